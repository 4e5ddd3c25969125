"""Helpers for training in several processes."""

from . import messages

__all__ = ["is_main_process", "print_once"]


def is_main_process() -> bool:
    """Return whether this is the process that writes files and prints messages. Lightning starts the others."""
    from lightning.fabric.utilities.rank_zero import rank_zero_only

    rank: int = rank_zero_only.rank  # type: ignore[attr-defined]
    return rank == 0


def print_once(line: str) -> None:
    """Print a line in the main process only."""
    if is_main_process():
        messages.print_line(line)
