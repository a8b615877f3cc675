"""FlashAttention-3 for Hopper, in Gluon; launch.py is the host's side."""
