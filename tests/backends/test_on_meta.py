"""The tests that need a GPU, on meta tensors: what a CPU tensor among the GPU's would break is told without a GPU.

Every test of test_cuda.py and test_triton.py that takes the fixture `device` runs here with the device "meta", over the
ops' fake kernels. Meta tensors have shapes, types and a device, but no values: asserts are evaluated and not judged,
and what reads a value gets some value. What cannot run so is named in `NEED_VALUES`, with the reason.
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
    "test_compile",
    "test_counts",
    "test_discretized",
    "test_extremes",
    "test_noise",
    "test_values",
)

NEED_VALUES = {
    "test_a_device_that_is_not_the_current_one": "two GPUs",
    "test_a_generator_of_its_own": "a generator of CUDA",
    "test_a_second_stream": "streams",
    "test_a_tensor_from_elsewhere_is_refused": "the CUDA kernels' own check of devices",
    "test_an_elbo_that_nobody_moved": "a GPU that could be waited for, and a CUDA graph",
    "test_an_optimiser_that_counts_on_the_cpu": "a CUDA graph",
    "test_autocast_around_the_call": "a CUDA graph",
    "test_batches_of_the_cpu_and_an_odd_one": "a CUDA graph",
    "test_draws_stay_draws_when_compiled": "torch.compile knows no generator of meta tensors",
    "test_every_replay_draws_anew_and_beta_steers": "a CUDA graph",
    "test_five_launches": "a profile of the GPU",
    "test_four_launches": "a profile of the GPU",
    "test_graph_replays_draw_anew": "a CUDA graph",
    "test_launches_on_many_streams_at_once": "streams",
    "test_more_than_two_to_the_31_elements": "the GPU's memory",
    "test_no_host_sync": "a GPU that could be waited for",
    "test_no_launch_but_ours_without_a_gradient": "a profile of the GPU",
    "test_peak_memory": "the GPU's memory",
    "test_plain_tensors_take_the_short_cut": "the CUDA kernels",
    "test_replays_are_the_steps_of_eager": "a CUDA graph",
    "test_seeds": "a generator of CUDA",
}

# ---------------------------------------------------------------------------------------------------------------------
# The same tests, their asserts not judged
# ---------------------------------------------------------------------------------------------------------------------


class _NotJudged(ast.NodeTransformer):
    def visit_Assert(self, node: ast.Assert) -> ast.Expr:
        return ast.copy_location(ast.Expr(node.test), node)


class _Loader(SourceFileLoader):
    def get_code(self, fullname: str) -> CodeType:
        path = self.get_filename(fullname)
        tree = _NotJudged().visit(ast.parse(self.get_data(path)))
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


def not_judged(*names: str) -> list[ModuleType]:
    """Copies of these modules, of what they import of `HELPERS` and of each other; other tests keep their own."""
    finder = _Finder((*names, *HELPERS))
    kept = {name: sys.modules.pop(name) for name in finder.names if name in sys.modules}
    sys.meta_path.insert(0, finder)
    try:
        return [importlib.import_module(name) for name in names]
    finally:
        sys.meta_path.remove(finder)
        for name in finder.names:
            sys.modules.pop(name, None)
        sys.modules.update(kept)


# ---------------------------------------------------------------------------------------------------------------------
# Meta tensors in the place of the GPU's
# ---------------------------------------------------------------------------------------------------------------------


def same_device(*tensors: Any) -> None:
    devices = {x.device for x in tensors if isinstance(x, Tensor)}
    if len(devices) > 1:
        raise RuntimeError(f"tensors of several devices are compared: {sorted(map(str, devices))}")


def assert_close(actual: Any, expected: Any, **_: Any) -> None:
    """All that `torch.testing.assert_close` asks but the values."""
    for a, b in zip(*([x] if isinstance(x, Tensor) else x for x in (actual, expected)), strict=True):
        if isinstance(a, Tensor) and isinstance(b, Tensor):
            found, wanted = ((x.device, x.dtype, x.shape) for x in (a, b))
            if found != wanted:
                raise AssertionError(f"found {found}, expected {wanted}")


class _ToCpu(torch.autograd.Function):
    """`.cpu()` of a meta tensor, zeros, and its gradient."""

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
    """`"cuda"` means meta; reading a meta tensor's values gives some."""

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
    # With the kernels of `Meta` a backend serves meta tensors as it serves a GPU's.
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


TESTS = dict(
    zip((TestTriton, TestNative), map(device_tests, not_judged("test_triton", "test_cuda")), strict=True)
)
for _class, _tests in TESTS.items():
    for _name, _test in _tests.items():
        _test.pytestmark = [m for m in getattr(_test, "pytestmark", ()) if m.name != "skipif"]
        if _name not in NEED_VALUES:
            setattr(_class, _name, staticmethod(_test))


# ---------------------------------------------------------------------------------------------------------------------
# Whether this finds anything
# ---------------------------------------------------------------------------------------------------------------------


def test_what_is_left_out_is_there() -> None:
    assert NEED_VALUES.keys() <= {name for tests in TESTS.values() for name in tests}


@pytest.mark.parametrize("backend", ["native", "triton"])
def test_a_tensor_of_the_cpu_is_found(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a formula, in an argument, and in a comparison."""
    case = cases.by_id["gaussian"]
    shape, dtype = (4, 7), torch.float32
    test_values = TESTS[TestNative]["test_values"]
    elsewhere = case._replace(terms=lambda mean, target: [*case.terms(mean, target), torch.ones(4, 7)])
    argument = case._replace(call=lambda f, mean, target: f.gaussian_nll(mean, torch.ones(4, 7), scale=0.7))
    with on_meta(backend, monkeypatch) as device:
        test_values(device, case, shape, dtype)
        with pytest.raises(RuntimeError, match="on the expected device meta"):
            test_values(device, elsewhere, shape, dtype)
        with pytest.raises(ValueError, match="`target` must be on the device of `mean`, meta, got cpu"):
            test_values(device, argument, shape, dtype)
        ours, theirs = torch.ones(3, device=device), torch.ones(3)
        for compare in (torch.equal, torch.allclose, torch.testing.assert_close):
            compare(ours, ours)
            with pytest.raises((RuntimeError, AssertionError), match=r"several devices|expected"):
                compare(ours, theirs)
