"""How a command ends that does not end well: one line on stderr, an exit code, and no traceback."""

import contextlib
import functools
import sys
from collections.abc import Callable
from typing import Any

__all__ = ["Interrupted", "fail", "stoppable"]


class Interrupted(Exception):
    """Ctrl-C, under a name of our own: typer would end the program itself, without a word."""


def fail(message: str, code: int = 2) -> int:
    """Say it; returns the exit code."""
    if sys.stderr is not None:
        with contextlib.suppress(OSError):
            print("fastvae:", " ".join(message.split()), file=sys.stderr)
    return code


def stoppable(command: Callable[..., None]) -> Callable[..., None]:
    """A command that Ctrl-C ends as `Interrupted`."""

    @functools.wraps(command)
    def run(*args: Any, **kwargs: Any) -> None:
        try:
            command(*args, **kwargs)
        except KeyboardInterrupt as stop:
            raise Interrupted(*stop.args) from None

    return run
