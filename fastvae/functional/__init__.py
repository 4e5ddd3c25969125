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

from .categorical import categorical_nll
from .continuous import (
    bernoulli_nll,
    continuous_bernoulli_nll,
    gaussian_head_nll,
    gaussian_nll,
    laplace_head_nll,
    laplace_nll,
    student_t_head_nll,
    student_t_nll,
)
from .counts import (
    negative_binomial_logits_nll,
    negative_binomial_nll,
    poisson_nll,
    zero_inflated_negative_binomial_logits_nll,
    zero_inflated_negative_binomial_nll,
)
from .discretized import discretized_logistic_mixture_nll, discretized_logistic_nll
from .latents import gaussian_kl, reparameterize_kl

__all__ = [
    "bernoulli_nll",
    "categorical_nll",
    "continuous_bernoulli_nll",
    "discretized_logistic_mixture_nll",
    "discretized_logistic_nll",
    "gaussian_head_nll",
    "gaussian_kl",
    "gaussian_nll",
    "laplace_head_nll",
    "laplace_nll",
    "negative_binomial_logits_nll",
    "negative_binomial_nll",
    "poisson_nll",
    "reparameterize_kl",
    "student_t_head_nll",
    "student_t_nll",
    "zero_inflated_negative_binomial_logits_nll",
    "zero_inflated_negative_binomial_nll",
]
