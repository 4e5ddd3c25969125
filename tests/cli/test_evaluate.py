"""`fastvae evaluate` for images: what it measures, writes and prints."""

import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from run_files import run_command, train_mlp
from ssim_by_hand import structural_similarity
from torch import Tensor

from fastvae.train import image

pytestmark = pytest.mark.usefixtures("one_thread")


def reconstruct(opened: image.ImageRun, x: Tensor) -> Tensor:
    with torch.no_grad():
        return opened.model.elbo.likelihood.mean(opened.model.decode(opened.model.encode(x)[0])).clamp(0, 1)


def test_evaluate_measures_psnr_and_ssim_against_the_input(run, colour_run, tmp_path, capsys):
    def evaluate_run(out: Path) -> tuple[float, float | None]:
        text = run_command(capsys, "evaluate", out, "--samples", 2)
        results = json.loads((out / "evaluation.json").read_text())
        assert re.search(rf"reconstructions: PSNR +{results['psnr']:.2f} dB", text)
        similarity = r" \(from 11 x 11 pixels\) +-" if results["ssim"] is None else f" +{results['ssim']:.3f}"
        assert re.search(rf"^ *SSIM{similarity} *$", text, re.MULTILINE)
        return results["psnr"], results["ssim"]

    def ratio(x: Tensor, reconstructions: Tensor) -> float:
        return (-10 * torch.log10((x - reconstructions).double().square().mean((1, 2, 3)))).mean().item()

    # For the Bernoulli, images are compared after binarisation.
    opened = image.load(run)
    images = opened.images.val.permute(0, 3, 1, 2)
    x = (images >= 128).float()
    reconstructions = reconstruct(opened, x)
    assert ratio(x, reconstructions) != pytest.approx(ratio(images / 255, reconstructions), abs=0.5)
    assert evaluate_run(run) == (pytest.approx(ratio(x, reconstructions)), None)
    # For the Gaussian, they are compared with the bytes, although its input has noise of up to one level.
    opened = image.load(colour_run)
    images = opened.images.val.permute(0, 3, 1, 2)
    reconstructions = reconstruct(opened, (images + 0.5) / 256)
    assert evaluate_run(colour_run) == (pytest.approx(ratio(images / 255, reconstructions), abs=0.02), None)
    # For bytes, with one side or both sides large enough for SSIM.
    for height, width in ((16, 10), (12, 13)):
        file = tmp_path / f"{height}.npz"
        x = np.random.default_rng(0).integers(0, 256, (20, height, width, 3), dtype=np.uint8)
        x[:, :6] //= 3
        np.savez(file, x_train=x, x_test=x[:7])
        options = ("--likelihood", "dmol", "--components", "2", "--data", str(file))
        out = train_mlp(tmp_path / f"run{height}", *options)
        opened = image.load(out)
        images = opened.images.val.permute(0, 3, 1, 2).contiguous()
        reconstructions = reconstruct(opened, images)
        found, similar = evaluate_run(out)
        assert found == pytest.approx(ratio(images / 255, reconstructions))
        if width < 11:
            assert similar is None
            continue
        pairs = zip((images / 255).numpy(), reconstructions.numpy(), strict=True)
        similarity = np.mean([structural_similarity(a, b) for a, b in pairs])
        assert similar == pytest.approx(similarity, abs=1e-5)


def test_evaluate_agrees_with_training_metrics(run, capsys):
    text = run_command(capsys, "evaluate", run, "--samples", 20)
    results = json.loads((run / "evaluation.json").read_text())
    assert f"{run}: 299 validation images of scikit-learn's digits; epoch 2 (best)" in text
    for words, value in (
        ("negative ELBO", results["neg_elbo"]),
        ("reconstruction", results["reconstruction"]),
        ("KL", results["kl"]),
        ("NLL, 20 importance samples", results["iw_nll"]),
        ("standard error over images", results["iw_nll_standard_error"]),
    ):
        assert re.search(rf"^ *{words} +{value:.3f}", text, re.MULTILINE), words
    assert re.search(rf"active units +{results['active_units']} of 6", text)
    assert text.endswith(f"The results were written to {run / 'evaluation.json'}\n")

    assert results["images"] == 299
    assert results["samples"] == 20
    assert results["dimensions"] == 64
    assert results["neg_elbo"] == pytest.approx(results["reconstruction"] + results["kl"], rel=1e-9)
    assert 0 < results["iw_nll"] < results["neg_elbo"]
    assert results["bits_per_dim"] == pytest.approx(results["iw_nll"] / 64 / math.log(2))
    assert results["neg_elbo_bits_per_dim"] == pytest.approx(results["neg_elbo"] / 64 / math.log(2))
    # Training measured the same in this epoch, with one draw for each image.
    metrics = (run / "metrics.csv").read_text().splitlines()
    row = dict(zip(metrics[0].split(","), map(float, metrics[2].split(",")), strict=True))
    assert results["neg_elbo"] == pytest.approx(row["val_neg_elbo"], rel=0.01)
    assert results["kl"] == pytest.approx(row["val_kl"], rel=1e-5)
    assert results["active_units"] == row["active_units"]

    first = (run / "evaluation.json").read_bytes()
    run_command(capsys, "evaluate", run, "--samples", 20)
    assert (run / "evaluation.json").read_bytes() == first
    run_command(capsys, "evaluate", run, "--samples", 20, "--seed", 1)
    assert (run / "evaluation.json").read_bytes() != first
    run_command(capsys, "evaluate", run, "--samples", 2, "--limit", 1)
    one = json.loads((run / "evaluation.json").read_text())
    assert (one["images"], one["iw_nll_standard_error"]) == (1, None)


def test_evaluate_adds_8_bits_for_scaled_bytes(colour_run, capsys):
    """The density of (x + u) / 256 is 256 times that of x + u in each dimension, which makes 8 bits."""
    run_command(capsys, "evaluate", colour_run, "--samples", 2)
    results = json.loads((colour_run / "evaluation.json").read_text())
    dimensions = 9 * 7 * 3
    assert results["dimensions"] == dimensions
    assert results["bits_per_dim"] == pytest.approx(results["iw_nll"] / dimensions / math.log(2) + 8)
    assert 1 < results["bits_per_dim"] < 12


def test_commands_accept_another_data_file(run, tmp_path, capsys):
    file = tmp_path / "other.npz"
    x = np.random.default_rng(0).integers(0, 256, (9, 8, 8), dtype=np.uint8)
    np.savez(file, x_train=x, x_test=x[:4])
    assert f"4 validation images of {file.name}; " in run_command(
        capsys, "evaluate", run, "--samples", 2, "--data", file
    )
    assert "4 validation images, " in run_command(capsys, "reconstruct", run, "--data", file)
