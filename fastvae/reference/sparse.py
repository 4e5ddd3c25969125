"""Linear layers of sparse input."""

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["sparse_linear"]


def sparse_linear(
    values: Tensor, starts: Tensor, columns: Tensor, weight: Tensor, bias: Tensor | None
) -> Tensor:
    """x W^T + b for the matrix x (B, I) whose row r has values[i] in columns[i], for i from starts[r] to starts[r + 1].

    Values in the same place are added, as torch does for sparse CSR tensors.
    """
    lengths = starts.diff()
    rows = torch.repeat_interleave(torch.arange(lengths.numel(), device=values.device), lengths)
    x = torch.zeros(lengths.numel(), weight.shape[1], dtype=values.dtype, device=values.device)
    return F.linear(x.index_put((rows, columns), values, accumulate=True), weight, bias)
