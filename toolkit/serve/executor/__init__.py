"""What runs a batch: the CPU here; a GPU and a simulated device speak the same protocol."""
