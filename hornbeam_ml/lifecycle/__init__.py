"""The life of a worker among the others of its server: booting, leaving, being replaced."""
