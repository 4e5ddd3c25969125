"""Types, data as numbers, and sums: what holds for every function of this package."""

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
