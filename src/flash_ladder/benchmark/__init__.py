"""Attention alone, measured beside its peers: speed, memory, error, masks, their tables and pictures; and tiles tuned."""
