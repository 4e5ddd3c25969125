"""The command line: `fastvae demo` and `fastvae doctor`.

Whatever a user can mend is told in one line on stderr, with exit code 2 and no traceback.
"""

import io
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

from . import backend, show_config
from .training.data import InputError

__all__ = ["main"]

_EXTRA = {
    "typer",
    "rich",
    "PIL",
    "matplotlib",
    "sklearn",
}  # the packages of the extra `train`, as they are imported


class _Interrupted(Exception):
    """Ctrl-C, under a name of our own: typer would end the program itself, without a word."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line (without the program's name; None takes the process's) and return its exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv) or ["--help"]
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
    except _Interrupted:
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
    native = backend._serve("native", "cpu")
    if native is None:
        return _fail(f"native does not serve the CPU: {backend._reason('native', 'cpu')}", code=1)
    return 0


def _app() -> Any:
    """The commands, for typer. A function, because typer is only there with the extra `train`."""
    import typer

    app = typer.Typer(
        help="The ELBO at memory speed: fused kernels in place of the hand-written VAE loss.",
        add_completion=False,
        pretty_exceptions_enable=False,
    )

    @app.command()
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

        try:
            run(Settings(data, out, epochs, batch_size, seed), Console())
        except KeyboardInterrupt:
            raise _Interrupted from None

    @app.command()
    def doctor() -> int:
        """Say what runs where, and what to do about anything that is missing. Exit code 0: native serves the CPU."""
        return _doctor()

    return app


if __name__ == "__main__":
    raise SystemExit(main())
