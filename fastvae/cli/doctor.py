"""`fastvae doctor`: what runs where. It imports nothing but the core, so that it runs when something is missing."""

from .ending import fail

__all__ = ["doctor"]


def doctor() -> int:
    """Say what runs where, and what to do about anything that is missing. Exit code 0: native serves the CPU."""
    from fastvae import backends, show_config  # they import torch, which may be what is missing

    print(show_config())
    if backends.serve("native", "cpu") is None:
        return fail(f"native does not serve the CPU: {backends.reason('native', 'cpu')}", code=1)
    return 0
