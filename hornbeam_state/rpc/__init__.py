"""Calls between nodes: who is there, what they offer, and how it is called."""
