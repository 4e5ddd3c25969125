"""Builds the C++ extension of fastvae, or the pure package where there is nothing to build it with.

Everything that does not depend on the machine stands in pyproject.toml. The environment may say:

FASTVAE_NATIVE  auto (default): build the extension where torch and a C++ compiler are there;
                1: build it or fail; 0: the pure package, which runs on fastvae.reference.
FASTVAE_CUDA    auto (default): build the CUDA kernels too where torch is a CUDA build and nvcc is there;
                1: build them or fail; 0: leave them out. The machine that builds needs no GPU.
TORCH_CUDA_ARCH_LIST  the GPUs to build for, as of torch ("9.0", "8.0;9.0+PTX"); see CUDA_ARCHES for the default.
CUDA_HOME       where the CUDA toolkit is (default: where nvcc is, or /usr/local/cuda).
MAX_JOBS        how many compilers may run at a time (default: two more than there are cores).
FASTVAE_WHEELS  where the wheels of this release are to be found; set by .ci/wheels.py alone. The version of a
                wheel with the extension then names the torch that it is for, and either kind of wheel remembers where
                the others are.
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

# csrc/cpu is compiled once for each of these, into a namespace of that name, and csrc/ops chooses among them when
# it is loaded. The least demanding comes first: see BuildNative.build_extension.
INSTRUCTION_SETS = {"default": ["-DCPU_CAPABILITY=DEFAULT", "-DCPU_CAPABILITY_DEFAULT"]}
if platform.machine() in ("x86_64", "AMD64"):
    # Processors without AVX2 are older than 2013. Optimised for speed, their kernels took a third of the whole build.
    INSTRUCTION_SETS["default"] += ["-Os"]
    # Tuned for what is common in data centres; it runs on every processor that has the instructions.
    avx2 = ["-mavx2", "-mfma", "-mf16c", "-mtune=icelake-server"]
    avx512 = ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", *avx2]
    INSTRUCTION_SETS["avx2"] = ["-DCPU_CAPABILITY=AVX2", "-DCPU_CAPABILITY_AVX2", *avx2]
    INSTRUCTION_SETS["avx512"] = ["-DCPU_CAPABILITY=AVX512", "-DCPU_CAPABILITY_AVX512", *avx512]
    # GCC 12 finds fault with its own intrinsics.
    INSTRUCTION_SETS["avx512"] += ["-Wno-uninitialized", "-Wno-maybe-uninitialized"]

# No -std: torch adds the one that its headers need. No -ffast-math: NaN and infinity must come out as they should.
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

# Without these GCC leaves a kernel's instructions in the order of the source, chains that wait one behind the other.
GCC_ARGS = ["-fschedule-insns", "-fsched-pressure"]

# No --use_fast_math: csrc/cuda itself says where an approximation is accurate enough. Threads: one for each GPU.
NVCC_ARGS = ["-O3", "--threads=4", "-Xcompiler=-fvisibility=hidden,-fvisibility-inlines-hidden"]

# By toolkit, the first that is not newer: A100, H100 and B200; PTX of the last serves what comes after it. Code for 8.0
# runs on 8.6 and 8.9 as well.
CUDA_ARCHES = {(12, 8): "8.0;9.0;10.0+PTX", (0, 0): "8.0;9.0+PTX"}


def stop(message):
    raise SystemExit(f"fastvae: {message}")


def tell(message):
    """Says it to whoever waits: pip shows nothing of a build that succeeds, unless it is asked to with -v."""
    print(f"fastvae: {message}", file=sys.stderr, flush=True)
    # The script in which pip and its like run a build.
    captured = Path(getattr(sys.modules["__main__"], "__file__", None) or "").name == "_in_process.py"
    if captured and os.name == "posix":
        with suppress(OSError):  # where nobody sits at a terminal
            # Pip has begun a line there.
            Path("/dev/tty").write_text(f"\n  fastvae: {message}\n")


def choice(variable):
    value = os.environ.get(variable, "auto")
    if value not in ("0", "1", "auto"):
        stop(f"{variable} must be 0, 1 or auto, got {value!r}")
    return value


def why_not_native():
    """What keeps the extension from being built here, with what mends it; None if nothing does."""
    if sys.platform != "linux":
        return "the extension is built on Linux only"
    try:
        import torch
        from torch.utils.cpp_extension import get_cxx_compiler
    except ImportError as error:
        return (
            f"torch cannot be imported in the build environment ({error}), which pip makes anew for every build; the "
            "extension fits only the torch it was built with, so install torch, ninja and pybind11 into your own "
            "environment and build there, with --no-build-isolation"
        )
    if tuple(map(int, torch.__version__.split(".")[:2])) < (2, 11):
        return f"torch 2.11 or newer is needed, this is {torch.__version__}"
    compiler = shlex.split(get_cxx_compiler())[0]
    if shutil.which(compiler) is None:
        return f"no C++ compiler: {compiler!r} is not there; install g++, or set CXX"
    if not Path(sysconfig.get_path("include"), "Python.h").exists():
        return "the header Python.h is not there; install the development files of this Python (python3-dev)"
    return None


def why_pure():
    """Why the extension is not built, with what mends it; None where it is."""
    wish = choice("FASTVAE_NATIVE")
    if wish == "0":
        return (
            "it is the pure wheel" if WHEELS else "FASTVAE_NATIVE=0 was set when it was installed; unset it"
        )
    reason = why_not_native()
    if reason is not None and wish == "1":
        stop(f"FASTVAE_NATIVE=1, but {reason}")
    return reason


def find_toolkit():
    """Folder and version (a pair) of the CUDA toolkit, or (None, None).

    Torch takes the folder above nvcc's, wrong where that nvcc is a script that calls another one.
    """
    given = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    nvcc = shutil.which("nvcc")
    found = [Path(nvcc).resolve().parents[1]] if nvcc else []
    for home in [Path(given)] if given else [*found, Path("/usr/local/cuda")]:
        if Path(home, "bin/nvcc").exists() and Path(home, "include/cuda_runtime_api.h").exists():
            told = subprocess.run([home / "bin/nvcc", "--version"], capture_output=True, text=True).stdout
            if version := re.search(r"release (\d+)\.(\d+)", told):
                return str(home), (int(version[1]), int(version[2]))
    return None, None


def why_not_cuda(toolkit):
    """What keeps the CUDA kernels from being built here, with what mends it; None if nothing does."""
    import torch

    if torch.version.cuda is None:
        return (
            f"this torch ({torch.__version__}) is not built for CUDA; get one that is from: "
            "https://pytorch.org/get-started"
        )
    home, version = toolkit
    if home is None:
        given = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
        where = f"in CUDA_HOME={given}" if given else "on the PATH nor in /usr/local/cuda"
        return (
            f"there is no CUDA toolkit (nvcc with its headers) {where}; install CUDA {torch.version.cuda}, or set "
            "CUDA_HOME to its folder"
        )
    major = int(torch.version.cuda.split(".")[0])
    if version[0] != major:
        return (
            f"the CUDA toolkit in {home} is version {version[0]}.{version[1]}, and this torch was built with CUDA "
            f"{torch.version.cuda}; install a toolkit {major}.x and set CUDA_HOME to its folder"
        )
    return None


def cuda_arches(version):
    """The GPUs to build for. Lists of old ones are set in many a container: of those, what the kernels can run on."""
    default = next(arches for oldest, arches in CUDA_ARCHES.items() if version >= oldest)
    named = re.split("[; ]+", (os.environ.get("TORCH_CUDA_ARCH_LIST") or default).strip("; "))
    kept = [arch for arch in named if not re.match(r"[1-7]\.\d", arch)]
    if not kept:
        stop(
            f"TORCH_CUDA_ARCH_LIST names {', '.join(named)}, and the CUDA kernels need compute capability 8.0; name a "
            "newer one, or leave them out with FASTVAE_CUDA=0: Triton's kernels serve older GPUs"
        )
    return kept


def cuda_wanted(toolkit):
    wish = choice("FASTVAE_CUDA")
    if wish == "0":
        return False
    reason = why_not_cuda(toolkit)
    if reason is not None and wish == "1":
        stop(f"FASTVAE_CUDA=1, but {reason}")
    import torch

    # With a torch for CPUs nobody expects them.
    if reason is not None and torch.version.cuda is not None:
        print(f"fastvae: no CUDA kernels, because {reason}", file=sys.stderr)
    return reason is None


def digest_of_sources():
    """Of all that the extension is made of: whether one fits, benchmarks/gpu/build.py asks."""
    digest = hashlib.sha256()
    for path in (Path("setup.py"), *sorted(p for p in Path("csrc").rglob("*") if p.is_file())):
        digest.update(path.as_posix().encode() + path.read_bytes())
    return digest.hexdigest()


def compiler_seconds():
    """The CPU time of all processes that this one has started and waited for."""
    import resource  # not on every system that builds the pure package

    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def header_seconds(folder):
    """The CPU time that one of torch's headers takes: how fast this machine compiles.

    On every core at once, as a build does it: two threads of one core are slower than one alone.
    """
    from torch.utils import cpp_extension

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
    lines = ['"""How this package was built, and for what; written by setup.py."""', ""]
    lines += [f"{name} = {value!r}" for name, value in record.items()]
    Path(folder, "_build_info.py").write_text("\n".join(lines) + "\n")


def release_record():
    return {"WHEELS": WHEELS} if WHEELS else {}


@contextmanager
def progress(folder, files):
    """Tells after every quarter how many of the object files there are."""
    done, start = threading.Event(), time.monotonic()

    def watch():
        told = 0
        while not done.wait(1):
            found = len(list(Path(folder).rglob("*.o")))
            if 4 * found // files > told and found < files:
                told = 4 * found // files
                tell(f"{found} of {files} files are compiled, after {time.monotonic() - start:.0f} s")

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield
    finally:
        done.set()
        watcher.join()


class BuildPython(build_py):
    def find_package_modules(self, package, package_dir):
        # A build record left in the tree by an editable install says nothing about the wheel made now.
        modules = super().find_package_modules(package, package_dir)
        return [module for module in modules if module[1] != "_build_info"]


class BuildPurePython(BuildPython):
    """Keeps the reason why there is no extension: pip shows nothing of a build that succeeds."""

    def run(self):
        super().run()
        folder = "fastvae" if self.editable_mode else Path(self.build_lib, "fastvae")
        if self.editable_mode and any(Path("fastvae").glob("_C*.so")):
            return  # an extension that is there goes on serving
        if os.environ.get("FASTVAE_NATIVE") != "0":
            tell(f"this is the pure package, which is slow, because {reason}")
        write_record(folder, {"WHY_PURE": reason} | release_record())


def native():
    """The arguments of setup() that add the extension."""
    toolkit = find_toolkit() if choice("FASTVAE_CUDA") != "0" else (None, None)
    cuda = cuda_wanted(toolkit)

    import torch
    from torch.utils import cpp_extension
    from torch.utils.cpp_extension import BuildExtension, CppExtension, CUDAExtension

    arches = ""
    if cuda:
        cpp_extension.CUDA_HOME = toolkit[0]
        # Without it torch would build for the GPUs of this machine, of which there may be none.
        arches = os.environ["TORCH_CUDA_ARCH_LIST"] = ";".join(cuda_arches(toolkit[1]))

    include_dirs = []
    if importlib.util.find_spec("pybind11"):  # else torch's own copy serves
        import pybind11

        include_dirs.append(pybind11.get_include())
    if importlib.util.find_spec("ninja"):
        import ninja

        # Torch looks for the program on the PATH, where a virtual environment is only while it is activated.
        os.environ["PATH"] = ninja.BIN_DIR + os.pathsep + os.environ.get("PATH", "")

    class BuildNative(BuildExtension):
        def finalize_options(self):
            super().finalize_options()
            # An editable install would build in a temporary folder, and compile everything again each time.
            self.build_temp = str(Path("build", f"{sys.implementation.cache_tag}-torch-{torch.__version__}"))

        def build_extension(self, ext):
            # Each set of flags is a run of ninja of its own. They share the jobs and run side by side, so that no core
            # waits for the last file of a set.
            jobs = int(os.environ.get("MAX_JOBS") or len(os.sched_getaffinity(0)) + 2)
            at_once = min(jobs, 1 + len(INSTRUCTION_SETS)) if self.use_ninja else 1
            gpus = f" and CUDA {arches}" if cuda else ""
            files = len(INSTRUCTION_SETS) * len(list(Path("csrc/cpu").glob("*.cpp"))) + len(ext.sources)
            from_nothing = not any(Path(self.build_temp).rglob("*.o"))
            what, minutes = "what has changed", ""
            if from_nothing:
                what, minutes = f"{files} files", "; the CPU kernels take two to four minutes on two cores"
            how = f"with up to {jobs} compilers at a time"
            if not self.use_ninja:
                how = "one after the other, because ninja is not installed (pip install ninja)"
            tell(f"compiling {what} for {', '.join(INSTRUCTION_SETS)}{gpus}, {how}{minutes}")
            os.environ["MAX_JOBS"] = str(jobs // at_once)
            watch = progress(self.build_temp, files) if from_nothing else nullcontext()
            with watch, ThreadPoolExecutor(at_once) as pool:
                by_set = [pool.submit(self.compile_kernels, ext, *item) for item in INSTRUCTION_SETS.items()]
                # The same call as super() makes, which then finds the objects up to date.
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
                # Of an inline function that several objects hold (std::vector's, say) the linker keeps the first copy
                # it meets. Were that the AVX-512 copy, the extension would crash a machine without it. So the objects
                # are linked in this order: extension.cpp (setuptools puts it before extra_objects), default, avx2,
                # avx512. What must differ between instruction sets lives in a namespace of its own.
                for objects in by_set:
                    ext.extra_objects += objects.result()
            super().build_extension(ext)

        def compile_kernels(self, ext, name, flags):
            """Compiles csrc/cpu for one instruction set, the largest files first; returns the objects."""
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
            everything = not Path(self.build_temp).exists()
            before = compiler_seconds()
            super().run()
            if everything:  # tests/project/test_build.py looks whether it takes longer than it did
                seconds = compiler_seconds() - before
                record = f"{seconds:.0f} {header_seconds(self.build_temp):.2f}\n"
                Path(self.build_temp, "compiler_seconds").write_text(record)
            in_tree = self.inplace or self.editable_mode
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

    # csrc/ops refers to the instruction sets that are there.
    compile_args = COMPILE_ARGS + [f"-DFASTVAE_HAVE_{name.upper()}" for name in INSTRUCTION_SETS]
    compiler = shlex.split(cpp_extension.get_cxx_compiler())
    if "clang" not in subprocess.run([*compiler, "--version"], capture_output=True, text=True).stdout:
        compile_args += GCC_ARGS
    sources = ["csrc/extension.cpp"]
    depends = sorted(
        str(path) for path in Path("csrc").rglob("*") if path.is_file()
    )  # for builds without ninja
    # Not linked with -fopenmp: then the OpenMP runtime is the one that torch itself depends on, whatever its file is
    # called. A second one would have threads of its own, out of reach of torch.set_num_threads.
    if cuda:
        for_cuda = [*Path("csrc/ops").glob("*_cuda.cpp"), *Path("csrc/cuda").glob("*.cu")]
        extension = CUDAExtension(
            "fastvae._C",
            sources + sorted(map(str, for_cuda)),
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
        # The extension loads into no other minor version.
        "install_requires": [f"torch=={torch_minor}.*", "numpy"],
    }


# Older versions stop at the licence in pyproject.toml, with a message about schemas.
if int(setuptools.__version__.split(".")[0]) < 77:
    stop(f"setuptools 77 or newer is needed, this is {setuptools.__version__}: pip install -U setuptools")

WHEELS = os.environ.get("FASTVAE_WHEELS")
VERSION = runpy.run_path("fastvae/_version.py")["__version__"]
reason = why_pure()
setuptools.setup(
    **native()
    if reason is None
    else {
        "version": VERSION,
        "cmdclass": {"build_py": BuildPurePython},
        "install_requires": ["torch>=2.11", "numpy"],
    }
)
