"""The backend "triton": `fastvae._triton`, whose ops are in `torch.ops.fastvae_triton`."""

import importlib

from .base import Backend, Missing, from_ops

INSTALL = 'pip install -U "triton>=3.6"'


def load() -> Backend:
    try:
        importlib.import_module("fastvae._triton")
    except (ImportError, OSError) as error:
        first_line = str(error).partition("\n")[0]
        if getattr(error, "name", None) == "triton":  # triton is missing or too old, and the message says so
            raise Missing(first_line) from error
        raise Missing(f"importing its kernels failed ({first_line}); try: {INSTALL}") from error
    return from_ops("triton", "fastvae_triton")
