"""The life of a run: `train` starts it, `resume` continues it, and `load` opens it for use.

The functions here are the same for all kinds of data; what differs is implemented by a `Kind`.
"""

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import torch

from . import checkpoints, messages, processes, registry, run_folder, trainer
from .errors import InputError
from .kind import D, F, Kind, R, S
from .settings import Settings

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

    from .module import VAE

__all__ = ["load", "new_model", "resume", "train"]


def load(
    kind: Kind[S, F, D, R],
    path: Path,
    *,
    data: str | None = None,
    checkpoint: Literal["best", "last"] = "best",
) -> R:
    """Open a run of this kind. `data` replaces the data that it was trained on.

    Raises InputError if the folder is not a run of this kind, if its config.toml is wrong, or if its checkpoint is
    missing, damaged or belongs to another model.
    """
    found, stored_settings, form_values = registry.read_run(path)
    if found is not kind:
        raise InputError(f"{path}: {found.wrong_kind_message}")
    settings, form = cast("S", stored_settings), kind.read_form(path, form_values)
    other_data = data is not None and Path(data).expanduser().resolve() != Path(settings.data)
    if data is not None:
        settings = dataclasses.replace(settings, data=data)
    model = kind.build(settings, form)
    device, epoch = checkpoints.restore(model, path, settings, checkpoint)

    def read() -> D:
        return _load_data(kind, settings, form, path, other_data=other_data)

    run: R = kind.run(path, settings, form, model, device, epoch, other_data, read)
    return run


def train(settings: Settings, out: Path, *, overwrite: bool = False) -> None:
    """Train a recipe into a new run folder.

    Raises InputError before any work if something is missing or wrong, or if the folder already contains a run and
    `overwrite` is not set. Ctrl-C raises KeyboardInterrupt with a message that says how to continue.
    """
    settings.check()
    if Path(settings.data).expanduser().resolve() == out.resolve():
        raise InputError(f"--out {out}: this is the folder of --data; a run must not write into its own data")
    kind = registry.kind_of(settings)
    kind.check(settings)
    data = kind.load(settings)
    settings = kind.resolve_settings(settings, data).resolve_components(len(data.train))
    if settings.devices > min(settings.batch_size, len(data.train)):
        raise InputError(
            f"--devices {settings.devices}: every device needs at least {kind.datum_with_article} in every batch"
        )
    names = (*kind.form_files, *kind.training_files, *kind.command_files)
    run_folder.refuse_to_replace(out, overwrite, names)
    form = kind.make_form(settings, data)
    model = new_model(kind, settings, form, data)
    kind.init_from_run(model, settings, out, resumed=False)
    lightning_trainer = trainer.make_trainer(settings, out, kind.examples_callback(data, form, settings, out))
    with run_folder.lock(out, names):
        if processes.is_main_process():
            run_folder.remove_outputs(out, names)
            kind.write_form(out, form)
            run_folder.write_config(out, settings, kind.form_lines(form))
        _fit(kind, lightning_trainer, model, data, form, settings, out, 0)


def resume(path: Path, *, epochs: int | None = None, data: str | None = None) -> None:
    """Continue a run from its last complete epoch, as if it had not been stopped.

    `epochs` is a new total number of epochs and `data` a new location of the data; both are kept in config.toml.

    Raises InputError if the run cannot be continued or is complete, and KeyboardInterrupt as `train` does.
    """
    options = {"epochs": epochs, "data": data}
    updates: dict[str, Any] = {name: value for name, value in options.items() if value is not None}
    kind, settings, form_values = registry.read_run(path)
    form = kind.read_form(path, form_values)
    settings = kind.resolve_on_resume(dataclasses.replace(settings, **updates), form)
    settings.check()
    run_data = _load_data(kind, settings, form, path)
    model = new_model(kind, settings, form, run_data)
    done = checkpoints.epochs_done(model, path, settings)
    if not done:
        kind.init_from_run(model, settings, path, resumed=True)
    lightning_trainer = trainer.make_trainer(
        settings, path, kind.examples_callback(run_data, form, settings, path), resumed=True
    )
    with run_folder.lock(path, (*kind.form_files, *kind.training_files)):
        if processes.is_main_process():
            run_folder.remove_partial(path)
            if updates:
                run_folder.write_config(path, settings, kind.form_lines(form))
        _fit(kind, lightning_trainer, model, run_data, form, settings, path, done)


def new_model(kind: Kind[S, F, D, R], settings: S, form: F, data: D) -> "VAE":
    """Build a model and initialise its weights as at the start of training."""
    torch.manual_seed(settings.seed)
    model = kind.build(settings, form)
    with torch.no_grad():
        kind.init_from_data(model, settings, data)
    return model


def _load_data(kind: Kind[S, F, D, R], settings: S, form: F, path: Path, *, other_data: bool = False) -> D:
    """Load the data of a run."""
    try:
        data = kind.load(settings, form, other_data=other_data)
    except InputError as error:
        raise InputError(f"{error} (the data of {path}; use --data to give other data)") from error
    return kind.adapt_data(data, form, settings, path)


def _fit(
    kind: Kind[S, F, D, R],
    lightning_trainer: "Trainer",
    model: "VAE",
    data: D,
    form: F,
    settings: S,
    out: Path,
    done: int,
) -> None:
    """Train from epoch `done` on; the weights of that epoch are in last.ckpt."""
    batches = kind.batches(model, data, form, settings)
    model.dataset_size = len(data.train)
    introduction = [
        *messages.describe_backend(lightning_trainer.strategy.root_device),
        *kind.describe_run(model, data, form, settings, batches),
    ]
    trainer.fit(
        lightning_trainer,
        model,
        batches,
        settings,
        out,
        done,
        introduction,
        kind.training_files,
        can_sample=kind.can_sample,
    )
