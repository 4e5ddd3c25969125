"""Estimators of the likelihood: the ELBO, and a closer bound by importance weighting."""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from torch import Tensor

from fastvae import functional

from .module import VAE

__all__ = ["Bounds", "bounds", "in_batches"]

B = TypeVar("B")


class Bounds(NamedTuple):
    """Of each image, in nats, float64 (B,)."""

    nll: Tensor
    """The importance-weighted bound on -log p(x)."""
    reconstruction: Tensor
    """-log p(x | z), the mean over the draws."""
    kl: Tensor


@torch.no_grad()
def bounds(
    model: VAE,
    x: Any,
    samples: int,
    *,
    seed: int = 0,
    first_row: int = 0,
    advance: Callable[[], object] = lambda: None,
) -> tuple[Bounds, Tensor]:
    """The ELBO's terms and the importance-weighted likelihood of x (B, ...), and the posterior means (B, L).

    The latter is the bound of Burda et al. 2016 (equation 8) with K = `samples` draws z_k from the posterior:

        log p(x) >= E log 1/K sum_k w_k,    w_k = p(x | z_k) p(z_k) / q(z_k | x)

    which is the ELBO for K = 1 and tends to log p(x). Each draw is of the whole batch, against one and the same x, and
    its weights are summed as they come: the memory is that of one draw, whatever K is. Draw k of the row
    `first_row` + r depends on nothing but `seed`, so batches of any size give the same numbers, up to rounding.
    """
    mu, logvar = model.encode(x)
    mean, log_variance = mu.double().flatten(1), logvar.double().flatten(1)
    total = torch.full((len(mu),), -math.inf, dtype=torch.float64, device=mu.device)
    reconstruction = torch.zeros_like(total)
    for k in range(samples):
        noise = torch.tensor([seed, 4 * k], device=mu.device)
        z, kl = functional.reparameterize_kl(mu, logvar, seed=noise, row_offset=first_row)
        nll = model.nll(z, x).double()
        at = z.double().flatten(1)
        # log p(z) - log q(z | x), of the very z that was decoded: rounded to float32 it is not mu + sigma eps any more.
        ratio = ((at - mean).square() * torch.exp(-log_variance) + log_variance - at.square()).sum(1) / 2
        total = torch.logaddexp(total, ratio - nll)
        reconstruction += nll
        advance()
    return Bounds(math.log(samples) - total, reconstruction / samples, kl.double()), mu


def in_batches(
    model: VAE,
    batches: Sequence[B],
    prepare: Callable[[B], Any],
    size: int,
    samples: int,
    seed: int,
    console: Console,
    what: str,
) -> Iterator[tuple[B, Any, Bounds, Tensor]]:
    """Of each batch, of `size` rows but for the last: it, what `prepare` makes of it, its bounds, posterior means.

    `seed` is of the draws of z; a progress bar on `console`, where there is a terminal to draw it on, says `what` is
    done.
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
            found, mu = bounds(
                model, x, samples, seed=seed, first_row=number * size, advance=lambda: bar.advance(task)
            )
            yield batch, x, found, mu
