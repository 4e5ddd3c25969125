"""How a command fails: with one line on stderr, an exit code and no traceback."""

import contextlib
import functools
import sys
from collections.abc import Callable
from typing import Any

__all__ = ["Interrupted", "catch_interrupt", "fail"]


class Interrupted(Exception):
    """Ctrl-C. Typer would catch a KeyboardInterrupt itself and exit without a message."""


def fail(message: str, code: int = 2) -> int:
    """Print the message to stderr and return the exit code."""
    if sys.stderr is not None:
        with contextlib.suppress(OSError):
            print("fastvae:", " ".join(message.split()), file=sys.stderr)
    return code


def catch_interrupt(command: Callable[..., None]) -> Callable[..., None]:
    """Wrap a command so that Ctrl-C raises `Interrupted`."""

    @functools.wraps(command)
    def run(*args: Any, **kwargs: Any) -> None:
        try:
            command(*args, **kwargs)
        except KeyboardInterrupt as stop:
            raise Interrupted(*stop.args) from None

    return run
