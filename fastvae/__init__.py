"""The ELBO at memory speed: fused kernels in place of the hand-written VAE loss.

>>> elbo = fastvae.ELBO("bernoulli")
>>> z, kl = elbo.reparameterize(mu, logvar)
>>> loss = elbo(decoder(z), x, kl=kl).loss
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from ._version import __version__

if TYPE_CHECKING:
    from . import functional, likelihoods, nn, posteriors, priors, reference, regularizers
    from .backends import empty_cache, set_backend, show_config, use_backend
    from .bounds import IWAE, IWAEOutput
    from .elbo import ELBO, ELBOOutput
    from .functional.ranges import set_range_warnings
    from .graphs import graph_step

__all__ = [
    "ELBO",
    "IWAE",
    "ELBOOutput",
    "IWAEOutput",
    "__version__",
    "empty_cache",
    "functional",
    "graph_step",
    "likelihoods",
    "nn",
    "posteriors",
    "priors",
    "reference",
    "regularizers",
    "set_backend",
    "set_range_warnings",
    "show_config",
    "use_backend",
]

# These names are imported on first access because they need torch: `fastvae --help` then does not wait for it, and
# `fastvae doctor` can report that it is missing.
_MODULES = (
    "backends",
    "bounds",
    "elbo",
    "functional",
    "graphs",
    "likelihoods",
    "nn",
    "posteriors",
    "priors",
    "reference",
    "regularizers",
)
_MODULE_OF_NAME = {
    "ELBO": "elbo",
    "ELBOOutput": "elbo",
    "IWAE": "bounds",
    "IWAEOutput": "bounds",
    "empty_cache": "backends",
    "graph_step": "graphs",
    "set_backend": "backends",
    "set_range_warnings": "functional.ranges",
    "show_config": "backends",
    "use_backend": "backends",
}


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return import_module(f"{__name__}.{name}")
    if name not in _MODULE_OF_NAME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(f"{__name__}.{_MODULE_OF_NAME[name]}"), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
