"""The likelihood modules: means, samples, forms of the scale, and extreme parameters."""

import math
from collections.abc import Callable
from typing import Any

import mpmath
import numpy as np
import pytest
import scipy.integrate
import scipy.special
import scipy.stats
import torch
from test_densities import exact_continuous_bernoulli
from torch import Tensor

import fastvae
from fastvae import functional as fv
from fastvae import likelihoods, reference
from fastvae.likelihoods import ContinuousBernoulli, Gamma, Laplace, Likelihood, Poisson, StudentT

mpmath.mp.dps = 50


# --- The modules: mean, draws, channels -------------------------------------------------------------------------------


def grid(n: int) -> Tensor:
    return torch.tensor([-40.0, -3.0, -0.4, 0.0, 1e-3, 0.6, 5.0, 300.0]).repeat(n, 1)


def test_continuous_bernoulli_mean_is_accurate() -> None:
    logits = grid(1)[0].double().requires_grad_()
    mean = ContinuousBernoulli().mean(logits)
    for a, got in zip(logits.tolist(), mean.tolist(), strict=True):
        grad = exact_continuous_bernoulli(mpmath.mpf(a), mpmath.mpf(0))[1]
        assert abs(got - grad) < 1e-14
    torch.autograd.gradcheck(ContinuousBernoulli().mean, logits)
    assert ContinuousBernoulli().mean(logits.half()).dtype == torch.float16


SAMPLED: dict[str, tuple[Likelihood, Callable[[int], Any], Callable[[np.ndarray], np.ndarray]]] = {
    "laplace": (Laplace(0.5), lambda n: torch.full((n,), 0.2), scipy.stats.laplace(0.2, 0.5).cdf),
    "laplace, per element": (
        Laplace("per_element"),
        lambda n: (torch.full((n,), 0.2), torch.full((n,), math.log(0.5))),
        scipy.stats.laplace(0.2, 0.5).cdf,
    ),
    "student t": (StudentT(2.5, 0.5), lambda n: torch.full((n,), 0.2), scipy.stats.t(2.5, 0.2, 0.5).cdf),
    "gamma": (
        Gamma(2.5),
        lambda n: torch.full((n,), math.log(0.5)),
        scipy.stats.gamma(2.5, scale=0.5).cdf,
    ),
    "exponential": (Gamma(1), lambda n: torch.full((n,), -1.0), scipy.stats.expon(scale=math.exp(-1)).cdf),
    "continuous Bernoulli": (
        ContinuousBernoulli(),
        lambda n: torch.full((n,), 3.0),
        lambda x: np.expm1(3 * x) / np.expm1(3.0),
    ),
    "continuous Bernoulli, falling": (
        ContinuousBernoulli(),
        lambda n: torch.full((n,), -3.0),
        lambda x: np.expm1(-3 * x) / np.expm1(-3.0),
    ),
    "continuous Bernoulli, flat": (ContinuousBernoulli(), lambda n: torch.zeros(n), scipy.stats.uniform.cdf),
}


@pytest.mark.parametrize("name", SAMPLED)
def test_samples_follow_the_density(name: str) -> None:
    likelihood, params, distribution = SAMPLED[name]
    draws = likelihood.sample(params(20_000), torch.Generator().manual_seed(1))
    assert scipy.stats.kstest(draws.numpy(), distribution).pvalue > 1e-3
    again = likelihood.sample(params(20_000), torch.Generator().manual_seed(1))
    assert torch.equal(draws, again)
    assert not torch.equal(draws, likelihood.sample(params(20_000), torch.Generator().manual_seed(2)))


def test_poisson_samples_follow_the_distribution() -> None:
    draws = Poisson().sample(torch.full((20_000,), 0.7), torch.Generator().manual_seed(1))
    observed = torch.bincount(draws.long(), minlength=8)
    expected = 20_000 * scipy.stats.poisson.pmf(np.arange(len(observed)), math.exp(0.7))
    assert scipy.stats.chisquare(observed, expected * observed.sum().item() / expected.sum()).pvalue > 1e-3
    torch.testing.assert_close(Poisson().mean(torch.tensor([0.7])), torch.tensor([math.exp(0.7)]))


def test_gamma_mean_equals_that_of_samples(backend: str) -> None:
    """The mean of samples, and the minimum of an ELBO, where mean and data agree."""
    likelihood, log_scale = Gamma(4), torch.tensor([[-2.0, 0.0, 3.0]])
    mean = likelihood.mean(log_scale)
    torch.testing.assert_close(mean, 4 * torch.exp(log_scale))
    draws = likelihood.sample(log_scale.repeat(40_000, 1), torch.Generator().manual_seed(1))
    torch.testing.assert_close(draws.mean(0, keepdim=True), mean, rtol=0.01, atol=0)
    leaf = log_scale.clone().requires_grad_()
    fastvae.ELBO(likelihood)(leaf, mean, kl=torch.zeros(1)).loss.backward()
    assert leaf.grad is not None
    torch.testing.assert_close(leaf.grad, torch.zeros_like(leaf), rtol=0, atol=2e-6)
    assert likelihood.sample(log_scale.half()).dtype == torch.float16
    assert repr(likelihood) == "Gamma(shape=4)"


def test_continuous_bernoulli_samples_stay_in_0_1() -> None:
    draws = ContinuousBernoulli().sample(grid(10_000))
    assert ((draws >= 0) & (draws <= 1)).all()
    torch.testing.assert_close(draws.mean(0), ContinuousBernoulli().mean(grid(1)[0]), atol=0.02, rtol=0)


@pytest.mark.parametrize("make", [Laplace, lambda scale: StudentT(3.0, scale)], ids=["laplace", "student_t"])
def test_scale_is_the_same_in_every_form(backend: str, make: Callable[[Any], Likelihood]) -> None:
    """The same scale, passed in four forms, gives the same loss and gradient; a learned one can be trained."""
    loc, x = torch.randn(5, 6, 4), torch.randn(5, 6, 4)
    log_scale = torch.full_like(loc, math.log(0.7))
    learned = make("learned")
    with torch.no_grad():
        learned.log_scale.fill_(math.log(0.7))
    want = make(0.7).nll(loc, x)
    for likelihood, params in (
        (learned, loc),
        (make("per_element"), (loc, log_scale)),
        (make("per_element"), torch.cat((loc, log_scale), 1)),
    ):
        torch.testing.assert_close(likelihood.nll(params, x), want)
        torch.testing.assert_close(likelihood.mean(params), loc)
        assert likelihood.sample(params).shape == x.shape
        assert likelihood.channels(3) == (6 if likelihood.scale == "per_element" else 3)
    elbo = fastvae.ELBO(learned)
    elbo(loc, x, kl=torch.zeros(5)).loss.backward()
    by_element = log_scale.clone().requires_grad_()
    (make("per_element").nll((loc, by_element), x).mean()).backward()
    torch.testing.assert_close(learned.log_scale.grad, by_element.grad.sum())


def test_learned_scale_converges_to_that_of_the_data(native: None) -> None:
    generator = torch.Generator().manual_seed(3)
    for likelihood in (Laplace("learned"), StudentT(4.0, "learned")):
        with torch.no_grad():
            x = type(likelihood)(**({"df": 4.0} if isinstance(likelihood, StudentT) else {})).sample(
                torch.zeros(64, 400), generator
            )
        x = 0.25 * x
        optimiser = torch.optim.Adam(likelihood.parameters(), lr=0.1)
        for _ in range(150):
            optimiser.zero_grad()
            (likelihood.nll(torch.zeros_like(x), x).mean() / 400).backward()
            optimiser.step()
        assert abs(likelihood.log_scale.exp().item() - 0.25) < 0.01


@pytest.mark.parametrize("name", ["laplace", "continuous_bernoulli", "poisson"])
def test_elbo_by_name_creates_the_likelihood(backend: str, name: str) -> None:
    elbo = fastvae.ELBO(name)
    x = torch.rand(3, 4).round()
    out = elbo(torch.randn(3, 4, requires_grad=True), x, kl=torch.zeros(3))
    assert type(elbo.likelihood) is likelihoods.BY_NAME[name]
    out.loss.backward()


def test_elbo_accepts_integer_counts(backend: str) -> None:
    rates, counts = torch.randn(4, 9), torch.poisson(torch.full((4, 9), 20.0))
    want = fastvae.ELBO("poisson")(rates, counts, kl=torch.zeros(4)).loss
    for dtype in (torch.uint8, torch.uint16, torch.int32, torch.int64):
        got = fastvae.ELBO("poisson")(rates, counts.to(dtype), kl=torch.zeros(4)).loss
        assert torch.equal(got, want), dtype


# --- Counts that are none ---------------------------------------------------------------------------------------------

BAD_COUNTS = {
    "negative": (torch.tensor([[0, 1], [2, -3]]), r"got -3 at \(1, 1\)"),
    "fractional": (torch.tensor([[0.0, 1.5], [2.5, 3]]), r"got 1.5 at \(0, 1\)"),
    "nan": (torch.tensor([[0.0, 1.0], [math.nan, 3]]), r"got nan at \(1, 0\)"),
    "infinite": (torch.tensor([[0.0, 1.0], [math.inf, 3]]), r"got inf at \(1, 0\)"),
}


@pytest.mark.parametrize("name", BAD_COUNTS)
def test_validate_names_the_first_invalid_count(name: str) -> None:
    target, words = BAD_COUNTS[name]
    with pytest.raises(
        ValueError,
        match=r"fastvae.poisson_nll: `target` must hold counts, whole numbers that are at least 0, " + words,
    ):
        fv.poisson_nll(torch.zeros(2, 2), target, validate=True)
    fv.poisson_nll(torch.zeros(2, 2), target)  # not checked


def test_validate_accepts_counts() -> None:
    for dtype in (torch.float32, torch.uint8, torch.uint16, torch.int32, torch.int64):
        fv.poisson_nll(torch.zeros(2, 3), torch.tensor([[0, 1, 2], [3, 250, 4]]).to(dtype), validate=True)


# ---------------------------------------------------------------------------------------------------------------------
# Extreme means and samples
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("log_scale", [90.0, 1e30, math.inf])
def test_discretized_mean_with_an_overflowing_scale_is_finite(log_scale: float) -> None:
    params = torch.zeros(2, 2, 3)
    params[:, 1] = log_scale
    params.requires_grad_()
    likelihood = likelihoods.DiscretizedLogistic()
    mean = likelihood.mean(params)
    torch.testing.assert_close(mean, torch.full((2, 1, 3), 0.5))
    (gradient,) = torch.autograd.grad(mean.sum(), params)
    assert gradient.isfinite().all()
    assert set(likelihood.sample(params).unique().tolist()) <= {0, 255}
    mixture = likelihoods.DiscretizedLogisticMixture(2)
    params = torch.zeros(2, 20, 3)
    params[:, 8:14] = log_scale
    assert mixture.mean(params).isfinite().all()


def test_count_samples_stay_in_range() -> None:
    """torch.poisson counts in int64, and larger counts used to be negative."""
    rates = torch.tensor([[3.0, 44.0, 80.0]]).expand(1000, -1)
    counts = likelihoods.Poisson().sample(rates)
    for column, rate in zip(counts.double().T, rates[0].double().exp(), strict=True):
        assert (column >= 0).all()
        torch.testing.assert_close(column.mean(), rate, rtol=0.02, atol=0)
    # 1e18 in float64, where a relative spread of 1e-9 is visible.
    wide = likelihoods.Poisson().sample(torch.full((4000, 1), math.log(1e18), dtype=torch.float64))
    torch.testing.assert_close(wide.std().item(), 1e9, rtol=0.05, atol=0)
    with pytest.raises(
        ValueError, match=r"Poisson.sample: `params` must give rates within the range of float32"
    ):
        likelihoods.Poisson().sample(torch.tensor([[1.0, 90.0]]))
    with pytest.raises(ValueError, match=r"rates within the range of float16, at most 6.6e\+04"):
        likelihoods.Poisson().sample(torch.tensor([[12.0]], dtype=torch.float16))


@pytest.mark.parametrize("log_dispersion", [-200.0, -89.0, 89.0, 200.0])
def test_negative_binomial_samples_with_extreme_dispersion_are_finite(log_dispersion: float) -> None:
    likelihood = likelihoods.NegativeBinomial(2, "gene-cell")
    params = (torch.zeros(2000, 2), torch.full((2000,), 20.0), torch.full((2000, 2), log_dispersion))
    counts = likelihood.sample(params)
    assert counts.isfinite().all()
    # Poisson with mean 10, or nearly always 0.
    want = 10.0 if log_dispersion > 0 else 0.0
    torch.testing.assert_close(counts.mean().item(), want, rtol=0.03, atol=0)


@pytest.mark.parametrize(
    "likelihood", [likelihoods.ContinuousBernoulli(), likelihoods.StudentT(3.0), likelihoods.Gamma(2.0)]
)
def test_samples_without_float64_equal_those_with_it(
    likelihood: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on an MPS device: the same samples in float32, and nothing is created in float64."""
    params = torch.linspace(-3, 3, 4001).expand(2, -1).contiguous()
    exact = likelihood.sample(params.double(), generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr("fastvae.likelihoods.continuous.sampling_dtype", lambda like: torch.float32)
    monkeypatch.setattr(Tensor, "double", None)
    draws = likelihood.sample(params, generator=torch.Generator().manual_seed(0))
    assert draws.dtype == torch.float32
    assert draws.isfinite().all()
    for quantile in (0.1, 0.5, 0.9):
        torch.testing.assert_close(
            draws.quantile(quantile).item(), exact.quantile(quantile).item(), rtol=0.1, atol=0.1
        )


# ---------------------------------------------------------------------------------------------------------------------
# Scales: bounds and initial values
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "make", [likelihoods.Laplace, lambda *args, **options: likelihoods.StudentT(4.0, *args, **options)]
)
def test_log_scale_bounds_apply_the_smooth_clamp(backend: str, make: Any) -> None:
    """The smooth clamp of the Gaussian's log-variance, applied to packed, paired and learned log-scales."""
    x, loc = torch.randn(3, 2, 5), torch.randn(3, 2, 5)
    log_scale = (8 * torch.randn(3, 2, 5)).requires_grad_()
    clamped = reference.continuous.bounded_logvar(log_scale, (-4.0, 1.0))
    want = make("per_element").nll((loc, clamped), x)
    (grad,) = torch.autograd.grad(want.sum(), log_scale)
    likelihood = make("per_element", log_scale_bounds=(-4.0, 1.0))
    assert repr(likelihood).endswith("scale='per_element', log_scale_bounds=(-4.0, 1.0))")
    for params in ((loc, log_scale), torch.cat((loc, log_scale), 1)):
        got = likelihood.nll(params, x)
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(torch.autograd.grad(got.sum(), log_scale)[0], grad, rtol=1e-4, atol=1e-5)
        assert likelihood.sample(params).abs().max() < 1e4
    learned = make("learned", log_scale_bounds=(-4.0, 1.0))
    with torch.no_grad():
        learned.log_scale.fill_(50.0)
    torch.testing.assert_close(learned.nll(loc, x), make(math.e).nll(loc, x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "make",
    [
        lambda: likelihoods.Gaussian("learned"),
        lambda: likelihoods.Laplace("learned"),
        lambda: likelihoods.StudentT(3.0, "learned"),
        lambda: likelihoods.NegativeBinomial(4),
        lambda: likelihoods.ZeroInflatedNegativeBinomial(4),
    ],
)
def test_learned_scales_after_to_empty_are_0(make: Any) -> None:
    with torch.device("meta"):
        likelihood = make()
    likelihood.to_empty(device="cpu")
    for parameter in likelihood.parameters():
        parameter.data.fill_(7.0)
    likelihood.reset_parameters()
    assert all((parameter == 0).all() for parameter in likelihood.parameters())
    assert len(list(likelihood.parameters())) == 1
