"""Checks of a CUDA build without a GPU: `make cuda-link` runs this with the extension on its path.

The extension loads, its CPU kernels run, every op has its CUDA kernel and its fake kernel, fake CUDA tensors go through
forward and backward with the right shapes, dtypes and devices, and the binary has machine code for every requested GPU,
of every kernel in csrc/cuda.
"""

import importlib
import re
import subprocess
from pathlib import Path

import torch
from torch._subclasses import FakeTensorMode

import fastvae
from fastvae import _build_info
from fastvae._spec import VARIANTS
from fastvae.backends import OPS, choose
from fastvae.backends.base import CPU_OPS, OPS_LACKING
from fastvae.reference import REDUCTIONS


def has_kernel(op: str, key: str) -> bool:
    return torch._C._dispatch_has_kernel_for_dispatch_key(op, key)


def check_kernels() -> int:
    extension = importlib.import_module("fastvae._C").__file__
    assert Path(extension).parents[1] == Path.cwd(), f"{extension} is not of this tree"
    ops = [name for name in torch._C._dispatch_get_all_op_names() if name.startswith("fastvae::")]
    # The ops that users call pass their arguments on to the others.
    working = [op for op in ops if re.search("_(forward|backward_?|gradient)$", op)]
    assert len(ops) == len(working) + len(OPS) + len(CPU_OPS), ops
    lacking = (*CPU_OPS, *(op for op, places in OPS_LACKING.items() if ("native", "cuda") in places))
    for op in working:
        if op.removeprefix("fastvae::").startswith(lacking):
            continue
        for key in ("CUDA", "CPU", "Meta"):
            assert has_kernel(op, key), f"{op} has no kernel for {key}"
    for op in OPS:
        assert has_kernel(f"fastvae::{op}", "Autograd"), f"{op} has no autograd for CUDA"
    fastvae.set_backend("native")
    logits, target = torch.randn(5, 33), torch.rand(5, 33)
    expected = fastvae.reference.bernoulli_nll(logits, target)
    torch.testing.assert_close(fastvae.functional.bernoulli_nll(logits, target), expected)
    assert choose.serving["cuda"].name == "native"
    assert not [v.name for v in VARIANTS.values() if ("native", "cuda") in v.lacks]
    return len(working)


def check_fakes() -> int:
    """Forwards use the public functions and backwards the ops, because the autograd engine itself needs a GPU."""
    count = 0

    def expect(tensor: torch.Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        nonlocal count
        found = (tuple(tensor.shape), tensor.dtype, tensor.device.type)
        assert found == (shape, dtype, "cuda"), f"{found} where {(shape, dtype, 'cuda')} belongs"
        count += 1

    ops = torch.ops.fastvae
    with FakeTensorMode(allow_non_fake_inputs=True):
        for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
            rows = torch.float64 if dtype == torch.float64 else torch.float32
            mu, logvar, recon = (
                torch.empty(shape, dtype=dtype, device="cuda", requires_grad=True)
                for shape in ((6, 20), (6, 20), (6, 3, 8, 8))
            )
            x = torch.empty(6, 3, 8, 8, dtype=torch.uint8, device="cuda")
            for samples, shape in ((None, (6, 20)), (4, (4, 6, 20))):
                z, kl = fastvae.functional.reparameterize_kl(mu, logvar, samples=samples)
                expect(z, shape, dtype)
                expect(kl, (6,), rows)
                seed = torch.empty(2, dtype=torch.int64, device="cuda")
                for gradient in ops.reparameterize_kl_backward(
                    z, kl, mu, logvar, None, None, "logvar", [], None, samples, seed, 0, None, 3
                ):
                    expect(gradient, (6, 20), dtype)
            expect(fastvae.functional.gaussian_kl(mu, logvar), (6,), rows)
            expect(fastvae.functional.gaussian_kl(mu, logvar, reduction="none"), (6, 20), rows)
            beta, scale = (torch.empty((), dtype=kind, device="cuda") for kind in (torch.float32, dtype))
            head = torch.cat((recon, recon), 1)
            mixture = torch.cat((head, head, head, recon[:, :2]), 1)  # for two inputs
            for reduction in REDUCTIONS.values():
                for name, params, constants in (
                    ("bernoulli", [recon], []),
                    ("gaussian", [recon], [0.5]),
                    ("gaussian_learned", [recon, scale], []),
                    ("gaussian_per_element", [recon, recon], []),
                    ("gaussian_head", [head], []),
                    ("gaussian_bounded_head", [head], [-12.0, 2.0]),
                    ("discretized_logistic", [head], [8.0, -7.0, 1e-5]),
                    ("discretized_logistic_mixture", [mixture], [2.0, 8.0, -7.0, 1e-5]),
                ):
                    loss, nll = fastvae.functional.loss.nll(name, params, x, constants, kl, beta, reduction)
                    expect(loss, (6,) if reduction == REDUCTIONS["none"] else (), rows)
                    expect(nll, (6,), rows)
                    scaled = ops.nll_backward(loss, None, params[:1], nll, kl, beta, 6, reduction, True, True)
                    shapes = ((tuple(params[0].shape), dtype), ((), rows), ((6,), rows), ((), torch.float32))
                    for gradient, (shape, kind) in zip(scaled, shapes, strict=True):
                        expect(gradient, shape, kind)
            # Counts, the values of elements, draws with their densities and mixtures of Gaussians have kernels of their
            # own.
            genes = torch.empty(6, 300, dtype=dtype, device="cuda", requires_grad=True)
            counts = torch.empty(6, 300, dtype=torch.int32, device="cuda")
            per_feature = torch.empty(300, dtype=dtype, device="cuda", requires_grad=True)
            library = torch.empty(6, dtype=dtype, device="cuda", requires_grad=True)
            for name, params, constants in (
                ("negative_binomial", [genes, per_feature], [1e-8]),
                ("negative_binomial_logits", [genes, genes, library], []),
                ("zero_inflated_negative_binomial", [genes, genes, genes], [1e-8]),
                ("zero_inflated_negative_binomial_logits", [genes, per_feature, genes, library], []),
                ("negative_binomial_mixture", [genes, per_feature, genes, genes], [1e-8]),
                ("multinomial", [genes], []),
            ):
                loss, nll = fastvae.functional.loss.nll(name, params, counts, constants)
                expect(loss, (6,), rows)
                expect(nll, (6,), rows)
                needs = (1 << len(params)) - 1
                *_, gradients, _ = ops.nll_forward(
                    name, params, counts, constants, None, None, REDUCTIONS["mean"], needs
                )
                for gradient, param in zip(gradients, params, strict=True):
                    expect(gradient, tuple(param.shape), dtype)
                if constants:
                    values = ops.nll_elements(name, params, counts, constants, 1.0)
                    expect(values, (6, 300), rows)
            for value in fastvae.functional.sample_log_probs(mu, logvar, samples=4):
                expect(value, (4, 6, 20) if value.dim() == 3 else (4, 6), dtype if value.dim() == 3 else rows)
            joint, per_dimension = fastvae.functional.gaussian_mixture_log_prob(
                mu, mu, logvar, per_dimension="both"
            )
            expect(joint, (6,), rows)
            expect(per_dimension, (6, 20), rows)
            for gradient in ops.gaussian_mixture_log_prob_backward(
                joint, per_dimension, mu, mu, logvar, None, joint, per_dimension, 7
            ):
                expect(gradient, (6, 20), dtype)
    return count


def machine_code() -> list[str]:
    """The GPUs for which the binary has code, each of them with every kernel of csrc/cuda."""
    from torch.utils.cpp_extension import CUDA_HOME

    program = Path(CUDA_HOME or "", "bin", "cuobjdump")
    if not program.exists():
        program = Path(importlib.import_module("triton").__file__).parent / "backends/nvidia/bin/cuobjdump"
    extension = importlib.import_module("fastvae._C").__file__
    listing = subprocess.run(
        [program, "--list-elf", "--list-ptx", extension], capture_output=True, text=True, check=True
    ).stdout
    found = {
        f"{int(sm) // 10}.{int(sm) % 10}" + ("+PTX" if kind == "ptx" else "")
        for sm, kind in re.findall(r"\.sm_(\d+)\.(cubin|ptx)", listing)
    }
    required = set(_build_info.CUDA_ARCHES)
    required |= {arch.removesuffix("+PTX") for arch in required}
    assert found >= required, f"built for {sorted(required)}, found {sorted(found)}"
    sources = [path.read_text() for path in sorted(Path("csrc/cuda").glob("*.cu*"))]
    kernels = {name for text in sources for name in re.findall(r"__global__ void[^;{]*?(\w+_kernel)\(", text)}
    assert len(kernels) >= 10, kernels
    for code in _build_info.CUDA_ARCHES:
        gpu = "sm_" + code.removesuffix("+PTX").replace(".", "")
        symbols = subprocess.run(
            [program, "--gpu-architecture", gpu, "--dump-elf-symbols", extension],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        lacking = [name for name in sorted(kernels) if f"{len(name)}{name}" not in symbols]
        assert not lacking, f"{gpu} has no code of {lacking}"
    return sorted(found)


if __name__ == "__main__":
    print(fastvae.show_config())
    print(f"\n{check_kernels()} ops with a CUDA, a CPU and a fake kernel")
    print(f"{check_fakes()} fake CUDA tensors of the right shape, type and device")
    print(f"machine code for {', '.join(machine_code())}")
