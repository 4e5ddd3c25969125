"""The functions behind the ops fastvae_triton::nll_elements*: the value of each element, and its derivatives.

The likelihoods' kernels (counts.py, elementwise.py) write both at a time. The backward multiplies the derivatives by
what arrives, which is read where it is: one number for a row where it was expanded.
"""

from collections.abc import Sequence

import torch
import triton.language as tl
from torch import Tensor

from .._spec import VARIANTS
from .launch import (
    COMPUTE,
    dense_rows,
    divisor,
    event_size,
    kernel,
    launch,
    memory_order,
    number,
    row_dtype,
)
from .loss import EVALUATE


@kernel
def scale_elements_kernel(
    grad,  # (rows, size), or where PER_ROW (rows,)
    first,  # derivatives (rows, size), dense, as is all that follows; any may be None
    second,
    third,
    first_result,  # out: `first` times grad; `first` itself to scale in place
    second_result,
    third_result,
    summed,  # a derivative whose product is added up over rows, or None
    sums,  # out: (chunks, size), of the rows of each program
    row_count: "number",
    size: "number",  # this and the stride in units of UNIT elements
    grad_stride: "number",
    rows_per_chunk: "number",
    blocks: "number",  # of COLUMNS columns
    PER_ROW: tl.constexpr,
    UNIT: tl.constexpr,
    COLUMNS: tl.constexpr,
    C: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    chunk = program // blocks
    begin = program % blocks * COLUMNS
    size = size.to(tl.int64) * UNIT
    columns = tl.arange(0, COLUMNS)
    inside = columns < size - begin
    total = tl.zeros((COLUMNS,), C)
    for row in range(chunk * rows_per_chunk, tl.minimum(row_count, (chunk + 1) * rows_per_chunk)):
        start = row * size + begin
        if PER_ROW:
            factor = tl.load(grad + row * grad_stride).to(C)
        else:
            factor = tl.load(grad + (row * grad_stride * UNIT + begin) + columns, inside, 0.0).to(C)
        if first is not None:
            x = tl.load(first + start + columns, inside, 0.0) * factor
            tl.store(first_result + start + columns, x.to(first_result.dtype.element_ty), inside)
        if second is not None:
            y = tl.load(second + start + columns, inside, 0.0) * factor
            tl.store(second_result + start + columns, y.to(second_result.dtype.element_ty), inside)
        if third is not None:
            z = tl.load(third + start + columns, inside, 0.0) * factor
            tl.store(third_result + start + columns, z.to(third_result.dtype.element_ty), inside)
        if summed is not None:
            total += tl.load(summed + start + columns, inside, 0.0) * factor
    if summed is not None:
        tl.store(sums + chunk * size + begin + columns, total, inside)


def nll_elements_forward(
    likelihood: str,
    params: Sequence[Tensor],
    target: Tensor,
    constants: Sequence[float],
    weight: float,
    needs: int,
) -> tuple[Tensor, list[Tensor]]:
    """(values, derivatives), as csrc/ops/nll_elements.h describes them."""
    if not VARIANTS[likelihood].elements:
        raise ValueError(f"fastvae::nll_elements: there is no kernel for the elements of {likelihood}")
    lead = params[0]
    values = torch.empty_like(lead, dtype=row_dtype(lead), memory_format=memory_order(lead))
    derivatives, *_ = EVALUATE[likelihood](
        likelihood, params, target, constants, needs, weight, values=False, element_values=values
    )
    return values, derivatives


def nll_elements_backward(
    grad: Tensor, derivatives: Sequence[Tensor], shared: int, dtype: torch.dtype
) -> list[Tensor]:
    """The derivatives times `grad`, in `dtype`; of derivatives[shared] the sum over rows, in its own."""
    gradients = [
        derivative if i == shared else torch.empty_like(derivative, dtype=dtype)
        for i, derivative in enumerate(derivatives)
    ]
    sums = _scale(grad, derivatives, gradients, shared)
    if shared >= 0:
        gradients[shared] = sums[0]
    return gradients


def nll_elements_backward_(grad: Tensor, derivatives: Sequence[Tensor], shared: int) -> list[Tensor]:
    """nll_elements_backward in place, which returns the sum alone, where there is one."""
    return _scale(grad, derivatives, derivatives, shared)


def _scale(
    grad: Tensor, derivatives: Sequence[Tensor], results: Sequence[Tensor], shared: int
) -> list[Tensor]:
    if not derivatives:
        return []
    lead = derivatives[0]
    rows, size = lead.shape[0], event_size(lead)
    per_row = all(
        stride == 0 or length == 1 for stride, length in zip(grad.stride()[1:], grad.shape[1:], strict=True)
    )
    grad = grad if per_row else dense_rows(grad, memory_order(lead))
    unit = divisor(size, 0 if per_row else grad.stride(0))
    columns = 1024 if lead.dtype == torch.float32 else 512
    blocks = -(-size // columns)
    # By the shape alone: it decides in which order numbers are added up.
    rows_per_chunk = max(1, min(32, rows * blocks // 1024)) if shared < 0 else max(8, -(-rows // 32))
    chunks = -(-rows // rows_per_chunk)
    sums = lead.new_empty((chunks, size)) if shared >= 0 else None
    scaled = [i for i in range(len(derivatives)) if i != shared]
    places: list[int | None] = [*scaled, None, None, None][:3]
    launch(
        scale_elements_kernel,
        chunks * blocks,
        lead.device,
        grad,
        *(None if i is None else derivatives[i] for i in places),
        *(None if i is None else results[i] for i in places),
        derivatives[shared] if shared >= 0 else None,
        sums,
        rows,
        size // unit,
        grad.stride(0) // (1 if per_row else unit),
        rows_per_chunk,
        blocks,
        PER_ROW=per_row,
        UNIT=unit,
        COLUMNS=columns,
        C=COMPUTE[lead.dtype],
        num_warps=4,
    )
    return [] if sums is None else [sums.sum(0).reshape(lead.shape[1:])]
