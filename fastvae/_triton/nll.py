"""The reconstruction loss: its kernels, and the functions behind fastvae_triton::nll_forward and its backward ops.

A loss is three launches. `nll_kernel` reads parameters and data once and writes the gradient, weighted by the
reduction, and partial sums of rows; `finish_kernel` adds those up to the rows' nll and to the loss; in the backward
`scale_kernel` looks at the factor that arrives, on the device, and returns at once where it is 1.

Everything is computed in float32, or float64 for float64 parameters: C below. Sums are made in an order that the shape
decides. Offsets are 64-bit where rows are counted, and 32-bit within a row unless it is longer than that.
"""

from collections.abc import Callable, Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

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
)
from .likelihoods import LIKELIHOODS
from .tuning import choice

NONE, SUM, MEAN = 0, 1, 2  # `reduction`

# ---------------------------------------------------------------------------------------------------------------------
# Kernels
# ---------------------------------------------------------------------------------------------------------------------


@triton.jit
def tile_rows(splits, ROWS: tl.constexpr):
    """(row numbers of this program, int64 (ROWS,); its split)."""
    program = tl.program_id(0).to(tl.int64)
    return program // splits * ROWS + tl.arange(0, ROWS), program % splits


@triton.jit
def row_size(units, UNIT: tl.constexpr, WIDE: tl.constexpr):
    """The elements of a row; the number of units may fit into 32 bits where this does not."""
    if WIDE:
        units = units.to(tl.int64)
    return units * UNIT


@triton.jit
def first_column(split, tiles, COLUMNS: tl.constexpr, WIDE: tl.constexpr):
    """Where a split begins; 32 bits, unless a row has too many columns for that."""
    start = split * tiles * COLUMNS
    if not WIDE:
        start = start.to(tl.int32)
    return start


@triton.jit
def tile_columns(start, COLUMNS: tl.constexpr, WIDE: tl.constexpr):
    columns = tl.arange(0, COLUMNS)
    if WIDE:
        columns = columns.to(tl.int64)
    return start + columns


@triton.jit
def row_factor(grad_loss, grad_nll, weight, rows, inside, grad_loss_stride, grad_nll_stride, C: tl.constexpr):
    """d objective / d nll of each row: weight * grad_loss + grad_nll, of which one may be missing; (ROWS,) in C.

    A reduced loss has a grad_loss of one number, which is read with stride 0.
    """
    factor = tl.zeros(rows.shape, C)
    if grad_loss is not None:
        factor += tl.load(grad_loss + rows * grad_loss_stride, inside, 0.0).to(C) * tl.full((), weight, C)
    if grad_nll is not None:
        factor += tl.load(grad_nll + rows * grad_nll_stride, inside, 0.0).to(C)
    return factor


@triton.jit
def fold_sum(x, ROWS: tl.constexpr, COLUMNS: tl.constexpr, FOLD: tl.constexpr):
    """(ROWS, COLUMNS) -> (ROWS, COLUMNS / FOLD): adds up neighbours, which one thread holds."""
    return tl.sum(tl.reshape(x, (ROWS, COLUMNS // FOLD, FOLD)), 2)


@triton.jit
def fold_excess(e, ROWS: tl.constexpr, COLUMNS: tl.constexpr, FOLD: tl.constexpr):
    """The same for products: see combine_excess."""
    for i in tl.static_range(0, 4):
        if 2 << i <= FOLD:
            even, odd = tl.split(tl.reshape(e, (ROWS, COLUMNS >> (i + 1), 2)))
            e = combine_excess(even, odd)
    return e


@kernel
def nll_kernel(
    first,  # parameters: (rows, size), any stride of rows
    second,  # None where the likelihood has one
    target,  # (rows, size), any dtype
    scalar,  # one number, or None: then `scalar_value` is it
    scalar_value: tl.float64,
    shape: tl.float64,  # see likelihoods.py
    offset: tl.float64,
    first_slope,  # out, or None: (rows, size) as the parameters
    second_slope,
    row_sums,  # out, or None: (rows, splits) in C
    scalar_sums,  # out, or None: the same of the derivative by `scalar`
    grad_loss,  # see row_factor; with neither of the two, slopes are multiplied by `weight`
    grad_nll,
    weight: tl.float64,
    row_count: "number",
    size: "number",  # this and all strides in units of UNIT elements
    first_stride: "number",
    second_stride: "number",
    target_stride: "number",
    slope_stride: "number",
    second_offset: "number",  # of the second half of a packed head
    grad_loss_stride: "number",
    grad_nll_stride: "number",
    splits: "number",
    tiles: "number",
    ELEMENT: tl.constexpr,
    LOG_TERM: tl.constexpr,
    COUNTS: tl.constexpr,  # integers are numbers, uint8 too
    UNIT: tl.constexpr,
    RUN: tl.constexpr,  # 0, or the channels of a packed head in channels_last order, where the halves alternate
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
    target += rows[:, None] * target_stride * UNIT
    if first_slope is not None:
        first_slope += rows[:, None] * slope_stride * UNIT
    if second_slope is not None:
        second_slope += rows[:, None] * slope_stride * UNIT + second_offset.to(tl.int64) * UNIT

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
    scalar_slopes = tl.zeros((ROWS, COLUMNS // FOLD), C)
    excess = tl.zeros((ROWS, COLUMNS // FOLD), C)
    start = first_column(split, tiles, COLUMNS, WIDE)
    for i in range(0, tiles):
        columns = tile_columns(start + i * COLUMNS, COLUMNS, WIDE)[None, :]
        inside = inside_rows[:, None] & (columns < size)
        # What is outside counts as 0, and is taken out of the sums below.
        if RUN > 0:
            places = columns + columns // RUN * RUN
        else:
            # FOLD neighbours make a 128-bit access of the parameters. Left to itself Triton would have a thread hold
            # the 16 that make one of uint8 data, and pass everything else through shared memory.
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
        value, e, slope_a, slope_b, slope_shared = ELEMENT(a, b, t, shared, shape, offset)

        if first_slope is not None:
            tl.store(first_slope + places, (slope_a * factor).to(first_slope.dtype.element_ty), inside)
        if second_slope is not None:
            tl.store(second_slope + places, (slope_b * factor).to(second_slope.dtype.element_ty), inside)
        if row_sums is not None:
            sums += fold_sum(tl.where(inside, value, 0.0), ROWS, COLUMNS, FOLD)
        if scalar_sums is not None:
            scalar_slopes += fold_sum(tl.where(inside, slope_shared, 0.0), ROWS, COLUMNS, FOLD)
        if LOG_TERM and row_sums is not None:
            excess = combine_excess(excess, fold_excess(tl.where(inside, e, 0.0), ROWS, COLUMNS, FOLD))
            # 64 factors, each at most 2, fit in float32.
            if (i + 1) * FOLD % 64 == 0:
                sums += log1p(excess)
                excess = tl.zeros((ROWS, COLUMNS // FOLD), C)

    if LOG_TERM:
        sums += log1p(excess)
    if row_sums is not None:
        tl.store(row_sums + rows * splits + split, tl.sum(sums, 1), inside_rows)
    if scalar_sums is not None:
        tl.store(scalar_sums + rows * splits + split, tl.sum(scalar_slopes, 1), inside_rows)


@triton.jit
def row_totals(partials, rows, inside, splits, ROWS: tl.constexpr, SPLITS: tl.constexpr):
    """Adds up what the splits of each row left: (ROWS,)."""
    total = tl.zeros((ROWS, SPLITS), partials.dtype.element_ty)
    for start in range(0, splits, SPLITS):
        split = start + tl.arange(0, SPLITS)[None, :]
        total += tl.load(partials + rows[:, None] * splits + split, inside[:, None] & (split < splits), 0.0)
    return tl.sum(total, 1)


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


# ---------------------------------------------------------------------------------------------------------------------
# Launches
# ---------------------------------------------------------------------------------------------------------------------

# Up to so many rows, what is done once per row is done by a single program, in one launch.
_ROWS_PER_PROGRAM = 8192


def weight_of(reduction: int, rows: int) -> float:
    """What the reduction multiplies every row's loss by. The mean of no rows is not a number."""
    if reduction != MEAN:
        return 1.0
    return 1.0 / rows if rows else float("nan")


def _stride(tensor: Tensor | None) -> int:
    """Of a (B,) tensor; 0 of a single number, which then serves for all rows."""
    return tensor.stride(0) if tensor is not None and tensor.dim() else 0


def _evaluate(
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
) -> tuple[list[Tensor], Tensor | None, Tensor | None]:
    """Runs nll_kernel: (gradients that `needs` asks for, sums (rows, splits) of rows, the same of scalar slopes).

    Without `values`, only the gradients are made.
    """
    row, lead = LIKELIHOODS[likelihood], params[0]
    order, dtype = memory_order(lead), row_dtype(lead)
    rows, size = lead.shape[0], event_size(target)
    first, data = dense_rows(lead, order), dense_rows(target, order)
    scalar = params[-1] if row.has_scalar else None
    second = dense_rows(params[1], order) if len(params) - row.has_scalar > 1 else None

    slopes: list[Tensor | None] = [
        torch.empty_like(lead, memory_format=order) if needs >> i & 1 else None for i in (0, 1)
    ]
    if row.has_scalar:
        slopes[1] = None
    gradients = [slope for slope in slopes if slope is not None]
    second_offset, run = 0, 0
    if row.packed:
        # Dimension 1 holds the channels of the first, then those of the second. In channels_last order the two
        # alternate at every pixel.
        second, slopes[1] = first, slopes[0]
        in_turns = order != torch.contiguous_format
        run = target.shape[1] if in_turns else 0
        second_offset = run if in_turns else size

    slope_stride = size * (2 if row.packed else 1)
    second_stride = second.stride(0) if second is not None else 0
    unit = divisor(size, first.stride(0), second_stride, data.stride(0), slope_stride, second_offset)
    # The elements of one 128-bit access, or what the strides allow of it: those a thread holds side by side.
    fold = min(16 // lead.element_size(), unit)
    cut = partition(rows, size, choice("nll", rows * size, lead.device), narrowest=fold)
    row_sums = lead.new_empty((rows, cut.splits), dtype=dtype) if values else None
    scalar_sums = None
    if row_sums is not None and row.has_scalar and needs >> (len(params) - 1) & 1:
        scalar_sums = torch.empty_like(row_sums)
    launch(
        nll_kernel,
        cut.programs,
        lead.device,
        first,
        second,
        data,
        scalar,
        row.scalar_of(constants),
        row.shape_of(constants),
        row.offset_of(constants),
        *slopes,
        row_sums,
        scalar_sums,
        grad_loss,
        grad_nll,
        weight,
        rows,
        size // unit,
        first.stride(0) // unit,
        second_stride // unit,
        data.stride(0) // unit,
        slope_stride // unit,
        second_offset // unit,
        _stride(grad_loss),
        _stride(grad_nll),
        cut.splits,
        cut.tiles,
        ELEMENT=row.element,
        LOG_TERM=row.log_term,
        COUNTS=row.counts,
        UNIT=unit,
        RUN=run,
        ROWS=cut.rows,
        COLUMNS=cut.columns,
        FOLD=fold,
        WIDE=cut.wide,
        C=COMPUTE[dtype],
        num_warps=cut.warps * (row.warps_64 if dtype == torch.float64 else 1),
    )
    return gradients, row_sums, scalar_sums


# By the family of a likelihood; counts.py and mixtures.py add their own.
EVALUATE: dict[str, Callable[..., tuple[list[Tensor], Tensor | None, Tensor | None]]] = {
    "elementwise": _evaluate
}


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
    gradients, row_sums, scalar_sums = EVALUATE[LIKELIHOODS[likelihood].family](
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
    tile = min(1024, triton.next_power_of_2(splits))
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
        _stride(kl),
        REDUCE=reduces,
        ROWS=max(1, 1024 // tile),
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
    gradients, *_ = EVALUATE[LIKELIHOODS[likelihood].family](
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
        cut = partition(row_count, size, choice("scale", row_count * size, device))
        programs = cut.programs if size else 0
        if makes_kl:
            programs = max(programs, min(-(-rows // 1024), 64))
        unit = divisor(size)
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
            *map(_stride, factors),
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
        _stride(kl),
        *map(_stride, factors),
        ROWS=1024,
        num_warps=4,
    )
    if parts > 1:
        by_scalar = _total(by_scalar, by_scalar.dtype) if by_scalar is not None else None
        by_beta = _total(by_beta, beta.dtype) if by_beta is not None and beta is not None else None
    return by_scalar, by_beta
