"""The command line: `fastvae train`, the commands that use a run, `fastvae demo` and `fastvae doctor`.

An error that the user can fix is printed as one line on stderr, with exit code 2 and no traceback.
"""

import contextlib
import io
import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

from fastvae import __version__
from fastvae.train.errors import InputError
from fastvae.train.files import error_reason

from .doctor import doctor
from .failures import Interrupted, fail

if TYPE_CHECKING:
    import typer

__all__ = ["app", "main"]

# Nothing works without these packages.
_NEEDED = {"torch", "numpy"}
# The import names of the packages in the extra `train`.
_EXTRA = {
    "typer", "rich", "PIL", "matplotlib", "sklearn", "lightning", "torchmetrics", "tokenizers", "tomli", "tomli_w",
}  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line (without the program's name; by default that of the process) and return the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments in ([], ["train"]):
        arguments.append("--help")
    if sys.stdout is None:
        return fail("standard output is closed")
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # some terminals cannot print "·" or "µ"
    try:
        code = _run(arguments)
        sys.stdout.flush()
        return code
    except OSError:
        if (cause := _output_error()) is None:
            raise
        return fail(f"cannot write to standard output: {cause}")
    except SystemExit as end:
        # rich raises this when the reader of a pipe has gone, after it has replaced standard output with the null
        # device. The console is global, so it would print nothing in the rest of this process.
        if not isinstance(end.__context__, BrokenPipeError):
            raise
        import rich

        rich.reconfigure()
        return fail("cannot write to standard output: broken pipe")


def _output_error() -> str | None:
    """Return why standard output cannot be written to, or None if it can; pending output is then dropped."""
    try:
        sys.stdout.write("\n")
        sys.stdout.flush()
    except OSError as error:
        with contextlib.suppress(OSError, ValueError):
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, sys.stdout.fileno())
            os.close(null)
        return error_reason(error)
    return None


def _run(arguments: Sequence[str]) -> int:
    try:
        for argument in arguments:
            try:
                argument.encode()
            except UnicodeEncodeError:
                raise InputError(
                    f"{argument!a}: not valid UTF-8; rename the file, or create a link to it"
                ) from None
        if arguments == ["doctor"]:
            return doctor()  # bypasses typer, which may be one of the missing packages
        code = app()(arguments, prog_name="fastvae", standalone_mode=False)
        return code if isinstance(code, int) else 0
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package in _NEEDED:
            return fail(f"{package} is not installed; install it with: pip install {package}")
        if package not in _EXTRA:
            raise
        return fail(f'{package} is not installed; install it with: pip install "fastvae-elbo[train]"')
    except Interrupted as stop:
        return fail(str(stop) or "interrupted", code=130)
    except KeyboardInterrupt:  # raised before a command started, while modules were being imported
        return fail("interrupted", code=130)
    except InputError as error:
        return fail(str(error))
    except OSError:
        raise  # `main` checks whether standard output is the cause
    except Exception as error:
        # Typer's own errors (an unknown option, a bad number). Their class has moved between versions of typer.
        if callable(message := getattr(error, "format_message", None)):
            return fail(f"{message()} (see fastvae --help)")
        raise


def app() -> "typer.Typer":
    """Return the typer app. It is built here because typer is only installed with the extra `train`."""
    import typer

    from . import demo, run_commands, train_commands

    typer_app = typer.Typer(
        help="Fused VAE losses for PyTorch: train VAEs and use them.",
        add_completion=False,
        pretty_exceptions_enable=False,
    )

    def print_version(value: bool) -> None:
        if value:
            print(f"fastvae {__version__}")
            raise typer.Exit

    @typer_app.callback()
    def options(
        version: Annotated[
            bool,
            typer.Option(
                "--version", callback=print_version, is_eager=True, help="Show the version and exit."
            ),
        ] = False,
    ) -> None: ...

    train_commands.add(typer_app)
    run_commands.add(typer_app)
    demo.add(typer_app)
    typer_app.command()(doctor)
    return typer_app
