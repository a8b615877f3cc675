"""What a call costs: FLOPs, memory and time."""
