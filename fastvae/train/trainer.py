"""Lightning's Trainer for a run, and the call that trains."""

import importlib.util
import logging
import signal
import sys
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import processes
from .errors import InputError
from .messages import pluralize, shell_command
from .run_folder import CHECKPOINTS, CONFIG, TABLES, TENSORBOARD
from .settings import Settings

if TYPE_CHECKING:
    from lightning.pytorch import Callback, LightningDataModule, Trainer

    from .module import VAE

__all__ = ["fit", "make_trainer"]

# The beginnings of warnings that can be ignored here.
_EXPECTED_WARNINGS = (
    ".*You have overridden `transfer_batch_to_device`",  # batches of counts are sparse and named tuples
    "Checkpoint directory .* exists and is not empty",
    "The number of training batches .* is smaller than the logging interval",  # nothing is logged between epochs
    r"It is recommended to use `self\.log\(.*sync_dist",  # the module sums over processes itself
    ".*isinstance.treespec, LeafSpec.* is deprecated",  # raised inside Lightning
    "Grad strides do not match bucket view strides",  # two strides of the same kernel with one channel
)


def make_trainer(
    settings: Settings, folder: Path, save_examples: "Callback", *, resumed: bool = False
) -> "Trainer":
    """Return a Trainer whose callback for examples is `save_examples`. Raises InputError for bad options."""
    prefix = f"{folder / CONFIG}: " if resumed else "--"  # name the options as the user gave them
    from lightning.fabric.utilities.exceptions import MisconfigurationException
    from lightning.pytorch import Trainer
    from lightning.pytorch.loggers import TensorBoardLogger

    from . import callbacks

    # Hide Lightning's hints about hardware, loaders and so on.
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    for message in _EXPECTED_WARNINGS:
        warnings.filterwarnings("ignore", message)
    logger: Any = False
    if settings.logger == "tensorboard":
        if not (importlib.util.find_spec("tensorboard") or importlib.util.find_spec("tensorboardX")):
            raise InputError(
                f"{prefix}logger tensorboard needs the package tensorboard: pip install tensorboard"
            )
        logger = TensorBoardLogger(folder, name=None, version=TENSORBOARD)
    bar = sys.stdout.isatty()
    checkpoints = folder / CHECKPOINTS
    try:
        trainer = Trainer(
            max_epochs=settings.epochs,
            accelerator=settings.accelerator,
            devices=settings.devices,
            strategy=settings.strategy,
            precision=settings.precision,  # type: ignore[arg-type]
            gradient_clip_val=(settings.clip or None) if settings.automatic_optimization else None,
            logger=logger,
            callbacks=[
                *([callbacks.ProgressBar()] if bar else []),
                save_examples,
                *([callbacks.weight_average(settings.ema)] if settings.ema else []),
                callbacks.ProgressTable(folder, processes.print_once),
                callbacks.SaveBest(checkpoints, settings.monitor),
                callbacks.SaveLast(checkpoints),
            ],
            plugins=[callbacks.AtomicCheckpoints()],
            enable_progress_bar=bar,
            enable_model_summary=False,
            num_sanity_val_steps=0,
            use_distributed_sampler=False,
            default_root_dir=folder,
        )
    except (ValueError, TypeError, RuntimeError, ImportError, MisconfigurationException) as error:
        given = [
            f"{name} {getattr(settings, name)}"
            for name in ("accelerator", "devices", "strategy", "precision")
            if getattr(settings, name) != getattr(Settings, name)
        ]
        raise InputError(
            f"Lightning does not accept {prefix}{(', ' if resumed else ' --').join(given)}: "
            f"{str(error).strip().splitlines()[0]}"
        ) from error
    if trainer.precision == "16-true":
        raise InputError(
            f"{prefix}precision 16-true: Adam's squared gradients overflow or underflow in float16; use bf16-true or "
            "16-mixed"
        )
    if settings.ema and trainer.precision in ("bf16-true", "64-true"):
        raise InputError(
            f"{prefix}ema needs precision 32-true, bf16-mixed or 16-mixed, got {trainer.precision}: the average is "
            "kept in float32"
        )
    return trainer


def fit(
    trainer: "Trainer",
    model: "VAE",
    batches: "LightningDataModule",
    settings: Settings,
    out: Path,
    done: int,
    introduction: Sequence[str],
    names: Sequence[str],
    *,
    can_sample: bool,
) -> None:
    """Train, and print what the user should know before and after.

    `names` are the files that a run leaves besides its tables. `can_sample` says whether the command `sample` supports
    the run. The weights after `done` epochs are in last.ckpt.
    """
    for line in (*introduction, *_describe_plan(settings, out, done)):
        processes.print_once(line)
    last = out / CHECKPOINTS / "last.ckpt"
    handler = signal.getsignal(signal.SIGINT)
    try:
        trainer.fit(
            model,
            datamodule=batches,
            ckpt_path=last if done else None,
            weights_only=True,
        )
    except InputError:
        if not processes.is_main_process():
            raise SystemExit(2) from None  # the main process prints the message
        raise
    except SystemExit:  # Lightning turns Ctrl-C into this
        if not trainer.interrupted:
            raise
        progress = "the last complete epoch was saved" if last.exists() else "no epoch was complete yet"
        raise KeyboardInterrupt(
            f"interrupted; {progress}; continue with: {shell_command('resume', out)}"
        ) from None
    finally:
        signal.signal(signal.SIGINT, handler)
    processes.print_once("")
    processes.print_once(
        f"{out}: {', '.join((*TABLES[:1], *(name for name in names if (out / name).exists())))}, checkpoints/"
    )
    processes.print_once(
        f"next: {shell_command('evaluate', out)}, "
        + (f"{shell_command('sample', out)}, " if can_sample else "")
        + shell_command("resume", out, "--epochs", 2 * settings.epochs)
    )


def _describe_plan(settings: Settings, out: Path, done: int) -> Iterator[str]:
    yield f"run: {out}, {pluralize(settings.epochs, 'epoch')}" + (f", {done} of them done" if done else "")
    if settings.warmup != "none" and settings.warmup_epochs > settings.epochs:
        what = "its capacity" if settings.capacity else "its full weight"
        yield (
            f"warning: the warm-up takes {settings.warmup_epochs:g} epochs, but the run has only {settings.epochs}, so "
            f"the KL will not reach {what} (see --warmup-epochs)"
        )
