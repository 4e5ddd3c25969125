"""Likelihoods: what the decoder's output means. Each is a small module that an `ELBO` takes by name or by object.

Your own: any `nn.Module` with `nll(params, target) -> (B,)` works in `fastvae.ELBO`. Subclass `Likelihood` and give
`kernel_call` instead of `nll` to have a fused kernel serve it.
"""

from . import base, categorical, continuous, counts, discretized, product
from .base import *
from .base import KernelCall as KernelCall
from .categorical import *
from .continuous import *
from .counts import *
from .discretized import *
from .names import BY_NAME as BY_NAME
from .names import get as get
from .product import *

__all__: list[str] = []
__all__ += base.__all__
__all__ += categorical.__all__
__all__ += continuous.__all__
__all__ += counts.__all__
__all__ += discretized.__all__
__all__ += product.__all__
