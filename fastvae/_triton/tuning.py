"""How the kernels divide their work: a table of measurements from `make gpu`, by architecture and class of shape.

Nothing is tuned while a user's program runs. The last bits of results depend on this table, because it determines the
order of summation, but on nothing else about the machine, such as how many processors are free or what ran before.
"""

from functools import cache
from typing import NamedTuple

import torch

from .runtime import INTERPRETED


class Choice(NamedTuple):
    tile: int  # the number of elements that a program handles at a time, a power of two
    warps: int  # the number of warps that share a full tile
    programs: int  # the number of programs that fill the chip; rows are split until there are about this many


KERNELS = ("nll", "counts", "logistic", "scale", "sample", "sample_gradient", "mixture")

# Shapes with at most this many elements (rows * size) are in the class "small", all others in "large".
SMALL = 1 << 20

_DEFAULT = {
    ("nll", "small"): Choice(1024, 4, 1024),
    ("nll", "large"): Choice(2048, 4, 2048),
    # A warp takes a tile, because it need not wait for others where it lists its counts above zero.
    ("counts", "small"): Choice(256, 1, 4096),
    ("counts", "large"): Choice(256, 1, 4096),
    # These tiles are in pixels, each of which has many planes and much to compute.
    ("logistic", "small"): Choice(256, 2, 1024),
    ("logistic", "large"): Choice(512, 4, 2048),
    ("scale", "small"): Choice(1024, 4, 1024),
    ("scale", "large"): Choice(4096, 8, 1024),
    ("sample", "small"): Choice(512, 2, 1024),
    ("sample", "large"): Choice(1024, 4, 2048),
    ("sample_gradient", "small"): Choice(512, 2, 1024),
    ("sample_gradient", "large"): Choice(1024, 4, 2048),
    # These tiles are pairs of a point and a component.
    ("mixture", "small"): Choice(1024, 4, 256),
    ("mixture", "large"): Choice(1024, 4, 1024),
}

# Maps architecture -> (kernel, class) -> choice. If there is no entry, that of "default" is used. In a full tile, a
# thread has 16 elements, so that it has eight 128-bit loads of two operands in flight, or 8 elements where there is
# more to compute. Small shapes use small tiles, because a chip has more than a hundred processors to keep busy.
TABLE: dict[str, dict[tuple[str, str], Choice]] = {
    "default": _DEFAULT,
    # A warp has 64 threads on every gfx9.
    "gfx9": {key: choice._replace(warps=max(1, choice.warps // 2)) for key, choice in _DEFAULT.items()}
    | {("counts", size): Choice(512, 1, 4096) for size in ("small", "large")},
    # Triton's interpreter takes a millisecond or two per program, no matter how large the tile is.
    "interpreter": {(kernel, size): Choice(4096, 4, 4) for kernel in KERNELS for size in ("small", "large")},
}


@cache
def architecture(device: torch.device) -> str:
    """For example sm_90 for an H100 or H200 and gfx942 for an MI300; "default" if it is neither from NVIDIA nor AMD."""
    if INTERPRETED:
        return "interpreter"
    if device.type != "cuda":
        return "default"
    if torch.version.hip:
        return torch.cuda.get_device_properties(device).gcnArchName.partition(":")[0]
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


def choice(kernel: str, elements: int, device: torch.device) -> Choice:
    """The table's choice for a kernel and a number of elements, for the architecture, its family or the default."""
    key = kernel, "small" if elements <= SMALL else "large"
    name = architecture(device)
    for place in (name, name[:4]):
        if key in (found := TABLE.get(place, {})):
            return found[key]
    return TABLE["default"][key]
