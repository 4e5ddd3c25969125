"""Values and gradients, compared with the float64 formulas of `cases` and with the reference."""

import math
import re
from pathlib import Path

import cases
import pytest
import torch
from cases import (
    CASES,
    DTYPES,
    ELSEWHERE,
    GRADIENT_TOLERANCE,
    HALF,
    SHAPES,
    VALUE_TOLERANCE,
    WITH_TARGET,
    Case,
    Result,
)
from torch import Tensor

import fastvae
from fastvae import functional, reference
from fastvae._spec import VARIANTS

# The smallest steps of float16. Gradients that are not much larger are inaccurate.
STEP = {torch.float16: 2.0**-24}


def check(got: Result, want: Result, dtype: torch.dtype) -> None:
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert got.value.dtype == wide
    assert got.value.shape == want.value.shape
    error = (got.value.double() - want.value).abs()
    assert (error <= VALUE_TOLERANCE[dtype] * want.scale).all(), f"values off by {error.max():.3g}"
    for name, exact in want.gradients.items():
        # The rounding of a float32 target's gradient with float64 parameters, or of a half one with half ones.
        coarser = max(dtype, got.gradients[name].dtype, key=GRADIENT_TOLERANCE.__getitem__)
        check_gradient(name, got.gradients[name], exact, coarser)


def check_gradient(name: str, got: Tensor, exact: Tensor, dtype: torch.dtype) -> None:
    """Compare relative to the element, or in full precision to the row, because an element may be a difference that
    cancels."""
    assert got.shape == exact.shape
    if exact.numel() == 0:
        return
    row = exact.abs().flatten(1).amax(1) if exact.dim() > 1 else exact.abs()
    row = row.reshape((-1,) + (1,) * (exact.dim() - 1)) if exact.dim() > 1 else row.clamp(min=1)
    bound = GRADIENT_TOLERANCE[dtype] * exact.abs() + VALUE_TOLERANCE[dtype] * row
    error = (got.double() - exact).abs()
    assert (error <= bound).all(), (
        f"gradient of {name} off by {error.max():.3g}, {(error / bound).max():.3g} bounds"
    )


def test_every_variant_has_a_test(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every variant must be called by a case, or named in the file that `ELSEWHERE` gives."""
    served = set()

    def serve(likelihood: str, params: list[Tensor], *_: object, **__: object) -> list[Tensor]:
        served.add(likelihood)
        return [params[0]]

    monkeypatch.setattr(functional.loss, "nll", serve)
    for case in WITH_TARGET:
        case.call(functional, **case.inputs((2, 2)))
    for row, file in ELSEWHERE.items():
        text = (Path(__file__).parent / file).read_text()
        assert re.search(rf"\b{row}(_nll)?\b", text), f"{file} does not name {row}"
    assert served | ELSEWHERE.keys() == VARIANTS.keys()


@pytest.mark.parametrize("dtype", DTYPES, ids=cases.ids)
@pytest.mark.parametrize("shape", SHAPES, ids=cases.ids)
@pytest.mark.parametrize("case", CASES, ids=cases.ids)
def test_nll_equals_the_formula(backend: str, case: Case, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    if len(shape) < case.min_rank:
        shape = (*shape, 1)
    inputs = cases.cast(case.inputs(shape), dtype)
    got = cases.run(case, functional, inputs)
    check(got, cases.exact(case, inputs), dtype)
    for name, gradient in got.gradients.items():
        assert gradient.dtype == inputs[name].dtype


@pytest.mark.parametrize("dtype", DTYPES, ids=cases.ids)
@pytest.mark.parametrize("case", CASES, ids=cases.ids)
def test_kernels_equal_the_reference_in_the_same_dtype(native: None, case: Case, dtype: torch.dtype) -> None:
    """The kernels compared with the specification in the same dtype, as a user sees them when switching."""
    inputs = cases.cast(case.inputs((6, 3, 7, 5)), dtype)
    got, want = cases.run(case, functional, inputs), cases.run(case, reference, inputs)
    scale = cases.exact(case, inputs).scale
    check(got, Result(want.value.double(), scale, {n: g.double() for n, g in want.gradients.items()}), dtype)


TARGETS = [
    (case, dtype, target)
    for case in WITH_TARGET
    for dtype in DTYPES
    for target in (torch.float32, *case.targets)
    if target != dtype
]


@pytest.mark.parametrize(("case", "dtype", "target"), TARGETS, ids=cases.ids)
@pytest.mark.parametrize("shape", [(5, 17), (2, 3, 20, 19)], ids=cases.ids)
def test_target_of_any_dtype_equals_the_formula(
    backend: str, case: Case, dtype: torch.dtype, target: torch.dtype, shape: tuple[int, ...]
) -> None:
    inputs = cases.cast(case.inputs(shape), dtype, target, counts=case.counts)
    assert inputs["target"].dtype == target
    assert inputs["target"].double().unique().numel() > 1
    check(cases.run(case, functional, inputs), cases.exact(case, inputs), dtype)


@pytest.mark.parametrize("dtype", HALF, ids=cases.ids)
def test_float32_learned_scale_with_half_inputs_is_accepted(backend: str, dtype: torch.dtype) -> None:
    """Autocast gives half means with a float32 parameter."""
    case = cases.by_id["gaussian_learned"]
    inputs = cases.cast(case.inputs((6, 100)), dtype)
    inputs["logvar"] = torch.tensor(0.123456789)
    got = cases.run(case, functional, inputs)
    check(got, cases.exact(case, inputs), dtype)
    assert got.gradients["logvar"].dtype == torch.float32


@pytest.mark.parametrize("case", CASES, ids=cases.ids)
def test_gradcheck(backend: str, case: Case) -> None:
    inputs = case.inputs((3, 2, 3))
    names = cases.differentiable(case, inputs)
    leaves = [inputs[name].requires_grad_() for name in names]

    def function(*values: Tensor) -> Tensor:
        return case.call(functional, **{**inputs, **dict(zip(names, values, strict=True))})

    assert torch.autograd.gradcheck(function, leaves)


# ---------------------------------------------------------------------------------------------------------------------
# z
# ---------------------------------------------------------------------------------------------------------------------

Z_SHAPES = [(4, 1), (3, 9), (2, 1025), (2, 3, 5), (6,), (0, 4), (2, 3, 4, 5)]


@pytest.mark.parametrize("dtype", DTYPES, ids=cases.ids)
@pytest.mark.parametrize("samples", [None, 1, 3])
@pytest.mark.parametrize("prior", [False, True], ids=["standard", "prior"])
@pytest.mark.parametrize("noise", ["eps", "seed"])
@pytest.mark.parametrize("shape", Z_SHAPES, ids=cases.ids)
def test_reparameterize_kl_equals_the_formula(
    backend: str, shape: tuple[int, ...], noise: str, prior: bool, samples: int | None, dtype: torch.dtype
) -> None:
    """z, kl and the gradient of both together, which one kernel sums."""
    names = ("mu", "logvar", "prior_mu", "prior_logvar") if prior else ("mu", "logvar")
    inputs = {name: torch.randn(shape).to(dtype) for name in names}
    z_shape = shape if samples is None else (samples, *shape)
    eps = torch.randn(z_shape).to(dtype)
    seed = torch.tensor([2**40 + 17, 2**33 + 5])
    source = {"eps": eps} if noise == "eps" else {"seed": seed}
    if noise == "seed":
        eps = reference.normal_noise(seed, 0, shape[0], math.prod(shape[1:]), samples or 1, torch.float64)
        eps = eps.reshape(z_shape)

    leaves = [x.requires_grad_() for x in inputs.values()]
    z, kl = functional.reparameterize_kl(*leaves, samples=samples, **source)
    exact = {name: x.detach().double().requires_grad_() for name, x in inputs.items()}
    want_z = exact["mu"] + torch.exp(exact["logvar"] / 2) * eps.double()
    terms = cases.kl_terms(**exact)
    want_kl = (terms[0] + terms[1]).reshape(shape[0], math.prod(shape[1:])).sum(1)

    assert z.dtype == dtype
    assert z.shape == z_shape
    # Six digits, relative to the largest summand of z where the two cancel, and one rounding to the dtype of z.
    size = exact["mu"].abs() + torch.exp(exact["logvar"] / 2) * eps.double().abs()
    rounding = {torch.float32: 0, torch.float64: 0, torch.bfloat16: 2**-8, torch.float16: 2**-11}[dtype]
    precise = 1e-13 if dtype == torch.float64 else 1.5e-6
    assert ((z.double() - want_z).abs() <= precise * (size + 1) + rounding * want_z.abs()).all()
    assert ((kl.double() - want_kl).abs() <= VALUE_TOLERANCE[dtype] * want_kl).all()

    z_weights, kl_weights = torch.rand(z_shape).to(dtype), cases.cotangent(kl).to(kl.dtype)
    got = torch.autograd.grad((z, kl), leaves, (z_weights, kl_weights))
    want = torch.autograd.grad(
        (want_z, want_kl), list(exact.values()), (z_weights.double(), kl_weights.double())
    )
    for name, g, w in zip(names, got, want, strict=True):
        check_gradient(name, g, w, dtype)


@pytest.mark.parametrize("output", [0, 1], ids=["z", "kl"])
@pytest.mark.parametrize("samples", [None, 2])
def test_gradcheck_reparameterize_kl(backend: str, samples: int | None, output: int) -> None:
    leaves = [torch.randn(3, 5, dtype=torch.float64, requires_grad=True) for _ in range(4)]
    seed = torch.tensor([7, 8])
    if output == 0:  # z does not depend on the prior
        leaves = leaves[:2]
    assert torch.autograd.gradcheck(
        lambda *x: functional.reparameterize_kl(*x, samples=samples, seed=seed)[output], leaves
    )


@pytest.mark.parametrize("prior", [False, True], ids=["standard", "prior"])
def test_eps_gets_its_gradient(backend: str, prior: bool) -> None:
    """`eps` may come from a network; its gradient is sigma."""
    mu, logvar = torch.randn(4, 6), torch.randn(4, 6)
    eps = torch.randn(4, 6, requires_grad=True)
    z, _ = functional.reparameterize_kl(mu, logvar, *((mu, logvar) if prior else ()), eps=eps)
    (gradient,) = torch.autograd.grad(z.sum(), eps)
    torch.testing.assert_close(gradient, torch.exp(logvar / 2))


# ---------------------------------------------------------------------------------------------------------------------
# Accuracy at difficult points
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=cases.ids)
@pytest.mark.parametrize("target", [0.0, 1.0])
@pytest.mark.parametrize("logit", [-30.0, -15.0, -9.0, 9.0, 15.0, 30.0])
def test_saturated_rows_are_accurate(backend: str, logit: float, target: float, dtype: torch.dtype) -> None:
    """A network that predicts every pixel confidently and correctly: 784 tiny losses that must all be accurate."""
    inputs = {
        "logits": torch.full((2, 784), logit, dtype=dtype),
        "target": torch.full((2, 784), target, dtype=dtype),
    }
    case = cases.by_id["bernoulli"]
    got, want = cases.run(case, functional, inputs), cases.exact(case, inputs)
    assert ((got.value.double() - want.value).abs() <= VALUE_TOLERANCE[dtype] * want.value).all()
    # sigmoid(a) - t is a difference of numbers up to 1, so its error is one unit in the last place of 1.
    eps = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps
    exact, gradient = want.gradients["logits"], got.gradients["logits"].double()
    assert ((gradient - exact).abs() <= 1.5 * eps + GRADIENT_TOLERANCE[dtype] * exact.abs()).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=cases.ids)
@pytest.mark.parametrize("logvar", [1e-3, -1e-3, 1e-5, 0.02, -0.9, 0.99, 1.01])
@pytest.mark.parametrize("case", [case for case in CASES if case.id.startswith("kl")], ids=cases.ids)
def test_gaussian_kl_near_collapse_is_accurate(
    backend: str, case: Case, logvar: float, dtype: torch.dtype
) -> None:
    """A posterior close to its prior, where e^v - 1 - v is about v^2 / 2."""
    inputs = {name: torch.zeros(3, 2000, dtype=dtype) for name in case.inputs((1, 1))}
    inputs["logvar"] += logvar
    got, want = cases.run(case, functional, inputs), cases.exact(case, inputs)
    assert ((got.value.double() - want.value).abs() <= VALUE_TOLERANCE[dtype] * want.value).all()
    gradient, exact = got.gradients["logvar"].double(), want.gradients["logvar"]
    bound = GRADIENT_TOLERANCE[dtype] * exact.abs() + STEP.get(dtype, 0)
    assert ((gradient - exact).abs() <= bound).all()


def test_textbook_kl_fails_near_collapse() -> None:
    """A check that the test above can fail: the usual formula does."""
    logvar = torch.full((1, 2000), 1e-3, dtype=torch.bfloat16)
    textbook = -0.5 * (1 + logvar - logvar.exp()).sum(1).double()
    exact = sum(cases.kl_terms(torch.zeros_like(logvar).double(), logvar.double())).sum(1)
    assert ((textbook - exact).abs() > 0.5 * exact).all()


EXTREMES = [(case, dtype) for case in CASES if case.extremes for dtype in DTYPES]


@pytest.mark.parametrize(("case", "dtype"), EXTREMES, ids=cases.ids)
def test_extremes_are_finite_and_accurate(backend: str, case: Case, dtype: torch.dtype) -> None:
    assert case.extremes is not None
    inputs = cases.cast(case.extremes(), dtype)
    got, want = cases.run(case, functional, inputs), cases.exact(case, inputs)
    assert (want.value.abs() < 1e38).all(), "a case that float32 cannot answer"
    assert got.value.isfinite().all()
    # Below the smallest normal number, a result may be 0.
    tiny = torch.finfo(torch.float32).tiny
    assert ((got.value.double() - want.value).abs() <= VALUE_TOLERANCE[dtype] * want.scale + tiny).all()
    for name, exact in want.gradients.items():
        gradient = got.gradients[name].double()
        representable = exact.abs() < 0.99 * torch.finfo(dtype).max
        assert gradient[representable].isfinite().all(), name
        error = (gradient - exact).abs()[representable]
        bound = GRADIENT_TOLERANCE[dtype] * exact.abs() + max(1e-7, torch.finfo(dtype).tiny)
        assert (error <= bound[representable]).all(), name


@pytest.mark.parametrize("logvar", [-80.0, 80.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=cases.ids)
def test_extreme_logvar_gives_accurate_z(backend: str, dtype: torch.dtype, logvar: float) -> None:
    mu, eps = torch.full((3, 17), 0.5, dtype=dtype), torch.full((3, 17), -1.5, dtype=dtype)
    z, _ = functional.reparameterize_kl(mu, torch.full_like(mu, logvar), eps=eps)
    want = 0.5 - 1.5 * torch.exp(torch.tensor(logvar / 2, dtype=torch.float64))
    assert ((z.double() - want).abs() <= {torch.bfloat16: 4e-3}.get(dtype, 1e-6) * want.abs()).all()


# ---------------------------------------------------------------------------------------------------------------------
# NaN
# ---------------------------------------------------------------------------------------------------------------------

NANS = [(case, name) for case in CASES for name, x in case.inputs((1, 1)).items() if x.dim() > 0]


@pytest.mark.parametrize("dtype", DTYPES, ids=cases.ids)
@pytest.mark.parametrize(("case", "name"), NANS, ids=cases.ids)
@pytest.mark.parametrize("place", [0, 18, 36], ids=["vector", "later", "tail"])
def test_nan_affects_only_its_row(
    backend: str, case: Case, name: str, place: int, dtype: torch.dtype
) -> None:
    inputs = cases.cast(case.inputs((4, 37)), dtype)
    clean = cases.run(case, functional, inputs)
    inputs[name][2, place] = float("nan")
    dirty = cases.run(case, functional, inputs)

    element = (2, place) if case.per_element else (2,)
    assert dirty.value[element].isnan().all()
    same = torch.ones_like(clean.value, dtype=torch.bool)
    same[element] = False
    assert torch.equal(dirty.value[same], clean.value[same])
    others = torch.tensor([0, 1, 3])
    for which, gradient in dirty.gradients.items():
        if gradient.dim() == 0:
            assert gradient.isnan()  # one parameter shared by all rows
            continue
        assert torch.equal(gradient[others], clean.gradients[which][others])
    if name in dirty.gradients and not (case.id.startswith("kl_prior") and name == "prior_mu"):
        assert dirty.gradients[name][2, place].isnan()


@pytest.mark.parametrize("name", ["mu", "logvar", "eps"])
@pytest.mark.parametrize("place", [0, 36])
def test_nan_in_the_posterior_affects_only_its_element_of_z(backend: str, name: str, place: int) -> None:
    inputs = {key: torch.randn(4, 37) for key in ("mu", "logvar", "eps")}
    inputs[name][2, place] = float("nan")
    z, _ = functional.reparameterize_kl(**inputs)
    want = torch.zeros(4, 37, dtype=torch.bool)
    want[2, place] = True
    assert torch.equal(z.isnan(), want)


FAR_SCALES = (
    -120.0,
    -90.0,
    90.0,
    120.0,
)  # values of log s^2 for which s^2 or its inverse exceeds float32, but s does not


@pytest.mark.parametrize("logvar", FAR_SCALES)
@pytest.mark.parametrize("distance", [0.0, 1.5])
def test_gaussian_far_from_its_mean_is_accurate(backend: str, logvar: float, distance: float) -> None:
    """A Gaussian whose mean is `distance` scales away."""
    scale = math.exp(0.5 * logvar)
    away = torch.full((2, 9), distance * scale)
    mean = away.clone().requires_grad_()
    variance = torch.full((2, 9), logvar, requires_grad=True)
    close = torch.testing.assert_close

    def gradients(nll: Tensor, *leaves: Tensor) -> list[float]:
        return [gradient[0, 0].item() for gradient in torch.autograd.grad(nll.sum(), leaves)]

    value = 9 * (0.5 * (math.log(2 * math.pi) + logvar + distance**2))
    by_mean, by_logvar = distance / scale, 0.5 * (1 - distance**2)
    zeros = torch.zeros(2, 9)
    rtol = 2e-5  # log s^2 has 24 bits, so at 120 its exponential is accurate to 17 bits
    for nll, by in (
        (functional.gaussian_nll(mean, zeros, variance), (by_mean, by_logvar)),
        (functional.gaussian_nll(mean, zeros, scale=scale), (by_mean,)),
    ):
        close(nll, torch.full((2,), value), rtol=rtol, atol=0)
        close(gradients(nll, *(mean, variance)[: len(by)]), list(by), rtol=rtol, atol=0)

    kl = functional.gaussian_kl(mean, variance, zeros, torch.full((2, 9), logvar))
    close(kl, torch.full((2,), 4.5 * distance**2), rtol=rtol, atol=1e-6)
    close(gradients(kl, mean, variance), [by_mean, 0.0], rtol=rtol, atol=1e-6)


# ---------------------------------------------------------------------------------------------------------------------
# float16 under a loss scaler
# ---------------------------------------------------------------------------------------------------------------------


def test_float16_gradients_survive_the_mean(backend: str) -> None:
    """Weighted by 1/B before they are scaled up, small gradients would round to zero in float16."""
    batch, scale = 1024, 2.0**16
    logits = torch.linspace(-14, -6, 4096).repeat(batch, 1).half().requires_grad_()
    target = torch.zeros(batch, 4096).half()
    out = fastvae.ELBO("bernoulli")(logits, target, kl=torch.zeros(batch))
    (gradient,) = torch.autograd.grad(out.loss * scale, logits)
    exact = torch.sigmoid(logits.detach().double()) * (scale / batch)
    assert (gradient != 0).all()
    assert ((gradient.double() - exact).abs() <= 1e-3 * exact).all()


def test_float16_gradients_larger_than_float16_survive_the_mean(backend: str) -> None:
    """Before its weight 1/B is applied, a grad may exceed 65504."""
    batch = 128
    mean = torch.full((batch, 9), 10.0).half().requires_grad_()
    target = torch.zeros(batch, 9).half().requires_grad_()
    elbo = fastvae.ELBO(fastvae.likelihoods.Gaussian(scale=0.01))
    gradients = torch.autograd.grad(elbo(mean, target, kl=torch.zeros(batch)).loss, (mean, target))
    exact = torch.full((batch, 9), 10.0 / 0.01**2 / batch, dtype=torch.float64)
    for gradient, sign in zip(gradients, (1, -1), strict=True):
        torch.testing.assert_close(gradient.double(), sign * exact, rtol=1e-3, atol=0)


@pytest.mark.parametrize("bits", [0x7FFFFFFF, 0x7FC00001, -1], ids=hex)
def test_nan_with_a_payload_gives_nan(backend: str, bits: int) -> None:
    """Other devices produce NaNs whose low bits are set."""
    nan = torch.tensor([[bits]], dtype=torch.int32).view(torch.float32).expand(1, 17)
    assert nan.isnan().all()
    logits = nan.clone().requires_grad_()
    nll = functional.bernoulli_nll(logits, torch.ones(1, 17))
    assert nll.isnan().all()
    assert torch.autograd.grad(nll.sum(), logits)[0].isnan().all()
    mu, logvar = torch.zeros(1, 17), nan.clone().requires_grad_()
    z, kl = functional.reparameterize_kl(mu, logvar)
    assert z.isnan().all()
    assert kl.isnan().all()
    assert torch.autograd.grad(z.sum() + kl.sum(), logvar)[0].isnan().all()
