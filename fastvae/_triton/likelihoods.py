"""The table of likelihoods, and one Triton function for each kind of element.

To add one: its function here and its row in `LIKELIHOODS`. The kernels of nll.py call the function for every tile.

    element(first, second, target, scalar) -> (value, e, first_slope, second_slope, scalar_slope)

    first, second   tiles of the parameters, float32 or float64; of one parameter, `second` is `first` again
    target          the data, as numbers: uint8 is x / 255 already
    scalar          one number for all elements, where the row has one
    value + log(1 + e)   the negative log-likelihood of each element in nats. A likelihood with a term log(1 + e), e in
                    [0, 1], leaves it to the kernel, which takes one logarithm for many elements (`log_term`)
    *_slope         its derivatives by first, second and scalar

What a likelihood has no use for is returned as 0.0.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import triton
import triton.language as tl

from .elementary import exp

_HALF_LOG_2PI: tl.constexpr = tl.constexpr(0.9189385332046727)


@triton.jit
def bernoulli(logit, _, target, scalar):
    """-log Bernoulli(t; sigmoid(a)) = max(a, 0) - a t + log(1 + e^-|a|)."""
    e = tl.exp(-tl.abs(logit))
    slope = tl.where(logit < 0.0, e, 1.0) / (1.0 + e) - target
    value = tl.where(logit < 0.0, 0.0, logit) - logit * target
    return value, e, slope, 0.0, 0.0


@triton.jit
def gaussian(mean, _, target, logvar):
    """-log N(t; m, e^v), one v for all elements."""
    difference = mean - target
    slope = difference * exp(-logvar)
    half_square = 0.5 * difference * slope
    return half_square + (0.5 * logvar + _HALF_LOG_2PI), 0.0, slope, 0.0, 0.5 - half_square


@triton.jit
def gaussian_per_element(mean, logvar, target, scalar):
    """-log N(t; m, e^v), a v for every element."""
    difference = mean - target
    slope = difference * exp(-logvar)
    half_square = 0.5 * difference * slope
    return half_square + (0.5 * logvar + _HALF_LOG_2PI), 0.0, slope, 0.5 - half_square, 0.0


class Likelihood(NamedTuple):
    """What the ops and kernels know of a likelihood besides its element."""

    element: Any
    tensors: int = 1  # the length of `params`
    packed: bool = False  # one tensor (B, 2C, ...) holds first and second, along dimension 1
    has_scalar: bool = False  # the last tensor is 0-dimensional: `scalar`
    is_location: bool = True  # a density of (target - first): the target's derivative is the first's, negated
    log_term: bool = False
    scalar_of: Callable[[Sequence[float]], float] = lambda constants: 0.0  # `scalar` where no tensor holds it
    family: str = (
        "elementwise"  # the function of nll.EVALUATE that does the work; others than this have no element
    )


LIKELIHOODS = {
    "bernoulli": Likelihood(bernoulli, is_location=False, log_term=True),
    "gaussian": Likelihood(gaussian, scalar_of=lambda constants: 2 * math.log(constants[0])),
    "gaussian_learned": Likelihood(gaussian, tensors=2, has_scalar=True),
    "gaussian_per_element": Likelihood(gaussian_per_element, tensors=2),
    "gaussian_head": Likelihood(gaussian_per_element, packed=True),
    "discretized_logistic": Likelihood(None, is_location=False, family="logistic"),
    "discretized_logistic_mixture": Likelihood(None, is_location=False, family="logistic"),
}
