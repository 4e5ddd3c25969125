"""Objectives of training: several draws of z, the importance-weighted bounds, and a capacity of the KL."""

import math

import pytest
import torch
from run_files import assert_same_run, command_error, read_metrics, train, train_text
from torch import nn

import fastvae
from fastvae import cli, reference
from fastvae.train import image
from fastvae.train.counts import cells
from fastvae.train.counts.module import CellVAE
from fastvae.train.counts.recipe import Counts
from fastvae.train.image import module
from fastvae.train.text import sentences
from fastvae.train.text.module import TextVAE
from fastvae.train.text.recipe import Text

pytestmark = pytest.mark.usefixtures("one_thread", "no_pictures")

OBJECTIVES = {
    "average": ("--samples", "3"),
    "iwae": ("--objective", "iwae", "--samples", "3"),
    "stl": ("--objective", "stl", "--samples", "1"),
    "dreg": ("--objective", "dreg", "--samples", "3", "--warmup", "linear", "--warmup-epochs", "2"),
    "capacity": ("--capacity", "4", "--beta", "10", "--warmup", "linear", "--warmup-epochs", "2"),
}


@pytest.mark.parametrize("options", OBJECTIVES.values(), ids=OBJECTIVES)
def test_resumed_run_equals_uninterrupted_run(tmp_path, options):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    options += ("--batch-size", "500")
    assert train(whole, *options, "--epochs", "2") == 0
    assert train(parts, *options, "--epochs", "1") == 0
    assert cli.main(["resume", str(parts), "--epochs", "2"]) == 0
    assert_same_run(parts, whole)
    first, second = (float(row["train_nll"]) for row in read_metrics(whole))
    assert second < first


def test_bound_of_validation_is_reported_and_selects_the_best_epoch(tmp_path, capsys):
    run = tmp_path / "run"
    assert train(run, "--objective", "iwae", "--samples", "20", "--beta", "0.5", "--epochs", "1") == 0
    assert "-bound" in capsys.readouterr().out
    (row,) = read_metrics(run)
    elbo, bound = float(row["val_neg_elbo"]), float(row["val_neg_bound"])
    assert elbo - 2 < bound < elbo
    best = torch.load(run / "checkpoints" / "best.ckpt", weights_only=True)["callbacks"]
    (state,) = [state for name, state in best.items() if "val_neg_bound" in name]
    assert state["best_model_score"] == pytest.approx(bound)
    # The bound of the metric does not include beta.
    opened = image.load(run)
    val = opened.images.val
    x = (val >= 128).float().permute(0, 3, 1, 2)
    iwae = fastvae.IWAE("bernoulli", 20)
    with torch.no_grad():
        draws = iwae.sample(*opened.model.encode(x), seed=torch.tensor([1, 0]))
        expected = -iwae(opened.model.decode, x, draws=draws).bound.mean()
    assert bound == pytest.approx(expected.item(), rel=1e-5)


def make_model(elbo: fastvae.ELBO, **options: float) -> module.ImageVAE:
    torch.manual_seed(0)
    return module.ImageVAE(nn.Linear(9, 6), nn.Linear(3, 9), elbo, latents=3, dimensions=9, **options)


def test_iwae_is_the_formula_in_float64(backend):
    model = make_model(fastvae.IWAE("bernoulli", 4))
    x = (torch.rand(5, 9) > 0.5).float()
    out, mu, logvar = model(x, torch.tensor([7, 8]), 2)
    eps = reference.normal_noise(torch.tensor([7, 8]), 2, 5, 3, 4).double()
    z = mu.double() + torch.exp(logvar.double() / 2) * eps
    logits = z @ model.decoder.weight.double().T + model.decoder.bias.double()
    normal = torch.distributions.Normal
    log_weights = (
        torch.distributions.Bernoulli(logits=logits).log_prob(x.double()).sum(-1)
        + normal(0.0, 1.0).log_prob(z).sum(-1)
        - normal(mu.double(), torch.exp(logvar.double() / 2)).log_prob(z).sum(-1)
    )
    expected = (math.log(4) - log_weights.logsumexp(0)).mean()
    torch.testing.assert_close(out.loss.double(), expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("capacity", [0.01, 1000.0])
def test_capacity_replaces_the_kl_by_its_distance(capacity):
    """Burgess et al. 2018, equation 8: below the capacity, the loss rewards a larger KL."""
    model = make_model(fastvae.ELBO("bernoulli", beta=3.0, capacity=capacity))
    plain = make_model(fastvae.ELBO("bernoulli", beta=3.0))
    x = (torch.rand(5, 9) > 0.5).float()
    out, expected = model(x, torch.tensor([7, 8]), 0)[0], plain(x, torch.tensor([7, 8]), 0)[0]
    torch.testing.assert_close(out.kl, expected.kl)
    torch.testing.assert_close(out.loss, out.nll.mean() + 3 * (out.kl.mean() - capacity).abs())
    sign = 1 if capacity < 1 else -1
    torch.testing.assert_close(
        torch.autograd.grad(out.loss, model.encoder.bias),
        torch.autograd.grad(expected.nll.mean() + sign * 3 * expected.kl.mean(), plain.encoder.bias),
    )


def test_warmup_raises_the_capacity_and_not_beta(tmp_path):
    options = ("--capacity", "4", "--beta", "10", "--warmup", "linear", "--warmup-epochs", "2")
    assert train(tmp_path / "run", *options, "--epochs", "3") == 0
    rows = read_metrics(tmp_path / "run")
    assert [float(row["beta"]) for row in rows] == [10, 10, 10]
    # The logged value is that of the last of the 12 steps.
    assert [float(row["capacity"]) for row in rows] == pytest.approx([4 * 11 / 24, 4 * 23 / 24, 4])


def test_each_step_has_its_own_noise(tmp_path, monkeypatch):
    """Draw k of a step uses the noise of the offset plus 4 k, so the offset grows by 4 for each draw."""
    forward, seeds = module.ImageVAE.forward, []

    def record(self, x, seed, row_offset):
        if self.training:
            seeds.append(seed.tolist())
        return forward(self, x, seed, row_offset)

    monkeypatch.setattr(module.ImageVAE, "forward", record)
    options = ("--samples", "3", "--batch-size", "500", "--seed", "3")
    assert train(tmp_path / "run", *options, "--epochs", "1") == 0
    assert cli.main(["resume", str(tmp_path / "run"), "--epochs", "2"]) == 0
    assert seeds == [[3, 12 * step] for step in range(6)]


def text_model() -> tuple[TextVAE, sentences.Batch]:
    settings = Text(data="x", objective="iwae", samples=3, free_bits=0, embedding=5, hidden=6, latent=2)
    elbo = settings.make_elbo(fastvae.likelihoods.Categorical(ignore_index=sentences.PAD))
    model = TextVAE(*settings.networks(12), elbo, **settings.module_options())
    tokens = sentences.TokenTable(torch.randint(4, 12, (4, 6)), torch.tensor([6, 3, 1, 5]))
    return model, sentences.make_batch(tokens)


def counts_model(likelihood: str, dispersion: str) -> tuple[CellVAE, cells.Batch]:
    # 12 genes, as many as there are rows for the decoder.
    settings = Counts(data="x", objective="iwae", samples=3, likelihood=likelihood, dispersion=dispersion)
    elbo = settings.make_elbo(settings.make_likelihood(12))
    model = CellVAE(*settings.networks(12, 2), elbo, **settings.module_options())
    counts = torch.randint(1, 5, (4, 12)).float()
    return model, cells.Batch(counts, counts.sum(1, keepdim=True), torch.tensor([0, 1, 1, 0]))


@pytest.mark.parametrize(
    "make",
    [
        text_model,
        lambda: counts_model("zinb", "gene"),
        lambda: counts_model("nb", "gene-cell"),
        lambda: counts_model("poisson", "gene"),
    ],
    ids=["text", "zinb", "nb", "poisson"],
)
def test_draws_of_text_and_counts_equal_single_draws(backend, make):
    """The decoder gets the previous tokens, or the batch of the cell, for every draw."""
    model, x = make()
    model.eval()
    with torch.no_grad():
        draws = model.elbo.sample(*model.encode(x), seed=torch.tensor([3, 0]))
        out, _, _ = model(x, torch.tensor([3, 0]), 0)
        each = torch.stack([model.nll(z, x) for z in draws.z])
    torch.testing.assert_close(out.nll, each, rtol=1e-5, atol=1e-5)


def test_text_trains_with_dreg(tmp_path, capsys):
    data = tmp_path / "x.txt"
    data.write_text("".join(f"{a} {b} .\n" for a in "abcdefg" for b in "uvwxyz"))
    options = ("--objective", "dreg", "--samples", "2", "--epochs", "1")
    assert train_text(tmp_path / "run", data, *options, "--free-bits", "0") == 0
    assert {"val_neg_bound", "val_perplexity"} < read_metrics(tmp_path / "run")[0].keys()
    error = command_error(
        capsys, "train", "text", "--data", data, "--out", tmp_path / "other", "--objective", "dreg"
    )
    assert "--free-bits 0.25 only applies to --objective elbo, got dreg; add --free-bits 0" in error
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize(
    ("recipe", "options", "words"),
    [
        (
            "mlp",
            ("--objective", "iwae", "--free-bits", "0.5"),
            "--free-bits 0.5 only applies to --objective elbo, got iwae; add --free-bits 0",
        ),
        (
            "mlp",
            ("--objective", "stl", "--capacity", "5"),
            "--capacity 5 only applies to --objective elbo, got stl; add --capacity 0",
        ),
        (
            "mlp",
            ("--capacity", "5", "--free-bits", "0.5"),
            "--capacity 5 and --free-bits 0.5 exclude each other; add --free-bits 0",
        ),
        (
            "mlp",
            ("--objective", "vae"),
            "--objective must be one of elbo, iwae, stl, dreg, beta-tc, info, got 'vae'",
        ),
        ("mlp", ("--samples", "0"), "--samples must be at least 1, got 0"),
        ("vae-gan", ("--objective", "iwae"), "--objective must be elbo for vae-gan, "),
        ("vae-gan", ("--samples", "2"), "--samples must be 1 for vae-gan, "),
        ("vae-gan", ("--capacity", "2"), "--capacity must be 0.0 for vae-gan, "),
    ],
)
def test_impossible_objective_fails_in_one_line(tmp_path, capsys, recipe, options, words):
    assert words in command_error(capsys, "train", recipe, "--out", tmp_path / "run", *options)
    assert not (tmp_path / "run").exists()
