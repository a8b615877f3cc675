"""Flash Ladder: a GPT training recipe whose attention climbs with the GPU."""
