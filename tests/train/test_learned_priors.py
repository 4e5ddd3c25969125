"""Runs with a learned prior: training, resuming, evaluation, samples and errors."""

import json
import math

import numpy as np
import pytest
import torch
from run_files import assert_same_run, command_error, read_metrics, run_command, train, train_text
from torch import Tensor, nn
from torch.distributions import Categorical, Independent, MixtureSameFamily, MultivariateNormal, Normal

import fastvae
from fastvae import cli
from fastvae.train import bounds, counts, image, runs, text
from fastvae.train.image import KIND, data, loader
from fastvae.train.image.module import ImageVAE
from fastvae.train.image.recipes import MLP, ResNet

pytestmark = pytest.mark.usefixtures("one_thread", "no_pictures")

PRIORS = {"mog": ("--prior", "mog", "--components", "5"), "vamp": ("--prior", "vamp", "--components", "7")}
MIXTURE = fastvae.priors.GaussianMixture


DREG = ("--objective", "dreg", "--samples", "2")


@pytest.mark.parametrize(
    ("options", "objective"),
    [
        (PRIORS["mog"], ()),
        (PRIORS["vamp"], DREG),
        pytest.param(PRIORS["mog"], DREG, marks=pytest.mark.slow),
        pytest.param(PRIORS["vamp"], (), marks=pytest.mark.slow),
    ],
    ids=["mog-elbo", "vamp-dreg", "mog-dreg", "vamp-elbo"],
)
def test_resumed_run_equals_uninterrupted_run(tmp_path, options, objective):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    options += (*objective, "--batch-size", "500", "--ema", "0.9")
    assert train(whole, *options, "--epochs", "2") == 0
    assert train(parts, *options, "--epochs", "1") == 0
    assert cli.main(["resume", str(parts), "--epochs", "2"]) == 0
    assert_same_run(parts, whole)
    first, second = (float(row["train_nll"]) for row in read_metrics(whole))
    assert second < first
    opened = image.load(whole)
    fresh = runs.new_model(KIND, opened.settings, opened.form, opened.images)
    for (name, before), after in zip(
        fresh.prior.named_parameters(), opened.model.prior.parameters(), strict=True
    ):
        assert not torch.equal(before, after), name


@pytest.mark.parametrize(
    ("settings", "channels"),
    [(MLP(likelihood="bernoulli"), 1), (ResNet(likelihood="dmol", channels=4), 3)],
    ids=["bernoulli", "bytes"],
)
def test_pseudo_inputs_start_near_training_images_inside_of_their_range(settings, channels):
    images = torch.randint(0, 256, (30, 8, 8, channels), dtype=torch.uint8)
    settings = settings.__class__(
        **{**vars(settings), "prior": "vamp", "components": 20},
    )
    model = runs.new_model(KIND, settings, (8, 8, channels), data.Images("x", images, images[:2]))
    assert model.prior.bounds == (0.0, 1.0)
    found = model.prior.pseudo_inputs.detach()
    x = loader.prepare(images, settings)
    seen = 0.05 + 0.9 * (x.float() / 255 if x.dtype == torch.uint8 else x)
    distance, nearest = (found.unsqueeze(1) - seen).abs().flatten(2).amax(2).min(1)
    assert distance.max() < 1e-6
    assert len(set(nearest.tolist())) == 20
    # The prior is that of the model's own encoder, for which an image of bytes is the same as its floats.
    mu, logvar, _ = model.prior.components()
    torch.testing.assert_close((mu, logvar), model.encode(found))
    # The networks start as with the standard prior.
    plain = runs.new_model(
        KIND,
        settings.__class__(**{**vars(settings), "prior": "standard", "components": 0}),
        (8, 8, channels),
        data.Images("x", images, images[:2]),
    )
    for name, weight in plain.state_dict().items():
        torch.testing.assert_close(weight, model.state_dict()[name], msg=name)


def mixture() -> fastvae.priors.GaussianMixture:
    prior = MIXTURE(3, 2)
    with torch.no_grad():
        prior.mu.copy_(torch.tensor([[-2.0, 0.0], [1.0, 1.0], [0.5, -1.5]]))
        prior.logvar.copy_(torch.tensor([[-1.0, 0.3], [0.0, -0.5], [0.4, 0.1]]))
        prior.logits.copy_(torch.tensor([0.2, -0.4, 0.9]))
    return prior


def linear_gaussian(prior: fastvae.priors.GaussianMixture) -> tuple[ImageVAE, Tensor, Tensor]:
    """Return a model with this prior, data drawn from it, and their log p(x) in closed form: x | z ~ N(W z, s^2 I), so
    that x is a mixture of N(W mu_m, W S_m W' + s^2 I)."""
    scale, dimensions = 0.7, 4
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(dimensions, 2, generator=generator)
    encoder, decoder = nn.Linear(dimensions, 4), nn.Linear(2, dimensions)
    with torch.no_grad():
        precision = torch.eye(2) + weight.T @ weight / scale**2
        mean = torch.linalg.solve(precision, weight.T) / scale**2
        encoder.weight.copy_(torch.cat([mean, torch.zeros_like(mean)]))
        encoder.bias.copy_(torch.cat([torch.zeros(2), -precision.diagonal().log() + 0.5]))
        decoder.weight.copy_(weight)
        decoder.bias.zero_()
    elbo = fastvae.ELBO(fastvae.likelihoods.Gaussian(scale), prior=prior)
    z = prior.sample(60, generator=generator)
    x = z @ weight.T + scale * torch.randn(60, dimensions, generator=generator)
    covariance = weight @ torch.diag_embed(prior.logvar.detach().exp()) @ weight.T
    marginal = MixtureSameFamily(
        Categorical(logits=prior.logits.detach().double()),
        MultivariateNormal(
            (prior.mu.detach() @ weight.T).double(),
            (covariance + scale**2 * torch.eye(dimensions)).double(),
        ),
    )
    return ImageVAE(encoder, decoder, elbo, latents=2, dimensions=4), x, marginal.log_prob(x.double())


def test_importance_weighted_likelihood_takes_the_density_of_the_prior(native):
    model, x, log_likelihood = linear_gaussian(mixture())
    gaps = [
        (log_likelihood + bounds.estimate_bounds(model, x, samples, seed=1)[0].nll).mean().item()
        for samples in (1, 10, 100, 5000)
    ]
    assert gaps == sorted(gaps, reverse=True)
    assert gaps[0] > 0.1
    assert abs(gaps[3]) < 0.005


@torch.no_grad()
def test_bounds_with_a_prior_are_the_formula_in_float64(native):
    model, x, _ = linear_gaussian(mixture())
    found, _ = bounds.estimate_bounds(model, x, 7, seed=5, draws=3)
    mean, logvar = model.encoder(x).double().chunk(2, 1)
    eps = torch.stack(
        [fastvae.reference.normal_noise(torch.tensor([5, 4 * k]), 0, 60, 2)[0] for k in range(7)]
    )
    z = mean + torch.exp(logvar / 2) * eps
    prior = model.prior
    log_p = MixtureSameFamily(
        Categorical(logits=prior.logits.double()),
        Independent(Normal(prior.mu.double(), torch.exp(prior.logvar.double() / 2)), 1),
    ).log_prob(z)
    log_q = Normal(mean, torch.exp(logvar / 2)).log_prob(z).sum(-1)
    nll = -Normal(z @ model.decoder.weight.T.double(), 0.7).log_prob(x.double()).sum(-1)
    torch.testing.assert_close(found.kl, (log_q - log_p).mean(0), rtol=0, atol=1e-5)
    expected = math.log(7) - torch.logsumexp(log_p - log_q - nll, 0)
    torch.testing.assert_close(found.nll, expected, rtol=0, atol=1e-5)


def test_kl_of_an_evaluation_is_analytic_where_it_can_be(native):
    model, x, _ = linear_gaussian(mixture())
    model.elbo.prior = one = MIXTURE(1, 2)
    found, _ = bounds.estimate_bounds(model, x, 2)
    with torch.no_grad():
        mean, logvar = model.encode(x)
        posterior, prior = (
            Independent(Normal(m, torch.exp(v / 2)), 1) for m, v in ((mean, logvar), (one.mu, one.logvar))
        )
        expected = torch.distributions.kl_divergence(posterior, prior)
    torch.testing.assert_close(found.kl.float(), expected)


@pytest.fixture(scope="module")
def vamp_run(tmp_path_factory, one_thread):
    run = tmp_path_factory.mktemp("vamp") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fastvae.train.callbacks.should_save_examples", lambda trainer: False)
        assert train(run, *PRIORS["vamp"], "--epochs", "2", "--lr", "0.01") == 0
    return run


def test_samples_come_from_the_prior(vamp_run, tmp_path, capsys):
    model = image.load(vamp_run).model
    with torch.no_grad():
        mu, logvar, _ = model.prior.components()
        z = model.sample_prior(20_000, torch.Generator().manual_seed(0))
        variance = (logvar.exp() + mu.square()).mean(0) - mu.mean(0).square()
    assert ((z.mean(0) - mu.mean(0)).abs() < 5 * (variance / 20_000).sqrt()).all()
    torch.testing.assert_close(z.var(0), variance, rtol=0.05, atol=0)
    assert (variance - 1).abs().max() > 0.05, "the standard normal would pass"

    out = tmp_path / "a.png"
    text = run_command(capsys, "sample", vamp_run, "-n", 4, "--temperature", 0, "--out", out)
    assert "from z of the prior, the mean posterior of 7 pseudo-inputs, with 0 times their standard" in text
    assert out.exists()


def test_evaluation_agrees_with_validation(vamp_run, capsys):
    run_command(capsys, "evaluate", vamp_run, "--samples", 30)
    results = json.loads((vamp_run / "evaluation.json").read_text())
    row = read_metrics(vamp_run)[-1]
    assert results["kl"] == pytest.approx(float(row["val_kl"]), rel=0.02)
    assert results["neg_elbo"] == pytest.approx(float(row["val_neg_elbo"]), rel=0.02)
    assert results["iw_nll"] < results["neg_elbo"]
    # Only the standard normal has a dimension-wise KL.
    assert results["dimension_wise_kl"] is None
    opened = image.load(vamp_run)
    x = (opened.images.val >= 128).float().permute(0, 3, 1, 2)
    found, _ = bounds.estimate_bounds(opened.model, x, 30)
    assert results["iw_nll"] == pytest.approx(found.nll.mean().item())


def test_number_of_components_defaults_to_500_or_all_training_data():
    for prior in ("mog", "vamp"):
        settings = MLP(prior=prior)
        assert [settings.resolve_components(n).components for n in (9, 60_000)] == [9, 500]
        assert MLP(prior=prior, components=4).resolve_components(9).components == 4
    assert MLP().resolve_components(9).components == 0


def test_dmol_has_its_own_components_beside_a_prior():
    both = ResNet(likelihood="dmol", prior="vamp", components=30)
    assert both.make_likelihood().components == 10
    assert ResNet(likelihood="dmol", components=3).make_likelihood().components == 3
    assert ResNet(likelihood="dmol").make_likelihood().components == 10


@pytest.mark.parametrize(
    "options", [pytest.param(PRIORS["mog"], marks=pytest.mark.slow), PRIORS["vamp"]], ids=PRIORS
)
def test_counts_train_resume_and_evaluate_with_a_prior(tmp_path, capsys, options):
    rng = np.random.default_rng(0)
    file = tmp_path / "cells.npz"
    np.savez(file, x=rng.poisson(2.0, (60, 12)).astype(np.int32), batch=np.array(["a", "b"] * 30))
    small = ("--data", str(file), "--hidden", "8", "--latent", "2", "--accelerator", "cpu", *options)
    for name, epochs in (("whole", "2"), ("parts", "1")):
        out = str(tmp_path / name)
        assert cli.main(["train", "counts", "--out", out, "--epochs", epochs, *small]) == 0
    assert cli.main(["resume", str(tmp_path / "parts"), "--epochs", "2"]) == 0
    assert_same_run(tmp_path / "parts", tmp_path / "whole")
    run_command(capsys, "evaluate", tmp_path / "whole", "--samples", 5)
    if "vamp" not in options:
        return
    # The encoder reads a pseudo-input like the cell at which it started.
    opened = counts.load(tmp_path / "whole")
    model = runs.new_model(counts.KIND, opened.settings, opened.form, opened.cells).eval()
    logs = model.prior.pseudo_inputs.detach()
    library = torch.expm1(logs).sum(1, keepdim=True)
    batch = counts.cells.Batch(torch.expm1(logs).round(), library, model.pseudo_batches)
    torch.testing.assert_close(model.prior.components()[:2], model.encode(batch))
    assert set(model.pseudo_batches.tolist()) == {0, 1}
    rows = {tuple(row) for row in opened.cells.counts.rows(np.arange(60)).toarray().astype(int).tolist()}
    assert {tuple(row) for row in batch.counts.int().tolist()} <= rows


def test_text_trains_and_samples_with_a_mixture(tmp_path, capsys):
    file = tmp_path / "x.txt"
    file.write_text("".join(f"{a} {b} .\n" for a in "abcdefg" for b in "uvwxyz"))
    run = tmp_path / "run"
    assert train_text(run, file, *PRIORS["mog"], "--free-bits", "0", "--epochs", "1") == 0
    assert isinstance(text.load(run).model.prior, MIXTURE)
    written = run_command(capsys, "sample", run, "-n", 2)
    assert "2 new sentences, written from z of the prior, a mixture of 5 Gaussians" in written
    run_command(capsys, "evaluate", run, "--samples", 2)


@pytest.mark.parametrize(
    ("recipe", "options", "words"),
    [
        ("mlp", ("--prior", "flow"), "--prior must be one of standard, mog, vamp, got 'flow'"),
        (
            "mlp",
            ("--components", "5"),
            "--components only applies to --likelihood dmol, and to --prior mog or vamp, got 5",
        ),
        (
            "mlp",
            ("--prior", "vamp", "--components", "2000"),
            "--components must be at most 1498 for --prior vamp, whose pseudo-inputs start at training examples, got "
            "2000",
        ),
        ("mlp", ("--prior", "mog", "--components", "-1"), "--components must be at least 0, got -1"),
        (
            "mlp",
            ("--prior", "mog", "--free-bits", "0.5"),
            "--free-bits 0.5 needs the KL of each latent dimension, which has no closed form with --prior mog; add "
            "--free-bits 0",
        ),
        (
            "text",
            ("--prior", "vamp"),
            "--prior must be standard or mog for text, got vamp: its pseudo-inputs are learned by gradients, which "
            "words do not have",
        ),
        ("vae-gan", ("--prior", "mog"), "--prior must be standard for vae-gan, "),
    ],
)
def test_impossible_prior_fails_in_one_line(tmp_path, capsys, recipe, options, words):
    assert words in command_error(capsys, "train", recipe, "--out", tmp_path / "run", *options)
    assert not (tmp_path / "run").exists()
