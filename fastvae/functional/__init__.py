"""One function per operation: what it computes, what it accepts, and the call of the backend that serves it.

Every function checks its inputs before any work and then hands them to the backend that serves the tensor's device: a
compiled kernel or `fastvae.reference`, where each formula is written out with its source. Dimension 0 is the batch,
every further dimension belongs to the event and is summed; results are in nats, float32 per row (float64 for float64
inputs).

Accepted dtypes, the same on every backend:

| argument                                 | dtypes                                                                    |
|------------------------------------------|---------------------------------------------------------------------------|
| logits, mean, params, mu                 | float16, bfloat16, float32, float64                                       |
| logvar, prior_mu, prior_logvar, eps      | that of the line above (a 0-dim logvar of a half mean also: float32)      |
| target                                   | that of the parameters, float32, or uint8, which is read as x / 255       |
| target of a Bernoulli                    | bool too                                                                  |
| target of a categorical                  | int64 and nothing else                                                    |
| target of counts                         | that of the parameters, float32, uint8 (as it is), uint16, int32, int64   |
| (G,) dispersion, library                 | that of the parameters; beside half types float32 too                     |
| target of a discretised logistic         | uint8 alone, which is the level itself                                    |
| seed                                     | int64                                                                     |

A value or shape that does not fit is a ValueError, as is a wrong device; a wrong dtype or kind is a TypeError.
"""

from . import categorical, continuous, counts, discretized, latents
from .categorical import *
from .continuous import *
from .counts import *
from .discretized import *
from .latents import *

__all__: list[str] = []
__all__ += categorical.__all__
__all__ += continuous.__all__
__all__ += counts.__all__
__all__ += discretized.__all__
__all__ += latents.__all__
