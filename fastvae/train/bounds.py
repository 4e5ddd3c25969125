"""Bounds on the likelihood: the ELBO, and the tighter importance-weighted bound."""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from torch import Tensor

from fastvae import functional

from .module import VAE

__all__ = ["Bounds", "estimate_bounds", "estimate_in_batches"]

B = TypeVar("B")


class Bounds(NamedTuple):
    """Values for each example in nats, float64 (B,)."""

    nll: Tensor
    """The importance-weighted bound on -log p(x)."""
    reconstruction: Tensor
    """-log p(x | z), averaged over the draws."""
    kl: Tensor


@torch.no_grad()
def estimate_bounds(
    model: VAE,
    x: Any,
    samples: int,
    *,
    seed: int = 0,
    first_row: int = 0,
    advance: Callable[[], object] = lambda: None,
) -> tuple[Bounds, Tensor]:
    """Return the ELBO's terms and the importance-weighted bound for x (B, ...), and the posterior means (B, L).

    The bound is that of Burda et al. 2016 (equation 8) with K = `samples` draws z_k from the posterior:

        log p(x) >= E log 1/K sum_k w_k,    w_k = p(x | z_k) p(z_k) / q(z_k | x)

    It equals the ELBO for K = 1 and tends to log p(x) as K grows. The draws are made one at a time for the whole batch,
    so the memory does not depend on K. Draw k of row r depends only on `seed` and `first_row` + r, so all batch sizes
    give the same numbers up to rounding.
    """
    mu, logvar = model.encode(x)
    mean, log_variance = mu.double().flatten(1), logvar.double().flatten(1)
    total = torch.full((len(mu),), -math.inf, dtype=torch.float64, device=mu.device)
    reconstruction = torch.zeros_like(total)
    for k in range(samples):
        noise = torch.tensor([seed, 4 * k], device=mu.device)
        z, kl = functional.reparameterize_kl(mu, logvar, seed=noise, row_offset=first_row)
        nll = model.nll(z, x).double()
        z_double = z.double().flatten(1)
        # log p(z) - log q(z | x) at the z that was decoded, which differs from mu + sigma eps by float32 rounding.
        ratio = (
            (z_double - mean).square() * torch.exp(-log_variance) + log_variance - z_double.square()
        ).sum(1) / 2
        total = torch.logaddexp(total, ratio - nll)
        reconstruction += nll
        advance()
    return Bounds(math.log(samples) - total, reconstruction / samples, kl.double()), mu


def estimate_in_batches(
    model: VAE,
    batches: Sequence[B],
    prepare: Callable[[B], Any],
    size: int,
    samples: int,
    seed: int,
    console: Console,
    what: str,
) -> Iterator[tuple[B, Any, Bounds, Tensor]]:
    """Yield each batch with the result of `prepare`, its bounds and its posterior means.

    All batches but the last have `size` rows. `seed` seeds the draws of z. A progress bar with the description `what`
    is shown if `console` is a terminal.
    """
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
                model, x, samples, seed=seed, first_row=number * size, advance=lambda: bar.advance(task)
            )
            yield batch, x, found, mu
