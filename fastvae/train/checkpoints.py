"""Reading checkpoints. They may come from anyone, so their content is checked and no code in them is run."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from . import files, messages
from .errors import InputError
from .run_folder import CHECKPOINTS
from .settings import Settings

if TYPE_CHECKING:
    from .module import VAE

__all__ = ["epochs_done", "open_checkpoint", "read_checkpoint", "restore"]


def restore(model: "VAE", path: Path, settings: Settings, checkpoint: str) -> tuple[torch.device, int]:
    """Load the weights of a run into the model, put it into eval mode on its device, and return device and epochs."""
    file = path / CHECKPOINTS / f"{checkpoint}.ckpt"
    if not file.exists():
        raise InputError(
            f"{path}: {file.relative_to(path)} does not exist yet; it is written after the first epoch with a finite "
            "validation loss"
        )
    state = read_checkpoint(file, model)
    model.load_state_dict(state["state_dict"])
    device = torch.device("cuda" if torch.cuda.is_available() and settings.accelerator != "cpu" else "cpu")
    model.to(device).eval()
    return device, state["epoch"] + 1


def epochs_done(model: "VAE", path: Path, settings: Settings) -> int:
    """Return the number of complete epochs of a stopped run. Raises InputError if there are none left to train."""
    file = path / CHECKPOINTS / "last.ckpt"
    done: int = read_checkpoint(file, model)["epoch"] + 1 if file.exists() else 0
    if done >= settings.epochs:
        raise InputError(
            f"{path}: already trained for {messages.pluralize(done, 'epoch')}; to continue, give a larger --epochs"
        )
    return done


def read_checkpoint(file: Path, model: "VAE") -> dict[str, Any]:
    """Read a checkpoint. Raises InputError if the file is not one, or belongs to another model."""
    checkpoint = open_checkpoint(file)
    state = checkpoint["state_dict"]
    names = set(state)
    for name, tensor in model.state_dict().items():
        if name not in names:
            raise InputError(f"{file}: this checkpoint belongs to another model: `{name}` is missing")
        if state[name].shape != tensor.shape:
            raise InputError(
                f"{file}: this checkpoint belongs to another model: `{name}` must be {tuple(tensor.shape)} for this "
                f"config.toml, got {tuple(state[name].shape)}"
            )
        if not state[name].isfinite().all():
            raise InputError(f"{file}: `{name}` contains NaN or infinity, so the weights cannot be used")
    if more := sorted(names - set(model.state_dict())):
        raise InputError(f"{file}: this checkpoint belongs to another model: `{more[0]}` is not expected")
    return checkpoint


def open_checkpoint(file: Path) -> dict[str, Any]:
    try:
        checkpoint: dict[str, Any] = torch.load(file, map_location="cpu", weights_only=True)
        for key in ("epoch", "loops", "optimizer_states"):
            checkpoint[key]
        if not all(isinstance(weight, Tensor) for weight in checkpoint["state_dict"].values()):
            raise TypeError
    except (PermissionError, IsADirectoryError) as error:
        raise InputError(f"{file}: cannot be read: {files.error_reason(error)}") from error
    # Damaged or foreign files make pickle, zipfile and torch raise many types of errors.
    except Exception as error:
        raise InputError(f"{file}: not a fastvae checkpoint, or damaged") from error
    return checkpoint
