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
from torch import Tensor, nn

import fastvae
from fastvae import cli
from fastvae.recipes import generate
from fastvae.training import evaluate, pictures, runs
from fastvae.training.data import InputError
from fastvae.training.module import VAE

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
    opened = runs.load(out)
    x = opened.images.held_out.permute(0, 3, 1, 2).contiguous()
    # The evaluation's first draw: that of seed 0.
    part, _ = evaluate.bounds(opened.model, x, 5)
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
    rf"the worst drawn: {NUMBER}"
)


def nll_per_dimension(opened: runs.Run, images: np.ndarray, seed: int) -> np.ndarray:
    """Of images (N, H, W, C) in [0, 1], whole numbers of 255ths: by `evaluate` itself, in one batch."""
    x = torch.from_numpy(images).permute(0, 3, 1, 2)
    if opened.settings.likelihood == "bernoulli":
        x = (x >= 0.5).float()
    elif opened.settings.of_bytes:
        x = (x * 255).round().to(torch.uint8).contiguous()
    nll = evaluate.bounds(opened.model, x, 20, seed=seed)[0].nll
    return nll.numpy() / x[0].numel() / math.log(2)


def test_best_of(run, tmp_path, capsys, monkeypatch):
    """Those of the images that `sample -n` draws whose likelihood is highest, in that order."""
    every, some = tmp_path / "every.png", tmp_path / "some.png"
    done(capsys, "sample", run, "-n", 40, "--seed", 3, "--out", every)
    text = done(capsys, "sample", run, "--best", 6, "--of", 40, "--seed", 3, "--out", some)
    first, second = text.splitlines()
    assert first == f"{some}: the best 6 of 40 new images, decoded from z ~ N(0, I), the best first"
    said = re.fullmatch(LIKELIHOOD, second)
    assert said

    all_cells = cells(every, 7, 6).reshape(-1, 64, 64)[:40]
    nll = nll_per_dimension(runs.load(run), all_cells[:, ::8, ::8, None] / np.float32(255), seed=3)
    order = nll.argsort()
    assert order.tolist() != list(range(40))
    np.testing.assert_array_equal(cells(some, 6, 1)[0], all_cells[order[:6]])
    expected = [nll[order[0]], nll[order[5]], nll[order[-1]]]
    assert [float(number) for number in said.groups()] == pytest.approx(expected, abs=1e-4)

    again = some.read_bytes()
    done(capsys, "sample", run, "--best", 6, "--of", 40, "--seed", 3, "--out", some)
    assert some.read_bytes() == again
    for module in (generate, evaluate):
        monkeypatch.setattr(module, "held_out_batch", lambda settings, shape: 7)
    assert done(capsys, "sample", run, "--best", 6, "--of", 40, "--seed", 3, "--out", some) == text
    assert some.read_bytes() == again
    # Whatever the run was trained on, a mean is brought to zeros and ones without a draw.
    config = run / "config.toml"
    config.write_text(config.read_text().replace('binarize = "threshold"', 'binarize = "dynamic"'))
    assert runs.load(run).settings.binarize == "dynamic"
    assert done(capsys, "sample", run, "--best", 6, "--of", 40, "--seed", 3, "--out", some) == text
    assert some.read_bytes() == again
    assert "the best 16 of 256 new images" in done(capsys, "sample", run, "--best", 16)
    text = done(capsys, "sample", run, "--best", 1, "--of", 1, "--temperature", 0.5)
    assert "the best 1 of 1 new image, decoded from z ~ N(0, 0.5² I)" in text


@pytest.mark.parametrize("likelihood", ["gaussian", "dmol", "dlogistic"])
def test_best_of_bytes(colour, tmp_path, likelihood):
    out = colour
    if likelihood != "gaussian":
        data = str(colour.parent / "colour.npz")
        options = ["--components", "2"] if likelihood == "dmol" else []
        out = trained(tmp_path / "run", "--likelihood", likelihood, *options, "--data", data)
    opened = runs.load(out)
    found = generate.best(opened, tmp_path / "best.png", n=3, of=30)
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
    nats = generate.best(opened, tmp_path / "best.png", n=3, of=30)
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
    opened = runs.load(run)
    opened.model.__class__ = Critic
    opened.model.fails = fails
    monkeypatch.setattr(runs, "load", lambda *args, **kwargs: opened)
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
    said = re.search(r"ranked by the discriminator's score: from (.+) to (.+); the worst drawn: (.+)", text)
    assert said
    expected = [mean[order[0]], mean[order[7]], worst]
    assert [float(number) for number in said.groups()] == pytest.approx(expected, abs=2e-3, nan_ok=True)


def test_reconstruct(run, capsys):
    text = done(capsys, "reconstruct", run, "-n", 13)
    out = run / "reconstructions.png"
    assert text == f"{out}: 13 held-out images, each above what the model makes of it\n"
    opened = runs.load(run)
    with Image.open(out) as picture:
        assert picture.size == (10 * 66 + 2, 4 * 66 + 2 + 8)
        pixels = np.asarray(picture)
    original = opened.images.held_out[12, ..., 0].numpy().repeat(8, 0).repeat(8, 1)
    below = 2 + 2 * 66 + 8  # the second pair of rows, apart from the first
    np.testing.assert_array_equal(pixels[below : below + 64, 2 + 2 * 66 :][:, :64], original)
    with torch.no_grad():
        x = (opened.images.held_out[12:13] >= 128).float().permute(0, 3, 1, 2)
        shown = torch.sigmoid(opened.model.decode(opened.model.encode(x)[0]))[0, 0].numpy()
    got = pixels[below + 66 : below + 66 + 64 : 8, 2 + 2 * 66 :][:, :64:8]
    np.testing.assert_allclose(got, shown * 255, atol=1)
    assert (pixels[below : below + 64, 2 + 3 * 66 :] == GREY).all()


def test_no_more_than_there_are(colour, tmp_path, capsys):
    out = tmp_path / "few.png"
    assert f"{out}: 6 held-out images, " in done(capsys, "reconstruct", colour, "--out", out)
    assert f"{out}: 6 held-out images: " in done(capsys, "inpaint", colour, "--out", out)
    with Image.open(out) as picture:
        assert picture.mode == "RGB"
    assert "0 to 1, 2 to 3, 4 to 5" in done(capsys, "interpolate", colour, "--out", out)


def test_interpolate(run, capsys):
    out = run / "interpolations.png"
    text = done(capsys, "interpolate", run, "--from", 3, "--to", 5, "--from", 298, "--to", 0, "--steps", 7)
    ways = "held-out images 3 to 5, 298 to 0"
    assert text == f"{out}: {ways}; 7 decoded on the way, between the two originals\n"
    with Image.open(out) as picture:
        assert picture.size == (9 * 66 + 2 + 16, 2 * 66 + 2)
        pixels = np.asarray(picture)
    held_out = runs.load(run).images.held_out[..., 0].numpy()
    np.testing.assert_array_equal(pixels[2:66:8, 2:66:8], held_out[3])
    np.testing.assert_array_equal(pixels[2:66:8, -66:-2:8], held_out[5])
    np.testing.assert_array_equal(pixels[68:132:8, -66:-2:8], held_out[0])
    # The ends of the way are the reconstructions.
    done(capsys, "reconstruct", run, "-n", 6)
    with Image.open(run / "reconstructions.png") as picture:
        recon = np.asarray(picture)[68:132]
    np.testing.assert_array_equal(pixels[2:66, 2 + 66 + 8 :][:, :64], recon[:, 2 + 3 * 66 :][:, :64])
    np.testing.assert_array_equal(pixels[2:66, -66 - 8 - 66 :][:, :64], recon[:, 2 + 5 * 66 :][:, :64])
    text = done(capsys, "interpolate", run)
    assert "12 to 13, 14 to 15; 10 decoded" in text


def test_traverse(run, capsys):
    text = done(capsys, "traverse", run, "--image", 4, "--steps", 5)
    out = run / "traversals.png"
    rows = "6 dimensions, the most active first, each going from -3 to 3"
    assert text == f"{out}: held-out image 4, varied along {rows}\n"
    with Image.open(out) as picture:
        width, height = picture.size
        assert height == 6 * 66 + 2
        assert width > 5 * 66 + 2  # room for the labels
    opened = runs.load(run)
    order = generate.traverse(opened, run / "again.png", image=4, steps=5)
    assert (run / "again.png").read_bytes() == out.read_bytes()
    with torch.no_grad():
        x = (opened.images.held_out >= 128).float().permute(0, 3, 1, 2)
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
    assert text == f"{out}: 4 held-out images: masked, filled by the model, whole\n"
    masked, filled, whole = cells(out, 4, 3)[:, :, ::8, ::8]
    np.testing.assert_array_equal(whole, runs.load(run).images.held_out[:4, ..., 0].numpy())
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
    opened = runs.load(run)
    x = (opened.images.held_out[:4] >= 128).float().permute(0, 3, 1, 2)
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


def linear_gaussian(orthogonal: bool) -> tuple[VAE, Tensor, Tensor]:
    """A model whose likelihood has a closed form, data from it, and their log p(x).

    z ~ N(0, I), x | z ~ N(W z + b, s^2 I), so x ~ N(b, W W' + s^2 I). The encoder has the mean of the true posterior
    and the best diagonal variances. With orthogonal columns of W the posterior is diagonal, and so this is it exactly.
    """
    latents, dimensions, scale = 3, 8, 0.6
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(dimensions, latents, generator=generator)
    if orthogonal:
        weight = torch.linalg.qr(weight)[0] * torch.tensor([0.5, 1.0, 2.0])
    bias = torch.randn(dimensions, generator=generator)
    precision = torch.eye(latents) + weight.T @ weight / scale**2

    encoder, decoder = nn.Linear(dimensions, 2 * latents), nn.Linear(latents, dimensions)
    with torch.no_grad():
        mean = torch.linalg.solve(precision, weight.T) / scale**2
        encoder.weight.copy_(torch.cat([mean, torch.zeros_like(mean)]))
        encoder.bias.copy_(torch.cat([-mean @ bias, -precision.diagonal().log()]))
        decoder.weight.copy_(weight)
        decoder.bias.copy_(bias)
    elbo = fastvae.ELBO(fastvae.likelihoods.Gaussian(scale))
    model = VAE(encoder, decoder, elbo, latents=latents, dimensions=dimensions)

    marginal = torch.distributions.MultivariateNormal(
        bias.double(), (weight @ weight.T).double() + scale**2 * torch.eye(dimensions).double()
    )
    noise = torch.randn(400, latents + dimensions, generator=generator)
    x = noise[:, :latents] @ weight.T + bias + scale * noise[:, latents:]
    return model, x, marginal.log_prob(x.double())


def test_exact_posterior_gives_the_exact_likelihood(backend):
    """Every weight is then p(x): one sample is as good as many."""
    model, x, log_likelihood = linear_gaussian(orthogonal=True)
    for samples in (1, 20):
        found, _ = evaluate.bounds(model, x, samples)
        torch.testing.assert_close(-found.nll, log_likelihood, rtol=0, atol=2e-5)


def test_importance_weighting_approaches_the_likelihood_from_below(native):
    model, x, log_likelihood = linear_gaussian(orthogonal=False)
    off = torch.tensor([0.3, 0.3, 0.3])
    with torch.no_grad():
        model.encoder.bias += torch.cat([off, off])  # the mean aside, and the variance too large
    gaps = []
    for samples in (1, 10, 100, 3000):
        found, mu = evaluate.bounds(model, x, samples, seed=1)
        gaps.append((log_likelihood + found.nll).mean().item())
    assert gaps == sorted(gaps, reverse=True)
    assert gaps[0] > 10 * gaps[2] > 0
    assert 0 < gaps[3] < 0.01

    # Without weights the gap is the divergence of the encoder from the true posterior.
    elbo = -(found.reconstruction + found.kl)
    normal = torch.distributions.MultivariateNormal
    precision = torch.eye(3) + model.decoder.weight.T @ model.decoder.weight / 0.6**2
    encoder = normal(mu[0], torch.diag_embed(model.encoder.bias[3:].exp()))
    kl = torch.distributions.kl_divergence(encoder, normal(mu[0] - off, precision_matrix=precision)).item()
    assert (log_likelihood - elbo).mean().item() == pytest.approx(kl, rel=0.01)
    assert kl > 0.3


def test_weights_against_a_formula_of_its_own(native):
    """log-mean-exp over all draws at once, from torch.distributions, in float64."""
    torch.manual_seed(0)
    encoder, decoder = nn.Linear(10, 8), nn.Linear(4, 10)
    model = VAE(encoder, decoder, fastvae.ELBO("bernoulli"), latents=4, dimensions=10)
    x = torch.rand(6, 10).round()
    found, mu = evaluate.bounds(model, x, 7, seed=5, first_row=3)
    normal = torch.distributions.Normal
    with torch.no_grad():
        mean, logvar = encoder(x).double().chunk(2, dim=1)
        eps = torch.stack(
            [fastvae.reference.normal_noise(torch.tensor([5, 4 * k]), 3, 6, 4)[0] for k in range(7)]
        )
        z = mean + torch.exp(logvar / 2) * eps
        logits = decoder(z.float()).double()
        log_weights = (
            torch.distributions.Bernoulli(logits=logits).log_prob(x.double()).sum(-1)
            + normal(0.0, 1.0).log_prob(z).sum(-1)
            - normal(mean, torch.exp(logvar / 2)).log_prob(z).sum(-1)
        )
    torch.testing.assert_close(-found.nll, log_weights.logsumexp(0) - math.log(7), rtol=0, atol=1e-5)
    torch.testing.assert_close(mu.double(), mean)


def test_neither_the_batch_nor_its_place_matters(native):
    model, x, _ = linear_gaussian(orthogonal=False)
    whole, _ = evaluate.bounds(model, x, 5)
    parts = [evaluate.bounds(model, part, 5, first_row=90 * i)[0] for i, part in enumerate(x.split(90))]
    for value, pieces in zip(whole, zip(*parts, strict=True), strict=True):
        torch.testing.assert_close(value, torch.cat(pieces), rtol=1e-6, atol=1e-5)


def test_far_weights_do_not_overflow(native):
    """An encoder far from the posterior: log-weights of about -1e5, and 1e5 apart."""
    model, x, _ = linear_gaussian(orthogonal=False)
    with torch.no_grad():
        model.encoder.bias[:3] += 200
    found, _ = evaluate.bounds(model, x, 3)
    assert found.nll.isfinite().all()
    assert (found.nll > 1e4).all()


def windows(image: np.ndarray) -> np.ndarray:
    """Every 11 x 11 part of an image (H, W)."""
    return np.lib.stride_tricks.sliding_window_view(image.astype(np.float64), (11, 11))


def structural_similarity(a: np.ndarray, b: np.ndarray) -> float:
    """Wang et al. 2004, equation 13 with weighted moments (14 to 16), of images (C, H, W) in [0, 1]."""
    distance = np.arange(11) - 5
    weights = np.exp(-(distance[:, None] ** 2 + distance**2) / (2 * 1.5**2))
    weights /= weights.sum()
    c1, c2 = 0.01**2, 0.03**2
    values = []
    for first, second in zip(a, b, strict=True):
        x, y = windows(first), windows(second)
        mu_x, mu_y = ((weights * part).sum((-1, -2), keepdims=True) for part in (x, y))
        var_x = (weights * (x - mu_x) ** 2).sum((-1, -2))
        var_y = (weights * (y - mu_y) ** 2).sum((-1, -2))
        covariance = (weights * (x - mu_x) * (y - mu_y)).sum((-1, -2))
        mu_x, mu_y = mu_x[..., 0, 0], mu_y[..., 0, 0]
        luminance = (2 * mu_x * mu_y + c1) / (mu_x**2 + mu_y**2 + c1)
        values.append(luminance * (2 * covariance + c2) / (var_x + var_y + c2))
    return float(np.mean(values))


@pytest.mark.parametrize("shape", [(70, 1, 11, 11), (3, 3, 14, 23), (2, 1, 64, 40)])
def test_measures_of_pictures(shape):
    rng = np.random.default_rng(0)
    a = rng.random(shape)
    a[-1, :, :, :9] = 1  # a part without any variance
    b = a + rng.normal(0, 0.1, shape) * np.linspace(0.2, 3, shape[0])[:, None, None, None]
    seen = b.clip(0, 1)
    assert (seen != b).any()
    x, y = torch.from_numpy(a), torch.from_numpy(b)
    expected = [10 * math.log10(1 / ((p - q) ** 2).mean()) for p, q in zip(a, seen, strict=True)]
    assert evaluate.psnr(y, x).tolist() == pytest.approx(expected, rel=1e-6)
    expected = [structural_similarity(p, q) for p, q in zip(a, seen, strict=True)]
    assert max(expected) - min(expected) > 0.05
    assert evaluate.ssim(y.float(), x.float()).tolist() == pytest.approx(expected, abs=1e-5)


def test_measures_of_equal_pictures():
    x = torch.rand(3, 1, 16, 16)
    levels = torch.arange(256.0).view(1, 1, 16, 16)
    assert evaluate.ssim(x, x).tolist() == pytest.approx([1, 1, 1])
    assert evaluate.psnr(x, x).tolist() == pytest.approx([10 * math.log10(12 * 255**2)] * 3)
    # What rounding to bytes leaves is about the bound; a whole level is far from it.
    noise = torch.linspace(-0.5, 0.5, 256).view(1, 1, 16, 16)
    near = levels.clamp(1, 254)
    assert evaluate.psnr((near + noise) / 255, near / 255).item() == pytest.approx(58.9, abs=0.05)
    assert evaluate.psnr((near + 1) / 255, near / 255).item() == pytest.approx(20 * math.log10(255), abs=1e-4)


def reconstructed(opened: runs.Run, x: Tensor) -> Tensor:
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
    opened = runs.load(run)
    images = opened.images.held_out.permute(0, 3, 1, 2)
    x = (images >= 128).float()
    shown = reconstructed(opened, x)
    assert ratio(x, shown) != pytest.approx(ratio(images / 255, shown), abs=0.5)
    assert measured(run) == (pytest.approx(ratio(x, shown)), None)
    # The Gaussian: the bytes, though it sees them with noise. All of those are within a bytes' width.
    opened = runs.load(colour)
    images = opened.images.held_out.permute(0, 3, 1, 2)
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
        opened = runs.load(out)
        images = opened.images.held_out.permute(0, 3, 1, 2).contiguous()
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
    assert f"{run}: 299 held-out images of scikit-learn's digits; epoch 2 (best)" in text
    for words, value in (
        ("negative ELBO", written["nelbo"]),
        ("reconstruction", written["reconstruction"]),
        ("KL", written["kl"]),
        ("NLL, 20 importance samples", written["iw_nll"]),
        ("standard error over images", written["iw_nll_standard_error"]),
    ):
        assert re.search(rf"^ *{words} +{value:.3f}", text, re.MULTILINE), words
    assert re.search(rf"active units +{written['active_units']} of 6", text)
    assert text.endswith(f"written to {run / 'evaluation.json'}\n")

    assert written["images"] == 299
    assert written["samples"] == 20
    assert written["dimensions"] == 64
    assert written["nelbo"] == pytest.approx(written["reconstruction"] + written["kl"], rel=1e-9)
    assert 0 < written["iw_nll"] < written["nelbo"]
    assert written["bits_per_dim"] == pytest.approx(written["iw_nll"] / 64 / math.log(2))
    assert written["nelbo_bits_per_dim"] == pytest.approx(written["nelbo"] / 64 / math.log(2))
    # What training measured in this epoch, with one draw for each image.
    metrics = (run / "metrics.csv").read_text().splitlines()
    row = dict(zip(metrics[0].split(","), map(float, metrics[2].split(",")), strict=True))
    assert written["nelbo"] == pytest.approx(row["held_out_nelbo"], rel=0.01)
    assert written["kl"] == pytest.approx(row["held_out_kl"], rel=1e-5)
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
    assert f"4 held-out images of {file.name}; " in done(
        capsys, "evaluate", run, "--samples", 2, "--data", file
    )
    assert "4 held-out images, " in done(capsys, "reconstruct", run, "--data", file)


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
    (["sample", "--best", "4", "-n", "4"], "-n and --best: give one of them"),
    (["sample", "--of", "8"], "--of is of --best, which says how many of the 8 to keep: give both"),
    (["sample", "--best", "4", "--seed", "-1"], "--seed must be between 0 and 4294967295, got -1"),
    (["sample", "--best", "4", "--temperature", "-1"], "--temperature must be at least 0, got -1"),
    (["reconstruct", "-n", "0"], "-n must be between 1 and 10000, got 0"),
    (["reconstruct", "--data", "{tmp}/none.npz"], "none.npz: no such file"),
    (["reconstruct", "--data", "{tmp}/large.npz"], "the images are 9 x 7, those of {run} 8 x 8"),
    (["reconstruct", "--data", "{tmp}/colour.npz"], "the images are 8 x 8 x 3, those of {run} 8 x 8"),
    (
        ["interpolate", "--from", "0", "--to", "299"],
        "--to 299: there are 299 held-out images, counted from 0",
    ),
    (["interpolate", "--from", "-1", "--to", "2"], "--from -1: there are 299 held-out images"),
    (["interpolate", "--from", "0"], "--from and --to make pairs: got 1 of the one and 0 of the other"),
    (["interpolate", "--steps", "1"], "--steps must be between 2 and 100, got 1"),
    (["traverse", "--image", "1000"], "--image 1000: there are 299 held-out images, counted from 0"),
    (["traverse", "-n", "0"], "-n must be at least 1, got 0"),
    (["traverse", "--steps", "101"], "--steps must be between 2 and 100, got 101"),
    (["inpaint", "--mask", "middle"], "--mask must be one of left, right, top, bottom, center, or a box"),
    (["inpaint", "--mask", "1,2,3"], "or a box x0,y0,x1,y1 in pixels, got '1,2,3'"),
    (
        ["inpaint", "--mask", "0,0,9,8"],
        "--mask 0,0,9,8: not a box in an image of 8 x 8 pixels (width x height)",
    ),
    (["inpaint", "--mask", "-1,0,4,4"], "--mask -1,0,4,4: not a box"),
    (["inpaint", "--mask", "4,4,4,8"], "--mask 4,4,4,8: not a box"),
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
    assert f"{tmp_path / 'none'}: no such run" in refused(capsys, command, tmp_path / "none")
    assert "no run" in refused(capsys, command, tmp_path)
    assert "RUN" in refused(capsys, command)
    assert os.listdir(tmp_path) == []


def test_checkpoint_of_another_likelihood(run, capsys):
    config = run / "config.toml"
    config.write_text(config.read_text().replace('likelihood = "bernoulli"', 'likelihood = "gaussian"'))
    line = refused(capsys, "evaluate", run)
    assert "a checkpoint of another model: there is no `elbo.likelihood.logvar` in it" in line


def test_evaluation_that_cannot_be_written(run, capsys):
    (run / "evaluation.json").mkdir()
    assert "evaluation.json: cannot be written: it is a folder" in refused(capsys, "evaluate", run)


def test_interrupted(run, capsys, monkeypatch):
    def stop(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    for command, module, name in (("evaluate", evaluate, "bounds"), ("inpaint", pictures, "save_grid")):
        monkeypatch.setattr(module, name, stop)
        capsys.readouterr()
        assert cli.main([command, str(run)]) == 130
        assert capsys.readouterr().err == "fastvae: interrupted\n"
    assert not (run / "evaluation.json").exists()
    assert not (run / "inpainting.png").exists()


def test_interrupted_before_a_command_begins(capsys, monkeypatch):
    def stop() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "_app", stop)
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


# ---------------------------------------------------------------------------------------------------------------------
# Figures
# ---------------------------------------------------------------------------------------------------------------------


def shape_of(path: Path) -> tuple[int, int]:
    with Image.open(path) as picture:
        picture.load()
        assert np.asarray(picture.convert("L")).std() > 5  # there is something to see
        return picture.size


@pytest.mark.parametrize("epochs", [1, 2, 30])
def test_loss_curve(tmp_path, epochs):
    rows = [
        {
            "epoch": e + 1,
            "train_nll": 100 + 400 * math.exp(-e),
            "train_kl": 10.0 - 5 / (e + 1),
            "held_out_nelbo": 112 + 300 * math.exp(-e),
            "held_out_kl": 11.0,
            "beta": min(1.0, e / 10),
        }
        for e in range(epochs)
    ]
    if epochs > 2:
        rows[1]["train_nll"] = math.nan  # an epoch of which every step was skipped
    pictures.save_loss_curve(rows, tmp_path / "loss.png")
    width, height = shape_of(tmp_path / "loss.png")
    assert width > 1000
    assert height > 400
    assert os.listdir(tmp_path) == ["loss.png"]


@pytest.mark.parametrize(("latents", "labels"), [(1, 3), (1, None), (2, 1), (2, None), (7, 15), (7, 100)])
def test_latents(tmp_path, latents, labels):
    mu = torch.randn(300, latents)
    kinds = None if labels is None else torch.randint(labels, (300,))
    pictures.save_latents(mu, kinds, tmp_path / "latents.png")
    shape_of(tmp_path / "latents.png")


def test_latents_of_little(tmp_path):
    """A single image, a posterior that has collapsed, and one that is nowhere."""
    for dimensions in (1, 2, 5):
        mu = torch.randn(50, dimensions)
        mu[3] = torch.nan
        for some in (mu, mu * torch.inf):
            pictures.save_latents(some, torch.arange(50) % 3, tmp_path / "latents.png")
            shape_of(tmp_path / "latents.png")
    for mu in (torch.zeros(1, 5), torch.zeros(50, 5), torch.zeros(50, 2), torch.zeros(50, 1)):
        pictures.save_latents(mu, torch.zeros(len(mu)).long(), tmp_path / "latents.png")
        assert (tmp_path / "latents.png").stat().st_size > 1000


@pytest.mark.parametrize("points", [11, 300])
def test_legend_of_latents(tmp_path, monkeypatch, points):
    """The names of the classes, and markers that do not cover them however few points there are."""
    figures = []
    save = pictures._save
    monkeypatch.setattr(pictures, "_save", lambda figure, path: (save(figure, path), figures.append(figure)))
    labels = torch.arange(points) % 2
    pictures.save_latents(torch.randn(points, 3), labels, tmp_path / "latents.png", names=("cats", "dogs"))
    (axes,) = figures[0].axes
    legend = axes.get_legend()
    assert [text.get_text() for text in legend.get_texts()] == ["cats", "dogs"]
    assert all(area <= 61 for mark in legend.legend_handles for area in mark.get_sizes())


def test_principal_components():
    scales = torch.tensor([0.1, 5.0, 0.2, 2.0]).double()
    mu = torch.randn(4000, 4).double() * scales + 3
    directions, shares = pictures._principal(mu)
    torch.testing.assert_close(directions[[1, 3], [0, 1]], torch.ones(2).double(), rtol=0, atol=1e-2)
    expected = scales[[1, 3]].square() / scales.square().sum()
    torch.testing.assert_close(shares, expected, rtol=0.05, atol=0)


def test_figures_that_cannot_be_written(tmp_path):
    for draw in (
        lambda path: pictures.save_latents(torch.randn(5, 2), None, path),
        lambda path: pictures.save_grid([torch.rand(2, 4, 4, 1)], path),
    ):
        with pytest.raises(InputError, match="cannot be written: no such file or directory"):
            draw(tmp_path / "none" / "picture.png")
