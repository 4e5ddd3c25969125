"""The folder of a run: made by `train`, continued by `resume`, opened by `load`. (Of text: see `text_runs`.)

config.toml  metrics.csv  kl_per_dimension.csv  checkpoints/last.ckpt  checkpoints/best.ckpt
samples.png  reconstructions.png  loss.png  latents.png
"""

import dataclasses
import importlib.util
import logging
import math
import os
import signal
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

import fastvae

from . import data, files, messages, pictures
from .data import InputError
from .settings import ImageSettings, Settings

if TYPE_CHECKING:
    from lightning.pytorch import Callback, LightningDataModule, Trainer

    from .module import VAE

__all__ = ["Run", "build", "kind", "load", "resume", "train"]

CONFIG = "config.toml"
CHECKPOINTS = "checkpoints"
PICTURES = ("samples.png", "reconstructions.png", "loss.png", "latents.png")
TABLES = ("metrics.csv", "kl_per_dimension.csv")
TENSORBOARD = "tensorboard"
# What the commands on a run leave in it.
MADE_LATER = (
    "evaluation.json", "interpolations.png", "traversals.png", "inpainting.png", "generated.png", "neighbours.png",
)  # fmt: skip

Shape = tuple[int, int, int]

# Beginnings of warnings about what is meant here.
_NOTHING_TO_MEND = (
    "Checkpoint directory .* exists and is not empty",
    "The number of training batches .* is smaller than the logging interval",  # nothing is logged between epochs
    r"It is recommended to use `self\.log\(.*sync_dist",  # the module has summed over processes itself
    ".*isinstance.treespec, LeafSpec.* is deprecated",  # Lightning's own
    "Grad strides do not match bucket view strides",  # two descriptions of a kernel with one channel
)


@dataclass
class Run:
    """A run, finished or stopped, ready to be used."""

    path: Path
    settings: ImageSettings
    shape: Shape
    """Of an image: H, W, C."""
    model: "VAE"
    """In eval mode, on `device`; the averaged weights if there are any."""
    device: torch.device
    epoch: int
    """How many epochs the weights were trained for."""
    others: bool = False
    """Whether `settings.data` are other data than the run's: all images of a folder are then held-out ones."""

    @cached_property
    def images(self) -> data.Images:
        """The run's data, read when first asked for.

        Raises InputError where they are gone, and for images of another size.
        """
        return _images(self.settings, self.shape, self.path, self.others)


def load(path: Path, *, data: str | None = None, checkpoint: Literal["best", "last"] = "best") -> Run:
    """Open a run. `data` takes the place of the data it was trained on.

    Raises InputError for a folder that is no run, a wrong key in config.toml, and a checkpoint that is not there, is
    damaged or belongs to something else.
    """
    settings, shape = _read_config(path)
    others = data is not None and Path(data).expanduser().resolve() != Path(settings.data)
    if data is not None:
        settings = dataclasses.replace(settings, data=data)
    model = build(settings, shape)
    device, epoch = restore(model, path, settings, checkpoint)
    return Run(path, settings, shape, model, device, epoch, others)


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


def kind(path: Path) -> str:
    """What a run is of: "image", "text" or "counts". Raises InputError for a folder that is no run."""
    return _read_table(path)[0].kind


def train(settings: Settings, out: Path, *, overwrite: bool = False) -> None:
    """Train a recipe into a new run folder.

    Raises InputError before any work where something is missing or wrong, or a run is there already (`overwrite`
    replaces it), and KeyboardInterrupt, with words about how to go on, on Ctrl-C.
    """
    settings.check()
    if Path(settings.data).expanduser().resolve() == out.resolve():
        raise InputError(f"--out {out}: this is the folder of --data; what a run leaves would be among them")
    if not isinstance(settings, ImageSettings):
        from . import cell_runs, text_runs

        other = cell_runs.train if settings.kind == "counts" else text_runs.train
        return other(settings, out, overwrite=overwrite)
    images = data.load(settings.data, seed=settings.seed, size=settings.size)
    shape = _shape(images)
    settings = settings.resolve(shape[2])
    refuse_unused(settings)
    _refuse_unused(settings)
    if settings.data == "digits" or settings.data.endswith(".npz"):
        if settings.size != type(settings).size:
            raise InputError(
                f"--size is of folders and datasets: the images of {settings.data} are taken as they are"
            )
        settings = dataclasses.replace(settings, size=0)
    if settings.devices > min(settings.batch_size, len(images.train)):
        raise InputError(f"--devices {settings.devices}: every device needs an image of every batch")
    left = (*PICTURES, *MADE_LATER)
    refuse_to_replace(out, overwrite, left)
    if settings.init_from and Path(settings.init_from).is_relative_to(out.resolve()):
        raise InputError(
            f"--init-from {settings.init_from}: it is in the run that would be replaced; give another --out"
        )
    model = _fresh(settings, images)
    if settings.init_from:
        initialise(model, settings, f"--init-from {settings.init_from}")
    trainer = make_trainer(settings, out, _drawer(images, settings, out))
    with alone(out, left):
        if is_first():
            clear(out, left)
            _write_config(out, settings, shape)
        _fit(trainer, model, images, settings, out, 0)
    return None


def refuse_to_replace(out: Path, overwrite: bool, names: Sequence[str]) -> None:
    """Raises InputError where a run, or anything of these names that is none, is there already."""
    if (out / CONFIG).exists() and not overwrite and is_first():
        raise InputError(
            f"{out}: there is a run in this folder; continue it (fastvae resume {out}), give another --out, "
            "or replace it with --overwrite"
        )
    if not (out / CONFIG).exists() and is_first():
        for name in (*TABLES, *names, CHECKPOINTS, TENSORBOARD):
            if (out / name).exists():
                raise InputError(
                    f"{out / name}: there already, in a folder that is no run (no {CONFIG}); a run would replace it: "
                    "move it away, or give another --out"
                )


def refuse_unused(settings: Settings) -> None:
    """Raises InputError for options that would do nothing."""
    given = {
        name
        for name in ("cycles", "warmup_epochs")
        if getattr(settings, name) != getattr(type(settings), name)
    }
    if "cycles" in given and settings.warmup != "cyclical":
        raise InputError("--cycles is of a cyclical warm-up: give --warmup cyclical")
    if "warmup_epochs" in given and settings.warmup == "none":
        raise InputError("--warmup-epochs is of a warm-up: give --warmup linear, cyclical or sigmoid")


def _refuse_unused(settings: ImageSettings) -> None:
    """Raises InputError for options of a likelihood that is not the run's."""
    of = {
        "binarize": (
            "the Bernoulli likelihood",
            "--likelihood bernoulli",
            settings.likelihood == "bernoulli",
        ),
        "components": ("dmol", "--likelihood dmol", settings.likelihood == "dmol"),
        "variance": ("the Gaussian likelihood", "--likelihood gaussian", settings.likelihood == "gaussian"),
        "sigma": ("a fixed variance", "--variance fixed", settings.variance == "fixed"),
    }
    bounded = settings.likelihood == "gaussian" and settings.variance != "fixed"
    for name in ("logvar_min", "logvar_max"):
        needed = (
            "--likelihood gaussian" if settings.variance != "fixed" else "--variance learned or per-pixel"
        )
        of[name] = ("a learned or per-pixel variance", needed, bounded)
    for name, (what, needed, holds) in of.items():
        if getattr(settings, name) != getattr(type(settings), name) and not holds:
            raise InputError(f"--{name.replace('_', '-')} is of {what}: give {needed}")


@contextmanager
def alone(folder: Path, names: Sequence[str]) -> Iterator[None]:
    """Make a run's folder, and let no other process train in it meanwhile, where systems and file systems have locks.

    Raises InputError where one does, or where files of these names cannot be written. The lock goes with the process,
    however it ends.
    """
    if not is_first():
        yield
        return
    pictures.prepare_folder(folder, (CONFIG, *TABLES, *names))
    if importlib.util.find_spec("fcntl") is None:
        yield
        return
    import fcntl

    opened = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(f"{folder}: this run is being trained, by another process") from None
        except OSError:
            pass  # no locks here, as on some network file systems
        yield
    finally:
        os.close(opened)


def clear(out: Path, names: Sequence[str]) -> None:
    """Remove what an earlier run has left, by name and nothing else; config.toml stays until it is replaced."""
    checkpoints, tensorboard = out / CHECKPOINTS, out / TENSORBOARD
    left = [out / name for name in (*TABLES, *names)]
    left += [checkpoints / "last.ckpt", checkpoints / "best.ckpt", tensorboard / "hparams.yaml"]
    for path in (*left, *tensorboard.glob("events.*")):
        path.unlink(missing_ok=True)
    remove_partial(out)


def remove_partial(path: Path) -> None:
    for folder in (path, path / CHECKPOINTS):
        files.remove_partial(folder)


def resume(path: Path, *, epochs: int | None = None, data: str | None = None) -> None:
    """Continue a run from its last whole epoch, as if it had not been stopped.

    `epochs` is another number of epochs to go up to, and `data` where the run's data are now; both are kept.

    Raises InputError where it cannot be continued or has nothing left to do, and KeyboardInterrupt as `train`.
    """
    changed: dict[str, Any] = {"epochs": epochs, "data": data}
    changed = {name: value for name, value in changed.items() if value is not None}
    if (of := kind(path)) != "image":
        from . import cell_runs, text_runs

        return (cell_runs.resume if of == "counts" else text_runs.resume)(path, changed)
    settings, shape = _read_config(path)
    settings = dataclasses.replace(settings, **changed).resolve(shape[2])
    settings.check()
    images = _images(settings, shape, path)
    model = _fresh(settings, images)
    done = epochs_done(model, path, settings)
    if settings.init_from and not done:
        initialise(model, settings, f"{path / CONFIG}: init_from {settings.init_from}")
    trainer = make_trainer(settings, path, _drawer(images, settings, path), resumed=True)
    with alone(path, PICTURES):
        if is_first():
            remove_partial(path)
            if changed:
                _write_config(path, settings, shape)
        _fit(trainer, model, images, settings, path, done)
    return None


def epochs_done(model: "VAE", path: Path, settings: Settings) -> int:
    """How many epochs a stopped run has whole. Raises InputError where none are left to do."""
    file = path / CHECKPOINTS / "last.ckpt"
    done: int = read_checkpoint(file, model)["epoch"] + 1 if file.exists() else 0
    if done >= settings.epochs:
        raise InputError(
            f"{path}: trained for {_epochs(done)} already; to go on, give a larger number of --epochs"
        )
    return done


def build(settings: ImageSettings, shape: Shape) -> "VAE":
    """The model of a recipe for images (H, W, C), with fresh weights from torch's generator."""
    options: dict[str, Any] = {
        "latents": settings.latent,
        "dimensions": math.prod(shape),
        "lr": settings.lr,
        "seed": settings.seed,
        "schedule": settings.warmup,
        "schedule_epochs": settings.warmup_epochs,
        "cycles": settings.cycles,
        "bits_offset": 8 if settings.likelihood == "gaussian" else 0,
    }
    try:
        return settings.make_module(shape, **options)
    except RuntimeError as error:  # torch's, of sizes that no memory holds
        raise InputError(f"this model cannot be made: {str(error).strip().splitlines()[0]}") from error


# ---------------------------------------------------------------------------------------------------------------------
# Training
# ---------------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def _fresh(settings: ImageSettings, images: data.Images) -> "VAE":
    """The model as training starts from it."""
    torch.manual_seed(settings.seed)
    model = build(settings, _shape(images))
    if settings.likelihood == "gaussian":
        # The decoder begins with the mean image, or the mean colour where its last layer is a convolution, and the
        # scale with what is left of the images then. From 1, far above any image's, too little of the reconstruction
        # would count: the posterior collapses before the scale has come down.
        pixels = images.train[:1000].permute(0, 3, 1, 2).add(0.5).div(256)
        mean = pixels.mean(0)
        _, last = _last_layer(model)
        if not isinstance(last, nn.Linear):
            mean = mean.mean((1, 2), keepdim=True)
        variance = (pixels - mean).square().mean() + 1 / (12 * 256**2)
        start = mean.flatten()
        if settings.variance != "fixed":
            from .module import unbounded_logvar

            logvar = unbounded_logvar(variance.log(), (settings.logvar_min, settings.logvar_max))
            if settings.variance == "per-pixel":
                start = torch.cat((start, logvar.expand_as(start)))
            else:
                model.likelihood.logvar.fill_(logvar)
        if last.bias is not None and last.bias.numel() % start.numel() == 0:
            last.bias.copy_(start.repeat_interleave(last.bias.numel() // start.numel()))
        model.start(pixels)
    return model


def _last_layer(model: "VAE") -> tuple[str, Any]:
    """Of the decoder, by its name in the model."""
    layers = (nn.Linear, nn.Conv2d, nn.ConvTranspose2d)
    return [
        (f"decoder.{name}", layer)
        for name, layer in model.decoder.named_modules()
        if isinstance(layer, layers)
    ][-1]


@torch.no_grad()
def initialise(model: "VAE", settings: ImageSettings, given: str) -> None:
    """Give the model the weights of `settings.init_from`, a run or a checkpoint, where names and shapes are the same.

    The decoder's last layer and the variance of another likelihood mean something else, and are not taken.
    `given` is how the user gave it.

    Raises InputError for a path without a checkpoint, and for one that fits nowhere.
    """
    path = file = Path(settings.init_from)
    if path.is_dir():
        kept = [path / CHECKPOINTS / f"{name}.ckpt" for name in ("best", "last")]
        file = next((one for one in kept if one.exists()), kept[0])
    if not file.exists():
        raise InputError(f"{given}: there is no {file if path.is_dir() else 'such file'}")
    weights = _open_checkpoint(file)["state_dict"]
    own = dict(model.named_parameters())
    same = [name for name in own if name in weights and weights[name].shape == own[name].shape]
    if (file.parent.parent / CONFIG).exists():
        theirs, _ = _read_table(file.parent.parent)
        of = ("likelihood", "variance", "components", "logvar_min", "logvar_max")
        if any(getattr(theirs, name, None) != getattr(settings, name) for name in of):
            last, _ = _last_layer(model)
            same = [name for name in same if not name.startswith(("elbo.", f"{last}."))]
    if all(name.startswith("elbo.") for name in same):
        raise InputError(f"{given}: no weight in it has the name and shape of one of this model")
    for name in same:
        if not weights[name].isfinite().all():
            raise InputError(f"{file}: `{name}` holds NaN or infinity: these weights are of no use")
        own[name].copy_(weights[name])
    taken = sum(own[name].numel() for name in same) / sum(weight.numel() for weight in own.values())
    _say()(f"init: {taken:.0%} of the weights from {file}")


def is_first() -> bool:
    """Whether this process writes and speaks. Lightning starts the others as further runs of the program."""
    from lightning.fabric.utilities.rank_zero import _get_rank

    return (_get_rank() or 0) == 0


def _say() -> Callable[[str], None]:
    return messages.say if is_first() else lambda line: None


def _drawer(images: data.Images, settings: ImageSettings, folder: Path) -> "Callback":
    from . import callbacks

    return callbacks.Pictures(folder, images, settings)


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
                callbacks.Metrics(folder, _say()),
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


def _fit(
    trainer: "Trainer", model: "VAE", images: data.Images, settings: ImageSettings, out: Path, done: int
) -> None:
    """`done`: how many epochs are; they are in last.ckpt."""
    from .loader import ImageData

    said = [*messages.backend_lines(trainer.strategy.root_device), *_introduction(model, images, settings)]
    fit(trainer, model, ImageData(images, settings), settings, out, done, said, PICTURES)


def fit(
    trainer: "Trainer",
    model: "VAE",
    batches: "LightningDataModule",
    settings: Settings,
    out: Path,
    done: int,
    introduction: Sequence[str],
    names: Sequence[str],
) -> None:
    """Train, with what is said before and after. `names` are of the files that the run leaves beside its tables."""
    say = _say()
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
        if not is_first():
            raise SystemExit(2) from None  # the first process has the word
        raise
    except SystemExit:  # what Lightning makes of Ctrl-C
        if not trainer.interrupted:
            raise
        kept = "the last whole epoch is kept" if last.exists() else "no epoch was whole yet"
        raise KeyboardInterrupt(f"interrupted; {kept}; to go on: fastvae resume {out}") from None
    finally:
        signal.signal(signal.SIGINT, handler)
    say("")
    say(
        f"{out}: {', '.join((*TABLES[:1], *(name for name in names if (out / name).exists())))}, checkpoints/"
    )
    say(
        f"next: fastvae evaluate {out}, "
        + ("" if settings.kind == "counts" else f"fastvae sample {out}, ")
        + f"fastvae resume {out} --epochs {2 * settings.epochs}"
    )


def _introduction(model: "VAE", images: data.Images, settings: ImageSettings) -> Iterator[str]:
    size = messages.size_of(_shape(images))
    yield f"data: {images.name}, {size}: {len(images.train)} to train on, {len(images.held_out)} held out"
    for note in images.notes:
        yield f"warning: {note}"
    parameters = sum(p.numel() for p in model.parameters())
    yield f"model: {settings.recipe}, {settings.latent} latent dimensions, {parameters:,} parameters"
    yield f"       {settings.described}"


def _plan(settings: Settings, out: Path, done: int) -> Iterator[str]:
    yield f"run: {out}, {_epochs(settings.epochs)}" + (f", {done} of them done" if done else "")
    if settings.warmup != "none" and settings.warmup_epochs > settings.epochs:
        yield (
            f"warning: the warm-up takes {settings.warmup_epochs:g} epochs and the run only {settings.epochs}: "
            "the KL will not get its whole weight (--warmup-epochs)"
        )


def _epochs(n: int) -> str:
    return f"{n} epoch{'s' if n != 1 else ''}"


# ---------------------------------------------------------------------------------------------------------------------
# The folder
# ---------------------------------------------------------------------------------------------------------------------


def _shape(images: data.Images) -> Shape:
    height, width, channels = images.train.shape[1:]
    return height, width, channels


def _images(settings: ImageSettings, shape: Shape, path: Path, others: bool = False) -> data.Images:
    try:
        # Files are brought to the shape of the run, whatever they would be by themselves.
        images = data.load(settings.data, seed=settings.seed, size=settings.size, shape=shape, whole=others)
    except InputError as error:
        raise InputError(f"{error} (the data of {path}; give others with --data)") from error
    if _shape(images) != shape:
        raise InputError(
            f"{settings.data}: the images are {messages.size_of(_shape(images))}, those of {path} "
            f"{messages.size_of(shape)}"
        )
    return images


def _write_config(out: Path, settings: Settings, shape: Shape) -> None:
    write_config(out, settings, f"shape = {list(shape)}  # of an image: height, width, channels\n")


def write_config(out: Path, settings: Settings, head: str = "") -> None:
    import tomli_w

    first = {"recipe": settings.recipe, "fastvae": fastvae.__version__}
    text = tomli_w.dumps(first) + head + "\n" + tomli_w.dumps(dataclasses.asdict(settings))
    files.write(out / CONFIG, text.encode())


def _read_config(path: Path) -> tuple[ImageSettings, Shape]:
    settings, shape = _read_table(path)
    if not isinstance(settings, ImageSettings):
        if settings.kind == "counts":
            raise InputError(
                f"{path}: a run of counts, and this is for images; there are evaluate and resume"
            )
        raise InputError(
            f"{path}: a run of {settings.kind}, which has no pictures; there are sample, reconstruct, interpolate and "
            "evaluate"
        )
    if not (isinstance(shape, list) and len(shape) == 3 and all(type(n) is int and n > 0 for n in shape)):
        raise InputError(f"{path / CONFIG}: `shape` must be [height, width, channels], got {shape!r}")
    height, width, channels = shape
    return settings, (height, width, channels)


def _read_table(path: Path) -> tuple[Settings, Any]:
    """The settings, and `shape` as it stands there."""
    from fastvae.recipes import RECIPES  # the one arrow upwards: a run names its recipe

    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib

    file = path / CONFIG
    try:
        table = tomllib.loads(file.read_text("utf-8"))
    except FileNotFoundError:
        what = "no run: there is no config.toml in it" if path.is_dir() else "no such run"
        raise InputError(f"{path}: {what}") from None
    except OSError as error:
        raise InputError(f"{file}: cannot be read: {files.reason(error)}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{file}: not TOML: {error}") from error
    recipe = table.pop("recipe", None)
    shape = table.pop("shape", None)
    table.pop("fastvae", None)
    if recipe not in RECIPES:
        raise InputError(f"{file}: `recipe` must be one of {', '.join(RECIPES)}, got {recipe!r}")
    return RECIPES[recipe].read(table, str(file)), shape


def read_checkpoint(file: Path, model: "VAE") -> dict[str, Any]:
    """Raises InputError for a file that is no checkpoint, and for one of another model."""
    checkpoint = _open_checkpoint(file)
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


def _open_checkpoint(file: Path) -> dict[str, Any]:
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
