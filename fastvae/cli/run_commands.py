"""The commands that use a run: sample, reconstruct, encode, interpolate, traverse, inpaint, evaluate.

This module defines their options and checks that they fit the kind of run; `image_commands`, `text_commands` and
`counts_commands` do the work.
"""

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from fastvae.train import kinds
from fastvae.train.errors import InputError

from .failures import catch_interrupt

__all__ = ["add"]


def add(app: typer.Typer) -> None:
    for command in (sample, reconstruct, encode, interpolate, traverse, inpaint, evaluate):
        app.command(rich_help_panel="Commands that use a run")(catch_interrupt(command))


RunArgument = Annotated[Path, typer.Argument(metavar="RUN", help="Folder of the run.", show_default=False)]
Checkpoint = Annotated[
    Literal["best", "last"],
    typer.Option(
        help="Use the weights of the epoch with the best validation ELBO (of the last epoch for vae-gan), "
        "or those of the last epoch."
    ),
]


def _data(used: str) -> Any:
    text = f"Use other data than the run's own, given as for `fastvae train`. {used}"
    return typer.Option(metavar="DATA", help=text, show_default=False)


Data = Annotated[str | None, _data("Their validation part is used, or all images of a folder.")]
Seed = Annotated[int, typer.Option(help="Random seed for everything that is drawn.")]

Method = Annotated[
    Literal["greedy", "nucleus", "beam"] | None,
    typer.Option("--decoding", help="How the words are chosen (text only).", show_default=False),
]
TopP = Annotated[
    float | None,
    typer.Option(help="Probability mass that nucleus decoding samples from.", show_default="0.9"),
]
Beams = Annotated[int | None, typer.Option(help="Number of beams for beam decoding.", show_default="5")]


def _out(name: str) -> Any:
    text = f"File to write the picture to; by default RUN/{name}."
    if name in ("samples.png", "reconstructions.png", "interpolations.png"):
        text += " For text, a .txt file; by default the sentences are also printed."
    if name == "reconstructions.png":
        text += " For counts, an .npz file."
    return typer.Option(metavar="FILE", help=text, show_default=False)


def sample(
    run: RunArgument,
    n: Annotated[
        int | None,
        typer.Option("-n", help="Number of images or sentences.", show_default="64; 20 for text"),
    ] = None,
    best: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="Draw --of images and keep the N that the model ranks highest, best first. They are ranked by their "
            "likelihood, which favours plain images, or by the discriminator's score if the model has one.",
            show_default=False,
        ),
    ] = None,
    of: Annotated[
        int | None,
        typer.Option(metavar="M", help="Number of images that --best chooses from.", show_default="256"),
    ] = None,
    temperature: Annotated[
        float,
        typer.Option(
            help="Standard deviation of z: below 1 gives plainer images, above 1 more unusual ones."
        ),
    ] = 1.0,
    seed: Seed = 0,
    decoding: Method = None,
    top_p: TopP = None,
    beams: Beams = None,
    checkpoint: Checkpoint = "best",
    out: Annotated[Path | None, _out("samples.png")] = None,
) -> None:
    """Generate new images or sentences."""
    kind = _kind(run)
    text = kind == "text"
    options = _decoding(kind, "nucleus", decoding, top_p, beams)
    for name, value in (("--best", best), ("--of", of)):
        if kind != "image" and value is not None:
            raise InputError(f"{name} only applies to runs of images; this is a run of {kind}")
    if best is None and of is not None:
        raise InputError(f"--of {of} only applies together with --best, the number of images to keep")
    if best is not None and n is not None:
        raise InputError("-n and --best cannot be used together; --best already sets the number of images")
    if text:
        from . import text_commands

        text_commands.sample(
            run, options, n=n, temperature=temperature, seed=seed, checkpoint=checkpoint, out=out
        )
        return
    from . import image_commands

    if best is not None:
        image_commands.best(run, best, of, temperature=temperature, seed=seed, checkpoint=checkpoint, out=out)
        return
    image_commands.sample(run, n=n, temperature=temperature, seed=seed, checkpoint=checkpoint, out=out)


def reconstruct(
    run: RunArgument,
    n: Annotated[
        int | None,
        typer.Option(
            "-n", help="Maximum number of images, sentences or cells.", show_default="30; all cells"
        ),
    ] = None,
    data: Annotated[
        str | None,
        _data(
            "For text and arrays of images the validation part is used; of a folder all images; of counts all cells."
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Random seed for the words that are drawn (text only).")] = 0,
    decoding: Method = None,
    top_p: TopP = None,
    beams: Beams = None,
    checkpoint: Checkpoint = "best",
    out: Annotated[Path | None, _out("reconstructions.png")] = None,
) -> None:
    """Encode and decode validation images or sentences, the sentences of a text file, or all cells."""
    kind = _kind(run)
    text = kind == "text"
    options = _decoding(kind, "greedy", decoding, top_p, beams)
    if kind == "counts":
        from . import counts_commands

        counts_commands.reconstruct(run, n=n, data=data, checkpoint=checkpoint, out=out)
        return
    n = 30 if n is None else n
    if text:
        from . import text_commands

        text_commands.reconstruct(run, options, n=n, data=data, seed=seed, checkpoint=checkpoint, out=out)
        return
    from . import image_commands

    image_commands.reconstruct(run, n=n, data=data, checkpoint=checkpoint, out=out)


def encode(
    run: RunArgument,
    out: Annotated[
        Path,
        typer.Option(
            metavar="FILE",
            help="An .npz file to write, or an .h5ad file with the same cells, to whose obsm the latent means are "
            "added (a copy of the data, if it does not exist).",
            show_default=False,
        ),
    ],
    data: Annotated[str | None, _data("All their cells are used.")] = None,
    checkpoint: Checkpoint = "best",
) -> None:
    """Write the latent means of all cells of a run of counts."""
    from . import counts_commands

    counts_commands.encode(run, out, data=data, checkpoint=checkpoint)


def interpolate(
    run: RunArgument,
    first: Annotated[
        str | None, typer.Argument(metavar="FIRST", help="First sentence (text only).", show_default=False)
    ] = None,
    second: Annotated[
        str | None,
        typer.Argument(metavar="SECOND", help="Second sentence (text only).", show_default=False),
    ] = None,
    start: Annotated[
        list[int] | None,
        typer.Option(
            "--from",
            metavar="I",
            help="Validation image to start from, counted from 0. Repeat --from and --to for further pairs. "
            "Defaults to 0 and 1, 2 and 3, and so on.",
            show_default=False,
        ),
    ] = None,
    end: Annotated[
        list[int] | None,
        typer.Option("--to", metavar="J", help="Validation image to end with.", show_default=False),
    ] = None,
    steps: Annotated[int, typer.Option(help="Number of images or sentences in between.")] = 10,
    data: Data = None,
    seed: Seed = 0,
    decoding: Method = None,
    top_p: TopP = None,
    beams: Beams = None,
    checkpoint: Checkpoint = "best",
    out: Annotated[Path | None, _out("interpolations.png")] = None,
) -> None:
    """Interpolate between two images, or between two sentences, in the latent space."""
    kind = _kind(run)
    text = kind == "text"
    options = _decoding(kind, "greedy", decoding, top_p, beams)
    if text:
        if first is None or second is None:
            raise InputError(f'a run of text needs two sentences: fastvae interpolate {run} "FIRST" "SECOND"')
        if start or end:
            raise InputError(
                "--from and --to only apply to runs of images; a run of text takes two sentences"
            )
        from . import text_commands

        text_commands.interpolate(
            run, options, first, second, steps=steps, seed=seed, checkpoint=checkpoint, out=out
        )
        return
    if kind == "image" and first is not None:
        raise InputError(f"{run}: this is a run of images; use --from and --to, not sentences")
    from . import image_commands

    starts, ends = start or (), end or ()
    image_commands.interpolate(run, starts, ends, steps=steps, data=data, checkpoint=checkpoint, out=out)


def traverse(
    run: RunArgument,
    image: Annotated[
        int, typer.Option(metavar="I", help="Validation image to start from, counted from 0.")
    ] = 0,
    n: Annotated[int, typer.Option("-n", help="Maximum number of dimensions.")] = 20,
    steps: Annotated[int, typer.Option(help="Number of images per dimension, from -3 to 3.")] = 11,
    data: Data = None,
    checkpoint: Checkpoint = "best",
    out: Annotated[Path | None, _out("traversals.png")] = None,
) -> None:
    """Vary an image along each latent dimension, starting with the most active one."""
    from . import image_commands

    image_commands.traverse(run, image, n=n, steps=steps, data=data, checkpoint=checkpoint, out=out)


def inpaint(
    run: RunArgument,
    mask: Annotated[
        str,
        typer.Option(
            help="Part to fill: left, right, top, bottom, center, or a box x0,y0,x1,y1 in pixels from the top left, "
            "where x1 and y1 are exclusive."
        ),
    ] = "right",
    steps: Annotated[int, typer.Option(help="How often to encode and decode.")] = 100,
    n: Annotated[int, typer.Option("-n", help="Maximum number of images.")] = 10,
    seed: Seed = 0,
    data: Data = None,
    checkpoint: Checkpoint = "best",
    out: Annotated[Path | None, _out("inpainting.png")] = None,
) -> None:
    """Hide a part of validation images and let the model fill it in."""
    from . import image_commands

    image_commands.inpaint(
        run, mask=mask, steps=steps, n=n, seed=seed, data=data, checkpoint=checkpoint, out=out
    )


def evaluate(
    run: RunArgument,
    samples: Annotated[
        int | None,
        typer.Option(
            help="Importance samples per image, cell or sentence. More give a tighter bound on the likelihood.",
            show_default="500; 100 for counts, 20 for text",
        ),
    ] = None,
    limit: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="Only use the first N validation images, cells or sentences.",
            show_default=False,
        ),
    ] = None,
    test: Annotated[
        bool,
        typer.Option("--test", help="Use the test images of a run of images that was trained with --val."),
    ] = False,
    factors: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Known factors of the images or cells, for the mutual information gap (MIG): a .csv file with names "
            "in its first line, or an .npy or .npz file, with one row for each.",
            show_default=False,
        ),
    ] = None,
    seed: Seed = 0,
    data: Data = None,
    checkpoint: Checkpoint = "best",
) -> None:
    """Evaluate a run on validation data and write RUN/evaluation.json.

    It measures the ELBO, the likelihood, the parts of the KL and the active units; for images PSNR and SSIM, for text
    the perplexity, and for counts with a multinomial likelihood the ranking of held-out items.
    """
    from fastvae.train.evaluate import evaluate

    evaluate(
        run,
        data=data,
        checkpoint=checkpoint,
        samples=samples,
        limit=limit,
        seed=seed,
        test=test,
        factors=factors,
    )


def _kind(run: Path) -> str:
    """Return the kind of data of a run. Raises InputError if the folder is not a run."""
    return kinds.read_run(run)[0].name


def _decoding(kind: str, default: Any, method: Any, top_p: float | None, beams: int | None) -> Any:
    """Return how to decode sentences, or None for a run of another kind, which refuses these options."""
    option_values = {"--decoding": method, "--top-p": top_p, "--beams": beams}
    given_names = [name for name, value in option_values.items() if value is not None]
    if kind != "text":
        if given_names:
            of = "images" if kind == "image" else kind
            raise InputError(f"{given_names[0]} only applies to runs of text; this is a run of {of}")
        return None
    from fastvae.train.text.decoding import Decoding

    method = method or default
    for name, value, needed in (("--top-p", top_p, "nucleus"), ("--beams", beams, "beam")):
        if value is not None and method != needed:
            raise InputError(f"{name} only applies to --decoding {needed}, got {method}")
    options = Decoding(method)
    options = options._replace(
        top_p=options.top_p if top_p is None else top_p, beams=options.beams if beams is None else beams
    )
    options.check()
    return options
