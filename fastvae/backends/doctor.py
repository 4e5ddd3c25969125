"""Report which backends run here and what is missing, for `fastvae doctor`."""

import importlib.metadata
import platform

import torch

from .._version import __version__
from . import available, choose, native
from .base import DEVICES, OPS


def _version(distribution: str) -> str:
    # Read from the metadata: importing triton is slow, and its interpreter must be enabled before the first import.
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _serving_backend(op: str, device_type: str) -> str:
    """The name of the backend that serves an op on a device type."""
    backend = choose.with_kernel(op, device_type)
    if backend is not None:
        return backend.name
    return "reference" if choose.setting == "auto" else "(none)"


def show_config() -> str:
    """Describe the installation: versions, which backend serves which op on which device, and what is missing.

    Like `torch.__config__.show()`, this returns the text. Print it with `print(fastvae.show_config())`, or run
    `fastvae doctor`.
    """
    built = native.build_info()
    loaded = available.load("native") is not None
    lines = [
        f"fastvae {__version__}",
        f"  python        {platform.python_version()}",
        f"  torch         {torch.__version__} (CUDA {torch.version.cuda or 'none'})",
        f"  numpy         {_version('numpy')}",
        f"  triton        {_version('triton')}",
    ]
    if built is None:
        lines.append("  extension     " + ("loaded, no build record" if loaded else "not built"))
    elif hasattr(built, "WHY_PURE"):
        lines.append("  extension     not built")
    else:
        lines += [
            f"  extension     {'loaded' if loaded else 'not loaded'}",
            f"  built for     torch {built.TORCH_VERSION}, Python {built.PYTHON_VERSION}",
            f"  CPU kernels   {', '.join(built.CPU_CAPABILITIES) or 'none'}",
            f"  CUDA kernels  {', '.join(built.CUDA_ARCHES) or 'none'} (CUDA {built.CUDA_VERSION or 'none'})",
        ]
    if loaded:
        lines.append(f"  CPU in use    {importlib.import_module('fastvae._C').cpu_capability()}")
    lines.append(f"  threads       {torch.get_num_threads()}")
    lines.append(f"  GPU           {torch.cuda.get_device_name() if torch.cuda.is_available() else 'none'}")

    lines += [
        "",
        f"backend {choose.setting!r} serves",
        f"  {'':28}" + "".join(f"{d:14}" for d in (*DEVICES, "other")),
    ]
    for op in OPS:
        served = [*(_serving_backend(op, device_type) for device_type in DEVICES), "reference"]
        lines.append(f"  {op:28}" + "".join(f"{name:14}" for name in served))

    missing = []
    for name in ("native", "triton"):
        if available.load(name) is None:
            missing.append(f"  {name}: {available.missing[name]}")
        else:
            missing += [
                f"  {name} on {device_type}: {available.reason(name, device_type)}"
                for device_type in DEVICES
                if not available.serves(name, device_type)
            ]
    missing += [
        f"  {name} on {device_type}: no kernel yet for {', '.join(names)}"
        for (name, device_type), names in choose.LIKELIHOODS_LACKING.items()
        if available.load(name) is not None and available.serves(name, device_type)
    ]
    if missing:
        lines += ["", "missing", *missing]
    return "\n".join(line.rstrip() for line in lines)
