"""How calls get from one process to another."""
