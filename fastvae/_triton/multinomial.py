"""The multinomial: the kernels of rows of counts whose features share a normaliser, and their launches.

csrc/cpu/multinomial.cpp has the formula and explains it: the nll of a row is that of Poisson counts with the means
n softmax(logits), given their sum n. A row consists of sections, which several programs may share.
`multinomial_sums_kernel` writes the sums of each section: the exponentials of its logits and the counts.
`multinomial_kernel` combines those of a row, in order, and computes the terms of the counts and the gradient.

The term of a count of 0 is its mean, which is computed in the type of computation C. The places of the other counts are
listed, section by section, or found among the stored values of a sparse target. Of these, small whole counts are
computed in C and the rest, whose terms cancel, in float64.
"""

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .counts import cut_of
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
from .tiles import append, factor_of_row, load_weights, put

# Below every logit. It is finite, because a difference of infinite numbers is NaN.
_LOWEST: tl.constexpr = tl.constexpr(-3.0e38)
# The largest finite numbers.
_MOST_32: tl.constexpr = tl.constexpr(3.4028234663852886e38)
_MOST_64: tl.constexpr = tl.constexpr(1.7976931348623157e308)

# log t! for t = 2, ..., 7.
_LOG_FACTORIALS: tl.constexpr = tl.constexpr(tuple(math.log(math.factorial(t)) for t in range(2, 8)))


@triton.jit
def place_and_count(entry, there, target, stored_columns, first, begin):
    """The column of an entry of a section's list, and its count. Outside, they are some column of it and 1.

    The list of a dense target has the places in the section. That of a sparse one has the numbers of its stored values.
    """
    if stored_columns is None:
        place = begin + entry
        t = tl.load(target + place, there, 1)
    else:
        place = tl.load(stored_columns + first + entry, there, begin).to(tl.int32)
        t = tl.load(target + first + entry, there, 1)
    return place, t


@kernel
def multinomial_sums_kernel(
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
    sums,  # out: (rows, 4, sections) in C; see below
    totals,  # out: (rows, 4, sections) in float64; see below
    places,  # room for (programs, SECTION) int16
    marks,  # of a sparse target, room for (programs, SECTION) int8
    features: "number",  # this and the strides of rows in units of UNIT elements
    logits_stride: "number",
    target_stride: "number",
    target_rows: "number",  # see elementwise.py
    stored: "number",  # the number of stored values
    splits: "number",  # programs of a row
    each: "number",  # sections of a program
    sections: "number",  # of a row
    REPEATED: tl.constexpr,
    WEIGHTED: tl.constexpr,  # KIND of the weights
    UNIT: tl.constexpr,
    SECTION: tl.constexpr,  # a multiple of COLUMNS
    COLUMNS: tl.constexpr,
    PLACES: tl.constexpr,
    C: tl.constexpr,
):
    """Writes the sums of sections.

    `sums` has four numbers of each: of the features with a count of 0, the largest logit and the sum of e^(logit - it);
    of those with another count, the largest logit and the same sum without this logit itself; see `rest` in
    csrc/cpu/multinomial.cpp. `totals` has the sum of the counts, the weighted count of the feature with that largest
    logit, the sum of the other weighted counts, and the feature's column, -1 if there is none. If the columns of a
    sparse target are invalid, the sums of counts are NaN.
    """
    program = tl.program_id(0).to(tl.int64)
    row = program // splits
    features = features * UNIT
    logits += row * logits_stride * UNIT
    data_row = row
    if REPEATED:
        data_row = row % target_rows
    first = tl.full((), 0, tl.int64)
    if starts is None:
        target += data_row * target_stride * UNIT
        places += program * SECTION
    else:
        row_first, row_last, row_valid = row_positions(starts, data_row, stored)
        marks += program * SECTION
    if WEIGHTED > 0:
        weights += data_row * weights_stride
    sums += row * 4 * sections
    totals += row * 4 * sections
    MOST: tl.constexpr = _MOST_64 if C == tl.float64 else _MOST_32

    first_section = (program % splits * each).to(tl.int32)
    for section in range(first_section, tl.minimum(first_section + each, sections)):
        begin = section * SECTION
        end = tl.minimum(begin + SECTION, features)
        count = tl.full((), 0, tl.int32)
        broken = tl.full((), 0.0, tl.float64)
        if starts is not None:
            first = positions_until(stored_columns, row_first, row_last, begin, features, PLACES)
            last = positions_until(stored_columns, row_first, row_last, end, features, PLACES)
            good = row_valid & (first <= last)
            good = good & mark_stored(
                marks, target, stored_columns, first, last, begin, end, SECTION, PLACES, C
            )
            count = tl.where(good, last - first, 0).to(tl.int32)
            broken = tl.where(good, broken, float("nan"))

        # A thread has four adjacent logits at a time, and scales their common sum once.
        tops = tl.full((COLUMNS // 4,), _LOWEST, C)
        zeros = tl.zeros((COLUMNS // 4,), C)
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
                kept = inside & (
                    load_weights(
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
                    != 0.0
                )
            fours = tl.reshape(tl.where(kept & ~is_other, x, -float("inf")), (COLUMNS // 4, 4))
            before = tops
            # An infinite logit makes the sum infinite, and not NaN, because without counts it changes nothing.
            tops = tl.minimum(tl.maximum(before, tl.max(fours, 1)), MOST)
            zeros = zeros * exp(before - tops) + tl.sum(exp(fours - tops[:, None]), 1)
            if starts is None:
                count = append(places, count, columns - begin, kept & is_other, COLUMNS)
        tl.debug_barrier()  # all threads must have written the places before others read them

        other_tops = tl.full((PLACES,), _LOWEST, C)
        rests = tl.zeros((PLACES,), C)
        own_places = tl.full((PLACES,), -1, tl.int32)
        own_counts = tl.zeros((PLACES,), tl.float64)
        other_counts = tl.zeros((PLACES,), tl.float64)
        if WEIGHTED > 0:
            unweighted = tl.zeros((PLACES,), tl.float64)
        for base in range(0, count, PLACES):
            entry = base + tl.arange(0, PLACES)
            there = entry < count
            if starts is None:
                entry = tl.load(places + entry, there, 0).to(tl.int32)
            place, t = place_and_count(entry, there, target, stored_columns, first, begin)
            t = t.to(tl.float64)
            there = there & (t != 0.0)
            if WEIGHTED > 0:
                own = load_weights(
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
                )
                there = there & (own != 0.0)
                unweighted += tl.where(there, t, 0.0)
                t *= own.to(tl.float64)
            t = tl.where(there, t, 0.0)
            a = tl.load(logits + place, there, 0.0).to(C)
            difference = tl.where(a < float("inf"), a, float("nan")) - other_tops
            e = exp(-tl.abs(difference))
            rises = there & (difference > 0.0)
            rests = tl.where(rises, (rests + 1.0) * e, rests + tl.where(there, e, 0.0))
            other_counts += tl.where(rises, own_counts, t)
            own_counts = tl.where(rises, t, own_counts)
            own_places = tl.where(rises, place, own_places)
            other_tops = tl.where(rises, a, other_tops)
        tl.debug_barrier()  # and read them before others write those of the next section

        top = tl.max(tops, 0)
        tl.store(sums + section, top)
        tl.store(sums + sections + section, tl.sum(zeros * exp(tops - top), 0))
        lanes = tl.arange(0, PLACES)
        top = tl.max(other_tops, 0)
        mine = lanes == tl.min(tl.where((other_tops == top) & (own_places >= 0), lanes, PLACES), 0)
        rest = tl.sum((rests + tl.where(mine | (own_places < 0), 0.0, 1.0)) * exp(other_tops - top), 0)
        tl.store(sums + 2 * sections + section, top)
        tl.store(sums + 3 * sections + section, rest)
        own_count = tl.sum(tl.where(mine, own_counts, 0.0), 0)
        others = tl.sum(other_counts + tl.where(mine, 0.0, own_counts), 0) + broken
        total = own_count + others
        if WEIGHTED > 0:
            total = tl.sum(unweighted, 0) + broken
        tl.store(totals + section, total)
        tl.store(totals + sections + section, own_count)
        tl.store(totals + 2 * sections + section, others)
        # float64 represents every column exactly.
        own_place = tl.max(tl.where(mine, own_places, -1), 0)
        tl.store(totals + 3 * sections + section, own_place.to(tl.float64))


@triton.jit
def sums_of_row(sums, totals, sections, WEIGHTED: tl.constexpr, AT_A_TIME: tl.constexpr, C: tl.constexpr):
    """What multinomial_sums_kernel writes for a section, of all sections of a row; the column is that in the row."""
    lanes = tl.arange(0, AT_A_TIME)
    tops = tl.full((AT_A_TIME,), _LOWEST, C)
    other_tops = tl.full((AT_A_TIME,), _LOWEST, C)
    at = tl.full((AT_A_TIME,), -1, tl.int32)
    for start in range(0, sections, AT_A_TIME):
        section = start + lanes
        inside = section < sections
        tops = tl.maximum(tops, tl.load(sums + section, inside, _LOWEST))
        one = tl.load(sums + 2 * sections + section, inside, _LOWEST)
        rises = one > other_tops
        at = tl.where(rises, section, at)
        other_tops = tl.where(rises, one, other_tops)
    top = tl.max(tops, 0)
    other_top = tl.max(other_tops, 0)
    NONE: tl.constexpr = 2**31 - 1
    own = tl.min(tl.where((other_tops == other_top) & (at >= 0), at, NONE), 0)
    zeros = tl.zeros((AT_A_TIME,), C)
    rests = tl.zeros((AT_A_TIME,), C)
    own_counts = tl.zeros((AT_A_TIME,), tl.float64)
    others = tl.zeros((AT_A_TIME,), tl.float64)
    total = tl.zeros((AT_A_TIME,), tl.float64)
    for start in range(0, sections, AT_A_TIME):
        section = start + lanes
        inside = section < sections
        one = tl.load(sums + section, inside, _LOWEST)
        zeros += tl.load(sums + sections + section, inside, 0.0) * exp(one - top)
        one = tl.load(sums + 2 * sections + section, inside, _LOWEST)
        rest = tl.load(sums + 3 * sections + section, inside, 0.0)
        has_place = (one > _LOWEST) & (section != own)
        rests += (rest + tl.where(has_place, 1.0, 0.0)) * exp(one - other_top)
        count = tl.load(totals + sections + section, inside, 0.0)
        own_counts += tl.where(section == own, count, 0.0)
        others += tl.load(totals + 2 * sections + section, inside, 0.0) + tl.where(section == own, 0.0, count)
        if WEIGHTED > 0:
            total += tl.load(totals + section, inside, 0.0)
    own_count = tl.sum(own_counts, 0)
    other_count = tl.sum(others, 0)
    n = own_count + other_count
    if WEIGHTED > 0:
        n = tl.sum(total, 0)
    place = tl.load(totals + 3 * sections + own, own != NONE, -1.0).to(tl.int32)
    return top, tl.sum(zeros, 0), other_top, tl.sum(rests, 0), n, own_count, other_count, place


@triton.jit
def small_count_of_multinomial(t, difference, scale, offset, lacks):
    """Whether float32 is enough for a count, its nll and its mean. The logit is `difference` above the largest one.

    It is for whole counts from 1 to 7. The logarithm of the mean is `difference` plus an offset, whose rounding would
    be an error of the whole row, so that `lacks` has what `offset` lacks.
    """
    # A greater difference might overflow in the product with the count.
    fits = (t >= 1.0) & (t < 8.0) & (tl.floor(t) == t) & ((difference > -1e37) | (difference != difference))
    t = tl.where(fits, t, 1.0)
    mu = exp(difference) * scale
    log_mu = (difference + offset) + lacks
    log_factorial = tl.zeros(t.shape, tl.float32)
    for i in tl.static_range(6):
        log_factorial = tl.where(t >= i + 2.0, _LOG_FACTORIALS[i], log_factorial)
    return fits, (mu - t * log_mu) + log_factorial, mu


@kernel
def multinomial_kernel(
    logits,  # this and the next twelve as in multinomial_sums_kernel
    target,
    starts,
    stored_columns,
    weights,
    weights_stride: "number",
    weights_size_0: "number",
    weights_size_1: "number",
    weights_size_2: "number",
    weights_stride_0: "number",
    weights_stride_1: "number",
    weights_stride_2: "number",
    weights_stride_3: "number",
    sums,  # what multinomial_sums_kernel writes
    totals,
    grads,  # out, or None: (rows, features), dense
    row_sums,  # out: (rows, sections) in C
    places,  # room for (programs, SECTION) int16
    grad_loss,  # see row_factor in tiles.py
    grad_nll,
    weight: tl.float64,
    features: "number",  # this and the next seven as in multinomial_sums_kernel
    logits_stride: "number",
    target_stride: "number",
    target_rows: "number",
    stored: "number",
    splits: "number",
    each: "number",
    sections: "number",
    grad_loss_stride: "number",
    grad_nll_stride: "number",
    REPEATED: tl.constexpr,
    WEIGHTED: tl.constexpr,
    UNIT: tl.constexpr,
    SECTION: tl.constexpr,
    COLUMNS: tl.constexpr,
    PLACES: tl.constexpr,
    AT_A_TIME: tl.constexpr,  # sections whose sums are combined at a time
    C: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    row = program // splits
    features = features * UNIT
    logits += row * logits_stride * UNIT
    data_row = row
    if REPEATED:
        data_row = row % target_rows
    first = tl.full((), 0, tl.int64)
    if starts is None:
        target += data_row * target_stride * UNIT
    else:
        row_first, row_last, _ = row_positions(starts, data_row, stored)
    if WEIGHTED > 0:
        weights += data_row * weights_stride
    if grads is not None:
        grads += row * features
    places += program * SECTION
    factor = factor_of_row(grad_loss, grad_nll, weight, row, grad_loss_stride, grad_nll_stride, tl.float64)

    zero_top, zero_sum, other_top, other_rest, n, own_count, counts_of_others, own_place = sums_of_row(
        sums + row * 4 * sections, totals + row * 4 * sections, sections, WEIGHTED, AT_A_TIME, C
    )
    empty = n == 0.0
    top = tl.maximum(zero_top, other_top)
    own_place = tl.where(empty, -1, own_place)  # the likeliest of the features that have a count
    own_share = tl.where(own_place < 0, 0.0, tl.exp(other_top.to(tl.float64) - top.to(tl.float64)))
    of_zeros = zero_sum.to(tl.float64) * tl.exp(zero_top.to(tl.float64) - top.to(tl.float64))
    rest = of_zeros + other_rest.to(tl.float64) * own_share
    total = rest + own_share
    total = tl.where(
        (top > _LOWEST * 0.99) & (total < float("inf")) & (n < float("inf")), total, float("nan")
    )
    inverse_total = 1.0 / total
    # Without counts, the logits change nothing, but a NaN must not go unseen.
    nothing = tl.where(zero_sum == zero_sum, 0.0, float("nan")).to(C)
    weighted_n = n
    mean_weight = tl.full((), 1.0, tl.float64)
    some = tl.where(empty, 1.0, n)
    if WEIGHTED > 0:
        weighted_n = counts_of_others + own_count
        mean_weight = weighted_n / some
    log_n = tl.log(some)
    scale = n * inverse_total
    log_offset = log_n - tl.log(total)
    own_grad = (factor * inverse_total) * (counts_of_others * own_share - own_count * rest)
    top_of_zeros = tl.where(empty, 0.0, top)
    factor_of_zeros = (factor * weighted_n * inverse_total).to(C)
    if C == tl.float32:
        small_factor = factor.to(C)
        small_scale = scale.to(C)
        small_mean_weight = mean_weight.to(C)
        offset = log_offset.to(C)
        lacks = (log_offset - offset.to(tl.float64)).to(C)

    first_section = (program % splits * each).to(tl.int32)
    more = tl.where(empty, nothing.to(tl.float64), weighted_n * (of_zeros * inverse_total))
    more = tl.where(first_section == 0, more, 0.0)
    for section in range(first_section, tl.minimum(first_section + each, sections)):
        begin = section * SECTION
        end = tl.minimum(begin + SECTION, features)
        count = tl.full((), 0, tl.int32)
        if starts is not None:
            first = positions_until(stored_columns, row_first, row_last, begin, features, PLACES)
            last = positions_until(stored_columns, row_first, row_last, end, features, PLACES)
            count = (last - first).to(tl.int32)
        for start in range(begin, end, COLUMNS):
            columns = start + tl.arange(0, COLUMNS)
            inside = columns < features
            kept = inside
            if WEIGHTED > 0:
                kept = inside & (
                    load_weights(
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
                    != 0.0
                )
            if grads is not None:
                x = tl.load(logits + columns, inside, 0.0).to(C)
                grad = tl.where(empty, nothing, exp(x - top_of_zeros) * factor_of_zeros)
                if WEIGHTED > 0:
                    grad = tl.where(kept, grad, 0.0)
                put(grads + columns, grad, inside)
            if starts is None:
                is_other = tl.load(target + columns, inside, 0).to(C) != 0.0
                count = append(places, count, columns - begin, kept & is_other, COLUMNS)
        # If the columns are invalid, nothing may be written there. The row is NaN already.
        count = tl.where(empty | (n != n), 0, count)
        # All threads must have written the places and the gradients of zeros before others read or overwrite them.
        tl.debug_barrier()

        # The others, in float32 if that is enough. The entries of the rest move to the front of the list.
        lanes = tl.arange(0, PLACES)
        small_values = tl.zeros((PLACES,), C)
        left_over = count
        if C == tl.float32:
            left_over = tl.full((), 0, tl.int32)
            for base in range(0, count, PLACES):
                entry = base + lanes
                there = entry < count
                if starts is None:
                    entry = tl.load(places + entry, there, 0).to(tl.int32)
                place, given = place_and_count(entry, there, target, stored_columns, first, begin)
                t = given.to(C)
                there = there & (t != 0.0)
                if WEIGHTED > 0:
                    own = load_weights(
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
                    )
                    there = there & (own != 0.0)
                x = tl.load(logits + place, there, 0.0).to(C)
                fits, value, mu = small_count_of_multinomial(t, x - top, small_scale, offset, lacks)
                fits = fits & (place != own_place)
                grad = mu - t
                if WEIGHTED > 0:
                    # See below.
                    value = own * value + (own - small_mean_weight) * (t - mu)
                    grad = mu * small_mean_weight - t * own
                small_values += tl.where(there & fits, value, 0.0)
                if grads is not None:
                    put(grads + place, grad * small_factor, there & fits)
                left = (there & ~fits).to(tl.int32)
                left_count = tl.sum(left, 0)
                if left_count > 0:
                    tl.debug_barrier()  # all threads must have read the list before others write to it
                    tl.store(places + (left_over + tl.cumsum(left, 0) - 1), entry.to(tl.int16), left > 0)
                    left_over += left_count
            tl.debug_barrier()
        # If one feature has all counts, its term and that of the sum n cancel to the last bit. Both are elements of the
        # same loop, so that the same instructions compute them.
        has_total = (own_place >= begin) & (own_place < end)
        values = tl.zeros((PLACES,), tl.float64)
        for base in range(0, left_over + has_total.to(tl.int32), PLACES):
            entry = base + lanes
            is_total = has_total & (entry == left_over)
            there = entry < left_over
            if starts is None or C == tl.float32:
                entry = tl.load(places + entry, there, 0).to(tl.int32)
            place, given = place_and_count(entry, there, target, stored_columns, first, begin)
            t = given.to(tl.float64)
            there = there & (t != 0.0)
            if WEIGHTED > 0:
                own = load_weights(
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
                there = there & (own != 0.0)
            # A lane without a count takes part with a large one, because these take the fewest branches.
            t = tl.where(is_total, n, tl.where(there, t, 64.0))
            difference = tl.load(logits + place, there, 0.0).to(C).to(tl.float64) - top.to(tl.float64)
            mu = tl.where(is_total, n, tl.exp(difference) * scale)
            value = poisson_term(t, mu, tl.where(is_total, log_n, difference + log_offset))
            grad = mu - t
            if WEIGHTED > 0:
                # The terms are those of a row in which every count has the mean weight, and what its own changes.
                own = tl.where(is_total, -mean_weight, own)
                value = own * value + (own - mean_weight) * (t - mu)
                grad = mu * mean_weight - t * own
            else:
                value = tl.where(is_total, -value, value)
            values += tl.where(there | is_total, value, 0.0)
            if grads is not None:
                grad = tl.where(place == own_place, own_grad, grad * factor)
                put(grads + place, grad.to(C), there)
        tl.debug_barrier()  # all threads must have read the list before others write that of the next section
        # The first section also has the term of all zeros.
        section_sum = tl.sum(values, 0) + tl.sum(small_values, 0).to(tl.float64) + more
        more = tl.zeros_like(more)
        tl.store(row_sums + row * sections + section, section_sum.to(C))


# The number of sections whose sums are combined at a time.
_AT_A_TIME = 32


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
    """Run the kernels, as elementwise.evaluate runs the kernel of elements. They always compute the values."""
    lead = params[0]
    rows, features = lead.shape
    dtype, device = row_dtype(lead), lead.device
    starts, stored_columns = params[1:] if len(params) > 1 else (None, None)
    sparse = starts is not None
    target_rows = starts.numel() - 1 if starts is not None else target.shape[0]
    logits, data = dense_rows(lead), target.contiguous() if sparse else dense_rows(target)
    grads = torch.empty_like(lead, memory_format=torch.contiguous_format) if needs & 1 else None
    weights = weight_view(element_weight, (target_rows, features))
    cut = cut_of(rows, features, dtype, device)
    programs = rows * cut.splits
    sums = lead.new_empty((rows, 4, cut.sections), dtype=dtype)
    totals = lead.new_empty((rows, 4, cut.sections), dtype=torch.float64)
    row_sums = lead.new_empty((rows, cut.sections), dtype=dtype)
    places = torch.empty((programs, cut.section), dtype=torch.int16, device=device)
    data_stride = 0 if sparse else data.stride(0)
    unit = divisor(features, logits.stride(0), data_stride)
    inputs = logits, data, starts, stored_columns, *weights.arguments, sums, totals
    sizes = (
        features // unit,
        logits.stride(0) // unit,
        data_stride // unit,
        target_rows,
        data.numel() if sparse else 0,
        cut.splits,
        cut.each,
        cut.sections,
    )
    constants_of_both = {
        "REPEATED": target_rows != rows,
        "WEIGHTED": weights.kind,
        "UNIT": unit,
        "SECTION": cut.section,
        "COLUMNS": cut.columns,
        "PLACES": cut.places,
        "C": COMPUTE[dtype],
        "num_warps": cut.warps,
    }
    marks = torch.empty((programs, cut.section), dtype=torch.int8, device=device) if sparse else None
    launch(multinomial_sums_kernel, programs, device, *inputs, places, marks, *sizes, **constants_of_both)
    launch(
        multinomial_kernel,
        programs,
        device,
        *inputs,
        grads,
        row_sums,
        places,
        grad_loss,
        grad_nll,
        weight,
        *sizes,
        row_stride(grad_loss),
        row_stride(grad_nll),
        AT_A_TIME=_AT_A_TIME,
        **constants_of_both,
    )
    return ([grads] if grads is not None else []), row_sums, None
