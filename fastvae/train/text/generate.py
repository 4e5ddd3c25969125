"""Sentences from a run: samples, reconstructions and interpolations.

Each function is short and builds on `TextRun.model` and `decoding.decode`, so it can serve as an example.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from fastvae.train import files
from fastvae.train.errors import InputError

from . import sentences
from .decoding import Decoding, decode
from .run import TextRun

__all__ = ["interpolate", "reconstruct", "sample", "save_lines", "warnings_about"]


def sample(
    run: TextRun, decoding: Decoding, *, n: int = 20, seed: int = 0, temperature: float = 1.0
) -> list[str]:
    """Return n new sentences, decoded from z of the prior, whose standard deviation is multiplied by the
    temperature."""
    _check("-n", n, 1, 100_000)
    _check("--seed", seed, 0, 2**32 - 1)
    _check("--temperature", temperature, 0)
    draws = torch.Generator().manual_seed(seed)
    z = run.model.sample_prior(n, draws, temperature)
    return _decode_texts(run, z, decoding, draws)


def reconstruct(
    run: TextRun, decoding: Decoding, *, n: int = 30, seed: int = 0, lines: Sequence[str] = ()
) -> list[tuple[str, str]]:
    """Return at most n of `lines`, or of the validation sentences if there are none, each with its reconstruction.

    Reconstructions are decoded from the posterior mean. Unknown words are read as <unk>.
    """
    _check("-n", n, 1, 100_000)
    _check("--seed", seed, 0, 2**32 - 1)
    originals = list(lines or run.corpus.val)[:n]
    reconstructions = _decode_texts(
        run, posterior_means(run, originals), decoding, torch.Generator().manual_seed(seed)
    )
    return list(zip(originals, reconstructions, strict=True))


def interpolate(
    run: TextRun, decoding: Decoding, first: str, second: str, *, steps: int = 8, seed: int = 0
) -> list[str]:
    """Return `steps` sentences on the straight line between the posterior means of two sentences."""
    _check("--steps", steps, 2, 1000)
    _check("--seed", seed, 0, 2**32 - 1)
    for line in (first, second):
        if not line.strip():
            raise InputError("a sentence to interpolate must not be empty")
    start, end = posterior_means(run, [first, second])
    z = torch.stack([start.lerp(end, t) for t in torch.linspace(0, 1, steps).tolist()])
    return _decode_texts(run, z, decoding, torch.Generator().manual_seed(seed))


def warnings_about(run: TextRun, lines: Sequence[str]) -> list[str]:
    """Return warnings about sentences of the user: unknown words, and sentences longer than any in training."""
    numbers = run.vocabulary.encode(lines)
    unknown = sum(line.count(sentences.UNKNOWN) for line in numbers)
    bound = run.settings.max_words
    long = sum(sentences.count_words(run.vocabulary.tokenizer, line) > bound for line in lines)
    warnings = []
    if unknown:
        warnings.append(f"{unknown} unknown word{'s' if unknown > 1 else ''}, read as <unk>")
    if long:
        warnings.append(
            f"{long} line{'s' if long > 1 else ''} of more than {bound} words, which is longer than any in training"
        )
    return warnings


@torch.no_grad()
def posterior_means(run: TextRun, lines: Sequence[str]) -> Tensor:
    """Return posterior means (N, L), on the CPU."""
    numbers = run.vocabulary.encode(lines)
    for line, tokens in zip(lines, numbers, strict=True):
        if not tokens:
            raise InputError(f"the sentence {line!r} contains no words")
    parts = []
    for first in range(0, len(numbers), 200):
        batch = sentences.make_batch(sentences.token_table(numbers[first : first + 200]))
        mu, _ = run.model.encode(sentences.Batch(*(part.to(run.device) for part in batch)))
        parts.append(mu.float().cpu())
    return torch.cat(parts)


def _decode_texts(run: TextRun, z: Tensor, decoding: Decoding, draws: torch.Generator) -> list[str]:
    decoding = decoding._replace(longest=2 * run.settings.max_words)
    decoding.check()
    return [run.vocabulary.decode(tokens) for tokens in decode(run.model, z, decoding, draws)]


def save_lines(path: Path, lines: Sequence[str]) -> None:
    """Write a text file. Raises InputError if that fails."""
    files.prepare_folder(path.parent, [path.name])
    sentences.write_lines(path, lines)


def _check(name: str, value: float, low: float, high: float | None = None) -> None:
    if not (low <= value and (high is None or value <= high) and abs(value) != float("inf")):
        bounds = f"at least {low}" if high is None else f"between {low} and {high}"
        raise InputError(f"{name} must be {bounds}, got {value}")
