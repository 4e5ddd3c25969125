"""Gaussian posteriors: the forms in which encoders give their scale, and a distribution with the usual methods.

| form                             | sigma                                         | used by                     |
|----------------------------------|-----------------------------------------------|-----------------------------|
| `"logvar"`, `LogVar()`           | e^(v / 2)                                     | Kingma and Welling 2014     |
| `LogVar(clamp=(-30, 20))`        | the same, v clamped hard                      | latent diffusion, diffusers |
| `LogVar(bounds=(lo, hi))`        | the same, v clamped smoothly                  |                             |
| `"log_std"`, `LogStd()`          | e^v                                           | VDVAE                       |
| `LogStd(soft_clamp=5, eps=1e-2)` | e^(5 tanh(v / 5)) + 1e-2, mean 5 tanh(mu / 5) | NVAE                        |
| `"softplus"`, `Softplus()`       | log(1 + e^v) + 1e-4                           | stable-audio-tools, RAVE    |
| `"variance"`, `Variance()`       | (e^v + 1e-4)^(1/2)                            | scvi-tools                  |

`functional.reparameterize_kl`, `functional.gaussian_kl` and `ELBO(posterior=...)` take a form or its name.
"""

from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from . import functional
from .functional.checks import check_floating, check_like
from .functional.forms import LogStd, LogVar, ScaleForm, Softplus, Variance, checked_form
from .reference.latents import mean_and_logvar

__all__ = ["DiagonalGaussian", "LogStd", "LogVar", "ScaleForm", "Softplus", "Variance"]

_DIFFUSERS = LogVar(clamp=(-30.0, 20.0))


class DiagonalGaussian:
    """The posterior N(mean, std^2) of an encoder's packed output, in place of diffusers' and latent diffusion's
    `DiagonalGaussianDistribution`::

        posterior = fastvae.posteriors.DiagonalGaussian(encoder(x))
        z, kl = posterior.reparameterize_kl()

    `sample`, `mode`, `kl` and `nll` give what theirs give: the same draws, and nats summed over all dimensions but the
    batch. They may be combined freely. `reparameterize_kl` is faster: it draws z and its KL in one pass, and the head
    gets one gradient.

    Args:
        head: (B, 2 L, ...), floating: the mean and what `form` says, along dimension 1.
        form: the form of the scale, one of this module or its name. The default clamps the log-variance hard to
            [-30, 20], as theirs does.
    """

    def __init__(self, head: Tensor, form: str | ScaleForm = _DIFFUSERS) -> None:
        check_floating("posteriors.DiagonalGaussian", "head", head)
        if head.dim() < 2 or head.shape[1] % 2 != 0:
            raise ValueError(
                "fastvae.posteriors.DiagonalGaussian: `head` must have shape (B, 2 L, ...), mean and scale packed "
                f"along dimension 1, got {tuple(head.shape)}"
            )
        self.head = head
        self.form = checked_form("posteriors.DiagonalGaussian", "form", form)

    @cached_property
    def _moments(self) -> tuple[Tensor, Tensor]:
        name, constants = self.form.kernel
        return mean_and_logvar(self.head, None, name, constants, self.head.dtype)

    @property
    def mean(self) -> Tensor:
        """(B, L, ...)"""
        return self._moments[0]

    @property
    def logvar(self) -> Tensor:
        """log std^2, (B, L, ...)."""
        return self._moments[1]

    @property
    def std(self) -> Tensor:
        """(B, L, ...)"""
        return torch.exp(0.5 * self.logvar)

    @property
    def var(self) -> Tensor:
        """std^2, (B, L, ...)."""
        return torch.exp(self.logvar)

    def sample(self, generator: torch.Generator | None = None) -> Tensor:
        """Draw z, (B, L, ...), with the noise of `torch.randn` for `generator`."""
        shape = self.head.shape[0], self.head.shape[1] // 2, *self.head.shape[2:]
        eps = torch.randn(shape, generator=generator, dtype=self.head.dtype, device=self.head.device)
        return functional.reparameterize_kl(self.head, form=self.form, eps=eps)[0]

    def mode(self) -> Tensor:
        """The mean, (B, L, ...)."""
        return self.mean

    def kl(self, other: "DiagonalGaussian | None" = None) -> Tensor:
        """The KL divergence from N(0, I), or from another posterior, of every row, (B,), in nats."""
        if other is None:
            return functional.gaussian_kl(self.head, form=self.form)
        if not isinstance(other, DiagonalGaussian):
            raise TypeError(
                "fastvae.posteriors.DiagonalGaussian.kl: `other` must be a DiagonalGaussian, got "
                f"{type(other).__name__}"
            )
        if self.form == other.form:
            return functional.gaussian_kl(self.head, None, other.head, form=self.form)
        return functional.gaussian_kl(self.mean, self.logvar, other.mean, other.logvar)

    def nll(self, x: Tensor) -> Tensor:
        """-log N(x; mean, std^2) of every row, (B,), in nats, with its constant."""
        check_like("posteriors.DiagonalGaussian.nll", "x", x, "mean", self.mean)
        return functional.gaussian_nll(self.mean, x, self.logvar)

    def reparameterize_kl(self, **options: Any) -> tuple[Tensor, Tensor]:
        """(z, kl) from one pass: `fastvae.functional.reparameterize_kl` of the head, with its keyword arguments."""
        return functional.reparameterize_kl(self.head, form=self.form, **options)
