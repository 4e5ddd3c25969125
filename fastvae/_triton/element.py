"""The function of an element, of likelihoods whose elements are each for themselves: what elementwise.py is handed.

    element(first, second, target, scalar, shape, offset)
        -> (value, e, first_slope, second_slope, scalar_slope)

    first, second   tiles of the parameters, float32 or float64; of one parameter, `second` is `first` again
    target          the data, as numbers: uint8 is x / 255 already, unless the row `counts` (fastvae/_spec.py)
    scalar          one number for all elements, where the row has one
    shape, offset   two more, made of the row's constants on the host: a parameter of the density and its normaliser,
                    or two parameters
    value + log(1 + e)   the negative log-likelihood of each element in nats. A likelihood with a term log(1 + e), e in
                    [0, 1], leaves it to the kernel, which takes one logarithm for many elements (`log_term`)
    *_slope         its derivatives by first, second and scalar

What a likelihood has no use for is returned as 0.0.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple


class Element(NamedTuple):
    """A function of an element, and what the kernel must know of it besides. `constants` are those of the row."""

    function: Any
    log_term: bool = False
    warps_64: int = 1  # times the usual number, in float64: for an element that fills many registers
    scalar_of: Callable[[Sequence[float]], float] = lambda constants: 0.0  # `scalar` where no tensor holds it
    shape_of: Callable[[Sequence[float]], float] = lambda constants: 0.0
    offset_of: Callable[[Sequence[float]], float] = lambda constants: 0.0
