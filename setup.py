"""Builds the C++ extension of fastvae, or the pure package where there is nothing to build it with.

Everything that does not depend on the machine stands in pyproject.toml. The environment may say:

FASTVAE_NATIVE  auto (default): build the extension where torch and a C++ compiler are there;
                1: build it or fail; 0: the pure package, which runs on fastvae.reference.
FASTVAE_CUDA    auto (default) or 0; 1 fails, because this version has no CUDA kernels.
MAX_JOBS        how many compilers may run at a time (default: two more than there are cores).
"""

import importlib.util
import os
import platform
import shlex
import shutil
import sys
import sysconfig
from pathlib import Path

import setuptools
from setuptools.command.build_py import build_py

# csrc/cpu is compiled once for each of these, into a namespace of that name, and csrc/ops chooses among them when
# it is loaded. The least demanding comes first: see BuildNative.build_extension.
INSTRUCTION_SETS = {"default": ["-DCPU_CAPABILITY=DEFAULT", "-DCPU_CAPABILITY_DEFAULT"]}
if platform.machine() in ("x86_64", "AMD64"):
    avx2 = ["-mavx2", "-mfma", "-mf16c"]
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


def stop(message):
    raise SystemExit(f"fastvae: {message}")


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
            f"torch cannot be imported in the build environment ({error}); the extension fits only the torch it was "
            "built with, so install torch first, and then: pip install --no-build-isolation ."
        )
    if tuple(map(int, torch.__version__.split(".")[:2])) < (2, 11):
        return f"torch 2.11 or newer is needed, this is {torch.__version__}"
    compiler = shlex.split(get_cxx_compiler())[0]
    if shutil.which(compiler) is None:
        return f"no C++ compiler: {compiler!r} is not there; install g++, or set CXX"
    if not Path(sysconfig.get_path("include"), "Python.h").exists():
        return "the header Python.h is not there; install the development files of this Python (python3-dev)"
    return None


def native_wanted():
    wish = choice("FASTVAE_NATIVE")
    if wish == "0":
        return False
    reason = why_not_native()
    if reason is not None and wish == "1":
        stop(f"FASTVAE_NATIVE=1, but {reason}")
    if reason is not None:
        print(f"fastvae: building the pure package, which is slow, because {reason}", file=sys.stderr)
    return reason is None


class BuildPython(build_py):
    def find_package_modules(self, package, package_dir):
        # A build record left in the tree by an editable install says nothing about the wheel made now.
        modules = super().find_package_modules(package, package_dir)
        return [module for module in modules if module[1] != "_build_info"]


def native():
    """The arguments of setup() that add the extension."""
    import torch
    from torch.utils.cpp_extension import BuildExtension, CppExtension

    # The gate for CUDA kernels. It asks what torch was built for, never torch.cuda.is_available(): the machine that
    # builds needs no GPU.
    cuda = torch.version.cuda
    if choice("FASTVAE_CUDA") == "1":
        stop(f"FASTVAE_CUDA=1, but this version has no CUDA kernels yet (this torch: CUDA {cuda or 'none'})")

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
            # Of an inline function that several objects hold (std::vector's, say) the linker keeps the first copy it
            # meets. Were that the AVX-512 copy, the extension would crash a machine without it. So the objects are
            # linked in this order: module and ops (setuptools puts them before extra_objects), default, avx2,
            # avx512. What must differ between instruction sets lives in a namespace of its own.
            for name, flags in INSTRUCTION_SETS.items():
                ext.extra_objects += self.compiler.compile(
                    sorted(str(path) for path in Path("csrc/cpu").glob("*.cpp")),
                    output_dir=str(Path(self.build_temp, name)),
                    include_dirs=ext.include_dirs,
                    debug=self.debug,
                    extra_postargs=[*ext.extra_compile_args, f"-DFASTVAE_ISA=isa_{name}", *flags],
                )
            super().build_extension(ext)

        def run(self):
            super().run()
            in_tree = self.inplace or self.editable_mode
            record = {
                "TORCH_VERSION": str(torch.__version__),
                "CUDA_VERSION": cuda,
                "PYTHON_VERSION": platform.python_version(),
                "CPU_CAPABILITIES": tuple(INSTRUCTION_SETS),
                "CUDA_ARCHES": (),
            }
            lines = ['"""What the extension was built with and for; written by setup.py."""', ""]
            lines += [f"{name} = {value!r}" for name, value in record.items()]
            folder = Path("fastvae") if in_tree else Path(self.build_lib, "fastvae")
            (folder / "_build_info.py").write_text("\n".join(lines) + "\n")

    extension = CppExtension(
        "fastvae._C",
        ["csrc/module.cpp", *sorted(str(path) for path in Path("csrc/ops").glob("*.cpp"))],
        include_dirs=include_dirs,
        # csrc/ops refers to the instruction sets that are there.
        extra_compile_args=COMPILE_ARGS + [f"-DFASTVAE_HAVE_{name.upper()}" for name in INSTRUCTION_SETS],
        # Not linked with -fopenmp: then the OpenMP runtime is the one that torch itself depends on, whatever its
        # file is called. A second one would have threads of its own, out of reach of torch.set_num_threads.
    )
    torch_minor = ".".join(torch.__version__.split(".")[:2])
    return {
        "ext_modules": [extension],
        "cmdclass": {"build_ext": BuildNative, "build_py": BuildPython},
        # The extension loads into no other minor version.
        "install_requires": [f"torch=={torch_minor}.*", "numpy"],
    }


# Older versions stop at the licence in pyproject.toml, with a message about schemas.
if int(setuptools.__version__.split(".")[0]) < 77:
    stop(f"setuptools 77 or newer is needed, this is {setuptools.__version__}: pip install -U setuptools")

setuptools.setup(
    **native()
    if native_wanted()
    else {"cmdclass": {"build_py": BuildPython}, "install_requires": ["torch>=2.11", "numpy"]}
)
