"""The categorical likelihood: a kernel for one position, whose classes share a normaliser, and its launch."""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .elementary import exp, log1p
from .launch import (
    COMPUTE,
    dense_rows,
    divisor,
    event_size,
    kernel,
    launch,
    number,
    row_dtype,
    row_stride,
    weight_view,
)
from .runtime import INTERPRETED
from .tiles import load_weights


@kernel
def categorical_kernel(
    logits,  # (rows, positions, classes), any stride of rows
    target,  # (target_rows, positions), int64, any stride of rows
    weights,  # the weights of positions (target_rows, positions), or None; this and the next eight are in a WeightView
    weights_stride: "number",
    weights_size_0: "number",
    weights_size_1: "number",
    weights_size_2: "number",
    weights_stride_0: "number",
    weights_stride_1: "number",
    weights_stride_2: "number",
    weights_stride_3: "number",
    grads,  # output or None: shaped like the logits, dense
    sums,  # output or None: (rows, positions) in C
    grad_loss,  # see row_factor in tiles.py
    grad_nll,
    weight: tl.float64,
    positions: "number",
    classes: "number",  # this and logits_stride are in units of UNIT elements
    logits_stride: "number",
    target_stride: "number",
    target_rows: "number",  # see elementwise.py
    ignored: "number",
    grad_loss_stride: "number",
    grad_nll_stride: "number",
    REPEATED: tl.constexpr,
    WEIGHTED: tl.constexpr,  # KIND of the weights
    UNIT: tl.constexpr,
    COLUMNS: tl.constexpr,
    C: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    row, position = program // positions, program % positions
    classes = classes * UNIT
    logits += row * logits_stride * UNIT + position * classes
    data_row = row
    if REPEATED:
        data_row = row % target_rows
    chosen = tl.load(target + data_row * target_stride + position)
    if grad_loss is None and grad_nll is None:
        factor = tl.full((), weight, C)
    else:
        factor = tl.full((), 0.0, C)
        if grad_loss is not None:
            factor += tl.load(grad_loss + row * grad_loss_stride).to(C) * tl.full((), weight, C)
        if grad_nll is not None:
            factor += tl.load(grad_nll + row * grad_nll_stride).to(C)
    left_out = chosen == ignored
    if WEIGHTED > 0:
        own_weight = load_weights(
            weights + data_row * weights_stride,
            position,
            position < positions,
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
        factor *= own_weight
        left_out = left_out | (own_weight == 0.0)

    if left_out:
        if sums is not None:
            tl.store(sums + program, tl.full((), 0.0, C))
        if grads is not None:
            nothing = tl.zeros((COLUMNS,), grads.dtype.element_ty)
            for start in range(0, classes, COLUMNS):
                columns = start + tl.arange(0, COLUMNS)
                tl.store(grads + program * classes + columns, nothing, columns < classes)
    else:
        # The chosen class is left out of the sum: if it were included, the nll of a confident prediction would lose
        # the other classes to rounding. A class number out of range gives NaN.
        exists = (chosen >= 0) & (chosen < classes)
        own = tl.load(logits + tl.where(exists, chosen, 0)).to(C)
        own = tl.where(exists, own, float("nan"))
        tops = tl.full((COLUMNS,), -3.0e38, C)
        rests = tl.zeros((COLUMNS,), C)
        for start in range(0, classes, COLUMNS):
            columns = start + tl.arange(0, COLUMNS)
            inside = columns < classes
            other = inside & (
                columns != chosen
            )  # as the mask of the load, this would make it go element by element
            x = tl.where(other, tl.load(logits + columns, inside, 0.0).to(C), -3.0e38)
            higher = tl.where(x > tops, x, tops)
            rests = rests * exp(tops - higher) + tl.where(other, exp(x - higher), 0.0)
            tops = higher
        highest = tl.max(tops, 0)
        top = tl.where(highest > own, highest, own)
        rest = tl.sum(rests * exp(tops - top), 0)  # in units of exp(top), as are the next two
        mine = exp(own - top)
        total = mine + rest
        if sums is not None:
            value = tl.where(own == top, log1p(rest), top - own + tl.log(total))
            if WEIGHTED > 0:
                value *= own_weight
            tl.store(sums + program, value)
        if grads is not None:
            scale = factor / total
            for start in range(0, classes, COLUMNS):
                columns = start + tl.arange(0, COLUMNS)
                x = tl.load(logits + columns, columns < classes, -float("inf")).to(C)
                grad = tl.where(columns == chosen, -rest, exp(x - top)) * scale
                tl.store(
                    grads + program * classes + columns,
                    grad.to(grads.dtype.element_ty),
                    columns < classes,
                )


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
    """Runs categorical_kernel with one program per position; see elementwise.evaluate for the arguments."""
    lead = params[0]
    dtype, classes = row_dtype(lead), lead.shape[-1]
    logits, chosen = dense_rows(lead), dense_rows(target)
    rows, positions = lead.shape[0], event_size(target)
    grads = torch.empty_like(lead, memory_format=torch.contiguous_format) if needs & 1 else None
    sums = lead.new_empty((rows, positions), dtype=dtype) if values else None
    widest = 4096 if INTERPRETED or dtype == torch.float32 else 2048
    columns = min(widest, max(16, triton.next_power_of_2(classes)))
    unit = divisor(classes, logits.stride(0))
    weights = weight_view(element_weight, target.shape)
    launch(
        categorical_kernel,
        rows * positions,
        lead.device,
        logits,
        chosen,
        *weights.arguments,
        grads,
        sums,
        grad_loss,
        grad_nll,
        weight,
        positions,
        classes // unit,
        logits.stride(0) // unit,
        chosen.stride(0),
        chosen.shape[0],
        int(constants[0]),
        row_stride(grad_loss),
        row_stride(grad_nll),
        REPEATED=chosen.shape[0] != rows,
        WEIGHTED=weights.kind,
        UNIT=unit,
        COLUMNS=columns,
        C=COMPUTE[dtype],
        num_warps=max(1, columns // 512),
    )
    return ([grads] if grads is not None else []), sums, None
