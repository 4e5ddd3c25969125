"""What is done with a run: sample, reconstruct, interpolate, traverse, inpaint, evaluate.

Here are the options, and which of them belong to which kind of run; `images` and `texts` do the work, and say it.
"""

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from fastvae.train import kinds
from fastvae.train.errors import InputError

from .ending import stoppable

__all__ = ["add"]


def add(app: typer.Typer) -> None:
    for command in (sample, reconstruct, interpolate, traverse, inpaint, evaluate):
        app.command(rich_help_panel="With a run")(stoppable(command))


RunArgument = Annotated[Path, typer.Argument(metavar="RUN", help="The folder of a run.", show_default=False)]
Checkpoint = Annotated[
    Literal["best", "last"],
    typer.Option(
        help="The weights of the best epoch (by the held-out ELBO; vae-gan: the last), or of the last."
    ),
]
Data = Annotated[
    str | None,
    typer.Option(
        metavar="DATA",
        help="Other data than the run's own, given as for `fastvae train`: the held-out ones; all of a folder.",
        show_default=False,
    ),
]
Seed = Annotated[int, typer.Option(help="Of all that is drawn.")]

Method = Annotated[
    Literal["greedy", "nucleus", "beam"] | None,
    typer.Option("--decoding", help="Of text: how words are chosen.", show_default=False),
]
TopP = Annotated[
    float | None,
    typer.Option(help="Of nucleus: the share of the probability that is drawn from.", show_default="0.9"),
]
Beams = Annotated[int | None, typer.Option(help="Of beam: how many beginnings.", show_default="5")]


def _out(name: str) -> Any:
    text = f"Where the picture goes; RUN/{name} if not given."
    if name in ("samples.png", "reconstructions.png", "interpolations.png"):
        text += " Of text: a .txt file, in place of the screen."
    return typer.Option(metavar="FILE", help=text, show_default=False)


def sample(
    run: RunArgument,
    n: Annotated[int | None, typer.Option("-n", help="How many.", show_default="64; 20 of text")] = None,
    best: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="Only the N of --of images that the model ranks highest, best first: by their likelihood, "
            "which favours plain images over rich ones; or by its discriminator's score, if it has one.",
            show_default=False,
        ),
    ] = None,
    of: Annotated[
        int | None,
        typer.Option(metavar="M", help="Of --best: how many to choose from.", show_default="256"),
    ] = None,
    temperature: Annotated[
        float, typer.Option(help="Standard deviation of z: below 1 plainer images, above 1 odder ones.")
    ] = 1.0,
    seed: Seed = 0,
    decoding: Method = None,
    top_p: TopP = None,
    beams: Beams = None,
    checkpoint: Checkpoint = "best",
    out: Annotated[Path | None, _out("samples.png")] = None,
) -> None:
    """Draw new images, or write new sentences."""
    kind = _kind(run)
    text = kind == "text"
    how = _decoding(text, "nucleus", decoding, top_p, beams)
    for name, value in (("--best", best), ("--of", of)):
        if kind != "image" and value is not None:
            raise InputError(f"{name} is for runs of images, and this is one of {kind}")
    if best is None and of is not None:
        raise InputError(f"--of is of --best, which says how many of the {of} to keep: give both")
    if best is not None and n is not None:
        raise InputError("-n and --best: give one of them; --best keeps the best of --of images")
    if text:
        from . import texts

        texts.sample(run, how, n=n, temperature=temperature, seed=seed, checkpoint=checkpoint, out=out)
        return
    from . import images

    if best is not None:
        images.best(run, best, of, temperature=temperature, seed=seed, checkpoint=checkpoint, out=out)
        return
    images.sample(run, n=n, temperature=temperature, seed=seed, checkpoint=checkpoint, out=out)


def reconstruct(
    run: RunArgument,
    n: Annotated[int, typer.Option("-n", help="How many, if there are so many.")] = 30,
    data: Data = None,
    seed: Seed = 0,
    decoding: Method = None,
    top_p: TopP = None,
    beams: Beams = None,
    checkpoint: Checkpoint = "best",
    out: Annotated[Path | None, _out("reconstructions.png")] = None,
) -> None:
    """Encode and decode held-out images, or held-out sentences, or those of a text file."""
    text = _kind(run) == "text"
    how = _decoding(text, "greedy", decoding, top_p, beams)
    if text:
        from . import texts

        texts.reconstruct(run, how, n=n, data=data, seed=seed, checkpoint=checkpoint, out=out)
        return
    from . import images

    images.reconstruct(run, n=n, data=data, checkpoint=checkpoint, out=out)


def interpolate(
    run: RunArgument,
    first: Annotated[
        str | None, typer.Argument(metavar="FIRST", help="Of text: a sentence.", show_default=False)
    ] = None,
    second: Annotated[
        str | None, typer.Argument(metavar="SECOND", help="Of text: another.", show_default=False)
    ] = None,
    start: Annotated[
        list[int] | None,
        typer.Option(
            "--from",
            metavar="I",
            help="Held-out image to start from, counted from 0. Give --from and --to again for a further row; "
            "without them: 0 to 1, 2 to 3, and so on.",
            show_default=False,
        ),
    ] = None,
    end: Annotated[
        list[int] | None,
        typer.Option("--to", metavar="J", help="Held-out image to end with.", show_default=False),
    ] = None,
    steps: Annotated[int, typer.Option(help="Images, or sentences, on the way.")] = 10,
    data: Data = None,
    seed: Seed = 0,
    decoding: Method = None,
    top_p: TopP = None,
    beams: Beams = None,
    checkpoint: Checkpoint = "best",
    out: Annotated[Path | None, _out("interpolations.png")] = None,
) -> None:
    """Go from one image to another in the latent space, a row for each pair, or from one sentence to another."""
    text = _kind(run) == "text"
    how = _decoding(text, "greedy", decoding, top_p, beams)
    if text:
        if first is None or second is None:
            raise InputError(f'two sentences are needed: fastvae interpolate {run} "FIRST" "SECOND"')
        if start or end:
            raise InputError("--from and --to are for runs of images; this one takes two sentences")
        from . import texts

        texts.interpolate(run, how, first, second, steps=steps, seed=seed, checkpoint=checkpoint, out=out)
        return
    if first is not None:
        raise InputError(f"{run}: a run of images: give --from and --to, not sentences")
    from . import images

    starts, ends = start or (), end or ()
    images.interpolate(run, starts, ends, steps=steps, data=data, checkpoint=checkpoint, out=out)


def traverse(
    run: RunArgument,
    image: Annotated[int, typer.Option(metavar="I", help="Held-out image to vary, counted from 0.")] = 0,
    n: Annotated[int, typer.Option("-n", help="How many dimensions, if there are so many.")] = 20,
    steps: Annotated[int, typer.Option(help="Images in a row, from -3 to 3.")] = 11,
    data: Data = None,
    checkpoint: Checkpoint = "best",
    out: Annotated[Path | None, _out("traversals.png")] = None,
) -> None:
    """Vary an image along each latent dimension, the most active first."""
    from . import images

    images.traverse(run, image, n=n, steps=steps, data=data, checkpoint=checkpoint, out=out)


def inpaint(
    run: RunArgument,
    mask: Annotated[
        str,
        typer.Option(
            help="What to fill: left, right, top, bottom, center, or a box x0,y0,x1,y1 in pixels from the top "
            "left, x1 and y1 not included."
        ),
    ] = "right",
    steps: Annotated[int, typer.Option(help="Times to encode and decode.")] = 100,
    n: Annotated[int, typer.Option("-n", help="How many images, if there are so many.")] = 10,
    seed: Seed = 0,
    data: Data = None,
    checkpoint: Checkpoint = "best",
    out: Annotated[Path | None, _out("inpainting.png")] = None,
) -> None:
    """Hide a part of held-out images and let the model fill it."""
    from . import images

    images.inpaint(run, mask=mask, steps=steps, n=n, seed=seed, data=data, checkpoint=checkpoint, out=out)


def evaluate(
    run: RunArgument,
    samples: Annotated[
        int | None,
        typer.Option(
            help="Importance samples for each image or sentence: more come closer to the likelihood.",
            show_default="500; 100 of counts, 20 of text",
        ),
    ] = None,
    limit: Annotated[
        int | None,
        typer.Option(metavar="N", help="Only the first N held-out images or sentences.", show_default=False),
    ] = None,
    seed: Seed = 0,
    data: Data = None,
    checkpoint: Checkpoint = "best",
) -> None:
    """Measure a run on held-out data: ELBO, likelihood, active units, PSNR, SSIM. Leaves RUN/evaluation.json."""
    from fastvae.train.evaluate import evaluate

    evaluate(run, data=data, checkpoint=checkpoint, samples=samples, limit=limit, seed=seed)


def _kind(run: Path) -> str:
    """What a run is of. Raises InputError for a folder that is no run."""
    return kinds.read_run(run)[0].name


def _decoding(text: bool, default: Any, method: Any, top_p: float | None, beams: int | None) -> Any:
    """How sentences are written; of a run of images, that nobody asked for it."""
    given = {"--decoding": method, "--top-p": top_p, "--beams": beams}
    named = [name for name, value in given.items() if value is not None]
    if not text:
        if named:
            raise InputError(f"{named[0]} is for runs of text, and this is one of images")
        return None
    from fastvae.train.text.decoding import Decoding

    method = method or default
    for name, value, needed in (("--top-p", top_p, "nucleus"), ("--beams", beams, "beam")):
        if value is not None and method != needed:
            raise InputError(f"{name} is of --decoding {needed}, and this is {method}")
    how = Decoding(method)
    how = how._replace(
        top_p=how.top_p if top_p is None else top_p, beams=how.beams if beams is None else beams
    )
    how.check()
    return how
