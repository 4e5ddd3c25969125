"""The commands on a run of text: what they write, and what they say of it."""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from fastvae.train import messages, text
from fastvae.train.errors import InputError
from fastvae.train.text import sentences, write
from fastvae.train.text.decoding import Decoding

__all__ = ["interpolate", "reconstruct", "sample"]

Checkpoint = Literal["best", "last"]


def sample(
    run: Path,
    how: Decoding,
    *,
    n: int | None,
    temperature: float,
    seed: int,
    checkpoint: Checkpoint,
    out: Path | None,
) -> None:
    loaded = text.load(run, checkpoint=checkpoint)
    path = _text_out(out, run / "samples.txt")
    n = 20 if n is None else n
    lines = write.sample(loaded, how, n=n, temperature=temperature, seed=seed)
    _tell(lines, out)
    write.output(path, lines)
    messages.say(f"{path}: {messages.count(n, 'new sentence')}, written from {messages.prior(temperature)}")


def reconstruct(
    run: Path,
    how: Decoding,
    *,
    n: int,
    data: str | None,
    seed: int,
    checkpoint: Checkpoint,
    out: Path | None,
) -> None:
    # Of a file all lines are taken, not only a part held out.
    is_file = data is not None and (Path(data).is_file() or data.endswith(".txt"))
    opened = text.load(run, data=None if is_file else data, checkpoint=checkpoint)
    path = _text_out(out, run / "reconstructions.txt")
    given = sentences.read(Path(str(data)).expanduser()) if is_file else []
    for note in write.notes(opened, given[:n]):
        messages.say(f"warning: {data}: {note}")
    pairs = write.reconstruct(opened, how, n=n, seed=seed, lines=given)
    lines = [line for original, made in pairs for line in (original, f"  {made}")]
    _tell(lines, out)
    write.output(path, lines)
    whose = "sentence" if is_file else "held-out sentence"
    messages.say(f"{path}: {messages.count(len(pairs), whose)}, each above what the model makes of it")


def interpolate(
    run: Path,
    how: Decoding,
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
    for note in write.notes(opened, [first, second]):
        messages.say(f"warning: {note}")
    written = write.interpolate(opened, how, first, second, steps=steps, seed=seed)
    lines = [first, *(f"  {line}" for line in written), second]
    _tell(lines, out)
    write.output(path, lines)
    messages.say(f"{path}: {messages.count(steps, 'sentence')} on the way, between the two given")


def _text_out(out: Path | None, default: Path) -> Path:
    if out is not None and out.suffix.lower() != ".txt":
        raise InputError(f"--out {out}: sentences go into a text file, so its name must end in .txt")
    return out or default


def _tell(lines: Sequence[str], out: Path | None) -> None:
    """On the screen, where no file was asked for."""
    if out is None:
        for line in lines:
            messages.say(line)
        messages.say()
