"""Densities of numbers, element by element, and the Bernoulli, which is computed as they are."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..reference.continuous import bounded_logvar
from . import loss
from .checks import check_floating, check_learned, checked_positive, checked_scale

__all__ = [
    "bernoulli_nll",
    "continuous_bernoulli_nll",
    "gamma_nll",
    "gaussian_head_nll",
    "gaussian_nll",
    "laplace_head_nll",
    "laplace_nll",
    "student_t_head_nll",
    "student_t_nll",
]


def bernoulli_nll(logits: Tensor, target: Tensor, *, draws: int | None = None) -> Tensor:
    """-log Bernoulli(target | sigmoid(logits)) of every row, in nats.

    Per element max(a, 0) - a t + log(1 + e^-|a|) for logit a and target t (Kingma and Welling 2014, appendix C.1).
    Grey targets, strictly between 0 and 1, give the cross-entropy, which is not normalised: no bits per dimension.

    Args:
        logits: (B, ...), before the sigmoid.
        target: the shape of `logits`, in [0, 1]: floating, bool, or uint8 read as x / 255. It must not require a
            gradient.
        draws: K says that the parameters hold K draws, (K, B, ...), for one target, (B, ...), which is read and not
            repeated; the result is (K, B). A learned scale or a (G,) dispersion serves all draws.

    Returns:
        (B,), float32 (float64 for float64 logits).

    Raises:
        TypeError: a dtype or kind that does not fit.
        ValueError: a shape or device that does not fit, or a target that requires a gradient.
    """
    return loss.nll("bernoulli", [logits], target, [], draws=draws)[0]


def gaussian_nll(
    mean: Tensor,
    target: Tensor,
    logvar: Tensor | None = None,
    *,
    scale: float = 1.0,
    logvar_bounds: tuple[float, float] | None = None,
    draws: int | None = None,
) -> Tensor:
    """-log N(target | mean, variance) of every row, in nats, with the constant 1/2 log 2 pi of each element.

    Per element 1/2 [ log 2 pi + log s^2 + (x - m)^2 / s^2 ] (Kingma and Welling 2014, appendix C.2).

    Args:
        mean: (B, ...).
        target: the shape of `mean`: floating, or uint8 read as x / 255. Its gradient is given where it requires one.
        logvar: the log-variance log s^2: the shape of `mean` (per element), or 0-dimensional (one learned variance).
        scale: the standard deviation s where there is no `logvar`; a positive number.
        logvar_bounds: (lo, hi): log s^2 is not `logvar` v but mid + half tanh((v - mid) / half), mid = (lo + hi) / 2,
            half = (hi - lo) / 2. Where a model fits some data exactly, flat parts of an image, the best variance is
            0 and the loss has no lower end; this smooth clamp gives it one. In the middle it is v, and it has a
            gradient outside of the bounds too.
        draws: K says that the parameters hold K draws, (K, B, ...), for one target, (B, ...), which is read and not
            repeated; the result is (K, B). A learned scale or a (G,) dispersion serves all draws.

    Returns:
        (B,), float32 (float64 for a float64 mean).

    Raises:
        TypeError: a dtype or kind that does not fit (a learned scale is a `logvar`).
        ValueError: a shape, device, scale or bounds that do not fit, both `logvar` and `scale`, or `logvar_bounds`
            without `logvar`.
    """
    if isinstance(scale, Tensor):
        raise TypeError(
            "fastvae.gaussian_nll: `scale` must be a float, got Tensor; pass a variance that is a tensor as "
            "`logvar` = 2 * scale.log()"
        )
    scale = checked_scale("gaussian_nll", scale)
    if logvar is None:
        if logvar_bounds is not None:
            raise ValueError(
                f"fastvae.gaussian_nll: `logvar_bounds` bound a `logvar`, which is missing, got {logvar_bounds!r}"
            )
        return loss.nll("gaussian", [mean], target, [scale], draws=draws)[0]
    if scale != 1.0:
        raise ValueError(
            f"fastvae.gaussian_nll: `logvar` and `scale` exclude each other, got `scale` {scale}"
        )
    learned = isinstance(logvar, Tensor) and isinstance(mean, Tensor) and logvar.shape != mean.shape
    if logvar_bounds is None:
        return loss.nll(
            "gaussian_learned" if learned else "gaussian_per_element", [mean, logvar], target, [], draws=draws
        )[0]
    bounds = checked_bounds("gaussian_nll", logvar_bounds)
    if not learned:
        return loss.nll("gaussian_bounded_per_element", [mean, logvar], target, list(bounds), draws=draws)[0]
    check_floating("gaussian_nll", "mean", mean)
    check_learned("gaussian_nll", "logvar", logvar, "mean", mean)
    return loss.nll("gaussian_learned", [mean, smooth_clamp(logvar, bounds)], target, [], draws=draws)[0]


def gaussian_head_nll(
    params: Tensor,
    target: Tensor,
    *,
    logvar_bounds: tuple[float, float] | None = None,
    draws: int | None = None,
) -> Tensor:
    """`gaussian_nll` with mean and log-variance packed in one tensor, whose gradient comes packed too.

    Args:
        params: (B, 2C, ...): the C channels of the mean, then the C channels of the log-variance.
        target: (B, C, ...): floating, or uint8 read as x / 255. Its gradient is given where it requires one.
        logvar_bounds: (lo, hi): a smooth clamp of the log-variance, mid + half tanh((v - mid) / half), as for
            `gaussian_nll`; it takes no memory.
        draws: K says that the parameters hold K draws, (K, B, ...), for one target, (B, ...), which is read and not
            repeated; the result is (K, B). A learned scale or a (G,) dispersion serves all draws.

    Returns:
        (B,) in nats, float32 (float64 for float64 params).

    Raises:
        TypeError: a dtype or kind that does not fit.
        ValueError: a shape, device or bounds that do not fit.
    """
    if logvar_bounds is None:
        return loss.nll("gaussian_head", [params], target, [], draws=draws)[0]
    bounds = checked_bounds("gaussian_head_nll", logvar_bounds)
    return loss.nll("gaussian_bounded_head", [params], target, list(bounds), draws=draws)[0]


def smooth_clamp(logvar: Tensor, bounds: Sequence[float]) -> Tensor:
    """`bounded_logvar` of a tensor that may be half, in float32."""
    return bounded_logvar(logvar if logvar.dtype == torch.float64 else logvar.float(), bounds)


def checked_bounds(where: str, bounds: Any, name: str = "logvar_bounds") -> tuple[float, float]:
    if not isinstance(bounds, (tuple, list)) or len(bounds) != 2:
        kind = ValueError if isinstance(bounds, (tuple, list)) else TypeError
        raise kind(f"fastvae.{where}: `{name}` must be a pair of floats (lo, hi), got {bounds!r}")
    try:
        lo, hi = float(bounds[0]), float(bounds[1])
    except (TypeError, ValueError) as error:
        raise TypeError(
            f"fastvae.{where}: `{name}` must be a pair of floats (lo, hi), got {bounds!r}"
        ) from error
    if not -math.inf < lo < hi < math.inf:
        raise ValueError(f"fastvae.{where}: `{name}` must be finite, lo < hi, got {(lo, hi)}")
    return lo, hi


def laplace_nll(
    loc: Tensor,
    target: Tensor,
    log_scale: Tensor | None = None,
    *,
    scale: float = 1.0,
    draws: int | None = None,
) -> Tensor:
    """-log Laplace(target | loc, scale) of every row, in nats: the normalised form of an L1 loss.

    Per element log 2b + |x - m| / b for a scale b. Where x = m the gradient is 0.

    Args:
        loc: (B, ...), the median and mean m.
        target: the shape of `loc`: floating, or uint8 read as x / 255. Its gradient is given where it requires one.
        log_scale: log b: the shape of `loc` (per element), or 0-dimensional (one learned scale).
        scale: b where there is no `log_scale`; a positive number.
        draws: K says that the parameters hold K draws, (K, B, ...), for one target, (B, ...), which is read and not
            repeated; the result is (K, B). A learned scale or a (G,) dispersion serves all draws.

    Returns:
        (B,), float32 (float64 for a float64 loc).

    Raises:
        TypeError: a dtype or kind that does not fit (a learned scale is a `log_scale`).
        ValueError: a shape, device or scale that does not fit, or both `log_scale` and `scale`.
    """
    name, params, fixed = _scale_row("laplace", loc, log_scale, scale)
    return loss.nll(name, params, target, fixed, draws=draws)[0]


def laplace_head_nll(params: Tensor, target: Tensor, *, draws: int | None = None) -> Tensor:
    """`laplace_nll` with location and log-scale packed in one tensor, whose gradient comes packed too.

    Args:
        params: (B, 2C, ...): the C channels of the location, then the C channels of the log-scale.
        target: (B, C, ...): floating, or uint8 read as x / 255. Its gradient is given where it requires one.
        draws: K says that the parameters hold K draws, (K, B, ...), for one target, (B, ...), which is read and not
            repeated; the result is (K, B). A learned scale or a (G,) dispersion serves all draws.

    Returns:
        (B,) in nats, float32 (float64 for float64 params).

    Raises:
        TypeError: a dtype or kind that does not fit.
        ValueError: a shape or device that does not fit.
    """
    return loss.nll("laplace_head", [params], target, draws=draws)[0]


def student_t_nll(
    loc: Tensor,
    target: Tensor,
    log_scale: Tensor | None = None,
    *,
    df: float,
    scale: float = 1.0,
    draws: int | None = None,
) -> Tensor:
    """-log of Student's t with `df` degrees of freedom, of every row, in nats: robust where a Gaussian is not.

    Per element, for z = (x - m) / s and v degrees of freedom: (v + 1)/2 log(1 + z^2 / v) + log s + log B(v/2, 1/2) +
    1/2 log v (Lange, Little and Taylor 1989). An outlier's gradient falls off as 1 / z.

    Args:
        loc: (B, ...), the centre m.
        target: the shape of `loc`: floating, or uint8 read as x / 255. Its gradient is given where it requires one.
        log_scale: log s: the shape of `loc` (per element), or 0-dimensional (one learned scale).
        df: the degrees of freedom v, a positive number: 1 is the Cauchy, and towards infinity it is the Gaussian.
        scale: s where there is no `log_scale`; a positive number.
        draws: K says that the parameters hold K draws, (K, B, ...), for one target, (B, ...), which is read and not
            repeated; the result is (K, B). A learned scale or a (G,) dispersion serves all draws.

    Returns:
        (B,), float32 (float64 for a float64 loc).

    Raises:
        TypeError: a dtype or kind that does not fit (a learned scale is a `log_scale`).
        ValueError: a shape, device, df or scale that does not fit, or both `log_scale` and `scale`.
    """
    df = checked_positive("student_t_nll", "df", df)
    name, params, fixed = _scale_row("student_t", loc, log_scale, scale)
    return loss.nll(name, params, target, [df, *fixed], draws=draws)[0]


def student_t_head_nll(params: Tensor, target: Tensor, *, df: float, draws: int | None = None) -> Tensor:
    """`student_t_nll` with location and log-scale packed in one tensor, whose gradient comes packed too.

    Args:
        params: (B, 2C, ...): the C channels of the location, then the C channels of the log-scale.
        target: (B, C, ...): floating, or uint8 read as x / 255. Its gradient is given where it requires one.
        df: the degrees of freedom, a positive number.
        draws: K says that the parameters hold K draws, (K, B, ...), for one target, (B, ...), which is read and not
            repeated; the result is (K, B). A learned scale or a (G,) dispersion serves all draws.

    Returns:
        (B,) in nats, float32 (float64 for float64 params).

    Raises:
        TypeError: a dtype or kind that does not fit.
        ValueError: a shape, device or df that does not fit.
    """
    return loss.nll(
        "student_t_head", [params], target, [checked_positive("student_t_head_nll", "df", df)], draws=draws
    )[0]


def _scale_row(family: str, loc: Any, log_scale: Any, scale: Any) -> tuple[str, list[Tensor], list[float]]:
    """Which row of a family serves a scale that is fixed, learned or given per element: (name, params, constants)."""
    where = f"{family}_nll"
    if isinstance(scale, Tensor):
        raise TypeError(
            f"fastvae.{where}: `scale` must be a float, got Tensor; pass a scale that is a tensor as "
            "`log_scale` = scale.log()"
        )
    scale = checked_scale(where, scale)
    if log_scale is None:
        return family, [loc], [scale]
    if scale != 1.0:
        raise ValueError(f"fastvae.{where}: `log_scale` and `scale` exclude each other, got `scale` {scale}")
    learned = isinstance(log_scale, Tensor) and isinstance(loc, Tensor) and log_scale.shape != loc.shape
    return f"{family}_learned" if learned else f"{family}_per_element", [loc, log_scale], []


def continuous_bernoulli_nll(logits: Tensor, target: Tensor, *, draws: int | None = None) -> Tensor:
    """-log of the continuous Bernoulli of every row, in nats: a density of grey values, which `bernoulli_nll` is not.

    Per element log((e^a - 1) / a) - a t for logit a and target t in [0, 1] (Loaiza-Ganem and Cunningham 2019), which
    is `bernoulli_nll` less the log of its missing normaliser. Exact near a = 0, too. It is a density, and so may be
    negative.

    Args:
        logits: (B, ...), before the sigmoid. The mean is not their sigmoid: see likelihoods.ContinuousBernoulli.
        target: the shape of `logits`, in [0, 1]: floating, or uint8 read as x / 255. It must not require a gradient.
        draws: K says that the parameters hold K draws, (K, B, ...), for one target, (B, ...), which is read and not
            repeated; the result is (K, B). A learned scale or a (G,) dispersion serves all draws.

    Returns:
        (B,), float32 (float64 for float64 logits).

    Raises:
        TypeError: a dtype or kind that does not fit.
        ValueError: a shape or device that does not fit, or a target that requires a gradient.
    """
    return loss.nll("continuous_bernoulli", [logits], target, draws=draws)[0]


def gamma_nll(log_scale: Tensor, target: Tensor, *, shape: float, draws: int | None = None) -> Tensor:
    """-log Gamma(target | shape, e^log_scale) of every row, in nats: positive data whose spread grows with its mean.

    Per element, for shape k and log-scale s: log Gamma(k) + k s - (k - 1) log x + x e^-s. The mean is k e^s.

    With `shape` 1 it is the exponential, s + x e^-s: the likelihood of a power spectrum whose mean is e^s. Less the
    log x + 1 of the data, which no parameter sees, it is the Itakura-Saito loss x / e^s - log(x / e^s) - 1 (Fevotte,
    Bertin and Durrieu 2009, section 2: maximum likelihood of a complex Gaussian of that variance).

    Args:
        log_scale: (B, ...), log of the scale.
        target: the shape of `log_scale`, positive: of its dtype or float32. (Pixels have zeros: uint8 is refused.) A
            zero is data like any other for `shape` 1. Elsewhere its value is the limit, +inf for a larger shape and
            -inf for a smaller, and its gradient is finite. It must not require a gradient.
        shape: k, a positive number.
        draws: K says that the parameters hold K draws, (K, B, ...), for one target, (B, ...), which is read and not
            repeated; the result is (K, B). A learned scale or a (G,) dispersion serves all draws.

    Returns:
        (B,), float32 (float64 for a float64 log_scale).

    Raises:
        TypeError: a dtype or kind that does not fit.
        ValueError: a shape or device that does not fit, a `shape` that is not positive, or a target that requires a
            gradient.
    """
    return loss.nll(
        "gamma", [log_scale], target, [checked_positive("gamma_nll", "shape", shape)], draws=draws
    )[0]
