"""The likelihoods with independent elements: one kernel, which takes the function of an element as an argument.

The kernel reads parameters and data once, and writes the gradient, weighted by the reduction, and partial sums of rows.

Everything is computed in the type C, which is float64 for float64 parameters and float32 otherwise. The order of
summation is determined by the shape. Offsets of rows are 64-bit; those within a row are 32-bit unless it is too long.
"""

from collections.abc import Sequence

import torch
import triton.language as tl
from torch import Tensor

from .._spec import VARIANTS
from . import continuous, counts_elements
from .elementary import combine_excess, log1p
from .launch import (
    COMPUTE,
    dense_rows,
    divisor,
    event_size,
    kernel,
    launch,
    memory_order,
    number,
    partition,
    row_dtype,
    row_stride,
    weight_view,
)
from .tiles import (
    by_weight,
    first_column,
    fold_excess,
    fold_sum,
    load_weights,
    row_factor,
    row_size,
    tile_columns,
    tile_rows,
)
from .tuning import choice

# Maps each variant to its element.
ELEMENTS = {
    variant.name: {**continuous.ELEMENTS, **counts_elements.ELEMENTS}[variant.element]
    for variant in VARIANTS.values()
    if variant.element
}


@kernel
def nll_kernel(
    first,  # the parameters: (rows, size), with any stride of rows
    second,  # None if the likelihood has only one
    target,  # (target_rows, size), any dtype
    weights,  # the weights of elements (target_rows, size), or None; this and the next eight are in a WeightView
    weights_stride: "number",  # in units of UNIT elements if the weights are dense
    weights_size_0: "number",
    weights_size_1: "number",
    weights_size_2: "number",
    weights_stride_0: "number",
    weights_stride_1: "number",
    weights_stride_2: "number",
    weights_stride_3: "number",
    scalar,  # one number, or None to use `scalar_value`
    scalar_value: tl.float64,
    shape: tl.float64,  # see element.py
    offset: tl.float64,
    first_grad,  # output or None: (rows, size), stored like the parameters
    second_grad,
    row_sums,  # output or None: (rows, splits) in C
    scalar_sums,  # output or None: the same sums of the derivative by `scalar`
    element_values,  # output or None: (rows, size) in C, dense, with the same factor as the grads
    grad_loss,  # see row_factor; without this and grad_nll, grads are multiplied by `weight`
    grad_nll,
    weight: tl.float64,
    row_count: "number",
    size: "number",  # in units of UNIT elements, like second_offset and all strides but the last two
    first_stride: "number",
    second_stride: "number",
    target_stride: "number",
    target_rows: "number",  # if REPEATED, several draws share a target: row r reads target row r % target_rows
    grad_stride: "number",
    second_offset: "number",  # where the second half of a packed head starts
    grad_loss_stride: "number",
    grad_nll_stride: "number",
    splits: "number",
    tiles: "number",
    ELEMENT: tl.constexpr,
    LOG_TERM: tl.constexpr,
    REPEATED: tl.constexpr,
    WEIGHTED: tl.constexpr,  # KIND of the weights
    COUNTS: tl.constexpr,  # integers are plain numbers, even uint8
    UNIT: tl.constexpr,
    RUN: tl.constexpr,  # 0, or half the channels of a packed head in channels_last order, whose halves are interleaved
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    FOLD: tl.constexpr,
    WIDE: tl.constexpr,
    C: tl.constexpr,
):
    rows, split = tile_rows(splits, ROWS)
    inside_rows = rows < row_count
    size = row_size(size, UNIT, WIDE)
    first += rows[:, None] * first_stride * UNIT
    if second is not None:
        second += rows[:, None] * second_stride * UNIT + second_offset.to(tl.int64) * UNIT
    data_rows = rows
    if REPEATED:
        data_rows = rows % target_rows
    target += data_rows[:, None] * target_stride * UNIT
    if WEIGHTED > 0:
        weights += data_rows[:, None] * weights_stride * (UNIT if WEIGHTED == 1 else 1)
    if first_grad is not None:
        first_grad += rows[:, None] * grad_stride * UNIT
    if second_grad is not None:
        second_grad += rows[:, None] * grad_stride * UNIT + second_offset.to(tl.int64) * UNIT

    if scalar is not None:
        shared = tl.load(scalar).to(C)
    else:
        shared = tl.full((), scalar_value, C)
    shape = tl.full((), shape, C)
    offset = tl.full((), offset, C)
    if grad_loss is None and grad_nll is None:
        factor = tl.full((), weight, C)
    else:
        factor = row_factor(
            grad_loss, grad_nll, weight, rows, inside_rows, grad_loss_stride, grad_nll_stride, C
        )
        factor = factor[:, None]

    sums = tl.zeros((ROWS, COLUMNS // FOLD), C)
    scalar_grads = tl.zeros((ROWS, COLUMNS // FOLD), C)
    excess = tl.zeros((ROWS, COLUMNS // FOLD), C)
    start = first_column(split, tiles, COLUMNS, WIDE)
    for i in range(0, tiles):
        columns = tile_columns(start + i * COLUMNS, COLUMNS, WIDE)[None, :]
        inside = inside_rows[:, None] & (columns < size)
        # Elements outside the row are read as 0 and excluded from the sums below.
        if RUN > 0:
            places = columns + columns // RUN * RUN
        else:
            # FOLD adjacent elements make a 128-bit access to the parameters. Without this hint, Triton would give each
            # thread 16, which make such an access to uint8 data, and pass everything else through shared memory.
            places = tl.max_contiguous(columns, (1, FOLD))
        a = tl.load(first + places, inside, 0.0).to(C)
        if second is not None:
            b = tl.load(second + places, inside, 0.0).to(C)
        else:
            b = a
        t = tl.load(target + columns, inside, 0)
        is_pixel: tl.constexpr = t.dtype == tl.uint8 and not COUNTS
        t = t.to(C)
        if is_pixel:
            t = t / 255.0
        value, e, grad_a, grad_b, grad_shared = ELEMENT(a, b, t, shared, shape, offset)
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
            if LOG_TERM:
                value += log1p(e)
            value = by_weight(own, value)
            grad_a = by_weight(own, grad_a)
            grad_b = by_weight(own, grad_b)
            grad_shared = by_weight(own, grad_shared)

        if first_grad is not None:
            tl.store(first_grad + places, (grad_a * factor).to(first_grad.dtype.element_ty), inside)
        if second_grad is not None:
            tl.store(second_grad + places, (grad_b * factor).to(second_grad.dtype.element_ty), inside)
        if element_values is not None:
            whole = value + log1p(e) if LOG_TERM and WEIGHTED == 0 else value
            place = rows[:, None] * size + columns
            tl.store(element_values + place, whole * factor, inside)
        if row_sums is not None:
            sums += fold_sum(tl.where(inside, value, 0.0), ROWS, COLUMNS, FOLD)
        if scalar_sums is not None:
            scalar_grads += fold_sum(tl.where(inside, grad_shared, 0.0), ROWS, COLUMNS, FOLD)
        if LOG_TERM and WEIGHTED == 0 and row_sums is not None:
            excess = combine_excess(excess, fold_excess(tl.where(inside, e, 0.0), ROWS, COLUMNS, FOLD))
            # The product of 64 factors of at most 2 each fits in float32.
            if (i + 1) * FOLD % 64 == 0:
                sums += log1p(excess)
                excess = tl.zeros((ROWS, COLUMNS // FOLD), C)

    if LOG_TERM and WEIGHTED == 0:
        sums += log1p(excess)
    if row_sums is not None:
        tl.store(row_sums + rows * splits + split, tl.sum(sums, 1), inside_rows)
    if scalar_sums is not None:
        tl.store(scalar_sums + rows * splits + split, tl.sum(scalar_grads, 1), inside_rows)


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
    element_values: Tensor | None = None,
    element_weight: Tensor | None = None,
) -> tuple[list[Tensor], Tensor | None, Tensor | None]:
    """Runs nll_kernel and returns (gradients, row sums (rows, splits), the same sums of the derivative by the scalar).

    Bit i of `needs` requests the gradient of params[i]. Without `values`, only gradients are computed. The value of
    each element is written to `element_values` if that is given, and the gradients then have its dtype. Values and
    derivatives are multiplied by `element_weight`, if it is given.
    """
    variant, element, lead = VARIANTS[likelihood], ELEMENTS[likelihood], params[0]
    order, dtype = memory_order(lead), row_dtype(lead)
    like = lead if element_values is None else element_values
    rows, size = lead.shape[0], event_size(target)
    first, data = dense_rows(lead, order), dense_rows(target, order)
    scalar = params[-1] if variant.has_scalar else None
    second = dense_rows(params[1], order) if len(params) - variant.has_scalar > 1 else None

    grads: list[Tensor | None] = [
        torch.empty_like(like, memory_format=order) if needs >> i & 1 else None for i in (0, 1)
    ]
    if variant.has_scalar:
        grads[1] = None
    gradients = [grad for grad in grads if grad is not None]
    second_offset, run = 0, 0
    if variant.packed:
        # Dimension 1 holds the channels of the first parameter, then those of the second. In channels_last order the
        # two are interleaved at every pixel.
        second, grads[1] = first, grads[0]
        in_turns = order != torch.contiguous_format
        run = target.shape[1] if in_turns else 0
        second_offset = run if in_turns else size

    weights = weight_view(element_weight, target.shape, order)
    grad_stride = size * (2 if variant.packed else 1)
    second_stride = second.stride(0) if second is not None else 0
    # In float64, the weights take registers too.
    spread = max(element.warps_64, 2 if weights.kind else 1) if dtype == torch.float64 else 1
    dense = weights.row_stride if weights.kind == 1 else 0
    unit = divisor(size, first.stride(0), second_stride, data.stride(0), grad_stride, second_offset, dense)
    if weights.kind == 1:
        weights = weights._replace(row_stride=dense // unit)
    # A thread holds this many adjacent elements: those of a 128-bit access, or fewer if the strides require it.
    fold = min(16 // lead.element_size(), unit)
    cut = partition(rows, size, choice("nll", rows * size, lead.device), narrowest=fold)
    row_sums = lead.new_empty((rows, cut.splits), dtype=dtype) if values else None
    scalar_sums = None
    if row_sums is not None and variant.has_scalar and needs >> (len(params) - 1) & 1:
        scalar_sums = torch.empty_like(row_sums)
    launch(
        nll_kernel,
        cut.programs,
        lead.device,
        first,
        second,
        data,
        *weights.arguments,
        scalar,
        element.scalar_of(constants),
        element.shape_of(constants),
        element.offset_of(constants),
        *grads,
        row_sums,
        scalar_sums,
        element_values,
        grad_loss,
        grad_nll,
        weight,
        rows,
        size // unit,
        first.stride(0) // unit,
        second_stride // unit,
        data.stride(0) // unit,
        target.shape[0],
        grad_stride // unit,
        second_offset // unit,
        row_stride(grad_loss),
        row_stride(grad_nll),
        cut.splits,
        cut.tiles,
        ELEMENT=element.function,
        LOG_TERM=element.log_term,
        REPEATED=target.shape[0] != rows,
        WEIGHTED=weights.kind,
        COUNTS=variant.counts,
        UNIT=unit,
        RUN=run,
        ROWS=cut.rows,
        COLUMNS=cut.columns,
        FOLD=fold,
        WIDE=cut.wide,
        C=COMPUTE[dtype],
        num_warps=cut.warps * spread,
    )
    return gradients, row_sums, scalar_sums
