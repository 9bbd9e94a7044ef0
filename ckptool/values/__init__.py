"""From bytes to numbers and back."""
