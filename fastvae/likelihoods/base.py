"""The base class of the likelihood modules."""

from typing import Any

import torch
from torch import Tensor, nn

from ..functional import loss
from ..functional.checks import check_floating, checked_int

__all__ = ["Likelihood"]

# (name of the variant, its tensors, its constants): what a backend needs to evaluate the likelihood.
KernelCall = tuple[str, list[Tensor], list[float]]


class Likelihood(nn.Module):
    """The base class of likelihoods p(data | params), where `params` is the output of the decoder.

    A subclass defines `kernel_call`, `mean` and `sample`, or overrides `nll` instead of `kernel_call`.
    """

    def kernel_call(self, params: Any) -> KernelCall:
        """Return the arguments (name, tensors, constants) with which a backend evaluates this likelihood."""
        raise NotImplementedError(f"{type(self).__name__} must define `kernel_call` or `nll`")

    def nll(
        self, params: Any, target: Tensor, *, weight: Tensor | None = None, draws: int | None = None
    ) -> Tensor:
        """Compute -log p(target | params) of every row, (B,), in nats.

        Args:
            params: the output of the decoder, (B, ...).
            target: the data, (B, ...).
            weight: multiplies the nll of each element, or of each position of a categorical and each pixel of a mixture
                of discretised logistics, as in the function of this likelihood in `fastvae.functional`.
            draws: K if `params` has K * B rows, which hold K draws for each row of `target` one after another, as
                `decoder(z.flatten(0, 1))` returns them for z (K, B, ...). The result is then (K, B), and `target` and
                `weight` are read without being repeated.
        """
        name, tensors, constants = self.kernel_call(params)
        if draws is not None:
            where = f"likelihoods.{type(self).__name__}"
            checked_int(where, "draws", draws, 1, None)
            check_floating(where, "params", tensors[0])
            if tensors[0].shape[0] % draws != 0:
                raise ValueError(
                    f"fastvae.{where}: `params` must have K * B rows with K = `draws` = {draws}, got "
                    f"{tensors[0].shape[0]} rows"
                )
            tensors = divided_rows(tensors, draws)
        probs = params if getattr(self, "from_probs", False) else None
        return loss.nll(name, tensors, target, constants, probs=probs, draws=draws, weight=weight)[0]

    def mean(self, params: Any) -> Tensor:
        """The expected data, differentiable, for instance to show as a reconstruction."""
        raise NotImplementedError(f"{type(self).__name__} must define `mean`")

    def sample(self, params: Any, generator: torch.Generator | None = None) -> Tensor:
        """Draw data, without a gradient."""
        raise NotImplementedError(f"{type(self).__name__} must define `sample`")

    def channels(self, c: int) -> int:
        """The number of channels that the decoder must return for `c` channels of data."""
        return c


def divided_rows(tensors: list[Tensor], draws: int) -> list[Tensor]:
    """Divide tensors of K * B rows into draws, (K, B, ...). Those that all rows share, a learned scale or a dispersion
    per feature, are left as they are. `draws` must divide the number of rows."""
    rows = tensors[0].shape[0]
    return [
        p.unflatten(0, (draws, -1)) if p.dim() > 1 or (p.dim() == 1 and i > 0 and p.shape[0] == rows) else p
        for i, p in enumerate(tensors)
    ]


def sampling_dtype(like: Tensor) -> torch.dtype:
    """The most precise dtype for draws: float64, or float32 on MPS devices, which have no float64."""
    return torch.float32 if like.device.type == "mps" else torch.float64


def is_pair(params: Any) -> bool:
    return isinstance(params, (tuple, list)) and len(params) == 2
