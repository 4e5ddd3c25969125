"""The objectives beta-tc and info, which compare the posteriors of a batch with each other."""

import pytest
import torch
from run_files import assert_same_run, command_error, read_metrics, train
from torch import Tensor, nn
from torch.distributions import Normal

import fastvae
from fastvae import cli, reference
from fastvae.train import image
from fastvae.train.image import module
from fastvae.train.image.recipes import MLP

pytestmark = pytest.mark.usefixtures("one_thread", "no_pictures")

SIZE = 40  # the number of training data


def make_model(elbo: fastvae.ELBO, **options: object) -> module.ImageVAE:
    torch.manual_seed(0)
    model = module.ImageVAE(nn.Linear(9, 6), nn.Linear(3, 9), elbo, latents=3, dimensions=9, **options)
    model.dataset_size = SIZE
    return model


def parts_in_double(model: module.ImageVAE, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return (z, nll, log q of each posterior at each z and dimension, KL) in float64."""
    mu, logvar = model.encoder(x).double().chunk(2, 1)
    z = mu + torch.exp(logvar / 2) * reference.normal_noise(torch.tensor([7, 8]), 2, len(x), 3)[0].double()
    logits = z @ model.decoder.weight.double().T + model.decoder.bias.double()
    nll = -torch.distributions.Bernoulli(logits=logits).log_prob(x.double()).sum(1)
    log_q = Normal(mu, torch.exp(logvar / 2)).log_prob(z.unsqueeze(1))
    kl = (mu.square() + logvar.exp() - logvar - 1).sum(1) / 2
    return z, nll, log_q, kl


@pytest.mark.parametrize("warmup", [1.0, 0.25])
def test_beta_tc_is_the_loss_of_chen_et_al(backend, warmup):
    """nll + KL + (beta - 1) TC, with TC from stratified weights; a warm-up scales both of the last terms."""
    model = make_model(fastvae.ELBO("bernoulli", beta=warmup), aggregate="beta-tc", aggregate_weight=6.0)
    x = (torch.rand(5, 9) > 0.5).float()
    out, _, _ = model(x, torch.tensor([7, 8]), 2)
    _, nll, log_q, kl = parts_in_double(model, x)
    weights = torch.full((5, 5), (SIZE - 1) / (SIZE * 4), dtype=torch.float64).fill_diagonal_(1 / SIZE)
    joint = (weights * log_q.sum(2).exp()).sum(1).log()
    marginals = (weights.unsqueeze(2) * log_q.exp()).sum(1).log().sum(1)
    tc = (joint - marginals).mean()
    expected = nll.mean() + warmup * (kl.mean() + 5 * tc)
    torch.testing.assert_close(out.loss.double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(model.steps.aggregate[0].double(), tc, rtol=1e-4, atol=1e-5)
    parameters = [*model.encoder.parameters(), *model.decoder.parameters()]
    for a, b in zip(
        torch.autograd.grad(out.loss, parameters), torch.autograd.grad(expected, parameters), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    # Outside of training, the loss is the ELBO.
    model.eval()
    torch.testing.assert_close(
        model(x, torch.tensor([7, 8]), 2)[0].loss.double(), nll.mean() + warmup * kl.mean(), rtol=1e-5, atol=0
    )


def test_info_is_the_elbo_with_the_mmd_from_the_prior(backend):
    """With the kernel's bandwidth sqrt(L), for which the expectations over N(0, I) are integrals of Gaussians."""
    model = make_model(fastvae.ELBO("bernoulli", beta=0.5), aggregate="info", aggregate_weight=100.0)
    x = (torch.rand(30, 9) > 0.5).float()
    out, _, _ = model(x, torch.tensor([7, 8]), 2)
    z, nll, _, kl = parts_in_double(model, x)
    pairs = torch.exp(-torch.cdist(z, z).square() / 6)
    own = (pairs.sum() - 30) / (30 * 29)
    cross = (3 / 4) ** 1.5 * torch.exp(-z.square().sum(1) / 8).mean()
    mmd = own - 2 * cross + (3 / 5) ** 1.5
    torch.testing.assert_close(model.steps.aggregate[0].double(), mmd, rtol=1e-4, atol=1e-6)
    expected = nll.mean() + 0.5 * kl.mean() + 100 * mmd
    torch.testing.assert_close(out.loss.double(), expected, rtol=1e-4, atol=0)


@pytest.mark.parametrize(
    ("options", "metric"),
    [
        (
            ("--objective", "beta-tc", "--beta", "6", "--warmup", "linear", "--warmup-epochs", "2"),
            "train_total_correlation",
        ),
        pytest.param(
            ("--objective", "info", "--beta", "0", "--mmd-weight", "50"), "train_mmd", marks=pytest.mark.slow
        ),
    ],
    ids=["beta-tc", "info"],
)
def test_resumed_run_equals_uninterrupted_run(tmp_path, options, metric):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    options += ("--batch-size", "500")
    assert train(whole, *options, "--epochs", "2") == 0
    assert train(parts, *options, "--epochs", "1") == 0
    assert cli.main(["resume", str(parts), "--epochs", "2"]) == 0
    assert_same_run(parts, whole)
    rows = read_metrics(whole)
    assert all(float(row[metric]) != 0 for row in rows)
    assert float(rows[1]["train_nll"]) < float(rows[0]["train_nll"])
    assert float(rows[1]["beta"]) == pytest.approx(6 * 5 / 6 if "beta-tc" in options else 0)
    assert image.load(whole).settings.monitor == "val_neg_elbo"


def test_last_batch_of_a_single_image_and_the_size_of_the_training_set(tmp_path, monkeypatch):
    sizes = []
    total_correlation = fastvae.regularizers.total_correlation

    def record(z, mu, logvar, dataset_size):
        sizes.append((len(z), dataset_size))
        return total_correlation(z, mu, logvar, dataset_size)

    monkeypatch.setattr(fastvae.regularizers, "total_correlation", record)
    assert train(tmp_path / "run", "--objective", "beta-tc", "--batch-size", "1497", "--epochs", "1") == 0
    assert sizes == [(1497, 1498)]


@pytest.mark.slow
def test_beta_tc_lowers_the_total_correlation(tmp_path):
    found = {}
    for beta in ("1", "8"):
        out = tmp_path / beta
        assert train(out, "--objective", "beta-tc", "--beta", beta, "--epochs", "40", "--lr", "0.005") == 0
        found[beta] = float(read_metrics(out)[-1]["train_total_correlation"])
    assert found["8"] < found["1"] - 0.1


@pytest.mark.parametrize("precision", ["bf16-mixed", pytest.param("bf16-true", marks=pytest.mark.slow)])
def test_half_precision_keeps_the_distance_of_z_from_mu(tmp_path, precision):
    """Rounding z to bfloat16 would move it by more than a narrow posterior is wide."""
    options = ("--objective", "beta-tc", "--beta", "4", "--epochs", "1", "--batch-size", "500")
    found = {}
    for name in ("32-true", precision):
        assert train(tmp_path / name, *options, "--precision", name) == 0
        found[name] = float(read_metrics(tmp_path / name)[0]["train_total_correlation"])
    assert found[precision] == pytest.approx(found["32-true"], abs=0.05)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--mmd-weight", "5"), "--mmd-weight 5 only applies to --objective info, got elbo"),
        (
            ("--objective", "beta-tc", "--mmd-weight", "5"),
            "--mmd-weight 5 only applies to --objective info, got beta-tc",
        ),
        (
            ("--objective", "beta-tc", "--prior", "mog"),
            "--objective beta-tc only applies to --prior standard, got mog",
        ),
        (
            ("--objective", "info", "--samples", "2"),
            "--samples must be 1 for --objective info, got 2",
        ),
        (
            ("--objective", "info", "--free-bits", "0.5"),
            "--free-bits 0.5 only applies to --objective elbo, got info; add --free-bits 0",
        ),
        (
            ("--objective", "beta-tc", "--batch-size", "1"),
            "--objective beta-tc needs at least 2 examples per batch on each device, got --batch-size 1 and "
            "--devices 1",
        ),
    ],
)
def test_impossible_options_fail_in_one_line(tmp_path, capsys, options, words):
    assert words in command_error(capsys, "train", "mlp", "--out", tmp_path / "run", *options)
    assert not (tmp_path / "run").exists()


def test_objective_is_passed_to_the_module():
    options = MLP(objective="beta-tc", beta=5.0).module_options()
    assert (options["aggregate"], options["aggregate_weight"]) == ("beta-tc", 5.0)
    assert MLP(beta=5.0).module_options()["aggregate"] is None
    assert float(MLP(objective="beta-tc", beta=5.0).make_elbo("bernoulli").beta) == 1
    assert float(MLP(objective="info", beta=0.0).make_elbo("bernoulli").beta) == 0
