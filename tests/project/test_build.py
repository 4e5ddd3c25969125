"""The built extension is one file that runs on every x86-64, whatever instruction sets its kernels use."""

import importlib
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest
import torch
from torch.utils.cpp_extension import get_cxx_compiler

import fastvae
from fastvae.backends import native

# Code for an instruction set may be in the namespaces isa_avx2 and isa_avx512 (ours), AVX2 and AVX512 (ATen's).
HOMES = (("avx512", re.compile("isa_avx512|AVX512")), ("avx2", re.compile("isa_avx2|AVX2")))
# AT&T syntax: 512-bit or mask registers, or numbers above 15, are AVX-512; 256 bits or a v-instruction at least AVX.
AVX512 = re.compile(r"%zmm|%k[1-7]|%[xy]mm(1[6-9]|2\d|3[01])")
AVX = re.compile(r"%ymm|^v[a-z]")
ROOT, TORCH = Path(__file__).parents[2], Path(torch.__file__).parent
LEVEL = {"base": 0, "avx2": 1, "avx512": 2}


def home(function: str) -> str:
    return next((name for name, pattern in HOMES if pattern.search(function)), "base")


def levels(listing: str) -> dict[str, str]:
    """Function -> the instruction set that its code needs, from an objdump listing."""
    found: dict[str, str] = defaultdict(lambda: "base")
    function = ""
    for line in listing.splitlines():
        if header := re.match(r"[0-9a-f]+ <(.+)>:$", line):
            function = header[1]
            found[function] = found[function]
        elif "\t" in line:
            instruction = line.split("\t", 1)[1]
            needed = "avx512" if AVX512.search(instruction) else "avx2" if AVX.search(instruction) else "base"
            found[function] = max(found[function], needed, key=LEVEL.__getitem__)
    return found


@pytest.fixture(scope="module")
def functions() -> dict[str, str]:
    if platform.machine() not in ("x86_64", "AMD64"):
        pytest.skip("there is one instruction set on this machine's architecture")
    if shutil.which("objdump") is None:
        pytest.skip("objdump (binutils) is not installed")
    extension = importlib.import_module("fastvae._C").__file__
    command = ["objdump", "-d", "-w", "--no-show-raw-insn", extension]
    return levels(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def test_wide_registers_occur_only_in_their_namespaces(functions: dict[str, str]) -> None:
    """An inline function in objects of several instruction sets must be linked from the least demanding one.

    With the AVX-512 copy, the extension would crash on machines without AVX-512, although it passes on ours.
    """
    misplaced = {name: need for name, need in functions.items() if LEVEL[need] > LEVEL[home(name)]}
    # The compiler's clones of a function belong to their object.
    assert {
        name: need for name, need in misplaced.items() if not re.search(r"\.(constprop|isra|part)\.", name)
    } == {}


def test_kernels_are_vectorised(functions: dict[str, str]) -> None:
    """The flags reach the compiler; without them, ATen's vectors are scalar loops, ten times slower."""
    for name in ("avx2", "avx512"):
        assert any(home(function) == name and need == name for function, need in functions.items()), name


def test_disassembly_is_parsed_correctly() -> None:
    listing = (
        "0000 <plain>:\n  10:\tmovss  (%rax),%xmm0\n\n0020 <_ZN8isa_avx21fEv>:\n  20:\tvaddps %ymm1,%ymm2,%ymm3\n"
        "0030 <std_vector>:\n  30:\tvmovups (%rax),%zmm1\n  38:\tret\n"
    )
    assert levels(listing) == {"plain": "base", "_ZN8isa_avx21fEv": "avx2", "std_vector": "avx512"}


def test_build_record_describes_this_build() -> None:
    record = native.build_info()
    assert record is not None
    assert fastvae.show_config().count(record.TORCH_VERSION) >= 1
    capability = importlib.import_module("fastvae._C").cpu_capability()
    assert capability.lower() in {name.lower() for name in record.CPU_CAPABILITIES}


# ---------------------------------------------------------------------------------------------------------------------
# The cost of the build
# ---------------------------------------------------------------------------------------------------------------------

# The reference values of a build for x86-64 without CUDA, by GCC 12: the extension's size in bytes, and the compilers'
# CPU time as a multiple of that of one of torch's headers on the same, equally busy machine. If a larger value is
# justified, write the new numbers here.
SIZE = 6_510_000
COMPILATION = 58


@pytest.fixture
def build_temp() -> Path:
    version = subprocess.run(
        [*shlex.split(get_cxx_compiler()), "-dumpfullversion"], capture_output=True, text=True
    ).stdout
    if (
        platform.machine() not in ("x86_64", "AMD64")
        or native.build_info().CUDA_ARCHES
        or version[:3] != "12."
    ):
        pytest.skip("the numbers are those of a build for x86-64 without CUDA by GCC 12")
    return ROOT / "build" / f"{sys.implementation.cache_tag}-torch-{torch.__version__}"


@pytest.mark.usefixtures("build_temp")
def test_extension_size_has_not_grown_by_a_quarter() -> None:
    size = Path(importlib.import_module("fastvae._C").__file__).stat().st_size
    assert size <= 1.25 * SIZE


def test_build_time_has_not_grown_by_a_quarter(build_temp: Path) -> None:
    record = build_temp / "compiler_seconds"
    if not record.exists():
        pytest.skip(f"{record} is written by a build from nothing, and there was none here")
    seconds, header = map(float, record.read_text().split())
    assert seconds <= 1.25 * COMPILATION * header


def test_extension_includes_every_file_of_csrc_ops() -> None:
    """If extension.cpp omitted a file that only registers kernels, nothing else would fail."""
    included = re.findall(r'#include "ops/(.+)"', (ROOT / "csrc" / "extension.cpp").read_text())
    there = [
        path.name for path in (ROOT / "csrc" / "ops").glob("*.cpp") if not path.name.endswith("_cuda.cpp")
    ]
    assert sorted(included) == sorted(there)


# ---------------------------------------------------------------------------------------------------------------------
# The messages of setup.py about CUDA kernels that it cannot build
# ---------------------------------------------------------------------------------------------------------------------

TOOLKIT = """#!/bin/sh
echo "Cuda compilation tools, release {version}, V{version}.1"
"""


@pytest.fixture
def toolkit(tmp_path: Path) -> Path:
    (tmp_path / "bin").mkdir()
    (tmp_path / "include").mkdir()
    (tmp_path / "include" / "cuda_runtime_api.h").touch()
    return tmp_path


# Imports torch once, and forks for every environment that stdin lists.
SETUP = """
import contextlib, io, json, os, runpy, sys, torch, torch.utils.cpp_extension, traceback
cuda, environments = json.load(sys.stdin)
torch.version.cuda = cuda
sys.argv = ["setup.py", "--version"]
for environment in environments:
    if not os.fork():
        os.environ.update(environment)
        code, errors, output = 0, io.StringIO(), io.StringIO()
        try:
            with contextlib.redirect_stderr(errors), contextlib.redirect_stdout(output):
                runpy.run_path("setup.py")
        except SystemExit as stop:
            code = stop.code
            if isinstance(code, str):  # Python prints it to stderr
                errors.write(code)
                code = 1
        except BaseException:
            code = 1
            errors.write(traceback.format_exc())
        print(json.dumps([code or 0, errors.getvalue(), output.getvalue()]), flush=True)
        os._exit(0)
    os.wait()
"""


def setup(cuda: str | None, *environments: dict[str, str]) -> list[tuple[int, str]]:
    """The exit code and the stderr for each of the environments: see `version`."""
    return [(code, errors) for code, errors, _ in version(cuda, *environments)]


def version(cuda: str | None, *environments: dict[str, str]) -> list[tuple[int, str, str]]:
    """Run `setup.py --version` with a torch that pretends to be built for a version of CUDA.

    Returns the exit code, stderr and stdout for each of the environments.
    """
    done = subprocess.run(
        [sys.executable, "-c", SETUP],
        input=json.dumps([cuda, environments]),
        cwd=ROOT,
        env=os.environ | {"FASTVAE_NATIVE": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    results = [(code, errors, output) for code, errors, output in map(json.loads, done.stdout.splitlines())]
    assert len(results) == len(environments), done.stderr
    return results


def test_torch_without_cuda_is_reported() -> None:
    (code, errors), *others = setup(None, *({"FASTVAE_CUDA": wish} for wish in ("1", "auto", "0")))
    assert code != 0
    assert (
        f"fastvae: FASTVAE_CUDA=1 is set, but this torch ({torch.__version__}) was built without CUDA; "
        "install one with CUDA from https://pytorch.org" in errors
    )
    # Nobody requested CUDA kernels or expects them.
    for code, errors in others:
        assert code == 0, errors
        assert "CUDA" not in errors


def test_missing_cuda_toolkit_is_reported(tmp_path: Path) -> None:
    reason = (
        f"no CUDA toolkit (nvcc and its headers) was found in CUDA_HOME={tmp_path}; install CUDA 13.0, or set "
        "CUDA_HOME to its folder"
    )
    wishes = ({"FASTVAE_CUDA": wish, "CUDA_HOME": str(tmp_path)} for wish in ("1", "auto", "0"))
    forced, asked, refused = setup("13.0", *wishes)
    assert forced[0] != 0
    assert f"fastvae: FASTVAE_CUDA=1 is set, but {reason}" in forced[1]
    assert asked[0] == 0, asked[1]
    assert f"fastvae: building without CUDA kernels, because {reason}" in asked[1]
    assert refused[0] == 0
    assert "without CUDA kernels" not in refused[1]


def test_cuda_toolkit_of_another_version_is_reported(toolkit: Path) -> None:
    nvcc = toolkit / "bin" / "nvcc"
    nvcc.write_text(TOOLKIT.format(version="12.4"))
    nvcc.chmod(0o755)
    ((code, errors),) = setup("13.0", {"FASTVAE_CUDA": "1", "CUDA_HOME": str(toolkit)})
    assert code != 0
    assert (
        f"the CUDA toolkit in {toolkit} is version 12.4, but this torch was built with CUDA 13.0; install a toolkit "
        "13.x and set CUDA_HOME to its folder" in errors
    )


def test_unknown_value_of_fastvae_cuda_raises() -> None:
    ((code, errors),) = setup(None, {"FASTVAE_CUDA": "yes"})
    assert code != 0
    assert "FASTVAE_CUDA must be 0, 1 or auto, got 'yes'" in errors


def test_unsupported_gpus_in_arch_list_are_ignored_or_raise(toolkit: Path) -> None:
    """They are an error if there are no others, and ignored otherwise."""
    nvcc = toolkit / "bin" / "nvcc"
    nvcc.write_text(TOOLKIT.format(version="13.0"))
    nvcc.chmod(0o755)
    environment = {"FASTVAE_CUDA": "1", "CUDA_HOME": str(toolkit), "TORCH_CUDA_ARCH_LIST": "7.0;7.5+PTX"}
    ((code, errors),) = setup("13.0", environment)
    assert code != 0
    assert (
        "TORCH_CUDA_ARCH_LIST names 7.0, 7.5+PTX, but the CUDA kernels need compute capability 8.0; name a newer one, "
        "or leave them out with FASTVAE_CUDA=0" in errors
    )


def test_wheel_version_names_torch_and_cuda(toolkit: Path) -> None:
    """Only the wheel of a release has it, because PyPI accepts no versions with a local part."""
    nvcc = toolkit / "bin" / "nvcc"
    nvcc.write_text(TOOLKIT.format(version="13.0"))
    nvcc.chmod(0o755)
    wheels = {"FASTVAE_WHEELS": "https://example.org"}
    results = version(
        "13.0",
        {"FASTVAE_CUDA": "0"},
        {"FASTVAE_CUDA": "0"} | wheels,
        {"FASTVAE_CUDA": "1", "CUDA_HOME": str(toolkit)} | wheels,
        {"FASTVAE_NATIVE": "0"} | wheels,
    )
    minor = ".".join(torch.__version__.split(".")[:2])
    assert [output.split()[-1] for _, _, output in results] == [
        fastvae.__version__,
        f"{fastvae.__version__}+torch{minor}",
        f"{fastvae.__version__}+torch{minor}.cu130",
        fastvae.__version__,
    ]


# ---------------------------------------------------------------------------------------------------------------------
# The record of a build without the extension
# ---------------------------------------------------------------------------------------------------------------------


def test_pure_package_records_the_reason(tmp_path: Path) -> None:
    """pip hides the output of a successful build, so `fastvae doctor` and the first slow call report it."""
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "fastvae").mkdir()
    for name in ("__init__.py", "_version.py"):
        shutil.copy(ROOT / "fastvae" / name, tmp_path / "fastvae")
    done = subprocess.run(
        [sys.executable, "setup.py", "-q", "build"],
        cwd=tmp_path,
        env=os.environ | {"FASTVAE_NATIVE": "auto", "CXX": "no-such-compiler"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    why = "the C++ compiler 'no-such-compiler' was not found; install g++, or set CXX"
    record = tmp_path / "build" / "lib" / "fastvae" / "_build_info.py"
    assert f"WHY_PURE = {why!r}" in record.read_text()

    told = subprocess.run(
        [sys.executable, "-c", PURE], input=record.read_text(), capture_output=True, text=True, timeout=120
    )
    assert told.returncode == 0, told.stderr
    sentence = (
        f"fastvae was installed without its compiled extension: {why}; then install it again: pip install "
        "--no-build-isolation -e . (in a clone of fastvae)"
    )
    assert f"native: {sentence}" in told.stdout  # output of fastvae doctor
    assert sentence in told.stderr  # the warning


PURE = """
import sys, types
record = types.ModuleType("fastvae._build_info")
exec(sys.stdin.read(), record.__dict__)
sys.modules["fastvae._build_info"] = record
import torch, fastvae
print(fastvae.show_config())
fastvae.functional.bernoulli_nll(torch.zeros(2, 3), torch.zeros(2, 3))
"""
