"""The mixture of two negative binomials: accuracy, extremes, targets, weights, autograd, and the module."""

import math
import os
from collections.abc import Iterator
from functools import cache
from itertools import product
from typing import Any

import mpmath
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fastvae
from fastvae import functional, likelihoods
from fastvae.backends import choose
from fastvae.functional import negative_binomial_mixture_nll, negative_binomial_nll

INF, NAN = math.inf, math.nan
MIXTURE = "negative_binomial_mixture"
NAMES = ("mean1", "inverse_dispersion", "mean2", "mixture_logits")
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
VALUES = {torch.float64: 1e-12}  # 2e-6 for the others, whose rows are float32
SLOPES = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}
INTEGERS = (torch.uint8, torch.uint16, torch.int32, torch.int64)
Inputs = dict[str, Tensor]


@pytest.fixture(params=["reference", "native"])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Run the test on each backend that serves this likelihood on the CPU."""
    with fastvae.use_backend(request.param):
        yield request.param


def make(
    rows: int = 5, features: int = 37, dtype: torch.dtype = torch.float32, shared: bool = True
) -> tuple[Inputs, Tensor]:
    """The parameters, and counts of which half are 0 and some are large."""
    shape = (rows, features)
    counts = torch.poisson(torch.exp(2 * torch.randn(shape))) * (torch.rand(shape) > 0.4)
    values = {
        "mean1": torch.exp(torch.randn(shape)),
        "inverse_dispersion": torch.exp(2 * torch.randn((features,) if shared else shape)),
        "mean2": torch.exp(2 + torch.randn(shape)),
        "mixture_logits": 2 * torch.randn(shape),
    }
    return {name: value.to(dtype) for name, value in values.items()}, counts.clamp(max=250).to(dtype)


def log_nb(t: Tensor, mu: Tensor, theta: Tensor) -> Tensor:
    gammas = torch.lgamma(t + theta) - torch.lgamma(theta) - torch.lgamma(t + 1)
    return gammas + theta * torch.log(theta / (theta + mu)) + t * torch.log(mu / (theta + mu))


def formula(inputs: Inputs, target: Tensor) -> Tensor:
    """The nll of each element."""
    mu1, theta, mu2, pi = (inputs[name] for name in NAMES)
    t = target.to(mu1.dtype)
    first, second = F.logsigmoid(pi) + log_nb(t, mu1, theta), F.logsigmoid(-pi) + log_nb(t, mu2, theta)
    return -torch.logaddexp(first, second)


def sparse(target: Tensor) -> Tensor:
    """The counts as CSR, also of the dtypes that torch cannot convert."""
    csr = target.double().to_sparse_csr()
    return torch.sparse_csr_tensor(
        csr.crow_indices(), csr.col_indices(), csr.values().to(target.dtype), csr.shape
    )


def leaves_of(inputs: Inputs, dtype: torch.dtype | None = None) -> Inputs:
    return {name: x.detach().to(dtype or x.dtype, copy=True).requires_grad_() for name, x in inputs.items()}


def with_gradients(value: Tensor, leaves: Inputs, factors: Tensor | None = None) -> tuple[Tensor, Inputs]:
    factors = torch.ones_like(value) if factors is None else factors.to(value.dtype)
    found = torch.autograd.grad(value, list(leaves.values()), factors)
    return value.detach(), dict(zip(leaves, found, strict=True))


def evaluate(
    inputs: Inputs, target: Tensor, factors: Tensor | None = None, **options: Any
) -> tuple[Tensor, Inputs]:
    leaves = leaves_of(inputs)
    return with_gradients(negative_binomial_mixture_nll(**leaves, target=target, **options), leaves, factors)


def wanted(
    inputs: Inputs, target: Tensor, factors: Tensor | None = None, weight: Tensor | None = None
) -> tuple[Tensor, Inputs]:
    """Value and gradients of the rows by the formula, in float64."""
    leaves = leaves_of(inputs, torch.float64)
    values = formula(leaves, target)
    if weight is not None:
        values = values * weight.double()
    return with_gradients(values.sum(1), leaves, factors)


def check(found: tuple[Tensor, Inputs], want: tuple[Tensor, Inputs], dtype: torch.dtype) -> None:
    """Compare with the largest value, and with the largest gradient by the same parameter."""
    assert found[0].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    pairs = {"value": (found[0], want[0], VALUES.get(dtype, 2e-6))}
    pairs |= {name: (found[1][name], want[1][name], SLOPES[dtype]) for name in NAMES}
    for name, (one, other, tolerance) in pairs.items():
        assert one.shape == other.shape
        if other.numel():
            error = (one.double() - other).abs().max() / other.abs().max().clamp_min(1e-30)
            assert error <= tolerance, f"{name}: {error:.3g} of the largest, {tolerance:.3g} allowed"


# ---------------------------------------------------------------------------------------------------------------------
# Numbers
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["dense", "csr"])
@pytest.mark.parametrize("shared", [True, False], ids=["shared", "each"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(5, 37), (1, 1), (3, 8), (2, 1025), (70, 9), (0, 4), (4, 0)], ids=str)
def test_values_and_gradients_equal_the_formula(
    backend: str, shape: tuple[int, int], dtype: torch.dtype, shared: bool, layout: str
) -> None:
    inputs, target = make(*shape, dtype, shared)
    factors = 0.5 + torch.rand(shape[0])
    found = evaluate(inputs, sparse(target) if layout == "csr" else target, factors)
    check(found, wanted(inputs, target, factors), dtype)
    for name, gradient in found[1].items():
        assert gradient.dtype == dtype, name


@cache
def truths(dtype: torch.dtype) -> tuple[Inputs, Tensor, Tensor, Inputs]:
    """(parameters, counts, values, gradients) of a table of extremes, (points, 1), the last two in mpmath."""
    axes = (
        ((2.0, 40.0), (1e-3, 3.0), (1e6 + 700, 5e4), (1.5, 1.5 + 2**-12)),  # both means
        (1e-4, 0.5, 30.0, 1e8),
        (-100.0, 0.75, 100.0),
        (0.0, 1.0, 7.0, 300.0, 1e6),
    )
    points = [(*means, theta, pi, t) for means, theta, pi, t in product(*axes)]
    columns = torch.tensor(points, dtype=torch.float64).to(dtype).unsqueeze(2).unbind(1)
    exact = []
    with mpmath.workdps(50):
        for values in torch.cat(columns, 1).double().tolist():
            mu1, mu2, theta, pi, t = map(mpmath.mpf, values)
            gammas = mpmath.loggamma(t + theta) - mpmath.loggamma(theta) - mpmath.loggamma(t + 1)
            digamma = mpmath.digamma(t + theta) - mpmath.digamma(theta)
            p = 1 / (1 + mpmath.exp(-pi))
            parts = []
            for weight, mu in ((p, mu1), (1 / (1 + mpmath.exp(pi)), mu2)):
                log_p = gammas + theta * mpmath.log(theta / (theta + mu)) + t * mpmath.log(mu / (theta + mu))
                d_mu = t / mu - (t + theta) / (theta + mu)
                d_theta = digamma + mpmath.log(theta / (theta + mu)) + (mu - t) / (theta + mu)
                parts.append((weight * mpmath.exp(log_p), d_mu, d_theta))
            total = parts[0][0] + parts[1][0]
            share1, share2 = parts[0][0] / total, parts[1][0] / total
            d_theta = -(share1 * parts[0][2] + share2 * parts[1][2])
            row = (-mpmath.log(total), -share1 * parts[0][1], d_theta, -share2 * parts[1][1], p - share1)
            exact.append([float(x) for x in row])
    want = torch.tensor(exact, dtype=torch.float64)
    mu1, mu2, theta, pi, t = columns
    inputs = dict(zip(NAMES, (mu1, theta, mu2, pi), strict=True))
    return inputs, t, want[:, :1], dict(zip(NAMES, want[:, 1:].split(1, 1), strict=True))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_nll_equals_50_digits(backend: str, dtype: torch.dtype) -> None:
    """Dispersions from 1e-4 to 1e8, counts to 1e6, logits to 100, and means that nearly agree.

    Both sides start from the same numbers. An error of a value is allowed to be that of its terms, and one of a
    gradient that of the logarithm of the share by which it is multiplied, because both components may be far off. For
    small counts, CUDA's kernel computes it in float32: its error is that of a component's nll.
    """
    inputs, target, exact, slopes = truths(dtype)
    leaves = leaves_of(inputs)
    value = negative_binomial_mixture_nll(**leaves, target=target, reduction="none")
    _, found = with_gradients(value, leaves)
    rough, last = (1e-11, 1e-15) if dtype == torch.float64 else (5e-6, 3e-7)
    # CUDA's, which tests/backends/cuda/test_cuda_binding.py runs on the CPU.
    on_cuda = "FASTVAE_CUDA_BINDING" in os.environ
    assert ((value.double() - exact).abs() <= (0.15 if on_cuda else 0.1) * rough * exact.abs()).all()
    apart = 1 + (target.double() + leaves["mean1"] + leaves["mean2"]).detach().double()
    terms = 1e-14 * apart
    if on_cuda and dtype == torch.float32:
        terms = torch.where(target < 8, 1e-7 * apart.clamp(max=64), terms)
    for name in NAMES:
        error = (found[name].double() - slopes[name]).abs()
        allowed = slopes[name].abs() * (rough + terms)
        if name == "inverse_dispersion":  # a sum of terms of both signs
            allowed = allowed + 1e-15 * (target > 0) / inputs[name].double()
        if name == "mixture_logits":  # the difference of two probabilities, which have the errors of values
            allowed = allowed + last * (1 + exact.abs())
        worst = (error - allowed).argmax()
        assert (error <= allowed + torch.finfo(dtype).tiny).all(), (
            f"{name}: {found[name][worst].item()} for {slopes[name][worst].item()} at "
            f"{[x[worst].item() for x in inputs.values()]}, {target[worst].item()}"
        )


def test_probabilities_sum_to_1(backend: str) -> None:
    counts = torch.arange(3000, dtype=torch.float64).unsqueeze(0)
    mean1, theta, mean2, pi = (torch.full_like(counts, x) for x in (2.0, 3.0, 40.0, 0.7))
    values = negative_binomial_mixture_nll(mean1, counts, theta, mean2, pi, reduction="none")
    assert abs(torch.exp(-values).sum().item() - 1) < 1e-13


def test_nll_equals_the_formula_of_scvi(backend: str) -> None:
    """log_mixture_nb of scvi-tools, whose eps is within its logarithms."""
    inputs, target = make(dtype=torch.float64)
    mu1, theta, mu2, pi = (inputs[name] for name in NAMES)
    eps = 1e-8
    log1, log2 = (torch.log(theta + mu + eps) for mu in (mu1, mu2))
    gammas = torch.lgamma(target + theta) - torch.lgamma(theta) - torch.lgamma(target + 1)
    nb1, nb2 = (
        theta * (torch.log(theta + eps) - log) + target * (torch.log(mu + eps) - log) + gammas
        for mu, log in ((mu1, log1), (mu2, log2))
    )
    want = torch.logsumexp(torch.stack((nb1, nb2 - pi)), dim=0) - F.softplus(-pi)
    found = negative_binomial_mixture_nll(**inputs, target=target, eps=eps, reduction="none")
    torch.testing.assert_close(found, -want, rtol=1e-6, atol=1e-6)


@pytest.mark.slow  # the import of scvi-tools takes ten seconds
@pytest.mark.filterwarnings("ignore")
def test_nll_equals_scvi(backend: str) -> None:
    distributions = pytest.importorskip("scvi.distributions", reason="scvi-tools is not installed")
    inputs, target = make(dtype=torch.float64)
    mu1, theta, mu2, pi = (inputs[name] for name in NAMES)
    scvi = distributions.NegativeBinomialMixture(mu1=mu1, mu2=mu2, theta1=theta, mixture_logits=pi)
    found = negative_binomial_mixture_nll(**inputs, target=target, eps=1e-8, reduction="none")
    torch.testing.assert_close(found, -scvi.log_prob(target), rtol=1e-6, atol=1e-6)
    likelihood = likelihoods.NegativeBinomialMixture(37).double()
    torch.testing.assert_close(likelihood.mean((mu1, mu2, pi)), scvi.mean)


def test_gradcheck(backend: str) -> None:
    inputs, target = make(1, 5, torch.float64)
    target[0] = torch.tensor([0.0, 3.0, 1.0, 9.0, 30.0])  # on both sides of the start of Stirling's formula
    inputs["inverse_dispersion"] = torch.tensor([0.5, 20.0, 2.0, 2.0, 50.0], dtype=torch.float64)
    weight = 0.5 + torch.rand(1, 5)
    leaves = tuple(leaves_of(inputs).values())

    def rows(*params: Tensor, **options: Any) -> Tensor:
        return negative_binomial_mixture_nll(params[0], target, *params[1:], **options)

    assert torch.autograd.gradcheck(lambda *p: rows(*p, weight=weight, eps=0.1), leaves)
    assert torch.autograd.gradcheck(lambda *p: rows(*p, reduction="none"), leaves)
    if backend == "reference":
        assert torch.autograd.gradgradcheck(rows, leaves, fast_mode=True)


# ---------------------------------------------------------------------------------------------------------------------
# The ends
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("logit", [INF, -INF])
def test_infinite_logits_leave_one_component(backend: str, logit: float, dtype: torch.dtype) -> None:
    inputs, target = make(dtype=dtype)
    inputs["mixture_logits"].fill_(logit)
    value, gradients = evaluate(inputs, target)
    one, other = ("mean1", "mean2") if logit > 0 else ("mean2", "mean1")
    leaves = leaves_of({"mean": inputs[one], "inverse_dispersion": inputs["inverse_dispersion"]})
    want, slopes = with_gradients(negative_binomial_nll(**leaves, target=target), leaves)
    tolerance = {
        "rtol": 2e-6 if dtype == torch.float32 else 1e-12,
        "atol": 1e-6 if dtype == torch.float32 else 1e-12,
    }
    torch.testing.assert_close(value, want, **tolerance)
    torch.testing.assert_close(gradients[one], slopes["mean"], **tolerance)
    torch.testing.assert_close(
        gradients["inverse_dispersion"], slopes["inverse_dispersion"], rtol=1e-5, atol=1e-5
    )
    assert gradients[other].count_nonzero() == 0
    assert gradients["mixture_logits"].count_nonzero() == 0


SIGMOID = 1 / (1 + math.exp(-0.3))  # of the logit 0.3
NB_0 = (2 / 5) ** 2  # the probabilities of 0, 1 and 2 for a mean of 3 and an inverse dispersion of 2
NB_1, NB_2 = 2 * NB_0 * 3 / 5, 3 * NB_0 * 9 / 25
# (mean1, mean2, logit, count): the probability, and the gradients of its negative logarithm by the means
MEANS_OF_0 = {
    (0.0, 0.0, 0.3, 0.0): (1.0, SIGMOID, 1 - SIGMOID),
    (0.0, 3.0, 0.3, 0.0): (SIGMOID + (1 - SIGMOID) * NB_0, None, None),
    (0.0, 3.0, 0.3, 1.0): ((1 - SIGMOID) * NB_1, -SIGMOID / ((1 - SIGMOID) * NB_1), 4 / 15),
    (0.0, 3.0, 0.3, 2.0): ((1 - SIGMOID) * NB_2, 0.0, 2 / 15),
    (3.0, 0.0, 0.3, 2.0): (SIGMOID * NB_2, 2 / 15, 0.0),
    (0.0, 3.0, -INF, 2.0): (NB_2, 0.0, 2 / 15),
    (3.0, 0.0, INF, 1.0): (NB_1, 4 / 15, 0.0),
    (0.0, 0.0, 0.3, 2.0): (0.0, -INF, -INF),
    (0.0, 3.0, INF, 2.0): (0.0, -INF, 0.0),
    (3.0, 0.0, -INF, 1.0): (0.0, 0.0, -INF),
}  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_means_of_0_give_their_limits(backend: str, dtype: torch.dtype) -> None:
    """A mean of 0 makes every count above 0 impossible, but it has a slope beside a count of 1."""
    for (mean1, mean2, logit, count), (p, d_mean1, d_mean2) in MEANS_OF_0.items():
        values = (mean1, 2.0, mean2, logit)
        inputs = {name: torch.tensor([[x]], dtype=dtype) for name, x in zip(NAMES, values, strict=True)}
        value, gradients = evaluate(inputs, torch.tensor([[count]], dtype=dtype))
        want = -math.log(p) if p > 0 else INF
        assert value.item() == pytest.approx(want, rel=1e-6, abs=0)
        for name, slope in (("mean1", d_mean1), ("mean2", d_mean2)):
            if slope is not None:
                assert gradients[name].item() == pytest.approx(slope, rel=1e-6), (values, count)
        assert not gradients["mixture_logits"].isnan()
        assert gradients["inverse_dispersion"].isfinite()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_far_components_do_not_matter(backend: str, dtype: torch.dtype) -> None:
    """A component with a huge mean has no part in a count of 0, nor has one with a tiny mean in a large count."""
    means, counts = [3.0, 1e30, 1e-30], torch.tensor([[0.0, 0.0, 40.0]], dtype=dtype)
    for logit in (-50.0, 0.0, 50.0):
        values = (means, [1e4] * 3, [3.0] * 3, [logit] * 3)
        inputs = {name: torch.tensor([x], dtype=dtype) for name, x in zip(NAMES, values, strict=True)}
        nll = negative_binomial_mixture_nll(**inputs, target=counts, reduction="none")
        one = negative_binomial_nll(inputs["mean2"], counts, inputs["inverse_dispersion"], reduction="none")
        want = one - F.logsigmoid(-inputs["mixture_logits"])
        torch.testing.assert_close(nll[:, 1:], want[:, 1:], rtol=2e-6, atol=0)
        torch.testing.assert_close(nll[:, 0], one[:, 0], rtol=2e-6, atol=0)
        for gradient in evaluate(inputs, counts)[1].values():
            assert gradient.isfinite().all()


@pytest.mark.parametrize("theta", [1e20, INF])
def test_infinite_dispersion_gives_poissons(backend: str, theta: float) -> None:
    inputs, target = make(dtype=torch.float64)
    inputs["inverse_dispersion"].fill_(theta)
    value, gradients = evaluate(inputs, target)
    assert gradients.pop("inverse_dispersion").abs().max() < 1e-15
    leaves = leaves_of({name: inputs[name] for name in gradients}, torch.float64)
    log_p1, log_p2 = (
        target * m.log() - m - torch.lgamma(target + 1) for m in (leaves["mean1"], leaves["mean2"])
    )
    pi = leaves["mixture_logits"]
    mixed = -torch.logaddexp(F.logsigmoid(pi) + log_p1, F.logsigmoid(-pi) + log_p2)
    want, slopes = with_gradients(mixed.sum(1), leaves)
    torch.testing.assert_close(value, want, rtol=1e-12, atol=1e-12)
    for name, slope in slopes.items():
        torch.testing.assert_close(gradients[name], slope, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("theta", [0.0, 1e-300])
def test_vanishing_dispersion_gives_zeros(backend: str, theta: float) -> None:
    target = torch.tensor([[0.0, 0.0], [0.0, 5.0]], dtype=torch.float64)
    inputs = {name: torch.ones_like(target) for name in NAMES} | {
        "inverse_dispersion": torch.full_like(target, theta)
    }
    value, gradients = evaluate(inputs, target)
    assert abs(value[0]) < 1e-250
    want = INF if theta == 0 else -math.log(theta) + math.log(5)
    assert value[1].item() == pytest.approx(want, rel=1e-12)
    for name in ("mean1", "mean2", "mixture_logits"):
        assert gradients[name].isfinite().all()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("count", [0.0, 3.0])
def test_nan_affects_only_its_row(backend: str, name: str, count: float) -> None:
    inputs, target = make(4, 1030, shared=False)
    inputs[name][2, 1027], target[2, 1027] = NAN, count
    value, gradients = evaluate(inputs, target)
    assert value.isnan().tolist() == [False, False, True, False]
    for gradient in gradients.values():
        assert gradient[[0, 1, 3]].isfinite().all()
    assert any(gradient[2, 1027].isnan() for gradient in gradients.values())


# ---------------------------------------------------------------------------------------------------------------------
# Targets, weights and draws
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["dense", "csr"])
@pytest.mark.parametrize("target_dtype", [*INTEGERS, torch.float32], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_targets_of_any_dtype_are_not_scaled(
    backend: str, layout: str, target_dtype: torch.dtype, dtype: torch.dtype
) -> None:
    inputs, target = make(dtype=dtype)
    data = target.to(torch.float32).to(target_dtype)
    found = evaluate(inputs, sparse(data) if layout == "csr" else data)
    check(found, wanted(inputs, target), dtype)


def test_strided_inputs_equal_dense_ones(backend: str) -> None:
    inputs, target = make(9, 5, shared=False)
    want = evaluate(inputs, target)
    strided = {name: x.t().contiguous().t() for name, x in inputs.items()}
    for data in (target.t().contiguous().t(), torch.stack([target, target], 2)[..., 1]):
        value, gradients = evaluate(strided, data)
        assert torch.equal(value, want[0])
        for name, gradient in gradients.items():
            assert torch.equal(gradient, want[1][name])


PLACES = {"full": (5, 37), "rows": (5, 1), "features": (1, 37), "flat": (37,)}


@pytest.mark.parametrize("shared", [True, False], ids=["shared", "each"])
@pytest.mark.parametrize("layout", ["dense", "csr"])
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.uint8, torch.bool], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_weights_multiply_the_elements(
    backend: str, place: str, weight_dtype: torch.dtype, dtype: torch.dtype, layout: str, shared: bool
) -> None:
    inputs, target = make(dtype=dtype, shared=shared)
    weight = (2.5 * torch.rand(PLACES[place])).to(weight_dtype)
    factors = 0.5 + torch.rand(5)
    found = evaluate(inputs, sparse(target) if layout == "csr" else target, factors, weight=weight)
    check(found, wanted(inputs, target, factors, weight), dtype)


@pytest.mark.parametrize("reduction", ["event", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_elements_of_weight_0_are_left_out(backend: str, dtype: torch.dtype, reduction: str) -> None:
    inputs, target = make(dtype=dtype, shared=False)
    weight = torch.rand(5, 37) > 0.4
    poison = torch.tensor([NAN, INF, -INF, 0.0]).repeat(47)[:185].view(5, 37).to(dtype)
    poisoned = {name: torch.where(weight, x, poison) for name, x in inputs.items()}
    value, gradients = evaluate(
        poisoned, torch.where(weight, target, poison), weight=weight, reduction=reduction
    )
    want, slopes = evaluate(inputs, target, weight=weight, reduction=reduction)
    assert torch.equal(value, want)
    for name, gradient in gradients.items():
        assert gradient[~weight].count_nonzero() == 0
        assert torch.equal(gradient, slopes[name])


@pytest.mark.parametrize("layout", ["dense", "csr"])
def test_draws_share_target_weight_and_dispersion(backend: str, layout: str) -> None:
    target, weight = make()[1], torch.rand(5, 37)
    drawn = [make()[0] for _ in range(3)]
    theta = drawn[0]["inverse_dispersion"]
    inputs = {name: torch.stack([one[name] for one in drawn]) for name in NAMES} | {
        "inverse_dispersion": theta
    }
    data = sparse(target) if layout == "csr" else target
    found, gradients = evaluate(inputs, data, draws=3, weight=weight)
    each = [evaluate(one | {"inverse_dispersion": theta}, data, weight=weight) for one in drawn]
    assert torch.equal(found, torch.stack([value for value, _ in each]))
    for name in ("mean1", "mean2", "mixture_logits"):
        assert torch.equal(gradients[name], torch.stack([slopes[name] for _, slopes in each]))
    torch.testing.assert_close(
        gradients["inverse_dispersion"], sum(slopes["inverse_dispersion"] for _, slopes in each)
    )


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("shared", [True, False], ids=["shared", "each"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_values_of_elements_equal_the_formula(
    backend: str, dtype: torch.dtype, shared: bool, weighted: bool
) -> None:
    inputs, target = make(dtype=dtype, shared=shared)
    weight = 0.5 + torch.rand(5, 37) if weighted else None
    factors = 0.5 + torch.rand(5, 37)
    leaves = leaves_of(inputs, torch.float64)
    values = formula(leaves, target) * (1 if weight is None else weight.double())
    want = with_gradients(values, leaves, factors)
    check(evaluate(inputs, target, factors, reduction="none", weight=weight), want, dtype)


@pytest.mark.parametrize("needed", NAMES)
def test_each_parameter_may_be_the_only_one_with_a_gradient(backend: str, needed: str) -> None:
    inputs, target = make()
    for options in ({}, {"reduction": "none"}):
        want = evaluate(inputs, target, **options)[1][needed]
        leaf = inputs[needed].clone().requires_grad_()
        value = negative_binomial_mixture_nll(**inputs | {needed: leaf}, target=target, **options)
        assert torch.equal(torch.autograd.grad(value.sum(), leaf)[0], want)


def test_eps_is_added_to_both_means(backend: str) -> None:
    inputs, target = make(dtype=torch.float64)
    larger = inputs | {name: inputs[name] + 0.25 for name in ("mean1", "mean2")}
    want, found = evaluate(larger, target), evaluate(inputs, target, eps=0.25)
    torch.testing.assert_close(found, want, rtol=1e-14, atol=0)


# ---------------------------------------------------------------------------------------------------------------------
# Wrong inputs
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "options", "kind", "message"),
    [
        ({"mean1": torch.ones(37)}, {}, ValueError, r"`mean1` must have shape \(B, G\), batch and features"),
        ({"mean1": torch.ones(5, 37).int()}, {}, TypeError, "`mean1` must be"),
        ({"mean2": torch.ones(5, 36)}, {}, ValueError, "`mean2` must have the shape of `mean1`"),
        ({"mean2": torch.ones(37)}, {}, ValueError, "`mean2` must have the shape of `mean1`"),
        ({"mixture_logits": torch.ones(5, 37).double()}, {}, TypeError, "`mixture_logits` must be"),
        ({"inverse_dispersion": torch.ones(36)}, {}, ValueError, r"`inverse_dispersion` must have the shape \(37,\)"),
        ({"target": torch.ones(5, 36)}, {}, ValueError, "`target` must have the shape of `mean1`"),
        ({"target": torch.ones(5, 37).to_sparse()}, {}, TypeError, "`target` must be dense or torch.sparse_csr"),
        ({"target": torch.ones(5, 37).bool()}, {}, TypeError, "`target` must be"),
        ({"target": torch.ones(5, 37, requires_grad=True)}, {}, ValueError, r"pass target\.detach\(\)"),
        ({}, {"eps": -1.0}, ValueError, "`eps` must be finite and at least 0"),
        ({}, {"reduction": "sum"}, ValueError, "`reduction` must be one of"),
        ({}, {"reduction": "none", "draws": 1}, ValueError, "`draws` must be None"),
        ({}, {"weight": torch.ones(4, 37)}, ValueError, "`weight` must have"),
        ({"target": -torch.ones(5, 37)}, {"validate": True}, ValueError, r"`target` must hold counts.*, got -1.0 at"),
        ({"mean2": -torch.ones(5, 37)}, {"validate": True}, ValueError, "`mean2` must hold .*at least 0"),
        ({"mean1": -torch.ones(5, 37)}, {"validate": True, "eps": 1e-8}, ValueError, "`mean1` must hold .*at least 0"),
        ({"inverse_dispersion": torch.zeros(37)}, {"validate": True}, ValueError, "`inverse_dispersion` must hold pos"),
        ({"mixture_logits": torch.full((5, 37), NAN)}, {"validate": True}, ValueError, "`mixture_logits` must hold"),
    ],
)  # fmt: skip
def test_wrong_inputs_raise(
    backend: str, change: Inputs, options: dict[str, Any], kind: type[Exception], message: str
) -> None:
    inputs, target = make()
    with pytest.raises(kind, match=rf"fastvae\.negative_binomial_mixture_nll: .*{message}"):
        negative_binomial_mixture_nll(**{**inputs, "target": target, **change}, **options)


def test_validate_accepts_valid_inputs(backend: str) -> None:
    inputs, target = make()
    want = negative_binomial_mixture_nll(**inputs, target=target)
    assert torch.equal(negative_binomial_mixture_nll(**inputs, target=target, validate=True), want)


def test_triton_leaves_it_to_the_reference_with_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choose, "_fallbacks_warned", set())
    assert MIXTURE in choose.LIKELIHOODS_LACKING["triton", "cuda"]
    with pytest.warns(RuntimeWarning, match="reference for the likelihood 'negative_binomial_mixture'"):
        assert choose._substitute("triton", "cuda", MIXTURE, "nll").name == "reference"


# ---------------------------------------------------------------------------------------------------------------------
# Autograd
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("use", ["loss", "nll", "both", "twice"])
@pytest.mark.parametrize("shared", [True, False], ids=["shared", "each"])
def test_outputs_used_in_any_way_give_correct_gradients(
    backend: str, dtype: torch.dtype, reduction: str, use: str, shared: bool
) -> None:
    inputs, target = make(6, 33, dtype, shared)
    leaves = leaves_of(inputs)
    code = fastvae.reference.REDUCTIONS[reduction]
    loss, nll = functional.loss.nll(
        MIXTURE, list(leaves.values()), target, [0.0], torch.ones(6), torch.tensor(0.5), code
    )
    rows = torch.linspace(0.5, 1.5, 6)
    of_loss = {"mean": torch.full((6,), 1 / 6), "sum": torch.ones(6), "none": rows}[reduction]
    total = (loss * rows).sum() if reduction == "none" else loss
    objective, factors = {
        "loss": (total, of_loss),
        "nll": ((nll * rows).sum(), rows),
        "both": (total + (nll * rows).sum(), of_loss + rows),
        "twice": (total + total, 2 * of_loss),
    }[use]
    _, gradients = with_gradients(objective, leaves)
    check((nll.detach(), gradients), wanted(inputs, target, factors), dtype)
    for name, leaf in leaves.items():
        assert torch.equal(leaf, inputs[name])
        assert leaf._version == 0


@pytest.mark.parametrize("reduction", ["event", "none"])
def test_kept_graph_gives_the_same_gradients_twice(backend: str, reduction: str) -> None:
    inputs, target = make()
    leaves = list(leaves_of(inputs).values())
    loss = negative_binomial_mixture_nll(leaves[0], target, *leaves[1:], reduction=reduction).sum()
    first = torch.autograd.grad(loss, leaves, retain_graph=True)
    copies = [x.clone() for x in first]
    for one, copy, other in zip(first, copies, torch.autograd.grad(loss, leaves), strict=True):
        assert torch.equal(one, other)
        assert torch.equal(one, copy)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("op", ["nll", "nll, csr", "elements"])
def test_opcheck(dtype: torch.dtype, op: str, native: None) -> None:
    inputs, target = make(3, 9, dtype)
    params = list(leaves_of(inputs).values())
    if op == "elements":
        arguments: tuple[Any, ...] = (MIXTURE, params, target, [1e-8], 1.0)
        torch.library.opcheck(torch.ops.fastvae.nll_elements.default, arguments)
        return
    if op == "nll, csr":
        csr = target.to_sparse_csr()
        # These are copies, because views of a sparse tensor refer to it, and the checks cannot make a fake of it.
        params += [csr.crow_indices().clone(), csr.col_indices().clone()]
        target = csr.values().clone()
    arguments = (MIXTURE, params, target, [0.0], torch.rand(3), torch.tensor(0.5), 2)
    torch.library.opcheck(torch.ops.fastvae.nll.default, arguments)


def test_compiled_call_is_one_graph(backend: str) -> None:
    from torch._dynamo.testing import CompileCounter

    counter = CompileCounter()

    elbo = fastvae.ELBO(likelihoods.NegativeBinomialMixture(11))

    def step(mean1: Tensor, mean2: Tensor, logits: Tensor, x: Tensor, kl: Tensor) -> Tensor:
        return elbo((mean1, mean2, logits), x, kl=kl).loss

    torch._dynamo.reset()
    compiled = torch.compile(step, backend=counter, fullgraph=True, dynamic=True)
    for rows in (3, 5, 8):
        inputs, target = make(rows, 11)
        params = [inputs[name].requires_grad_() for name in ("mean1", "mean2", "mixture_logits")]
        leaves, kl = [*params, *elbo.parameters()], torch.rand(rows)
        got, want = (torch.autograd.grad(f(*params, target, kl), leaves) for f in (compiled, step))
        torch.testing.assert_close(got, want)
    assert counter.frame_count == 1


def test_same_bits_at_any_thread_count(threads: None, native: None) -> None:
    inputs, target = make(300, 300)
    results = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        results.append(evaluate(inputs, target))
    for value, gradients in results[1:]:
        assert torch.equal(value, results[0][0])
        for name, gradient in gradients.items():
            assert torch.equal(gradient, results[0][1][name])


def check_on_this_instruction_set() -> None:
    """For test_every_instruction_set_gives_the_same_results of test_count_elements.py, which starts the processes."""
    for dtype, shared in product((torch.float32, torch.float64, torch.bfloat16), (True, False)):
        inputs, target = make(9, 1100, dtype, shared)
        for data in (target, sparse(target)):
            check(evaluate(inputs, data), wanted(inputs, target), dtype)


# ---------------------------------------------------------------------------------------------------------------------
# The module
# ---------------------------------------------------------------------------------------------------------------------


def test_module_equals_the_function(backend: str) -> None:
    likelihood = likelihoods.NegativeBinomialMixture(37)
    inputs, target = make()
    mean1, theta, mean2, pi = (inputs[name] for name in NAMES)
    with torch.no_grad():
        likelihood.log_dispersion.copy_(theta.log())
    want = formula({name: x.double() for name, x in inputs.items()}, target).sum(1).float()
    params = (mean1, mean2, pi)
    torch.testing.assert_close(likelihood.nll(params, target), want)
    out = fastvae.ELBO(likelihood, beta=0.25, reduction="sum")(params, target.int(), kl=torch.ones(5))
    torch.testing.assert_close(out.loss, want.sum() + 1.25)
    torch.autograd.backward(out.loss)
    assert likelihood.log_dispersion.grad is not None
    torch.testing.assert_close(
        likelihood.log_dispersion.grad,
        evaluate(inputs, target)[1]["inverse_dispersion"] * theta,
        rtol=1e-4,
        atol=1e-4,
    )
    torch.testing.assert_close(likelihood.mean(params), pi.sigmoid() * mean1 + (1 - pi.sigmoid()) * mean2)
    assert likelihood.channels(37) == 3 * 37
    assert repr(likelihood) == "NegativeBinomialMixture(37)"
    likelihood.reset_parameters()
    assert likelihood.log_dispersion.count_nonzero() == 0


@pytest.mark.parametrize("log_dispersion", [-1e4, 100.0, 1e4])
def test_module_with_an_extreme_dispersion_has_finite_gradients(backend: str, log_dispersion: float) -> None:
    likelihood = likelihoods.NegativeBinomialMixture(37)
    inputs, target = make()
    torch.nn.init.constant_(likelihood.log_dispersion, log_dispersion)
    params = tuple(inputs[name].requires_grad_() for name in ("mean1", "mean2", "mixture_logits"))
    if log_dispersion < 0:  # where other counts are impossible
        target = torch.zeros_like(target)
    value = likelihood.nll(params, target)
    assert value.isfinite().all()
    for gradient in torch.autograd.grad(value.sum(), [*params, likelihood.log_dispersion]):
        assert gradient.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_samples_have_the_right_moments(dtype: torch.dtype) -> None:
    likelihood = likelihoods.NegativeBinomialMixture(3)
    with torch.no_grad():
        likelihood.log_dispersion.copy_(torch.tensor([0.5, 2.0, 200.0]))
    n = 40_000
    mean1, mean2 = (torch.tensor([m], dtype=dtype).expand(n, 3) for m in ([2.0, 1.0, 4.0], [20.0, 30.0, 8.0]))
    pi = torch.tensor([[0.5, -INF, -1.0]], dtype=dtype).expand(n, 3)
    counts = likelihood.sample((mean1, mean2, pi), torch.Generator().manual_seed(3))
    assert counts.dtype == (dtype if dtype == torch.float64 else torch.float32)
    assert torch.equal(counts, likelihood.sample((mean1, mean2, pi), torch.Generator().manual_seed(3)))
    m1, m2, p = mean1[0].double(), mean2[0].double(), pi[0].double().sigmoid()
    inverse = torch.exp(-likelihood.log_dispersion.detach().double())
    mean = p * m1 + (1 - p) * m2
    square = p * (m1 + m1**2 * (1 + inverse)) + (1 - p) * (m2 + m2**2 * (1 + inverse))
    variance = square - mean**2
    assert ((counts.double().mean(0) - mean).abs() <= 5 * (variance / n).sqrt()).all()
    torch.testing.assert_close(counts.double().var(0), variance, rtol=0.1, atol=0)
    assert likelihood.sample((mean1[:0], mean2[:0], pi[:0])).shape == (0, 3)


def test_module_with_wrong_arguments_raises() -> None:
    with pytest.raises(TypeError, match=r"likelihoods.NegativeBinomialMixture: `features` must be an int"):
        likelihoods.NegativeBinomialMixture(3.0)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="`features` must be at least 1, got 0"):
        likelihoods.NegativeBinomialMixture(0)
    likelihood, ones = likelihoods.NegativeBinomialMixture(3), torch.ones(2, 3)
    for params, found in ((ones, "Tensor"), ((ones, ones), "2 values")):
        with pytest.raises(
            TypeError, match=rf"must be the tuple \(mean1, mean2, mixture_logits\), got {found}"
        ):
            likelihood.nll(params, ones)
