"""The reconstruction loss: what all likelihoods share of it, and the functions behind the ops fastvae_triton::nll_*.

A loss is three launches. The likelihood's kernel (elementwise.py, counts.py, categorical.py, discretized.py) writes the
gradient and partial sums of rows; `finish_kernel` adds those up to the rows' nll and to the loss; in the backward
`scale_kernel` looks at the factor that arrives, on the device, and returns at once where it is 1.
"""

from collections.abc import Callable, Sequence

import torch
import triton.language as tl
from torch import Tensor

from .._spec import VARIANTS
from . import categorical, counts, discretized, elementwise
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

NONE, SUM, MEAN = 0, 1, 2  # `reduction`

# What runs a variant's kernel: see elementwise.evaluate.
Evaluate = Callable[..., tuple[list[Tensor], Tensor | None, Tensor | None]]
FAMILIES: dict[str, Evaluate] = {
    "counts": counts.evaluate,
    "categorical": categorical.evaluate,
    "discretized": discretized.evaluate,
}
EVALUATE: dict[str, Evaluate] = {
    variant.name: elementwise.evaluate if variant.element else FAMILIES[variant.family]
    for variant in VARIANTS.values()
}


@kernel
def finish_kernel(
    row_sums,  # (rows, splits) in C
    scalar_sums,  # the same, or None
    kl,  # (rows,), or None
    beta,  # one number, or None
    nll,  # out: (rows,) in C
    scalar_rows,  # out, or None: (rows,) in C
    loss,  # out: (rows,), or where REDUCE (programs,): the sum of each program's, times `weight`
    weight: tl.float64,
    row_count: "number",
    splits: "number",
    rows_per_program: "number",
    kl_stride: "number",
    REDUCE: tl.constexpr,
    ROWS: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """What is summed over columns becomes nll, loss = nll + beta kl, and the loss that is reduced over rows."""
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
    """result = weight * the sum of `count` numbers, by a single program."""
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
    first_result,  # out; `first` itself to scale in place
    second_result,
    kl_gradient,  # out, or None: (kl_rows,)
    beta,  # one number, or None
    grad_loss,  # see row_factor
    grad_nll,
    weight: tl.float64,  # that of the reduction, which is in `first` and `second` already
    one_over_weight: tl.float64,
    kl_rows: "number",
    row_count: "number",
    size: "number",  # this and the stride in units of UNIT elements
    stride: "number",
    grad_loss_stride: "number",
    grad_nll_stride: "number",
    splits: "number",
    tiles: "number",
    UNIFORM: tl.constexpr,  # one factor for all rows, which are then seen as one
    IN_PLACE: tl.constexpr,
    UNIT: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    WIDE: tl.constexpr,
    KL_ROWS: tl.constexpr,
    C: tl.constexpr,
):
    """Multiplies what the forward made by what the backward brings, unless that is 1; and writes the KL's gradient."""
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
        if changes or not IN_PLACE:
            size = row_size(size, UNIT, WIDE)
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
    scalar_results,  # out: (programs,), of each program's rows the sum of their d objective / d nll * scalar_rows
    beta_results,  # out: (programs,), the same of d objective / d loss * kl
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
    """The gradients of a learned scale and of beta: one number each, summed over rows."""
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


# Up to so many rows, what is done once per row is done by a single program, in one launch.
_ROWS_PER_PROGRAM = 8192


def weight_of(reduction: int, rows: int) -> float:
    """What the reduction multiplies every row's loss by. The mean of no rows is not a number."""
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
) -> tuple[Tensor, Tensor, list[Tensor], Tensor]:
    """(loss, nll, gradients, scalar_rows), as csrc/ops/nll.h describes them.

    `needs`: bit i is set where params[i] wants its gradient. Gradients, one for each such tensor of the data's shape,
    are multiplied by the reduction's weight already; scalar_rows: (B,) derivatives of the rows by the 0-dim tensor.
    """
    lead = params[0]
    rows = lead.shape[0]
    weight = weight_of(reduction, rows)
    gradients, row_sums, scalar_sums = EVALUATE[likelihood](
        likelihood, params, target, constants, needs, weight
    )
    assert row_sums is not None
    splits = row_sums.shape[1]
    nll = row_sums.new_empty(rows)
    scalar_rows = row_sums.new_empty(rows if scalar_sums is not None else 0)
    loss_dtype = torch.float64 if kl is not None and kl.dtype == torch.float64 else row_sums.dtype
    reduces = reduction != NONE
    # Where a single program sees all rows it writes the loss itself; else there is a sum of each program's rows to add.
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
    """weight * the sum of a (n,) tensor: one number."""
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
) -> list[Tensor]:
    """The gradients of the objective, for what the forward cannot make yet: fp16 must know the factor first."""
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
    """The scaled gradients, then those of the scalar (where there are scalar_rows), kl and beta that are wanted."""
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
    """nll_backward that scales the gradients in place and does not return them."""
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
    # A launch scales two gradients of one shape, and makes that of kl.
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
        # Gradients are dense: where one factor serves for all, they are a single long row.
        uniform = reduction != NONE and grad_nll is None
        size = first.numel() if first is not None else 0
        row_count = 1 if uniform else rows
        size = size // max(1, row_count)
        device = any_tensor.device
        chosen = choice("scale", row_count * size, device)
        # A single row ends within a tile, whatever the batch: its tiles are whole ones.
        cut = partition(row_count, size, chosen, narrowest=chosen.tile if uniform else 1)
        programs = cut.programs if size else 0
        if makes_kl:
            programs = max(programs, min(-(-rows // 1024), 64))
        # Of a row, not of all that lies behind it: that changes from batch to batch, and with it what is compiled.
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
    """The gradients of the scalar and of beta, where there are scalar_rows, and kl."""
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
