"""What this machine is and what it can run: its hardware and packages, the decided device and backend, the doctor."""
