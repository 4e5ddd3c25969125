"""Data of a few levels, bytes for the most part, under a density that is cut into bins."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .._spec import Variant
from . import loss
from .checks import check_floating, checked_int, device_message, dtype_name, is_dense, layout_message

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
) -> Tensor:
    """-log P(target | params) of every row under discretised logistics, in nats: a true likelihood of bytes.

    Data of 2^`bits` levels are scaled to x in [-1, 1]; a level has the mass that a logistic puts into its bin, which
    reaches half way to its neighbours and, at both ends, to infinity (Salimans et al. 2017, equation 2; Kingma et al.
    2016). As in the code of PixelCNN++, a mass below `min_mass` is that of the density in the middle of the bin, so
    that its logarithm and gradient stay finite.

    Args:
        params: (B, 2C, ...): the C channels of the mean, in units of x, then the C channels of the log-scale.
        target: uint8 (B, C, ...), the levels 0, ..., 2^bits - 1 as they are. Higher ones count as the highest.
        bits: 1 to 8.
        log_scale_floor: log-scales below it count as it, and get no gradient; between -60 and 60.
        min_mass: at least 0 and below 1; with 0 every mass is that of its bin, and the masses of all levels sum to
            1 exactly.
        validate: look for levels above the highest, and raise. It reads the target once more, and waits for a GPU.
        draws: K says that the parameters hold K draws, (K, B, ...), for one target, (B, ...), which is read and not
            repeated; the result is (K, B). A learned scale or a (G,) dispersion serves all draws.

    Returns:
        (B,), float32 (float64 for float64 params).

    Raises:
        TypeError: a dtype or kind that does not fit.
        ValueError: a shape, device or number that does not fit; with `validate`, a level out of range.
    """
    where = "discretized_logistic_nll"
    constants = logistic_constants(where, bits, log_scale_floor, min_mass)
    if validate:
        _check_range(where, "target", target, bits)
    return loss.nll("discretized_logistic", [params], target, constants, draws=draws)[0]


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
) -> Tensor:
    """-log P(target | params) of every row under mixtures of discretised logistics, in nats: PixelCNN++'s likelihood.

    A pixel has one component for all its channels, -log sum_k pi_k prod_c P(channel c | k), with the masses of
    `discretized_logistic_nll`. Of three channels, red green blue, the mean of green is m_g + a r and that of blue
    m_b + b r + c g, r and g being the pixel's own (Salimans et al. 2017, equation 3).

    Args:
        params: (B, 10K, ...) for three channels, in the order of PixelCNN++'s code (and NVAE's and VDVAE's): K logits;
            for each channel in turn K means, K log-scales, and K numbers whose tanh are a (in red's place), b (in
            green's) and c (in blue's). (B, 3K, ...) for one channel: K logits, K means, K log-scales.
        target: uint8 (B, 3, ...) or (B, 1, ...), as there.
        components: K, at least 1.
        bits, log_scale_floor, min_mass, validate: as there.
        draws: K says that the parameters hold K draws, (K, B, ...), for one target, (B, ...), which is read and not
            repeated; the result is (K, B). A learned scale or a (G,) dispersion serves all draws.

    Returns:
        (B,), float32 (float64 for float64 params).

    Raises:
        TypeError: a dtype or kind that does not fit.
        ValueError: a shape, device or number that does not fit; with `validate`, a level out of range.
    """
    where = "discretized_logistic_mixture_nll"
    constants = [
        checked_int(where, "components", components, 1, None),
        *logistic_constants(where, bits, log_scale_floor, min_mass),
    ]
    if validate:
        _check_range(where, "target", target, bits)
    return loss.nll("discretized_logistic_mixture", [params], target, constants, draws=draws)[0]


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
    # Whole numbers stay int: torch.compile takes a module's ints for constants, and its floats for inputs.
    return [bits, float(log_scale_floor), float(min_mass)]


def mixture_planes(components: int, channels: int) -> int:
    """Of a mixture's decoder: logits, means and log-scales, and of three channels as many coefficients."""
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
    """The target of a discretised likelihood and the channels that the decoder must have for it."""
    if not isinstance(target, Tensor):
        raise TypeError(f"fastvae.{where}: `{target_name}` must be a Tensor, got {type(target).__name__}")
    if target.dtype != torch.uint8:
        top = 2 ** int(constants[-3]) - 1
        hint = f"did you mean {target_name}.to(torch.uint8)?"
        if target.is_floating_point():
            hint = (
                f"of data in [0, 1] these are ({target_name} * {top}).round().to(torch.uint8), of data in [-1, 1] "
                f"(({target_name} + 1) * {top / 2:g}).round().to(torch.uint8)"
            )
        raise TypeError(
            f"fastvae.{where}: `{target_name}` must be uint8, the levels of the data as they are, got "
            f"{dtype_name(target.dtype)}; {hint}"
        )
    if target.device != params.device:
        raise ValueError(device_message(where, target_name, target, name, params))
    components = int(constants[0]) if len(constants) == 4 else None
    if target.dim() < 2 or (components is not None and target.shape[1] not in (1, 3)):
        wanted = "(B, C, ...)" if components is None else "(B, 3, ...) or (B, 1, ...)"
        raise ValueError(
            f"fastvae.{where}: `{target_name}` must have shape {wanted}, got {tuple(target.shape)}"
        )
    channels = target.shape[1]
    planes = 2 * channels if components is None else mixture_planes(components, channels)
    expected = (target.shape[0], planes, *target.shape[2:])
    if params.shape != expected:
        what = "mean and log-scale" if components is None else f"{components} components"
        raise ValueError(
            f"fastvae.{where}: `{name}` must have shape {tuple(expected)}, {what} for `{target_name}` "
            f"{tuple(target.shape)}, got {tuple(params.shape)}"
        )


def _check_range(where: str, name: str, target: Any, bits: int) -> None:
    # The checks of the loss have the words for what is none.
    levels = isinstance(target, Tensor) and target.dtype == torch.uint8 and is_dense(target)
    if levels and target.numel() > 0:
        highest = int(target.max())
        if highest >= 2**bits:
            raise ValueError(
                f"fastvae.{where}: `{name}` must have levels from 0 to {2**bits - 1} with `bits` {bits}, got {highest}"
            )
