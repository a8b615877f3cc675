"""Many runs as one command: a process each, side by side where there are GPUs for it, and a result whatever becomes of it."""
