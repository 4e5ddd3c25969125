"""Likelihoods define what the decoder's output means. An `ELBO` takes them as modules, or some by name.

You can write your own: `fastvae.ELBO` accepts any `nn.Module` with `nll(params, target) -> (B,)`. To use a fused
kernel, subclass `Likelihood` and define `kernel_call` instead of `nll`.
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
