"""What is done with a finished run: sample, reconstruct, interpolate, traverse, inpaint, evaluate."""

import json
import math
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from ssim_by_hand import structural_similarity
from torch import Tensor

import fastvae
from fastvae import cli
from fastvae.train import bounds, image
from fastvae.train.image import evaluate, generate, pictures
from fastvae.train.image.module import ImageVAE as VAE

pytestmark = pytest.mark.usefixtures("one_thread")

GREY = pictures.BACKGROUND


def trained(folder: Path, *options: str) -> Path:
    arguments = ["train", "mlp", "--epochs", "2", "--hidden", "50", "--latent", "6", "--accelerator", "cpu"]
    assert cli.main([*arguments, "--out", str(folder), *options]) == 0
    return folder


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """A run on the digits."""
    return trained(tmp_path_factory.mktemp("finished") / "run", "--lr", "0.01")


@pytest.fixture(scope="module")
def colour(tmp_path_factory) -> Path:
    """A run on 30 colour images, with the Gaussian likelihood."""
    folder = tmp_path_factory.mktemp("colour")
    rng = np.random.default_rng(0)
    x = rng.integers(0, 60, (36, 9, 7, 3), dtype=np.uint8)
    x[::2, 1:5] += 180
    np.savez(folder / "colour.npz", x_train=x[:30], x_test=x[30:])
    return trained(folder / "run", "--data", str(folder / "colour.npz"))


@pytest.fixture
def run(finished, tmp_path) -> Path:
    """A copy, to write into."""
    return Path(shutil.copytree(finished, tmp_path / "run"))


def done(capsys, *arguments: object) -> str:
    capsys.readouterr()
    assert cli.main([str(argument) for argument in arguments]) == 0
    text, errors = capsys.readouterr()
    assert errors == ""
    return text


def cells(path: Path, columns: int, rows: int, side: int = 64) -> np.ndarray:
    """The images of a plain grid, (rows, columns, side, side)."""
    with Image.open(path) as picture:
        assert picture.size == (columns * (side + 2) + 2, rows * (side + 2) + 2)
        pixels = np.asarray(picture)
    return np.stack(
        [
            [pixels[2 + r * (side + 2) :, 2 + c * (side + 2) :][:side, :side] for c in range(columns)]
            for r in range(rows)
        ]
    )


# ---------------------------------------------------------------------------------------------------------------------
# Pictures
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "columns", "rows"), [(64, 8, 8), (5, 5, 1), (10, 4, 3), (1, 1, 1)])
def test_sample(run, tmp_path, capsys, n, columns, rows):
    out = tmp_path / "new" / "folder" / "new.png"
    text = done(capsys, "sample", run, "-n", n, "--out", out)
    assert text == f"{out}: {n} new image{'s' if n > 1 else ''}, decoded from z ~ N(0, I)\n"
    images = cells(out, columns, rows).reshape(-1, 64, 64)
    assert (images[n:] == GREY).all()
    assert all(image.std() > 10 for image in images[:n])
    assert len(np.unique(images[:n], axis=0)) == n
    assert os.listdir(out.parent) == ["new.png"]


def test_a_run_on_bytes(colour, tmp_path, capsys):
    """Everything that a run can be asked for, with a likelihood of bytes."""
    data = colour.parent / "colour.npz"
    out = trained(tmp_path / "run", "--likelihood", "dmol", "--components", "2", "--data", str(data))
    assert (out / "reconstructions.png").exists()
    for command in ("sample", "reconstruct", "interpolate"):
        done(capsys, command, out)
    first = tmp_path / "first.png"
    done(capsys, "inpaint", out, "--out", first)
    done(capsys, "inpaint", out, "--out", tmp_path / "second.png")
    assert first.read_bytes() == (tmp_path / "second.png").read_bytes()
    done(capsys, "inpaint", out, "--out", tmp_path / "second.png", "--seed", 1)
    assert first.read_bytes() != (tmp_path / "second.png").read_bytes()
    done(capsys, "evaluate", out, "--samples", 5)
    found = json.loads((out / "evaluation.json").read_text())
    assert found["bits_per_dim"] == pytest.approx(found["iw_nll"] / (9 * 7 * 3 * math.log(2)))
    opened = image.load(out)
    x = opened.images.val.permute(0, 3, 1, 2).contiguous()
    # The evaluation's first draw: that of seed 0.
    part, _ = bounds.estimate_bounds(opened.model, x, 5)
    assert found["reconstruction"] == pytest.approx(part.reconstruction.mean().item())


def test_samples_are_repeatable(run, tmp_path, capsys):
    def draw(*options: object) -> bytes:
        done(capsys, "sample", run, "-n", 4, *options)
        return (run / "samples.png").read_bytes()

    assert draw() == draw("--seed", 0)
    assert draw() != draw("--seed", 1)
    assert draw() != draw("--temperature", 0.5)
    assert "z ~ N(0, 0.5² I)" in done(capsys, "sample", run, "--temperature", 0.5)
    assert draw("--checkpoint", "last", "--temperature", 0) == draw(
        "--checkpoint", "last", "--temperature", 0, "--seed", 1
    )


NUMBER = r"(-?[0-9.]+)"
LIKELIHOOD = (
    rf"ranked by likelihood under the model \(20 importance samples\): from {NUMBER} to {NUMBER} bits per dimension; "
    rf"the worst is {NUMBER}"
)


def nll_per_dimension(opened: image.ImageRun, images: np.ndarray, seed: int) -> np.ndarray:
    """Of images (N, H, W, C) in [0, 1], whole numbers of 255ths: by `evaluate` itself, in one batch."""
    x = torch.from_numpy(images).permute(0, 3, 1, 2)
    if opened.settings.likelihood == "bernoulli":
        x = (x >= 0.5).float()
    elif opened.settings.models_bytes:
        x = (x * 255).round().to(torch.uint8).contiguous()
    nll = bounds.estimate_bounds(opened.model, x, 20, seed=seed)[0].nll
    return nll.numpy() / x[0].numel() / math.log(2)


def test_best_of(run, tmp_path, capsys, monkeypatch):
    """Those of the images that `sample -n` draws whose likelihood is highest, in that order."""
    every, some = tmp_path / "every.png", tmp_path / "some.png"
    done(capsys, "sample", run, "-n", 40, "--seed", 3, "--out", every)
    text = done(capsys, "sample", run, "--best", 6, "--of", 40, "--seed", 3, "--out", some)
    first, second = text.splitlines()
    assert first == f"{some}: the best 6 of 40 new images, decoded from z ~ N(0, I), best first"
    said = re.fullmatch(LIKELIHOOD, second)
    assert said

    all_cells = cells(every, 7, 6).reshape(-1, 64, 64)[:40]
    nll = nll_per_dimension(image.load(run), all_cells[:, ::8, ::8, None] / np.float32(255), seed=3)
    order = nll.argsort()
    assert order.tolist() != list(range(40))
    np.testing.assert_array_equal(cells(some, 6, 1)[0], all_cells[order[:6]])
    expected = [nll[order[0]], nll[order[5]], nll[order[-1]]]
    assert [float(number) for number in said.groups()] == pytest.approx(expected, abs=1e-4)

    again = some.read_bytes()
    done(capsys, "sample", run, "--best", 6, "--of", 40, "--seed", 3, "--out", some)
    assert some.read_bytes() == again
    for module in (generate, evaluate):
        monkeypatch.setattr(module, "val_batch_size", lambda settings, shape: 7)
    assert done(capsys, "sample", run, "--best", 6, "--of", 40, "--seed", 3, "--out", some) == text
    assert some.read_bytes() == again
    # Whatever the run was trained on, a mean is brought to zeros and ones without a draw.
    config = run / "config.toml"
    config.write_text(config.read_text().replace('binarize = "threshold"', 'binarize = "dynamic"'))
    assert image.load(run).settings.binarize == "dynamic"
    assert done(capsys, "sample", run, "--best", 6, "--of", 40, "--seed", 3, "--out", some) == text
    assert some.read_bytes() == again
    assert "the best 16 of 256 new images" in done(capsys, "sample", run, "--best", 16)
    text = done(capsys, "sample", run, "--best", 1, "--of", 1, "--temperature", 0.5)
    assert "the best 1 of 1 new image, decoded from z ~ N(0, 0.5² I)" in text


@pytest.mark.parametrize("likelihood", ["gaussian", "dmol", "discretized-logistic"])
def test_best_of_bytes(colour, tmp_path, likelihood):
    out = colour
    if likelihood != "gaussian":
        data = str(colour.parent / "colour.npz")
        options = ["--components", "2"] if likelihood == "dmol" else []
        out = trained(tmp_path / "run", "--likelihood", likelihood, *options, "--data", data)
    opened = image.load(out)
    found = generate.sample_best(opened, tmp_path / "best.png", n=3, of=30)
    assert found.unit == " bits per dimension"
    assert found.values.diff().min() >= 0
    z = torch.randn(30, 6, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        x = opened.model.elbo.likelihood.mean(opened.model.decode(z)).clamp(0, 1).mul(255).round().div(255)
    nll = nll_per_dimension(opened, x.permute(0, 2, 3, 1).numpy(), seed=0)
    if likelihood == "gaussian":  # not of the dequantised bytes, but near
        assert found.values.numpy() == pytest.approx(np.sort(nll) + 8, abs=0.05)
    else:
        assert found.values.numpy() == pytest.approx(np.sort(nll), abs=1e-4)
    # Without bits per dimension: nats.
    opened.model.bits_offset = None
    nats = generate.sample_best(opened, tmp_path / "best.png", n=3, of=30)
    assert nats.unit == " nats"
    offset = 8 if likelihood == "gaussian" else 0
    per_dimension = nats.values / (9 * 7 * 3 * math.log(2)) + offset
    assert torch.allclose(per_dimension, found.values)


class Critic(VAE):
    """Holds bright images for real."""

    def realism(self, images: Tensor) -> Tensor:
        assert images.shape[1:] == (1, 8, 8)
        assert images.min() >= 0
        assert images.max() <= 1
        score = images.mean((1, 2, 3))
        return torch.where(score == score.max(), math.nan, score) if self.fails else score


@pytest.mark.parametrize("fails", [False, True], ids=["", "NaN"])
def test_best_by_a_measure_of_the_models_own(run, tmp_path, capsys, monkeypatch, fails):
    opened = image.load(run)
    opened.model.__class__ = Critic
    opened.model.fails = fails
    monkeypatch.setattr(image, "load", lambda *args, **kwargs: opened)
    every, some = tmp_path / "every.png", tmp_path / "some.png"
    done(capsys, "sample", run, "-n", 40, "--out", every)
    text = done(capsys, "sample", run, "--best", 8, "--of", 40, "--out", some)
    all_cells = cells(every, 7, 6).reshape(-1, 64, 64)[:40]
    mean = all_cells.mean((1, 2)) / 255
    order = (-mean).argsort()
    worst = mean[order[-1]]
    if fails:
        order, worst = np.append(order[1:], order[0]), math.nan
    np.testing.assert_array_equal(cells(some, 8, 1)[0], all_cells[order[:8]])
    said = re.search(r"ranked by the discriminator's score: from (.+) to (.+); the worst is (.+)", text)
    assert said
    expected = [mean[order[0]], mean[order[7]], worst]
    assert [float(number) for number in said.groups()] == pytest.approx(expected, abs=2e-3, nan_ok=True)


def test_reconstruct(run, capsys):
    text = done(capsys, "reconstruct", run, "-n", 13)
    out = run / "reconstructions.png"
    assert text == f"{out}: 13 validation images, each above its reconstruction\n"
    opened = image.load(run)
    with Image.open(out) as picture:
        assert picture.size == (10 * 66 + 2, 4 * 66 + 2 + 8)
        pixels = np.asarray(picture)
    original = opened.images.val[12, ..., 0].numpy().repeat(8, 0).repeat(8, 1)
    below = 2 + 2 * 66 + 8  # the second pair of rows, apart from the first
    np.testing.assert_array_equal(pixels[below : below + 64, 2 + 2 * 66 :][:, :64], original)
    with torch.no_grad():
        x = (opened.images.val[12:13] >= 128).float().permute(0, 3, 1, 2)
        shown = torch.sigmoid(opened.model.decode(opened.model.encode(x)[0]))[0, 0].numpy()
    got = pixels[below + 66 : below + 66 + 64 : 8, 2 + 2 * 66 :][:, :64:8]
    np.testing.assert_allclose(got, shown * 255, atol=1)
    assert (pixels[below : below + 64, 2 + 3 * 66 :] == GREY).all()


def test_no_more_than_there_are(colour, tmp_path, capsys):
    out = tmp_path / "few.png"
    assert f"{out}: 6 validation images, " in done(capsys, "reconstruct", colour, "--out", out)
    assert f"{out}: 6 validation images, " in done(capsys, "inpaint", colour, "--out", out)
    with Image.open(out) as picture:
        assert picture.mode == "RGB"
    assert "0 to 1, 2 to 3, 4 to 5" in done(capsys, "interpolate", colour, "--out", out)


def test_interpolate(run, capsys):
    out = run / "interpolations.png"
    text = done(capsys, "interpolate", run, "--from", 3, "--to", 5, "--from", 298, "--to", 0, "--steps", 7)
    ways = "3 to 5, 298 to 0"
    assert text == f"{out}: validation images {ways}, with 7 decoded images between the two originals\n"
    with Image.open(out) as picture:
        assert picture.size == (9 * 66 + 2 + 16, 2 * 66 + 2)
        pixels = np.asarray(picture)
    val = image.load(run).images.val[..., 0].numpy()
    np.testing.assert_array_equal(pixels[2:66:8, 2:66:8], val[3])
    np.testing.assert_array_equal(pixels[2:66:8, -66:-2:8], val[5])
    np.testing.assert_array_equal(pixels[68:132:8, -66:-2:8], val[0])
    # The ends of the way are the reconstructions.
    done(capsys, "reconstruct", run, "-n", 6)
    with Image.open(run / "reconstructions.png") as picture:
        recon = np.asarray(picture)[68:132]
    np.testing.assert_array_equal(pixels[2:66, 2 + 66 + 8 :][:, :64], recon[:, 2 + 3 * 66 :][:, :64])
    np.testing.assert_array_equal(pixels[2:66, -66 - 8 - 66 :][:, :64], recon[:, 2 + 5 * 66 :][:, :64])
    text = done(capsys, "interpolate", run)
    assert "12 to 13, 14 to 15, with 10 decoded" in text


def test_traverse(run, capsys):
    text = done(capsys, "traverse", run, "--image", 4, "--steps", 5)
    out = run / "traversals.png"
    dimensions = "6 dimensions, the most active first"
    assert text == f"{out}: validation image 4, varied from -3 to 3 along {dimensions}\n"
    with Image.open(out) as picture:
        width, height = picture.size
        assert height == 6 * 66 + 2
        assert width > 5 * 66 + 2  # room for the labels
    opened = image.load(run)
    order = generate.traverse(opened, run / "again.png", image=4, steps=5)
    assert (run / "again.png").read_bytes() == out.read_bytes()
    with torch.no_grad():
        x = (opened.images.val >= 128).float().permute(0, 3, 1, 2)
        mu = opened.model.encode(x)[0]
    assert order == mu.var(0).argsort(descending=True).tolist()
    assert "along 2 dimensions, " in done(capsys, "traverse", run, "-n", 2)
    # The row of the most active dimension, and that of the least.
    with Image.open(run / "again.png") as picture:
        pixels = np.asarray(picture)
    for row in (0, 5):
        z = mu[4].repeat(5, 1)
        z[:, order[row]] = torch.linspace(-3, 3, 5)
        with torch.no_grad():
            expected = torch.sigmoid(opened.model.decode(z))[:, 0].permute(1, 0, 2) * 255  # side by side
        images = pixels[2 + row * 66 :, width - 5 * 66 :][:64:8]
        got = np.stack([images[:, c * 66 :][:, :64:8] for c in range(5)], 1)
        np.testing.assert_allclose(got, expected, atol=1)


@pytest.mark.parametrize(
    ("mask", "box"),
    [
        ("left", (0, 0, 4, 8)),
        ("right", (4, 0, 8, 8)),
        ("top", (0, 0, 8, 4)),
        ("bottom", (0, 4, 8, 8)),
        ("center", (2, 2, 6, 6)),
        ("1,0,8,3", (1, 0, 8, 3)),
    ],
)
def test_inpaint(run, capsys, mask, box):
    text = done(capsys, "inpaint", run, "--mask", mask, "-n", 4, "--steps", 3)
    out = run / "inpainting.png"
    assert text == f"{out}: 4 validation images, each masked, inpainted and as it was\n"
    masked, filled, whole = cells(out, 4, 3)[:, :, ::8, ::8]
    np.testing.assert_array_equal(whole, image.load(run).images.val[:4, ..., 0].numpy())
    x0, y0, x1, y1 = box
    hidden = np.zeros((8, 8), bool)
    hidden[y0:y1, x0:x1] = True
    assert (masked[:, hidden] == GREY).all()
    np.testing.assert_array_equal(masked[:, ~hidden], whole[:, ~hidden])
    np.testing.assert_array_equal(filled[:, ~hidden], whole[:, ~hidden])
    assert (filled[:, hidden] != whole[:, hidden]).any()


def test_inpainting_is_repeatable(run, capsys):
    def draw(*options: object) -> bytes:
        done(capsys, "inpaint", run, "-n", 4, "--steps", 3, *options)
        return (run / "inpainting.png").read_bytes()

    assert draw() == draw()
    assert draw() != draw("--seed", 1)


def test_inpainting_is_what_the_model_makes_of_it(run):
    opened = image.load(run)
    x = (opened.images.val[:4] >= 128).float().permute(0, 3, 1, 2)
    x[..., 4:].uniform_(generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = torch.sigmoid(opened.model.decode(opened.model.encode(x)[0]))[:, 0] * 255
    found = {}
    for steps in (1, 2):
        generate.inpaint(opened, run / "inpainting.png", steps=steps, n=4)
        found[steps] = cells(run / "inpainting.png", 4, 3)[1, :, ::8, ::8][..., 4:]
    np.testing.assert_allclose(found[1], expected[..., 4:], atol=1)
    assert (found[1] != found[2]).any()


def test_mask_of_an_odd_size():
    assert generate.box("left", 9, 7) == (0, 0, 3, 9)
    assert generate.box("right", 9, 7) == (4, 0, 7, 9)
    assert generate.box("center", 9, 7) == (1, 2, 6, 7)


# ---------------------------------------------------------------------------------------------------------------------
# Evaluation
# ---------------------------------------------------------------------------------------------------------------------


def reconstructed(opened: image.ImageRun, x: Tensor) -> Tensor:
    with torch.no_grad():
        return opened.model.elbo.likelihood.mean(opened.model.decode(opened.model.encode(x)[0])).clamp(0, 1)


def test_reconstructions_are_measured_on_what_was_to_be_reconstructed(run, colour, tmp_path, capsys):
    def measured(out: Path) -> tuple[float, float | None]:
        text = done(capsys, "evaluate", out, "--samples", 2)
        written = json.loads((out / "evaluation.json").read_text())
        assert re.search(rf"reconstructions: PSNR +{written['psnr']:.2f} dB", text)
        similarity = r" \(from 11 x 11 pixels\) +-" if written["ssim"] is None else f" +{written['ssim']:.3f}"
        assert re.search(rf"^ *SSIM{similarity} *$", text, re.MULTILINE)
        return written["psnr"], written["ssim"]

    def ratio(x: Tensor, shown: Tensor) -> float:
        return (-10 * torch.log10((x - shown).double().square().mean((1, 2, 3)))).mean().item()

    # The Bernoulli: zeros and ones, not the grey ones that they were made of.
    opened = image.load(run)
    images = opened.images.val.permute(0, 3, 1, 2)
    x = (images >= 128).float()
    shown = reconstructed(opened, x)
    assert ratio(x, shown) != pytest.approx(ratio(images / 255, shown), abs=0.5)
    assert measured(run) == (pytest.approx(ratio(x, shown)), None)
    # The Gaussian: the bytes, though it sees them with noise. All of those are within a bytes' width.
    opened = image.load(colour)
    images = opened.images.val.permute(0, 3, 1, 2)
    shown = reconstructed(opened, (images + 0.5) / 256)
    assert measured(colour) == (pytest.approx(ratio(images / 255, shown), abs=0.02), None)
    # Bytes, and sides of which one is large enough and both are.
    for height, width in ((16, 10), (12, 13)):
        file = tmp_path / f"{height}.npz"
        x = np.random.default_rng(0).integers(0, 256, (20, height, width, 3), dtype=np.uint8)
        x[:, :6] //= 3
        np.savez(file, x_train=x, x_test=x[:7])
        options = ("--likelihood", "dmol", "--components", "2", "--data", str(file))
        out = trained(tmp_path / f"run{height}", *options)
        opened = image.load(out)
        images = opened.images.val.permute(0, 3, 1, 2).contiguous()
        shown = reconstructed(opened, images)
        found, similar = measured(out)
        assert found == pytest.approx(ratio(images / 255, shown))
        if width < 11:
            assert similar is None
            continue
        pairs = zip((images / 255).numpy(), shown.numpy(), strict=True)
        similarity = np.mean([structural_similarity(a, b) for a, b in pairs])
        assert similar == pytest.approx(similarity, abs=1e-5)


def test_evaluate(run, capsys):
    text = done(capsys, "evaluate", run, "--samples", 20)
    written = json.loads((run / "evaluation.json").read_text())
    assert f"{run}: 299 validation images of scikit-learn's digits; epoch 2 (best)" in text
    for words, value in (
        ("negative ELBO", written["neg_elbo"]),
        ("reconstruction", written["reconstruction"]),
        ("KL", written["kl"]),
        ("NLL, 20 importance samples", written["iw_nll"]),
        ("standard error over images", written["iw_nll_standard_error"]),
    ):
        assert re.search(rf"^ *{words} +{value:.3f}", text, re.MULTILINE), words
    assert re.search(rf"active units +{written['active_units']} of 6", text)
    assert text.endswith(f"The results were written to {run / 'evaluation.json'}\n")

    assert written["images"] == 299
    assert written["samples"] == 20
    assert written["dimensions"] == 64
    assert written["neg_elbo"] == pytest.approx(written["reconstruction"] + written["kl"], rel=1e-9)
    assert 0 < written["iw_nll"] < written["neg_elbo"]
    assert written["bits_per_dim"] == pytest.approx(written["iw_nll"] / 64 / math.log(2))
    assert written["neg_elbo_bits_per_dim"] == pytest.approx(written["neg_elbo"] / 64 / math.log(2))
    # What training measured in this epoch, with one draw for each image.
    metrics = (run / "metrics.csv").read_text().splitlines()
    row = dict(zip(metrics[0].split(","), map(float, metrics[2].split(",")), strict=True))
    assert written["neg_elbo"] == pytest.approx(row["val_neg_elbo"], rel=0.01)
    assert written["kl"] == pytest.approx(row["val_kl"], rel=1e-5)
    assert written["active_units"] == row["active_units"]

    first = (run / "evaluation.json").read_bytes()
    done(capsys, "evaluate", run, "--samples", 20)
    assert (run / "evaluation.json").read_bytes() == first
    done(capsys, "evaluate", run, "--samples", 20, "--seed", 1)
    assert (run / "evaluation.json").read_bytes() != first
    done(capsys, "evaluate", run, "--samples", 2, "--limit", 1)
    one = json.loads((run / "evaluation.json").read_text())
    assert (one["images"], one["iw_nll_standard_error"]) == (1, None)


def test_bits_of_bytes(colour, capsys):
    """The density of (x + u) / 256 is 256 times that of x + u in each dimension: 8 bits more."""
    done(capsys, "evaluate", colour, "--samples", 2)
    written = json.loads((colour / "evaluation.json").read_text())
    dimensions = 9 * 7 * 3
    assert written["dimensions"] == dimensions
    assert written["bits_per_dim"] == pytest.approx(written["iw_nll"] / dimensions / math.log(2) + 8)
    assert 1 < written["bits_per_dim"] < 12


def test_another_data_file(run, tmp_path, capsys):
    file = tmp_path / "other.npz"
    x = np.random.default_rng(0).integers(0, 256, (9, 8, 8), dtype=np.uint8)
    np.savez(file, x_train=x, x_test=x[:4])
    assert f"4 validation images of {file.name}; " in done(
        capsys, "evaluate", run, "--samples", 2, "--data", file
    )
    assert "4 validation images, " in done(capsys, "reconstruct", run, "--data", file)


# ---------------------------------------------------------------------------------------------------------------------
# Bad input: one line, exit code 2, nothing written
# ---------------------------------------------------------------------------------------------------------------------


def refused(capsys, *arguments: object) -> str:
    """The one line that a refused command leaves."""
    capsys.readouterr()
    assert cli.main([str(argument) for argument in arguments]) == 2
    text, errors = capsys.readouterr()
    assert text == ""
    assert errors.startswith("fastvae: ")
    assert errors.count("\n") == 1
    return errors


BAD = [
    (["sample", "-n", "0"], "-n must be between 1 and 10000, got 0"),
    (["sample", "-n", "20000"], "-n must be between 1 and 10000, got 20000"),
    (["sample", "-n", "some"], "'-n'"),
    (["sample", "--temperature", "-1"], "--temperature must be at least 0, got -1"),
    (["sample", "--temperature", "nan"], "--temperature must be at least 0, got nan"),
    (["sample", "--seed", "-1"], "--seed must be between 0 and 4294967295, got -1"),
    (["sample", "--checkpoint", "first"], "'first' is not one of 'best', 'last'"),
    (["sample", "--out", "{tmp}/new.jpg"], "must end in .png"),
    (["sample", "--out", "{tmp}/file/new.png"], "cannot be written to: it is a file"),
    (["sample", "--out", "{tmp}/folder.png"], "cannot be written: it is a folder"),
    (["sample", "--best", "0"], "--best must be between 1 and 256 (--of), got 0"),
    (["sample", "--best", "300"], "--best must be between 1 and 256 (--of), got 300"),
    (["sample", "--best", "9", "--of", "8"], "--best must be between 1 and 8 (--of), got 9"),
    (["sample", "--best", "1", "--of", "0"], "--of must be between 1 and 10000, got 0"),
    (["sample", "--best", "1", "--of", "10001"], "--of must be between 1 and 10000, got 10001"),
    (["sample", "--best", "4", "-n", "4"], "-n and --best cannot be used together"),
    (["sample", "--of", "8"], "--of only applies with --best; give the number of images to keep, out of 8"),
    (["sample", "--best", "4", "--seed", "-1"], "--seed must be between 0 and 4294967295, got -1"),
    (["sample", "--best", "4", "--temperature", "-1"], "--temperature must be at least 0, got -1"),
    (["reconstruct", "-n", "0"], "-n must be between 1 and 10000, got 0"),
    (["reconstruct", "--data", "{tmp}/none.npz"], "none.npz: no such file"),
    (["reconstruct", "--data", "{tmp}/large.npz"], "the images must be 8 x 8 as in {run}, got 9 x 7"),
    (["reconstruct", "--data", "{tmp}/colour.npz"], "the images must be 8 x 8 as in {run}, got 8 x 8 x 3"),
    (
        ["interpolate", "--from", "0", "--to", "299"],
        "--to must be between 0 and 298, as there are 299 validation images, got 299",
    ),
    (
        ["interpolate", "--from", "-1", "--to", "2"],
        "--from must be between 0 and 298, as there are 299 validation images, got -1",
    ),
    (["interpolate", "--from", "0"], "--from and --to must be given equally often, got 1 and 0 of them"),
    (["interpolate", "--steps", "1"], "--steps must be between 2 and 100, got 1"),
    (
        ["traverse", "--image", "1000"],
        "--image must be between 0 and 298, as there are 299 validation images, got 1000",
    ),
    (["traverse", "-n", "0"], "-n must be at least 1, got 0"),
    (["traverse", "--steps", "101"], "--steps must be between 2 and 100, got 101"),
    (["inpaint", "--mask", "middle"], "--mask must be one of left, right, top, bottom, center, or a box"),
    (["inpaint", "--mask", "1,2,3"], "or a box x0,y0,x1,y1 in pixels, got '1,2,3'"),
    (
        ["inpaint", "--mask", "0,0,9,8"],
        "--mask 0,0,9,8: the box must lie inside the image of 8 x 8 pixels (width x height)",
    ),
    (["inpaint", "--mask", "-1,0,4,4"], "--mask -1,0,4,4: the box must lie inside"),
    (["inpaint", "--mask", "4,4,4,8"], "--mask 4,4,4,8: the box must lie inside"),
    (["inpaint", "--steps", "0"], "--steps must be at least 1, got 0"),
    (["inpaint", "-n", "0"], "-n must be between 1 and 1000, got 0"),
    (["evaluate", "--samples", "0"], "--samples must be at least 1, got 0"),
    (["evaluate", "--limit", "0"], "--limit must be at least 1, got 0"),
    (["evaluate", "--seed", "-5"], "--seed must be between 0 and 4294967295, got -5"),
]


@pytest.mark.parametrize(("arguments", "words"), BAD, ids=[" ".join(arguments) for arguments, _ in BAD])
def test_bad_arguments(finished, tmp_path, capsys, arguments, words):
    (tmp_path / "file").write_text("text")
    (tmp_path / "folder.png").mkdir()
    np.savez(tmp_path / "large.npz", x_train=np.zeros((4, 9, 7), np.uint8))
    np.savez(tmp_path / "colour.npz", x_train=np.zeros((4, 8, 8, 3), np.uint8))
    command, *options = arguments
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("*")}
    given = len(os.listdir(tmp_path))
    line = refused(capsys, command, finished, *(option.format(tmp=tmp_path) for option in options))
    assert words.format(run=finished) in line
    assert {path: path.stat().st_mtime_ns for path in finished.rglob("*")} == before
    assert len(os.listdir(tmp_path)) == given


COMMANDS = ("sample", "reconstruct", "interpolate", "traverse", "inpaint", "evaluate")


@pytest.mark.parametrize("command", COMMANDS)
def test_what_is_no_run(tmp_path, capsys, command):
    assert f"{tmp_path / 'none'}: no such run directory" in refused(capsys, command, tmp_path / "none")
    assert "not a run directory" in refused(capsys, command, tmp_path)
    assert "RUN" in refused(capsys, command)
    assert os.listdir(tmp_path) == []


def test_checkpoint_of_another_likelihood(run, capsys):
    config = run / "config.toml"
    config.write_text(config.read_text().replace('likelihood = "bernoulli"', 'likelihood = "gaussian"'))
    line = refused(capsys, "evaluate", run)
    assert "this checkpoint belongs to another model: `elbo.likelihood.logvar` is missing" in line


def test_evaluation_that_cannot_be_written(run, capsys):
    (run / "evaluation.json").mkdir()
    assert "evaluation.json: cannot be written: it is a folder" in refused(capsys, "evaluate", run)


def test_interrupted(run, capsys, monkeypatch):
    def stop(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    for command, module, name in (
        ("evaluate", bounds, "estimate_bounds"),
        ("inpaint", pictures, "save_grid"),
    ):
        monkeypatch.setattr(module, name, stop)
        capsys.readouterr()
        assert cli.main([command, str(run)]) == 130
        assert capsys.readouterr().err == "fastvae: interrupted\n"
    assert not (run / "evaluation.json").exists()
    assert not (run / "inpainting.png").exists()


def test_interrupted_before_a_command_begins(capsys, monkeypatch):
    def stop() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "app", stop)
    assert cli.main(["sample", "run"]) == 130
    assert capsys.readouterr().err == "fastvae: interrupted\n"


def test_version(capsys):
    assert done(capsys, "--version") == f"fastvae {fastvae.__version__}\n"
    assert "--version" in done(capsys, "--help")


def test_help(capsys):
    for command in COMMANDS:
        text = done(capsys, command, "--help")
        assert "RUN" in text
        assert "--checkpoint" in text
