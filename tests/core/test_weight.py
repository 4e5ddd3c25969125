"""Weights of elements: for every likelihood, the float64 formula times the weight, with NaN and inf where it is 0."""

import functools
import math
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import cases
import pytest
import torch
from cases import DTYPES, WITH_TARGET, Case, Inputs, Result
from published_logistics import log_probabilities, mixture
from test_values import check, check_gradient
from torch import Tensor

import fastvae
from fastvae import functional as fv

WEIGHTS = (torch.bool, torch.uint8, torch.float32, torch.float16, torch.float64)


def make_weight(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """About a third of zeros, in each dimension that is not 1; otherwise a number above 1."""
    if math.prod(shape) == 1:
        return torch.full(shape, 2).to(dtype)
    kept = torch.rand(shape) > 0.35
    kept.view(-1)[0], kept.view(-1)[-1] = False, True
    if dtype == torch.bool:
        return kept
    values = torch.randint(1, 4, shape) if dtype == torch.uint8 else torch.rand(shape) + 0.5
    return (values * kept).to(dtype)


def poisoned(x: Tensor, removed: Tensor) -> Tensor:
    """`x` with NaN, inf and -inf in turns where `removed` says, if it has values of that kind."""
    if not x.is_floating_point() or x.dim() == 0:
        return x
    poison = torch.tensor([math.nan, math.inf, -math.inf], device=x.device)
    turns = poison[torch.arange(x.numel(), device=x.device) % 3].view(x.shape)
    result = torch.where(removed, turns.to(x.dtype), x)
    channels_last = x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last)
    return result.contiguous(memory_format=torch.channels_last) if channels_last else result


class Weighted:
    """fastvae.functional with a weight in every call."""

    def __init__(self, weight: Tensor) -> None:
        self.weight = weight

    def __getattr__(self, name: str) -> Any:
        return functools.partial(getattr(fv, name), weight=self.weight)


# ---------------------------------------------------------------------------------------------------------------------
# Independent elements
# ---------------------------------------------------------------------------------------------------------------------

SHAPE = (3, 4, 5, 7)
# The sizes of a weight for this shape, and for one that does not fit into a block of the CPU kernels.
PLACES = {
    "full": SHAPE,
    "pixels": (3, 1, 5, 7),
    "channels": (3, 4, 1, 1),
    "rows": (3, 1, 1, 1),
    "data": (1, 4, 5, 7),
    "columns": (1, 1, 1, 7),
    "lines": (3, 1, 5, 1),
    "alternate": (1, 4, 1, 7),
    "number": (1, 1, 1, 1),
}
LONG = (2, 3, 11, 67)
LONG_PLACES = {"full": LONG, "pixels": (2, 1, 11, 67), "lines": (1, 3, 11, 1), "alternate": (2, 3, 1, 67)}


def removed_from(x: Tensor, removed: Tensor) -> Tensor:
    """Where elements are removed, for a tensor of the data's shape or for a packed head."""
    return removed if x.shape == removed.shape else torch.cat((removed, removed), 1)


def exact(case: Case, inputs: Inputs, weight: Tensor) -> Result:
    leaves = {name: x.requires_grad_() for name, x in cases.to_exact(inputs, case.counts).items()}
    terms = [weight.double() * term for term in case.terms(**leaves)]
    value, scale = sum(terms), sum(term.abs() for term in terms)
    if not case.per_element:
        value, scale = value.flatten(1).sum(1), scale.flatten(1).sum(1)
    names = cases.differentiable(case, inputs)
    slopes = torch.autograd.grad((value * cases.cotangent(value)).sum(), [leaves[name] for name in names])
    return Result(value.detach(), scale.detach(), dict(zip(names, slopes, strict=True)))


def check_elements(case: Case, inputs: Inputs, weight: Tensor, dtype: torch.dtype) -> None:
    want = exact(case, inputs, weight)
    removed = (weight == 0).expand(inputs["target"].shape)
    given = {name: poisoned(x, removed_from(x, removed)) if x.dim() > 0 else x for name, x in inputs.items()}
    got = cases.run(case, Weighted(weight), given)
    check(got, want, dtype)
    for name, gradient in got.gradients.items():
        if gradient.dim() > 0:
            assert gradient.masked_fill(~removed_from(gradient, removed), 0).count_nonzero() == 0, name


@pytest.mark.parametrize("dtype", DTYPES, ids=cases.ids)
@pytest.mark.parametrize("weight_dtype", WEIGHTS, ids=cases.ids)
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("case", WITH_TARGET, ids=cases.ids)
def test_weighted_elements_equal_the_formula(
    backend: str, case: Case, place: str, weight_dtype: torch.dtype, dtype: torch.dtype
) -> None:
    inputs = cases.cast(case.inputs(SHAPE), dtype)
    check_elements(case, inputs, make_weight(PLACES[place], weight_dtype), dtype)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "strided"])
@pytest.mark.parametrize("place", LONG_PLACES)
@pytest.mark.parametrize(
    "name",
    ["bernoulli", "gaussian_learned", "gaussian_head", "student_t_learned", "poisson_rate_per_element"],
)
def test_weights_of_any_layout_are_read_in_place(backend: str, name: str, place: str, layout: str) -> None:
    case = cases.by_id[name]
    inputs = cases.cast(case.inputs(LONG), torch.float32)
    weight = make_weight(LONG_PLACES[place], torch.float32)
    if layout == "channels_last":
        inputs = {
            key: x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x
            for key, x in inputs.items()
        }
    elif layout == "strided":
        weight = torch.stack((weight, weight), -1)[..., 0]
        assert weight.stride(-1) == 2
    check_elements(case, inputs, weight, torch.float32)


@pytest.mark.parametrize("target", [torch.uint8, torch.bool, torch.uint16, torch.int64], ids=cases.ids)
@pytest.mark.parametrize("name", ["bernoulli", "gaussian", "poisson"])
def test_a_weight_goes_with_targets_of_any_dtype(backend: str, name: str, target: torch.dtype) -> None:
    case = cases.by_id[name]
    if target not in case.targets:
        pytest.skip("not accepted")
    inputs = cases.cast(case.inputs(SHAPE), torch.float32, target, counts=case.counts)
    check_elements(case, inputs, make_weight(PLACES["pixels"], torch.uint8), torch.float32)


# ---------------------------------------------------------------------------------------------------------------------
# Positions, pixels and counts
# ---------------------------------------------------------------------------------------------------------------------


class Family(NamedTuple):
    call: Callable[..., Tensor]  # with fastvae.functional, the inputs and the weight
    inputs: Callable[[], Inputs]  # in float64
    values: Callable[..., Tensor]  # the nll of each element, position or pixel, in float64
    # Where a tensor is poisoned, given where elements are removed; tensors that are not named stay as they are.
    poison: dict[str, Callable[[Tensor], Tensor]]
    weights: tuple[tuple[int, ...], ...]
    tolerance: float = 1e-12


def _randn(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


def _classes() -> Inputs:
    target = torch.randint(0, 11, (3, 6))
    target[1, 2] = -100
    return {"logits": 2 * _randn(3, 6, 11), "target": target}


def _class_values(logits: Tensor, target: Tensor) -> Tensor:
    chosen = logits.gather(-1, target.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    return torch.where(target == -100, 0.0, logits.logsumexp(-1) - chosen)


def _levels(planes: int, channels: int) -> Inputs:
    target = torch.randint(-40, 296, (3, channels, 5, 7)).clamp(0, 255).to(torch.uint8)
    return {"params": 1.5 * _randn(3, planes, 5, 7) - 0.5, "target": target}


def _logistic_values(params: Tensor, target: Tensor) -> Tensor:
    mean, log_scale = params.chunk(2, dim=1)
    return -log_probabilities(target.double() / 127.5 - 1, mean, log_scale)


def _mixture_values(params: Tensor, target: Tensor) -> Tensor:
    """Every pixel as a row of its own."""
    batch, planes, *pixels = params.shape
    components = planes // (10 if target.shape[1] == 3 else 3)
    rows, data = (x.flatten(2).movedim(1, 2).flatten(0, 1).unsqueeze(2) for x in (params, target))
    return mixture(rows, data, components).view(batch, 1, *pixels)


B, G = 4, 45


def _counts(*names: str) -> Inputs:
    values = {
        "mean": _randn(B, G).exp(),
        "inverse_dispersion": (2 * _randn(B, G)).exp(),
        "shared": (2 * _randn(G)).exp(),
        "logits": _randn(B, G),
        "log_dispersion": 2 * _randn(G),
        "zi_logits": 2 * _randn(B, G),
        "library": (4 + _randn(B)).exp(),
    }
    counts = torch.poisson(torch.exp(1.5 * _randn(B, G))) * (torch.rand(B, G) > 0.6)
    return {name.replace("shared", "inverse_dispersion"): values[name] for name in names} | {"target": counts}


def _count_values(
    target: Tensor,
    mean: Tensor | None = None,
    inverse_dispersion: Tensor | None = None,
    zi_logits: Tensor | None = None,
    logits: Tensor | None = None,
    log_dispersion: Tensor | None = None,
    library: Tensor | None = None,
) -> Tensor:
    if logits is not None and library is not None and log_dispersion is not None:
        mean, inverse_dispersion = library.view(-1, 1) * torch.softmax(logits, 1), log_dispersion.exp()
    assert mean is not None
    assert inverse_dispersion is not None
    t, r = target, inverse_dispersion.expand_as(mean)
    value = torch.lgamma(r) + torch.lgamma(t + 1) - torch.lgamma(t + r)
    value = value - r * torch.log(r / (r + mean)) - t * torch.log(mean / (r + mean))
    if zi_logits is None:
        return value
    log_p, log_rest = -torch.nn.functional.softplus(-zi_logits), -torch.nn.functional.softplus(zi_logits)
    return -torch.where(t == 0, torch.logaddexp(log_p, log_rest - value), log_rest - value)


def _same(removed: Tensor) -> Tensor:
    return removed


def _whole_genes(removed: Tensor) -> Tensor:
    return removed.all(0)


OF_COUNTS = ((B, G), (B, 1), (1, G), (G,), (1, 1))
OF_PIXELS = ((3, 1, 5, 7), (3, 5, 7), (1, 1, 5, 7), (3, 1, 1, 7), (3, 1, 1, 1), (1, 1, 1, 1))
FAMILIES = {
    "categorical": Family(
        lambda f, **inputs: f.categorical_nll(**inputs),
        _classes,
        _class_values,
        {"logits": lambda removed: removed.unsqueeze(-1)},
        ((3, 6), (3, 1), (1, 6), (1, 1)),
    ),
    "logistic": Family(
        lambda f, **inputs: f.discretized_logistic_nll(**inputs),
        lambda: _levels(6, 3),
        _logistic_values,
        {"params": lambda removed: torch.cat((removed, removed), 1)},
        ((3, 3, 5, 7), (3, 1, 5, 7), (1, 3, 1, 1), (3, 1, 1, 1)),
        1e-9,
    ),
    "mixture": Family(
        lambda f, **inputs: f.discretized_logistic_mixture_nll(**inputs, components=3),
        lambda: _levels(30, 3),
        _mixture_values,
        {"params": _same},
        OF_PIXELS,
        1e-9,
    ),
    "grey mixture": Family(
        lambda f, **inputs: f.discretized_logistic_mixture_nll(**inputs, components=2),
        lambda: _levels(6, 1),
        _mixture_values,
        {"params": _same},
        OF_PIXELS,
        1e-9,
    ),
    "counts": Family(
        lambda f, **inputs: f.negative_binomial_nll(**inputs),
        lambda: _counts("mean", "shared"),
        _count_values,
        {"mean": _same, "target": _same, "inverse_dispersion": _whole_genes},
        OF_COUNTS,
        1e-9,
    ),
    "inflated counts": Family(
        lambda f, **inputs: f.zero_inflated_negative_binomial_nll(**inputs),
        lambda: _counts("mean", "inverse_dispersion", "zi_logits"),
        _count_values,
        dict.fromkeys(("mean", "target", "inverse_dispersion", "zi_logits"), _same),
        OF_COUNTS,
        1e-9,
    ),
    "raw counts": Family(
        lambda f, **inputs: f.negative_binomial_logits_nll(**inputs),
        lambda: _counts("logits", "log_dispersion", "library"),
        _count_values,
        {"target": _same, "log_dispersion": _whole_genes},
        OF_COUNTS,
        1e-9,
    ),
    "inflated raw counts": Family(
        lambda f, **inputs: f.zero_inflated_negative_binomial_logits_nll(**inputs),
        lambda: _counts("logits", "log_dispersion", "zi_logits", "library"),
        _count_values,
        {"target": _same, "log_dispersion": _whole_genes, "zi_logits": _same},
        OF_COUNTS,
        1e-9,
    ),
}
COUNTS = [name for name in FAMILIES if "counts" in name]
GRID = [(name, shape) for name, family in FAMILIES.items() for shape in family.weights]


def check_family(
    family: Family,
    inputs: Inputs,
    weight: Tensor,
    dtype: torch.dtype,
    *,
    sparse: bool = False,
    clean: bool = False,
) -> None:
    """`inputs` are of the dtype under test."""
    names = [name for name, x in inputs.items() if name != "target" and x.is_floating_point()]
    leaves = {
        name: x.double().requires_grad_(name in names) if x.is_floating_point() else x
        for name, x in inputs.items()
    }
    values = family.values(**leaves)
    like = weight.double()
    if like.dim() == 3:  # pixels without the dimension of channels
        like = like.unsqueeze(1)
    like = like.expand(values.shape)
    want = (like * values).flatten(1).sum(1)
    cotangent = cases.cotangent(want)
    slopes = torch.autograd.grad((want * cotangent).sum(), [leaves[name] for name in names])

    removed = like == 0
    given = {
        name: poisoned(x, family.poison[name](removed)) if name in family.poison and not clean else x
        for name, x in inputs.items()
    }
    given = {name: x.detach().requires_grad_(name in names) for name, x in given.items()}
    if sparse:
        given["target"] = inputs["target"].to_sparse_csr()
    got = family.call(fv, **given, weight=weight)
    gradients = torch.autograd.grad(got, [given[name] for name in names], cotangent.to(got.dtype))
    scale = (like * values).abs().flatten(1).sum(1)
    tolerance = family.tolerance if dtype == torch.float64 else 1e-5
    assert got.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert ((got.double() - want).abs() <= tolerance * scale.clamp(min=1)).all()
    rough = {
        torch.float64: 10 * family.tolerance,
        torch.float32: 3e-5,
        torch.float16: 4e-3,
        torch.bfloat16: 3e-2,
    }
    for name, gradient, slope in zip(names, gradients, slopes, strict=True):
        assert gradient.shape == slope.shape
        assert gradient.dtype == dtype
        largest = slope.abs().max().clamp(min=1)
        assert ((gradient.double() - slope).abs() <= rough[dtype] * largest).all(), name
        if name in family.poison:
            left = family.poison[name](removed).expand(slope.shape)
            assert gradient.masked_fill(~left, 0).count_nonzero() == 0, name


@pytest.mark.parametrize("dtype", DTYPES, ids=cases.ids)
@pytest.mark.parametrize("weight_dtype", WEIGHTS, ids=cases.ids)
@pytest.mark.parametrize(("name", "shape"), GRID, ids=str)
def test_weighted_families_equal_the_formula(
    backend: str, name: str, shape: tuple[int, ...], weight_dtype: torch.dtype, dtype: torch.dtype
) -> None:
    family = FAMILIES[name]
    inputs = {key: x.to(dtype) if x.is_floating_point() else x for key, x in family.inputs().items()}
    check_family(family, inputs, make_weight(shape, weight_dtype), dtype)


@pytest.mark.filterwarnings("ignore:Sparse CSR")
@pytest.mark.parametrize("shape", OF_COUNTS, ids=str)
@pytest.mark.parametrize("name", COUNTS)
def test_weights_go_with_sparse_counts(backend: str, name: str, shape: tuple[int, ...]) -> None:
    inputs = {key: x.float() for key, x in FAMILIES[name].inputs().items()}
    check_family(
        FAMILIES[name], inputs, make_weight(shape, torch.float32), torch.float32, sparse=True, clean=True
    )


@pytest.mark.parametrize("shape", OF_PIXELS[:3], ids=str)
@pytest.mark.parametrize("name", ["logistic", "mixture", "grey mixture"])
def test_weights_go_with_channels_last_levels(backend: str, name: str, shape: tuple[int, ...]) -> None:
    if name == "logistic":
        shape = (shape[0], 3 if len(shape) == 3 else 1, 5, 7)
    inputs = {
        key: (x.float() if x.is_floating_point() else x).contiguous(memory_format=torch.channels_last)
        for key, x in FAMILIES[name].inputs().items()
    }
    check_family(FAMILIES[name], inputs, make_weight(shape, torch.uint8), torch.float32)


@pytest.mark.parametrize("name", ["raw counts", "inflated raw counts"])
def test_a_cell_without_any_weight_has_no_gradient_whatever_its_logits_are(backend: str, name: str) -> None:
    inputs = {key: x.float() for key, x in FAMILIES[name].inputs().items()}
    inputs["logits"][1], inputs["library"][1] = math.nan, math.inf
    weight = torch.ones(B, 1)
    weight[1] = 0
    leaves = {key: x.requires_grad_(key != "target") for key, x in inputs.items()}
    value = FAMILIES[name].call(fv, **leaves, weight=weight)
    value.sum().backward()
    assert value[1] == 0
    assert value.isfinite().all()
    for key, x in leaves.items():
        if key != "target":
            assert x.grad is not None
            assert x.grad.isfinite().all(), key
    assert leaves["logits"].grad[1].count_nonzero() == 0  # type: ignore[index]
    assert leaves["library"].grad[1] == 0  # type: ignore[index]


@pytest.mark.parametrize("name", ["counts", "inflated counts"])
@pytest.mark.parametrize("shape", OF_COUNTS, ids=str)
def test_weighted_elements_of_counts_equal_the_formula(
    backend: str, name: str, shape: tuple[int, ...]
) -> None:
    family = FAMILIES[name]
    inputs = {key: x.float() for key, x in family.inputs().items()}
    weight = make_weight(shape, torch.float32)
    leaves = {key: x.double().requires_grad_(key != "target") for key, x in inputs.items()}
    want = weight * family.values(**leaves)
    removed = (weight == 0).expand(want.shape)
    given = {
        key: poisoned(x, family.poison[key](removed)).requires_grad_(key != "target")
        for key, x in inputs.items()
    }
    got = family.call(fv, **given, weight=weight, reduction="none")
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-6)
    factors = torch.rand(B, G)
    names = [key for key in inputs if key != "target"]
    slopes = torch.autograd.grad((want * factors).sum(), [leaves[key] for key in names])
    gradients = torch.autograd.grad((got * factors).sum(), [given[key] for key in names])
    for gradient, slope in zip(gradients, slopes, strict=True):
        torch.testing.assert_close(gradient.double(), slope, rtol=1e-4, atol=1e-5)


# ---------------------------------------------------------------------------------------------------------------------
# Draws, modules, ELBO and bounds
# ---------------------------------------------------------------------------------------------------------------------

K = 3


@pytest.mark.parametrize("shape", [(4, 3, 5), (4, 1, 5), (1, 3, 1)], ids=str)
def test_draws_share_the_weight(backend: str, shape: tuple[int, ...]) -> None:
    weight, target = make_weight(shape, torch.float32), torch.rand(4, 3, 5)
    params = torch.randn(K, 4, 6, 5, requires_grad=True)
    poisoned_target = poisoned(target, (weight == 0).expand(target.shape))
    got = fv.gaussian_head_nll(params, poisoned_target, draws=K, weight=weight)
    want = torch.stack([fv.gaussian_head_nll(params[k], target, weight=weight) for k in range(K)])
    torch.testing.assert_close(got, want)
    a, b = (torch.autograd.grad((x * x).sum(), params)[0] for x in (got, want))
    torch.testing.assert_close(a, b)


@pytest.mark.parametrize("name", ["raw counts", "categorical", "mixture"])
def test_draws_of_the_other_families_share_the_weight(backend: str, name: str) -> None:
    family = FAMILIES[name]
    inputs = {key: x.float() if x.is_floating_point() else x for key, x in family.inputs().items()}
    weight = make_weight(family.weights[1], torch.float32)
    each = [
        {key: x + 0.1 * k for key, x in inputs.items() if key not in ("target", "log_dispersion")}
        for k in range(K)
    ]
    rest = {key: inputs[key] for key in ("target", "log_dispersion") if key in inputs}
    drawn = {key: torch.stack([one[key] for one in each]) for key in each[0]}
    got = family.call(fv, **drawn, **rest, weight=weight, draws=K)
    want = torch.stack([family.call(fv, **one, **rest, weight=weight) for one in each])
    torch.testing.assert_close(got, want)


def test_target_gets_the_negated_weighted_gradient(backend: str) -> None:
    mean, target = torch.randn(3, 5), torch.randn(3, 5, requires_grad=True)
    weight = make_weight((3, 5), torch.float32)
    (got,) = torch.autograd.grad(fv.gaussian_nll(mean, target, scale=2.0, weight=weight).sum(), target)
    torch.testing.assert_close(got, weight * (target.detach() - mean) / 4)


def test_elbo_weighs_the_elements(backend: str) -> None:
    elbo = fastvae.ELBO(fastvae.likelihoods.Gaussian("learned"), beta=0.5)
    recon, x, kl = torch.randn(4, 3, 5, requires_grad=True), torch.randn(4, 3, 5), torch.rand(4)
    weight = make_weight((4, 1, 5), torch.bool)
    logvar = elbo.likelihood.logvar
    out = elbo(recon, poisoned(x, ~weight.expand_as(x)), kl=kl, weight=weight)
    each = 0.5 * (math.log(2 * math.pi) + logvar + (x - recon) ** 2 * torch.exp(-logvar))
    want = (weight * each).sum((1, 2))
    torch.testing.assert_close(out.nll, want)
    torch.testing.assert_close(out.loss, (want + 0.5 * kl).mean())
    leaves = [recon, logvar]
    for a, b in zip(
        torch.autograd.grad(out.loss, leaves),
        torch.autograd.grad((want + 0.5 * kl).mean(), leaves),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


def test_product_takes_the_weights_of_its_parts(native: None) -> None:
    elbo = fastvae.ELBO(fastvae.likelihoods.Product({"image": "bernoulli", "label": "categorical"}))
    recon = {"image": torch.randn(4, 9), "label": torch.randn(4, 6)}
    x = {"image": torch.rand(4, 9), "label": torch.randint(0, 6, (4,))}
    weight = make_weight((4, 9), torch.bool)
    out = elbo(recon, x, kl=torch.zeros(4), weight={"image": weight})
    want = fv.bernoulli_nll(recon["image"], x["image"], weight=weight)
    torch.testing.assert_close(out.nll, want + fv.categorical_nll(recon["label"], x["label"]))
    with pytest.raises(ValueError, match=r"`weight` must be a dict with some of the keys 'image', 'label'"):
        elbo(recon, x, kl=torch.zeros(4), weight={"picture": weight})
    with pytest.raises(TypeError, match="`weight` must be a dict"):
        elbo(recon, x, kl=torch.zeros(4), weight=weight)


def test_module_without_weight_is_refused(native: None) -> None:
    class Own(torch.nn.Module):
        def nll(self, params: Tensor, target: Tensor) -> Tensor:
            return (params - target).abs().sum(1)

    elbo = fastvae.ELBO(Own())
    x = torch.rand(4, 9)
    assert elbo(x, x, kl=torch.zeros(4)).loss == 0
    with pytest.raises(
        TypeError, match=r"needs a likelihood with nll\(params, target, \*, weight=None\), got Own"
    ):
        elbo(x, x, kl=torch.zeros(4), weight=torch.ones(4, 9))


@pytest.mark.parametrize(
    ("likelihood", "data"),
    [
        (fastvae.likelihoods.Bernoulli(), torch.rand(4, 9)),
        (fastvae.likelihoods.Gaussian("per_element"), torch.rand(4, 9)),
        (fastvae.likelihoods.Product({"a": "bernoulli", "b": "gaussian"}), None),
    ],
    ids=["bernoulli", "gaussian", "product"],
)
def test_modules_take_draws(backend: str, likelihood: Any, data: Tensor | None) -> None:
    """K * B rows of parameters, as a decoder returns them for z.flatten(0, 1)."""
    if data is None:
        x: Any = {"a": torch.rand(4, 9), "b": torch.rand(4, 9)}
        params: Any = {"a": torch.randn(K * 4, 9), "b": torch.randn(K * 4, 9)}
        weight: Any = {"b": make_weight((4, 9), torch.bool)}

        def part(k: int) -> Any:
            return {key: value[4 * k : 4 * k + 4] for key, value in params.items()}
    else:
        x, params = data, torch.randn(K * 4, likelihood.channels(9))
        weight = make_weight((4, 9), torch.bool)

        def part(k: int) -> Any:
            return params[4 * k : 4 * k + 4]

    got = likelihood.nll(params, x, weight=weight, draws=K)
    want = torch.stack([likelihood.nll(part(k), x, weight=weight) for k in range(K)])
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize(
    "likelihood",
    [
        fastvae.likelihoods.Bernoulli(from_probs=True),
        fastvae.likelihoods.Laplace("per_element", log_scale_bounds=(-3, 2)),
        fastvae.likelihoods.Gaussian("per_element", logvar_bounds=(-3, 2)),
    ],
    ids=["probabilities", "laplace", "gaussian"],
)
def test_modules_that_convert_parameters_pass_no_gradient_to_what_is_left_out(
    backend: str, likelihood: Any
) -> None:
    weight = make_weight((4, 9), torch.bool)
    clean = torch.rand(4, likelihood.channels(9)) * 0.8 + 0.1
    x = torch.rand(4, 9)
    given = poisoned(clean, removed_from(clean, ~weight)).requires_grad_()
    leaf = clean.clone().requires_grad_()
    got, want = likelihood.nll(given, x, weight=weight), likelihood.nll(leaf, x, weight=weight)
    torch.testing.assert_close(got, want)
    (a,), (b,) = torch.autograd.grad(got.sum(), given), torch.autograd.grad(want.sum(), leaf)
    torch.testing.assert_close(a, b)


def test_modules_refuse_rows_that_are_not_draws(native: None) -> None:
    with pytest.raises(
        ValueError, match=re.escape("`params` must have K * B rows with K = `draws` = 3, got 4 rows")
    ):
        fastvae.likelihoods.Bernoulli().nll(torch.zeros(4, 2), torch.zeros(1, 2), draws=3)


@pytest.mark.parametrize("estimator", ["iwae", "stl", "dreg"])
def test_iwae_with_weights_is_miwae(backend: str, estimator: str) -> None:
    """Mattei and Frellsen 2019, equation 4: the bound of what is observed. The rest of x is NaN."""
    torch.manual_seed(3)
    decoder, observed = torch.nn.Linear(2, 9), torch.tensor([1, 0, 1, 1, 0, 1, 0, 1, 1]).bool()
    x = torch.randn(5, 9)
    mu, logvar = torch.randn(5, 2, requires_grad=True), torch.randn(5, 2, requires_grad=True)
    iwae = fastvae.IWAE("gaussian", samples=4, estimator=estimator)
    leaves = [mu, logvar, *decoder.parameters()]

    def run(decode: Callable[[Tensor], Tensor], x: Tensor, **weight: Tensor) -> list[Tensor]:
        draws = iwae.sample(mu, logvar, seed=torch.tensor([1, 2]))
        out = iwae(decode(draws.z.flatten(0, 1)), x, draws=draws, **weight)
        return [out.loss, out.bound, out.nll, *torch.autograd.grad(out.loss, leaves)]

    missing = x.masked_fill(~observed, math.nan)
    got = run(decoder, missing, weight=observed.expand(5, 9))
    want = run(lambda z: decoder(z)[:, observed], x[:, observed])
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)
    for a, b in zip(run(decoder, missing, weight=observed.view(1, 9)), want, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("estimator", ["iwae", "stl", "dreg"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_an_impossible_draw_has_no_part_in_the_gradient(backend: str, estimator: str, reduction: str) -> None:
    """A draw that gives x the probability 0 has weight 0 in the bound."""
    x = torch.ones(2, 3)
    logits = torch.randn(K * 2, 3)
    logits[3] = -math.inf  # draw 1 of row 1
    logits.requires_grad_()
    mu, logvar = torch.zeros(2, 4, requires_grad=True), torch.zeros(2, 4, requires_grad=True)
    iwae = fastvae.IWAE("bernoulli", samples=K, estimator=estimator, reduction=reduction)
    draws = iwae.sample(mu, logvar, seed=torch.tensor([1, 2]))
    out = iwae(logits, x, draws=draws)
    assert out.nll[1, 1] == math.inf
    gradient, *others = torch.autograd.grad(out.loss.sum(), [logits, mu, logvar])

    leaf = logits.detach().double().requires_grad_()
    kl = (draws.log_q - draws.log_p).detach().double()
    log_w = -torch.nn.functional.softplus(-leaf).view(K, 2, 3).sum(2) - kl
    of_row_1 = torch.stack((log_w[0, 1], log_w[2, 1])).logsumexp(0) - math.log(K)
    bound = torch.stack((log_w[:, 0].logsumexp(0) - math.log(K), of_row_1))
    torch.testing.assert_close(out.bound.double(), bound)
    loss = -bound if reduction == "none" else -bound.mean()
    torch.testing.assert_close(out.loss.double(), loss)
    (want,) = torch.autograd.grad(loss.sum(), leaf)
    torch.testing.assert_close(gradient.double(), want.nan_to_num(), rtol=1e-5, atol=1e-6)
    assert gradient[3].count_nonzero() == 0
    assert all(other.isfinite().all() for other in others)


def test_a_row_without_a_possible_draw_has_an_infinite_loss(backend: str) -> None:
    logits = torch.full((K * 2, 3), -math.inf)
    logits[::2] = 0.5
    logits.requires_grad_()
    iwae = fastvae.IWAE("bernoulli", samples=K, reduction="none")
    draws = iwae.sample(torch.zeros(2, 4), torch.zeros(2, 4))
    out = iwae(logits, torch.ones(2, 3), draws=draws)
    assert out.loss[0].isfinite()
    assert out.loss[1] == math.inf
    (gradient,) = torch.autograd.grad(out.loss[0], logits)
    assert gradient.isfinite().all()


# ---------------------------------------------------------------------------------------------------------------------
# Compilers, opcheck and memory
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=cases.ids)
def test_compiled_weighted_elbo_is_one_graph(backend: str, dtype: torch.dtype) -> None:
    if backend == "triton" and dtype == torch.float16:
        pytest.skip("the interpreter is slow")
    elbo = fastvae.ELBO(fastvae.likelihoods.Gaussian("per_element"))

    def step(recon: Tensor, x: Tensor, weight: Tensor) -> Tensor:
        out = elbo(recon, x, kl=torch.zeros(len(x)), weight=weight)
        return 3 * out.loss + out.nll.square().mean()

    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend="aot_eager")
    for rows in (3, 5):
        recon, x = torch.randn(rows, 4, 5).to(dtype).requires_grad_(), torch.rand(rows, 2, 5)
        for weight in (make_weight((rows, 1, 5), torch.bool), make_weight((rows, 2, 5), torch.float32)):
            got, want = compiled(recon, x, weight), step(recon, x, weight)
            torch.testing.assert_close(got, want)
            a, b = (torch.autograd.grad(value, recon)[0] for value in (got, want))
            torch.testing.assert_close(a, b)


def test_a_weight_is_not_expanded(native: None) -> None:
    """A mask of 4 MiB for data of 64 MiB in four channels: expanding it would take 16 MiB, and float32 64 MiB."""
    from benchmarks.timing import peak_bytes

    mean, target = torch.randn(4, 4, 2**10, 2**10), torch.rand(4, 4, 2**10, 2**10)
    weight = torch.ones(4, 1, 2**10, 2**10, dtype=torch.bool)
    with torch.no_grad():
        assert peak_bytes(lambda: fv.gaussian_nll(mean, target, weight=weight), torch.device("cpu")) < 2**20


# ---------------------------------------------------------------------------------------------------------------------
# Errors and warnings
# ---------------------------------------------------------------------------------------------------------------------

X = torch.rand(4, 3, 5, 7)
LOGITS = torch.zeros(4, 3, 5, 7)


@pytest.mark.parametrize(
    ("weight", "error", "message"),
    [
        ([1, 2], TypeError, "`weight` must be a Tensor, got list"),
        (torch.ones(4, 3, 5, 7).to_sparse(), TypeError, "`weight` must be dense"),
        (
            torch.ones(4, 3, 5, 7).long(),
            TypeError,
            "`weight` must be bool, uint8, .* got int64; did you mean weight.bool",
        ),
        (torch.ones(4, 3, 5, 7, requires_grad=True), ValueError, r"pass weight\.detach\(\)"),
        (
            torch.ones(4, 3, 5, 7, device="meta"),
            ValueError,
            r"`weight` must be on the device of `target`, cpu, got meta",
        ),
        (
            torch.ones(4, 2, 5, 7),
            ValueError,
            r"`weight` must have the shape \(4, 3, 5, 7\), in which any size may be 1, for `target` \(4, 3, 5, 7\), "
            r"got \(4, 2, 5, 7\)",
        ),
        (torch.ones(4), ValueError, r"got \(4,\); did you mean weight.reshape\(\(4, 1, 1, 1\)\)"),
        (torch.ones(4, 5, 7), ValueError, r"got \(4, 5, 7\); did you mean weight.reshape\(\(4, 1, 5, 7\)\)"),
        (torch.ones(()), ValueError, r"got \(\)"),
    ],
)
def test_wrong_weights_are_refused(native: None, weight: Any, error: type[Exception], message: str) -> None:
    for call in (
        lambda: fv.bernoulli_nll(LOGITS, X, weight=weight),
        lambda: fv.bernoulli_nll(LOGITS.expand(2, *LOGITS.shape), X, draws=2, weight=weight),
    ):
        with pytest.raises(error, match=f"fastvae.bernoulli_nll: .*{message}"):
            call()
    with pytest.raises(error, match="fastvae.ELBO: .*" + message.replace("`target`", "`x`")):
        fastvae.ELBO("bernoulli")(LOGITS, X, kl=torch.zeros(4), weight=weight)


def test_a_weight_with_too_many_broadcast_dimensions_is_refused(native: None) -> None:
    x, weight = torch.rand(2, 2, 3, 2, 3, 2), torch.rand(2, 2, 1, 2, 1, 2)
    message = (
        "the `weight` has too many broadcast dimensions; pass weight.expand([2, 2, 3, 2, 3, 2]).contiguous()"
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        fv.bernoulli_nll(x, x, weight=weight)
    want = torch.nn.functional.binary_cross_entropy_with_logits(x, x, reduction="none") * weight
    got = fv.bernoulli_nll(x, x, weight=weight.expand([2, 2, 3, 2, 3, 2]).contiguous())
    torch.testing.assert_close(got, want.flatten(1).sum(1))


def test_the_advice_for_a_wrong_weight_works(native: None) -> None:
    mask = make_weight((4, 5, 7), torch.bool)
    got = fv.bernoulli_nll(LOGITS, X, weight=mask.reshape((4, 1, 5, 7)))
    torch.testing.assert_close(got, 3 * math.log(2) * mask.sum((1, 2)))


def test_wrong_weights_of_pixels_and_features_are_refused(native: None) -> None:
    params, levels = torch.zeros(4, 20, 5, 7), torch.zeros(4, 3, 5, 7, dtype=torch.uint8)
    with pytest.raises(
        ValueError, match=r"one value per pixel: the shape \(4, 1, 5, 7\).*got \(4, 3, 5, 7\)"
    ):
        fv.discretized_logistic_mixture_nll(params, levels, components=2, weight=torch.ones(4, 3, 5, 7))
    mean = torch.ones(4, 6)
    with pytest.raises(ValueError, match=r"or \(6,\), one value for every feature, got \(4,\)"):
        fv.negative_binomial_nll(mean, mean, mean, weight=torch.ones(4))
    with pytest.raises(ValueError, match=r"got \(5,\)"):
        fv.categorical_nll(torch.zeros(4, 5, 6), torch.zeros(4, 5).long(), weight=torch.ones(5))


def test_first_call_warns_of_wrong_values_of_a_weight(native: None, range_warnings: None) -> None:
    weight = torch.ones(4, 6)
    weight[2, 1] = -1
    with pytest.warns(
        UserWarning, match="`weight` must hold finite numbers that are at least 0.*from -1 to 1"
    ):
        fv.gaussian_nll(torch.zeros(4, 6), torch.zeros(4, 6), weight=weight)
    weight[2, 1] = math.nan
    with pytest.warns(UserWarning, match=r"fastvae.ELBO: `weight`"):
        fastvae.ELBO("bernoulli")(torch.zeros(4, 6), torch.zeros(4, 6), kl=torch.zeros(4), weight=weight)


@pytest.mark.filterwarnings("error")
def test_data_of_weight_0_are_not_warned_of(native: None, range_warnings: None) -> None:
    x, weight = torch.rand(4, 6), torch.ones(4, 6)
    x[1, 2], weight[1, 2] = -1.0, 0
    fv.bernoulli_nll(torch.zeros(4, 6), x, weight=weight)
    with pytest.warns(UserWarning, match="values outside"):
        fastvae.ELBO("bernoulli")(torch.zeros(4, 6), x, kl=torch.zeros(4))


def test_ops_refuse_what_python_refuses(native: None) -> None:
    """The short cut passes arguments to the ops unchecked."""
    logits = torch.zeros(4, 6, requires_grad=True)
    for weight in (
        torch.ones(4),
        torch.ones(4, 5),
        torch.ones(4, 6).int(),
        torch.ones(4, 6, requires_grad=True),
    ):
        with pytest.raises((ValueError, TypeError), match="fastvae::nll: "):
            torch.ops.fastvae.nll("bernoulli", [logits], torch.zeros(4, 6), [], None, None, 1, weight)


def test_check_gradient_finds_a_missing_weight() -> None:
    """Otherwise the tests above would show nothing."""
    case = cases.by_id["bernoulli"]
    inputs = cases.cast(case.inputs(SHAPE), torch.float64)
    weight = make_weight(SHAPE, torch.float64)
    want = exact(case, inputs, weight)
    got = cases.run(case, fv, inputs)
    with pytest.raises(AssertionError):
        check_gradient("logits", got.gradients["logits"], want.gradients["logits"], torch.float64)
