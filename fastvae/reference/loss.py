"""`nll` and `nll_elements`, which evaluate any likelihood through the interface that all backends share."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .._spec import VARIANTS, Variant
from . import categorical, continuous, counts, discretized

__all__ = ["REDUCTIONS", "nll", "nll_elements"]

FAMILIES: dict[str, Any] = {
    "continuous": continuous,
    "counts": counts,
    "categorical": categorical,
    "discretized": discretized,
}


def _entry(variant: Variant) -> Callable[..., Tensor]:
    """Wraps a variant's function in the interface of backends: nll(params, target, constants, **keywords)."""
    function = getattr(FAMILIES[variant.family], variant.function)
    constants = variant.constants

    def nll(params: Sequence[Tensor], target: Tensor, numbers: Sequence[float], **keywords: Any) -> Tensor:
        i = 0
        for constant in constants:
            if constant.length > 1:
                keywords[constant.name] = numbers[i : i + constant.length]
            else:
                keywords[constant.name] = int(numbers[i]) if constant.whole else numbers[i]
            i += constant.length
        return function(params[0], target, *params[1:], **keywords)

    return nll


LIKELIHOODS = {name: _entry(variant) for name, variant in VARIANTS.items()}
REDUCTIONS = {"none": 0, "sum": 1, "mean": 2}


def nll(
    likelihood: str,
    params: Sequence[Tensor],
    target: Tensor,
    constants: Sequence[float],
    kl: Tensor | None = None,
    beta: Tensor | None = None,
    reduction: int = 0,
    weight: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(loss, nll), where loss = reduce(nll + beta kl) is the negative ELBO ([KW], equation 3) and nll is (B,).

    `reduction` is a value of `REDUCTIONS`; the mean is over the batch. Without `kl`, loss = reduce(nll). A target with
    fewer rows than the parameters is shared by several draws, which are stored one after another. `weight`, of the
    target's shape or with sizes of 1, multiplies the nll of each element (of each pixel, for a mixture of discretised
    logistics). Elements of weight 0 are left out: even NaN or inf there reach neither value nor gradient.
    """
    if target.shape[0] != params[0].shape[0]:
        draws = params[0].shape[0] // target.shape[0]
        if weight is not None and weight.shape[0] == target.shape[0]:
            weight = _repeated(weight, draws)
        target = _repeated(target, draws)
    rows = LIKELIHOODS[likelihood](params, target, constants, weight=weight)
    total = rows
    if kl is not None:
        total = rows + (kl if beta is None else beta * kl)
    return reduce_rows(total, reduction), rows


def reduce_rows(rows: Tensor, reduction: int) -> Tensor:
    """Reduce the losses of the rows, (B,), as `reduction`, a value of `REDUCTIONS`, says."""
    if reduction == REDUCTIONS["sum"]:
        return rows.sum()
    return rows.mean() if reduction == REDUCTIONS["mean"] else rows


def _repeated(target: Tensor, draws: int) -> Tensor:
    dense = target if target.layout == torch.strided else target.to_dense()
    return dense.expand(draws, *dense.shape).flatten(0, 1)


def nll_elements(
    likelihood: str,
    params: Sequence[Tensor],
    target: Tensor,
    constants: Sequence[float],
    factor: float = 1.0,
    weight: Tensor | None = None,
) -> Tensor:
    """`factor` times the nll of each element, for a likelihood whose function supports `reduction="none"`. The
    elements are multiplied by `weight`, too, as in `nll`."""
    values = LIKELIHOODS[likelihood](params, target, constants, reduction="none", weight=weight)
    return values if factor == 1 else factor * values
