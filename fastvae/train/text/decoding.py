"""Decoding sentences from z: greedily, by nucleus sampling, or by beam search."""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from fastvae.train.errors import InputError

from .module import TextVAE
from .sentences import END, PAD, START, UNKNOWN

__all__ = ["Decoding", "decode"]

_NEVER = [PAD, UNKNOWN, START]
_CHUNK = 200  # number of sentences at a time


class Decoding(NamedTuple):
    """How to choose the tokens of a sentence."""

    method: Literal["greedy", "nucleus", "beam"] = "nucleus"
    top_p: float = 0.9
    """nucleus: sample from the likeliest tokens with this total probability (Holtzman et al. 2020)."""
    beams: int = 5
    """beam: the number of beams."""
    longest: int = 50
    """The largest number of tokens."""

    def check(self) -> None:
        """Raises InputError if a value is out of range."""
        if not 0 < self.top_p <= 1:
            raise InputError(f"--top-p must be above 0 and at most 1, got {self.top_p}")
        if not 1 <= self.beams <= 100:
            raise InputError(f"--beams must be between 1 and 100, got {self.beams}")


@torch.no_grad()
def decode(
    model: TextVAE, z: Tensor, options: Decoding, generator: torch.Generator | None = None
) -> list[list[int]]:
    """Decode a sentence from each row of z (N, L) and return its tokens without END.

    `generator` is a CPU generator for nucleus sampling. The token for unknown words is never chosen.
    """
    sentences: list[list[int]] = []
    for part in z.split(_CHUNK):
        part = part.to(model.device)
        if options.method == "beam":
            tokens = _beam_search(model, part, options.beams, options.longest)
        else:
            tokens = _step_by_step(model, part, _make_chooser(options, generator), options.longest)
        for sentence in tokens.tolist():
            sentences.append(sentence[: sentence.index(END)] if END in sentence else sentence)
    return sentences


def _decoder(model: TextVAE) -> Any:
    return model.decoder


def _next_log_probs(
    model: TextVAE, z: Tensor, last: Tensor, state: tuple[Tensor, ...]
) -> tuple[Tensor, tuple[Tensor, ...]]:
    logits, state = _decoder(model).advance(z, last.unsqueeze(1), state)
    log_probs = logits[:, 0].float().log_softmax(-1)
    log_probs[:, _NEVER] = -torch.inf
    return log_probs, state


def _make_chooser(options: Decoding, generator: torch.Generator | None) -> Callable[[Tensor], Tensor]:
    if options.method == "greedy":
        return lambda log_probs: log_probs.argmax(-1)

    def nucleus(log_probs: Tensor) -> Tensor:
        probs, order = log_probs.softmax(-1).cpu().sort(-1, descending=True)
        # Drop tokens if the likelier ones already reach the probability mass.
        probs = probs.masked_fill(probs.cumsum(-1) - probs >= options.top_p, 0.0)
        return (
            order.gather(-1, torch.multinomial(probs, 1, generator=generator))
            .squeeze(-1)
            .to(log_probs.device)
        )

    return nucleus


def _step_by_step(model: TextVAE, z: Tensor, choose: Callable[[Tensor], Tensor], longest: int) -> Tensor:
    state = _decoder(model).initial_state(z)
    last = torch.full((len(z),), START, device=z.device)
    output = torch.full((len(z), longest), END, device=z.device)
    for t in range(longest):
        log_probs, state = _next_log_probs(model, z, last, state)
        last = torch.where(last == END, END, choose(log_probs)) if t else choose(log_probs)
        output[:, t] = last
        if (last == END).all():
            break
    return output


def _beam_search(model: TextVAE, z: Tensor, beams: int, longest: int) -> Tensor:
    """Return the sentences that maximise log p / ((5 + n) / 6)^0.6 for n tokens (Wu et al. 2016, equation 14)."""
    n = len(z)
    repeated_z = z.repeat_interleave(beams, 0)
    state = _decoder(model).initial_state(repeated_z)
    last = torch.full((n * beams,), START, device=z.device)
    scores = torch.full((n, beams), -torch.inf, device=z.device)
    scores[:, 0] = 0.0  # all beams start equal, so only one may be extended
    output = torch.full((n, beams, longest), END, device=z.device)
    lengths = torch.zeros(n, beams, device=z.device)
    first = torch.arange(n, device=z.device).unsqueeze(1) * beams
    for t in range(longest):
        log_probs, state = _next_log_probs(model, repeated_z, last, state)
        ended = last == END
        log_probs[ended] = -torch.inf
        log_probs[ended, END] = 0.0  # a finished sentence stays as it is
        total = scores.unsqueeze(2) + log_probs.view(n, beams, -1)
        scores, positions = total.flatten(1).topk(beams, 1)
        parent, token = positions // log_probs.shape[1], positions % log_probs.shape[1]
        output = output.gather(1, parent.unsqueeze(2).expand_as(output))
        output[:, :, t] = token
        lengths = lengths.gather(1, parent) + (~ended).view(n, beams).gather(1, parent)
        state = tuple(part[:, (first + parent).flatten()] for part in state)
        last = token.flatten()
        if (last == END).all():
            break
    best = (scores / ((5 + lengths) / 6) ** 0.6).argmax(1)
    return output[torch.arange(n, device=z.device), best]
