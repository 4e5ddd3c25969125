"""`fastvae train` and `fastvae resume`: what they leave, how a stopped run goes on, and what bad input gets."""

import csv
import math
import os
import pickle
import signal
import subprocess
import sys
import types
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import fastvae
from fastvae import cli, reference
from fastvae.recipes import RECIPES
from fastvae.training import callbacks, data, files, loader, module, runs, warmup
from fastvae.training.data import InputError

pytestmark = pytest.mark.usefixtures("one_thread")

# The others have files of their own; photos is gaussian with other defaults.
IMAGES = ["mlp", "conv", "conv-lstm", "gaussian"]
QUICK = ("--accelerator", "cpu", "--hidden", "32", "--latent", "4")
FILES = {
    "config.toml",
    "metrics.csv",
    "kl_per_dimension.csv",
    "checkpoints",
    "samples.png",
    "reconstructions.png",
    "loss.png",
    "latents.png",
}


@pytest.fixture(autouse=True)
def _no_pictures(request, monkeypatch):
    """They take most of the time of so short a run."""
    if "drawn" not in request.fixturenames:
        monkeypatch.setattr("fastvae.training.callbacks._is_drawn", lambda trainer: False)


def train(out: Path, *options: str, recipe: str = "mlp") -> int:
    quick = QUICK if recipe == "mlp" else QUICK[:2]
    return cli.main(["train", recipe, "--out", str(out), *quick, *options])


def rows(out: Path) -> list[dict[str, str]]:
    """metrics.csv, without the time, which is never the same."""
    with (out / "metrics.csv").open() as file:
        return [
            {name: value for name, value in row.items() if name != "seconds"} for row in csv.DictReader(file)
        ]


def weights(out: Path, name: str = "last") -> dict[str, torch.Tensor]:
    return torch.load(out / "checkpoints" / f"{name}.ckpt", weights_only=True)["state_dict"]


def assert_same_run(ours: Path, theirs: Path) -> None:
    assert rows(ours) == rows(theirs)
    assert (ours / "kl_per_dimension.csv").read_text() == (theirs / "kl_per_dimension.csv").read_text()
    for name in ("last", "best"):
        a, b = weights(ours, name), weights(theirs, name)
        assert a.keys() == b.keys()
        assert all(torch.equal(a[key], b[key]) for key in a)


def one_line(capsys) -> str:
    """What stands on stderr: one line, and no traceback."""
    error = capsys.readouterr().err
    assert error.startswith("fastvae: ")
    assert error.count("\n") == 1, error
    return error


def in_a_process(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


# ---------------------------------------------------------------------------------------------------------------------
# A run
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def drawn() -> None:
    """For a test of the pictures."""


@pytest.mark.parametrize("recipe", IMAGES)
@pytest.mark.usefixtures("drawn")
def test_what_a_run_leaves(tmp_path, capsys, recipe):
    out = tmp_path / "runs" / "first"
    options = ("--epochs", "2", "--lr", "0.005", "--batch-size", "128", "--latent", "4")
    assert train(out, *options, recipe=recipe) == 0
    said = capsys.readouterr().out

    assert {path.name for path in out.iterdir()} == FILES
    assert {path.name for path in (out / "checkpoints").iterdir()} == {"last.ckpt", "best.ckpt"}
    sizes = {}
    for picture in out.glob("*.png"):
        with Image.open(picture) as image:
            image.load()
            sizes[picture.name] = image.size
    # The commands on a run draw the same in their place.
    for command, name in (("sample", "samples.png"), ("reconstruct", "reconstructions.png")):
        assert cli.main([command, str(out), "--out", str(tmp_path / name)]) == 0
        with Image.open(tmp_path / name) as image:
            assert image.size == sizes[name]
    first, second = rows(out)
    assert (first["epoch"], second["epoch"], second["step"]) == ("1", "2", "24")
    assert float(second["train_loss"]) < float(first["train_loss"])
    for part in ("train", "held_out"):
        nelbo = float(second[f"{part}_nll"]) + float(second[f"{part}_kl"])
        assert float(second["train_loss" if part == "train" else "held_out_nelbo"]) == pytest.approx(nelbo)
        bits = nelbo / (64 * math.log(2)) + (8 if recipe == "gaussian" else 0)
        assert float(second[f"{part}_bits_per_dim"]) == pytest.approx(bits)
    with (out / "kl_per_dimension.csv").open() as file:
        (_, *kl) = list(csv.reader(file))[-1]
    assert sum(map(float, kl)) == pytest.approx(float(second["held_out_kl"]), rel=1e-5)

    assert f"fastvae {fastvae.__version__} · backend native" in said
    assert "8 x 8: 1498 to train on, 299 held out" in said
    assert f"model: {recipe}" in said
    assert f"fastvae resume {out}" in said
    assert "warning" not in said


def test_config_is_resolved(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    x = np.random.default_rng(0).integers(0, 255, (40, 8, 9), dtype=np.uint8)
    np.savez("mine.npz", x_train=x)
    assert train(Path("run"), "--data", "mine.npz", "--epochs", "1") == 0
    settings, shape = runs._read_config(tmp_path / "run")
    assert shape == (8, 9, 1)
    assert settings.data == str(tmp_path / "mine.npz")
    assert settings.likelihood == "bernoulli"
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert len(runs.load(tmp_path / "run").images.train) == 34


def test_colour_images_get_a_gaussian_whose_scale_is_trained(tmp_path):
    x = np.random.default_rng(0).integers(0, 255, (60, 9, 11, 3), dtype=np.uint8)
    np.savez(tmp_path / "colour.npz", x_train=x, x_test=x[:20])
    for recipe in IMAGES:
        out = tmp_path / recipe
        options = ["--data", str(tmp_path / "colour.npz"), "--epochs", "2", "--batch-size", "16"]
        assert train(out, *options, recipe=recipe) == 0
        assert weights(out)["elbo.likelihood.logvar"] != 0
        row = rows(out)[-1]
        bits = float(row["held_out_nelbo"]) / (9 * 11 * 3 * math.log(2)) + 8
        assert float(row["held_out_bits_per_dim"]) == pytest.approx(bits, rel=1e-5)


@pytest.mark.parametrize("likelihood", ["dlogistic", "dmol"])
@pytest.mark.parametrize("recipe", IMAGES)
def test_likelihoods_of_bytes(tmp_path, recipe, likelihood):
    """Of bytes as they are, with bits per dimension to which nothing is added."""
    x = np.random.default_rng(0).integers(0, 255, (60, 9, 11, 3), dtype=np.uint8)
    np.savez(tmp_path / "colour.npz", x_train=x, x_test=x[:20])
    options = ["--likelihood", likelihood, "--data", str(tmp_path / "colour.npz")]
    options += ["--components", "3"] if likelihood == "dmol" else []
    assert train(tmp_path / "run", *options, "--epochs", "2", "--batch-size", "16", recipe=recipe) == 0
    row = rows(tmp_path / "run")[-1]
    bits = float(row["held_out_nelbo"]) / (9 * 11 * 3 * math.log(2))
    assert float(row["held_out_bits_per_dim"]) == pytest.approx(bits, rel=1e-5)
    assert 7 < bits < 12
    run = runs.load(tmp_path / "run")
    planes = run.model.decode(torch.zeros(1, run.model.latents)).shape[1]
    assert planes == {"dlogistic": 6, "dmol": 30}[likelihood]


def test_mixture_learns(tmp_path):
    """Of the digits, whose bytes are 17 levels, a mixture knows more than any Gaussian of all pixels."""
    options = ["--epochs", "10", "--lr", "0.005"]
    assert train(tmp_path / "gaussian", "--likelihood", "gaussian", *options) == 0
    assert train(tmp_path / "dmol", "--likelihood", "dmol", *options) == 0
    gaussian, dmol = (
        float(rows(tmp_path / name)[-1]["held_out_bits_per_dim"]) for name in ("gaussian", "dmol")
    )
    assert dmol < gaussian - 1


def test_gaussian_learns(tmp_path):
    """With a scale that starts at 1 and moves as slowly as the weights the posterior stays collapsed, at 9.3 bits."""
    assert train(tmp_path / "run", "--likelihood", "gaussian", "--epochs", "10", "--lr", "0.005") == 0
    assert float(rows(tmp_path / "run")[-1]["held_out_bits_per_dim"]) < 8.2
    assert float(rows(tmp_path / "run")[-1]["held_out_kl"]) > 3


@pytest.mark.parametrize("recipe", IMAGES)
def test_gaussian_begins_with_the_mean_image(recipe):
    """Not with a black one, which many epochs go into leaving."""
    torch.manual_seed(0)
    x = torch.randint(0, 40, (60, 16, 20, 3), dtype=torch.uint8) + torch.tensor(
        [200, 100, 20], dtype=torch.uint8
    )
    x[:, :8] += 10
    model = runs._fresh(RECIPES[recipe](likelihood="gaussian"), data.Images("colour", x, x[:10]))
    pixels = (x.permute(0, 3, 1, 2) + 0.5) / 256
    mean = pixels.mean(0) if recipe == "mlp" else pixels.mean((0, 2, 3))[:, None, None]
    with torch.no_grad():
        shown = model.decode(torch.randn(20, model.latents))
    assert (shown - pixels.mean(0)).square().mean() < 0.2 * pixels.square().mean()
    error = (mean - pixels).square().mean().item()
    learned = model.likelihood
    variance = reference.bounded_logvar(learned.logvar, learned.logvar_bounds).exp()
    assert variance.item() == pytest.approx(error, rel=1e-3)


def test_best_is_the_epoch_with_the_smallest_held_out_loss(tmp_path):
    # So large a rate makes the loss go up and down.
    assert train(tmp_path / "run", "--epochs", "6", "--lr", "0.05") == 0
    losses = [float(row["held_out_nelbo"]) for row in rows(tmp_path / "run")]
    best = losses.index(min(losses)) + 1
    assert best != 6, "this test needs a run whose last epoch is not the best"
    assert runs.load(tmp_path / "run").epoch == best
    assert runs.load(tmp_path / "run", checkpoint="last").epoch == 6


def test_tensorboard(tmp_path, capsys, monkeypatch):
    pytest.importorskip("tensorboard")
    assert train(tmp_path / "run", "--epochs", "1", "--logger", "tensorboard") == 0
    assert list((tmp_path / "run" / "tensorboard").glob("events.*"))
    capsys.readouterr()

    find = runs.importlib.util.find_spec
    monkeypatch.setattr(
        runs.importlib.util, "find_spec", lambda name: None if "tensorboard" in name else find(name)
    )
    assert train(tmp_path / "other", "--logger", "tensorboard") == 2
    assert "pip install tensorboard" in one_line(capsys)
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("options", [(), ("--ema", "0.9", "--clip", "1")], ids=["", "everything"])
@pytest.mark.parametrize("precision", ["bf16-true", "64-true", "bf16-mixed", "16-mixed"])
@pytest.mark.usefixtures("drawn")
def test_precisions(tmp_path, capsys, precision, options):
    options = ("--epochs", "1", "--lr", "0.005", "--precision", precision, *options)
    code = train(tmp_path / "run", *options)
    if precision.endswith("true") and "--ema" in options:
        assert code == 2
        assert f"--ema averages weights in float32: give precision 32-true, got {precision}" in one_line(
            capsys
        )
        return
    assert code == 0
    assert {path.name for path in (tmp_path / "run").iterdir()} == FILES
    (row,) = rows(tmp_path / "run")
    assert float(row["train_loss"]) < 44.4  # 64 ln 2
    assert row["skipped_steps"] == "0"
    assert cli.main(["resume", str(tmp_path / "run"), "--epochs", "2"]) == 0
    first, second = rows(tmp_path / "run")
    assert float(second["train_loss"]) < float(first["train_loss"])
    run = runs.load(tmp_path / "run")
    assert run.model.decode(torch.zeros(1, 4)).isfinite().all()


# ---------------------------------------------------------------------------------------------------------------------
# Stopped and resumed
# ---------------------------------------------------------------------------------------------------------------------

VARIANTS = {
    "plain": (),
    "everything": (
        *("--ema", "0.9", "--binarize", "dynamic", "--clip", "5"),
        *("--warmup", "cyclical", "--warmup-epochs", "4", "--cycles", "2", "--beta", "0.8"),
    ),
    "gaussian": ("--likelihood", "gaussian"),
    "mixture": ("--likelihood", "dmol", "--components", "2"),
}


@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)
def test_resumed_run_is_the_uninterrupted_one(tmp_path, recwarn, options):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert train(whole, *options, "--epochs", "4") == 0
    assert train(parts, *options, "--epochs", "1") == 0
    assert cli.main(["resume", str(parts), "--epochs", "3"]) == 0
    # Which epoch was the best is remembered where the run is found in another place.
    moved = parts.rename(tmp_path / "moved")
    assert cli.main(["resume", str(moved), "--epochs", "4"]) == 0
    assert_same_run(moved, whole)
    assert not [str(warning.message) for warning in recwarn if "lightning" in warning.filename]


def test_moving_average_is_what_is_saved_and_validated(tmp_path):
    assert train(tmp_path / "run", "--ema", "0.99", "--epochs", "2") == 0
    saved = torch.load(tmp_path / "run" / "checkpoints" / "last.ckpt", weights_only=True)
    name = "encoder.1.weight"
    assert not torch.equal(saved["state_dict"][name], saved["current_model_state"][name])
    run = runs.load(tmp_path / "run", checkpoint="last")
    assert torch.equal(run.model.state_dict()[name], saved["state_dict"][name])


def test_moving_average_follows_at_first_and_then_decays():
    update = callbacks.average(0.5)._kwargs["multi_avg_fn"]
    for steps, share in ((0, 0.9), (2, 1 - 3 / 12), (1000, 0.5)):
        averaged = [torch.zeros(3)]
        update(averaged, [torch.ones(3)], steps)
        assert torch.allclose(averaged[0], torch.full((3,), share))


@pytest.mark.usefixtures("drawn")
def test_moving_average_is_what_is_drawn(tmp_path, monkeypatch):
    drawn = []
    draw = callbacks.Pictures.draw
    monkeypatch.setattr(
        callbacks.Pictures,
        "draw",
        lambda self, model: (drawn.append(model.encoder[1].weight.detach().clone()), draw(self, model)),
    )
    assert train(tmp_path / "run", "--ema", "0.99", "--epochs", "1") == 0
    assert torch.equal(drawn[0], weights(tmp_path / "run")["encoder.1.weight"])


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_clipping(tmp_path, precision):
    """Adam divides by the gradients' size, save where they are far below its epsilon of 1e-8."""
    assert train(tmp_path / "run", "--epochs", "1", "--clip", "1e-12", "--precision", precision) == 0
    settings = runs.load(tmp_path / "run").settings
    torch.manual_seed(0)
    fresh = settings.build((8, 8, 1))[0][1].weight.detach()
    trained = weights(tmp_path / "run")["encoder.1.weight"]
    assert not torch.equal(trained, fresh)
    assert (trained - fresh).abs().max() < 1e-5


def test_each_step_draws_noise_of_its_own(tmp_path, monkeypatch):
    forward, seeds = module.VAE.forward, []

    def record(self, x, seed, row_offset):
        if self.training:
            seeds.append(seed.tolist())
        return forward(self, x, seed, row_offset)

    monkeypatch.setattr(module.VAE, "forward", record)
    assert train(tmp_path / "run", "--epochs", "2", "--seed", "3") == 0
    assert seeds == [[3, 4 * step] for step in range(24)]


def test_a_file_is_whole_or_as_it_was(tmp_path, monkeypatch):
    file = tmp_path / "metrics.csv"
    files.write(file, b"old")
    write = Path.write_bytes

    def full(self, content):
        write(self, content[:1])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(InputError, match=r"metrics\.csv: cannot be written: no space left"):
        files.write(file, b"new")
    assert file.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [file]


def test_full_disk(tmp_path):
    resource = pytest.importorskip("resource")
    file = tmp_path / "last.ckpt"
    file.write_bytes(b"old")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(InputError, match=r"last\.ckpt: cannot be written: file too large"):
            callbacks.AtomicCheckpoints().save_checkpoint({"weights": torch.zeros(100_000)}, file)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert file.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [file]


def test_interrupt(tmp_path, capsys, monkeypatch):
    step = module.VAE.training_step

    def interrupted(self, batch, batch_idx):
        if (self.current_epoch, batch_idx) == (1, 5):
            raise KeyboardInterrupt
        return step(self, batch, batch_idx)

    monkeypatch.setattr(module.VAE, "training_step", interrupted)
    handler = signal.getsignal(signal.SIGINT)
    assert train(tmp_path / "run", "--epochs", "3") == 130
    assert f"fastvae resume {tmp_path / 'run'}" in one_line(capsys)
    assert signal.getsignal(signal.SIGINT) is handler
    monkeypatch.undo()
    monkeypatch.setattr("fastvae.training.callbacks._is_drawn", lambda trainer: False)
    assert cli.main(["resume", str(tmp_path / "run")]) == 0
    assert train(tmp_path / "whole", "--epochs", "3") == 0
    assert_same_run(tmp_path / "run", tmp_path / "whole")


KILLED = """
import os, signal, sys, torch
from fastvae import cli
from fastvae.training import callbacks, module

def die():
    os.kill(os.getpid(), signal.SIGKILL)

callbacks._is_drawn = lambda trainer: False
place, *arguments = sys.argv[1:]
step, save, saved = module.VAE.training_step, torch.save, 0

def training_step(self, batch, batch_idx):
    if (self.current_epoch, batch_idx) == {"first": (0, 3), "training": (1, 7)}.get(place):
        die()
    return step(self, batch, batch_idx)

def save_half(checkpoint, file):
    global saved
    saved += 1
    save(checkpoint, file)
    # best.ckpt and last.ckpt of the first epoch; then those of the second.
    if saved == {"saving best": 3, "saving last": 4}.get(place):
        file.truncate(file.tell() // 2)
        die()

module.VAE.training_step, torch.save = training_step, save_half
cli.main(arguments)
"""


@pytest.mark.parametrize(
    "place",
    [
        "saving last",
        *(pytest.param(place, marks=pytest.mark.slow) for place in ("first", "training", "saving best")),
    ],
)
def test_killed_run_goes_on(tmp_path, place):
    run, whole = tmp_path / "run", tmp_path / "whole"
    died = in_a_process("-c", KILLED, place, "train", "mlp", "--out", str(run), *QUICK, "--epochs", "3")
    assert died.returncode == -signal.SIGKILL, died.stderr
    parts = [path.name for path in run.rglob("*.part")]
    assert bool(parts) is place.startswith("saving")

    assert cli.main(["resume", str(run)]) == 0
    assert not list(run.rglob("*.part"))
    assert train(whole, "--epochs", "3") == 0
    assert_same_run(run, whole)


@pytest.mark.parametrize(("before", "after"), [("lr = 0.001", "lr = 0.01"), ("beta = 1.0", "beta = 0.25")])
def test_edited_settings_count_when_resumed(tmp_path, before, after):
    run = tmp_path / "run"
    assert train(run, "--epochs", "1", "--likelihood", "gaussian") == 0
    config = run / "config.toml"
    assert before in config.read_text()
    config.write_text(config.read_text().replace(before, after))
    assert cli.main(["resume", str(run), "--epochs", "2"]) == 0
    saved = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    rates = [group["lr"] for group in saved["optimizer_states"][0]["param_groups"]]
    assert rates == ([0.01, 0.1] if "lr" in after else [0.001, 0.01])
    assert float(rows(run)[-1]["beta"]) == (1.0 if "lr" in after else 0.25)


def test_two_processes_in_one_folder(tmp_path, capsys):
    fcntl = pytest.importorskip("fcntl")
    run = tmp_path / "run"
    assert train(run, "--epochs", "1") == 0
    before = (run / "config.toml").read_bytes()
    other = os.open(run, os.O_RDONLY)
    fcntl.flock(other, fcntl.LOCK_EX)
    capsys.readouterr()
    for command in (
        ["resume", str(run), "--epochs", "2"],
        ["train", "mlp", "--out", str(run), *QUICK, "--overwrite"],
    ):
        assert cli.main(command) == 2
        assert f"{run}: this run is being trained, by another process" in one_line(capsys)
    assert (run / "config.toml").read_bytes() == before
    assert len(rows(run)) == 1
    os.close(other)
    assert cli.main(["resume", str(run), "--epochs", "2"]) == 0


def test_nothing_left_to_resume(tmp_path, capsys):
    assert train(tmp_path / "run", "--epochs", "1") == 0
    capsys.readouterr()
    assert cli.main(["resume", str(tmp_path / "run")]) == 2
    assert "--epochs" in one_line(capsys)


def test_existing_run_is_replaced_only_when_asked(tmp_path, capsys):
    run = tmp_path / "run"
    assert train(run, "--epochs", "2") == 0
    (run / "notes.txt").write_text("mine")
    before = (run / "metrics.csv").read_text()
    capsys.readouterr()
    assert train(run, "--epochs", "1") == 2
    error = one_line(capsys)
    assert f"fastvae resume {run}" in error
    assert "--overwrite" in error
    assert (run / "metrics.csv").read_text() == before
    assert train(run, "--epochs", "1", "--overwrite") == 0
    assert len(rows(run)) == 1
    assert (run / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("overwrite", [(), ("--overwrite",)], ids=["", "overwrite"])
@pytest.mark.parametrize(
    "name", ["checkpoints/other.ckpt", "tensorboard/events.1", "samples.png", "metrics.csv"]
)
def test_what_fastvae_did_not_make_is_not_touched(tmp_path, capsys, name, overwrite):
    file = tmp_path / "project" / name
    file.parent.mkdir(parents=True)
    file.write_text("mine")
    assert train(tmp_path / "project", "--epochs", "1", *overwrite) == 2
    assert f"{tmp_path / 'project' / Path(name).parts[0]}: there already" in one_line(capsys)
    assert file.read_text() == "mine"
    assert not (tmp_path / "project" / "config.toml").exists()


def test_overwrite_removes_only_what_a_run_leaves(tmp_path):
    pytest.importorskip("tensorboard")
    run = tmp_path / "run"
    assert train(run, "--epochs", "1", "--logger", "tensorboard") == 0
    mine = [run / "checkpoints" / "other.ckpt", run / "tensorboard" / "notes.txt", run / "data" / "x.npz"]
    for path in mine:
        path.parent.mkdir(exist_ok=True)
        path.write_text("mine")
    (run / "checkpoints" / ".last.ckpt.1.part").write_text("half")
    for command in ("evaluate", "interpolate", "traverse", "inpaint"):
        assert cli.main([command, str(run)]) == 0
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.is_file()}
    assert train(run, "--epochs", "1", "--overwrite") == 0
    left = {path for path in run.rglob("*") if before.get(path) == path.stat().st_mtime_ns}
    assert left == set(mine)
    assert not list((run / "tensorboard").glob("events.*"))


# ---------------------------------------------------------------------------------------------------------------------
# Several processes
# ---------------------------------------------------------------------------------------------------------------------

RANKS = """
import sys
from fastvae import cli
from fastvae.training import module
step = module.VAE.training_step

def training_step(self, batch, batch_idx):
    loss = step(self, batch, batch_idx)
    if (self.current_epoch, batch_idx) == (0, 0):
        x, first = batch
        sys.stderr.write(f"rank={self.global_rank} rows={len(x)} first={first} loss={loss.item():.9g}\\n")
    if (self.current_epoch, batch_idx, self.global_rank) == (1, 2, self.trainer.world_size - 1):
        self._steps.losses[-1].fill_(torch.nan)  # of one process only, and not of the one that speaks
        self._steps.nll[-1].fill_(torch.nan)
    return loss

import torch
module.VAE.training_step = training_step
sys.exit(cli.main(sys.argv[1:]))
"""


@pytest.mark.slow
def test_two_processes_train_as_one(tmp_path):
    options = (*QUICK, "--epochs", "3", "--binarize", "dynamic", "--batch-size", "96")
    script = tmp_path / "train.py"  # Lightning runs the same file for the second process
    script.write_text(RANKS)
    first = {}
    for devices in ("1", "2"):
        done = in_a_process(
            str(script), "train", "mlp", "--out", str(tmp_path / devices), *options, "--devices", devices,
            "--strategy", "auto" if devices == "1" else "ddp",
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        lines = sorted(
            line for line in done.stderr.replace("rank=", "\nrank=").splitlines() if "rows=" in line
        )
        first[devices] = [dict(word.split("=") for word in line.split()) for line in lines]
        assert done.stdout.count("backend native") == 1  # one process speaks
    assert [(r["rank"], r["rows"], r["first"]) for r in first["2"]] == [("0", "48", "0"), ("1", "48", "48")]
    (whole,) = first["1"]
    halves = [float(r["loss"]) for r in first["2"]]
    assert sum(halves) / 2 == pytest.approx(float(whole["loss"]), rel=1e-6)
    assert abs(halves[0] - halves[1]) > 1e-3

    assert "1 of 16 steps skipped, the weights left as they were: nll of step 3" in done.stdout
    one, two = rows(tmp_path / "1"), rows(tmp_path / "2")
    assert [row["skipped_steps"] for row in two] == ["0", "1", "0"]
    for a, b in zip(one, two, strict=True):
        assert a.keys() == b.keys()
        for name in a:
            assert float(a[name]) == pytest.approx(float(b[name]), rel=1e-4), name
    a, b = weights(tmp_path / "1"), weights(tmp_path / "2")
    assert any(not torch.equal(a[name], b[name]) for name in a)  # it was not one process both times
    for name in a:
        assert torch.allclose(a[name], b[name], atol=1e-4), name


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("n", [23, 24])
def test_batches_of_all_processes_together(world, n):
    x = torch.arange(n, dtype=torch.uint8).view(n, 1, 1, 1)
    images = data.Images("numbers", x, x)
    settings = RECIPES["mlp"](batch_size=6, likelihood="gaussian", devices=world)

    def parts(held_out, epoch, world=world):
        each = []
        for rank in range(world):
            kept = loader.ImageData(images, settings)
            kept.trainer = types.SimpleNamespace(global_rank=rank, world_size=world, current_epoch=epoch)
            batches = kept.val_dataloader() if held_out else kept.train_dataloader()
            each.append(list(batches))
            assert len(each[-1]) == len(batches)
        return each

    for epoch in (0, 1):
        (one,) = parts(False, epoch, 1)
        each = parts(False, epoch)
        whole = [torch.cat([x for x, _ in batch]) for batch in zip(*each, strict=True)]
        assert all(len({len(x) for x, _ in batch}) == 1 for batch in zip(*each, strict=True))
        assert [first for _, first in each[-1]] == [len(batch) * (world - 1) // world for batch in whole]
        lost = sum(size % world for size in [6] * (n // 6) + ([n % 6] if n % 6 else []))
        assert sum(map(len, whole)) == n - lost
        assert len(one) == len(whole)
        assert all(torch.equal(a, b[: len(a)]) for a, (b, _) in zip(whole, one, strict=True))
    held_out = torch.cat([x for batch in zip(*parts(True, 0), strict=True) for x, _ in batch])
    assert torch.equal((held_out.flatten() * 256).floor(), torch.arange(n).float())
    assert not torch.equal(parts(False, 0)[0][0][0], parts(False, 1)[0][0][0])


def test_held_out_batches_of_large_images_are_small():
    sizes = []
    for side in (8, 512, 4000):
        x = torch.zeros(1, side, side, 3, dtype=torch.uint8).expand(2001, -1, -1, -1)
        kept = loader.ImageData(data.Images("large", x, x), RECIPES["mlp"](likelihood="gaussian"))
        sizes.append(kept.val_dataloader().size)
    assert sizes == [1000, 10, 1]


def test_held_out_batches_count_what_the_decoder_makes():
    """Of dmol ten numbers for each of 10 components of a pixel, of which there are 64 x 64."""

    def size(likelihood, channels, **more):
        return loader.held_out_batch(RECIPES["mlp"](likelihood=likelihood, **more), (64, 64, channels))

    decoded = {
        ("dmol", 3): 100,
        ("dmol", 1): 30,
        ("dlogistic", 3): 6,
        ("gaussian", 3): 3,
        ("bernoulli", 1): 1,
    }
    for (likelihood, channels), planes in decoded.items():
        assert size(likelihood, channels) == min(1000, 2**23 // (planes * 64 * 64))
    assert size("gaussian", 3, variance="per-pixel") == size("dlogistic", 3)


# ---------------------------------------------------------------------------------------------------------------------
# Steps that cannot be taken
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("term", ["nll", "kl", "the gradient"])
@pytest.mark.parametrize("clip", [(), ("--clip", "1")], ids=["", "clipped"])
def test_non_finite_step_is_skipped_counted_and_named(tmp_path, capsys, monkeypatch, term, clip):
    after = []

    def spoil(name, spoilt):
        method = getattr(module.VAE, name)
        monkeypatch.setattr(module.VAE, name, lambda self, value: spoilt(self, method(self, value)))

    def here(self):
        return self.training and (self.current_epoch, self.trainer.fit_loop.batch_idx) == (0, 4)

    if term == "nll":
        spoil("decode", lambda self, recon: recon * math.nan if here(self) else recon)
    elif term == "the gradient":

        def spoilt(self, recon):
            if here(self):
                recon.register_hook(
                    lambda gradient: gradient * math.inf
                )  # the loss itself is as it should be
            return recon

        spoil("decode", spoilt)
    else:
        spoil(
            "encode", lambda self, posterior: (posterior[0] * (math.nan if here(self) else 1), posterior[1])
        )
    monkeypatch.setattr(
        module.VAE,
        "on_train_batch_end",
        lambda self, *_: after.append(self.encoder[1].weight.detach().clone()),
        raising=False,
    )
    assert train(tmp_path / "run", "--epochs", "2", *clip) == 0
    assert f"1 of 12 steps skipped, the weights left as they were: {term} of step 5 is not finite" in (
        capsys.readouterr().out
    )
    assert [row["skipped_steps"] for row in rows(tmp_path / "run")] == ["1", "0"]
    assert all(math.isfinite(float(value)) for row in rows(tmp_path / "run") for value in row.values())
    assert [torch.equal(a, b) for a, b in pairwise(after)] == [step == 4 for step in range(1, 24)]


def test_only_the_first_process_tells_of_a_mistake(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(module.VAE, "decode", lambda self, z: self.decoder(z) * math.inf)
    monkeypatch.setattr(runs, "is_first", lambda: False)
    (tmp_path / "run").mkdir()
    with pytest.raises(SystemExit) as ended:
        train(tmp_path / "run", "--epochs", "2")
    assert ended.value.code == 2
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("epoch", "advice"),
    [
        (1, "with the weights that the run starts from, whatever --lr: look at the data"),
        (2, "try a smaller --lr, or --clip 1"),
    ],
)
def test_epoch_that_never_steps_is_an_error(tmp_path, capsys, monkeypatch, epoch, advice):
    """Before a first step the learning rate cannot be its cause, after one it may be."""

    def decode(self, z):
        return self.decoder(z) * (math.inf if self.training and self.current_epoch + 1 == epoch else 1)

    monkeypatch.setattr(module.VAE, "decode", decode)
    assert train(tmp_path / "run", "--epochs", "2") == 2
    line = one_line(capsys)
    assert f"every step of epoch {epoch} was skipped: nll of step 1 is not finite; " in line
    assert advice in line
    assert (tmp_path / "run" / "checkpoints" / "last.ckpt").exists() == (epoch > 1)


@pytest.mark.usefixtures("drawn")
def test_weights_that_give_no_finite_held_out_loss_are_not_kept(tmp_path, capsys, monkeypatch):
    def spoilt(epochs):
        encode = module.VAE.encode

        def spoil(self, x):
            bad = math.nan if not self.training and self.current_epoch in epochs else 1
            return tuple(part * bad for part in encode(self, x))

        monkeypatch.setattr(module.VAE, "encode", spoil)

    run = tmp_path / "run"
    spoilt([0])
    assert train(run, "--epochs", "1") == 0
    assert (
        "warning: the held-out loss of epoch 1 is not finite: no checkpoint is kept"
        in capsys.readouterr().out
    )
    assert not (run / "checkpoints").exists()
    assert cli.main(["sample", str(run)]) == 2
    assert "no checkpoints/best.ckpt yet" in one_line(capsys)
    monkeypatch.undo()
    assert cli.main(["resume", str(run)]) == 0
    spoilt([1])
    assert cli.main(["resume", str(run), "--epochs", "2"]) == 0
    assert len(rows(run)) == 2
    for name in ("last", "best"):
        assert runs.load(run, checkpoint=name).epoch == 1


# ---------------------------------------------------------------------------------------------------------------------
# Warm-up
# ---------------------------------------------------------------------------------------------------------------------


def test_schedules():
    def at(schedule, *passed, cycles=1):
        return [warmup.weight(schedule, p, 10.0, cycles) for p in passed]

    assert at("none", 0, 5, 20) == [1, 1, 1]
    assert at("linear", 0, 2.5, 5, 10, 20) == [0, 0.25, 0.5, 1, 1]
    assert at("cyclical", 0, 1.25, 2.5, 4.9, 5, 6.25, 7.5, 10, 12, cycles=2) == pytest.approx(
        [0, 0.5, 1, 1, 0, 0.5, 1, 1, 1]
    )
    sigmoid = at("sigmoid", 0, 5, 9.999, 10)
    assert sigmoid == pytest.approx([0.00247, 0.5, 0.99753, 1], abs=1e-4)
    for schedule in ("linear", "sigmoid"):
        values = at(schedule, *np.linspace(0, 12, 50))
        assert values == sorted(values)


@pytest.mark.parametrize("schedule", ["linear", "cyclical", "sigmoid"])
def test_warm_up_reaches_the_loss(tmp_path, capsys, schedule):
    options = ("--warmup", schedule, "--warmup-epochs", "2", "--beta", "0.5")
    if schedule == "cyclical":
        options += ("--cycles", "1")
    assert train(tmp_path / "run", *options, "--epochs", "3") == 0
    assert "warning" not in capsys.readouterr().out
    # Of the last of an epoch's 12 steps.
    expected = [0.5 * warmup.weight(schedule, epoch + 11 / 12, 2.0) for epoch in range(3)]
    assert [float(row["beta"]) for row in rows(tmp_path / "run")] == pytest.approx(expected)
    last = {name: float(value) for name, value in rows(tmp_path / "run")[-1].items()}
    assert last["train_loss"] == pytest.approx(last["train_nll"] + 0.5 * last["train_kl"], rel=1e-5)
    assert last["held_out_nelbo"] == pytest.approx(last["held_out_nll"] + last["held_out_kl"], rel=1e-6)


def test_warm_up_longer_than_the_run(tmp_path, capsys):
    assert train(tmp_path / "run", "--warmup", "linear", "--epochs", "1") == 0
    assert "warning: the warm-up takes 10 epochs and the run only 1" in capsys.readouterr().out


# ---------------------------------------------------------------------------------------------------------------------
# Data
# ---------------------------------------------------------------------------------------------------------------------


def test_prepare():
    images = torch.arange(256, dtype=torch.uint8).repeat(2000, 1).view(2000, 16, 16, 1)
    threshold = loader.prepare(images, RECIPES["mlp"](likelihood="bernoulli"))
    assert threshold.shape == (2000, 1, 16, 16)
    assert torch.equal(threshold[0].flatten(), (torch.arange(256) >= 128).float())

    dynamic = RECIPES["mlp"](likelihood="bernoulli", binarize="dynamic")
    x = loader.prepare(images, dynamic, loader.generator(1, 2))
    assert set(x.unique().tolist()) == {0.0, 1.0}
    assert (x.mean(0).flatten() - torch.arange(256) / 255).abs().max() < 5 * 0.5 / 2000**0.5
    assert x[:, 0, 0, 0].max() == 0
    assert x[:, 0, -1, -1].min() == 1
    assert torch.equal(x, loader.prepare(images, dynamic, loader.generator(1, 2)))
    assert not torch.equal(x, loader.prepare(images, dynamic, loader.generator(1, 3)))

    colour = torch.arange(2 * 4 * 5 * 3, dtype=torch.uint8).view(2, 4, 5, 3)
    x = loader.prepare(colour, RECIPES["mlp"](likelihood="gaussian"))
    assert x.shape == (2, 3, 4, 5)
    assert x.is_contiguous()
    assert torch.equal((x * 256).floor().permute(0, 2, 3, 1), colour.float())

    x = loader.prepare(colour, RECIPES["mlp"](likelihood="dmol"))
    assert x.is_contiguous()
    assert torch.equal(x.permute(0, 2, 3, 1), colour)


def picture(path: Path, size: tuple[int, int], value: object = 100, mode: str = "L", **save: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, value).save(path, **save)


def test_folder_of_images(tmp_path, capsys):
    for i in range(6):
        picture(tmp_path / "cats" / f"{i}.png", (20, 12), i)
        picture(tmp_path / "dogs" / "more" / f"{i}.jpg", (12, 20), 200 + i)
    (tmp_path / "cats" / "6.png").write_text("no image")
    whole = (tmp_path / "cats" / "5.png").read_bytes()
    (tmp_path / "dogs" / "half.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "readme.txt").write_text("not meant as an image")
    images = data.load(str(tmp_path), size=8)
    assert images.train.shape == (10, 8, 8, 1)
    assert images.held_out.shape == (2, 8, 8, 1)
    for part, labels in ((images.train, images.train_labels), (images.held_out, images.held_out_labels)):
        assert torch.equal(labels, (part[:, 0, 0, 0] > 100).long())
    assert images.label_names == ("cats", "dogs")
    (note,) = images.notes
    assert note.startswith("2 of 14 images cannot be read and are skipped: ")
    assert "cats/6.png (not an image)" in note
    assert "dogs/half.png" in note
    # Told in a run, and no reason to stop.
    assert train(tmp_path / "run", "--data", str(tmp_path), "--size", "8", "--epochs", "1") == 0
    assert f"warning: {note}" in capsys.readouterr().out


def test_another_folder_is_brought_to_the_shape_of_the_run(tmp_path, capsys):
    for i in range(12):
        picture(tmp_path / "own" / f"{i}.png", (20, 12), 20 * i)
    assert train(tmp_path / "run", "--data", str(tmp_path / "own"), "--epochs", "1") == 0
    picture(tmp_path / "other" / "a.png", (90, 70), (250, 10, 10), "RGB")
    others = runs.load(tmp_path / "run", data=str(tmp_path / "other")).images
    assert others.held_out.shape == (1, 12, 20, 1)
    picture(tmp_path / "other" / "b.png", (30, 30), 7)
    capsys.readouterr()
    for command in ("reconstruct", "evaluate"):
        assert cli.main([command, str(tmp_path / "run"), "--data", str(tmp_path / "other")]) == 0
        assert "2 held-out images" in capsys.readouterr().out
    # Its own folder by its name is no other one: what was trained on is not held out.
    assert len(runs.load(tmp_path / "run", data=str(tmp_path / "own")).images.held_out) == 2


@pytest.mark.usefixtures("drawn")
def test_run_inside_its_data_is_not_trained_on(tmp_path, capsys):
    for i in range(12):
        picture(tmp_path / f"{i}.png", (20, 12), 20 * i)
    before = data.load(str(tmp_path))
    assert train(tmp_path, "--data", str(tmp_path)) == 2
    assert "this is the folder of --data" in one_line(capsys)
    assert train(tmp_path / "runs" / "first", "--data", str(tmp_path), "--epochs", "1") == 0
    after = data.load(str(tmp_path))
    assert torch.equal(before.train, after.train)
    assert after.train_labels is None


def test_transparency_is_white(tmp_path):
    for i in range(2):
        picture(tmp_path / "colour" / f"{i}.png", (9, 9), (10, 20, 30, 0), "RGBA")
        picture(tmp_path / "half" / f"{i}.png", (9, 9), (0, 0, 0, 127), "RGBA")
        picture(tmp_path / "grey" / f"{i}.png", (9, 9), (7, 0), "LA")
        picture(tmp_path / "palette" / f"{i}.gif", (9, 9), 3, "P", transparency=3)
    for name in ("colour", "grey", "palette"):
        assert data.load(str(tmp_path / name)).train.unique().tolist() == [255]
    assert data.load(str(tmp_path / "half")).train.unique().tolist() == [128]


def test_pixels_of_unknown_range_are_named(tmp_path):
    for i in range(3):
        picture(tmp_path / f"{i}.png", (9, 9), 3)
    picture(tmp_path / "float.tif", (9, 9), 0.5, "F")
    picture(tmp_path / "long.tif", (9, 9), 100_000, "I")
    (note,) = data.load(str(tmp_path)).notes
    assert (
        "float.tif (pixels of mode F, of unknown range), long.tif (pixels of mode I, of unknown range)"
        in note
    )


def test_labels_are_numbered_without_unreadable_folders(tmp_path):
    for i in range(6):
        picture(tmp_path / "dogs" / f"{i}.png", (9, 9), 200)
        picture(tmp_path / "eels" / f"{i}.png", (9, 9), 10)
    (tmp_path / "cats").mkdir()
    (tmp_path / "cats" / "0.png").write_text("no image")
    images = data.load(str(tmp_path))
    assert images.label_names == ("dogs", "eels")
    assert torch.equal(images.train_labels, (images.train[:, 0, 0, 0] < 100).long())


def test_sizes_and_kinds_of_images(tmp_path):
    for i in range(3):
        picture(tmp_path / "same" / f"{i}.png", (30, 20), i)
        picture(tmp_path / "large" / f"{i}.png", (80, 80), i)
        picture(tmp_path / "mixed" / f"{i}.png", (30 + i, 20), (10, 20, 30) if i else 7, "RGB" if i else "L")
        picture(tmp_path / "deep" / f"{i}.png", (9, 9), 40_000, "I;16")
    turned = Image.Exif()
    turned[0x0112] = 6
    for i in range(2):
        picture(tmp_path / "turned" / f"{i}.jpg", (30, 20), i, exif=turned)
        picture(tmp_path / "palette" / f"{i}.gif", (9, 9), 3, "P")

    def shape(name, **options):
        return tuple(data.load(str(tmp_path / name), **options).train.shape[1:])

    assert shape("same") == (20, 30, 1)
    assert shape("turned") == (30, 20, 1)
    assert shape("large") == (64, 64, 1)
    assert shape("mixed") == (64, 64, 3)
    assert shape("same", size=16) == (16, 16, 1)
    assert shape("palette") == (9, 9, 3)
    assert data.load(str(tmp_path / "deep")).train.unique().tolist() == [40_000 >> 8]
    assert data.load(str(tmp_path / "same")).train_labels is None


def fake_datasets(monkeypatch, splits, features) -> list[str]:
    """A module in the place of `datasets`, of which the images are bytes."""
    fake = types.ModuleType("datasets")
    fake.Image = type("Image", (), {"__init__": lambda self, decode=True: setattr(self, "decode", decode)})
    fake.ClassLabel = type("ClassLabel", (), {"names": [f"kind {i}" for i in range(100)]})
    kinds = {"image": fake.Image, "label": fake.ClassLabel, "text": str}

    class Split:
        def __init__(self, columns, decode=True):
            self.columns, self.decode = columns, decode
            self.features = {name: kinds[kind]() for name, kind in features.items()}

        def cast_column(self, name, kind):
            assert features[name] == "image"
            return Split(self.columns, kind.decode)

        def __getitem__(self, name):
            assert features[name] != "image" or not self.decode
            return self.columns[name]

    asked = []

    def load_dataset(name):
        asked.append(name)
        return {name: Split(columns) for name, columns in splits.items()}

    fake.load_dataset = load_dataset
    monkeypatch.setitem(sys.modules, "datasets", fake)
    return asked


def png(value: int) -> dict[str, object]:
    import io

    file = io.BytesIO()
    Image.new("L", (10, 10), value).save(file, "PNG")
    return {"bytes": file.getvalue(), "path": None}


def test_hugging_face_dataset(tmp_path, monkeypatch, capsys):
    train_split = {"img": [png(i) for i in range(8)] + [{"bytes": b"?", "path": None}], "y": [*range(8), 99]}
    test_split = {"img": [png(100), png(101)], "y": [5, 6]}
    features = {"y": "label", "img": "image"}
    asked = fake_datasets(monkeypatch, {"train": train_split, "test": test_split}, features)
    images = data.load("someone/pictures")
    assert asked == ["someone/pictures"]
    assert images.train.shape == (8, 10, 10, 1)
    assert torch.equal(images.train[:, 0, 0, 0].long(), images.train_labels)
    assert images.held_out[:, 0, 0, 0].tolist() == [100, 101]
    assert images.held_out_labels.tolist() == [5, 6]
    assert images.label_names[6] == "kind 6"
    assert images.notes == ("1 of 11 images cannot be read and are skipped: train[8] (not an image)",)

    fake_datasets(monkeypatch, {"train": train_split}, features)
    alone = data.load("someone/pictures")
    assert (len(alone.train), len(alone.held_out)) == (7, 1)
    assert torch.equal(alone.train[:, 0, 0, 0].long(), alone.train_labels)
    assert train(tmp_path / "run", "--data", "someone/pictures", "--epochs", "1") == 0
    capsys.readouterr()

    gaps = {"img": [*map(png, range(8)), None, {"bytes": None, "path": None}], "y": [None, *range(1, 10)]}
    fake_datasets(monkeypatch, {"train": gaps, "test": test_split}, features)
    images = data.load("someone/pictures")
    assert images.notes == (
        "2 of 12 images cannot be read and are skipped: train[8] (no image), train[9] (no image)",
    )
    assert images.train_labels.tolist() == [-1, *range(1, 8)]

    fake_datasets(monkeypatch, {"train": {"t": ["words"]}}, {"t": "text"})
    assert train(tmp_path / "text", "--data", "someone/text") == 2
    assert "no column of images, only t" in one_line(capsys)
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert train(tmp_path / "none", "--data", "someone/text") == 2
    assert "pip install datasets" in one_line(capsys)


# ---------------------------------------------------------------------------------------------------------------------
# Mistakes
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--lr", "0"), "--lr must be above 0, got 0"),
        (("--lr", "nan"), "--lr must be above 0 and finite, got nan"),
        (("--lr", "inf"), "--lr must be above 0 and finite, got inf"),
        (("--hidden", "10000000000000"), "this model cannot be made: "),
        (("--lr", "fast"), "--lr"),
        (("--ema", "1"), "--ema must be at least 0 and below 1"),
        (("--batch-size", "0"), "--batch-size must be at least 1"),
        (("--warmup", "cosine"), "--warmup must be one of none, linear, cyclical, sigmoid, got 'cosine'"),
        (("--likelihood", "gaussian", "--binarize", "dynamic"), "--binarize is of the Bernoulli likelihood"),
        (("--size", "16"), "--size is of folders and datasets: the images of digits are taken as they are"),
        (
            ("--cycles", "2", "--warmup", "linear"),
            "--cycles is of a cyclical warm-up: give --warmup cyclical",
        ),
        (
            ("--warmup-epochs", "2"),
            "--warmup-epochs is of a warm-up: give --warmup linear, cyclical or sigmoid",
        ),
        (("--data", "/no/such.npz"), "/no/such.npz: no such file"),
        (("--data", "./none"), "./none: no such file or folder"),
        (("--data", __file__), "neither a .npz file nor a folder of images"),
        (("--accelerator", "abacus"), "Lightning refuses --accelerator abacus"),
        (("--strategy", "ddq"), "Lightning refuses --accelerator cpu --strategy ddq"),
        (("--precision", "7"), "Lightning refuses --accelerator cpu --precision 7"),
        (
            ("--precision", "16-true"),
            "--precision 16-true: Adam's squares of gradients leave the range of float16",
        ),
        (("--devices", "200"), "--devices 200"),
        (("--colour", "red"), "No such option"),
    ],
)
def test_mistakes_are_told_in_a_line(tmp_path, capsys, options, message):
    chosen = ("--accelerator", "cpu") if "--accelerator" not in options else ()
    assert cli.main(["train", "mlp", "--out", str(tmp_path / "run"), *chosen, *options]) == 2
    assert message in one_line(capsys)
    assert not (tmp_path / "run").exists()


def test_folder_without_images(tmp_path, capsys):
    (tmp_path / "words").mkdir()
    (tmp_path / "words" / "a.txt").write_text("text")
    assert train(tmp_path / "run", "--data", str(tmp_path / "words")) == 2
    assert "there are no images in this folder" in one_line(capsys)
    (tmp_path / "words" / "a.png").write_text("text")
    assert train(tmp_path / "run", "--data", str(tmp_path / "words")) == 2
    assert "not one image can be read: a.png (not an image)" in one_line(capsys)
    picture(tmp_path / "words" / "b.png", (8, 8))
    assert train(tmp_path / "run", "--data", str(tmp_path / "words")) == 2
    assert "one image is too few" in one_line(capsys)
    assert not (tmp_path / "run").exists()


def test_conv_needs_eight_pixels(tmp_path, capsys):
    np.savez(tmp_path / "small.npz", x_train=np.zeros((9, 8, 7), dtype=np.uint8))
    assert train(tmp_path / "run", "--data", str(tmp_path / "small.npz"), recipe="conv") == 2
    assert "at least 8 x 8 pixels, got 8 x 7; mlp takes any size" in one_line(capsys)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("finished") / "run"
    assert train(out, "--epochs", "1") == 0
    return out


@pytest.fixture
def run(finished, tmp_path):
    """A copy, to be spoilt."""
    import shutil

    return shutil.copytree(finished, tmp_path / "run")


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ("hidden", "hiden", "there is no setting `hiden`; did you mean `hidden`?"),
        ("hidden", "colour", "there is no setting `colour`; there are data, latent"),
        ("lr = 0.001", 'lr = "x"', "`lr` must be a number, got 'x'"),
        ("epochs = 1", "epochs = 1.5", "`epochs` must be a whole number, got 1.5"),
        ("clip = 0.0", "clip = -1", "`clip` must be at least 0, got -1"),
        ('logger = "csv"', 'logger = "paper"', "`logger` must be one of csv, tensorboard, got 'paper'"),
        (
            'recipe = "mlp"',
            'recipe = "unet"',
            "`recipe` must be one of mlp, conv, conv-lstm, gaussian, photos, vae-gan, text, counts, got 'unet'",
        ),
        ("shape = [8, 8, 1]", "shape = [8, 8]", "`shape` must be [height, width, channels], got [8, 8]"),
        ("recipe", "= recipe", "not TOML"),
        ("hidden = 32", "hidden = 30", "`encoder.1.weight` is (32, 64) in it, and (30, 64) by config.toml"),
        ("[8, 8, 1]", "[9, 8, 1]", "the images are 8 x 8, those of"),
        ('data = "digits"', 'data = "/gone.npz"', "/gone.npz: no such file"),
    ],
)
def test_wrong_config(run, capsys, before, after, message):
    config = run / "config.toml"
    assert before in config.read_text()
    config.write_text(config.read_text().replace(before, after, 1))
    assert cli.main(["resume", str(run), "--epochs", "2"]) == 2
    assert message in one_line(capsys)


@pytest.mark.parametrize("name", ["accelerator", "strategy"])
def test_what_lightning_refuses_is_named_where_it_stands(run, capsys, name):
    config = run / "config.toml"
    before = {"accelerator": '"cpu"', "strategy": '"auto"'}[name]
    config.write_text(config.read_text().replace(f"{name} = {before}", f'{name} = "abacus"'))
    assert cli.main(["resume", str(run), "--epochs", "2"]) == 2
    error = one_line(capsys)
    assert f"Lightning refuses {config}: " in error
    assert f"{name} abacus" in error
    assert "--" not in error


def test_foreign_and_damaged_checkpoints(run, capsys):
    file = run / "checkpoints" / "last.ckpt"
    good = file.read_bytes()

    def refused() -> str:
        capsys.readouterr()
        assert cli.main(["resume", str(run), "--epochs", "2"]) == 2
        with pytest.raises(InputError):
            runs.load(run, checkpoint="last")
        return one_line(capsys)

    for half in (b"text", good[: len(good) // 2], b""):
        file.write_bytes(half)
        assert "not a checkpoint of fastvae, or damaged" in refused()
    torch.save({"weights": torch.zeros(2)}, file)
    assert "not a checkpoint of fastvae" in refused()
    file.write_bytes(good)
    saved = torch.load(file, weights_only=True)
    saved["state_dict"]["other.weight"] = torch.zeros(2)
    torch.save(saved, file)
    assert "`other.weight` is none of this one's" in refused()
    del saved["state_dict"]["other.weight"]
    saved["state_dict"]["decoder.0.bias"][0] = math.nan
    torch.save(saved, file)
    assert "`decoder.0.bias` holds NaN or infinity" in refused()
    del saved["state_dict"]["decoder.0.bias"]
    torch.save(saved, file)
    assert "there is no `decoder.0.bias` in it" in refused()
    file.unlink()
    with pytest.raises(InputError, match=r"there is no checkpoints/last.ckpt yet"):
        runs.load(run, checkpoint="last")


def test_checkpoint_holds_no_code(run):
    """What a foreign checkpoint could run when it is read is never run: not in `load`, and not by Lightning."""

    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(run / "evil"),)

    torch.save(
        {"state_dict": {}, "epoch": 0, "loops": {}, "optimizer_states": Evil()},
        run / "checkpoints" / "last.ckpt",
    )
    assert cli.main(["resume", str(run), "--epochs", "2"]) == 2
    assert not (run / "evil").exists()


def test_lightning_runs_no_code_of_a_checkpoint(run, monkeypatch):
    """Nor would it without the look that is taken before."""

    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(run / "evil"),)

    file = run / "checkpoints" / "last.ckpt"
    saved = torch.load(file, weights_only=True)
    torch.save({**saved, "optimizer_states": Evil()}, file)
    monkeypatch.setattr(runs, "read_checkpoint", lambda file, model: saved)
    with pytest.raises(pickle.UnpicklingError, match=r"[Ww]eights.only"):
        cli.main(["resume", str(run), "--epochs", "2"])
    assert not (run / "evil").exists()


def test_not_a_run(tmp_path, capsys):
    assert cli.main(["resume", str(tmp_path / "none")]) == 2
    assert "no such run" in one_line(capsys)
    assert cli.main(["resume", str(tmp_path)]) == 2
    assert "no run: there is no config.toml in it" in one_line(capsys)


def test_moved_data(tmp_path, capsys):
    x = np.random.default_rng(0).integers(0, 255, (40, 8, 9), dtype=np.uint8)
    np.savez(tmp_path / "old.npz", x_train=x)
    assert train(tmp_path / "run", "--data", str(tmp_path / "old.npz"), "--epochs", "1") == 0
    (tmp_path / "old.npz").rename(tmp_path / "new.npz")
    capsys.readouterr()
    assert cli.main(["resume", str(tmp_path / "run"), "--epochs", "2"]) == 2
    assert "--data" in one_line(capsys)
    assert (
        cli.main(["resume", str(tmp_path / "run"), "--epochs", "2", "--data", str(tmp_path / "new.npz")]) == 0
    )
    assert cli.main(["resume", str(tmp_path / "run"), "--epochs", "3"]) == 0


def test_help_is_quick_and_says_the_options(capsys):
    done = in_a_process(
        "-c",
        "import sys; from fastvae import cli; code = cli.main(['train', 'mlp', '--help']);"
        "sys.exit(code or 'lightning' in sys.modules or 'matplotlib' in sys.modules)",
    )
    assert done.returncode == 0, done.stderr
    for option in ("--hidden", "--layers", "--latent", "--warmup", "--out"):
        assert option in done.stdout
    assert "--channels" not in done.stdout
