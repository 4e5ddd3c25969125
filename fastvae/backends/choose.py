"""Choose the backend that serves a tensor.

The choice is made once, in the forward call, from the device of the tensors. The backward belongs to the op that ran
the forward. The state is plain module-level data, so that torch.compile can trace it and recompiles when it changes.
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

# torch.func's current transform level, or None outside of its transforms.
transform_level = torch._C._functorch.maybe_current_level

# (backend, device type) -> the variants that it has no kernel for. "auto" then uses the next backend that has one.
LIKELIHOODS_LACKING: dict[tuple[str, str], tuple[str, ...]] = {
    place: tuple(variant.name for variant in VARIANTS.values() if place in variant.lacks)
    for place in dict.fromkeys(place for variant in VARIANTS.values() for place in variant.lacks)
}

setting = "auto"
_fallbacks_warned: set[str] = set()  # descriptions of what fell back to the reference with a warning
_gpu_capability: tuple[int, int] | None = None  # the GPU's compute capability; see `_choose_for_gpu`
serving: dict[str, Backend] = {}  # device type -> the backend that serves it under the current setting
# The ops for calls as a training loop makes them, including checks, if the native backend serves CPU tensors (and for
# CUDA tensors if it serves them too). They return None for any call that is unusual or wrong, and torch.compile cannot
# trace them.
fast_path: Any = None
_no_backend_warned = False


def serve(name: str, device_type: str) -> Backend | None:
    """The backend for a device type under setting `name`, or None. For "auto", the reference does not count."""
    if name == "reference":
        return REFERENCE
    for candidate in ("native", "triton") if name == "auto" else (name,):
        # Triton is slow to import and serves GPUs, so "auto" loads it only if torch sees one.
        eligible = (
            name != "auto" or candidate != "triton" or (device_type == "cuda" and torch.cuda.is_available())
        )
        if not eligible:
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
    """Check that the extension's CUDA kernels can run on this GPU, and choose again if they cannot.

    Torch calls this when it initialises CUDA, before there can be a CUDA tensor. Querying the GPU at import would
    initialise CUDA, and then the process could not fork. Querying it in `for_tensor` would cost every call and add a
    branch to every trace.
    """
    global _gpu_capability
    _gpu_capability = torch.cuda.get_device_capability()
    if not native.built_for(_gpu_capability):
        set_backend(setting)


def set_backend(name: str) -> None:
    """Choose the backend of all later calls in this process.

    `"auto"` (the default) uses the compiled extension if it has kernels for the tensors' device (and was built for this
    GPU), else Triton (on a GPU), else the reference, with a warning. `"reference"` is plain PyTorch: slow, but twice
    differentiable and available on any device. `"native"` and `"triton"` are strict: a tensor on a CPU or CUDA device
    for which they have no kernels raises RuntimeError. Tensors on any other device are served by the reference under
    every setting.

    Raises ValueError for an unknown name, and RuntimeError, with the reason, for a backend that is not available.
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
    backends = {device_type: serve(name, device_type) for device_type in DEVICES}
    setting = name
    serving.clear()
    serving.update({device_type: backend for device_type, backend in backends.items() if backend is not None})
    native_on = [device_type for device_type, backend in serving.items() if backend.name == "native"]
    fast_path = importlib.import_module("fastvae._C").fast_path if "cpu" in native_on else None
    if fast_path is not None:
        fast_path.serve_cuda("cuda" in native_on)


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Call `set_backend(name)` for the duration of a `with` block, and restore the previous setting afterwards.

    The setting belongs to the process, not to the thread.
    """
    previous = setting
    set_backend(name)
    try:
        yield
    finally:
        set_backend(previous)


def empty_cache() -> int:
    """Release the memory that the native CPU kernels keep for their next results.

    Results of 1 MiB and more are written into buffers that are reused; up to 512 MiB of unused buffers are kept,
    because the page faults of a fresh buffer cost more time than the kernel that fills it. Returns the number of bytes
    released.
    """
    if available.load("native") is None:
        return 0
    return int(importlib.import_module("fastvae._C").empty_buffer_pool())


def with_kernel(op: str, device_type: str) -> Backend | None:
    """The backend that serves an op on a device type under the current setting. None if there is none, or only the
    reference as a fallback of "auto"."""
    backend = serving.get(device_type)
    if backend is None or (backend.name, device_type) not in OPS_LACKING.get(op, ()):
        return backend
    return serve("triton", device_type) if setting == "auto" and device_type == "cuda" else None


def for_tensor(tensor: Tensor, likelihood: str = "", op: str = "nll") -> Backend:
    """The backend that serves tensors on this tensor's device and has a kernel for the likelihood and the op."""
    device_type = tensor.device.type
    backend = serving.get(device_type)
    if backend is None:
        return _without_backend(device_type)
    place = (backend.name, device_type)
    if likelihood in LIKELIHOODS_LACKING.get(place, ()) or place in OPS_LACKING.get(op, ()):
        backend = _substitute(*place, likelihood, op)
    # Compiled ops do not support these. torch's own message for a transform does not name a solution, and forward-mode
    # AD would silently lose the tangent.
    if (
        not torch.compiler.is_compiling()
        and (transform_level() is not None or forward_ad._current_level >= 0)
        and backend is not REFERENCE
    ):
        raise RuntimeError(
            f"fastvae: backend {backend.name!r} does not support torch.func transforms and forward-mode AD; use the "
            f'reference for them: with fastvae.use_backend("reference"): ...'
        )
    return backend


def _without_backend(device_type: str) -> Backend:
    """The reference, with a warning, or an error if the setting requires another backend."""
    global _no_backend_warned
    if device_type not in DEVICES:
        return REFERENCE
    if setting != "auto":
        raise RuntimeError(
            f"fastvae: backend {setting!r} has no kernels for {device_type} tensors: "
            f"{available.reason(setting, device_type)}; fastvae.set_backend('auto') uses what is available"
        )
    # A warning cannot be traced, so compiled code gets the reference silently (and the compiler fuses it).
    # is_compiling() comes first, so that a trace does not depend on `_no_backend_warned`.
    if not torch.compiler.is_compiling() and not _no_backend_warned:
        _no_backend_warned = True
        reasons = [available.reason("native", device_type)]
        if device_type == "cuda":
            reasons.append(f"Triton: {available.reason('triton', device_type)}")
        warn(
            f"fastvae uses its pure-PyTorch reference for {device_type} tensors, which is slow "
            f"(fastvae.set_backend('reference') silences this warning): {'; '.join(reasons)}",
            RuntimeWarning,
        )
    return REFERENCE


def _substitute(name: str, device_type: str, likelihood: str, op: str) -> Backend:
    """The backend that replaces one that has no kernel for the likelihood or the op."""
    subject = f"the likelihood {likelihood!r}"
    if op == "nll_elements":
        subject = f"the elements of {subject}"
    elif op == "gaussian_mixture_log_prob":
        subject = "mixtures of Gaussians"
    if setting != "auto":
        raise RuntimeError(
            f"fastvae: backend {name!r} has no kernel for {subject} on {device_type} tensors; "
            f"fastvae.set_backend('auto') uses what is available"
        )
    # An op that the CUDA kernels lack has a kernel in Triton, but a likelihood may have neither.
    lacks = LIKELIHOODS_LACKING.get(("triton", "cuda"), ())
    if (name, device_type) == ("native", "cuda") and likelihood not in lacks:
        triton = serve("triton", "cuda")
        if triton is not None:
            return triton
    if not torch.compiler.is_compiling() and subject not in _fallbacks_warned:
        _fallbacks_warned.add(subject)
        warn(
            f"fastvae uses its pure-PyTorch reference for {subject}, which is slow "
            f"(fastvae.set_backend('reference') silences this warning): there is no kernel for it on {device_type} "
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
