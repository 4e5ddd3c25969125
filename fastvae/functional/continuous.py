"""Continuous densities, element by element, and the Bernoulli, whose kernel is of the same kind."""

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


def bernoulli_nll(
    logits: Tensor,
    target: Tensor,
    *,
    validate: bool = False,
    draws: int | None = None,
    weight: Tensor | None = None,
) -> Tensor:
    """Compute -log Bernoulli(target | sigmoid(logits)) of every row, in nats.

    Per element, max(a, 0) - a t + log(1 + e^-|a|) for logit a and target t (Kingma and Welling 2014, appendix C.1).
    Grey targets, strictly between 0 and 1, give the cross-entropy. It is not normalised, so bits per dimension cannot
    be computed from it.

    Args:
        logits: (B, ...), before the sigmoid.
        target: the shape of `logits`, in [0, 1]: floating, bool, or uint8 read as x / 255. It must not require a
            gradient.
        validate: check every value first, and report the first value of `target` that is more than 1e-4 outside [0, 1],
            and the first weight that is negative, infinite or NaN. What has a weight of 0 is not checked. Reading the
            values waits for the GPU.
        draws: K if the parameters hold K draws, (K, B, ...), for one target, (B, ...), which is read without being
            repeated. The result is then (K, B). A learned scale or a (G,) dispersion is shared by all draws.
        weight: multiplies the nll of each element: bool, uint8 (read as a number, not as x / 255) or floating, at
            least 0, in the shape of `target` or with sizes of 1, which are read in place. Elements of weight 0 are
            left out: even NaN or inf there, in the parameters or in `target`, reach neither value nor gradient. It
            must not require a gradient. With `draws`, it belongs to the target and is shared by all draws.

    Returns:
        (B,), float32 (float64 for float64 logits).

    Raises:
        TypeError: If an argument has the wrong type or dtype.
        ValueError: If a shape or device is wrong, the target requires a gradient, or `validate` finds an invalid value.
    """
    return loss.nll("bernoulli", [logits], target, [], draws=draws, weight=weight, validate=validate)[0]


def gaussian_nll(
    mean: Tensor,
    target: Tensor,
    logvar: Tensor | None = None,
    *,
    scale: float = 1.0,
    logvar_bounds: tuple[float, float] | None = None,
    validate: bool = False,
    draws: int | None = None,
    weight: Tensor | None = None,
) -> Tensor:
    """Compute -log N(target | mean, variance) of every row, in nats, with the constant 1/2 log 2 pi of each element.

    Per element, 1/2 [ log 2 pi + log s^2 + (x - m)^2 / s^2 ] (Kingma and Welling 2014, appendix C.2).

    Args:
        mean: (B, ...).
        target: the shape of `mean`: floating, or uint8 read as x / 255. It gets a gradient if it requires one.
        logvar: the log-variance log s^2: the shape of `mean` (per element), or 0-dimensional (one learned variance).
        scale: the standard deviation s if there is no `logvar`; a positive number.
        logvar_bounds: (lo, hi), a smooth clamp of `logvar`: log s^2 is mid + half tanh((logvar - mid) / half) with
            mid = (lo + hi) / 2 and half = (hi - lo) / 2. If a model fits some data exactly, such as flat parts of an
            image, the best variance is 0 and the loss has no lower bound; the clamp gives it one. It is close to the
            identity in the middle, and has a gradient outside the bounds too.
        validate: check every value first, and report the first value of `target` that is infinite or NaN, and the first
            weight that is negative, infinite or NaN. What has a weight of 0 is not checked. Reading the values waits
            for the GPU.
        draws: K if the parameters hold K draws, (K, B, ...), for one target, (B, ...), which is read without being
            repeated. The result is then (K, B). A learned scale or a (G,) dispersion is shared by all draws.
        weight: multiplies the nll of each element: bool, uint8 (read as a number, not as x / 255) or floating, at
            least 0, in the shape of `target` or with sizes of 1, which are read in place. Elements of weight 0 are
            left out: even NaN or inf there, in the parameters or in `target`, reach neither value nor gradient. It
            must not require a gradient. With `draws`, it belongs to the target and is shared by all draws.

    Returns:
        (B,), float32 (float64 for a float64 mean).

    Raises:
        TypeError: If an argument has the wrong type or dtype (pass a learned scale as `logvar`).
        ValueError: If a shape, device, `scale` or the bounds are wrong, `logvar` and `scale` are both passed,
            `logvar_bounds` is passed without `logvar`, or `validate` finds an invalid value.
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
                f"fastvae.gaussian_nll: `logvar_bounds` requires `logvar`, got `logvar_bounds` {logvar_bounds!r} alone"
            )
        return loss.nll("gaussian", [mean], target, [scale], draws=draws, weight=weight, validate=validate)[0]
    if scale != 1.0:
        raise ValueError(
            f"fastvae.gaussian_nll: `logvar` and `scale` exclude each other, got `scale` {scale}"
        )
    learned = isinstance(logvar, Tensor) and isinstance(mean, Tensor) and logvar.shape != mean.shape
    if logvar_bounds is None:
        return loss.nll(
            "gaussian_learned" if learned else "gaussian_per_element",
            [mean, logvar],
            target,
            [],
            draws=draws,
            weight=weight,
            validate=validate,
        )[0]
    bounds = checked_bounds("gaussian_nll", logvar_bounds)
    if not learned:
        return loss.nll(
            "gaussian_bounded_per_element",
            [mean, logvar],
            target,
            list(bounds),
            draws=draws,
            weight=weight,
            validate=validate,
        )[0]
    check_floating("gaussian_nll", "mean", mean)
    check_learned("gaussian_nll", "logvar", logvar, "mean", mean)
    return loss.nll(
        "gaussian_learned",
        [mean, smooth_clamp(logvar, bounds)],
        target,
        [],
        draws=draws,
        weight=weight,
        validate=validate,
    )[0]


def gaussian_head_nll(
    params: Tensor,
    target: Tensor,
    *,
    logvar_bounds: tuple[float, float] | None = None,
    validate: bool = False,
    draws: int | None = None,
    weight: Tensor | None = None,
) -> Tensor:
    """Compute `gaussian_nll` from mean and log-variance packed in one tensor, whose gradient is packed in the same way.

    Args:
        params: (B, 2C, ...): the C channels of the mean, then the C channels of the log-variance.
        target: (B, C, ...): floating, or uint8 read as x / 255. It gets a gradient if it requires one.
        logvar_bounds: (lo, hi), a smooth clamp of the log-variance, as in `gaussian_nll`; it needs no extra memory.
        validate: check every value first, and report the first value of `target` that is infinite or NaN, and the first
            weight that is negative, infinite or NaN. What has a weight of 0 is not checked. Reading the values waits
            for the GPU.
        draws: K if the parameters hold K draws, (K, B, ...), for one target, (B, ...), which is read without being
            repeated. The result is then (K, B). A learned scale or a (G,) dispersion is shared by all draws.
        weight: multiplies the nll of each element: bool, uint8 (read as a number, not as x / 255) or floating, at
            least 0, in the shape of `target` or with sizes of 1, which are read in place. Elements of weight 0 are
            left out: even NaN or inf there, in the parameters or in `target`, reach neither value nor gradient. It
            must not require a gradient. With `draws`, it belongs to the target and is shared by all draws.

    Returns:
        (B,) in nats, float32 (float64 for float64 params).

    Raises:
        TypeError: If an argument has the wrong type or dtype.
        ValueError: If a shape, a device or the bounds are wrong, or `validate` finds an invalid value.
    """
    if logvar_bounds is None:
        return loss.nll("gaussian_head", [params], target, [], draws=draws, weight=weight, validate=validate)[
            0
        ]
    bounds = checked_bounds("gaussian_head_nll", logvar_bounds)
    return loss.nll(
        "gaussian_bounded_head", [params], target, list(bounds), draws=draws, weight=weight, validate=validate
    )[0]


def smooth_clamp(logvar: Tensor, bounds: Sequence[float]) -> Tensor:
    """Apply `bounded_logvar` in float32 (float64 for float64)."""
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
        raise ValueError(f"fastvae.{where}: `{name}` must be finite with lo < hi, got {(lo, hi)}")
    return lo, hi


def laplace_nll(
    loc: Tensor,
    target: Tensor,
    log_scale: Tensor | None = None,
    *,
    scale: float = 1.0,
    validate: bool = False,
    draws: int | None = None,
    weight: Tensor | None = None,
) -> Tensor:
    """Compute -log Laplace(target | loc, scale) of every row, in nats: the normalised form of an L1 loss.

    Per element, log 2b + |x - m| / b for a scale b. The gradient at x = m is 0.

    Args:
        loc: (B, ...), the median and mean m.
        target: the shape of `loc`: floating, or uint8 read as x / 255. It gets a gradient if it requires one.
        log_scale: log b: the shape of `loc` (per element), or 0-dimensional (one learned scale).
        scale: b if there is no `log_scale`; a positive number.
        validate: check every value first, and report the first value of `target` that is infinite or NaN, and the first
            weight that is negative, infinite or NaN. What has a weight of 0 is not checked. Reading the values waits
            for the GPU.
        draws: K if the parameters hold K draws, (K, B, ...), for one target, (B, ...), which is read without being
            repeated. The result is then (K, B). A learned scale or a (G,) dispersion is shared by all draws.
        weight: multiplies the nll of each element: bool, uint8 (read as a number, not as x / 255) or floating, at
            least 0, in the shape of `target` or with sizes of 1, which are read in place. Elements of weight 0 are
            left out: even NaN or inf there, in the parameters or in `target`, reach neither value nor gradient. It
            must not require a gradient. With `draws`, it belongs to the target and is shared by all draws.

    Returns:
        (B,), float32 (float64 for a float64 loc).

    Raises:
        TypeError: If an argument has the wrong type or dtype (pass a learned scale as `log_scale`).
        ValueError: If a shape, device or `scale` is wrong, `log_scale` and `scale` are both passed, or `validate` finds
            an invalid value.
    """
    name, params, constants = _scale_variant("laplace", loc, log_scale, scale)
    return loss.nll(name, params, target, constants, draws=draws, weight=weight, validate=validate)[0]


def laplace_head_nll(
    params: Tensor,
    target: Tensor,
    *,
    validate: bool = False,
    draws: int | None = None,
    weight: Tensor | None = None,
) -> Tensor:
    """Compute `laplace_nll` from location and log-scale packed in one tensor, whose gradient is packed in the same way.

    Args:
        params: (B, 2C, ...): the C channels of the location, then the C channels of the log-scale.
        target: (B, C, ...): floating, or uint8 read as x / 255. It gets a gradient if it requires one.
        validate: check every value first, and report the first value of `target` that is infinite or NaN, and the first
            weight that is negative, infinite or NaN. What has a weight of 0 is not checked. Reading the values waits
            for the GPU.
        draws: K if the parameters hold K draws, (K, B, ...), for one target, (B, ...), which is read without being
            repeated. The result is then (K, B). A learned scale or a (G,) dispersion is shared by all draws.
        weight: multiplies the nll of each element: bool, uint8 (read as a number, not as x / 255) or floating, at
            least 0, in the shape of `target` or with sizes of 1, which are read in place. Elements of weight 0 are
            left out: even NaN or inf there, in the parameters or in `target`, reach neither value nor gradient. It
            must not require a gradient. With `draws`, it belongs to the target and is shared by all draws.

    Returns:
        (B,) in nats, float32 (float64 for float64 params).

    Raises:
        TypeError: If an argument has the wrong type or dtype.
        ValueError: If a shape or device is wrong, or `validate` finds an invalid value.
    """
    return loss.nll("laplace_head", [params], target, draws=draws, weight=weight, validate=validate)[0]


def student_t_nll(
    loc: Tensor,
    target: Tensor,
    log_scale: Tensor | None = None,
    *,
    df: float,
    scale: float = 1.0,
    validate: bool = False,
    draws: int | None = None,
    weight: Tensor | None = None,
) -> Tensor:
    """Compute -log of Student's t density with `df` degrees of freedom, of every row, in nats.

    Unlike a Gaussian, it is robust: the gradient of an outlier falls off as 1 / z. Per element, for z = (x - m) / s and
    v degrees of freedom: (v + 1)/2 log(1 + z^2 / v) + log s + log B(v/2, 1/2) + 1/2 log v (Lange, Little and Taylor
    1989).

    Args:
        loc: (B, ...), the centre m.
        target: the shape of `loc`: floating, or uint8 read as x / 255. It gets a gradient if it requires one.
        log_scale: log s: the shape of `loc` (per element), or 0-dimensional (one learned scale).
        df: the degrees of freedom v, a positive number. 1 gives the Cauchy; towards infinity, it approaches the
            Gaussian.
        scale: s if there is no `log_scale`; a positive number.
        validate: check every value first, and report the first value of `target` that is infinite or NaN, and the first
            weight that is negative, infinite or NaN. What has a weight of 0 is not checked. Reading the values waits
            for the GPU.
        draws: K if the parameters hold K draws, (K, B, ...), for one target, (B, ...), which is read without being
            repeated. The result is then (K, B). A learned scale or a (G,) dispersion is shared by all draws.
        weight: multiplies the nll of each element: bool, uint8 (read as a number, not as x / 255) or floating, at
            least 0, in the shape of `target` or with sizes of 1, which are read in place. Elements of weight 0 are
            left out: even NaN or inf there, in the parameters or in `target`, reach neither value nor gradient. It
            must not require a gradient. With `draws`, it belongs to the target and is shared by all draws.

    Returns:
        (B,), float32 (float64 for a float64 loc).

    Raises:
        TypeError: If an argument has the wrong type or dtype (pass a learned scale as `log_scale`).
        ValueError: If a shape, device, `df` or `scale` is wrong, `log_scale` and `scale` are both passed, or `validate`
            finds an invalid value.
    """
    df = checked_positive("student_t_nll", "df", df)
    name, params, constants = _scale_variant("student_t", loc, log_scale, scale)
    return loss.nll(name, params, target, [df, *constants], draws=draws, weight=weight, validate=validate)[0]


def student_t_head_nll(
    params: Tensor,
    target: Tensor,
    *,
    df: float,
    validate: bool = False,
    draws: int | None = None,
    weight: Tensor | None = None,
) -> Tensor:
    """Compute `student_t_nll` from location and log-scale packed in one tensor, whose gradient is packed likewise.

    Args:
        params: (B, 2C, ...): the C channels of the location, then the C channels of the log-scale.
        target: (B, C, ...): floating, or uint8 read as x / 255. It gets a gradient if it requires one.
        df: the degrees of freedom, a positive number.
        validate: check every value first, and report the first value of `target` that is infinite or NaN, and the first
            weight that is negative, infinite or NaN. What has a weight of 0 is not checked. Reading the values waits
            for the GPU.
        draws: K if the parameters hold K draws, (K, B, ...), for one target, (B, ...), which is read without being
            repeated. The result is then (K, B). A learned scale or a (G,) dispersion is shared by all draws.
        weight: multiplies the nll of each element: bool, uint8 (read as a number, not as x / 255) or floating, at
            least 0, in the shape of `target` or with sizes of 1, which are read in place. Elements of weight 0 are
            left out: even NaN or inf there, in the parameters or in `target`, reach neither value nor gradient. It
            must not require a gradient. With `draws`, it belongs to the target and is shared by all draws.

    Returns:
        (B,) in nats, float32 (float64 for float64 params).

    Raises:
        TypeError: If an argument has the wrong type or dtype.
        ValueError: If a shape, device or `df` is wrong, or `validate` finds an invalid value.
    """
    return loss.nll(
        "student_t_head",
        [params],
        target,
        [checked_positive("student_t_head_nll", "df", df)],
        draws=draws,
        weight=weight,
        validate=validate,
    )[0]


def _scale_variant(
    density: str, loc: Any, log_scale: Any, scale: Any
) -> tuple[str, list[Tensor], list[float]]:
    """The variant for a scale that is fixed, learned or per element, as (name, params, constants)."""
    where = f"{density}_nll"
    if isinstance(scale, Tensor):
        raise TypeError(
            f"fastvae.{where}: `scale` must be a float, got Tensor; pass a scale that is a tensor as "
            "`log_scale` = scale.log()"
        )
    scale = checked_scale(where, scale)
    if log_scale is None:
        return density, [loc], [scale]
    if scale != 1.0:
        raise ValueError(f"fastvae.{where}: `log_scale` and `scale` exclude each other, got `scale` {scale}")
    learned = isinstance(log_scale, Tensor) and isinstance(loc, Tensor) and log_scale.shape != loc.shape
    return f"{density}_learned" if learned else f"{density}_per_element", [loc, log_scale], []


def continuous_bernoulli_nll(
    logits: Tensor,
    target: Tensor,
    *,
    validate: bool = False,
    draws: int | None = None,
    weight: Tensor | None = None,
) -> Tensor:
    """Compute -log of the continuous Bernoulli of every row, in nats: unlike `bernoulli_nll`, a density of grey values.

    Per element, log((e^a - 1) / a) - a t for logit a and target t in [0, 1] (Loaiza-Ganem and Cunningham 2019), which
    is `bernoulli_nll` minus the log of its missing normaliser. It is accurate near a = 0 too. Because it is a density,
    the result may be negative.

    Args:
        logits: (B, ...), before the sigmoid, which is not the mean here: see likelihoods.ContinuousBernoulli.
        target: the shape of `logits`, in [0, 1]: floating, or uint8 read as x / 255. It must not require a gradient.
        validate: check every value first, and report the first value of `target` that is more than 1e-4 outside [0, 1],
            and the first weight that is negative, infinite or NaN. What has a weight of 0 is not checked. Reading the
            values waits for the GPU.
        draws: K if the parameters hold K draws, (K, B, ...), for one target, (B, ...), which is read without being
            repeated. The result is then (K, B). A learned scale or a (G,) dispersion is shared by all draws.
        weight: multiplies the nll of each element: bool, uint8 (read as a number, not as x / 255) or floating, at
            least 0, in the shape of `target` or with sizes of 1, which are read in place. Elements of weight 0 are
            left out: even NaN or inf there, in the parameters or in `target`, reach neither value nor gradient. It
            must not require a gradient. With `draws`, it belongs to the target and is shared by all draws.

    Returns:
        (B,), float32 (float64 for float64 logits).

    Raises:
        TypeError: If an argument has the wrong type or dtype.
        ValueError: If a shape or device is wrong, the target requires a gradient, or `validate` finds an invalid value.
    """
    return loss.nll("continuous_bernoulli", [logits], target, draws=draws, weight=weight, validate=validate)[
        0
    ]


def gamma_nll(
    log_scale: Tensor,
    target: Tensor,
    *,
    shape: float,
    validate: bool = False,
    draws: int | None = None,
    weight: Tensor | None = None,
) -> Tensor:
    """Compute -log Gamma(target | shape, e^log_scale) of every row, in nats, for positive data.

    The spread of such data grows with their mean, k e^s. Per element, for shape k and log-scale s:
    log Gamma(k) + k s - (k - 1) log x + x e^-s.

    With `shape` 1, this is the exponential, s + x e^-s: the likelihood of a power spectrum with mean e^s. Up to the
    term log x + 1, which depends on the data only, it is the Itakura-Saito loss x / e^s - log(x / e^s) - 1 (Fevotte,
    Bertin and Durrieu 2009, section 2: the maximum likelihood of a complex Gaussian with that variance).

    Args:
        log_scale: (B, ...), log of the scale.
        target: the shape of `log_scale`, positive, of its dtype or float32. uint8 is refused because pixels may be 0. A
            target of 0 is valid for `shape` 1. Otherwise its value is the limit, +inf for a larger shape and -inf for a
            smaller one, and its gradient is finite. It must not require a gradient.
        shape: k, a positive number.
        validate: check every value first, and report the first value of `target` that is not positive (for `shape` 1:
            negative) or not finite, and the first weight that is negative, infinite or NaN. What has a weight of 0 is
            not checked. Reading the values waits for the GPU.
        draws: K if the parameters hold K draws, (K, B, ...), for one target, (B, ...), which is read without being
            repeated. The result is then (K, B). A learned scale or a (G,) dispersion is shared by all draws.
        weight: multiplies the nll of each element: bool, uint8 (read as a number, not as x / 255) or floating, at
            least 0, in the shape of `target` or with sizes of 1, which are read in place. Elements of weight 0 are
            left out: even NaN or inf there, in the parameters or in `target`, reach neither value nor gradient. It
            must not require a gradient. With `draws`, it belongs to the target and is shared by all draws.

    Returns:
        (B,), float32 (float64 for a float64 log_scale).

    Raises:
        TypeError: If an argument has the wrong type or dtype.
        ValueError: If a shape or device is wrong, the argument `shape` is not positive, the target requires a gradient,
            or `validate` finds an invalid value.
    """
    return loss.nll(
        "gamma",
        [log_scale],
        target,
        [checked_positive("gamma_nll", "shape", shape)],
        draws=draws,
        weight=weight,
        validate=validate,
    )[0]
