"""gaussian_mixture_log_prob against formulas in float64, torch.distributions and the limits at extreme numbers."""

import math
import os
import re
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import cases
import pytest
import torch
from cases import DTYPES
from test_repeatability import on_threads
from torch import Tensor
from torch.distributions import Categorical, Independent, MixtureSameFamily, Normal

import fastvae
from fastvae import functional
from fastvae.functional import gaussian_mixture_log_prob

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
FORMS: tuple[bool | str, ...] = (False, True, "both")
WEIGHTS = ("equal", "shared", "of_rows")
# (points, components, dimensions): one of each, partial groups and tiles, many of each, no dimension, no point.
# The interpreter of Triton takes a millisecond for every dimension of a tile.
LONG = (3, 100, 4) if INTERPRETED else (3, 300, 17)
SIZES = [(1, 1, 1), (5, 3, 2), (6, 70, 3), (33, 130, 5), LONG, (3, 20, 0), (0, 3, 2)]
INF = math.inf


def make(size: tuple[int, int, int], weights: str, dtype: torch.dtype) -> list[Tensor]:
    """z, mu, logvar and perhaps log-weights."""
    points, components, dims = size
    generator = torch.Generator().manual_seed(points + 7 * components + 31 * dims)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    inputs = [normal(points, dims), normal(components, dims), normal(components, dims)]
    if weights != "equal":
        inputs.append(normal(points, components) if weights == "of_rows" else normal(components))
    return inputs


def formula(
    z: Tensor, mu: Tensor, logvar: Tensor, log_weight: Tensor | None = None, *, per_dimension: bool | str
) -> Any:
    components = mu.shape[0]
    if log_weight is None:
        log_weight = mu.new_full((components,), -math.log(components))
    elements = Normal(mu, torch.exp(logvar / 2)).log_prob(z.unsqueeze(1))
    joint = torch.logsumexp(elements.sum(2) + log_weight, 1)
    each = torch.logsumexp(elements + log_weight.unsqueeze(-1), 1)
    return (joint, each) if per_dimension == "both" else each if per_dimension else joint


def results(function: Callable[..., Any], inputs: list[Tensor], form: bool | str) -> tuple[Tensor, ...]:
    """The values, and the gradients of a random combination of them."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    out = function(*leaves, per_dimension=form)
    values = out if isinstance(out, tuple) else (out,)
    generator = torch.Generator().manual_seed(1)
    factors = [
        torch.randn(value.shape, generator=generator).to(value.device, value.dtype) for value in values
    ]
    return *(value.detach() for value in values), *torch.autograd.grad(values, leaves, factors)


def relative_error(got: Tensor, want: Tensor) -> Tensor:
    if want.numel() == 0:
        return torch.zeros(())
    return (got.double() - want).abs().max() / (1 + want.abs().max())


TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12, torch.float16: 2e-3, torch.bfloat16: 2e-2}


@pytest.mark.parametrize("dtype", DTYPES, ids=cases.ids)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("size", SIZES, ids=cases.ids)
def test_values_and_gradients_equal_the_formula(
    backend: str, size: tuple[int, int, int], weights: str, form: bool | str, dtype: torch.dtype
) -> None:
    inputs = make(size, weights, dtype)
    got = results(gaussian_mixture_log_prob, inputs, form)
    want = results(formula, [x.double() for x in inputs], form)
    row_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    assert {value.dtype for value in got[: -len(inputs)]} == {row_dtype}
    assert {gradient.dtype for gradient in got[-len(inputs) :]} == {dtype}
    for ours, exact in zip(got, want, strict=True):
        assert ours.shape == exact.shape
        assert relative_error(ours, exact) < TOLERANCE[dtype]


def test_every_instruction_set_equals_the_formula(on_capability: Callable[[str], str]) -> None:
    script = f"""
import sys
sys.path[:0] = {sys.path!r}
from test_mixture import *
fastvae.set_backend("native")
for dtype in (torch.float32, torch.float64):
    for form in FORMS:
        inputs = make((7, 70, 3), "of_rows", dtype)
        got = results(gaussian_mixture_log_prob, inputs, form)
        want = results(formula, [x.double() for x in inputs], form)
        assert all(relative_error(a, b) < TOLERANCE[dtype] for a, b in zip(got, want, strict=True))
"""
    on_capability(script)


def test_joint_equals_mixture_same_family(backend: str) -> None:
    z, mu, logvar, log_weight = make((40, 30, 6), "shared", torch.float64)
    want = MixtureSameFamily(
        Categorical(logits=log_weight), Independent(Normal(mu, torch.exp(logvar / 2)), 1)
    ).log_prob(z)
    got = gaussian_mixture_log_prob(z, mu, logvar, log_weight.log_softmax(0))
    torch.testing.assert_close(got, want, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("weights", WEIGHTS)
def test_gradcheck(backend: str, weights: str, form: bool | str) -> None:
    size = (2, 3, 2) if INTERPRETED else (5, 7, 3)  # the interpreter takes a millisecond for a launch
    inputs = [x.requires_grad_() for x in make(size, weights, torch.float64)]
    assert torch.autograd.gradcheck(
        lambda *x: gaussian_mixture_log_prob(*x, per_dimension=form), inputs, eps=1e-6, atol=1e-7
    )


def test_second_derivative_of_the_reference_passes_gradgradcheck() -> None:
    inputs = [x.requires_grad_() for x in make((3, 4, 2), "of_rows", torch.float64)]
    with fastvae.use_backend("reference"):
        assert torch.autograd.gradgradcheck(
            lambda *x: gaussian_mixture_log_prob(*x, per_dimension="both"), inputs
        )


def test_second_derivative_of_a_kernel_raises(native: None) -> None:
    z, mu, logvar = (x.requires_grad_() for x in make((3, 4, 2), "equal", torch.float32))
    (gradient,) = torch.autograd.grad(gaussian_mixture_log_prob(z, mu, logvar).sum(), z, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        gradient.sum().backward()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("log_variance", "spread"), [(-27.6, 1e-6), (27.6, 1e6), (-27.6, 1.0), (0.0, 1e4)], ids=cases.ids
)
def test_extreme_variances_and_distances_are_accurate(
    backend: str, log_variance: float, spread: float, form: bool | str
) -> None:
    """Variances 1e-12 and 1e12, and components far apart. Distances from the nearest component are exact in float32, as
    means are 0 or powers of 2. (A matrix product in place of differences would have no correct digit.)"""
    z, mu, logvar = make((6, 40, 3), "equal", torch.float32)
    mu = torch.where(mu > 0, 2.0 ** torch.round(4 * mu), 0.0) * spread
    z = mu[:6] + z * math.exp(log_variance / 2)
    logvar = torch.full_like(logvar, log_variance) + logvar / 4
    got = results(gaussian_mixture_log_prob, [z, mu, logvar], form)
    want = results(formula, [x.double() for x in (z, mu, logvar)], form)
    for ours, exact in zip(got, want, strict=True):
        assert relative_error(ours, exact) < 3e-5


def test_equal_components_share_the_gradient(backend: str) -> None:
    z, mu, logvar = make((4, 1, 3), "equal", torch.float64)
    one = results(gaussian_mixture_log_prob, [z, mu, logvar], "both")
    many = results(gaussian_mixture_log_prob, [z, mu.repeat(50, 1), logvar.repeat(50, 1)], "both")
    for a, b in zip(one[:3], many[:3], strict=True):
        torch.testing.assert_close(a, b)
    for a, b in zip(one[3:], many[3:], strict=True):
        torch.testing.assert_close(a.expand_as(b) / 50, b)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=cases.ids)
@pytest.mark.parametrize("weights", ["shared", "of_rows"])
def test_components_with_weight_zero_or_infinite_distance_count_for_nothing(
    backend: str, weights: str, dtype: torch.dtype, form: bool | str
) -> None:
    points, reachable, dims = 5, 6, 3
    inputs = make((points, reachable + 3, dims), weights, dtype)
    z, mu, logvar, log_weight = inputs
    log_weight[..., 0] = -INF
    mu[1] = INF
    mu[2], logvar[2] = 1e30, -60.0  # its squares overflow in float32, or give densities that round to 0
    got = results(gaussian_mixture_log_prob, inputs, form)
    kept = results(gaussian_mixture_log_prob, [z, mu[3:], logvar[3:], log_weight[..., 3:]], form)
    values = 2 if form == "both" else 1
    for ours, want in zip(got[: values + 1], kept[: values + 1], strict=True):
        torch.testing.assert_close(ours, want)
    for ours, want in zip(got[values + 1 : values + 3], kept[values + 1 : values + 3], strict=True):
        torch.testing.assert_close(ours[3:], want)
        assert torch.equal(ours[:3], torch.zeros_like(ours[:3]))
    torch.testing.assert_close(got[-1][..., 3:], kept[-1])
    assert torch.equal(got[-1][..., :3], torch.zeros_like(got[-1][..., :3]))


@pytest.mark.parametrize("form", FORMS)
def test_point_that_no_component_reaches_has_no_density_and_no_gradient(
    backend: str, form: bool | str
) -> None:
    z, mu, logvar = make((6, 5, 2), "equal", torch.float32)
    want = results(gaussian_mixture_log_prob, [z[1:], mu, logvar], False)[0]
    z[0] = INF
    got = results(gaussian_mixture_log_prob, [z, mu, logvar], form)
    assert torch.equal(got[0][0], torch.full_like(got[0][0], -INF))
    if form is not True:
        torch.testing.assert_close(got[0][1:], want)
    assert all(gradient.isfinite().all() for gradient in got[-3:])
    assert torch.equal(got[-3][0], torch.zeros(2))
    nothing = results(gaussian_mixture_log_prob, [z[1:], mu, logvar, torch.full((5,), -INF)], form)
    assert all((value == -INF).all() for value in nothing[:-4])
    assert all(torch.equal(gradient, torch.zeros_like(gradient)) for gradient in nothing[-4:])


def test_component_without_variance_has_the_limits(backend: str) -> None:
    z = torch.tensor([[1.0, 2.0], [1.0, 3.0]])
    mu, logvar = torch.tensor([[1.0, 2.0], [0.0, 0.0]]), torch.tensor([[-INF, -INF], [0.0, 0.0]])
    joint, each = gaussian_mixture_log_prob(z, mu, logvar, per_dimension="both")
    other = formula(z.double(), mu[1:].double(), logvar[1:].double(), per_dimension="both")
    assert torch.equal(each[:, 0], torch.full((2,), INF))
    assert joint[0] == each[0, 1] == INF
    torch.testing.assert_close(joint[1].double(), other[0][1] - math.log(2))
    torch.testing.assert_close(each[1, 1].double(), other[1][1, 1] - math.log(2))


@pytest.mark.parametrize("form", FORMS)
def test_nan_affects_only_its_row(backend: str, form: bool | str) -> None:
    z, mu, logvar = make((6, 40, 2), "equal", torch.float32)
    want = results(gaussian_mixture_log_prob, [z, mu, logvar], form)
    z[2] = math.nan
    got = results(gaussian_mixture_log_prob, [z, mu, logvar], form)
    others = [0, 1, 3, 4, 5]
    for ours, clean in zip(got[:-2], want[:-2], strict=True):
        assert ours[2].isnan().all()
        assert torch.equal(ours[others], clean[others])


@pytest.mark.skipif(INTERPRETED, reason="the interpreter would take minutes")
def test_many_components_are_summed_accurately(native: None) -> None:
    z, mu, logvar = make((3, 100_000, 2), "equal", torch.float32)
    got = results(gaussian_mixture_log_prob, [z, mu, logvar], "both")
    want = results(formula, [x.double() for x in (z, mu, logvar)], "both")
    for ours, exact in zip(got, want, strict=True):
        assert relative_error(ours, exact) < 1e-6


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("weights", ["shared", "of_rows"])
@pytest.mark.parametrize("size", [(300, 129, 9), (5, 2000, 3)], ids=cases.ids)
def test_the_same_bits_at_any_thread_count(
    native: None, threads: None, size: tuple[int, int, int], weights: str, form: bool | str
) -> None:
    inputs = make(size, weights, torch.float32)
    on_threads(lambda: list(results(gaussian_mixture_log_prob, inputs, form)))


def test_both_forms_equal_each_alone(native: None) -> None:
    inputs = make((40, 70, 5), "of_rows", torch.float32)
    joint, each = gaussian_mixture_log_prob(*inputs, per_dimension="both")
    torch.testing.assert_close(joint, gaussian_mixture_log_prob(*inputs), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(each, gaussian_mixture_log_prob(*inputs, per_dimension=True))


def test_gradient_of_one_form_of_both_is_that_of_the_form(backend: str) -> None:
    """The other output has no gradient then, instead of one of zeros."""
    inputs = [x.requires_grad_() for x in make((8, 9, 3), "shared", torch.float64)]
    both = gaussian_mixture_log_prob(*inputs, per_dimension="both")
    for form, value in ((False, both[0]), (True, both[1])):
        alone = gaussian_mixture_log_prob(*inputs, per_dimension=form)
        for a, b in zip(
            torch.autograd.grad(value.sum(), inputs, retain_graph=True),
            torch.autograd.grad(alone.sum(), inputs),
            strict=True,
        ):
            torch.testing.assert_close(a, b)


def test_strided_and_expanded_arguments_equal_copies(backend: str) -> None:
    z, mu, logvar, log_weight = make((6, 9, 4), "shared", torch.float64)
    head = torch.cat([mu, logvar], 1)
    views = [z.t().contiguous().t(), *head.chunk(2, 1), log_weight.expand(6, 9)]
    got, want = (results_of_views(x) for x in (views, [z, mu, logvar, log_weight.repeat(6, 1)]))
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)
    versions = [view._version for view in views]
    gaussian_mixture_log_prob(*views)
    assert versions == [view._version for view in views]


def results_of_views(inputs: list[Tensor]) -> tuple[Tensor, ...]:
    leaves = [x.detach().requires_grad_() for x in inputs]  # keeps the strides
    value = gaussian_mixture_log_prob(*leaves)
    return value, *torch.autograd.grad(value.sum(), leaves)


def test_compiled_is_one_graph_for_every_size(backend: str) -> None:
    if backend == "triton":
        pytest.skip("the interpreter's kernels cannot be compiled")
    torch._dynamo.reset()

    @torch.compile(fullgraph=True, dynamic=True, backend="aot_eager_decomp_partition")
    def loss(*inputs: Tensor) -> Tensor:
        joint, each = gaussian_mixture_log_prob(*inputs, per_dimension="both")
        return joint.sum() + each.square().sum()

    for size in ((4, 6, 3), (5, 9, 3)):
        leaves = [x.requires_grad_() for x in make(size, "of_rows", torch.float32)]
        got = torch.autograd.grad(loss(*leaves), leaves)
        joint, each = gaussian_mixture_log_prob(*leaves, per_dimension="both")
        want = torch.autograd.grad(joint.sum() + each.square().sum(), leaves)
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b)


def test_peak_memory_is_far_below_one_tensor_of_all_elements() -> None:
    """The broadcast formula keeps several tensors of 134 MB here. This counts what kernels allocate themselves, too."""
    script = """
import resource, torch, fastvae
from fastvae.functional import gaussian_mixture_log_prob

def step(n):
    z, mu, logvar = (torch.randn(n, 32).requires_grad_() for _ in range(3))
    joint, each = gaussian_mixture_log_prob(z, mu, logvar, per_dimension="both")
    (joint.sum() + each.sum()).backward()

fastvae.set_backend("native")
torch.set_num_threads(1)
step(8)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
step(1024)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 20_000  # KiB


Z, MU = torch.zeros(4, 3), torch.zeros(5, 3)
WRONG: dict[str, tuple[Callable[[], object], type[Exception], str]] = {
    "rank": (
        lambda: gaussian_mixture_log_prob(torch.zeros(4, 3, 2), MU, MU),
        ValueError,
        "`z` must have shape (B, D), got (4, 3, 2); did you mean z.flatten(1)?",
    ),
    "no components": (
        lambda: gaussian_mixture_log_prob(Z, MU[:0], MU[:0]),
        ValueError,
        "`mu` must have at least one component, got shape (0, 3)",
    ),
    "dimensions": (
        lambda: gaussian_mixture_log_prob(Z, MU[:, :2], MU[:, :2]),
        ValueError,
        "`mu` must have shape (M, 3) for `z` (4, 3), got (5, 2)",
    ),
    "logvar": (
        lambda: gaussian_mixture_log_prob(Z, MU, MU[0]),
        ValueError,
        "`logvar` must have the shape of `mu` (5, 3), got (3,); did you mean logvar.expand_as(mu)?",
    ),
    "dtype": (
        lambda: gaussian_mixture_log_prob(Z, MU.double(), MU.double()),
        TypeError,
        "`mu` must be float32, like `z`, got float64; did you mean mu.to(z.dtype)?",
    ),
    "device": (
        lambda: gaussian_mixture_log_prob(Z, MU.to("meta"), MU.to("meta")),
        ValueError,
        "`mu` must be on the device of `z`, cpu, got meta; did you mean mu.to(z.device)?",
    ),
    "weights": (
        lambda: gaussian_mixture_log_prob(Z, MU, MU, torch.zeros(4)),
        ValueError,
        "`log_weight` must have shape (5,) or (4, 5) for `z` (4, 3) and `mu` (5, 3), got (4,)",
    ),
    "form": (
        lambda: gaussian_mixture_log_prob(Z, MU, MU, per_dimension="each"),  # type: ignore[call-overload]
        ValueError,
        "`per_dimension` must be one of False, True, 'both', got 'each'",
    ),
    "sum": (
        lambda: gaussian_mixture_log_prob(Z, MU, MU, torch.zeros(4, 5), validate=True),
        ValueError,
        "the exponentials of `log_weight` must sum to 1, got 5 in row 0; did you mean log_weight.log_softmax(-1)?",
    ),
    "not a tensor": (
        lambda: gaussian_mixture_log_prob(Z, None, MU),  # type: ignore[call-overload]
        TypeError,
        "`mu` must be a Tensor, got NoneType",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_argument_raises(backend: str, name: str) -> None:
    call, kind, message = WRONG[name]
    with pytest.raises(kind, match=re.escape(f"fastvae.gaussian_mixture_log_prob: {message}")):
        call()


def test_validate_accepts_weights_that_sum_to_1(backend: str) -> None:
    weights = torch.randn(4, 5).log_softmax(1)
    functional.gaussian_mixture_log_prob(Z, MU, MU, weights, validate=True)
    functional.gaussian_mixture_log_prob(Z, MU, MU, validate=True)
