"""The commands that use a run of text: each writes sentences and prints a line about them."""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from fastvae.train import messages, text
from fastvae.train.errors import InputError
from fastvae.train.text import generate, sentences
from fastvae.train.text.decoding import Decoding

__all__ = ["interpolate", "reconstruct", "sample"]

Checkpoint = Literal["best", "last"]


def sample(
    run: Path,
    decoding: Decoding,
    *,
    n: int | None,
    temperature: float,
    seed: int,
    checkpoint: Checkpoint,
    out: Path | None,
) -> None:
    opened = text.load(run, checkpoint=checkpoint)
    path = _text_out(out, run / "samples.txt")
    n = 20 if n is None else n
    lines = generate.sample(opened, decoding, n=n, temperature=temperature, seed=seed)
    _print_lines(lines, out)
    generate.save_lines(path, lines)
    source = messages.describe_prior(opened.settings, temperature)
    messages.print_line(f"{path}: {messages.pluralize(n, 'new sentence')}, written from {source}")


def reconstruct(
    run: Path,
    decoding: Decoding,
    *,
    n: int,
    data: str | None,
    seed: int,
    checkpoint: Checkpoint,
    out: Path | None,
) -> None:
    # All lines of a text file are used, not only a validation part.
    is_file = data is not None and (Path(data).is_file() or data.endswith(".txt"))
    opened = text.load(run, data=None if is_file else data, checkpoint=checkpoint)
    path = _text_out(out, run / "reconstructions.txt")
    given = sentences.read_lines(Path(str(data)).expanduser()) if is_file else []
    for note in generate.warnings_about(opened, given[:n]):
        messages.print_line(f"warning: {data}: {note}")
    pairs = generate.reconstruct(opened, decoding, n=n, seed=seed, lines=given)
    lines = [line for original, reconstruction in pairs for line in (original, f"  {reconstruction}")]
    _print_lines(lines, out)
    generate.save_lines(path, lines)
    noun = "sentence" if is_file else "validation sentence"
    messages.print_line(f"{path}: {messages.pluralize(len(pairs), noun)}, each above its reconstruction")


def interpolate(
    run: Path,
    decoding: Decoding,
    first: str,
    second: str,
    *,
    steps: int,
    seed: int,
    checkpoint: Checkpoint,
    out: Path | None,
) -> None:
    opened = text.load(run, checkpoint=checkpoint)
    path = _text_out(out, run / "interpolations.txt")
    for note in generate.warnings_about(opened, [first, second]):
        messages.print_line(f"warning: {note}")
    between = generate.interpolate(opened, decoding, first, second, steps=steps, seed=seed)
    lines = [first, *(f"  {line}" for line in between), second]
    _print_lines(lines, out)
    generate.save_lines(path, lines)
    messages.print_line(f"{path}: {messages.pluralize(steps, 'sentence')} between the two that were given")


def _text_out(out: Path | None, default: Path) -> Path:
    if out is not None and out.suffix.lower() != ".txt":
        raise InputError(f"--out {out}: sentences are saved as text, so the name must end in .txt")
    return out or default


def _print_lines(lines: Sequence[str], out: Path | None) -> None:
    """Print the lines unless they go to a file of the user's choice."""
    if out is None:
        for line in lines:
            messages.print_line(line)
        messages.print_line()
