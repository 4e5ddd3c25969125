"""`fastvae doctor`. It imports only the core of the package, so that it runs when other packages are missing."""

from .failures import fail

__all__ = ["doctor"]


def doctor() -> int:
    """Show which kernels run on this machine and how to get those that are missing.

    The exit code is 0 if the native kernels run on the CPU.
    """
    from fastvae import backends, show_config  # they import torch, which may be missing

    print(show_config())
    if backends.serve("native", "cpu") is None:
        return fail(f"the native kernels do not run on the CPU: {backends.reason('native', 'cpu')}", code=1)
    return 0
