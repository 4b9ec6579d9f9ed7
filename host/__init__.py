"""The only code that imports the host."""
