"""Finds which tensors of one checkpoint become which tensors of another, from names, shapes, order and values."""
