"""What runs an embedding model: one file for each library."""
