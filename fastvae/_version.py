"""The version, in a file that imports nothing: whoever wants to know it need not load torch."""

__version__ = "0.1.0"
