"""The fake kernels, which take the arguments of an op and return empty results of the right shapes and types."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .._spec import VARIANTS
from . import latents
from .launch import memory_order, row_dtype
from .loss import NONE


def _empty_gradients(tensors: Sequence[Tensor], needs: int) -> list[Tensor]:
    """A gradient of the first tensor's shape for each bit of `needs` that belongs to one of `tensors`."""
    lead = tensors[0]
    order = memory_order(lead)
    return [torch.empty_like(lead, memory_format=order) for i in range(len(tensors)) if needs >> i & 1]


def _dense_gradients(likelihood: str) -> bool:
    """Whether gradients are contiguous, rather than in the memory order of the first tensor."""
    variant = VARIANTS[likelihood]
    return not variant.element and variant.family in ("counts", "categorical")


def _gradients_of(likelihood: str, params: Sequence[Tensor], needs: int) -> list[Tensor]:
    if _dense_gradients(likelihood):
        return [
            torch.empty_like(p, memory_format=torch.contiguous_format)
            for i, p in enumerate(params)
            if needs >> i & 1
        ]
    return _empty_gradients(params, needs)


def nll_forward(
    likelihood: str,
    params: Sequence[Tensor],
    target: Tensor,
    constants: Sequence[float],
    kl: Tensor | None,
    beta: Tensor | None,
    reduction: int,
    needs: int,
    weight: Tensor | None = None,
) -> tuple[Tensor, Tensor, list[Tensor], Tensor]:
    variant, lead = VARIANTS[likelihood], params[0]
    rows, dtype = lead.shape[0], row_dtype(lead)
    loss_dtype = torch.float64 if kl is not None and kl.dtype == torch.float64 else dtype
    elementwise = params[:-1] if variant.has_scalar else params
    with_scalar = variant.has_scalar and needs >> len(elementwise) & 1
    return (
        lead.new_empty((rows,) if reduction == NONE else (), dtype=loss_dtype),
        lead.new_empty((rows,), dtype=dtype),
        _gradients_of(likelihood, elementwise, needs),
        lead.new_empty((rows if with_scalar else 0,), dtype=dtype),
    )


def nll_gradient(
    likelihood: str,
    params: Sequence[Tensor],
    target: Tensor,
    constants: Sequence[float],
    grad_loss: Tensor | None,
    grad_nll: Tensor | None,
    reduction: int,
    needs: int,
    weight: Tensor | None = None,
) -> list[Tensor]:
    return _gradients_of(likelihood, params, needs)


def nll_backward_(
    grad_loss: Tensor | None,
    grad_nll: Tensor | None,
    gradients: Sequence[Tensor],
    scalar_rows: Tensor | None,
    kl: Tensor | None,
    beta: Tensor | None,
    rows: int,
    reduction: int,
    need_kl: bool,
    need_beta: bool,
) -> list[Tensor]:
    extras = [scalar_rows.new_empty(())] if scalar_rows is not None else []
    if need_kl and kl is not None:
        extras.append(torch.empty_like(kl, memory_format=torch.contiguous_format))
    if need_beta and beta is not None:
        extras.append(beta.new_empty(()))
    return extras


def nll_backward(
    grad_loss: Tensor | None, grad_nll: Tensor | None, gradients: Sequence[Tensor], *rest: Any
) -> list[Tensor]:
    scaled = [torch.empty_like(gradient) for gradient in gradients]
    return scaled + nll_backward_(grad_loss, grad_nll, gradients, *rest)


def nll_elements_forward(
    likelihood: str,
    params: Sequence[Tensor],
    target: Tensor,
    constants: Sequence[float],
    factor: float,
    needs: int,
    weight: Tensor | None = None,
) -> tuple[Tensor, list[Tensor]]:
    lead = params[0]

    def empty() -> Tensor:
        return torch.empty_like(lead, dtype=row_dtype(lead), memory_format=memory_order(lead))

    return empty(), [empty() for i in range(len(params)) if needs >> i & 1]


def nll_elements_backward_(grad: Tensor, derivatives: Sequence[Tensor], shared: int) -> list[Tensor]:
    return [derivatives[shared].new_empty(derivatives[shared].shape[1:])] if shared >= 0 else []


def nll_elements_backward(
    grad: Tensor, derivatives: Sequence[Tensor], shared: int, dtype: torch.dtype
) -> list[Tensor]:
    gradients = [torch.empty_like(derivative, dtype=dtype) for derivative in derivatives]
    if shared >= 0:
        gradients[shared : shared + 1] = nll_elements_backward_(grad, derivatives, shared)
    return gradients


def _latent_shape(mu: Tensor, logvar: Tensor | None) -> tuple[int, ...]:
    """The shape of z for one draw, where mu may be a packed head."""
    return mu.shape if logvar is not None else (mu.shape[0], mu.shape[1] // 2, *mu.shape[2:])


def reparameterize_kl_forward(
    mu: Tensor,
    logvar: Tensor | None,
    prior_mu: Tensor | None,
    prior_logvar: Tensor | None,
    form: str,
    constants: Sequence[float],
    balance: float | None,
    per_element: bool,
    samples: int | None,
    seed: Tensor | None,
    row_offset: int,
    eps: Tensor | None,
    generator: torch.Generator | None,
) -> tuple[Tensor, Tensor, Tensor]:
    shape = _latent_shape(mu, logvar)
    return (
        mu.new_empty(shape if samples is None else (samples, *shape)),
        mu.new_empty(shape if per_element else shape[:1], dtype=row_dtype(mu)),
        mu.new_empty((0 if eps is not None else 2,), dtype=torch.int64),
    )


def gaussian_kl_forward(
    mu: Tensor,
    logvar: Tensor | None,
    prior_mu: Tensor | None,
    prior_logvar: Tensor | None,
    form: str,
    constants: Sequence[float],
    balance: float | None,
    per_element: bool,
) -> Tensor:
    shape = _latent_shape(mu, logvar)
    return mu.new_empty(shape if per_element else shape[:1], dtype=row_dtype(mu))


def _posterior_gradients(
    mu: Tensor, prior_mu: Tensor | None, needs: int, eps: Tensor | None = None
) -> list[Tensor]:
    """The two tensors of a pair have one shape, and the tensor of a packed head is the first of its pair."""
    firsts = (
        (latents.MU, mu),
        (latents.LOGVAR, mu),
        (latents.PRIOR_MU, prior_mu),
        (latents.PRIOR_LOGVAR, prior_mu),
    )
    gradients = [mu.new_empty(first.shape) for bit, first in firsts if needs & bit and first is not None]
    return gradients + ([mu.new_empty(eps.shape)] if needs & latents.EPS and eps is not None else [])


def reparameterize_kl_backward(
    grad_z: Tensor | None,
    grad_kl: Tensor | None,
    mu: Tensor,
    logvar: Tensor | None,
    prior_mu: Tensor | None,
    *rest: Any,
) -> list[Tensor]:
    *_, eps, needs = rest
    return _posterior_gradients(mu, prior_mu, needs, eps)


def gaussian_kl_backward(
    grad_kl: Tensor, mu: Tensor, logvar: Tensor | None, prior_mu: Tensor | None, *rest: Any
) -> list[Tensor]:
    return _posterior_gradients(mu, prior_mu, rest[-1])


def sample_log_probs_forward(
    mu: Tensor,
    logvar: Tensor | None,
    prior_mu: Tensor | None,
    prior_logvar: Tensor | None,
    form: str,
    constants: Sequence[float],
    stl: bool,
    samples: int,
    seed: Tensor | None,
    row_offset: int,
    eps: Tensor | None,
    generator: torch.Generator | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows = (samples, mu.shape[0])
    return (
        mu.new_empty((samples, *_latent_shape(mu, logvar))),
        mu.new_empty(rows, dtype=row_dtype(mu)),
        mu.new_empty(rows, dtype=row_dtype(mu)),
        mu.new_empty((0 if eps is not None else 2,), dtype=torch.int64),
    )


def sample_log_probs_backward(
    grad_z: Tensor | None,
    grad_log_q: Tensor | None,
    grad_log_p: Tensor | None,
    mu: Tensor,
    logvar: Tensor | None,
    prior_mu: Tensor | None,
    *rest: Any,
) -> list[Tensor]:
    return _posterior_gradients(mu, prior_mu, rest[-1])


def gaussian_mixture_log_prob_forward(
    z: Tensor, mu: Tensor, logvar: Tensor, log_weight: Tensor | None, joint: bool, per_dimension: bool
) -> tuple[Tensor, Tensor]:
    dtype = row_dtype(z)
    return (
        z.new_empty(z.shape[:1] if joint else 0, dtype=dtype),
        z.new_empty(z.shape if per_dimension else 0, dtype=dtype),
    )


def gaussian_mixture_log_prob_backward(
    grad_joint: Tensor | None,
    grad_per_dimension: Tensor | None,
    z: Tensor,
    mu: Tensor,
    logvar: Tensor,
    log_weight: Tensor | None,
    joint: Tensor,
    per_dimension: Tensor,
    needs: int,
) -> list[Tensor]:
    inputs = (z, mu, logvar, log_weight)
    return [t.new_empty(t.shape) for i, t in enumerate(inputs) if t is not None and needs >> i & 1]
