"""How an op becomes launches: dense views of its tensors, a partition of its work, and the call itself."""

import inspect
import math
from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .tuning import Choice

# ---------------------------------------------------------------------------------------------------------------------
# Views
# ---------------------------------------------------------------------------------------------------------------------


def row_dtype(tensor: Tensor) -> torch.dtype:
    """Sums and results per row are float32 whatever the input, float64 for float64."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


# The types of computation, for the kernels.
COMPUTE = {torch.float32: tl.float32, torch.float64: tl.float64}


def memory_order(lead: Tensor) -> torch.memory_format:
    """The order that rows are read and gradients written in: the lead operand's own where it is dense."""
    if not lead.is_contiguous():
        if lead.dim() == 4 and lead.is_contiguous(memory_format=torch.channels_last):
            return torch.channels_last
        if lead.dim() == 5 and lead.is_contiguous(memory_format=torch.channels_last_3d):
            return torch.channels_last_3d
    return torch.contiguous_format


def dense_rows(tensor: Tensor, order: torch.memory_format = torch.contiguous_format) -> Tensor:
    """`tensor` with its event dimensions dense in `order`, a copy where they are not.

    Any stride of the batch will do, so that slices of a packed head and expanded data pass as they are.
    """
    if tensor.is_contiguous(memory_format=order):
        return tensor
    sizes, strides = tensor.shape, tensor.stride()
    if order == torch.contiguous_format:
        dimensions = range(len(sizes) - 1, 0, -1)
    else:
        dimensions = (1, *range(len(sizes) - 1, 1, -1))  # type: ignore[assignment]
    dense = 1
    for i in dimensions:
        if sizes[i] != 1 and strides[i] != dense:
            return tensor.contiguous(memory_format=order)
        dense *= sizes[i]
    return tensor


def event_size(tensor: Tensor) -> int:
    return math.prod(tensor.shape[1:])


def row_stride(tensor: Tensor | None) -> int:
    """Of a (B,) tensor; 0 of a single number, which then serves for all rows, and of none."""
    return tensor.stride(0) if tensor is not None and tensor.dim() else 0


def divisor(*numbers: int) -> int:
    """The largest power of two up to 16 that divides all sizes and strides.

    Kernels are given these in units of it. So the compiler knows that rows start, and end, where a 128-bit access may;
    of plain arguments it would look only for 16.
    """
    return math.gcd(16, *numbers)


# ---------------------------------------------------------------------------------------------------------------------
# Partitions
# ---------------------------------------------------------------------------------------------------------------------


class Partition(NamedTuple):
    """A program takes `rows` rows and of them `tiles` tiles of `columns` columns: split number (program % splits)."""

    rows: int
    columns: int
    tiles: int
    splits: int
    programs: int
    warps: int
    wide: bool  # a row has too many elements for 32-bit columns


@lru_cache(maxsize=1024)
def partition(rows: int, size: int, choice: Choice, narrowest: int = 1) -> Partition:
    """Cuts (rows, size) up: short rows are taken several at a time, long ones are split.

    A function of the shape and the table alone, as is then the order in which numbers are added up. `narrowest` is the
    fewest columns of a tile.
    """
    columns = _columns(size, choice.tile, narrowest)
    # Not fewer for fewer rows: a kernel is compiled for the group, and a small last batch must not wait for that.
    group = max(1, choice.tile // columns)
    row_groups = -(-rows // group)
    row_tiles = -(-size // columns)
    splits = min(max(1, choice.programs // max(1, row_groups)), max(1, row_tiles))
    tiles = -(-row_tiles // splits)
    splits = -(-row_tiles // tiles) if tiles else 1
    warps = max(1, choice.warps * group * columns // choice.tile)
    return Partition(group, columns, tiles, splits, row_groups * splits, warps, size > 2**31 - 2**20)


def _power_of_two(n: int) -> int:
    """The smallest that is at least n."""
    return 1 << max(0, n - 1).bit_length()


def _columns(size: int, tile: int, narrowest: int) -> int:
    """The widest tile of a row of `size` elements that wastes little more at the row's end than others would."""
    if size <= 256 or narrowest >= tile:
        return min(tile, max(narrowest, _power_of_two(size)))
    candidates = [1 << i for i in range(8, tile.bit_length()) if 1 << i <= max(256, _power_of_two(size))]
    padded = {columns: -(-size // columns) * columns for columns in candidates}
    bound = min(padded.values()) * 17 // 16
    return max(columns for columns in candidates if padded[columns] <= bound)


def splits_at_a_time(splits: int) -> int:
    """How many of a row's partial sums are added up at a time.

    Few values, because a kernel is compiled for each, and the number of splits differs from batch to batch.
    """
    return 1 if splits == 1 else 16 if splits <= 16 else 256


# ---------------------------------------------------------------------------------------------------------------------
# The call
# ---------------------------------------------------------------------------------------------------------------------


# Marks the sizes and strides among a kernel's parameters; the type follows from the value. Written in quotes, because
# Triton looks at annotations too.
number = Any


def kernel(function: Callable[..., None]) -> Any:
    """`triton.jit` that compiles once for all values of the parameters marked `number`.

    Triton would compile anew for a 1, and for what 16 divides. What matters of sizes and strides is in `divisor`, and a
    last batch of another size must not make a training loop wait.
    """
    parameters = inspect.signature(function).parameters.values()
    numbers = [parameter.name for parameter in parameters if parameter.annotation == "number"]
    return triton.jit(function, do_not_specialize=numbers)


def launch(
    function: Any, programs: int, device: torch.device, *args: Any, num_warps: int, **constants: Any
) -> None:
    """Runs a kernel on the tensors' device, which need not be the current one, and on its current stream."""
    if programs == 0:
        return
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        with torch.cuda.device(device):
            function[(programs,)](*args, num_warps=num_warps, **constants)
    else:
        function[(programs,)](*args, num_warps=num_warps, **constants)
