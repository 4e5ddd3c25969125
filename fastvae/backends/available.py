"""Which backends are available, and why the others are not."""

import torch

from . import native, triton
from .base import DEVICES, OPS, OPS_LACKING, Backend, Missing
from .reference import REFERENCE

LOADERS = {"native": native.load, "triton": triton.load}
NAMESPACES = {"native": "fastvae", "triton": "fastvae_triton"}

loaded: dict[str, Backend] = {"reference": REFERENCE}
missing: dict[str, str] = {}  # backend name -> why it could not be loaded


def load(name: str) -> Backend | None:
    """Load the backend at the first request. If this fails, return None and keep the reason in `missing`."""
    if name not in loaded and name not in missing:
        try:
            loaded[name] = LOADERS[name]()
        except Missing as error:
            missing[name] = str(error)
    return loaded.get(name)


def has_kernels(name: str, device_type: str) -> bool:
    """Whether a backend has all kernels for a device type, except those that it is known to lack."""
    has_kernel, prefix = torch._C._dispatch_has_kernel_for_dispatch_key, NAMESPACES[name]
    ops = [op for op in OPS if (name, device_type) not in OPS_LACKING.get(op, ())]
    return all(has_kernel(f"{prefix}::{op}_forward", DEVICES[device_type]) for op in ops)


def serves(name: str, device_type: str) -> bool:
    """Whether a backend has the kernels for a device type, and this machine's GPU can run them."""
    if not has_kernels(name, device_type):
        return False
    if device_type != "cuda":
        return True
    if not torch.cuda.is_available():
        return False
    return name != "native" or native.built_for(torch.cuda.get_device_capability())


def reason(name: str, device_type: str) -> str:
    """Why a backend does not serve a device type, with the command that fixes it."""
    if load(name) is None:
        return missing[name]
    if device_type == "cuda" and torch.version.cuda is None and torch.version.hip is None:
        return "this torch was built without CUDA; install one with CUDA from https://pytorch.org/get-started"
    if device_type == "cuda" and not torch.cuda.is_available():
        return "torch sees no GPU; see https://pytorch.org/get-started for what it needs"
    if name == "native" and device_type == "cuda":
        if torch.version.cuda is None:
            return "its GPU kernels are for NVIDIA GPUs; Triton's kernels serve AMD GPUs as well"
        if not has_kernels(name, device_type):
            return f"the extension was built without CUDA kernels; build them with: FASTVAE_CUDA=1 {native.BUILD}"
        built, capability = native.build_info(), torch.cuda.get_device_capability()
        if capability < (8, 0):
            return (
                f"its CUDA kernels need compute capability 8.0 but this GPU has {capability[0]}.{capability[1]}; "
                "Triton's kernels serve it"
            )
        return (
            f"it was built for compute capability {', '.join(built.CUDA_ARCHES)} but this GPU has "
            f"{capability[0]}.{capability[1]}; build it for this GPU with: TORCH_CUDA_ARCH_LIST="
            f"{capability[0]}.{capability[1]} {native.BUILD}"
        )
    return (
        "its kernels are for GPUs" if name == "triton" else f"its kernels are not for {device_type} tensors"
    )
