"""Load the backends, choose one for a tensor, and say what is there and what is missing.

A backend is three functions of fixed positional signatures (`Backend` below). There are three:

- "reference": `fastvae.reference`, plain PyTorch, always there, any device;
- "native": the compiled extension `fastvae._C`, whose ops live in `torch.ops.fastvae`;
- "triton": `fastvae._triton`, whose ops live in `torch.ops.fastvae_triton`.

The choice is made once, in the forward call, by the device of the tensors; a backward belongs to the op that ran
forward. State is plain module-level data, so that torch.compile can trace through it (and recompiles when it changes).
"""

import importlib
import importlib.metadata
import importlib.util
import platform
import re
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import reference

NAMES = ("auto", "reference", "native", "triton")
OPS = ("reparameterize_kl", "gaussian_kl", "nll")

_BUILD = "pip install --no-build-isolation -e . (in a clone of fastvae)"
_TRITON = 'pip install -U "triton>=3.6"'
# None outside of torch.func's transforms.
_transform_level = torch._C._functorch.maybe_current_level
# Tensors of every other device type go to the reference, whatever the setting.
_DEVICES = {"cpu": "CPU", "cuda": "CUDA"}


class Backend(NamedTuple):
    """The functions of one backend, called with positional arguments:

    reparameterize_kl(mu, logvar, prior_mu, prior_logvar, samples, seed, row_offset, eps, generator) -> (z, kl)
    gaussian_kl(mu, logvar, prior_mu, prior_logvar, per_element) -> kl
    nll(likelihood, params, target, constants, kl, beta, reduction) -> (loss, nll)
    """

    name: str
    reparameterize_kl: Callable[..., Any]
    gaussian_kl: Callable[..., Any]
    nll: Callable[..., Any]


# ---------------------------------------------------------------------------------------------------------------------
# Load
# ---------------------------------------------------------------------------------------------------------------------


def _reference_reparameterize_kl(
    mu: Tensor,
    logvar: Tensor,
    prior_mu: Tensor | None,
    prior_logvar: Tensor | None,
    samples: int | None,
    seed: Tensor | None,
    row_offset: int,
    eps: Tensor | None,
    generator: torch.Generator | None,
) -> tuple[Tensor, Tensor]:
    return reference.reparameterize_kl(
        mu,
        logvar,
        prior_mu,
        prior_logvar,
        samples=samples,
        generator=generator,
        seed=seed,
        row_offset=row_offset,
        eps=eps,
    )


def _reference_gaussian_kl(
    mu: Tensor, logvar: Tensor, prior_mu: Tensor | None, prior_logvar: Tensor | None, per_element: bool
) -> Tensor:
    reduction = "none" if per_element else "event"
    return reference.gaussian_kl(mu, logvar, prior_mu, prior_logvar, reduction=reduction)


_reference = Backend("reference", _reference_reparameterize_kl, _reference_gaussian_kl, reference.nll)


class _Missing(Exception):
    """Why a backend cannot be loaded: one sentence, with the command that mends it."""


def _ops_backend(name: str, namespace: str) -> Backend:
    ops = getattr(torch.ops, namespace)
    # The overload itself: one step less per call than asking the overload packet to pick it.
    return Backend(name, *(getattr(ops, op).default for op in OPS))


def _build_info() -> Any:
    """What setup.py wrote when it built the extension, or None."""
    try:
        return importlib.import_module("fastvae._build_info")
    except ImportError:
        return None


def _minor(version: str) -> str:
    return ".".join(version.split(".")[:2])


def _major(version: str | None) -> str:
    return (version or "").partition(".")[0]


def _load_native() -> Backend:
    built = _build_info()
    if built is not None:
        # Compared first, because an extension built for another torch or Python fails to load with a message about
        # symbols that tells a user nothing.
        if _minor(built.TORCH_VERSION) != _minor(torch.__version__):
            raise _Missing(
                f"the extension was built for torch {built.TORCH_VERSION} and this is torch {torch.__version__}; "
                f"rebuild it with: {_BUILD}"
            )
        if _minor(built.PYTHON_VERSION) != _minor(platform.python_version()):
            raise _Missing(
                f"the extension was built for Python {built.PYTHON_VERSION} and this is Python "
                f"{platform.python_version()}; rebuild it with: {_BUILD}"
            )
        cuda = getattr(built, "CUDA_VERSION", None)
        if cuda is not None and _major(cuda) != _major(torch.version.cuda):
            raise _Missing(
                f"the extension was built for CUDA {cuda} and this torch ({torch.__version__}) is for "
                f"{f'CUDA {torch.version.cuda}' if torch.version.cuda else 'no CUDA'}; rebuild it with: {_BUILD}"
            )
    try:
        importlib.import_module("fastvae._C")
    except ModuleNotFoundError as error:
        if error.name != "fastvae._C":
            raise _Missing(f"importing the extension failed ({error}); rebuild it with: {_BUILD}") from error
        raise _Missing(f"the compiled extension is not installed; build it with: {_BUILD}") from error
    except (ImportError, OSError) as error:
        first_line = str(error).partition("\n")[0]
        raise _Missing(f"importing the extension failed ({first_line}); rebuild it with: {_BUILD}") from error
    return _ops_backend("native", "fastvae")


def _load_triton() -> Backend:
    try:
        importlib.import_module("fastvae._triton")
    except (ImportError, OSError) as error:
        first_line = str(error).partition("\n")[0]
        if getattr(error, "name", None) == "triton":  # missing or too old: the message is complete
            raise _Missing(first_line) from error
        raise _Missing(f"importing its kernels failed ({first_line}); try: {_TRITON}") from error
    return _ops_backend("triton", "fastvae_triton")


_LOADERS = {"native": _load_native, "triton": _load_triton}
_NAMESPACES = {"native": "fastvae", "triton": "fastvae_triton"}

_loaded: dict[str, Backend] = {"reference": _reference}
_missing: dict[str, str] = {}  # backend name -> the reason


def _load(name: str) -> Backend | None:
    """The named backend, loaded at the first request; None leaves its reason in `_missing`."""
    if name not in _loaded and name not in _missing:
        try:
            _loaded[name] = _LOADERS[name]()
        except _Missing as missing:
            _missing[name] = str(missing)
    return _loaded.get(name)


def _has_kernels(name: str, device_type: str) -> bool:
    """Whether a loaded backend of ops has every kernel for a device type."""
    has_kernel, prefix = torch._C._dispatch_has_kernel_for_dispatch_key, _NAMESPACES[name]
    return all(has_kernel(f"{prefix}::{op}_forward", _DEVICES[device_type]) for op in OPS)


# ---------------------------------------------------------------------------------------------------------------------
# Choose
# ---------------------------------------------------------------------------------------------------------------------

# Likelihoods that a backend has no kernel for on a type of device. "auto" takes the next one that has.
_COUNTS = (
    "negative_binomial",
    "zero_inflated_negative_binomial",
    "negative_binomial_logits",
    "zero_inflated_negative_binomial_logits",
)
_LACKS: dict[tuple[str, str], tuple[str, ...]] = {
    ("native", "cuda"): _COUNTS,
}

_setting = "auto"
_told: set[str] = set()  # likelihoods whose fallback was warned of
_gpu: tuple[int, int] | None = None  # its compute capability; see `_meet_gpu`
_serving: dict[str, Backend] = {}  # device type -> backend under the current setting, where one was found
# Where the native backend serves CPU tensors: the ops for calls as a training loop makes them, checks included. They
# return None for whatever is not plain and fitting, and are not for torch.compile to trace.
plain: Any = None
_warned = False


def _serve(name: str, device_type: str) -> Backend | None:
    """The backend that setting `name` gives to a device type; None where it has none (for "auto": a fast one)."""
    if name == "reference":
        return _reference
    for candidate in ("native", "triton") if name == "auto" else (name,):
        # Triton takes a while to import and serves GPUs: "auto" asks for it only where this torch has one.
        wanted = (
            name != "auto" or candidate != "triton" or (device_type == "cuda" and torch.cuda.is_available())
        )
        if not wanted:
            continue
        backend = _load(candidate)
        if backend is None or not _has_kernels(candidate, device_type):
            continue
        if (candidate, device_type) == ("native", "cuda") and _gpu is not None and not _built_for(_gpu):
            continue
        return backend
    return None


def _meet_gpu() -> None:
    """Look whether the extension's CUDA kernels run on this GPU, and choose anew where they do not.

    Torch calls it when it initialises CUDA, before there is a CUDA tensor: to ask at import would be to initialise it,
    and then the process could not fork; to ask in `choose`, a step more in every call and a branch in every trace.
    """
    global _gpu
    _gpu = torch.cuda.get_device_capability()
    if not _built_for(_gpu):
        set_backend(_setting)


def set_backend(name: str) -> None:
    """Choose the backend of all later calls in this process.

    `"auto"` (the default) takes the compiled extension where it has kernels for the tensors' device (and was built for
    this GPU), else Triton (on a GPU), else the reference, which warns once. `"reference"` is plain PyTorch: slow,
    differentiable twice, any device. `"native"` and `"triton"` insist: a tensor on a CPU or a CUDA device that they
    have no kernels for is a RuntimeError. Tensors on any other device are served by the reference under every setting.

    Raises ValueError for an unknown name and RuntimeError, with the reason, for a backend that is not there.
    """
    global _setting, plain
    if name not in NAMES:
        raise ValueError(
            f"fastvae.set_backend: `name` must be one of {', '.join(map(repr, NAMES))}, got {name!r}"
        )
    if name not in ("auto", "reference") and _load(name) is None:
        raise RuntimeError(f"fastvae.set_backend: backend {name!r} is not available: {_missing[name]}")
    serving = {device_type: _serve(name, device_type) for device_type in _DEVICES}
    _setting = name
    _serving.clear()
    _serving.update({device_type: backend for device_type, backend in serving.items() if backend is not None})
    native = "cpu" in _serving and _serving["cpu"].name == "native"
    plain = importlib.import_module("fastvae._C").plain if native else None


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """`set_backend(name)` for the length of a `with` block; what was set before comes back, also after an exception.

    The setting belongs to the process, not to the thread.
    """
    before = _setting
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
    if _load("native") is None:
        return 0
    return int(importlib.import_module("fastvae._C").empty_buffer_pool())


def choose(tensor: Tensor, likelihood: str = "") -> Backend:
    """The backend that serves tensors on this tensor's device, of those that have a kernel for the likelihood."""
    device_type = tensor.device.type
    backend = _serving.get(device_type)
    if backend is None:
        return _unserved(device_type)
    if likelihood in _LACKS.get((backend.name, device_type), ()):
        backend = _instead(backend.name, device_type, likelihood)
    # Compiled ops cannot cross these: torch's own message for a transform names no way out, and forward-mode AD would
    # get no tangent at all, in silence.
    if (
        not torch.compiler.is_compiling()
        and (_transform_level() is not None or forward_ad._current_level >= 0)
        and backend is not _reference
    ):
        raise RuntimeError(
            f"fastvae: torch.func transforms and forward-mode AD cannot cross backend {backend.name!r}; differentiate "
            f'the reference: with fastvae.use_backend("reference"): ...'
        )
    return backend


def _unserved(device_type: str) -> Backend:
    global _warned
    if device_type not in _DEVICES:
        return _reference
    if _setting != "auto":
        raise RuntimeError(
            f"fastvae: backend {_setting!r} has no kernels for {device_type} tensors: "
            f"{_reason(_setting, device_type)}; fastvae.set_backend('auto') takes what there is"
        )
    # A warning cannot be traced; compiled code gets the reference silently (and fused by the compiler). This order,
    # so that a trace does not depend on `_warned`.
    if not torch.compiler.is_compiling() and not _warned:
        _warned = True
        reasons = [_reason("native", device_type)]
        if device_type == "cuda":
            reasons.append(f"Triton: {_reason('triton', device_type)}")
        warn(
            f"fastvae runs {device_type} tensors on its pure-PyTorch reference, which is slow "
            f"(fastvae.set_backend('reference') accepts that silently): {'; '.join(reasons)}",
            RuntimeWarning,
        )
    return _reference


def _instead(name: str, device_type: str, likelihood: str) -> Backend:
    if _setting != "auto":
        raise RuntimeError(
            f"fastvae: backend {name!r} has no kernel for the likelihood {likelihood!r} on {device_type} tensors; "
            f"fastvae.set_backend('auto') takes what there is"
        )
    if name == "native" and device_type == "cuda":
        triton = _serve("triton", "cuda")
        if triton is not None:
            return triton
    if not torch.compiler.is_compiling() and likelihood not in _told:
        _told.add(likelihood)
        warn(
            f"fastvae runs the likelihood {likelihood!r} on its pure-PyTorch reference, which is slow "
            f"(fastvae.set_backend('reference') accepts that silently): there is no kernel for it on {device_type} "
            "tensors yet",
            RuntimeWarning,
        )
    return _reference


def warn(message: str, category: type[Warning]) -> None:
    """`warnings.warn` at the line of the user's that called, however many frames of ours and torch's lie between."""
    frame, level = sys._getframe(1), 2
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] in (
        "fastvae",
        "torch",
    ):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, category, stacklevel=level)


# ---------------------------------------------------------------------------------------------------------------------
# Diagnose
# ---------------------------------------------------------------------------------------------------------------------


def _reason(name: str, device_type: str) -> str:
    """Why a backend does not serve a device type, and the command that mends it."""
    if _load(name) is None:
        return _missing[name]
    if device_type == "cuda" and torch.version.cuda is None and torch.version.hip is None:
        return "this torch was built without CUDA; get one that has it from: https://pytorch.org/get-started"
    if device_type == "cuda" and not torch.cuda.is_available():
        return "torch sees no GPU; see what it says to: https://pytorch.org/get-started"
    if name == "native" and device_type == "cuda":
        if torch.version.cuda is None:
            return "its GPU kernels are for NVIDIA's; Triton's serve AMD's as well"
        if not _has_kernels(name, device_type):
            return f"the extension was built without CUDA kernels; build them with: FASTVAE_CUDA=1 {_BUILD}"
        built, capability = _build_info(), torch.cuda.get_device_capability()
        if capability < (8, 0):
            return (
                f"its CUDA kernels need compute capability 8.0 and this GPU has {capability[0]}.{capability[1]}; "
                "Triton's serve it"
            )
        return (
            f"it was built for compute capability {', '.join(built.CUDA_ARCHES)} and this GPU has "
            f"{capability[0]}.{capability[1]}; build for it with: TORCH_CUDA_ARCH_LIST="
            f"{capability[0]}.{capability[1]} {_BUILD}"
        )
    return (
        "its kernels are for GPUs" if name == "triton" else f"its kernels are not for {device_type} tensors"
    )


def _built_for(capability: tuple[int, int]) -> bool:
    """Whether the extension's CUDA kernels run on a GPU: as machine code of its generation or PTX of an older one."""
    arches = getattr(_build_info(), "CUDA_ARCHES", ())
    for arch in arches:
        if found := re.fullmatch(r"(\d+)\.(\d)(\+PTX)?", arch):
            built = int(found[1]), int(found[2])
            if built <= capability and (found[3] or built[0] == capability[0]):
                return True
        else:
            return True  # a name of torch's, "Hopper" or "native", or code for one GPU alone: "9.0a"
    return not arches


def _serves(name: str, device_type: str) -> bool:
    """What `_has_kernels` tells, and whether this machine's GPU can run them."""
    if not _has_kernels(name, device_type):
        return False
    if device_type != "cuda":
        return True
    if not torch.cuda.is_available():
        return False
    return name != "native" or _built_for(torch.cuda.get_device_capability())


def _version(distribution: str) -> str:
    # From the metadata: importing triton takes long, and its interpreter must be asked for before its first import.
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def show_config() -> str:
    """What runs here, as text to print: versions, which backend serves which op on which device, and what is missing.

    Like `torch.__config__.show()`, it returns the text: `print(fastvae.show_config())`, or `fastvae doctor`.
    """
    from . import __version__

    built = _build_info()
    native = _load("native") is not None
    lines = [
        f"fastvae {__version__}",
        f"  python        {platform.python_version()}",
        f"  torch         {torch.__version__} (CUDA {torch.version.cuda or 'none'})",
        f"  numpy         {_version('numpy')}",
        f"  triton        {_version('triton')}",
    ]
    if built is None:
        lines.append("  extension     " + ("loaded, no build record" if native else "not built"))
    else:
        lines += [
            f"  extension     {'loaded' if native else 'not loaded'}",
            f"  built for     torch {built.TORCH_VERSION}, Python {built.PYTHON_VERSION}",
            f"  CPU kernels   {', '.join(built.CPU_CAPABILITIES) or 'none'}",
            f"  CUDA kernels  {', '.join(built.CUDA_ARCHES) or 'none'} (CUDA {built.CUDA_VERSION or 'none'})",
        ]
    if native:
        lines.append(f"  CPU in use    {importlib.import_module('fastvae._C').cpu_capability()}")
    lines.append(f"  threads       {torch.get_num_threads()}")
    lines.append(f"  GPU           {torch.cuda.get_device_name() if torch.cuda.is_available() else 'none'}")

    lines += [
        "",
        f"backend {_setting!r} serves",
        f"  {'':20}" + "".join(f"{d:14}" for d in (*_DEVICES, "other")),
    ]
    served = []
    for device_type in _DEVICES:
        backend = _serving.get(device_type)
        served.append(
            backend.name if backend is not None else "reference" if _setting == "auto" else "(none)"
        )
    served.append("reference")
    lines += [f"  {op:20}" + "".join(f"{name:14}" for name in served) for op in OPS]

    absent = []
    for name in ("native", "triton"):
        if _load(name) is None:
            absent.append(f"  {name}: {_missing[name]}")
        else:
            absent += [
                f"  {name} on {device_type}: {_reason(name, device_type)}"
                for device_type in _DEVICES
                if not _serves(name, device_type)
            ]
    absent += [
        f"  {name} on {device_type}: no kernel yet for {', '.join(names)}"
        for (name, device_type), names in _LACKS.items()
        if _load(name) is not None and _serves(name, device_type)
    ]
    if absent:
        lines += ["", "missing", *absent]
    return "\n".join(line.rstrip() for line in lines)


set_backend("auto")
if "native" in _loaded and _has_kernels("native", "cuda"):
    if torch.cuda.is_initialized():
        _meet_gpu()
    else:
        torch.cuda._lazy_call(_meet_gpu)
