"""The backend "native": the compiled extension `fastvae._C`, whose ops live in `torch.ops.fastvae`."""

import importlib
import platform
import re
from typing import Any

import torch

from .base import Backend, Missing, from_ops

BUILD = "pip install --no-build-isolation -e . (in a clone of fastvae)"


def build_info() -> Any:
    """What setup.py wrote when it built the extension, or None."""
    try:
        return importlib.import_module("fastvae._build_info")
    except ImportError:
        return None


def _minor(version: str) -> str:
    return ".".join(version.split(".")[:2])


def _major(version: str | None) -> str:
    return (version or "").partition(".")[0]


def load() -> Backend:
    built = build_info()
    if (why := getattr(built, "WHY_PURE", None)) is not None:
        raise Missing(
            f"fastvae was installed without its compiled extension: {why}; then install it again: {BUILD}"
        )
    if built is not None:
        # Compared first, because an extension built for another torch or Python fails to load with a message about
        # symbols that tells a user nothing.
        if _minor(built.TORCH_VERSION) != _minor(torch.__version__):
            raise Missing(
                f"the extension was built for torch {built.TORCH_VERSION} and this is torch {torch.__version__}; "
                f"rebuild it with: {BUILD}"
            )
        if _minor(built.PYTHON_VERSION) != _minor(platform.python_version()):
            raise Missing(
                f"the extension was built for Python {built.PYTHON_VERSION} and this is Python "
                f"{platform.python_version()}; rebuild it with: {BUILD}"
            )
        cuda = getattr(built, "CUDA_VERSION", None)
        if cuda is not None and _major(cuda) != _major(torch.version.cuda):
            raise Missing(
                f"the extension was built for CUDA {cuda} and this torch ({torch.__version__}) is for "
                f"{f'CUDA {torch.version.cuda}' if torch.version.cuda else 'no CUDA'}; rebuild it with: {BUILD}"
            )
    try:
        importlib.import_module("fastvae._C")
    except ModuleNotFoundError as error:
        if error.name != "fastvae._C":
            raise Missing(f"importing the extension failed ({error}); rebuild it with: {BUILD}") from error
        raise Missing(f"the compiled extension is not installed; build it with: {BUILD}") from error
    except (ImportError, OSError) as error:
        first_line = str(error).partition("\n")[0]
        raise Missing(f"importing the extension failed ({first_line}); rebuild it with: {BUILD}") from error
    try:
        return from_ops("native", "fastvae")
    except AttributeError as error:  # an op that is newer than the extension
        raise Missing(
            f"the extension was built from another version of fastvae; rebuild it with: {BUILD}"
        ) from error


def built_for(capability: tuple[int, int]) -> bool:
    """Whether the extension's CUDA kernels run on a GPU: as machine code of its generation or PTX of an older one."""
    arches = getattr(build_info(), "CUDA_ARCHES", ())
    for arch in arches:
        if found := re.fullmatch(r"(\d+)\.(\d)(\+PTX)?", arch):
            built = int(found[1]), int(found[2])
            if built <= capability and (found[3] or built[0] == capability[0]):
                return True
        else:
            return True  # a name of torch's, "Hopper" or "native", or code for one GPU alone: "9.0a"
    return not arches
