"""The backend "native": the compiled extension `fastvae._C`, whose ops are in `torch.ops.fastvae`."""

import importlib
import platform
import re
from typing import Any

import torch

from .._version import __version__
from .base import CPU_OPS, Backend, Missing, from_ops

BUILD = "pip install --no-build-isolation -e . (in a clone of fastvae)"


def build_info() -> Any:
    """The module that setup.py wrote when it built the extension, or None."""
    try:
        return importlib.import_module("fastvae._build_info")
    except ImportError:
        return None


def _minor(version: str) -> str:
    return ".".join(version.split(".")[:2])


def _major(version: str | None) -> str:
    return (version or "").partition(".")[0]


def _install_advice(built: Any) -> str:
    """How to get a matching extension: by a build, or from a wheel if the package came from one."""
    wheels = getattr(built, "WHEELS", None)
    if wheels is None:
        return f"rebuild it with: {BUILD}"
    version = f"{__version__}+torch{_minor(torch.__version__)}"
    return (
        f'install the wheel for this torch with: pip install --find-links {wheels} "fastvae-elbo=={version}"'
    )


def load() -> Backend:
    built = build_info()
    advice = _install_advice(built)
    if (why := getattr(built, "WHY_PURE", None)) is not None:
        reinstall = advice if hasattr(built, "WHEELS") else f"then install it again: {BUILD}"
        raise Missing(f"fastvae was installed without its compiled extension: {why}; {reinstall}")
    if built is not None:
        # The versions are compared first, because loading an extension that was built for another torch or Python fails
        # with an unhelpful message about symbols.
        if _minor(built.TORCH_VERSION) != _minor(torch.__version__):
            raise Missing(
                f"the extension was built for torch {built.TORCH_VERSION} but this is torch {torch.__version__}; "
                f"{advice}"
            )
        if _minor(built.PYTHON_VERSION) != _minor(platform.python_version()):
            raise Missing(
                f"the extension was built for Python {built.PYTHON_VERSION} but this is Python "
                f"{platform.python_version()}; {advice}"
            )
        cuda = getattr(built, "CUDA_VERSION", None)
        if cuda is not None and _major(cuda) != _major(torch.version.cuda):
            raise Missing(
                f"the extension was built for CUDA {cuda} but this torch ({torch.__version__}) was built for "
                f"{f'CUDA {torch.version.cuda}' if torch.version.cuda else 'no CUDA'}; {advice}"
            )
    try:
        importlib.import_module("fastvae._C")
    except ModuleNotFoundError as error:
        if error.name != "fastvae._C":
            raise Missing(f"importing the extension failed ({error}); {advice}") from error
        raise Missing(f"the compiled extension is not installed; build it with: {BUILD}") from error
    except (ImportError, OSError) as error:
        first_line = str(error).partition("\n")[0]
        raise Missing(f"importing the extension failed ({first_line}); {advice}") from error
    try:
        backend = from_ops("native", "fastvae")
        for op in CPU_OPS:
            getattr(torch.ops.fastvae, op)
        return backend
    except AttributeError as error:  # the extension does not have all ops
        raise Missing(f"the extension was built from another version of fastvae; {advice}") from error


def built_for(capability: tuple[int, int]) -> bool:
    """Whether the CUDA kernels run on a GPU, as machine code of its generation or as PTX of an older one."""
    arches = getattr(build_info(), "CUDA_ARCHES", ())
    for arch in arches:
        if match := re.fullmatch(r"(\d+)\.(\d)(\+PTX)?", arch):
            built = int(match[1]), int(match[2])
            if built <= capability and (match[3] or built[0] == capability[0]):
                return True
        else:
            return True  # one of torch's names ("Hopper", "native"), or code for a single GPU ("9.0a")
    return not arches
