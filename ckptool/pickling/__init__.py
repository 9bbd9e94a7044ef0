"""Torch's pickles, both ways. Nothing that a pickle names is imported or run."""
