"""The log-density of mixtures of diagonal Gaussians."""

from typing import Any, Literal, overload

import torch
from torch import Tensor

from ..backends import choose
from .checks import (
    check_beside,
    check_floating,
    check_like,
    device_message,
    dtype_name,
    is_dense,
    layout_message,
)

__all__ = ["gaussian_mixture_log_prob"]


@overload
def gaussian_mixture_log_prob(
    z: Tensor,
    mu: Tensor,
    logvar: Tensor,
    log_weight: Tensor | None = None,
    *,
    per_dimension: bool = False,
    validate: bool = False,
) -> Tensor: ...
@overload
def gaussian_mixture_log_prob(
    z: Tensor,
    mu: Tensor,
    logvar: Tensor,
    log_weight: Tensor | None = None,
    *,
    per_dimension: Literal["both"],
    validate: bool = False,
) -> tuple[Tensor, Tensor]: ...


def gaussian_mixture_log_prob(
    z: Tensor,
    mu: Tensor,
    logvar: Tensor,
    log_weight: Tensor | None = None,
    *,
    per_dimension: bool | str = False,
    validate: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Log-density of a mixture of M diagonal Gaussians at B points, in nats: log sum_m w_m N(z_b; mu_m, e^logvar_m).

    (Bishop 2006, equation 9.7.) It serves aggregate posteriors, whose components are the posteriors of other data, and
    mixture priors. No tensor of B x M x D elements is made: the components go by in tiles, and the backward pass
    computes their densities again. Memory is that of the arguments and of a few tensors of their sizes.

    Args:
        z: the points, (B, D), floating point.
        mu, logvar: means and log-variances of the components, (M, D), with z's dtype.
        log_weight: the log-weights of the components, (M,), or (B, M) if they differ from point to point; z's dtype, or
            float32 beside half precision. Their exponentials need not sum to 1, and -inf takes a component out.
            Without them every component weighs 1 / M.
        per_dimension: False returns the joint log-density, (B,). True returns that of every dimension by itself,
            log sum_m w_m N(z_bd; mu_md, e^logvar_md), (B, D). `"both"` returns the pair (joint, per dimension) in
            little more time than the second alone.
        validate: check that the weights sum to 1. Reading the values waits for the GPU.

    Returns:
        (B,), (B, D) or both; float32 (float64 for float64). All four tensors are differentiable. A point that no
        component reaches has the value -inf and no gradient.

    Raises:
        TypeError: If an argument has the wrong type or dtype.
        ValueError: If a shape or device is wrong, there are no components, `per_dimension` is unknown, or `validate`
            finds weights that do not sum to 1.
    """
    where = "gaussian_mixture_log_prob"
    _check_mixture(where, z, mu, logvar, log_weight)
    if not isinstance(per_dimension, bool) and per_dimension != "both":
        raise ValueError(
            f"fastvae.{where}: `per_dimension` must be one of False, True, 'both', got {per_dimension!r}"
        )
    if validate and log_weight is not None:
        _check_sum(where, log_weight)
    joint, of_each = choose.for_tensor(z, op=where).gaussian_mixture_log_prob(
        z, mu, logvar, log_weight, per_dimension is not True, per_dimension is not False
    )
    if per_dimension == "both":
        return joint, of_each
    return of_each if per_dimension else joint


def _check_mixture(where: str, z: Any, mu: Any, logvar: Any, log_weight: Any) -> None:
    check_floating(where, "z", z)
    if z.dim() != 2:
        hint = "; did you mean z.flatten(1)?" if z.dim() > 2 else ""
        raise ValueError(f"fastvae.{where}: `z` must have shape (B, D), got {tuple(z.shape)}{hint}")
    if not isinstance(mu, Tensor):
        raise TypeError(f"fastvae.{where}: `mu` must be a Tensor, got {type(mu).__name__}")
    if not is_dense(mu):
        raise TypeError(layout_message(where, "mu", mu))
    if mu.dtype != z.dtype:
        raise TypeError(
            f"fastvae.{where}: `mu` must be {dtype_name(z.dtype)}, like `z`, got {dtype_name(mu.dtype)}; "
            f"did you mean mu.to(z.dtype)?"
        )
    if mu.device != z.device:
        raise ValueError(device_message(where, "mu", mu, "z", z))
    if mu.dim() != 2 or mu.shape[1] != z.shape[1]:
        hint = "; did you mean mu.flatten(1)?" if mu.dim() > 2 else ""
        raise ValueError(
            f"fastvae.{where}: `mu` must have shape (M, {z.shape[1]}) for `z` {tuple(z.shape)}, got "
            f"{tuple(mu.shape)}{hint}"
        )
    if mu.shape[0] == 0:
        raise ValueError(
            f"fastvae.{where}: `mu` must have at least one component, got shape {tuple(mu.shape)}"
        )
    check_like(where, "logvar", logvar, "mu", mu)
    if log_weight is None:
        return
    check_beside(where, "log_weight", log_weight, "z", z)
    points, components = z.shape[0], mu.shape[0]
    # torch.compile cannot trace `in` for shapes with symbolic sizes.
    if log_weight.shape != (components,) and log_weight.shape != (points, components):
        raise ValueError(
            f"fastvae.{where}: `log_weight` must have shape ({components},) or ({points}, {components}) for `z` "
            f"{tuple(z.shape)} and `mu` {tuple(mu.shape)}, got {tuple(log_weight.shape)}"
        )


def _check_sum(where: str, log_weight: Tensor) -> None:
    sums = torch.logsumexp(log_weight.detach().to(torch.float64), -1).exp().reshape(-1)
    tolerance = 1e-4 if log_weight.dtype in (torch.float32, torch.float64) else 1e-2
    wrong = ((sums - 1).abs() > tolerance) | sums.isnan()
    if bool(wrong.any()):
        row = int(wrong.nonzero()[0])
        place = f" in row {row}" if log_weight.dim() == 2 else ""
        raise ValueError(
            f"fastvae.{where}: the exponentials of `log_weight` must sum to 1, got {sums[row].item():.6g}{place}; "
            "did you mean log_weight.log_softmax(-1)?"
        )
