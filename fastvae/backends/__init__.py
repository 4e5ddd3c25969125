"""The backends: which of them serves a tensor, and why the others do not.

A backend is a set of functions with fixed positional signatures (`Backend`). There are three:

- "reference": `fastvae.reference`, plain PyTorch, which is always available on any device;
- "native": the compiled extension `fastvae._C`, whose ops are in `torch.ops.fastvae`;
- "triton": `fastvae._triton`, whose ops are in `torch.ops.fastvae_triton`.

`choose.py` holds the setting and makes the choice. `native.py` and `triton.py` load the backends. `available.py` keeps
the loaded ones, and the reasons why others could not be loaded. `doctor.py` reports all of this.
"""

from .available import reason, serves
from .base import NAMES, OPS, Backend
from .choose import empty_cache, for_tensor, serve, set_backend, use_backend
from .doctor import show_config

__all__ = [
    "NAMES",
    "OPS",
    "Backend",
    "empty_cache",
    "for_tensor",
    "reason",
    "serve",
    "serves",
    "set_backend",
    "show_config",
    "use_backend",
]
