"""Negative binomial counts, with and without additional zeros: accuracy, gradients, inputs, and autograd."""

import functools
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mpmath
import numpy as np
import pytest
import scipy.special
import scipy.stats
import torch
from torch import Tensor

import fastvae
from fastvae import functional, likelihoods
from fastvae.functional.values import check_columns

mpmath.mp.dps = 50

NB, ZINB = "negative_binomial", "zero_inflated_negative_binomial"
NB_RAW, ZINB_RAW = "negative_binomial_logits", "zero_inflated_negative_binomial_logits"
FORMS = (NB, ZINB, NB_RAW, ZINB_RAW)
NAMES = {
    NB: ("mean", "inverse_dispersion"),
    ZINB: ("mean", "inverse_dispersion", "zi_logits"),
    NB_RAW: ("logits", "log_dispersion", "library"),
    ZINB_RAW: ("logits", "log_dispersion", "zi_logits", "library"),
}
# The additional constant of a backend's call: the eps of the means.
NUMBERS: dict[str, list[float]] = {NB: [0.0], ZINB: [0.0], NB_RAW: [], ZINB_RAW: []}
Inputs = dict[str, Tensor]


def call(form: str, module: Any = functional, **inputs: Tensor) -> Tensor:
    nll: Tensor = getattr(module, f"{form}_nll")(**inputs)
    return nll


def make(
    form: str,
    rows: int = 5,
    genes: int = 37,
    dtype: torch.dtype = torch.float32,
    shared: bool = True,
    zeros: float = 0.7,
) -> Inputs:
    """The inputs of a variant. Counts are small, and most of them are 0."""
    shape = (rows, genes)
    counts = torch.poisson(torch.exp(1.5 * torch.randn(shape))) * (torch.rand(shape) > zeros)
    dispersion = 2 * torch.randn((genes,) if shared else shape)
    values = {
        "mean": torch.exp(torch.randn(shape)),
        "inverse_dispersion": torch.exp(dispersion),
        "logits": torch.randn(shape),
        "log_dispersion": dispersion,
        "zi_logits": 2 * torch.randn(shape),
        "library": torch.exp(4 + torch.randn(rows)),
    }
    return {name: values[name].to(dtype).requires_grad_() for name in NAMES[form]} | {
        "target": counts.to(dtype)
    }


def formula(form: str, target: Tensor, **p: Tensor) -> Tensor:
    """-log p of each element in float64, computed by scipy."""
    values = {name: value.detach().double() for name, value in p.items()}
    if form in (NB, ZINB):
        mean, theta = values["mean"], values["inverse_dispersion"]
    else:
        mean = values["library"].reshape(-1, 1) * torch.softmax(values["logits"], 1)
        theta = torch.exp(values["log_dispersion"])
    t, mean, theta = target.double().numpy(), mean.numpy(), theta.numpy()
    log_p = scipy.stats.nbinom.logpmf(t, theta, theta / (theta + mean))
    if form in (ZINB, ZINB_RAW):
        pi = values["zi_logits"].numpy()
        kept = log_p + scipy.special.log_expit(-pi)
        log_p = np.where(t == 0, np.logaddexp(scipy.special.log_expit(pi), kept), kept)
    return -torch.as_tensor(log_p)


def gradients(value: Tensor, inputs: Inputs, weights: Tensor | None = None) -> Inputs:
    names = [name for name, x in inputs.items() if x.requires_grad]
    weights = torch.ones_like(value) if weights is None else weights.to(value.dtype)
    found = torch.autograd.grad(value, [inputs[name] for name in names], weights)
    return dict(zip(names, found, strict=True))


def in_float64(inputs: Inputs) -> Inputs:
    return {
        name: x.detach().double().requires_grad_(x.requires_grad) if x.is_floating_point() else x
        for name, x in inputs.items()
    }


def by_reference(form: str, inputs: Inputs, weights: Tensor | None = None) -> tuple[Tensor, Inputs]:
    """Value and gradients in float64, from the same numbers."""
    wide = in_float64(inputs)
    value = call(form, fastvae.reference, **wide)
    return value.detach(), gradients(value, wide, weights)


def close(actual: Tensor, expected: Tensor, tolerance: float, at_least: float = 1e-30) -> None:
    scale = expected.abs().max().clamp_min(at_least)
    error = (actual.double() - expected.double()).abs().max() / scale
    assert error <= tolerance, f"{error:.3g} of the largest, {tolerance:.3g} allowed"


# ---------------------------------------------------------------------------------------------------------------------
# Numbers
# ---------------------------------------------------------------------------------------------------------------------

VALUES = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 2e-6, torch.float16: 2e-6}
SLOPES = {torch.float64: 1e-11, torch.float32: 4e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", VALUES, ids=str)
@pytest.mark.parametrize(
    "shape", [(5, 37), (1, 1), (3, 8), (2, 1025), (9, 16), (40, 5), (0, 4), (4, 0)], ids=str
)
@pytest.mark.parametrize("shared", [True, False], ids=["gene", "gene-cell"])
def test_values_and_gradients_equal_the_formula(
    form: str, dtype: torch.dtype, shape: tuple[int, int], shared: bool, backend: str
) -> None:
    inputs = make(form, *shape, dtype=dtype, shared=shared)
    value = call(form, **inputs)
    assert value.shape == shape[:1]
    assert value.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    if 0 in shape:
        assert torch.equal(value, torch.zeros(shape[0], dtype=value.dtype))
        for name, gradient in gradients(value, inputs).items():
            assert torch.equal(gradient, torch.zeros_like(inputs[name]))
        return
    close(value, formula(form, **inputs).sum(1), VALUES[dtype])
    weights = 0.5 + torch.rand(shape[0])
    _, expected = by_reference(form, inputs, weights)
    for name, gradient in gradients(value, inputs, weights).items():
        assert gradient.dtype == dtype
        assert gradient.shape == inputs[name].shape
        # The gradients for the logits sum to 0, so for a single gene they are 0.
        close(gradient, expected[name], SLOPES[dtype], 1.0 if name == "logits" else 1e-30)


def exact(t: float, mu: float, theta: float, pi: float | None = None) -> Any:
    def nll(mu: Any, theta: Any, pi: Any = None) -> Any:
        count = mpmath.mpf(t)
        value = mpmath.loggamma(theta) + mpmath.loggamma(count + 1) - mpmath.loggamma(count + theta)
        value += theta * mpmath.log1p(mu / theta) + count * mpmath.log((theta + mu) / mu)
        if pi is None:
            return value
        p = 1 / (1 + mpmath.exp(-pi))
        kept = (1 - p) * mpmath.exp(-value)
        return -mpmath.log(p + kept if t == 0 else kept)

    where = [mpmath.mpf(x) for x in (mu, theta, *(() if pi is None else (pi,)))]
    value = nll(*where)
    grads = []
    for i, x in enumerate(where):
        # Accurate to about 40 digits, because mpmath's step is half of its precision.
        with mpmath.workdps(110):
            step = max(abs(x), mpmath.mpf(10) ** -8) * mpmath.mpf(10) ** -40
            above, below = list(where), list(where)
            above[i], below[i] = x + step, x - step
            grads.append((nll(*above) - nll(*below)) / (2 * step))
    return value, grads


HARD = [
    (t, mu, theta)
    for theta in (1e-4, 0.7, 7.5, 8.5, 1e3, 1e8)
    for t, means in (
        (0, (1e-8, 0.5, 1e6)),
        (1, (1e-8, 0.5, 1e6)),
        (2, (3.0,)),
        (7, (5.0, 1e3)),
        (8, (5.0, 1e3)),
        (100, (1e-3, 90.0)),
        (1e6, (1.0, 1e6 - 700, 2e6)),
    )
    for mu in means
]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("pi", [None, -30.0, -1.0, 2.0], ids=lambda pi: "NB" if pi is None else f"pi={pi}")
def test_nll_equals_50_digits(dtype: torch.dtype, pi: float | None, backend: str) -> None:
    """Inverse dispersions from 1e-4 to 1e8 and counts up to 1e6, where no difference of log Gamma may cancel."""
    table = torch.tensor(HARD, dtype=torch.float64)
    t, mean, theta = (table[:, i : i + 1].to(dtype) for i in range(3))
    inputs = {"mean": mean, "inverse_dispersion": theta}
    if pi is not None:
        inputs["zi_logits"] = torch.full_like(mean, pi)
    inputs = {name: x.requires_grad_() for name, x in inputs.items()} | {"target": t}
    value = call(NB if pi is None else ZINB, **inputs)
    found = gradients(value, inputs)
    for i in range(len(HARD)):
        # The point is rounded to float32 first.
        point = (t[i].item(), mean[i].item(), theta[i].item())
        expected, grads = exact(*point, *(() if pi is None else (pi,)))
        message = f"count {point[0]}, mean {point[1]}, inverse dispersion {point[2]}"
        tolerance = 1e-6 if dtype == torch.float32 else 2e-11 if backend == "reference" else 1e-12
        assert abs(value[i].item() - expected) <= tolerance * abs(expected), message
        # Near its zero, a grad keeps the absolute accuracy of its terms.
        scales = [point[0] / point[1] + 1, None, 1]
        for name, grad, scale in zip(found, grads, scales, strict=False):
            floor = 1e-6 * scale if scale else 1e-6 * abs(expected) / point[2]
            error = abs(found[name][i].item() - grad)
            allowed = (2e-6 if dtype == torch.float32 else 1e-10) * max(abs(grad), floor)
            assert error <= allowed, f"{name}: {message}: {found[name][i].item()} for {mpmath.nstr(grad, 17)}"


@pytest.mark.parametrize("form", [NB, ZINB])
def test_probabilities_sum_to_1(form: str, backend: str) -> None:
    """The sum over all counts, for means and dispersions whose tail ends before 20,000."""
    for mean, theta in ((0.3, 0.1), (4.0, 2.0), (50.0, 30.0), (100.0, 1e8)):
        counts = torch.arange(20_000, dtype=torch.float64).unsqueeze(1)
        inputs = {"mean": torch.full_like(counts, mean), "inverse_dispersion": torch.full_like(counts, theta)}
        if form == ZINB:
            inputs["zi_logits"] = torch.full_like(counts, -0.4)
        total = torch.exp(-call(form, target=counts, **inputs)).sum().item()
        assert abs(total - 1) < 1e-11


def test_nll_equals_scvi_tools(backend: str) -> None:
    stored = json.loads(Path(__file__).with_name("scvi_values.json").read_text())
    x, mu, theta, pi = (
        torch.tensor(stored[name], dtype=torch.float64).unsqueeze(1)
        for name in ("x", "mu", "theta", "zi_logits")
    )
    assert (x == 0).any()
    assert (x > 20).any()
    for eps, tolerance in (("none", 1e-12), ("default", 1e-6)):
        expected = torch.tensor(stored[f"log_nb_positive, eps {eps}"], dtype=torch.float64)
        torch.testing.assert_close(
            -functional.negative_binomial_nll(mu, x, theta), expected, rtol=tolerance, atol=1e-12
        )
        expected = torch.tensor(stored[f"log_zinb_positive, eps {eps}"], dtype=torch.float64)
        found = -functional.zero_inflated_negative_binomial_nll(mu, x, theta, pi)
        torch.testing.assert_close(found, expected, rtol=tolerance, atol=2e-8)


def test_nll_equals_torch_distributions(backend: str) -> None:
    inputs = make(NB, dtype=torch.float64)
    mean, theta = inputs["mean"].detach(), inputs["inverse_dispersion"].detach()
    expected = torch.distributions.NegativeBinomial(theta, logits=torch.log(mean / theta)).log_prob(
        inputs["target"]
    )
    torch.testing.assert_close(call(NB, **inputs), -expected.sum(1), rtol=1e-12, atol=0)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shared", [True, False], ids=["gene", "gene-cell"])
def test_gradcheck(form: str, shared: bool, backend: str) -> None:
    inputs = make(form, 2, 5, torch.float64, shared)
    inputs["target"][0, :3] = torch.tensor(
        [9.0, 30.0, 0.0]
    )  # on both sides of the start of Stirling's formula
    names = NAMES[form]
    with torch.no_grad():
        inputs[names[1]][..., 1] = 40.0 if form in (NB, ZINB) else 4.0
    fixed = {"target": inputs["target"]}
    leaves = [inputs[name] for name in names]
    assert torch.autograd.gradcheck(
        lambda *xs: call(form, **dict(zip(names, xs, strict=True)), **fixed), leaves
    )
    if backend == "reference":
        assert torch.autograd.gradgradcheck(
            lambda *xs: call(form, **dict(zip(names, xs, strict=True)), **fixed), leaves
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_extreme_parameters_give_finite_values(dtype: torch.dtype, backend: str) -> None:
    """Results are finite wherever the exact ones are."""
    logits = torch.tensor([[0.0, 200.0, -200.0, 1e4, -1e4, 0.0]]).repeat(8, 1).to(dtype)
    target = torch.tensor([[0.0, 1.0, 3.0, 1000.0, 1e6, 0.0]]).repeat(8, 1).to(dtype)
    target[4:] = 0
    log_dispersion = torch.tensor([-80.0, -9.0, 0.0, 80.0]).repeat(2).unsqueeze(1).repeat(1, 6).to(dtype)
    zi_logits = torch.tensor([-1e4, -200.0, -85.0, 0.0, 85.0, 1e4]).repeat(8, 1).to(dtype)
    library = torch.full((8,), 1e4, dtype=dtype)
    inputs = {"logits": logits, "log_dispersion": log_dispersion, "zi_logits": zi_logits, "library": library}
    inputs = {name: x.clone().requires_grad_() for name, x in inputs.items()}
    value = call(ZINB_RAW, target=target, **inputs)
    assert value.isfinite().all()
    for name, gradient in gradients(value, inputs).items():
        assert gradient.isfinite().all(), name
    close(value, call(ZINB_RAW, fastvae.reference, target=target.double(), **in_float64(inputs)), 1e-5)


def test_unlikely_zero_with_little_zero_inflation_is_accurate(backend: str) -> None:
    """exp(pi) and exp(-nll) both underflow."""
    mean = torch.tensor([[3e4, 90.0, 200.0]], requires_grad=True)
    theta = torch.full_like(mean, 1e8, requires_grad=True)
    pi = torch.tensor([[-120.0, -150.0, -200.5]], requires_grad=True)
    inputs = {"mean": mean, "inverse_dispersion": theta, "zi_logits": pi}
    value = call(ZINB, target=torch.zeros_like(mean), **inputs)
    expected, grads = by_reference(ZINB, inputs | {"target": torch.zeros(1, 3)})
    close(value, expected, 1e-6)
    found = gradients(value, inputs)
    close(found["mean"], grads["mean"], 1e-5)
    close(found["zi_logits"], grads["zi_logits"], 1e-5)


# ---------------------------------------------------------------------------------------------------------------------
# Inputs
# ---------------------------------------------------------------------------------------------------------------------

INTEGERS = (torch.uint8, torch.uint16, torch.int32, torch.int64)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", INTEGERS, ids=str)
@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "csr"])
def test_integer_targets_are_not_scaled(form: str, dtype: torch.dtype, sparse: bool, backend: str) -> None:
    inputs = make(form)
    inputs["target"] = inputs["target"].clamp(max=255)
    expected = call(form, **inputs)
    target = inputs["target"].to(torch.int64)
    if sparse:
        csr = target.to_sparse_csr()
        target = torch.sparse_csr_tensor(
            csr.crow_indices(), csr.col_indices(), csr.values().to(dtype), csr.shape
        )
    else:
        target = target.to(dtype)
    assert torch.equal(call(form, **inputs | {"target": target}), expected)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_csr_target_equals_dense(form: str, dtype: torch.dtype, backend: str) -> None:
    inputs = make(form, 6, 2100, dtype)
    inputs["target"][2] = 0
    weights = 0.5 + torch.rand(6)
    dense = call(form, **inputs)
    by_dense = gradients(dense, inputs, weights)
    sparse = call(form, **inputs | {"target": inputs["target"].to_sparse_csr()})
    assert torch.equal(dense, sparse)
    for name, gradient in gradients(sparse, inputs, weights).items():
        assert torch.equal(gradient, by_dense[name])


def test_malformed_csr_raises(native: None) -> None:
    inputs = make(NB, 3, 4)
    crow, col = torch.tensor([0, 1, 2, 3]), torch.tensor([0, 4, 1])
    with torch.sparse.check_sparse_tensor_invariants(False):
        target = torch.sparse_csr_tensor(crow, col, torch.ones(3), (3, 4))
        with pytest.raises(IndexError, match="col_indices of `target` must lie between 0 and 3"):
            call(NB, **inputs | {"target": target})
        target = torch.sparse_csr_tensor(torch.tensor([0, 5, 2, 3]), col - 1, torch.ones(3), (3, 4))
        with pytest.raises(ValueError, match="crow_indices of `target` must rise"):
            call(NB, **inputs | {"target": target})


@pytest.mark.parametrize("form", FORMS)
def test_strided_inputs_equal_contiguous(form: str, backend: str) -> None:
    """Halves of one tensor, transposed and expanded tensors are read in place or copied correctly."""
    inputs = make(form, 4, 9)
    lead = NAMES[form][0]
    expected = call(form, **inputs)
    half = torch.cat((inputs[lead], inputs[lead]), 1).chunk(2, 1)[1]
    transposed = inputs["target"].t().contiguous().t()
    assert torch.equal(call(form, **inputs | {lead: half, "target": transposed}), expected)
    one = {name: x[:1].expand(4, -1) if x.dim() == 2 else x for name, x in inputs.items()}
    if "library" in one:
        one["library"] = one["library"][:1].expand(4)
    first = call(form, **one)
    assert torch.equal(first, first[:1].expand(4))
    assert torch.allclose(first[0], expected[0], rtol=1e-6)


@pytest.mark.parametrize("form", [NB_RAW, ZINB_RAW])
def test_library_of_shape_b_1_is_accepted(form: str, backend: str) -> None:
    inputs = make(form)
    flat = call(form, **inputs)
    column = inputs["library"].detach().unsqueeze(1).requires_grad_()
    value = call(form, **inputs | {"library": column})
    assert torch.equal(value, flat)
    (gradient,) = torch.autograd.grad(value.sum(), column)
    (expected,) = torch.autograd.grad(flat.sum(), inputs["library"])
    assert torch.equal(gradient[:, 0], expected)


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16], ids=str)
def test_float32_dispersion_with_half_outputs_is_accepted(half: torch.dtype, backend: str) -> None:
    """The dtypes that autocast gives for a model with a learned dispersion."""
    inputs = make(ZINB_RAW, dtype=half)
    inputs["log_dispersion"] = inputs["log_dispersion"].detach().float().requires_grad_()
    inputs["library"] = inputs["library"].detach().float().requires_grad_()
    value = call(ZINB_RAW, **inputs)
    found = gradients(value, inputs)
    expected_value, expected = by_reference(ZINB_RAW, inputs)
    close(value, expected_value, 2e-6)
    assert found["log_dispersion"].dtype == torch.float32
    close(found["log_dispersion"], expected["log_dispersion"], 4e-6)
    close(found["library"], expected["library"], 1e-5)


ERRORS: list[tuple[str, Callable[[Inputs], Inputs], type[Exception], str]] = [
    (NB, lambda p: {"mean": p["mean"][0]}, ValueError, r"`mean` must have shape \(B, G\)"),
    (
        NB,
        lambda p: {"inverse_dispersion": torch.ones(3)},
        ValueError,
        r"`inverse_dispersion` must have the shape \(37,\), one for every feature of `mean`, or \(5, 37\), got \(3,\)",
    ),
    (
        NB,
        lambda p: {"inverse_dispersion": torch.ones(37, dtype=torch.float64)},
        TypeError,
        "`inverse_dispersion` must be float32, like `mean`, got float64",
    ),
    (
        NB,
        lambda p: {"inverse_dispersion": 1.0},
        TypeError,
        "`inverse_dispersion` must be a Tensor, got float",
    ),
    (
        ZINB,
        lambda p: {"zi_logits": p["zi_logits"][:, 1:]},
        ValueError,
        r"`zi_logits` must have the shape of `mean`",
    ),
    (
        NB_RAW,
        lambda p: {"library": torch.ones(4)},
        ValueError,
        r"`library` must have one value per row of `logits`",
    ),
    (
        NB_RAW,
        lambda p: {"target": p["target"].bool()},
        TypeError,
        "`target` must be float32, uint8, uint16, int32 or",
    ),
    (NB_RAW, lambda p: {"target": p["target"].to_sparse()}, TypeError, "did you mean target.to_sparse_csr"),
    (NB_RAW, lambda p: {"target": p["target"].requires_grad_()}, ValueError, "`target` requires a gradient"),
    (
        NB_RAW,
        lambda p: {"target": p["target"][:, 1:]},
        ValueError,
        "`target` must have the shape of `logits`",
    ),
]


@pytest.mark.parametrize("case", ERRORS, ids=lambda case: case[3])
def test_wrong_inputs_raise(
    case: tuple[str, Callable[[Inputs], Inputs], type[Exception], str], backend: str
) -> None:
    form, change, kind, message = case
    inputs = make(form)
    inputs |= change(inputs)
    with pytest.raises(kind, match=rf"fastvae\.{form}_nll: .*{message}"):
        call(form, **inputs)


@pytest.mark.parametrize(
    ("starts", "columns", "message"),
    [
        ([0, 2, 2, 4], [1, 4, 0, 5], "col_indices from 0 to 4, got 5 at position 1 of row 2$"),
        ([0, 2, 2, 4], [4, -1, 0, 2], "col_indices from 0 to 4, got -1 at position 1 of row 0$"),
        ([0, 2, 1, 4], [0, 1, 2, 3], "crow_indices that rise from 0 to its 4 values, got 1 at position 2"),
        ([0, 2, 2, 3], [0, 1, 2, 3], "crow_indices that rise from 0 to its 4 values, got 3 at position 3"),
        ([0, 2, 2, 4], [4, 1, 0, 2], "ascending col_indices in every row.*, got 1 at position 1 of row 0;"),
        ([0, 2, 2, 4], [1, 4, 2, 2], "ascending col_indices in every row.*, got 2 at position 1 of row 2;"),
    ],
)
def test_validate_names_the_first_wrong_position(starts: list[int], columns: list[int], message: str) -> None:
    """Only a GPU needs ascending columns, which torch makes of others; a column out of range it cannot mend."""
    with torch.sparse.check_sparse_tensor_invariants(False):
        target = torch.sparse_csr_tensor(torch.tensor(starts), torch.tensor(columns), torch.ones(4), (3, 5))
    where, positions = "negative_binomial_nll", (target.crow_indices(), target.col_indices(), 5)
    with pytest.raises(ValueError, match=f"fastvae.{where}: `target` must have {message}"):
        check_columns(where, "target", *positions)
    inputs = make(NB, 3, 5) | {"target": target}
    if message.endswith(";"):
        functional.negative_binomial_nll(**inputs, validate=True)
        mended = target.to_dense().to_sparse_csr()
        check_columns(where, "target", mended.crow_indices(), mended.col_indices(), 5)
    else:
        with pytest.raises(ValueError, match=f"`target` must have {message}"):
            functional.negative_binomial_nll(**inputs, validate=True)


@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "csr"])
@pytest.mark.parametrize("value", [-1.0, 2.5, math.nan, math.inf], ids=str)
def test_validate_names_the_first_invalid_count(sparse: bool, value: float, backend: str) -> None:
    inputs = make(NB)
    functional.negative_binomial_nll(**inputs, validate=True)
    inputs["target"][3, 17] = inputs["target"][4, 1] = value
    target = inputs["target"].to_sparse_csr() if sparse else inputs["target"]
    with pytest.raises(ValueError, match=rf"`target` must hold counts.*, got {value} at \(3, 17\)"):
        functional.negative_binomial_nll(**inputs | {"target": target}, validate=True)


def test_validate_accepts_an_empty_cell(backend: str) -> None:
    inputs = make(NB_RAW)
    inputs["target"][1] = 0
    inputs["library"] = inputs["target"].sum(1)
    value = functional.negative_binomial_logits_nll(**inputs, validate=True)
    assert value[1] == 0
    assert torch.equal(value, call(NB_RAW, **inputs))


@pytest.mark.parametrize(
    ("form", "name", "value"),
    [(NB, "mean", 0.0), (ZINB, "inverse_dispersion", -1.0), (ZINB, "zi_logits", math.nan),
     (NB_RAW, "library", -1.0), (ZINB_RAW, "logits", math.inf), (ZINB_RAW, "log_dispersion", math.nan)],
)  # fmt: skip
def test_validate_names_the_first_invalid_parameter(form: str, name: str, value: float, backend: str) -> None:
    inputs = make(form)
    inputs[name] = inputs[name].detach().clone()
    inputs[name].view(-1)[2] = value
    with pytest.raises(ValueError, match=rf"`{name}` must hold .* numbers.*, got {value} at \((0, )?2,?\)"):
        getattr(functional, f"{form}_nll")(**inputs, validate=True)


# ---------------------------------------------------------------------------------------------------------------------
# Autograd
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shared", [True, False], ids=["gene", "gene-cell"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("use", ["loss", "nll", "both", "scaled", "twice"])
def test_outputs_used_in_any_way_give_correct_gradients(
    form: str, shared: bool, dtype: torch.dtype, reduction: str, use: str, backend: str
) -> None:
    """The gradient of (G,) is a sum over rows. One factor scales it; factors per row require computing it again."""
    inputs = make(form, 20, 33, dtype, shared)
    names = list(NAMES[form])
    before = [x.detach().clone() for x in inputs.values()]

    def objective(p: Inputs, module: Any) -> Tensor:
        params = [p[name] for name in names]
        kl, beta = torch.ones(20), torch.tensor(0.5)
        code = fastvae.reference.REDUCTIONS[reduction]
        if module is functional:
            loss, nll = functional.loss.nll(form, params, p["target"], NUMBERS[form], kl, beta, code)
        else:
            loss, nll = fastvae.reference.nll(form, params, p["target"], NUMBERS[form], kl, beta, code)
        rows = torch.linspace(0.5, 1.5, 20, dtype=nll.dtype)
        if use == "nll":
            return (nll * rows).sum()
        total = (loss * rows).sum() if reduction == "none" else loss
        return {
            "loss": total,
            "both": total + (nll * rows).sum(),
            "scaled": -3 * total,
            "twice": total + total,
        }[use]

    found = gradients(objective(inputs, functional), inputs)
    wide = in_float64(inputs)
    expected = gradients(objective(wide, fastvae.reference), wide)
    for name in found:
        close(found[name], expected[name], 4e-6 if dtype == torch.float32 else 2e-3)
    for x, y in zip(inputs.values(), before, strict=True):
        assert torch.equal(x, y)
        assert x._version == 0


@pytest.mark.parametrize("requested", NAMES[ZINB_RAW])
def test_single_input_gradient_equals_the_formula(requested: str, backend: str) -> None:
    inputs = {name: x.detach() for name, x in make(ZINB_RAW, 12).items()}
    inputs[requested].requires_grad_()
    weights = 0.5 + torch.rand(12)
    value = call(ZINB_RAW, **inputs)
    _, expected = by_reference(ZINB_RAW, inputs, weights)
    close(gradients(value, inputs, weights)[requested], expected[requested], 4e-6)


def test_kept_graph_gives_the_same_gradient_twice(backend: str) -> None:
    inputs = make(NB_RAW)
    loss = call(NB_RAW, **inputs).sum()
    leaves = [inputs[name] for name in NAMES[NB_RAW]]
    first = torch.autograd.grad(loss, leaves, retain_graph=True)
    copies = [g.clone() for g in first]
    second = torch.autograd.grad(loss, leaves)
    for a, b, c in zip(first, second, copies, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, c)


def test_second_derivative_raises(native: None) -> None:
    inputs = make(ZINB_RAW)
    first = torch.autograd.grad(call(ZINB_RAW, **inputs).sum(), inputs["logits"], create_graph=True)[0]
    with pytest.raises(RuntimeError, match="use_backend"):
        first.sum().backward()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("shared", [True, False], ids=["gene", "gene-cell"])
@pytest.mark.parametrize("sparse", [True, False], ids=["csr", "dense"])
def test_opcheck(form: str, dtype: torch.dtype, shared: bool, sparse: bool, native: None) -> None:
    inputs = make(form, 3, 9, dtype, shared)
    params, target = [inputs[name] for name in NAMES[form]], inputs["target"]
    if sparse:
        csr = target.to_sparse_csr()
        # These are copies, because views of a sparse tensor refer to it, and the checks cannot make a fake of it.
        parts = [part.clone() for part in (csr.crow_indices(), csr.col_indices(), csr.values())]
        params, target = [*params, *parts[:2]], parts[2]
    for reduction in (0, 2):
        torch.library.opcheck(
            torch.ops.fastvae.nll.default,
            (form, params, target, NUMBERS[form], torch.rand(3), torch.tensor(0.5), reduction),
            test_utils=("test_schema", "test_autograd_registration", "test_faketensor"),
        )
    torch.library.opcheck(
        torch.ops.fastvae.nll.default,
        (form, params, target, NUMBERS[form], torch.rand(3), torch.tensor(0.5), 2),
    )


def test_compiled_call_is_one_graph(native: None) -> None:
    from torch._dynamo.testing import CompileCounter

    counter = CompileCounter()

    elbo = fastvae.ELBO(likelihoods.ZeroInflatedNegativeBinomial(11))

    def step(logits: Tensor, library: Tensor, zi_logits: Tensor, x: Tensor, kl: Tensor) -> Tensor:
        return elbo((logits, library, zi_logits), x, kl=kl).loss

    torch._dynamo.reset()
    compiled = torch.compile(step, backend=counter, fullgraph=True, dynamic=True)
    for rows in (3, 5, 8):
        p = make(ZINB_RAW, rows, 11)
        args = p["logits"], p["library"].detach(), p["zi_logits"], p["target"], torch.rand(rows)
        leaves = [args[0], args[2], elbo.likelihood.log_dispersion]
        expected = torch.autograd.grad(step(*args), leaves)
        for a, b in zip(torch.autograd.grad(compiled(*args), leaves), expected, strict=True):
            torch.testing.assert_close(a, b)
    assert counter.frame_count == 1


@pytest.mark.parametrize("form", FORMS)
def test_same_bits_at_any_thread_count(form: str, threads: None, native: None) -> None:
    inputs = make(form, 70, 3000)
    results = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        loss, nll = functional.loss.nll(
            form,
            [inputs[name] for name in NAMES[form]],
            inputs["target"],
            NUMBERS[form],
            torch.ones(70),
            None,
            2,
        )
        results.append([loss, nll, *gradients(loss, inputs).values()])
    for result in results[1:]:
        for a, b in zip(results[0], result, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("where", ["lead", "zi_logits", "target"])
def test_nan_affects_only_its_row(form: str, where: str, backend: str) -> None:
    name = NAMES[form][0] if where == "lead" else where
    inputs = make(form, 6, 40)
    if name not in inputs:
        pytest.skip("no additional zeros")
    with torch.no_grad():
        inputs["target"][2, 11] = 0  # for other counts, the mean's gradient does not depend on zi_logits
        inputs[name][2, 11] = math.nan
    value = call(form, **inputs)
    assert value[2].isnan()
    assert value[[0, 1, 3, 4, 5]].isfinite().all()
    gradient = gradients(value, inputs)[NAMES[form][0]]
    assert gradient[[0, 1, 3, 4, 5]].isfinite().all()
    assert gradient[2, 11].isnan()


def test_every_instruction_set_gives_the_same_results(on_capability: Callable[[str], str]) -> None:
    script = f"""
import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})
import itertools, torch, test_counts as t
for form, dtype, shared in itertools.product({[NB, ZINB_RAW]}, (torch.float32, torch.float64), (True, False)):
    torch.manual_seed(1)
    inputs = t.make(form, 9, 1100, dtype, shared)
    value = t.call(form, **inputs)
    expected, grads = t.by_reference(form, inputs)
    t.close(value, expected, t.VALUES[dtype])
    for name, gradient in t.gradients(value, inputs).items():
        t.close(gradient, grads[name], t.SLOPES[dtype])
print("good")
"""
    assert on_capability(script).strip() == "good"


# ---------------------------------------------------------------------------------------------------------------------
# Modules
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dispersion", ["gene", "gene-cell"])
@pytest.mark.parametrize("kind", [likelihoods.NegativeBinomial, likelihoods.ZeroInflatedNegativeBinomial])
def test_modules_equal_the_functions(
    kind: type[likelihoods.NegativeBinomial], dispersion: str, backend: str
) -> None:
    inflated = kind is likelihoods.ZeroInflatedNegativeBinomial
    inputs = make(ZINB_RAW, 6, 5, shared=False)
    likelihood = kind(5, dispersion)
    params = [inputs["logits"], inputs["library"].unsqueeze(1)]
    log_dispersion = inputs["log_dispersion"]
    if dispersion == "gene":
        with torch.no_grad():
            likelihood.log_dispersion.copy_(log_dispersion[0])
        log_dispersion = likelihood.log_dispersion
    else:
        params.append(log_dispersion)
    if inflated:
        params.append(inputs["zi_logits"])
    assert likelihood.channels(5) == 5 * (len(params) - 1)

    form = ZINB_RAW if inflated else NB_RAW
    given = {"logits": inputs["logits"], "log_dispersion": log_dispersion, "library": inputs["library"]}
    if inflated:
        given["zi_logits"] = inputs["zi_logits"]
    expected = formula(form, inputs["target"], **given).sum(1)
    close(likelihood.nll(tuple(params), inputs["target"]), expected, 2e-6)
    out = fastvae.ELBO(likelihood, beta=0.25, reduction="sum")(
        tuple(params), inputs["target"].int(), kl=torch.ones(6)
    )
    close(out.loss, expected.sum() + 1.5, 2e-6)
    out.loss.backward()
    assert log_dispersion.grad is not None
    assert log_dispersion.grad.abs().sum() > 0


@pytest.mark.parametrize(
    ("likelihood", "parts", "name"),
    [
        (likelihoods.NegativeBinomial(11), 1, "logits"),
        (likelihoods.ZeroInflatedNegativeBinomial(11, "gene-cell"), 3, "logits"),
        (likelihoods.NegativeBinomialMixture(11), 3, "mean1"),
        (likelihoods.Multinomial(11), 1, "params"),
    ],
    ids=str,
)
def test_modules_of_other_features_raise(likelihood: Any, parts: int, name: str) -> None:
    recon: Any = [torch.ones(4, 10) for _ in range(parts)]
    if isinstance(likelihood, likelihoods.NegativeBinomial):
        recon.insert(1, torch.ones(4))
    recon = recon[0] if name == "params" else tuple(recon)
    message = rf"{type(likelihood).__name__}: `{name}` must have 11 features, got shape \(4, 10\)"
    for call in (likelihood.nll, functools.partial(fastvae.ELBO(likelihood), kl=torch.zeros(4))):
        with pytest.raises(ValueError, match=message):
            call(recon, torch.ones(4, 10))
    with pytest.raises(ValueError, match=message):
        likelihood.nll(recon, torch.ones(2, 10), draws=2)


def test_samples_have_the_right_mean_and_variance() -> None:
    likelihood = likelihoods.ZeroInflatedNegativeBinomial(3)
    with torch.no_grad():
        likelihood.log_dispersion.copy_(torch.tensor([0.0, 1.0, 3.0]))
    draws = 200_000
    logits, zi_logits = (
        torch.tensor([[0.0, 1.0, 2.0]]).expand(draws, 3),
        torch.tensor([[-9.0, 0.0, 1.0]]).expand(draws, 3),
    )
    params = (logits, torch.full((draws,), 50.0), zi_logits)
    generator = torch.Generator().manual_seed(3)
    counts = likelihood.sample(params, generator=generator).double()
    again = likelihood.sample(params, generator=torch.Generator().manual_seed(3)).double()
    assert torch.equal(counts, again)
    assert torch.equal(counts, counts.round())
    mean = likelihood.mean(params)[0].detach().double()
    kept = torch.sigmoid(-zi_logits[0]).double()
    rate, theta = mean / kept, likelihood.log_dispersion.detach().double().exp()
    variance = kept * (rate + rate**2 / theta + rate**2) - mean**2
    assert ((counts.mean(0) - mean).abs() < 5 * (variance / draws).sqrt()).all()
    torch.testing.assert_close(counts.var(0), variance, rtol=0.05, atol=0)


def test_modules_with_wrong_arguments_raise() -> None:
    with pytest.raises(TypeError, match="`features` must be an int, got float"):
        likelihoods.NegativeBinomial(3.0)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="`features` must be at least 1, got 0"):
        likelihoods.NegativeBinomial(0)
    with pytest.raises(ValueError, match="`dispersion` must be one of 'gene', 'gene-cell', got 'cell'"):
        likelihoods.NegativeBinomial(3, "cell")
    logits = torch.zeros(2, 3)
    with pytest.raises(TypeError, match=r"must be the tuple \(logits, library, zi_logits\), got 2 values"):
        likelihoods.ZeroInflatedNegativeBinomial(3).nll((logits, torch.ones(2)), logits)
    with pytest.raises(TypeError, match=r"must be the tuple \(logits, library\), got Tensor"):
        fastvae.ELBO(likelihoods.NegativeBinomial(3))(logits, logits, kl=torch.zeros(2))


def test_backend_without_the_kernel_warns_or_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(fastvae.backends.choose.LIKELIHOODS_LACKING, ("native", "cpu"), (NB,))
    monkeypatch.setattr(fastvae.backends.choose, "_fallbacks_warned", set())
    inputs = make(NB)
    with fastvae.use_backend("auto"):
        with pytest.warns(
            RuntimeWarning, match="pure-PyTorch reference for the likelihood 'negative_binomial'"
        ):
            value = call(NB, **inputs)
        assert torch.equal(value, call(NB, fastvae.reference, **inputs))
    with fastvae.use_backend("native"), pytest.raises(RuntimeError, match="no kernel for the likelihood"):
        call(NB, **inputs)
