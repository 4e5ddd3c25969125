"""Counts by their mean: the value of each element, `eps`, fractional counts, and the Poisson by its rate.

test_counts.py tests the values of rows; this file tests those of elements, and what is specific to them.
"""

import math
from collections.abc import Callable
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import mpmath
import pytest
import torch
from test_counts import NB, ZINB, close, gradients, in_float64
from torch import Tensor

import fastvae
from fastvae import functional
from fastvae.backends import choose

mpmath.mp.dps = 50

POISSON = "poisson_rate"
FORMS = (POISSON, NB, ZINB)
NAMES = {
    POISSON: ("rate",),
    NB: ("mean", "inverse_dispersion"),
    ZINB: ("mean", "inverse_dispersion", "zi_logits"),
}
FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
Inputs = dict[str, Tensor]


def call(
    form: str, module: Any = functional, reduction: str = "none", eps: float = 1e-8, **inputs: Tensor
) -> Tensor:
    values: Tensor = getattr(module, f"{form}_nll")(**inputs, eps=eps, reduction=reduction)
    return values


def make(
    form: str, rows: int = 5, genes: int = 37, dtype: torch.dtype = torch.float32, shared: bool = True
) -> Inputs:
    """The inputs of a variant. Most counts are 0, and some are fractions."""
    shape = (rows, genes)
    counts = torch.poisson(torch.exp(1.5 * torch.randn(shape))) * (torch.rand(shape) > 0.7)
    counts += 0.25 * (torch.rand(shape) > 0.9)
    mean = torch.exp(torch.randn(shape))
    mean[torch.rand(shape) > 0.9] = 0.02
    values = {
        "rate": mean,
        "mean": mean,
        "inverse_dispersion": torch.exp(2 * torch.randn((genes,) if shared else shape)),
        "zi_logits": 2 * torch.randn(shape),
    }
    return {name: values[name].to(dtype).requires_grad_() for name in NAMES[form]} | {
        "target": counts.to(dtype)
    }


def by_reference(form: str, inputs: Inputs, weights: Tensor | None = None) -> tuple[Tensor, Inputs]:
    wide = in_float64(inputs)
    value = call(form, fastvae.reference, **wide)
    return value.detach(), gradients(value, wide, weights)


# ---------------------------------------------------------------------------------------------------------------------
# Numbers
# ---------------------------------------------------------------------------------------------------------------------

THETAS = (1e-4, 0.7, 7.9, 8.1, 1e3, 1e8)
MEANS = (0.0, 1e-10, 1e-3, 0.5, 30.0, 1e5 - 300, 1e6)
COUNTS = (0.0, 0.3, 1.0, 2.5, 7.0, 8.5, 200.0, 1e5 + 0.5, 1e6)
EPS = 1e-8


@cache
def exact(form: str, t: float, mean: float, theta: float, pi: float, eps: float) -> tuple[Any, list[Any]]:
    """Value and derivatives of an element by the formula, in 50 digits minus those lost by cancellation."""
    with mpmath.workdps(80):
        m = mpmath.mpf(mean) + mpmath.mpf(eps)
        t, theta, pi = map(mpmath.mpf, (t, theta, pi))
        if form == POISSON:
            return m - t * mpmath.log(m) + mpmath.loggamma(t + 1), [1 - t / m]
        value = mpmath.loggamma(theta) + mpmath.loggamma(t + 1) - mpmath.loggamma(t + theta)
        value += theta * mpmath.log1p(m / theta) + t * mpmath.log((theta + m) / m)
        d_mean = (theta + t) / (theta + m) - t / m
        d_theta = (
            mpmath.digamma(theta)
            - mpmath.digamma(t + theta)
            + mpmath.log1p(m / theta)
            + (t - m) / (theta + m)
        )
        if form == NB:
            return value, [d_mean, d_theta]
        p = 1 / (1 + mpmath.exp(-pi))
        if t > 0:
            return value - mpmath.log(1 - p), [d_mean, d_theta, p]
        kept = (1 - p) * mpmath.exp(-value)
        share = kept / (p + kept)
        d_pi = (1 - p) * (kept / (1 - p) - 1) * p / (p + kept)
        return -mpmath.log(p + kept), [d_mean * share, d_theta * share, d_pi]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shared", [True, False], ids=["gene", "gene-cell"])
@pytest.mark.parametrize("reduction", ["none", "event"])
def test_formula_has_50_digits(form: str, shared: bool, reduction: str, backend: str) -> None:
    """In float32, over the range of single-cell models, compared with the formula at mean + eps."""
    points = list(product(COUNTS, MEANS, THETAS if form != POISSON else (1.0,)))
    t, mean, theta = torch.tensor(points).T.contiguous().unsqueeze(1)
    pi = torch.linspace(-30, 8, len(points)).unsqueeze(0)[:, torch.randperm(len(points))]
    columns = {
        "rate": mean,
        "mean": mean,
        "inverse_dispersion": theta[0] if shared else theta,
        "zi_logits": pi,
    }
    inputs = {name: columns[name].clone() for name in NAMES[form]} | {"target": t}
    if reduction == "event":  # one row per point
        inputs = {name: x.reshape(-1, 1) for name, x in inputs.items()}
    inputs = {name: x.requires_grad_(name != "target") for name, x in inputs.items()}
    value = call(form, reduction=reduction, eps=EPS, **inputs)
    found = gradients(value, inputs)
    want = [exact(form, *(x[0, i].item() for x in (t, mean, theta, pi)), EPS) for i in range(len(points))]
    values = torch.tensor([float(x) for x, _ in want], dtype=torch.float64)
    relative, absolute = (1e-5, 1e-7) if reduction == "none" else (1e-6, 1e-7)
    torch.testing.assert_close(value.double().flatten(), values, rtol=relative, atol=absolute)
    for place, name in enumerate(NAMES[form]):
        slopes = torch.tensor([float(slopes[place]) for _, slopes in want], dtype=torch.float64)
        error = found[name].double().flatten() - slopes
        assert error.norm() <= 1e-5 * slopes.norm(), name
        # The elements are checked one by one. Near its zero, a slope keeps the absolute accuracy of its terms.
        terms = {"inverse_dispersion": values.abs() / theta[0] + 1e-5}.get(name, 1 + t[0] / (mean[0] + EPS))
        assert (error.abs() <= 1e-5 * slopes.abs() + 1e-6 * terms).all(), name


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shared", [True, False], ids=["gene", "gene-cell"])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("shape", [(5, 37), (1, 1), (2, 1025), (9, 16), (40, 5), (0, 4), (4, 0)], ids=str)
def test_values_and_gradients_equal_the_formula(
    form: str, shared: bool, dtype: torch.dtype, shape: tuple[int, int], backend: str
) -> None:
    inputs = make(form, *shape, dtype=dtype, shared=shared)
    value = call(form, **inputs)
    assert value.shape == shape
    assert value.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    weights = 0.5 + torch.rand(shape)
    found = gradients(value, inputs, weights)
    if 0 in shape:
        for name, gradient in found.items():
            assert torch.equal(gradient, torch.zeros_like(inputs[name]))
        return
    expected, slopes = by_reference(form, inputs, weights)
    close(value, expected, 1e-12 if dtype == torch.float64 else 2e-6)
    for name, gradient in found.items():
        assert gradient.dtype == dtype
        assert gradient.shape == inputs[name].shape
        close(gradient, slopes[name], {torch.float64: 1e-11, torch.float32: 4e-6}.get(dtype, 5e-3))


@pytest.mark.parametrize("form", FORMS)
def test_elements_sum_to_rows(form: str, backend: str) -> None:
    inputs = make(form, 6, 1300)
    elements, rows = call(form, **inputs), call(form, reduction="event", **inputs)
    close(elements.sum(1), rows, 1e-6)
    for (name, a), b in zip(
        gradients(elements.sum(1), inputs).items(), gradients(rows, inputs).values(), strict=True
    ):
        close(a, b, 1e-6)
        assert a.shape == inputs[name].shape


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("reduction", ["none", "event"])
def test_eps_is_added_to_the_mean(form: str, reduction: str, backend: str) -> None:
    """The same for any mean, including 0 with a positive count."""
    inputs = make(form, dtype=torch.float64)
    name = NAMES[form][0]
    moved = inputs | {name: (inputs[name].detach() + 0.75).requires_grad_()}
    given, without = (
        call(form, reduction=reduction, eps=0.75, **inputs),
        call(form, reduction=reduction, eps=0.0, **moved),
    )
    torch.testing.assert_close(given, without, rtol=1e-14, atol=0)
    torch.testing.assert_close(
        list(gradients(given, inputs).values()), list(gradients(without, moved).values()), rtol=1e-13, atol=0
    )
    zeros = {x: torch.zeros_like(y) if x == name else y.detach() for x, y in inputs.items()}
    zeros[name].requires_grad_()
    value = call(form, reduction=reduction, **zeros)
    assert value.isfinite().all()
    assert gradients(value, zeros)[name].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("reduction", ["none", "event"])
def test_rate_at_its_ends_gives_the_limit(dtype: torch.dtype, reduction: str, backend: str) -> None:
    inf, nan = math.inf, math.nan
    smallest = torch.finfo(dtype).tiny / 1024
    points = [
        (0.0, 0.0, 0.0, 1.0), (0.0, 1.0, inf, -inf), (0.0, 2.5, inf, -inf), (inf, 0.0, inf, 1.0), (inf, 3.0, inf, 1.0),
        (3.0, 0.0, 3.0, 1.0), (-1.0, 2.0, nan, 3.0), (-1.0, 20.0, nan, 21.0), (nan, 0.0, nan, None),
        (1.0, nan, nan, nan),
        (smallest, 0.0, smallest, 1.0), (smallest, 1.0, -math.log(smallest), -inf),
        (smallest, 30.0, -30 * math.log(smallest) + math.lgamma(31), None),
    ]  # fmt: skip
    rate = torch.tensor([[point[0]] for point in points], dtype=dtype, requires_grad=True)
    target = torch.tensor([[point[1]] for point in points], dtype=dtype)
    value = call(POISSON, reduction=reduction, eps=0.0, rate=rate, target=target)
    (slope,) = torch.autograd.grad(value, rate, torch.ones_like(value))
    for point, got, got_slope in zip(points, value.flatten().tolist(), slope.flatten().tolist(), strict=True):
        for found, requested in ((got, point[2]), (got_slope, point[3])):
            if requested is not None:
                assert found == pytest.approx(requested, rel=1e-6, abs=0, nan_ok=True), point


@pytest.mark.parametrize("form", [NB, ZINB])
def test_nll_equals_scvi_tools_with_its_eps(form: str, backend: str) -> None:
    """Its formula has eps in the logarithms. In float64, the value at mean + 1e-8 differs from it by only 1e-7."""
    inputs = {name: x.detach() for name, x in make(form, 30, 200, torch.float64).items()}
    inputs["mean"][:, ::7] = 0
    mu, theta, x = inputs["mean"], inputs["inverse_dispersion"], inputs["target"]
    eps = 1e-8
    log_theta_mu = torch.log(theta + mu + eps)
    rest = torch.lgamma(x + theta) - torch.lgamma(theta) - torch.lgamma(x + 1)
    log_p = theta * (torch.log(theta + eps) - log_theta_mu) + x * (torch.log(mu + eps) - log_theta_mu) + rest
    if form == ZINB:
        pi = inputs["zi_logits"]
        softplus_pi = torch.nn.functional.softplus(-pi)
        from_zero = -pi + theta * (torch.log(theta + eps) - log_theta_mu)
        zero = torch.nn.functional.softplus(from_zero) - softplus_pi
        log_p = torch.where(
            x < eps, zero, -softplus_pi + from_zero - theta * (torch.log(theta + eps) - log_theta_mu) + log_p
        )
    torch.testing.assert_close(-call(form, **inputs), log_p, rtol=1e-6, atol=1e-6)


# ---------------------------------------------------------------------------------------------------------------------
# Inputs
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16, torch.int32, torch.int64], ids=str)
def test_integer_targets_are_not_scaled(form: str, dtype: torch.dtype, backend: str) -> None:
    inputs = make(form)
    inputs["target"] = inputs["target"].floor().clamp(max=255)
    expected = call(form, **inputs)
    assert torch.equal(
        call(form, **inputs | {"target": inputs["target"].to(torch.int64).to(dtype)}), expected
    )


@pytest.mark.parametrize("form", FORMS)
def test_strided_inputs_equal_contiguous(form: str, backend: str) -> None:
    inputs = make(form, 4, 9, shared=False)
    lead = NAMES[form][0]
    weights = 0.5 + torch.rand(4, 9)
    expected = call(form, **inputs)
    slopes = gradients(expected, inputs, weights)
    half = torch.cat((inputs[lead], inputs[lead]), 1).detach().chunk(2, 1)[1].requires_grad_()
    transposed = inputs["target"].t().contiguous().t()
    strided = inputs | {lead: half, "target": transposed}
    value = call(form, **strided)
    assert torch.equal(value, expected)
    for name, gradient in gradients(value, strided, weights).items():
        assert torch.equal(gradient, slopes[name])


@pytest.mark.parametrize("form", [NB, ZINB])
def test_expanded_dispersion_gets_a_summed_gradient(form: str, backend: str) -> None:
    """(B, G) with stride 0 is treated as (B, G). Autograd's own sum computes its gradient for (G,)."""
    inputs = make(form, 12, 40)
    expanded = inputs | {"inverse_dispersion": inputs["inverse_dispersion"].expand(12, 40)}
    value, expected = call(form, **expanded), call(form, **inputs)
    close(value, expected, 1e-7)
    weights = 0.5 + torch.rand(12, 40)
    found, slopes = gradients(value, inputs, weights), gradients(expected, inputs, weights)
    for name, gradient in found.items():
        close(gradient, slopes[name], 2e-6)


@pytest.mark.parametrize("shape", [(6,), (3, 2, 4, 5), (2, 3, 1, 2, 2)], ids=str)
def test_poisson_accepts_any_shape(shape: tuple[int, ...], backend: str) -> None:
    rate = torch.rand(shape).requires_grad_()
    target = torch.poisson(3 * torch.rand(shape))
    value = call(POISSON, rate=rate, target=target)
    assert value.shape == shape
    (slope,) = torch.autograd.grad(value.sum(), rate)
    torch.testing.assert_close(slope, 1 - target / (rate.detach() + 1e-8), rtol=1e-5, atol=1e-6)
    if len(shape) == 4:
        order = torch.channels_last
        other = rate.detach().to(memory_format=order).requires_grad_()
        again = call(POISSON, rate=other, target=target.to(memory_format=order))
        assert torch.equal(again, value)
        assert torch.equal(
            torch.autograd.grad(again, other, value.detach())[0], slope_of(rate, target, value)
        )


def slope_of(rate: Tensor, target: Tensor, weights: Tensor) -> Tensor:
    return torch.autograd.grad(call(POISSON, rate=rate, target=target), rate, weights.detach())[0]


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16], ids=str)
def test_float32_dispersion_with_half_outputs_is_accepted(half: torch.dtype, backend: str) -> None:
    inputs = make(ZINB, dtype=half)
    inputs["inverse_dispersion"] = inputs["inverse_dispersion"].detach().float().requires_grad_()
    weights = torch.rand(5, 37)
    value = call(ZINB, **inputs)
    expected, slopes = by_reference(ZINB, inputs, weights)
    close(value, expected, 2e-6)
    found = gradients(value, inputs, weights)["inverse_dispersion"]
    assert found.dtype == torch.float32
    close(found, slopes["inverse_dispersion"], 4e-6)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("where", ["lead", "inverse_dispersion", "zi_logits", "target"])
@pytest.mark.parametrize("count", [0.0, 3.0])
def test_nan_affects_only_its_element(form: str, where: str, count: float, backend: str) -> None:
    name = NAMES[form][0] if where == "lead" else where
    inputs = make(form, 6, 40, shared=False)
    if name not in inputs:
        pytest.skip("not of this likelihood")
    with torch.no_grad():
        inputs["target"][2, 11] = count
        inputs[name][2, 11] = math.nan
    value = call(form, **inputs)
    at = torch.zeros(6, 40, dtype=torch.bool)
    at[2, 11] = True
    assert torch.equal(value.isnan(), at)
    for gradient in gradients(value, inputs).values():
        assert not gradient[~at].isnan().any()


ONES = torch.ones(2, 3)


@pytest.mark.parametrize("reduction", ["none", "event"])
def test_validate_with_eps_accepts_a_mean_of_0(reduction: str, backend: str) -> None:
    zeros = torch.zeros(2, 3)
    functional.negative_binomial_nll(zeros, ONES, ONES, eps=1e-8, reduction=reduction, validate=True)
    functional.poisson_rate_nll(zeros, ONES, reduction=reduction, validate=True)
    with pytest.raises(ValueError, match=r"`mean` must hold positive, finite numbers, got 0\.0"):
        functional.negative_binomial_nll(zeros, ONES, ONES, reduction=reduction, validate=True)


# ---------------------------------------------------------------------------------------------------------------------
# Autograd
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shared", [True, False], ids=["gene", "gene-cell"])
@pytest.mark.parametrize("grad", ["of each row", "of all", "of each gene", "transposed", "one"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kept", [False, True], ids=["freed", "kept"])
def test_grad_output_of_any_layout_is_accepted(
    form: str, shared: bool, grad: str, dtype: torch.dtype, kept: bool, backend: str
) -> None:
    """`values.sum(1)` and `values.mean()` give expanded gradients."""
    inputs = make(form, 20, 33, dtype, shared)
    weights = {
        "of each row": (0.5 + torch.rand(20, 1)).expand(20, 33),
        "of all": torch.tensor(-0.75).expand(20, 33),
        "of each gene": (0.5 + torch.rand(33)).expand(20, 33),
        "transposed": (0.5 + torch.rand(33, 20)).t(),
        "one": torch.ones(()).expand(20, 33),
    }[grad]
    leaves = [inputs[name] for name in NAMES[form]]
    dense = torch.autograd.grad(call(form, **inputs), leaves, weights.contiguous())
    found = torch.autograd.grad(call(form, **inputs), leaves, weights, retain_graph=kept)
    for a, b in zip(found, dense, strict=True):
        assert a.dtype == dtype
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shared", [True, False], ids=["gene", "gene-cell"])
def test_kept_graph_gives_the_same_gradient_twice(form: str, shared: bool, backend: str) -> None:
    inputs = make(form, shared=shared)
    before = [(x.detach().clone(), x._version) for x in inputs.values()]
    leaves = [inputs[name] for name in NAMES[form]]
    values = call(form, **inputs)
    weights = torch.rand_like(values)
    first = torch.autograd.grad(values, leaves, weights, retain_graph=True)
    copies = [g.clone() for g in first]
    second = torch.autograd.grad(values, leaves, weights)
    for a, b, c in zip(first, second, copies, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, c)
    for x, (y, version) in zip(inputs.values(), before, strict=True):
        assert torch.equal(x, y)
        assert x._version == version


@pytest.mark.parametrize("requested", NAMES[ZINB])
@pytest.mark.parametrize("shared", [True, False], ids=["gene", "gene-cell"])
def test_single_input_gradient_equals_the_formula(requested: str, shared: bool, backend: str) -> None:
    inputs = {name: x.detach() for name, x in make(ZINB, 12, shared=shared).items()}
    inputs[requested].requires_grad_()
    weights = 0.5 + torch.rand(12, 37)
    _, expected = by_reference(ZINB, inputs, weights)
    close(gradients(call(ZINB, **inputs), inputs, weights)[requested], expected[requested], 4e-6)


@pytest.mark.parametrize("form", FORMS)
def test_gradcheck(form: str, backend: str) -> None:
    inputs = make(form, 2, 5, torch.float64)
    inputs["target"][0, :3] = torch.tensor([9.0, 30.5, 0.0])
    leaves = [inputs[name] for name in NAMES[form]]

    def values(*xs: Tensor) -> Tensor:
        return call(form, eps=0.25, target=inputs["target"], **dict(zip(NAMES[form], xs, strict=True)))

    assert torch.autograd.gradcheck(values, leaves)
    if backend == "reference":
        assert torch.autograd.gradgradcheck(values, leaves)


def test_weight_of_minus_1_gives_log_probabilities(backend: str) -> None:
    """The weight of -1 is an argument of the op."""
    inputs = make(ZINB)
    params = [inputs[name] for name in NAMES[ZINB]]
    log_p = functional.loss.nll_elements(ZINB, params, inputs["target"], (1e-8,), -1.0)
    values = call(ZINB, **inputs)
    assert torch.equal(log_p, -values)
    for a, b in zip(
        torch.autograd.grad(log_p.sum(), params), torch.autograd.grad(values.sum(), params), strict=True
    ):
        assert torch.equal(a, -b)


def test_only_requested_derivatives_are_saved(native: None) -> None:
    """One tensor for each parameter that requires a gradient, and none otherwise."""
    kept: list[int] = []

    def keep(x: Tensor) -> Tensor:
        kept.append(x.numel())
        return x

    inputs = make(ZINB, 4, 50)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        call(ZINB, **inputs)
        assert kept == [200, 200, 200]
        kept.clear()
        call(ZINB, **inputs | {"mean": inputs["mean"].detach()})
        assert kept == [200, 200]
        kept.clear()
        with torch.no_grad():
            assert call(ZINB, **inputs).grad_fn is None
    assert kept == []


def test_second_derivative_raises(backend: str) -> None:
    inputs = make(ZINB)
    values = call(ZINB, **inputs)
    (first,) = torch.autograd.grad(values.sum(), inputs["mean"], create_graph=True)
    if backend == "reference":
        first.sum().backward()
        return
    with pytest.raises(RuntimeError, match="use_backend"):
        torch.autograd.grad(first.sum(), inputs["mean"])


def test_forward_mode_ad_raises(native: None) -> None:
    inputs = {name: x.detach() for name, x in make(NB).items()}
    with torch.autograd.forward_ad.dual_level():
        mean = torch.autograd.forward_ad.make_dual(inputs["mean"], torch.ones(5, 37))
        with pytest.raises(RuntimeError, match="use_backend"):
            call(NB, **inputs | {"mean": mean})
        with pytest.raises(RuntimeError, match="use_backend"):
            torch.ops.fastvae.nll_elements(
                NB, [mean, inputs["inverse_dispersion"]], inputs["target"], [0.0], 1.0
            )


@pytest.mark.parametrize("form", FORMS)
def test_compiled_call_is_one_graph(form: str, native: None) -> None:
    from torch._dynamo.testing import CompileCounter

    counter = CompileCounter()

    def step(*params: Tensor, target: Tensor) -> Tensor:
        named = dict(zip(NAMES[form], params, strict=True))
        return call(form, target=target, **named).sum(-1).mean()

    torch._dynamo.reset()
    compiled = torch.compile(step, backend=counter, fullgraph=True, dynamic=True)
    for rows in (3, 5, 8):
        inputs = make(form, rows, 11)
        leaves = [inputs[name] for name in NAMES[form]]
        expected = torch.autograd.grad(step(*leaves, target=inputs["target"]), leaves)
        found = torch.autograd.grad(compiled(*leaves, target=inputs["target"]), leaves)
        torch.testing.assert_close(found, expected)
    assert counter.frame_count == 1


@pytest.mark.parametrize("shared", [True, False], ids=["gene", "gene-cell"])
def test_compiled_forward_and_backward_equal_eager(shared: bool, native: None) -> None:
    """The traced backward does not write to its inputs."""
    inputs = make(ZINB, 6, 11, shared=shared)
    leaves = [inputs[name] for name in NAMES[ZINB]]

    def step(*params: Tensor) -> Tensor:
        return call(ZINB, target=inputs["target"], **dict(zip(NAMES[ZINB], params, strict=True))).mean()

    torch._dynamo.reset()
    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(
        torch.autograd.grad(compiled(*leaves), leaves), torch.autograd.grad(step(*leaves), leaves)
    )


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("grad", ["row", "element"])
def test_same_bits_at_any_thread_count(form: str, grad: str, threads: None, native: None) -> None:
    inputs = make(form, 70, 3000)
    weights = torch.rand(70, 1).expand(70, 3000) if grad == "row" else torch.rand(70, 3000)
    results = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        values = call(form, **inputs)
        results.append([values, *gradients(values, inputs, weights).values()])
    for result in results[1:]:
        for a, b in zip(results[0], result, strict=True):
            assert torch.equal(a, b)


def test_every_instruction_set_gives_the_same_results(on_capability: Callable[[str], str]) -> None:
    script = f"""
import sys; sys.path[:0] = [{str(Path(__file__).parent)!r}, {str(Path(__file__).parents[1])!r}]
import itertools, torch, test_count_elements as t
torch.manual_seed(1)
for form, dtype, shared in itertools.product(t.FORMS, (torch.float32, torch.float64), (True, False)):
    inputs, weights = t.make(form, 9, 1100, dtype, shared), torch.rand(9, 1100, dtype=dtype)
    values = t.call(form, **inputs)
    expected, slopes = t.by_reference(form, inputs, weights)
    t.close(values, expected, 2e-6 if dtype == torch.float32 else 1e-12)
    for name, gradient in t.gradients(values, inputs, weights).items():
        t.close(gradient, slopes[name], 4e-6 if dtype == torch.float32 else 1e-11)
import test_nb_mixture
test_nb_mixture.check_on_this_instruction_set()
print("good")
"""
    assert on_capability(script).strip() == "good"


# ---------------------------------------------------------------------------------------------------------------------
# Dispatch
# ---------------------------------------------------------------------------------------------------------------------


def test_spec_lists_the_variants_with_elements(native: None) -> None:
    for name, variant in fastvae._spec.VARIANTS.items():
        assert variant.elements == (name in (*FORMS, "negative_binomial_mixture"))  # see test_nb_mixture.py
    with pytest.raises(ValueError, match="no kernel for the elements of bernoulli"):
        torch.ops.fastvae.nll_elements("bernoulli", [ONES], ONES, [], 1.0)
    with pytest.raises(ValueError, match="no kernel for the elements of negative_binomial_logits"):
        torch.ops.fastvae.nll_elements("negative_binomial_logits", [ONES, ONES, ONES[:, 0]], ONES, [], 1.0)


def test_backend_without_the_op_warns_or_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(choose.OPS_LACKING, "nll_elements", (("native", "cpu"),))
    monkeypatch.setattr(choose, "_fallbacks_warned", set())
    inputs = make(NB)
    with fastvae.use_backend("auto"):
        with pytest.warns(
            RuntimeWarning,
            match="pure-PyTorch reference for the elements of the likelihood 'negative_binomial'",
        ):
            values = call(NB, **inputs)
        assert torch.equal(values, call(NB, fastvae.reference, **inputs))
    with fastvae.use_backend("native"), pytest.raises(RuntimeError, match="no kernel for the elements of"):
        call(NB, **inputs)
