"""How the kernels cut up their work: a table by architecture and class of shape. Data, measured by `make gpu`.

Nothing is tuned while a user's program runs. Results depend on this table in their last bits (it says which numbers are
added up where), and on nothing else of the machine: not on how many processors are free, nor on what ran before.
"""

from functools import cache
from typing import NamedTuple

import torch

from .runtime import INTERPRETED


class Choice(NamedTuple):
    tile: int  # elements that a program handles at a time, a power of two
    warps: int  # that share a full tile
    programs: int  # that fill the chip: rows are split until there are about as many


KERNELS = ("nll", "logistic", "scale", "sample", "sample_gradient")

# What a class of shapes is called, and how many elements (rows * size) it ends at.
SMALL = 1 << 20

_DEFAULT = {
    ("nll", "small"): Choice(1024, 4, 1024),
    ("nll", "large"): Choice(2048, 4, 2048),
    # Of pixels: many planes for each, and much to compute.
    ("logistic", "small"): Choice(256, 2, 1024),
    ("logistic", "large"): Choice(512, 4, 2048),
    ("scale", "small"): Choice(1024, 4, 1024),
    ("scale", "large"): Choice(4096, 8, 1024),
    ("sample", "small"): Choice(512, 2, 1024),
    ("sample", "large"): Choice(1024, 4, 2048),
    ("sample_gradient", "small"): Choice(512, 2, 1024),
    ("sample_gradient", "large"): Choice(1024, 4, 2048),
}

# architecture -> (kernel, class) -> choice. Where there is no entry, that of "default" is taken. Threads of a full tile
# have 16 elements, so that eight 128-bit loads of two operands are under way in each, or 8, where there is more to
# compute. Small shapes take small tiles, because a chip has more than a hundred processors to give them to.
TABLE: dict[str, dict[tuple[str, str], Choice]] = {
    "default": _DEFAULT,
    # A warp has 64 threads here, on every gfx9.
    "gfx9": {key: choice._replace(warps=max(1, choice.warps // 2)) for key, choice in _DEFAULT.items()},
    # Triton's interpreter takes a millisecond or two for a program, however large.
    "interpreter": {(kernel, size): Choice(4096, 4, 4) for kernel in KERNELS for size in ("small", "large")},
}


@cache
def architecture(device: torch.device) -> str:
    """sm_90 for an H100 or H200, gfx942 for an MI300; "default" for what is neither NVIDIA's nor AMD's."""
    if INTERPRETED:
        return "interpreter"
    if device.type != "cuda":
        return "default"
    if torch.version.hip:
        return torch.cuda.get_device_properties(device).gcnArchName.partition(":")[0]
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


def choice(kernel: str, elements: int, device: torch.device) -> Choice:
    """What the table has for a kernel and so many elements: for the architecture, its family, or any."""
    key = kernel, "small" if elements <= SMALL else "large"
    name = architecture(device)
    for place in (name, name[:4]):
        if key in (found := TABLE.get(place, {})):
            return found[key]
    return TABLE["default"][key]
