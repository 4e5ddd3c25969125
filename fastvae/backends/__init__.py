"""The backends: who serves a tensor, and why another does not.

A backend is four functions of fixed positional signatures (`Backend`). There are three:

- "reference": `fastvae.reference`, plain PyTorch, always there, any device;
- "native": the compiled extension `fastvae._C`, whose ops live in `torch.ops.fastvae`;
- "triton": `fastvae._triton`, whose ops live in `torch.ops.fastvae_triton`.

`choose.py` has the setting and makes the choice, `native.py` and `triton.py` load what it may choose from,
`available.py` keeps what was loaded and the reasons of what was not, `doctor.py` prints all of that.
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
