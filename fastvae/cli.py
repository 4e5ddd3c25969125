"""The command line: `fastvae train`, what is done with a run, `fastvae demo` and `fastvae doctor`.

Whatever a user can mend is told in one line on stderr, with exit code 2 and no traceback.
"""

import dataclasses
import functools
import inspect
import io
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from . import __version__, backends, show_config
from .training.data import InputError

if TYPE_CHECKING:
    from .training.settings import Settings

__all__ = ["main"]

# The packages of the extra `train`, as they are imported.
_EXTRA = {
    "typer", "rich", "PIL", "matplotlib", "sklearn", "lightning", "torchmetrics", "tokenizers", "tomli", "tomli_w",
}  # fmt: skip


class _Interrupted(Exception):
    """Ctrl-C, under a name of our own: typer would end the program itself, without a word."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line (without the program's name; None takes the process's) and return its exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments in ([], ["train"]):
        arguments.append("--help")
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal without "·" or "µ" is no reason to fail
    try:
        if arguments == ["doctor"]:
            return _doctor()  # without typer too: this is the command to run when something is missing
        code = _app()(arguments, prog_name="fastvae", standalone_mode=False)
        return code if isinstance(code, int) else 0
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in _EXTRA:
            raise
        return _fail(f'{package} is not installed; get it with: pip install "fastvae-elbo[train]"')
    except _Interrupted as stop:
        return _fail(str(stop) or "interrupted", code=130)
    except KeyboardInterrupt:  # before a command has begun: imports take their time
        return _fail("interrupted", code=130)
    except InputError as error:
        return _fail(str(error))
    except Exception as error:
        # Typer's own (an unknown option, a number that is none), whose class has moved between its versions.
        if callable(message := getattr(error, "format_message", None)):
            return _fail(f"{message()} (fastvae --help)")
        raise


def _fail(message: str, code: int = 2) -> int:
    print("fastvae:", " ".join(message.split()), file=sys.stderr)
    return code


def _doctor() -> int:
    print(show_config())
    native = backends.serve("native", "cpu")
    if native is None:
        return _fail(f"native does not serve the CPU: {backends.reason('native', 'cpu')}", code=1)
    return 0


def _app() -> Any:
    """The commands, for typer. A function, because typer is only there with the extra `train`."""
    import typer

    from .recipes import RECIPES

    app = typer.Typer(
        help="The ELBO at memory speed: fused kernels in place of the hand-written VAE loss.",
        add_completion=False,
        pretty_exceptions_enable=False,
    )

    def say_version(asked: bool) -> None:
        if asked:
            print(f"fastvae {__version__}")
            raise typer.Exit

    @app.callback()
    def options(
        version: Annotated[
            bool,
            typer.Option("--version", callback=say_version, is_eager=True, help="Say the version and end."),
        ] = False,
    ) -> None: ...

    trainer = typer.Typer()
    app.add_typer(trainer, name="train", help="Train a recipe into a run folder; `fastvae train mlp --help`.")
    for recipe in RECIPES.values():
        trainer.command(recipe.recipe, help=_summary(recipe))(_train_command(recipe))

    @app.command()
    @_stoppable
    def resume(
        run: Annotated[Path, typer.Argument(metavar="RUN", help="The folder of a run.")],
        epochs: Annotated[
            int | None, typer.Option(help="Train up to this many epochs, if not as many as first planned.")
        ] = None,
        data: Annotated[
            str | None,
            typer.Option(
                metavar="DATA", help="Where the run's data are now, if they were moved.", show_default=False
            ),
        ] = None,
    ) -> None:
        """Continue a run from its last whole epoch, as if it had never been stopped."""
        from .training import runs

        runs.resume(run, epochs=epochs, data=data)

    panel = "With a run"
    RunArgument = Annotated[
        Path, typer.Argument(metavar="RUN", help="The folder of a run.", show_default=False)
    ]
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

    def out(name: str) -> Any:
        text = f"Where the picture goes; RUN/{name} if not given."
        if name in ("samples.png", "reconstructions.png", "interpolations.png"):
            text += " Of text: a .txt file, in place of the screen."
        return typer.Option(metavar="FILE", help=text, show_default=False)

    Method = Annotated[
        Literal["greedy", "nucleus", "beam"] | None,
        typer.Option("--decoding", help="Of text: how words are chosen.", show_default=False),
    ]
    TopP = Annotated[
        float | None,
        typer.Option(help="Of nucleus: the share of the probability that is drawn from.", show_default="0.9"),
    ]
    Beams = Annotated[int | None, typer.Option(help="Of beam: how many beginnings.", show_default="5")]

    @app.command(rich_help_panel=panel)
    @_stoppable
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
        out: Annotated[Path | None, out("samples.png")] = None,
    ) -> None:
        """Draw new images, or write new sentences."""
        from .recipes import generate, write
        from .training import messages, runs, text_runs

        kind = runs.kind(run)
        text = kind == "text"
        how = _decoding(text, "nucleus", decoding, top_p, beams)
        for name, value in (("--best", best), ("--of", of)):
            if kind != "image" and value is not None:
                raise InputError(f"{name} is for runs of images, and this is one of {kind}")
        if best is None and of is not None:
            raise InputError(f"--of is of --best, which says how many of the {of} to keep: give both")
        if best is not None and n is not None:
            raise InputError("-n and --best: give one of them; --best keeps the best of --of images")
        what = f"z ~ N(0, {temperature:g}² I)" if temperature != 1 else "z ~ N(0, I)"
        if text:
            loaded = text_runs.load(run, checkpoint=checkpoint)
            path = _text_out(out, run / "samples.txt")
            n = 20 if n is None else n
            lines = write.sample(loaded, how, n=n, temperature=temperature, seed=seed)
            _tell(lines, out)
            write.output(path, lines)
            messages.say(f"{path}: {_count(n, 'new sentence')}, written from {what}")
            return
        out = out or run / "samples.png"
        if best is not None:
            of = 256 if of is None else of
            opened = runs.load(run, checkpoint=checkpoint)
            found = generate.best(opened, out, n=best, of=of, temperature=temperature, seed=seed)
            drawn = f"the best {best} of {_count(of, 'new image')}"
            messages.say(f"{out}: {drawn}, decoded from {what}, the best first")
            first, last, worst = (f"{found.values[i]:.{found.decimals}f}" for i in (0, best - 1, -1))
            messages.say(
                f"ranked by {found.measure}: from {first} to {last}{found.unit}; the worst drawn: {worst}"
            )
            return
        n = 64 if n is None else n
        generate.sample(runs.load(run, checkpoint=checkpoint), out, n=n, temperature=temperature, seed=seed)
        messages.say(f"{out}: {_count(n, 'new image')}, decoded from {what}")

    @app.command(rich_help_panel=panel)
    @_stoppable
    def reconstruct(
        run: RunArgument,
        n: Annotated[int, typer.Option("-n", help="How many, if there are so many.")] = 30,
        data: Data = None,
        seed: Seed = 0,
        decoding: Method = None,
        top_p: TopP = None,
        beams: Beams = None,
        checkpoint: Checkpoint = "best",
        out: Annotated[Path | None, out("reconstructions.png")] = None,
    ) -> None:
        """Encode and decode held-out images, or held-out sentences, or those of a text file."""
        from .recipes import generate, write
        from .training import messages, runs, sentences, text_runs

        text = runs.kind(run) == "text"
        how = _decoding(text, "greedy", decoding, top_p, beams)
        if text:
            # Of a file all lines are taken, not only a part held out.
            is_file = data is not None and (Path(data).is_file() or data.endswith(".txt"))
            opened = text_runs.load(run, data=None if is_file else data, checkpoint=checkpoint)
            path = _text_out(out, run / "reconstructions.txt")
            given = sentences.read(Path(str(data)).expanduser()) if is_file else []
            for note in write.notes(opened, given[:n]):
                messages.say(f"warning: {data}: {note}")
            pairs = write.reconstruct(opened, how, n=n, seed=seed, lines=given)
            lines = [line for original, made in pairs for line in (original, f"  {made}")]
            _tell(lines, out)
            write.output(path, lines)
            whose = "sentence" if is_file else "held-out sentence"
            messages.say(f"{path}: {_count(len(pairs), whose)}, each above what the model makes of it")
            return
        out = out or run / "reconstructions.png"
        count = generate.reconstruct(runs.load(run, data=data, checkpoint=checkpoint), out, n=n)
        messages.say(f"{out}: {_count(count, 'held-out image')}, each above what the model makes of it")

    @app.command(rich_help_panel=panel)
    @_stoppable
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
        out: Annotated[Path | None, out("interpolations.png")] = None,
    ) -> None:
        """Go from one image to another in the latent space, a row for each pair, or from one sentence to another."""
        from .recipes import generate, write
        from .training import messages, runs, text_runs

        text = runs.kind(run) == "text"
        how = _decoding(text, "greedy", decoding, top_p, beams)
        if text:
            if first is None or second is None:
                raise InputError(f'two sentences are needed: fastvae interpolate {run} "FIRST" "SECOND"')
            if start or end:
                raise InputError("--from and --to are for runs of images; this one takes two sentences")
            opened = text_runs.load(run, checkpoint=checkpoint)
            path = _text_out(out, run / "interpolations.txt")
            for note in write.notes(opened, [first, second]):
                messages.say(f"warning: {note}")
            written = write.interpolate(opened, how, first, second, steps=steps, seed=seed)
            lines = [first, *(f"  {line}" for line in written), second]
            _tell(lines, out)
            write.output(path, lines)
            messages.say(f"{path}: {_count(steps, 'sentence')} on the way, between the two given")
            return
        if first is not None:
            raise InputError(f"{run}: a run of images: give --from and --to, not sentences")
        out = out or run / "interpolations.png"
        loaded = runs.load(run, data=data, checkpoint=checkpoint)
        pairs = generate.interpolate(loaded, out, starts=start or (), ends=end or (), steps=steps)
        ways = ", ".join(f"{i} to {j}" for i, j in pairs)
        messages.say(f"{out}: held-out images {ways}; {steps} decoded on the way, between the two originals")

    @app.command(rich_help_panel=panel)
    @_stoppable
    def traverse(
        run: RunArgument,
        image: Annotated[int, typer.Option(metavar="I", help="Held-out image to vary, counted from 0.")] = 0,
        n: Annotated[int, typer.Option("-n", help="How many dimensions, if there are so many.")] = 20,
        steps: Annotated[int, typer.Option(help="Images in a row, from -3 to 3.")] = 11,
        data: Data = None,
        checkpoint: Checkpoint = "best",
        out: Annotated[Path | None, out("traversals.png")] = None,
    ) -> None:
        """Vary an image along each latent dimension, the most active first."""
        from .recipes import generate
        from .training import messages, runs

        out = out or run / "traversals.png"
        loaded = runs.load(run, data=data, checkpoint=checkpoint)
        order = generate.traverse(loaded, out, image=image, n=n, steps=steps)
        rows = f"{_count(len(order), 'dimension')}, the most active first, each going from -3 to 3"
        messages.say(f"{out}: held-out image {image}, varied along {rows}")

    @app.command(rich_help_panel=panel)
    @_stoppable
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
        out: Annotated[Path | None, out("inpainting.png")] = None,
    ) -> None:
        """Hide a part of held-out images and let the model fill it."""
        from .recipes import generate
        from .training import messages, runs

        out = out or run / "inpainting.png"
        loaded = runs.load(run, data=data, checkpoint=checkpoint)
        count = generate.inpaint(loaded, out, mask=mask, steps=steps, n=n, seed=seed)
        messages.say(f"{out}: {_count(count, 'held-out image')}: masked, filled by the model, whole")

    @app.command(rich_help_panel=panel)
    @_stoppable
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
            typer.Option(
                metavar="N", help="Only the first N held-out images or sentences.", show_default=False
            ),
        ] = None,
        seed: Seed = 0,
        data: Data = None,
        checkpoint: Checkpoint = "best",
    ) -> None:
        """Measure a run on held-out data: ELBO, likelihood, active units, PSNR, SSIM. Leaves RUN/evaluation.json."""
        from rich import get_console

        from .recipes import generate
        from .training import evaluate, messages, pictures, runs

        if (of := runs.kind(run)) != "image":
            measure = _evaluate_counts if of == "counts" else _evaluate_text
            measure(run, data, checkpoint, samples, limit, seed)
            return
        samples = 500 if samples is None else samples
        loaded = runs.load(run, data=data, checkpoint=checkpoint)
        pictures.prepare_folder(run, ["evaluation.json"])
        done = evaluate.evaluate(
            loaded, get_console(), checkpoint=checkpoint, samples=samples, limit=limit, seed=seed
        )
        done.write(run / "evaluation.json")
        of = f"{_count(done.images, 'held-out image')} of {done.data}"
        messages.say(f"{run}: {of}; epoch {done.epoch} ({checkpoint})\n")
        get_console().print(done.table())
        messages.say(f"\nwritten to {run / 'evaluation.json'}")
        if hasattr(loaded.model, "realism"):  # a GAN, which may have learned images by heart
            generate.beside(loaded, run / "generated.png", seed=seed)
            messages.say(f"{run / 'generated.png'}: new images, above held-out ones")
            if loaded.others:
                messages.say(
                    "neighbours.png is not drawn: it is of the images trained on, and --data are others"
                )
                return
            generate.neighbours(loaded, run / "neighbours.png", seed=seed)
            messages.say(f"{run / 'neighbours.png'}: new images, each above the nearest of those trained on")

    @app.command()
    @_stoppable
    def demo(
        data: Annotated[
            Path | None,
            typer.Option(
                metavar="FILE.npz",
                help="Images to train on: x_train, uint8 (N, H, W) or (N, H, W, C), and perhaps x_test. "
                "Without it: scikit-learn's digits.",
            ),
        ] = None,
        out: Annotated[Path, typer.Option(metavar="DIR", help="Where the pictures go.")] = Path("runs/demo"),
        epochs: Annotated[
            int | None, typer.Option(help="40 for the digits, 5 for a file, if not given.")
        ] = None,
        batch_size: Annotated[int, typer.Option(help="Images in a batch.")] = 128,
        seed: Annotated[int, typer.Option(help="Of the weights, the batches and the noise.")] = 0,
    ) -> None:
        """Train a small VAE with fastvae.ELBO, then with the hand-written loss; compare them; leave two pictures."""
        from rich.console import Console

        from .recipes.demo import Settings, run

        run(Settings(data, out, epochs, batch_size, seed), Console())

    @app.command()
    def doctor() -> int:
        """Say what runs where, and what to do about anything that is missing. Exit code 0: native serves the CPU."""
        return _doctor()

    return app


def _decoding(text: bool, default: Any, method: Any, top_p: float | None, beams: int | None) -> Any:
    """How sentences are written; of a run of images, that nobody asked for it."""
    given = {"--decoding": method, "--top-p": top_p, "--beams": beams}
    named = [name for name, value in given.items() if value is not None]
    if not text:
        if named:
            raise InputError(f"{named[0]} is for runs of text, and this is one of images")
        return None
    from .training.decoding import Decoding

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


def _text_out(out: Path | None, default: Path) -> Path:
    if out is not None and out.suffix.lower() != ".txt":
        raise InputError(f"--out {out}: sentences go into a text file, so its name must end in .txt")
    return out or default


def _tell(lines: Sequence[str], out: Path | None) -> None:
    """On the screen, where no file was asked for."""
    from .training import messages

    if out is None:
        for line in lines:
            messages.say(line)
        messages.say()


def _evaluate_text(
    run: Path, data: str | None, checkpoint: Any, samples: int | None, limit: int | None, seed: int
) -> None:
    from rich import get_console

    from .training import messages, pictures, text_evaluate, text_runs

    loaded = text_runs.load(run, data=data, checkpoint=checkpoint)
    pictures.prepare_folder(run, ["evaluation.json"])
    done = text_evaluate.evaluate(
        loaded,
        get_console(),
        checkpoint=checkpoint,
        samples=20 if samples is None else samples,
        limit=limit,
        seed=seed,
    )
    done.write(run / "evaluation.json")
    of = f"{_count(done.sentences, 'held-out sentence')} of {done.data}"
    messages.say(f"{run}: {of}; epoch {done.epoch} ({checkpoint})\n")
    get_console().print(done.table())
    messages.say(f"\nwritten to {run / 'evaluation.json'}")


def _evaluate_counts(
    run: Path, data: str | None, checkpoint: Any, samples: int | None, limit: int | None, seed: int
) -> None:
    from rich import get_console

    from .training import cell_evaluate, cell_runs, messages, pictures

    loaded = cell_runs.load(run, data=data, checkpoint=checkpoint)
    pictures.prepare_folder(run, ["evaluation.json"])
    done = cell_evaluate.evaluate(
        loaded,
        get_console(),
        checkpoint=checkpoint,
        samples=100 if samples is None else samples,
        limit=limit,
        seed=seed,
    )
    done.write(run / "evaluation.json")
    of = f"{_count(done.cells, 'held-out cell')} of {done.data}"
    messages.say(f"{run}: {of}; epoch {done.epoch} ({checkpoint})\n")
    get_console().print(done.table())
    messages.say(f"\nwritten to {run / 'evaluation.json'}")


def _stoppable(command: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(command)
    def run(*args: Any, **kwargs: Any) -> None:
        try:
            command(*args, **kwargs)
        except KeyboardInterrupt as stop:
            raise _Interrupted(*stop.args) from None

    return run


def _count(n: int, what: str) -> str:
    return f"{n} {what}{'s' if n != 1 else ''}"


def _summary(recipe: "type[Settings]") -> str:
    return (recipe.__doc__ or "").partition("\n")[0]


def _train_command(recipe: "type[Settings]") -> Callable[..., None]:
    """A command whose options are the fields of the recipe's dataclass."""
    import typer

    def command(out: Path, overwrite: bool, **values: Any) -> None:
        from .training import runs

        runs.train(recipe(**values), out, overwrite=overwrite)

    def parameter(name: str, kind: Any, default: Any, option: Any) -> inspect.Parameter:
        annotation = Annotated[kind, option]
        return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)

    kinds = recipe.kinds()
    overwrite = typer.Option("--overwrite", help="Replace a run that is there.")
    parameters = [
        parameter(
            "out", Path, Path("runs", recipe.recipe), typer.Option(metavar="DIR", help="The run's folder.")
        ),
        parameter("overwrite", bool, False, overwrite),
    ]
    for field in dataclasses.fields(recipe):
        shown = typer.Option(help=field.metadata["help"], rich_help_panel=field.metadata["group"])
        parameters.append(parameter(field.name, kinds[field.name], field.default, shown))
    # What typer reads.
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {p.name: p.annotation for p in parameters}
    return _stoppable(command)


if __name__ == "__main__":
    raise SystemExit(main())
