"""Many runs as one: a sweep's points, a process each, and the report of what they found."""
