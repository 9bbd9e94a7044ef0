"""Partial loading: loads what fits, adapts shapes, initialises the rest, and sets up fine-tuning."""
