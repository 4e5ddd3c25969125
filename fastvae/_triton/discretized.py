"""The discretised logistic and mixtures of it: their kernel and its launch.

A program processes a tile of pixels and goes over their components twice: once for the sum of the mixture and, once
that is known, again for the gradient. Components are recomputed the second time, because none of their values are kept.
csrc/math/discretized.h has the formulas, and says what is measured in half bins.
"""

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .elementary import combine_excess, exp, exp_minus_1_minus, log1p, tanh
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
from .tiles import first_column, load_weights, row_factor, row_size, tile_columns, tile_rows
from .tuning import choice

# ---------------------------------------------------------------------------------------------------------------------
# An element
# ---------------------------------------------------------------------------------------------------------------------

# The mass of a bin narrower than this, in units of the scale, equals density times width to full precision.
_NARROW_32: tl.constexpr = tl.constexpr(1e-4)
_NARROW_64: tl.constexpr = tl.constexpr(1e-8)


@triton.jit
def one_minus_square(x, e):
    """1 - e^-2x, given x >= 0 and e = e^-x."""
    return tl.where(x < 1.0, x - exp_minus_1_minus(-x, e), 1.0 - e) * (1.0 + e)


@triton.jit
def log_mass(n, distance, raw_log_scale, levels, log_width, floor, small):
    """The parts of log mass = log(factor) - linear - log(1 + e1) - log(1 + e2), and its derivatives.

    Returns (linear, e1, e2, factor, factor / ((1 + e1) (1 + e2)), derivative by the mean, derivative by the log-scale).
    `distance` is the level minus the mean, in half bins.
    """
    floored = raw_log_scale < floor
    log_scale = tl.where(floored, floor, raw_log_scale)
    h = exp(-log_scale) / levels
    u = h * distance
    size = tl.abs(u)
    r = exp(-h)
    q = exp(-size)

    lowest = n < 1.0 - levels
    edge = lowest | (n > levels - 1.0)
    t = tl.where(edge, tl.where(lowest, -u, u), size)
    sign = tl.where(edge, tl.where(lowest, -1.0, 1.0), tl.where(u < 0.0, -1.0, 1.0))
    y = t - h
    e1 = exp(-tl.abs(y))
    e2 = tl.where(edge, 0.0, q * r)
    factor = tl.where(edge, 1.0, one_minus_square(h, r))
    odd = tl.where(edge, 1.0, one_minus_square(size, q))

    narrow = h < (_NARROW_64 if h.dtype == tl.float64 else _NARROW_32)
    mass = tl.where(y > 0.0, e1, 1.0) * factor
    is_small = ((mass < small * (1.0 + e1) * (1.0 + e2)) | narrow) & (edge == 0)
    y = tl.where(is_small, size, y)
    e1 = tl.where(is_small, q, e1)
    e2 = tl.where(is_small, q, e2)
    factor = tl.where(is_small, 1.0, factor)
    linear = tl.where(y < 0.0, 0.0, y) + tl.where(is_small, log_scale - log_width, 0.0)

    f1 = 1.0 + e1
    f2 = 1.0 + e2
    over = factor / (f1 * f2)
    grad = tl.where(y < 0.0, e1, 1.0) * odd / (f1 * f2)
    inner = (1.0 + r * r) / factor - tl.where(y > 0.0, e1, 1.0) * over
    by_h = tl.where(is_small, 1.0, h * tl.where(edge, grad, inner))
    by_log_scale = tl.where(floored, 0.0, t * grad - by_h)
    return linear, e1, e2, factor, over, h * sign * grad, by_log_scale


# ---------------------------------------------------------------------------------------------------------------------
# A component
# ---------------------------------------------------------------------------------------------------------------------


@triton.jit
def load_plane(first, places, plane, step, inside, C: tl.constexpr):
    return tl.load(first + places + plane * step, inside, 0.0).to(C)


@triton.jit
def store_plane(grads, places, plane, step, inside, value):
    tl.store(grads + places + plane * step, value.to(grads.dtype.element_ty), inside)


@triton.jit
def component(
    first, places, k, K, step, inside, n0, n1, n2, levels, log_width, floor, small, CHANNELS: tl.constexpr
):
    """(logit, linear, factor, nine derivatives of the log-mass) of component k; see csrc/cuda/discretized.cuh.

    The derivatives are by three means, three log-scales and three coefficients. With a single channel, only the first
    mean and the first log-scale have meaningful ones.
    """
    C: tl.constexpr = n0.dtype
    logit = load_plane(first, places, k, step, inside, C)
    distance = tl.fma(-load_plane(first, places, K + k, step, inside, C), levels, n0)
    scale = load_plane(first, places, 2 * K + k, step, inside, C)
    linear, _, _, _, factor, m0, s0 = log_mass(n0, distance, scale, levels, log_width, floor, small)
    linear = -linear
    m1, m2, s1, s2, c0, c1, c2 = m0, m0, s0, s0, m0, m0, m0
    if CHANNELS == 3:
        a, a_grad = tanh(load_plane(first, places, 3 * K + k, step, inside, C))
        b, b_grad = tanh(load_plane(first, places, 6 * K + k, step, inside, C))
        c, c_grad = tanh(load_plane(first, places, 9 * K + k, step, inside, C))
        distance = tl.fma(-load_plane(first, places, 4 * K + k, step, inside, C), levels, n1)
        distance = tl.fma(-a, n0, distance)
        scale = load_plane(first, places, 5 * K + k, step, inside, C)
        more, _, _, _, over, m1, s1 = log_mass(n1, distance, scale, levels, log_width, floor, small)
        linear -= more
        factor *= over
        distance = tl.fma(-load_plane(first, places, 7 * K + k, step, inside, C), levels, n2)
        distance = tl.fma(-c, n1, tl.fma(-b, n0, distance))
        scale = load_plane(first, places, 8 * K + k, step, inside, C)
        more, _, _, _, over, m2, s2 = log_mass(n2, distance, scale, levels, log_width, floor, small)
        linear -= more
        factor *= over
        c0 = m1 * n0 * a_grad
        c1 = m2 * n0 * b_grad
        c2 = m2 * n1 * c_grad
    return logit, linear, factor, m0 * levels, m1 * levels, m2 * levels, s0, s1, s2, c0, c1, c2


# ---------------------------------------------------------------------------------------------------------------------
# Kernel
# ---------------------------------------------------------------------------------------------------------------------


@kernel
def logistic_kernel(
    first,  # the parameters (rows, planes * pixels), with any stride of rows
    target,  # uint8 levels (target_rows, channels * pixels), with any stride of rows
    weights,  # of elements or, if MIXED, of pixels, or None; this and the next eight are in a WeightView
    weights_stride: "number",
    weights_size_0: "number",
    weights_size_1: "number",
    weights_size_2: "number",
    weights_stride_0: "number",
    weights_stride_1: "number",
    weights_stride_2: "number",
    weights_stride_3: "number",
    grads,  # output or None: shaped like `first`
    row_sums,  # output or None: (rows, splits) in C
    levels: tl.float64,  # 2^bits - 1
    log_width: tl.float64,  # log(2 / levels)
    floor: tl.float64,
    small: tl.float64,
    grad_loss,  # see row_factor in tiles.py; without this and grad_nll, grads are multiplied by `weight`
    grad_nll,
    weight: tl.float64,
    row_count: "number",
    pixels: "number",  # in units of UNIT elements, like all strides but the last two
    params_stride: "number",
    target_stride: "number",
    target_rows: "number",  # see elementwise.py
    grads_stride: "number",
    planes: "number",
    K: "number",  # the number of components; 0 if there is no mixture
    channels: "number",
    grad_loss_stride: "number",
    grad_nll_stride: "number",
    splits: "number",
    tiles: "number",
    REPEATED: tl.constexpr,
    WEIGHTED: tl.constexpr,  # KIND of the weights
    MIXED: tl.constexpr,  # the number of channels of a mixture, or 0
    ALTERNATE: tl.constexpr,  # planes are interleaved at every pixel (channels_last)
    UNIT: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    FOLD: tl.constexpr,
    WIDE: tl.constexpr,
    C: tl.constexpr,
):
    rows, split = tile_rows(splits, ROWS)
    inside_rows = rows < row_count
    size = row_size(pixels, UNIT, WIDE)
    first += rows[:, None] * params_stride * UNIT
    data_rows = rows
    if REPEATED:
        data_rows = rows % target_rows
    target += data_rows[:, None] * target_stride * UNIT
    if WEIGHTED > 0:
        weights += data_rows[:, None] * weights_stride
    if grads is not None:
        grads += rows[:, None] * grads_stride * UNIT
    if grad_loss is None and grad_nll is None:
        row_weights = tl.full((), weight, C)
    else:
        row_weights = row_factor(
            grad_loss, grad_nll, weight, rows, inside_rows, grad_loss_stride, grad_nll_stride, C
        )
        row_weights = row_weights[:, None]
    highest = tl.full((), levels, C)
    width = tl.full((), log_width, C)
    least = tl.full((), floor, C)
    smallest = tl.full((), small, C)

    sums = tl.zeros((ROWS, COLUMNS), C)
    start = first_column(split, tiles, COLUMNS, WIDE)
    for i in range(0, tiles):
        columns = tile_columns(start + i * COLUMNS, COLUMNS, WIDE)[None, :]
        inside = inside_rows[:, None] & (columns < size)
        if ALTERNATE:
            places = columns * planes
            data_places = columns * channels
            step = 1
            data_step = 1
            singles = channels
        else:
            places = tl.max_contiguous(columns, (1, FOLD))
            data_places = columns
            step = size
            data_step = size
            singles = 1

        if MIXED > 0:
            n0 = 2.0 * tl.minimum(tl.load(target + data_places, inside, 0).to(C), highest) - highest
            n1 = n0
            n2 = n0
            if MIXED == 3:
                n1 = (
                    2.0 * tl.minimum(tl.load(target + data_places + data_step, inside, 0).to(C), highest)
                    - highest
                )
                n2 = (
                    2.0 * tl.minimum(tl.load(target + data_places + 2 * data_step, inside, 0).to(C), highest)
                    - highest
                )
            # The params of a pixel of weight 0 are not read but taken to be 0, so that all derivatives are finite.
            reads = inside
            factors = row_weights
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
                reads = inside & (own != 0.0)
                factors = row_weights * own
            # This works like Mixed in csrc/cuda/discretized.cuh. The initial values are lower than any logit but
            # finite: if they were -inf, a first component of weight 0 would give -inf - -inf.
            top = tl.full((ROWS, COLUMNS), -1e38, C)
            top_linear = tl.zeros((ROWS, COLUMNS), C)
            top_logit = top
            # The sums of e^((logit - top) + (linear - top_linear)) * factor and of e^(logit - top_logit).
            masses = tl.zeros((ROWS, COLUMNS), C)
            priors = tl.zeros((ROWS, COLUMNS), C)
            for k in range(0, K):
                logit, linear, factor, _, _, _, _, _, _, _, _, _ = component(
                    first, places, k, K, step, reads, n0, n1, n2, highest, width, least, smallest, MIXED
                )
                above = (logit - top) + (linear - top_linear)
                ratio = exp(-tl.abs(above))
                higher = above > 0.0
                masses = masses * tl.where(higher, ratio, 1.0) + factor * tl.where(higher, 1.0, ratio)
                top = tl.where(higher, logit, top)
                top_linear = tl.where(higher, linear, top_linear)
                above = logit - top_logit
                ratio = exp(-tl.abs(above))
                higher = above > 0.0
                priors = priors * tl.where(higher, ratio, 1.0) + tl.where(higher, 1.0, ratio)
                top_logit = tl.where(higher, logit, top_logit)
            # From here on, top_linear is relative to the highest logit, so that `top` need not be kept.
            top_linear += top - top_logit
            value = tl.log(priors / masses) - top_linear
            if WEIGHTED > 0:
                value *= own
            sums += tl.where(inside, value, 0.0)
            if grads is not None:
                posterior = -factors / masses
                prior = factors / priors
                for k in range(0, K):
                    logit, linear, factor, m0, m1, m2, s0, s1, s2, c0, c1, c2 = component(
                        first, places, k, K, step, reads, n0, n1, n2, highest, width, least, smallest, MIXED
                    )
                    logit -= top_logit
                    share = posterior * factor * exp((logit + linear) - top_linear)
                    by_logit = prior * exp(logit) + share
                    store_plane(grads, places, k, step, inside, by_logit)
                    store_plane(grads, places, K + k, step, inside, m0 * share)
                    store_plane(grads, places, 2 * K + k, step, inside, s0 * share)
                    if MIXED == 3:
                        store_plane(grads, places, 3 * K + k, step, inside, c0 * share)
                        store_plane(grads, places, 4 * K + k, step, inside, m1 * share)
                        store_plane(grads, places, 5 * K + k, step, inside, s1 * share)
                        store_plane(grads, places, 6 * K + k, step, inside, c1 * share)
                        store_plane(grads, places, 7 * K + k, step, inside, m2 * share)
                        store_plane(grads, places, 8 * K + k, step, inside, s2 * share)
                        store_plane(grads, places, 9 * K + k, step, inside, c2 * share)
        else:
            for c in range(0, singles):
                level = tl.load(target + data_places + c * data_step, inside, 0).to(C)
                n = 2.0 * tl.minimum(level, highest) - highest
                reads = inside
                factors = row_weights
                if WEIGHTED > 0:
                    own = load_weights(
                        weights,
                        data_places + c * data_step,
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
                    reads = inside & (own != 0.0)
                    factors = row_weights * own
                distance = tl.fma(-load_plane(first, places, c, step, reads, C), highest, n)
                scale = load_plane(first, places, channels + c, step, reads, C)
                linear, e1, e2, factor, _, by_middle, by_scale = log_mass(
                    n, distance, scale, highest, width, least, smallest
                )
                value = linear + log1p(combine_excess(e1, e2)) - tl.log(factor)
                if WEIGHTED > 0:
                    value *= own
                sums += tl.where(inside, value, 0.0)
                if grads is not None:
                    store_plane(grads, places, c, step, inside, -factors * by_middle * highest)
                    store_plane(grads, places, channels + c, step, inside, -factors * by_scale)

    if row_sums is not None:
        tl.store(row_sums + rows * splits + split, tl.sum(sums, 1), inside_rows)


# ---------------------------------------------------------------------------------------------------------------------
# Launch
# ---------------------------------------------------------------------------------------------------------------------


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
    """Runs logistic_kernel; see elementwise.evaluate for the arguments."""
    components = int(constants[0]) if len(constants) == 4 else 0
    bits, floor, small = constants[-3:]
    levels = 2.0**bits - 1
    lead = params[0]
    order, dtype = memory_order(lead), row_dtype(lead)
    first, data = dense_rows(lead, order), dense_rows(target, order)
    rows, planes, channels = lead.shape[0], lead.shape[1], target.shape[1]
    alternate = order != torch.contiguous_format
    weights = weight_view(element_weight, target.shape, order)
    if components:
        weights = weight_view(element_weight, (rows, 1, *target.shape[2:]))
    pixels = event_size(target) // max(1, channels)
    if not components and not alternate:  # channels are independent and form one long plane
        pixels, planes, channels = pixels * channels, 2, 1

    grads = torch.empty_like(lead, memory_format=order) if needs & 1 else None
    grads_stride = event_size(lead)
    unit = divisor(pixels, first.stride(0), data.stride(0), grads_stride)
    fold = min(16 // lead.element_size(), unit)
    cut = partition(rows, pixels, choice("logistic", rows * pixels, lead.device), narrowest=fold)
    # Offsets of planes are 32-bit too, so what counts is the size of all planes together.
    wide = grads_stride > 2**31 - 2**20
    row_sums = lead.new_empty((rows, cut.splits), dtype=dtype) if values else None
    # A thread must hold fewer pixels in float64, and where accesses are not vectorised.
    spread = 2 if dtype == torch.float64 or alternate else 1
    launch(
        logistic_kernel,
        cut.programs,
        lead.device,
        first,
        data,
        *weights.arguments,
        grads,
        row_sums,
        levels,
        math.log(2.0 / levels),
        floor,
        small,
        grad_loss,
        grad_nll,
        weight,
        rows,
        pixels // unit,
        first.stride(0) // unit,
        data.stride(0) // unit,
        target.shape[0],
        grads_stride // unit,
        planes,
        components,
        channels,
        row_stride(grad_loss),
        row_stride(grad_nll),
        cut.splits,
        cut.tiles,
        REPEATED=target.shape[0] != rows,
        WEIGHTED=weights.kind,
        MIXED=channels if components else 0,
        ALTERNATE=alternate,
        UNIT=unit,
        ROWS=cut.rows,
        COLUMNS=cut.columns,
        FOLD=fold,
        WIDE=wide,
        C=COMPUTE[dtype],
        num_warps=cut.warps * spread,
    )
    return ([grads] if grads is not None else []), row_sums, None
