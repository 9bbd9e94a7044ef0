"""How the pairs beyond the given ones were made; needs the libraries that README.md names, and is not part of a run."""
