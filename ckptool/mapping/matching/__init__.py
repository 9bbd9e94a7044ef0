"""Matches the tensors of two sides by what their names, shapes, order and neighbours say."""
