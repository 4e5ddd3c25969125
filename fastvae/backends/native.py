"""The backend "native": the compiled extension `fastvae._C`, whose ops live in `torch.ops.fastvae`."""

import importlib
import platform
import re
from typing import Any

import torch

from .._version import __version__
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


def _cure(built: Any) -> str:
    """What brings an extension that fits: a build where the package was built, a wheel where it came from one."""
    wheels = getattr(built, "WHEELS", None)
    if wheels is None:
        return f"rebuild it with: {BUILD}"
    version = f"{__version__}+torch{_minor(torch.__version__)}"
    return (
        f'install the wheel for this torch with: pip install --find-links {wheels} "fastvae-elbo=={version}"'
    )


def load() -> Backend:
    built = build_info()
    cure = _cure(built)
    if (why := getattr(built, "WHY_PURE", None)) is not None:
        again = cure if hasattr(built, "WHEELS") else f"then install it again: {BUILD}"
        raise Missing(f"fastvae was installed without its compiled extension: {why}; {again}")
    if built is not None:
        # Compared first, because an extension built for another torch or Python fails to load with a message about
        # symbols that tells a user nothing.
        if _minor(built.TORCH_VERSION) != _minor(torch.__version__):
            raise Missing(
                f"the extension was built for torch {built.TORCH_VERSION} and this is torch {torch.__version__}; "
                f"{cure}"
            )
        if _minor(built.PYTHON_VERSION) != _minor(platform.python_version()):
            raise Missing(
                f"the extension was built for Python {built.PYTHON_VERSION} and this is Python "
                f"{platform.python_version()}; {cure}"
            )
        cuda = getattr(built, "CUDA_VERSION", None)
        if cuda is not None and _major(cuda) != _major(torch.version.cuda):
            raise Missing(
                f"the extension was built for CUDA {cuda} and this torch ({torch.__version__}) is for "
                f"{f'CUDA {torch.version.cuda}' if torch.version.cuda else 'no CUDA'}; {cure}"
            )
    try:
        importlib.import_module("fastvae._C")
    except ModuleNotFoundError as error:
        if error.name != "fastvae._C":
            raise Missing(f"importing the extension failed ({error}); {cure}") from error
        raise Missing(f"the compiled extension is not installed; build it with: {BUILD}") from error
    except (ImportError, OSError) as error:
        first_line = str(error).partition("\n")[0]
        raise Missing(f"importing the extension failed ({first_line}); {cure}") from error
    try:
        return from_ops("native", "fastvae")
    except AttributeError as error:  # an op that is newer than the extension
        raise Missing(f"the extension was built from another version of fastvae; {cure}") from error


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
