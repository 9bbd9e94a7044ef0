"""The functions of `import ckptool`: the one place where formats, operations and values meet."""
