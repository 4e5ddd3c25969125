"""`fastvae sample` for images: new images, and the best of many."""

import json
import math
import os
import re

import numpy as np
import pytest
import torch
from run_files import read_grid, run_command, train_mlp
from torch import Tensor

from fastvae.train import bounds, image
from fastvae.train.image import evaluate, generate, pictures
from fastvae.train.image.module import ImageVAE as VAE

pytestmark = pytest.mark.usefixtures("one_thread")


GREY = pictures.BACKGROUND


@pytest.mark.parametrize(("n", "columns", "rows"), [(64, 8, 8), (5, 5, 1), (10, 4, 3), (1, 1, 1)])
def test_sample_draws_n_different_images(run, tmp_path, capsys, n, columns, rows):
    out = tmp_path / "new" / "folder" / "new.png"
    text = run_command(capsys, "sample", run, "-n", n, "--out", out)
    assert text == f"{out}: {n} new image{'s' if n > 1 else ''}, decoded from z ~ N(0, I)\n"
    images = read_grid(out, columns, rows).reshape(-1, 64, 64)
    assert (images[n:] == GREY).all()
    assert all(image.std() > 10 for image in images[:n])
    assert len(np.unique(images[:n], axis=0)) == n
    assert os.listdir(out.parent) == ["new.png"]


def test_commands_support_byte_likelihoods(colour_run, tmp_path, capsys):
    """All commands work with a likelihood of bytes."""
    data = colour_run.parent / "colour.npz"
    out = train_mlp(tmp_path / "run", "--likelihood", "dmol", "--components", "2", "--data", str(data))
    assert (out / "reconstructions.png").exists()
    for command in ("sample", "reconstruct", "interpolate"):
        run_command(capsys, command, out)
    first = tmp_path / "first.png"
    run_command(capsys, "inpaint", out, "--out", first)
    run_command(capsys, "inpaint", out, "--out", tmp_path / "second.png")
    assert first.read_bytes() == (tmp_path / "second.png").read_bytes()
    run_command(capsys, "inpaint", out, "--out", tmp_path / "second.png", "--seed", 1)
    assert first.read_bytes() != (tmp_path / "second.png").read_bytes()
    run_command(capsys, "evaluate", out, "--samples", 5)
    results = json.loads((out / "evaluation.json").read_text())
    assert results["bits_per_dim"] == pytest.approx(results["iw_nll"] / (9 * 7 * 3 * math.log(2)))
    opened = image.load(out)
    x = opened.images.val.permute(0, 3, 1, 2).contiguous()
    # The first draw of the evaluation uses seed 0.
    part, _ = bounds.estimate_bounds(opened.model, x, 5)
    assert results["reconstruction"] == pytest.approx(part.reconstruction.mean().item())


def test_sample_with_same_seed_repeats(run, tmp_path, capsys):
    def draw(*options: object) -> bytes:
        run_command(capsys, "sample", run, "-n", 4, *options)
        return (run / "samples.png").read_bytes()

    assert draw() == draw("--seed", 0)
    assert draw() != draw("--seed", 1)
    assert draw() != draw("--temperature", 0.5)
    assert "z ~ N(0, 0.5² I)" in run_command(capsys, "sample", run, "--temperature", 0.5)
    assert draw("--checkpoint", "last", "--temperature", 0) == draw(
        "--checkpoint", "last", "--temperature", 0, "--seed", 1
    )


NUMBER = r"(-?[0-9.]+)"


LIKELIHOOD = (
    rf"ranked by likelihood under the model \(20 importance samples\): from {NUMBER} to {NUMBER} bits per dimension; "
    rf"the worst is {NUMBER}"
)


def nll_per_dimension(opened: image.ImageRun, images: np.ndarray, seed: int) -> np.ndarray:
    """Compute bits per dimension of images (N, H, W, C) in [0, 1], multiples of 1/255, with `bounds` in one batch."""
    x = torch.from_numpy(images).permute(0, 3, 1, 2)
    if opened.settings.likelihood == "bernoulli":
        x = (x >= 0.5).float()
    elif opened.settings.models_bytes:
        x = (x * 255).round().to(torch.uint8).contiguous()
    nll = bounds.estimate_bounds(opened.model, x, 20, seed=seed)[0].nll
    return nll.numpy() / x[0].numel() / math.log(2)


def test_sample_best_ranks_by_likelihood(run, tmp_path, capsys, monkeypatch):
    """The images are those that `sample -n` draws, sorted by likelihood."""
    all_images, best_images = tmp_path / "every.png", tmp_path / "some.png"
    run_command(capsys, "sample", run, "-n", 40, "--seed", 3, "--out", all_images)
    text = run_command(capsys, "sample", run, "--best", 6, "--of", 40, "--seed", 3, "--out", best_images)
    first, second = text.splitlines()
    assert first == f"{best_images}: the best 6 of 40 new images, decoded from z ~ N(0, I), best first"
    match = re.fullmatch(LIKELIHOOD, second)
    assert match

    all_cells = read_grid(all_images, 7, 6).reshape(-1, 64, 64)[:40]
    nll = nll_per_dimension(image.load(run), all_cells[:, ::8, ::8, None] / np.float32(255), seed=3)
    order = nll.argsort()
    assert order.tolist() != list(range(40))
    np.testing.assert_array_equal(read_grid(best_images, 6, 1)[0], all_cells[order[:6]])
    expected = [nll[order[0]], nll[order[5]], nll[order[-1]]]
    assert [float(number) for number in match.groups()] == pytest.approx(expected, abs=1e-4)

    again = best_images.read_bytes()
    run_command(capsys, "sample", run, "--best", 6, "--of", 40, "--seed", 3, "--out", best_images)
    assert best_images.read_bytes() == again
    for module in (generate, evaluate):
        monkeypatch.setattr(module, "val_batch_size", lambda settings, shape: 7)
    assert (
        run_command(capsys, "sample", run, "--best", 6, "--of", 40, "--seed", 3, "--out", best_images) == text
    )
    assert best_images.read_bytes() == again
    # The means are binarised by a threshold, even if training draws the pixels.
    config = run / "config.toml"
    config.write_text(config.read_text().replace('binarize = "threshold"', 'binarize = "dynamic"'))
    assert image.load(run).settings.binarize == "dynamic"
    assert (
        run_command(capsys, "sample", run, "--best", 6, "--of", 40, "--seed", 3, "--out", best_images) == text
    )
    assert best_images.read_bytes() == again
    assert "the best 16 of 256 new images" in run_command(capsys, "sample", run, "--best", 16)
    text = run_command(capsys, "sample", run, "--best", 1, "--of", 1, "--temperature", 0.5)
    assert "the best 1 of 1 new image, decoded from z ~ N(0, 0.5² I)" in text


@pytest.mark.parametrize("likelihood", ["gaussian", "dmol", "discretized-logistic"])
def test_sample_best_ranks_every_likelihood_in_bits_per_dimension(colour_run, tmp_path, likelihood):
    out = colour_run
    if likelihood != "gaussian":
        data = str(colour_run.parent / "colour.npz")
        options = ["--components", "2"] if likelihood == "dmol" else []
        out = train_mlp(tmp_path / "run", "--likelihood", likelihood, *options, "--data", data)
    opened = image.load(out)
    results = generate.sample_best(opened, tmp_path / "best.png", n=3, of=30)
    assert results.unit == " bits per dimension"
    assert results.values.diff().min() >= 0
    z = torch.randn(30, 6, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        x = opened.model.elbo.likelihood.mean(opened.model.decode(z)).clamp(0, 1).mul(255).round().div(255)
    nll = nll_per_dimension(opened, x.permute(0, 2, 3, 1).numpy(), seed=0)
    if likelihood == "gaussian":  # its value is that of the dequantised bytes, which is close
        assert results.values.numpy() == pytest.approx(np.sort(nll) + 8, abs=0.05)
    else:
        assert results.values.numpy() == pytest.approx(np.sort(nll), abs=1e-4)
    # If the model has no bits per dimension, the unit is nats.
    opened.model.bits_offset = None
    nats = generate.sample_best(opened, tmp_path / "best.png", n=3, of=30)
    assert nats.unit == " nats"
    offset = 8 if likelihood == "gaussian" else 0
    per_dimension = nats.values / (9 * 7 * 3 * math.log(2)) + offset
    assert torch.allclose(per_dimension, results.values)


class Critic(VAE):
    """Prefers bright images."""

    def realism(self, images: Tensor) -> Tensor:
        assert images.shape[1:] == (1, 8, 8)
        assert images.min() >= 0
        assert images.max() <= 1
        score = images.mean((1, 2, 3))
        return torch.where(score == score.max(), math.nan, score) if self.fails else score


@pytest.mark.parametrize("fails", [False, True], ids=["", "NaN"])
def test_sample_best_ranks_by_realism_if_the_model_has_it(run, tmp_path, capsys, monkeypatch, fails):
    opened = image.load(run)
    opened.model.__class__ = Critic
    opened.model.fails = fails
    monkeypatch.setattr(image, "load", lambda *args, **kwargs: opened)
    all_images, best_images = tmp_path / "every.png", tmp_path / "some.png"
    run_command(capsys, "sample", run, "-n", 40, "--out", all_images)
    text = run_command(capsys, "sample", run, "--best", 8, "--of", 40, "--out", best_images)
    all_cells = read_grid(all_images, 7, 6).reshape(-1, 64, 64)[:40]
    mean = all_cells.mean((1, 2)) / 255
    order = (-mean).argsort()
    worst = mean[order[-1]]
    if fails:
        order, worst = np.append(order[1:], order[0]), math.nan
    np.testing.assert_array_equal(read_grid(best_images, 8, 1)[0], all_cells[order[:8]])
    match = re.search(r"ranked by the discriminator's score: from (.+) to (.+); the worst is (.+)", text)
    assert match
    expected = [mean[order[0]], mean[order[7]], worst]
    assert [float(number) for number in match.groups()] == pytest.approx(expected, abs=2e-3, nan_ok=True)
