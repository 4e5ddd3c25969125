"""The smooth clamp of the Gaussian's log-variance."""

import copy
import math
from typing import Any

import mpmath
import pytest
import torch
from test_densities import DTYPES, FLOATS, column, compare
from torch import Tensor

import fastvae
from fastvae import functional as fv
from fastvae import likelihoods, reference

mpmath.mp.dps = 50


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
def test_bounded_gaussian_equals_50_digits(
    backend: str, bounds: tuple[float, float], dtype: torch.dtype
) -> None:
    """In the middle, where it is the identity; where it bends; and where it is saturated."""
    middle, half = sum(bounds) / 2, (bounds[1] - bounds[0]) / 2
    steps = (0.0, 1e-12, 1e-6, 1e-3, 0.1, 0.3, 0.7, 1.0, 1.5, 3.0, 20.0, 1e4)
    points = [(middle + sign * x * half, t) for x in steps for sign in (1, -1) for t in (0.5, 0.375, 4.0)]

    def exact(v: Any, t: Any) -> tuple[Any, Any]:
        lo, hi = map(mpmath.mpf, bounds)
        square = (t - 0.5) ** 2 * mpmath.exp(-bounded_by_mpmath(v, bounds))
        value = (mpmath.log(2 * mpmath.pi) + bounded_by_mpmath(v, bounds) + square) / 2
        return value, (1 - square) / 2 * mpmath.sech((v - (lo + hi) / 2) / ((hi - lo) / 2)) ** 2

    # The rounding error of the log-variance is one unit of its largest summand, and the exponential multiplies it.
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


def test_wide_bounds_keep_the_accuracy_of_logvar(backend: str) -> None:
    """In the middle, the error is relative to the log-variance and not to half the interval."""
    logvar, target = torch.randn(2000, 1), torch.randn(2000, 1)

    def run(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        v = logvar.to(dtype).requires_grad_()
        value = fv.gaussian_nll(torch.zeros_like(v), target.to(dtype), v, logvar_bounds=(-1000.0, 1000.0))
        return value.double(), torch.autograd.grad(value.sum(), v)[0].double()

    for found, exact in zip(run(torch.float32), run(torch.float64), strict=True):
        assert ((found - exact).abs() <= 8 * torch.finfo(torch.float32).eps * (1 + exact.abs())).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_logvar_outside_its_bounds_has_a_gradient(backend: str, dtype: torch.dtype) -> None:
    """Half an interval beyond the bounds, where a hard clamp has no gradient, it points back to a better variance."""
    below, above = BOUNDS[0] - 8.0, BOUNDS[1] + 8.0
    # Above, the data fit exactly, so a smaller variance is better; below, they do not fit at all.
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
def test_logvar_gradient_far_outside_its_bounds_is_accurate(native: None, dtype: torch.dtype) -> None:
    """1 - tanh^2 would be 0 once tanh rounds to 1, in float32 ten half intervals from the middle."""
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
def test_bounded_logvar_stays_in_its_bounds(backend: str, v: float, dtype: torch.dtype) -> None:
    params = torch.cat((torch.full((2, 3, 5), 0.5), torch.full((2, 3, 5), v)), 1).to(dtype).requires_grad_()
    target = torch.full((2, 3, 5), 0.25, dtype=dtype).requires_grad_()
    bound = BOUNDS[v > 0]
    nll = fv.gaussian_head_nll(params, target, logvar_bounds=BOUNDS)
    want = 15 * (math.log(2 * math.pi) + bound + 0.0625 * math.exp(-bound)) / 2
    torch.testing.assert_close(nll.double(), torch.full((2,), want).double(), rtol=2e-6, atol=0)
    by_params, by_target = torch.autograd.grad(nll.sum(), (params, target))
    rtol = {torch.bfloat16: 5e-3, torch.float16: 1e-3}.get(dtype, 2e-6)
    grad = torch.full((2, 3, 5), 0.25 * math.exp(-bound))
    torch.testing.assert_close(by_params[:, :3].float(), grad, rtol=rtol, atol=0)
    torch.testing.assert_close(by_target.float(), -grad, rtol=rtol, atol=0)
    assert (by_params[:, 3:].abs() < 1e-6).all()


def test_bounded_variance_is_the_same_in_every_form(backend: str) -> None:
    """Learned, from a head and from a pair: the same loss and standard deviation, and gradients that sum to each
    other."""
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
def test_bounded_standard_deviation_keeps_its_dtype(dtype: torch.dtype) -> None:
    """In half types, the clamp is computed in float32 like the loss: rounding -5.9 to bfloat16 would cost 0.8 %."""
    likelihood = likelihoods.Gaussian("per_element", logvar_bounds=BOUNDS)
    head = torch.full((1, 2, 3), -9.0, dtype=dtype)
    mean, std = likelihood._mean_and_std(head)
    assert isinstance(std, Tensor)
    assert mean.dtype == std.dtype == dtype
    want = math.exp(bounded_by_mpmath(-9.0) / 2)
    assert (std.double() / want - 1).abs().max() < torch.finfo(dtype).eps * 4
    assert likelihood.sample(head).dtype == dtype


def test_bounded_reference_is_twice_differentiable(native: None) -> None:
    params = torch.randn(2, 4, 3, dtype=torch.float64, requires_grad=True)
    target = torch.randn(2, 2, 3, dtype=torch.float64)
    assert torch.autograd.gradgradcheck(
        lambda p: reference.gaussian_head_nll(p, target, logvar_bounds=(-1.0, 2.0)), params
    )


def test_bounds_are_in_repr_and_deepcopy() -> None:
    likelihood = likelihoods.Gaussian("per_element", logvar_bounds=[-6, 2])
    assert repr(likelihood) == "Gaussian(scale='per_element', logvar_bounds=(-6.0, 2.0))"
    assert repr(likelihoods.Gaussian("per_element")) == "Gaussian(scale='per_element')"
    assert copy.deepcopy(likelihood).logvar_bounds == (-6.0, 2.0)


def test_logvar_bounds_stop_training_from_diverging(native: None) -> None:
    """If a decoder fits the data exactly, the loss keeps falling without bounds, and settles with them."""
    x = torch.zeros(4, 8)

    def train(bounds: tuple[float, float] | None) -> Tensor:
        logvar = torch.zeros(4, 8, requires_grad=True)
        likelihood = likelihoods.Gaussian("per_element", logvar_bounds=bounds)
        optimiser = torch.optim.SGD([logvar], lr=0.5)
        for _ in range(200):
            optimiser.zero_grad()
            likelihood.nll((x, logvar), x).sum().backward()
            optimiser.step()
        return likelihood._mean_and_std((x, logvar.detach()))[1]

    assert (train(None) < math.exp(-20)).all()
    std = train(BOUNDS)
    assert (std >= math.exp(-3)).all()
    assert (std < 1.1 * math.exp(-3)).all()
