"""The CUDA side of csrc/ops without a GPU, with kernels that run on the CPU (cuda_shim) in place of the CPU kernels.

CPU tensors then take the path of CUDA tensors, through the same schemas, autograd and binding, and the tests of the
native backend check the results. A few lines each replace CUDA's runtime, allocator and generator.
"""

import os
import subprocess
import sys
from pathlib import Path

import compiled
import cuda_kernels
import pytest
import torch

ROOT = Path(__file__).parents[3]
HERE = Path(__file__).parent / "cuda_binding"
TORCH = Path(torch.__file__).parent
# For each file, the tests that also apply to CUDA tensors. Each part runs in one process, on a core of its own.
PARTS = {
    "elements": {
        "backends/cuda/cuda_binding/launches.py": "",
        "core/test_autograd.py": "native and not large_buffers",
        "core/test_autograd_features.py": "native and not ddp",
        "core/test_layouts.py": "native",
        "core/test_weight.py": "native and not per_element and not compiled",
        "core/test_noise.py": "native",
        "core/test_mixture.py": "native and not thread",
    },
    "families": {
        # Sparse products have no CUDA kernel.
        "backends/test_compile.py": "(opcheck or one_graph and native) and not negative_binomial1 and not sparse",
        "core/test_posteriors.py": "native and not node and not compiled",
        "core/test_log_probs.py": "native and not compiled",
        "core/test_categorical.py": "not thread and not instruction and not reference and not invalid_class",
        "core/test_discretized.py": "native or eager",
        "core/test_discretized_modules.py": "native or eager or compiles",
        # A CUDA kernel reads no positions on the host; the sum over a thousand rows takes the shim a minute.
        "core/test_counts.py": "native and not malformed and not sum_to_1",
        "core/test_count_elements.py": "native",
        "core/test_extremes.py": "native and (negative_binomial or zero_inflated)",
        "core/test_nb_mixture.py": "native and not thread and not triton",
        # Here columns must be in ascending order.
        "core/test_multinomial.py": "native and not thread and not any_order",
        # accelerate() of scvi-tools.
        "integrations/test_scvi.py": "native",
    },
}

if missing := cuda_kernels.compiler_missing():
    pytest.skip(missing, allow_module_level=True)


@pytest.fixture(scope="module")
def libraries() -> tuple[Path, Path]:
    kernels = cuda_kernels.library()
    flags = ["-std=c++20", "-O0", "-g0", "-fPIC", "-shared", "-Wall", "-Wno-unknown-pragmas", "-Werror"]
    flags += [f"-DFASTVAE_THREADS={cuda_kernels.THREADS}", f"-I{HERE}", f"-I{cuda_kernels.SHIM}"]
    flags += ["-isystem", str(TORCH / "include"), "-isystem", str(TORCH / "include/torch/csrc/api/include")]
    link = [str(kernels), f"-L{TORCH / 'lib'}", "-lc10", "-ltorch", "-ltorch_cpu"]
    link += [f"-Wl,-rpath,{kernels.parent},-rpath,{TORCH / 'lib'}"]

    def make(folder: Path) -> None:
        command = ["g++", *flags, str(HERE / "binding.cpp"), "-o", str(folder / "binding.so"), *link]
        subprocess.run(command, check=True)

    sources = (HERE, ROOT / "csrc", *cuda_kernels.SHIM_FILES)
    return compiled.kept("cuda_binding", sources, [*flags, *link], make) / "binding.so", kernels


@pytest.mark.parametrize("part", PARTS)
def test_binding_passes_the_tests_of_the_native_backend(
    libraries: tuple[Path, Path], part: str, which_tests: list[str]
) -> None:
    files = [f"tests/{file}" for file in PARTS[part]]
    which = " or ".join(f"{Path(file).name} and ({which or 'test'})" for file, which in PARTS[part].items())
    done = subprocess.run(
        [
            sys.executable,
            HERE / "run.py",
            *libraries,
            "-q",
            "-p",
            "no:cacheprovider",
            *which_tests,
            "-k",
            which,
            *files,
        ],
        cwd=ROOT,
        env=os.environ
        | {
            "PYTHONPATH": os.pathsep.join((str(ROOT), os.environ.get("PYTHONPATH", ""))),
            "FASTVAE_CUDA_BINDING": "1",
        },
        capture_output=True,
        text=True,
        timeout=1800,
    )
    print(done.stdout[-8000:])
    assert done.returncode == 0, done.stderr
