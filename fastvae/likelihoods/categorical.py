"""One of several classes at every position."""

import torch
from torch import Tensor

from ..functional.categorical import checked_index
from .base import KernelCall, Likelihood

__all__ = ["Categorical"]


class Categorical(Likelihood):
    """One of V classes at every position: the tokens of a text, or a label. `params` are logits (B, ..., V), classes
    last; the data are the classes' numbers, int64 (B, ...).

    `ignore_index`: data of this number (padding) count for nothing.
    """

    def __init__(self, ignore_index: int = -100) -> None:
        super().__init__()
        checked_index("likelihoods.Categorical", ignore_index)
        self.ignore_index = ignore_index

    def kernel_call(self, params: Tensor) -> KernelCall:
        return "categorical", [params], [float(self.ignore_index)]

    def mean(self, params: Tensor) -> Tensor:
        """The classes' probabilities, (B, ..., V)."""
        return torch.softmax(params, -1)

    @torch.no_grad()
    def sample(self, params: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Classes drawn, int64 (B, ...)."""
        dtype = torch.float64 if params.dtype == torch.float64 else torch.float32
        probs = torch.softmax(params, -1, dtype=dtype).flatten(0, -2)
        return torch.multinomial(probs, 1, generator=generator).view(params.shape[:-1])

    def channels(self, c: int) -> int:
        """For c classes: a logit for each."""
        return c

    def extra_repr(self) -> str:
        return f"ignore_index={self.ignore_index}"
