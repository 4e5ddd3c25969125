"""Gradients in every way that autograd may request them, compared with float64 formulas written here."""

import importlib
import itertools
import math
from collections.abc import Callable
from typing import NamedTuple

import published_logistics
import pytest
import torch
from torch import Tensor

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
    formula: Callable[..., Tensor]  # the formula, in float64
    inputs: dict[str, tuple[int, ...]]  # input name -> shape
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
    if "n" in values:  # integer levels
        values["n"] = (255 * torch.sigmoid(2 * values["n"])).round()
    return values


def subsets(names: tuple[str, ...]) -> list[tuple[str, ...]]:
    return [s for size in range(1, len(names) + 1) for s in itertools.combinations(names, size)]


@pytest.mark.parametrize(
    ("name", "requested"),
    [(name, requested) for name, case in CASES.items() for requested in subsets(case.differentiable)],
)
def test_any_subset_of_inputs_gets_its_gradients(backend: str, name: str, requested: tuple[str, ...]) -> None:
    """Any set of inputs that require a gradient gets it, with weighted rows. Nothing else gets one or is written to."""
    case = CASES[name]
    inputs = {k: v.requires_grad_(k in requested) for k, v in make(case).items()}
    before = {k: (v.detach().clone(), v._version) for k, v in inputs.items()}
    (case.fused(*inputs.values()) * WEIGHTS).sum().backward()

    exact = {k: v.detach().double().requires_grad_(k in requested) for k, v in inputs.items()}
    (case.formula(*exact.values()) * WEIGHTS.double()).sum().backward()
    for key, value in inputs.items():
        if key in requested:
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


# Objectives as functions of (loss, nll, kl), which also apply to float64 formulas.
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
    """Float64 leaves, and (loss, nll, kl) computed from them."""
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
def test_elbo_objectives_equal_the_formula(
    backend: str, likelihood: str, reduction: str, objective: str
) -> None:
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
def test_kept_graph_gives_the_same_gradient_twice(backend: str, likelihood: str, first: str) -> None:
    """A kept graph gives equal gradients any number of times, including the last time, when it is not kept."""
    elbo, inputs = make_elbo(likelihood), elbo_inputs(likelihood)
    out = elbo(*inputs.values())
    objective = OBJECTIVES[first](*out)
    requested = [v for v in inputs.values() if v.requires_grad]
    runs = [torch.autograd.grad(objective, requested, retain_graph=keep) for keep in (True, True, False)]
    for again in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], again, strict=True))
    assert runs[0][0].data_ptr() != runs[1][0].data_ptr()
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        objective.backward()


def test_outputs_differentiated_separately_equal_the_formula(backend: str) -> None:
    """On one kept graph, a backward through nll and one through loss accumulate the gradient of their sum."""
    elbo, inputs = make_elbo("bernoulli"), elbo_inputs("bernoulli")
    out = elbo(*inputs.values())
    (out.nll * WEIGHTS).sum().backward(retain_graph=True)
    (2 * out.loss).backward()
    leaves, (loss, nll, _) = formula("bernoulli", "mean", inputs)
    ((nll * WEIGHTS.double()).sum() + 2 * loss).backward()
    close(inputs["recon"].grad, leaves["recon"].grad)
    close(inputs["mu"].grad, leaves["mu"].grad)


def test_expanded_grad_output_equals_a_dense_one(backend: str) -> None:
    elbo, inputs = make_elbo("bernoulli", "none"), elbo_inputs("bernoulli")
    grad = torch.tensor(2.5).expand(B)
    assert grad.stride() == (0,)
    elbo(*inputs.values()).loss.backward(grad)
    leaves, (loss, _, _) = formula("bernoulli", "none", inputs)
    (2.5 * loss.sum()).backward()
    for key in ("recon", "mu", "logvar"):
        close(inputs[key].grad, leaves[key].grad)


def test_accumulation_into_a_leaf_adds_up(backend: str) -> None:
    """Micro-batches add up in .grad. The second backward must not overwrite the first one's buffer."""
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


def test_changing_saved_latents_in_place_raises() -> None:
    """Tensors that the backward reads again must not have been changed in between."""
    mu = torch.randn(B, 3, requires_grad=True)
    inner = mu * 1
    z, _ = fv.reparameterize_kl(inner, torch.zeros(B, 3))
    inner.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        z.sum().backward()


# --- No copy ----------------------------------------------------------------------------------------------------------


def big_allocations(run: Callable[[], object], size: int) -> list[int]:
    """The sizes of the allocations of at least `size` bytes that `run` makes."""
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
        (
            lambda loss: loss.backward(retain_graph=True),
            2,
        ),  # the saved gradient is still needed, so it is not scaled in place
    ],
    ids=["plain", "scaled", "kept"],
)
@pytest.mark.parametrize("likelihood", ["bernoulli", "gaussian"])
def test_forward_and_backward_allocate_only_one_gradient(
    likelihood: str, use: Callable[[Tensor], None], buffers: int
) -> None:
    # Under 1 MB, where the pool of large buffers begins, so that the profiler sees each buffer as an allocation.
    recon, x = torch.randn(60, 4096, requires_grad=True), torch.rand(60, 4096)
    elbo, kl = fastvae.ELBO(likelihood), torch.rand(60)
    size = recon.numel() * recon.element_size()
    with fastvae.use_backend("native"):
        assert big_allocations(lambda: use(elbo(recon, x, kl=kl).loss), size // 2) == [size] * buffers


@pytest.mark.parametrize("bounds", [None, (-6.0, 2.0)])
def test_image_head_allocates_only_one_gradient(native: None, bounds: tuple[float, float] | None) -> None:
    """The peak above the inputs, for every form of the log-variance."""
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
    with fastvae.use_backend("reference"):  # a check that this test can fail
        assert peak(step) > 2 * params.nbytes


def test_large_buffers_are_reused_only_after_release(native: None) -> None:
    """Gradients over 1 MB come from a pool. One that is still referenced is not touched, and a free one is reused."""
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
    assert pool.empty_buffer_pool() == 0  # both were in use, and no third one was needed
    del first, second
    assert gradient(2.0).data_ptr() in places
    assert pool.empty_buffer_pool() == 2 * size


def test_forward_without_gradient_allocates_nothing_large() -> None:
    recon, x, kl = torch.randn(64, 4096, requires_grad=True), torch.rand(64, 4096), torch.rand(64)
    elbo = fastvae.ELBO("gaussian")
    with torch.no_grad():
        assert big_allocations(lambda: elbo(recon, x, kl=kl), recon.numel()) == []
