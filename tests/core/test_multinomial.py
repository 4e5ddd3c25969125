"""The multinomial: accuracy, extremes, targets, weights, autograd, and the module."""

import math
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import mpmath
import pytest
import torch
from torch import Tensor

import fastvae
from fastvae import functional, likelihoods
from fastvae.functional import multinomial_nll

INF, NAN = math.inf, math.nan
VALUES = {torch.float64: 1e-13, torch.float32: 1e-6, torch.bfloat16: 1e-6, torch.float16: 1e-6}
SLOPES = {torch.float64: 1e-13, torch.float32: 1e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}
INTEGERS = (torch.uint8, torch.uint16, torch.int32, torch.int64)


def make(rows: int = 5, features: int = 37, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Logits, and counts of which most are 0."""
    logits = 2 * torch.randn(rows, features)
    counts = torch.poisson(torch.exp(1.5 * torch.randn(rows, features)))
    return logits.to(dtype), (counts * (torch.rand(rows, features) > 0.7)).clamp(max=255).to(dtype)


def formula(logits: Tensor, target: Tensor, weight: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """(nll, the sum of its terms' sizes, gradient by the logits) of each row, in float64. Weights are above 0."""
    a, t = logits.detach().double(), target.double()
    w = torch.ones_like(t) if weight is None else weight.double().expand_as(t)
    n = t.sum(1, keepdim=True)
    log_p = a - a.logsumexp(1, keepdim=True)
    share = torch.where(n > 0, t / n, 0.0)
    terms = [w * torch.lgamma(t + 1), -w * t * log_p, -w * share * torch.lgamma(n + 1)]
    gradient = (w * t).sum(1, keepdim=True) * log_p.exp() - w * t
    return sum(terms).sum(1), sum(term.abs() for term in terms).sum(1), gradient  # type: ignore[union-attr]


def sparse(target: Tensor) -> Tensor:
    """The counts as CSR, also of the dtypes that torch cannot convert."""
    csr = target.double().to_sparse_csr()
    return torch.sparse_csr_tensor(
        csr.crow_indices(), csr.col_indices(), csr.values().to(target.dtype), csr.shape
    )


def value_and_gradient(
    logits: Tensor, target: Tensor, factors: Tensor | None = None, **options: Any
) -> tuple[Tensor, Tensor]:
    leaf = logits.detach().requires_grad_()
    value = multinomial_nll(leaf, target, **options)
    factors = torch.ones_like(value) if factors is None else factors.to(value.dtype)
    return value.detach(), torch.autograd.grad(value, leaf, factors)[0]


def check(value: Tensor, gradient: Tensor, want: tuple[Tensor, Tensor, Tensor], factors: Tensor) -> None:
    """Compare with the size of the terms, and with the counts of the row."""
    exact, size, slope = want
    assert ((value.double() - exact).abs() <= VALUES[gradient.dtype] * size).all()
    slope = slope * factors.double().unsqueeze(1)
    largest = slope.abs().amax(1, keepdim=True) if slope.numel() else slope
    assert ((gradient.double() - slope).abs() <= SLOPES[gradient.dtype] * largest).all()


# ---------------------------------------------------------------------------------------------------------------------
# Numbers
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["dense", "csr"])
@pytest.mark.parametrize("dtype", VALUES, ids=str)
@pytest.mark.parametrize(
    "shape", [(5, 37), (1, 1), (4, 1), (3, 8), (2, 1025), (9, 16), (3, 2100), (0, 4), (4, 0)], ids=str
)
def test_values_and_gradients_equal_the_formula(
    backend: str, shape: tuple[int, int], dtype: torch.dtype, layout: str
) -> None:
    logits, target = make(*shape, dtype)
    factors = 0.5 + torch.rand(shape[0])
    data = sparse(target) if layout == "csr" else target
    value, gradient = value_and_gradient(logits, data, factors)
    assert value.shape == shape[:1]
    assert value.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert gradient.dtype == dtype
    check(value, gradient, formula(logits, target), factors)


def exact(logits: list[float], target: list[float]) -> tuple[Any, list[Any]]:
    """The nll and its derivatives by the logits, in mpmath. A logit of -inf has the probability 0."""
    with mpmath.workdps(80):
        top = max(logits)
        e = [mpmath.mpf(0) if a == -INF else mpmath.exp(mpmath.mpf(a) - top) for a in logits]
        counts, total = [mpmath.mpf(t) for t in target], mpmath.fsum(e)
        n = mpmath.fsum(counts)
        value = -mpmath.loggamma(n + 1)
        for p, t in zip(e, counts, strict=True):
            if t > 0:
                value += mpmath.loggamma(t + 1) - t * mpmath.log(p / total) if p > 0 else mpmath.mpf(INF)
        return value, [n * p / total - t for p, t in zip(e, counts, strict=True)]


# Logits and counts of a row.
HARD = {
    "huge and likely": ([0.0, math.log(2), math.log(3)], [1e6 + 700, 2e6 - 300, 3e6 - 400]),
    "huger and likely": ([1.0, 1.0, 1.0, -20.0], [1e12, 1e12 + 2**20, 1e12 - 2**20, 0.0]),
    "huge and unlikely": ([0.0, 3.0, -3.0, 0.5], [1e12, 1.0, 2.0**30, 0.0]),
    "huge and small": ([0.0, 2.0, 1.0, -1.0], [1e9, 1.0, 7.0, 8.0]),
    "one feature": ([3.0], [5.0]),
    "one count": ([3.0, 1.0, -2.0], [0.0, 1.0, 0.0]),
    "fractions": ([0.3, -0.2, 0.9, 0.0], [0.5, 2.25, 1e-3, 0.0]),
    "saturated, right": ([40.0, 0.0, -1.0, 2.0], [6.0, 0.0, 0.0, 0.0]),
    "saturated, right and huge": ([30.0, 0.0, -1.0, 2.0], [1e12, 0.0, 0.0, 0.0]),
    "saturated, nearly right": ([60.0, 0.0, -1.0, 2.0], [6.0, 0.0, 1.0, 0.0]),
    "saturated, wrong": ([1e4, 0.0, -1.0, 2.0], [0.0, 3.0, 1.0, 0.0]),
    "far apart": ([1e4, -1e4, 0.0, 5.0], [2.0, 1.0, 0.0, 3.0]),
    "far below": ([-1e4, -1e4 - 1, -1e4 + 2, -2e4], [2.0, 1.0, 0.0, 0.0]),
    "excluded": ([0.5, -INF, 1.0, -INF], [2.0, 0.0, 1.0, 0.0]),
    "all but one excluded": ([-INF, -INF, 0.25, -INF], [0.0, 0.0, 9.0, 0.0]),
    "impossible": ([0.5, -INF, 1.0, 0.0], [2.0, 1.0, 30.0, 0.0]),
    "impossible and huge": ([0.5, -INF, 1.0, 0.0], [2.0, 1e12, 3.0, 0.0]),
    "impossible alone": ([0.5, -INF, 1.0, 0.0], [0.0, 4.0, 0.0, 0.0]),
    "nothing": ([0.5, -3.0, 1e4, 0.0], [0.0, 0.0, 0.0, 0.0]),
}  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("name", HARD)
def test_nll_equals_80_digits(backend: str, name: str, dtype: torch.dtype) -> None:
    """Counts to 1e12, saturated logits, and features that are excluded. Both sides start from the rounded numbers."""
    logits, target = (torch.tensor([x], dtype=dtype) for x in HARD[name])
    for data in (target, sparse(target)):
        value, gradient = value_and_gradient(logits, data)
        want, slopes = exact(logits[0].tolist(), target[0].tolist())
        rough = 5e-6 if dtype == torch.float32 else 1e-11
        if want == INF:
            assert value.item() == INF
        else:
            # What rounding to a nat's last digit costs, except where the nll is small because the row is likely.
            saturated = "right" in name and backend != "reference"
            assert abs(value.item() - want) <= rough * (abs(want) if saturated else 1 + abs(want)), value
        for i, slope in enumerate(slopes):
            # Near its zero, a derivative keeps the accuracy of its terms. If all counts are those of one feature, which
            # has nearly all of the probability, it keeps all digits.
            n_p, found = slope + target[0, i].item(), gradient[0, i].item()
            alone = target[0, i] > 0 and target[0].sum() == target[0, i] and abs(slope) < 0.01 * n_p
            size = abs(slope) if alone and backend != "reference" else n_p
            allowed = (2e-6 if dtype == torch.float32 else 1e-12) * (size + abs(slope))
            underflow = 10 * torch.finfo(dtype).tiny
            assert abs(found - slope) <= allowed + underflow, f"{i}: {found} for {mpmath.nstr(slope, 17)}"


def test_probabilities_sum_to_1(backend: str) -> None:
    """Over all counts of three features whose sum is 6."""
    counts = torch.tensor([c for c in product(range(7), repeat=3) if sum(c) == 6], dtype=torch.float64)
    logits = torch.tensor([[0.5, -1.0, 2.0]], dtype=torch.float64).expand(len(counts), 3)
    assert abs(torch.exp(-multinomial_nll(logits, counts)).sum().item() - 1) < 1e-13


def test_nll_equals_torch_distributions(backend: str) -> None:
    logits, target = make(dtype=torch.float64)
    want = [
        -torch.distributions.Multinomial(int(t.sum()), logits=a).log_prob(t)
        for a, t in zip(logits, target, strict=True)
    ]
    torch.testing.assert_close(multinomial_nll(logits, target), torch.stack(want), rtol=1e-12, atol=1e-10)


def test_gradient_equals_that_of_mult_vae(backend: str) -> None:
    logits, target = make(dtype=torch.float64)
    leaf = logits.requires_grad_()
    want = torch.autograd.grad(-(torch.log_softmax(leaf, 1) * target).sum(), leaf)[0]
    torch.testing.assert_close(value_and_gradient(logits, target)[1], want, rtol=1e-11, atol=1e-11)


def test_gradcheck(backend: str) -> None:
    logits, target = make(2, 6, torch.float64)
    target[0, :3] = torch.tensor([9.0, 30.0, 0.0])  # on both sides of the start of Stirling's formula
    weight = 0.5 + torch.rand(2, 6)
    leaf = logits.requires_grad_()
    assert torch.autograd.gradcheck(lambda a: multinomial_nll(a, target), leaf)
    assert torch.autograd.gradcheck(lambda a: multinomial_nll(a, target, weight=weight), leaf)
    if backend == "reference":
        assert torch.autograd.gradgradcheck(lambda a: multinomial_nll(a, target), leaf)


# ---------------------------------------------------------------------------------------------------------------------
# The ends
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["dense", "csr"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_row_without_counts_has_no_value_and_no_gradient(
    backend: str, layout: str, dtype: torch.dtype
) -> None:
    """Whatever its logits are; only a NaN is not lost."""
    logits, target = make(8, 1030, dtype)
    target[1:6] = 0
    logits[2], logits[3], logits[4, 7] = -INF, INF, INF
    logits[5, 1025] = NAN
    value, gradient = value_and_gradient(logits, sparse(target) if layout == "csr" else target)
    assert value[1:5].tolist() == [0, 0, 0, 0]
    assert gradient[1:5].count_nonzero() == 0
    assert value[5].isnan()
    assert gradient[5].isnan().any()
    for row in (0, 6, 7):
        assert value[row] > 0
        assert gradient[row].isfinite().all()


@pytest.mark.parametrize("value", [NAN, INF], ids=str)
@pytest.mark.parametrize("place", [0, 18, 1500])
@pytest.mark.parametrize("counted", [False, True])
def test_nan_and_inf_affect_only_their_row(backend: str, value: float, place: int, counted: bool) -> None:
    logits, target = make(4, 1501)
    logits[2, place], target[2, place] = value, float(counted)
    nll, gradient = value_and_gradient(logits, target)
    assert nll.isnan().tolist() == [False, False, True, False]
    assert gradient[[0, 1, 3]].isfinite().all()
    assert gradient[2].isnan().any()


@pytest.mark.parametrize("count", [NAN, INF], ids=str)
def test_count_that_is_not_finite_gives_nan_in_its_row(backend: str, count: float) -> None:
    logits, target = make(3, 20)
    target[1, 4] = count
    assert multinomial_nll(logits, target).isnan().tolist() == [False, True, False]


def test_counts_of_excluded_features_only_give_nan(backend: str) -> None:
    """If all logits are -inf, the probabilities have no limit."""
    value = multinomial_nll(torch.full((1, 5), -INF), torch.tensor([[0.0, 1.0, 0.0, 2.0, 0.0]]))
    assert value.isnan().all()


# ---------------------------------------------------------------------------------------------------------------------
# Targets
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["dense", "csr"])
@pytest.mark.parametrize("target_dtype", [*INTEGERS, torch.float32], ids=str)
@pytest.mark.parametrize("dtype", VALUES, ids=str)
def test_targets_of_any_dtype_are_not_scaled(
    backend: str, layout: str, target_dtype: torch.dtype, dtype: torch.dtype
) -> None:
    logits, target = make(dtype=dtype)
    target = target.to(torch.float32).round().clamp(max=250)
    data = target.to(target_dtype)
    value, gradient = value_and_gradient(logits, sparse(data) if layout == "csr" else data)
    check(value, gradient, formula(logits, target), torch.ones(len(value)))


@pytest.mark.parametrize("layout", ["dense", "csr"])
def test_large_integers_are_not_rounded(backend: str, layout: str) -> None:
    """Beside float32 logits, which have 24 bits."""
    target = torch.tensor([[2**40 + 1, 2**40 + 3, 2**40 - 4]])
    logits = torch.zeros(1, 3)
    want = exact([0.0] * 3, target[0].double().tolist())[0]
    data = target.to_sparse_csr() if layout == "csr" else target
    value, gradient = value_and_gradient(logits, data)
    assert abs(value.item() - want) < 5e-6 * want
    torch.testing.assert_close(gradient, torch.tensor([[-1.0, -3.0, 4.0]]), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_csr_equals_dense(backend: str, dtype: torch.dtype) -> None:
    logits, target = make(6, 2100, dtype)
    target[2] = 0
    for one, other in zip(
        value_and_gradient(logits, target), value_and_gradient(logits, sparse(target)), strict=True
    ):
        assert torch.equal(one, other)


def test_csr_in_any_order_and_with_zeros_equals_dense(native: None) -> None:
    """On the CPU, columns may come in any order and twice, and stored zeros are zeros."""
    target = torch.tensor([[0.0, 3.0, 2.0, 0.0], [1.0, 0.0, 0.0, 4.0]])
    starts, columns = torch.tensor([0, 4, 7]), torch.tensor([2, 1, 2, 0, 0, 1, 3])
    stored = torch.tensor([1.5, 3.0, 0.5, 0.0, 1.0, 0.0, 4.0])
    with torch.sparse.check_sparse_tensor_invariants(False):
        csr = torch.sparse_csr_tensor(starts, columns, stored, (2, 4))
        logits = torch.randn(2, 4)
        for one, other in zip(
            value_and_gradient(logits, csr), value_and_gradient(logits, target), strict=True
        ):
            assert torch.equal(one, other)
        wrong = torch.sparse_csr_tensor(starts, columns + 1, stored, (2, 4))
        with pytest.raises(IndexError, match="col_indices of `target` must lie between 0 and 3"):
            multinomial_nll(logits, wrong)


def test_csr_target_is_not_made_dense(native: None) -> None:
    """A step takes the memory of one gradient."""
    from benchmarks.timing import peak_bytes

    logits = torch.randn(64, 8192, requires_grad=True)
    target = (torch.rand(64, 8192) < 0.002).int().to_sparse_csr()
    fastvae.empty_cache()

    def step() -> None:
        torch.autograd.grad(multinomial_nll(logits, target).mean(), logits)

    assert peak_bytes(step, torch.device("cpu")) < 1.1 * 4 * logits.numel()


def test_strided_inputs_equal_contiguous(backend: str) -> None:
    logits, target = make(4, 9)
    want = value_and_gradient(logits, target)
    half = torch.cat((logits, logits), 1).chunk(2, 1)[1]
    for given in (half, logits.t().contiguous().t(), torch.stack((logits, logits), -1)[..., 0]):
        got = value_and_gradient(given, target.t().contiguous().t())
        for one, other in zip(got, want, strict=True):
            assert torch.equal(one, other)
    assert torch.equal(
        multinomial_nll(logits[:1].expand(4, 9), target[:1].expand(4, 9)), want[0][:1].expand(4)
    )


# ---------------------------------------------------------------------------------------------------------------------
# Weights
# ---------------------------------------------------------------------------------------------------------------------

PLACES = {"full": (5, 37), "rows": (5, 1), "features": (1, 37), "flat": (37,), "number": (1, 1)}


@pytest.mark.parametrize("layout", ["dense", "csr"])
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.uint8, torch.float64], ids=str)
@pytest.mark.parametrize("dtype", VALUES, ids=str)
def test_weighted_terms_equal_the_formula(
    backend: str, place: str, weight_dtype: torch.dtype, dtype: torch.dtype, layout: str
) -> None:
    logits, target = make(dtype=dtype)
    weight = (1 + 3 * torch.rand(PLACES[place])).to(weight_dtype)
    factors = 0.5 + torch.rand(5)
    data = sparse(target) if layout == "csr" else target
    value, gradient = value_and_gradient(logits, data, factors, weight=weight)
    check(value, gradient, formula(logits, target, weight), factors)


@pytest.mark.parametrize("place", ["full", "features", "flat"])
@pytest.mark.parametrize("weight_dtype", [torch.bool, torch.float16], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_features_of_weight_0_are_left_out(
    backend: str, place: str, weight_dtype: torch.dtype, dtype: torch.dtype
) -> None:
    """The result is that of a multinomial of the other features, whatever there is in their place."""
    logits, target = make(dtype=dtype)
    weight = ((torch.rand(PLACES[place]) > 0.4) * 1.5).to(weight_dtype)
    removed = (weight == 0).expand(target.shape)
    poison = torch.tensor([NAN, INF, -INF]).repeat(62)[:185].view(5, 37).to(dtype)
    value, gradient = value_and_gradient(
        torch.where(removed, poison, logits), torch.where(removed, poison, target), weight=weight
    )
    assert gradient[removed].count_nonzero() == 0
    for row in range(5):
        kept = ~removed[row]
        w = weight.expand(target.shape)[row, kept].double().unsqueeze(0)
        want = formula(logits[row : row + 1, kept], target[row : row + 1, kept], w)
        check(value[row : row + 1], gradient[row : row + 1, kept], want, torch.ones(1))


def test_row_of_weight_0_has_no_value_and_no_gradient(backend: str) -> None:
    logits, target = make(3, 40)
    logits[1], weight = NAN, torch.tensor([[1.0], [0.0], [2.0]])
    value, gradient = value_and_gradient(logits, target, weight=weight)
    assert value[1] == 0
    assert gradient[1].count_nonzero() == 0
    torch.testing.assert_close(value[2], 2 * multinomial_nll(logits[2:], target[2:])[0])


@pytest.mark.parametrize("layout", ["dense", "csr"])
def test_draws_share_the_weight(backend: str, layout: str) -> None:
    logits, target = torch.randn(3, 5, 37), make()[1]
    data = sparse(target) if layout == "csr" else target
    weight = (torch.rand(5, 37) > 0.3) * torch.rand(5, 37)
    got = multinomial_nll(logits, data, draws=3, weight=weight)
    want = torch.stack([multinomial_nll(logits[k], data, weight=weight) for k in range(3)])
    assert torch.equal(got, want)


# ---------------------------------------------------------------------------------------------------------------------
# Wrong inputs
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        (lambda a, t: (a[0], t), ValueError, r"`logits` must have shape \(B, G\), batch and features, got \(37,\)"),
        (lambda a, t: (a, t[:, 1:]), ValueError, "`target` must have the shape of `logits`"),
        (lambda a, t: (a, t.to_sparse()), TypeError, "`target` must be dense or torch.sparse_csr.*to_sparse_csr"),
        (lambda a, t: (a, t.double()), TypeError, "`target` must be"),
        (lambda a, t: (a, t.bool()), TypeError, "`target` must be"),
        (lambda a, t: (a.int(), t), TypeError, "`logits` must be"),
        (lambda a, t: (a, t.clone().requires_grad_()), ValueError, r"pass target\.detach\(\)"),
    ],
)  # fmt: skip
def test_wrong_inputs_raise(
    backend: str, change: Callable[..., tuple[Tensor, Tensor]], kind: type[Exception], message: str
) -> None:
    with pytest.raises(kind, match=rf"fastvae\.multinomial_nll: .*{message}"):
        multinomial_nll(*change(*make()))


@pytest.mark.parametrize("layout", ["dense", "csr"])
def test_validate_names_the_first_invalid_value(backend: str, layout: str) -> None:
    logits, target = make()
    logits[0, 2] = -INF
    target[:, 2] = 0
    multinomial_nll(logits, target, validate=True)
    wrong = target.clone()
    wrong[3, 17] = -1
    data = sparse(wrong) if layout == "csr" else wrong
    with pytest.raises(ValueError, match=r"`target` must hold counts.*, got -1.0 at \(3, 17\)"):
        multinomial_nll(logits, data, validate=True)
    logits[1, 4] = INF
    with pytest.raises(ValueError, match=r"`logits` must hold finite numbers or -inf, got inf at \(1, 4\)"):
        multinomial_nll(logits, target, validate=True)


# ---------------------------------------------------------------------------------------------------------------------
# Autograd
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("use", ["loss", "nll", "both", "twice"])
def test_outputs_used_in_any_way_give_correct_gradients(
    backend: str, dtype: torch.dtype, reduction: str, use: str
) -> None:
    logits, target = make(6, 33, dtype)
    before = logits.clone()
    leaf = logits.requires_grad_()
    code = fastvae.reference.REDUCTIONS[reduction]
    loss, nll = functional.loss.nll("multinomial", [leaf], target, [], torch.ones(6), torch.tensor(0.5), code)
    rows = torch.linspace(0.5, 1.5, 6)
    of_loss = {"mean": torch.full((6,), 1 / 6), "sum": torch.ones(6), "none": rows}[reduction]
    total = (loss * rows).sum() if reduction == "none" else loss
    objective, factors = {
        "loss": (total, of_loss),
        "nll": ((nll * rows).sum(), rows),
        "both": (total + (nll * rows).sum(), of_loss + rows),
        "twice": (total + total, 2 * of_loss),
    }[use]
    (gradient,) = torch.autograd.grad(objective, leaf)
    check(nll.detach(), gradient, formula(logits, target), factors)
    assert torch.equal(logits, before)
    assert logits._version == 0


def test_kept_graph_gives_the_same_gradient_twice(backend: str) -> None:
    logits, target = make()
    leaf = logits.requires_grad_()
    loss = multinomial_nll(leaf, target).sum()
    first = torch.autograd.grad(loss, leaf, retain_graph=True)[0]
    copy = first.clone()
    second = torch.autograd.grad(loss, leaf)[0]
    assert torch.equal(first, second)
    assert torch.equal(first, copy)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("layout", ["dense", "csr"])
def test_opcheck(dtype: torch.dtype, layout: str, native: None) -> None:
    logits, target = make(3, 9, dtype)
    params = [logits.requires_grad_()]
    if layout == "csr":
        csr = target.to_sparse_csr()
        # These are copies, because views of a sparse tensor refer to it, and the checks cannot make a fake of it.
        params += [csr.crow_indices().clone(), csr.col_indices().clone()]
        target = csr.values().clone()
    torch.library.opcheck(
        torch.ops.fastvae.nll.default,
        ("multinomial", params, target, [], torch.rand(3), torch.tensor(0.5), 2),
    )


def test_compiled_call_is_one_graph(backend: str) -> None:
    from torch._dynamo.testing import CompileCounter

    counter = CompileCounter()

    elbo = fastvae.ELBO(likelihoods.Multinomial(11))

    def step(logits: Tensor, x: Tensor, kl: Tensor) -> Tensor:
        return elbo(logits, x, kl=kl).loss

    torch._dynamo.reset()
    compiled = torch.compile(step, backend=counter, fullgraph=True, dynamic=True)
    for rows in (3, 5, 8):
        logits, target = make(rows, 11)
        leaf, kl = logits.requires_grad_(), torch.rand(rows)
        got, want = (torch.autograd.grad(f(leaf, target, kl), leaf)[0] for f in (compiled, step))
        torch.testing.assert_close(got, want)
    assert counter.frame_count == 1


def test_same_bits_at_any_thread_count(threads: None, native: None) -> None:
    logits, target = make(70, 3000)
    results = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        results.append(value_and_gradient(logits, target))
    for result in results[1:]:
        for one, other in zip(results[0], result, strict=True):
            assert torch.equal(one, other)


def test_every_instruction_set_gives_the_same_results(on_capability: Callable[[str], str]) -> None:
    script = f"""
import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})
import torch, test_multinomial as t
torch.manual_seed(1)
for dtype in (torch.float32, torch.float64, torch.bfloat16):
    logits, target = t.make(9, 1100, dtype)
    for data in (target, t.sparse(target)):
        t.check(*t.value_and_gradient(logits, data), t.formula(logits, target), torch.ones(9))
print("good")
"""
    assert on_capability(script).strip() == "good"


# ---------------------------------------------------------------------------------------------------------------------
# The module
# ---------------------------------------------------------------------------------------------------------------------


def test_module_equals_the_function(backend: str) -> None:
    likelihood = likelihoods.Multinomial(37)
    logits, target = make()
    want = formula(logits, target)[0].float()
    torch.testing.assert_close(likelihood.nll(logits, target), want)
    out = fastvae.ELBO(likelihood, beta=0.25, reduction="sum")(logits, target.int(), kl=torch.ones(5))
    torch.testing.assert_close(out.loss, want.sum() + 1.25)
    assert likelihood.channels(37) == 37
    assert repr(likelihood) == "Multinomial(37)"
    torch.testing.assert_close(likelihood.mean(logits), torch.softmax(logits, 1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_samples_have_the_given_sums_and_the_right_mean(dtype: torch.dtype) -> None:
    likelihood = likelihoods.Multinomial(4)
    logits = torch.tensor([[0.0, 1.0, -INF, 2.0]], dtype=dtype).expand(5, 4)
    totals = torch.tensor([0, 1, 50_000, 3, 1024])
    counts = likelihood.sample(logits, torch.Generator().manual_seed(3), total=totals)
    assert counts.dtype == (dtype if dtype == torch.float64 else torch.float32)
    assert counts.sum(1).tolist() == totals.tolist()
    assert counts[:, 2].count_nonzero() == 0
    assert torch.equal(counts, likelihood.sample(logits, torch.Generator().manual_seed(3), total=totals))
    p = torch.softmax(logits[0].double(), 0)
    assert ((counts[2] / 50_000 - p).abs() <= 5 * (p * (1 - p) / 50_000).sqrt()).all()
    assert likelihood.sample(logits).sum(1).tolist() == [1] * 5
    assert likelihood.sample(logits, total=7).sum(1).tolist() == [7] * 5
    assert likelihood.sample(logits[:0]).shape == (0, 4)


def test_module_with_wrong_arguments_raises() -> None:
    with pytest.raises(TypeError, match=r"likelihoods.Multinomial: `features` must be an int, got float"):
        likelihoods.Multinomial(3.0)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="`features` must be at least 1, got 0"):
        likelihoods.Multinomial(0)
    likelihood, logits = likelihoods.Multinomial(3), torch.zeros(2, 3)
    for total, kind, message in (
        (2.0, TypeError, "must be an int or a tensor of integers, got float"),
        (torch.ones(2), TypeError, "got a tensor of torch.float32"),
        (torch.ones(3).long(), ValueError, r"one for every row of `params`, got \(3,\)"),
        (-1, ValueError, "must be at least 0, got -1"),
    ):
        with pytest.raises(kind, match=message):
            likelihood.sample(logits, total=total)
