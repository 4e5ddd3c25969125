"""Extreme inputs: infinite parameters, scales that over- and underflow, data at the location, empty cells, huge counts.

Every backend returns the limit of the exact value there, and the limit of the exact gradient wherever that is finite.
`grid` makes a grid of extremes for each variant of the table of likelihoods, with the truth from mpmath. Single cases
that users have met follow.
"""

import math
from collections.abc import Callable
from functools import cache
from itertools import product
from typing import Any, NamedTuple

import mpmath
import pytest
import torch
from test_counts import NB_RAW, ZINB_RAW, make
from torch import Tensor

from fastvae import functional
from fastvae._spec import VARIANTS, Variant

INF = math.inf
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
VALUE = {torch.float64: 1e-12}  # 5e-6 for the others, whose rows are float32
GRADIENT = {torch.float32: 5e-6, torch.float64: 1e-12, torch.bfloat16: 1e-2, torch.float16: 2e-3}

# ---------------------------------------------------------------------------------------------------------------------
# The truth: (nll, its derivative by each parameter) of one element
# ---------------------------------------------------------------------------------------------------------------------

Truth = tuple[Any, list[Any]]
mpf = mpmath.mpf


def sigmoid(a: Any) -> Any:
    return 1 / (1 + mpmath.exp(-a))


def log1pexp(a: Any) -> Any:
    """log(1 + e^a)."""
    return max(a, 0) + mpmath.log1p(mpmath.exp(-abs(a)))


def bernoulli(a: Any, t: Any) -> Truth:
    # Both terms are positive, so nothing cancels.
    return t * log1pexp(-a) + (1 - t) * log1pexp(a), [(1 - t) * sigmoid(a) - t * sigmoid(-a)]


def gaussian(m: Any, v: Any, t: Any) -> Truth:
    inverse = mpmath.exp(-v)
    square = (m - t) ** 2 * inverse
    return (mpmath.log(2 * mpmath.pi) + v + square) / 2, [(m - t) * inverse, (1 - square) / 2]


def laplace(m: Any, s: Any, t: Any) -> Truth:
    inverse = mpmath.exp(-s)
    distance = abs(m - t) * inverse
    return mpmath.log(2) + s + distance, [mpmath.sign(m - t) * inverse, 1 - distance]


def student_t(m: Any, s: Any, t: Any, df: Any) -> Truth:
    constant = mpmath.loggamma(df / 2) - mpmath.loggamma((df + 1) / 2) + mpmath.log(df * mpmath.pi) / 2
    if m == t:
        return constant + s, [mpf(0), mpf(1)]
    log_y = mpmath.log(abs(m - t)) - s - mpmath.log(df) / 2
    scale_grad = (df + 1) * sigmoid(2 * log_y)
    return constant + s + (df + 1) / 2 * log1pexp(2 * log_y), [scale_grad / (m - t), 1 - scale_grad]


def continuous_bernoulli(a: Any, t: Any) -> Truth:
    if a == 0:
        return mpf(0), [0.5 - t]
    if abs(a) > 1000:  # e^-|a| is negligible beside 1
        return max(a, 0) - a * t - mpmath.log(abs(a)), [(1 if a > 0 else 0) - 1 / a - t]
    with mpmath.workdps(150):  # a hundred digits cancel
        return mpmath.log(mpmath.expm1(a) / a) - a * t, [1 / -mpmath.expm1(-a) - 1 / a - t]


def gamma(s: Any, x: Any, shape: Any) -> Truth:
    ratio = x * mpmath.exp(-s)
    if x == 0:  # the infinite logarithm of x outweighs any s
        return s if shape == 1 else mpf(INF) * mpmath.sign(shape - 1), [shape]
    return mpmath.loggamma(shape) + shape * s - (shape - 1) * mpmath.log(x) + ratio, [shape - ratio]


def poisson(a: Any, t: Any) -> Truth:
    rate = mpmath.exp(a)
    return rate - t * a + mpmath.loggamma(t + 1), [rate - t]


def poisson_rate(m: Any, t: Any) -> Truth:
    if t == 0:
        return m, [mpf(1)]
    if m == 0:
        return mpf(INF), [mpf(-INF)]
    return m - t * mpmath.log(m) + mpmath.loggamma(t + 1), [1 - t / m]


def negative_binomial(mu: Any, theta: Any, t: Any) -> Truth:
    """The derivatives are by the logarithms of `mu` and `theta`, neither of which is 0."""
    if t > 50 and theta > 1e30:
        with mpmath.workdps(80 + int(mpmath.log10(theta))):  # all digits but 80 cancel
            ratio = mpmath.loggamma(t + theta) - mpmath.loggamma(theta)
            digamma = mpmath.digamma(t + theta) - mpmath.digamma(theta)
    elif t <= 50:
        ratio = mpmath.fsum(
            mpmath.log(theta + i) for i in range(int(t))
        )  # log of Gamma(t + theta) / Gamma(theta)
        digamma = mpmath.fsum(1 / (theta + i) for i in range(int(t)))
    else:
        ratio = mpmath.loggamma(t + theta) - mpmath.loggamma(theta)
        digamma = mpmath.digamma(t + theta) - mpmath.digamma(theta)
    zeros = mpmath.log1p(mu / theta)
    value = mpmath.loggamma(t + 1) - ratio + theta * zeros + t * mpmath.log((theta + mu) / mu)
    d_theta = zeros - mu / (theta + mu) + t / (theta + mu) - digamma
    return value, [(mu - t) * theta / (theta + mu), theta * d_theta]


def with_zeros(of_count: Truth, pi: Any, t: Any) -> Truth:
    z, (d_mu, d_theta) = of_count
    if t > 0:
        return z + log1pexp(pi), [d_mu, d_theta, sigmoid(pi)]
    # -log(p + (1 - p) e^-z) is computed from the larger term. `share` is the share of the second term.
    share = sigmoid(-pi - z)
    value = log1pexp(pi) - max(pi, -z) - mpmath.log1p(mpmath.exp(-abs(pi + z)))
    return value, [d_mu * share, d_theta * share, sigmoid(pi) - sigmoid(pi + z)]


def exp_of(log_theta: Any) -> Any:
    """e^log_theta, capped where the distribution equals the Poisson to all digits. Larger numbers are too long."""
    return mpmath.exp(min(log_theta, mpf(2000)))


def by_mean(mu: Any, theta: Any, t: Any) -> Truth:
    value, (d_mu, d_theta) = negative_binomial(mu, theta, t)
    return value, [d_mu / mu, d_theta / theta]


def by_mean_with_zeros(mu: Any, theta: Any, pi: Any, t: Any) -> Truth:
    value, (d_mu, d_theta, d_pi) = with_zeros(negative_binomial(mu, theta, t), pi, t)
    return value, [d_mu / mu, d_theta / theta, d_pi]


def by_library(_: Any, log_theta: Any, library: Any, t: Any) -> Truth:
    """A cell with a single gene, whose logit changes nothing."""
    value, (d_mu, d_theta) = negative_binomial(library, exp_of(log_theta), t)
    return value, [mpf(0), d_theta, d_mu / library]


def by_library_with_zeros(_: Any, log_theta: Any, pi: Any, library: Any, t: Any) -> Truth:
    value, (d_mu, d_theta, d_pi) = with_zeros(negative_binomial(library, exp_of(log_theta), t), pi, t)
    return value, [mpf(0), d_theta, d_pi, d_mu / library]


def discretized_logistic(mean: Any, raw: Any, level: Any) -> Truth:
    """For 8 bits, a floor of -7 and a minimum mass of 1e-5. The derivatives use that of a sigmoid, s(a) s(-a)."""
    s = max(raw, mpf(-7))
    x, half, inverse = 2 * level / 255 - 1, mpf(1) / 255, mpmath.exp(-s)
    u, h = (x - mean) * inverse, half * inverse
    if level in (0, 255):
        past = (u + h) if level == 0 else (h - u)
        by_mean = sigmoid(-past) * inverse * (1 if level == 0 else -1)
        value, by_scale = log1pexp(-past), sigmoid(-past) * past
    else:
        # The nll uses the mass of the level, or the density where the mass is small.
        u = -abs(u)
        sign = 1 if x < mean else -1
        mass = sigmoid(u + h) * sigmoid(h - u) * -mpmath.expm1(-2 * h)
        if mass > mpf(1e-5):
            value = -mpmath.log(mass)
            grad = sigmoid(-u - h) - sigmoid(u - h)  # the derivative of log mass by u
            by_h = sigmoid(-u - h) + sigmoid(u - h) + 2 / mpmath.expm1(2 * h)
        else:
            value = -(u - s - 2 * log1pexp(u) - mpmath.log(mpf(255) / 2))
            grad, by_h = 1 - 2 * sigmoid(u), 1 / h
        by_mean, by_scale = grad * inverse * sign, u * grad + h * by_h
    return value, [by_mean, mpf(0) if raw < -7 else by_scale]


def mixture(logit: Any, mean: Any, raw: Any, level: Any) -> Truth:
    """A mixture with a single component, whose logit changes nothing."""
    value, grads = discretized_logistic(mean, raw, level)
    return value, [mpf(0), *grads]


def gaussian_kl(mu: Any, v: Any, prior_mu: Any = 0, prior_v: Any = 0) -> Truth:
    inverse, ratio = mpmath.exp(-prior_v), mpmath.exp(v - prior_v)
    square = (mu - prior_mu) ** 2 * inverse
    by_mu = (mu - prior_mu) * inverse
    value = (square + ratio - 1 - (v - prior_v)) / 2
    return value, [by_mu, (ratio - 1) / 2, -by_mu, (1 - ratio - square) / 2]


def limit(
    truth: Callable[..., Truth], values: tuple[float, ...], positive: bool = False
) -> tuple[float, ...]:
    """(nll, derivatives) as floats.

    For an infinite parameter, two large values replace it: either their results agree, or they show to which infinity
    the results go. If the parameters are `positive`, 0 is a limit too.
    """
    *params, target = values
    if not any(math.isinf(x) or (positive and x == 0) for x in params):
        with mpmath.workdps(120 if max(map(abs, values)) > 1e3 else 60):
            value, grads = truth(*map(mpf, values))
            return tuple(map(float, (value, *grads)))

    def at(size: int) -> list[Any]:
        large = mpf(10) ** size

        def near(x: float) -> Any:
            return (
                large * int(math.copysign(1, x))
                if math.isinf(x)
                else 1 / large
                if positive and x == 0
                else mpf(x)
            )

        value, grads = truth(*map(near, params), mpf(target))
        return [value, *grads]

    with mpmath.workdps(60):
        pairs = zip(at(400), at(800), strict=True)
        return tuple(
            float(far) if abs(far - close) <= mpf(10) ** -40 * (1 + abs(close)) else float(far * mpf(INF))
            for close, far in pairs
        )


# ---------------------------------------------------------------------------------------------------------------------
# The grid
# ---------------------------------------------------------------------------------------------------------------------

LOGITS = (-INF, -1e4, -100.0, -20.0, 0.0, 0.75, 89.0, 1e4, INF)
PLACES = (0.0, 1.0, -1e-20, 1e4, 1e30)
SCALES = (-INF, -1e30, -1000.0, -180.0, -100.0, -89.0, -20.0, 0.0, 89.0, 180.0, 1e30, INF)
COUNTS = (0.0, 1.0, 2.0, 16.0, 300.0, 1e6, 1e12)

# The keys are the names of the tensors.
AXES: dict[str, tuple[float, ...]] = {
    "logits": LOGITS,
    "zi_logits": (-INF, -100.0, 0.5, 100.0, INF),
    "mean": PLACES,
    "loc": PLACES,
    "logvar": tuple(2 * s for s in SCALES),
    "log_scale": SCALES,
    "log_rate": (-INF, -1e4, -100.0, -20.0, 0.0, 5.75, 20.0, 100.0, INF),
    "rate": (0.0, 1e-30, 0.5, 20.0, 1e6, 1e30, INF),
    "inverse_dispersion": (1e-30, 0.5, 300.0, 1e20, INF),
    "log_dispersion": (-INF, -700.0, -100.0, 0.0, 5.0, 100.0, 1000.0, INF),
    "library": (0.0, 1e-20, 3.0, 1e6),
}
# The axes of some densities differ. The logit of a single gene or of a single component changes nothing.
OTHER_AXES: dict[str, dict[str, tuple[float, ...]]] = {
    "negative_binomial": {"mean": (0.0, 1e-20, 3.0, 1e6), "logits": (0.75,)},
    "zero_inflated_negative_binomial": {"mean": (0.0, 3.0, 1e6), "logits": (0.75,)},
    "discretized_logistic": {"mean": (-1e30, -1.0, 0.25, 1e4)},
    "discretized_logistic_mixture": {
        "mean": (-1e30, -1.0, 0.25, 1e4),
        "log_scale": SCALES[:-1],
        "logits": (0.75,),
    },
}
TARGETS = {
    "bernoulli": (0.0, 0.25, 1.0),
    "continuous_bernoulli": (0.0, 0.25, 1.0),
    "gamma": (0.0, 0.25, 1e-20, 1e20),
    "poisson": COUNTS,
    "negative_binomial": (0.0, 1.0, 20.0, 1e6, 1e12),
    "zero_inflated_negative_binomial": (0.0, 3.0, 1e12),
    "discretized_logistic": (0.0, 100.0, 255.0),
    "discretized_logistic_mixture": (0.0, 100.0, 255.0),
}
CONSTANTS: dict[str, tuple[tuple[float, ...], ...]] = {
    "scale": ((1e-60,), (1e-30,), (1.0,), (1e60,)),
    "logvar_bounds": ((-6.0, 2.0),),
    "df": ((3.0,),),
    "shape": ((0.5,), (1.0,), (2.5,)),
    "eps": ((0.0,),),
    "bits": ((8.0,),),
    "log_scale_floor": ((-7.0,),),
    "min_mass": ((1e-5,),),
    "components": ((1.0,),),
}
# The parameters in the packed tensor of each density.
PACKED = {
    "gaussian": ("mean", "logvar"),
    "laplace": ("loc", "log_scale"),
    "student_t": ("loc", "log_scale"),
    "discretized_logistic": ("mean", "log_scale"),
    "discretized_logistic_mixture": ("logits", "mean", "log_scale"),
}
TRUTHS: dict[str, Callable[..., Truth]] = {
    "bernoulli": bernoulli,
    "gaussian": gaussian,
    "laplace": laplace,
    "continuous_bernoulli": continuous_bernoulli,
    "student_t": student_t,
    "gamma": gamma,
    "poisson": poisson,
    "poisson_rate": poisson_rate,
    "negative_binomial": by_mean,
    "zero_inflated_negative_binomial": by_mean_with_zeros,
    "negative_binomial_logits": by_library,
    "zero_inflated_negative_binomial_logits": by_library_with_zeros,
    "discretized_logistic": discretized_logistic,
    "discretized_logistic_mixture": mixture,
}
# Classes and the features of a multinomial share a normaliser, and a mixture has too many parameters for a grid, so
# their own files test their extremes.
GRIDDED = [
    variant
    for variant in VARIANTS.values()
    if variant.density not in ("categorical", "multinomial", "negative_binomial_mixture")
]


def truth_of(variant: Variant, constants: tuple[float, ...]) -> Callable[..., Truth]:
    """The truth as a function of the values of the variant's tensors and of the target."""
    plain = TRUTHS.get(variant.name, TRUTHS[variant.density])
    names = [constant.name for constant in variant.constants]
    if names in (["eps"], ["bits", "log_scale_floor", "min_mass"], ["components", *names[1:]]):
        return plain
    given = tuple(map(mpf, constants))
    if names == ["logvar_bounds"]:

        def of_bounded(m: Any, v: Any, t: Any) -> Truth:
            middle, half = (given[0] + given[1]) / 2, (given[1] - given[0]) / 2
            y = (v - middle) / half
            value, (by_mean, by_logvar) = gaussian(m, middle + half * mpmath.tanh(y), t)
            return value, [by_mean, by_logvar * mpmath.sech(y) ** 2]

        return of_bounded
    if "scale" in names:
        log_scale = mpmath.log(given[-1]) * (2 if variant.density == "gaussian" else 1)
        others = given[:-1]

        def of_fixed(m: Any, t: Any) -> Truth:
            value, grads = plain(m, log_scale, t, *others)
            return value, grads[:1]

        return of_fixed
    return lambda *values: plain(*values, *given)


class Points(NamedTuple):
    """Points of a grid, with one element each, in tensors of shape (points, 1)."""

    constants: tuple[float, ...]
    columns: tuple[Tensor, ...]  # one tensor for each parameter
    target: Tensor
    want: Tensor  # (points, 1 + parameters), float64: the nll and its derivatives


@cache
def grid(name: str, dtype: torch.dtype, every: int = 1) -> list[Points]:
    """Every n-th point of the grid of a variant, with a set of points for each choice of its constants."""
    variant = VARIANTS[name]
    tensors = PACKED[variant.density] if variant.tensors == ("params",) else variant.tensors
    axes = AXES | OTHER_AXES.get(variant.density, {})
    if "bounded" in variant.name:  # avoids products of an infinite number and one that is nearly 0
        axes |= {"mean": PLACES[:-1]}
    targets = TARGETS.get(variant.density, (0.0,))
    values = torch.tensor(list(product(*(axes[tensor] for tensor in tensors), targets)), dtype=torch.float64)
    if dtype.itemsize == 2:
        every *= 5  # half types differ from float32 only in the conversions
    fits = (values.isinf() == values.to(dtype).isinf()).all(1)
    values = values[fits].to(dtype).double().unique(dim=0)
    # Where two parameters go to their limits, the result depends on the path, so such points are left out.
    params, positive = values[:, :-1], "negative_binomial" in variant.density
    at_end = params.isinf() | (params == 0) & positive
    if "log_dispersion" in tensors:
        at_end |= params == -700
    if variant.density == "gamma":
        at_end = values.isinf() | (values == 0) & torch.tensor([False, True])
    values = values[at_end.sum(1) < 2][::every]
    found = []
    for constants in product(*(CONSTANTS[constant.name] for constant in variant.constants)):
        numbers = sum(constants, ())
        truth = truth_of(variant, numbers)
        want = torch.tensor(
            [limit(truth, tuple(point), positive) for point in values.tolist()], dtype=torch.float64
        )
        *columns, target = values.to(dtype).split(1, dim=1)
        if variant.family == "discretized":
            target = target.to(torch.uint8)
        found.append(Points(numbers, tuple(map(Tensor.contiguous, columns)), target.contiguous(), want))
    return found


def tensors_of(variant: Variant, columns: tuple[Tensor, ...]) -> list[Tensor]:
    if variant.tensors == ("params",):
        return [torch.cat(columns, 1)] if len(columns) > 1 else list(columns)
    return [x.flatten() if name == "library" else x for name, x in zip(variant.tensors, columns, strict=True)]


def wrong(got: Tensor, want: Tensor, dtype: torch.dtype, bound: Tensor) -> Tensor:
    """True where `got` is not within `bound` of `want`.

    Where `dtype` cannot hold `want`, `got` must be infinite, or nearly so, with the same sign.
    """
    got, most = got.double(), torch.finfo(dtype).max
    return (
        torch.where(
            want.abs() > 0.4 * most, (got * want <= 0) | (got.abs() < 0.3 * most), (got - want).abs() > bound
        )
        | got.isnan()
    )


def check_points(
    variant: Variant, points: Points, nll: Tensor, grads: list[Tensor], dtype: torch.dtype
) -> None:
    """Check the nll, (points,), and the derivatives by each parameter."""
    nll, grads = nll.cpu(), [grad.cpu() for grad in grads]
    columns, target = [x.double().flatten() for x in points.columns], points.target.double().flatten()
    want, *by = points.want.unbind(1)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    tolerance = VALUE.get(dtype, 5e-6)
    # The error that rounding the parameters causes.
    terms = sum((x * grad).nan_to_num(0.0, 0.0, 0.0).abs() for x, grad in zip(columns, by, strict=True))
    found = [("nll", nll, want, wrong(nll, want, wide, tolerance * (1 + terms + want.abs())))]
    for i, (x, grad, exact) in enumerate(zip(columns, grads, by, strict=True)):
        size = torch.ones_like(target)
        if variant.counts:
            size += target
            if "inverse_dispersion" in variant.tensors and i == 1:
                size /= x.clamp(max=1)
        bound = GRADIENT[dtype] * exact.abs() + tolerance * size
        # Where the limit is infinite, the only requirement on the gradient is that it is not NaN.
        finite = exact.abs() < 0.4 * torch.finfo(dtype).max
        places = wrong(grad, exact, dtype, bound) & finite | grad.isnan()
        found.append((f"grad by {i}", grad, exact, places))
    for what, got, exact, places in found:
        faults = [
            f"{[x[i].item() for x in columns]}, target {target[i].item()}: {got[i].item()} for {exact[i].item()}"
            for i in places.nonzero().flatten().tolist()
        ]
        assert not faults, f"{variant.name} {points.constants}, {what}: " + "; ".join(faults)


def run(variant: Variant, points: Points, device: torch.device | str = "cpu") -> tuple[Tensor, list[Tensor]]:
    """(nll, derivatives) of each point. A point is a row, or a call of its own where all rows share a scale."""
    columns = [x.to(device) for x in points.columns]
    target = points.target.to(device)
    if variant.has_scalar:
        each = []
        for i in range(len(target)):
            lead, scalar = columns[0][i : i + 1].requires_grad_(), columns[1][i, 0].requires_grad_()
            nll = functional.loss.nll(variant.name, [lead, scalar], target[i : i + 1], points.constants)[1]
            each.append((nll.detach(), *torch.autograd.grad(nll.sum(), [lead, scalar])))
        nll, *grads = (torch.stack([x.flatten()[0] for x in column]) for column in zip(*each, strict=True))
        return nll, grads
    params = [x.requires_grad_() for x in tensors_of(variant, tuple(columns))]
    nll = functional.loss.nll(variant.name, params, target, points.constants)[1]
    grads = torch.autograd.grad(nll.sum(), params)
    if len(params) == 1:
        return nll.detach(), list(grads[0].unbind(1))
    return nll.detach(), [grad.flatten() for grad in grads]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("variant", GRIDDED, ids=lambda variant: variant.name)
def test_nll_on_the_grid_equals_the_limits(backend: str, variant: Variant, dtype: torch.dtype) -> None:
    # The grid is thinned in the interpreter, which runs a program for each cell.
    for points in grid(variant.name, dtype, 1 if variant.element or backend != "triton" else 9):
        check_points(variant, points, *run(variant, points), dtype)


BESIDE = [
    variant
    for variant in GRIDDED
    if variant.elements or (variant.element and not variant.packed and not variant.has_scalar)
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("variant", BESIDE, ids=lambda variant: variant.name)
def test_nll_on_the_grid_in_one_row_equals_separate_rows(
    backend: str, variant: Variant, dtype: torch.dtype
) -> None:
    """Neighbours in the row, an inverse dispersion that all cells share, and values per element change nothing."""
    for points in grid(variant.name, dtype, 1 if variant.element or backend != "triton" else 9):
        nll, grads = run(variant, points)
        params = [
            x.flatten() if name == "inverse_dispersion" else x.t()
            for name, x in zip(variant.tensors, points.columns, strict=True)
        ]
        params = [x.clone().requires_grad_() for x in params]
        target = points.target.t()
        if variant.elements:
            values = functional.loss.nll_elements(variant.name, params, target, points.constants)
            torch.testing.assert_close(values[0], nll, rtol=1e-6, atol=1e-30)
        else:
            values = functional.loss.nll(variant.name, params, target, points.constants)[1]
        for grad, expected in zip(torch.autograd.grad(values.sum(), params), grads, strict=True):
            torch.testing.assert_close(grad.flatten(), expected, rtol=1e-6, atol=1e-30)


KL_PLACES = (0.0, -1e-20, 1.0, 1e4)
KL_LOGVARS = (-INF, -1e30, -400.0, -200.0, -20.0, 0.0, 20.0, 200.0, INF)


@cache
def kl_grid(dtype: torch.dtype, prior: bool) -> tuple[Tensor, Tensor]:
    """The points, (points, parameters), and their truth."""
    axes = (KL_PLACES, KL_LOGVARS, *([(0.0, 1.0), KL_LOGVARS] if prior else []))
    points = torch.tensor(list(product(*axes)), dtype=torch.float64)
    points = points[(points.isinf().sum(1) < 2) & (points.isinf() == points.to(dtype).isinf()).all(1)]
    points = points.to(dtype).double().unique(dim=0)[:: 5 if dtype.itemsize == 2 else 1]
    want = [limit(lambda *x: gaussian_kl(*x[:-1]), (*point, 0.0)) for point in points.tolist()]
    return points.to(dtype), torch.tensor(want, dtype=torch.float64)[:, : 1 + points.shape[1]]


def check_kl(points: Tensor, want: Tensor, kl: Tensor, grads: list[Tensor]) -> None:
    dtype, kl, grads = points.dtype, kl.cpu(), [grad.cpu() for grad in grads]
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    tolerance = VALUE.get(dtype, 5e-6)
    for i, (got, exact) in enumerate(zip((kl, *grads), want.unbind(1), strict=True)):
        kind, relative = (dtype, GRADIENT[dtype]) if i else (wide, tolerance)
        places = wrong(got, exact, kind, relative * exact.abs() + tolerance)
        if i:
            places = places & (exact.abs() < 0.4 * torch.finfo(kind).max) | got.isnan()
        faults = zip(points[places].tolist(), got[places].tolist(), exact[places].tolist(), strict=True)
        assert not places.any(), f"{i}: " + "; ".join(f"{x}: {y} for {z}" for x, y, z in faults)


def run_kl(points: Tensor, with_z: bool) -> tuple[Tensor, list[Tensor]]:
    leaves = [x.clone().requires_grad_() for x in points.split(1, 1)]
    if with_z:
        kl = functional.reparameterize_kl(*leaves, eps=torch.zeros_like(leaves[0]))[1]
    else:
        kl = functional.gaussian_kl(*leaves)
    return kl.detach(), [grad.flatten() for grad in torch.autograd.grad(kl.sum(), leaves)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("with_z", [False, True])
@pytest.mark.parametrize("prior", [False, True])
def test_kl_on_the_grid_equals_the_limits(
    backend: str, prior: bool, with_z: bool, dtype: torch.dtype
) -> None:
    points, want = kl_grid(dtype, prior)
    check_kl(points, want, *run_kl(points, with_z))


# ---------------------------------------------------------------------------------------------------------------------
# Cases that users have met
# ---------------------------------------------------------------------------------------------------------------------


def value_and_grads(function: Callable[..., Tensor], *values: float, dtype: torch.dtype) -> tuple[float, ...]:
    """The value and the gradients of a function of single numbers."""
    leaves = [torch.tensor([[value]], dtype=dtype, requires_grad=True) for value in values]
    nll = function(*leaves)
    return nll.item(), *(grad.item() for grad in torch.autograd.grad(nll.sum(), leaves))


floats = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("form", [NB_RAW, ZINB_RAW])
@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "csr"])
@pytest.mark.parametrize("shared", [True, False], ids=["gene", "gene-cell"])
def test_gradient_of_an_empty_cell_is_only_by_its_library(
    backend: str, form: str, sparse: bool, shared: bool, dtype: torch.dtype
) -> None:
    """The library of the cell is 0. The gradient by it is the sum of the shares of the genes.

    With additional zeros, each share is multiplied by the probability that the gene has no additional zero.
    """
    inputs = {name: x.detach() for name, x in make(form, 4, 21, dtype, shared=shared).items()}
    inputs["target"][1], inputs["library"][1] = 0, 0

    def run(rows: slice) -> tuple[Tensor, dict[str, Tensor]]:
        chosen = {name: x if x.dim() == 1 and name != "library" else x[rows] for name, x in inputs.items()}
        leaves = {name: x.clone().requires_grad_() for name, x in chosen.items() if name != "target"}
        target = chosen["target"].to_sparse_csr() if sparse else chosen["target"]
        nll = getattr(functional, f"{form}_nll")(**leaves, target=target)
        return nll.detach(), dict(zip(leaves, torch.autograd.grad(nll.sum(), leaves.values()), strict=True))

    nll, grads = run(slice(1, 2))
    assert nll.tolist() == [0]
    for name, grad in grads.items():
        if name != "library":
            assert torch.equal(grad, torch.zeros_like(grad)), name
    share = torch.softmax(inputs["logits"][1].double(), 0)
    if form == ZINB_RAW:
        share *= torch.sigmoid(-inputs["zi_logits"][1].double())
    tolerance = {torch.bfloat16: 1e-2, torch.float16: 1e-3}.get(dtype, 1e-6)
    torch.testing.assert_close(grads["library"].double(), share.sum().view(1), rtol=tolerance, atol=0)

    # The results of the other cells are the same as without the empty cell.
    nll, grads = run(slice(0, 4))
    for row in (0, 2, 3):
        alone, of_one = run(slice(row, row + 1))
        assert torch.equal(nll[row : row + 1], alone)
        for name, grad in of_one.items():
            if name == "library" or grad.dim() == 2:
                assert torch.equal(grads[name][row : row + 1], grad), name


@pytest.mark.parametrize(("count", "want"), [(1e6, 7.8267), (1e7, 8.9780)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_poisson_nll_of_a_large_count_keeps_its_digits(
    backend: str, count: float, want: float, dtype: torch.dtype
) -> None:
    """If the rate equals the count, the nll is log(2 pi t) / 2.

    In float32, three terms as large as t log t would leave no correct digit of it.
    """
    nll, grad = value_and_grads(
        lambda a: functional.poisson_nll(a, torch.full_like(a, count)), math.log(count), dtype=dtype
    )
    assert abs(nll - want) < 1e-3
    assert abs(grad) < 3e-6 * count


@floats
def test_student_t_nll_far_outside_of_a_tiny_scale_is_accurate(backend: str, dtype: torch.dtype) -> None:
    nll, *grads = value_and_grads(
        lambda m, s: functional.student_t_nll(m, torch.ones_like(m), s, df=3), 0.0, -100.0, dtype=dtype
    )
    assert abs(nll - 298.8036) < 1e-3
    assert grads == pytest.approx([-4, -3], rel=1e-6)


@floats
@pytest.mark.parametrize("count", [1.0, 20.0])
def test_negative_binomial_nll_at_a_dispersion_below_float32_is_accurate(
    backend: str, count: float, dtype: torch.dtype
) -> None:
    """The nll there is -log theta plus a constant."""
    inputs = {"logits": [[0.0]], "log_dispersion": [[-100.0]], "library": [1.0]}
    leaves = {name: torch.tensor(x, dtype=dtype, requires_grad=True) for name, x in inputs.items()}
    nll = functional.negative_binomial_logits_nll(**leaves, target=torch.full((1, 1), count, dtype=dtype))
    assert abs(nll.item() - (100 + math.log(count))) < 1e-4
    assert [grad.item() for grad in torch.autograd.grad(nll.sum(), leaves.values())] == pytest.approx(
        [0, -1, 0], abs=1e-6
    )


MET = {
    "laplace": (lambda m, s: functional.laplace_nll(m, torch.zeros_like(m), s), math.log(2), 1.0),
    "student_t": (
        lambda m, s: functional.student_t_nll(m, torch.zeros_like(m), s, df=3),
        1.0008888496235103,
        1.0,
    ),
    "gaussian": (
        lambda m, s: functional.gaussian_nll(m, torch.zeros_like(m), 2 * s),
        0.5 * math.log(2 * math.pi),
        1.0,
    ),
    "gaussian, a half": (
        lambda m, s: functional.gaussian_nll(m, torch.zeros_like(m), s),
        0.5 * math.log(2 * math.pi),
        0.5,
    ),
}


@floats
@pytest.mark.parametrize("log_scale", [-89.0, -178.0, -400.0, -1e4])
@pytest.mark.parametrize("name", MET)
def test_nll_at_the_location_with_an_underflowing_scale_is_accurate(
    backend: str, name: str, log_scale: float, dtype: torch.dtype
) -> None:
    """The nll keeps falling with the log-scale, and its gradient by the location is 0."""
    function, constant, grad = MET[name]
    nll, *grads = value_and_grads(function, 0.0, log_scale, dtype=dtype)
    assert nll == pytest.approx(constant + grad * log_scale, rel=1e-6)
    assert grads == [0, grad]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nll_of_infinite_logits_equals_the_limits(backend: str, dtype: torch.dtype) -> None:
    """An infinite logit has nll 0 if it is right and an infinite nll if it is wrong, also among other elements.

    The nll of the continuous Bernoulli is -inf if the logit is right.
    """

    def nll(function: Callable[..., Tensor], logit: float, target: float) -> tuple[float, float]:
        logits = torch.tensor([[0.0, logit]] * 20, dtype=dtype).view(1, 40).requires_grad_()
        targets = torch.tensor([[1.0, target]] * 20, dtype=dtype).view(1, 40)
        value = function(logits, targets)
        (grad,) = torch.autograd.grad(value.sum(), logits)
        assert (grad[0, 1::2] == grad[0, 1]).all()
        return (
            value - function(torch.zeros(1, 20, dtype=dtype), torch.ones(1, 20, dtype=dtype))
        ).item(), grad[0, 1].item()

    tiny, none = pytest.approx(0, abs=1e-5), pytest.approx(0, abs=1e-30)
    bernoulli, continuous, poisson = (
        functional.bernoulli_nll,
        functional.continuous_bernoulli_nll,
        functional.poisson_nll,
    )
    assert nll(bernoulli, INF, 1) == (tiny, 0)
    assert nll(bernoulli, -INF, 0) == (tiny, 0)
    assert nll(bernoulli, INF, 0) == (INF, 1)
    assert nll(bernoulli, -INF, 1) == (INF, -1)
    assert nll(bernoulli, INF, 0.25) == (INF, 0.75)
    assert nll(continuous, INF, 1) == (-INF, none)
    assert nll(continuous, INF, 0.5) == (INF, 0.5)
    assert nll(continuous, INF, 0) == (INF, 1)
    assert nll(continuous, -INF, 0) == (-INF, none)
    assert nll(continuous, -INF, 0.5) == (INF, -0.5)
    assert nll(continuous, -INF, 1) == (INF, -1)
    assert nll(poisson, -INF, 0) == (tiny, 0)
    assert nll(poisson, -INF, 3) == (INF, -3)
    assert nll(poisson, INF, 3) == (INF, INF)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_kl_of_a_posterior_without_variance_is_infinite(backend: str, dtype: torch.dtype) -> None:
    mu, logvar = torch.zeros(1, 9, dtype=dtype), torch.zeros(1, 9, dtype=dtype)
    logvar[0, 4] = -INF
    logvar.requires_grad_()
    for kl in (functional.gaussian_kl(mu, logvar), functional.reparameterize_kl(mu, logvar)[1]):
        assert kl.item() == INF
        assert torch.autograd.grad(kl.sum(), logvar)[0][0].tolist() == [0, 0, 0, 0, -0.5, 0, 0, 0, 0]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("count", [0.0, 3.0])
def test_zero_inflated_nll_at_zi_logits_of_minus_infinity_equals_the_plain_one(
    backend: str, count: float, dtype: torch.dtype
) -> None:
    inputs = {name: x.detach() for name, x in make(ZINB_RAW, 3, 9, dtype).items()}
    inputs["target"].fill_(count)
    inputs["zi_logits"].fill_(-INF)
    leaves = {name: x.requires_grad_() for name, x in inputs.items() if name != "target"}
    nll = functional.zero_inflated_negative_binomial_logits_nll(**leaves, target=inputs["target"])
    grads = dict(zip(leaves, torch.autograd.grad(nll.sum(), leaves.values()), strict=True))
    assert not grads.pop("zi_logits").abs().gt(1e-30).any()
    leaves.pop("zi_logits")
    plain = functional.negative_binomial_logits_nll(**leaves, target=inputs["target"])
    torch.testing.assert_close(nll, plain, rtol=1e-6, atol=1e-6)
    for name, expected in zip(leaves, torch.autograd.grad(plain.sum(), leaves.values()), strict=True):
        torch.testing.assert_close(grads[name], expected)


@floats
def test_negative_binomial_nll_at_a_dispersion_of_e_to_the_1000_equals_the_poisson(
    backend: str, dtype: torch.dtype
) -> None:
    logits, target = torch.randn(4, 9).to(dtype), torch.poisson(torch.full((4, 9), 5.0)).to(dtype)
    library = torch.full((4,), 40.0, dtype=dtype)
    log_dispersion = torch.full((9,), 1000.0, dtype=dtype, requires_grad=True)
    nll = functional.negative_binomial_logits_nll(logits, target, log_dispersion, library)
    log_rate = torch.log_softmax(logits, 1) + library.log()[:, None]
    torch.testing.assert_close(nll, functional.poisson_nll(log_rate, target))
    assert not torch.autograd.grad(nll.sum(), log_dispersion)[0].any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_categorical_nll_with_a_nan_at_an_ignored_token_is_unchanged(
    backend: str, dtype: torch.dtype
) -> None:
    logits, target = torch.randn(3, 4, 7).to(dtype), torch.randint(7, (3, 4))
    target[1, 2] = -100
    clean = functional.categorical_nll(logits, target)
    logits[1, 2] = math.nan
    logits.requires_grad_()
    nll = functional.categorical_nll(logits, target)
    assert torch.equal(nll, clean)
    (grad,) = torch.autograd.grad(nll.sum(), logits)
    assert not grad[1, 2].any()
    assert grad.isfinite().all()
