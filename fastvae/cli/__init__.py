"""The command line: `fastvae train`, what is done with a run, `fastvae demo` and `fastvae doctor`.

Whatever a user can mend is told in one line on stderr, with exit code 2 and no traceback.
"""

import contextlib
import io
import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

from fastvae import __version__
from fastvae.train.errors import InputError
from fastvae.train.files import reason

from .doctor import doctor
from .ending import Interrupted, fail

if TYPE_CHECKING:
    import typer

__all__ = ["app", "main"]

# Without them there is nothing to run.
_NEEDED = {"torch", "numpy"}
# The packages of the extra `train`, as they are imported.
_EXTRA = {
    "typer", "rich", "PIL", "matplotlib", "sklearn", "lightning", "torchmetrics", "tokenizers", "tomli", "tomli_w",
}  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line (without the program's name; None takes the process's) and return its exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments in ([], ["train"]):
        arguments.append("--help")
    if sys.stdout is None:
        return fail("standard output is closed")
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal without "·" or "µ" is no reason to fail
    try:
        code = _run(arguments)
        sys.stdout.flush()
        return code
    except OSError:
        if (why := _lost_output()) is None:
            raise
        return fail(f"standard output: cannot be written: {why}")
    except SystemExit as end:
        # What rich makes of a reader that has gone; it has put the null device in the place of standard output. Its
        # console, which belongs to the whole process, would print nothing more.
        if not isinstance(end.__context__, BrokenPipeError):
            raise
        import rich

        rich.reconfigure()
        return fail("standard output: cannot be written: broken pipe")


def _lost_output() -> str | None:
    """Why standard output takes nothing more, if that is so; what is still to be written is given up then."""
    try:
        sys.stdout.write("\n")
        sys.stdout.flush()
    except OSError as error:
        with contextlib.suppress(OSError, ValueError):
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, sys.stdout.fileno())
            os.close(null)
        return reason(error)
    return None


def _run(arguments: Sequence[str]) -> int:
    try:
        for argument in arguments:
            try:
                argument.encode()
            except UnicodeEncodeError:
                raise InputError(f"{argument!a}: not in UTF-8; rename the file, or link to it") from None
        if arguments == ["doctor"]:
            return doctor()  # without typer too: this is the command to run when something is missing
        code = app()(arguments, prog_name="fastvae", standalone_mode=False)
        return code if isinstance(code, int) else 0
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package in _NEEDED:
            return fail(f"{package} is not installed; get it with: pip install {package}")
        if package not in _EXTRA:
            raise
        return fail(f'{package} is not installed; get it with: pip install "fastvae-elbo[train]"')
    except Interrupted as stop:
        return fail(str(stop) or "interrupted", code=130)
    except KeyboardInterrupt:  # before a command has begun: imports take their time
        return fail("interrupted", code=130)
    except InputError as error:
        return fail(str(error))
    except OSError:
        raise  # `main` looks whether it is standard output's
    except Exception as error:
        # Typer's own (an unknown option, a number that is none), whose class has moved between its versions.
        if callable(message := getattr(error, "format_message", None)):
            return fail(f"{message()} (fastvae --help)")
        raise


def app() -> "typer.Typer":
    """The commands. A function, because typer is only there with the extra `train`."""
    import typer

    from . import demo, training, using

    made = typer.Typer(
        help="The ELBO at memory speed: fused kernels in place of the hand-written VAE loss.",
        add_completion=False,
        pretty_exceptions_enable=False,
    )

    def say_version(asked: bool) -> None:
        if asked:
            print(f"fastvae {__version__}")
            raise typer.Exit

    @made.callback()
    def options(
        version: Annotated[
            bool,
            typer.Option("--version", callback=say_version, is_eager=True, help="Say the version and end."),
        ] = False,
    ) -> None: ...

    training.add(made)
    using.add(made)
    demo.add(made)
    made.command()(doctor)
    return made
