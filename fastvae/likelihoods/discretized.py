"""Data with few levels, usually bytes, under densities that are integrated over bins."""

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
    """Bytes, or levels of fewer `bits`, under a logistic density that is integrated over bins (Kingma et al. 2016).

    `params` is (B, 2C, ...), mean and log-scale packed along dimension 1, for data scaled to [-1, 1]. The data are
    levels, uint8 (B, C, ...), not scaled. The number of bits per dimension is nll / (dimensions * ln 2), without any
    correction. The options are those of `fastvae.functional.discretized_logistic_nll`.

    With fewer than 8 `bits`, values above the highest level count as the highest level; `nll(..., validate=True)`
    checks for them.

    `mean` returns floats in [0, 1], for pictures; `sample` returns uint8 levels.
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
        """The expected data divided by the highest level. The error is up to half a level if a scale is below a bin."""
        mean, log_scale = self._split(params)
        return ((_clipped_mean(mean, self._scale(log_scale)) + 1) / 2).to(params.dtype)

    @torch.no_grad()
    def sample(self, params: Tensor, generator: torch.Generator | None = None) -> Tensor:
        mean, log_scale = self._split(params)
        x = mean + self._scale(log_scale) * _logistic_noise(mean, generator)
        return self._level(x).to(torch.uint8)

    def channels(self, c: int) -> int:
        return 2 * c

    def _split(self, params: Any) -> tuple[Tensor, ...]:
        """Return mean and log-scale, in float32 or float64."""
        params = self._to_float32(params)
        if params.dim() < 2 or params.shape[1] % 2 != 0:
            raise ValueError(
                f"fastvae.likelihoods.DiscretizedLogistic: `params` must have shape (B, 2C, ...), mean and log-scale "
                f"packed along dimension 1, got {tuple(params.shape)}"
            )
        return params.chunk(2, dim=1)

    def _to_float32(self, params: Any) -> Tensor:
        check_floating(f"likelihoods.{type(self).__name__}", "params", params)
        converted: Tensor = params if params.dtype == torch.float64 else params.float()
        return converted

    def _scale(self, log_scale: Tensor) -> Tensor:
        # From e^60 on, the data lie at both ends with equal probability, and larger powers would overflow.
        return torch.exp(log_scale.clamp(min=self.log_scale_floor, max=60.0))

    def _level(self, x: Tensor) -> Tensor:
        """The level whose bin contains x."""
        highest = 2**self.bits - 1
        return torch.round((x + 1) / 2 * highest).clamp(0, highest)

    def extra_repr(self) -> str:
        options = {"log_scale_floor": (self.log_scale_floor, -7.0), "min_mass": (self.min_mass, 1e-5)}
        changed = [f"{name}={value}" for name, (value, default) in options.items() if value != default]
        return ", ".join([f"bits={self.bits}", *changed])


class DiscretizedLogisticMixture(DiscretizedLogistic):
    """The likelihood of bytes of PixelCNN++, also used by NVAE and VDVAE (Salimans et al. 2017).

    Each pixel has a mixture of `components` logistics. `params` is (B, 10 components, ...) for colour images and
    (B, 3 components, ...) for grey ones, in the order of PixelCNN++'s code. The data are levels, uint8 (B, 3, ...) or
    (B, 1, ...), not scaled. Green depends on the pixel's red, and blue on both. The options are those of
    `fastvae.functional.discretized_logistic_mixture_nll`.

    With fewer than 8 `bits`, values above the highest level count as the highest level; `nll(..., validate=True)`
    checks for them.

    `mean` returns floats in [0, 1], for pictures; `sample` returns uint8 levels, and draws green and blue given the
    channels before them.
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
        """The expected data divided by the highest level. Green and blue are given the expected channels before them.

        The error is up to half a level if a scale is narrower than a bin, and if a channel seldom leaves [-1, 1].
        """
        logits, mean, log_scale, coefficients = self._split(params)
        weights = torch.softmax(logits, 1)
        channels: list[Tensor] = []  # (B, K, ...) each, because every component has its own red
        for c in range(mean.shape[1]):
            channel_mean = mean[:, c]
            # As in reference.mixture_means, where all components share one x.
            for j, previous in enumerate(channels):
                channel_mean = channel_mean + coefficients[:, c - 1 + j] * previous
            channels.append(_clipped_mean(channel_mean, self._scale(log_scale[:, c])))
        x = torch.stack([(weights * channel).sum(1) for channel in channels], 1)
        return ((x + 1) / 2).to(params.dtype)

    @torch.no_grad()
    def sample(self, params: Tensor, generator: torch.Generator | None = None) -> Tensor:
        logits, mean, log_scale, coefficients = self._split(params)
        # The argmax of logits plus Gumbel noise is a draw from their softmax.
        uniform = _uniform(logits, generator)
        chosen = (logits - torch.log(-torch.log(uniform))).argmax(1, keepdim=True)
        noise = _logistic_noise(mean[:, :, 0], generator)
        highest = 2**self.bits - 1
        levels: list[Tensor] = []
        for c in range(mean.shape[1]):
            x = [2 * level / highest - 1 for level in levels]
            channel_mean = mixture_means(mean, coefficients, x)[c].gather(1, chosen)[:, 0]
            scale = self._scale(log_scale[:, c].gather(1, chosen)[:, 0])
            levels.append(self._level(channel_mean + scale * noise[:, c]))
        return torch.stack(levels, 1).to(torch.uint8)

    def channels(self, c: int) -> int:
        if c not in (1, 3):
            raise ValueError(
                f"fastvae.likelihoods.DiscretizedLogisticMixture: data must have 1 or 3 channels, got {c}"
            )
        return mixture_planes(self.components, c)

    def _split(self, params: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return `reference.mixture_parts` in float32 or float64."""
        params = self._to_float32(params)
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
    """Compute E[clip(x, -1, 1)] of a logistic x, which is -1 plus the integral over [-1, 1] of P(x > t)."""
    narrow_scale = scale.clamp(max=1)
    narrow = narrow_scale * (F.softplus((mean + 1) / narrow_scale) - F.softplus((mean - 1) / narrow_scale))
    # The same integral without the difference, which would cancel for a wide scale.
    wide_scale = scale.clamp(min=1)
    wide = wide_scale * torch.log1p(torch.sigmoid((mean - 1) / wide_scale) * torch.expm1(2 / wide_scale))
    return (torch.where(scale < 1, narrow, wide) - 1).clamp(-1, 1)  # rounding may exceed the ends


def _uniform(like: Tensor, generator: torch.Generator | None) -> Tensor:
    """Draw numbers in the open interval (0, 1), float32."""
    uniform = torch.rand(like.shape, device=like.device, generator=generator)
    return uniform.clamp(2.0**-26, 1 - 2.0**-24)


def _logistic_noise(like: Tensor, generator: torch.Generator | None) -> Tensor:
    return torch.logit(_uniform(like, generator))
