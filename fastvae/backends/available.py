"""Which backends are there, and why the others are not."""

import torch

from . import native, triton
from .base import DEVICES, OPS, OPS_LACKING, Backend, Missing
from .reference import REFERENCE

LOADERS = {"native": native.load, "triton": triton.load}
NAMESPACES = {"native": "fastvae", "triton": "fastvae_triton"}

loaded: dict[str, Backend] = {"reference": REFERENCE}
missing: dict[str, str] = {}  # backend name -> the reason


def load(name: str) -> Backend | None:
    """The named backend, loaded at the first request; None leaves its reason in `missing`."""
    if name not in loaded and name not in missing:
        try:
            loaded[name] = LOADERS[name]()
        except Missing as why:
            missing[name] = str(why)
    return loaded.get(name)


def has_kernels(name: str, device_type: str) -> bool:
    """Whether a loaded backend of ops has every kernel for a device type, but those that it is known to lack."""
    has_kernel, prefix = torch._C._dispatch_has_kernel_for_dispatch_key, NAMESPACES[name]
    ops = [op for op in OPS if (name, device_type) not in OPS_LACKING.get(op, ())]
    return all(has_kernel(f"{prefix}::{op}_forward", DEVICES[device_type]) for op in ops)


def serves(name: str, device_type: str) -> bool:
    """What `has_kernels` tells, and whether this machine's GPU can run them."""
    if not has_kernels(name, device_type):
        return False
    if device_type != "cuda":
        return True
    if not torch.cuda.is_available():
        return False
    return name != "native" or native.built_for(torch.cuda.get_device_capability())


def reason(name: str, device_type: str) -> str:
    """Why a backend does not serve a device type, and the command that mends it."""
    if load(name) is None:
        return missing[name]
    if device_type == "cuda" and torch.version.cuda is None and torch.version.hip is None:
        return "this torch was built without CUDA; get one that has it from: https://pytorch.org/get-started"
    if device_type == "cuda" and not torch.cuda.is_available():
        return "torch sees no GPU; see what it says to: https://pytorch.org/get-started"
    if name == "native" and device_type == "cuda":
        if torch.version.cuda is None:
            return "its GPU kernels are for NVIDIA's; Triton's serve AMD's as well"
        if not has_kernels(name, device_type):
            return f"the extension was built without CUDA kernels; build them with: FASTVAE_CUDA=1 {native.BUILD}"
        built, capability = native.build_info(), torch.cuda.get_device_capability()
        if capability < (8, 0):
            return (
                f"its CUDA kernels need compute capability 8.0 and this GPU has {capability[0]}.{capability[1]}; "
                "Triton's serve it"
            )
        return (
            f"it was built for compute capability {', '.join(built.CUDA_ARCHES)} and this GPU has "
            f"{capability[0]}.{capability[1]}; build for it with: TORCH_CUDA_ARCH_LIST="
            f"{capability[0]}.{capability[1]} {native.BUILD}"
        )
    return (
        "its kernels are for GPUs" if name == "triton" else f"its kernels are not for {device_type} tensors"
    )
