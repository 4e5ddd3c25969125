"""`validate=True`: every likelihood, in every form of call, names the first wrong value before any work."""

import inspect
import itertools
import math
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

import fastvae
from fastvae import _spec, functional, likelihoods
from fastvae.functional.values import check_values
from fastvae.likelihoods.base import KernelCall, Likelihood

B, C, D, K = 4, 3, 6, 2
CLASSES, COMPONENTS, BITS, SHAPE = 5, 2, 5, 2.5
CONSTANTS = {
    "scale": 0.7,
    "logvar_bounds": (-3.0, 2.0),
    "df": 2.5,
    "shape": SHAPE,
    "eps": 0.25,
    "ignore_index": -100,
    "components": COMPONENTS,
    "bits": BITS,
    "log_scale_floor": -7.0,
    "min_mass": 1e-5,
}


class Arguments(NamedTuple):
    params: dict[str, Tensor]
    target: Tensor
    weight: tuple[int, ...]  # the shape of a weight that is not broadcast
    constants: dict[str, Any]


def make(variant: _spec.Variant) -> Arguments:
    """Arguments for a likelihood of the table: ones, which are valid for all of them."""
    data, planes = (B, D), (B, D)
    weight = data
    if variant.family == "discretized":
        data = weight = (B, C, D)
        planes = (B, 2 * C, D)
        if variant.density == "discretized_logistic_mixture":
            planes, weight = (B, 10 * COMPONENTS, D), (B, 1, D)
    elif variant.family == "categorical":
        planes = (B, D, CLASSES)
    elif variant.packed:
        planes = (B, 2 * D)
    params = {name: torch.ones(planes) for name in variant.tensors}
    if variant.has_scalar:
        params[variant.tensors[-1]] = torch.ones(())
    for name in params:
        if name == "library":
            params[name] = torch.ones(B)
        elif name.endswith("dispersion"):
            params[name] = torch.ones(D)
    dtype = torch.float32 if torch.uint8 in variant.integers or not variant.integers else variant.integers[0]
    if variant.family == "discretized":
        dtype = torch.uint8
    constants = {constant.name: CONSTANTS[constant.name] for constant in variant.constants}
    return Arguments(params, torch.ones(data, dtype=dtype), weight, constants)


def of_draws(value: Tensor, name: str) -> Tensor:
    """K draws of a parameter, (K, B, ...), or what all draws share."""
    return value.expand(K, *value.shape) if value.dim() > 1 or name == "library" else value


class OfVariant(Likelihood):
    """A module for any likelihood of the table. Its decoder returns all tensors as a dict."""

    def __init__(self, variant: _spec.Variant) -> None:
        super().__init__()
        self.variant = variant

    def kernel_call(self, params: dict[str, Tensor]) -> KernelCall:
        constants: list[float] = []
        for constant in self.variant.constants:
            value = CONSTANTS[constant.name]
            constants += value if isinstance(value, tuple) else [value]
        return self.variant.name, list(params.values()), constants


def call_function(variant: _spec.Variant, a: Arguments, **options: Any) -> Tensor:
    function: Callable[..., Tensor] = getattr(functional, variant.function)
    return function(**a.params, target=a.target, **a.constants, **options)


def call_function_with_draws(variant: _spec.Variant, a: Arguments, **options: Any) -> Tensor:
    params = {name: of_draws(value, name) for name, value in a.params.items()}
    return call_function(variant, a._replace(params=params), draws=K, **options)


def call_elements(variant: _spec.Variant, a: Arguments, **options: Any) -> Tensor:
    return call_function(variant, a, reduction="none", **options)


def call_module(variant: _spec.Variant, a: Arguments, **options: Any) -> Tensor:
    return OfVariant(variant).nll(a.params, a.target, **options)


def rows_of_draws(a: Arguments) -> dict[str, Tensor]:
    drawn = {name: of_draws(value, name) for name, value in a.params.items()}
    return {
        name: value if value is a.params[name] else value.flatten(0, 1).clone()
        for name, value in drawn.items()
    }


def call_module_with_draws(variant: _spec.Variant, a: Arguments, **options: Any) -> Tensor:
    return OfVariant(variant).nll(rows_of_draws(a), a.target, draws=K, **options)


def call_elbo(variant: _spec.Variant, a: Arguments, **options: Any) -> Tensor:
    elbo = fastvae.ELBO(OfVariant(variant))
    return elbo(a.params, a.target, torch.zeros(B, 2), torch.zeros(B, 2), **options).nll


def call_elbo_of_samples(variant: _spec.Variant, a: Arguments, **options: Any) -> Tensor:
    elbo = fastvae.ELBO(OfVariant(variant), samples=K)
    return elbo(rows_of_draws(a), a.target, kl=torch.zeros(B), **options).nll


def call_iwae(variant: _spec.Variant, a: Arguments, **options: Any) -> Tensor:
    iwae = fastvae.IWAE(OfVariant(variant), samples=K)
    return iwae(lambda z: rows_of_draws(a), a.target, torch.zeros(B, 2), torch.zeros(B, 2), **options).nll


def call_iwae_in_chunks(variant: _spec.Variant, a: Arguments, **options: Any) -> Tensor:
    iwae = fastvae.IWAE(OfVariant(variant), samples=K, chunk=1)
    return iwae(lambda z: a.params, a.target, torch.zeros(B, 2), torch.zeros(B, 2), **options).nll


CALLS = {
    "function": call_function,
    "function with draws": call_function_with_draws,
    "elements": call_elements,
    "module": call_module,
    "module with draws": call_module_with_draws,
    "ELBO": call_elbo,
    "ELBO of samples": call_elbo_of_samples,
    "IWAE": call_iwae,
    "IWAE in chunks": call_iwae_in_chunks,
}


def calls_of(variant: _spec.Variant) -> dict[str, Callable[..., Tensor]]:
    """The forms of call that the likelihood has."""
    return {form: call for form, call in CALLS.items() if form != "elements" or variant.elements}


def named_by(form: str, variant: _spec.Variant) -> str:
    """The name with which messages begin."""
    objective = form.split()[0]
    return objective if objective in ("ELBO", "IWAE") else variant.function


@pytest.mark.parametrize("name", _spec.VARIANTS)
def test_validate_finds_wrong_values_of_a_weight(native: None, name: str) -> None:
    """The first of two, in a weight of the data's shape and in one that is broadcast over the rows."""
    variant = _spec.VARIANTS[name]
    arguments = make(variant)
    shapes = (arguments.weight, (1, *arguments.weight[1:]))
    for value, shape in itertools.product((-1.0, math.nan, math.inf), shapes):
        weight = torch.ones(shape)
        first = weight.numel() // 2 + 1
        weight.view(-1)[first] = value
        weight.view(-1)[first + 1] = -2
        place = tuple(int(i) for i in torch.unravel_index(torch.tensor(first), shape))
        for form, call in calls_of(variant).items():
            where = "IWAE" if form.startswith("IWAE") else named_by(form, variant)
            message = f"fastvae.{where}: `weight` must hold finite numbers that are at least 0, got {value} at {place}"
            state = torch.get_rng_state()
            with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
                call(variant, arguments, validate=True, weight=weight)
            assert torch.equal(torch.get_rng_state(), state)  # no noise is drawn before


@pytest.mark.parametrize("name", _spec.VARIANTS)
def test_validate_accepts_valid_values(native: None, name: str) -> None:
    variant = _spec.VARIANTS[name]
    arguments = make(variant)
    for call in calls_of(variant).values():
        want = call(variant, arguments)
        torch.testing.assert_close(call(variant, arguments, validate=True), want)
        for dtype in (torch.bool, torch.uint8, torch.float32):
            weight = torch.ones(arguments.weight, dtype=dtype)
            torch.testing.assert_close(call(variant, arguments, validate=True, weight=weight), want)


WRONG: dict[str, tuple[tuple[float, ...], str]] = {
    "categorical": ((CLASSES, -1), f"classes from 0 to {CLASSES - 1}, or -100 (ignore_index)"),
    "bernoulli": ((1.5, -0.25, math.nan), "numbers from 0 to 1"),
    "continuous_bernoulli": ((1.5, -0.25, math.nan), "numbers from 0 to 1"),
    "gamma": ((0.0, -1.0, math.inf), "positive, finite numbers"),
    "discretized": ((2**BITS, 255), f"levels from 0 to {2**BITS - 1} with `bits` {BITS}"),
    "counts": ((-1.0, 1.5, math.nan, math.inf), "counts, whole numbers that are at least 0"),
    "continuous": ((math.nan, -math.inf), "finite numbers"),
}


@pytest.mark.parametrize("name", _spec.VARIANTS)
def test_validate_finds_data_that_the_likelihood_cannot_have(native: None, name: str) -> None:
    variant = _spec.VARIANTS[name]
    arguments = make(variant)
    values, required = WRONG.get(variant.density) or WRONG[variant.family]
    weight = torch.ones(arguments.weight, dtype=torch.bool)
    weight[2:] = False
    for value in values:
        target = arguments.target.clone()
        place = (2, 0, 1) if target.dim() == 3 else (2, 1)
        target[place] = value
        target[(3, *place[1:])] = values[-1]
        wrong = arguments._replace(target=target)
        for form, call in calls_of(variant).items():
            data = "x" if form.startswith(("ELBO", "IWAE")) else "target"
            message = (
                f"fastvae.{named_by(form, variant)}: `{data}` must hold {required}, got {value} at {place}"
            )
            for options in ({}, {"weight": ~weight}):
                with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
                    call(variant, wrong, validate=True, **options)
            if variant.family == "categorical":  # the CPU also checks positions of weight 0
                with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
                    call(variant, wrong, weight=weight)
                continue
            # What a weight of 0 leaves out may be anything.
            call(variant, wrong, validate=True, weight=weight)


def test_validate_tolerates_rounding_and_the_data_of_an_exponential(native: None) -> None:
    x = torch.full((2, 3), 1 + 1e-6)
    functional.bernoulli_nll(x, x, validate=True)
    functional.bernoulli_nll(x, torch.full((2, 3), 200, dtype=torch.uint8), validate=True)
    functional.bernoulli_nll(x, torch.ones(2, 3, dtype=torch.bool), validate=True)
    functional.gamma_nll(x, torch.zeros(2, 3), shape=1, validate=True)
    with pytest.raises(
        ValueError, match=r"`target` must hold finite numbers that are at least 0, got -1\.0 at"
    ):
        functional.gamma_nll(x, -torch.ones(2, 3), shape=1, validate=True)


def test_validate_finds_classes_that_do_not_exist() -> None:
    """On the CPU, every call refuses them; on a GPU, the check of values finds those that have a weight."""
    variant = _spec.VARIANTS["categorical"]
    target = torch.tensor([[0, CLASSES - 1, -100], [CLASSES, -1, 2]])
    message = r"`target` must hold classes from 0 to 4, or -100 \(ignore_index\), got 5 at \(1, 0\)"
    arguments = ("f", ("logits",), variant, [torch.ones(2, 3, CLASSES)], target, "target", (-100,))
    with pytest.raises(ValueError, match=message):
        check_values(*arguments, None)
    with pytest.raises(ValueError, match=r"got -1 at \(1, 1\)"):
        check_values(*arguments, torch.tensor([[True, True, True], [False, True, True]]))
    check_values(*arguments, torch.tensor([[True], [False]]))


@pytest.mark.filterwarnings("ignore:Sparse CSR")
@pytest.mark.parametrize("shape", [(B, D), (B, 1), (1, D), (D,)], ids=str)
@pytest.mark.parametrize("name", ["negative_binomial", "multinomial"])
def test_validate_leaves_out_stored_counts_of_weight_0(
    native: None, name: str, shape: tuple[int, ...]
) -> None:
    variant = _spec.VARIANTS[name]
    arguments = make(variant)
    arguments.target[:, 0] = 0
    arguments.target[2, 4] = -3
    sparse = arguments._replace(target=arguments.target.to_sparse_csr())
    weight = torch.ones(shape)
    with pytest.raises(ValueError, match=r"`target` must hold counts.*got -3.0 at \(2, 4\)"):
        call_function(variant, sparse, validate=True, weight=weight)
    weight[
        tuple(0 if size == 1 else place for size, place in zip(shape, (2, 4)[-len(shape) :], strict=True))
    ] = 0
    call_function(variant, sparse, validate=True, weight=weight)


@pytest.mark.parametrize("form", ["function", "function with draws", "ELBO of samples"])
@pytest.mark.parametrize(
    ("name", "part", "removed", "place"),
    [
        ("poisson_rate", "rate", (2, 1), (2, 1)),
        ("negative_binomial", "mean", (2, 1), (2, 1)),
        ("negative_binomial", "inverse_dispersion", (slice(None), 1), (1,)),
        ("zero_inflated_negative_binomial", "zi_logits", (2, 1), (2, 1)),
        ("negative_binomial_mixture", "mixture_logits", (2, 1), (2, 1)),
        ("negative_binomial_logits", "logits", (2, slice(None)), (2, 1)),
        ("negative_binomial_logits", "library", (2, slice(None)), (2,)),
        ("zero_inflated_negative_binomial_logits", "log_dispersion", (slice(None), 1), (1,)),
        ("multinomial", "logits", (2, 1), (2, 1)),
    ],
)
def test_validate_leaves_out_parameters_that_only_what_has_weight_0_needs(
    native: None, form: str, name: str, part: str, removed: Any, place: tuple[int, ...]
) -> None:
    variant, call = _spec.VARIANTS[name], CALLS[form]
    arguments = make(variant)
    arguments.params[part][place] = math.nan
    weight = torch.ones(B, D)
    weight[removed] = 0
    call(variant, arguments, validate=True, weight=weight)
    weight[2 if place[0] == 2 else 0, 1] = 1  # one element needs it again
    drawn = place if form == "function" or place == (1,) else (0, *place)
    label = "recon" if form.startswith("ELBO") and part == variant.tensors[0] else part
    message = re.escape(f"`{label}` must hold ") + ".*" + re.escape(f", got nan at {drawn}")
    with pytest.raises(ValueError, match=message):
        call(variant, arguments, validate=True, weight=weight)


def test_validate_leaves_out_rates_of_weight_0_in_one_dimension(native: None) -> None:
    rate, target = torch.tensor([math.nan, 1.0, 0.0]), torch.ones(3)
    functional.poisson_rate_nll(rate, target, weight=torch.tensor([0.0, 1.0, 1.0]), validate=True)
    with pytest.raises(ValueError, match=r"`rate` must hold .*, got nan at \(0,\)"):
        functional.poisson_rate_nll(rate, target, weight=torch.tensor([1.0, 0.0, 1.0]), validate=True)


@pytest.mark.parametrize(
    ("name", "part", "values"),
    [
        ("zero_inflated_negative_binomial", "zi_logits", (math.inf, -math.inf)),
        ("zero_inflated_negative_binomial_logits", "zi_logits", (math.inf, -math.inf)),
        ("negative_binomial_mixture", "mixture_logits", (math.inf, -math.inf)),
        ("negative_binomial_mixture", "mean1", (0.0,)),
        ("negative_binomial_mixture", "mean2", (0.0,)),
    ],
)
@pytest.mark.parametrize("form", ["function", "function with draws", "ELBO of samples"])
def test_validate_accepts_parameters_at_the_ends_that_have_limits(
    native: None, form: str, name: str, part: str, values: tuple[float, ...]
) -> None:
    variant, call = _spec.VARIANTS[name], CALLS[form]
    arguments = make(variant)
    arguments = arguments._replace(constants=dict.fromkeys(arguments.constants, 0.0))
    for value in values:
        for count in (0.0, 2.0):
            arguments.params[part][2, 1], arguments.target[2, 1] = value, count
            nll = call(variant, arguments, validate=True)
            assert not nll.isnan().any()
            torch.testing.assert_close(nll, call(variant, arguments))
    # A NaN, or a mean below 0, is still refused.
    arguments.params[part][2, 1] = math.nan if "logits" in part else -1.0
    with pytest.raises(ValueError, match=rf"`{part}` must hold |`recon` must hold "):
        call(variant, arguments, validate=True)


def test_every_likelihood_takes_validate() -> None:
    calls: list[Callable[..., Any]] = [getattr(functional, v.function) for v in _spec.VARIANTS.values()]
    calls += [getattr(likelihoods, spec.module).nll for spec in _spec.SPECS]
    calls += [likelihoods.Product.nll, fastvae.ELBO.forward, fastvae.IWAE.forward]
    for call in calls:
        parameter = inspect.signature(call).parameters["validate"]
        assert parameter.kind is parameter.KEYWORD_ONLY, call
        assert parameter.default is False, call


def test_validate_checks_the_parts_of_a_product(native: None) -> None:
    product = likelihoods.Product({"a": "bernoulli", "b": "poisson"})
    ones = torch.ones(B, D)
    params, target = {"a": ones, "b": ones}, {"a": ones, "b": ones}
    wrong = {"b": -ones}
    calls: list[Callable[..., Any]] = [
        lambda x, **options: product.nll(params, x, **options),
        lambda x, **options: fastvae.ELBO(product)(params, x, kl=torch.zeros(B), **options),
    ]
    for call in calls:
        call(target, validate=True, weight={"b": ones})
        with pytest.raises(
            ValueError, match=r"in part 'b': .*`target` must hold counts.*got -1.0 at \(0, 0\)"
        ):
            call(target | wrong, validate=True)
        with pytest.raises(ValueError, match=r"in part 'b': .*`weight` must hold .*got -1.0 at \(0, 0\)"):
            call(target, validate=True, weight=wrong)
    iwae = fastvae.IWAE(product, samples=1)
    with pytest.raises(ValueError, match=r"fastvae.IWAE: `weight\['b'\]` must hold .*got -1.0 at \(0, 0\)"):
        iwae(lambda z: params, target, ones, ones, validate=True, weight=wrong)


def test_a_module_without_validate_is_refused(native: None) -> None:
    class Own(torch.nn.Module):
        def nll(self, params: Tensor, target: Tensor) -> Tensor:
            return (params - target).abs().sum(1)

    class OwnWithValidate(Own):
        def nll(self, params: Tensor, target: Tensor, *, validate: bool = False) -> Tensor:
            if validate:
                raise ValueError("validated")
            return super().nll(params, target)

    x = torch.rand(4, 9)
    for samples in (None, 1):
        kl = torch.zeros(4)
        fastvae.ELBO(Own(), samples=samples)(x, x, kl=kl, validate=False)
        with pytest.raises(
            TypeError, match=r"`validate` needs a likelihood with nll\(.*validate=False\), got Own"
        ):
            fastvae.ELBO(Own(), samples=samples)(x, x, kl=kl, validate=True)
        with pytest.raises(ValueError, match="validated"):
            fastvae.ELBO(OwnWithValidate(), samples=samples)(x, x, kl=kl, validate=True)
