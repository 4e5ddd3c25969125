"""The Triton backend: the same tests on a GPU and, without one, in Triton's slow interpreter.

The interpreter must be enabled before the first import of Triton: TRITON_INTERPRET=1 pytest tests/backends/triton.
Without this variable and without a GPU, this file starts itself with it, in two processes, together with the tests of
core files below that take a backend. test_triton_aot.py tests the compiled kernels
without a GPU.
"""

import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import cases
import posterior_forms
import pytest
import test_count_elements
import test_counts
import test_discretized
import test_extremes as ends
import test_log_probs
import test_mixture
import test_multinomial
import test_posteriors
import test_weight
import torch
from cases import CASES, DTYPES, GRADIENT_TOLERANCE, VALUE_TOLERANCE, Case, Inputs, Result
from conftest import INTERPRETED
from test_autograd import OBJECTIVES, elbo_inputs, formula, make_elbo
from test_autograd_features import TWICE
from test_compile import CALLS, CHECKS, OPS, skip_what_cannot_be_traced
from test_noise import NOISE_TOLERANCE, PLACES, by_hand
from test_values import WITH_TARGET, check, check_gradient
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

import fastvae
from fastvae import functional, reference
from fastvae._spec import Variant
from fastvae.backends.base import CPU_OPS

GPU = torch.cuda.is_available() and not INTERPRETED
HERE = GPU or INTERPRETED
on_gpu = pytest.mark.skipif(not GPU, reason="only a GPU can show this")


@pytest.mark.skipif(HERE, reason="this process runs them itself")
@pytest.mark.parametrize("shard", ["0/2", "1/2"])
def test_device_tests_pass_in_the_interpreter(shard: str, which_tests: list[str]) -> None:
    tests = Path(__file__).parents[2]
    core = ("test_autograd", "test_autograd_features", "test_draws", "test_mixture")
    files = [
        *(str(tests / f"backends/triton/{name}.py") for name in ("test_triton", "test_triton_counts")),
        *(str(tests / f"core/{name}.py") for name in core),
    ]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-k", "triton", "--shard", shard, *which_tests, *files],
        cwd=tests.parent,
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=1800,
    )
    print(done.stdout[-10000:])
    assert done.returncode == 0, done.stderr


@pytest.fixture
def device() -> Iterator[torch.device]:
    """The GPU, or the CPU if the interpreter runs the kernels. If there is neither, conftest.py deselects the test."""
    with fastvae.use_backend("triton"):
        yield torch.device("cuda" if GPU else "cpu")


def move(inputs: Inputs, device: torch.device) -> Inputs:
    return {name: x.to(device) for name, x in inputs.items()}


# ---------------------------------------------------------------------------------------------------------------------
# Values and gradients, compared with the formulas in float64
# ---------------------------------------------------------------------------------------------------------------------

# One element, less than a vector, one more or less than a vector, a few tiles, several dimensions, rank 1, and empty.
SHAPES = [(3, 1), (4, 7), (2, 15), (5, 17), (2, 1000), (2, 4099), (2, 3, 8, 8), (5,), (0, 5), (3, 0)]


@pytest.mark.parametrize("dtype", DTYPES, ids=cases.ids)
@pytest.mark.parametrize("shape", SHAPES, ids=cases.ids)
@pytest.mark.parametrize("case", CASES, ids=cases.ids)
def test_values_and_gradients_equal_the_formula(
    device: torch.device, case: Case, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    if len(shape) < case.min_rank:
        shape = (*shape, 1)
    inputs = move(cases.cast(case.inputs(shape), dtype), device)
    got = cases.run(case, functional, inputs)
    check(got, cases.exact(case, inputs), dtype)
    for name, gradient in got.gradients.items():
        assert gradient.dtype == inputs[name].dtype


@pytest.mark.parametrize("case", CASES, ids=cases.ids)
def test_against_the_reference(device: torch.device, case: Case) -> None:
    """Switching backends does not change results."""
    inputs = move(cases.cast(case.inputs((6, 3, 7, 5)), torch.float32), device)
    got, want = cases.run(case, functional, inputs), cases.run(case, reference, inputs)
    scale = cases.exact(case, inputs).scale
    exact = Result(want.value.double(), scale, {n: g.double() for n, g in want.gradients.items()})
    check(got, exact, torch.float32)


@pytest.mark.parametrize("dtype", DTYPES, ids=cases.ids)
@pytest.mark.parametrize("form", test_mixture.FORMS)
@pytest.mark.parametrize("weights", test_mixture.WEIGHTS)
def test_gaussian_mixture_equals_the_formula(
    device: torch.device, weights: str, form: bool | str, dtype: torch.dtype
) -> None:
    size = (500, 300, 20) if GPU else (20, 70, 3)
    inputs = [x.to(device) for x in test_mixture.make(size, weights, dtype)]
    got = test_mixture.results(functional.gaussian_mixture_log_prob, inputs, form)
    want = test_mixture.results(test_mixture.formula, [x.double() for x in inputs], form)
    for ours, exact in zip(got, want, strict=True):
        assert ours.shape == exact.shape
        assert test_mixture.relative_error(ours, exact) < test_mixture.TOLERANCE[dtype]


# components (0: no mixture), channels, pixels
# The tiles of the interpreter are smaller, and each is slow.
IMAGE = (16, 24) if GPU else (6, 10)
LINE = (33,) if GPU else (9,)
DISCRETIZED = [(0, 3, IMAGE), (3, 3, IMAGE), (10, 3, LINE), (3, 1, (7, 5)), (2, 3, ())]


@pytest.mark.parametrize("dtype", DTYPES, ids=cases.ids)
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize(("components", "channels", "pixels"), DISCRETIZED, ids=cases.ids)
def test_discretized_nll_equals_the_formula(
    device: torch.device,
    components: int,
    channels: int,
    pixels: tuple[int, ...],
    channels_last: bool,
    dtype: torch.dtype,
) -> None:
    """Compared with the reference in float64, which test_discretized.py compares with published values."""
    params, target = test_discretized.make(components, channels, (3, *pixels))
    params, target = params.to(device, dtype), target.to(device)
    if channels_last and len(pixels) == 2:
        params = params.contiguous(memory_format=torch.channels_last)
    got = test_discretized.value_and_gradient(functional, params, target, components)
    want = test_discretized.value_and_gradient(reference, params.double(), target, components)
    _, eager_gradient = test_discretized.value_and_gradient(reference, params, target, components)
    test_discretized.check(got, want, dtype, eager_gradient)


@pytest.mark.parametrize("shift", test_discretized.SHIFTS)
@pytest.mark.parametrize(("components", "channels"), [(5, 1), (3, 3)])
def test_mixture_nll_of_large_logits_is_accurate(
    device: torch.device, components: int, channels: int, shift: float
) -> None:
    params, target = (x.to(device) for x in test_discretized.large_logits(components, channels, shift))
    got = test_discretized.value_and_gradient(functional, params, target, components)
    want = test_discretized.value_and_gradient(reference, params.double(), target, components)
    test_discretized.check(got, want, torch.float32)


@pytest.mark.parametrize("dtype", DTYPES, ids=cases.ids)
@pytest.mark.parametrize("shape", [(3, 4, 5000), (4, 3, 33), (5, 7)], ids=cases.ids)
@pytest.mark.parametrize("weights", [None, 0.25], ids=["mean", "rows"])
def test_categorical_nll_equals_cross_entropy(
    device: torch.device, shape: tuple[int, ...], weights: float | None, dtype: torch.dtype
) -> None:
    """Compared with the reference in float64: ignored positions, confident predictions, and a factor for each row."""
    logits = 3 * torch.randn(shape)
    target = torch.randint(shape[-1], shape[:-1])
    target[0] = -7
    logits[-1, ..., 0], target[-1] = 40.0, 0
    params, target = logits.to(device, dtype).requires_grad_(), target.to(device)
    exact = params.detach().double().requires_grad_()
    nll = functional.categorical_nll(params, target, ignore_index=-7)
    want = reference.categorical_nll(exact, target, ignore_index=-7)
    factors = torch.arange(1.0, shape[0] + 1, device=device)
    for value, leaf in ((nll, params), (want, exact)):
        (value.mean() if weights is None else (value * (weights * factors).to(value.dtype)).sum()).backward()
        assert leaf.grad is not None
    tolerance = 1e-12 if dtype == torch.float64 else 5e-6
    assert torch.allclose(nll.double(), want, rtol=tolerance, atol=1e-13)  # 1 is all that the reference keeps
    assert nll[0] == 0
    assert params.grad[0].count_nonzero() == 0  # type: ignore[index]
    rough = {torch.float64: 1e-12, torch.float32: 5e-6, torch.float16: 1e-3, torch.bfloat16: 1e-2}[dtype]
    assert (params.grad.double() - exact.grad).abs().max() <= rough * exact.grad.abs().max()  # type: ignore[union-attr, operator]


def test_empty_gene_with_a_large_mean_is_accurate(device: torch.device) -> None:
    """-log p(0) is -log sigmoid(pi), because e^-mean is 0.

    Only a GPU contracts a product and a difference into one operation, which once left the rounding error of the mean
    where 1 was meant.
    """
    mean = torch.tensor([[100.3, 3333.3, 123456.7, 1e7 / 3]], device=device)
    pi = torch.tensor([[0.5, -1.0, 2.0, -3.0]], device=device)
    theta = torch.full_like(mean, 1e8)
    nll = functional.zero_inflated_negative_binomial_nll(
        mean, torch.zeros_like(mean), theta, pi, reduction="none"
    )
    test_counts.close(nll, torch.nn.functional.softplus(-pi.double()), 1e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=cases.ids)
@pytest.mark.parametrize("shared", [True, False], ids=["gene", "gene-cell"])
@pytest.mark.parametrize("form", test_counts.FORMS)
@pytest.mark.parametrize("weights", [None, 0.25], ids=["mean", "rows"])
def test_counts_nll_equals_the_formula(
    device: torch.device, form: str, shared: bool, weights: float | None, dtype: torch.dtype
) -> None:
    """Compared with the reference in float64, which test_counts.py compares with scipy: one factor, and one per row."""
    inputs = {
        name: x.detach().to(device).requires_grad_(x.requires_grad)
        for name, x in test_counts.make(form, 3, 45, dtype, shared).items()
    }
    factors = (
        torch.full((3,), 1 / 3, dtype=torch.float64) if weights is None else weights * torch.arange(1.0, 4.0)
    )
    want, slopes = test_counts.by_reference(form, inputs, factors.to(device))
    nll = test_counts.call(form, **inputs)
    test_counts.close(nll.detach(), want, 1e-11 if dtype == torch.float64 else 1e-5)
    leaves = {name: x for name, x in inputs.items() if x.requires_grad}
    objective = nll.mean() if weights is None else (nll * factors.to(device, nll.dtype)).sum()
    rough = {torch.float64: 1e-11, torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}[dtype]
    for name, gradient in zip(leaves, torch.autograd.grad(objective, list(leaves.values())), strict=True):
        test_counts.close(gradient, slopes[name], rough)


@pytest.mark.parametrize("dtype", DTYPES, ids=cases.ids)
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("layout", ["dense", "csr"])
def test_multinomial_nll_equals_the_formula(
    device: torch.device, layout: str, weighted: bool, dtype: torch.dtype
) -> None:
    logits, target = test_multinomial.make(3, 1300, dtype)
    data = (target.to_sparse_csr() if layout == "csr" else target).to(device)
    logits, target = logits.to(device), target.to(device)
    weight = 0.5 + torch.rand(1, 1300, device=device) if weighted else None
    factors = torch.arange(1.0, 4.0, device=device)
    value, gradient = test_multinomial.value_and_gradient(logits, data, factors, weight=weight)
    want = test_multinomial.formula(logits, target, weight)
    test_multinomial.check(value, gradient, want, factors)


@pytest.mark.parametrize("dtype", DTYPES, ids=cases.ids)
@pytest.mark.parametrize("shared", [True, False], ids=["gene", "gene-cell"])
@pytest.mark.parametrize("form", test_count_elements.FORMS)
@pytest.mark.parametrize("kept", [False, True], ids=["freed", "kept"])
@pytest.mark.parametrize("grad", ["row", "element"])
def test_nll_elements_of_counts_equal_the_formula(
    device: torch.device, form: str, shared: bool, kept: bool, grad: str, dtype: torch.dtype
) -> None:
    """The same, with an expanded gradient and with one per element."""
    inputs = {
        name: x.detach().to(device).requires_grad_(x.requires_grad)
        for name, x in test_count_elements.make(form, 9, 45, dtype, shared).items()
    }
    weights = (0.5 + torch.rand(9, 1 if grad == "row" else 45, device=device)).expand(9, 45)
    want, slopes = test_count_elements.by_reference(form, inputs, weights)
    values = test_count_elements.call(form, **inputs)
    test_counts.close(values.detach(), want, 1e-11 if dtype == torch.float64 else 1e-5)
    leaves = {name: x for name, x in inputs.items() if x.requires_grad}
    found = torch.autograd.grad(values, list(leaves.values()), weights.to(values.dtype), retain_graph=kept)
    rough = {torch.float64: 1e-11, torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}[dtype]
    for name, gradient in zip(leaves, found, strict=True):
        assert gradient.dtype == dtype
        test_counts.close(gradient, slopes[name], rough)


WEIGHTED = ("bernoulli", "gaussian_learned", "gaussian_head", "student_t_learned", "poisson_rate_per_element")


@pytest.mark.parametrize("dtype", DTYPES, ids=cases.ids)
@pytest.mark.parametrize("weight", [torch.bool, torch.uint8, torch.float32, torch.float16], ids=cases.ids)
@pytest.mark.parametrize("place", test_weight.PLACES)
@pytest.mark.parametrize("name", WEIGHTED)
def test_weighted_elements_equal_the_formula(
    device: torch.device, name: str, place: str, weight: torch.dtype, dtype: torch.dtype
) -> None:
    """NaN and inf where the weight is 0."""
    case = cases.by_id[name]
    inputs = move(cases.cast(case.inputs(test_weight.SHAPE), dtype), device)
    values = test_weight.make_weight(test_weight.PLACES[place], weight).to(device)
    test_weight.check_elements(case, inputs, values, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=cases.ids)
@pytest.mark.parametrize("weight", [torch.bool, torch.float32], ids=cases.ids)
@pytest.mark.parametrize("place", [0, 1])
@pytest.mark.parametrize("name", test_weight.FAMILIES)
def test_weighted_families_equal_the_formula(
    device: torch.device, name: str, place: int, weight: torch.dtype, dtype: torch.dtype
) -> None:
    family = test_weight.FAMILIES[name]
    inputs = move(
        {key: x.to(dtype) if x.is_floating_point() else x for key, x in family.inputs().items()}, device
    )
    values = test_weight.make_weight(family.weights[place], weight).to(device)
    test_weight.check_family(family, inputs, values, dtype)


# Rows that many programs share, rows long enough to flush the product of 1 + e, and more rows than programs.
SPLIT = [(1, 300_001), (3, 70_016), (20_000, 3)]


# The polynomial for small products is also computed where it is not used.
@pytest.mark.filterwarnings("ignore:overflow encountered in multiply:RuntimeWarning")
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("shape", SPLIT, ids=cases.ids)
@pytest.mark.parametrize("likelihood", ["bernoulli", "learned"])
def test_nll_of_long_and_many_rows_equals_the_formula(
    device: torch.device, likelihood: str, shape: tuple[int, ...], reduction: str
) -> None:
    elbo = make_elbo(likelihood, reduction).to(device)
    recon = torch.randn(shape, device=device, requires_grad=True)
    x, kl = torch.rand(shape, device=device), torch.rand(shape[0], device=device, requires_grad=True)
    elbo.beta = torch.tensor(0.7, device=device)
    leaves = [recon, kl, *elbo.parameters()]

    def gradients(out: fastvae.ELBOOutput) -> list[Tensor]:
        return list(torch.autograd.grad((3 * out.loss).mean() + 2 * out.nll.sum(), leaves))

    out = elbo(recon, x, kl=kl)
    got = gradients(out)
    again = gradients(elbo(recon, x, kl=kl))
    assert all(torch.equal(a, b) for a, b in zip(got, again, strict=True)), "the same call, other bits"
    with fastvae.use_backend("reference"):
        want = elbo(recon, x, kl=kl)
        for a, b in zip((*out, *got), (*want, *gradients(want)), strict=True):
            torch.testing.assert_close(a, b, rtol=2e-5, atol=1e-4)


@pytest.mark.parametrize("shape", [(2, 20_011), (3000, 5)], ids=cases.ids)
def test_reparameterize_kl_of_long_and_many_rows_equals_the_formula(
    device: torch.device, shape: tuple[int, ...]
) -> None:
    inputs = [torch.randn(shape, device=device, requires_grad=True) for _ in range(4)]
    weight = torch.rand(shape, device=device)
    eps = torch.randn(shape, device=device)

    def run(module: object) -> list[Tensor]:
        z, kl = module.reparameterize_kl(*inputs, eps=eps)  # type: ignore[attr-defined]
        alone = module.gaussian_kl(*inputs)  # type: ignore[attr-defined]
        return [z, kl, alone, *torch.autograd.grad((z * weight).sum() + (kl + alone).sum(), inputs)]

    for got, want in zip(run(functional), run(reference), strict=True):
        torch.testing.assert_close(got, want, rtol=2e-5, atol=1e-5)


def test_kernels_with_64_bit_columns_equal_the_others(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernels for rows with more than 2^31 elements, tested on shorter ones."""
    from fastvae._triton import elementwise, latents
    from fastvae._triton import loss as losses
    from fastvae._triton.launch import partition

    inputs = {name: torch.randn(2, 5000, device=device, requires_grad=True) for name in ("a", "b")}

    def run() -> list[Tensor]:
        rows = functional.gaussian_nll(inputs["a"], torch.ones_like(inputs["a"]), inputs["b"])
        z, kl = functional.reparameterize_kl(
            **dict(zip(("mu", "logvar"), inputs.values(), strict=True)), seed=seed
        )
        loss = (rows * rows).sum() / 1e4 + (z * z).sum() + kl.sum()
        return [rows, z, kl, *torch.autograd.grad(loss, list(inputs.values()))]

    seed = torch.tensor([1, 2], device=device)
    narrow = run()
    for module in (elementwise, losses, latents):
        monkeypatch.setattr(module, "partition", lambda *a, **k: partition(*a, **k)._replace(wide=True))
    for a, b in zip(narrow, run(), strict=True):
        # The results may differ in the last bits, because only one of two compilations may fuse a product with a sum.
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=cases.ids)
@pytest.mark.parametrize(
    "target", [torch.float32, torch.uint8, torch.bool, torch.uint16, torch.int32, torch.int64], ids=cases.ids
)
@pytest.mark.parametrize("case", WITH_TARGET, ids=cases.ids)
def test_target_of_any_dtype_equals_the_formula(
    device: torch.device, case: Case, target: torch.dtype, dtype: torch.dtype
) -> None:
    if target != torch.float32 and target not in case.targets:
        pytest.skip("not accepted")
    inputs = move(cases.cast(case.inputs((2, 3, 20, 19)), dtype, target, counts=case.counts), device)
    check(cases.run(case, functional, inputs), cases.exact(case, inputs), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=cases.ids)
@pytest.mark.parametrize("logit", [-30.0, -9.0, 15.0])
def test_nll_of_saturated_rows_is_accurate(device: torch.device, logit: float, dtype: torch.dtype) -> None:
    """784 tiny losses, which must stay accurate in the product of 1 + e."""
    inputs = {name: torch.full((2, 784), logit, dtype=dtype, device=device) for name in ("logits", "target")}
    inputs["target"].fill_(float(logit > 0))
    case = cases.by_id["bernoulli"]
    got, want = cases.run(case, functional, inputs), cases.exact(case, inputs)
    assert ((got.value.double() - want.value).abs() <= VALUE_TOLERANCE[dtype] * want.value).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=cases.ids)
@pytest.mark.parametrize("logvar", [1e-5, -1e-3, 0.99, 1.01])
@pytest.mark.parametrize("case", [case for case in CASES if case.id.startswith("kl")], ids=cases.ids)
def test_gaussian_kl_near_collapse_is_accurate(
    device: torch.device, case: Case, logvar: float, dtype: torch.dtype
) -> None:
    inputs = {name: torch.zeros(3, 500, dtype=dtype, device=device) for name in case.inputs((1, 1))}
    inputs["logvar"] += logvar
    got, want = cases.run(case, functional, inputs), cases.exact(case, inputs)
    assert ((got.value.double() - want.value).abs() <= VALUE_TOLERANCE[dtype] * want.value).all()
    exact = want.gradients["logvar"]
    bound = GRADIENT_TOLERANCE[dtype] * exact.abs() + (2.0**-24 if dtype == torch.float16 else 0)
    assert ((got.gradients["logvar"].double() - exact).abs() <= bound).all()


@pytest.mark.filterwarnings("ignore:overflow encountered in cast:RuntimeWarning")
@pytest.mark.parametrize("dtype", DTYPES, ids=cases.ids)
@pytest.mark.parametrize("case", [case for case in CASES if case.extremes], ids=cases.ids)
def test_nll_of_extremes_is_finite(device: torch.device, case: Case, dtype: torch.dtype) -> None:
    assert case.extremes is not None
    inputs = move(cases.cast(case.extremes(), dtype), device)
    got, want = cases.run(case, functional, inputs), cases.exact(case, inputs)
    tiny = torch.finfo(torch.float32).tiny
    assert ((got.value.double() - want.value).abs() <= VALUE_TOLERANCE[dtype] * want.scale + tiny).all()
    for name, exact in want.gradients.items():
        gradient = got.gradients[name].double()
        fits = exact.abs() < 0.99 * torch.finfo(dtype).max
        bound = GRADIENT_TOLERANCE[dtype] * exact.abs() + max(1e-7, torch.finfo(dtype).tiny)
        assert (((gradient - exact).abs() <= bound) | ~fits).all(), name


def extremes(device: torch.device, variant: Variant, dtype: torch.dtype) -> None:
    # The interpreter is slow for each call, and for the program of each cell.
    every = 1 if not INTERPRETED else 23 if not variant.element else 7 if variant.has_scalar else 2
    for points in ends.grid(variant.name, dtype, every):
        ends.check_points(variant, points, *ends.run(variant, points, device), dtype)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("dtype", DTYPES, ids=cases.ids)
@pytest.mark.parametrize(
    "variant", [variant for variant in ends.GRIDDED if variant.element], ids=lambda variant: variant.name
)
def test_nll_on_the_grid_of_extremes_equals_the_limits(
    device: torch.device, variant: Variant, dtype: torch.dtype
) -> None:
    extremes(device, variant, dtype)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("dtype", DTYPES, ids=cases.ids)
@pytest.mark.parametrize(
    "variant", [variant for variant in ends.GRIDDED if not variant.element], ids=lambda variant: variant.name
)
def test_nll_on_the_grid_of_extreme_counts_equals_the_limits(
    device: torch.device, variant: Variant, dtype: torch.dtype
) -> None:
    """The variants that have a kernel of their own."""
    extremes(device, variant, dtype)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("dtype", DTYPES, ids=cases.ids)
@pytest.mark.parametrize("with_z", [False, True])
@pytest.mark.parametrize("prior", [False, True])
def test_kl_on_the_grid_of_extremes_equals_the_limits(
    device: torch.device, prior: bool, with_z: bool, dtype: torch.dtype
) -> None:
    points, want = ends.kl_grid(dtype, prior)
    ends.check_kl(points, want, *ends.run_kl(points.to(device), with_z))


@pytest.mark.parametrize("case", CASES, ids=cases.ids)
def test_nan_affects_only_its_row(device: torch.device, case: Case) -> None:
    names = [name for name, x in case.inputs((1, 1)).items() if x.dim() > 0]
    inputs = move(cases.cast(case.inputs((4, 37)), torch.float32), device)
    clean = cases.run(case, functional, inputs)
    others = torch.tensor([0, 1, 3], device=device)
    for name in names:
        dirty_inputs = {n: x.clone() for n, x in inputs.items()}
        dirty_inputs[name][2, 36] = float("nan")
        dirty = cases.run(case, functional, dirty_inputs)
        assert dirty.value[2].isnan().any()
        assert torch.equal(dirty.value[others], clean.value[others])
        for which, gradient in dirty.gradients.items():
            if gradient.dim():
                assert torch.equal(gradient[others], clean.gradients[which][others])


# ---------------------------------------------------------------------------------------------------------------------
# Layouts
# ---------------------------------------------------------------------------------------------------------------------


def compare_layouts(case: Case, inputs: Inputs, dtype: torch.dtype) -> Result:
    got = cases.run(case, functional, inputs)
    dense = {name: x.clone(memory_format=torch.contiguous_format) for name, x in inputs.items()}
    check(got, cases.exact(case, dense), dtype)
    return got


@pytest.mark.parametrize("dtype", DTYPES, ids=cases.ids)
@pytest.mark.parametrize("target_too", [False, True])
@pytest.mark.parametrize("case", WITH_TARGET, ids=cases.ids)
def test_channels_last_equals_contiguous(
    device: torch.device, case: Case, target_too: bool, dtype: torch.dtype
) -> None:
    """Such tensors are read in place, including the halves of a packed head. The gradient has the layout of the
    reconstruction."""
    inputs = move(cases.cast(case.inputs((2, 8, 6, 10)), dtype), device)
    for name, x in inputs.items():
        if x.dim() == 4 and (name != "target" or target_too):
            inputs[name] = x.contiguous(memory_format=torch.channels_last)
    got = compare_layouts(case, inputs, dtype)
    assert next(iter(got.gradients.values())).is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("case", WITH_TARGET, ids=cases.ids)
def test_slices_and_expanded_data_equal_copies(device: torch.device, case: Case) -> None:
    inputs = move(cases.cast(case.inputs((4, 6, 5)), torch.float32), device)
    for name, x in inputs.items():
        if name == "target":
            inputs[name] = x[:1].expand_as(x)
        elif x.dim():
            inputs[name] = torch.cat((x, x), 1)[:, : x.shape[1]]
    compare_layouts(case, inputs, torch.float32)


@pytest.mark.parametrize("dtype", DTYPES, ids=cases.ids)
@pytest.mark.parametrize("shape", [(5, 34), (2, 4, 8, 8)], ids=cases.ids)
def test_chunks_of_a_head_equal_copies(
    device: torch.device, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    """`mu, logvar = h.chunk(2, dim=1)` in place and copied."""
    head, seed = torch.randn(shape).to(device, dtype), torch.tensor([3, 4], device=device)

    def run(copy: bool) -> list[Tensor]:
        leaf = head.detach().requires_grad_()
        mu, logvar = (x.clone() if copy else x for x in leaf.chunk(2, dim=1))
        z, kl = functional.reparameterize_kl(mu, logvar, seed=seed)
        return [z, kl, *torch.autograd.grad(z.sum().to(kl) + kl.sum(), leaf)]

    for got, want in zip(run(False), run(True), strict=True):
        torch.testing.assert_close(got, want, rtol=2e-6, atol=1e-6)


def test_packed_halves_are_not_copied(device: torch.device) -> None:
    from fastvae._triton.launch import dense_rows

    packed = torch.zeros(4, 6, 5, device=device)
    assert dense_rows(packed[:, 3:]).data_ptr() == packed[:, 3:].data_ptr()
    assert dense_rows(packed[:1].expand(4, 6, 5)).stride(0) == 0
    image = torch.zeros(2, 6, 4, 4, device=device).contiguous(memory_format=torch.channels_last)
    assert dense_rows(image, torch.channels_last) is image


# ---------------------------------------------------------------------------------------------------------------------
# z and its noise
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=cases.ids)
@pytest.mark.parametrize("samples", [None, 3])
@pytest.mark.parametrize("prior", [False, True], ids=["standard", "prior"])
@pytest.mark.parametrize("noise", ["eps", "seed"])
@pytest.mark.parametrize("shape", [(4, 1), (3, 9), (2, 3, 5), (6,), (0, 4), (2, 0)], ids=cases.ids)
def test_reparameterize_kl_equals_the_formula(
    device: torch.device,
    shape: tuple[int, ...],
    noise: str,
    prior: bool,
    samples: int | None,
    dtype: torch.dtype,
) -> None:
    names = ("mu", "logvar", "prior_mu", "prior_logvar") if prior else ("mu", "logvar")
    inputs = {name: torch.randn(shape).to(device, dtype) for name in names}
    z_shape = shape if samples is None else (samples, *shape)
    eps = torch.randn(z_shape).to(device, dtype)
    seed = torch.tensor([2**40 + 17, 2**33 + 5], device=device)
    source = {"eps": eps} if noise == "eps" else {"seed": seed}
    if noise == "seed":
        rows, dims = shape[0], math.prod(shape[1:])
        eps = reference.normal_noise(seed, 0, rows, dims, samples or 1, torch.float64).reshape(z_shape)

    leaves = [x.requires_grad_() for x in inputs.values()]
    z, kl = functional.reparameterize_kl(*leaves, samples=samples, **source)
    exact = [x.detach().double().requires_grad_() for x in leaves]
    want_z, want_kl = reference.reparameterize_kl(*exact, samples=samples, eps=eps.double())
    assert (z.dtype, z.shape) == (dtype, z_shape)
    size = exact[0].abs() + torch.exp(exact[1] / 2) * eps.double().abs()
    rounding = {torch.bfloat16: 2**-8, torch.float16: 2**-11}.get(dtype, 0)
    precise = 1e-13 if dtype == torch.float64 else 1.5e-6
    assert ((z.double() - want_z).abs() <= precise * (size + 1) + rounding * want_z.abs()).all()
    assert ((kl.double() - want_kl).abs() <= VALUE_TOLERANCE[dtype] * want_kl).all()

    weights = torch.rand(z_shape).to(device, dtype), cases.cotangent(kl).to(kl.dtype)
    got = torch.autograd.grad((z, kl), leaves, weights)
    want = torch.autograd.grad((want_z, want_kl), exact, [w.double() for w in weights])
    for name, g, w in zip(names, got, want, strict=True):
        check_gradient(name, g, w, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=cases.ids)
@pytest.mark.parametrize("packed", [False, True], ids=["apart", "packed"])
@pytest.mark.parametrize("prior", [False, True], ids=["standard", "prior"])
@pytest.mark.parametrize("shape", [(3, 9), (2, 3, 5)], ids=cases.ids)
@pytest.mark.parametrize("name", posterior_forms.FORMS)
def test_forms_of_the_scale_equal_the_formula(
    device: torch.device, name: str, shape: tuple[int, ...], prior: bool, packed: bool, dtype: torch.dtype
) -> None:
    tensors = test_posteriors.posterior(shape, dtype, prior, device)
    balance = 0.8 if prior else None
    test_posteriors.check_against_the_formula(name, tensors, packed=packed, balance=balance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=cases.ids)
@pytest.mark.parametrize("name", posterior_forms.FORMS)
def test_forms_of_the_scale_at_their_ends_equal_the_formula(
    device: torch.device, name: str, dtype: torch.dtype
) -> None:
    test_posteriors.check_ends(name, dtype, device)


@pytest.mark.parametrize("dtype", DTYPES, ids=cases.ids)
@pytest.mark.parametrize("given", [False, True], ids=["seed", "eps"])
@pytest.mark.parametrize("packed", [False, True], ids=["apart", "packed"])
@pytest.mark.parametrize("prior", [False, True], ids=["standard", "prior"])
@pytest.mark.parametrize("stl", [False, True], ids=["full", "stl"])
@pytest.mark.parametrize("shape", [(3, 9), (2, 3, 5), (2, 4100)], ids=cases.ids)
@pytest.mark.parametrize("name", ["logvar", "softplus", "nvae"])
def test_log_probs_equal_the_formula(
    device: torch.device,
    name: str,
    shape: tuple[int, ...],
    stl: bool,
    prior: bool,
    packed: bool,
    given: bool,
    dtype: torch.dtype,
) -> None:
    # In half precision, the gradients of a prior with a small scale would overflow.
    tensors = [t * 0.4 for t in test_posteriors.posterior(shape, dtype, prior, device)]
    test_log_probs.check_log_probs(name, tensors, packed=packed, stl=stl, given=given)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=cases.ids)
@pytest.mark.parametrize("stl", [False, True], ids=["full", "stl"])
@pytest.mark.parametrize("name", posterior_forms.FORMS)
def test_log_q_at_the_ends_equals_the_formula(
    device: torch.device, name: str, stl: bool, dtype: torch.dtype
) -> None:
    test_log_probs.check_ends(name, stl, dtype, device)


@pytest.mark.parametrize("dtype", NOISE_TOLERANCE, ids=["float32", "float64"])
@pytest.mark.parametrize("place", [place for place in PLACES if math.prod(place[3:]) <= 300])
def test_noise_equals_box_muller_by_hand(
    device: torch.device, place: tuple[int, ...], dtype: torch.dtype
) -> None:
    """Agreement to 1e-13 in float64 shows that the integers are the same: carries, offsets and positions."""
    seed, offset, row_offset, rows, dims, draws = place
    zeros = torch.zeros(rows, dims, dtype=dtype, device=device)
    key = torch.tensor([seed, offset], device=device)
    z, _ = functional.reparameterize_kl(zeros, zeros, seed=key, row_offset=row_offset, samples=draws)
    assert (z.double().cpu() - by_hand(place)).abs().max() <= NOISE_TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", DTYPES, ids=cases.ids)
def test_noise_depends_only_on_its_position(device: torch.device, dtype: torch.dtype) -> None:
    """A part of a batch, one draw of several, and another rank give the same bits. Half noise is rounded float32."""
    mu, logvar = torch.randn(2, 7, 21, device=device).to(dtype)
    seed = torch.tensor([9, 100], device=device)

    def draw(rows: slice = slice(None), step: int = 0, **kwargs: int) -> Tensor:
        return functional.reparameterize_kl(mu[rows], logvar[rows], seed=seed + step, **kwargs)[0]

    whole = draw(samples=2, row_offset=10)
    assert torch.equal(draw(slice(3, 6), samples=2, row_offset=13), whole[:, 3:6])
    assert torch.equal(draw(row_offset=10), whole[0])
    later = torch.tensor([9, 104], device=device)
    assert torch.equal(functional.reparameterize_kl(mu, logvar, seed=later, row_offset=10)[0], whole[1])
    image, image_logvar = mu.view(7, 3, 7), logvar.view(7, 3, 7)
    z, _ = functional.reparameterize_kl(image, image_logvar, seed=seed, row_offset=10)
    assert torch.equal(z.flatten(1), whole[0])
    if dtype in cases.HALF:
        zeros = torch.zeros(5, 33, device=device)
        precise = functional.reparameterize_kl(zeros, zeros, seed=seed)[0]
        half = functional.reparameterize_kl(zeros.to(dtype), zeros.to(dtype), seed=seed)[0]
        assert torch.equal(half, precise.to(dtype))


@pytest.mark.parametrize("source", ["seed", "torch"])
@pytest.mark.parametrize("dtype", DTYPES, ids=cases.ids)
def test_backward_generates_the_same_noise(device: torch.device, dtype: torch.dtype, source: str) -> None:
    """With sigma 1, dz/dlogvar = eps / 2, and halving is exact."""
    mu = torch.zeros(5, 50, dtype=dtype, device=device)
    logvar = torch.zeros_like(mu).requires_grad_()
    seed = torch.tensor([77, 2**34], device=device) if source == "seed" else None
    z, _ = functional.reparameterize_kl(mu, logvar, samples=2, seed=seed)
    torch.randn(5, device=device)  # the generator advances between forward and backward
    for k in range(2):
        (gradient,) = torch.autograd.grad(z[k].sum(), logvar, retain_graph=True)
        assert torch.equal(gradient * 2, z[k].detach())


def test_manual_seed_and_generator_determine_the_noise(device: torch.device) -> None:
    """torch.manual_seed, generator= and saved states work as for torch.randn; eps draws nothing."""
    zeros = torch.zeros(4, 9, device=device)

    def draw(**kwargs: object) -> Tensor:
        return functional.reparameterize_kl(zeros, zeros, **kwargs)[0]

    torch.manual_seed(5)
    first, second = draw(), draw()
    assert not torch.equal(first, second)
    torch.manual_seed(5)
    assert torch.equal(draw(), first)
    generator = torch.Generator(device).manual_seed(5)
    assert torch.equal(draw(generator=generator), first)
    state = generator.get_state()
    third = draw(generator=generator)
    generator.set_state(state)
    assert torch.equal(draw(generator=generator), third)
    draw(seed=torch.tensor([1, 2], device=device))
    draw(eps=zeros)
    assert torch.equal(draw(), second)


# ---------------------------------------------------------------------------------------------------------------------
# Autograd
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("likelihood", ["bernoulli", "learned", "per_element"])
def test_elbo_objectives_equal_the_formula(
    device: torch.device, likelihood: str, reduction: str, objective: str
) -> None:
    """For any use of loss, nll and kl, the gradients are correct and the inputs are not written to."""
    elbo = make_elbo(likelihood, reduction).to(device)
    inputs = {k: x.detach().to(device).requires_grad_(k != "x") for k, x in elbo_inputs(likelihood).items()}
    before = {k: (x.detach().clone(), x._version) for k, x in inputs.items()}
    out = elbo(*inputs.values())
    OBJECTIVES[objective](*(t.cpu() for t in out)).backward()
    leaves, exact = formula(likelihood, reduction, {k: x.cpu() for k, x in inputs.items()})
    OBJECTIVES[objective](*exact).backward()
    for actual, expected in zip(out, exact, strict=True):
        torch.testing.assert_close(actual.double().cpu(), expected, rtol=2e-5, atol=2e-6)
    for key, (value, version) in before.items():
        assert torch.equal(inputs[key].detach(), value)
        assert inputs[key]._version == version
    if likelihood == "learned":
        inputs["scale"] = elbo.likelihood.logvar
    for key, leaf in leaves.items():
        if leaf.grad is None:
            assert inputs[key].grad is None or not inputs[key].grad.any(), key
        else:
            torch.testing.assert_close(inputs[key].grad.double().cpu(), leaf.grad, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("likelihood", ["bernoulli", "per_element"])
def test_backward_returns_the_saved_gradient(device: torch.device, likelihood: str) -> None:
    """It is scaled in place if the graph is freed, and into a new tensor if it is kept."""
    elbo = make_elbo(likelihood).to(device)
    inputs = {k: x.detach().to(device).requires_grad_(k != "x") for k, x in elbo_inputs(likelihood).items()}
    loss = 3 * elbo(*inputs.values()).loss
    kept = torch.autograd.grad(loss, inputs["recon"], retain_graph=True)[0]
    again = torch.autograd.grad(loss, inputs["recon"], retain_graph=True)[0]
    last = torch.autograd.grad(loss, inputs["recon"])[0]
    assert len({kept.data_ptr(), again.data_ptr(), last.data_ptr()}) == 3
    assert torch.equal(kept, again)
    assert torch.equal(kept, last)


@pytest.mark.parametrize("name", TWICE)
@pytest.mark.parametrize("between", [False, True], ids=["leaf", "made"])
def test_second_derivative_raises(device: torch.device, name: str, between: bool) -> None:
    """It also raises through tensors that no longer exist, and if there is another path to the leaf."""
    a = torch.randn(5, 3, device=device, requires_grad=True)
    made = a.sin() if between else a
    (first,) = torch.autograd.grad(TWICE[name](made).sum(), a, create_graph=True)
    del made
    (plain,) = torch.autograd.grad(TWICE[name](a.sin() if between else a).sum(), a)
    torch.testing.assert_close(first.detach(), plain)
    again = first.sum()
    for differentiate in (lambda: torch.autograd.grad(again, a, retain_graph=True), again.backward):
        with pytest.raises(RuntimeError, match=r"fastvae\.use_backend\(\"reference\"\)"):
            differentiate()


@pytest.mark.parametrize("likelihood", ["bernoulli", "learned"])
def test_compiled_elbo_is_one_graph(device: torch.device, likelihood: str) -> None:
    """One dynamic fullgraph for all batch sizes, with the results of eager."""
    elbo, counter = make_elbo(likelihood).to(device), CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()
    compiled = torch.compile(elbo, fullgraph=True, dynamic=True, backend=counter)
    for rows in (3, 8, 17):
        leaves = [torch.randn(rows, size, device=device, requires_grad=True) for size in (12, 5, 5)]
        x = torch.rand(rows, 12, device=device)

        def run(
            step: Callable[..., fastvae.ELBOOutput], leaves: list[Tensor] = leaves, x: Tensor = x
        ) -> list[Tensor]:
            out = step(leaves[0], x, leaves[1], leaves[2])
            wanted = [*leaves, *elbo.parameters()]
            return [*out, *torch.autograd.grad(3 * out.loss + out.nll.square().mean(), wanted)]

        for actual, expected in zip(run(compiled), run(elbo), strict=True):
            torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)
    assert counter.frame_count == 1


def test_compiled_draws_are_not_merged(device: torch.device) -> None:
    mu, logvar = torch.zeros(4, 5, device=device, requires_grad=True), torch.zeros(4, 5, device=device)
    torch._dynamo.reset()

    @torch.compile(fullgraph=True, backend="aot_eager_decomp_partition")
    def twice(mu: Tensor, logvar: Tensor) -> tuple[Tensor, Tensor]:
        first = functional.reparameterize_kl(mu, logvar)[0]
        return first, functional.reparameterize_kl(mu, logvar)[0]

    first, second = twice(mu, logvar)
    assert not torch.equal(first, second)
    assert not torch.equal(first, twice(mu, logvar)[0])


def moved(argument: object, device: torch.device) -> object:
    if isinstance(argument, Tensor):
        return argument.detach().to(device).requires_grad_(argument.requires_grad)
    if isinstance(argument, list):
        return [moved(item, device) for item in argument]
    return argument


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize(("name", "number"), [c for c in CALLS if not c.values[0].startswith(CPU_OPS)])
def test_opcheck(device: torch.device, name: str, number: int, check: str) -> None:
    skip_what_cannot_be_traced(name, check)
    args = tuple(moved(argument, device) for argument in OPS[name][number])
    torch.library.opcheck(getattr(torch.ops.fastvae_triton, name).default, args, test_utils=check)


def test_schemas_equal_the_native_ones(device: torch.device) -> None:
    with fastvae.use_backend("auto"):  # loads the extension if it is installed
        native = [name for name in torch._C._dispatch_get_all_op_names() if name.startswith("fastvae::")]
    if not native:
        pytest.skip("the compiled extension is not installed")
    for name in native:
        op = name.removeprefix("fastvae::")
        if op.startswith(CPU_OPS):
            continue
        ours, theirs = (
            str(getattr(o, op).default._schema) for o in (torch.ops.fastvae_triton, torch.ops.fastvae)
        )
        assert ours == theirs.replace("fastvae::", "fastvae_triton::")


def test_errors_have_the_same_messages_as_native(device: torch.device) -> None:
    """The checks are the same for all backends, and run before any work."""
    a, x = torch.zeros(4, 12, device=device), torch.zeros(4, 3, 4, device=device)
    words = []
    for name in ("triton", "reference"):
        with fastvae.use_backend(name), pytest.raises(ValueError, match=r"did you mean") as caught:
            functional.bernoulli_nll(a, x)
        words.append(str(caught.value))
    assert words[0] == words[1]


# ---------------------------------------------------------------------------------------------------------------------
# Tests that need a real GPU
# ---------------------------------------------------------------------------------------------------------------------


def step(elbo: fastvae.ELBO, leaves: list[Tensor], x: Tensor) -> list[Tensor]:
    """The loss part of a training step, which returns (z, loss, gradients...)."""
    recon, mu, logvar = leaves
    z, kl = elbo.reparameterize(mu, logvar)
    loss = elbo(recon, x, kl=kl).loss
    return [z, loss, *torch.autograd.grad((loss, z), leaves, (torch.ones_like(loss), torch.ones_like(z)))]


def step_inputs() -> tuple[fastvae.ELBO, list[Tensor], Tensor]:
    leaves = [torch.randn(128, size, device="cuda", requires_grad=True) for size in (784, 20, 20)]
    return make_elbo("bernoulli").cuda(), leaves, torch.rand(128, 784, device="cuda")


@on_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.uint8], ids=cases.ids)
def test_nll_of_more_than_2_31_elements_is_correct(device: torch.device, dtype: torch.dtype) -> None:
    """Rows at more than 2^31 elements from the start of the batch, and one longer row."""
    if torch.cuda.mem_get_info()[0] < 30 << 30:
        pytest.skip("needs 30 GB of free memory")
    for shape in ((3, 2**30), (1, 2**31 + 16)):
        logits = torch.zeros(shape, device=device, dtype=torch.bfloat16)
        logits[-1, -1] = 2.0
        logits.requires_grad_()
        target = torch.ones(1, 1, device=device).to(dtype).expand(1, shape[1]).contiguous().expand(shape)
        if dtype == torch.uint8:
            target = target * 255 if shape[0] == 1 else (target[:1] * 255).expand(shape)
        nll = functional.bernoulli_nll(logits, target)
        (gradient,) = torch.autograd.grad(nll.sum(), logits)
        want = shape[1] * math.log(2)
        assert ((nll.double() - want).abs() < 1e-5 * want).all()
        assert gradient[0, 0] == -0.5
        assert abs(gradient[-1, -1].item() - (torch.tensor(2.0).sigmoid().item() - 1)) < 1e-3
        del logits, target, gradient
        torch.cuda.empty_cache()


@on_gpu
def test_graph_replays_draw_fresh_noise(device: torch.device) -> None:
    elbo, leaves, x = step_inputs()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step(elbo, leaves, x)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        z, loss, *gradients = step(elbo, leaves, x)
    seen = []
    for _ in range(3):
        graph.replay()
        noise = ((z - leaves[1]) * torch.exp(-leaves[2] / 2)).detach()
        # d z / d logvar = sigma eps / 2 shows that the backward generated the noise of its own replay.
        sampled = gradients[2] - elbo.beta / 128 * torch.expm1(leaves[2]) / 2
        want = noise * torch.exp(leaves[2] / 2) / 2
        torch.testing.assert_close(sampled, want, rtol=1e-4, atol=1e-4)
        seen.append(noise.clone())
        assert loss.isfinite()
    assert not torch.equal(seen[0], seen[1])
    assert not torch.equal(seen[1], seen[2])


@on_gpu
def test_op_on_a_second_stream_runs_there(device: torch.device) -> None:
    elbo, leaves, x = step_inputs()
    seed = torch.tensor([1, 2], device=device)
    want = functional.reparameterize_kl(leaves[1], leaves[2], seed=seed)[0]
    loss = elbo(leaves[0], x, leaves[1], leaves[2]).loss
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)  # work on the default stream would be finished before
        scaled = leaves[0] * 1.0
        got = functional.reparameterize_kl(leaves[1], leaves[2], seed=seed)[0]
        again = elbo(scaled, x, leaves[1], leaves[2]).loss
    stream.synchronize()
    assert torch.equal(got, want)
    assert torch.equal(again, loss)


@on_gpu
def test_training_step_does_not_synchronise(device: torch.device) -> None:
    elbo, leaves, x = step_inputs()
    learned = make_elbo("learned").cuda()
    kl = torch.rand(128, device=device)
    for _ in range(2):
        step(elbo, leaves, x)
        (3 * learned(leaves[0], x, kl=kl).loss).backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(elbo, leaves, x)
        (3 * learned(leaves[0], x, kl=kl).loss).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@on_gpu
def test_training_step_launches_five_kernels(device: torch.device) -> None:
    """Sample, nll, its final sum, and a backward of each."""
    elbo, leaves, x = step_inputs()
    step(elbo, leaves, x)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        step(elbo, leaves, x)
        torch.cuda.synchronize()
    ours = [
        event.key for event in profile.key_averages() for _ in range(event.count) if "_kernel" in event.key
    ]
    names = ("sample_kernel", "nll_kernel", "finish_kernel", "scale_kernel", "sample_gradient_kernel")
    assert sorted(name for name in ours if name in names) == sorted(names)
    assert not {"kl_kernel", "total_kernel", "dot_kernel"} & set(ours)


@on_gpu
def test_training_step_peak_memory_is_one_gradient(device: torch.device) -> None:
    """The inputs and one gradient."""
    recon, x = (
        torch.randn(512, 65536, device=device, requires_grad=True),
        torch.rand(512, 65536, device=device),
    )
    elbo, kl = make_elbo("bernoulli").cuda(), torch.rand(512, device=device)
    elbo(recon, x, kl=kl).loss.backward()
    recon.grad = None
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    elbo(recon, x, kl=kl).loss.backward()
    assert torch.cuda.max_memory_allocated() - before < 1.05 * recon.nbytes


@on_gpu
def test_noise_equals_that_of_the_cpu(device: torch.device) -> None:
    """The same seed gives the same noise on every device."""
    mu, logvar, seed = torch.randn(64, 100), torch.randn(64, 100), torch.tensor([5, 6])
    ours = functional.reparameterize_kl(mu.cuda(), logvar.cuda(), seed=seed.cuda())[0]
    theirs = reference.reparameterize_kl(mu, logvar, seed=seed)[0]
    torch.testing.assert_close(ours.cpu(), theirs, rtol=1e-5, atol=1e-5)
