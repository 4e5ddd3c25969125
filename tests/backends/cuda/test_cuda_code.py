"""The CUDA kernels under sanitizers, and their machine code, on a machine without a GPU.

If nvcc is available, the kernels are compiled, and the machine code is inspected: registers, spills and 128-bit
accesses. Run as a program, this file compiles them for every architecture and prints a table of their resources, and
one of what zeros cost in the kernels of counts. The names of sources, as in `test_cuda_code.py counts_f32`, restrict it
to these.
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from itertools import cycle, product
from pathlib import Path
from typing import Any, NamedTuple

import cuda_kernels
import pytest
from cuda_kernels import SOURCES, build
from machine_code import shortest

# ---------------------------------------------------------------------------------------------------------------------
# Sanitizers
# ---------------------------------------------------------------------------------------------------------------------


def sanitized(directory: Path, sanitizer: str) -> Path:
    if missing := cuda_kernels.compiler_missing(f"-fsanitize={sanitizer}"):
        pytest.skip(missing)
    flags = ("-O0", "-g", f"-fsanitize={sanitizer}", "-fno-sanitize-recover=all")
    return build(directory, *flags, main="sanitized.cpp")


def run(program: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(program)], env={**os.environ, **environment}, capture_output=True, text=True, timeout=900
    )


@pytest.mark.slow
def test_address_sanitizer_finds_no_invalid_access(tmp_path: Path) -> None:
    done = run(sanitized(tmp_path, "address,undefined"))
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout == "all right\n"


@pytest.mark.slow
def test_thread_sanitizer_finds_no_race(tmp_path: Path) -> None:
    program = sanitized(tmp_path, "thread")
    done = run(program, TSAN_OPTIONS="halt_on_error=1")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout == "all right\n"
    # Check that the sanitizer detects a fault.
    done = run(program, TSAN_OPTIONS="halt_on_error=1", SHIM_WITHOUT_BARRIERS="1")
    assert "data race" in done.stderr


# ---------------------------------------------------------------------------------------------------------------------
# Machine code
# ---------------------------------------------------------------------------------------------------------------------

ARCHITECTURES = ("sm_80", "sm_90", "sm_100")
NVCC = shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")
FLAGS = ("-O3", "-std=c++17", "--expt-relaxed-constexpr", "-Xptxas", "-v", "-cubin")


class Kernel(NamedTuple):
    architecture: str
    name: str
    registers: int
    shared: int
    stack: int
    spilled: int  # in bytes
    code: str  # SASS, or "" without cuobjdump

    def accesses(self, operation: str) -> list[str]:
        return re.findall(rf"\b{operation}\.E\S*", self.code)

    @property
    def is_wide(self) -> bool:
        """Whether this is the variant that reads and writes 128 bits at a time."""
        return not re.search(r"Any|, [01]>$|, 4, false|mixture|log_probs", self.name)


def cuobjdump() -> str | None:
    """The tool of the toolkit, or the one that is part of Triton."""
    if found := shutil.which("cuobjdump") or shutil.which("/usr/local/cuda/bin/cuobjdump"):
        return found
    try:
        import triton
    except ImportError:
        return None
    carried = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return str(carried) if carried.exists() else None


def readable(symbols: list[str]) -> dict[str, str]:
    """Return `nll_kernel<Bernoulli, float, float, 4>` for a mangled name."""
    done = subprocess.run(["c++filt"], input="\n".join(symbols), capture_output=True, text=True, check=True)
    names = {}
    for symbol, name in zip(symbols, done.stdout.splitlines(), strict=True):
        name = re.sub(r"fastvae::cuda::|fastvae::math::isa_cuda::|\(anonymous namespace\)::|^void ", "", name)
        name = name[: name.index(">(") + 1].replace("__nv_bfloat16", "bf16").replace("__half", "half")
        names[symbol] = re.sub(r"\(bool\)([01])", lambda m: "true" if m[1] == "1" else "false", name)
    return names


def compile_kernels(source: Path, architecture: str, directory: Path) -> list[Kernel]:
    assert NVCC is not None
    cubin = directory / f"{source.stem}.{architecture}.cubin"
    command = [NVCC, *FLAGS, f"-arch={architecture}", str(source), "-o", str(cubin)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "warning" not in done.stderr, done.stderr
    pattern = (
        r"Compiling entry function '(\w+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads"
        r".*?Used (\d+) registers([^\n]*)"
    )
    found = re.findall(pattern, done.stderr, re.DOTALL)
    if not found:
        return []
    names, code = readable([f[0] for f in found]), {}
    if dump := cuobjdump():
        listing = subprocess.run(
            [dump, "-sass", str(cubin)], capture_output=True, text=True, check=True
        ).stdout
        for part in listing.split("Function : ")[1:]:
            symbol, _, body = part.partition("\n")
            code[symbol.strip()] = body
    kernels = []
    for symbol, stack, stores, loads, registers, rest in found:
        shared = re.search(r"(\d+) bytes smem", rest)
        # The listing truncates long names.
        body = next((text for name, text in code.items() if symbol.startswith(name)), "")
        spilled = int(stores) + int(loads)
        size = int(shared[1]) if shared else 0
        kernels.append(Kernel(architecture, names[symbol], int(registers), size, int(stack), spilled, body))
    return kernels


def compile_all(jobs: list[tuple[Path, str]]) -> list[Kernel]:
    with tempfile.TemporaryDirectory() as directory, ThreadPoolExecutor(2) as pool:
        compiled = [pool.submit(compile_kernels, *job, Path(directory)) for job in jobs]
        return [kernel for job in compiled for kernel in job.result()]


@pytest.fixture(scope="session")
def compiled() -> list[Kernel]:
    """Every source for sm_90 and, in turn, for one of the other GPUs: all of them would take half as long again."""
    if NVCC is None:
        pytest.skip("nvcc is not installed")
    others = cycle(name for name in ARCHITECTURES if name != "sm_90")
    return compile_all([(source, name) for source in SOURCES for name in ("sm_90", next(others))])


# Kernel name prefix -> the registers per thread that the number of blocks on a multiprocessor permits.
REGISTERS = (
    (r"count_kernel<double", 255),
    (r"count_kernel", 128),
    (r"count_mixture_kernel<double", 255),
    (r"count_mixture_kernel", 128),
    (r"multinomial_kernel<double", 255),
    (r"multinomial_kernel", 128),
    (r"gaussian_mixture_\w+<double", 255),
    (r"gaussian_mixture_", 128),
    (r"categorical_kernel<double", 128),
    (r"categorical_kernel", 64),
    (r"mixture_kernel<3, double", 255),
    (r"mixture_kernel<1, double", 255),
    (r"mixture_kernel<3", 128),
    (r"mixture_kernel<1", 80),
    (r"nll_kernel<\w+, double", 128),
    (r"nll_kernel<(DiscretizedLogistic|PoissonRate), .* 1>", 128),
    (r"nll_kernel<PoissonRate, (half|bf16)", 80),
    (r"nll_kernel<Gaussian, (half|bf16), Any", 128),
    (r"nll_kernel<DiscretizedLogistic", 80),
    (r"nll_kernel<(Poisson|ContinuousBernoulli|StudentT), ((half|bf16)|\w+, Any)", 128),
    (r"nll_kernel<(Poisson|ContinuousBernoulli|StudentT|\w+PerElement|GaussianBounded)", 80),
    (r"nll_kernel<\w+, \w+, Any", 80),
    (r"nll_kernel", 64),
    (r"nll_backward_kernel<double", 128),
    (r"nll_backward_kernel", 64),
    (r"sample_kernel<double", 255),
    (r"sample_kernel", 64),
    (r"sample_grad_kernel<double", 255),
    (r"sample_grad_kernel", 128),
    (r"log_probs_kernel<double", 255),
    (r"log_probs_kernel", 80),
    (r"log_probs_grad_kernel<double", 255),
    (r"log_probs_grad_kernel", 128),
)


@pytest.mark.slow
def test_kernels_spill_no_registers(compiled: list[Kernel]) -> None:
    assert {k.architecture for k in compiled} == set(ARCHITECTURES)
    for kernel in compiled:
        assert (kernel.stack, kernel.spilled) == (0, 0), kernel[:6]
        bound = next(bound for pattern, bound in REGISTERS if re.match(pattern, kernel.name))
        assert kernel.registers <= bound, kernel[:6]
        # A multiprocessor has at least 100 KiB, for two blocks of Gaussians, three of logistics, or four of a
        # categorical.
        is_large = "mixture" in kernel.name or kernel.name.startswith(("count_kernel", "multinomial"))
        shared = 24 << 10 if is_large else 3 << 10 if "categorical" in kernel.name else 1024
        if kernel.name.startswith("gaussian_mixture"):
            shared = 46 << 10
        assert kernel.shared <= shared, kernel[:6]


@pytest.mark.slow
def test_kernels_access_memory_with_128_bits(compiled: list[Kernel]) -> None:
    if cuobjdump() is None:
        pytest.skip("no cuobjdump: neither the CUDA toolkit's nor Triton's")
    seen = 0
    for kernel in compiled:
        assert kernel.code, kernel.name
        assert not re.search(r"\b(LDL|STL)\b", kernel.code), kernel.name
        if not kernel.is_wide:
            continue
        seen += 1
        loads, stores = kernel.accesses("LDG"), kernel.accesses("STG")
        # Four of these use all registers, or are a quad.
        width = (
            ".64"
            if re.search(r"Logistic, (half|bf16)|multinomial_kernel<(half|bf16)", kernel.name)
            else ".128"
        )
        assert any(width in load for load in loads), (kernel.name, loads)
        assert any(width in store for store in stores), (kernel.name, stores)
    assert seen >= 2 * 40


@pytest.mark.slow
def test_gaussian_mixtures_read_memory_with_128_bits(compiled: list[Kernel]) -> None:
    """Tiles are read with 128 bits, from memory and then from shared memory."""
    if cuobjdump() is None:
        pytest.skip("no cuobjdump: neither the CUDA toolkit's nor Triton's")
    kernels = [kernel for kernel in compiled if kernel.name.startswith("gaussian_mixture")]
    assert len(kernels) == 2 * 8  # for two GPUs
    for kernel in kernels:
        assert any(".128" in load for load in kernel.accesses("LDG")), kernel.name
        assert len(re.findall(r"\bLDS\.128", kernel.code)) >= 8, kernel.name


@pytest.mark.slow
def test_kernels_issue_loads_before_their_use(compiled: list[Kernel]) -> None:
    """A thread issues all loads of a step before it computes, which hides the memory's latency."""
    if cuobjdump() is None:
        pytest.skip("no cuobjdump: neither the CUDA toolkit's nor Triton's")
    for kernel in compiled:
        if kernel.name != "nll_kernel<Bernoulli, float, float, 4>":
            continue
        operations = re.findall(r"\b(LDG\.E\.128|MUFU\.EX2|STG\.E\.128)", kernel.code)
        first = operations.index("MUFU.EX2")
        assert operations[:first].count("LDG.E.128") == 4, (kernel.architecture, operations)


# By whether the params are raw outputs and whether there are additional zeros: what a count of zero costs if its
# dispersion is that of its feature, and if it has its own.
ZEROS = {
    (False, False): (34, 35),
    (False, True): (59, 60),
    (True, False): (34, 36),
    (True, True): (59, 60),
}


def instructions_of_zeros(
    kernel: Kernel, raw: bool, inflated: bool, per_element: bool, sparse: bool = False
) -> tuple[float, float]:
    """The instructions, and those of them that are special functions, for a count of zero in a training step: from the
    first load to the last store of a thread's eight elements of a segment."""
    arrays = 2 + inflated + per_element - sparse  # that are read
    # A segment loads the dispersions of its elements under a predicate, which is false if all rows share them.
    load = r"LDG\.E\.128" if per_element else r"^LDG\.E\.128"
    need = {
        r"MUFU": 8 * (2 + raw + 4 * inflated + per_element),
        r"STG\.E\.128": 2 * (1 + inflated + per_element),
        r"STS\.128": 0 if per_element else 2,
        load: 2 * arrays,
    }
    # Both quads of each array are read from one address, in a block of their own. Counts in float32 take a single load.
    second = r"LDG\.E\.128\.CONSTANT \S+ desc\[\S+\]\[R\d+\.64\+0x200\]"
    other_types = r"LDG\.E\.(64\.CONST|U8|U16|CONST)|LDG\.E\.128\S* \S+ desc\[\S+\]\[R\d+\.64\+0x10\]"
    # A sparse target's zeros are read from shared memory, and so are dispersions that all rows share.
    bits, avoid = r"\bLDS\b" if per_element else r"\bLDS R", other_types
    if sparse:
        need[bits] = 2
    else:
        avoid += f"|{bits}"
    path = shortest(kernel.code, second, 1 + inflated, need, avoid)
    wide = [i for i, text in enumerate(path) if re.search(r"(LDG|STG)\.E\.128", text)]
    assert wide, kernel.name
    between = path[wide[0] : wide[-1] + 1]
    return len(between) / 8, sum("MUFU" in text for text in between) / 8


@pytest.mark.slow
def test_zeros_cost_few_instructions(compiled: list[Kernel]) -> None:
    if cuobjdump() is None:
        pytest.skip("no cuobjdump: neither the CUDA toolkit's nor Triton's")
    kernels = {kernel.name: kernel for kernel in compiled if kernel.architecture == "sm_90"}
    for (raw, inflated), bounds in ZEROS.items():
        kernel = kernels[f"count_kernel<float, {raw}, {inflated}, false>".lower()]
        for per_element, bound in enumerate(bounds):
            cost, _ = instructions_of_zeros(kernel, raw, inflated, bool(per_element))
            assert cost <= bound, (kernel.name, per_element, cost)


def table(kernels: list[Kernel]) -> str:
    """The resources as Markdown, with a line for each kernel and a column for each architecture."""
    rows: dict[str, dict[str, Any]] = {}
    for kernel in kernels:
        cell = f"{kernel.registers} / {kernel.shared} / {kernel.spilled}"
        rows.setdefault(kernel.name, {})[kernel.architecture] = cell
    head = f"| registers / shared bytes / spilled bytes | {' | '.join(ARCHITECTURES)} |"
    lines = [head, "|---" * (1 + len(ARCHITECTURES)) + "|"]
    for name, cells in sorted(rows.items()):
        lines.append(f"| `{name}` | " + " | ".join(str(cells.get(a, "")) for a in ARCHITECTURES) + " |")
    return "\n".join(lines)


# An H200: bytes a second of memory, and instructions and special functions a second of all threads (132
# multiprocessors at 1.98 GHz, each with 4 issue slots of 32 threads and 16 special functions a cycle).
BANDWIDTH, ISSUES, SPECIAL = 4.8e12, 132 * 4 * 32 * 1.98e9, 132 * 16 * 1.98e9
CELLS, GENES = 128, 20_000


def table_of_zeros(kernels: list[Kernel]) -> str:
    """What the kernels of counts in float32 cost on an H200, as Markdown, if all counts are zero.

    The bytes are those that a training step reads and writes once. The share is that of the issue slots which the zeros
    take while these bytes are copied at the memory's rate. The microseconds, for 128 x 20,000 counts, are the longest
    of copying, of issuing and of the special functions; starting, the softmax and other counts come on top.
    """
    lines = [
        "| sm_90, float32 | dispersion of each | target | registers | shared bytes | spilled bytes | instructions | "
        "special functions | bytes | share of the issue slots | us |",
        "|---" * 11 + "|",
    ]
    named = {kernel.name: kernel for kernel in kernels if kernel.architecture == "sm_90"}
    for (raw, inflated), own, sparse in product(ZEROS, (False, True), (False, True)):
        kernel = named.get(f"count_kernel<float, {raw}, {inflated}, false>".lower())
        if kernel is None or not kernel.code:
            continue
        cost, special = instructions_of_zeros(kernel, raw, inflated, own, sparse)
        size = 4 * (2 * (1 + inflated + own) + (not sparse))
        copy, issue = size / BANDWIDTH, cost / ISSUES
        longest = max(copy, issue, special / SPECIAL)
        lines.append(
            f"| {'ZINB' if inflated else 'NB'}{', raw' if raw else ''} | {'element' if own else 'feature'} | "
            f"{'CSR' if sparse else 'dense'} | {kernel.registers} | {kernel.shared} | {kernel.spilled} | {cost:.1f} | "
            f"{special:.1f} | {size} | {issue / copy:.0%} | {1e6 * CELLS * GENES * longest:.1f} |"
        )
    return "\n".join(lines) if len(lines) > 2 else ""


if __name__ == "__main__":
    if NVCC is None:
        sys.exit("nvcc is not installed, or not on the PATH")
    sources = [source for source in SOURCES if source.stem in sys.argv[1:] or not sys.argv[1:]]
    found = compile_all(list(product(sources, ARCHITECTURES)))
    print(table(found), table_of_zeros(found), sep="\n\n")
