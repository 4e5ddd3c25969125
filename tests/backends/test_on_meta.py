"""The tests that need a GPU, on meta tensors, which detect CPU tensors among the GPU's without a GPU.

Every test of test_cuda.py, test_triton.py and test_triton_counts.py with the fixture `device` runs here with the device
"meta", using the ops' fake kernels. Meta tensors have shapes, dtypes and a device, but no values: asserts are evaluated
but ignored, and reads return some value. `NEED_VALUES` lists the tests that cannot run in this way, with the reason.
"""

import ast
import importlib
import importlib.abc
import importlib.util
import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.machinery import ModuleSpec, SourceFileLoader
from types import CodeType, FunctionType, ModuleType
from typing import Any

import cases
import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

import fastvae
from fastvae.backends import base

pytestmark = pytest.mark.on_meta

HELPERS = (
    "test_autograd",
    "test_autograd_features",
    "test_compile",
    "test_counts",
    "test_discretized",
    "test_extremes",
    "test_mixture",
    "test_multinomial",
    "test_nb_mixture",
    "test_noise",
    "test_values",
    "test_weight",
)

NEED_VALUES = {
    "test_op_on_another_than_the_current_device_runs_there": "two GPUs",
    "test_graph_step_with_generators_draws_their_noise": "a generator of CUDA",
    "test_op_on_a_second_stream_runs_there": "streams",
    "test_op_with_a_tensor_on_another_device_raises": "the CUDA kernels' own check of devices",
    "test_elbo_not_moved_to_the_gpu_moves_beta_once": "a GPU that could be waited for, and a CUDA graph",
    "test_graph_step_with_an_optimiser_that_is_not_capturable_raises": "a CUDA graph",
    "test_graph_step_under_autocast_gives_the_losses_of_eager": "a CUDA graph",
    "test_graph_step_survives_the_graphs_of_torch_compile": "a CUDA graph",
    "test_graph_step_accepts_cpu_batches_and_refuses_other_shapes": "a CUDA graph",
    "test_compiled_draws_are_not_merged": "torch.compile knows no generator of meta tensors",
    "test_graph_step_replay_draws_fresh_noise_and_follows_beta": "a CUDA graph",
    "test_training_step_launches_five_kernels": "a profile of the GPU",
    "test_training_step_launches_four_kernels": "a profile of the GPU",
    "test_graph_replays_draw_fresh_noise": "a CUDA graph",
    "test_graph_replays_the_loss_of_counts": "a CUDA graph",
    "test_concurrent_launches_on_many_streams_give_the_same_results": "streams",
    "test_nll_of_more_than_2_31_elements_is_correct": "the GPU's memory",
    "test_training_step_does_not_synchronise": "a GPU that could be waited for",
    "test_forward_without_gradient_launches_two_kernels": "a profile of the GPU",
    "test_training_step_peak_memory_is_one_gradient": "the GPU's memory",
    "test_plain_tensors_use_the_fast_path": "the CUDA kernels",
    "test_graph_step_replays_equal_eager_steps": "a CUDA graph",
    "test_manual_seed_and_generator_determine_the_noise": "a generator of CUDA",
    "test_sparse_linear_equals_the_formula": "torch has no sparse product of meta tensors",
}

# ---------------------------------------------------------------------------------------------------------------------
# The same tests with ignored asserts
# ---------------------------------------------------------------------------------------------------------------------


class _IgnoreAsserts(ast.NodeTransformer):
    def visit_Assert(self, node: ast.Assert) -> ast.Expr:
        return ast.copy_location(ast.Expr(node.test), node)


class _Loader(SourceFileLoader):
    def get_code(self, fullname: str) -> CodeType:
        path = self.get_filename(fullname)
        tree = _IgnoreAsserts().visit(ast.parse(self.get_data(path)))
        return compile(ast.fix_missing_locations(tree), path, "exec")


class _Finder(importlib.abc.MetaPathFinder):
    def __init__(self, names: tuple[str, ...]) -> None:
        self.names = names

    def find_spec(self, fullname: str, path: Any, target: ModuleType | None = None) -> ModuleSpec | None:
        if fullname not in self.names:
            return None
        found = importlib.machinery.PathFinder.find_spec(fullname, path)
        if found is None or found.origin is None:
            return None
        return importlib.util.spec_from_file_location(
            fullname, found.origin, loader=_Loader(fullname, found.origin)
        )


def import_with_ignored_asserts(*names: str) -> list[ModuleType]:
    """Import copies of these modules, with copies of `HELPERS` and of each other. Other tests keep the original
    modules."""
    finder = _Finder((*names, *HELPERS))
    originals = {name: sys.modules.pop(name) for name in finder.names if name in sys.modules}
    sys.meta_path.insert(0, finder)
    try:
        return [importlib.import_module(name) for name in names]
    finally:
        sys.meta_path.remove(finder)
        for name in finder.names:
            sys.modules.pop(name, None)
        sys.modules.update(originals)


# ---------------------------------------------------------------------------------------------------------------------
# Meta tensors in place of the GPU's
# ---------------------------------------------------------------------------------------------------------------------


def same_device(*tensors: Any) -> None:
    devices = {x.device for x in tensors if isinstance(x, Tensor)}
    if len(devices) > 1:
        raise RuntimeError(f"tensors of several devices are compared: {sorted(map(str, devices))}")


def assert_close(actual: Any, expected: Any, **_: Any) -> None:
    """Check everything that `torch.testing.assert_close` does, except values."""
    for a, b in zip(*([x] if isinstance(x, Tensor) else x for x in (actual, expected)), strict=True):
        if isinstance(a, Tensor) and isinstance(b, Tensor):
            found, required = ((x.device, x.dtype, x.shape) for x in (a, b))
            if found != required:
                raise AssertionError(f"found {found}, expected {required}")


class _ToCpu(torch.autograd.Function):
    """`.cpu()` of a meta tensor, which returns zeros, and its gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return torch.zeros_like(x, device="cpu")

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad.to("meta")


def is_cuda(argument: Any) -> bool:
    return isinstance(argument, (str, torch.device)) and str(argument).startswith("cuda")


READS: dict[Any, Callable[..., Any]] = {
    Tensor.__bool__: lambda x: True,
    Tensor.item: lambda x: 1.0,
    Tensor.cpu: _ToCpu.apply,
    torch.equal: lambda a, b: True,
    torch.allclose: lambda a, b, **_: True,
}


class MetaForCuda(TorchFunctionMode):
    """Replaces "cuda" by "meta", and returns some value when a meta tensor is read."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is Tensor.cuda:
            func, args = Tensor.to, (args[0], "meta")
        args = tuple("meta" if is_cuda(a) else a for a in args)
        if is_cuda(kwargs.get("device")):
            kwargs["device"] = "meta"
        if func in READS and any(isinstance(a, Tensor) and a.is_meta for a in args):
            same_device(*args)
            return READS[func](*args, **kwargs)
        return func(*args, **kwargs)


@contextmanager
def on_meta(backend: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[torch.device]:
    # With its `Meta` kernels, a backend serves meta tensors as it serves a GPU's.
    monkeypatch.setitem(base.DEVICES, "meta", "Meta")
    monkeypatch.setattr(torch.testing, "assert_close", assert_close)
    with fastvae.use_backend(backend), MetaForCuda():
        yield torch.device("meta")


class TestNative:
    @pytest.fixture
    def device(self, monkeypatch: pytest.MonkeyPatch) -> Iterator[torch.device]:
        with on_meta("native", monkeypatch) as device:
            yield device


class TestTriton:
    @pytest.fixture
    def device(self, monkeypatch: pytest.MonkeyPatch) -> Iterator[torch.device]:
        with on_meta("triton", monkeypatch) as device:
            yield device


def device_tests(module: ModuleType) -> dict[str, FunctionType]:
    return {
        name: test
        for name, test in vars(module).items()
        if name.startswith("test_") and callable(test) and "device" in inspect.signature(test).parameters
    }


_triton, _triton_counts, _cuda = map(
    device_tests, import_with_ignored_asserts("test_triton", "test_triton_counts", "test_cuda")
)
TESTS = {TestTriton: _triton | _triton_counts, TestNative: _cuda}
for _class, _tests in TESTS.items():
    for _name, _test in _tests.items():
        _test.pytestmark = [m for m in getattr(_test, "pytestmark", ()) if m.name != "skipif"]
        if _name not in NEED_VALUES:
            setattr(_class, _name, staticmethod(_test))


# ---------------------------------------------------------------------------------------------------------------------
# Checks of this file itself
# ---------------------------------------------------------------------------------------------------------------------


def test_names_of_excluded_tests_exist() -> None:
    assert NEED_VALUES.keys() <= {name for tests in TESTS.values() for name in tests}


@pytest.mark.parametrize("backend", ["native", "triton"])
def test_cpu_tensor_on_meta_raises(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a formula, in an argument, and in a comparison."""
    case = cases.by_id["gaussian"]
    shape, dtype = (4, 7), torch.float32
    check_values = TESTS[TestNative]["test_values_and_gradients_equal_the_formula"]
    elsewhere = case._replace(terms=lambda mean, target: [*case.terms(mean, target), torch.ones(4, 7)])
    argument = case._replace(call=lambda f, mean, target: f.gaussian_nll(mean, torch.ones(4, 7), scale=0.7))
    with on_meta(backend, monkeypatch) as device:
        check_values(device, case, shape, dtype)
        with pytest.raises(RuntimeError, match="on the expected device meta"):
            check_values(device, elsewhere, shape, dtype)
        with pytest.raises(ValueError, match="`target` must be on the device of `mean`, meta, got cpu"):
            check_values(device, argument, shape, dtype)
        ours, theirs = torch.ones(3, device=device), torch.ones(3)
        for compare in (torch.equal, torch.allclose, torch.testing.assert_close):
            compare(ours, ours)
            with pytest.raises((RuntimeError, AssertionError), match=r"several devices|expected"):
                compare(ours, theirs)
