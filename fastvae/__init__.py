"""The ELBO at memory speed: fused kernels in place of the hand-written VAE loss.

>>> elbo = fastvae.ELBO("bernoulli")
>>> z, kl = elbo.reparameterize(mu, logvar)
>>> loss = elbo(decoder(z), x, kl=kl).loss
"""

from . import functional, likelihoods, reference
from ._version import __version__
from .backends import empty_cache, set_backend, show_config, use_backend
from .elbo import ELBO, ELBOOutput
from .graphs import graph_step

__all__ = [
    "ELBO",
    "ELBOOutput",
    "__version__",
    "empty_cache",
    "functional",
    "graph_step",
    "likelihoods",
    "reference",
    "set_backend",
    "show_config",
    "use_backend",
]
