"""Sentences written from z: greedily, by nucleus sampling, or by beam search."""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from fastvae.train.errors import InputError

from .module import TextVAE
from .sentences import END, PAD, START, UNKNOWN

__all__ = ["Decoding", "write"]

_NEVER = [PAD, UNKNOWN, START]
_CHUNK = 200  # sentences at a time


class Decoding(NamedTuple):
    """How to choose a sentence's tokens."""

    method: Literal["greedy", "nucleus", "beam"] = "nucleus"
    top_p: float = 0.9
    """nucleus: draw from the likeliest tokens that have this share of the probability (Holtzman et al. 2020)."""
    beams: int = 5
    """beam: how many beginnings are kept."""
    longest: int = 50
    """Tokens, at most."""

    def check(self) -> None:
        """Raises InputError for a value out of its range."""
        if not 0 < self.top_p <= 1:
            raise InputError(f"--top-p must be above 0 and at most 1, got {self.top_p}")
        if not 1 <= self.beams <= 100:
            raise InputError(f"--beams must be between 1 and 100, got {self.beams}")


@torch.no_grad()
def write(model: TextVAE, z: Tensor, how: Decoding, draws: torch.Generator | None = None) -> list[list[int]]:
    """The tokens of a sentence for each row of z (N, L), without END. `draws`, on the CPU, is what nucleus draws from.

    An unknown word is never written.
    """
    sentences: list[list[int]] = []
    for part in z.split(_CHUNK):
        part = part.to(model.device)
        if how.method == "beam":
            tokens = _beam(model, part, how.beams, how.longest)
        else:
            tokens = _one_by_one(model, part, _chooser(how, draws), how.longest)
        for row in tokens.tolist():
            sentences.append(row[: row.index(END)] if END in row else row)
    return sentences


def _decoder(model: TextVAE) -> Any:
    return model.decoder


def _next(
    model: TextVAE, z: Tensor, last: Tensor, state: tuple[Tensor, ...]
) -> tuple[Tensor, tuple[Tensor, ...]]:
    logits, state = _decoder(model).advance(z, last.unsqueeze(1), state)
    log_probs = logits[:, 0].float().log_softmax(-1)
    log_probs[:, _NEVER] = -torch.inf
    return log_probs, state


def _chooser(how: Decoding, draws: torch.Generator | None) -> Callable[[Tensor], Tensor]:
    if how.method == "greedy":
        return lambda log_probs: log_probs.argmax(-1)

    def nucleus(log_probs: Tensor) -> Tensor:
        probs, order = log_probs.softmax(-1).cpu().sort(-1, descending=True)
        # Without those that the likelier ones already make up the share.
        probs = probs.masked_fill(probs.cumsum(-1) - probs >= how.top_p, 0.0)
        return order.gather(-1, torch.multinomial(probs, 1, generator=draws)).squeeze(-1).to(log_probs.device)

    return nucleus


def _one_by_one(model: TextVAE, z: Tensor, choose: Callable[[Tensor], Tensor], longest: int) -> Tensor:
    state = _decoder(model).begin(z)
    last = torch.full((len(z),), START, device=z.device)
    written = torch.full((len(z), longest), END, device=z.device)
    for t in range(longest):
        log_probs, state = _next(model, z, last, state)
        last = torch.where(last == END, END, choose(log_probs)) if t else choose(log_probs)
        written[:, t] = last
        if (last == END).all():
            break
    return written


def _beam(model: TextVAE, z: Tensor, beams: int, longest: int) -> Tensor:
    """The sentence of the greatest log p / ((5 + n) / 6)^0.6 for n tokens (Wu et al. 2016, equation 14)."""
    n = len(z)
    each = z.repeat_interleave(beams, 0)
    state = _decoder(model).begin(each)
    last = torch.full((n * beams,), START, device=z.device)
    scores = torch.full((n, beams), -torch.inf, device=z.device)
    scores[:, 0] = 0.0  # all beams begin alike: one is enough
    written = torch.full((n, beams, longest), END, device=z.device)
    lengths = torch.zeros(n, beams, device=z.device)
    first = torch.arange(n, device=z.device).unsqueeze(1) * beams
    for t in range(longest):
        log_probs, state = _next(model, each, last, state)
        ended = last == END
        log_probs[ended] = -torch.inf
        log_probs[ended, END] = 0.0  # goes on as it is
        total = scores.unsqueeze(2) + log_probs.view(n, beams, -1)
        scores, places = total.flatten(1).topk(beams, 1)
        parent, token = places // log_probs.shape[1], places % log_probs.shape[1]
        written = written.gather(1, parent.unsqueeze(2).expand_as(written))
        written[:, :, t] = token
        lengths = lengths.gather(1, parent) + (~ended).view(n, beams).gather(1, parent)
        state = tuple(part[:, (first + parent).flatten()] for part in state)
        last = token.flatten()
        if (last == END).all():
            break
    best = (scores / ((5 + lengths) / 6) ** 0.6).argmax(1)
    return written[torch.arange(n, device=z.device), best]
