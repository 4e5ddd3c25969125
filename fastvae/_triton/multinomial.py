"""The multinomial: a kernel for one row of counts, whose features share a normaliser, and its launch.

csrc/cpu/multinomial.cpp has the formula and explains it: the nll of a row is that of Poisson counts with the means
n softmax(logits), given their sum n. The term of a count of 0 is its mean, which is computed in the type of computation
C. The places of the other counts are listed, section by section, or found among the stored values of a sparse target,
and these are computed in float64.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .counts import TILES
from .counts_elements import poisson_term
from .elementary import exp
from .launch import (
    COMPUTE,
    dense_rows,
    divisor,
    kernel,
    launch,
    number,
    row_dtype,
    row_stride,
    weight_view,
)
from .sparse import mark_stored, positions_until, row_positions
from .tiles import append, factor_of_row, load_weights

# Below every logit. These are finite, because a difference of infinite numbers is NaN.
_LOWEST_32: tl.constexpr = tl.constexpr(-3.0e38)
_LOWEST_64: tl.constexpr = tl.constexpr(-1.0e308)


@kernel
def multinomial_kernel(
    logits,  # (rows, features), with any stride of rows
    target,  # (target_rows, features), the same; or the stored values of a sparse one
    starts,  # of a sparse target, its crow_indices, else None
    stored_columns,  # the same: its col_indices
    weights,  # the weights of elements (target_rows, features), or None; this and the next eight are in a WeightView
    weights_stride: "number",
    weights_size_0: "number",
    weights_size_1: "number",
    weights_size_2: "number",
    weights_stride_0: "number",
    weights_stride_1: "number",
    weights_stride_2: "number",
    weights_stride_3: "number",
    grads,  # out, or None: (rows, features), dense
    row_sums,  # out: (rows,) in C
    places,  # room for (rows, SECTION) int16, of a dense target
    marks,  # room for (rows, SECTION) int8, of a sparse one
    grad_loss,  # see row_factor in tiles.py
    grad_nll,
    weight: tl.float64,
    features: "number",  # this and the strides of rows in units of UNIT elements
    logits_stride: "number",
    target_stride: "number",
    target_rows: "number",  # see elementwise.py
    stored: "number",  # the number of stored values
    grad_loss_stride: "number",
    grad_nll_stride: "number",
    REPEATED: tl.constexpr,
    WEIGHTED: tl.constexpr,  # KIND of the weights
    UNIT: tl.constexpr,
    SECTION: tl.constexpr,  # a multiple of COLUMNS
    COLUMNS: tl.constexpr,
    PLACES: tl.constexpr,
    C: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    features = features * UNIT
    logits += row * logits_stride * UNIT
    data_row = row
    if REPEATED:
        data_row = row % target_rows
    if starts is None:
        target += data_row * target_stride * UNIT
        places += row * SECTION
    else:
        row_first, row_last, good = row_positions(starts, data_row, stored)
        marks += row * SECTION
        last = row_first
    if WEIGHTED > 0:
        weights += data_row * weights_stride
    factor = factor_of_row(grad_loss, grad_nll, weight, row, grad_loss_stride, grad_nll_stride, tl.float64)

    # The first pass: the exponentials of the zeros, and of the other counts the number and the exponentials. The
    # largest logit of a lane is left out of `other_rests`; see `rest` in csrc/cpu/multinomial.cpp.
    tops = tl.full((COLUMNS,), _LOWEST_32, C)
    rests = tl.zeros((COLUMNS,), C)
    invalid = tl.zeros((COLUMNS,), tl.int32)
    other_tops = tl.full((PLACES,), _LOWEST_64, tl.float64)
    other_rests = tl.zeros((PLACES,), tl.float64)
    own_counts = tl.zeros((PLACES,), tl.float64)  # the weighted counts of the largest logits
    other_counts = tl.zeros((PLACES,), tl.float64)  # those of all others
    own_places = tl.full((PLACES,), -1, tl.int32)
    totals = tl.zeros((PLACES,), tl.float64)
    for begin in range(0, features, SECTION):
        end = tl.minimum(begin + SECTION, features)
        count = tl.full((), 0, tl.int32)
        if starts is not None:
            first = last
            last = positions_until(stored_columns, first, row_last, end, features, PLACES)
            good = good & mark_stored(
                marks, target, stored_columns, first, last, begin, end, SECTION, PLACES, C
            )
            count = tl.where(good, last - first, 0).to(tl.int32)
        for start in range(begin, end, COLUMNS):
            columns = start + tl.arange(0, COLUMNS)
            inside = columns < features
            x = tl.load(logits + columns, inside, 0.0).to(C)
            if starts is None:
                is_other = tl.load(target + columns, inside, 0).to(C) != 0.0
            else:
                is_other = tl.load(marks + (columns - begin)) != 0
            kept = inside
            if WEIGHTED > 0:
                own = load_weights(
                    weights,
                    columns,
                    inside,
                    weights_size_0,
                    weights_size_1,
                    weights_size_2,
                    weights_stride_0,
                    weights_stride_1,
                    weights_stride_2,
                    weights_stride_3,
                    WEIGHTED,
                    C,
                )
                kept = inside & (own != 0.0)
            invalid = tl.where(kept & (x != x), 1, invalid)
            zero = kept & ~is_other
            x = tl.where(zero, x, _LOWEST_32)
            higher = tl.where(x > tops, x, tops)
            rests = rests * exp(tops - higher) + tl.where(zero, exp(x - higher), 0.0)
            tops = higher
            if starts is None:
                count = append(places, count, columns - begin, kept & is_other, COLUMNS)
        tl.debug_barrier()  # all threads must have written the places before others read them
        for base in range(0, count, PLACES):
            j = base + tl.arange(0, PLACES)
            there = j < count
            if starts is None:
                place = begin + tl.load(places + j, there, 0).to(tl.int32)
                other_t = tl.load(target + place, there, 0).to(tl.float64)
            else:
                place = tl.load(stored_columns + first + j, there, begin).to(tl.int32)
                other_t = tl.load(target + first + j, there, 0).to(tl.float64)
                there = there & (other_t != 0.0)
            if WEIGHTED > 0:
                own_weight = load_weights(
                    weights,
                    place,
                    there,
                    weights_size_0,
                    weights_size_1,
                    weights_size_2,
                    weights_stride_0,
                    weights_stride_1,
                    weights_stride_2,
                    weights_stride_3,
                    WEIGHTED,
                    C,
                ).to(tl.float64)
                there = there & (own_weight != 0.0)
            a = tl.load(logits + place, there, 0.0).to(tl.float64)
            other_t = tl.where(there, other_t, 0.0)
            totals += other_t
            if WEIGHTED > 0:
                other_t *= own_weight
            rises = there & (a > other_tops)
            other_rests = tl.where(
                rises,
                (other_rests + 1.0) * tl.exp(other_tops - a),
                other_rests + tl.where(there, tl.exp(a - other_tops), 0.0),
            )
            other_counts += tl.where(rises, own_counts, other_t)
            own_counts = tl.where(rises, other_t, own_counts)
            own_places = tl.where(rises, place, own_places)
            other_tops = tl.where(rises, a, other_tops)
        tl.debug_barrier()  # and read them before others overwrite them

    broken = tl.full((), 0.0, tl.float64)
    if starts is not None:
        broken = tl.where(good, 0.0, float("nan")).to(tl.float64)
        factor += broken
        last = row_first
    zero_top = tl.max(tops, 0)
    highest = tl.max(other_tops, 0)
    lanes = tl.arange(0, PLACES)
    mine = lanes == tl.min(tl.where(other_tops == highest, lanes, PLACES), 0)
    own_place = tl.sum(tl.where(mine, own_places, 0), 0)  # the likeliest of the features that have a count
    own_count = tl.sum(tl.where(mine, own_counts, 0.0), 0)
    counts_of_others = tl.sum(other_counts + tl.where(mine, 0.0, own_counts), 0)
    n = tl.sum(totals, 0)
    empty = n == 0.0
    top = tl.maximum(highest, zero_top.to(tl.float64))
    of_zeros = tl.sum(rests * exp(tops - zero_top), 0).to(tl.float64) * tl.exp(zero_top.to(tl.float64) - top)
    of_others = tl.sum((other_rests + tl.where(mine, 0.0, 1.0)) * tl.exp(other_tops - highest), 0)
    own_share = tl.where(own_place < 0, 0.0, tl.exp(highest - top))
    rest = of_zeros + of_others * own_share
    total = rest + own_share
    total = tl.where((top > _LOWEST_32 * 0.99) & (top < float("inf")), total, float("nan"))
    own_share /= total
    rest /= total
    # Without counts, the logits change nothing, but a NaN must not go unseen.
    nothing = tl.where(tl.max(invalid, 0) > 0, float("nan"), 0.0)
    weighted_n = n
    mean_weight = tl.full((), 1.0, tl.float64)
    if WEIGHTED > 0:
        weighted_n = counts_of_others + own_count
        mean_weight = weighted_n / tl.where(empty, 1.0, n)
    some = tl.where(empty, 1.0, n)
    scale = n / total
    log_offset = tl.log(some) - tl.log(total)
    of_total = poisson_term(some, some, tl.log(some))
    top_of_zeros = tl.where(empty, 0.0, top).to(C)
    factor_of_zeros = (factor * weighted_n / total).to(C)

    # The second pass: the terms of the other counts, and the gradient.
    values = tl.zeros((PLACES,), tl.float64)
    for begin in range(0, features, SECTION):
        end = tl.minimum(begin + SECTION, features)
        count = tl.full((), 0, tl.int32)
        if starts is not None:
            first = last
            last = positions_until(stored_columns, first, row_last, end, features, PLACES)
            count = tl.where(good, last - first, 0).to(tl.int32)
        for start in range(begin, end, COLUMNS):
            columns = start + tl.arange(0, COLUMNS)
            inside = columns < features
            kept = inside
            if WEIGHTED > 0:
                own = load_weights(
                    weights,
                    columns,
                    inside,
                    weights_size_0,
                    weights_size_1,
                    weights_size_2,
                    weights_stride_0,
                    weights_stride_1,
                    weights_stride_2,
                    weights_stride_3,
                    WEIGHTED,
                    C,
                )
                kept = inside & (own != 0.0)
            if grads is not None:
                x = tl.load(logits + columns, inside, 0.0).to(C)
                grad = exp(x - top_of_zeros) * factor_of_zeros
                grad = tl.where(kept, tl.where(empty, nothing.to(C), grad), 0.0)
                tl.store(grads + row * features + columns, grad.to(grads.dtype.element_ty), inside)
            if starts is None:
                is_other = tl.load(target + columns, inside, 0).to(C) != 0.0
                count = append(places, count, columns - begin, kept & is_other, COLUMNS)
        tl.debug_barrier()
        for base in range(0, count, PLACES):
            j = base + tl.arange(0, PLACES)
            there = j < count
            if starts is None:
                place = begin + tl.load(places + j, there, 0).to(tl.int32)
                other_t = tl.load(target + place, there, 0).to(tl.float64)
            else:
                place = tl.load(stored_columns + first + j, there, begin).to(tl.int32)
                other_t = tl.load(target + first + j, there, 0).to(tl.float64)
                there = there & (other_t != 0.0)
            if WEIGHTED > 0:
                own_weight = load_weights(
                    weights,
                    place,
                    there,
                    weights_size_0,
                    weights_size_1,
                    weights_size_2,
                    weights_stride_0,
                    weights_stride_1,
                    weights_stride_2,
                    weights_stride_3,
                    WEIGHTED,
                    C,
                ).to(tl.float64)
                there = there & (own_weight != 0.0)
            other_t = tl.where(there, other_t, 64.0)  # see count_kernel
            a = tl.load(logits + place, there, 0.0).to(tl.float64)
            mu = tl.exp(a - top) * scale
            value = poisson_term(other_t, mu, (a - top) + log_offset)
            weighted_t = other_t
            if WEIGHTED > 0:
                # The terms are those of a row in which every count has the mean weight, and what its own changes.
                value = own_weight * value + (own_weight - mean_weight) * (other_t - mu)
                weighted_t *= own_weight
            values += tl.where(there, value, 0.0)
            if grads is not None:
                other_grad = tl.where(
                    place == own_place,
                    counts_of_others * own_share - own_count * rest,
                    mu * mean_weight - weighted_t,
                )
                tl.store(
                    grads + row * features + place,
                    (other_grad * factor).to(C).to(grads.dtype.element_ty),
                    there,
                )
        tl.debug_barrier()
    row_sum = (tl.sum(values, 0) - mean_weight * of_total) + weighted_n * (of_zeros / total)
    tl.store(row_sums + row, (tl.where(empty, nothing, row_sum) + broken).to(C))


def evaluate(
    likelihood: str,
    params: Sequence[Tensor],
    target: Tensor,
    constants: Sequence[float],
    needs: int,
    weight: float,
    *,
    grad_loss: Tensor | None = None,
    grad_nll: Tensor | None = None,
    values: bool = True,
    element_weight: Tensor | None = None,
) -> tuple[list[Tensor], Tensor | None, Tensor | None]:
    """Run multinomial_kernel, as elementwise.evaluate runs the kernel of elements. It always computes the values."""
    lead = params[0]
    rows, features = lead.shape
    dtype = row_dtype(lead)
    starts, stored_columns = params[1:] if len(params) > 1 else (None, None)
    sparse = starts is not None
    target_rows = starts.numel() - 1 if starts is not None else target.shape[0]
    logits, data = dense_rows(lead), target.contiguous() if sparse else dense_rows(target)
    grads = torch.empty_like(lead, memory_format=torch.contiguous_format) if needs & 1 else None
    row_sums = lead.new_empty((rows, 1), dtype=dtype)
    weights = weight_view(element_weight, (target_rows, features))
    # Otherwise, as many elements per thread would not fit in the registers.
    widest, warps = (1024 if lead.dtype == torch.float32 and element_weight is None else 512), 4
    tile = min(widest, max(16, triton.next_power_of_2(features)))
    section = min(tile * TILES, max(tile, triton.next_power_of_2(features)))
    data_stride = 0 if sparse else data.stride(0)
    unit = divisor(features, logits.stride(0), data_stride)
    launch(
        multinomial_kernel,
        rows,
        lead.device,
        logits,
        data,
        starts,
        stored_columns,
        *weights.arguments,
        grads,
        row_sums,
        None if sparse else torch.empty((rows, section), dtype=torch.int16, device=lead.device),
        torch.empty((rows, section), dtype=torch.int8, device=lead.device) if sparse else None,
        grad_loss,
        grad_nll,
        weight,
        features // unit,
        logits.stride(0) // unit,
        data_stride // unit,
        target_rows,
        data.numel() if sparse else 0,
        row_stride(grad_loss),
        row_stride(grad_nll),
        REPEATED=target_rows != rows,
        WEIGHTED=weights.kind,
        UNIT=unit,
        SECTION=section,
        COLUMNS=tile,
        PLACES=min(128, tile),
        C=COMPUTE[dtype],
        num_warps=max(1, warps * tile // widest),
    )
    return ([grads] if grads is not None else []), row_sums, None
