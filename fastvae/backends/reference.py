"""The backend "reference": `fastvae.reference`, plain PyTorch, which is always available on any device."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import reference
from .base import Backend


def _reparameterize_kl(
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
) -> tuple[Tensor, Tensor]:
    return reference.reparameterize_kl(
        mu,
        logvar,
        prior_mu,
        prior_logvar,
        form=form,
        constants=constants,
        balance=balance,
        reduction="none" if per_element else "event",
        samples=samples,
        generator=generator,
        seed=seed,
        row_offset=row_offset,
        eps=eps,
    )


def _gaussian_kl(
    mu: Tensor,
    logvar: Tensor | None,
    prior_mu: Tensor | None,
    prior_logvar: Tensor | None,
    form: str,
    constants: Sequence[float],
    balance: float | None,
    per_element: bool,
) -> Tensor:
    return reference.gaussian_kl(
        mu,
        logvar,
        prior_mu,
        prior_logvar,
        form=form,
        constants=constants,
        balance=balance,
        reduction="none" if per_element else "event",
    )


def _sample_log_probs(
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
) -> tuple[Tensor, Tensor, Tensor]:
    return reference.sample_log_probs(
        mu,
        logvar,
        prior_mu,
        prior_logvar,
        samples=samples,
        form=form,
        constants=constants,
        stl=stl,
        generator=generator,
        seed=seed,
        row_offset=row_offset,
        eps=eps,
    )


def _gaussian_mixture_log_prob(
    z: Tensor, mu: Tensor, logvar: Tensor, log_weight: Tensor | None, joint: bool, per_dimension: bool
) -> tuple[Tensor, Tensor]:
    form = "both" if joint and per_dimension else per_dimension
    result = reference.gaussian_mixture_log_prob(z, mu, logvar, log_weight, per_dimension=form)
    if isinstance(result, tuple):
        return result
    empty = result.new_empty(0)
    return (result, empty) if joint else (empty, result)


REFERENCE = Backend(
    "reference",
    _reparameterize_kl,
    _gaussian_kl,
    _sample_log_probs,
    reference.nll,
    reference.nll_elements,
    _gaussian_mixture_log_prob,
)
