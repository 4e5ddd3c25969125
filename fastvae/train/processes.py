"""Several processes train as one: which of them writes and speaks."""

from collections.abc import Callable

from . import messages

__all__ = ["is_first", "speaker"]


def is_first() -> bool:
    """Whether this process writes and speaks. Lightning starts the others as further runs of the program."""
    from lightning.fabric.utilities.rank_zero import rank_zero_only

    rank: int = rank_zero_only.rank  # type: ignore[attr-defined]
    return rank == 0


def speaker() -> Callable[[str], None]:
    """What says a line to the user, once for all processes."""
    return messages.say if is_first() else lambda line: None
