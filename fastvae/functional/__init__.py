"""One function per operation: it documents what is computed and accepted, and calls the backend.

Every function checks its inputs before any work and then passes them to the backend that serves the tensors' device: a
compiled kernel, or `fastvae.reference`, where each formula is written out with its source. Dimension 0 is the batch;
all other dimensions belong to the event and are summed. Results are in nats, float32 per row (float64 for float64
inputs).

The accepted dtypes are the same on every backend:

| argument                                 | dtypes                                                                    |
|------------------------------------------|---------------------------------------------------------------------------|
| logits, mean, params, mu, z              | float16, bfloat16, float32, float64                                       |
| logvar, prior_mu, prior_logvar, eps      | the dtype of the line above; a 0-dim logvar may be float32 beside half    |
| target                                   | the parameters' dtype, float32, or uint8, which is read as x / 255        |
| target of a Bernoulli                    | also bool                                                                 |
| target of a categorical                  | only int64                                                                |
| target of counts                         | the parameters' dtype, float32, uint8 (not scaled), uint16, int32, int64  |
| (G,) dispersion, library, log_weight     | the parameters' dtype; beside half precision also float32                 |
| target of a discretised logistic         | only uint8, which is the level itself                                     |
| seed                                     | int64                                                                     |

A wrong value, shape or device raises ValueError; a wrong type or dtype raises TypeError.
"""

from . import categorical, continuous, counts, discretized, latents, mixture, sparse
from .categorical import *
from .continuous import *
from .counts import *
from .discretized import *
from .latents import *
from .mixture import *
from .sparse import *

__all__: list[str] = []
__all__ += categorical.__all__
__all__ += continuous.__all__
__all__ += counts.__all__
__all__ += discretized.__all__
__all__ += latents.__all__
__all__ += mixture.__all__
__all__ += sparse.__all__
