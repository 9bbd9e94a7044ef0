"""The benchmark of mapping: real pairs, harder versions of them, simple methods beside ckptool. README.md says more."""
