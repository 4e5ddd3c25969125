"""The gradient contracts: every way that autograd may ask for a gradient, against float64 formulas written here."""

import copy
import importlib
import itertools
import math
import pickle
import subprocess
import sys
from collections.abc import Callable
from typing import NamedTuple

import published_logistics
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import fastvae
import fastvae.functional as fv

B = 5
WEIGHTS = torch.tensor([0.5, -2.0, 1.0, 0.0, 3.0])


def close(actual: Tensor, expected: Tensor, rtol: float = 2e-5, atol: float = 2e-6) -> None:
    torch.testing.assert_close(actual.double(), expected.double(), rtol=rtol, atol=atol)


# --- The formulas, in float64 -----------------------------------------------------------------------------------------


def rows(value: Tensor) -> Tensor:
    return value.flatten(1).sum(1)


def bernoulli(a: Tensor, t: Tensor) -> Tensor:
    return rows(a.clamp(min=0) - a * t + torch.log1p(torch.exp(-a.abs())))


def gaussian(m: Tensor, x: Tensor, v: Tensor) -> Tensor:
    return rows(0.5 * (math.log(2 * math.pi) + v + (x - m) ** 2 * torch.exp(-v)))


def laplace(m: Tensor, x: Tensor, s: Tensor) -> Tensor:
    return rows(math.log(2) + s + (x - m).abs() * torch.exp(-s))


def student_t(m: Tensor, x: Tensor, s: Tensor) -> Tensor:
    constant = math.lgamma(2.0) - math.lgamma(2.5) + 0.5 * math.log(4 * math.pi)
    return rows(constant + s + 2.5 * torch.log1p((x - m) ** 2 * torch.exp(-2 * s) / 4))


def continuous_bernoulli(a: Tensor, t: Tensor) -> Tensor:
    return rows(torch.log(torch.expm1(a) / a) - a * t)


def kl_divergence(mu: Tensor, v: Tensor, prior_mu: Tensor, prior_v: Tensor) -> Tensor:
    return rows(0.5 * ((mu - prior_mu) ** 2 / prior_v.exp() + (v - prior_v).exp() - 1 - (v - prior_v)))


class Case(NamedTuple):
    fused: Callable[..., Tensor]  # float32 inputs -> (B,)
    formula: Callable[..., Tensor]  # the same in float64
    inputs: dict[str, tuple[int, ...]]  # name -> shape
    differentiable: tuple[str, ...]


SHAPE = (B, 3, 4)
ZERO = torch.zeros(())


def sampled(mu: Tensor, logvar: Tensor, eps: Tensor) -> Tensor:
    z, kl = fv.reparameterize_kl(mu, logvar, eps=eps)
    return rows(z**2) + kl


def sampled_with_prior(
    mu: Tensor, logvar: Tensor, prior_mu: Tensor, prior_logvar: Tensor, eps: Tensor
) -> Tensor:
    z, kl = fv.reparameterize_kl(mu, logvar, prior_mu, prior_logvar, samples=2, eps=eps)
    return rows(z[0] ** 2) + rows(z[1] ** 3) + kl


def sampled_with_prior_formula(mu: Tensor, v: Tensor, pm: Tensor, pv: Tensor, eps: Tensor) -> Tensor:
    z = mu + torch.exp(v / 2) * eps
    return rows(z[0] ** 2) + rows(z[1] ** 3) + kl_divergence(mu, v, pm, pv)


CASES = {
    "bernoulli": Case(fv.bernoulli_nll, bernoulli, {"a": SHAPE, "t": SHAPE}, ("a",)),
    "gaussian": Case(
        lambda m, x: fv.gaussian_nll(m, x, scale=0.3),
        lambda m, x: gaussian(m, x, torch.full_like(m, 2 * math.log(0.3))),
        {"m": SHAPE, "x": SHAPE},
        ("m", "x"),
    ),
    "gaussian_learned": Case(
        fv.gaussian_nll,
        lambda m, x, v: gaussian(m, x, v.expand_as(m)),
        {"m": SHAPE, "x": SHAPE, "v": ()},
        ("m", "x", "v"),
    ),
    "gaussian_per_element": Case(
        fv.gaussian_nll, gaussian, {"m": SHAPE, "x": SHAPE, "v": SHAPE}, ("m", "x", "v")
    ),
    "gaussian_head": Case(
        fv.gaussian_head_nll,
        lambda p, x: gaussian(p[:, :3], x, p[:, 3:]),
        {"p": (B, 6, 4), "x": SHAPE},
        ("p", "x"),
    ),
    "gaussian_bounded_head": Case(
        lambda p, x: fv.gaussian_head_nll(p, x, logvar_bounds=(-1.0, 2.0)),
        lambda p, x: gaussian(p[:, :3], x, 0.5 + 1.5 * torch.tanh((p[:, 3:] - 0.5) / 1.5)),
        {"p": (B, 6, 4), "x": SHAPE},
        ("p", "x"),
    ),
    "laplace": Case(
        lambda m, x: fv.laplace_nll(m, x, scale=0.3),
        lambda m, x: laplace(m, x, torch.full_like(m, math.log(0.3))),
        {"m": SHAPE, "x": SHAPE},
        ("m", "x"),
    ),
    "laplace_head": Case(
        fv.laplace_head_nll,
        lambda p, x: laplace(p[:, :3], x, p[:, 3:]),
        {"p": (B, 6, 4), "x": SHAPE},
        ("p", "x"),
    ),
    "continuous_bernoulli": Case(
        fv.continuous_bernoulli_nll, continuous_bernoulli, {"a": SHAPE, "t": SHAPE}, ("a",)
    ),
    "poisson": Case(
        lambda a, t: fv.poisson_nll(a, (5 * t).round()),
        lambda a, t: rows(a.exp() - a * (5 * t).round() + torch.lgamma((5 * t).round() + 1)),
        {"a": SHAPE, "t": SHAPE},
        ("a",),
    ),
    "poisson_rate": Case(
        lambda a, t: fv.poisson_rate_nll(a.exp(), (5 * t).round(), eps=0.5),
        lambda a, t: rows(
            a.exp() + 0.5 - torch.log(a.exp() + 0.5) * (5 * t).round() + torch.lgamma((5 * t).round() + 1)
        ),
        {"a": SHAPE, "t": SHAPE},
        ("a",),
    ),
    "gamma": Case(
        lambda s, x: fv.gamma_nll(s, x.exp(), shape=2.5),
        lambda s, x: rows(math.lgamma(2.5) + 2.5 * s - 1.5 * x + torch.exp(x - s)),
        {"s": SHAPE, "x": SHAPE},
        ("s",),
    ),
    "student_t_learned": Case(
        lambda m, x, s: fv.student_t_nll(m, x, s, df=4),
        lambda m, x, s: student_t(m, x, s.expand_as(m)),
        {"m": SHAPE, "x": SHAPE, "s": ()},
        ("m", "x", "s"),
    ),
    "student_t_per_element": Case(
        lambda m, x, s: fv.student_t_nll(m, x, s, df=4),
        student_t,
        {"m": SHAPE, "x": SHAPE, "s": SHAPE},
        ("m", "x", "s"),
    ),
    "discretized_logistic_mixture": Case(
        lambda p, n: fv.discretized_logistic_mixture_nll(p, n.to(torch.uint8), components=2),
        lambda p, n: published_logistics.mixture(p, n, 2),
        {"p": (B, 20, 4), "n": (B, 3, 4)},
        ("p",),
    ),
    "kl": Case(
        fv.gaussian_kl,
        lambda mu, v: kl_divergence(mu, v, ZERO, ZERO),
        {"mu": SHAPE, "v": SHAPE},
        ("mu", "v"),
    ),
    "kl_prior": Case(
        fv.gaussian_kl,
        kl_divergence,
        {"mu": SHAPE, "v": SHAPE, "pm": SHAPE, "pv": SHAPE},
        ("mu", "v", "pm", "pv"),
    ),
    "kl_per_element": Case(
        lambda mu, v: rows(fv.gaussian_kl(mu, v, reduction="none") ** 2),
        lambda mu, v: rows((0.5 * (mu**2 + v.exp() - 1 - v)) ** 2),
        {"mu": SHAPE, "v": SHAPE},
        ("mu", "v"),
    ),
    "sample": Case(
        sampled,
        lambda mu, v, e: rows((mu + torch.exp(v / 2) * e) ** 2) + kl_divergence(mu, v, ZERO, ZERO),
        {"mu": SHAPE, "v": SHAPE, "e": SHAPE},
        ("mu", "v", "e"),
    ),
    "sample_prior": Case(
        sampled_with_prior,
        sampled_with_prior_formula,
        {"mu": SHAPE, "v": SHAPE, "pm": SHAPE, "pv": SHAPE, "e": (2, *SHAPE)},
        ("mu", "v", "pm", "pv", "e"),
    ),
}


def make(case: Case) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    values = {name: torch.randn(shape, generator=generator) for name, shape in case.inputs.items()}
    if "t" in values:
        values["t"] = torch.sigmoid(values["t"])
    if "n" in values:  # levels
        values["n"] = (255 * torch.sigmoid(2 * values["n"])).round()
    return values


def subsets(names: tuple[str, ...]) -> list[tuple[str, ...]]:
    return [s for size in range(1, len(names) + 1) for s in itertools.combinations(names, size)]


@pytest.mark.parametrize(
    ("name", "wanted"),
    [(name, wanted) for name, case in CASES.items() for wanted in subsets(case.differentiable)],
)
def test_every_subset_of_gradients(backend: str, name: str, wanted: tuple[str, ...]) -> None:
    """Weighted rows; whatever set of inputs requires a gradient gets it, nothing else does, nothing is written to."""
    case = CASES[name]
    inputs = {k: v.requires_grad_(k in wanted) for k, v in make(case).items()}
    before = {k: (v.detach().clone(), v._version) for k, v in inputs.items()}
    (case.fused(*inputs.values()) * WEIGHTS).sum().backward()

    exact = {k: v.detach().double().requires_grad_(k in wanted) for k, v in inputs.items()}
    (case.formula(*exact.values()) * WEIGHTS.double()).sum().backward()
    for key, value in inputs.items():
        if key in wanted:
            assert value.grad is not None
            assert value.grad.dtype == value.dtype
            close(value.grad, exact[key].grad)
        else:
            assert value.grad is None
        assert torch.equal(value.detach(), before[key][0])
        assert value._version == before[key][1]


# --- The ELBO: how its outputs may be used ----------------------------------------------------------------------------

BETA = 0.7


def scalar(loss: Tensor) -> Tensor:
    return (loss * WEIGHTS.to(loss.dtype)).sum() if loss.dim() else loss


# How an objective is made of (loss, nll, kl); each stays as it is for float64 formulas.
OBJECTIVES: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "loss": lambda loss, nll, kl: scalar(loss),
    "scaled": lambda loss, nll, kl: 3 * scalar(loss),
    "negated": lambda loss, nll, kl: -scalar(loss),
    "twice": lambda loss, nll, kl: scalar(loss) + (scalar(loss) / 10) ** 2,
    "nll weighted": lambda loss, nll, kl: (nll * WEIGHTS.to(nll.dtype)).sum(),
    "nll expanded": lambda loss, nll, kl: nll.sum(),
    "loss expanded": lambda loss, nll, kl: loss.sum(),
    "kl only": lambda loss, nll, kl: (kl * WEIGHTS.to(kl.dtype)).sum(),
    "all three": lambda loss, nll, kl: scalar(loss) + nll.square().sum() / 100 + kl.square().sum(),
}


def elbo_inputs(likelihood: str) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(2)
    channels = 6 if likelihood == "per_element" else 3
    inputs = {
        "recon": torch.randn(B, channels, 4, generator=generator),
        "x": torch.rand(SHAPE, generator=generator),
        "mu": torch.randn(B, 7, generator=generator),
        "logvar": torch.randn(B, 7, generator=generator),
    }
    return {k: v.requires_grad_(k != "x") for k, v in inputs.items()}


def make_elbo(likelihood: str, reduction: str = "mean") -> fastvae.ELBO:
    module = "bernoulli" if likelihood == "bernoulli" else fastvae.likelihoods.Gaussian(likelihood)
    return fastvae.ELBO(module, beta=BETA, reduction=reduction)


def formula(
    likelihood: str, reduction: str, inputs: dict[str, Tensor]
) -> tuple[dict[str, Tensor], tuple[Tensor, ...]]:
    """Float64 leaves, and (loss, nll, kl) made of them."""
    leaves = {k: v.detach().double().requires_grad_(k != "x") for k, v in inputs.items()}
    recon, x = leaves["recon"], leaves["x"]
    if likelihood == "bernoulli":
        nll = bernoulli(recon, x)
    elif likelihood == "learned":
        leaves["scale"] = torch.zeros((), dtype=torch.float64, requires_grad=True)
        nll = gaussian(recon, x, leaves["scale"].expand_as(recon))
    else:
        nll = gaussian(recon[:, :3], x, recon[:, 3:])
    kl = kl_divergence(leaves["mu"], leaves["logvar"], ZERO, ZERO)
    total = nll + torch.tensor(BETA).double() * kl
    loss = {"mean": total.mean(), "sum": total.sum(), "none": total}[reduction]
    return leaves, (loss, nll, kl)


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("likelihood", ["bernoulli", "learned", "per_element"])
def test_elbo_objectives(backend: str, likelihood: str, reduction: str, objective: str) -> None:
    elbo, inputs = make_elbo(likelihood, reduction), elbo_inputs(likelihood)
    out = elbo(*inputs.values())
    OBJECTIVES[objective](*out).backward()
    leaves, exact = formula(likelihood, reduction, inputs)
    OBJECTIVES[objective](*exact).backward()

    for actual, expected in zip(out, exact, strict=True):
        close(actual, expected)
    if likelihood == "learned":
        inputs["scale"] = elbo.likelihood.logvar
    for key, leaf in leaves.items():
        if leaf.grad is None:
            assert inputs[key].grad is None or not inputs[key].grad.any(), key
        else:
            close(inputs[key].grad, leaf.grad)


@pytest.mark.parametrize("likelihood", ["bernoulli", "learned", "per_element"])
@pytest.mark.parametrize("first", ["loss", "scaled"])
def test_kept_graph(backend: str, likelihood: str, first: str) -> None:
    """A kept graph gives equal gradients any number of times, and the last, unkept, time too."""
    elbo, inputs = make_elbo(likelihood), elbo_inputs(likelihood)
    out = elbo(*inputs.values())
    objective = OBJECTIVES[first](*out)
    wanted = [v for v in inputs.values() if v.requires_grad]
    runs = [torch.autograd.grad(objective, wanted, retain_graph=keep) for keep in (True, True, False)]
    for again in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], again, strict=True))
    assert runs[0][0].data_ptr() != runs[1][0].data_ptr()
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        objective.backward()


def test_outputs_one_after_the_other(backend: str) -> None:
    """Backward through nll, then through loss, on one kept graph, accumulates what one backward of the sum gives."""
    elbo, inputs = make_elbo("bernoulli"), elbo_inputs("bernoulli")
    out = elbo(*inputs.values())
    (out.nll * WEIGHTS).sum().backward(retain_graph=True)
    (2 * out.loss).backward()
    leaves, (loss, nll, _) = formula("bernoulli", "mean", inputs)
    ((nll * WEIGHTS.double()).sum() + 2 * loss).backward()
    close(inputs["recon"].grad, leaves["recon"].grad)
    close(inputs["mu"].grad, leaves["mu"].grad)


def test_expanded_grad_output(backend: str) -> None:
    elbo, inputs = make_elbo("bernoulli", "none"), elbo_inputs("bernoulli")
    grad = torch.tensor(2.5).expand(B)
    assert grad.stride() == (0,)
    elbo(*inputs.values()).loss.backward(grad)
    leaves, (loss, _, _) = formula("bernoulli", "none", inputs)
    (2.5 * loss.sum()).backward()
    for key in ("recon", "mu", "logvar"):
        close(inputs[key].grad, leaves[key].grad)


def test_accumulation_into_a_leaf(backend: str) -> None:
    """Micro-batches add up in .grad; the second backward must not write over the first one's buffer."""
    elbo, inputs = make_elbo("bernoulli"), elbo_inputs("bernoulli")
    for factor in (1.0, 3.0):
        (factor * elbo(*inputs.values()).loss).backward()
    leaves, (loss, _, _) = formula("bernoulli", "mean", inputs)
    (4 * loss).backward()
    for key in ("recon", "mu", "logvar"):
        close(inputs[key].grad, leaves[key].grad)


def test_outputs_do_not_alias_inputs(backend: str) -> None:
    mu, logvar, eps = torch.randn(3, B, 7)
    kl = torch.rand(B)
    recon, x = torch.randn(B, 4), torch.rand(B, 4)
    z, own_kl = fv.reparameterize_kl(mu, logvar, eps=eps)
    out = fastvae.ELBO("gaussian", reduction="none")(recon, x, kl=kl)
    results = [z, own_kl, out.loss, out.nll, fv.gaussian_kl(mu[:, :1], logvar[:, :1], reduction="none")]
    storages = {t.untyped_storage().data_ptr() for t in (mu, logvar, eps, kl, recon, x)}
    assert not storages & {t.untyped_storage().data_ptr() for t in results}


def test_saved_latents_are_guarded() -> None:
    """What the backward reads again may not have been changed in between."""
    mu = torch.randn(B, 3, requires_grad=True)
    inner = mu * 1
    z, _ = fv.reparameterize_kl(inner, torch.zeros(B, 3))
    inner.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        z.sum().backward()


# --- No copy ----------------------------------------------------------------------------------------------------------


def big_allocations(run: Callable[[], object], size: int) -> list[int]:
    """Sizes of the allocations of at least `size` bytes that `run` makes."""
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        run()
    found = [e.nbytes() for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    return [n for n in found if n >= size]


@pytest.mark.parametrize(
    ("use", "buffers"),
    [
        (lambda loss: loss.backward(), 1),
        (lambda loss: (3 * loss).backward(), 1),  # scaled in place
        (lambda loss: loss.backward(retain_graph=True), 2),  # the saved gradient must outlive it
    ],
    ids=["plain", "scaled", "kept"],
)
@pytest.mark.parametrize("likelihood", ["bernoulli", "gaussian"])
def test_forward_and_backward_allocate_one_gradient(
    likelihood: str, use: Callable[[Tensor], None], buffers: int
) -> None:
    # Under 1 MB, where the pool of large buffers begins: each buffer is an allocation that the profiler sees.
    recon, x = torch.randn(60, 4096, requires_grad=True), torch.rand(60, 4096)
    elbo, kl = fastvae.ELBO(likelihood), torch.rand(60)
    size = recon.numel() * recon.element_size()
    with fastvae.use_backend("native"):
        assert big_allocations(lambda: use(elbo(recon, x, kl=kl).loss), size // 2) == [size] * buffers


@pytest.mark.parametrize("bounds", [None, (-6.0, 2.0)])
def test_a_head_of_an_image_costs_one_gradient(native: None, bounds: tuple[float, float] | None) -> None:
    """At a time, above the inputs, whatever is done to the log-variance."""
    params, x = torch.randn(16, 6, 256, 256, requires_grad=True), torch.rand(16, 3, 256, 256)
    elbo = fastvae.ELBO(fastvae.likelihoods.Gaussian("per_element", logvar_bounds=bounds))
    kl = torch.rand(16)

    def step() -> Tensor:
        return torch.autograd.grad(elbo(params, x, kl=kl).loss, params)[0]

    def peak(run: Callable[[], object]) -> int:
        fastvae.empty_cache()
        activities = [torch.profiler.ProfilerActivity.CPU]
        with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
            kept = run()
        events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
        events.sort(key=lambda e: e.start_ns())
        del kept
        return max(itertools.accumulate((e.nbytes() for e in events), initial=0))

    assert params.nbytes <= peak(step) < 1.02 * params.nbytes
    with fastvae.use_backend("reference"):  # that this test can fail
        assert peak(step) > 2 * params.nbytes


def test_large_buffers_are_reused_only_once_free(native: None) -> None:
    """Gradients over 1 MB come from a pool: one that somebody holds stays as it is, a free one serves again."""
    pool = importlib.import_module("fastvae._C")
    pool.empty_buffer_pool()
    x, size = torch.rand(300, 1024), 300 * 1024 * 4

    def gradient(shift: float) -> Tensor:
        recon = torch.full_like(x, shift, requires_grad=True)
        return torch.autograd.grad(fv.bernoulli_nll(recon, x).sum(), recon)[0]

    first = gradient(0.0)
    second = gradient(1.0)
    close(first, 0.5 - x)
    close(second, torch.sigmoid(torch.ones(())) - x)
    places = {first.data_ptr(), second.data_ptr()}
    assert len(places) == 2
    assert pool.empty_buffer_pool() == 0  # both are in use, and no third one was needed
    del first, second
    assert gradient(2.0).data_ptr() in places
    assert pool.empty_buffer_pool() == 2 * size


def test_no_gradient_allocates_nothing() -> None:
    recon, x, kl = torch.randn(64, 4096, requires_grad=True), torch.rand(64, 4096), torch.rand(64)
    elbo = fastvae.ELBO("gaussian")
    with torch.no_grad():
        assert big_allocations(lambda: elbo(recon, x, kl=kl), recon.numel()) == []


# --- Second derivatives -----------------------------------------------------------------------------------------------

TWICE = {
    "nll": lambda a: fv.bernoulli_nll(a, torch.full_like(a, 0.3)),
    "kl": lambda a: fv.gaussian_kl(a, a / 2),
    "sample": lambda a: fv.reparameterize_kl(a, a / 2, eps=torch.ones_like(a))[0].square().flatten(),
}


@pytest.mark.parametrize("name", TWICE)
@pytest.mark.parametrize(
    "differentiate",
    [
        pytest.param(lambda y, a: y.backward(), id="backward"),
        pytest.param(torch.autograd.grad, id="autograd.grad"),
    ],
)
def test_second_derivative_is_refused_by_name(
    name: str, differentiate: Callable[[Tensor, Tensor], object]
) -> None:
    a = torch.randn(B, 3, requires_grad=True)
    with fastvae.use_backend("native"):
        (first,) = torch.autograd.grad(TWICE[name](a).sum(), a, create_graph=True)
        (plain,) = torch.autograd.grad(TWICE[name](a).sum(), a)
    assert torch.equal(first.detach(), plain)  # create_graph alone is harmless
    with pytest.raises(RuntimeError, match=r"fastvae\.use_backend\(\"reference\"\)"):
        differentiate(first.sum(), a)


@pytest.mark.parametrize("name", TWICE)
def test_second_derivative_of_the_reference(name: str) -> None:
    a = torch.randn(B, 3, dtype=torch.float64, requires_grad=True)
    with fastvae.use_backend("reference"):
        assert torch.autograd.gradgradcheck(TWICE[name], (a,))


def test_create_graph_then_step() -> None:
    """backward(create_graph=True) leaves gradients that an optimiser can use."""
    inputs = elbo_inputs("bernoulli")
    with pytest.warns(UserWarning, match="create_graph=True"):
        make_elbo("bernoulli")(*inputs.values()).loss.backward(create_graph=True)
    leaves, (loss, _, _) = formula("bernoulli", "mean", inputs)
    loss.backward()
    close(inputs["recon"].grad.detach(), leaves["recon"].grad)


# --- torch.func, forward mode -----------------------------------------------------------------------------------------


def dual(a: Tensor) -> Tensor:
    with torch.autograd.forward_ad.dual_level():
        out = fv.bernoulli_nll(
            torch.autograd.forward_ad.make_dual(a, torch.ones_like(a)), torch.zeros_like(a)
        )
        return torch.autograd.forward_ad.unpack_dual(out).tangent


LOSS = lambda a: fv.bernoulli_nll(a, torch.zeros_like(a)).sum()  # noqa: E731
# Each gives a number that must be the derivative of `LOSS`, or of its rows, in direction 1.
TRANSFORMS = {
    "grad": lambda a: torch.func.grad(LOSS)(a).sum(),
    "vmap of grad": lambda a: torch.func.vmap(torch.func.grad(LOSS))(a[:, None]).sum(),
    "jvp": lambda a: torch.func.jvp(LOSS, (a,), (torch.ones_like(a),))[1],
    "jacrev": lambda a: torch.func.jacrev(LOSS)(a).sum(),
    "forward_ad": lambda a: dual(a).sum(),
}


@pytest.mark.parametrize("name", TRANSFORMS)
def test_transforms_point_to_the_reference(name: str) -> None:
    a = torch.randn(B, 3)
    with (
        fastvae.use_backend("native"),
        pytest.raises(RuntimeError, match=r"fastvae\.use_backend\(\"reference\"\)"),
    ):
        TRANSFORMS[name](a)
    with fastvae.use_backend("reference"):
        close(TRANSFORMS[name](a), torch.sigmoid(a).sum())


# --- It lives in PyTorch ----------------------------------------------------------------------------------------------


def test_grad_scaler_in_fp16(backend: str) -> None:
    """fp16 gradients of a mean over many rows keep their digits under a loss scale: 1/B comes after it."""
    n = 2048
    generator = torch.Generator().manual_seed(3)
    recon = torch.randn(n, 16, generator=generator).half()
    x = torch.sigmoid(recon.float() + 0.01 * torch.randn(n, 16, generator=generator))
    recon.requires_grad_()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**15)
    out = fastvae.ELBO("bernoulli")(recon, x, kl=torch.zeros(n))
    assert out.loss.dtype == torch.float32
    scaler.scale(out.loss).backward()
    exact = (torch.sigmoid(recon.detach().double()) - x.double()) / n * 2.0**15
    close(recon.grad, exact, rtol=1e-3, atol=2e-6)  # fp16's smallest step, times 2^15 / n
    assert (recon.grad == 0).double().mean() < 1e-3


def test_autocast_gives_float32(backend: str) -> None:
    torch.manual_seed(0)
    encoder, decoder, elbo = nn.Linear(12, 8), nn.Linear(4, 12), make_elbo("learned")
    x = torch.rand(B, 12)

    def run(fused: bool) -> list[Tensor]:
        for module in (encoder, decoder, elbo):
            module.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            mu, logvar = encoder(x).chunk(2, dim=1)
            assert mu.dtype == torch.bfloat16
            eps = torch.ones_like(mu)
            if fused:
                z, kl = elbo.reparameterize(mu, logvar, eps=eps)
                out = elbo(decoder(z), x, kl=kl)
                assert z.dtype == torch.bfloat16
                assert {t.dtype for t in out} == {torch.float32}
                loss = out.loss
            else:
                z = mu + torch.exp(logvar / 2) * eps
                kl = kl_divergence(mu.float(), logvar.float(), ZERO, ZERO)
                recon = decoder(z.bfloat16()).float()
                loss = (gaussian(recon, x, elbo.likelihood.logvar.expand_as(recon)) + BETA * kl).mean()
        loss.backward()
        parameters = [encoder.weight, decoder.weight, elbo.likelihood.logvar]
        return [p.grad.clone() for p in parameters]

    for fused, eager in zip(run(True), run(False), strict=True):
        assert fused.dtype == torch.float32
        close(fused, eager, rtol=3e-2, atol=2e-2)


@pytest.mark.parametrize("in_place", [False, True])
def test_tensor_hooks(backend: str, in_place: bool) -> None:
    """A hook on the reconstruction sees the gradient, and what it returns (or writes) travels on."""
    inputs = elbo_inputs("bernoulli")
    leaf = inputs["recon"]
    recon = leaf * 1
    seen = []

    def hook(grad: Tensor) -> Tensor | None:
        seen.append(grad.clone())
        if not in_place:
            return grad * 2
        grad.mul_(2)
        return None

    recon.register_hook(hook)
    elbo = make_elbo("bernoulli")
    elbo(recon, inputs["x"], inputs["mu"], inputs["logvar"]).loss.backward()
    leaves, (loss, _, _) = formula("bernoulli", "mean", inputs)
    loss.backward()
    close(seen[0], leaves["recon"].grad)
    close(leaf.grad, 2 * leaves["recon"].grad)


def test_module_hooks(backend: str) -> None:
    elbo, inputs, calls = make_elbo("bernoulli"), elbo_inputs("bernoulli"), []
    elbo.register_forward_hook(lambda module, args, out: calls.append(("forward", type(out))))
    elbo.register_full_backward_hook(
        lambda module, grad_in, grad_out: calls.append(("backward", grad_in[0].shape))
    )
    elbo(*inputs.values()).loss.backward()
    assert calls == [("forward", fastvae.ELBOOutput), ("backward", inputs["recon"].shape)]


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpoint(backend: str, use_reentrant: bool) -> None:
    """The recomputed forward draws the noise of the first one, and gradients are those of no checkpoint."""
    elbo, drawn = make_elbo("bernoulli"), []

    def block(mu: Tensor, logvar: Tensor, x: Tensor) -> Tensor:
        z, kl = elbo.reparameterize(mu, logvar)
        drawn.append(z.detach().clone())
        return elbo(z * z, x, kl=kl).loss

    def gradients(run: Callable[..., Tensor]) -> list[Tensor]:
        torch.manual_seed(5)
        mu, logvar = (torch.randn(B, 7, requires_grad=True) for _ in range(2))
        (2 * run(mu, logvar, torch.rand(B, 7))).backward()
        return [mu.grad, logvar.grad]

    plain = gradients(block)
    drawn.clear()
    again = gradients(lambda *args: checkpoint(block, *args, use_reentrant=use_reentrant))
    assert len(drawn) == 2
    assert torch.equal(drawn[0], drawn[1])
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))


@pytest.mark.parametrize("likelihood", ["bernoulli", "learned", "per_element"])
def test_saved_tensors_hooks(likelihood: str) -> None:
    """Whatever is saved goes through the hooks, and comes back from elsewhere."""
    elbo, inputs = make_elbo(likelihood), elbo_inputs(likelihood)
    wanted = [v for v in inputs.values() if v.requires_grad]
    plain = torch.autograd.grad(3 * elbo(*inputs.values()).loss, wanted)
    packed = []

    def pack(tensor: Tensor) -> int:
        packed.append(tensor.clone())
        return len(packed) - 1

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda index: packed[index].clone()):
        loss = elbo(*inputs.values()).loss
    assert any(t.shape == inputs["recon"].shape for t in packed)
    with torch.autograd.graph.save_on_cpu():
        on_cpu = elbo(*inputs.values()).loss
    for hooked in (loss, on_cpu):
        again = torch.autograd.grad(3 * hooked, wanted)
        assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_autograd(backend: str, mode: Callable[[], object]) -> None:
    elbo, inputs = make_elbo("bernoulli"), elbo_inputs("bernoulli")
    expected = elbo(*inputs.values())
    with mode():
        out = elbo(*inputs.values())
        z, kl = elbo.reparameterize(inputs["mu"], inputs["logvar"], eps=torch.zeros(B, 7))
    for actual, wanted in zip(out, expected, strict=True):
        assert torch.equal(actual, wanted.detach())
        assert not actual.requires_grad
    assert torch.equal(z, inputs["mu"].detach())
    assert not z.requires_grad
    assert not kl.requires_grad


@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"]
)
def test_copies(duplicate: Callable[[nn.Module], nn.Module]) -> None:
    """A copy computes the same and shares nothing: training or re-weighting it leaves the original alone."""
    elbo, inputs = make_elbo("learned", "sum"), elbo_inputs("learned")
    with torch.no_grad():
        elbo.likelihood.logvar.fill_(0.4)
    twin = duplicate(elbo)
    expected = elbo(*inputs.values()).loss
    assert torch.equal(twin(*inputs.values()).loss, expected)
    twin.beta = 0.0
    with torch.no_grad():
        twin.likelihood.logvar.fill_(1.0)
    assert torch.equal(elbo(*inputs.values()).loss, expected)
    assert not torch.equal(twin(*inputs.values()).loss, expected)


@pytest.mark.parametrize("name", CASES)
def test_deterministic_algorithms(name: str) -> None:
    """This mode fills fresh memory with NaN: it also tells whether every element of every result is written."""
    case = CASES[name]
    torch.use_deterministic_algorithms(True)
    try:
        inputs = {k: v.requires_grad_(k in case.differentiable) for k, v in make(case).items()}
        (case.fused(*inputs.values()) * WEIGHTS).sum().backward()
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(inputs[key].grad.isfinite().all() for key in case.differentiable)


DDP = """
import datetime, os, sys, torch, fastvae
from torch import distributed as dist, nn

class Model(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.encoder, self.decoder = nn.Linear(6, 4), nn.Linear(2, 6)
        self.elbo = fastvae.ELBO(fastvae.likelihoods.Gaussian("learned"))

    def forward(self, x):
        mu, logvar = self.encoder(x).chunk(2, dim=1)
        z, kl = self.elbo.reparameterize(mu, logvar, eps=torch.ones_like(mu))
        return self.elbo(self.decoder(z), x, kl=kl)

rank, folder = int(sys.argv[1]), sys.argv[2]
torch.set_num_threads(1)
dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2,
                        timeout=datetime.timedelta(seconds=60))
data = torch.arange(48.0).view(8, 6) / 48
wrapped = nn.parallel.DistributedDataParallel(Model())
wrapped(data[rank * 4 : rank * 4 + 4]).loss.backward()
whole = Model()
whole(data).loss.backward()
for (name, mine), wanted in zip(wrapped.module.named_parameters(), whole.parameters(), strict=True):
    torch.testing.assert_close(mine.grad, wanted.grad, rtol=1e-5, atol=1e-6, msg=name)
assert wrapped.module.elbo.likelihood.logvar.grad.abs() > 0
dist.destroy_process_group()
os._exit(0)  # not through the end of the interpreter, which now and then aborts on threads of gloo that still run
"""


@pytest.mark.slow
def test_ddp(tmp_path) -> None:  # type: ignore[no-untyped-def]
    """Two processes, half a batch each: the gradients of the whole batch, the learned scale's included."""
    if not torch.distributed.is_available() or not torch.distributed.is_gloo_available():
        pytest.skip("this torch has no gloo")
    command = [sys.executable, "-c", DDP]
    processes = [
        subprocess.Popen([*command, str(rank), str(tmp_path)], stderr=subprocess.PIPE, text=True)
        for rank in (0, 1)
    ]
    try:
        errors = [process.communicate(timeout=120)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], "\n".join(errors)


@pytest.mark.parametrize("prior", [None, -90.0, math.nan], ids=["standard", "overflows", "nan"])
def test_z_alone_has_no_gradient_from_the_kl(backend: str, prior: float | None) -> None:
    """Not even 0 times an infinite one."""
    mu = torch.zeros(2, 5, requires_grad=True)
    logvar = torch.full((2, 5), 90.0 if prior is None else 0.0, requires_grad=True)
    priors = [] if prior is None else [torch.zeros(2, 5), torch.full((2, 5), prior)]
    z, _ = fv.reparameterize_kl(mu, logvar, *priors, eps=torch.ones(2, 5))
    by_mu, by_logvar = torch.autograd.grad(z.sum(), [mu, logvar])
    close(by_mu, torch.ones(2, 5))
    close(by_logvar, 0.5 * torch.exp(0.5 * logvar.detach()))


def test_a_training_step_equals_the_tutorials(backend: str) -> None:
    """The loss of a hundred tutorials, with its gradients through encoder and decoder."""
    torch.manual_seed(4)
    encoder, decoder = nn.Linear(12, 8), nn.Sequential(nn.Linear(4, 12), nn.Sigmoid())
    x = torch.rand(B, 12)

    def step(loss: Callable[..., Tensor]) -> list[Tensor]:
        mu, logvar = encoder(x).chunk(2, dim=1)
        z = mu + torch.exp(0.5 * logvar) * torch.full_like(mu, 0.3)
        parameters = [*encoder.parameters(), *decoder.parameters()]
        return list(torch.autograd.grad(loss(z, mu, logvar), parameters))

    def tutorial(z: Tensor, mu: Tensor, logvar: Tensor) -> Tensor:
        bce = F.binary_cross_entropy(decoder(z), x, reduction="sum")
        return bce - 0.5 * torch.sum(1 + logvar - mu.pow(2) - logvar.exp())

    elbo = fastvae.ELBO("bernoulli", reduction="sum")
    fused = step(lambda z, mu, logvar: elbo(decoder[0](z), x, mu, logvar).loss)
    for actual, expected in zip(fused, step(tutorial), strict=True):
        close(actual, expected, rtol=1e-4, atol=1e-5)
