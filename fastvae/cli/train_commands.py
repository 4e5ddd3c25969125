"""`fastvae train` and `fastvae resume`."""

import dataclasses
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from fastvae.train import kinds
from fastvae.train.settings import Settings

from .failures import catch_interrupt

__all__ = ["add"]


def add(app: typer.Typer) -> None:
    trainer = typer.Typer()
    app.add_typer(trainer, name="train", help="Train a recipe; see for example `fastvae train mlp --help`.")
    for recipe in kinds.recipes().values():
        summary = (recipe.__doc__ or "").partition("\n")[0]
        trainer.command(recipe.recipe, help=summary)(_train_command(recipe))
    app.command()(catch_interrupt(resume))


def resume(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of the run.")],
    epochs: Annotated[
        int | None,
        typer.Option(help="New total number of epochs.", show_default="as planned when the run was started"),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(
            metavar="DATA", help="New location of the run's data, if they were moved.", show_default=False
        ),
    ] = None,
) -> None:
    """Continue a run from its last complete epoch, as if it had never been stopped."""
    from fastvae.train import runs

    runs.resume(run, epochs=epochs, data=data)


def _train_command(recipe: type[Settings]) -> Callable[..., None]:
    """Return a command whose options are the fields of the recipe's dataclass."""

    def command(out: Path, overwrite: bool, **values: Any) -> None:
        from fastvae.train import runs

        runs.train(recipe(**values), out, overwrite=overwrite)

    def parameter(name: str, kind: Any, default: Any, option: Any) -> inspect.Parameter:
        annotation = Annotated[kind, option]
        return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)

    kinds = recipe.kinds()
    overwrite = typer.Option("--overwrite", help="Replace the run in this folder, if there is one.")
    parameters = [
        parameter(
            "out", Path, Path("runs", recipe.recipe), typer.Option(metavar="DIR", help="Folder of the run.")
        ),
        parameter("overwrite", bool, False, overwrite),
    ]
    for field in dataclasses.fields(recipe):
        typer_option = typer.Option(help=field.metadata["help"], rich_help_panel=field.metadata["group"])
        parameters.append(parameter(field.name, kinds[field.name], field.default, typer_option))
    # Typer reads the signature.
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {p.name: p.annotation for p in parameters}
    return catch_interrupt(command)
