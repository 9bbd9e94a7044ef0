"""Ranks of tensor and pipeline parallelism: their layouts, the rules by which they are joined, and joining."""
