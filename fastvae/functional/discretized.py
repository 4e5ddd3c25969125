"""Data with few levels, usually bytes, under a density that is integrated over bins."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .._spec import Variant
from . import loss
from .checks import (
    check_floating,
    checked_int,
    device_message,
    dtype_name,
    is_dense,
    layout_message,
)

__all__ = ["discretized_logistic_mixture_nll", "discretized_logistic_nll"]


def discretized_logistic_nll(
    params: Tensor,
    target: Tensor,
    *,
    bits: int = 8,
    log_scale_floor: float = -7.0,
    min_mass: float = 1e-5,
    validate: bool = False,
    draws: int | None = None,
    weight: Tensor | None = None,
) -> Tensor:
    """Compute -log P(target | params) of every row under discretised logistics, in nats: a true likelihood of bytes.

    Data with 2^`bits` levels are scaled to x in [-1, 1]. The probability of a level is the mass of a logistic in its
    bin, which reaches half way to the neighbouring levels and, at both ends, to infinity (Salimans et al. 2017,
    equation 2; Kingma et al. 2016). As in the code of PixelCNN++, a mass below `min_mass` is replaced by the density in
    the middle of the bin times its width, so that its logarithm and gradient stay finite.

    Args:
        params: (B, 2C, ...): the C channels of the mean, in units of x, then the C channels of the log-scale.
        target: uint8 (B, C, ...), the levels 0, ..., 2^bits - 1, not scaled. Higher values count as the highest level.
        bits: 1 to 8.
        log_scale_floor: between -60 and 60. Log-scales below it count as equal to it, and get no gradient.
        min_mass: at least 0 and below 1. With 0, every probability is the mass of its bin, and the probabilities of all
            levels sum to exactly 1.
        validate: check every value first, and report the first level above the highest, and the first weight that is
            negative, infinite or NaN. What has a weight of 0 is not checked. Reading the values waits for the GPU.
        draws: K if the parameters hold K draws, (K, B, ...), for one target, (B, ...), which is read without being
            repeated. The result is then (K, B). A learned scale or a (G,) dispersion is shared by all draws.
        weight: multiplies the nll of each element: bool, uint8 (read as a number, not as x / 255) or floating, at
            least 0, in the shape of `target` or with sizes of 1, which are read in place. Elements of weight 0 are
            left out: even NaN or inf there, in the parameters or in `target`, reach neither value nor gradient. It
            must not require a gradient. With `draws`, it belongs to the target and is shared by all draws.

    Returns:
        (B,), float32 (float64 for float64 params).

    Raises:
        TypeError: If an argument has the wrong type or dtype.
        ValueError: If a shape, device or number is wrong, or `validate` finds a level out of range or an invalid
            weight.
    """
    where = "discretized_logistic_nll"
    constants = logistic_constants(where, bits, log_scale_floor, min_mass)
    return loss.nll(
        "discretized_logistic", [params], target, constants, draws=draws, weight=weight, validate=validate
    )[0]


def discretized_logistic_mixture_nll(
    params: Tensor,
    target: Tensor,
    *,
    components: int,
    bits: int = 8,
    log_scale_floor: float = -7.0,
    min_mass: float = 1e-5,
    validate: bool = False,
    draws: int | None = None,
    weight: Tensor | None = None,
) -> Tensor:
    """Compute -log P(target | params) of every row under mixtures of discretised logistics, in nats, as in PixelCNN++.

    All channels of a pixel share one component: -log sum_k pi_k prod_c P(channel c | k), with the masses of
    `discretized_logistic_nll`. If the channels are red, green and blue, the mean of green is m_g + a r and that of blue
    is m_b + b r + c g, where r and g are the values of the pixel (Salimans et al. 2017, equation 3).

    Args:
        params: (B, 10K, ...) for three channels, in the order of PixelCNN++'s code (and NVAE's and VDVAE's): K logits;
            then, for each channel, K means, K log-scales and K numbers whose tanh are a (in the place of red), b (of
            green) and c (of blue). (B, 3K, ...) for one channel: K logits, K means, K log-scales.
        target: uint8 (B, 3, ...) or (B, 1, ...), as for `discretized_logistic_nll`.
        components: K, at least 1.
        bits, log_scale_floor, min_mass, validate: as for `discretized_logistic_nll`.
        draws: K if the parameters hold K draws, (K, B, ...), for one target, (B, ...), which is read without being
            repeated. The result is then (K, B). A learned scale or a (G,) dispersion is shared by all draws.
        weight: multiplies the nll of each pixel, whose channels share it: bool, uint8 (read as a number) or floating,
            at least 0, (B, ...) without the dimension of channels or (B, 1, ...), where any size may be 1. Pixels of
            weight 0 are left out: even NaN or inf in their parameters reach neither value nor gradient. It must not
            require a gradient. With `draws`, it belongs to the target and is shared by all draws.

    Returns:
        (B,), float32 (float64 for float64 params).

    Raises:
        TypeError: If an argument has the wrong type or dtype.
        ValueError: If a shape, device or number is wrong, or `validate` finds a level out of range or an invalid
            weight.
    """
    where = "discretized_logistic_mixture_nll"
    constants = [
        checked_int(where, "components", components, 1, None),
        *logistic_constants(where, bits, log_scale_floor, min_mass),
    ]
    return loss.nll(
        "discretized_logistic_mixture",
        [params],
        target,
        constants,
        draws=draws,
        weight=weight,
        validate=validate,
    )[0]


def logistic_constants(where: str, bits: Any, log_scale_floor: Any, min_mass: Any) -> list[float]:
    checked_int(where, "bits", bits, 1, 8)
    for name, value in (("log_scale_floor", log_scale_floor), ("min_mass", min_mass)):
        if not isinstance(value, (int, float)) or isinstance(value, bool):
            raise TypeError(f"fastvae.{where}: `{name}` must be a float, got {value!r}")
    if not -60 <= log_scale_floor <= 60:
        raise ValueError(
            f"fastvae.{where}: `log_scale_floor` must be between -60 and 60, got {log_scale_floor}"
        )
    if not 0 <= min_mass < 1:
        raise ValueError(f"fastvae.{where}: `min_mass` must be at least 0 and below 1, got {min_mass}")
    # Integers stay int because torch.compile treats a module's ints as constants, but its floats as inputs.
    return [bits, float(log_scale_floor), float(min_mass)]


def mixture_planes(components: int, channels: int) -> int:
    """The channels of a mixture's decoder: logits, means and log-scales, and coefficients for three channels."""
    return components * (10 if channels == 3 else 3)


def _check(
    where: str,
    names: Sequence[str],
    variant: Variant,
    params: Sequence[Any],
    target: Any,
    name: str,
    constants: Sequence[float],
) -> Sequence[Tensor]:
    check_floating(where, names[0], params[0])
    if isinstance(target, Tensor) and not is_dense(target):
        raise TypeError(layout_message(where, name, target))
    _check_levels(where, names[0], params[0], name, target, constants)
    return params


loss.CHECKS["discretized"] = _check


def _check_levels(
    where: str, name: str, params: Tensor, target_name: str, target: Any, constants: Sequence[float]
) -> None:
    """Check the target of a discretised likelihood, and that the decoder has the channels it needs."""
    if not isinstance(target, Tensor):
        raise TypeError(f"fastvae.{where}: `{target_name}` must be a Tensor, got {type(target).__name__}")
    if target.dtype != torch.uint8:
        top = 2 ** int(constants[-3]) - 1
        hint = f"did you mean {target_name}.to(torch.uint8)?"
        if target.is_floating_point():
            hint = (
                f"for data in [0, 1], pass ({target_name} * {top}).round().to(torch.uint8); for data in [-1, 1], pass "
                f"(({target_name} + 1) * {top / 2:g}).round().to(torch.uint8)"
            )
        raise TypeError(
            f"fastvae.{where}: `{target_name}` must be uint8 levels, got {dtype_name(target.dtype)}; {hint}"
        )
    if target.device != params.device:
        raise ValueError(device_message(where, target_name, target, name, params))
    components = int(constants[0]) if len(constants) == 4 else None
    if target.dim() < 2 or (components is not None and target.shape[1] not in (1, 3)):
        required = "(B, C, ...)" if components is None else "(B, 3, ...) or (B, 1, ...)"
        raise ValueError(
            f"fastvae.{where}: `{target_name}` must have shape {required}, got {tuple(target.shape)}"
        )
    channels = target.shape[1]
    planes = 2 * channels if components is None else mixture_planes(components, channels)
    expected = (target.shape[0], planes, *target.shape[2:])
    if params.shape != expected:
        contents = "mean and log-scale" if components is None else f"{components} components"
        raise ValueError(
            f"fastvae.{where}: `{name}` must have shape {tuple(expected)}, {contents} for `{target_name}` "
            f"{tuple(target.shape)}, got {tuple(params.shape)}"
        )
