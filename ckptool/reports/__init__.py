"""Reports in other people's formats, made from the dataclasses of operations."""
