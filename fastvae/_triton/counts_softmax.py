"""The means of counts as a softmax times a library: the kernels before and after count_kernel.

Each row is split, and every program that needs the softmax of a row combines the results of its splits.
"""

import triton
import triton.language as tl

from .elementary import exp
from .launch import kernel, number
from .tiles import by_weight, factor_of_row, load_weights, put

# Below every logit. It is finite, because a difference of infinite numbers is NaN.
_LOWEST: tl.constexpr = tl.constexpr(-3.0e38)


@kernel
def softmax_kernel(
    logits,  # (rows, genes), with any stride of rows
    tops,  # out: (rows, splits) in C, the largest logit of each split
    sums,  # out: the same, the sum of e^(logit - top)
    genes: "number",  # this and the stride in units of UNIT elements
    logits_stride: "number",
    splits: "number",
    tiles: "number",  # of COLUMNS columns, in a split
    UNIT: tl.constexpr,
    COLUMNS: tl.constexpr,
    PARTS: tl.constexpr,  # of a tile
    C: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    row = program // splits
    genes = genes * UNIT
    logits += row * logits_stride * UNIT
    begin = (program % splits * tiles * COLUMNS).to(tl.int32)
    end = tl.minimum(begin + tiles * COLUMNS, genes)
    # A thread has logits of every part of a tile, and scales their common sum once for all parts.
    PART: tl.constexpr = COLUMNS // PARTS
    part = tl.arange(0, PARTS)[:, None] * PART + tl.arange(0, PART)[None, :]
    highest = tl.full((PART,), _LOWEST, C)
    total = tl.zeros((PART,), C)
    for start in range(begin, end, COLUMNS):
        x = tl.load(logits + start + part, start + part < end, -float("inf")).to(C)
        before = highest
        highest = tl.maximum(highest, tl.max(x, 0))
        total = total * exp(before - highest) + tl.sum(exp(x - highest[None, :]), 0)
    top = tl.max(highest, 0)
    tl.store(tops + program, top)
    tl.store(sums + program, tl.sum(total * exp(highest - top), 0))


@triton.jit
def softmax_of_row(tops, sums, row, splits, SPLITS: tl.constexpr):
    """(the largest logit of a row, the sum of e^(logit - top)), from those of its splits."""
    split = tl.arange(0, SPLITS)
    inside = split < splits
    top_of_each = tl.load(tops + row * splits + split, inside, _LOWEST)
    top = tl.max(top_of_each, 0)
    total = tl.sum(tl.load(sums + row * splits + split, inside, 0.0) * exp(top_of_each - top), 0)
    return top, tl.where((top > _LOWEST * 0.99) & (top < float("inf")), total, float("nan"))


@triton.jit
def total_of_row(partials, row, count, COUNT: tl.constexpr):
    """The sum of a row's `count` partial results, in order."""
    total = tl.zeros((COUNT,), partials.dtype.element_ty)
    for start in range(0, count, COUNT):
        i = start + tl.arange(0, COUNT)
        total += tl.load(partials + row * count + i, i < count, 0.0)
    return tl.sum(total, 0)


@triton.jit
def grad_of_empty(
    mean,
    zero_logits,
    genes,
    top,
    weights,
    weights_size_0,
    weights_size_1,
    weights_size_2,
    weights_stride_0,
    weights_stride_1,
    weights_stride_2,
    weights_stride_3,
    WEIGHTED: tl.constexpr,
    COLUMNS: tl.constexpr,
    C: tl.constexpr,
):
    """The derivative of a cell's nll by a library of 0, times the sum of e^(logit - top).

    The formula is explained at at_ends in csrc/cpu/counts.cpp.
    """
    shares = tl.zeros((COLUMNS,), C)
    for start in range(0, genes, COLUMNS):
        columns = start + tl.arange(0, COLUMNS)
        inside = columns < genes
        share = exp(tl.load(mean + columns, inside, -float("inf")).to(C) - top)
        if zero_logits is not None:
            share /= 1.0 + exp(tl.load(zero_logits + columns, inside, 0.0).to(C))
        if WEIGHTED > 0:
            share = by_weight(
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
                ),
                share,
            )
        shares += share
    return tl.sum(shares, 0)


@kernel
def logits_kernel(
    mean,  # (rows, genes), logits, with any stride of rows
    zero_logits,  # the same, or None
    library,  # (rows,)
    tops,  # what softmax_kernel writes
    sums,
    weights,  # this and the next eight as in count_kernel
    weights_stride: "number",
    weights_size_0: "number",
    weights_size_1: "number",
    weights_size_2: "number",
    weights_stride_0: "number",
    weights_stride_1: "number",
    weights_stride_2: "number",
    weights_stride_3: "number",
    row_sums,  # (rows, sections), what count_kernel writes, as are the next three
    row_grads,
    row_weighs,
    log_grads,
    d_mean,  # out, or None: (rows, genes), dense; may be log_grads
    d_library,  # out, or None: (rows,)
    grad_loss,  # see row_factor in tiles.py
    grad_nll,
    weight: tl.float64,
    genes: "number",  # this and the strides of rows in units of UNIT elements
    mean_stride: "number",
    zero_stride: "number",
    library_stride: "number",
    target_rows: "number",
    grad_loss_stride: "number",
    grad_nll_stride: "number",
    softmax_splits: "number",
    sections: "number",
    splits: "number",
    tiles: "number",  # of COLUMNS columns, in a split
    REPEATED: tl.constexpr,
    WEIGHTED: tl.constexpr,
    UNIT: tl.constexpr,
    COLUMNS: tl.constexpr,
    SPLITS: tl.constexpr,
    C: tl.constexpr,
):
    """The gradients of the logits and the library, which need the sum of count_kernel's derivatives over the row."""
    program = tl.program_id(0).to(tl.int64)
    row = program // splits
    split = program % splits
    genes = genes * UNIT
    mean += row * mean_stride * UNIT
    dense = row * genes
    factor = factor_of_row(grad_loss, grad_nll, weight, row, grad_loss_stride, grad_nll_stride, C)
    top, total = softmax_of_row(tops, sums, row, softmax_splits, SPLITS)
    grad = total_of_row(row_grads, row, sections, SPLITS)
    if WEIGHTED > 0:
        # Without any weight there is no derivative, whatever the logits are.
        any_weight = total_of_row(row_weighs, row, sections, SPLITS) > 0

    if d_library is not None:
        size = tl.load(library + row * library_stride).to(C)
        if split == 0:
            by_library = grad / size
            # If a row with a library of 0 has a count above zero, its nll and the derivative are infinite.
            if (size == 0.0) & (tl.abs(total_of_row(row_sums, row, sections, SPLITS)) < float("inf")):
                data_row = row
                if REPEATED:
                    data_row = row % target_rows
                zeros = zero_logits
                if zero_logits is not None:
                    zeros += row * zero_stride * UNIT
                weights_of_row = weights
                if WEIGHTED > 0:
                    weights_of_row += data_row * weights_stride
                by_library = grad_of_empty(
                    mean,
                    zeros,
                    genes,
                    top,
                    weights_of_row,
                    weights_size_0,
                    weights_size_1,
                    weights_size_2,
                    weights_stride_0,
                    weights_stride_1,
                    weights_stride_2,
                    weights_stride_3,
                    WEIGHTED,
                    COLUMNS,
                    C,
                )
                by_library /= total
            if WEIGHTED > 0:
                by_library = tl.where(any_weight, by_library, 0.0)
            tl.store(d_library + row, (factor * by_library).to(d_library.dtype.element_ty))
    if d_mean is not None:
        # The derivative by logit g is the derivative by log mu_g minus gene g's share of the sum over all genes.
        part = grad / total
        begin = (split * tiles * COLUMNS).to(tl.int32)
        end = tl.minimum(begin + tiles * COLUMNS, genes)
        for start in range(begin, end, COLUMNS):
            columns = start + tl.arange(0, COLUMNS)
            inside = columns < end
            d = tl.load(log_grads + dense + columns, inside, 0.0)
            d -= exp(tl.load(mean + columns, inside, 0.0).to(C) - top) * part
            if WEIGHTED > 0:
                d = tl.where(any_weight, d, 0.0)
            put(d_mean + dense + columns, d * factor, inside)
