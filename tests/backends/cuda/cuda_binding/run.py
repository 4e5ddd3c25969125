"""Runs pytest in a process whose native backend is binding.cpp: `run.py BINDING KERNELS [arguments of pytest]`."""

import ctypes
import sys
import types

import pytest
import torch

if __name__ == "__main__":
    binding, kernels, *arguments = sys.argv[1:]
    torch.ops.load_library(binding)
    extension = types.ModuleType("fastvae._C")
    extension.cpu_capability = lambda: "none"  # type: ignore[attr-defined]
    extension.empty_buffer_pool = lambda: 0  # type: ignore[attr-defined]
    extension.fast_path = None  # type: ignore[attr-defined]  # every call takes the way of CUDA tensors, past that short cut
    for name in ("set_capturing", "destroy_graph", "memsets"):
        setattr(extension, name, getattr(ctypes.CDLL(binding), name))
    extension.launches = ctypes.CDLL(kernels).launches  # type: ignore[attr-defined]
    sys.modules["fastvae._C"] = extension
    import fastvae
    from fastvae.backends.base import OPS_LACKING

    for op, places in OPS_LACKING.items():  # as of CUDA tensors
        OPS_LACKING[op] = (*places, *(("native", "cpu"),) * (("native", "cuda") in places))
    fastvae.set_backend("auto")
    torch.use_deterministic_algorithms(True)  # fills new tensors with NaN
    sys.exit(pytest.main(arguments))
