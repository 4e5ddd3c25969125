"""Options of the image recipes: variance, likelihood, size and augmentation; and resuming."""

import math

import numpy as np
import pytest
import torch
from run_files import assert_same_run, error_line, read_metrics, train_images

from fastvae import cli, reference
from fastvae.train import runs
from fastvae.train.image import KIND, data, load, loader
from fastvae.train.image.recipes.resnet import ResNet
from fastvae.train.seeding import seeded_generator

pytestmark = pytest.mark.usefixtures("one_thread", "no_pictures")


@pytest.mark.parametrize("variance", ["fixed", "learned", "per-element"])
def test_variance_option_selects_the_scale(colours, tmp_path, capsys, variance):
    out = tmp_path / "run"
    options = ["--sigma", "0.5"] if variance == "fixed" else ["--logvar-min", "-9", "--logvar-max", "1"]
    assert train_images("resnet", out, colours, "--epochs", "2", "--variance", variance, *options) == 0
    likelihood = load(out).model.likelihood
    expected = {"fixed": 0.5, "learned": "learned", "per-element": "per_element"}[variance]
    assert likelihood.scale == expected
    assert likelihood.logvar_bounds == (None if variance == "fixed" else (-9, 1))
    words = {"fixed": "standard deviation 0.5", "learned": "one learned variance"}
    assert words.get(variance, "a variance for each pixel") in capsys.readouterr().out
    bits = float(read_metrics(out)[-1]["val_neg_elbo"]) / (16 * 20 * 3 * math.log(2)) + 8
    assert float(read_metrics(out)[-1]["val_bits_per_dim"]) == pytest.approx(bits, rel=1e-5)


def test_per_element_variance_is_initialised_from_the_data(colours):
    images = data.load(str(colours))
    model = runs.new_model(KIND, ResNet(variance="per-element", channels=4), (16, 20, 3), images)
    x = loader.prepare(images.train, model_settings := ResNet(), torch.Generator().manual_seed(0))
    assert model_settings.likelihood == "gaussian"
    with torch.no_grad():
        params = model.decode(torch.randn(20, model.latents))
    _, logvar = params.chunk(2, 1)
    error = (x - x.mean((0, 2, 3), keepdim=True)).square().mean()
    started = reference.bounded_logvar(logvar, model.likelihood.logvar_bounds).exp().mean()
    assert started.item() == pytest.approx(error.item(), rel=0.2)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--sigma", "2"], "--sigma only applies to --variance fixed"),
        (["--likelihood", "dmol", "--variance", "fixed"], "--variance only applies to --likelihood gaussian"),
        (["--components", "3"], "--components only applies to --likelihood dmol"),
        (
            ["--variance", "fixed", "--logvar-max", "1"],
            "--logvar-max only applies to --variance learned or per-element",
        ),
        (["--logvar-max", "inf"], "--logvar-max must be at least -50 and at most 50 and finite, got inf"),
        (["--logvar-min", "3"], "--logvar-min must be below --logvar-max 2, got 3"),
        (["--variance", "each"], "each"),
        (["--sigma", "0", "--variance", "fixed"], "--sigma must be at least 0.0001"),
        (["--init-from", "/nowhere"], "--init-from /nowhere: this path does not exist"),
        (["--size", "32"], "--size only applies to folders and datasets"),
    ],
)
def test_train_with_unused_or_bad_option_fails(colours, tmp_path, capsys, options, words):
    assert train_images("resnet", tmp_path / "run", colours, *options) == 2
    assert words in error_line(capsys)
    assert not (tmp_path / "run").exists()


def test_photos_resizes_folders_but_not_files(pictures, tmp_path, capsys):
    out = tmp_path / "run"
    assert train_images("photos", out, pictures, "--size", "32", "--epochs", "2") == 0
    assert "32 x 32 x 3, 20 training images, 4 validation images" in capsys.readouterr().out
    assert train_images("photos", tmp_path / "other", pictures, "--epochs", "1") == 0
    assert "64 x 64 x 3" in capsys.readouterr().out
    # Images of a file keep their size, whatever the default of --size.
    np.savez(tmp_path / "x.npz", x_train=np.zeros((9, 16, 16, 3), np.uint8))
    assert train_images("photos", tmp_path / "third", tmp_path / "x.npz", "--epochs", "1") == 0
    assert load(tmp_path / "third").settings.size == 0
    assert train_images("photos", tmp_path / "fourth", tmp_path / "x.npz", "--size", "32") == 2


def test_augment_mirrors_and_shifts():
    x = torch.zeros(200, 33, 64, 3, dtype=torch.uint8)
    x[:, 16, 10] = 255
    augmented = loader.augment(x, seeded_generator(0))
    assert augmented.shape == x.shape
    assert augmented.dtype == torch.uint8
    places = (augmented[..., 0] == 255).nonzero()
    assert len(places) == 200, "each image keeps its one bright pixel"
    assert set(places[:, 1].tolist()) == {15, 16, 17}
    columns = set(places[:, 2].tolist())
    assert columns == {8, 9, 10, 11, 12, 51, 52, 53, 54, 55}
    mirrored = (places[:, 2] > 32).float().mean()
    assert 0.3 < mirrored < 0.7
    assert torch.equal(augmented, loader.augment(x, seeded_generator(0)))
    # Uncovered pixels repeat the edge.
    edge = torch.zeros(100, 32, 32, 1, dtype=torch.uint8)
    edge[:, 0] = 7
    moved = loader.augment(edge, seeded_generator(1))
    assert set(moved.unique().tolist()) == {0, 7}
    assert set((moved == 7).sum((1, 2, 3)).tolist()) == {0, 32, 64}


def test_augment_applies_to_training_images_only(colours):
    images = data.load(str(colours))
    for augment in (False, True):
        settings = ResNet(likelihood="discretized-logistic", augment=augment, batch_size=40)
        batches = loader.ImageData(images, settings)
        x, _ = next(iter(batches.val_dataloader()))
        assert torch.equal(x, images.val.permute(0, 3, 1, 2))
        x, _ = next(iter(batches.train_dataloader()))
        originals = {image.numpy().tobytes() for image in images.train.permute(0, 3, 1, 2).contiguous()}
        same = sum(image.numpy().tobytes() in originals for image in x)
        assert (same == 40) is not augment


@pytest.mark.parametrize("recipe", ["conv-lstm", "resnet", "photos"])
def test_resumed_run_equals_uninterrupted_run(colours, tmp_path, recipe):
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    assert train_images(recipe, whole, colours, "--epochs", "3", "--ema", "0.9") == 0
    assert train_images(recipe, stopped, colours, "--epochs", "2", "--ema", "0.9") == 0
    assert cli.main(["resume", str(stopped), "--epochs", "3"]) == 0
    assert_same_run(stopped, whole)
