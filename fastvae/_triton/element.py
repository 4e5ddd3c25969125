"""The function of one element, which a likelihood with independent elements passes to the kernel of elementwise.py.

    element(first, second, target, scalar, shape, offset)
        -> (value, e, first_grad, second_grad, scalar_grad)

    first, second   tiles of the parameters, float32 or float64; `second` is `first` if there is only one parameter
    target          the data, as numbers; uint8 is already divided by 255, unless the variant has `counts`
                    (fastvae/_spec.py)
    scalar          one number for all elements, if the variant has one
    shape, offset   two more numbers, which the host computes from the variant's constants: a parameter of the density
                    and its normaliser, or two parameters
    value + log(1 + e)   the negative log-likelihood of each element in nats. A likelihood with a term log(1 + e), where
                    e is in [0, 1], leaves this term to the kernel, which takes one logarithm for many elements
                    (`log_term`)
    *_grad         the derivatives by first, second and scalar

A likelihood returns 0.0 for anything it does not need.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple


class Element(NamedTuple):
    """The function of an element, and what the kernel must know about it. `constants` are those of the variant."""

    function: Any
    log_term: bool = False
    warps_64: int = 1  # a factor for the number of warps in float64, for elements that need many registers
    scalar_of: Callable[[Sequence[float]], float] = lambda constants: 0.0  # `scalar` if it is not a tensor
    shape_of: Callable[[Sequence[float]], float] = lambda constants: 0.0
    offset_of: Callable[[Sequence[float]], float] = lambda constants: 0.0
