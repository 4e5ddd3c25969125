"""The base class of the likelihood modules."""

from typing import Any

import torch
from torch import Tensor, nn

from .._spec import VARIANTS
from ..functional import loss

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

    def nll(self, params: Any, target: Tensor) -> Tensor:
        """Compute -log p(target | params) of every row, (B,), in nats."""
        name, tensors, constants = self.kernel_call(params)
        probs = params if getattr(self, "from_probs", False) else None
        return loss.nll(name, tensors, target, constants, probs=probs)[0]

    def mean(self, params: Any) -> Tensor:
        """The expected data, differentiable, for instance to show as a reconstruction."""
        raise NotImplementedError(f"{type(self).__name__} must define `mean`")

    def sample(self, params: Any, generator: torch.Generator | None = None) -> Tensor:
        """Draw data, without a gradient."""
        raise NotImplementedError(f"{type(self).__name__} must define `sample`")

    def channels(self, c: int) -> int:
        """The number of channels that the decoder must return for `c` channels of data."""
        return c


def sampling_dtype(like: Tensor) -> torch.dtype:
    """The most precise dtype for draws: float64, or float32 on MPS devices, which have no float64."""
    return torch.float32 if like.device.type == "mps" else torch.float64


def is_pair(params: Any) -> bool:
    return isinstance(params, (tuple, list)) and len(params) == 2


def nll_of_draws(where: str, likelihood: Any, recon: Any, x: Any, draws: int) -> Tensor:
    """Compute -log p(x | z) of K = `draws` draws of z for every row of `x`, (K, B), in nats.

    `recon` is the decoder's output for K * B rows, of which the first B belong to the first draw. The data are read in
    place and not repeated, except for a likelihood without a kernel. `where` is the caller, which messages name.
    """
    if not isinstance(likelihood, Likelihood) or type(likelihood).nll is not Likelihood.nll:
        rows: Tensor = likelihood.nll(recon, _repeated(x, draws))
        return rows.unflatten(0, (draws, len(rows) // draws))
    name, params, constants = likelihood.kernel_call(recon)
    count = params[0].shape[0]
    if count % draws != 0:
        raise ValueError(
            f"fastvae.{where}: the decoder must return K * B rows, {draws} times those of `x`, got {count}"
        )
    # Parameters that all rows share, a learned scale or a dispersion per feature, are not divided into draws.
    apart = [
        p.unflatten(0, (draws, count // draws)) if p.dim() > 1 or (p.dim() == 1 and part == "library") else p
        for part, p in zip(VARIANTS[name].tensors, params, strict=True)
    ]
    return loss.nll(name, apart, x, constants, draws=draws)[1]


def _repeated(x: Any, draws: int) -> Any:
    if isinstance(x, dict):
        return {name: _repeated(value, draws) for name, value in x.items()}
    return x.expand(draws, *x.shape).flatten(0, 1)
