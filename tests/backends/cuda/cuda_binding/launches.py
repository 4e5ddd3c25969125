"""The launches of the binding, and its behaviour in captures. Run by test_cuda_binding.py."""

import importlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import fastvae
import fastvae.functional as fv

extension: Any = importlib.import_module("fastvae._C")


@pytest.fixture(autouse=True)
def _native() -> Iterator[None]:
    with fastvae.use_backend("native"):
        yield


@pytest.fixture
def capturing() -> Iterator[Callable[[bool], None]]:
    yield extension.set_capturing
    extension.set_capturing(False)
    extension.destroy_graph()


# What neither reads nor writes a tensor's values. (If `to` had to convert, `_to_copy` would follow.)
VIEWS = {
    f"aten::{name}"
    for name in (
        "alias",
        "detach",
        "reshape",
        "view",
        "unsqueeze",
        "to",
        "crow_indices",
        "col_indices",
        "values",
    )
}


def launches(call: Callable[[], Any]) -> int:
    before = extension.launches()
    call()
    return extension.launches() - before


def leaf(*shape: int) -> Tensor:
    return torch.randn(shape, requires_grad=True)


def zinb(
    rows: int, features: int, sparse: bool
) -> tuple[fastvae.ELBO, list[Tensor], tuple[Tensor, ...], Tensor]:
    """An ELBO of counts with the leaves, the raw outputs of the decoder that it takes, and the counts."""
    elbo = fastvae.ELBO(fastvae.likelihoods.ZeroInflatedNegativeBinomial(features))
    counts = torch.poisson(torch.rand(rows, features))
    logits, zero_logits, library = leaf(rows, features), leaf(rows, features), counts.sum(1)
    leaves = [logits, zero_logits, *elbo.parameters()]
    return elbo, leaves, (logits, library, zero_logits), counts.to_sparse_csr() if sparse else counts


# This runs first, because the device's counters must not be created during a capture, in memory of the graph.
def test_the_first_call_may_be_a_captured_one(capturing: Callable[[bool], None]) -> None:
    recon, x, kl = leaf(64, 3000), torch.rand(64, 3000), torch.rand(64)
    elbo = fastvae.ELBO("bernoulli")
    losses = []
    for on in (True, True, False, True, False):
        capturing(on)
        losses.append(elbo(recon, x, kl=kl).loss.detach())
    assert all(torch.equal(loss, losses[0]) for loss in losses)
    with fastvae.use_backend("reference"):
        torch.testing.assert_close(losses[0], elbo(recon, x, kl=kl).loss.detach())


@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "csr"])
def test_the_loss_of_captured_counts_is_that_of_others(
    capturing: Callable[[bool], None], sparse: bool
) -> None:
    elbo, leaves, decoded, counts = zinb(9, 600, sparse)
    found = []
    for on in (False, True, True):
        capturing(on)
        loss = elbo(decoded, counts, kl=torch.ones(9)).loss
        found.append([loss, *torch.autograd.grad(loss, leaves)])
    for captured in found[1:]:
        assert all(torch.equal(one, other) for one, other in zip(captured, found[0], strict=True))


@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "csr"])
@pytest.mark.parametrize("rows", [4, 40])
def test_the_loss_part_of_a_step_on_counts_is_four_launches(rows: int, sparse: bool) -> None:
    """And nothing is copied, filled or read by the host."""
    elbo, leaves, decoded, counts = zinb(rows, 600, sparse)
    mu, logvar = leaf(rows, 10), leaf(rows, 10)
    weights = torch.tensor(3.0), torch.ones(rows, 10)

    def step() -> None:
        z, kl = elbo.reparameterize(mu, logvar)
        loss = elbo(decoded, counts, kl=kl).loss
        torch.autograd.grad((loss, z), [*leaves, mu, logvar], weights)

    assert launches(step) == 4
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        step()
    ops = {event.key for event in profile.key_averages()}
    assert "fastvae::nll_forward" in ops
    assert not {op for op in ops if op.startswith("aten::")} - VIEWS


@pytest.mark.parametrize("likelihood", ["bernoulli", "gaussian", "learned", "per_element"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("rows", [4, 600])
def test_the_loss_part_of_a_step_is_four_launches(likelihood: str, reduction: str, rows: int) -> None:
    """Reparameterise + KL, the reconstruction with its scalar, and a backward of each."""
    known = likelihood in fastvae.likelihoods.BY_NAME
    elbo = fastvae.ELBO(
        likelihood if known else fastvae.likelihoods.Gaussian(scale=likelihood), reduction=reduction
    )
    head, x = leaf(rows, 40), torch.rand(rows, 784)
    recon = leaf(rows, 784 * (2 if likelihood == "per_element" else 1))

    def step() -> None:
        z, kl = elbo.reparameterize(*head.chunk(2, 1))
        loss = elbo(recon, x, kl=kl).loss
        torch.autograd.grad((loss.sum(), z), [recon, head, *elbo.parameters()], (None, torch.ones_like(z)))

    assert launches(step) == 4
    with torch.no_grad():
        assert launches(lambda: elbo(recon, x, kl=elbo.reparameterize(*head.chunk(2, 1))[1])) == 2


def test_a_graph_that_is_gone_gives_its_counters_back(capturing: Callable[[bool], None]) -> None:
    """A launch for which no counter is left needs a memset of its own in every replay."""
    recon, x = torch.randn(70, 4), torch.rand(70, 4)
    elbo = fastvae.ELBO("bernoulli")

    def call() -> Tensor:
        return elbo(recon, x, kl=torch.ones(70)).loss

    want, before = call(), extension.memsets()
    capturing(True)
    for _ in range(300):
        for _ in range(5):
            call()
        extension.destroy_graph()
    assert torch.equal(call(), want)
    assert extension.memsets() == before
    for _ in range(1100):
        call()
    assert torch.equal(call(), want)
    assert before < extension.memsets() < before + 200


@pytest.mark.parametrize("likelihood", ["bernoulli", "gaussian"])
def test_a_step_copies_and_fills_nothing(likelihood: str) -> None:
    """Also with deterministic algorithms, for which torch fills all new memory."""
    assert torch.are_deterministic_algorithms_enabled()
    elbo, mu, logvar, recon, x = (
        fastvae.ELBO(likelihood),
        leaf(8, 20),
        leaf(8, 20),
        leaf(8, 784),
        torch.rand(8, 784),
    )
    weights = torch.tensor(3.0), torch.ones(8, 20)

    def step() -> None:
        z, kl = elbo.reparameterize(mu, logvar)
        loss = elbo(recon, x, kl=kl).loss
        torch.autograd.grad((loss, z), [recon, mu, logvar], weights)

    step()
    elbo.beta = 0.5
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        step()
    ops = {event.key for event in profile.key_averages()}
    assert "fastvae::nll_forward" in ops
    assert not {op for op in ops if op.startswith("aten::") and op != "aten::detach"}, ops


@pytest.mark.parametrize("rows", [2, 600])
@pytest.mark.parametrize(
    "likelihood",
    ["mixture", "logistic", "categorical", "counts", "sparse counts", "multinomial", "count mixture"],
)
def test_what_shares_more_than_an_element_takes_no_more_launches(likelihood: str, rows: int) -> None:
    levels = torch.randint(0, 256, (rows, 3, 5, 7), dtype=torch.uint8)
    modules = fastvae.likelihoods
    counts = torch.randint(0, 5, (rows, 300)).float()
    decoded = (leaf(rows, 300), leaf(rows).exp(), leaf(rows, 300))
    zinb = modules.ZeroInflatedNegativeBinomial(300)
    module, recon, target = {
        "counts": (zinb, decoded, counts),
        "sparse counts": (zinb, decoded, counts.to_sparse_csr()),
        "count mixture": (
            modules.NegativeBinomialMixture(300),
            (leaf(rows, 300).exp(), leaf(rows, 300).exp(), leaf(rows, 300)),
            counts,
        ),
        "multinomial": (modules.Multinomial(300), decoded[0], counts),
        "mixture": (modules.DiscretizedLogisticMixture(10), leaf(rows, 100, 5, 7), levels),
        "logistic": (modules.DiscretizedLogistic(), leaf(rows, 6, 5, 7), levels),
        "categorical": (modules.Categorical(), leaf(rows, 5, 300), torch.randint(0, 300, (rows, 5))),
    }[likelihood]
    elbo, kl = fastvae.ELBO(module), leaf(rows)
    inputs = [*(recon if isinstance(recon, tuple) else [recon]), kl, *elbo.parameters()]
    assert launches(lambda: torch.autograd.grad(elbo(recon, target, kl=kl).loss, inputs)) == 2


def test_half_parameters_take_one_more() -> None:
    """Their gradient is computed in the backward, when its factor is known."""
    recon, x = leaf(4, 30).detach().half().requires_grad_(), torch.rand(4, 30)
    elbo = fastvae.ELBO("bernoulli")
    for kl, count in ((torch.rand(4), 2), (leaf(4), 3)):
        assert launches(lambda kl=kl: torch.autograd.grad(elbo(recon, x, kl=kl).loss, recon)) == count


@pytest.mark.parametrize("samples", [None, 3])
def test_a_captured_draw_is_drawn_from_where_the_replay_will_look(
    capturing: Callable[[bool], None], samples: int | None
) -> None:
    """The same values behind pointers give the same noise, also in a backward that runs after they have changed."""
    mu, results = torch.zeros(5, 7), []
    for on in (False, True):
        logvar = torch.zeros(5, 7, requires_grad=True)
        capturing(on)
        torch.manual_seed(3)
        z, _ = fv.reparameterize_kl(mu, logvar, samples=samples)
        fv.reparameterize_kl(mu, logvar)
        (gradient,) = torch.autograd.grad(z.sum(), logvar)
        results.append(z.detach())
        torch.testing.assert_close(gradient, z.detach().reshape(-1, 5, 7).sum(0) / 2)
    assert torch.equal(*results)


def test_values_of_the_wrong_type_are_refused() -> None:
    recon, x = torch.zeros(2, 3), torch.zeros(2, 3)
    with pytest.raises(TypeError, match="fastvae: `kl` must be Float or Double, got Half"):
        torch.ops.fastvae.nll("bernoulli", [recon], x, [], torch.zeros(2).half(), None, 2)
    with pytest.raises(TypeError, match="fastvae: `beta` must be floating point, got Long"):
        torch.ops.fastvae.nll("bernoulli", [recon], x, [], torch.zeros(2), torch.tensor(1), 2)
