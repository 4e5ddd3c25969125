"""The commands on a run of images: what they draw, and what they say of it."""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from fastvae.train import image, messages
from fastvae.train.image import generate

__all__ = ["best", "inpaint", "interpolate", "reconstruct", "sample", "traverse"]

Checkpoint = Literal["best", "last"]


def sample(
    run: Path, *, n: int | None, temperature: float, seed: int, checkpoint: Checkpoint, out: Path | None
) -> None:
    out = out or run / "samples.png"
    n = 64 if n is None else n
    generate.sample(image.load(run, checkpoint=checkpoint), out, n=n, temperature=temperature, seed=seed)
    messages.say(f"{out}: {messages.count(n, 'new image')}, decoded from {messages.prior(temperature)}")


def best(
    run: Path,
    n: int,
    of: int | None,
    *,
    temperature: float,
    seed: int,
    checkpoint: Checkpoint,
    out: Path | None,
) -> None:
    out = out or run / "samples.png"
    of = 256 if of is None else of
    opened = image.load(run, checkpoint=checkpoint)
    found = generate.best(opened, out, n=n, of=of, temperature=temperature, seed=seed)
    drawn = f"the best {n} of {messages.count(of, 'new image')}"
    messages.say(f"{out}: {drawn}, decoded from {messages.prior(temperature)}, the best first")
    first, last, worst = (f"{found.values[i]:.{found.decimals}f}" for i in (0, n - 1, -1))
    messages.say(f"ranked by {found.measure}: from {first} to {last}{found.unit}; the worst drawn: {worst}")


def reconstruct(run: Path, *, n: int, data: str | None, checkpoint: Checkpoint, out: Path | None) -> None:
    out = out or run / "reconstructions.png"
    count = generate.reconstruct(image.load(run, data=data, checkpoint=checkpoint), out, n=n)
    images = messages.count(count, "held-out image")
    messages.say(f"{out}: {images}, each above what the model makes of it")


def interpolate(
    run: Path,
    starts: Sequence[int],
    ends: Sequence[int],
    *,
    steps: int,
    data: str | None,
    checkpoint: Checkpoint,
    out: Path | None,
) -> None:
    out = out or run / "interpolations.png"
    loaded = image.load(run, data=data, checkpoint=checkpoint)
    pairs = generate.interpolate(loaded, out, starts=starts, ends=ends, steps=steps)
    ways = ", ".join(f"{i} to {j}" for i, j in pairs)
    messages.say(f"{out}: held-out images {ways}; {steps} decoded on the way, between the two originals")


def traverse(
    run: Path,
    place: int,
    *,
    n: int,
    steps: int,
    data: str | None,
    checkpoint: Checkpoint,
    out: Path | None,
) -> None:
    out = out or run / "traversals.png"
    loaded = image.load(run, data=data, checkpoint=checkpoint)
    order = generate.traverse(loaded, out, image=place, n=n, steps=steps)
    rows = f"{messages.count(len(order), 'dimension')}, the most active first, each going from -3 to 3"
    messages.say(f"{out}: held-out image {place}, varied along {rows}")


def inpaint(
    run: Path,
    *,
    mask: str,
    steps: int,
    n: int,
    seed: int,
    data: str | None,
    checkpoint: Checkpoint,
    out: Path | None,
) -> None:
    out = out or run / "inpainting.png"
    loaded = image.load(run, data=data, checkpoint=checkpoint)
    count = generate.inpaint(loaded, out, mask=mask, steps=steps, n=n, seed=seed)
    images = messages.count(count, "held-out image")
    messages.say(f"{out}: {images}: masked, filled by the model, whole")
