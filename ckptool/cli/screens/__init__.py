"""What the commands print for people, as lines of text, from their reports."""
