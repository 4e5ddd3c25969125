"""How the kernels of counts read a sparse target: the values that are stored in a part of a row.

The columns of a row must be in ascending order, each once, as torch requires. A row that breaks this is found out, and
nothing is written outside the part.
"""

import triton
import triton.language as tl


@triton.jit
def row_positions(starts, row, stored):
    """(the first of a row's positions, the end of them, whether they are positions of the `stored` values)."""
    first = tl.load(starts + row)
    last = tl.load(starts + row + 1)
    valid = (first >= 0) & (first <= last) & (last <= stored)
    return tl.where(valid, first, 0), tl.where(valid, last, 0), valid


@triton.jit
def positions_until(columns, first, last, end, size, LANES: tl.constexpr):
    """The first of the positions from `first` to `last` whose column is at least `end`; `last` for all `size` columns.

    So every position belongs to one part of the row, whatever its column is. If columns are out of order, the result is
    some position between `first` and `last`, and the same one in every call with the same numbers.
    """
    lanes = tl.arange(0, LANES)
    result = tl.where(end < size, first, last)
    stop = tl.where(end > 0, last, first)
    while result < stop:
        step = (stop - result + (LANES - 1)) // LANES
        probes = result + lanes * step
        inside = probes < stop
        below = inside & (tl.load(columns + probes, inside, 0) < end)
        count = tl.sum(below.to(tl.int64), 0)
        stop = tl.where(count == 0, result, tl.minimum(result + count * step, stop))
        result = tl.where(count == 0, result, result + (count - 1) * step + 1)
    return result


@triton.jit
def mark_stored(
    marks, values, columns, first, last, begin, end, SIZE: tl.constexpr, LANES: tl.constexpr, C: tl.constexpr
):
    """Set byte i of `marks` if a value other than 0 is stored in column begin + i, and clear the other SIZE bytes.

    The stored values are those from `first` to `last`. Returns whether their columns lie between `begin` and `end` and
    ascend. All threads may read `marks` afterwards.
    """
    tl.store(marks + tl.arange(0, SIZE), tl.zeros((SIZE,), tl.int8))
    tl.debug_barrier()
    good = tl.full((LANES,), 1, tl.int32)
    for start in range(first, last, LANES):
        positions = start + tl.arange(0, LANES)
        there = positions < last
        column = tl.load(columns + positions, there, 0)
        before = tl.load(columns + positions - 1, there & (positions > first), -1)
        fits = there & (column >= begin) & (column < end) & (before < column)
        good = tl.where(there & ~fits, 0, good)
        value = tl.load(values + positions, fits, 0).to(C)
        tl.store(marks + (column - begin), tl.full((LANES,), 1, tl.int8), fits & (value != 0.0))
    tl.debug_barrier()
    return tl.min(good, 0) > 0
