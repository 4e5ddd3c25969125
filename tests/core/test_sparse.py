"""`fastvae.nn.SparseLinear` and `functional.sparse_linear`: layers that read a sparse matrix."""

import copy
import math
import pickle
import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastvae
from fastvae.functional import sparse_linear
from fastvae.nn import SparseLinear

pytestmark = pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta state")

ROWS, INPUTS = 7, 1500
# Whole groups of vectors, whole vectors, a rest, and both; the blocks of columns end within the input from 129 on.
OUTPUTS = (1, 16, 130, 200)


def counts(rows: int = ROWS, inputs: int = INPUTS, dtype: torch.dtype = torch.float32) -> Tensor:
    """About 9 % of the counts are not 0; row 2 is empty."""
    x = torch.poisson(torch.exp(3 * torch.randn(rows, inputs) - 6)).to(dtype)
    x[2:3] = 0
    return x


def layer(outputs: int = 130, dtype: torch.dtype = torch.float32, **options: Any) -> SparseLinear:
    return SparseLinear(INPUTS, outputs, dtype=dtype, **options)


def exact(x: Tensor, module: nn.Linear, upstream: Tensor, log1p: bool) -> tuple[Tensor, Tensor]:
    """The output and the weight's gradient in float64, written as sums over the dense matrix."""
    z = x.double()
    z = torch.log(1 + z) if log1p else z
    bias = 0 if module.bias is None else module.bias.detach().double()
    y = (z[:, None, :] * module.weight.detach().double()[None]).sum(2) + bias
    return y, (upstream.double()[:, :, None] * z[:, None, :]).sum(0)


def error(found: Tensor, truth: Tensor) -> float:
    return ((found.double() - truth).norm() / truth.norm()).item()


def check(module: nn.Linear, y: Tensor, x: Tensor, upstream: Tensor, *, log1p: bool, bias: bool) -> None:
    """Compare the output y and the gradients of a backward pass with the formula; x is dense."""
    dtype = module.weight.dtype
    truth, truth_gradient = exact(x, module, upstream, log1p)
    tolerance = 1e-6 if dtype == torch.float32 else 1e-14
    assert y.dtype == dtype
    assert error(y, truth) < tolerance
    assert error(module.weight.grad, truth_gradient) < tolerance
    if bias:
        assert error(module.bias.grad, upstream.double().sum(0)) < tolerance


@pytest.mark.parametrize("outputs", OUTPUTS)
@pytest.mark.parametrize("log1p", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_output_and_gradients_equal_the_formula(
    outputs: int, log1p: bool, bias: bool, dtype: torch.dtype, backend: str
) -> None:
    module, x = layer(outputs, dtype, bias=bias, log1p=log1p), counts()
    upstream = torch.randn(ROWS, outputs, dtype=dtype)
    y = module(x.to_sparse_csr())
    y.backward(upstream)
    check(module, y, x, upstream, log1p=log1p, bias=bias)


@pytest.mark.parametrize(
    "dtype", [torch.uint8, torch.uint16, torch.int32, torch.int64, torch.float16, torch.float64]
)
@pytest.mark.parametrize("index", [torch.int32, torch.int64])
def test_all_counts_are_read_as_numbers(dtype: torch.dtype, index: torch.dtype, backend: str) -> None:
    module, x = layer(log1p=True), counts()
    csr = x.to_sparse_csr()
    parts = csr.crow_indices().to(index), csr.col_indices().to(index)
    read = module(torch.sparse_csr_tensor(*parts, csr.values().to(dtype), x.shape))
    assert torch.equal(read, module(csr))


def test_dense_input_gives_the_same(backend: str) -> None:
    module, x = layer(log1p=True), counts()
    assert torch.allclose(module(x), module(x.to_sparse_csr()), rtol=1e-4, atol=1e-5)
    assert torch.equal(module(x.int()), module(x))
    assert torch.equal(module(x[None, None])[0, 0], module(x))


def test_unsorted_columns_and_repeated_columns_are_added(backend: str) -> None:
    module = layer()
    starts, columns = torch.tensor([0, 4, 4, 6]), torch.tensor([1400, 3, 1400, 7, 9, 8])
    values = torch.tensor([1.0, 2, 4, 8, 16, 32])
    x = torch.zeros(3, INPUTS)
    x[0, [3, 7, 1400]], x[2, [8, 9]] = torch.tensor([2.0, 8, 5]), torch.tensor([32.0, 16])
    y = module(torch.sparse_csr_tensor(starts, columns, values, x.shape))
    y.sum().backward()
    truth, truth_gradient = exact(x, module, torch.ones_like(y), False)
    assert error(y, truth) < 1e-6
    assert error(module.weight.grad, truth_gradient) < 1e-6
    assert values.tolist() == [1, 2, 4, 8, 16, 32]


@pytest.mark.parametrize("rows", [0, 1, 3])
def test_empty_rows_give_the_bias(rows: int, backend: str) -> None:
    module = layer()
    y = module(torch.zeros(rows, INPUTS).to_sparse_csr())
    assert torch.equal(y, module.bias.expand(rows, -1))
    y.sum().backward()
    assert not module.weight.grad.any()


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("log1p", [False, True])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.float64], ids=str)
def test_torchs_product_equals_the_formula(
    dtype: torch.dtype, log1p: bool, bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The product that a GPU uses, with torch's kernels of the CPU."""
    monkeypatch.setattr("fastvae.functional.sparse._BY_TORCH", ("cpu",))
    monkeypatch.setitem(fastvae.backends.choose.serving, "cpu", None)
    calls, product = [], torch.sparse.mm
    monkeypatch.setattr(torch.sparse, "mm", lambda *args: (calls.append(args), product(*args))[1])
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    module, csr = layer(dtype=wide, bias=bias, log1p=log1p), counts().clamp(max=255).to_sparse_csr()
    x = torch.sparse_csr_tensor(csr.crow_indices(), csr.col_indices(), csr.values().to(dtype), csr.shape)
    upstream = torch.randn(ROWS, 130, dtype=wide)
    y = module(x)
    y.backward(upstream)
    assert calls
    check(module, y, csr.to_dense(), upstream, log1p=log1p, bias=bias)


def test_nan_stays_in_its_row_and_in_its_columns_gradient(native: None) -> None:
    module, x = layer(), counts()
    x[1, 5] = torch.nan
    y = module(x.to_sparse_csr())
    assert y.isnan().any(1).tolist() == [row == 1 for row in range(ROWS)]
    y.sum().backward()
    assert module.weight.grad.isnan().any(0).nonzero().flatten().tolist() == [5]


def test_results_do_not_depend_on_the_number_of_threads(threads: None, native: None) -> None:
    module, x = layer(128), counts(200).to_sparse_csr()
    results = []
    for number in (1, 2, 3):
        torch.set_num_threads(number)
        module.weight.grad = None
        y = module(x)
        y.sin().sum().backward()
        results.append((y, module.weight.grad))
    assert all(torch.equal(a, b) for result in results for a, b in zip(result, results[0], strict=True))


@pytest.mark.parametrize("order", ["C", "F"])
def test_gradients_of_the_function(order: str, backend: str) -> None:
    """The weight may be stored by rows or by columns, and either parameter may be without a gradient."""
    x = counts(3, 12).to_sparse_csr()
    weight, bias = torch.randn(5, 12, dtype=torch.float64), torch.randn(5, dtype=torch.float64)
    if order == "F":
        weight = weight.t().contiguous().t()
    for needs in ((True, True), (True, False), (False, True)):
        arguments = [t.clone().requires_grad_(need) for t, need in zip((weight, bias), needs, strict=True)]
        torch.autograd.gradcheck(lambda w, b: sparse_linear(x, w, b, log1p=True), arguments)
    with pytest.raises(RuntimeError) if fastvae.backends.choose.setting == "native" else torch.enable_grad():
        leaf = weight.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(sparse_linear(x, leaf).square().sum(), leaf, create_graph=True)
        gradient.sum().backward()


# --- A layer in PyTorch -----------------------------------------------------------------------------------------------


def test_layer_is_a_linear_layer() -> None:
    """The weights that a seed gives, the state_dict and the keywords are those of nn.Linear."""
    torch.manual_seed(3)
    module = SparseLinear(30, 4)
    torch.manual_seed(3)
    linear = nn.Linear(30, 4)
    assert torch.equal(module.weight, linear.weight)
    assert torch.equal(module.bias, linear.bias)
    torch.manual_seed(3)
    module.reset_parameters()
    assert torch.equal(module.weight, linear.weight)
    assert isinstance(module, nn.Linear)

    other = SparseLinear(30, 4)
    other.load_state_dict(linear.state_dict())
    assert torch.equal(other.weight, linear.weight)
    linear.load_state_dict(SparseLinear(30, 4).state_dict())
    assert not torch.equal(other.weight, linear.weight)
    assert repr(SparseLinear(3, 2, bias=False, log1p=True)) == (
        "SparseLinear(in_features=3, out_features=2, bias=False, log1p=True)"
    )


def by_columns(module: nn.Linear) -> bool:
    return module.weight.t().is_contiguous()


def test_copies_keep_the_order_of_the_weight() -> None:
    module, x = layer(log1p=True), counts().to_sparse_csr()
    meta = SparseLinear(INPUTS, 130, device="meta", log1p=True)
    filled = copy.deepcopy(meta).to_empty(device="cpu")
    filled.load_state_dict(module.state_dict())
    for other in (module, copy.deepcopy(module), pickle.loads(pickle.dumps(module)), filled):
        assert by_columns(other)
        assert torch.equal(other(x), module(x))
    assigned = copy.deepcopy(meta)
    assigned.load_state_dict(
        {name: value.contiguous() for name, value in module.state_dict().items()}, assign=True
    )
    assert torch.equal(assigned(x), module(x))
    module.double()
    assert by_columns(module)
    assert module(x).dtype == torch.float64


@pytest.mark.parametrize("fused", [False, True])
def test_optimisers_train_it_like_a_linear_layer(fused: bool) -> None:
    x = counts()
    torch.manual_seed(0)
    module = SparseLinear(INPUTS, 130)
    linear = nn.Linear(INPUTS, 130)
    linear.load_state_dict(module.state_dict())
    for each, batch in ((module, x.to_sparse_csr()), (linear, x)):
        optimizer = torch.optim.Adam(each.parameters(), lr=1e-2, fused=fused)
        for _ in range(3):
            optimizer.zero_grad()
            each(batch).sin().sum().backward()
            optimizer.step()
    assert by_columns(module)
    assert module.weight.grad.stride() == module.weight.stride()
    assert torch.allclose(module.weight, linear.weight, atol=1e-4)


def test_autocast_and_half_precision_weights() -> None:
    """The product is computed in float32, and the output has the dtype that it has in nn.Linear."""
    module, x = layer(log1p=True), counts()
    truth = module(x.to_sparse_csr())
    with torch.autocast("cpu", torch.bfloat16):
        y = module(x.to_sparse_csr())
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, truth.bfloat16())
    y.float().sum().backward()
    assert module.weight.grad.dtype == torch.float32
    module.bfloat16()
    half = module(x.to_sparse_csr())
    assert half.dtype == torch.bfloat16
    exact_output, _ = exact(x, module, torch.zeros(ROWS, 130), True)
    assert error(half, exact_output) < 4e-3


def test_compiled_layer_gives_the_same() -> None:
    """Dense input is one graph. torch.compile does not trace sparse input, and runs the layer as it is."""
    module, x = layer(log1p=True), counts()
    torch._dynamo.reset()
    whole = torch.compile(module, backend="aot_eager", fullgraph=True)
    assert torch.allclose(whole(x), module(x))
    compiled = torch.compile(module, backend="aot_eager")
    assert torch.equal(compiled(x.to_sparse_csr()), module(x.to_sparse_csr()))


def test_parts_of_a_matrix_compile_into_one_graph(native: None) -> None:
    csr = counts().to_sparse_csr()
    # Copies, because views of a sparse tensor refer to it, and torch cannot make a fake of it.
    parts = csr.values().clone(), csr.crow_indices().clone(), csr.col_indices().clone()
    module = layer()

    def run(values: Tensor, starts: Tensor, columns: Tensor) -> Tensor:
        return torch.ops.fastvae.sparse_linear(values, starts, columns, module.weight, module.bias).sin()

    compiled = torch.compile(run, backend="aot_eager", fullgraph=True, dynamic=True)
    for function in (run, compiled):
        module.weight.grad = None
        function(*parts).sum().backward()
        if function is run:
            expected = module.weight.grad
    assert torch.equal(module.weight.grad, expected)


# --- Errors -----------------------------------------------------------------------------------------------------------

X, WEIGHT = torch.eye(3, 4).to_sparse_csr(), torch.ones(2, 4)
WRONG: dict[str, tuple[Any, type[Exception], str]] = {
    "no tensor": (lambda: sparse_linear([1], WEIGHT), TypeError, "`x` must be a Tensor, got list"),
    "coo": (
        lambda: sparse_linear(X.to_dense().to_sparse(), WEIGHT), TypeError,
        "`x` must be torch.sparse_csr or dense, got torch.sparse_coo; did you mean x.to_sparse_csr()?",
    ),
    "sparse weight": (
        lambda: sparse_linear(X, X), TypeError,
        "`weight` must be dense, got torch.sparse_csr; did you mean weight.to_dense()?",
    ),
    "whole weight": (lambda: sparse_linear(X, WEIGHT.int()), TypeError, "`weight` must be float32, "),
    "bool": (lambda: sparse_linear(X.to_dense().bool(), WEIGHT), TypeError, "`x` must be float32, "),
    "vector weight": (lambda: sparse_linear(X, WEIGHT[0]), ValueError, "`weight` must have shape (O, I), got (4,)"),
    "columns": (
        lambda: sparse_linear(X, WEIGHT[:, :3]), ValueError,
        "`x` must have 3 columns, as `weight` (2, 3) has, got (3, 4)",
    ),
    "bias": (
        lambda: sparse_linear(X, WEIGHT, torch.ones(3)), ValueError,
        "`bias` must have shape (2,), one value per row of `weight`, got (3,)",
    ),
    "bias's dtype": (
        lambda: sparse_linear(X, WEIGHT, torch.ones(2).double()), TypeError,
        "`bias` must be float32, like `weight`, got float64",
    ),
    "device": (
        lambda: sparse_linear(X, WEIGHT.to("meta")), ValueError, "`weight` must be on the device of `x`, cpu, got meta"
    ),
    "gradient": (
        lambda: sparse_linear(X.to_dense().requires_grad_().to_sparse_csr(), WEIGHT), ValueError,
        "a sparse `x` requires a gradient, which this layer does not provide; pass x.detach(), or x.to_dense()",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_wrong_arguments_raise(name: str) -> None:
    call, kind, words = WRONG[name]
    with pytest.raises(kind, match=re.escape(words)):
        call()


def test_damaged_matrices_raise(native: None) -> None:
    values = torch.ones(3)
    for starts, columns, kind, words in (
        ([0, 2, 3], [0, 4, 1], IndexError, "col_indices of the input must lie between 0 and 3"),
        ([0, 2, 3], [0, -1, 1], IndexError, "col_indices of the input must lie between 0 and 3"),
        ([0, 5, 3], [0, 1, 1], ValueError, "crow_indices of the input must rise from 0 to its 3 values"),
        ([0, 1, 2], [0, 1, 1], ValueError, "crow_indices of the input must rise from 0 to its 3 values"),
    ):
        with torch.sparse.check_sparse_tensor_invariants(False):
            x = torch.sparse_csr_tensor(torch.tensor(starts), torch.tensor(columns), values, (2, 4))
        with pytest.raises(kind, match=words):
            sparse_linear(x, WEIGHT)


def test_values_that_need_a_gradient_are_refused(native: None) -> None:
    with pytest.raises(ValueError, match="`values` requires a gradient"):
        torch.ops.fastvae.sparse_linear(
            torch.ones(1, requires_grad=True), torch.tensor([0, 1]), torch.tensor([0]), WEIGHT, None
        )


def test_magnitude_of_the_initial_weights() -> None:
    module = SparseLinear(400, 50)
    assert module.weight.abs().max().item() <= 1 / math.sqrt(400)
    assert module.weight.std().item() == pytest.approx(1 / math.sqrt(3 * 400), rel=0.05)
