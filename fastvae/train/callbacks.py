"""Callbacks of every run: the progress table, checkpoints, the progress bar and examples of the model's output."""

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

__all__ = [
    "MONITOR",
    "AtomicCheckpoints",
    "ProgressBar",
    "ProgressTable",
    "SaveBest",
    "SaveExamples",
    "SaveLast",
    "should_save_examples",
    "weight_average",
]

MONITOR = "val_neg_elbo"
_WHOLE = {"epoch", "step", "active_units", "skipped_steps"}


def metric_columns(model: VAE) -> list[str]:
    """Return the columns of metrics.csv that the model can log."""
    train, val = ([f"{part}_{name}" for name in model.split_metrics] for part in ("train", "val"))
    return [
        "epoch", "step", "train_loss", "train_nll", "train_kl", *train,
        "val_neg_elbo", "val_neg_bound", "val_nll", "val_kl", *val,
        "beta", "capacity", "active_units", *model.extra_metrics, "skipped_steps", "seconds",
    ]  # fmt: skip


class ProgressTable(Checkpoint):
    """Prints a line per epoch, writes metrics.csv and kl_per_dimension.csv, and draws loss.png.

    This is a `Checkpoint` because Lightning calls those last, when the module has logged its metrics. It comes before
    the other checkpoints, so that they save its records and a resumed run continues the tables.
    """

    def __init__(self, folder: Path, print_line: Callable[[str], None]) -> None:
        self.folder = folder
        self.print_line = print_line
        self.records: list[dict[str, float]] = []
        self.kl_records: list[list[float]] = []
        self._started = 0.0

    def state_dict(self) -> dict[str, Any]:
        return {"records": self.records, "kl_records": self.kl_records}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.records, self.kl_records = state["records"], state["kl_records"]

    def on_train_start(self, trainer: Trainer, model: LightningModule) -> None:
        assert isinstance(model, VAE)
        self.print_line(f"\n{'':5} {'training':^30} {'validation':^30}")
        last = "".join(f"{heading:>{max(8, len(heading) + 2)}}" for heading, _, _ in model.table_columns)
        self.print_line(
            f"epoch {'loss':>10}{'recon':>10}{'KL':>10} {'-ELBO':>10}{'recon':>10}{'KL':>10}"
            f"{last}{'active':>8}{'seconds':>9}"
        )

    def on_train_epoch_start(self, trainer: Trainer, model: LightningModule) -> None:
        self._started = time.perf_counter()

    def on_train_epoch_end(self, trainer: Trainer, model: LightningModule) -> None:
        assert isinstance(model, VAE)
        record = {name: value.item() for name, value in trainer.callback_metrics.items()}
        record |= {
            "epoch": trainer.current_epoch + 1,
            "step": model.steps_done,
            "seconds": time.perf_counter() - self._started,
        }
        self.records.append({name: record[name] for name in metric_columns(model) if name in record})
        self.kl_records.append([trainer.current_epoch + 1, *model.kl_per_dimension.tolist()])
        self.print_line(_format_line(record, model.table_columns))
        if skipped := int(record["skipped_steps"]):
            steps = int(trainer.num_training_batches)
            what = f"{model.first_skipped} is not finite"
            if skipped == steps:
                advice = "try a smaller --lr, or --clip 1"
                if record["epoch"] == 1 and model.automatic_optimization:
                    # No weight has changed yet. (With several optimisers, another one may have made a step.)
                    advice = (
                        "the initial weights already cause this, whatever --lr: check the data, and the outputs of "
                        "the encoder and the decoder"
                    )
                raise InputError(
                    f"every step of epoch {record['epoch']} was skipped because {what}; {advice}"
                )
            self.print_line(f"warning: {skipped} of {steps} steps were skipped because {what}")
        if not math.isfinite(record[MONITOR]):
            self.print_line(
                f"warning: the validation loss of epoch {record['epoch']} is not finite, so no checkpoint was saved"
            )
        if trainer.is_global_zero:
            names = [f"kl_{i}" for i in range(len(self.kl_records[0]) - 1)]
            files.write(
                self.folder / "metrics.csv", _csv([list(self.records[0]), *map(_format_cells, self.records)])
            )
            files.write(
                self.folder / "kl_per_dimension.csv",
                _csv(
                    [
                        ["epoch", *names],
                        *([int(epoch), *map(_format_number, kl)] for epoch, *kl in self.kl_records),
                    ]
                ),
            )
            if should_save_examples(trainer):
                figures.save_loss_curve(self.records, self.folder / "loss.png", model.unit)


def _align_number(width: int, places: int, value: float) -> str:
    """Right-align a number with a blank before it, however large it is, so that columns never run together."""
    text = f"{value:.{places}f}"
    if len(text) >= width:
        text = f"{value:.{width - 8}e}"
    return text.rjust(width)


def _format_line(record: dict[str, float], columns: tuple[tuple[str, str, int], ...]) -> str:
    values = [record[f"train_{name}"] for name in ("loss", "nll", "kl")]
    val = [record[f"val_{name}"] for name in ("neg_elbo", "nll", "kl")]
    last = "".join(
        _align_number(max(8, len(head) + 2), places, record.get(name, math.nan))
        for head, name, places in columns
    )
    return (
        f"{record['epoch']:5}"
        + "".join(" " + "".join(_align_number(10, 2, value) for value in part) for part in (values, val))
        + f"{last}{record['active_units']:8.0f}{record['seconds']:9.1f}"
    )


def _format_cells(record: dict[str, float]) -> list[str]:
    return [
        f"{value:.0f}" if name in _WHOLE else f"{value:.2f}" if name == "seconds" else _format_number(value)
        for name, value in record.items()
    ]


def _format_number(value: float) -> str:
    return f"{value:.9g}"  # enough digits to represent any float32 exactly


def _csv(lines: list[list[Any]]) -> bytes:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(lines)
    return text.getvalue().encode()


def should_save_examples(trainer: Trainer) -> bool:
    """Return True for about ten epochs of a run, including the last."""
    epoch, epochs = trainer.current_epoch + 1, trainer.max_epochs or 1
    return epoch % max(1, epochs // 10) == 0 or epoch == epochs


class SaveExamples(Callback, ABC):
    """Saves examples of the model's output to the run folder when `should_save_examples` says so.

    This callback must come before the moving average, which restores the original weights after validation.
    """

    def on_validation_epoch_end(self, trainer: Trainer, model: LightningModule) -> None:
        if trainer.is_global_zero and should_save_examples(trainer):
            self.save_examples(model)

    @abstractmethod
    def save_examples(self, model: Any) -> None: ...


class _SingleCheckpoint(ModelCheckpoint):
    """A single checkpoint file, which also works after the run folder was moved."""

    def __init__(self, folder: Path, name: str, monitor: str | None = None) -> None:
        super().__init__(folder, name, monitor, enable_version_counter=False, save_on_train_epoch_end=True)

    def on_train_epoch_end(self, trainer: Trainer, model: LightningModule) -> None:
        if math.isfinite(trainer.callback_metrics[MONITOR]):
            super().on_train_epoch_end(trainer, model)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        # Lightning discards the best score if the folder has changed.
        super().load_state_dict({**state_dict, "dirpath": self.dirpath})


class SaveBest(_SingleCheckpoint):
    """Saves checkpoints/best.ckpt: the epoch with the smallest `monitor`, or the last epoch if that is None."""

    def __init__(self, folder: Path, monitor: str | None = MONITOR) -> None:
        super().__init__(folder, "best", monitor)


class SaveLast(_SingleCheckpoint):
    """Saves checkpoints/last.ckpt after every epoch with a finite validation loss. `resume` continues from it."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, "last")


class AtomicCheckpoints(TorchCheckpointIO):
    """Writes a checkpoint to a temporary file in the same folder and renames it.

    Lightning writes to the system's folder for temporary files first. If that is on another file system, the move is
    not atomic, and a killed process leaves half a checkpoint.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        path = Path(path)
        part = files.temporary_path(path)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with part.open("wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            part.replace(path)
        except (OSError, RuntimeError) as error:
            # If the file cannot be written, torch's writer raises a RuntimeError after the OSError.
            cause = error if isinstance(error, OSError) else error.__context__
            if not isinstance(cause, OSError):
                raise
            raise InputError(f"{path}: cannot be written: {files.error_reason(cause)}") from error
        finally:
            part.unlink(missing_ok=True)


def weight_average(decay: float) -> WeightAveraging:
    """A moving average of the weights, which is validated, drawn from and saved in their place.

    Step n uses the decay min(decay, (1 + n) / (10 + n)); otherwise the initial weights would dominate the average for
    a long time.
    """

    def update(averaged: list[Tensor], current: list[Tensor], steps: Tensor | int) -> None:
        n = torch.as_tensor(steps, dtype=torch.float32)  # stays on the device, so that the host does not wait
        share = 1 - ((1 + n) / (10 + n)).clamp(max=decay)
        torch._foreach_lerp_(averaged, current, [share] * len(averaged))

    return WeightAveraging(use_buffers=False, multi_avg_fn=update)


class ProgressBar(RichProgressBar):
    """Lightning's progress bar, but counting epochs from 1 and refreshed at most ten times a second."""

    def __init__(self) -> None:
        super().__init__(refresh_rate=10)
        self._last_refresh = 0.0

    def _get_train_description(self, current_epoch: int) -> str:
        return f"epoch {current_epoch + 1} of {self.trainer.max_epochs}"

    def on_train_batch_end(self, *args: Any, **kwargs: Any) -> None:
        # Lightning's own hook would look up all metrics after every step.
        now = time.monotonic()
        batch_idx = args[4]
        if now - self._last_refresh > 0.1 or batch_idx + 1 == self.total_train_batches:
            self._last_refresh = now
            self._update(self.train_progress_bar_id, batch_idx + 1)

    def get_metrics(self, trainer: Trainer, model: LightningModule) -> dict[str, Any]:
        return {}  # the progress table shows them
