"""The importance-weighted bound, compared with likelihoods in closed form."""

import math

import pytest
import torch
from torch import Tensor, nn

import fastvae
from fastvae.train import bounds
from fastvae.train.image.module import ImageVAE as VAE

pytestmark = pytest.mark.usefixtures("one_thread")


def linear_gaussian(orthogonal: bool) -> tuple[VAE, Tensor, Tensor]:
    """Return a model whose likelihood has a closed form, data drawn from it, and their log p(x).

    z ~ N(0, I) and x | z ~ N(W z + b, s^2 I), so x ~ N(b, W W' + s^2 I). The encoder has the mean of the true posterior
    and the best diagonal variances. If the columns of W are orthogonal, this posterior is exact.
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


def test_bound_with_exact_posterior_equals_likelihood(backend):
    """All weights are p(x) in this case, so the number of samples does not matter."""
    model, x, log_likelihood = linear_gaussian(orthogonal=True)
    for samples in (1, 20):
        found, _ = bounds.estimate_bounds(model, x, samples)
        torch.testing.assert_close(-found.nll, log_likelihood, rtol=0, atol=2e-5)


def test_bound_with_more_samples_approaches_likelihood_from_below(native):
    model, x, log_likelihood = linear_gaussian(orthogonal=False)
    offset = torch.tensor([0.3, 0.3, 0.3])
    with torch.no_grad():
        model.encoder.bias += torch.cat([offset, offset])  # a wrong mean, and too large a variance
    gaps = []
    for samples in (1, 10, 100, 3000):
        found, mu = bounds.estimate_bounds(model, x, samples, seed=1)
        gaps.append((log_likelihood + found.nll).mean().item())
    assert gaps == sorted(gaps, reverse=True)
    assert gaps[0] > 10 * gaps[2] > 0
    assert 0 < gaps[3] < 0.01

    # The gap of the ELBO is the divergence of the encoder from the true posterior.
    elbo = -(found.reconstruction + found.kl)
    normal = torch.distributions.MultivariateNormal
    precision = torch.eye(3) + model.decoder.weight.T @ model.decoder.weight / 0.6**2
    encoder = normal(mu[0], torch.diag_embed(model.encoder.bias[3:].exp()))
    kl = torch.distributions.kl_divergence(encoder, normal(mu[0] - offset, precision_matrix=precision)).item()
    assert (log_likelihood - elbo).mean().item() == pytest.approx(kl, rel=0.01)
    assert kl > 0.3


@pytest.mark.parametrize("draws", [1, 3, 7, 10])
def test_bound_agrees_with_log_mean_exp_in_float64(native, draws):
    """The expected value is log-mean-exp over all draws at once, with torch.distributions in float64."""
    torch.manual_seed(0)
    encoder, decoder = nn.Linear(10, 8), nn.Linear(4, 10)
    model = VAE(encoder, decoder, fastvae.ELBO("bernoulli"), latents=4, dimensions=10)
    x = torch.rand(6, 10).round()
    advanced = []
    found, mu = bounds.estimate_bounds(model, x, 7, seed=5, first_row=3, draws=draws, advance=advanced.append)
    assert sum(advanced) == 7
    assert max(advanced) == min(draws, 7)
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


def test_bound_is_independent_of_batch_size(native):
    model, x, _ = linear_gaussian(orthogonal=False)
    whole, _ = bounds.estimate_bounds(model, x, 5, draws=2)
    parts = [
        bounds.estimate_bounds(model, part, 5, first_row=90 * i)[0] for i, part in enumerate(x.split(90))
    ]
    for value, pieces in zip(whole, zip(*parts, strict=True), strict=True):
        torch.testing.assert_close(value, torch.cat(pieces), rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("draws", [4, 30])
def test_bound_equals_a_loop_over_single_draws(native, draws):
    """The noise of draw k is that of a single draw with the offset 4 k."""
    model, x, _ = linear_gaussian(orthogonal=False)
    found, _ = bounds.estimate_bounds(model, x, 30, seed=2, draws=draws)
    with torch.no_grad():
        mu, logvar = model.encode(x)
        log_weights, nlls = [], []
        for k in range(30):
            z, _ = fastvae.functional.reparameterize_kl(mu, logvar, seed=torch.tensor([2, 4 * k]))
            nlls.append(model.nll(z, x).double())
            mean, variance = mu.double(), logvar.double().exp()
            log_ratio = ((z.double() - mean) ** 2 / variance + variance.log() - z.double() ** 2).sum(1) / 2
            log_weights.append(log_ratio - nlls[-1])
    expected = math.log(30) - torch.stack(log_weights).logsumexp(0)
    torch.testing.assert_close(found.nll, expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(found.reconstruction, torch.stack(nlls).mean(0), rtol=1e-6, atol=0)


def test_bound_with_extreme_weights_is_finite(native):
    """With an encoder far from the posterior, the log-weights are about -1e5 and differ by 1e5."""
    model, x, _ = linear_gaussian(orthogonal=False)
    with torch.no_grad():
        model.encoder.bias[:3] += 200
    found, _ = bounds.estimate_bounds(model, x, 3)
    assert found.nll.isfinite().all()
    assert (found.nll > 1e4).all()
