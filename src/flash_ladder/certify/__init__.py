"""Whether two implementations of attention make the same model of a transformers model: scripts/certify.py."""
