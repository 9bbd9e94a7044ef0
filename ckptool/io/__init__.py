"""Raw bytes, in and out."""
