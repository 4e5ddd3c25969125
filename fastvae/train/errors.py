"""The error for bad user input."""

__all__ = ["InputError"]


class InputError(Exception):
    """An error that the user can fix. The message is a single line, which is shown without a traceback."""
