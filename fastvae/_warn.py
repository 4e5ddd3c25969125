"""Warnings that point at the user's line."""

import sys
import warnings


def warn(message: str, category: type[Warning]) -> None:
    """Call `warnings.warn` so that it points at the user's line, past any frames of fastvae and torch in between."""
    frame, level = sys._getframe(1), 2
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] in (
        "fastvae",
        "torch",
    ):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, category, stacklevel=level)
