"""How the kernels iterate over rows and columns: which of them belong to a program, and how values are summed."""

import triton
import triton.language as tl

from .elementary import combine_excess


@triton.jit
def tile_rows(splits, ROWS: tl.constexpr):
    """(the row numbers of this program, int64 (ROWS,); the number of its split)."""
    program = tl.program_id(0).to(tl.int64)
    return program // splits * ROWS + tl.arange(0, ROWS), program % splits


@triton.jit
def row_size(units, UNIT: tl.constexpr, WIDE: tl.constexpr):
    """The number of elements of a row, which may need 64 bits even if the number of units does not."""
    if WIDE:
        units = units.to(tl.int64)
    return units * UNIT


@triton.jit
def first_column(split, tiles, COLUMNS: tl.constexpr, WIDE: tl.constexpr):
    """The column where a split begins, in 32 bits unless a row has too many columns for that."""
    start = split * tiles * COLUMNS
    if not WIDE:
        start = start.to(tl.int32)
    return start


@triton.jit
def tile_columns(start, COLUMNS: tl.constexpr, WIDE: tl.constexpr):
    columns = tl.arange(0, COLUMNS)
    if WIDE:
        columns = columns.to(tl.int64)
    return start + columns


@triton.jit
def row_factor(grad_loss, grad_nll, weight, rows, inside, grad_loss_stride, grad_nll_stride, C: tl.constexpr):
    """d objective / d nll of each row, weight * grad_loss + grad_nll, (ROWS,) in C. Either gradient may be None.

    The grad_loss of a reduced loss is a single number, which is read with stride 0.
    """
    factor = tl.zeros(rows.shape, C)
    if grad_loss is not None:
        factor += tl.load(grad_loss + rows * grad_loss_stride, inside, 0.0).to(C) * tl.full((), weight, C)
    if grad_nll is not None:
        factor += tl.load(grad_nll + rows * grad_nll_stride, inside, 0.0).to(C)
    return factor


@triton.jit
def factor_of_row(grad_loss, grad_nll, weight, row, grad_loss_stride, grad_nll_stride, C: tl.constexpr):
    """row_factor of one row; without gradients, the weight."""
    if grad_loss is None and grad_nll is None:
        factor = tl.full((), weight, C)
    else:
        factor = tl.full((), 0.0, C)
        if grad_loss is not None:
            factor += tl.load(grad_loss + row * grad_loss_stride).to(C) * tl.full((), weight, C)
        if grad_nll is not None:
            factor += tl.load(grad_nll + row * grad_nll_stride).to(C)
    return factor


@triton.jit
def load_weights(
    weights,
    places,
    inside,
    size_0,
    size_1,
    size_2,
    stride_0,
    stride_1,
    stride_2,
    stride_3,
    KIND: tl.constexpr,
    C: tl.constexpr,
):
    """The weights of the elements at `places` of a row, in C, and 0 outside. launch.py explains the numbers and KIND.

    `weights` points to the row.
    """
    offset = places
    if KIND == 2:
        offset = places * 0
    if KIND > 2:
        offset = (places % size_0).to(tl.int64) * stride_0
        rest = places // size_0
        if KIND > 3:
            offset += (rest % size_1).to(tl.int64) * stride_1
            rest = rest // size_1
        if KIND > 4:
            offset += (rest % size_2).to(tl.int64) * stride_2
            rest = rest // size_2
        last = stride_1 if KIND == 3 else stride_2 if KIND == 4 else stride_3
        offset += rest.to(tl.int64) * last
    return tl.load(weights + offset, inside, 0).to(C)


@triton.jit
def by_weight(weight, x):
    """`x` times the weight; 0 where the weight is 0, whatever x is."""
    return tl.where(weight == 0.0, 0.0, x * weight)


@triton.jit
def fold_sum(x, ROWS: tl.constexpr, COLUMNS: tl.constexpr, FOLD: tl.constexpr):
    """(ROWS, COLUMNS) -> (ROWS, COLUMNS / FOLD): sums adjacent elements, which are held by the same thread."""
    return tl.sum(tl.reshape(x, (ROWS, COLUMNS // FOLD, FOLD)), 2)


@triton.jit
def fold_excess(e, ROWS: tl.constexpr, COLUMNS: tl.constexpr, FOLD: tl.constexpr):
    """The same as fold_sum, for products of terms 1 + e; see combine_excess."""
    for i in tl.static_range(0, 4):
        if 2 << i <= FOLD:
            even, odd = tl.split(tl.reshape(e, (ROWS, COLUMNS >> (i + 1), 2)))
            e = combine_excess(even, odd)
    return e


@triton.jit
def row_totals(partials, rows, inside, splits, ROWS: tl.constexpr, SPLITS: tl.constexpr):
    """Sums the partial results of the splits of each row, (ROWS,)."""
    total = tl.zeros((ROWS, SPLITS), partials.dtype.element_ty)
    for start in range(0, splits, SPLITS):
        split = start + tl.arange(0, SPLITS)[None, :]
        total += tl.load(partials + rows[:, None] * splits + split, inside[:, None] & (split < splits), 0.0)
    return tl.sum(total, 1)


@triton.jit
def put(pointer, value, inside):
    tl.store(pointer, value.to(pointer.dtype.element_ty), inside)


@triton.jit
def sum_fours(x, COLUMNS: tl.constexpr):
    """The sums of four adjacent elements each, which are held by the same thread."""
    return tl.sum(tl.reshape(x, (COLUMNS // 4, 4)), 1)


@triton.jit
def append(places, count, entries, wanted, COLUMNS: tl.constexpr):
    """Appends those of `entries` that are `wanted` to a list of `count` numbers, in order. Returns the new number."""
    # A thread holds four adjacent entries. Only their sums are summed across threads.
    fours = tl.reshape(wanted.to(tl.int32), (COLUMNS // 4, 4))
    number = tl.sum(fours, 1)
    position = (tl.cumsum(number, 0) - number)[:, None] + (tl.cumsum(fours, 1) - 1)
    tl.store(places + (count + tl.reshape(position, (COLUMNS,))), entries.to(tl.int16), wanted)
    return count + tl.sum(number, 0)
