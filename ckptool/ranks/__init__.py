"""Work that is divided over the ranks of torchrun."""
