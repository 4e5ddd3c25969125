"""The checks of `validate=True`: every value of a weight, of the data, and of the parameters that have a range.

Reading the values waits for the GPU. What has a weight of 0 is left out of the loss, so it may be anything.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .._spec import Variant
from .checks import is_dense
from .ranges import TOLERANCE

_NOT_NEGATIVE = "finite numbers that are at least 0"
_POSITIVE = "positive, finite numbers"


def check_values(
    where: str,
    names: Sequence[str],
    variant: Variant,
    params: Sequence[Tensor],
    target: Tensor,
    name: str,
    constants: Sequence[float],
    weight: Tensor | None,
) -> None:
    """Report the first value of the target or of a parameter that the likelihood cannot have.

    The arguments have passed the checks of the loss, which has returned `weight` with as many dimensions as the target.
    Parameters may have a dimension of draws before that of the batch.
    """
    kept = None if weight is None else weight != 0
    _check_data(where, variant, params[0], target, name, constants, kept)
    if variant.counts:
        eps = constants[0] if variant.constants else 0.0
        if kept is not None:
            kept = kept.expand(target.shape)
        for label, part, value in zip(names, variant.tensors, params, strict=True):
            _check_parameter(where, label, variant, part, value, eps, kept)


def check_weight_values(where: str, weight: object, name: str = "weight") -> None:
    """Report the first value of a weight that is negative, infinite or NaN."""
    # A weight of another type is left to the checks of the loss, which have the message for it.
    if isinstance(weight, Tensor) and weight.is_floating_point() and is_dense(weight):
        _check(where, name, weight, (weight >= 0) & (weight < math.inf), _NOT_NEGATIVE)


def check_columns(
    where: str, name: str, starts: Tensor, columns: Tensor, features: int, *, ordered: bool = True
) -> None:
    """Check that the columns of every row of a CSR target exist and, if they must be `ordered`, ascend."""
    wrong = torch.zeros_like(starts, dtype=torch.bool)
    wrong[0] = starts[0] != 0
    wrong[1:] = starts[1:] < starts[:-1]
    wrong[-1] |= starts[-1] != len(columns)
    if wrong.any():
        i = int(wrong.nonzero()[0])
        raise ValueError(
            f"fastvae.{where}: `{name}` must have crow_indices that rise from 0 to its {len(columns)} values, got "
            f"{int(starts[i])} at position {i}"
        )
    exist = (columns >= 0) & (columns < features)
    required, advice = f"col_indices from 0 to {features - 1}", ""
    valid = exist
    if ordered and exist.all():
        first_of_row = torch.zeros(len(columns) + 1, dtype=torch.bool, device=columns.device)
        first_of_row[starts] = True
        valid = first_of_row[:-1].clone()
        valid[1:] |= columns[1:] > columns[:-1]
        required = "ascending col_indices in every row, each once"
        advice = f"; did you mean {name}.to_dense().to_sparse_csr()?"
    if not valid.all():
        i = int((~valid).nonzero()[0])
        row = int((starts > i).nonzero()[0]) - 1
        raise ValueError(
            f"fastvae.{where}: `{name}` must have {required}, got {int(columns[i])} at position "
            f"{i - int(starts[row])} of row {row}{advice}"
        )


def _check_data(
    where: str,
    variant: Variant,
    first: Tensor,
    target: Tensor,
    name: str,
    constants: Sequence[float],
    kept: Tensor | None,
) -> None:
    if target.layout != torch.sparse_csr:
        valid, required = _valid_data(variant, first, target, constants)
        _check(where, name, target, valid, required, kept)
        return
    starts, columns, stored = target.crow_indices(), target.col_indices(), target.values()
    # The CPU's kernel takes the columns of a row in any order.
    check_columns(where, name, starts, columns, target.shape[1], ordered=target.device.type != "cpu")
    valid, required = _valid_data(variant, first, stored, constants)
    rows = torch.arange(len(target), device=starts.device).repeat_interleave(starts.diff())
    if kept is not None:
        valid = valid | ~kept.expand(target.shape)[rows, columns]
    if not valid.all():
        i = int((~valid).nonzero()[0])
        _raise(where, name, required, stored[i], (int(rows[i]), int(columns[i])))


def _valid_data(
    variant: Variant, first: Tensor, values: Tensor, constants: Sequence[float]
) -> tuple[Tensor, str]:
    """Where `values`, those of the target, are values that the likelihood can have, and which these are."""
    density, is_floating = variant.density, values.is_floating_point()
    if variant.counts:
        required = "counts, whole numbers that are at least 0"
        if not is_floating:
            return values.to(torch.int64) >= 0, required
        return (values >= 0) & (values.floor() == values) & (values < math.inf), required
    if variant.family == "categorical":
        classes, ignored = first.shape[-1], int(constants[0])
        valid = ((values >= 0) & (values < classes)) | (values == ignored)
        return valid, f"classes from 0 to {classes - 1}, or {ignored} (ignore_index)"
    if variant.family == "discretized":
        bits = int(constants[[constant.name for constant in variant.constants].index("bits")])
        return values <= 2**bits - 1, f"levels from 0 to {2**bits - 1} with `bits` {bits}"
    if density in ("bernoulli", "continuous_bernoulli"):
        if not is_floating:  # pixels and bools are always in range
            return torch.ones_like(values, dtype=torch.bool), ""
        return (values >= -TOLERANCE) & (values <= 1 + TOLERANCE), "numbers from 0 to 1"
    if density == "gamma":
        if constants[0] == 1:  # the exponential
            return (values >= 0) & (values < math.inf), _NOT_NEGATIVE
        return (values > 0) & (values < math.inf), _POSITIVE
    return values.isfinite(), "finite numbers"


def _check_parameter(
    where: str, name: str, variant: Variant, part: str, value: Tensor, eps: float, kept: Tensor | None
) -> None:
    """Check a parameter of counts. `part` is its name in the table."""
    if part == "log_rate":
        return
    if part in ("rate", "library", "mean1", "mean2") or (part == "mean" and eps > 0):
        valid, required = (value >= 0) & (value < math.inf), _NOT_NEGATIVE
    elif part in ("mean", "inverse_dispersion"):
        valid, required = (value > 0) & (value < math.inf), _POSITIVE
    elif part in ("zi_logits", "mixture_logits"):  # probabilities of 0 and 1 have limits
        valid, required = ~value.isnan(), "finite numbers, inf or -inf"
    elif variant.density == "multinomial":
        valid, required = value < math.inf, "finite numbers or -inf"
    else:
        valid, required = value.isfinite(), "finite numbers"
    if kept is not None:
        if part == "library":
            kept = kept.any(1)
        elif part == "logits" and "library" in variant.tensors:  # the softmax includes every gene of a cell
            kept = kept.any(1, keepdim=True)
        elif part.endswith("dispersion") and value.dim() == 1:  # one for every gene
            kept = kept.any(0)
    _check(where, name, value, valid, required, kept)


def _check(
    where: str, name: str, values: Tensor, valid: Tensor, required: str, kept: Tensor | None = None
) -> None:
    """Report the first position of `values` that is kept but not valid."""
    if kept is not None:
        valid = valid | ~kept
    if not valid.all():
        position = tuple((~valid).nonzero()[0].tolist())
        _raise(where, name, required, values[position], position)


def _raise(where: str, name: str, required: str, value: Tensor, position: tuple[int, ...]) -> None:
    raise ValueError(f"fastvae.{where}: `{name}` must hold {required}, got {value.item()} at {position}")
