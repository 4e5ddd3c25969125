"""The reconstruction loss: what all likelihoods share, and the functions behind the ops fastvae_triton::nll_*.

A loss takes three launches, or five for counts whose means are a softmax. The kernel of the likelihood (elementwise.py,
counts.py, multinomial.py, categorical.py, discretized.py) writes the gradient and partial sums of rows. `finish_kernel`
adds these up to the nll of each row and to the loss. In the backward, `scale_kernel` reads the incoming factor on the
device, and returns immediately if it is 1.
"""

from collections.abc import Callable, Sequence

import torch
import triton.language as tl
from torch import Tensor

from .._spec import VARIANTS
from . import categorical, counts, discretized, elementwise, multinomial
from .launch import (
    COMPUTE,
    divisor,
    event_size,
    kernel,
    launch,
    number,
    partition,
    row_dtype,
    row_stride,
    splits_at_a_time,
)
from .tiles import first_column, row_factor, row_size, row_totals, tile_columns, tile_rows
from .tuning import choice

NONE, SUM, MEAN = 0, 1, 2  # the values of `reduction`

# A function that runs the kernel of a variant; see elementwise.evaluate.
Evaluate = Callable[..., tuple[list[Tensor], Tensor | None, Tensor | None]]
FAMILIES: dict[str, Evaluate] = {
    "counts": counts.evaluate,
    "categorical": categorical.evaluate,
    "discretized": discretized.evaluate,
}
EVALUATE: dict[str, Evaluate] = {
    variant.name: elementwise.evaluate if variant.element else FAMILIES[variant.family]
    for variant in VARIANTS.values()
} | {"multinomial": multinomial.evaluate}


@kernel
def finish_kernel(
    row_sums,  # (rows, splits) in C
    scalar_sums,  # (rows, splits) in C, or None
    kl,  # (rows,), or None
    beta,  # one number, or None
    nll,  # output: (rows,) in C
    scalar_rows,  # output or None: (rows,) in C
    loss,  # output: (rows,), or if REDUCE (programs,), the sum over each program's rows times `weight`
    weight: tl.float64,
    row_count: "number",
    splits: "number",
    rows_per_program: "number",
    kl_stride: "number",
    REDUCE: tl.constexpr,
    ROWS: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """Adds up the splits of each row to its nll; writes loss = nll + beta kl, or if REDUCE its sum over rows."""
    L: tl.constexpr = loss.dtype.element_ty
    program = tl.program_id(0).to(tl.int64)
    end = tl.minimum(row_count, (program + 1) * rows_per_program)
    total = tl.zeros((ROWS,), L)
    if beta is not None:
        factor = tl.load(beta).to(L)
    for start in range(program * rows_per_program, end, ROWS):
        rows = start + tl.arange(0, ROWS)
        inside = rows < end
        value = row_totals(row_sums, rows, inside, splits, ROWS, SPLITS)
        tl.store(nll + rows, value, inside)
        if scalar_sums is not None:
            tl.store(scalar_rows + rows, row_totals(scalar_sums, rows, inside, splits, ROWS, SPLITS), inside)
        value = value.to(L)
        if kl is not None:
            divergence = tl.load(kl + rows * kl_stride, inside, 0.0).to(L)
            if beta is not None:
                divergence *= factor
            value += divergence
        if REDUCE:
            total += tl.where(inside, value, 0.0)
        else:
            tl.store(loss + rows, value, inside)
    if REDUCE:
        tl.store(loss + program, tl.sum(total, 0) * tl.full((), weight, L))


@kernel
def total_kernel(partials, result, weight: tl.float64, count: "number", BLOCK: tl.constexpr):
    """Computes weight times the sum of `count` numbers in a single program."""
    C: tl.constexpr = partials.dtype.element_ty
    total = tl.zeros((BLOCK,), C)
    for start in range(0, count, BLOCK):
        i = start + tl.arange(0, BLOCK)
        total += tl.load(partials + i, i < count, 0.0)
    tl.store(result, (tl.sum(total, 0) * tl.full((), weight, C)).to(result.dtype.element_ty))


@kernel
def scale_kernel(
    first,  # gradients (rows, size), or None
    second,  # another, or None
    first_result,  # output; the same tensor as `first` to scale in place
    second_result,
    kl_gradient,  # output or None: (kl_rows,)
    beta,  # one number, or None
    grad_loss,  # see row_factor
    grad_nll,
    weight: tl.float64,  # the weight of the reduction, which `first` and `second` already include
    one_over_weight: tl.float64,
    kl_rows: "number",
    row_count: "number",
    size: "number",  # this and `stride` are in units of UNIT elements
    stride: "number",
    grad_loss_stride: "number",
    grad_nll_stride: "number",
    splits: "number",
    tiles: "number",
    UNIFORM: tl.constexpr,  # all rows share one factor and are treated as a single row
    IN_PLACE: tl.constexpr,
    UNIT: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    WIDE: tl.constexpr,
    KL_ROWS: tl.constexpr,
    C: tl.constexpr,
):
    """Multiplies the gradients from the forward by the incoming factor, unless it is 1; writes the KL's gradient."""
    if kl_gradient is not None:
        for start in range(
            tl.program_id(0).to(tl.int64) * KL_ROWS, kl_rows, tl.num_programs(0).to(tl.int64) * KL_ROWS
        ):
            rows = start + tl.arange(0, KL_ROWS)
            inside = rows < kl_rows
            K: tl.constexpr = kl_gradient.dtype.element_ty
            value = row_factor(grad_loss, None, weight, rows, inside, grad_loss_stride, 0, K)
            if beta is not None:
                value *= tl.load(beta).to(K)
            tl.store(kl_gradient + rows, value, inside)

    if first is not None:
        rows, split = tile_rows(splits, ROWS)
        inside_rows = rows < row_count
        if UNIFORM:
            factor = tl.load(grad_loss).to(C)
            changes = factor != 1.0
        else:
            factor = row_factor(
                grad_loss, grad_nll, weight, rows, inside_rows, grad_loss_stride, grad_nll_stride, C
            )
            factor = (factor * tl.full((), one_over_weight, C))[:, None]
            changes = tl.sum((inside_rows[:, None] & (factor != 1.0)).to(tl.int32)) > 0
        size = row_size(size, UNIT, WIDE)
        if changes or not IN_PLACE:
            base = rows[:, None] * stride * UNIT
            begin = first_column(split, tiles, COLUMNS, WIDE)
            for i in range(0, tiles):
                columns = tile_columns(begin + i * COLUMNS, COLUMNS, WIDE)[None, :]
                inside = inside_rows[:, None] & (columns < size)
                x = tl.load(first + base + columns, inside).to(C) * factor
                tl.store(first_result + base + columns, x.to(first.dtype.element_ty), inside)
                if second is not None:
                    y = tl.load(second + base + columns, inside).to(C) * factor
                    tl.store(second_result + base + columns, y.to(second.dtype.element_ty), inside)


@kernel
def dot_kernel(
    scalar_rows,  # (rows,), or None
    kl,  # (rows,), or None
    scalar_results,  # output: (programs,), the sum of d objective / d nll * scalar_rows over each program's rows
    beta_results,  # output: (programs,), the same sum of d objective / d loss * kl
    grad_loss,
    grad_nll,
    weight: tl.float64,
    row_count: "number",
    rows_per_program: "number",
    kl_stride: "number",
    grad_loss_stride: "number",
    grad_nll_stride: "number",
    ROWS: tl.constexpr,
):
    """Computes the gradients of a learned scale and of beta, each of which is a sum over rows."""
    program = tl.program_id(0).to(tl.int64)
    end = tl.minimum(row_count, (program + 1) * rows_per_program)
    if scalar_rows is not None:
        S: tl.constexpr = scalar_rows.dtype.element_ty
        scalar_sum = tl.zeros((ROWS,), S)
    if kl is not None:
        K: tl.constexpr = kl.dtype.element_ty
        beta_sum = tl.zeros((ROWS,), K)
    for start in range(program * rows_per_program, end, ROWS):
        rows = start + tl.arange(0, ROWS)
        inside = rows < end
        if scalar_rows is not None:
            by_nll = row_factor(
                grad_loss, grad_nll, weight, rows, inside, grad_loss_stride, grad_nll_stride, S
            )
            scalar_sum += by_nll * tl.load(scalar_rows + rows, inside, 0.0)
        if kl is not None:
            by_loss = row_factor(grad_loss, None, weight, rows, inside, grad_loss_stride, 0, K)
            beta_sum += by_loss * tl.load(kl + rows * kl_stride, inside, 0.0)
    if scalar_rows is not None:
        tl.store(scalar_results + program, tl.sum(scalar_sum, 0).to(scalar_results.dtype.element_ty))
    if kl is not None:
        tl.store(beta_results + program, tl.sum(beta_sum, 0).to(beta_results.dtype.element_ty))


# Up to this number of rows, a single program does the work per row, so that one launch suffices.
_ROWS_PER_PROGRAM = 8192


def weight_of(reduction: int, rows: int) -> float:
    """The factor by which the reduction multiplies the loss of every row. The mean over no rows is NaN."""
    if reduction != MEAN:
        return 1.0
    return 1.0 / rows if rows else float("nan")


def nll_forward(
    likelihood: str,
    params: Sequence[Tensor],
    target: Tensor,
    constants: Sequence[float],
    kl: Tensor | None,
    beta: Tensor | None,
    reduction: int,
    needs: int,
    element_weight: Tensor | None = None,
) -> tuple[Tensor, Tensor, list[Tensor], Tensor]:
    """(loss, nll, gradients, scalar_rows), as csrc/ops/nll.h describes them.

    Bit i of `needs` is set if params[i] needs a gradient. There is one gradient for each such tensor of the data's
    shape, and they already include the weight of the reduction. scalar_rows (B,) has the derivatives of the rows by
    the 0-dim tensor.
    """
    lead = params[0]
    rows = lead.shape[0]
    weight = weight_of(reduction, rows)
    gradients, row_sums, scalar_sums = EVALUATE[likelihood](
        likelihood, params, target, constants, needs, weight, element_weight=element_weight
    )
    assert row_sums is not None
    splits = row_sums.shape[1]
    nll = row_sums.new_empty(rows)
    scalar_rows = row_sums.new_empty(rows if scalar_sums is not None else 0)
    loss_dtype = torch.float64 if kl is not None and kl.dtype == torch.float64 else row_sums.dtype
    reduces = reduction != NONE
    # A single program that handles all rows writes the loss itself. Several programs each write the sum of their rows,
    # and these sums remain to be added.
    parts = max(1, -(-rows // _ROWS_PER_PROGRAM)) if reduces else -(-rows // 1024)
    loss = nll.new_empty((parts,) if reduces and parts > 1 else () if reduces else (rows,), dtype=loss_dtype)
    tile = splits_at_a_time(splits)
    launch(
        finish_kernel,
        parts,
        lead.device,
        row_sums,
        scalar_sums,
        kl,
        beta,
        nll,
        scalar_rows,
        loss,
        weight if parts == 1 else 1.0,
        rows,
        splits,
        _ROWS_PER_PROGRAM if reduces else 1024,
        row_stride(kl),
        REDUCE=reduces,
        ROWS=1024 // tile,
        SPLITS=tile,
        num_warps=4,
    )
    if reduces and parts > 1:
        loss = _total(loss, loss_dtype, weight)
    return loss, nll, gradients, scalar_rows


def _total(partials: Tensor, dtype: torch.dtype, weight: float = 1.0) -> Tensor:
    """`weight` times the sum of a tensor (n,), as a 0-dim tensor."""
    result = partials.new_empty((), dtype=dtype)
    launch(
        total_kernel, 1, partials.device, partials, result, weight, partials.numel(), BLOCK=1024, num_warps=4
    )
    return result


def nll_gradient(
    likelihood: str,
    params: Sequence[Tensor],
    target: Tensor,
    constants: Sequence[float],
    grad_loss: Tensor | None,
    grad_nll: Tensor | None,
    reduction: int,
    needs: int,
    element_weight: Tensor | None = None,
) -> list[Tensor]:
    """The gradients of the objective, if the forward could not compute them: fp16 needs the incoming factor first."""
    gradients, *_ = EVALUATE[likelihood](
        likelihood,
        params,
        target,
        constants,
        needs,
        weight_of(reduction, params[0].shape[0]),
        grad_loss=grad_loss,
        grad_nll=grad_nll,
        values=False,
        element_weight=element_weight,
    )
    return gradients


def nll_backward(
    grad_loss: Tensor | None,
    grad_nll: Tensor | None,
    gradients: Sequence[Tensor],
    scalar_rows: Tensor | None,
    kl: Tensor | None,
    beta: Tensor | None,
    rows: int,
    reduction: int,
    need_kl: bool,
    need_beta: bool,
) -> list[Tensor]:
    """The scaled gradients, followed by those of the scalar (if there are scalar_rows), kl and beta if needed."""
    scaled = [torch.empty_like(gradient) for gradient in gradients]
    return scaled + _scale(
        scaled, grad_loss, grad_nll, gradients, scalar_rows, kl, beta, rows, reduction, need_kl, need_beta
    )


def nll_backward_(
    grad_loss: Tensor | None,
    grad_nll: Tensor | None,
    gradients: Sequence[Tensor],
    scalar_rows: Tensor | None,
    kl: Tensor | None,
    beta: Tensor | None,
    rows: int,
    reduction: int,
    need_kl: bool,
    need_beta: bool,
) -> list[Tensor]:
    """A version of nll_backward that scales the gradients in place and does not return them."""
    return _scale(
        gradients, grad_loss, grad_nll, gradients, scalar_rows, kl, beta, rows, reduction, need_kl, need_beta
    )


def _scale(
    results: Sequence[Tensor],
    grad_loss: Tensor | None,
    grad_nll: Tensor | None,
    gradients: Sequence[Tensor],
    scalar_rows: Tensor | None,
    kl: Tensor | None,
    beta: Tensor | None,
    rows: int,
    reduction: int,
    need_kl: bool,
    need_beta: bool,
) -> list[Tensor]:
    """Writes the scaled gradients to `results` and returns the others."""
    weight = weight_of(reduction, rows)
    kl_gradient = (
        torch.empty_like(kl, memory_format=torch.contiguous_format) if need_kl and kl is not None else None
    )
    factors = (grad_loss, grad_nll)
    # One launch scales two gradients of the same shape, and the first launch also computes that of kl.
    pairs = [(i, i + 1) for i in range(0, len(gradients), 2)]
    if any(gradient.shape != gradients[0].shape for gradient in gradients):
        pairs = [(i, len(gradients)) for i in range(len(gradients))]
    for pair in pairs or [(0, 1)]:
        first, second = (gradients[i] if i < len(gradients) else None for i in pair)
        first_result, second_result = (results[i] if i < len(gradients) else None for i in pair)
        makes_kl = kl_gradient is not None and pair[0] == 0
        any_tensor = first if first is not None else kl_gradient
        if any_tensor is None:
            break
        # Gradients are dense, so they form a single long row if all rows share a factor.
        uniform = reduction != NONE and grad_nll is None
        size = first.numel() if first is not None else 0
        row_count = 1 if uniform else rows
        size = size // max(1, row_count)
        device = any_tensor.device
        chosen = choice("scale", row_count * size, device)
        # A single row may end within a tile for any batch size, so its tiles always have full width.
        cut = partition(row_count, size, chosen, narrowest=chosen.tile if uniform else 1)
        programs = cut.programs if size else 0
        if makes_kl:
            programs = max(programs, min(-(-rows // 1024), 64))
        # The divisor is that of one row's size even if all rows are treated as one: the total size changes from batch
        # to batch, and each different divisor would compile the kernel again.
        of_rows = first is not None and first.shape[0] == rows
        unit = divisor(event_size(first) if of_rows and first is not None else size)
        launch(
            scale_kernel,
            programs,
            device,
            first,
            second,
            first_result,
            second_result,
            kl_gradient if makes_kl else None,
            beta,
            *factors,
            weight,
            1.0 / weight,
            rows,
            row_count,
            size // unit,
            size // unit,
            *map(row_stride, factors),
            cut.splits,
            cut.tiles,
            UNIFORM=uniform,
            IN_PLACE=results is gradients,
            UNIT=unit,
            ROWS=cut.rows,
            COLUMNS=cut.columns,
            WIDE=cut.wide,
            KL_ROWS=1024,
            C=COMPUTE[row_dtype(any_tensor)],
            num_warps=cut.warps,
        )

    by_scalar = by_beta = None
    if scalar_rows is not None or need_beta:
        by_scalar, by_beta = _dots(scalar_rows, kl if need_beta else None, beta, factors, weight, rows)
    return [t for t in (by_scalar, kl_gradient, by_beta) if t is not None]


def _dots(
    scalar_rows: Tensor | None,
    kl: Tensor | None,
    beta: Tensor | None,
    factors: tuple[Tensor | None, Tensor | None],
    weight: float,
    rows: int,
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of the scalar, if there are scalar_rows, and of beta, if there is kl."""
    parts = max(1, -(-rows // _ROWS_PER_PROGRAM))
    shape = () if parts == 1 else (parts,)
    last = beta.dtype if parts == 1 and beta is not None else kl.dtype if kl is not None else None
    by_scalar = scalar_rows.new_empty(shape) if scalar_rows is not None else None
    by_beta = kl.new_empty(shape, dtype=last) if kl is not None else None
    device = next(t.device for t in (scalar_rows, kl) if t is not None)
    launch(
        dot_kernel,
        parts,
        device,
        scalar_rows,
        kl,
        by_scalar,
        by_beta,
        *factors,
        weight,
        rows,
        _ROWS_PER_PROGRAM,
        row_stride(kl),
        *map(row_stride, factors),
        ROWS=1024,
        num_warps=4,
    )
    if parts > 1:
        by_scalar = _total(by_scalar, by_scalar.dtype) if by_scalar is not None else None
        by_beta = _total(by_beta, beta.dtype) if by_beta is not None and beta is not None else None
    return by_scalar, by_beta
