"""Triton's kernels of counts with rows of many parts, which take longer rows than the interpreter has time for.

With small tiles, shorter rows have several programs, sections and lists. test_triton.py starts this file, and explains
how. test_cuda.py runs these tests again on the CUDA kernels as they are.
"""

from collections.abc import Iterator
from typing import Any

import pytest
import test_counts
import test_multinomial
import torch
from conftest import INTERPRETED
from test_counts import NB, NB_RAW, ZINB, ZINB_RAW
from torch import Tensor

import fastvae
from fastvae import functional

GPU = torch.cuda.is_available() and not INTERPRETED

SIZE = 320  # two sections of a row, three in float64

pytestmark = pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta state")


@pytest.fixture
def device() -> Iterator[torch.device]:
    """The GPU, or the CPU if the interpreter runs the kernels. If there is neither, conftest.py deselects the test."""
    with fastvae.use_backend("triton"):
        yield torch.device("cuda" if GPU else "cpu")


def cut(monkeypatch: pytest.MonkeyPatch, programs: int = 64) -> None:
    """Sections of 256 columns in tiles of 64 (float64: half of it), and about so many programs, on Triton."""
    if fastvae.backends.choose.setting != "triton":
        return
    from fastvae._triton import counts, multinomial, tuning

    def choice(kernel: str, *args: Any) -> tuning.Choice:
        return tuning.Choice(64, 1, programs)

    for module in (counts, multinomial):
        monkeypatch.setattr(module, "choice", choice, raising=False)


def on(device: torch.device, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: x.detach().to(device).requires_grad_(x.requires_grad) for name, x in inputs.items()}


def results(form: str, inputs: dict[str, Tensor], **options: Any) -> list[Tensor]:
    """The nll of each row, and the gradients for one factor per row."""
    nll = test_counts.call(form, **inputs, **options)
    factors = 0.5 + torch.arange(len(nll), device=nll.device)
    return [nll.detach(), *test_counts.gradients(nll, inputs, factors).values()]


@pytest.mark.parametrize("form", [NB, ZINB, NB_RAW, ZINB_RAW])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("shared", [True, False], ids=["gene", "gene-cell"])
def test_rows_of_many_parts_equal_the_formula(
    device: torch.device, form: str, dtype: torch.dtype, shared: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With fewer programs, the bits are the same: the parts of a row depend on its size alone."""
    cut(monkeypatch)
    made = test_counts.make(form, 2, SIZE, dtype, shared)
    inputs = on(device, made)
    sparse = inputs | {"target": made["target"].to_sparse_csr().to(device)}
    value, grads = test_counts.by_reference(form, inputs, 0.5 + torch.arange(2.0, device=device))
    tolerance = 1e-12 if dtype == torch.float64 else 2e-6
    dense = results(form, inputs)
    for nll, *found in (dense, results(form, sparse)):
        test_counts.close(nll, value, tolerance)
        for grad, want in zip(found, grads.values(), strict=True):
            test_counts.close(grad, want, 10 * tolerance)
    cut(monkeypatch, programs=1)
    assert all(torch.equal(a, b) for a, b in zip(dense, results(form, inputs), strict=True))


@pytest.mark.parametrize("layout", ["dense", "csr"])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_multinomial_of_many_parts_equals_the_formula(
    device: torch.device, dtype: torch.dtype, weighted: bool, layout: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One to three programs for a row give the same bits."""
    logits, target = test_multinomial.make(4, SIZE, dtype)
    target[1] = 0
    target[2, 300] = 300  # a count that needs float64
    logits[3], target[3], target[3, 310] = -30, 0, 20  # the row's only count, in the last section
    logits[3, 310] = 5
    weight = (1 + torch.rand(SIZE)) * (torch.rand(SIZE) > 0.2) if weighted else None
    if weight is not None:
        weight[310] = 2
    kept = slice(None) if weight is None else weight != 0
    factors = 0.5 + torch.arange(4.0)
    data = (test_multinomial.sparse(target) if layout == "csr" else target).to(device)
    options = {} if weight is None else {"weight": weight.to(device)}
    found = []
    for programs in (64, 8, 1):
        cut(monkeypatch, programs)
        value, gradient = test_multinomial.value_and_gradient(
            logits.to(device), data, factors.to(device), **options
        )
        found.append((value.cpu(), gradient.cpu()))
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))
    value, gradient = found[0]
    want = test_multinomial.formula(
        logits[:3, kept], target[:3, kept], None if weight is None else weight[kept].double()
    )
    test_multinomial.check(value[:3], gradient[:3, kept], want, factors[:3])
    # The last row's nll is what the other features have of the probability, which the formula would lose.
    odds = torch.exp(logits[3].double() - logits[3, 310].double())
    odds[310] = 0
    share = odds[kept].sum()
    scale = 20.0 * (1.0 if weight is None else weight[310].item())
    torch.testing.assert_close(value[3].double(), scale * torch.log1p(share), rtol=1e-5, atol=0)
    torch.testing.assert_close(
        gradient[3, 310].double(), -factors[3].double() * scale * share, rtol=1e-2, atol=0
    )


@pytest.mark.parametrize("columns", [[5, 3], [300, 300], [7, SIZE], [-1, 3], [3, SIZE + 100]], ids=str)
@pytest.mark.parametrize("form", [NB, ZINB_RAW, "multinomial"])
def test_row_with_columns_out_of_order_or_range_is_nan(
    device: torch.device, form: str, columns: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is written outside of the row, whose nll is NaN. The other rows are as they are without it."""
    cut(monkeypatch)
    if form == "multinomial":
        logits, target = test_multinomial.make(3, SIZE)
        inputs = {"logits": logits.requires_grad_(), "target": target}
    else:
        inputs = test_counts.make(form, 3, SIZE, shared=False)
    target = inputs["target"]
    target[1] = 0
    good = target.to_sparse_csr()
    starts, split = good.crow_indices().clone(), int(good.crow_indices()[1])
    starts[2:] += 2
    with torch.sparse.check_sparse_tensor_invariants(False):
        bad = torch.sparse_csr_tensor(
            starts,
            torch.cat([good.col_indices()[:split], torch.tensor(columns), good.col_indices()[split:]]),
            torch.cat([good.values()[:split], torch.ones(2), good.values()[split:]]),
            target.shape,
        )
    call = functional.multinomial_nll if form == "multinomial" else getattr(functional, f"{form}_nll")
    found = []
    for data in (good, bad):
        leaves = on(device, {name: x for name, x in inputs.items() if name != "target"})
        nll = call(**leaves, target=data.to(device))
        found.append([nll, *torch.autograd.grad(nll.sum(), list(leaves.values()))])
    assert found[1][0].isnan().cpu().tolist() == [False, True, False]
    for a, b in zip(*found, strict=True):
        assert torch.equal(a[::2], b[::2])
