"""What is wrong with what a user gave."""

__all__ = ["InputError"]


class InputError(Exception):
    """Something that a user can mend: the message is one line, to be shown without a traceback."""
