"""Conventions of every function of this package: dtypes, data as numbers, products and sums with infinite operands."""

import math

import torch
from torch import Tensor


def compute_dtype(tensor: Tensor) -> torch.dtype:
    """The dtype in which sums are computed: float64 for float64, and float32 for all others."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def read_target(target: Tensor, dtype: torch.dtype) -> Tensor:
    """Data as numbers. uint8 pixels become x / 255, bool becomes 0 or 1, and floats are unchanged."""
    value = target.to(dtype)
    return value / 255 if target.dtype == torch.uint8 else value


def read_counts(target: Tensor, dtype: torch.dtype) -> Tensor:
    """Counts as numbers. Integers of every type keep their value, including uint8."""
    return target.to(dtype)


def sum_event(value: Tensor, weight: Tensor | None = None) -> Tensor:
    """Sum over every dimension but the batch: (B, ...) -> (B,). Elements are multiplied by `weight`, if it is given."""
    value = with_weight(value, weight)
    # torch takes an empty list of dimensions to mean all of them, so a tensor of rank 1 is returned unchanged.
    return value.sum(tuple(range(1, value.dim()))) if value.dim() > 1 else value


def with_weight(value: Tensor, weight: Tensor | None) -> Tensor:
    """`value` times `weight`, which is None for 1. A weight of 0 gives 0 even for an infinite value or a NaN."""
    if weight is None:
        return value
    return torch.where(weight == 0, 0.0, value * weight.to(value.dtype))


def without_removed(weight: Tensor | None, *tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors with 1 in place of each element of weight 0, so that whatever is there has no part in any gradient.

    A gradient of 0 would not be enough, because 0 times an infinite derivative is NaN. All likelihoods are finite for
    parameters and data of 1.
    """
    if weight is None:
        return tensors
    removed = weight == 0
    return tuple(tensor.masked_fill(removed, 1) for tensor in tensors)


def weighted(weight: Tensor, x: Tensor) -> Tensor:
    """`weight` times `x`. A weight of 0 gives 0 even for an infinite x."""
    return weight * torch.where((weight == 0) & x.isinf(), 0.0, x)


def scaled(distance: Tensor, log_scale: Tensor) -> Tensor:
    """`distance` e^-log_scale.

    The distance is multiplied twice by the square root of e^-log_scale, which is finite for a range of log-scales twice
    as wide. A distance of 0 gives 0 for every scale, so the log-scale is raised there to one whose inverse is finite.
    """
    smallest = -709.0 if log_scale.dtype == torch.float64 else -88.0
    log_scale = torch.where((distance == 0) & (log_scale < smallest), smallest, log_scale)
    root = torch.exp(log_scale / -2)
    return distance * root * root


def plus(size: Tensor, summand: Tensor) -> Tensor:
    """`size` + `summand`. An infinite `size` is the result whatever the summand, so inf - inf does not occur."""
    return torch.where(size == math.inf, size, size + summand)
