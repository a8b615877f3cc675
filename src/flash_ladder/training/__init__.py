"""One run: the loop, the optimizer, the devices, the checkpoints and the record it leaves."""
