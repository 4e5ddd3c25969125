"""What it takes to launch a kernel: dense views of tensors, a partition of the work, and the call itself."""

import inspect
import math
from collections.abc import Callable, Sequence
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
    """The type of sums and results per row: float64 for float64 inputs, and float32 for all others."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


# Maps the type of rows to the type that kernels compute in.
COMPUTE = {torch.float32: tl.float32, torch.float64: tl.float64}


def memory_order(lead: Tensor) -> torch.memory_format:
    """The order in which rows are read and gradients written: that of the lead operand, if it is dense."""
    if not lead.is_contiguous():
        if lead.dim() == 4 and lead.is_contiguous(memory_format=torch.channels_last):
            return torch.channels_last
        if lead.dim() == 5 and lead.is_contiguous(memory_format=torch.channels_last_3d):
            return torch.channels_last_3d
    return torch.contiguous_format


def dense_rows(tensor: Tensor, order: torch.memory_format = torch.contiguous_format) -> Tensor:
    """Returns `tensor` with its event dimensions dense in `order`, and copies it only if they are not.

    The batch may have any stride, so that slices of a packed head and expanded data are not copied.
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
    """The stride of a (B,) tensor; 0 for a single number, which all rows then share, and for None."""
    return tensor.stride(0) if tensor is not None and tensor.dim() else 0


class WeightView(NamedTuple):
    """The arguments by which a kernel reads the weights of elements, and the constant `KIND`.

    The dimensions of a row are nested loops of `sizes` with `strides`, the innermost first; a stride of 0 repeats a
    weight. KIND is 0 if there are no weights, 1 if they are dense, 2 if a row has only one, and otherwise the number of
    loops, 2 to 4, plus 1. The outermost loop needs no size.
    """

    tensor: Tensor | None = None
    row_stride: int = 0
    sizes: tuple[int, int, int] = (1, 1, 1)
    strides: tuple[int, int, int, int] = (0, 0, 0, 0)
    kind: int = 0

    @property
    def arguments(self) -> tuple[Any, ...]:
        return (self.tensor, self.row_stride, *self.sizes, *self.strides)


def weight_view(
    weight: Tensor | None, sizes: Sequence[int], order: torch.memory_format = torch.contiguous_format
) -> WeightView:
    """A view of the weights of elements, positions or pixels of these sizes, (B, ...), which are read in `order`."""
    if weight is None:
        return WeightView()
    dimensions = list(range(weight.dim() - 1, 0, -1))
    if order != torch.contiguous_format:
        dimensions = [1, *dimensions[:-1]]
    loops: list[list[int]] = []
    for i in dimensions:
        size, stride = sizes[i], weight.stride(i) if weight.shape[i] > 1 else 0
        if size == 1:
            continue
        if loops and stride == loops[-1][0] * loops[-1][1]:
            loops[-1][0] *= size
        else:
            loops.append([size, stride])
    row_stride_ = weight.stride(0) if weight.shape[0] > 1 else 0
    if not loops or (len(loops) == 1 and loops[0][1] == 0):
        return WeightView(weight, row_stride_, kind=2)
    if len(loops) == 1 and loops[0][1] == 1:
        return WeightView(weight, row_stride_, kind=1)
    if len(loops) > 4:
        raise ValueError(
            f"fastvae::nll: the `weight` has too many broadcast dimensions; pass weight.expand({tuple(sizes)})"
            ".contiguous()"
        )
    count = max(2, len(loops))
    loops += [[1, 0]] * (4 - len(loops))
    first, second, third, _ = (size for size, _ in loops)
    strides = (loops[0][1], loops[1][1], loops[2][1], loops[3][1])
    return WeightView(weight, row_stride_, (first, second, third), strides, count + 1)


def divisor(*numbers: int) -> int:
    """The largest power of two up to 16 that divides all sizes and strides.

    Kernels receive sizes and strides in units of this number, which tells the compiler that rows start and end where a
    128-bit access may. For plain arguments, Triton would only check for divisibility by 16.
    """
    return math.gcd(16, *numbers)


# ---------------------------------------------------------------------------------------------------------------------
# Partitions
# ---------------------------------------------------------------------------------------------------------------------


class Partition(NamedTuple):
    """How work is divided: each program processes one split of `rows` rows, number (program % splits).

    A split consists of `tiles` tiles of `columns` columns.
    """

    rows: int
    columns: int
    tiles: int
    splits: int
    programs: int
    warps: int
    wide: bool  # a row has too many elements for 32-bit columns


@lru_cache(maxsize=1024)
def partition(rows: int, size: int, choice: Choice, narrowest: int = 1) -> Partition:
    """Divides work of shape (rows, size): several short rows share a program, and long rows are split.

    The partition, and with it the order of summation, depends only on the shape and on the tuning table.
    `narrowest` is the minimum number of columns of a tile.
    """
    columns = _columns(size, choice.tile, narrowest)
    # The group does not shrink if there are few rows: the kernel is compiled for its size, and a small last batch must
    # not wait for a compilation.
    group = max(1, choice.tile // columns)
    row_groups = -(-rows // group)
    row_tiles = -(-size // columns)
    splits = min(max(1, choice.programs // max(1, row_groups)), max(1, row_tiles))
    tiles = -(-row_tiles // splits)
    splits = -(-row_tiles // tiles) if tiles else 1
    warps = max(1, choice.warps * group * columns // choice.tile)
    return Partition(group, columns, tiles, splits, row_groups * splits, warps, size > 2**31 - 2**20)


def _power_of_two(n: int) -> int:
    """The smallest power of two that is at least n."""
    return 1 << max(0, n - 1).bit_length()


def _columns(size: int, tile: int, narrowest: int) -> int:
    """The widest tile that wastes little more at the end of a row of `size` elements than narrower tiles would."""
    if size <= 256 or narrowest >= tile:
        return min(tile, max(narrowest, _power_of_two(size)))
    candidates = [1 << i for i in range(8, tile.bit_length()) if 1 << i <= max(256, _power_of_two(size))]
    padded = {columns: -(-size // columns) * columns for columns in candidates}
    bound = min(padded.values()) * 17 // 16
    return max(columns for columns in candidates if padded[columns] <= bound)


def splits_at_a_time(splits: int) -> int:
    """How many partial sums of a row are added at a time.

    There are only a few possible values, because a kernel is compiled for each, while the number of splits varies from
    batch to batch.
    """
    return 1 if splits == 1 else 16 if splits <= 16 else 256


# ---------------------------------------------------------------------------------------------------------------------
# The call
# ---------------------------------------------------------------------------------------------------------------------


# Annotates the sizes and strides among the parameters of a kernel, whose types follow from their values. It is used in
# quotes, because Triton evaluates annotations too.
number = Any


def kernel(function: Callable[..., None]) -> Any:
    """`triton.jit` that compiles once for all values of the parameters annotated with "number".

    By default, Triton recompiles for a value of 1 and for multiples of 16, and a last batch of a different size would
    then make a training loop wait. What the compiler needs to know about sizes and strides is given by `divisor`.
    """
    parameters = inspect.signature(function).parameters.values()
    numbers = [parameter.name for parameter in parameters if parameter.annotation == "number"]
    return triton.jit(function, do_not_specialize=numbers)


def launch(
    function: Any, programs: int, device: torch.device, *args: Any, num_warps: int, **constants: Any
) -> None:
    """Launches a kernel on the current stream of `device`, which need not be the current device."""
    if programs == 0:
        return
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        with torch.cuda.device(device):
            function[(programs,)](*args, num_warps=num_warps, **constants)
    else:
        function[(programs,)](*args, num_warps=num_warps, **constants)
