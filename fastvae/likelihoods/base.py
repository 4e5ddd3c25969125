"""What all likelihood modules are."""

from typing import Any

import torch
from torch import Tensor, nn

from ..functional import loss

__all__ = ["Likelihood"]

# A backend's row: the likelihood's name there, its tensors and its constants.
KernelCall = tuple[str, list[Tensor], list[float]]


class Likelihood(nn.Module):
    """p(data | params): the base of the likelihood modules. `params` is what the decoder returns.

    A subclass gives `kernel_call`, `mean` and `sample`, or replaces `nll` altogether.
    """

    def kernel_call(self, params: Any) -> KernelCall:
        """The kernel that serves this likelihood: (name, tensors, constants) for the backend."""
        raise NotImplementedError(f"{type(self).__name__} must define `kernel_call` or `nll`")

    def nll(self, params: Any, target: Tensor) -> Tensor:
        """-log p(target | params) of every row, (B,), in nats."""
        name, tensors, constants = self.kernel_call(params)
        given = params if getattr(self, "from_probs", False) else None
        return loss.nll(name, tensors, target, constants, given=given)[0]

    def mean(self, params: Any) -> Tensor:
        """The expected data, differentiable: what to show as a reconstruction."""
        raise NotImplementedError(f"{type(self).__name__} must define `mean`")

    def sample(self, params: Any, generator: torch.Generator | None = None) -> Tensor:
        """A draw of data, without a gradient."""
        raise NotImplementedError(f"{type(self).__name__} must define `sample`")

    def channels(self, c: int) -> int:
        """How many channels the decoder must give for `c` channels of data."""
        return c


def widest(like: Tensor) -> torch.dtype:
    """The most exact type to draw in: float64, which MPS devices do not have."""
    return torch.float32 if like.device.type == "mps" else torch.float64


def is_pair(params: Any) -> bool:
    return isinstance(params, (tuple, list)) and len(params) == 2
