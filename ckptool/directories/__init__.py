"""Checkpoints of several files: a directory, or the index of one."""
