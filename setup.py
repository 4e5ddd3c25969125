"""Builds fastvae's C++ extension, or the pure package where the extension cannot be built.

Everything that does not depend on the machine is in pyproject.toml. These environment variables control the build:

FASTVAE_NATIVE  auto (default): build the extension if torch and a C++ compiler are available;
                1: build it or fail; 0: the pure package, which runs on fastvae.reference.
FASTVAE_CUDA    auto (default): build the CUDA kernels too if torch is a CUDA build and nvcc is available;
                1: build them or fail; 0: leave them out. The build machine needs no GPU.
TORCH_CUDA_ARCH_LIST  the GPUs to build for, in torch's format ("9.0", "8.0;9.0+PTX"); see CUDA_ARCHES for the default.
CUDA_HOME       the folder of the CUDA toolkit (default: that of nvcc, or /usr/local/cuda).
MAX_JOBS        the number of compilers that may run at the same time (default: the number of cores plus two).
FASTVAE_WHEELS  the address of the wheels of this release; only .ci/wheels.py sets it. The version of a wheel with the
                extension then names its torch, and both kinds of wheels record the address of the others.
"""

import hashlib
import importlib.util
import os
import platform
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import sysconfig
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path

import setuptools
from setuptools.command.build_py import build_py

# csrc/cpu is compiled once for each of these, into a namespace of that name, and csrc/ops chooses one of them when it
# is loaded. The least demanding comes first: see BuildNative.build_extension.
INSTRUCTION_SETS = {"default": ["-DCPU_CAPABILITY=DEFAULT", "-DCPU_CAPABILITY_DEFAULT"]}
if platform.machine() in ("x86_64", "AMD64"):
    # Processors without AVX2 predate 2013. Optimising their kernels for speed took a third of the build time.
    INSTRUCTION_SETS["default"] += ["-Os", "-DFASTVAE_SMALL"]
    # Tuned for processors that are common in data centres; the code runs on every processor with these instructions.
    avx2 = ["-mavx2", "-mfma", "-mf16c", "-mtune=icelake-server"]
    avx512 = ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", *avx2]
    INSTRUCTION_SETS["avx2"] = ["-DCPU_CAPABILITY=AVX2", "-DCPU_CAPABILITY_AVX2", *avx2]
    INSTRUCTION_SETS["avx512"] = ["-DCPU_CAPABILITY=AVX512", "-DCPU_CAPABILITY_AVX512", *avx512]
    # GCC 12 warns about its own intrinsics.
    INSTRUCTION_SETS["avx512"] += ["-Wno-uninitialized", "-Wno-maybe-uninitialized"]

# No -std, because torch adds the one its headers need. No -ffast-math, because NaN and infinity must be handled
# correctly.
COMPILE_ARGS = [
    "-O3",
    "-g0",
    "-fopenmp",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fvisibility=hidden",
    "-fvisibility-inlines-hidden",
    "-Wall",
    "-Wno-unknown-pragmas",
    "-Wno-psabi",
    "-DAT_PER_OPERATOR_HEADERS",
]

# Without these, GCC keeps a kernel's instructions in source order, where they wait for one another.
GCC_ARGS = ["-fschedule-insns", "-fsched-pressure"]

# No --use_fast_math: csrc/cuda uses approximations explicitly where they are accurate enough. One thread for each GPU.
NVCC_ARGS = ["-O3", "--threads=4", "-Xcompiler=-fvisibility=hidden,-fvisibility-inlines-hidden"]

# The defaults by toolkit version, newest first: A100, H100 and B200, and PTX of the last one for later GPUs. Code for
# 8.0 also runs on 8.6 and 8.9.
CUDA_ARCHES = {(12, 8): "8.0;9.0;10.0+PTX", (0, 0): "8.0;9.0+PTX"}


def fail(message):
    raise SystemExit(f"fastvae: {message}")


def announce(message):
    """Print a message even if pip captures the output, as it does for builds that succeed unless -v is given."""
    print(f"fastvae: {message}", file=sys.stderr, flush=True)
    # The script in which pip and similar tools run a build.
    captured = Path(getattr(sys.modules["__main__"], "__file__", None) or "").name == "_in_process.py"
    if captured and os.name == "posix":
        with suppress(OSError):  # there may be no terminal
            # The terminal's cursor is in the middle of a line of pip's.
            Path("/dev/tty").write_text(f"\n  fastvae: {message}\n")


def read_choice(variable):
    value = os.environ.get(variable, "auto")
    if value not in ("0", "1", "auto"):
        fail(f"{variable} must be 0, 1 or auto, got {value!r}")
    return value


def why_not_native():
    """Why the extension cannot be built here, with advice, or None if it can."""
    if sys.platform != "linux":
        return "the extension is built on Linux only"
    try:
        import torch
        from torch.utils.cpp_extension import get_cxx_compiler
    except ImportError as error:
        return (
            f"torch cannot be imported in the build environment ({error}), which pip creates for every build; the "
            "extension only works with the torch it was built with, so install torch, ninja and pybind11 into your own "
            "environment and build there, with --no-build-isolation"
        )
    if tuple(map(int, torch.__version__.split(".")[:2])) < (2, 11):
        return f"torch 2.11 or newer is required, but this is {torch.__version__}"
    compiler = shlex.split(get_cxx_compiler())[0]
    if shutil.which(compiler) is None:
        return f"the C++ compiler {compiler!r} was not found; install g++, or set CXX"
    if not Path(sysconfig.get_path("include"), "Python.h").exists():
        return "the header Python.h was not found; install the development files of this Python (python3-dev)"
    return None


def why_pure():
    """Why the extension is not built, with advice, or None if it is built."""
    setting = read_choice("FASTVAE_NATIVE")
    if setting == "0":
        return (
            "this is the pure wheel" if WHEELS else "FASTVAE_NATIVE=0 was set when it was installed; unset it"
        )
    reason = why_not_native()
    if reason is not None and setting == "1":
        fail(f"FASTVAE_NATIVE=1 is set, but {reason}")
    return reason


def find_toolkit():
    """Return the folder and the version (a pair) of the CUDA toolkit, or (None, None).

    Torch assumes the folder above that of nvcc, which is wrong if nvcc is a script that calls another one.
    """
    configured = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    nvcc = shutil.which("nvcc")
    on_path = [Path(nvcc).resolve().parents[1]] if nvcc else []
    for home in [Path(configured)] if configured else [*on_path, Path("/usr/local/cuda")]:
        if Path(home, "bin/nvcc").exists() and Path(home, "include/cuda_runtime_api.h").exists():
            output = subprocess.run([home / "bin/nvcc", "--version"], capture_output=True, text=True).stdout
            if version := re.search(r"release (\d+)\.(\d+)", output):
                return str(home), (int(version[1]), int(version[2]))
    return None, None


def why_not_cuda(toolkit):
    """Why the CUDA kernels cannot be built here, with advice, or None if they can."""
    import torch

    if torch.version.cuda is None:
        return (
            f"this torch ({torch.__version__}) was built without CUDA; install one with CUDA from "
            "https://pytorch.org/get-started"
        )
    home, version = toolkit
    if home is None:
        configured = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
        searched = f"in CUDA_HOME={configured}" if configured else "on the PATH or in /usr/local/cuda"
        return (
            f"no CUDA toolkit (nvcc and its headers) was found {searched}; install CUDA {torch.version.cuda}, or set "
            "CUDA_HOME to its folder"
        )
    major = int(torch.version.cuda.split(".")[0])
    if version[0] != major:
        return (
            f"the CUDA toolkit in {home} is version {version[0]}.{version[1]}, but this torch was built with CUDA "
            f"{torch.version.cuda}; install a toolkit {major}.x and set CUDA_HOME to its folder"
        )
    return None


def cuda_arches(version):
    """The GPUs to build for. Many containers set old lists; the GPUs that the kernels cannot run on are ignored."""
    default = next(arches for oldest, arches in CUDA_ARCHES.items() if version >= oldest)
    requested = re.split("[; ]+", (os.environ.get("TORCH_CUDA_ARCH_LIST") or default).strip("; "))
    supported = [arch for arch in requested if not re.match(r"[1-7]\.\d", arch)]
    if not supported:
        fail(
            f"TORCH_CUDA_ARCH_LIST names {', '.join(requested)}, but the CUDA kernels need compute capability 8.0; "
            "name a newer one, or leave them out with FASTVAE_CUDA=0, because Triton's kernels serve older GPUs"
        )
    return supported


def should_build_cuda(toolkit):
    setting = read_choice("FASTVAE_CUDA")
    if setting == "0":
        return False
    reason = why_not_cuda(toolkit)
    if reason is not None and setting == "1":
        fail(f"FASTVAE_CUDA=1 is set, but {reason}")
    import torch

    # Nobody expects CUDA kernels with a CPU build of torch.
    if reason is not None and torch.version.cuda is not None:
        print(f"fastvae: building without CUDA kernels, because {reason}", file=sys.stderr)
    return reason is None


def digest_of_sources():
    """A digest of all source files of the extension. benchmarks/gpu/build.py uses it to find a matching extension."""
    digest = hashlib.sha256()
    for path in (Path("setup.py"), *sorted(p for p in Path("csrc").rglob("*") if p.is_file())):
        digest.update(path.as_posix().encode() + path.read_bytes())
    return digest.hexdigest()


def compiler_seconds():
    """The CPU time of all finished child processes of this one."""
    import resource  # not available on every system that builds the pure package

    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def header_seconds(folder):
    """The CPU time for compiling one of torch's headers, as a measure of the speed of this machine.

    It is measured on all cores at once, as in a build, because two threads on one core are slower than one.
    """
    from torch.utils import cpp_extension

    Path(folder).mkdir(parents=True, exist_ok=True)
    Path(folder, "header.cpp").write_text("#include <torch/library.h>\n")
    command = [
        *shlex.split(cpp_extension.get_cxx_compiler()),
        "-std=c++20",
        "-O3",
        "-c",
        "header.cpp",
        "-o",
        os.devnull,
    ]
    for path in cpp_extension.include_paths():
        command += ["-isystem", path]
    before = compiler_seconds()
    running = [subprocess.Popen(command, cwd=folder) for _ in range(min(os.cpu_count() or 1, 8))]
    for process in running:
        if process.wait():
            raise subprocess.CalledProcessError(process.returncode, command)
    return (compiler_seconds() - before) / len(running)


def write_record(folder, record):
    """Write _build_info.py, which `fastvae doctor` reads."""
    lines = ['"""How this package was built and what it was built for. Written by setup.py."""', ""]
    lines += [f"{name} = {value!r}" for name, value in record.items()]
    Path(folder, "_build_info.py").write_text("\n".join(lines) + "\n")


def release_record():
    return {"WHEELS": WHEELS} if WHEELS else {}


@contextmanager
def report_progress(folder, files):
    """Report after every quarter how many of the object files have been compiled."""
    done, start = threading.Event(), time.monotonic()

    def watch():
        reported_quarters = 0
        while not done.wait(1):
            compiled = len(list(Path(folder).rglob("*.o")))
            if 4 * compiled // files > reported_quarters and compiled < files:
                reported_quarters = 4 * compiled // files
                announce(f"{compiled} of {files} files compiled after {time.monotonic() - start:.0f} s")

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield
    finally:
        done.set()
        watcher.join()


class BuildPython(build_py):
    def find_package_modules(self, package, package_dir):
        # A build record that an editable install left in the tree does not describe the wheel that is built now.
        modules = super().find_package_modules(package, package_dir)
        return [module for module in modules if module[1] != "_build_info"]


class BuildPurePython(BuildPython):
    """Records why there is no extension, because pip hides the output of a build that succeeds."""

    def run(self):
        super().run()
        folder = "fastvae" if self.editable_mode else Path(self.build_lib, "fastvae")
        if self.editable_mode and any(Path("fastvae").glob("_C*.so")):
            return  # an existing extension stays in use
        if os.environ.get("FASTVAE_NATIVE") != "0":
            announce(f"this is the pure package, which is slow, because {reason}")
        write_record(folder, {"WHY_PURE": reason} | release_record())


def extension_arguments():
    """The arguments of setup() that add the extension."""
    toolkit = find_toolkit() if read_choice("FASTVAE_CUDA") != "0" else (None, None)
    cuda = should_build_cuda(toolkit)

    import torch
    from torch.utils import cpp_extension
    from torch.utils.cpp_extension import BuildExtension, CppExtension, CUDAExtension

    arches = ""
    if cuda:
        cpp_extension.CUDA_HOME = toolkit[0]
        # Without this, torch would build for the GPUs of this machine, which may have none.
        arches = os.environ["TORCH_CUDA_ARCH_LIST"] = ";".join(cuda_arches(toolkit[1]))

    include_dirs = []
    if importlib.util.find_spec("pybind11"):  # otherwise torch's own copy is used
        import pybind11

        include_dirs.append(pybind11.get_include())
    if importlib.util.find_spec("ninja"):
        import ninja

        # Torch searches ninja on the PATH, which includes a virtual environment only while that is activated.
        os.environ["PATH"] = ninja.BIN_DIR + os.pathsep + os.environ.get("PATH", "")

    class BuildNative(BuildExtension):
        def finalize_options(self):
            super().finalize_options()
            # Otherwise an editable install would build in a temporary folder and compile everything again each time.
            self.build_temp = str(Path("build", f"{sys.implementation.cache_tag}-torch-{torch.__version__}"))

        def build_extension(self, ext):
            # Each set of flags needs its own run of ninja. They share the jobs and run concurrently, so that no core
            # idles while the last file of a set is compiled.
            jobs = int(os.environ.get("MAX_JOBS") or len(os.sched_getaffinity(0)) + 2)
            concurrent = min(jobs, 1 + len(INSTRUCTION_SETS)) if self.use_ninja else 1
            gpus = f" and CUDA {arches}" if cuda else ""
            files = len(INSTRUCTION_SETS) * len(list(Path("csrc/cpu").glob("*.cpp"))) + len(ext.sources)
            from_scratch = not any(Path(self.build_temp).rglob("*.o"))
            scope, minutes = "changed files", ""
            if from_scratch:
                scope, minutes = f"{files} files", "; the CPU kernels take two to four minutes on two cores"
            method = f"with up to {jobs} compilers at a time"
            if not self.use_ninja:
                method = "one after another, because ninja is not installed (pip install ninja)"
            announce(f"compiling {scope} for {', '.join(INSTRUCTION_SETS)}{gpus}, {method}{minutes}")
            os.environ["MAX_JOBS"] = str(jobs // concurrent)
            progress = report_progress(self.build_temp, files) if from_scratch else nullcontext()
            with progress, ThreadPoolExecutor(concurrent) as pool:
                by_set = [pool.submit(self.compile_kernels, ext, *item) for item in INSTRUCTION_SETS.items()]
                # super() makes the same call later, and then finds the objects up to date.
                rest = pool.submit(
                    self.compiler.compile,
                    ext.sources,
                    output_dir=self.build_temp,
                    include_dirs=ext.include_dirs,
                    debug=self.debug,
                    extra_postargs=ext.extra_compile_args,
                    depends=ext.depends,
                )
                rest.result()
                # If several objects contain an inline function (of std::vector, say), the linker keeps the first copy.
                # If that were the AVX-512 copy, the extension would crash on a machine without AVX-512. Therefore the
                # objects are linked in this order: extension.cpp (setuptools puts it before extra_objects), default,
                # avx2, avx512. Code that must differ between instruction sets is in a namespace of its own.
                for objects in by_set:
                    ext.extra_objects += objects.result()
            super().build_extension(ext)

        def compile_kernels(self, ext, name, flags):
            """Compile csrc/cpu for one instruction set, the largest files first, and return the objects."""
            sources = sorted(
                Path("csrc/cpu").glob("*.cpp"), key=lambda path: path.stat().st_size, reverse=True
            )
            return self.compiler.compile(
                list(map(str, sources)),
                output_dir=str(Path(self.build_temp, name)),
                include_dirs=ext.include_dirs,
                debug=self.debug,
                extra_postargs=[*compile_args, f"-DFASTVAE_ISA=isa_{name}", *flags],
            )

        def run(self):
            in_tree = self.inplace or self.editable_mode
            # tests/project/test_build.py checks that builds do not get slower. The machine's speed may change, so it is
            # measured before and after the build.
            timed = in_tree and not Path(self.build_temp).exists()
            headers = [header_seconds(self.build_temp)] if timed else []
            before = compiler_seconds()
            super().run()
            if timed:
                seconds = compiler_seconds() - before
                headers.append(header_seconds(self.build_temp))
                record = f"{seconds:.0f} {sum(headers) / len(headers):.2f}\n"
                Path(self.build_temp, "compiler_seconds").write_text(record)
            record = {
                "TORCH_VERSION": str(torch.__version__),
                "CUDA_VERSION": ".".join(map(str, toolkit[1])) if cuda else None,
                "PYTHON_VERSION": platform.python_version(),
                "CPU_CAPABILITIES": tuple(INSTRUCTION_SETS),
                "CUDA_ARCHES": tuple(arches.split(";")) if cuda else (),
                "SOURCES": digest_of_sources(),
            }
            record |= release_record()
            write_record(Path("fastvae") if in_tree else Path(self.build_lib, "fastvae"), record)

    # csrc/ops refers to the instruction sets that are compiled.
    compile_args = COMPILE_ARGS + [f"-DFASTVAE_HAVE_{name.upper()}" for name in INSTRUCTION_SETS]
    compiler = shlex.split(cpp_extension.get_cxx_compiler())
    if "clang" not in subprocess.run([*compiler, "--version"], capture_output=True, text=True).stdout:
        compile_args += GCC_ARGS
    sources = ["csrc/extension.cpp"]
    depends = sorted(
        str(path) for path in Path("csrc").rglob("*") if path.is_file()
    )  # for builds without ninja
    # The extension is not linked with -fopenmp, so that it uses the OpenMP runtime that torch depends on, whatever its
    # file name. A second runtime would have its own threads, which torch.set_num_threads could not control.
    if cuda:
        cuda_sources = [*Path("csrc/ops").glob("*_cuda.cpp"), *Path("csrc/cuda").glob("*.cu")]
        extension = CUDAExtension(
            "fastvae._C",
            sources + sorted(map(str, cuda_sources)),
            include_dirs=include_dirs,
            depends=depends,
            extra_compile_args={"cxx": compile_args, "nvcc": NVCC_ARGS},
        )
    else:
        extension = CppExtension(
            "fastvae._C",
            sources,
            include_dirs=include_dirs,
            depends=depends,
            extra_compile_args=compile_args,
        )
    torch_minor = ".".join(torch.__version__.split(".")[:2])
    local = f"+torch{torch_minor}" + (f".cu{''.join(map(str, toolkit[1]))}" if cuda else "")
    return {
        "version": VERSION + (local if WHEELS else ""),
        "ext_modules": [extension],
        "cmdclass": {"build_ext": BuildNative, "build_py": BuildPython},
        # The extension cannot be loaded by another minor version of torch.
        "install_requires": [f"torch=={torch_minor}.*", "numpy"],
    }


# Older versions fail on the licence in pyproject.toml, with a message about schemas.
if int(setuptools.__version__.split(".")[0]) < 77:
    fail(
        f"setuptools 77 or newer is required, but this is {setuptools.__version__}: pip install -U setuptools"
    )

WHEELS = os.environ.get("FASTVAE_WHEELS")
VERSION = runpy.run_path("fastvae/_version.py")["__version__"]
reason = why_pure()
setuptools.setup(
    **extension_arguments()
    if reason is None
    else {
        "version": VERSION,
        "cmdclass": {"build_py": BuildPurePython},
        "install_requires": ["torch>=2.11", "numpy"],
    }
)
