"""Total correlation, the parts of the KL and MMD, against enumerations, closed forms and formulas by hand."""

import itertools
import math
import os
import re
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.distributions import MultivariateNormal, Normal

from fastvae.posteriors import DiagonalGaussian, LogStd, ScaleForm
from fastvae.regularizers import decompose_kl, mmd, total_correlation

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def data_set(size: int, dims: int = 2, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """(z, mu, logvar) with one sample of every posterior."""
    generator = torch.Generator().manual_seed(seed)
    mu, logvar, eps = torch.randn(3, size, dims, generator=generator, dtype=torch.float64)
    return mu + torch.exp(logvar / 2) * eps, mu, logvar


def densities(z: Tensor, mu: Tensor, logvar: Tensor) -> Tensor:
    """q(z_b | n) by dimension, (B, N, D)."""
    return Normal(mu, torch.exp(logvar / 2)).log_prob(z.unsqueeze(1)).exp()


def estimates(batch: list[int], data: tuple[Tensor, Tensor, Tensor], estimator: str) -> tuple[Tensor, Tensor]:
    """The estimates of q(z) and of prod_j q(z_j) for the first of the batch."""
    z, mu, logvar = (t[batch] for t in data)
    parts = decompose_kl(z, mu, logvar, len(data[0]), estimator, reduction="none")
    log_q = Normal(mu, torch.exp(logvar / 2)).log_prob(z).sum(1) - parts.mutual_information
    return log_q[0].exp(), (log_q - parts.total_correlation)[0].exp()


N, B = 6, 3
BATCHES = [[0, *others] for others in itertools.combinations(range(1, N), B - 1)]


def test_mss_is_unbiased_over_all_batches(backend: str) -> None:
    data = data_set(N)
    got = torch.stack([estimates(batch, data, "mss")[0] for batch in BATCHES]).mean()
    want = densities(*data).prod(2)[0].mean()
    torch.testing.assert_close(got, want, rtol=1e-12, atol=0)


def test_mss_of_one_dimension_is_unbiased_over_all_batches(backend: str) -> None:
    """With one dimension, the product of the marginals is the marginal itself."""
    data = data_set(N, 1)
    got = torch.stack([estimates(batch, data, "mss")[1] for batch in BATCHES]).mean()
    torch.testing.assert_close(got, densities(*data)[0].mean(), rtol=1e-12, atol=0)


def test_mws_has_its_expectation_over_all_batches(backend: str) -> None:
    data = data_set(N)
    got = torch.stack([estimates(batch, data, "mws")[0] for batch in BATCHES]).mean()
    q = densities(*data).prod(2)[0]
    want = (q[0] + (B - 1) / (N - 1) * q[1:].sum()) / (N * B)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=0)


@pytest.mark.parametrize("estimator", ["mss", "mws"])
def test_weights_of_a_batch_are_those_of_the_definition(backend: str, estimator: str) -> None:
    data, batch = data_set(N), [4, 0, 2]
    q = densities(*(t[batch] for t in data))[0]
    own, others = (1 / N, (N - 1) / (N * (B - 1))) if estimator == "mss" else (1 / (N * B),) * 2
    joint, marginals = estimates(batch, data, estimator)
    torch.testing.assert_close(joint, own * q[0].prod() + others * q[1:].prod(1).sum())
    torch.testing.assert_close(marginals, (own * q[0] + others * q[1:].sum(0)).prod())


@pytest.mark.parametrize("estimator", ["mss", "mws"])
def test_estimate_does_not_depend_on_the_order_of_the_batch(backend: str, estimator: str) -> None:
    data = data_set(8, 3)
    order = torch.randperm(8)
    shuffled = tuple(t[order] for t in data)
    torch.testing.assert_close(
        total_correlation(*data, 50, estimator), total_correlation(*shuffled, 50, estimator)
    )


def correlated(rho: float, size: int = 4096, std: float = 0.3) -> tuple[Tensor, Tensor, Tensor]:
    """Posteriors with this standard deviation, whose aggregate is Gaussian with unit variances and correlation `rho`.

    The points are Sobol's, so that the error of the mean is far below that of random ones (2 %)."""
    uniform = torch.quasirandom.SobolEngine(4, scramble=True, seed=1).draw(size, dtype=torch.float64)
    normal = math.sqrt(2) * torch.erfinv(2 * uniform.clamp(1e-9, 1 - 1e-9) - 1)
    covariance = torch.tensor([[1 - std**2, rho], [rho, 1 - std**2]], dtype=torch.float64)
    mu = normal[:, :2] @ torch.linalg.cholesky(covariance).T
    z = mu + std * normal[:, 2:]
    return z.float(), mu.float(), torch.full((size, 2), 2 * math.log(std))


@pytest.mark.skipif(INTERPRETED, reason="the interpreter would take minutes")
@pytest.mark.parametrize("rho", [0.0, 0.8])
def test_total_correlation_of_gaussians_is_that_of_their_correlation(native: None, rho: float) -> None:
    got = total_correlation(*correlated(rho), 4096).item()
    want = -math.log(1 - rho**2) / 2
    assert abs(got - want) < (0.02 * want if rho else 0.02)


@pytest.mark.skipif(INTERPRETED, reason="the interpreter would take minutes")
def test_parts_of_the_kl_are_those_of_gaussians(native: None) -> None:
    """The aggregate is N(0, Sigma), so that every part has a closed form."""
    rho, std = 0.8, 0.3
    parts = decompose_kl(*correlated(rho), 4096)
    sigma = torch.tensor([[1.0, rho], [rho, 1.0]])
    aggregate = MultivariateNormal(torch.zeros(2), sigma)
    information = aggregate.entropy() - Normal(torch.zeros(2), std).entropy().sum()
    assert abs(parts.mutual_information - information) < 0.02
    assert abs(parts.dimension_wise_kl) < 0.01


def test_parts_sum_to_the_kl(backend: str) -> None:
    z, mu, logvar = data_set(7, 3)
    parts = decompose_kl(z, mu, logvar, 100, reduction="none")
    standard = Normal(torch.zeros_like(mu), torch.ones_like(mu))
    want = (Normal(mu, torch.exp(logvar / 2)).log_prob(z) - standard.log_prob(z)).sum(1)
    torch.testing.assert_close(torch.stack(parts).sum(0), want)
    torch.testing.assert_close(torch.stack(decompose_kl(z, mu, logvar, 100)), torch.stack(parts).mean(1))


def test_gradient_of_total_correlation_passes_gradcheck(backend: str) -> None:
    inputs = [x.requires_grad_() for x in data_set(5, 3)]
    assert torch.autograd.gradcheck(lambda *x: total_correlation(*x, 40), inputs)


def test_beta_tc_objective_compiles_for_every_batch_size(backend: str) -> None:
    if backend == "triton":
        pytest.skip("the interpreter's kernels cannot be compiled")
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda *x: torch.stack(decompose_kl(*x, 100)), fullgraph=True, dynamic=True, backend="aot_eager"
    )
    for size in (5, 8):
        inputs = [x.float() for x in data_set(size)]
        torch.testing.assert_close(compiled(*inputs), torch.stack(decompose_kl(*inputs, 100)))


def kernel(x: Tensor, y: Tensor, width: float) -> Tensor:
    return torch.exp(-torch.cdist(x, y).square() / (2 * width**2))


@pytest.mark.parametrize("unbiased", [True, False])
@pytest.mark.parametrize("bandwidth", [None, 0.7, [0.5, 2.0]])
def test_mmd_equals_the_formula(backend: str, bandwidth: float | list[float] | None, unbiased: bool) -> None:
    z, p = (x.double().requires_grad_() for x in (torch.randn(9, 3) + 0.5, torch.randn(7, 3)))
    got = mmd(z, p, bandwidth=bandwidth, unbiased=unbiased)
    widths = bandwidth if isinstance(bandwidth, list) else [bandwidth or math.sqrt(3)]

    def within(x: Tensor, width: float) -> Tensor:
        all_pairs, n = kernel(x, x, width), len(x)
        off_diagonal = all_pairs.sum() - all_pairs.diagonal().sum()
        return off_diagonal / (n * (n - 1)) if unbiased else all_pairs.mean()

    want = sum(within(z, w) + within(p, w) - 2 * kernel(z, p, w).mean() for w in widths) / len(widths)
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)


def test_gradient_of_mmd_passes_gradcheck(backend: str) -> None:
    z, p = (torch.randn(6, 3, dtype=torch.float64, requires_grad=True) for _ in range(2))
    assert torch.autograd.gradcheck(lambda z, p: mmd(z, p), (z, p))
    assert torch.autograd.gradcheck(lambda z: mmd(z, bandwidth=0.8), (z,))


def test_mmd_from_the_standard_normal_is_the_limit_of_many_samples(native: None) -> None:
    z = torch.randn(50, 3) + 1
    exact = mmd(z, bandwidth=1.5)
    sampled = mmd(z, torch.randn(20_000, 3), bandwidth=1.5)
    assert abs(exact - sampled) < 0.005
    assert exact > 0.05


def test_mmd_of_a_prior_from_itself_is_zero_within_its_noise(native: None) -> None:
    values = torch.stack([mmd(torch.randn(200, 4)) for _ in range(50)])
    assert abs(values.mean()) < 4 * values.std() / math.sqrt(50)


FORMS = ("logvar", "log_std", "softplus", "variance", LogStd(soft_clamp=1.5, eps=1e-2))


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_other_form_and_a_packed_head_are_converted_first(form: str | ScaleForm) -> None:
    z, mu, v = data_set(6)
    head = torch.cat([mu, v], 1)
    posterior = DiagonalGaussian(head, form)
    want = torch.stack(decompose_kl(z, posterior.mean, posterior.logvar, 20))
    for given in ((mu, v), (head, None)):
        torch.testing.assert_close(torch.stack(decompose_kl(z, *given, 20, form=form)), want)
        torch.testing.assert_close(total_correlation(z, *given, 20, form=form), want[1])


Z = torch.zeros(4, 3)
WRONG: dict[str, tuple[Callable[[], object], type[Exception], str]] = {
    "size": (
        lambda: total_correlation(Z, Z, Z, 3),
        ValueError,
        "total_correlation: `dataset_size` must be at least the 4 rows of `z`, got 3",
    ),
    "size type": (
        lambda: total_correlation(Z, Z, Z, 3.5),  # type: ignore[arg-type]
        TypeError,
        "total_correlation: `dataset_size` must be an int, got 3.5",
    ),
    "one row": (
        lambda: decompose_kl(Z[:1], Z[:1], Z[:1], 10),
        ValueError,
        "decompose_kl: `z` must have at least 2 rows for the estimator 'mss', got shape (1, 3)",
    ),
    "estimator": (
        lambda: total_correlation(Z, Z, Z, 10, "mean"),
        ValueError,
        "total_correlation: `estimator` must be one of 'mss', 'mws', got 'mean'",
    ),
    "reduction": (
        lambda: decompose_kl(Z, Z, Z, 10, reduction="sum"),
        ValueError,
        "decompose_kl: `reduction` must be one of 'mean', 'none', got 'sum'",
    ),
    "posterior": (
        lambda: total_correlation(Z, Z[:2], Z, 10),
        ValueError,
        "total_correlation: `mu` must have the shape of `z` (4, 3), got (2, 3)",
    ),
    "form": (
        lambda: total_correlation(Z, Z, Z, 10, form="sigma"),
        ValueError,
        "total_correlation: `form` must be one of 'logvar', 'log_std', 'softplus', 'variance', got 'sigma'",
    ),
    "packed head": (
        lambda: decompose_kl(Z, Z, None, 10),
        ValueError,
        "decompose_kl: without `logvar`, `mu` must be a packed head (4, 6), mean and scale along dimension 1, for `z` "
        "(4, 3), got (4, 3)",
    ),
    "mmd dimensions": (
        lambda: mmd(Z, Z[:, :2]),
        ValueError,
        "mmd: `prior_sample` must have shape (P, 3) for `z` (4, 3), got (4, 2)",
    ),
    "mmd rows": (
        lambda: mmd(Z[:1]),
        ValueError,
        "mmd: `z` must have at least 2 rows, got shape (1, 3); did you mean unbiased=False?",
    ),
    "bandwidth": (
        lambda: mmd(Z, bandwidth=0.0),
        ValueError,
        "mmd: `bandwidth` must be positive and finite, got 0.0",
    ),
    "no bandwidth": (
        lambda: mmd(Z, bandwidth=[]),
        ValueError,
        "mmd: `bandwidth` must have at least one value, got []",
    ),
    "rank": (lambda: mmd(torch.zeros(4, 3, 2)), ValueError, "mmd: `z` must have shape (B, D), got (4, 3, 2)"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_argument_raises(backend: str, name: str) -> None:
    call, kind, message = WRONG[name]
    with pytest.raises(kind, match=re.escape(f"fastvae.{message}")):
        call()


def test_estimates_in_half_precision_are_float32(backend: str) -> None:
    inputs = [x.half() for x in data_set(6)]
    got = total_correlation(*inputs, 20)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, total_correlation(*(x.float() for x in inputs), 20))
    of_form = total_correlation(*inputs, 20, form="softplus")
    torch.testing.assert_close(of_form, total_correlation(*(x.float() for x in inputs), 20, form="softplus"))
