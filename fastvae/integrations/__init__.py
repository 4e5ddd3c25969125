"""Into the programs that people already run: a module for each, named after the package that it serves.

Importing one of them does not import that package; only what it offers does, when it is called.
"""
