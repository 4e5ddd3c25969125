"""Choose the backend that serves a tensor.

The choice is made once, in the forward call, by the device of the tensors; a backward belongs to the op that ran
forward. State is plain module-level data, so that torch.compile can trace through it (and recompiles when it changes).
"""

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .._spec import VARIANTS
from .._warn import warn
from . import available, native
from .base import DEVICES, NAMES, OPS_LACKING, Backend
from .reference import REFERENCE

# None outside of torch.func's transforms.
transform_level = torch._C._functorch.maybe_current_level

# (backend, type of device) -> the likelihoods that it has no kernel for. "auto" takes the next backend that has.
LIKELIHOODS_LACKING: dict[tuple[str, str], tuple[str, ...]] = {
    place: tuple(variant.name for variant in VARIANTS.values() if place in variant.lacks)
    for place in dict.fromkeys(place for variant in VARIANTS.values() for place in variant.lacks)
}

setting = "auto"
_fallbacks_warned: set[str] = set()  # what fell back to the reference, and was warned of
_gpu_capability: tuple[int, int] | None = None  # its compute capability; see `_choose_for_gpu`
serving: dict[str, Backend] = {}  # device type -> backend under the current setting, where one was found
# Where the native backend serves CPU tensors: the ops for calls as a training loop makes them, checks included, also of
# CUDA tensors where it serves those. They return None for whatever is not plain and fitting, and are not for
# torch.compile to trace.
fast_path: Any = None
_unserved_warned = False


def serve(name: str, device_type: str) -> Backend | None:
    """The backend that setting `name` gives to a device type; None where it has none (for "auto": a fast one)."""
    if name == "reference":
        return REFERENCE
    for candidate in ("native", "triton") if name == "auto" else (name,):
        # Triton takes a while to import and serves GPUs: "auto" asks for it only where this torch has one.
        wanted = (
            name != "auto" or candidate != "triton" or (device_type == "cuda" and torch.cuda.is_available())
        )
        if not wanted:
            continue
        backend = available.load(candidate)
        if backend is None or not available.has_kernels(candidate, device_type):
            continue
        if (
            (candidate, device_type) == ("native", "cuda")
            and _gpu_capability is not None
            and not native.built_for(_gpu_capability)
        ):
            continue
        return backend
    return None


def _choose_for_gpu() -> None:
    """Look whether the extension's CUDA kernels run on this GPU, and choose anew where they do not.

    Torch calls it when it initialises CUDA, before there is a CUDA tensor: to ask at import would be to initialise it,
    and then the process could not fork; to ask in `for_tensor`, a step more in every call and a branch in every trace.
    """
    global _gpu_capability
    _gpu_capability = torch.cuda.get_device_capability()
    if not native.built_for(_gpu_capability):
        set_backend(setting)


def set_backend(name: str) -> None:
    """Choose the backend of all later calls in this process.

    `"auto"` (the default) takes the compiled extension where it has kernels for the tensors' device (and was built for
    this GPU), else Triton (on a GPU), else the reference, which warns once. `"reference"` is plain PyTorch: slow,
    differentiable twice, any device. `"native"` and `"triton"` insist: a tensor on a CPU or a CUDA device that they
    have no kernels for is a RuntimeError. Tensors on any other device are served by the reference under every setting.

    Raises ValueError for an unknown name and RuntimeError, with the reason, for a backend that is not there.
    """
    global setting, fast_path
    if name not in NAMES:
        raise ValueError(
            f"fastvae.set_backend: `name` must be one of {', '.join(map(repr, NAMES))}, got {name!r}"
        )
    if name not in ("auto", "reference") and available.load(name) is None:
        raise RuntimeError(
            f"fastvae.set_backend: backend {name!r} is not available: {available.missing[name]}"
        )
    found = {device_type: serve(name, device_type) for device_type in DEVICES}
    setting = name
    serving.clear()
    serving.update({device_type: backend for device_type, backend in found.items() if backend is not None})
    native_on = [device_type for device_type, backend in serving.items() if backend.name == "native"]
    fast_path = importlib.import_module("fastvae._C").fast_path if "cpu" in native_on else None
    if fast_path is not None:
        fast_path.serve_cuda("cuda" in native_on)


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """`set_backend(name)` for the length of a `with` block; what was set before comes back, also after an exception.

    The setting belongs to the process, not to the thread.
    """
    before = setting
    set_backend(name)
    try:
        yield
    finally:
        set_backend(before)


def empty_cache() -> int:
    """Give the memory that the native CPU kernels keep for their next results back to the system.

    Results of 1 MiB and more are written into buffers that are used again, up to 512 MiB of unused ones: a fresh buffer
    costs more time in page faults than the kernel that fills it. Returns how many bytes were given back.
    """
    if available.load("native") is None:
        return 0
    return int(importlib.import_module("fastvae._C").empty_buffer_pool())


def with_kernel(op: str, device_type: str) -> Backend | None:
    """The backend that serves an op on a type of device under the current setting; None where only the reference would,
    unasked, or nothing."""
    backend = serving.get(device_type)
    if backend is None or (backend.name, device_type) not in OPS_LACKING.get(op, ()):
        return backend
    return serve("triton", device_type) if setting == "auto" and device_type == "cuda" else None


def for_tensor(tensor: Tensor, likelihood: str = "", op: str = "nll") -> Backend:
    """The backend that serves tensors on this tensor's device, of those that have a kernel for the likelihood, and that
    op of it."""
    device_type = tensor.device.type
    backend = serving.get(device_type)
    if backend is None:
        return _unserved(device_type)
    place = (backend.name, device_type)
    if likelihood in LIKELIHOODS_LACKING.get(place, ()) or place in OPS_LACKING.get(op, ()):
        backend = _substitute(*place, likelihood, op)
    # Compiled ops cannot cross these: torch's own message for a transform names no way out, and forward-mode AD would
    # get no tangent at all, in silence.
    if (
        not torch.compiler.is_compiling()
        and (transform_level() is not None or forward_ad._current_level >= 0)
        and backend is not REFERENCE
    ):
        raise RuntimeError(
            f"fastvae: torch.func transforms and forward-mode AD cannot cross backend {backend.name!r}; differentiate "
            f'the reference: with fastvae.use_backend("reference"): ...'
        )
    return backend


def _unserved(device_type: str) -> Backend:
    global _unserved_warned
    if device_type not in DEVICES:
        return REFERENCE
    if setting != "auto":
        raise RuntimeError(
            f"fastvae: backend {setting!r} has no kernels for {device_type} tensors: "
            f"{available.reason(setting, device_type)}; fastvae.set_backend('auto') takes what there is"
        )
    # A warning cannot be traced; compiled code gets the reference silently (and fused by the compiler). This order,
    # so that a trace does not depend on `_unserved_warned`.
    if not torch.compiler.is_compiling() and not _unserved_warned:
        _unserved_warned = True
        reasons = [available.reason("native", device_type)]
        if device_type == "cuda":
            reasons.append(f"Triton: {available.reason('triton', device_type)}")
        warn(
            f"fastvae runs {device_type} tensors on its pure-PyTorch reference, which is slow "
            f"(fastvae.set_backend('reference') accepts that silently): {'; '.join(reasons)}",
            RuntimeWarning,
        )
    return REFERENCE


def _substitute(name: str, device_type: str, likelihood: str, op: str) -> Backend:
    what = f"the likelihood {likelihood!r}"
    if op == "nll_elements":
        what = f"the elements of {what}"
    if setting != "auto":
        raise RuntimeError(
            f"fastvae: backend {name!r} has no kernel for {what} on {device_type} tensors; "
            f"fastvae.set_backend('auto') takes what there is"
        )
    if name == "native" and device_type == "cuda":
        triton = serve("triton", "cuda")
        if triton is not None:
            return triton
    if not torch.compiler.is_compiling() and what not in _fallbacks_warned:
        _fallbacks_warned.add(what)
        warn(
            f"fastvae runs {what} on its pure-PyTorch reference, which is slow "
            f"(fastvae.set_backend('reference') accepts that silently): there is no kernel for it on {device_type} "
            "tensors yet",
            RuntimeWarning,
        )
    return REFERENCE


set_backend("auto")
if "native" in available.loaded and available.has_kernels("native", "cuda"):
    if torch.cuda.is_initialized():
        _choose_for_gpu()
    else:
        torch.cuda._lazy_call(_choose_for_gpu)
