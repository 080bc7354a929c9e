"""What the machine has: its devices, number formats, threads and processes."""
