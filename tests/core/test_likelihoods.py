"""The densities: that they are those of torch, scipy and 50 digits, sum to 1, and give the mean and draws they should.

Types, shapes, layouts and gradients are held to one rule for all by the shared cases (cases.py).
"""

import copy
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

import fastvae
from fastvae import functional as fv
from fastvae import likelihoods, reference
from fastvae.likelihoods import ContinuousBernoulli, Gamma, Laplace, Likelihood, Poisson, StudentT

mpmath.mp.dps = 50

FLOATS = (torch.float32, torch.float64)
DTYPES = (*FLOATS, torch.bfloat16, torch.float16)
# Relative to the result itself, cancellations included.
EXACT = {torch.float32: 1e-6, torch.float64: 1e-13}


def column(*values: float, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.tensor(values, dtype=dtype)


# --- The libraries' densities -----------------------------------------------------------------------------------------

LOC, DATA = torch.linspace(-3, 4, 41).double(), torch.linspace(2, -5, 41).double()
RATES, COUNTS = torch.linspace(-4, 5, 60).double(), torch.arange(60).double()
UNIT = torch.linspace(0, 1, 41).double()
POSITIVE = torch.logspace(-3, 2, 41).double()


def scipy_continuous_bernoulli(logit: Tensor, x: Tensor) -> np.ndarray:
    """An exponential distribution of rate -a, cut off at 1."""
    a, x = logit.numpy(), x.numpy()
    # scipy's is on [0, b] with scale 1 / rate: mirrored where the density rises.
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
def test_the_libraries_densities(backend: str, name: str) -> None:
    ours, theirs = LIBRARIES[name]
    torch.testing.assert_close(-ours(), torch.as_tensor(theirs()), rtol=1e-10, atol=1e-10)


# --- 50 digits --------------------------------------------------------------------------------------------------------


def exact_continuous_bernoulli(a: Any, t: Any) -> tuple[Any, Any]:
    """(nll, its derivative by the logit)."""
    if a == 0:
        return mpmath.mpf(0), mpmath.mpf("0.5") - t
    with mpmath.workdps(150):  # a hundred of them cancel
        return mpmath.log(mpmath.expm1(a) / a) - a * t, 1 / -mpmath.expm1(-a) - 1 / a - t


def exact_poisson(a: Any, t: Any) -> tuple[Any, Any]:
    return mpmath.exp(a) - t * a + mpmath.loggamma(t + 1), mpmath.exp(a) - t


def exact_poisson_rate(m: Any, t: Any) -> tuple[Any, Any]:
    return m - t * mpmath.log(m) + mpmath.loggamma(t + 1), 1 - t / m


def exact_gamma(s: Any, x: Any, shape: Any) -> tuple[Any, Any]:
    """(nll, its derivative by the log-scale)."""
    ratio = x * mpmath.exp(-s)
    return mpmath.loggamma(shape) + shape * s - (shape - 1) * mpmath.log(x) + ratio, shape - ratio


def exact_student_t(z: Any, df: Any) -> tuple[Any, Any]:
    """Of distance z, scale 1."""
    constant = mpmath.loggamma(df / 2) - mpmath.loggamma((df + 1) / 2) + mpmath.log(df * mpmath.pi) / 2
    return (df + 1) / 2 * mpmath.log1p(z * z / df) + constant, (df + 1) * z / (df + z * z)


def compare(
    function: Callable[..., Tensor],
    exact: Callable[..., tuple[Any, Any]],
    points: list[tuple[float, ...]],
    dtype: torch.dtype,
    scale: Callable[..., float] = lambda *point: 0.0,
    slope_scale: float = 0.0,
) -> None:
    """`function`(first, second) of the columns of `points`, relative to itself or to `scale` of the point."""
    first, second = (column(*values, dtype=dtype) for values in zip(*points, strict=True))
    first.requires_grad_()
    value = function(first, second)
    (slope,) = torch.autograd.grad(value.sum(), first)
    for i, (x, y) in enumerate(zip(first.tolist(), second.tolist(), strict=True)):
        want, want_slope = exact(mpmath.mpf(x), mpmath.mpf(y))
        bound = EXACT[dtype] * (abs(want) + scale(x, y)) + torch.finfo(dtype).tiny
        assert abs(value[i].item() - want) <= bound, (x, y, value[i].item(), mpmath.nstr(want, 17))
        slope_bound = EXACT[dtype] * (abs(want_slope) + (slope_scale or scale(x, y)))
        assert abs(slope[i].item() - want_slope) <= slope_bound, (x, y, mpmath.nstr(want_slope, 17))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_continuous_bernoulli_to_50_digits(backend: str, dtype: torch.dtype) -> None:
    """Around logit 0, where the normaliser is 0 / 0; where two formulas meet; far out."""
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
        # For t = 1/2 the first order vanishes, and a^2 / 24 is left of the value: with all of its digits.
        scale=lambda a, t: 0.0 if abs(a) < 0.5 and t == 0.5 else abs(a * (0.5 - t)) + 0.5 * abs(a),
        slope_scale=1.0,  # it is a difference from t
    )


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_poisson_to_50_digits(backend: str, dtype: torch.dtype) -> None:
    rates = [-80.0, -3.0, 0.0, 0.4, 3.0, 12.0]
    points = [(a, t) for a in rates for t in (0.0, 1.0, 2.0, 3.0, 15.0, 16.0, 17.0, 200.0, 65_535.0, 1e6)]
    # Of the size of the terms: t a and log t!.
    compare(
        fv.poisson_nll,
        exact_poisson,
        points,
        dtype,
        lambda a, t: math.exp(a) + t * (1 + abs(a) + math.log(t + 1)),
    )


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_poisson_by_its_rate_to_50_digits(backend: str, dtype: torch.dtype) -> None:
    """Relative to the value itself: by the rate nothing of it is lost in a logarithm."""
    rates = [1e-30, 1e-10, 0.05, 1.0, 1.5, 3.1, 20.0, 1e5, 1e6]
    counts = [0.0, 0.3, 1.0, 1.999, 2.0, 2.5, 15.5, 16.0, 17.0, 200.0, 65_535.0, 1e6]
    points = [(m, t) for m in rates for t in counts] + [(t, t) for t in counts[1:]]
    compare(
        fv.poisson_rate_nll,
        exact_poisson_rate,
        points,
        dtype,
        # The reference makes the terms, in float64.
        lambda m, t: (m + t * (1 + abs(math.log(m)) + math.log(t + 1))) if backend == "reference" else 0.0,
        slope_scale=1.0,
    )


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 3e-4), (torch.float64, 1e-11)], ids=str)
@pytest.mark.parametrize("t", [40.0, 1e3, 1e5, 1e6])
def test_large_counts_keep_their_digits(backend: str, t: float, dtype: torch.dtype, bound: float) -> None:
    """At a good fit three terms of the size of t log t leave log(2 pi t) / 2: in float32 nothing, if they are made."""
    rate = column(*(math.log(t) + d / math.sqrt(t) for d in (-2, -0.5, 0, 1, 3)), dtype=dtype)
    target = torch.full_like(rate, t)
    value = fv.poisson_nll(rate, target)
    exact = column(*(float(exact_poisson(mpmath.mpf(a), mpmath.mpf(t))[0]) for a in rate.tolist()))
    assert ((value - exact).abs() <= bound * exact.abs()).all()
    if dtype == torch.float32 and t >= 1e5:  # that this test can fail: what users write does
        written = torch.exp(rate) - target * rate + torch.lgamma(target + 1)
        assert ((written - exact).abs() > 10 * bound * exact.abs()).any()


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_log_factorials(backend: str, dtype: torch.dtype) -> None:
    """Log t! alone: a rate of 0 beside it. The integers from 2 on, fractions, where series meet."""
    counts = [0, 1, 2, 3, 4, 7, 15, 16, 17, 100, 255, 1000, 65_535, 1e6, 0.5, 1.5, 1.999, 2.5, 0.001, 15.5]
    value = fv.poisson_nll(torch.zeros(len(counts), dtype=dtype), column(*counts, dtype=dtype))
    for got, t in zip(value.tolist(), counts, strict=True):
        exact = mpmath.loggamma(mpmath.mpf(float(torch.tensor(t, dtype=dtype))) + 1) + 1
        assert abs(got - exact) <= EXACT[dtype] * abs(exact), t


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("df", [0.5, 1.0, 4.0, 30.0, 199.0, 201.0, 1e4, 1e8])
def test_student_t_to_50_digits(backend: str, df: float, dtype: torch.dtype) -> None:
    """Near the centre, where log(1 + e) is e, and where a square is no float32 any more."""
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
    # The centre's neighbourhood without the constant: the value is a square, and no digit of it is lost.
    z = 1e-4
    both = fv.student_t_nll(column(z, 0.0), column(0.0, 0.0), df=df)
    exact = (df + 1) / 2 * math.log1p(z * z / df)
    assert abs((both[0] - both[1]).item() - exact) <= 1e-6 * exact + 2e-15 * constant


@pytest.mark.parametrize("df", [0.5, 3.0, 199.0, 201.0, 1e4, 1e8, 1e15])
def test_the_normaliser_of_student_t(df: float) -> None:
    exact = mpmath.log(mpmath.beta(mpmath.mpf(df) / 2, mpmath.mpf("0.5")))
    assert abs(reference.log_beta_half(df) - exact) <= 1e-13 * (1 + abs(exact))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("shape", [0.01, 0.5, 1.0, 2.5, 30.0, 1e4])
def test_gamma_to_50_digits(backend: str, shape: float, dtype: torch.dtype) -> None:
    """Data below float32's normal numbers, too."""
    data = (1e-40, 2e-38, 1e-20, 1e-3, 0.7, 1.0, 33.0, 1e6, 1e28)
    points = [(s, x) for s in (-20.0, -3.0, 0.0, 0.4, 5.0, 60.0) for x in data]

    # Of the size of the terms.
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
def test_gamma_at_the_ends(backend: str, shape: float, dtype: torch.dtype) -> None:
    """A zero whatever the scale, and scales beyond the type's: the limits of value and gradient."""
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


def test_the_exponential_is_the_loss_of_itakura_and_saito(backend: str) -> None:
    """Up to what no parameter sees: log x + 1."""
    log_scale, power = torch.randn(6, 9).double(), torch.rand(6, 9).double() + 0.01
    ratio = power / torch.exp(log_scale)
    loss = (ratio - torch.log(ratio) - 1).sum(1)
    torch.testing.assert_close(fv.gamma_nll(log_scale, power, shape=1) - (torch.log(power) + 1).sum(1), loss)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_laplace_far_out(backend: str, dtype: torch.dtype) -> None:
    value = fv.laplace_nll(
        column(1e30, -1e30, 0.0, dtype=dtype), column(0.0, 1e30, 0.0, dtype=dtype), scale=1e-3
    )
    torch.testing.assert_close(value.double(), column(1e33, 2e33, math.log(2e-3)), rtol=1e-6, atol=1e-6)


def test_the_kink_of_laplace_has_slope_0(backend: str) -> None:
    loc, target = torch.zeros(1, 33, requires_grad=True), torch.zeros(1, 33, requires_grad=True)
    for call in (
        lambda: fv.laplace_nll(loc, target),
        lambda: fv.laplace_nll(loc, target, torch.zeros(1, 33)),
    ):
        for gradient in torch.autograd.grad(call().sum(), (loc, target)):
            assert torch.equal(gradient, torch.zeros(1, 33))


# --- A bounded log-variance -------------------------------------------------------------------------------------------

BOUNDS = (-6.0, 2.0)


def derivative_of_clamp(v: float, bounds: tuple[float, float] = BOUNDS) -> float:
    lo, hi = bounds
    return 1 / math.cosh((v - (lo + hi) / 2) / ((hi - lo) / 2)) ** 2


def bounded_by_mpmath(v: float, bounds: tuple[float, float] = BOUNDS) -> float:
    lo, hi = map(mpmath.mpf, bounds)
    return (lo + hi) / 2 + (hi - lo) / 2 * mpmath.tanh((v - (lo + hi) / 2) / ((hi - lo) / 2))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize(
    "bounds", [BOUNDS, (-1.0, 1.0), (-20.0, 20.0), (0.5, 0.5625), (-30.0, -2.0)], ids=str
)
def test_bounded_gaussian_to_50_digits(backend: str, bounds: tuple[float, float], dtype: torch.dtype) -> None:
    """Around the middle, where it is the identity; where it bends; out to where the clamp is all."""
    middle, half = sum(bounds) / 2, (bounds[1] - bounds[0]) / 2
    steps = (0.0, 1e-12, 1e-6, 1e-3, 0.1, 0.3, 0.7, 1.0, 1.5, 3.0, 20.0, 1e4)
    points = [(middle + sign * x * half, t) for x in steps for sign in (1, -1) for t in (0.5, 0.375, 4.0)]

    def exact(v: Any, t: Any) -> tuple[Any, Any]:
        lo, hi = map(mpmath.mpf, bounds)
        square = (t - 0.5) ** 2 * mpmath.exp(-bounded_by_mpmath(v, bounds))
        value = (mpmath.log(2 * mpmath.pi) + bounded_by_mpmath(v, bounds) + square) / 2
        return value, (1 - square) / 2 * mpmath.sech((v - (lo + hi) / 2) / ((hi - lo) / 2)) ** 2

    # The log-variance is rounded where it is summed, to a unit of its largest summand; an exponential multiplies that.
    def scale(v: float, t: float) -> float:
        bounded = float(bounded_by_mpmath(v, bounds))
        return (1 + abs(middle) + abs(bounded - middle)) * (1 + (t - 0.5) ** 2 * math.exp(-bounded))

    compare(
        lambda logvar, target: fv.gaussian_nll(
            torch.full_like(target, 0.5), target, logvar, logvar_bounds=bounds
        ),
        exact,
        points,
        dtype,
        scale,
    )


def test_bounds_far_apart(backend: str) -> None:
    """Around the middle the log-variance has its own accuracy, not that of half the interval."""
    logvar, target = torch.randn(2000, 1), torch.randn(2000, 1)

    def run(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        v = logvar.to(dtype).requires_grad_()
        value = fv.gaussian_nll(torch.zeros_like(v), target.to(dtype), v, logvar_bounds=(-1000.0, 1000.0))
        return value.double(), torch.autograd.grad(value.sum(), v)[0].double()

    for found, exact in zip(run(torch.float32), run(torch.float64), strict=True):
        assert ((found - exact).abs() <= 8 * torch.finfo(torch.float32).eps * (1 + exact.abs())).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_outside_of_the_bounds_there_is_a_gradient(backend: str, dtype: torch.dtype) -> None:
    """At twice half of the interval beyond, where a hard clamp has none; it points back where the variance is wrong."""
    below, above = BOUNDS[0] - 8.0, BOUNDS[1] + 8.0
    # The data fit exactly above, where a smaller variance is better, and not at all below.
    mean, target = torch.zeros(2, 3, dtype=dtype), torch.tensor([[9.0] * 3, [0.0] * 3]).to(dtype)
    logvar = torch.tensor([[below] * 3, [above] * 3]).to(dtype).requires_grad_()
    fv.gaussian_nll(mean, target, logvar, logvar_bounds=BOUNDS).sum().backward()
    assert logvar.grad is not None
    square = 81 * math.exp(-bounded_by_mpmath(below))
    want = [(1 - square) / 2 * derivative_of_clamp(below), derivative_of_clamp(above) / 2]
    rtol = {torch.float32: 1e-5, torch.float64: 1e-12, torch.bfloat16: 1e-2, torch.float16: 1e-3}[dtype]
    torch.testing.assert_close(logvar.grad[:, 0].double(), column(*want), rtol=rtol, atol=0)
    hard = logvar.detach().requires_grad_()
    fv.gaussian_nll(mean, target, hard.clamp(*BOUNDS)).sum().backward()
    assert hard.grad is not None
    assert (hard.grad == 0).all()


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_far_outside_the_gradient_keeps_its_digits(native: None, dtype: torch.dtype) -> None:
    """1 - tanh^2 would have none from tanh = 1 on, in float32 ten halves of the interval from its middle."""
    logvar = column(*(-2 + sign * 4 * x for x in (3, 6, 9, 15, 30, 40) for sign in (1, -1)), dtype=dtype)
    logvar.requires_grad_()
    rtol = 2e-5 if dtype == torch.float32 else 1e-13
    for distance in (0.0, 100.0):
        target = torch.full_like(logvar, distance)
        (got,) = torch.autograd.grad(
            fv.gaussian_nll(torch.zeros_like(target), target, logvar, logvar_bounds=BOUNDS).sum(), logvar
        )
        want = column(
            *(
                (1 - distance**2 * math.exp(-bounded_by_mpmath(v))) / 2 * derivative_of_clamp(v)
                for v in logvar.tolist()
            )
        )
        torch.testing.assert_close(got.double(), want, rtol=rtol, atol=0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("v", [-1e4, -80.0, 80.0, 1e4, -math.inf, math.inf])
def test_no_log_variance_leaves_its_bounds(backend: str, v: float, dtype: torch.dtype) -> None:
    params = torch.cat((torch.full((2, 3, 5), 0.5), torch.full((2, 3, 5), v)), 1).to(dtype).requires_grad_()
    target = torch.full((2, 3, 5), 0.25, dtype=dtype).requires_grad_()
    bound = BOUNDS[v > 0]
    nll = fv.gaussian_head_nll(params, target, logvar_bounds=BOUNDS)
    want = 15 * (math.log(2 * math.pi) + bound + 0.0625 * math.exp(-bound)) / 2
    torch.testing.assert_close(nll.double(), torch.full((2,), want).double(), rtol=2e-6, atol=0)
    by_params, by_target = torch.autograd.grad(nll.sum(), (params, target))
    rtol = {torch.bfloat16: 5e-3, torch.float16: 1e-3}.get(dtype, 2e-6)
    slope = torch.full((2, 3, 5), 0.25 * math.exp(-bound))
    torch.testing.assert_close(by_params[:, :3].float(), slope, rtol=rtol, atol=0)
    torch.testing.assert_close(by_target.float(), -slope, rtol=rtol, atol=0)
    assert (by_params[:, 3:].abs() < 1e-6).all()


def test_ways_to_a_bounded_variance(backend: str) -> None:
    """Learned, of a head and of a pair: one loss, one standard deviation, and gradients that are sums of each other."""
    mean, x = torch.randn(5, 3, 4), torch.randn(5, 3, 4)
    bounded = float(bounded_by_mpmath(-7.0))
    learned = likelihoods.Gaussian("learned", logvar_bounds=BOUNDS)
    by_element = likelihoods.Gaussian("per_element", logvar_bounds=BOUNDS)
    with torch.no_grad():
        learned.logvar.fill_(-7.0)
    logvar = torch.full_like(mean, -7.0).requires_grad_()
    want = fv.gaussian_nll(mean, x, scale=math.exp(bounded / 2))
    for likelihood, params in (
        (learned, mean),
        (by_element, (mean, logvar)),
        (by_element, torch.cat((mean, logvar), 1)),
    ):
        torch.testing.assert_close(likelihood.nll(params, x), want)
        assert torch.equal(likelihood.mean(params), mean)
        noise = likelihood.sample(params, torch.Generator().manual_seed(1)) - mean
        plain = likelihoods.Gaussian(math.exp(bounded / 2)).sample(mean, torch.Generator().manual_seed(1))
        torch.testing.assert_close(noise, plain - mean)
    elbo = fastvae.ELBO(learned)
    elbo(mean, x, kl=torch.zeros(5)).loss.backward()
    by_element.nll((mean, logvar), x).mean().backward()
    assert learned.logvar.grad is not None
    assert logvar.grad is not None
    torch.testing.assert_close(learned.logvar.grad, logvar.grad.sum())
    assert learned.logvar.grad != 0


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_bounded_standard_deviation_has_its_type(dtype: torch.dtype) -> None:
    """In half types the clamp, like the loss, is computed in float32: rounding -5.9 to bfloat16 would cost 0.8 %."""
    likelihood = likelihoods.Gaussian("per_element", logvar_bounds=BOUNDS)
    head = torch.full((1, 2, 3), -9.0, dtype=dtype)
    mean, std = likelihood._moments(head)
    assert isinstance(std, Tensor)
    assert mean.dtype == std.dtype == dtype
    want = math.exp(bounded_by_mpmath(-9.0) / 2)
    assert (std.double() / want - 1).abs().max() < torch.finfo(dtype).eps * 4
    assert likelihood.sample(head).dtype == dtype


def test_bounded_reference_twice_differentiable(native: None) -> None:
    params = torch.randn(2, 4, 3, dtype=torch.float64, requires_grad=True)
    target = torch.randn(2, 2, 3, dtype=torch.float64)
    assert torch.autograd.gradgradcheck(
        lambda p: reference.gaussian_head_nll(p, target, logvar_bounds=(-1.0, 2.0)), params
    )


def test_bounds_are_shown_and_kept() -> None:
    likelihood = likelihoods.Gaussian("per_element", logvar_bounds=[-6, 2])
    assert repr(likelihood) == "Gaussian(scale='per_element', logvar_bounds=(-6.0, 2.0))"
    assert repr(likelihoods.Gaussian("per_element")) == "Gaussian(scale='per_element')"
    assert copy.deepcopy(likelihood).logvar_bounds == (-6.0, 2.0)


def test_bounds_end_the_race_to_zero_variance(native: None) -> None:
    """A decoder that fits the data exactly: the loss goes on falling without bounds, and settles with them."""
    x = torch.zeros(4, 8)

    def train(bounds: tuple[float, float] | None) -> Tensor:
        logvar = torch.zeros(4, 8, requires_grad=True)
        likelihood = likelihoods.Gaussian("per_element", logvar_bounds=bounds)
        optimiser = torch.optim.SGD([logvar], lr=0.5)
        for _ in range(200):
            optimiser.zero_grad()
            likelihood.nll((x, logvar), x).sum().backward()
            optimiser.step()
        return likelihood._moments((x, logvar.detach()))[1]

    assert (train(None) < math.exp(-20)).all()
    std = train(BOUNDS)
    assert (std >= math.exp(-3)).all()
    assert (std < 1.1 * math.exp(-3)).all()


# --- Normalisation ----------------------------------------------------------------------------------------------------


def total(
    nll: Callable[[Tensor, Tensor], Tensor], param: float, low: float, high: float, middle: float
) -> float:
    """The integral of e^-nll, by scipy."""

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


# --- The modules: mean, draws, channels -------------------------------------------------------------------------------


def grid(n: int) -> Tensor:
    return torch.tensor([-40.0, -3.0, -0.4, 0.0, 1e-3, 0.6, 5.0, 300.0]).repeat(n, 1)


def test_mean_of_continuous_bernoulli() -> None:
    logits = grid(1)[0].double().requires_grad_()
    mean = ContinuousBernoulli().mean(logits)
    for a, got in zip(logits.tolist(), mean.tolist(), strict=True):
        slope = exact_continuous_bernoulli(mpmath.mpf(a), mpmath.mpf(0))[1]
        assert abs(got - slope) < 1e-14
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
def test_draws_follow_the_density(name: str) -> None:
    likelihood, params, distribution = SAMPLED[name]
    draws = likelihood.sample(params(20_000), torch.Generator().manual_seed(1))
    assert scipy.stats.kstest(draws.numpy(), distribution).pvalue > 1e-3
    again = likelihood.sample(params(20_000), torch.Generator().manual_seed(1))
    assert torch.equal(draws, again)
    assert not torch.equal(draws, likelihood.sample(params(20_000), torch.Generator().manual_seed(2)))


def test_draws_of_poisson() -> None:
    draws = Poisson().sample(torch.full((20_000,), 0.7), torch.Generator().manual_seed(1))
    observed = torch.bincount(draws.long(), minlength=8)
    expected = 20_000 * scipy.stats.poisson.pmf(np.arange(len(observed)), math.exp(0.7))
    assert scipy.stats.chisquare(observed, expected * observed.sum().item() / expected.sum()).pvalue > 1e-3
    torch.testing.assert_close(Poisson().mean(torch.tensor([0.7])), torch.tensor([math.exp(0.7)]))


def test_mean_of_gamma(backend: str) -> None:
    """The mean of draws, and what an ELBO of it minimises: the scale at which mean and data agree."""
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


def test_draws_of_continuous_bernoulli_stay_in_range() -> None:
    draws = ContinuousBernoulli().sample(grid(10_000))
    assert ((draws >= 0) & (draws <= 1)).all()
    torch.testing.assert_close(draws.mean(0), ContinuousBernoulli().mean(grid(1)[0]), atol=0.02, rtol=0)


@pytest.mark.parametrize("make", [Laplace, lambda scale: StudentT(3.0, scale)], ids=["laplace", "student_t"])
def test_ways_to_a_scale(backend: str, make: Callable[[Any], Likelihood]) -> None:
    """The same scale by four ways gives the same loss and gradient; a learned one trains."""
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


def test_a_learned_scale_finds_the_scale_of_the_data(native: None) -> None:
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
def test_by_name(backend: str, name: str) -> None:
    elbo = fastvae.ELBO(name)
    x = torch.rand(3, 4).round()
    out = elbo(torch.randn(3, 4, requires_grad=True), x, kl=torch.zeros(3))
    assert type(elbo.likelihood) is likelihoods.BY_NAME[name]
    out.loss.backward()


def test_integer_counts_through_elbo(backend: str) -> None:
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
def test_validate_names_the_first_bad_count(name: str) -> None:
    target, words = BAD_COUNTS[name]
    with pytest.raises(
        ValueError,
        match=r"fastvae.poisson_nll: `target` must hold counts: whole numbers, 0 or more, " + words,
    ):
        fv.poisson_nll(torch.zeros(2, 2), target, validate=True)
    fv.poisson_nll(torch.zeros(2, 2), target)  # not looked at


def test_validate_passes_counts() -> None:
    for dtype in (torch.float32, torch.uint8, torch.uint16, torch.int32, torch.int64):
        fv.poisson_nll(torch.zeros(2, 3), torch.tensor([[0, 1, 2], [3, 250, 4]]).to(dtype), validate=True)


# ---------------------------------------------------------------------------------------------------------------------
# Means and draws at the ends
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("log_scale", [90.0, 1e30, math.inf])
def test_mean_of_a_discretised_logistic_whose_scale_overflows(log_scale: float) -> None:
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


def test_draws_of_counts_stay_in_range() -> None:
    """torch.poisson counts in int64, and what does not fit there came out negative."""
    rates = torch.tensor([[3.0, 44.0, 80.0]]).expand(1000, -1)
    counts = likelihoods.Poisson().sample(rates)
    for column, rate in zip(counts.double().T, rates[0].double().exp(), strict=True):
        assert (column >= 0).all()
        torch.testing.assert_close(column.mean(), rate, rtol=0.02, atol=0)
    # 1e18 in float64, where a spread of a billionth can be seen.
    wide = likelihoods.Poisson().sample(torch.full((4000, 1), math.log(1e18), dtype=torch.float64))
    torch.testing.assert_close(wide.std().item(), 1e9, rtol=0.05, atol=0)
    with pytest.raises(ValueError, match=r"Poisson.sample: `params` must give rates that float32 can hold"):
        likelihoods.Poisson().sample(torch.tensor([[1.0, 90.0]]))
    with pytest.raises(ValueError, match=r"rates that float16 can hold, at most 6.6e\+04"):
        likelihoods.Poisson().sample(torch.tensor([[12.0]], dtype=torch.float16))


@pytest.mark.parametrize("log_dispersion", [-200.0, -89.0, 89.0, 200.0])
def test_draws_of_negative_binomials_whose_dispersion_over_or_underflows(log_dispersion: float) -> None:
    likelihood = likelihoods.NegativeBinomial(2, "gene-cell")
    params = (torch.zeros(2000, 2), torch.full((2000,), 20.0), torch.full((2000, 2), log_dispersion))
    counts = likelihood.sample(params)
    assert counts.isfinite().all()
    # Poisson with the mean 10, or hardly ever anything but 0.
    want = 10.0 if log_dispersion > 0 else 0.0
    torch.testing.assert_close(counts.mean().item(), want, rtol=0.03, atol=0)


@pytest.mark.parametrize(
    "likelihood", [likelihoods.ContinuousBernoulli(), likelihoods.StudentT(3.0), likelihoods.Gamma(2.0)]
)
def test_draws_where_there_is_no_float64(likelihood: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on an MPS device: the same draws to what float32 has, and nothing is made in float64."""
    params = torch.linspace(-3, 3, 4001).expand(2, -1).contiguous()
    exact = likelihood.sample(params.double(), generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr("fastvae.likelihoods.continuous.widest", lambda like: torch.float32)
    monkeypatch.setattr(Tensor, "double", None)
    draws = likelihood.sample(params, generator=torch.Generator().manual_seed(0))
    assert draws.dtype == torch.float32
    assert draws.isfinite().all()
    for quantile in (0.1, 0.5, 0.9):
        torch.testing.assert_close(
            draws.quantile(quantile).item(), exact.quantile(quantile).item(), rtol=0.1, atol=0.1
        )


# ---------------------------------------------------------------------------------------------------------------------
# Scales: bounds, and their start
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "make", [likelihoods.Laplace, lambda *args, **options: likelihoods.StudentT(4.0, *args, **options)]
)
def test_bounds_of_a_log_scale(backend: str, make: Any) -> None:
    """The smooth clamp of the Gaussian's log-variance, before the density: packed, as a pair, and learned."""
    x, loc = torch.randn(3, 2, 5), torch.randn(3, 2, 5)
    log_scale = (8 * torch.randn(3, 2, 5)).requires_grad_()
    clamped = reference.continuous.bounded_logvar(log_scale, (-4.0, 1.0))
    want = make("per_element").nll((loc, clamped), x)
    (slope,) = torch.autograd.grad(want.sum(), log_scale)
    likelihood = make("per_element", log_scale_bounds=(-4.0, 1.0))
    assert repr(likelihood).endswith("scale='per_element', log_scale_bounds=(-4.0, 1.0))")
    for params in ((loc, log_scale), torch.cat((loc, log_scale), 1)):
        got = likelihood.nll(params, x)
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(torch.autograd.grad(got.sum(), log_scale)[0], slope, rtol=1e-4, atol=1e-5)
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
def test_learned_scales_start_at_0_after_to_empty(make: Any) -> None:
    with torch.device("meta"):
        likelihood = make()
    likelihood.to_empty(device="cpu")
    for parameter in likelihood.parameters():
        parameter.data.fill_(7.0)
    likelihood.reset_parameters()
    assert all((parameter == 0).all() for parameter in likelihood.parameters())
    assert len(list(likelihood.parameters())) == 1
