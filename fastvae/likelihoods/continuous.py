"""Continuous densities, and the Bernoulli."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from ..functional.checks import checked_positive, checked_scale, is_dense
from ..functional.continuous import checked_bounds, smooth_clamp
from ..reference.continuous import BERNOULLI_NUMBERS
from .base import KernelCall, Likelihood, is_pair, sampling_dtype

__all__ = ["Bernoulli", "ContinuousBernoulli", "Gamma", "Gaussian", "Laplace", "StudentT"]


class Bernoulli(Likelihood):
    """Independent binary data. `params` are logits: the decoder must not end with a sigmoid.

    For a decoder that does end with a sigmoid, `from_probs=True` takes probabilities as `params`. The loss is then the
    same as that of `F.binary_cross_entropy`, including its limits: an exact 0 or 1 counts as a logit of -100 or 100,
    and gets no gradient. Logits are the better choice: they are exact there, faster, and learn from confident mistakes.
    """

    def __init__(self, from_probs: bool = False) -> None:
        super().__init__()
        self.from_probs = from_probs

    def kernel_call(self, params: Tensor) -> KernelCall:
        return "bernoulli", [_logit(params) if self.from_probs else params], []

    def mean(self, params: Tensor) -> Tensor:
        return params if self.from_probs else torch.sigmoid(params)

    @torch.no_grad()
    def sample(self, params: Tensor, generator: torch.Generator | None = None) -> Tensor:
        return torch.bernoulli(self.mean(params), generator=generator)

    def extra_repr(self) -> str:
        return "from_probs=True" if self.from_probs else ""


def _logit(probs: Tensor) -> Tensor:
    """Compute log(p / (1 - p)), finite on all of [0, 1], in the dtype of `probs`."""
    if not isinstance(probs, Tensor) or not probs.is_floating_point() or not is_dense(probs):
        return probs  # the checks of the loss report it
    p = probs if probs.dtype == torch.float64 else probs.float()
    limits = torch.finfo(p.dtype)
    # Clamping after the logarithm instead would make the gradient 0 * inf at the ends.
    inside = torch.logit(p.clamp(limits.tiny, 1 - limits.eps / 2))
    ends = torch.where(p >= 1, 100.0, torch.where(p <= 0, -100.0, inside))
    return ends.to(probs.dtype)


class Gaussian(Likelihood):
    """Independent normal data. `params` is the mean, or the mean and the log-variance, depending on `scale`:

    - `scale=s`, a positive float: s is the standard deviation everywhere.
    - `scale="learned"`: all elements share one trained variance, `logvar`, a parameter of this module that starts at 0.
      Pass it to the optimiser with `elbo.parameters()`.
    - `scale="per_element"`: the decoder returns mean and log-variance, packed along dimension 1 as (B, 2C, ...) for
      data (B, C, ...), or as a pair.

    `logvar_bounds=(lo, hi)` keeps a log-variance v that is learned or per element between bounds, with the smooth clamp
    mid + half tanh((v - mid) / half), mid = (lo + hi) / 2 and half = (hi - lo) / 2. It is close to v in the middle and
    has a gradient beyond the bounds. Without it, a decoder that fits some data exactly, such as flat parts of an image,
    drives its variance to 0 there and the loss to minus infinity.
    """

    def __init__(self, scale: float | str = 1.0, *, logvar_bounds: tuple[float, float] | None = None) -> None:
        super().__init__()
        if isinstance(scale, Tensor) or (isinstance(scale, str) and scale not in ("learned", "per_element")):
            kind = TypeError if isinstance(scale, Tensor) else ValueError
            found = "a Tensor" if isinstance(scale, Tensor) else repr(scale)
            raise kind(
                "fastvae.likelihoods.Gaussian: `scale` must be a positive float, 'learned' or 'per_element', "
                f"got {found}"
            )
        if not isinstance(scale, str):
            scale = checked_scale("likelihoods.Gaussian", scale)
            if logvar_bounds is not None:
                raise ValueError(
                    "fastvae.likelihoods.Gaussian: `logvar_bounds` must be None unless `scale` is 'learned' or "
                    f"'per_element', got {logvar_bounds!r} with `scale` {scale}"
                )
        self.scale = scale
        self.logvar_bounds = (
            None if logvar_bounds is None else checked_bounds("likelihoods.Gaussian", logvar_bounds)
        )
        if scale == "learned":
            self.logvar = nn.Parameter(torch.empty(()))
            self.reset_parameters()

    def reset_parameters(self) -> None:
        """Reset a learned log-variance to its initial value, 0, for instance after `to_empty`."""
        if self.scale == "learned":
            nn.init.zeros_(self.logvar)

    def kernel_call(self, params: Any) -> KernelCall:
        bounds = self.logvar_bounds
        if self.scale == "learned":
            logvar = self.logvar if bounds is None else smooth_clamp(self.logvar, bounds)
            return "gaussian_learned", [params, logvar], []
        if self.scale == "per_element":
            density, constants = ("gaussian", []) if bounds is None else ("gaussian_bounded", list(bounds))
            if is_pair(params):
                return f"{density}_per_element", list(params), constants
            return f"{density}_head", [params], constants
        return "gaussian", [params], [float(self.scale)]

    def mean(self, params: Any) -> Tensor:
        return self._mean_and_std(params)[0]

    @torch.no_grad()
    def sample(self, params: Any, generator: torch.Generator | None = None) -> Tensor:
        mean, std = self._mean_and_std(params)
        noise = torch.randn(mean.shape, dtype=mean.dtype, device=mean.device, generator=generator)
        return mean + std * noise

    def _mean_and_std(self, params: Any) -> tuple[Tensor, Tensor | float]:
        if self.scale == "per_element":
            mean, logvar = params if is_pair(params) else params.chunk(2, dim=1)
            return mean, self._std(logvar)
        if self.scale == "learned":
            return params, self._std(self.logvar)
        return params, float(self.scale)

    def _std(self, logvar: Tensor) -> Tensor:
        if self.logvar_bounds is None:
            return torch.exp(logvar / 2)
        return torch.exp(smooth_clamp(logvar, self.logvar_bounds) / 2).to(logvar.dtype)

    def channels(self, c: int) -> int:
        return 2 * c if self.scale == "per_element" else c

    def extra_repr(self) -> str:
        bounds = "" if self.logvar_bounds is None else f", logvar_bounds={self.logvar_bounds}"
        return f"scale={self.scale!r}{bounds}"


class _ScaleFamily(Likelihood):
    """A location and a scale, which can be fixed, learned or per element as documented in `Laplace`."""

    density: str

    def __init__(
        self, scale: float | str = 1.0, *, log_scale_bounds: tuple[float, float] | None = None
    ) -> None:
        super().__init__()
        where = f"likelihoods.{type(self).__name__}"
        if isinstance(scale, Tensor) or (isinstance(scale, str) and scale not in ("learned", "per_element")):
            kind = TypeError if isinstance(scale, Tensor) else ValueError
            found = "a Tensor" if isinstance(scale, Tensor) else repr(scale)
            raise kind(
                f"fastvae.{where}: `scale` must be a positive float, 'learned' or 'per_element', got {found}"
            )
        if not isinstance(scale, str):
            scale = checked_scale(where, scale)
            if log_scale_bounds is not None:
                raise ValueError(
                    f"fastvae.{where}: `log_scale_bounds` must be None unless `scale` is 'learned' or 'per_element', "
                    f"got {log_scale_bounds!r} with `scale` {scale}"
                )
        self.scale = scale
        self.log_scale_bounds = (
            None if log_scale_bounds is None else checked_bounds(where, log_scale_bounds, "log_scale_bounds")
        )
        if scale == "learned":
            self.log_scale = nn.Parameter(torch.empty(()))
            self.reset_parameters()

    def reset_parameters(self) -> None:
        """Reset a learned log-scale to its initial value, 0, for instance after `to_empty`."""
        if self.scale == "learned":
            nn.init.zeros_(self.log_scale)

    def kernel_call(self, params: Any) -> KernelCall:
        if self.scale == "learned":
            return f"{self.density}_learned", [params, self._clamp(self.log_scale)], []
        if self.scale == "per_element":
            if is_pair(params) or (self.log_scale_bounds is not None and _is_head(params)):
                loc, log_scale = params if is_pair(params) else params.chunk(2, dim=1)
                return f"{self.density}_per_element", [loc, self._clamp(log_scale)], []
            return f"{self.density}_head", [params], []
        return self.density, [params], [float(self.scale)]

    def _clamp(self, log_scale: Any) -> Any:
        if self.log_scale_bounds is None or not isinstance(log_scale, Tensor):
            return log_scale
        if log_scale.dim() > 0 and log_scale.is_floating_point():
            # This passes no gradient to a NaN or an infinity. If an element is left out by a weight of 0, its gradient
            # of 0 would otherwise become NaN in the smooth clamp.
            largest = torch.finfo(log_scale.dtype).max
            log_scale = log_scale.clamp(-largest, largest)
        return smooth_clamp(log_scale, self.log_scale_bounds).to(log_scale.dtype)

    def mean(self, params: Any) -> Tensor:
        return self._location_and_scale(params)[0]

    @torch.no_grad()
    def sample(self, params: Any, generator: torch.Generator | None = None) -> Tensor:
        loc, scale = self._location_and_scale(params)
        return loc + scale * self._standard_sample(loc, generator)

    def _standard_sample(self, like: Tensor, generator: torch.Generator | None) -> Tensor:
        """Draw with location 0 and scale 1, in the shape and dtype of `like`."""
        raise NotImplementedError

    def _location_and_scale(self, params: Any) -> tuple[Tensor, Tensor | float]:
        if self.scale == "per_element":
            loc, log_scale = params if is_pair(params) else params.chunk(2, dim=1)
            return loc, torch.exp(self._clamp(log_scale))
        if self.scale == "learned":
            return params, torch.exp(self._clamp(self.log_scale))
        return params, float(self.scale)

    def channels(self, c: int) -> int:
        return 2 * c if self.scale == "per_element" else c

    def extra_repr(self) -> str:
        bounds = "" if self.log_scale_bounds is None else f", log_scale_bounds={self.log_scale_bounds}"
        return f"scale={self.scale!r}{bounds}"


def _is_head(params: Any) -> bool:
    """Whether `params` can be split in two along dimension 1. If not, the checks of the loss report it."""
    return isinstance(params, Tensor) and is_dense(params) and params.dim() > 1 and params.shape[1] % 2 == 0


class Laplace(_ScaleFamily):
    """Independent data with the Laplace density e^(-|x - m| / b) / 2b: the normalised form of an L1 loss.

    `params` is the location m, or the location and the log-scale, depending on `scale`:

    - `scale=b`, a positive float: b is the scale everywhere.
    - `scale="learned"`: all elements share one trained scale; `log_scale` is a parameter of this module that starts at
      0. Pass it to the optimiser with `elbo.parameters()`.
    - `scale="per_element"`: the decoder returns location and log-scale, packed along dimension 1 as (B, 2C, ...) for
      data (B, C, ...), or as a pair.

    `log_scale_bounds=(lo, hi)` keeps a log-scale that is learned or per element between bounds, with the smooth clamp
    of `Gaussian`. Without it, a decoder that fits some data exactly drives its scale to 0 there.
    """

    density = "laplace"

    def _standard_sample(self, like: Tensor, generator: torch.Generator | None) -> Tensor:
        negative = torch.rand(like.shape, dtype=like.dtype, device=like.device, generator=generator) < 0.5
        magnitude = torch.empty_like(like).exponential_(generator=generator)
        return torch.where(negative, -magnitude, magnitude)


class StudentT(_ScaleFamily):
    """Independent data with Student's t density of `df` degrees of freedom, which is robust to outliers.

    `params` is the centre, or the centre and the log-scale. `scale` and `log_scale_bounds` are as for `Laplace`. The
    mean exists only for df > 1; `mean` always returns the centre.
    """

    density = "student_t"

    def __init__(
        self, df: float, scale: float | str = 1.0, *, log_scale_bounds: tuple[float, float] | None = None
    ) -> None:
        super().__init__(scale, log_scale_bounds=log_scale_bounds)
        self.df = checked_positive("likelihoods.StudentT", "df", df)

    def kernel_call(self, params: Any) -> KernelCall:
        name, tensors, constants = super().kernel_call(params)
        return name, tensors, [self.df, *constants]

    def _standard_sample(self, like: Tensor, generator: torch.Generator | None) -> Tensor:
        normal = torch.randn(like.shape, dtype=like.dtype, device=like.device, generator=generator)
        dtype = sampling_dtype(like)
        shape = torch.full_like(normal, self.df / 2, dtype=dtype)
        # For a small df, a gamma that underflows would make the draw infinite.
        gamma = torch._standard_gamma(shape, generator=generator).clamp(min=torch.finfo(dtype).tiny)
        return (normal.to(dtype) * torch.rsqrt(gamma / shape)).to(like.dtype)

    def extra_repr(self) -> str:
        return f"df={self.df:g}, {super().extra_repr()}"


class ContinuousBernoulli(Likelihood):
    """Independent grey values in [0, 1], with the Bernoulli's formula normalised to a density. `params` are logits.

    See Loaiza-Ganem and Cunningham (2019). Unlike for `Bernoulli`, the expected value is not the sigmoid of the logits,
    but 1 / (1 - e^-a) - 1 / a for a logit a, which `mean` returns.
    """

    def kernel_call(self, params: Tensor) -> KernelCall:
        return "continuous_bernoulli", [params], []

    def mean(self, params: Tensor) -> Tensor:
        a = params if params.dtype == torch.float64 else params.float()
        near = a.abs() < 0.5
        # A series is used near 0. Both branches are kept finite outside their range.
        small, large = torch.where(near, a, 0.0), torch.where(near, 1.0, a)
        series = torch.zeros_like(a)
        for n, number in reversed(list(enumerate(BERNOULLI_NUMBERS, 1))):
            series = series * small * small + number / math.factorial(2 * n)
        far = -1 / torch.expm1(-large) - 1 / large
        return torch.where(near, 0.5 + small * series, far).to(params.dtype)

    @torch.no_grad()
    def sample(self, params: Tensor, generator: torch.Generator | None = None) -> Tensor:
        a = params.to(sampling_dtype(params))
        u = torch.rand(a.shape, dtype=a.dtype, device=a.device, generator=generator)
        # The inverse of the distribution function for a negative logit. A positive logit is its mirror image.
        size = a.abs()
        tilted = -torch.log1p(u * torch.expm1(-size)) / size
        draw = torch.where(size == 0, u, tilted)
        return torch.where(a > 0, 1 - draw, draw).to(params.dtype)


class Gamma(Likelihood):
    """Independent positive data with a gamma density of the given `shape`. `params` are log-scales.

    The mean is shape e^s for a log-scale s. `Gamma(1)` is the exponential, the likelihood of power spectra behind the
    Itakura-Saito loss (see `functional.gamma_nll`). Only `Gamma(1)` accepts data of 0.
    """

    def __init__(self, shape: float) -> None:
        super().__init__()
        self.shape = checked_positive("likelihoods.Gamma", "shape", shape)

    def kernel_call(self, params: Tensor) -> KernelCall:
        return "gamma", [params], [self.shape]

    def mean(self, params: Tensor) -> Tensor:
        return self.shape * torch.exp(params)

    @torch.no_grad()
    def sample(self, params: Tensor, generator: torch.Generator | None = None) -> Tensor:
        dtype = sampling_dtype(params)
        shape = torch.full_like(params, self.shape, dtype=dtype)
        draw = torch._standard_gamma(shape, generator=generator) * torch.exp(params.to(dtype))
        return draw.to(params.dtype)

    def extra_repr(self) -> str:
        return f"shape={self.shape:g}"
