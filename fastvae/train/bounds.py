"""Bounds on the likelihood: the ELBO, and the tighter importance-weighted bound."""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from torch import Tensor

from fastvae import functional
from fastvae.likelihoods.base import nll_of_draws

from .module import VAE

__all__ = ["Bounds", "estimate_bounds", "estimate_in_batches"]

# On 2 cores, MNIST and a table of 2,000 genes take a tenth less time than with one draw of ten times as many rows,
# because the data are read from the cache.
_DRAWS = 10

B = TypeVar("B")


class Bounds(NamedTuple):
    """Values for each example in nats, float64 (B,)."""

    nll: Tensor
    """The importance-weighted bound on -log p(x)."""
    reconstruction: Tensor
    """-log p(x | z), averaged over the draws."""
    kl: Tensor
    """The KL from the prior; averaged over the draws if it has no closed form."""


@torch.no_grad()
def estimate_bounds(
    model: VAE,
    x: Any,
    samples: int,
    *,
    seed: int = 0,
    first_row: int = 0,
    draws: int = _DRAWS,
    advance: Callable[[int], object] = lambda count: None,
) -> tuple[Bounds, Tensor]:
    """Return the ELBO's terms and the importance-weighted bound for x (B, ...), and the posterior means (B, L).

    The bound is that of Burda et al. 2016 (equation 8) with K = `samples` draws z_k from the posterior:

        log p(x) >= E log 1/K sum_k w_k,    w_k = p(x | z_k) p(z_k) / q(z_k | x)

    It equals the ELBO for K = 1 and tends to log p(x) as K grows. So many `draws` at a time are made for the whole
    batch, so the memory does not depend on K; `advance` is called with their number. Draw k of row r depends only on
    `seed` and `first_row` + r, so all batch sizes and numbers of draws at a time give the same numbers up to rounding.
    """
    mu, logvar = model.encode(x)
    mean, log_variance = mu.double().flatten(1), logvar.double().flatten(1)
    precision, constant = torch.exp(-log_variance), log_variance.sum(1)
    target = model.target(x)
    total = torch.full((len(mu),), -math.inf, dtype=torch.float64, device=mu.device)
    reconstruction = torch.zeros_like(total)
    learned = model.prior
    prior = None if learned is None else learned.frozen()
    sampled_kl = torch.zeros_like(total)
    for first in range(0, samples, draws):
        count = min(draws, samples - first)
        noise = torch.tensor([seed, 4 * first], device=mu.device)
        z, kl = functional.reparameterize_kl(mu, logvar, samples=count, seed=noise, row_offset=first_row)
        nll = nll_of_draws(
            "train.bounds", model.likelihood, model.params(z.flatten(0, 1), x), target, count
        ).double()
        # log p(z) - log q(z | x) at the z that was decoded, which differs from mu + sigma eps by float32 rounding.
        z_double = z.double().flatten(2)
        if prior is None:
            ratio = (((z_double - mean).square() * precision - z_double.square()).sum(2) + constant) / 2
        else:
            log_p = prior.log_prob(z.flatten(0, 1)).double().unflatten(0, (count, -1))
            squares = ((z_double - mean).square() * precision).sum(2)
            ratio = log_p + (squares + constant + mean.shape[1] * math.log(2 * math.pi)) / 2
            sampled_kl -= ratio.sum(0)
        total = torch.logaddexp(total, torch.logsumexp(ratio - nll, 0))
        reconstruction += nll.sum(0)
        advance(count)
    if learned is not None:
        analytic = learned.analytic_kl(mu, logvar)
        kl = sampled_kl / samples if analytic is None else analytic
    return Bounds(math.log(samples) - total, reconstruction / samples, kl.double()), mu


def estimate_in_batches(
    model: VAE,
    split: Callable[[int], Sequence[B]],
    prepare: Callable[[B], Any],
    rows: int,
    samples: int,
    seed: int,
    console: Console,
    what: str,
) -> Iterator[tuple[B, Any, Bounds, Tensor]]:
    """Yield each batch with the result of `prepare`, its bounds and its posterior means.

    `split` returns all batches of a size. At most so many `rows` are decoded at a time, several draws of each row of a
    batch. `seed` seeds the draws of z. A progress bar with the description `what` is shown if `console` is a terminal.
    """
    draws = min(_DRAWS, rows)
    size = rows // draws
    batches = split(size)
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )
    with bar:
        task = bar.add_task(what, total=len(batches) * samples)
        for number, batch in enumerate(batches):
            x = prepare(batch)
            found, mu = estimate_bounds(
                model,
                x,
                samples,
                seed=seed,
                first_row=number * size,
                draws=draws,
                advance=lambda count: bar.advance(task, count),
            )
            yield batch, x, found, mu
