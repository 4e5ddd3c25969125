"""What every run does beside training: metrics, checkpoints, a progress bar, and when to draw."""

import csv
import io
import math
import os
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint, ModelCheckpoint, RichProgressBar, WeightAveraging
from torch import Tensor

from . import figures, files
from .errors import InputError
from .module import VAE

__all__ = ["MONITOR", "AtomicCheckpoints", "Bar", "Best", "Drawer", "Last", "Metrics", "average", "is_drawn"]

MONITOR = "held_out_nelbo"
_WHOLE = {"epoch", "step", "active_units", "skipped_steps"}


def columns(model: VAE) -> list[str]:
    """Those of metrics.csv, as far as the model logs them."""
    train, held_out = ([f"{part}_{name}" for name in model.measures] for part in ("train", "held_out"))
    return [
        "epoch", "step", "train_loss", "train_nll", "train_kl", *train,
        "held_out_nelbo", "held_out_nll", "held_out_kl", *held_out,
        "beta", "active_units", *model.others, "skipped_steps", "seconds",
    ]  # fmt: skip


class Metrics(Checkpoint):
    """Writes metrics.csv and kl_per_dimension.csv after each epoch, says a line of it, and draws loss.png.

    To Lightning it is one of its checkpoints, because those are called last, when the module has logged its metrics;
    given before the others it is in what they save, and so a resumed run goes on with the same rows.
    """

    def __init__(self, folder: Path, say: Callable[[str], None]) -> None:
        self.folder = folder
        self.say = say
        self.rows: list[dict[str, float]] = []
        self.kl_rows: list[list[float]] = []
        self._started = 0.0

    def state_dict(self) -> dict[str, Any]:
        return {"rows": self.rows, "kl_rows": self.kl_rows}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.rows, self.kl_rows = state["rows"], state["kl_rows"]

    def on_train_start(self, trainer: Trainer, model: LightningModule) -> None:
        assert isinstance(model, VAE)
        self.say(f"\n{'':5} {'train':^30} {'held out':^30}")
        last = "".join(f"{heading:>{max(8, len(heading) + 2)}}" for heading, _, _ in model.shown)
        self.say(
            f"epoch {'loss':>10}{'recon':>10}{'KL':>10} {'-ELBO':>10}{'recon':>10}{'KL':>10}"
            f"{last}{'active':>8}{'seconds':>9}"
        )

    def on_train_epoch_start(self, trainer: Trainer, model: LightningModule) -> None:
        self._started = time.perf_counter()

    def on_train_epoch_end(self, trainer: Trainer, model: LightningModule) -> None:
        assert isinstance(model, VAE)
        row = {name: value.item() for name, value in trainer.callback_metrics.items()}
        row |= {
            "epoch": trainer.current_epoch + 1,
            "step": model.steps_done,
            "seconds": time.perf_counter() - self._started,
        }
        self.rows.append({name: row[name] for name in columns(model) if name in row})
        self.kl_rows.append([trainer.current_epoch + 1, *model.kl_per_dimension.tolist()])
        self.say(_line(row, model.shown))
        if skipped := int(row["skipped_steps"]):
            steps = int(trainer.num_training_batches)
            what = f"{model.first_skip} is not finite"
            if skipped == steps:
                advice = "try a smaller --lr, or --clip 1"
                if row["epoch"] == 1 and model.automatic_optimization:
                    # No weight has moved yet. (Of several optimizers another one may have stepped.)
                    advice = (
                        "it is so with the weights that the run starts from, whatever --lr: look at the data, and at "
                        "what encoder and decoder make of them"
                    )
                raise InputError(f"every step of epoch {row['epoch']} was skipped: {what}; {advice}")
            self.say(f"warning: {skipped} of {steps} steps skipped, the weights left as they were: {what}")
        if not math.isfinite(row[MONITOR]):
            self.say(
                f"warning: the held-out loss of epoch {row['epoch']} is not finite: no checkpoint is kept of it"
            )
        if trainer.is_global_zero:
            names = [f"kl_{i}" for i in range(len(self.kl_rows[0]) - 1)]
            files.write(self.folder / "metrics.csv", _csv([list(self.rows[0]), *map(_cells, self.rows)]))
            files.write(
                self.folder / "kl_per_dimension.csv",
                _csv([["epoch", *names], *([int(epoch), *map(_number, kl)] for epoch, *kl in self.kl_rows)]),
            )
            if is_drawn(trainer):
                figures.save_loss_curve(self.rows, self.folder / "loss.png", model.unit)


def _number_in(width: int, places: int, value: float) -> str:
    """Right-aligned, with a blank before it however large it is: the columns of a run that diverges stay apart."""
    text = f"{value:.{places}f}"
    if len(text) >= width:
        text = f"{value:.{width - 8}e}"
    return text.rjust(width)


def _line(row: dict[str, float], shown: tuple[tuple[str, str, int], ...]) -> str:
    values = [row[f"train_{name}"] for name in ("loss", "nll", "kl")]
    held_out = [row[f"held_out_{name}"] for name in ("nelbo", "nll", "kl")]
    last = "".join(
        _number_in(max(8, len(head) + 2), places, row.get(name, math.nan)) for head, name, places in shown
    )
    return (
        f"{row['epoch']:5}"
        + "".join(" " + "".join(_number_in(10, 2, value) for value in part) for part in (values, held_out))
        + f"{last}{row['active_units']:8.0f}{row['seconds']:9.1f}"
    )


def _cells(row: dict[str, float]) -> list[str]:
    return [
        f"{value:.0f}" if name in _WHOLE else f"{value:.2f}" if name == "seconds" else _number(value)
        for name, value in row.items()
    ]


def _number(value: float) -> str:
    return f"{value:.9g}"  # all of a float32


def _csv(rows: list[list[Any]]) -> bytes:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue().encode()


def is_drawn(trainer: Trainer) -> bool:
    """Ten times in a run, and when it ends."""
    epoch, epochs = trainer.current_epoch + 1, trainer.max_epochs or 1
    return epoch % max(1, epochs // 10) == 0 or epoch == epochs


class Drawer(Callback, ABC):
    """Leaves in the folder what shows how the model does, whenever `is_drawn`.

    Stands before the moving average among the callbacks, which takes its weights back when an epoch's validation ends.
    """

    def on_validation_epoch_end(self, trainer: Trainer, model: LightningModule) -> None:
        if trainer.is_global_zero and is_drawn(trainer):
            self.draw(model)

    @abstractmethod
    def draw(self, model: Any) -> None: ...


class _Movable(ModelCheckpoint):
    """One file, and a run that goes on in another folder."""

    def __init__(self, folder: Path, name: str, monitor: str | None = None) -> None:
        super().__init__(folder, name, monitor, enable_version_counter=False, save_on_train_epoch_end=True)

    def on_train_epoch_end(self, trainer: Trainer, model: LightningModule) -> None:
        if math.isfinite(trainer.callback_metrics[MONITOR]):
            super().on_train_epoch_end(trainer, model)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        # Lightning forgets which epoch was best when the folder has been moved.
        super().load_state_dict({**state_dict, "dirpath": self.dirpath})


class Best(_Movable):
    """checkpoints/best.ckpt: the epoch of the smallest `monitor`, or of none the last one."""

    def __init__(self, folder: Path, monitor: str | None = MONITOR) -> None:
        super().__init__(folder, "best", monitor)


class Last(_Movable):
    """checkpoints/last.ckpt, after every epoch whose held-out loss is finite: what `resume` goes on from."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, "last")


class AtomicCheckpoints(TorchCheckpointIO):
    """Writes a checkpoint beside and renames it. Lightning's own writes it to the folder for temporary files first,
    and moving it from another file system is no renaming: killed there, it leaves half a checkpoint.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        path = Path(path)
        part = files.beside(path)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with part.open("wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            part.replace(path)
        except (OSError, RuntimeError) as error:
            # torch's writer, when the file cannot be written on, raises a RuntimeError after the OSError.
            cause = error if isinstance(error, OSError) else error.__context__
            if not isinstance(cause, OSError):
                raise
            raise InputError(f"{path}: cannot be written: {files.reason(cause)}") from error
        finally:
            part.unlink(missing_ok=True)


def average(decay: float) -> WeightAveraging:
    """A moving average of the weights: validated, drawn and saved in place of the weights themselves.

    Step n has the decay min(decay, (1 + n) / (10 + n)): otherwise the average would long be one of the weights that a
    run starts from.
    """

    def update(averaged: list[Tensor], current: list[Tensor], steps: Tensor | int) -> None:
        n = torch.as_tensor(steps, dtype=torch.float32)  # on the device: read there, not by the host
        share = 1 - ((1 + n) / (10 + n)).clamp(max=decay)
        torch._foreach_lerp_(averaged, current, [share] * len(averaged))

    return WeightAveraging(use_buffers=False, multi_avg_fn=update)


class Bar(RichProgressBar):
    """Lightning's, counting epochs from 1 and drawn ten times a second."""

    def __init__(self) -> None:
        super().__init__(refresh_rate=10)
        self._shown = 0.0

    def _get_train_description(self, current_epoch: int) -> str:
        return f"epoch {current_epoch + 1} of {self.trainer.max_epochs}"

    def on_train_batch_end(self, *args: Any, **kwargs: Any) -> None:
        # Lightning's hook looks up all metrics after every step.
        now = time.monotonic()
        batch_idx = args[4]
        if now - self._shown > 0.1 or batch_idx + 1 == self.total_train_batches:
            self._shown = now
            self._update(self.train_progress_bar_id, batch_idx + 1)

    def get_metrics(self, trainer: Trainer, model: LightningModule) -> dict[str, Any]:
        return {}  # there is a line for each epoch above the bar
