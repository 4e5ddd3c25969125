"""What is done with a run of text: new sentences, reconstructions, ways between sentences.

To read it as an example: each function is a few lines on `TextRun.model` and `decoding.write`.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from fastvae.train import files
from fastvae.train.errors import InputError

from . import sentences
from .decoding import Decoding, write
from .run import TextRun

__all__ = ["interpolate", "notes", "output", "reconstruct", "sample"]


def sample(run: TextRun, how: Decoding, *, n: int = 20, seed: int = 0, temperature: float = 1.0) -> list[str]:
    """n new sentences, written from z ~ N(0, temperature^2 I)."""
    _check("-n", n, 1, 100_000)
    _check("--seed", seed, 0, 2**32 - 1)
    _check("--temperature", temperature, 0)
    draws = torch.Generator().manual_seed(seed)
    z = temperature * torch.randn(n, run.model.latents, generator=draws)
    return _texts(run, z, how, draws)


def reconstruct(
    run: TextRun, how: Decoding, *, n: int = 30, seed: int = 0, lines: Sequence[str] = ()
) -> list[tuple[str, str]]:
    """`lines`, or else the held-out sentences, n of them at most, each with what the model makes of it.

    Written from the posterior's mean. A word that the run does not know is read as <unk>.
    """
    _check("-n", n, 1, 100_000)
    _check("--seed", seed, 0, 2**32 - 1)
    originals = list(lines or run.corpus.held_out)[:n]
    made = _texts(run, means(run, originals), how, torch.Generator().manual_seed(seed))
    return list(zip(originals, made, strict=True))


def interpolate(
    run: TextRun, how: Decoding, first: str, second: str, *, steps: int = 8, seed: int = 0
) -> list[str]:
    """`steps` sentences on the straight line between the posterior means of two."""
    _check("--steps", steps, 2, 1000)
    _check("--seed", seed, 0, 2**32 - 1)
    for line in (first, second):
        if not line.strip():
            raise InputError("a sentence to interpolate is empty")
    start, end = means(run, [first, second])
    z = torch.stack([start.lerp(end, t) for t in torch.linspace(0, 1, steps).tolist()])
    return _texts(run, z, how, torch.Generator().manual_seed(seed))


def notes(run: TextRun, lines: Sequence[str]) -> list[str]:
    """What to tell of sentences that a user gave: unknown words, and lengths that no training sentence had."""
    numbers = run.vocabulary.numbers(lines)
    unknown = sum(line.count(sentences.UNKNOWN) for line in numbers)
    bound = run.settings.max_words
    long = sum(sentences.count_words(run.vocabulary.tokenizer, line) > bound for line in lines)
    said = []
    if unknown:
        said.append(f"{unknown} word{'s' if unknown > 1 else ''} that the run does not know, read as <unk>")
    if long:
        said.append(
            f"{long} line{'s' if long > 1 else ''} of more than {bound} words: longer than any that it was trained on"
        )
    return said


@torch.no_grad()
def means(run: TextRun, lines: Sequence[str]) -> Tensor:
    """Posterior means (N, L), on the CPU."""
    numbers = run.vocabulary.numbers(lines)
    for line, tokens in zip(lines, numbers, strict=True):
        if not tokens:
            raise InputError(f"there is no word in {line!r}")
    parts = []
    for first in range(0, len(numbers), 200):
        some = sentences.batch(sentences.rows(numbers[first : first + 200]))
        mu, _ = run.model.encode(sentences.Batch(*(part.to(run.device) for part in some)))
        parts.append(mu.float().cpu())
    return torch.cat(parts)


def _texts(run: TextRun, z: Tensor, how: Decoding, draws: torch.Generator) -> list[str]:
    how = how._replace(longest=2 * run.settings.max_words)
    how.check()
    return [run.vocabulary.text(tokens) for tokens in write(run.model, z, how, draws)]


def output(path: Path, lines: Sequence[str]) -> None:
    """Write a text file. Raises InputError where that fails."""
    files.prepare_folder(path.parent, [path.name])
    sentences.save(path, lines)


def _check(name: str, value: float, low: float, high: float | None = None) -> None:
    if not (low <= value and (high is None or value <= high) and abs(value) != float("inf")):
        bounds = f"at least {low}" if high is None else f"between {low} and {high}"
        raise InputError(f"{name} must be {bounds}, got {value}")
