"""What a store can be kept in."""
