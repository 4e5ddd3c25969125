"""`fastvae train`: the files that it writes, and the effect of its options."""

import csv
import importlib.util
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from run_files import error_line, read_metrics, train, weights

import fastvae
from fastvae import cli, reference
from fastvae.train import image, kinds, runs
from fastvae.train.image import data

pytestmark = pytest.mark.usefixtures("one_thread", "no_pictures")

# The other recipes have their own test files; photos is resnet with other defaults.
IMAGES = ["mlp", "conv", "conv-lstm", "resnet"]
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


@pytest.mark.parametrize("recipe", IMAGES)
@pytest.mark.usefixtures("with_pictures")
def test_training_writes_files_and_metrics(tmp_path, capsys, recipe):
    out = tmp_path / "runs" / "first"
    options = ("--epochs", "2", "--lr", "0.005", "--batch-size", "128", "--latent", "4")
    assert train(out, *options, recipe=recipe) == 0
    output = capsys.readouterr().out

    assert {path.name for path in out.iterdir()} == FILES
    assert {path.name for path in (out / "checkpoints").iterdir()} == {"last.ckpt", "best.ckpt"}
    sizes = {}
    for picture in out.glob("*.png"):
        with Image.open(picture) as image:
            image.load()
            sizes[picture.name] = image.size
    # The commands that use a run draw pictures of the same size.
    for command, name in (("sample", "samples.png"), ("reconstruct", "reconstructions.png")):
        assert cli.main([command, str(out), "--out", str(tmp_path / name)]) == 0
        with Image.open(tmp_path / name) as image:
            assert image.size == sizes[name]
    first, second = read_metrics(out)
    assert (first["epoch"], second["epoch"], second["step"]) == ("1", "2", "24")
    assert float(second["train_loss"]) < float(first["train_loss"])
    for part in ("train", "val"):
        neg_elbo = float(second[f"{part}_nll"]) + float(second[f"{part}_kl"])
        assert float(second["train_loss" if part == "train" else "val_neg_elbo"]) == pytest.approx(neg_elbo)
        bits = neg_elbo / (64 * math.log(2)) + (8 if recipe == "resnet" else 0)
        assert float(second[f"{part}_bits_per_dim"]) == pytest.approx(bits)
    with (out / "kl_per_dimension.csv").open() as file:
        (_, *kl) = list(csv.reader(file))[-1]
    assert sum(map(float, kl)) == pytest.approx(float(second["val_kl"]), rel=1e-5)

    assert f"fastvae {fastvae.__version__} · backend native" in output
    assert "8 x 8, 1498 training images, 299 validation images" in output
    assert f"model: {recipe}" in output
    assert f"fastvae resume {out}" in output
    assert "warning" not in output


def test_config_has_absolute_paths_and_resolved_likelihood(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    x = np.random.default_rng(0).integers(0, 255, (40, 8, 9), dtype=np.uint8)
    np.savez("mine.npz", x_train=x)
    assert train(Path("run"), "--data", "mine.npz", "--epochs", "1") == 0
    opened = image.load(tmp_path / "run")
    settings, shape = opened.settings, opened.shape
    assert shape == (8, 9, 1)
    assert settings.data == str(tmp_path / "mine.npz")
    assert settings.likelihood == "bernoulli"
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert len(image.load(tmp_path / "run").images.train) == 34


def test_colour_images_use_a_gaussian_with_learned_scale(tmp_path):
    x = np.random.default_rng(0).integers(0, 255, (60, 9, 11, 3), dtype=np.uint8)
    np.savez(tmp_path / "colour.npz", x_train=x, x_test=x[:20])
    for recipe in IMAGES:
        out = tmp_path / recipe
        options = ["--data", str(tmp_path / "colour.npz"), "--epochs", "2", "--batch-size", "16"]
        assert train(out, *options, recipe=recipe) == 0
        assert weights(out)["elbo.likelihood.logvar"] != 0
        row = read_metrics(out)[-1]
        bits = float(row["val_neg_elbo"]) / (9 * 11 * 3 * math.log(2)) + 8
        assert float(row["val_bits_per_dim"]) == pytest.approx(bits, rel=1e-5)


@pytest.mark.parametrize("likelihood", ["discretized-logistic", "dmol"])
@pytest.mark.parametrize("recipe", IMAGES)
def test_byte_likelihoods_report_bits_per_dimension(tmp_path, recipe, likelihood):
    """These are likelihoods of unscaled bytes, so nothing is added to the bits per dimension."""
    x = np.random.default_rng(0).integers(0, 255, (60, 9, 11, 3), dtype=np.uint8)
    np.savez(tmp_path / "colour.npz", x_train=x, x_test=x[:20])
    options = ["--likelihood", likelihood, "--data", str(tmp_path / "colour.npz")]
    options += ["--components", "3"] if likelihood == "dmol" else []
    assert train(tmp_path / "run", *options, "--epochs", "2", "--batch-size", "16", recipe=recipe) == 0
    row = read_metrics(tmp_path / "run")[-1]
    bits = float(row["val_neg_elbo"]) / (9 * 11 * 3 * math.log(2))
    assert float(row["val_bits_per_dim"]) == pytest.approx(bits, rel=1e-5)
    assert 7 < bits < 12
    run = image.load(tmp_path / "run")
    planes = run.model.decode(torch.zeros(1, run.model.latents)).shape[1]
    assert planes == {"discretized-logistic": 6, "dmol": 30}[likelihood]


def test_dmol_beats_gaussian_on_digits(tmp_path):
    """The bytes of the digits have only 17 levels, which a mixture can learn and a single Gaussian cannot."""
    options = ["--epochs", "10", "--lr", "0.005"]
    assert train(tmp_path / "gaussian", "--likelihood", "gaussian", *options) == 0
    assert train(tmp_path / "dmol", "--likelihood", "dmol", *options) == 0
    gaussian, dmol = (
        float(read_metrics(tmp_path / name)[-1]["val_bits_per_dim"]) for name in ("gaussian", "dmol")
    )
    assert dmol < gaussian - 1


def test_gaussian_does_not_collapse_on_digits(tmp_path):
    """If the scale started at 1 and moved as slowly as the weights, the posterior would stay collapsed at 9.3 bits."""
    assert train(tmp_path / "run", "--likelihood", "gaussian", "--epochs", "10", "--lr", "0.005") == 0
    assert float(read_metrics(tmp_path / "run")[-1]["val_bits_per_dim"]) < 8.2
    assert float(read_metrics(tmp_path / "run")[-1]["val_kl"]) > 3


@pytest.mark.parametrize("recipe", IMAGES)
def test_gaussian_is_initialised_with_the_mean_image(recipe):
    """It would take many epochs to get there from a black image."""
    torch.manual_seed(0)
    x = torch.randint(0, 40, (60, 16, 20, 3), dtype=torch.uint8) + torch.tensor(
        [200, 100, 20], dtype=torch.uint8
    )
    x[:, :8] += 10
    images = data.Images("colour", x, x[:10])
    model = runs.new_model(image.KIND, kinds.recipes()[recipe](likelihood="gaussian"), (16, 20, 3), images)
    pixels = (x.permute(0, 3, 1, 2) + 0.5) / 256
    mean = pixels.mean(0) if recipe == "mlp" else pixels.mean((0, 2, 3))[:, None, None]
    with torch.no_grad():
        means = model.decode(torch.randn(20, model.latents))
    assert (means - pixels.mean(0)).square().mean() < 0.2 * pixels.square().mean()
    error = (mean - pixels).square().mean().item()
    learned = model.likelihood
    variance = reference.bounded_logvar(learned.logvar, learned.logvar_bounds).exp()
    assert variance.item() == pytest.approx(error, rel=1e-3)


def test_best_checkpoint_has_the_smallest_val_neg_elbo(tmp_path):
    # With such a large learning rate the loss goes up and down.
    assert train(tmp_path / "run", "--epochs", "6", "--lr", "0.05") == 0
    losses = [float(row["val_neg_elbo"]) for row in read_metrics(tmp_path / "run")]
    best = losses.index(min(losses)) + 1
    assert best != 6, "this test needs a run whose last epoch is not the best"
    assert image.load(tmp_path / "run").epoch == best
    assert image.load(tmp_path / "run", checkpoint="last").epoch == 6


def test_tensorboard_logger_writes_events(tmp_path, capsys, monkeypatch):
    pytest.importorskip("tensorboard")
    assert train(tmp_path / "run", "--epochs", "1", "--logger", "tensorboard") == 0
    assert list((tmp_path / "run" / "tensorboard").glob("events.*"))
    capsys.readouterr()

    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if "tensorboard" in name else find(name)
    )
    assert train(tmp_path / "other", "--logger", "tensorboard") == 2
    assert "pip install tensorboard" in error_line(capsys)
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("options", [(), ("--ema", "0.9", "--clip", "1")], ids=["", "everything"])
@pytest.mark.parametrize(
    "precision", ["bf16-true", pytest.param("64-true", marks=pytest.mark.slow), "bf16-mixed", "16-mixed"]
)
@pytest.mark.usefixtures("with_pictures")
def test_precisions_train_and_resume(tmp_path, capsys, precision, options):
    options = ("--epochs", "1", "--lr", "0.005", "--precision", precision, *options)
    code = train(tmp_path / "run", *options)
    if precision.endswith("true") and "--ema" in options:
        assert code == 2
        assert f"--ema needs precision 32-true, bf16-mixed or 16-mixed, got {precision}" in error_line(capsys)
        return
    assert code == 0
    assert {path.name for path in (tmp_path / "run").iterdir()} == FILES
    (row,) = read_metrics(tmp_path / "run")
    assert float(row["train_loss"]) < 44.4  # 64 ln 2
    assert row["skipped_steps"] == "0"
    assert cli.main(["resume", str(tmp_path / "run"), "--epochs", "2"]) == 0
    first, second = read_metrics(tmp_path / "run")
    assert float(second["train_loss"]) < float(first["train_loss"])
    run = image.load(tmp_path / "run")
    assert run.model.decode(torch.zeros(1, 4)).isfinite().all()
