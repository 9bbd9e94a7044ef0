"""What a checkpoint is. Reads nothing, and needs nothing but the standard library."""
