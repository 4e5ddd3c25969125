"""The weights of a run, as a checkpoint keeps them: read with care, for anybody may have written the file."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from . import files, messages
from .errors import InputError
from .folder import CHECKPOINTS
from .settings import Settings

if TYPE_CHECKING:
    from .module import VAE

__all__ = ["epochs_done", "open_checkpoint", "read_checkpoint", "restore"]


def restore(model: "VAE", path: Path, settings: Settings, checkpoint: str) -> tuple[torch.device, int]:
    """Give the model a run's weights: then it is in eval mode on the device, trained for so many epochs."""
    file = path / CHECKPOINTS / f"{checkpoint}.ckpt"
    if not file.exists():
        raise InputError(
            f"{path}: there is no {file.relative_to(path)} yet: it comes with the first epoch whose held-out loss "
            "is finite"
        )
    state = read_checkpoint(file, model)
    model.load_state_dict(state["state_dict"])
    device = torch.device("cuda" if torch.cuda.is_available() and settings.accelerator != "cpu" else "cpu")
    model.to(device).eval()
    return device, state["epoch"] + 1


def epochs_done(model: "VAE", path: Path, settings: Settings) -> int:
    """How many epochs a stopped run has whole. Raises InputError where none are left to do."""
    file = path / CHECKPOINTS / "last.ckpt"
    done: int = read_checkpoint(file, model)["epoch"] + 1 if file.exists() else 0
    if done >= settings.epochs:
        raise InputError(
            f"{path}: trained for {messages.count(done, 'epoch')} already; to go on, give a larger number of --epochs"
        )
    return done


def read_checkpoint(file: Path, model: "VAE") -> dict[str, Any]:
    """Raises InputError for a file that is no checkpoint, and for one of another model."""
    checkpoint = open_checkpoint(file)
    state = checkpoint["state_dict"]
    names = set(state)
    for name, tensor in model.state_dict().items():
        if name not in names:
            raise InputError(f"{file}: a checkpoint of another model: there is no `{name}` in it")
        if state[name].shape != tensor.shape:
            raise InputError(
                f"{file}: a checkpoint of another model: `{name}` is {tuple(state[name].shape)} in it, and "
                f"{tuple(tensor.shape)} by config.toml"
            )
        if not state[name].isfinite().all():
            raise InputError(f"{file}: `{name}` holds NaN or infinity: these weights are of no use")
    if more := sorted(names - set(model.state_dict())):
        raise InputError(f"{file}: a checkpoint of another model: `{more[0]}` is none of this one's")
    return checkpoint


def open_checkpoint(file: Path) -> dict[str, Any]:
    try:
        checkpoint: dict[str, Any] = torch.load(file, map_location="cpu", weights_only=True)
        for key in ("epoch", "loops", "optimizer_states"):
            checkpoint[key]
        if not all(isinstance(weight, Tensor) for weight in checkpoint["state_dict"].values()):
            raise TypeError
    except (PermissionError, IsADirectoryError) as error:
        raise InputError(f"{file}: cannot be read: {files.reason(error)}") from error
    # What a damaged or foreign file makes pickle, zipfile and torch raise is many things; each means the same here.
    except Exception as error:
        raise InputError(f"{file}: not a checkpoint of fastvae, or damaged") from error
    return checkpoint
