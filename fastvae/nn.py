"""Layers for models of sparse data.

>>> encoder = nn.Sequential(fastvae.nn.SparseLinear(20_000, 128, log1p=True), nn.ReLU(), nn.Linear(128, 20))
>>> head = encoder(counts)                                   # counts: torch.sparse_csr (B, 20_000)
"""

import math
from typing import Any

import torch
from torch import Tensor, nn

from .functional import sparse_linear

__all__ = ["SparseLinear"]


class SparseLinear(nn.Linear):
    """A first layer that reads a sparse matrix: y = x W^T + b, or log(1 + x) W^T + b with `log1p=True`.

    It replaces `nn.Linear`: the same arguments, the same initial weights for a seed, and a `state_dict` that each loads
    from the other. A batch of counts, of which 91 to 97 % are 0, is read as it is stored, forward and backward; the
    weight's gradient is dense. Dense input is served as well, by torch.

    The weight has the shape (out_features, in_features), but is stored by columns, because each stored value of the
    input meets one of them. `load_state_dict(assign=True)` and other replacements of the weight may change its order,
    which costs a copy of the weight in every call, and nothing else.

    Args:
        in_features, out_features: I and O.
        bias: whether there is a bias.
        device, dtype: of the parameters.
        log1p: take log(1 + x) of the input first.

    `forward(x)` takes x (B, I), torch.sparse_csr, or dense (..., I), and returns (B, O); see
    `fastvae.functional.sparse_linear` for dtypes and errors. Under autocast the product is computed in float32, and the
    result has autocast's dtype.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        log1p: bool = False,
    ) -> None:
        super().__init__(in_features, out_features, bias, device, dtype)
        self.log1p = log1p
        self.weight = nn.Parameter(self.weight.detach().t().contiguous().t())

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw weight and bias as `nn.Linear` does, from U(-1/sqrt(I), 1/sqrt(I)), with the same values for a seed."""
        # Random numbers fill memory in its order, which here is not that of nn.Linear.
        drawn = torch.empty_like(self.weight, memory_format=torch.contiguous_format)
        self.weight.copy_(nn.init.kaiming_uniform_(drawn, a=math.sqrt(5)))
        if self.bias is not None:
            bound = 1 / math.sqrt(self.in_features) if self.in_features > 0 else 0
            nn.init.uniform_(self.bias, -bound, bound)

    def forward(self, x: Tensor) -> Tensor:
        return sparse_linear(x, self.weight, self.bias, log1p=self.log1p)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, log1p={self.log1p}"
