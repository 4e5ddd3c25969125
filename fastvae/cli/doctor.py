"""`fastvae doctor`: what runs where. It imports nothing but the core, so that it runs when something is missing."""

from fastvae import backend, show_config

from .ending import fail

__all__ = ["doctor"]


def doctor() -> int:
    """Say what runs where, and what to do about anything that is missing. Exit code 0: native serves the CPU."""
    print(show_config())
    native = backend._serve("native", "cpu")  # noqa: SLF001
    if native is None:
        reason = backend._reason("native", "cpu")  # noqa: SLF001
        return fail(f"native does not serve the CPU: {reason}", code=1)
    return 0
