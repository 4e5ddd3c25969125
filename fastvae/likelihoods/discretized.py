"""Data of a few levels, bytes for the most part, under densities that are cut into bins."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..functional.checks import check_floating, checked_int
from ..functional.discretized import logistic_constants, mixture_planes
from ..reference.discretized import mixture_means, mixture_parts
from .base import KernelCall, Likelihood

__all__ = ["DiscretizedLogistic", "DiscretizedLogisticMixture"]


class DiscretizedLogistic(Likelihood):
    """Bytes, and data of fewer `bits`, as levels: a logistic for each, cut into bins (Kingma et al. 2016).

    `params` is (B, 2C, ...), mean and log-scale packed along dimension 1, with data scaled to [-1, 1]; data are uint8
    (B, C, ...), read as they are. nll / (dimensions * ln 2) is the number of bits per dimension: nothing is added.
    Options as in `fastvae.functional.discretized_logistic_nll`.

    With fewer than 8 `bits` higher levels in the data count as the highest one;
    `functional.discretized_logistic_nll(..., validate=True)` looks whether there are any.

    `mean` is a float in [0, 1], for pictures; `sample` gives uint8 levels.
    """

    def __init__(
        self,
        bits: int = 8,
        *,
        log_scale_floor: float = -7.0,
        min_mass: float = 1e-5,
    ) -> None:
        super().__init__()
        self.constants = logistic_constants(
            f"likelihoods.{type(self).__name__}", bits, log_scale_floor, min_mass
        )
        self.bits, self.log_scale_floor, self.min_mass = bits, log_scale_floor, min_mass

    def kernel_call(self, params: Tensor) -> KernelCall:
        return "discretized_logistic", [params], self.constants

    def mean(self, params: Tensor) -> Tensor:
        """The expected data over the highest level, right to half a level where the scale is narrower than a bin."""
        mean, log_scale = self._parts(params)
        return ((_clipped_mean(mean, self._scale(log_scale)) + 1) / 2).to(params.dtype)

    @torch.no_grad()
    def sample(self, params: Tensor, generator: torch.Generator | None = None) -> Tensor:
        mean, log_scale = self._parts(params)
        x = mean + self._scale(log_scale) * _logistic_noise(mean, generator)
        return self._level(x).to(torch.uint8)

    def channels(self, c: int) -> int:
        return 2 * c

    def _parts(self, params: Any) -> tuple[Tensor, ...]:
        """Mean and log-scale, float32 at least."""
        params = self._wide(params)
        if params.dim() < 2 or params.shape[1] % 2 != 0:
            raise ValueError(
                f"fastvae.likelihoods.DiscretizedLogistic: `params` must have shape (B, 2C, ...), mean and log-scale "
                f"packed along dimension 1, got {tuple(params.shape)}"
            )
        return params.chunk(2, dim=1)

    def _wide(self, params: Any) -> Tensor:
        check_floating(f"likelihoods.{type(self).__name__}", "params", params)
        wide: Tensor = params if params.dtype == torch.float64 else params.float()
        return wide

    def _scale(self, log_scale: Tensor) -> Tensor:
        # From e^60 on the data lie at both ends, half and half, and the next power would overflow.
        return torch.exp(log_scale.clamp(min=self.log_scale_floor, max=60.0))

    def _level(self, x: Tensor) -> Tensor:
        """The level whose bin has x in it."""
        highest = 2**self.bits - 1
        return torch.round((x + 1) / 2 * highest).clamp(0, highest)

    def extra_repr(self) -> str:
        options = {"log_scale_floor": (self.log_scale_floor, -7.0), "min_mass": (self.min_mass, 1e-5)}
        set_ones = [f"{name}={value}" for name, (value, default) in options.items() if value != default]
        return ", ".join([f"bits={self.bits}", *set_ones])


class DiscretizedLogisticMixture(DiscretizedLogistic):
    """PixelCNN++'s likelihood of bytes, and NVAE's and VDVAE's (Salimans et al. 2017).

    Each pixel has a mixture of `components` logistics. `params` is (B, 10 components, ...) for colour and
    (B, 3 components, ...) for grey images, in the order of PixelCNN++'s code; data are uint8, (B, 3, ...) or
    (B, 1, ...), read as they are. Green depends on the pixel's red, blue on both. Options as in
    `fastvae.functional.discretized_logistic_mixture_nll`.

    With fewer than 8 `bits` higher levels in the data count as the highest one;
    `functional.discretized_logistic_mixture_nll(..., validate=True)` looks whether there are any.

    `mean` is a float in [0, 1], for pictures; `sample` gives uint8 levels, red first and the others given it.
    """

    def __init__(
        self,
        components: int = 10,
        bits: int = 8,
        *,
        log_scale_floor: float = -7.0,
        min_mass: float = 1e-5,
    ) -> None:
        super().__init__(bits, log_scale_floor=log_scale_floor, min_mass=min_mass)
        self.components = checked_int(
            "likelihoods.DiscretizedLogisticMixture", "components", components, 1, None
        )
        self.constants = [components, *self.constants]

    def kernel_call(self, params: Tensor) -> KernelCall:
        return "discretized_logistic_mixture", [params], self.constants

    def mean(self, params: Tensor) -> Tensor:
        """The expected data over the highest level; of green and blue, given the expected channels before.

        Right to half a level where a scale is narrower than a bin, and where a channel seldom leaves [-1, 1].
        """
        logits, mean, log_scale, coefficients = self._parts(params)
        weights = torch.softmax(logits, 1)
        channels: list[Tensor] = []  # (B, K, ...) each: every component has its own red
        for c in range(mean.shape[1]):
            at = mean[:, c]
            # As in reference.mixture_means, whose x is one for all components.
            for j, before in enumerate(channels):
                at = at + coefficients[:, c - 1 + j] * before
            channels.append(_clipped_mean(at, self._scale(log_scale[:, c])))
        x = torch.stack([(weights * channel).sum(1) for channel in channels], 1)
        return ((x + 1) / 2).to(params.dtype)

    @torch.no_grad()
    def sample(self, params: Tensor, generator: torch.Generator | None = None) -> Tensor:
        logits, mean, log_scale, coefficients = self._parts(params)
        # The largest of logits plus Gumbel noise is a draw from their softmax.
        uniform = _uniform(logits, generator)
        chosen = (logits - torch.log(-torch.log(uniform))).argmax(1, keepdim=True)
        noise = _logistic_noise(mean[:, :, 0], generator)
        highest = 2**self.bits - 1
        levels: list[Tensor] = []
        for c in range(mean.shape[1]):
            x = [2 * level / highest - 1 for level in levels]
            at = mixture_means(mean, coefficients, x)[c].gather(1, chosen)[:, 0]
            scale = self._scale(log_scale[:, c].gather(1, chosen)[:, 0])
            levels.append(self._level(at + scale * noise[:, c]))
        return torch.stack(levels, 1).to(torch.uint8)

    def channels(self, c: int) -> int:
        if c not in (1, 3):
            raise ValueError(
                f"fastvae.likelihoods.DiscretizedLogisticMixture: data must have 1 or 3 channels, got {c}"
            )
        return mixture_planes(self.components, c)

    def _parts(self, params: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """As `reference.mixture_parts`, float32 at least."""
        params = self._wide(params)
        planes = params.shape[1] if params.dim() > 1 else 0
        for channels in (3, 1):
            if planes == mixture_planes(self.components, channels):
                return mixture_parts(params, self.components, channels)
        raise ValueError(
            "fastvae.likelihoods.DiscretizedLogisticMixture: `params` must have shape "
            f"(B, {10 * self.components}, ...) or (B, {3 * self.components}, ...) "
            f"for {self.components} components, got {tuple(params.shape)}"
        )

    def extra_repr(self) -> str:
        return f"components={self.components}, {super().extra_repr()}"


def _clipped_mean(mean: Tensor, scale: Tensor) -> Tensor:
    """E[clip(x, -1, 1)] of a logistic x: -1 plus the integral over [-1, 1] of P(x > t)."""
    slim = scale.clamp(max=1)
    narrow = slim * (F.softplus((mean + 1) / slim) - F.softplus((mean - 1) / slim))
    # The same without the difference, whose digits a wide scale cancels.
    wide = scale.clamp(min=1)
    integral = wide * torch.log1p(torch.sigmoid((mean - 1) / wide) * torch.expm1(2 / wide))
    return (torch.where(scale < 1, narrow, integral) - 1).clamp(-1, 1)  # past the ends by rounding


def _uniform(like: Tensor, generator: torch.Generator | None) -> Tensor:
    """Numbers in the open interval (0, 1), float32."""
    uniform = torch.rand(like.shape, device=like.device, generator=generator)
    return uniform.clamp(2.0**-26, 1 - 2.0**-24)


def _logistic_noise(like: Tensor, generator: torch.Generator | None) -> Tensor:
    return torch.logit(_uniform(like, generator))
