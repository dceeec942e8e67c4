"""What happens in the arbiter before it forks, and what must not."""
