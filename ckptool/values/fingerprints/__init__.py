"""What a tensor's values look like, in numbers that fit in memory, and which tensors of two sides have like ones."""
