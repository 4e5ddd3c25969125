"""Discretised logistics: the published formula, probabilities that sum to 1, 50 digits at difficult points, layouts."""

import itertools
import json
import math
from collections.abc import Callable
from typing import Any

import mpmath
import published_logistics
import pytest
import torch
from torch import Tensor

from fastvae import functional, reference

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
VALUE_TOLERANCE = {torch.float64: 1e-13}  # for others it is 5e-6, because rows are float32
GRADIENT_TOLERANCE = {torch.float64: 1e-12, torch.float32: 5e-6, torch.float16: 1e-3, torch.bfloat16: 1e-2}

# components (0: no mixture), channels
KINDS = [(0, 3), (0, 1), (1, 3), (4, 3), (10, 3), (1, 1), (5, 1)]
kinds = pytest.mark.parametrize(("components", "channels"), KINDS, ids=lambda n: str(n))


def only_some(backend: str, components: int, dtype: torch.dtype = torch.float32, few: bool = True) -> None:
    """Thin out the grid for Triton's interpreter, which takes a second for what others do immediately."""
    if backend == "triton" and (components in (1, 10) or dtype == torch.float16 or not few):
        pytest.skip("the interpreter is slow, and others of these tests show the same")


def nll(module: Any, params: Tensor, target: Tensor, components: int, **options: float) -> Tensor:
    if components:
        return module.discretized_logistic_mixture_nll(params, target, components=components, **options)
    return module.discretized_logistic_nll(params, target, **options)


def planes(components: int, channels: int) -> int:
    return components * (10 if channels == 3 else 3) or 2 * channels


def make(components: int, channels: int, shape: tuple[int, ...], scale: float = 1.5) -> tuple[Tensor, Tensor]:
    """float64 parameters with log-scales around -1, and levels including both edges."""
    batch, *rest = shape
    params = scale * torch.randn(batch, planes(components, channels), *rest, dtype=torch.float64) - 0.5
    target = torch.randint(-40, 296, (batch, channels, *rest)).clamp(0, 255).to(torch.uint8)
    return params, target


def value_and_gradient(module: Any, params: Tensor, *args: Any, **options: float) -> tuple[Tensor, Tensor]:
    leaf = params.detach().requires_grad_()
    value = nll(module, leaf, *args, **options)
    weights = torch.linspace(0.5, 1.5, len(value)).to(value)
    (gradient,) = torch.autograd.grad(value, leaf, weights)
    return value.detach(), gradient


def check(
    got: tuple[Tensor, Tensor],
    want: tuple[Tensor, Tensor],
    dtype: torch.dtype,
    eager_gradient: Tensor | None = None,
) -> None:
    """Compare relative to the row; a gradient also relative to its element.

    If two components far from the level have equal weight, rounding their log-masses changes the gradient by more.
    `eager_gradient`, the formula's in `dtype`, shows where: twice its error is allowed in addition.
    """
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert got[0].dtype == wide
    assert got[1].dtype == dtype
    tolerance = VALUE_TOLERANCE.get(dtype, 5e-6)
    assert ((got[0].double() - want[0]).abs() <= tolerance * want[0].abs()).all()
    assert got[1].shape == want[1].shape
    if want[1].numel():
        row = want[1].abs().flatten(1).amax(1).view(-1, *[1] * (want[1].dim() - 1))
        bound = GRADIENT_TOLERANCE[dtype] * want[1].abs() + max(tolerance, 1e-12) * row
        # Half the smallest step of float16.
        bound += 2.0**-24 if dtype == torch.float16 else 0
        if eager_gradient is not None:
            bound += 2 * (eager_gradient.double() - want[1]).abs()
        assert ((got[1].double() - want[1]).abs() <= bound).all()


# ---------------------------------------------------------------------------------------------------------------------
# Values
# ---------------------------------------------------------------------------------------------------------------------

STORED = json.loads(published_logistics.STORED.read_text())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("name", STORED)
def test_nll_equals_published_values(backend: str, name: str, dtype: torch.dtype) -> None:
    case = STORED[name]
    leaf = torch.tensor(case["params"], dtype=dtype, requires_grad=True)
    value = nll(functional, leaf, torch.tensor(case["target"], dtype=torch.uint8), case["components"])
    (gradient,) = torch.autograd.grad(value.sum(), leaf)
    want, grad = (torch.tensor(case[key], dtype=torch.float64) for key in ("nll", "gradient"))
    tolerance = 1e-10 if dtype == torch.float64 else 5e-6  # the error of the published differences
    assert ((value.double() - want).abs() <= tolerance * want).all()
    row = grad.abs().amax((1, 2), keepdim=True)
    assert ((gradient.double() - grad).abs() <= tolerance * (row + grad.abs())).all()


def test_stored_values_equal_those_of_the_script() -> None:
    for name, (components, params, target) in published_logistics.cases().items():
        value = (
            published_logistics.mixture(params, target, components)
            if components
            else published_logistics.logistic(params, target)
        )
        torch.testing.assert_close(value.tolist(), STORED[name]["nll"], rtol=1e-12, atol=0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("min_mass", [1e-5, 0.0])
@pytest.mark.parametrize("shape", [(3,), (2, 5), (4, 131), (2, 7, 9), (1, 40, 33), (2, 2, 3, 5)], ids=str)
@kinds
def test_nll_equals_the_float64_reference(
    backend: str,
    components: int,
    channels: int,
    shape: tuple[int, ...],
    min_mass: float,
    dtype: torch.dtype,
) -> None:
    """The reference in float64 is the formula; the stored values compare the reference with the published one."""
    only_some(backend, components, dtype, few=math.prod(shape) < 200)
    params, target = make(components, channels, shape)
    params = params.to(dtype)
    got = value_and_gradient(functional, params, target, components, min_mass=min_mass)
    want = value_and_gradient(reference, params.double(), target, components, min_mass=min_mass)
    check(got, want, dtype)


@pytest.mark.parametrize("bits", [1, 2, 5, 7])
@kinds
def test_fewer_bits_equal_the_reference(backend: str, components: int, channels: int, bits: int) -> None:
    """Values above the highest level count as the highest."""
    params, target = make(components, channels, (3, 17))
    inside = target.clamp(max=2**bits - 1)
    assert (inside < target).any()
    for dtype in (torch.float32, torch.float64):
        want = value_and_gradient(reference, params.to(dtype).double(), inside, components, bits=bits)
        check(value_and_gradient(functional, params.to(dtype), inside, components, bits=bits), want, dtype)
        check(value_and_gradient(functional, params.to(dtype), target, components, bits=bits), want, dtype)


@kinds
def test_gradcheck(backend: str, components: int, channels: int) -> None:
    only_some(backend, components, few=components != 4)
    params, target = make(components, channels, (2, 3))
    assert torch.autograd.gradcheck(
        lambda p: nll(functional, p, target, components), params.requires_grad_(), atol=1e-6
    )


def test_reference_is_twice_differentiable() -> None:
    params, target = make(2, 3, (1, 2))
    leaf = params.requires_grad_()
    assert torch.autograd.gradgradcheck(lambda p: nll(reference, p, target, 2), leaf)


@pytest.mark.parametrize("floor", [-7.0, -2.0, 1.5])
@kinds
def test_log_scales_below_the_floor_count_as_it_without_gradient(
    backend: str, components: int, channels: int, floor: float
) -> None:
    """Log-scales below the floor count as equal to it and get no gradient; at the floor they do."""
    params, target = make(components, channels, (4, 11), scale=4)
    want = value_and_gradient(reference, params, target, components, log_scale_floor=floor)
    got = value_and_gradient(functional, params, target, components, log_scale_floor=floor)
    check(got, want, torch.float64)
    one = torch.tensor([[0.0, floor], [0.0, floor - 1e-3]], dtype=torch.float64)
    _, gradient = value_and_gradient(
        functional, one, torch.full((2, 1), 100, dtype=torch.uint8), 0, log_scale_floor=floor
    )
    assert gradient[0, 1] != 0
    assert gradient[1, 1] == 0


# ---------------------------------------------------------------------------------------------------------------------
# Masses
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("components", [0, 1, 4])
@pytest.mark.parametrize("log_scale", [-9.0, -6.0, -4.0, -1.0, 2.0])
def test_probabilities_of_a_channel_sum_to_1(backend: str, log_scale: float, components: int) -> None:
    levels = torch.arange(256, dtype=torch.uint8).view(256, 1)
    params = torch.randn(planes(components, 1), dtype=torch.float64)
    params[-max(1, components) :] += log_scale
    for means in (0.0, 0.7, -1.3):  # between and outside the edges
        shifted = params.clone()
        shifted[-2 * max(1, components) : -max(1, components)] += means
        rows = shifted.expand(256, -1)
        mass = torch.exp(-nll(functional, rows, levels, components, min_mass=0.0))
        assert abs(mass.sum().item() - 1) < 1e-12
        assert (
            abs(torch.exp(-nll(functional, rows.float(), levels, components, min_mass=0.0)).sum() - 1) < 1e-6
        )
        # The published sum is slightly below 1 if scales are much narrower than a bin.
        published = torch.exp(-nll(functional, rows, levels, components)).sum().item()
        assert abs(published - 1) < (1e-6 if log_scale > -4 else 2e-5)


def test_conditional_probabilities_of_a_channel_sum_to_1(backend: str) -> None:
    """For each component of a mixture, P(r, g, b) summed over b is P(r, g), and summed over g as well it is P(r)."""
    levels = torch.arange(256, dtype=torch.uint8)
    params = torch.randn(10, dtype=torch.float64) - torch.tensor([0.0] + [0.0, 2.0, 0.0] * 3)
    means, log_scales, raw = params[1::3], params[2::3], torch.tanh(params[3::3])

    def channel(level: Tensor, mean: Tensor, log_scale: Tensor) -> Tensor:
        row = torch.stack((mean, log_scale)).expand(len(level), 2)
        return torch.exp(-functional.discretized_logistic_nll(row, level.view(-1, 1), min_mass=0.0))

    for red, green in ((0, 255), (13, 200), (255, 0)):
        r, g = 2 * red / 255 - 1, 2 * green / 255 - 1
        pixels = torch.stack([torch.full_like(levels, red), torch.full_like(levels, green), levels], 1)
        joint = torch.exp(
            -functional.discretized_logistic_mixture_nll(
                params.expand(256, 10), pixels, components=1, min_mass=0.0
            )
        )
        red_green = channel(torch.tensor([red], dtype=torch.uint8), means[0], log_scales[0]) * channel(
            torch.tensor([green], dtype=torch.uint8), means[1] + raw[0] * r, log_scales[1]
        )
        assert abs(joint.sum() / red_green - 1) < 1e-12
        given = channel(levels, means[2] + raw[1] * r + raw[2] * g, log_scales[2])
        torch.testing.assert_close(joint / red_green, given, rtol=1e-11, atol=0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_probabilities_of_all_pixels_sum_to_1(backend: str, dtype: torch.dtype) -> None:
    bits = 2 if backend == "triton" else 4
    pixels = torch.tensor(list(itertools.product(range(2**bits), repeat=3)), dtype=torch.uint8)
    params = torch.randn(1, 30, dtype=dtype) - 1
    rows = functional.discretized_logistic_mixture_nll(
        params.expand(len(pixels), 30), pixels, components=3, bits=bits, min_mass=0.0
    )
    assert abs(torch.exp(-rows.double()).sum().item() - 1) < (1e-12 if dtype == torch.float64 else 1e-6)


# ---------------------------------------------------------------------------------------------------------------------
# Difficult points
# ---------------------------------------------------------------------------------------------------------------------


def exact(level: int, mean: float, log_scale: float, min_mass: float) -> tuple[float, float, float]:
    """-log mass and its derivatives with respect to mean and log-scale, from at least 50 digits."""

    def log_mass(mean: Any, log_scale: Any) -> Any:
        x, half, inverse = mpmath.mpf(2 * level) / 255 - 1, mpmath.mpf(1) / 255, mpmath.exp(-log_scale)
        if level in (0, 255):
            past = (x + half - mean if level == 0 else mean - x + half) * inverse
            return -mpmath.log1p(mpmath.exp(-past))
        # This is symmetric in the mean, and far below it avoids a difference of two numbers close to 1.
        middle = -abs(x - mean) * inverse
        above, below = (1 / (1 + mpmath.exp(-middle - side * half * inverse)) for side in (1, -1))
        if above - below > min_mass:
            return mpmath.log(above - below)
        return middle - log_scale - 2 * mpmath.log(1 + mpmath.exp(middle)) - mpmath.log(mpmath.mpf(255) / 2)

    with mpmath.workdps(150):  # derivatives by a step of 10^-50 lose a hundred digits
        m, v, step = mpmath.mpf(mean), mpmath.mpf(log_scale), mpmath.mpf(10) ** -50
        by_mean = (log_mass(m + step, v) - log_mass(m - step, v)) / (2 * step)
        by_log_scale = (log_mass(m, v + step) - log_mass(m, v - step)) / (2 * step)
        return float(-log_mass(m, v)), float(-by_mean), float(-by_log_scale)


HARD = [
    (level, mean, log_scale)
    for level in (0, 1, 128, 254, 255)
    for mean in (-20.0, -1.0, 0.00390625, 1.0, 3.5)
    for log_scale in (-6.75, -4.5, 0.0, 6.0, 30.0)
]


@pytest.mark.parametrize("min_mass", [1e-5, 0.0])
def test_nll_equals_50_digits(backend: str, min_mass: float) -> None:
    """Edges, tiny and huge scales, and far means, one per row. The inputs are exact in float32."""
    want = torch.tensor([exact(*point, min_mass) for point in HARD], dtype=torch.float64)
    params = torch.tensor([point[1:] for point in HARD], dtype=torch.float64)
    target = torch.tensor([point[:1] for point in HARD], dtype=torch.uint8)
    for dtype in (torch.float64, torch.float32):
        leaf = params.to(dtype).requires_grad_()
        value = functional.discretized_logistic_nll(leaf, target, min_mass=min_mass)
        (gradient,) = torch.autograd.grad(value.sum(), leaf)
        eps = torch.finfo(dtype).eps
        # u = (x - mean) / scale has the rounding errors of x, mean and 1 / scale, which are unavoidable in this dtype.
        inverse = torch.exp(-params[:, 1])
        u = ((2 * target.double() / 255 - 1 - params[:, :1]).abs()[:, 0] + 2) * inverse
        by_u = want[:, 1].abs() / inverse
        error = (value.double() - want[:, 0]).abs()
        assert (error <= eps * (20 * want[:, 0].abs() + 4 * u * by_u) + torch.finfo(dtype).tiny).all()
        error = (gradient.double() - want[:, 1:]).abs()
        # The reference adds up the grads at both ends of the bin, which cancel.
        rest = u + (1 if backend == "reference" else 0)
        bound = 40 * want[:, 1:].abs() + 8 * (1 + u[:, None]) * torch.stack((inverse * rest, rest), 1)
        assert (error <= eps * bound).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@kinds
@pytest.mark.parametrize("row", ["sure", "wrong", "edges", "borders"])
def test_nll_is_at_least_as_accurate_as_eager(
    native: None, row: str, components: int, channels: int, dtype: torch.dtype
) -> None:
    """Rows of 500 pixels that the decoder predicts confidently are at least as accurate as the published formula.

    In "borders", the means of row f are f / 10 half bins inside the edge; at 1, the bin of the edge would end.
    """
    k = max(1, components)
    rows = 10 if row == "borders" else 3
    target = torch.randint(0, 256, (rows, channels, 500), dtype=torch.uint8)
    if row in ("edges", "borders"):
        target = 255 * (target % 2)
    x = target.double() / 127.5 - 1
    inside = x * (1 - torch.arange(rows).view(-1, 1, 1) / 2550)
    mean = {"sure": x, "wrong": -x, "edges": 3 * x, "borders": inside}[row]
    mean = mean.repeat_interleave(k, 1).view(rows, channels, 1, k, 500)
    block = [mean, torch.full_like(mean, -7.0 if row == "borders" else -6.0)]
    if components and channels == 3:
        block.append(torch.zeros_like(mean))
    params = (
        torch.cat(block, 2).flatten(1, 3) if components else torch.cat([b.flatten(1, 3) for b in block], 1)
    )
    if components:
        params = torch.cat((torch.randn(rows, k, 500, dtype=torch.float64), params), 1)
    params = params.to(dtype)

    def eager_nll(p: Tensor) -> Tensor:
        if components:
            return published_logistics.mixture(p, target, components)
        return published_logistics.logistic(p, target)

    want = nll(reference, params.double(), target, components)
    got = nll(functional, params, target, components).double()
    eager = eager_nll(params.float()).double()
    assert ((got - want).abs() <= (eager - want).abs() + 5e-6 * want).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("bits", [5, 6])
def test_nll_of_wide_bins_is_at_least_as_accurate_as_eager(
    native: None, bits: int, dtype: torch.dtype
) -> None:
    """Each row has means at one distance from the level, in half bins, which are up to 35 scales wide."""
    levels = 2**bits - 1
    target = torch.arange(1, levels, dtype=torch.uint8).expand(8, 1, -1)  # without the edges
    distance = torch.tensor([-0.8, -0.6, -0.4, -0.2, 0.2, 0.4, 0.6, 0.8], dtype=torch.float64).view(8, 1, 1)
    x = 2 * target.double() / levels - 1
    params = torch.cat((x + distance / levels, torch.full_like(x, -7.0)), 1).to(dtype)

    mean, log_scale = params.float().chunk(2, 1)
    eager = -published_logistics.log_probabilities(2 * target.float() / levels - 1, mean, log_scale, levels)
    eager = eager.double().sum((1, 2))
    want = nll(reference, params.double(), target, 0, bits=bits)
    got = nll(functional, params, target, 0, bits=bits).double()
    assert ((got - want).abs() <= (eager - want).abs() + 5e-6 * want).all()


@pytest.mark.parametrize("log_scale", [-6.9, -10.0, -20.0, -50.0])
@pytest.mark.parametrize("bits", [2, 5, 8])
def test_bin_with_all_the_mass_has_no_gradient(native: None, bits: int, log_scale: float) -> None:
    """For bins up to e^50 scales wide, a term that should cancel would be multiplied by their width."""
    target = torch.full((1, 1, 4), 2 ** (bits - 1), dtype=torch.uint8)
    x = 2 * target.double() / (2**bits - 1) - 1
    params = torch.cat((x, torch.full_like(x, log_scale)), 1)
    grads = []
    for module, dtype in ((functional, torch.float32), (reference, torch.float64)):
        leaf = params.to(dtype).requires_grad_()
        module.discretized_logistic_nll(leaf, target, bits=bits, log_scale_floor=-60.0).sum().backward()
        grads.append(leaf.grad[:, 1].double())
    torch.testing.assert_close(*grads, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("bits", "wide", "narrow", "floor"), [(5, 5.7, -7.0, -7.0), (2, 8.1, -5.0, -7.0), (8, 3.66, -9.0, -10.0)]
)
@pytest.mark.parametrize("past", [28.0, 29.0, 29.3])
def test_components_with_very_different_scales_are_accurate(
    backend: str, past: float, bits: int, wide: float, narrow: float, floor: float
) -> None:
    """One component is so wide that its bin has little mass. The other is narrow, but its mean is so far from the bin
    that its mass is of the same size. Neither may be lost."""
    levels = 2**bits - 1
    target = torch.full((1, 3, 1), 2 ** (bits - 1), dtype=torch.uint8)
    x = 2 * target.double() / levels - 1
    half_bin = math.exp(-narrow) / levels
    blocks = torch.zeros(
        1, 3, 3, 2, 1, dtype=torch.float64
    )  # channels; means, log-scales, coefficients; components
    blocks[:, :, 0, 0] = x
    blocks[:, :, 0, 1] = x - (past + max(half_bin - 20, 0)) * math.exp(narrow)
    blocks[:, :, 1] = torch.tensor([[wide], [narrow]])
    params = torch.cat((torch.zeros(1, 2, 1, dtype=torch.float64), blocks.flatten(1, 3)), 1).float()
    options = {"bits": bits, "log_scale_floor": floor}
    want = value_and_gradient(reference, params.double(), target, 2, **options)
    check(value_and_gradient(functional, params, target, 2, **options), want, torch.float32)


SHIFTS = (300.0, 1e4, -1e4, 1e30)


def large_logits(components: int, channels: int, shift: float) -> tuple[Tensor, Tensor]:
    """float32 parameters with `shift` added to every logit. Of several components, the first or the last is switched
    off."""
    params, target = make(components, channels, (6, 7))
    params[:, :components] += shift
    if components > 1:
        params[:, 0, ::2] = params[:, components - 1, 1::2] = -math.inf
    return params.float(), target


@pytest.mark.parametrize("shift", SHIFTS)
@pytest.mark.parametrize(("components", "channels"), [(1, 3), (4, 1), (4, 3), (40, 3)])
def test_shifting_all_logits_keeps_accuracy(
    backend: str, components: int, channels: int, shift: float
) -> None:
    params, target = large_logits(components, channels, shift)
    want = value_and_gradient(reference, params.double(), target, components)
    check(value_and_gradient(functional, params, target, components), want, torch.float32)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("components", [0, 3])
def test_extreme_parameters_give_finite_values(backend: str, components: int, dtype: torch.dtype) -> None:
    """Finite wherever the float64 result is representable, for means and log-scales that no network should return."""
    points = list(itertools.product((0, 1, 200, 255), (-1e4, 0.0, 1e4), (-80.0, 0.0, 30.0, 80.0)))
    target = torch.tensor([[level] for level, *_ in points], dtype=torch.uint8)
    pair = torch.tensor([rest for _, *rest in points], dtype=torch.float64)
    params = (
        pair if not components else torch.cat((torch.zeros(len(pair), 3), pair.repeat_interleave(3, 1)), 1)
    )
    for options in ({}, {"min_mass": 0.0}, {"log_scale_floor": -60.0}):
        leaf = params.to(dtype).requires_grad_()
        value = nll(functional, leaf, target, components, **options)
        want = nll(reference, params.to(dtype).double(), target, components, **options)
        fits = want < torch.finfo(torch.float32).max
        assert value[fits].isfinite().all()
        error = (value.double() - want).abs()[fits]
        assert (error <= 1e-5 * want[fits].abs() + 1e-6).all()
        (gradient,) = torch.autograd.grad(value[fits].sum(), leaf)
        if "log_scale_floor" not in options and dtype != torch.float16:
            assert gradient.isfinite().all()


@kinds
def test_nan_affects_only_its_row(backend: str, components: int, channels: int) -> None:
    only_some(backend, components)
    params, target = make(components, channels, (4, 37))
    clean = value_and_gradient(functional, params.float(), target, components)
    for plane in {0, planes(components, channels) - 1}:
        for place in (0, 36):
            dirty = params.float().clone()
            dirty[2, plane, place] = float("nan")
            value, gradient = value_and_gradient(functional, dirty, target, components)
            assert value[2].isnan()
            if backend != "reference":  # a log-scale of NaN passes clamp() without a gradient
                assert gradient[2, plane, place].isnan()
            others = torch.tensor([0, 1, 3])
            assert torch.equal(value[others], clean[0][others])
            assert torch.equal(gradient[others], clean[1][others])


def test_component_with_weight_0_has_no_effect(backend: str) -> None:
    """A logit of minus infinity gives the weight 0."""
    params, target = make(3, 1, (2, 9))
    params[:, 1] = -math.inf
    rest = params.view(2, 3, 3, 9)[:, :, [0, 2]].reshape(2, 6, 9)
    for dtype in (torch.float32, torch.float64):
        value, gradient = value_and_gradient(functional, params.to(dtype), target, 3)
        torch.testing.assert_close(value.double(), nll(reference, rest, target, 2), rtol=1e-5, atol=0)
        assert gradient.isfinite().all()
        off = params.to(dtype)
        off[1, :3, 4] = -math.inf  # no component is left
        assert nll(functional, off, target, 3).isnan().tolist() == [False, True]


# ---------------------------------------------------------------------------------------------------------------------
# Layouts
# ---------------------------------------------------------------------------------------------------------------------


def channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": Tensor.contiguous,
    "channels_last": channels_last,
    "other": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
    "slice": lambda x: torch.cat((x[:, :1], x, x[:, :1]), 1)[:, 1:-1],
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("data", LAYOUTS)
@pytest.mark.parametrize("decoder", LAYOUTS)
@kinds
def test_layouts_equal_contiguous(
    backend: str, components: int, channels: int, decoder: str, data: str, dtype: torch.dtype
) -> None:
    """For any memory layout, the result is that of contiguous tensors, and the gradient has the layout of the
    parameters."""
    only_some(
        backend, components, dtype, few=decoder == "channels_last" or (data != "slice" and decoder != "other")
    )
    params, target = make(components, channels, (2, 20, 19))
    params = params.to(dtype)
    lying = LAYOUTS[decoder](params)
    got = value_and_gradient(functional, lying, LAYOUTS[data](target), components)
    want = value_and_gradient(functional, params, target, components)
    torch.testing.assert_close(got[0], want[0], rtol=2e-6 if dtype != torch.float64 else 1e-14, atol=0)
    torch.testing.assert_close(got[1], want[1], rtol=4 * torch.finfo(dtype).eps, atol=1e-6)
    if backend != "reference" and decoder == "channels_last":
        assert got[1].is_contiguous(memory_format=torch.channels_last)


def test_expanded_data_equals_a_copy(backend: str) -> None:
    params, target = make(2, 3, (4, 5, 6))
    one = target[:1].expand(4, -1, -1, -1)
    got = nll(functional, params, one, 2)
    assert torch.equal(got, nll(functional, params, one.contiguous(), 2))


@kinds
def test_empty_batch_gives_empty_results(backend: str, components: int, channels: int) -> None:
    for shape in ((0, 4, 4), (3, 0)):
        params, target = make(components, channels, shape)
        value, gradient = value_and_gradient(functional, params, target, components)
        assert torch.equal(value, torch.zeros(shape[0], dtype=torch.float64))
        assert gradient.shape == params.shape


@pytest.mark.parametrize("shape", [(1, 200, 251), (1027, 3), (16, 32, 32)], ids=str)
@kinds
def test_same_bits_at_any_thread_count(
    native: None, threads: None, components: int, channels: int, shape: tuple[int, ...]
) -> None:
    params, target = make(components, channels, shape)
    for x in (params.float(), params.bfloat16()):
        torch.set_num_threads(2)
        want = value_and_gradient(functional, x, target, components)
        for count in (1, 3):
            torch.set_num_threads(count)
            got = value_and_gradient(functional, x, target, components)
            assert torch.equal(got[0], want[0])
            assert torch.equal(got[1], want[1])


FRESH = """
import torch, fastvae
from fastvae import functional, reference
fastvae.set_backend("native")
torch.manual_seed(0)
for components, channels in ((0, 3), (4, 3), (3, 1)):
    planes = components * (10 if channels == 3 else 3) or 2 * channels
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        params = torch.randn(3, planes, 7, 19).to(dtype)
        target = torch.randint(-40, 296, (3, channels, 7, 19)).clamp(0, 255).to(torch.uint8)
        values = []
        for module, p in ((functional, params), (reference, params.double())):
            leaf = p.detach().requires_grad_()
            if components:
                value = module.discretized_logistic_mixture_nll(leaf, target, components=components)
            else:
                value = module.discretized_logistic_nll(leaf, target)
            values.append((value.detach().double(), torch.autograd.grad(value.sum(), leaf)[0].double()))
        (value, grad), (want, exact) = values
        assert ((value - want).abs() <= 5e-6 * want).all()
        assert ((grad - exact).abs() <= (1e-2 if dtype == torch.bfloat16 else 1e-5) * exact.abs().max()).all()
print("right")
"""


def test_every_instruction_set_gives_the_same_results(on_capability: Callable[[str], str]) -> None:
    assert on_capability(FRESH).strip() == "right"
