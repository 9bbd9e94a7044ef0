"""What we do: pure functions from checkpoints to checkpoints and reports. Nothing here reads a file."""
