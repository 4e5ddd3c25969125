"""The same call gives the same bits when repeated, with any number of threads, and in a fresh process."""

from collections.abc import Callable

import cases
import pytest
import torch
from cases import CASES, Case
from torch import Tensor

import fastvae
from fastvae import functional

# Few rows of many elements, many rows of few, and cases in between, on both sides of a thread's smallest share.
SIZES = [(1, 300_001), (3, 70_003), (20_011, 7), (257, 784), (40, 1025)]


def bits(tensors: list[Tensor]) -> list[Tensor]:
    return [x.detach().contiguous().view(torch.uint8) for x in (y.reshape(-1) for y in tensors)]


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(bits(a), bits(b), strict=True))


def on_threads(function: Callable[[], list[Tensor]]) -> None:
    """Two threads, one, two again, and three."""
    torch.set_num_threads(2)
    want = function()
    for threads in (2, 1, 3):
        torch.set_num_threads(threads)
        assert same(function(), want), f"{threads} threads"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=cases.ids)
@pytest.mark.parametrize("shape", SIZES, ids=cases.ids)
@pytest.mark.parametrize("case", CASES, ids=cases.ids)
def test_nll_has_the_same_bits_at_any_thread_count(
    native: None, threads: None, case: Case, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    inputs = cases.cast(case.inputs(shape), dtype)

    def run() -> list[Tensor]:
        result = cases.run(case, functional, inputs)
        return [result.value, *result.gradients.values()]

    on_threads(run)


@pytest.mark.parametrize("samples", [None, 3])
@pytest.mark.parametrize("shape", SIZES, ids=cases.ids)
def test_z_has_the_same_bits_at_any_thread_count(
    native: None, threads: None, shape: tuple[int, ...], samples: int | None
) -> None:
    mu, logvar = torch.randn(shape), torch.randn(shape)

    def run() -> list[Tensor]:
        leaves = [mu.requires_grad_(), logvar.requires_grad_()]
        z, kl = functional.reparameterize_kl(*leaves, samples=samples, seed=torch.tensor([1, 2]))
        return [z, kl, *torch.autograd.grad((z, kl), leaves, (z.detach(), kl.detach()))]

    on_threads(run)


@pytest.mark.parametrize("shape", SIZES, ids=cases.ids)
def test_log_probs_have_the_same_bits_at_any_thread_count(
    native: None, threads: None, shape: tuple[int, ...]
) -> None:
    leaves = [torch.randn(shape).requires_grad_() for _ in range(2)]

    def run() -> list[Tensor]:
        outputs = functional.sample_log_probs(
            *leaves, samples=3, form="softplus", stl=True, seed=torch.tensor([1, 2])
        )
        return [*outputs, *torch.autograd.grad(outputs, leaves, [t.detach() for t in outputs])]

    on_threads(run)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_loss_has_the_same_bits_at_any_thread_count(native: None, threads: None, reduction: str) -> None:
    elbo = fastvae.ELBO("bernoulli", reduction=reduction)
    logits, target, kl = torch.randn(513, 784), torch.rand(513, 784), torch.rand(513)

    def run() -> list[Tensor]:
        leaf = logits.requires_grad_()
        loss = elbo(leaf, target, kl=kl).loss
        return [loss, *torch.autograd.grad(loss, leaf)]

    on_threads(run)


FRESH = """
import hashlib, torch, fastvae
from fastvae import functional
fastvae.set_backend("native")
torch.manual_seed(0)
inputs = [(torch.rand(shape), torch.rand(shape)) for shape in ((5, 7), (128, 784))]
results = []
for a, t in inputs:
    for name in ("laplace_nll", "bernoulli_nll", "gaussian_nll", "gaussian_kl"):
        leaf = a.clone().requires_grad_()
        value = getattr(functional, name)(leaf, t)
        results += [value, *torch.autograd.grad(value.sum(), leaf)]
    results += functional.reparameterize_kl(a, t, seed=torch.tensor([1, 2]))
print([hashlib.sha256(x.detach().numpy().tobytes()).hexdigest()[:12] for x in results])
"""


def test_fresh_processes_give_the_same_bits(on_capability: Callable[[str], str]) -> None:
    """The first call of a process, which creates threads and dispatch tables while it runs.

    This does not use probabilities: in one of a hundred new processes, a thread of torch.logit's first call is accurate
    to four digits only.
    """
    first = on_capability(FRESH)
    assert first.count("'") == 2 * 2 * 10
    assert on_capability(FRESH) == first
