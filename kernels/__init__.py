"""Attention kernels, one operation on several backends; torch and triton only."""
