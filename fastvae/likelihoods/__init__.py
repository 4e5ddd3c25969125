"""Likelihoods: what the decoder's output means. Each is a small module that an `ELBO` takes by name or by object.

Your own: any `nn.Module` with `nll(params, target) -> (B,)` works in `fastvae.ELBO`. Subclass `Likelihood` and give
`row` instead of `nll` to have a fused kernel serve it.
"""

from .base import Likelihood
from .base import Row as Row
from .categorical import Categorical
from .continuous import Bernoulli, ContinuousBernoulli, Gaussian, Laplace, StudentT
from .counts import NegativeBinomial, Poisson, ZeroInflatedNegativeBinomial
from .discretized import DiscretizedLogistic, DiscretizedLogisticMixture
from .names import BY_NAME as BY_NAME
from .names import get as get
from .product import Product

__all__ = [
    "Bernoulli",
    "Categorical",
    "ContinuousBernoulli",
    "DiscretizedLogistic",
    "DiscretizedLogisticMixture",
    "Gaussian",
    "Laplace",
    "Likelihood",
    "NegativeBinomial",
    "Poisson",
    "Product",
    "StudentT",
    "ZeroInflatedNegativeBinomial",
]
