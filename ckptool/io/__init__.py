"""Reading and writing bytes: files, zip archives, atomic outputs."""
