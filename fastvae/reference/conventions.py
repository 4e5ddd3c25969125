"""Types, data as numbers, products and sums at their ends: what holds for every function of this package."""

import math

import torch
from torch import Tensor


def compute_dtype(tensor: Tensor) -> torch.dtype:
    """The type that sums are kept in: float64 for float64, else float32."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def read_target(target: Tensor, dtype: torch.dtype) -> Tensor:
    """Data as numbers: uint8 pixels are x / 255, bool is 0 or 1, floats are themselves."""
    value = target.to(dtype)
    return value / 255 if target.dtype == torch.uint8 else value


def read_counts(target: Tensor, dtype: torch.dtype) -> Tensor:
    """Counts as numbers: every integer type is itself, uint8 too."""
    return target.to(dtype)


def sum_event(value: Tensor) -> Tensor:
    """Sum over every dimension but the batch: (B, ...) -> (B,)."""
    # torch reads an empty list of dimensions as "all of them", so rank 1 has nothing to sum and goes its own way.
    return value.sum(tuple(range(1, value.dim()))) if value.dim() > 1 else value


def weighted(weight: Tensor, x: Tensor) -> Tensor:
    """`weight` x, of which no weight makes nothing of an infinite x too."""
    return weight * torch.where((weight == 0) & x.isinf(), 0.0, x)


def scaled(distance: Tensor, log_scale: Tensor) -> Tensor:
    """`distance` e^-log_scale, by the root of e^-log_scale twice, which is finite for twice as many scales.

    A distance of 0 is 0 scales whatever the scale; and so the smallest scales count there as one that has an inverse.
    """
    smallest = -709.0 if log_scale.dtype == torch.float64 else -88.0
    log_scale = torch.where((distance == 0) & (log_scale < smallest), smallest, log_scale)
    root = torch.exp(log_scale / -2)
    return distance * root * root


def plus(size: Tensor, summand: Tensor) -> Tensor:
    """`size` + `summand`, of which an infinite size is not taken away again."""
    return torch.where(size == math.inf, size, size + summand)
