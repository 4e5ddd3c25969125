"""scvi-tools with fastvae's op in its distributions: accuracy, training, fallbacks, and restoring scvi-tools."""

import copy
import functools
import runpy
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mpmath
import numpy as np
import pytest
import torch
from torch import Tensor

import fastvae
from fastvae.integrations import scvi as integration
from fastvae.integrations.scvi import accelerate, status, undo

ROOT = Path(__file__).parents[2]
EPS = 1e-8

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning:(lightning|anndata|scvi|mudata|torch)"),
    pytest.mark.filterwarnings("ignore:.*num_workers:UserWarning"),
]


@pytest.fixture(scope="module")
def scvi() -> Any:
    """scvi-tools, whose import takes about ten seconds, with the settings that the tests need."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        package = pytest.importorskip("scvi", reason="scvi-tools is not installed")
        import scvi.external.gimvi._module as gimvi
        import scvi.module._multivae as multivae
        from scvi.distributions import _negative_binomial as formulas
    found = metadata.version("scvi-tools")
    if found not in integration.VERSIONS:
        pytest.skip(f"scvi-tools {found} is not served")
    return SimpleNamespace(
        package=package,
        formulas=formulas,
        gimvi=gimvi,
        multivae=multivae,
        NB=formulas.NegativeBinomial,
        ZINB=formulas.ZeroInflatedNegativeBinomial,
        Poisson=formulas.Poisson,
    )


@pytest.fixture(autouse=True)
def _as_it_was() -> Iterator[None]:
    yield
    undo()


# ---------------------------------------------------------------------------------------------------------- numbers

THETAS = (1e-4, 1e-2, 0.5, 1.0, 10.0, 1e3, 1e4, 1e6, 1e8)
COUNTS = (0.0, 0.0, 1.0, 2.0, 7.0, 100.0, 1e4, 1e6, 0.5, 3.25)
MEANS = (1e-10, 1e-6, 1e-3, 0.3, 5.0, 1e3, 1e6)
ZI_LOGITS = (-8.0, -1.0, 0.0, 3.0)


def grid() -> dict[str, Tensor]:
    """Every theta with every count in a row and every mean in a column; float32, whose values are taken as exact."""
    theta, x = torch.cartesian_prod(torch.tensor(THETAS), torch.tensor(COUNTS)).unbind(1)
    mu = torch.tensor(MEANS)[:, None].repeat(1, len(theta))
    pi = torch.tensor(ZI_LOGITS).repeat(mu.numel())[: mu.numel()].reshape(mu.shape)
    return {"mu": mu, "theta": theta, "zi_logits": pi, "x": x.expand_as(mu).clone()}


def exact(kind: str, mu: float, theta: float, pi: float, x: float) -> float:
    """scvi-tools' log_nb_positive and log_zinb_positive, and torch's Poisson, in 50 digits."""
    with mpmath.workdps(50):
        mu, theta, pi, x = map(mpmath.mpf, (mu, theta, pi, x))
        if kind == "Poisson":
            return float((x * mpmath.log(mu) if x else 0) - mu - mpmath.loggamma(x + 1))
        total = mpmath.log(theta + mu + EPS)
        log_p = theta * (mpmath.log(theta + EPS) - total) + x * (mpmath.log(mu + EPS) - total)
        log_p += mpmath.loggamma(x + theta) - mpmath.loggamma(theta) - mpmath.loggamma(x + 1)
        if kind == "ZINB":
            zero = 1 / (1 + mpmath.exp(-pi))
            log_p = (
                mpmath.log(zero + (1 - zero) * mpmath.exp(log_p)) if x == 0 else log_p + mpmath.log(1 - zero)
            )
        return float(log_p)


def distribution(scvi: Any, kind: str, at: dict[str, Tensor]) -> Any:
    if kind == "Poisson":
        return scvi.Poisson(at["mu"], validate_args=False)
    if kind == "NB":
        return scvi.NB(mu=at["mu"], theta=at["theta"])
    return scvi.ZINB(mu=at["mu"], theta=at["theta"], zi_logits=at["zi_logits"])


PARAMS = {"NB": ("mu", "theta"), "ZINB": ("mu", "theta", "zi_logits"), "Poisson": ("mu",)}
KINDS = tuple(PARAMS)


def evaluate(scvi: Any, kind: str, at: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """log_prob of each element, and the gradients of its sum."""
    leaves = {name: at[name].clone().requires_grad_() for name in PARAMS[kind]}
    # theta is the exponential of a model's parameter, and mu the output of its decoder.
    made = {name: leaf * 1 for name, leaf in leaves.items()}
    log_p = distribution(scvi, kind, {**at, **made}).log_prob(at["x"])
    gradients = torch.autograd.grad(log_p.sum(), list(leaves.values()))
    return log_p.detach(), dict(zip(leaves, gradients, strict=True))


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected).norm() / expected.norm())


@pytest.mark.filterwarnings("ignore:The value argument must be within the support:UserWarning")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("per_gene", [True, False])
def test_log_prob_equals_the_formula_in_float64(scvi: Any, backend: str, kind: str, per_gene: bool) -> None:
    at = grid()
    if not per_gene:
        at["theta"] = at["theta"].expand_as(at["mu"]).contiguous()
    every = zip(
        at["mu"].flatten().tolist(),
        at["theta"].expand_as(at["mu"]).flatten().tolist(),
        at["zi_logits"].flatten().tolist(),
        at["x"].flatten().tolist(),
        strict=True,
    )
    truth = torch.tensor([exact(kind, *values) for values in every], dtype=torch.float64)
    truth = truth.reshape(at["mu"].shape)
    _, grads = evaluate(scvi, kind, {name: value.double() for name, value in at.items()})

    with accelerate(strict=True):
        log_p, gradients = evaluate(scvi, kind, at)

    assert log_p.dtype == torch.float32
    assert ((log_p - truth).abs() <= 1e-5 * truth.abs() + 1e-7).all()
    rows = truth.sum(1)
    assert ((log_p.double().sum(1) - rows).abs() <= 1e-6 * rows.abs()).all()
    for name, expected in grads.items():
        assert relative(gradients[name], expected) < 1e-5, name


@pytest.mark.parametrize("kind", KINDS)
def test_log_prob_in_float64_is_served(scvi: Any, backend: str, kind: str) -> None:
    at = {name: value.double() for name, value in grid().items()}
    few = at["theta"] < 100  # where float64 itself is accurate enough
    at = {name: value[..., few] for name, value in at.items()}
    at["x"] = at["x"].floor()
    theirs, grads = evaluate(scvi, kind, at)
    with accelerate(strict=True):
        log_p, gradients = evaluate(scvi, kind, at)
    assert log_p.dtype == torch.float64
    torch.testing.assert_close(log_p, theirs, rtol=1e-9, atol=2e-8)  # scvi-tools adds EPS to theta too
    for name, expected in grads.items():
        assert relative(gradients[name], expected) < 1e-7, name


def small(rows: int = 6, genes: int = 20) -> dict[str, Tensor]:
    mu = torch.rand(rows, genes) * 3 + 0.1
    return {
        "mu": mu,
        "theta": torch.rand(genes) + 0.5,
        "zi_logits": torch.randn(rows, genes),
        "x": torch.poisson(mu),
    }


def test_reassigned_means_are_used(scvi: Any) -> None:
    at = small()
    px = distribution(scvi, "ZINB", at)
    with accelerate(strict=True):
        before = px.log_prob(at["x"])
        px.mu = px.mu * 2  # as scvi-tools' differential expression does
        after = px.log_prob(at["x"])
    torch.testing.assert_close(after, px.log_prob(at["x"]), rtol=1e-5, atol=1e-6)
    assert not torch.allclose(before, after)


def test_total_count_and_logits_are_served(scvi: Any) -> None:
    at = small()
    px = scvi.NB(total_count=at["theta"], logits=at["zi_logits"])
    theirs = px.log_prob(at["x"])
    with accelerate(strict=True):
        torch.testing.assert_close(px.log_prob(at["x"]), theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_half_zi_logits_of_autocast_are_served(scvi: Any, half: torch.dtype) -> None:
    at = small()
    at["zi_logits"] = at["zi_logits"].to(half).requires_grad_()
    exact_too = {**at, "zi_logits": at["zi_logits"].detach().float().requires_grad_()}
    with accelerate(strict=True):
        log_p = distribution(scvi, "ZINB", at).log_prob(at["x"])
        log_p.sum().backward()
    theirs = distribution(scvi, "ZINB", exact_too).log_prob(at["x"])
    theirs.sum().backward()
    torch.testing.assert_close(log_p, theirs, rtol=1e-5, atol=1e-6)
    assert at["zi_logits"].grad is not None
    assert at["zi_logits"].grad.dtype == half
    torch.testing.assert_close(
        at["zi_logits"].grad.float(), exact_too["zi_logits"].grad, rtol=1e-2, atol=1e-3
    )


# ----------------------------------------------------------------------------------------------- theta, one per gene


@pytest.fixture
def dispersions(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """The dispersions with which the op is called."""
    seen = []
    op = integration.nll_elements

    def recorded(row: str, params: tuple[Tensor, ...], *rest: Any) -> Tensor:
        seen.append(params[1])
        return op(row, params, *rest)

    monkeypatch.setattr(integration, "nll_elements", recorded)
    return seen


def theta_gradients(scvi: Any, make: Callable[[Tensor], Tensor], kind: str = "ZINB") -> Tensor:
    torch.manual_seed(0)
    at = small()
    leaf = torch.rand(at["mu"].shape).requires_grad_()
    log_p = distribution(scvi, kind, {**at, "theta": make(leaf)}).log_prob(at["x"])
    return torch.autograd.grad(log_p.sum(), leaf)[0]


@pytest.mark.parametrize("kind", ["NB", "ZINB"])
def test_dispersion_per_gene_is_not_broadcast(scvi: Any, dispersions: list[Tensor], kind: str) -> None:
    bases: list[Tensor] = []

    def of_genes(leaf: Tensor) -> Tensor:
        bases.append(torch.exp(leaf[0]))
        return bases[-1]

    theirs = theta_gradients(scvi, of_genes, kind)
    with accelerate(strict=True):
        torch.testing.assert_close(theta_gradients(scvi, of_genes, kind), theirs, rtol=1e-5, atol=1e-5)
    assert dispersions[0] is bases[-1]


def a_row(leaf: Tensor) -> Tensor:
    """A view whose base is another tensor."""
    return leaf[1]


def every_other(leaf: Tensor) -> Tensor:
    return leaf.flatten()[:40:2]


def expanded_early(leaf: Tensor) -> Tensor:
    return torch.exp(leaf[2]).unsqueeze(0).expand_as(leaf)


@pytest.mark.parametrize("make", [a_row, every_other, expanded_early])
def test_dispersion_that_is_a_view_gets_the_same_gradient(
    scvi: Any, dispersions: list[Tensor], make: Callable[[Tensor], Tensor]
) -> None:
    theirs = theta_gradients(scvi, make)
    with accelerate(strict=True):
        torch.testing.assert_close(theta_gradients(scvi, make), theirs, rtol=1e-5, atol=1e-5)
    assert dispersions[0].shape == (20,)


def test_detached_dispersion_gets_no_gradient(scvi: Any) -> None:
    at = small()
    theta = at["theta"].requires_grad_()
    mu = at["mu"].requires_grad_()
    px = distribution(scvi, "NB", at)
    px.theta = px.theta.detach()
    with accelerate(strict=True):
        px.log_prob(at["x"]).sum().backward()
    assert mu.grad is not None
    assert theta.grad is None


def test_dispersion_per_cell_and_without_autograd_is_served(scvi: Any, dispersions: list[Tensor]) -> None:
    at = small()
    theirs = distribution(scvi, "NB", at).log_prob(at["x"])
    with accelerate(strict=True):
        with torch.inference_mode():
            found = distribution(scvi, "NB", at).log_prob(at["x"])
        torch.testing.assert_close(found, theirs, rtol=1e-5, atol=1e-6)
        each = {**at, "theta": at["theta"].expand_as(at["mu"]).contiguous()}
        torch.testing.assert_close(
            distribution(scvi, "NB", each).log_prob(at["x"]), theirs, rtol=1e-5, atol=1e-6
        )
    assert [seen.shape for seen in dispersions] == [(20,), (6, 20)]


# ------------------------------------------------------------------------------------------------- what falls back


def broadcast(at: dict[str, Tensor]) -> None:
    at["mu"] = at["mu"] * torch.ones(3, 1, 1)  # three samples, as marginal_ll draws them


def halves(at: dict[str, Tensor]) -> None:
    at |= {name: at[name].to(torch.bfloat16) for name in ("mu", "theta", "zi_logits")}


def wide_values(at: dict[str, Tensor]) -> None:
    at["x"] = at["x"].double()


def empty(at: dict[str, Tensor]) -> None:
    at |= {name: at[name][:0] for name in ("mu", "zi_logits", "x")}


def trained_values(at: dict[str, Tensor]) -> None:
    at["x"].requires_grad_()


FALLBACKS = {
    broadcast: "several samples",
    halves: "bfloat16 means",
    wide_values: "float64 values",
    empty: "an empty batch",
    trained_values: "require a gradient",
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("change", FALLBACKS)
def test_unsupported_call_uses_scvi_tools_code(
    scvi: Any, kind: str, change: Callable[[dict[str, Tensor]], None]
) -> None:
    at = small()
    change(at)
    px = distribution(scvi, kind, at)
    theirs = px.log_prob(at["x"])
    with accelerate():
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            found = px.log_prob(at["x"])
        assert torch.equal(found, theirs)
        assert found.dtype == theirs.dtype
        ((reason, count),) = status().fell_back[type(px).__name__].items()
        assert FALLBACKS[change] in reason
        assert count == 1
        assert not status().served
    with accelerate(strict=True), pytest.raises(RuntimeError, match=FALLBACKS[change]) as error:
        px.log_prob(at["x"])
    assert type(px).__name__ in str(error.value)
    assert "without strict=True" in str(error.value)


def test_device_without_kernels_uses_scvi_tools_code(scvi: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    at = small()
    px = distribution(scvi, "ZINB", at)
    theirs = px.log_prob(at["x"])
    monkeypatch.setattr(fastvae.backends.choose, "serving", {})  # as without the extension
    with accelerate():
        assert torch.equal(px.log_prob(at["x"]), theirs)
    monkeypatch.undo()
    assert list(status().fell_back["ZeroInflatedNegativeBinomial"]) == [
        "no kernels for cpu tensors; fastvae doctor says why"
    ]


def test_torch_func_transform_uses_scvi_tools_code(scvi: Any) -> None:
    at = small()

    def row(mu: Tensor, x: Tensor) -> Tensor:
        return scvi.NB(mu=mu, theta=at["theta"]).log_prob(x)

    together = (at["mu"].expand(2, -1, -1), at["x"].expand(2, -1, -1))
    theirs = torch.func.vmap(row)(*together)
    with accelerate():
        assert torch.equal(torch.func.vmap(row)(*together), theirs)


def test_integer_counts_are_served(scvi: Any) -> None:
    at = small()
    expected = distribution(scvi, "NB", at).log_prob(at["x"])
    with accelerate(strict=True):
        for dtype in (torch.uint8, torch.int32, torch.int64):
            found = distribution(scvi, "ZINB", {**at, "zi_logits": torch.full_like(at["mu"], -30.0)})
            torch.testing.assert_close(found.log_prob(at["x"].to(dtype)), expected, rtol=1e-5, atol=1e-6)


SUPPORT = "The value argument must be within the support of the distribution"


def test_fractional_counts_are_served_with_a_warning(scvi: Any) -> None:
    at = small()
    at["x"] += 0.25
    px = distribution(scvi, "ZINB", at)
    with pytest.warns(UserWarning, match=SUPPORT) as told:
        theirs = px.log_prob(at["x"])
    with accelerate(strict=True):
        with pytest.warns(UserWarning, match=SUPPORT) as ours:
            found = px.log_prob(at["x"])
        with warnings.catch_warnings():  # a plain NB does not validate
            warnings.simplefilter("error")
            distribution(scvi, "NB", at).log_prob(at["x"])
        with pytest.warns(UserWarning, match=SUPPORT):
            scvi.NB(mu=at["mu"], theta=at["theta"], validate_args=True).log_prob(at["x"])
    assert ours[0].filename == told[0].filename == __file__
    torch.testing.assert_close(found, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("bad", [-1.0, -0.5, float("nan"), float("inf")])
def test_invalid_count_gives_the_warning_of_scvi_tools(scvi: Any, bad: float) -> None:
    at = small()
    at["x"][3, 5] = bad
    px = distribution(scvi, "ZINB", at)
    with pytest.warns(UserWarning, match=SUPPORT):
        theirs = px.log_prob(at["x"])
    with accelerate(), pytest.warns(UserWarning, match=SUPPORT):
        found = px.log_prob(at["x"])
    if bad < 0:  # 0 in scvi-tools' formula, and NaN where lgamma(x + 1) is infinite
        torch.testing.assert_close(found, theirs, rtol=0, atol=0, equal_nan=True)
    else:
        rest = torch.ones_like(found, dtype=torch.bool)
        rest[3, 5] = False
        torch.testing.assert_close(found[rest], theirs[rest], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["NB", "ZINB"])
def test_values_on_another_device_than_the_cpu_are_not_read(
    scvi: Any, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The check would wait for a GPU. On a meta tensor, which has no values, it raises an error."""
    monkeypatch.setitem(fastvae.backends.base.DEVICES, "meta", "Meta")
    with fastvae.use_backend("native"), accelerate(strict=True):
        at = {name: x.to("meta").requires_grad_(name != "x") for name, x in small().items()}
        log_p = distribution(scvi, kind, at).log_prob(at["x"])
        log_p.sum().backward()
    assert log_p.is_meta
    assert at["mu"].grad is not None
    assert list(status().served.values()) == [1]


def test_poisson_with_an_invalid_count_raises_as_before(scvi: Any) -> None:
    at = small()
    at["x"] += 0.5
    with accelerate():
        with pytest.raises(ValueError, match="to be within the support"):
            scvi.Poisson(at["mu"]).log_prob(at["x"])
        scvi.Poisson(at["mu"], validate_args=False).log_prob(at["x"])
    assert status().served == {"Poisson": 1}


def test_compiled_calls_are_not_counted(scvi: Any) -> None:
    at = small()

    def nb(mu: Tensor, theta: Tensor, x: Tensor) -> Tensor:
        return scvi.NB(mu=mu, theta=torch.exp(theta)).log_prob(x).sum(-1)

    def zinb(mu: Tensor, theta: Tensor, pi: Tensor, x: Tensor) -> Tensor:
        return scvi.ZINB(mu=mu, theta=torch.exp(theta), zi_logits=pi).log_prob(x).sum(-1)

    torch._dynamo.reset()
    arguments = [
        at["mu"].requires_grad_(),
        at["theta"].requires_grad_(),
        at["zi_logits"].requires_grad_(),
        at["x"],
    ]
    for function, inputs, whole in ((nb, [arguments[i] for i in (0, 1, 3)], True), (zinb, arguments, False)):
        theirs = function(*inputs)
        grads = torch.autograd.grad(theirs.sum(), inputs[:-1])
        with accelerate(strict=True):
            # On the CPU, ZINB's validation reads its values, which breaks a graph.
            compiled = torch.compile(function, backend="aot_eager", fullgraph=whole)
            for _ in range(3):
                found = compiled(*inputs)
            counted = status().served
            again = torch._dynamo.utils.counters["stats"]["unique_graphs"]
            compiled(*inputs)
            assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == again
        torch.testing.assert_close(found, theirs, rtol=1e-5, atol=1e-5)
        for a, b in zip(torch.autograd.grad(found.sum(), inputs[:-1]), grads, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
        if whole:
            assert counted == {}
    torch._dynamo.reset()


# --------------------------------------------------------------------------------------------------------- undoing


def attributes(scvi: Any) -> dict[str, Any]:
    from scvi.module import AutoZIVAE
    from scvi.train import TrainingPlan

    owners = (scvi.NB, scvi.ZINB, scvi.Poisson, AutoZIVAE, TrainingPlan, scvi.multivae, scvi.gimvi)
    return {f"{owner.__name__}.{name}": value for owner in owners for name, value in vars(owner).items()}


def test_leaving_the_block_restores_scvi_tools(scvi: Any) -> None:
    before = attributes(scvi)
    with accelerate(fused_adam=True):
        during = attributes(scvi)
        assert scvi.multivae.Poisson is scvi.Poisson
    changed = {name for name in during if during[name] is not before.get(name)}
    assert {
        "NegativeBinomial.log_prob",
        "ZeroInflatedNegativeBinomial.log_prob",
        "Poisson.log_prob",
    } < changed
    assert scvi.multivae.Poisson is torch.distributions.Poisson
    assert "log_prob" not in vars(scvi.Poisson)
    assert attributes(scvi) == before
    with pytest.raises(KeyError), accelerate():
        raise KeyError
    assert attributes(scvi) == before


def test_torch_distributions_are_not_changed(scvi: Any) -> None:
    before = dict(vars(torch.distributions.Poisson))
    with accelerate(fused_adam=True):
        assert dict(vars(torch.distributions.Poisson)) == before
        at = small()
        torch.distributions.Poisson(at["mu"]).log_prob(at["x"])
    assert not status().served


def test_nested_and_repeated_calls_end_with_the_last(scvi: Any) -> None:
    before = attributes(scvi)
    outer = accelerate()
    once = attributes(scvi)
    with accelerate(strict=True):
        assert status().strict
        assert attributes(scvi) == once
    assert not status().strict
    assert status().active
    another = accelerate()
    outer.undo()
    outer.undo()
    assert attributes(scvi) == once
    another.undo()
    assert attributes(scvi) == before
    accelerate()
    accelerate()
    undo()
    assert attributes(scvi) == before
    undo()


def test_patch_by_others_is_kept(scvi: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    at = small()
    theirs = distribution(scvi, "NB", at).log_prob(at["x"])
    original = scvi.NB.log_prob
    acceleration = accelerate()
    ours = scvi.NB.log_prob

    def traced(self: Any, value: Tensor) -> Tensor:
        return ours(self, value)

    scvi.NB.log_prob = traced
    try:
        acceleration.undo()
        assert scvi.NB.log_prob is traced
        assert torch.equal(distribution(scvi, "NB", at).log_prob(at["x"]), theirs)
    finally:
        scvi.NB.log_prob = original


def test_status_is_readable(scvi: Any) -> None:
    at = small()
    with accelerate(strict=False, fused_adam=True):
        assert "no calls yet" in str(status())
        distribution(scvi, "ZINB", at).log_prob(at["x"])
        broadcast(at)
        distribution(scvi, "NB", at).log_prob(at["x"])
        text = str(status())
    assert "on, fused Adam" in text
    assert "ZeroInflatedNegativeBinomial: 1 served" in text
    assert "NegativeBinomial: 0 served" in text
    assert "1 by scvi-tools' own code: shapes that are not all the same" in text
    assert "off" in str(status())
    assert repr(status()) == str(status())


# ---------------------------------------------------------------------------------------- versions, and what is there

OFF = (
    "from fastvae.integrations import scvi as s; import sys; print('scvi' in sys.modules); print(s.status())"
)


def test_import_does_not_import_scvi_tools() -> None:
    done = subprocess.run([sys.executable, "-c", OFF], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.splitlines()[0] == "False", done.stderr
    assert "accelerate() has not been called" in done.stdout


def test_missing_scvi_tools_raises_with_advice(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", missing)
    with pytest.raises(ImportError, match=r'not installed: .*pip install "scvi-tools==1\.\d\.\d"$'):
        accelerate()
    assert not status().active


@pytest.mark.parametrize(
    ("python", "advice"),
    [
        ((3, 10), 'use Python 3.11 or newer, and pip install "scvi-tools==1.4.2"'),
        ((3, 11), 'pip install "scvi-tools==1.4.2"'),
        ((3, 12), 'pip install "scvi-tools==1.5.1"'),
        ((3, 14), 'pip install "scvi-tools==1.5.1"'),
    ],
)
def test_unsupported_version_raises(
    monkeypatch: pytest.MonkeyPatch, python: tuple[int, int], advice: str
) -> None:
    monkeypatch.setattr(metadata, "version", lambda name: "1.3.3")
    monkeypatch.setattr(integration.sys, "version_info", python)
    with pytest.raises(ImportError) as error:
        accelerate()
    assert str(error.value) == (
        f"fastvae.integrations.scvi supports scvi-tools 1.4.2 and 1.5.1, found 1.3.3: {advice}"
    )
    assert not status().active


def test_extra_installs_a_supported_version() -> None:
    text = (ROOT / "pyproject.toml").read_text()
    assert all(f"scvi-tools=={version}; python_version" in text for version in integration.VERSIONS)


def test_failing_accelerate_changes_nothing(scvi: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    before = attributes(scvi)
    monkeypatch.setitem(sys.modules, "scvi.external.gimvi._module", None)
    with pytest.raises(ImportError):
        accelerate()
    monkeypatch.undo()
    assert attributes(scvi) == before
    assert not status().active


# ---------------------------------------------------------------------------------------------------------- models


@functools.cache
def cells(count: int, genes: int) -> Any:
    import anndata

    rng = np.random.default_rng(0)
    rate = rng.gamma(0.3, 2.0, (2, genes))[np.arange(count) % 2]
    data = anndata.AnnData(rng.poisson(rate * rng.gamma(4, 0.25, (count, 1))).astype(np.float32))
    data.X[:, 0] += 1  # no cell is empty
    data.obs["batch"] = np.array(["a", "b"])[np.arange(count) % 3 % 2]
    return data


def model(scvi: Any, kind: str = "SCVI", count: int = 64, genes: int = 100, **options: Any) -> Any:
    scvi.package.settings.seed = 0
    data = cells(count, genes).copy()
    cls = getattr(scvi.package.model, kind)
    cls.setup_anndata(data, batch_key="batch")
    return cls(data, n_hidden=16, n_latent=4, **options)


def losses(scvi: Any, trained: Any, steps: int, batch: int = 32, **plan: Any) -> Tensor:
    """The losses of every step of scvi-tools' own train()."""
    from lightning.pytorch.callbacks import Callback

    seen = []

    class Recorder(Callback):
        def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, *rest: Any) -> None:
            seen.append(outputs["loss"].detach().clone())

    scvi.package.settings.seed = 1
    trained.train(
        max_epochs=steps * batch // trained.adata.n_obs,
        batch_size=batch,
        train_size=1.0,
        accelerator="cpu",
        enable_progress_bar=False,
        callbacks=[Recorder()],
        plan_kwargs=plan or None,
    )
    assert len(seen) == steps
    return torch.stack(seen).double()


def further(found: Tensor, expected: Tensor) -> float:
    return float(((found - expected) / expected).abs().max())


@pytest.mark.parametrize("likelihood", ["zinb", "nb"])
def test_fifty_training_steps_give_the_same_losses(scvi: Any, one_thread: None, likelihood: str) -> None:
    theirs = losses(scvi, model(scvi, gene_likelihood=likelihood), 50)
    with accelerate(strict=True):
        found = losses(scvi, model(scvi, gene_likelihood=likelihood), 50)
    assert sum(status().served.values()) == 50
    assert further(found, theirs) < 1e-5


@pytest.mark.slow
def test_poisson_training_differs_no_more_than_with_other_threads(scvi: Any, threads: None) -> None:
    def run(count: int) -> Tensor:
        torch.set_num_threads(count)
        return losses(scvi, model(scvi, count=256, genes=2000, gene_likelihood="poisson"), 50, batch=128)

    theirs = run(1)
    apart = further(run(2), theirs)
    with accelerate(strict=True):
        found = further(run(1), theirs)
    assert found <= max(apart, 1e-5)


@pytest.mark.parametrize("inflation", ["gene", "gene-batch"])
def test_autozi_equals_the_formula_of_scvi_tools(scvi: Any, inflation: str) -> None:
    autozi = model(scvi, "AUTOZI", zero_inflation=inflation).module
    at = {name: value.double() for name, value in small().items()}
    d = torch.rand(20 if inflation == "gene" else (6, 20), dtype=torch.float64) * (1 - 2e-7) + 1e-7
    d.flatten()[:2] = torch.tensor([1e-7, 1 - 1e-7], dtype=torch.float64)
    arguments = {"x": at["x"], "px_rate": at["mu"], "px_r": at["theta"].expand_as(at["mu"])}
    arguments |= {"px_dropout": at["zi_logits"], "bernoulli_params": d}

    def run(dtype: torch.dtype) -> tuple[Tensor, dict[str, Tensor]]:
        leaves = {
            name: value.to(dtype).clone().requires_grad_(name != "x") for name, value in arguments.items()
        }
        loss = autozi.get_reconstruction_loss(**leaves)
        wanted = {name: leaf for name, leaf in leaves.items() if name != "x"}
        gradients = torch.autograd.grad(loss.sum(), list(wanted.values()))
        return loss.detach().double(), dict(zip(wanted, gradients, strict=True))

    theirs, grads = run(torch.float64)
    with accelerate(strict=True):
        assert further(run(torch.float64)[0], theirs) < 1e-7
        found, gradients = run(torch.float32)
    assert status().served == {"ZeroInflatedNegativeBinomial": 2}
    assert further(found, theirs) < 1e-6
    for name, expected in grads.items():
        assert relative(gradients[name], expected) < 1e-5, name


def test_autozi_with_several_samples_uses_scvi_tools_code(scvi: Any) -> None:
    autozi = model(scvi, "AUTOZI").module
    at = small(genes=20)
    arguments = (
        at["x"],
        at["mu"].expand(2, 6, 20),
        at["theta"].expand(2, 6, 20),
        at["zi_logits"].expand(2, 6, 20),
    )
    d = torch.rand(20)
    theirs = autozi.get_reconstruction_loss(*arguments, d)
    with accelerate():
        assert torch.equal(autozi.get_reconstruction_loss(*arguments, d), theirs)
    assert set(status().fell_back) == {"ZeroInflatedNegativeBinomial", "NegativeBinomial"}


@pytest.mark.parametrize("where", ["multivae", "gimvi"])
def test_models_with_torch_poisson_are_served(scvi: Any, where: str) -> None:
    at = small()
    module = getattr(scvi, where)
    theirs = module.Poisson(at["mu"]).log_prob(at["x"])
    with accelerate(strict=True):
        torch.testing.assert_close(module.Poisson(at["mu"]).log_prob(at["x"]), theirs, rtol=1e-5, atol=1e-6)
    assert status().served == {"Poisson": 1}


def test_models_save_and_load_with_and_without_accelerate(
    scvi: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with accelerate(strict=True, fused_adam=True):
        ours = model(scvi)
        losses(scvi, ours, 2)
        ours.save(tmp_path / "ours")
    theirs = model(scvi)
    losses(scvi, theirs, 2)
    theirs.save(tmp_path / "theirs")

    latent = ours.get_latent_representation()
    with monkeypatch.context() as without:
        for name in [name for name in sys.modules if name.split(".")[0] == "fastvae"]:
            without.setitem(sys.modules, name, None)  # importing it fails
        loaded = type(ours).load(tmp_path / "ours", adata=cells(64, 100).copy())
        np.testing.assert_array_equal(loaded.get_latent_representation(), latent)
        losses(scvi, loaded, 2)
    with accelerate():
        loaded = type(theirs).load(tmp_path / "theirs", adata=cells(64, 100).copy())
        np.testing.assert_array_equal(loaded.get_latent_representation(), theirs.get_latent_representation())
        losses(scvi, loaded, 2)
        copy.deepcopy(loaded.module)
    assert status().served["ZeroInflatedNegativeBinomial"] == 2


def test_fused_adam_sets_only_fused(scvi: Any, one_thread: None) -> None:
    from lightning.pytorch.callbacks import Callback

    settings = []

    class Recorder(Callback):
        def on_train_end(self, trainer: Any, module: Any) -> None:
            settings.append(dict(trainer.optimizers[0].param_groups[0], params=None))

    def run(**plan: Any) -> Tensor:
        trained = model(scvi)
        scvi.package.settings.seed = 1
        trained.train(
            max_epochs=5,
            batch_size=32,
            accelerator="cpu",
            enable_progress_bar=False,
            callbacks=[Recorder()],
            plan_kwargs=plan,
        )
        return torch.cat([p.detach().flatten() for p in trained.module.parameters()])

    for name in ("Adam", "AdamW"):
        with accelerate():
            theirs = run(optimizer=name)
        with accelerate(fused_adam=True):
            found = run(optimizer=name)
            if metadata.version("scvi-tools") == "1.4.2":
                assert status().served["fused Adam"] == 1
        before, after = settings[-2:]
        assert after["fused"]
        assert {**after, "fused": before["fused"]} == before
        assert relative(found, theirs.double()) < 1e-5


def test_fused_adam_with_other_parameters_uses_their_optimiser(scvi: Any) -> None:
    if metadata.version("scvi-tools") != "1.4.2":
        pytest.skip("scvi-tools makes fused optimisers by itself from 1.5 on")
    from scvi.train import TrainingPlan

    class Odd(Tensor):
        pass

    odd = torch.zeros(3).as_subclass(Odd).requires_grad_()
    with accelerate(fused_adam=True):
        plan = TrainingPlan(model(scvi).module)
        optimizer = plan.get_optimizer_creator()(iter([torch.zeros(2, requires_grad=True), odd]))
        assert not optimizer.defaults["fused"]
        assert len(optimizer.param_groups[0]["params"]) == 2
        assert "not plain floats" in str(status())


def test_example_runs(scvi: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["scvi_tools.py", "2"])
    runpy.run_path(str(ROOT / "examples" / "scvi_tools.py"))
    printed = capsys.readouterr().out
    assert "ZeroInflatedNegativeBinomial: 2 served" in printed
