"""The densities equal those of scipy and torch and 50 digits, and integrate or sum to 1.

The shared cases (cases.py) test dtypes, shapes, layouts and gradients of all likelihoods in the same way.
"""

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
from torch import Tensor

from fastvae import functional as fv
from fastvae import reference

mpmath.mp.dps = 50

FLOATS = (torch.float32, torch.float64)
DTYPES = (*FLOATS, torch.bfloat16, torch.float16)
# Relative to the result itself, including cancellation.
EXACT = {torch.float32: 1e-6, torch.float64: 1e-13}


def column(*values: float, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.tensor(values, dtype=dtype)


# --- The libraries' densities -----------------------------------------------------------------------------------------

LOC, DATA = torch.linspace(-3, 4, 41).double(), torch.linspace(2, -5, 41).double()
RATES, COUNTS = torch.linspace(-4, 5, 60).double(), torch.arange(60).double()
UNIT = torch.linspace(0, 1, 41).double()
POSITIVE = torch.logspace(-3, 2, 41).double()


def scipy_continuous_bernoulli(logit: Tensor, x: Tensor) -> np.ndarray:
    """The log-density of an exponential distribution with rate -a, truncated at 1."""
    a, x = logit.numpy(), x.numpy()
    # scipy's is on [0, b] with scale 1 / rate, so x is mirrored if the density rises.
    rate = np.abs(a)
    return scipy.stats.truncexpon.logpdf(np.where(a > 0, 1 - x, x), b=rate, scale=1 / rate)


LIBRARIES: dict[str, tuple[Callable[[], Tensor], Callable[[], Any]]] = {
    "Laplace, torch": (
        lambda: fv.laplace_nll(LOC, DATA, scale=0.7),
        lambda: torch.distributions.Laplace(LOC, 0.7).log_prob(DATA),
    ),
    "Laplace, scipy": (
        lambda: fv.laplace_nll(LOC, DATA, LOC / 4),
        lambda: scipy.stats.laplace.logpdf(DATA, LOC, np.exp(LOC.numpy() / 4)),
    ),
    "continuous Bernoulli, torch": (
        lambda: fv.continuous_bernoulli_nll(2.05 * LOC, UNIT),
        lambda: torch.distributions.ContinuousBernoulli(logits=2.05 * LOC).log_prob(UNIT),
    ),
    "continuous Bernoulli, scipy": (
        lambda: fv.continuous_bernoulli_nll(LOC, UNIT),
        lambda: scipy_continuous_bernoulli(LOC, UNIT),
    ),
    "Poisson, torch": (
        lambda: fv.poisson_nll(RATES, COUNTS),
        lambda: torch.distributions.Poisson(RATES.exp()).log_prob(COUNTS),
    ),
    "Poisson, scipy": (
        lambda: fv.poisson_nll(RATES, COUNTS.long()),
        lambda: scipy.stats.poisson.logpmf(COUNTS, RATES.exp()),
    ),
    "Poisson by its rate, torch": (
        lambda: fv.poisson_rate_nll(RATES.exp(), COUNTS),
        lambda: torch.distributions.Poisson(RATES.exp()).log_prob(COUNTS),
    ),
    "Poisson by its rate, scipy": (
        lambda: fv.poisson_rate_nll(RATES.exp(), COUNTS.long(), eps=0.5),
        lambda: scipy.stats.poisson.logpmf(COUNTS, RATES.exp() + 0.5),
    ),
    "gamma, torch": (
        lambda: fv.gamma_nll(LOC, POSITIVE, shape=2.5),
        lambda: torch.distributions.Gamma(2.5, torch.exp(-LOC)).log_prob(POSITIVE),
    ),
    "gamma, scipy": (
        lambda: fv.gamma_nll(LOC, POSITIVE, shape=0.3),
        lambda: scipy.stats.gamma.logpdf(POSITIVE, 0.3, scale=np.exp(LOC.numpy())),
    ),
    "gamma of shape 1 is exponential": (
        lambda: fv.gamma_nll(LOC, UNIT, shape=1),
        lambda: scipy.stats.expon.logpdf(UNIT, scale=np.exp(LOC.numpy())),
    ),
    "Student t, torch": (
        lambda: fv.student_t_nll(LOC, DATA, df=2.5, scale=0.7),
        lambda: torch.distributions.StudentT(2.5, LOC, 0.7).log_prob(DATA),
    ),
    "Student t, scipy": (
        lambda: fv.student_t_nll(LOC, DATA, LOC / 4, df=2.5),
        lambda: scipy.stats.t.logpdf(DATA, 2.5, LOC, np.exp(LOC.numpy() / 4)),
    ),
    "Student t with many degrees of freedom is nearly normal": (
        lambda: fv.student_t_nll(LOC, DATA, df=1e12, scale=0.7),
        lambda: scipy.stats.norm.logpdf(DATA, LOC, 0.7),
    ),
    "Student t with one is Cauchy": (
        lambda: fv.student_t_nll(LOC, DATA, df=1),
        lambda: scipy.stats.cauchy.logpdf(DATA, LOC),
    ),
}


@pytest.mark.parametrize("name", LIBRARIES)
def test_nll_equals_scipy_and_torch(backend: str, name: str) -> None:
    ours, theirs = LIBRARIES[name]
    torch.testing.assert_close(-ours(), torch.as_tensor(theirs()), rtol=1e-10, atol=1e-10)


# --- 50 digits --------------------------------------------------------------------------------------------------------


def exact_continuous_bernoulli(a: Any, t: Any) -> tuple[Any, Any]:
    """Return (nll, its derivative with respect to the logit)."""
    if a == 0:
        return mpmath.mpf(0), mpmath.mpf("0.5") - t
    with mpmath.workdps(150):  # a hundred digits cancel
        return mpmath.log(mpmath.expm1(a) / a) - a * t, 1 / -mpmath.expm1(-a) - 1 / a - t


def exact_poisson(a: Any, t: Any) -> tuple[Any, Any]:
    return mpmath.exp(a) - t * a + mpmath.loggamma(t + 1), mpmath.exp(a) - t


def exact_poisson_rate(m: Any, t: Any) -> tuple[Any, Any]:
    return m - t * mpmath.log(m) + mpmath.loggamma(t + 1), 1 - t / m


def exact_gamma(s: Any, x: Any, shape: Any) -> tuple[Any, Any]:
    """Return (nll, its derivative with respect to the log-scale)."""
    ratio = x * mpmath.exp(-s)
    return mpmath.loggamma(shape) + shape * s - (shape - 1) * mpmath.log(x) + ratio, shape - ratio


def exact_student_t(z: Any, df: Any) -> tuple[Any, Any]:
    """For distance z and scale 1."""
    constant = mpmath.loggamma(df / 2) - mpmath.loggamma((df + 1) / 2) + mpmath.log(df * mpmath.pi) / 2
    return (df + 1) / 2 * mpmath.log1p(z * z / df) + constant, (df + 1) * z / (df + z * z)


def compare(
    function: Callable[..., Tensor],
    exact: Callable[..., tuple[Any, Any]],
    points: list[tuple[float, ...]],
    dtype: torch.dtype,
    scale: Callable[..., float] = lambda *point: 0.0,
    grad_scale: float = 0.0,
) -> None:
    """Compare with `function`(first, second) of the columns of `points`, relative to the value or to a point's
    `scale`."""
    first, second = (column(*values, dtype=dtype) for values in zip(*points, strict=True))
    first.requires_grad_()
    value = function(first, second)
    (grad,) = torch.autograd.grad(value.sum(), first)
    for i, (x, y) in enumerate(zip(first.tolist(), second.tolist(), strict=True)):
        want, want_grad = exact(mpmath.mpf(x), mpmath.mpf(y))
        bound = EXACT[dtype] * (abs(want) + scale(x, y)) + torch.finfo(dtype).tiny
        assert abs(value[i].item() - want) <= bound, (x, y, value[i].item(), mpmath.nstr(want, 17))
        grad_bound = EXACT[dtype] * (abs(want_grad) + (grad_scale or scale(x, y)))
        assert abs(grad[i].item() - want_grad) <= grad_bound, (x, y, mpmath.nstr(want_grad, 17))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_continuous_bernoulli_equals_50_digits(backend: str, dtype: torch.dtype) -> None:
    """Near logit 0, where the normaliser is 0 / 0; where two formulas meet; and far out."""
    sizes = [
        0,
        1e-30,
        1e-12,
        1e-6,
        1e-3,
        0.03,
        0.3,
        0.499999,
        0.5,
        0.6,
        1,
        1.99999,
        2,
        2.1,
        5,
        20,
        90,
        800,
        1e4,
    ]
    logits = [sign * size for size in sizes for sign in (1, -1)]
    compare(
        fv.continuous_bernoulli_nll,
        exact_continuous_bernoulli,
        [(a, t) for a in logits for t in (0.0, 0.3, 0.5, 1.0)],
        dtype,
        # For t = 1/2, the first order vanishes and only a^2 / 24 of the value remains, which must be accurate.
        scale=lambda a, t: 0.0 if abs(a) < 0.5 and t == 0.5 else abs(a * (0.5 - t)) + 0.5 * abs(a),
        grad_scale=1.0,  # relative, because it is a difference from t
    )


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_poisson_equals_50_digits(backend: str, dtype: torch.dtype) -> None:
    rates = [-80.0, -3.0, 0.0, 0.4, 3.0, 12.0]
    points = [(a, t) for a in rates for t in (0.0, 1.0, 2.0, 3.0, 15.0, 16.0, 17.0, 200.0, 65_535.0, 1e6)]
    # The scale is that of the terms t a and log t!.
    compare(
        fv.poisson_nll,
        exact_poisson,
        points,
        dtype,
        lambda a, t: math.exp(a) + t * (1 + abs(a) + math.log(t + 1)),
    )


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_poisson_rate_equals_50_digits(backend: str, dtype: torch.dtype) -> None:
    """Relative to the value itself, because the rate is not rounded by a logarithm."""
    rates = [1e-30, 1e-10, 0.05, 1.0, 1.5, 3.1, 20.0, 1e5, 1e6]
    counts = [0.0, 0.3, 1.0, 1.999, 2.0, 2.5, 15.5, 16.0, 17.0, 200.0, 65_535.0, 1e6]
    points = [(m, t) for m in rates for t in counts] + [(t, t) for t in counts[1:]]
    compare(
        fv.poisson_rate_nll,
        exact_poisson_rate,
        points,
        dtype,
        # The reference computes the terms in float64.
        lambda m, t: (m + t * (1 + abs(math.log(m)) + math.log(t + 1))) if backend == "reference" else 0.0,
        grad_scale=1.0,
    )


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 3e-4), (torch.float64, 1e-11)], ids=str)
@pytest.mark.parametrize("t", [40.0, 1e3, 1e5, 1e6])
def test_poisson_of_large_counts_is_accurate(
    native: None, t: float, dtype: torch.dtype, bound: float
) -> None:
    """At a good fit, three terms of size t log t cancel to log(2 pi t) / 2, which float32 loses if it computes them."""
    rate = column(*(math.log(t) + d / math.sqrt(t) for d in (-2, -0.5, 0, 1, 3)), dtype=dtype)
    target = torch.full_like(rate, t)
    value = fv.poisson_nll(rate, target)
    exact = column(*(float(exact_poisson(mpmath.mpf(a), mpmath.mpf(t))[0]) for a in rate.tolist()))
    assert ((value - exact).abs() <= bound * exact.abs()).all()
    if dtype == torch.float32 and t >= 1e5:  # a check that this test can fail: the usual formula does
        by_hand = torch.exp(rate) - target * rate + torch.lgamma(target + 1)
        assert ((by_hand - exact).abs() > 10 * bound * exact.abs()).any()


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_log_factorial_is_accurate(backend: str, dtype: torch.dtype) -> None:
    """Log t! alone, with a rate of 0: integers from 2 on, fractions, and where series meet."""
    counts = [0, 1, 2, 3, 4, 7, 15, 16, 17, 100, 255, 1000, 65_535, 1e6, 0.5, 1.5, 1.999, 2.5, 0.001, 15.5]
    value = fv.poisson_nll(torch.zeros(len(counts), dtype=dtype), column(*counts, dtype=dtype))
    for got, t in zip(value.tolist(), counts, strict=True):
        exact = mpmath.loggamma(mpmath.mpf(float(torch.tensor(t, dtype=dtype))) + 1) + 1
        assert abs(got - exact) <= EXACT[dtype] * abs(exact), t


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("df", [0.5, 1.0, 4.0, 30.0, 199.0, 201.0, 1e4, 1e8])
def test_student_t_equals_50_digits(backend: str, df: float, dtype: torch.dtype) -> None:
    """Near the centre, where log(1 + e) is about e, and where the square exceeds float32."""
    points = [(s * z, 0.0) for z in (0.0, 1e-20, 1e-6, 1e-3, 0.4, 1.0, 3.0, 1e3, 1e10, 1e18) for s in (1, -1)]
    if dtype == torch.float64:
        points += [(1e150, 0.0)]
    constant = abs(float(exact_student_t(mpmath.mpf(0), mpmath.mpf(df))[0]))
    compare(
        lambda loc, target: fv.student_t_nll(loc, target, df=df),
        lambda loc, target: exact_student_t(loc - target, mpmath.mpf(df)),
        [(z, t) for z, t in points if not (dtype == torch.float32 and abs(z) * df > 1e25)],
        dtype,
        lambda loc, target: constant,
    )
    # Near the centre, without the constant: the value is a square, and must be accurate.
    z = 1e-4
    both = fv.student_t_nll(column(z, 0.0), column(0.0, 0.0), df=df)
    exact = (df + 1) / 2 * math.log1p(z * z / df)
    assert abs((both[0] - both[1]).item() - exact) <= 1e-6 * exact + 2e-15 * constant


@pytest.mark.parametrize("df", [0.5, 3.0, 199.0, 201.0, 1e4, 1e8, 1e15])
def test_student_t_normaliser_is_accurate(df: float) -> None:
    exact = mpmath.log(mpmath.beta(mpmath.mpf(df) / 2, mpmath.mpf("0.5")))
    assert abs(reference.log_beta_half(df) - exact) <= 1e-13 * (1 + abs(exact))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("shape", [0.01, 0.5, 1.0, 2.5, 30.0, 1e4])
def test_gamma_equals_50_digits(backend: str, shape: float, dtype: torch.dtype) -> None:
    """Including data below float32's normal numbers."""
    data = (1e-40, 2e-38, 1e-20, 1e-3, 0.7, 1.0, 33.0, 1e6, 1e28)
    points = [(s, x) for s in (-20.0, -3.0, 0.0, 0.4, 5.0, 60.0) for x in data]

    # The scale is that of the terms.
    def scale(s: float, x: float) -> float:
        return abs(math.lgamma(shape)) + shape * abs(s) + abs((shape - 1) * math.log(x)) + x * math.exp(-s)

    compare(
        lambda log_scale, target: fv.gamma_nll(log_scale, target, shape=shape),
        lambda s, x: exact_gamma(s, x, mpmath.mpf(shape)),
        points,
        dtype,
        scale,
    )


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("shape", [0.5, 1.0, 2.5])
def test_gamma_at_its_ends_gives_the_limit(backend: str, shape: float, dtype: torch.dtype) -> None:
    """A target of 0 for all scales, and scales beyond the dtype's range: the limits of value and gradient."""
    scales = [-3000.0, -200.0, -3.0, 0.0, 3.0, 200.0, 3000.0]
    log_scale = column(*scales, dtype=dtype).requires_grad_()
    nll = fv.gamma_nll(log_scale, torch.zeros_like(log_scale), shape=shape)
    want = log_scale if shape == 1 else torch.full_like(log_scale, math.copysign(math.inf, shape - 1))
    assert torch.equal(nll, want)
    assert torch.equal(torch.autograd.grad(nll.sum(), log_scale)[0], torch.full_like(log_scale, shape))

    far = column(-3000.0, 3000.0, dtype=dtype).requires_grad_()
    nll = fv.gamma_nll(far, torch.full_like(far, 0.25), shape=shape)
    constant = math.lgamma(shape) - (shape - 1) * math.log(0.25)
    torch.testing.assert_close(nll, column(math.inf, shape * 3000 + constant, dtype=dtype))
    torch.testing.assert_close(torch.autograd.grad(nll.sum(), far)[0], column(-math.inf, shape, dtype=dtype))


def test_gamma_of_shape_1_equals_the_itakura_saito_loss(backend: str) -> None:
    """Equal up to log x + 1, which does not depend on the parameters."""
    log_scale, power = torch.randn(6, 9).double(), torch.rand(6, 9).double() + 0.01
    ratio = power / torch.exp(log_scale)
    loss = (ratio - torch.log(ratio) - 1).sum(1)
    torch.testing.assert_close(fv.gamma_nll(log_scale, power, shape=1) - (torch.log(power) + 1).sum(1), loss)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_laplace_far_from_its_location_is_accurate(backend: str, dtype: torch.dtype) -> None:
    value = fv.laplace_nll(
        column(1e30, -1e30, 0.0, dtype=dtype), column(0.0, 1e30, 0.0, dtype=dtype), scale=1e-3
    )
    torch.testing.assert_close(value.double(), column(1e33, 2e33, math.log(2e-3)), rtol=1e-6, atol=1e-6)


def test_laplace_gradient_at_its_location_is_0(backend: str) -> None:
    loc, target = torch.zeros(1, 33, requires_grad=True), torch.zeros(1, 33, requires_grad=True)
    for call in (
        lambda: fv.laplace_nll(loc, target),
        lambda: fv.laplace_nll(loc, target, torch.zeros(1, 33)),
    ):
        for gradient in torch.autograd.grad(call().sum(), (loc, target)):
            assert torch.equal(gradient, torch.zeros(1, 33))


# --- Normalisation ----------------------------------------------------------------------------------------------------


def total(
    nll: Callable[[Tensor, Tensor], Tensor], param: float, low: float, high: float, middle: float
) -> float:
    """The integral of e^-nll, computed by scipy."""

    def density(x: float) -> float:
        return math.exp(-nll(column(param), column(x)).item())

    return sum(
        scipy.integrate.quad(density, a, b, epsabs=1e-11, epsrel=1e-11, limit=200)[0]
        for a, b in ((low, middle), (middle, high))
    )


@pytest.mark.parametrize("logit", [-30.0, -2.0, -0.3, 0.0, 1e-9, 0.5, 1.999, 7.0, 100.0])
def test_continuous_bernoulli_integrates_to_1(native: None, logit: float) -> None:
    assert abs(total(fv.continuous_bernoulli_nll, logit, 0, 1, 0.5) - 1) < 1e-9


def test_laplace_and_student_t_integrate_to_1(native: None) -> None:
    inf = math.inf
    assert abs(total(lambda m, x: fv.laplace_nll(m, x, scale=0.3), 0.7, -inf, inf, 0.7) - 1) < 1e-9
    for df in (1.5, 3.0, 40.0):
        t = lambda m, x, df=df: fv.student_t_nll(m, x, df=df, scale=0.3)  # noqa: E731
        assert abs(total(t, 0.7, -inf, inf, 0.7) - 1) < 1e-8


@pytest.mark.parametrize("shape", [1.0, 2.5, 30.0])
def test_gamma_integrates_to_1(native: None, shape: float) -> None:
    nll = lambda s, x: fv.gamma_nll(s, x, shape=shape)  # noqa: E731
    assert abs(total(nll, -1.0, 0, math.inf, shape * math.exp(-1)) - 1) < 1e-8


@pytest.mark.parametrize("log_rate", [-5.0, 0.0, 1.5, 4.0, 9.0])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_poisson_sums_to_1(backend: str, log_rate: float, dtype: torch.dtype) -> None:
    counts = torch.arange(12_000).unsqueeze(1)
    rates = torch.full(counts.shape, log_rate, dtype=dtype)
    mass = torch.exp(-fv.poisson_nll(rates, counts).double()).sum()
    assert abs(mass - 1) < (1e-10 if dtype == torch.float64 else 5e-6)
