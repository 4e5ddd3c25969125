"""A run, from its beginning to its use: `train` makes it, `resume` continues it, `load` opens it.

What is done here is done alike for every kind of data; what is not, a `Kind` does.
"""

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import torch

from . import checkpoints, folder, messages, processes, registry, trainer
from .errors import InputError
from .kind import D, F, Kind, R, S
from .settings import Settings

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

    from .module import VAE

__all__ = ["fresh", "load", "resume", "train"]


def load(
    kind: Kind[S, F, D, R],
    path: Path,
    *,
    data: str | None = None,
    checkpoint: Literal["best", "last"] = "best",
) -> R:
    """Open a run of this kind. `data` takes the place of the data it was trained on.

    Raises InputError for a folder that is no run, a wrong key in config.toml, and a checkpoint that is not there, is
    damaged or belongs to something else.
    """
    found, its_settings, head = registry.read_run(path)
    if found is not kind:
        raise InputError(f"{path}: {found.elsewhere}")
    settings, form = cast("S", its_settings), kind.read_form(path, head)
    others = data is not None and Path(data).expanduser().resolve() != Path(settings.data)
    if data is not None:
        settings = dataclasses.replace(settings, data=data)
    model = kind.build(settings, form)
    device, epoch = checkpoints.restore(model, path, settings, checkpoint)

    def read() -> D:
        return _load_data(kind, settings, form, path, others=others)

    run: R = kind.run(path, settings, form, model, device, epoch, others, read)
    return run


def train(settings: Settings, out: Path, *, overwrite: bool = False) -> None:
    """Train a recipe into a new run folder.

    Raises InputError before any work where something is missing or wrong, or a run is there already (`overwrite`
    replaces it), and KeyboardInterrupt, with words about how to go on, on Ctrl-C.
    """
    settings.check()
    if Path(settings.data).expanduser().resolve() == out.resolve():
        raise InputError(f"--out {out}: this is the folder of --data; what a run leaves would be among them")
    kind = registry.kind_of(settings)
    kind.check(settings)
    data = kind.load(settings)
    settings = kind.settle(settings, data)
    if settings.devices > min(settings.batch_size, len(data.train)):
        raise InputError(f"--devices {settings.devices}: every device needs {kind.a_datum} of every batch")
    names = (*kind.kept, *kind.left, *kind.later)
    folder.refuse_to_replace(out, overwrite, names)
    form = kind.make_form(settings, data)
    model = fresh(kind, settings, form, data)
    kind.initialise(model, settings, out, resumed=False)
    made = trainer.make_trainer(settings, out, kind.drawer(data, form, settings, out))
    with folder.alone(out, names):
        if processes.is_first():
            folder.clear(out, names)
            kind.write_form(out, form)
            folder.write_config(out, settings, kind.head_lines(form))
        _fit(kind, made, model, data, form, settings, out, 0)


def resume(path: Path, *, epochs: int | None = None, data: str | None = None) -> None:
    """Continue a run from its last whole epoch, as if it had not been stopped.

    `epochs` is another number of epochs to go up to, and `data` where the run's data are now; both are kept.

    Raises InputError where it cannot be continued or has nothing left to do, and KeyboardInterrupt as `train`.
    """
    given = {"epochs": epochs, "data": data}
    changed: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    kind, settings, head = registry.read_run(path)
    form = kind.read_form(path, head)
    settings = kind.settle_again(dataclasses.replace(settings, **changed), form)
    settings.check()
    loaded = _load_data(kind, settings, form, path)
    model = fresh(kind, settings, form, loaded)
    done = checkpoints.epochs_done(model, path, settings)
    if not done:
        kind.initialise(model, settings, path, resumed=True)
    made = trainer.make_trainer(settings, path, kind.drawer(loaded, form, settings, path), resumed=True)
    with folder.alone(path, (*kind.kept, *kind.left)):
        if processes.is_first():
            folder.remove_partial(path)
            if changed:
                folder.write_config(path, settings, kind.head_lines(form))
        _fit(kind, made, model, loaded, form, settings, path, done)


def fresh(kind: Kind[S, F, D, R], settings: S, form: F, data: D) -> "VAE":
    """The model as training starts from it."""
    torch.manual_seed(settings.seed)
    model = kind.build(settings, form)
    with torch.no_grad():
        kind.begin(model, settings, data)
    return model


def _load_data(kind: Kind[S, F, D, R], settings: S, form: F, path: Path, *, others: bool = False) -> D:
    """The data of a run."""
    try:
        data = kind.load(settings, form, others=others)
    except InputError as error:
        raise InputError(f"{error} (the data of {path}; give others with --data)") from error
    return kind.suit(data, form, settings, path)


def _fit(
    kind: Kind[S, F, D, R],
    made: "Trainer",
    model: "VAE",
    data: D,
    form: F,
    settings: S,
    out: Path,
    done: int,
) -> None:
    """`done`: how many epochs are; they are in last.ckpt."""
    batches = kind.batches(model, data, form, settings)
    said = [
        *messages.backend_lines(made.strategy.root_device),
        *kind.introduce(model, data, form, settings, batches),
    ]
    trainer.fit(made, model, batches, settings, out, done, said, kind.left, sampled=kind.sampled)
