"""The commands that use a run of images: each draws a picture and prints a line about it."""

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
    opened = image.load(run, checkpoint=checkpoint)
    generate.sample(opened, out, n=n, temperature=temperature, seed=seed)
    source = messages.describe_prior(opened.settings, temperature)
    messages.print_line(f"{out}: {messages.pluralize(n, 'new image')}, decoded from {source}")


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
    found = generate.sample_best(opened, out, n=n, of=of, temperature=temperature, seed=seed)
    selection = f"the best {n} of {messages.pluralize(of, 'new image')}"
    source = messages.describe_prior(opened.settings, temperature)
    messages.print_line(f"{out}: {selection}, decoded from {source}, best first")
    first, last, worst = (f"{found.values[i]:.{found.decimals}f}" for i in (0, n - 1, -1))
    messages.print_line(
        f"ranked by {found.measure}: from {first} to {last}{found.unit}; the worst is {worst}"
    )


def reconstruct(run: Path, *, n: int, data: str | None, checkpoint: Checkpoint, out: Path | None) -> None:
    out = out or run / "reconstructions.png"
    count = generate.reconstruct(image.load(run, data=data, checkpoint=checkpoint), out, n=n)
    images = messages.pluralize(count, "validation image")
    messages.print_line(f"{out}: {images}, each above its reconstruction")


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
    opened = image.load(run, data=data, checkpoint=checkpoint)
    pairs = generate.interpolate(opened, out, starts=starts, ends=ends, steps=steps)
    pairs_text = ", ".join(f"{i} to {j}" for i, j in pairs)
    messages.print_line(
        f"{out}: validation images {pairs_text}, with {steps} decoded images between the two originals"
    )


def traverse(
    run: Path,
    image_index: int,
    *,
    n: int,
    steps: int,
    data: str | None,
    checkpoint: Checkpoint,
    out: Path | None,
) -> None:
    out = out or run / "traversals.png"
    opened = image.load(run, data=data, checkpoint=checkpoint)
    order = generate.traverse(opened, out, image=image_index, n=n, steps=steps)
    dimensions = messages.pluralize(len(order), "dimension")
    messages.print_line(
        f"{out}: validation image {image_index}, varied from -3 to 3 along {dimensions}, the most active first"
    )


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
    opened = image.load(run, data=data, checkpoint=checkpoint)
    count = generate.inpaint(opened, out, mask=mask, steps=steps, n=n, seed=seed)
    images = messages.pluralize(count, "validation image")
    messages.print_line(f"{out}: {images}, each masked, inpainted and as it was")
