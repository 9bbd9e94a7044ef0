"""Files that `torch.save`, `torch.jit.save` and plain `pickle` write."""
