"""The results of the CUDA kernels on a machine without a GPU.

Their bodies run on the CPU, compiled as C++ with a fiber for every thread of a block, and are compared with
`fastvae.reference` in float64. test_cuda_code.py runs the sanitizers and inspects the machine code.
"""

import math
from collections.abc import Iterator
from functools import cache

import cuda_kernels
import mpmath
import posterior_forms
import pytest
import test_categorical
import test_counts
import test_discretized
import test_extremes
import test_mixture
import test_multinomial
import test_nb_mixture
import test_posteriors
import torch
from cuda_kernels import DTYPES, THREADS, Kernels, NoiseSource, pointer, row_dtype
from posterior_forms import FORMS
from torch import Tensor

from fastvae import reference
from fastvae._spec import VARIANTS

FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
# The tolerances of results and of gradients, which have the dtype of their input.
VALUE = {torch.float32: 5e-6, torch.float64: 1e-13, torch.float16: 5e-6, torch.bfloat16: 5e-6}
GRADIENT = {torch.float32: 5e-6, torch.float64: 1e-13, torch.float16: 1e-3, torch.bfloat16: 1e-2}
SIZES = (1, 7, 15, 16, 17, 24, 1000, 4099)
REDUCTIONS = {"none": 0, "sum": 1, "mean": 2}


@pytest.fixture(scope="session")
def built() -> Kernels:
    if missing := cuda_kernels.compiler_missing():
        pytest.skip(missing)
    return Kernels(cuda_kernels.library())


@pytest.fixture
def kernels(built: Kernels) -> Iterator[Kernels]:
    yield built
    built.processors = 1


def close(found: Tensor, expected: Tensor, tolerance: float, least: float = 0.0) -> None:
    """Compare with the tolerance relative to the largest number of each row, or to `least` if that is larger."""
    assert found.shape == expected.shape
    assert not found.isnan().any()
    scale = expected.abs().double().clamp_min(least)
    if expected.dim() > 1 and expected.numel():
        scale = scale.flatten(1).amax(1).view(-1, *[1] * (expected.dim() - 1))
    # The smallest numbers of a dtype are inaccurate, and the hardware's functions flush those of float32 to zero.
    floor = {torch.float16: 2.0**-24, torch.float64: 0.0}.get(found.dtype, 2.0**-126)
    error = (found.double() - expected.double()).abs()
    assert (error <= tolerance * scale + floor).all(), (error / scale).max().item()


def differentiable(*tensors: Tensor) -> list[Tensor]:
    return [t.double().requires_grad_() for t in tensors]


# ---------------------------------------------------------------------------------------------------------------------
# The reconstruction
# ---------------------------------------------------------------------------------------------------------------------


def case(likelihood: str, rows: int, size: int, dtype: torch.dtype) -> tuple[list[Tensor], list[float]]:
    """Return (params, constants) for data of shape (rows, size)."""
    mean = torch.randn(rows, size).mul(2).to(dtype)
    if likelihood == "poisson_rate":
        return [mean.exp()], [0.25]
    constants = [2.5] if likelihood.startswith(("student_t", "gamma")) else []
    if likelihood.startswith("gaussian_bounded"):
        constants = [-3.0, 1.5]
    if likelihood in ("gaussian", "laplace", "student_t"):
        return [mean], [*constants, 0.7]
    if likelihood.endswith("_learned"):
        return [mean, torch.tensor(-0.6, dtype=row_dtype(mean))], constants
    if likelihood.endswith("_per_element"):
        return [mean, torch.randn(rows, size).to(dtype)], constants
    if likelihood.endswith("_head"):
        return [torch.randn(rows, 2 * size).to(dtype)], constants
    return [mean], constants


def data(rows: int, size: int, dtype: torch.dtype) -> Tensor:
    if dtype == torch.uint8:
        return torch.randint(0, 256, (rows, size), dtype=dtype)
    return torch.rand(rows, size).round().bool() if dtype == torch.bool else torch.rand(rows, size).to(dtype)


def expected(
    likelihood: str,
    params: list[Tensor],
    target: Tensor,
    constants: list[float],
    kl: Tensor | None = None,
    beta: Tensor | None = None,
    reduction: int = 2,
    weight: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    if target.is_floating_point():
        target = target.double()
    return reference.nll(likelihood, params, target, constants, kl, beta, reduction, weight)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("likelihood", cuda_kernels.ELEMENTS)
@pytest.mark.parametrize("size", SIZES)
def test_nll_equals_the_reference(kernels: Kernels, likelihood: str, size: int, dtype: torch.dtype) -> None:
    rows = 3
    params, constants = case(likelihood, rows, size, dtype)
    target, kl, beta = data(rows, size, dtype), torch.rand(rows, dtype=torch.float32), torch.tensor(0.3)
    if likelihood.startswith("poisson"):
        target = (5 * target).round()
    loss, nll, gradients, scalar_rows = kernels.nll_forward(
        likelihood, params, target, constants, kl, beta, 2, needs=3
    )
    leaves = differentiable(*params)
    full, full_nll = expected(likelihood, leaves, target, constants, kl.double(), beta.double())
    full.backward()
    scale = 1.0 if likelihood == "bernoulli" else 3.0  # the terms of the others may cancel
    close(nll, full_nll.detach(), scale * VALUE[dtype])
    close(loss, full.detach(), scale * VALUE[dtype])
    for gradient, leaf in zip(gradients, leaves, strict=False):
        assert leaf.grad is not None
        close(gradient, leaf.grad, GRADIENT[dtype])
    if scalar_rows is not None:
        assert leaves[1].grad is not None
        close(scalar_rows.double().mean(), leaves[1].grad, 10 * VALUE[dtype])


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("likelihood", cuda_kernels.ELEMENTS)
@pytest.mark.parametrize(("rows", "size", "processors"), [(3, 17, 1), (40, 5, 1), (2, 4099, 4)])
def test_weighted_nll_equals_the_reference(
    kernels: Kernels, likelihood: str, rows: int, size: int, processors: int, dtype: torch.dtype
) -> None:
    """Rows that share a block, and rows that several blocks share. Elements of weight 0 are NaN."""
    kernels.processors = processors
    params, constants = case(likelihood, rows, size, dtype)
    target = data(rows, size, dtype)
    if likelihood.startswith("poisson"):
        target = (5 * target).round()
    weight = torch.rand(rows, size) * (torch.rand(rows, size) > 0.3)
    leaves = differentiable(*params)
    _, want = expected(likelihood, leaves, target, constants, weight=weight)
    want.sum().backward()
    removed = weight == 0
    given = [
        p.masked_fill(removed if p.shape == weight.shape else torch.cat((removed, removed), 1), math.nan)
        if p.dim() > 0
        else p
        for p in params
    ]
    loss, nll, gradients, scalar_rows = kernels.nll_forward(
        likelihood, given, target.masked_fill(removed, math.nan), constants, None, None, 1, 3, weight
    )
    close(nll, want.detach(), 3 * VALUE[dtype], 1.0)
    close(loss, want.detach().sum(), 3 * VALUE[dtype], 1.0)
    for gradient, leaf in zip(gradients, leaves, strict=False):
        assert leaf.grad is not None
        close(gradient, leaf.grad, GRADIENT[dtype])
    if scalar_rows is not None:
        assert leaves[1].grad is not None
        close(scalar_rows.double().sum(), leaves[1].grad, 10 * VALUE[dtype], 1.0)


PAIRS = [(d, t) for d in FLOATS for t in DTYPES if t in (d, torch.float32, torch.uint8, torch.bool)]


@pytest.mark.parametrize("size", [16, 17])
@pytest.mark.parametrize(("dtype", "target_dtype"), PAIRS, ids=str)
def test_nll_with_other_target_dtypes_equals_the_reference(
    kernels: Kernels, dtype: torch.dtype, target_dtype: torch.dtype, size: int
) -> None:
    params, _ = case("bernoulli", 5, size, dtype)
    target = data(5, size, target_dtype)
    _, nll, (gradient,), _ = kernels.nll_forward("bernoulli", params, target, needs=1)
    (leaf,) = differentiable(*params)
    full, full_nll = expected("bernoulli", [leaf], target, [])
    full.backward()
    assert leaf.grad is not None
    close(nll, full_nll.detach(), VALUE[dtype])
    close(gradient, leaf.grad, GRADIENT[dtype])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("shape", [0.5, 1.0, 2.5])
def test_gamma_nll_of_small_numbers_equals_the_reference(
    kernels: Kernels, shape: float, dtype: torch.dtype
) -> None:
    """A target of 0 for all scales, and numbers that are too small for the logarithm."""
    log_scale = torch.tensor([[-3000.0, -3.0, 0.0, 3000.0]], dtype=dtype).repeat(5, 1)
    target = torch.zeros_like(log_scale)
    _, nll, (gradient,), _ = kernels.nll_forward("gamma", [log_scale], target, [shape], reduction=1, needs=1)
    limit = 0.0 if shape == 1 else math.copysign(math.inf, shape - 1)
    assert torch.equal(nll, torch.full_like(nll, -3.0 if shape == 1 else limit))
    assert torch.equal(gradient, torch.full_like(gradient, shape))
    small = torch.full((5, 4), 1e-40 if dtype == torch.float32 else 1e-310, dtype=dtype)
    _, nll, (gradient,), _ = kernels.nll_forward(
        "gamma", [torch.zeros_like(small)], small, [shape], reduction=1, needs=1
    )
    _, want = expected("gamma", [torch.zeros_like(small).double()], small, [shape])
    close(nll, want, VALUE[dtype], 1.0)
    close(gradient, torch.full_like(gradient, shape).double(), VALUE[dtype])


ENDS = [name for name in cuda_kernels.ELEMENTS if name in VARIANTS and not VARIANTS[name].has_scalar]


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("likelihood", ENDS)
def test_the_grid_of_extremes(kernels: Kernels, likelihood: str, dtype: torch.dtype) -> None:
    variant = VARIANTS[likelihood]
    for points in test_extremes.grid(likelihood, dtype):
        params = test_extremes.tensors_of(variant, points.columns)
        _, nll, gradients, _ = kernels.nll_forward(
            likelihood, params, points.target, points.constants, reduction=1, needs=3
        )
        grads = list(gradients[0].unbind(1)) if len(params) == 1 else [g.flatten() for g in gradients]
        test_extremes.check_points(variant, points, nll, grads, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("likelihood", [name for name in cuda_kernels.ELEMENTS if name.endswith("_learned")])
def test_extreme_learned_scales(kernels: Kernels, likelihood: str, dtype: torch.dtype) -> None:
    variant = VARIANTS[likelihood]
    for points in test_extremes.grid(likelihood, dtype):
        each = []
        for mean, scalar, target in zip(*points.columns, points.target, strict=True):
            _, nll, gradients, scalar_rows = kernels.nll_forward(
                likelihood,
                [mean.view(1, 1), scalar.squeeze()],
                target.view(1, 1),
                points.constants,
                reduction=1,
                needs=3,
            )
            assert scalar_rows is not None
            each.append((nll, gradients[0].flatten(), scalar_rows))
        nll, *grads = (torch.cat(column) for column in zip(*each, strict=True))
        test_extremes.check_points(variant, points, nll, grads, dtype)


@pytest.mark.parametrize("size", [16, 17])
@pytest.mark.parametrize("target_dtype", cuda_kernels.COUNTS, ids=str)
def test_counts_are_not_scaled(kernels: Kernels, target_dtype: torch.dtype, size: int) -> None:
    log_rates = torch.randn(5, size)
    target = torch.randint(0, 200, (5, size)).to(target_dtype)
    _, nll, (gradient,), _ = kernels.nll_forward("poisson", [log_rates], target, needs=1)
    (leaf,) = differentiable(log_rates)
    full, full_nll = expected("poisson", [leaf], target, [])
    full.backward()
    assert leaf.grad is not None
    close(nll, full_nll.detach(), 5e-6)
    close(gradient, leaf.grad, 5e-6)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize(("rows", "size"), [(1, 1), (70, 3), (130, 20), (5, 1000), (1, 9000), (3, 9001)])
@pytest.mark.parametrize("processors", [1, 3])
def test_nll_with_any_partition_equals_the_reference(
    kernels: Kernels, processors: int, rows: int, size: int, reduction: str
) -> None:
    """Several rows per block, or several blocks per row. Every element counts once, in any order of the blocks."""
    kernels.processors = processors
    params, target = [torch.randn(rows, size)], torch.rand(rows, size)
    kl, beta = torch.rand(rows), torch.tensor(0.5)
    runs = [
        kernels.nll_forward("bernoulli", params, target, (), kl, beta, REDUCTIONS[reduction], 1)
        for _ in range(3)
    ]
    loss, nll, (gradient,), _ = runs[0]
    leaf = params[0].double().requires_grad_()
    full, full_nll = expected(
        "bernoulli", [leaf], target, [], kl.double(), beta.double(), REDUCTIONS[reduction]
    )
    full.sum().backward()
    assert leaf.grad is not None
    close(nll, full_nll.detach(), 5e-6)
    close(loss, full.detach(), 5e-6)
    close(gradient, leaf.grad, 5e-6)
    for other in runs[1:]:
        assert torch.equal(other[0], loss)
        assert torch.equal(other[1], nll)
        assert torch.equal(other[2][0], gradient)


@pytest.mark.parametrize("a", [9.0, 15.0, 30.0, 80.0])
@pytest.mark.parametrize("right", [True, False])
def test_nll_of_saturated_rows_is_accurate(kernels: Kernels, a: float, right: bool) -> None:
    """For confident logits, the loss is only what 1 + e would round away."""
    logits = torch.where(torch.rand(2, 784) < 0.5, a, -a)
    target = ((logits > 0) == right).float()
    _, nll, (gradient,), _ = kernels.nll_forward("bernoulli", [logits], target, needs=1)
    (leaf,) = differentiable(logits)
    full, full_nll = expected("bernoulli", [leaf], target, [])
    full.backward()
    assert leaf.grad is not None
    close(nll, full_nll.detach(), 5e-6)
    if not right or a < 16:
        assert ((gradient - leaf.grad).abs() <= 1.2e-7).all()


def test_nll_of_extreme_numbers_is_finite(kernels: Kernels) -> None:
    logits = torch.tensor([[-1e4], [-104.0], [0.0], [89.0], [1e4]])
    for t in (0.0, 1.0):
        target = torch.full_like(logits, t)
        _, nll, (gradient,), _ = kernels.nll_forward("bernoulli", [logits], target, needs=1)
        close(nll, reference.bernoulli_nll(logits.double(), target.double()), 5e-6)
        assert gradient.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_bounded_logvar_of_any_number_stays_in_bounds(kernels: Kernels, dtype: torch.dtype) -> None:
    logvar = torch.tensor([[-math.inf], [-1e4], [-80.0], [-8.0], [-0.75], [6.0], [80.0], [1e4]], dtype=dtype)
    mean, target = torch.full_like(logvar, 0.5), torch.full_like(logvar, 0.25)
    _, nll, (by_mean, by_logvar), _ = kernels.nll_forward(
        "gaussian_bounded_per_element", [mean, logvar], target, (-3.0, 1.5), reduction=1, needs=3
    )
    leaves = differentiable(mean, logvar)
    full, full_nll = expected("gaussian_bounded_per_element", leaves, target, [-3.0, 1.5], reduction=1)
    full.backward()
    close(nll, full_nll.detach(), VALUE[dtype])
    for gradient, leaf in zip((by_mean, by_logvar), leaves, strict=True):
        assert leaf.grad is not None
        close(gradient, leaf.grad, GRADIENT[dtype], least=1e-2)
    assert (by_logvar[[3, 5]] != 0).all()  # outside the bounds, but not far


def test_nan_affects_only_its_row(kernels: Kernels) -> None:
    logits, target = torch.randn(4, 24), torch.rand(4, 24)
    logits[1, 3] = math.nan
    _, nll, (gradient,), _ = kernels.nll_forward("bernoulli", [logits], target, reduction=0, needs=1)
    assert nll.isnan().tolist() == [False, True, False, False]
    assert gradient.isnan().nonzero().tolist() == [[1, 3]]
    logvar = torch.zeros(4, 24)
    logvar[2, 20] = math.nan
    z, kl, _ = kernels.sample(torch.zeros(4, 24), logvar, noise=seed(1, 2))
    assert kl.isnan().tolist() == [False, False, True, False]
    assert z.isnan().nonzero().tolist() == [[2, 20]]


def test_only_requested_gradients_are_written(kernels: Kernels) -> None:
    params, _ = case("gaussian_per_element", 3, 20, torch.float32)
    target = torch.rand(3, 20)
    nothing, _, none, _ = kernels.nll_forward("gaussian_per_element", params, target)
    both, _, (first, second), _ = kernels.nll_forward("gaussian_per_element", params, target, needs=3)
    one, _, (only,), _ = kernels.nll_forward("gaussian_per_element", params, target, needs=2)
    assert none == []
    assert torch.equal(nothing, both)
    assert torch.equal(one, both)
    assert torch.equal(only, second)
    assert first.isfinite().all()


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("channels", [1, 3, 8])
@pytest.mark.parametrize("order", [torch.contiguous_format, torch.channels_last])
def test_nll_of_packed_heads_equals_the_reference(
    kernels: Kernels, order: torch.memory_format, channels: int, dtype: torch.dtype
) -> None:
    params = torch.randn(2, 2 * channels, 4, 5).to(dtype).contiguous(memory_format=order)
    target = torch.rand(2, channels, 4, 5).to(dtype).contiguous(memory_format=order)
    _, nll, (gradient,), _ = kernels.nll_forward("gaussian_head", [params], target, needs=1)
    (leaf,) = differentiable(params)
    full, full_nll = expected("gaussian_head", [leaf], target, [])
    full.backward()
    assert leaf.grad is not None
    close(nll, full_nll.detach(), 3 * VALUE[dtype])
    close(gradient, leaf.grad, GRADIENT[dtype])


def test_nll_of_strided_rows_equals_the_reference(kernels: Kernels) -> None:
    """Slices of a wider tensor, expanded data, and rows that are not aligned to 16 bytes."""
    for wide, start, size in ((64, 0, 24), (64, 3, 24), (33, 0, 17), (67, 4, 24)):
        params = torch.randn(5, wide)[:, start : start + size]
        target = torch.rand(1, size).expand(5, size)
        _, nll, (gradient,), _ = kernels.nll_forward("bernoulli", [params], target, needs=1)
        (leaf,) = differentiable(params)
        full, full_nll = expected("bernoulli", [leaf], target, [])
        full.backward()
        assert leaf.grad is not None
        close(nll, full_nll.detach(), 5e-6)
        close(gradient, leaf.grad, 5e-6)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_nll_of_empty_tensors_equals_the_reference(kernels: Kernels, reduction: str) -> None:
    for shape in ((0, 5), (3, 0), (0, 0)):
        params, target = [torch.randn(shape)], torch.rand(shape)
        kl = torch.rand(shape[0])
        loss, nll, _, _ = kernels.nll_forward(
            "bernoulli", params, target, (), kl, None, REDUCTIONS[reduction], 1
        )
        full, full_nll = reference.nll("bernoulli", params, target, [], kl, None, REDUCTIONS[reduction])
        assert torch.equal(nll, full_nll)
        torch.testing.assert_close(loss, full, equal_nan=True)
        z, row_kl, _ = kernels.sample(params[0], target, noise=seed(1, 2))
        assert z.shape == shape
        assert torch.equal(row_kl, torch.zeros(shape[0]))
        kernels.sample_grad(params[0], kl, params[0], target, noise=seed(1, 2))
        grad = torch.rand(shape[0]) if reduction == "none" else torch.tensor(2.0)
        _, scalar, by_kl, by_beta = kernels.nll_backward(
            grad,
            None,
            params,
            kl,
            kl,
            torch.tensor(1.0),
            shape[0],
            REDUCTIONS[reduction],
            in_place=True,
            need_kl=True,
            need_beta=True,
        )
        for small in (scalar, by_kl, by_beta):
            assert small is not None
            assert not small.isnan().any()


def test_nll_accepts_all_dtypes_of_small_tensors(kernels: Kernels) -> None:
    """beta and a learned logvar have their own dtypes. kl may be float64, and then the loss is too."""
    for dtype in FLOATS:
        params, target = [torch.randn(4, 20), torch.tensor(-0.5, dtype=dtype)], torch.rand(4, 20)
        beta = torch.tensor(0.5, dtype=dtype)
        for kl in (torch.rand(4), torch.rand(4, dtype=torch.float64), torch.rand(1).expand(4)):
            loss, _, _, _ = kernels.nll_forward("gaussian_learned", params, target, (), kl, beta)
            full, _ = expected(
                "gaussian_learned", [p.double() for p in params], target, [], kl.double(), beta
            )
            assert loss.dtype == kl.dtype
            close(loss, full, 5e-6)


# ---------------------------------------------------------------------------------------------------------------------
# Discretised logistics
# ---------------------------------------------------------------------------------------------------------------------

# components (0: no mixture), channels. A block of 64 threads has 8 per pixel; for more components, it uses several.
KINDS = [(0, 1), (0, 3), (1, 3), (3, 3), (10, 3), (19, 3), (1, 1), (3, 1), (10, 1)]
kinds = pytest.mark.parametrize(("components", "channels"), KINDS, ids=lambda n: str(n))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("shape", [(3,), (20, 3), (3, 131), (2, 7, 9), (5, 4, 8)], ids=str)
@kinds
def test_discretized_nll_equals_the_reference(
    kernels: Kernels, components: int, channels: int, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    params, target = test_discretized.make(components, channels, shape)
    params = params.to(dtype)
    want = test_discretized.value_and_gradient(reference, params.double(), target, components)
    weights = torch.linspace(0.5, 1.5, len(target)).to(want[0]).to(row_dtype(params))
    orders = [torch.contiguous_format, torch.channels_last] if len(shape) == 3 else [torch.contiguous_format]
    for order in orders:
        lying, data = (x.contiguous(memory_format=order) for x in (params, target))
        loss, nll, plain = kernels.logistic(lying, data, components, reduction=1)
        close(loss, want[0].sum(), VALUE[dtype])
        _, _, gradient = kernels.logistic(lying, data, components, reduction=1, grad_nll=weights)
        test_discretized.check((nll, gradient), want, dtype)
        # The gradient of the forward includes the weight of the reduction.
        _, _, once = kernels.logistic(lying, data, components, grad_nll=torch.ones(len(target)).to(weights))
        assert torch.equal(plain, once)
        _, rows, _ = kernels.logistic(lying, data, components, reduction=0, with_gradient=False)
        assert torch.equal(rows, nll)


@pytest.mark.parametrize("small", [1e-5, 0.0])
def test_discretized_nll_at_extreme_points_equals_50_digits(kernels: Kernels, small: float) -> None:
    """Edges, tiny and huge scales and far means, as in test_nll_equals_50_digits, with the hardware's functions."""
    hard = test_discretized.HARD
    want = torch.tensor([test_discretized.exact(*point, small) for point in hard], dtype=torch.float64)
    params = torch.tensor([point[1:] for point in hard], dtype=torch.float64)
    target = torch.tensor([point[:1] for point in hard], dtype=torch.uint8)
    # A mixture with one component equals that component.
    mixed = torch.cat((torch.randn(len(hard), 1, dtype=torch.float64), params), 1)
    inverse = torch.exp(-params[:, 1])
    u = ((2 * target.double() / 255 - 1 - params[:, :1]).abs()[:, 0] + 2) * inverse
    for dtype in (torch.float64, torch.float32):
        # The hardware's exp(-log-scale) has an error of half a unit of the log-scale's binary exponent.
        eps = torch.finfo(dtype).eps * (1 + params[:, 1].abs() if dtype == torch.float32 else 1)
        for components, p in ((0, params), (1, mixed)):
            _, nll, gradient = kernels.logistic(p.to(dtype), target, components, small=small, reduction=1)
            error = (nll.double() - want[:, 0]).abs()
            floor = torch.finfo(dtype).tiny if components == 0 else 2 * torch.finfo(dtype).eps
            assert (error <= eps * (20 * want[:, 0].abs() + 4 * u * want[:, 1].abs() / inverse) + floor).all()
            error = (gradient[:, -2:].double() - want[:, 1:]).abs()
            bound = 40 * want[:, 1:].abs() + 8 * (1 + u[:, None]) * torch.stack((inverse * u, u), 1)
            assert (
                error <= eps.view(-1, 1) * bound if dtype == torch.float32 else error <= eps * bound
            ).all()


@pytest.mark.parametrize("processors", [1, 3])
@pytest.mark.parametrize(("rows", "pixels"), [(1, 1), (130, 3), (5, 1000), (1, 2001)])
@pytest.mark.parametrize("components", [0, 1, 3, 10])
def test_discretized_nll_with_any_partition_equals_the_reference(
    kernels: Kernels, components: int, rows: int, pixels: int, processors: int
) -> None:
    kernels.processors = processors
    params, target = test_discretized.make(components, 1, (rows, pixels))
    want = test_discretized.nll(reference, params, target, components)
    runs = [kernels.logistic(params.float(), target, components) for _ in range(3)]
    close(runs[0][1], want, 5e-6)
    close(runs[0][0], want.mean(), 5e-6)
    assert not runs[0][2].isnan().any()
    for other in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(other, runs[0], strict=True))


@pytest.mark.parametrize(("components", "channels"), [(0, 3), (3, 1), (10, 3)])
def test_discretized_nll_of_strided_inputs_is_correct(
    kernels: Kernels, components: int, channels: int
) -> None:
    """Slices of a wider tensor, expanded levels and levels above the highest, NaN, and a component with weight 0."""
    params, target = test_discretized.make(components, channels, (4, 24))
    wide = torch.cat((params[:, :1], params, params), 1).float()[:, 1 : 1 + params.shape[1]]
    _, nll, gradient = kernels.logistic(wide, target[:1].expand(4, -1, -1), components, levels=31)
    clamped = target[:1].clamp(max=31).expand(4, -1, -1)
    close(nll, test_discretized.nll(reference, wide.double(), clamped, components, bits=5), 5e-6)
    assert gradient.isfinite().all()
    wide[2, 0, 5] = math.nan
    _, nll, gradient = kernels.logistic(wide, clamped, components, levels=31)
    assert nll.isnan().tolist() == [False, False, True, False]
    assert gradient[2, 0, 5].isnan()
    assert gradient.isnan().nonzero()[:, [0, 2]].unique(dim=0).tolist() == [[2, 5]]
    if components:
        wide[:, :components] = -math.inf
        wide[:, components - 1] = 0
        _, nll, gradient = kernels.logistic(wide, clamped, components, levels=31)
        close(nll, test_discretized.nll(reference, wide.double(), clamped, components, bits=5), 5e-6)
        assert gradient.isfinite().all()
        wide[2, components - 1, 5] = -math.inf  # no component is left
        _, nll, gradient = kernels.logistic(wide, clamped, components, levels=31)
        assert nll.isnan().tolist() == [False, False, True, False]
        assert gradient.isnan().nonzero()[:, [0, 2]].unique(dim=0).tolist() == [[2, 5]]


@pytest.mark.parametrize("shift", test_discretized.SHIFTS)
@pytest.mark.parametrize(("components", "channels"), [(1, 3), (3, 1), (3, 3), (10, 3), (40, 3)])
def test_mixture_nll_of_large_logits_is_accurate(
    kernels: Kernels, components: int, channels: int, shift: float
) -> None:
    params, target = test_discretized.large_logits(components, channels, shift)
    want = test_discretized.value_and_gradient(reference, params.double(), target, components)
    weights = torch.linspace(0.5, 1.5, len(target))
    _, nll, _ = kernels.logistic(params, target, components)
    _, _, gradient = kernels.logistic(params, target, components, grad_nll=weights)
    test_discretized.check((nll, gradient), want, torch.float32)


@pytest.mark.parametrize("components", [0, 2])
def test_discretized_nll_without_pixels_is_zero(kernels: Kernels, components: int) -> None:
    for shape in ((0, 5), (3, 0)):
        params, target = test_discretized.make(components, 3, shape)
        loss, nll, _ = kernels.logistic(params, target, components, reduction=1)
        assert loss == 0
        assert torch.equal(nll, torch.zeros_like(nll))


# ---------------------------------------------------------------------------------------------------------------------
# The categorical
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("shape", [*test_categorical.SHAPES, (70, 3), (3, 40, 6), (2, 3, 64)], ids=str)
def test_categorical_nll_equals_the_reference(
    kernels: Kernels, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    logits, target = test_categorical.data(shape, dtype)
    (leaf,) = differentiable(logits)
    want = reference.categorical_nll(leaf, target)
    loss, nll, plain = kernels.categorical(logits, target, reduction=1)
    close(nll, want.detach(), VALUE[dtype], least=1.0)
    close(loss, want.detach().sum(), VALUE[dtype], least=1.0)
    weights = test_categorical.rows_weights(shape[0])
    want.backward(weights)
    assert leaf.grad is not None
    _, _, gradient = kernels.categorical(logits, target, grad_nll=weights.to(row_dtype(logits)))
    if target.numel():
        close(gradient, leaf.grad, GRADIENT[dtype])
    ones = torch.ones(shape[0], dtype=row_dtype(logits))
    assert torch.equal(kernels.categorical(logits, target, grad_nll=ones)[2], plain)
    assert torch.equal(kernels.categorical(logits, target, reduction=0, with_gradient=False)[1], nll)


def test_a_target_serves_the_same_row_of_every_draw(kernels: Kernels) -> None:
    draws, size = 3, 37
    target = torch.rand(2, size)
    logits = torch.randn(2 * draws, size)
    levels = torch.randint(0, 256, (2, 3, 5), dtype=torch.uint8)
    planes = torch.randn(2 * draws, 20, 5)
    classes = torch.randint(0, 6, (2, 5))
    scores = torch.randn(2 * draws, 5, 6)
    calls = (
        (lambda x: kernels.nll_forward("bernoulli", [logits], x, needs=1), target),
        (lambda x: kernels.logistic(planes[:, :6].contiguous(), x), levels),
        (lambda x: kernels.logistic(planes, x, 2), levels),
        (lambda x: kernels.categorical(scores, x), classes),
    )
    for call, data in calls:
        once, repeated = call(data), call(torch.cat([data] * draws))
        assert torch.equal(once[0], repeated[0])
        assert torch.equal(once[1], repeated[1])
        for a, b in zip(once[2], repeated[2], strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("processors", [1, 3])
@pytest.mark.parametrize("shape", [(1, 900, 3), (300, 5), (40, 7, 4), (3, 50, 300)], ids=str)
def test_categorical_nll_with_any_partition_equals_the_reference(
    kernels: Kernels, shape: tuple[int, ...], processors: int
) -> None:
    kernels.processors = processors
    logits, target = test_categorical.data(shape, torch.float32)
    want = reference.categorical_nll(logits.double(), target)
    runs = [kernels.categorical(logits, target) for _ in range(3)]
    close(runs[0][1], want, 5e-6, least=1.0)
    close(runs[0][0], want.mean(), 5e-6)
    assert not runs[0][2].isnan().any()
    for other in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(other, runs[0], strict=True))


def test_categorical_nll_of_an_invalid_class_is_nan(kernels: Kernels) -> None:
    """A kernel cannot raise, so it sets the row's nll and the position's slopes to NaN, and reads no such logit."""
    logits = torch.randn(3, 2, 5)
    for number in (5, -1, 2**40):
        target = torch.tensor([[0, 1], [2, number], [4, -100]])
        _, nll, gradient = kernels.categorical(logits, target)
        assert nll.isnan().tolist() == [False, True, False]
        assert gradient.isnan().all(2).tolist() == [[False, False], [False, True], [False, False]]
        assert not gradient[2, 1].any()


# ---------------------------------------------------------------------------------------------------------------------
# Counts
# ---------------------------------------------------------------------------------------------------------------------

COUNT_FORMS = [
    name
    for name, variant in VARIANTS.items()
    if variant.family == "counts" and not variant.element and ("native", "cuda") not in variant.lacks
]
# Each form with a dispersion of its own for each element, too, if it has one.
COUNT_CASES = [
    (form, shared) for form in COUNT_FORMS for shared in (True, False) if shared or form != "multinomial"
]
COUNT_SHAPES = ((1, 1), (3, 5), (5, 260), (70, 3), (2, 3000), (20, 515))


def counted(
    form: str, rows: int, features: int, dtype: torch.dtype, *, shared: bool
) -> tuple[list[Tensor], Tensor]:
    """Return (params, counts), most of which are 0 and a few large."""
    if form == "multinomial":
        logits, target = test_multinomial.make(rows, features, torch.float64)
        target[:, ::7] *= 30
        return [logits.to(dtype)], target
    if form == "negative_binomial_mixture":
        values, target = test_nb_mixture.make(rows, features, torch.float64, shared)
        target = torch.where(torch.rand(target.shape) > 0.5, target, 0.0)
        return [x.to(dtype) for x in values.values()], target
    inputs = test_counts.make(form, rows, features, torch.float64, shared, zeros=0.8)
    target = inputs.pop("target")
    target[:, ::7] *= 30
    return [x.detach().to(dtype) for x in inputs.values()], target


def count_truth(
    form: str, params: list[Tensor], target: Tensor, weights: Tensor, eps: float = 0.0
) -> tuple[Tensor, list[Tensor]]:
    """The nll of each row and the gradients of its sum with `weights`, in float64."""
    leaves = differentiable(*params)
    constants = [eps] * len(VARIANTS[form].constants)
    _, nll = reference.nll(form, leaves, target.double(), constants, None, None, 1)
    return nll.detach(), list(torch.autograd.grad(nll, leaves, weights.double()))


def check_gradient(found: Tensor, want: Tensor, dtype: torch.dtype) -> None:
    """Compare with the largest element: gradients of the dispersion and the library are sums of terms that cancel."""
    if want.numel():
        floor = 2.0**-24 if found.dtype == torch.float16 else 2.0**-126
        error, largest = (found.double() - want.double()).abs().max(), want.double().abs().max()
        assert error <= 2 * GRADIENT[dtype] * largest + floor, (error / largest).item()


def check_counts(
    found: Tensor, gradients: list[Tensor], want: tuple[Tensor, list[Tensor]], dtype: torch.dtype
) -> None:
    close(found, want[0], VALUE[dtype])
    for gradient, full in zip(gradients, want[1], strict=True):
        check_gradient(gradient, full, dtype)


@pytest.mark.parametrize(("form", "shared"), COUNT_CASES)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("shape", COUNT_SHAPES, ids=str)
@pytest.mark.parametrize("processors", [1, 3])
def test_count_nll_equals_the_reference(
    kernels: Kernels, form: str, shared: bool, dtype: torch.dtype, shape: tuple[int, int], processors: int
) -> None:
    """With one block or several, and with several rows for each warp."""
    kernels.processors = processors
    params, target = counted(form, *shape, dtype, shared=shared)
    eps = 1e-3 if VARIANTS[form].constants else 0.0
    runs = [kernels.counts(form, params, target.float(), eps=eps, reduction=1) for _ in range(2)]
    loss, nll, gradients, _ = runs[0]
    want = count_truth(form, params, target, torch.ones(shape[0]), eps)
    check_counts(nll, gradients, want, dtype)
    close(loss, want[0].sum(), VALUE[dtype])
    assert torch.equal(runs[1][0], loss)
    assert torch.equal(runs[1][1], nll)
    for one, other in zip(gradients, runs[1][2], strict=True):
        assert torch.equal(one, other)
    # The gradient alone, with a factor for each row, and the values alone.
    weights = torch.linspace(0.5, 2, shape[0]).to(row_dtype(params[0]))
    _, _, weighted, _ = kernels.counts(form, params, target.float(), eps=eps, grad_nll=weights)
    check_counts(nll, weighted, (want[0], count_truth(form, params, target, weights, eps)[1]), dtype)
    _, alone, _, _ = kernels.counts(form, params, target.float(), eps=eps, reduction=0, with_gradient=False)
    assert torch.equal(alone, nll)


@pytest.mark.parametrize("form", COUNT_FORMS)
@pytest.mark.parametrize("target_dtype", [*cuda_kernels.COUNTS, *FLOATS], ids=str)
@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "csr"])
@pytest.mark.parametrize("features", [300, 301])
def test_count_targets_of_any_dtype_and_layout_equal_float32(
    kernels: Kernels, form: str, target_dtype: torch.dtype, sparse: bool, features: int
) -> None:
    params, target = counted(form, 4, features, torch.float32, shared=True)
    target = target.clamp(max=250).round()
    _, nll, gradients, _ = kernels.counts(form, params, target.float())
    positions = None
    data = target.to(target_dtype)
    if sparse:
        csr = target.to_sparse_csr()
        positions = (csr.crow_indices(), csr.col_indices())
        data = csr.values().to(target_dtype)
    _, other, others, _ = kernels.counts(form, params, data, positions=positions)
    assert torch.equal(other, nll)
    for one, two in zip(gradients, others, strict=True):
        assert torch.equal(one, two)


@pytest.mark.parametrize(
    "form",
    [
        "negative_binomial",
        "zero_inflated_negative_binomial_logits",
        "negative_binomial_mixture",
        "multinomial",
    ],
)
def test_sparse_counts_at_invalid_positions_give_nan_in_their_row(kernels: Kernels, form: str) -> None:
    """Columns out of range, out of order or given twice, and rows that end before they begin or after the values."""
    params, target = counted(form, 3, 600, torch.float32, shared=True)
    csr = target.float().to_sparse_csr()
    starts, columns, values = csr.crow_indices(), csr.col_indices(), csr.values()
    first, last = int(starts[1]), int(starts[2]) - 1
    wrong = []
    for place, column in (
        (first, -1),
        (last, 600),
        (last, 2**40),
        (first, int(columns[first + 1])),
        (first, 599),
    ):
        bad = columns.clone()
        bad[place] = column
        wrong.append((starts, bad))
    for ends in (int(starts[1]) - 1, values.numel() + 5):
        bad_starts = starts.clone()
        bad_starts[2] = ends
        wrong.append((bad_starts, columns))
    for positions in wrong:
        _, nll, _, _ = kernels.counts(form, params, values, positions=positions, reduction=0)
        assert nll[1].isnan()
        assert not nll[0].isnan()
    _, nll, _, _ = kernels.counts(form, params, values, positions=(starts, columns), reduction=0)
    assert nll.isfinite().all()


@pytest.mark.parametrize("form", COUNT_FORMS)
@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "csr"])
def test_counts_serve_the_same_row_of_every_draw(kernels: Kernels, form: str, sparse: bool) -> None:
    params, target = counted(form, 6, 300, torch.float32, shared=True)
    target = target[:2].float()

    def call(data: Tensor) -> tuple[Tensor, Tensor, list[Tensor], Tensor | None]:
        csr = data.to_sparse_csr()
        positions = (csr.crow_indices(), csr.col_indices()) if sparse else None
        return kernels.counts(form, params, csr.values() if sparse else data, positions=positions)

    once, repeated = call(target), call(torch.cat([target] * 3))
    assert torch.equal(once[1], repeated[1])
    for one, two in zip(once[2], repeated[2], strict=True):
        assert torch.equal(one, two)


@pytest.mark.parametrize(
    "form", ["negative_binomial", "zero_inflated_negative_binomial", "negative_binomial_mixture"]
)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("shared", [True, False], ids=["feature", "element"])
def test_count_elements_sum_to_the_rows(
    kernels: Kernels, form: str, dtype: torch.dtype, shared: bool
) -> None:
    """Their derivatives are per element, in the rows' dtype, also by a dispersion that all rows share."""
    params, target = counted(form, 9, 301, dtype, shared=shared)
    _, nll, gradients, _ = kernels.counts(form, params, target.float())
    _, _, derivatives, values = kernels.counts(form, params, target.float(), elements=True)
    assert values is not None
    close(values.sum(1), nll.double(), 2 * VALUE[dtype])
    for derivative, gradient in zip(derivatives, gradients, strict=True):
        assert derivative.dtype == row_dtype(params[0])
        check_gradient(gradient, derivative.sum(0) if gradient.dim() == 1 else derivative, dtype)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (70, 3), (3, 600), (2, 3000)], ids=str)
@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "csr"])
@pytest.mark.parametrize("processors", [1, 3])
def test_weighted_multinomial_nll_equals_the_formula(
    kernels: Kernels, dtype: torch.dtype, shape: tuple[int, int], sparse: bool, processors: int
) -> None:
    """Features of weight 0 are left out, whatever there is in their place; a row has none, and another no counts."""
    kernels.processors = processors
    logits, target = test_multinomial.make(*shape, dtype)
    weight = (torch.rand(shape) > 0.3) * (0.5 + torch.rand(shape))
    weight[:1] += 0.25
    if shape[0] > 2:
        target[1], weight[2] = 0, 0
    removed = weight == 0
    poison = (
        torch.tensor([math.nan, math.inf, -math.inf]).repeat(logits.numel())[: logits.numel()].view(shape)
    )
    given = torch.where(removed, poison.to(dtype), logits)
    data, positions = (torch.where(removed, poison.to(dtype), target) if not sparse else target), None
    if sparse:
        csr = target.to_sparse_csr()
        positions, data = (csr.crow_indices(), csr.col_indices()), csr.values()
    loss, nll, (gradient,), _ = kernels.counts(
        "multinomial", [given], data, positions=positions, weight=weight
    )
    close(loss, nll.double().sum(), 1e-6)
    assert gradient[removed].count_nonzero() == 0
    for row in range(shape[0]):
        kept = ~removed[row]
        parts = (x[row : row + 1, kept] for x in (logits, target, weight))
        want = test_multinomial.formula(*parts)
        test_multinomial.check(nll[row : row + 1], gradient[row : row + 1, kept], want, torch.ones(1))
    if shape[0] > 2:
        assert nll[1:3].tolist() == [0, 0]
        assert gradient[1:3].count_nonzero() == 0


@pytest.mark.slow
@pytest.mark.parametrize("inflated", [False, True])
def test_counts_over_a_wide_range_equal_50_digits(kernels: Kernels, inflated: bool) -> None:
    """Inverse dispersions from 1e-4 to 1e8, counts up to 1e6 and means around them, in float32."""
    form = "zero_inflated_negative_binomial" if inflated else "negative_binomial"
    grid = [
        (float(t), max(t, 0.5) * ratio, 10.0**power)
        for t in (0, 1, 2, 5, 7, 8, 20, 1000, 10**6)
        for ratio in (1e-3, 0.5, 1.0, 1.1, 100.0)
        for power in range(-4, 9)
    ]
    table = torch.tensor(grid, dtype=torch.float64).float()
    t, mean, theta = (table[:, i : i + 1].contiguous() for i in range(3))
    pi = torch.full_like(t, -1.0)
    params = [mean, theta, *([pi] if inflated else [])]
    _, nll, gradients, _ = kernels.counts(form, params, t, reduction=0)
    for i in range(len(grid)):
        point = (t[i].item(), mean[i].item(), theta[i].item())
        value, slopes = test_counts.exact(*point, *((-1.0,) if inflated else ()))
        assert abs(nll[i].item() - value) <= 5e-6 * abs(value), point
        # With additional zeros, a zero's derivatives are proportional to e^-z: the relative error of z, times z.
        z = point[2] * math.log1p(point[1] / point[2]) if inflated and point[0] == 0 else 0.0
        for gradient, slope in zip(gradients, slopes, strict=True):
            found = gradient[i].item()
            assert abs(found - slope) <= 5e-6 * (1 + 0.1 * z) * abs(slope) + 1e-30, (
                point,
                found,
                float(slope),
            )


def float32(x: float) -> float:
    return torch.tensor(x, dtype=torch.float32).item()


# (count, library) of a row of 256 equal features.
WIDE_ROWS = [
    (t, float32(256 * max(t, 0.5) * ratio))
    for t in (0.0, 1.0, 2.0, 7.0, 8.0, 1000.0, 1e6)
    for ratio in (1e-3, 1.1, 100.0)
]
WIDE_LOG_DISPERSIONS = [float32(power * math.log(10)) for power in range(-4, 9, 2)]


@cache
def truth_by_logarithms(t: float, mean: float, log_theta: float, pi: float | None) -> list[float]:
    """The nll of a count, and its derivatives by log mean, log theta and, unless it is None, pi."""
    with mpmath.workdps(50):
        count = mpmath.mpf(t)
        term = test_extremes.negative_binomial(mpmath.mpf(mean), mpmath.exp(mpmath.mpf(log_theta)), count)
        value, slopes = term if pi is None else test_extremes.with_zeros(term, mpmath.mpf(pi), count)
        return [float(x) for x in (value, *slopes)]


@pytest.mark.parametrize("inflated", [False, True])
@pytest.mark.parametrize("shared", [True, False], ids=["feature", "element"])
def test_whole_segments_of_raw_counts_equal_50_digits(kernels: Kernels, shared: bool, inflated: bool) -> None:
    """Inverse dispersions from 1e-4 to 1e8, counts up to 1e6 and means around them, as in a training step.

    Every second count of a row is 0 and the others are equal, so that each element is one of two.
    """
    form = "zero_inflated_negative_binomial_logits" if inflated else "negative_binomial_logits"
    pi, library = -1.0, torch.tensor([library for _, library in WIDE_ROWS])
    target = torch.zeros(len(WIDE_ROWS), 256)
    target[:, 1::2] = torch.tensor([t for t, _ in WIDE_ROWS]).unsqueeze(1)
    for log_theta in WIDE_LOG_DISPERSIONS:
        params = [torch.full_like(target, 0.75), torch.full((256,) if shared else target.shape, log_theta)]
        params += [torch.full_like(target, pi)] if inflated else []
        _, nll, (by_logit, by_log_theta, *by_pi, by_library), _ = kernels.counts(
            form, [*params, library], target
        )
        pairs = [
            [truth_by_logarithms(t, total / 256, log_theta, pi if inflated else None) for t in (0.0, count)]
            for count, total in WIDE_ROWS
        ]
        want = torch.tensor(pairs, dtype=torch.float64)  # of (row, whether the count is the other one, what)
        bounds = 5e-6 * want.abs()
        if inflated:  # a zero's derivatives are proportional to e^-z: the relative error of z, times z
            for row, (count, total) in enumerate(WIDE_ROWS):
                z = truth_by_logarithms(0.0, total / 256, log_theta, None)[0]
                bounds[row, : 1 if count else 2, 1:] *= 1 + 0.3 * z
        bounds += 2.0**-126  # the hardware's functions flush what is smaller
        message = f"log theta {log_theta}"
        assert ((nll.double() - 128 * want[..., 0].sum(1)).abs() <= 128 * bounds[..., 0].sum(1)).all(), (
            message
        )
        # Where the derivatives of the two kinds of elements cancel, the sums keep the accuracy of their terms.
        by_log_mean, bound = want[..., 1].sum(1), bounds[..., 1].sum(1)
        error = by_library.double() * library.double() - 128 * by_log_mean
        assert (error.abs() <= 128 * bound).all(), message
        error = by_logit.double() - (want[..., 1] - by_log_mean.unsqueeze(1) / 2).repeat(1, 128)
        assert (error.abs() <= bound.unsqueeze(1)).all(), message
        slope, bound = want[..., 2].repeat(1, 128), bounds[..., 2].repeat(1, 128)
        if shared:
            slope, bound = slope.sum(0), bound.sum(0)
        assert ((by_log_theta.double() - slope).abs() <= bound).all(), message
        for gradient in by_pi:
            error = gradient.double() - want[..., 3].repeat(1, 128)
            assert (error.abs() <= bounds[..., 3].repeat(1, 128)).all(), message


# ---------------------------------------------------------------------------------------------------------------------
# Mixtures of Gaussians
# ---------------------------------------------------------------------------------------------------------------------

# Part of a tile, one tile of 16 points and 32 or 64 components, several, and dimensions in one tile or in three.
MIXTURES = ((1, 1, 1), (5, 3, 2), (16, 64, 16), (40, 70, 10), (20, 33, 37), (3, 70, 70))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("form", test_mixture.FORMS)
@pytest.mark.parametrize("weights", test_mixture.WEIGHTS)
@pytest.mark.parametrize("size", MIXTURES, ids=str)
@pytest.mark.parametrize("processors", [1, 3])
def test_gaussian_mixture_equals_the_formula(
    kernels: Kernels,
    size: tuple[int, int, int],
    weights: str,
    form: bool | str,
    dtype: torch.dtype,
    processors: int,
) -> None:
    """Also bit for bit the same in a second call, for which the shim runs the threads in the opposite order."""
    kernels.processors = processors
    inputs = test_mixture.make(size, weights, dtype)
    want = test_mixture.results(test_mixture.formula, [x.double() for x in inputs], form)
    runs = []
    for _ in range(2):
        values = kernels.gaussian_mixture(inputs, joint=form is not True, per_dimension=form is not False)
        generator = torch.Generator().manual_seed(1)  # as for `want`
        pairs = [(value, torch.randn(value.shape, generator=generator).to(value.dtype)) for value in values]
        joint = pairs[0] if form is not True else None
        gradients = kernels.gaussian_mixture_grad(inputs, joint, pairs[-1] if form is not False else None)
        runs.append((*values, *gradients))
    for ours, again, exact in zip(*runs, want, strict=True):
        assert torch.equal(ours, again)
        assert test_mixture.relative_error(ours, exact) < test_mixture.TOLERANCE[dtype]


# ---------------------------------------------------------------------------------------------------------------------
# Its backward
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("in_place", [True, False])
@pytest.mark.parametrize("size", [1, 17, 24, 4099])
@pytest.mark.parametrize("factor", [1.0, 0.125, -3.0])
def test_backward_with_one_factor_scales_all_gradients(
    kernels: Kernels, factor: float, size: int, in_place: bool, dtype: torch.dtype
) -> None:
    gradients = [torch.randn(5, size).to(dtype) for _ in range(2)]
    scaled = [(g.to(row_dtype(g)) * factor).to(dtype) for g in gradients]
    results, *_ = kernels.nll_backward(
        torch.tensor(factor, dtype=row_dtype(gradients[0])),
        None,
        gradients,
        None,
        None,
        None,
        5,
        2,
        in_place=in_place,
    )
    for result, want in zip(results, scaled, strict=True):
        assert torch.equal(result, want)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("in_place", [True, False])
@pytest.mark.parametrize("shape", [(70, 3), (5, 24), (3, 4099)])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_backward_with_factors_per_row_scales_each_row(
    kernels: Kernels, reduction: str, shape: tuple[int, int], in_place: bool, dtype: torch.dtype
) -> None:
    rows = shape[0]
    number = row_dtype(torch.empty(0, dtype=dtype))
    gradient = torch.randn(shape).to(dtype)
    grad_loss = torch.rand(() if reduction != "none" else (rows,), dtype=number)
    grad_nll = torch.rand(rows, dtype=number)
    grad_nll[0] = 0
    if reduction == "none":
        grad_loss[0] = 1  # a row that needs no scaling
    weight = 1 / rows if reduction == "mean" else 1.0
    want = gradient.double() * (grad_loss + grad_nll / weight).double().view(-1, 1)
    for by_loss, by_nll, full in (
        (grad_loss, grad_nll, want),
        (None, grad_nll, gradient.double() * (grad_nll / weight).double().view(-1, 1)),
    ):
        copy = gradient.clone()
        (result,), *_ = kernels.nll_backward(
            by_loss, by_nll, [copy], None, None, None, rows, REDUCTIONS[reduction], in_place=in_place
        )
        close(result, full, {torch.float64: 1e-14, torch.float32: 2e-7}.get(dtype, GRADIENT[dtype]))
        assert in_place or torch.equal(copy, gradient)


@pytest.mark.parametrize("rows", [1, 5, 300, 3000])
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_backward_gradients_of_scalar_kl_and_beta_are_correct(
    kernels: Kernels, dtype: torch.dtype, reduction: str, rows: int
) -> None:
    """The gradients of the scalar, the kl and beta are computed with an elementwise gradient and without one."""
    weight = 1 / rows if reduction == "mean" else 1.0
    grad_loss = torch.randn(() if reduction != "none" else (rows,), dtype=dtype)
    grad_nll, scalar_rows, kl = (torch.randn(rows, dtype=dtype) for _ in range(3))
    beta = torch.tensor(0.25, dtype=torch.bfloat16)
    by_loss = (weight * grad_loss.double()).expand(rows)
    for gradients in ([], [torch.randn(rows, 3, dtype=dtype)]):
        for by_nll in (None, grad_nll):
            _, scalar, by_kl, by_beta = kernels.nll_backward(
                grad_loss,
                by_nll,
                gradients,
                scalar_rows,
                kl,
                beta,
                rows,
                REDUCTIONS[reduction],
                in_place=True,
                need_kl=True,
                need_beta=True,
            )
            total = by_loss + (by_nll.double() if by_nll is not None else 0)
            scale = 1e-5 if dtype == torch.float32 else 1e-12
            assert scalar is not None
            assert by_kl is not None
            assert by_beta is not None
            assert (scalar - (total * scalar_rows).sum()).abs() <= scale * (total * scalar_rows).abs().sum()
            close(by_kl, by_loss * 0.25, scale)
            assert by_beta.dtype == torch.bfloat16
            assert (by_beta - (by_loss * kl).sum()).abs() <= 1e-2 * (by_loss * kl).abs().sum()


@pytest.mark.parametrize("likelihood", ["bernoulli", "gaussian_head"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_nll_gradient_equals_the_reference(
    kernels: Kernels, reduction: str, dtype: torch.dtype, likelihood: str
) -> None:
    """nll_gradient computes the gradient when the factor is known."""
    params, constants = case(likelihood, 4, 24, dtype)
    target = data(4, 24, torch.float32)
    grad_loss = torch.rand(() if reduction != "none" else (4,)) * 1000
    grad_nll = torch.rand(4)
    (gradient,) = kernels.nll_gradient(
        likelihood, params, target, constants, grad_loss, grad_nll, REDUCTIONS[reduction], 1
    )
    (leaf,) = differentiable(*params)
    loss, nll = expected(likelihood, [leaf], target, constants, reduction=REDUCTIONS[reduction])
    torch.autograd.backward((loss, nll), (grad_loss.double(), grad_nll.double()))
    assert leaf.grad is not None
    close(gradient, leaf.grad, GRADIENT[dtype])


# ---------------------------------------------------------------------------------------------------------------------
# The posterior
# ---------------------------------------------------------------------------------------------------------------------


def seed(key: int, offset: int, row_offset: int = 0) -> NoiseSource:
    return NoiseSource(seed=key, offset=offset, row_offset=row_offset)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("size", [1, 4, 7, 20, 129, 1000])
@pytest.mark.parametrize("samples", [None, 3])
def test_noise_equals_the_reference(
    kernels: Kernels, samples: int | None, size: int, dtype: torch.dtype
) -> None:
    """In float64, the agreement shows that the integers equal the reference's."""
    key, offset, row_offset = 0x1234_5678_9ABC_DEF0, 0x7FFF_FFFF_0000_0004, (1 << 33) + 5
    zero = torch.zeros(5, size, dtype=dtype)
    z, _, used = kernels.sample(zero, zero, noise=seed(key, offset, row_offset), samples=samples)
    noise = reference.normal_noise(
        torch.tensor([key, offset]), row_offset, 5, size, samples or 1, torch.float64
    )
    assert used.tolist() == [key, offset]
    error = (z.double().view(noise.shape) - noise).abs().max()
    assert error <= (2e-6 if dtype == torch.float32 else 1e-13)


def test_seed_by_value_tensor_or_pointer_gives_the_same_noise(kernels: Kernels) -> None:
    """By value, from a tensor, and from the addresses that a captured graph reads. Sign bits are ignored."""
    zero = torch.zeros(3, 20)
    key, offset = 77, 1 << 40
    z, _, used = kernels.sample(zero, zero, noise=seed(key, offset))
    assert used.tolist() == [key, offset]
    pair = torch.tensor([key - 2**63, offset - 2**63])
    other, _, used = kernels.sample(zero, zero, noise=NoiseSource(tensor=pointer(pair)))
    assert used.tolist() == [key, offset]
    assert torch.equal(other, z)
    keys, offsets = torch.tensor([key]), torch.tensor([offset - 12])
    captured = NoiseSource(
        seed_pointer=pointer(keys), offset_pointer=pointer(offsets), offset_intragraph=12, captured=True
    )
    other, _, used = kernels.sample(zero, zero, noise=captured)
    assert used.tolist() == [key, offset]
    assert torch.equal(other, z)
    assert not torch.equal(kernels.sample(zero, zero, noise=seed(key, offset + 4))[0], z)


def posterior(shape: tuple[int, ...], dtype: torch.dtype, prior: bool) -> tuple[list[Tensor], list[Tensor]]:
    tensors = [torch.randn(shape).to(dtype) for _ in range(4)]
    return tensors[:2], tensors[2:] if prior else []


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("size", [1, 7, 16, 20, 1000, 2049])
@pytest.mark.parametrize("prior", [False, True])
@pytest.mark.parametrize("samples", [None, 2])
@pytest.mark.parametrize("given", [False, True])
def test_reparameterize_kl_and_its_gradients_equal_the_reference(
    kernels: Kernels, given: bool, samples: int | None, prior: bool, size: int, dtype: torch.dtype
) -> None:
    shape = (3, size)
    q, p = posterior(shape, dtype, prior)
    z_shape = shape if samples is None else (samples, *shape)
    pair = torch.tensor([5, 8])
    eps = torch.randn(z_shape).to(dtype) if given else None
    noise = NoiseSource(tensor=pointer(pair), row_offset=9)
    z, kl, used = kernels.sample(*q, p or None, noise=noise, eps=eps, samples=samples)

    leaves = differentiable(*q, *p, *([eps] if eps is not None else []))
    full_z, full_kl = reference.reparameterize_kl(
        *leaves[: 2 + len(p)], samples=samples, seed=pair, row_offset=9, eps=leaves[-1] if given else None
    )
    close(kl, full_kl.detach(), VALUE[dtype])
    near = {torch.float32: 5e-6, torch.float64: 1e-13}.get(dtype, GRADIENT[dtype])
    close(z, full_z.detach(), near)

    grad_z, grad_kl = torch.randn(z_shape).to(dtype), torch.randn(3, dtype=row_dtype(z))
    torch.autograd.backward((full_z, full_kl), (grad_z.double(), grad_kl.double()))
    noise = NoiseSource(tensor=pointer(used), row_offset=9)
    gradients = kernels.sample_grad(grad_z, grad_kl, *q, p or None, noise=noise, eps=eps, samples=samples)
    for gradient, leaf in zip(gradients, leaves, strict=True):
        assert leaf.grad is not None
        close(gradient, leaf.grad, GRADIENT[dtype], least=1.0)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("size", [5, 64])
@pytest.mark.parametrize("prior", [False, True])
@pytest.mark.parametrize("per_element", [False, True])
def test_gaussian_kl_equals_the_reference(
    kernels: Kernels, per_element: bool, prior: bool, size: int, dtype: torch.dtype
) -> None:
    q, p = posterior((5, size), dtype, prior)
    kl = kernels.kl(*q, p or None, per_element=per_element)
    leaves = differentiable(*q, *p)
    full = reference.gaussian_kl(*leaves, reduction="none" if per_element else "event")
    close(kl, full.detach(), VALUE[dtype])
    grad = torch.randn(full.shape, dtype=kl.dtype)
    full.backward(grad.double())
    gradients = kernels.sample_grad(None, grad, *q, p or None, per_element=per_element)
    for gradient, leaf in zip(gradients, leaves, strict=True):
        assert leaf.grad is not None
        close(gradient, leaf.grad, GRADIENT[dtype], least=1.0)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("size", [7, 64])
@pytest.mark.parametrize("prior", [False, True])
@pytest.mark.parametrize("name", FORMS)
def test_forms_of_the_scale_equal_the_formula(
    kernels: Kernels, name: str, prior: bool, size: int, dtype: torch.dtype
) -> None:
    shape, form = (3, size), FORMS[name]
    q, p = posterior(shape, dtype, prior)
    eps = torch.randn(shape).to(dtype)
    z, kl, _ = kernels.sample(*q, p or None, eps=eps, form=form.kernel)
    leaves = differentiable(*q, *p, eps)
    balance, weights = (0.8, (0.2, 0.8)) if prior else (None, (1.0, 1.0))
    full_z, full_kl = posterior_forms.formula(form, leaves[0], leaves[1], leaves[2:-1], leaves[-1], balance)
    close(kl, full_kl.detach().sum(1), VALUE[dtype])
    near = {torch.float32: 5e-6, torch.float64: 1e-13}.get(dtype, GRADIENT[dtype])
    close(z, full_z.detach(), near, least=1.0)
    close(kernels.kl(*q, p or None, per_element=True, form=form.kernel), full_kl.detach(), 1e-5, least=1.0)

    grad_z, grad_kl = torch.randn(shape).to(dtype), torch.randn(3, dtype=row_dtype(z))
    torch.autograd.backward((full_z, full_kl.sum(1)), (grad_z.double(), grad_kl.double()))
    gradients = kernels.sample_grad(
        grad_z, grad_kl, *q, p or None, eps=eps, form=form.kernel, weights=weights
    )
    for gradient, leaf in zip(gradients, leaves, strict=True):
        assert leaf.grad is not None
        close(gradient, leaf.grad, 2 * GRADIENT[dtype], least=1.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", FORMS)
def test_forms_of_the_scale_at_their_ends_equal_the_formula(
    kernels: Kernels, name: str, dtype: torch.dtype
) -> None:
    def kl_and_gradient(mu: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        kl = kernels.kl(mu, v, form=FORMS[name].kernel)
        return kl, kernels.sample_grad(None, torch.ones_like(kl), mu, v, form=FORMS[name].kernel)[1]

    test_posteriors.check_ends(name, dtype, "cpu", kl_and_gradient)


def test_gaussian_kl_near_collapse_is_accurate(kernels: Kernels) -> None:
    """The inputs are so close to the prior that the textbook formula has no correct digit."""
    for small in (1e-2, 1e-4, 1e-6):
        mu, logvar = torch.zeros(2, 64), torch.randn(2, 64) * small
        close(kernels.kl(mu, logvar), reference.gaussian_kl(mu.double(), logvar.double()), 5e-6)
    for v in (-80.0, 80.0):
        logvar = torch.full((1, 1), v)
        close(
            kernels.kl(torch.zeros(1, 1), logvar),
            reference.gaussian_kl(logvar.double() * 0, logvar.double()),
            5e-6,
        )


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("prior", [False, True])
def test_the_kl_of_the_grid_of_extremes(kernels: Kernels, prior: bool, dtype: torch.dtype) -> None:
    points, want = test_extremes.kl_grid(dtype, prior)
    mu, logvar, *p = points.split(1, 1)
    kl = kernels.kl(mu, logvar, p or None)
    slopes = kernels.sample_grad(None, torch.ones_like(kl), mu, logvar, p or None)
    test_extremes.check_kl(points, want, kl, [slope.flatten() for slope in slopes])


@pytest.mark.parametrize("processors", [1, 3])
@pytest.mark.parametrize(
    ("rows", "size", "samples"), [(70, 5, None), (2, 3000, None), (2, 20, 40), (3, 2001, 5)]
)
def test_reparameterize_kl_with_any_partition_equals_the_reference(
    kernels: Kernels, rows: int, size: int, samples: int | None, processors: int
) -> None:
    """The work of each block, and the sums that blocks share, give the same result on any device."""
    mu, logvar = torch.randn(2, rows, size)
    z, _, _ = kernels.sample(mu, logvar, noise=seed(3, 4), samples=samples)
    kernels.processors = processors
    other, other_kl, _ = kernels.sample(mu, logvar, noise=seed(3, 4), samples=samples)
    assert torch.equal(z, other)
    close(other_kl, reference.gaussian_kl(mu.double(), logvar.double()), 5e-6)
    assert torch.equal(kernels.sample(mu, logvar, noise=seed(3, 4), samples=samples)[1], other_kl)
    noise = reference.normal_noise(torch.tensor([3, 4]), 0, rows, size, samples or 1, torch.float64)
    close(z.view(-1, rows, size), mu + torch.exp(logvar.double() / 2) * noise, 5e-6)


def test_reparameterize_kl_backward_accepts_missing_gradients(kernels: Kernels) -> None:
    q, _ = posterior((3, 20), torch.float32, False)
    used = torch.tensor([1, 2])
    noise = NoiseSource(tensor=pointer(used))
    by_z, by_kl = torch.randn(3, 20), torch.randn(3)
    both = kernels.sample_grad(by_z, by_kl, *q, noise=noise)
    noise = NoiseSource(tensor=pointer(used))
    first = kernels.sample_grad(by_z, None, *q, noise=noise)
    second = kernels.sample_grad(None, by_kl, *q)
    for a, b, c in zip(first, second, both, strict=True):
        torch.testing.assert_close(a + b, c, rtol=1e-5, atol=1e-6)


# ---------------------------------------------------------------------------------------------------------------------
# Sizes that are too large to run here
# ---------------------------------------------------------------------------------------------------------------------

EDGES = (0, 1, 3, 31, 33, 784, 4099, 65536, 2**20 + 1, 2**31, 2**33 + 3)


@pytest.mark.parametrize("slots", [1, 4, 132 * 4])
@pytest.mark.parametrize(("unit", "unroll"), [(1, 4), (4, 2), (8, 1)])
def test_work_items_cover_every_element_once(kernels: Kernels, unit: int, unroll: int, slots: int) -> None:
    for rows in EDGES:
        for size in EDGES:
            if rows * size > 2**40:
                continue  # more than fits into memory
            plan = kernels.plan(rows, size, unit, unroll, slots)
            assert plan.lanes == 1 << plan.lanes_log2 <= THREADS
            assert 1 <= plan.blocks <= max(1, min(plan.items, 8 * slots))
            if plan.splits == 1:
                assert plan.items == -(-rows // (THREADS // plan.lanes))
                assert rows == 0 or size <= 2**30
            else:
                assert plan.lanes == THREADS
                assert plan.blocks <= plan.items == rows * plan.splits < 2**32
                assert plan.split_size <= 2**30
                assert plan.split_size % (THREADS * unit * unroll) == 0
                assert (plan.splits - 1) * plan.split_size < size <= plan.splits * plan.split_size


def test_run_offsets_equal_exact_division(kernels: Kernels) -> None:
    """The division by multiplication is exact."""
    for run in (1, 2, 3, 5, 7, 64, 1000, 2**20 - 1, 2**20, 2**24 + 1):
        multiples = [k * run + d for k in (1, 2, 3, 1000, 2**17 + 1) for d in (-1, 0, 1)]
        for i in (0, 1, 2, run // 2, *multiples, 2**31 - 1, 2**31, 2**33 + 5, 2**36 - 1):
            if i * run >= 2**63:
                continue  # the documented limit
            assert kernels.place(i, run, 2 * run) == i // run * 2 * run + i % run, (i, run)
            assert kernels.place(i, run, 0) == i
