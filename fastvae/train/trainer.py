"""Lightning's Trainer for a run, and the training itself."""

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
from .folder import CHECKPOINTS, CONFIG, TABLES, TENSORBOARD
from .messages import command, count
from .settings import Settings

if TYPE_CHECKING:
    from lightning.pytorch import Callback, LightningDataModule, Trainer

    from .module import VAE

__all__ = ["fit", "make_trainer"]

# Beginnings of warnings about what is meant here.
_NOTHING_TO_MEND = (
    "Checkpoint directory .* exists and is not empty",
    "The number of training batches .* is smaller than the logging interval",  # nothing is logged between epochs
    r"It is recommended to use `self\.log\(.*sync_dist",  # the module has summed over processes itself
    ".*isinstance.treespec, LeafSpec.* is deprecated",  # Lightning's own
    "Grad strides do not match bucket view strides",  # two descriptions of a kernel with one channel
)


def make_trainer(settings: Settings, folder: Path, drawer: "Callback", *, resumed: bool = False) -> "Trainer":
    """`drawer` leaves samples in the folder. Raises InputError for what Lightning refuses."""
    dashes = f"{folder / CONFIG}: " if resumed else "--"  # where the user gave it
    from lightning.fabric.utilities.exceptions import MisconfigurationException
    from lightning.pytorch import Trainer
    from lightning.pytorch.loggers import TensorBoardLogger

    from . import callbacks

    # What Lightning tells by the way (hardware found and not used, tips, hints about loaders) is left out.
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    for message in _NOTHING_TO_MEND:
        warnings.filterwarnings("ignore", message)
    logger: Any = False
    if settings.logger == "tensorboard":
        if not (importlib.util.find_spec("tensorboard") or importlib.util.find_spec("tensorboardX")):
            raise InputError(
                f"{dashes}logger tensorboard needs a package that is missing: pip install tensorboard"
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
            gradient_clip_val=(settings.clip or None) if settings.automatic else None,
            logger=logger,
            callbacks=[
                *([callbacks.Bar()] if bar else []),
                drawer,
                *([callbacks.average(settings.ema)] if settings.ema else []),
                callbacks.Metrics(folder, processes.speaker()),
                callbacks.Best(checkpoints, callbacks.MONITOR if settings.judged else None),
                callbacks.Last(checkpoints),
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
            f"Lightning refuses {dashes}{(', ' if resumed else ' --').join(given)}: "
            f"{str(error).strip().splitlines()[0]}"
        ) from error
    if trainer.precision == "16-true":
        raise InputError(
            f"{dashes}precision 16-true: Adam's squares of gradients leave the range of float16; take bf16-true or "
            "16-mixed"
        )
    if settings.ema and trainer.precision in ("bf16-true", "64-true"):
        raise InputError(
            f"{dashes}ema averages weights in float32: give precision 32-true, got {trainer.precision}"
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
    sampled: bool,
) -> None:
    """Train, with what is said before and after.

    `names` are of the files that the run leaves beside its tables; `sampled` is whether there is a command `sample`
    for it. `done` epochs are in last.ckpt.
    """
    say = processes.speaker()
    for line in (*introduction, *_plan(settings, out, done)):
        say(line)
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
        if not processes.is_first():
            raise SystemExit(2) from None  # the first process has the word
        raise
    except SystemExit:  # what Lightning makes of Ctrl-C
        if not trainer.interrupted:
            raise
        kept = "the last whole epoch is kept" if last.exists() else "no epoch was whole yet"
        raise KeyboardInterrupt(f"interrupted; {kept}; to go on: {command('resume', out)}") from None
    finally:
        signal.signal(signal.SIGINT, handler)
    say("")
    say(
        f"{out}: {', '.join((*TABLES[:1], *(name for name in names if (out / name).exists())))}, checkpoints/"
    )
    say(
        f"next: {command('evaluate', out)}, "
        + (f"{command('sample', out)}, " if sampled else "")
        + command("resume", out, "--epochs", 2 * settings.epochs)
    )


def _plan(settings: Settings, out: Path, done: int) -> Iterator[str]:
    yield f"run: {out}, {count(settings.epochs, 'epoch')}" + (f", {done} of them done" if done else "")
    if settings.warmup != "none" and settings.warmup_epochs > settings.epochs:
        yield (
            f"warning: the warm-up takes {settings.warmup_epochs:g} epochs and the run only {settings.epochs}: "
            "the KL will not get its whole weight (--warmup-epochs)"
        )
