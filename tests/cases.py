"""A table of everything that has a value and a gradient: each op and likelihood, with its formula written by hand.

The formulas are float64, in a numerically stable form, and independent of `fastvae.reference`. Their constants are
created on the device of the inputs, which may be a GPU (test_on_meta.py uses another device than the CPU). A new
likelihood needs one entry in `CASES` (or `ELSEWHERE`); the tests of values, layouts and repeatability then apply to it
too.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastvae._spec import VARIANTS

Inputs = dict[str, Tensor]

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
HALF = (torch.bfloat16, torch.float16)

# Results per row are float32 for all input dtypes, so this applies to half inputs too.
VALUE_TOLERANCE = {torch.float32: 5e-6, torch.bfloat16: 5e-6, torch.float16: 5e-6, torch.float64: 1e-13}
# A gradient has its input's dtype. In half types it is rounded twice, when it is created and when it is weighted.
GRADIENT_TOLERANCE = {torch.float32: 5e-6, torch.float16: 1e-3, torch.bfloat16: 1e-2, torch.float64: 1e-13}

# The block of the CPU kernels is 1024 elements, and their widest vector 16.
SHAPES = (
    (1, 1),
    (3, 1),
    (4, 7),
    (2, 15),
    (5, 17),
    (7, 20),
    (2, 1000),
    (2, 1023),
    (1, 1025),
    (3, 4099),
    (2, 3, 5),
    (2, 3, 8, 8),
    (2, 2, 3, 1, 5),
    (5,),
    (0, 5),
    (0, 3, 4, 4),
    (3, 0),
)


class Case(NamedTuple):
    id: str
    call: Callable[..., Tensor]  # called with fastvae.functional or fastvae.reference, and the inputs
    inputs: Callable[[tuple[int, ...]], Inputs]  # float64, for a shape of the data
    # The summands of one element. Their sum is the result, and the sum of their absolute values is the scale of its
    # rounding.
    terms: Callable[..., list[Tensor]]
    per_element: bool = False
    min_rank: int = 1
    targets: tuple[torch.dtype, ...] = ()  # integer dtypes that `target` may have
    fixed: tuple[str, ...] = ()  # inputs that get no gradient
    counts: bool = False  # integer targets are not scaled, including uint8
    # float16 holds at most 65504, so half inputs are limited to where the gradient is representable.
    extremes: Callable[[], Inputs] | None = None


def softplus(x: Tensor) -> Tensor:
    return torch.logaddexp(torch.zeros_like(x), x)


def bernoulli_terms(logits: Tensor, target: Tensor) -> list[Tensor]:
    return [target * softplus(-logits), (1 - target) * softplus(logits)]


def gaussian_terms(mean: Tensor, target: Tensor, logvar: Tensor) -> list[Tensor]:
    constant = torch.full_like(mean, 0.5 * math.log(2 * math.pi))
    return [constant, 0.5 * logvar.expand_as(mean), 0.5 * (target - mean) ** 2 * torch.exp(-logvar)]


def head_terms(params: Tensor, target: Tensor) -> list[Tensor]:
    channels = target.shape[1]
    return gaussian_terms(params[:, :channels], target, params[:, channels:])


BOUNDS = (-3.0, 1.5)


def bounded_terms(mean: Tensor, target: Tensor, logvar: Tensor) -> list[Tensor]:
    """tanh(y) = 2 sigmoid(2 y) - 1."""
    lo, hi = BOUNDS
    y = (logvar - (lo + hi) / 2) / ((hi - lo) / 2)
    return gaussian_terms(mean, target, lo + (hi - lo) * torch.sigmoid(2 * y))


def laplace_terms(loc: Tensor, target: Tensor, log_scale: Tensor) -> list[Tensor]:
    distance = (target - loc).abs() * torch.exp(-log_scale)
    return [torch.full_like(loc, math.log(2)), log_scale.expand_as(loc), distance]


def continuous_bernoulli_terms(logits: Tensor, target: Tensor) -> list[Tensor]:
    """log((e^a - 1) / a) - a t. Near 0, it is a (1/2 - t) + log(sinh(a/2) / (a/2)), with the series of the sine."""
    near = logits.abs() < 0.5
    small, large = torch.where(near, logits, 0.0), torch.where(near, 1.0, logits)
    sine = torch.zeros_like(logits)
    for n in range(8, 0, -1):
        sine = (1 + sine) * (small / 2) ** 2 / ((2 * n) * (2 * n + 1))
    size = large.abs()
    return [
        torch.where(near, small * (0.5 - target), torch.relu(large) - large * target),
        torch.where(near, torch.log1p(sine), torch.log(-torch.expm1(-size) / size)),
    ]


def poisson_terms(log_rate: Tensor, target: Tensor) -> list[Tensor]:
    return [torch.exp(log_rate), -target * log_rate, torch.lgamma(target + 1)]


def poisson_rate_terms(rate: Tensor, target: Tensor, eps: float = 0.25) -> list[Tensor]:
    m = rate + eps
    return [m, -torch.xlogy(target, m), torch.lgamma(target + 1)]


def gamma_terms(log_scale: Tensor, target: Tensor, shape: float = 2.5) -> list[Tensor]:
    power = torch.zeros_like(target) if shape == 1 else (1 - shape) * torch.log(target)
    constant = torch.full_like(log_scale, math.lgamma(shape))
    return [constant, shape * log_scale, power, target * torch.exp(-log_scale)]


def student_t_terms(loc: Tensor, target: Tensor, log_scale: Tensor, df: float = 2.5) -> list[Tensor]:
    square = (target - loc) ** 2 * torch.exp(-2 * log_scale)
    constant = math.lgamma(df / 2) - math.lgamma((df + 1) / 2) + 0.5 * math.log(df * math.pi)
    return [
        torch.full_like(loc, constant),
        log_scale.expand_as(loc),
        (df + 1) / 2 * torch.log1p(square / df),
    ]


def halves(terms: Callable[..., list[Tensor]]) -> Callable[..., list[Tensor]]:
    """The terms for a packed head."""

    def packed_terms(params: Tensor, target: Tensor) -> list[Tensor]:
        first, second = params.chunk(2, dim=1)
        return terms(first, target, second)

    return packed_terms


def expm1_minus(v: Tensor) -> Tensor:
    """e^v - 1 - v. Where the two sides nearly cancel, it is the sum of v^n / n! from n = 2 on."""
    small = torch.where(v.abs() < 0.5, v, 0.0)
    power, series = small, torch.zeros_like(v)
    for n in range(2, 18):
        power = power * small / n
        series = series + power
    return torch.where(v.abs() < 0.5, series, torch.expm1(v) - v)


def kl_terms(
    mu: Tensor, logvar: Tensor, prior_mu: Tensor | None = None, prior_logvar: Tensor | None = None
) -> list[Tensor]:
    if prior_mu is None or prior_logvar is None:
        prior_mu = prior_logvar = torch.zeros_like(mu)
    v = logvar - prior_logvar
    return [0.5 * (mu - prior_mu) ** 2 * torch.exp(-prior_logvar), 0.5 * expm1_minus(v)]


def _randn(shape: tuple[int, ...], scale: float = 1.0) -> Tensor:
    return scale * torch.randn(shape, dtype=torch.float64)


def _rand(shape: tuple[int, ...]) -> Tensor:
    return torch.rand(shape, dtype=torch.float64)


def _packed(shape: tuple[int, ...]) -> tuple[int, ...]:
    return (shape[0], 2 * shape[1], *shape[2:])


def _columns(*names: str, rows: list[tuple[float, ...]]) -> Inputs:
    """Rows of one element each, as named inputs of shape (len(rows), 1)."""
    table = torch.tensor(rows, dtype=torch.float64)
    return {name: table[:, i : i + 1].clone() for i, name in enumerate(names)}


def _logvar_extremes() -> Inputs:
    rows = [(0.5, 0.25, v) for v in (-80.0, -30.0, 30.0, 80.0)] + [(100.0, -100.0, 0.0), (1.0, 1.0, -80.0)]
    return _columns("mean", "target", "logvar", rows=rows)


def _head_extremes() -> Inputs:
    inputs = _logvar_extremes()
    return {"params": torch.cat((inputs["mean"], inputs["logvar"]), 1), "target": inputs["target"]}


def _bounded_extremes() -> Inputs:
    far = (-1e4, -80.0, -10.0, BOUNDS[0], -0.75, BOUNDS[1], 10.0, 80.0, 1e4)
    rows = [(0.5, t, v) for v in far for t in (0.5, 0.25)]
    # Large grads are multiplied by eager's 1 - tanh^2, so they are tested only where that is accurate.
    rows += [(0.5, -100.0, v) for v in (BOUNDS[0], -0.75, BOUNDS[1])]
    return _columns("mean", "target", "logvar", rows=rows)


def _scale_extremes() -> Inputs:
    rows = [(0.5, 0.25, v) for v in (-80.0, -30.0, 30.0, 80.0)] + [(100.0, -100.0, 0.0), (1.0, 1.0, -80.0)]
    return _columns("loc", "target", "log_scale", rows=rows)


def _counts(shape: tuple[int, ...]) -> Tensor:
    """Mostly 0 and 1, and some counts of a few hundred."""
    return torch.poisson(torch.exp(_randn(shape, 2))).clamp(max=255)


def _scaled(shape: tuple[int, ...]) -> Inputs:
    return {"loc": _randn(shape), "target": _randn(shape), "log_scale": _randn(shape, 0.5)}


def _positive(shape: tuple[int, ...]) -> Inputs:
    return {"log_scale": _randn(shape), "target": torch.exp(_randn(shape))}


def _learned(shape: tuple[int, ...]) -> Inputs:
    return {"loc": _randn(shape), "target": _randn(shape), "log_scale": torch.tensor(0.375).double()}


_KL_EXTREMES = [(m, v) for m in (0.0, -1.5, 100.0) for v in (-80.0, 0.0, 80.0)]
_PRIOR_EXTREMES = [(0.5, v, 0.25, v) for v in (-80.0, 80.0)] + [
    (0.5, 0.0, 0.0, -80.0),
    (0.5, 0.0, 100.0, 80.0),
]

CASES = (
    Case(
        "bernoulli",
        lambda f, logits, target: f.bernoulli_nll(logits, target),
        lambda shape: {"logits": _randn(shape, 3), "target": _rand(shape)},
        bernoulli_terms,
        targets=(torch.uint8, torch.bool),
        fixed=("target",),
        extremes=lambda: _columns(
            "logits",
            "target",
            rows=[(a, t) for a in (-1e4, -104.0, 0.0, 89.0, 1e4) for t in (0.0, 0.25, 1.0)],
        ),
    ),
    Case(
        "gaussian",
        lambda f, mean, target: f.gaussian_nll(mean, target, scale=0.7),
        lambda shape: {"mean": _randn(shape), "target": _randn(shape)},
        lambda mean, target: gaussian_terms(mean, target, torch.full_like(mean, 2 * math.log(0.7))),
        targets=(torch.uint8,),
        extremes=lambda: _columns("mean", "target", rows=[(-1e4, 1e4), (1e4, 1.0), (1e-4, 0.0)]),
    ),
    Case(
        "gaussian_learned",
        lambda f, mean, target, logvar: f.gaussian_nll(mean, target, logvar),
        lambda shape: {
            "mean": _randn(shape),
            "target": _randn(shape),
            "logvar": torch.tensor(0.375).double(),
        },
        gaussian_terms,
        targets=(torch.uint8,),
    ),
    Case(
        "gaussian_per_element",
        lambda f, mean, target, logvar: f.gaussian_nll(mean, target, logvar),
        lambda shape: {"mean": _randn(shape), "target": _randn(shape), "logvar": _randn(shape)},
        gaussian_terms,
        targets=(torch.uint8,),
        extremes=_logvar_extremes,
    ),
    Case(
        "gaussian_head",
        lambda f, params, target: f.gaussian_head_nll(params, target),
        lambda shape: {"params": _randn(_packed(shape)), "target": _randn(shape)},
        head_terms,
        min_rank=2,
        targets=(torch.uint8,),
        extremes=_head_extremes,
    ),
    Case(
        "gaussian_bounded_learned",
        lambda f, **inputs: f.gaussian_nll(**inputs, logvar_bounds=BOUNDS),
        lambda shape: {
            "mean": _randn(shape),
            "target": _randn(shape),
            "logvar": torch.tensor(0.375).double(),
        },
        bounded_terms,
        targets=(torch.uint8,),
    ),
    Case(
        "gaussian_bounded_per_element",
        lambda f, **inputs: f.gaussian_nll(**inputs, logvar_bounds=BOUNDS),
        lambda shape: {"mean": _randn(shape), "target": _randn(shape), "logvar": _randn(shape, 3)},
        bounded_terms,
        targets=(torch.uint8,),
        extremes=_bounded_extremes,
    ),
    Case(
        "gaussian_bounded_head",
        lambda f, **inputs: f.gaussian_head_nll(**inputs, logvar_bounds=BOUNDS),
        lambda shape: {"params": _randn(_packed(shape), 2), "target": _randn(shape)},
        halves(bounded_terms),
        min_rank=2,
        targets=(torch.uint8,),
    ),
    Case(
        "laplace",
        lambda f, loc, target: f.laplace_nll(loc, target, scale=0.7),
        lambda shape: {"loc": _randn(shape), "target": _randn(shape)},
        lambda loc, target: laplace_terms(loc, target, torch.full_like(loc, math.log(0.7))),
        targets=(torch.uint8,),
        extremes=lambda: _columns("loc", "target", rows=[(-1e4, 1e4), (1e4, 1.0), (1e-4, 0.0), (0.5, 0.5)]),
    ),
    Case(
        "laplace_learned",
        lambda f, **inputs: f.laplace_nll(**inputs),
        _learned,
        laplace_terms,
        targets=(torch.uint8,),
    ),
    Case(
        "laplace_per_element",
        lambda f, **inputs: f.laplace_nll(**inputs),
        _scaled,
        laplace_terms,
        targets=(torch.uint8,),
        extremes=_scale_extremes,
    ),
    Case(
        "laplace_head",
        lambda f, **inputs: f.laplace_head_nll(**inputs),
        lambda shape: {"params": _randn(_packed(shape)), "target": _randn(shape)},
        halves(laplace_terms),
        min_rank=2,
        targets=(torch.uint8,),
    ),
    Case(
        "continuous_bernoulli",
        lambda f, **inputs: f.continuous_bernoulli_nll(**inputs),
        lambda shape: {"logits": _randn(shape, 3), "target": _rand(shape)},
        continuous_bernoulli_terms,
        targets=(torch.uint8,),
        fixed=("target",),
        extremes=lambda: _columns(
            "logits",
            "target",
            rows=[(a, t) for a in (-1e4, -104.0, -1e-3, 0.0, 0.5, 2.0, 89.0, 1e4) for t in (0.0, 0.25, 1.0)],
        ),
    ),
    Case(
        "poisson",
        lambda f, **inputs: f.poisson_nll(**inputs),
        lambda shape: {"log_rate": _randn(shape), "target": _counts(shape)},
        poisson_terms,
        targets=(torch.uint8, torch.uint16, torch.int32, torch.int64),
        fixed=("target",),
        counts=True,
        extremes=lambda: _columns(
            "log_rate",
            "target",
            rows=[(a, t) for a in (-80.0, 0.0, 3.0, 80.0) for t in (0.0, 1.0, 2.0, 16.0, 300.0, 6e4)],
        ),
    ),
    Case(
        "poisson_rate",
        lambda f, **inputs: f.poisson_rate_nll(**inputs, eps=0.25),
        lambda shape: {"rate": torch.exp(_randn(shape)), "target": _counts(shape)},
        poisson_rate_terms,
        targets=(torch.uint8, torch.uint16, torch.int32, torch.int64),
        fixed=("target",),
        counts=True,
        extremes=lambda: _columns(
            "rate",
            "target",
            rows=[(0.0, t) for t in (0.0, 1.0, 2.0, 300.0)]
            + [(m, t) for m in (1.0, 20.0, 6e4) for t in (0.0, 1.0, 2.0, 16.0, 300.0, 6e4)],
        ),
    ),
    Case(
        "poisson_rate_per_element",
        lambda f, **inputs: f.poisson_rate_nll(**inputs, reduction="none"),
        lambda shape: {"rate": torch.exp(_randn(shape)), "target": _counts(shape)},
        lambda rate, target: poisson_rate_terms(rate, target, 0.0),
        per_element=True,
        targets=(torch.uint8, torch.int64),
        fixed=("target",),
        counts=True,
    ),
    Case(
        "gamma",
        lambda f, **inputs: f.gamma_nll(**inputs, shape=2.5),
        _positive,
        gamma_terms,
        fixed=("target",),
        extremes=lambda: _columns(
            "log_scale",
            "target",
            rows=[(s, x) for s in (-80.0, -30.0, 0.0, 30.0, 80.0) for x in (0.0009765625, 0.25, 100.0)],
        ),
    ),
    Case(
        "exponential",
        lambda f, **inputs: f.gamma_nll(**inputs, shape=1),
        _positive,
        lambda log_scale, target: gamma_terms(log_scale, target, 1),
        fixed=("target",),
        extremes=lambda: _columns(
            "log_scale",
            "target",
            rows=[(s, x) for s in (-80.0, -30.0, 0.0, 30.0, 80.0) for x in (0.0, 0.25, 100.0)],
        ),
    ),
    Case(
        "student_t",
        lambda f, loc, target: f.student_t_nll(loc, target, df=2.5, scale=0.7),
        lambda shape: {"loc": _randn(shape), "target": _randn(shape)},
        lambda loc, target: student_t_terms(loc, target, torch.full_like(loc, math.log(0.7))),
        targets=(torch.uint8,),
        extremes=lambda: _columns("loc", "target", rows=[(-1e4, 1e4), (1e4, 1.0), (1e-4, 0.0), (0.5, 0.5)]),
    ),
    Case(
        "student_t_learned",
        lambda f, **inputs: f.student_t_nll(**inputs, df=2.5),
        _learned,
        student_t_terms,
        targets=(torch.uint8,),
    ),
    Case(
        "student_t_per_element",
        lambda f, **inputs: f.student_t_nll(**inputs, df=2.5),
        _scaled,
        student_t_terms,
        targets=(torch.uint8,),
        extremes=_scale_extremes,
    ),
    Case(
        "student_t_head",
        lambda f, **inputs: f.student_t_head_nll(**inputs, df=2.5),
        lambda shape: {"params": _randn(_packed(shape)), "target": _randn(shape)},
        halves(student_t_terms),
        min_rank=2,
        targets=(torch.uint8,),
    ),
    Case(
        "kl",
        lambda f, mu, logvar: f.gaussian_kl(mu, logvar),
        lambda shape: {"mu": _randn(shape), "logvar": _randn(shape)},
        kl_terms,
        extremes=lambda: _columns("mu", "logvar", rows=_KL_EXTREMES),
    ),
    Case(
        "kl_prior",
        lambda f, mu, logvar, prior_mu, prior_logvar: f.gaussian_kl(mu, logvar, prior_mu, prior_logvar),
        lambda shape: {name: _randn(shape) for name in ("mu", "logvar", "prior_mu", "prior_logvar")},
        kl_terms,
        extremes=lambda: _columns("mu", "logvar", "prior_mu", "prior_logvar", rows=_PRIOR_EXTREMES),
    ),
    Case(
        "kl_per_element",
        lambda f, mu, logvar: f.gaussian_kl(mu, logvar, reduction="none"),
        lambda shape: {"mu": _randn(shape), "logvar": _randn(shape)},
        kl_terms,
        per_element=True,
    ),
    Case(
        "kl_prior_per_element",
        lambda f, **inputs: f.gaussian_kl(**inputs, reduction="none"),
        lambda shape: {name: _randn(shape) for name in ("mu", "logvar", "prior_mu", "prior_logvar")},
        kl_terms,
        per_element=True,
    ),
    # A different kernel computes the KL that comes with z than the KL alone.
    Case(
        "kl_with_z",
        lambda f, mu, logvar: f.reparameterize_kl(mu, logvar, eps=torch.zeros_like(mu))[1],
        lambda shape: {"mu": _randn(shape), "logvar": _randn(shape)},
        kl_terms,
        extremes=lambda: _columns("mu", "logvar", rows=_KL_EXTREMES),
    ),
    Case(
        "kl_prior_with_z",
        lambda f, **inputs: f.reparameterize_kl(**inputs, eps=torch.zeros_like(inputs["mu"]))[1],
        lambda shape: {name: _randn(shape) for name in ("mu", "logvar", "prior_mu", "prior_logvar")},
        kl_terms,
        extremes=lambda: _columns("mu", "logvar", "prior_mu", "prior_logvar", rows=_PRIOR_EXTREMES),
    ),
)

WITH_TARGET = tuple(case for case in CASES if "target" in case.inputs((1, 1)))

# Variants whose elements are not independent, and the files that test them.
ELSEWHERE = {
    variant.name: f"test_{variant.family}.py" for variant in VARIANTS.values() if not variant.element
} | {"multinomial": "test_multinomial.py", "negative_binomial_mixture": "test_nb_mixture.py"}

by_id = {case.id: case for case in CASES}


def ids(value: Any) -> str:
    """The names of parameters in pytest's output."""
    if isinstance(value, Case):
        return value.id
    if isinstance(value, torch.dtype):
        return str(value).removeprefix("torch.")
    return "x".join(map(str, value)) if isinstance(value, tuple) else str(value)


def cast(
    inputs: Inputs, dtype: torch.dtype, target: torch.dtype | None = None, *, counts: bool = False
) -> Inputs:
    """The inputs in the dtypes under test. A float target is rounded for an integer dtype."""
    result = {}
    for name, value in inputs.items():
        if name != "target" or target is None:
            result[name] = value.to(dtype)
        elif target.is_floating_point or counts:
            result[name] = value.to(target)
        elif target == torch.bool:
            result[name] = value > 0.5
        else:
            result[name] = (value.abs() * 255).round().clamp(max=255).to(target)
    return result


def to_exact(inputs: Inputs, counts: bool) -> Inputs:
    """The float64 values that the inputs represent."""
    return {
        name: value.detach().double() / (255 if value.dtype == torch.uint8 and not counts else 1)
        for name, value in inputs.items()
    }


class Result(NamedTuple):
    value: Tensor
    scale: Tensor  # scale of the value's rounding: the sum of the absolute values of its summands
    gradients: Inputs


def differentiable(case: Case, inputs: Inputs) -> list[str]:
    return [name for name, x in inputs.items() if name not in case.fixed and x.is_floating_point()]


def cotangent(value: Tensor) -> Tensor:
    """Weights between 1/2 and 3/2 for the rows of a result, the same for every implementation."""
    steps = torch.arange(value.numel(), dtype=torch.float64, device=value.device).reshape(value.shape)
    return 0.5 + (steps * 0.618) % 1


def exact(case: Case, inputs: Inputs) -> Result:
    """Value and gradients of the formula, in float64."""
    leaves = {name: x.requires_grad_() for name, x in to_exact(inputs, case.counts).items()}
    terms = case.terms(**leaves)
    value, scale = sum(terms), sum(term.abs() for term in terms)
    if not case.per_element:
        value, scale = (x.flatten(1).sum(1) if x.dim() > 1 else x for x in (value, scale))
    names = differentiable(case, inputs)
    gradients = torch.autograd.grad((value * cotangent(value)).sum(), [leaves[name] for name in names])
    return Result(value.detach(), scale.detach(), dict(zip(names, gradients, strict=True)))


def run(case: Case, module: Any, inputs: Inputs) -> Result:
    """Value and gradients of `fastvae.functional` or `fastvae.reference`."""
    names = differentiable(case, inputs)
    leaves = {name: x.detach().requires_grad_(name in names) for name, x in inputs.items()}
    value = case.call(module, **leaves)
    weights = cotangent(value).to(value.dtype)
    gradients = torch.autograd.grad(value, [leaves[name] for name in names], weights)
    return Result(value.detach(), torch.empty(0), dict(zip(names, gradients, strict=True)))
