"""The functions behind the ops fastvae_triton::nll_elements*: the value of each element, and its derivatives.

The kernels of the likelihoods (counts.py, elementwise.py) write both in one launch. The backward multiplies the
derivatives by the incoming gradient, which is read without a copy: if it was expanded, as one number per row.
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
    grad,  # (rows, size), or (rows,) if PER_ROW
    first,  # derivatives (rows, size); these and all later tensors are dense, and any may be None
    second,
    third,
    first_result,  # output: `first` times grad; the same tensor as `first` to scale in place
    second_result,
    third_result,
    summed,  # a derivative whose product with grad is summed over rows, or None
    sums,  # output: (chunks, size), the sums over the rows of each chunk
    row_count: "number",
    size: "number",  # this is in units of UNIT elements, as is grad_stride unless PER_ROW
    grad_stride: "number",
    rows_per_chunk: "number",
    blocks: "number",  # the number of blocks of COLUMNS columns
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
    factor: float,
    needs: int,
    weight: Tensor | None = None,
) -> tuple[Tensor, list[Tensor]]:
    """(values, derivatives), as csrc/ops/nll_elements.h describes them."""
    if not VARIANTS[likelihood].elements:
        raise ValueError(f"fastvae::nll_elements: there is no kernel for the elements of {likelihood}")
    lead = params[0]
    values = torch.empty_like(lead, dtype=row_dtype(lead), memory_format=memory_order(lead))
    derivatives, *_ = EVALUATE[likelihood](
        likelihood,
        params,
        target,
        constants,
        needs,
        factor,
        values=False,
        element_values=values,
        element_weight=weight,
    )
    return values, derivatives


def nll_elements_backward(
    grad: Tensor, derivatives: Sequence[Tensor], shared: int, dtype: torch.dtype
) -> list[Tensor]:
    """The derivatives times `grad`, in `dtype`; derivatives[shared] is summed over rows and keeps its own dtype."""
    gradients = [
        derivative if i == shared else torch.empty_like(derivative, dtype=dtype)
        for i, derivative in enumerate(derivatives)
    ]
    sums = _scale(grad, derivatives, gradients, shared)
    if shared >= 0:
        gradients[shared] = sums[0]
    return gradients


def nll_elements_backward_(grad: Tensor, derivatives: Sequence[Tensor], shared: int) -> list[Tensor]:
    """nll_elements_backward in place, which returns only the sum over rows, if there is one."""
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
    # This determines the order of summation and must therefore depend only on the shape.
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
