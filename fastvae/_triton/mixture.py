"""Mixtures of diagonal Gaussians: the log-density of points, jointly and in each dimension, and its gradients.

A program keeps some points (or, for the gradients of components, some components) and goes through tiles of the others.
With r = e^(-logvar / 2) / sqrt(2) and t = (z - mu) r, the log-density of one dimension is
-t^2 - (logvar + log 2 pi) / 2, and its derivatives by z, mu and logvar are -2 t r, 2 t r and t^2 - 1/2.
csrc/math/mixture.h gives the reasons for what happens to infinite numbers.
"""

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .elementary import exp
from .launch import COMPUTE, kernel, launch, number, row_dtype
from .tuning import choice

POINTS, MEANS, LOGVARS, LOG_WEIGHTS = 1, 2, 4, 8  # the bits of `needs`

_INFINITY: tl.constexpr = tl.constexpr(float("inf"))
_LARGEST_32: tl.constexpr = tl.constexpr(3.4028234663852886e38)
_LARGEST_64: tl.constexpr = tl.constexpr(1.7976931348623157e308)
_INFINITE_LOG_DENSITY: tl.constexpr = tl.constexpr(1e29)


@triton.jit
def _indices(block, count, SIZE: tl.constexpr):
    """(the numbers of a block's points or components, int64; which of them exist)."""
    numbers = block.to(tl.int64) * SIZE + tl.arange(0, SIZE)
    return numbers, numbers < count


@triton.jit
def _standardised(z, mu, root, d, points, inside, components, real, point_count, component_count):
    """(t, its square, r) in dimension d: (POINTS, COMPONENTS), the same, and (1, COMPONENTS)."""
    value = tl.load(z + d * point_count + points, inside, 0.0)[:, None]
    mean = tl.load(mu + d * component_count + components, real, 0.0)[None, :]
    inverse = tl.load(root + d * component_count + components, real, 0.0)[None, :]
    t = (value - mean) * inverse
    return t, t * t, inverse


@triton.jit
def _weights(log_weight, stride, points, inside, components, real):
    """The log-weights of a tile, -inf for components that do not exist."""
    places = points[:, None] * stride + components[None, :]
    weights = tl.load(log_weight + places, inside[:, None] & real[None, :], 0.0)
    return tl.where(real[None, :], weights, -_INFINITY)


@triton.jit
def _joint_log_density(
    z, mu, root, base, weights, dims, points, inside, components, real, point_count, component_count
):
    """The log-density of each component at each point, with its log-weight."""
    squares = tl.zeros(weights.shape, weights.dtype)
    for d in range(0, dims):
        _, square, _ = _standardised(
            z, mu, root, d, points, inside, components, real, point_count, component_count
        )
        squares += square
    constant = tl.load(base + components, real, 0.0)[None, :]
    # The weight of a component that does not exist is -inf, also for an infinite point, whose square is NaN there.
    return tl.where(real[None, :], constant + weights - squares, -_INFINITY)


@triton.jit
def _share(x, total):
    """e^(x - total) for a summand x of a sum with the logarithm `total`, which x exceeds only by rounding errors."""
    difference = x - total
    return exp(tl.where(difference > 0.0, 0.0, difference))


@triton.jit
def _usable(total, grad):
    """(total, grad) such that a point without density has no gradient, and no gradient is NaN."""
    unreached = total == -_INFINITY
    grad = tl.where(unreached, 0.0, grad)
    total = tl.where(unreached, 0.0, tl.where(total == _INFINITY, _INFINITE_LOG_DENSITY, total))
    return total, grad


@triton.jit
def _total(maximum, total):
    result = tl.where(total == 0.0, -_INFINITY, maximum + tl.log(total))
    return tl.where(result > _INFINITE_LOG_DENSITY, _INFINITY, result)


@kernel
def value_kernel(
    z,  # (dims, points), as all tensors with dimensions of type C
    mu,  # (dims, components)
    root,  # the same
    constant,  # (components,), or (dims, components) if EACH
    log_weight,  # (components,), or (points, components)
    result,  # out: (splits, points), or (splits, points, dims) if EACH
    point_count: "number",
    component_count: "number",
    dims: "number",
    weight_stride: "number",
    blocks: "number",  # of points
    splits: "number",
    tiles: "number",  # of components in a split
    EACH: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    C: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    # Products of sizes may need 64 bits.
    point_count, component_count = point_count.to(tl.int64), component_count.to(tl.int64)
    points, inside = _indices(program % blocks, point_count, ROWS)
    split = program // blocks % splits
    d = program // blocks // splits  # 0 unless EACH
    LOWEST: tl.constexpr = -_LARGEST_64 if C == tl.float64 else -_LARGEST_32
    # Finite, because the difference of two -inf would be NaN.
    maximum = tl.full((ROWS,), LOWEST, C)
    total = tl.zeros((ROWS,), C)
    for i in range(0, tiles):
        components, real = _indices(split * tiles + i, component_count, COLUMNS)
        weights = _weights(log_weight, weight_stride, points, inside, components, real)
        if EACH:
            _, square, _ = _standardised(
                z, mu, root, d, points, inside, components, real, point_count, component_count
            )
            term = tl.load(constant + d * component_count + components, real, 0.0)[None, :]
            x = tl.where(real[None, :], term + weights - square, -_INFINITY)
        else:
            x = _joint_log_density(
                z,
                mu,
                root,
                constant,
                weights,
                dims,
                points,
                inside,
                components,
                real,
                point_count,
                component_count,
            )
        larger = tl.maximum(maximum, tl.max(x, 1))
        total = total * exp(maximum - larger) + tl.sum(exp(x - larger[:, None]), 1)
        maximum = larger
    if EACH:
        places = (split * point_count + points) * dims + d
    else:
        places = split * point_count + points
    tl.store(result + places, _total(maximum, total), inside)


@kernel
def gradient_kernel(
    z,  # these are as in value_kernel
    mu,
    root,
    constant,
    log_weight,
    values,  # (points,), or (points, dims) if EACH
    grads,  # the same
    first,  # out: (splits, dims, points), the gradient of z / -2; or (splits, dims, components), that of mu / 2
    second,  # out: None, or (splits, dims, components), the gradient of logvar
    point_count: "number",
    component_count: "number",
    dims: "number",
    weight_stride: "number",
    blocks: "number",  # of what the program keeps
    splits: "number",
    tiles: "number",  # of what it goes through
    EACH: tl.constexpr,
    OF_POINTS: tl.constexpr,  # whether the program keeps points, or components
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    C: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    # Products of sizes may need 64 bits.
    point_count, component_count = point_count.to(tl.int64), component_count.to(tl.int64)
    block = program % blocks
    split = program // blocks % splits
    dimension = program // blocks // splits
    first_d = dimension if EACH else 0
    last_d = dimension + 1 if EACH else dims
    KEPT: tl.constexpr = ROWS if OF_POINTS else COLUMNS
    count = point_count if OF_POINTS else component_count
    kept, kept_inside = _indices(block, count, KEPT)
    out = split * dims * count + kept
    first_sum = tl.zeros((KEPT,), C)
    second_sum = tl.zeros((KEPT,), C)
    for i in range(0, tiles):
        if OF_POINTS:
            points, inside = kept, kept_inside
            components, real = _indices(split * tiles + i, component_count, COLUMNS)
        else:
            points, inside = _indices(split * tiles + i, point_count, ROWS)
            components, real = kept, kept_inside
        weights = _weights(log_weight, weight_stride, points, inside, components, real)
        if not EACH:
            x = _joint_log_density(
                z,
                mu,
                root,
                constant,
                weights,
                dims,
                points,
                inside,
                components,
                real,
                point_count,
                component_count,
            )
            value, grad = _usable(tl.load(values + points, inside, 0.0), tl.load(grads + points, inside, 0.0))
            share = _share(x, value[:, None]) * grad[:, None]
        for d in range(first_d, last_d):
            t, square, inverse = _standardised(
                z, mu, root, d, points, inside, components, real, point_count, component_count
            )
            if EACH:
                term = tl.load(constant + d * component_count + components, real, 0.0)[None, :]
                x = tl.where(real[None, :], term + weights - square, -_INFINITY)
                places = points * dims + d
                value, grad = _usable(
                    tl.load(values + places, inside, 0.0), tl.load(grads + places, inside, 0.0)
                )
                share = _share(x, value[:, None]) * grad[:, None]
            # An infinitely distant component has the share 0, and 0 times the distance must not be NaN.
            infinite = (square == _INFINITY) | ~(inside[:, None] & real[None, :])
            by_mean = share * tl.where(infinite, 0.0, t) * inverse
            first_part = tl.sum(by_mean, 1 if OF_POINTS else 0)
            if second is not None:
                second_part = tl.sum(share * (tl.where(infinite, 0.0, square) - 0.5), 1 if OF_POINTS else 0)
            if EACH:
                first_sum += first_part
                if second is not None:
                    second_sum += second_part
            else:
                # This program alone adds to these places.
                here = out + d * count
                mask = kept_inside & (i > 0)
                tl.store(first + here, tl.load(first + here, mask, 0.0) + first_part, kept_inside)
                if second is not None:
                    tl.store(second + here, tl.load(second + here, mask, 0.0) + second_part, kept_inside)
        if not EACH:
            tl.debug_barrier()
    if EACH:
        tl.store(first + out + dimension * count, first_sum, kept_inside)
        if second is not None:
            tl.store(second + out + dimension * count, second_sum, kept_inside)


@kernel
def weight_gradient_kernel(
    z,  # these are as in value_kernel
    mu,
    root,
    base,
    term,
    log_weight,
    joint,  # (points,), or None, with its gradient
    grad_joint,
    each,  # (points, dims), or None, with its gradient
    grad_each,
    result,  # out: (points, components), or (blocks, components), the sums over blocks of points
    point_count: "number",
    component_count: "number",
    dims: "number",
    weight_stride: "number",
    blocks: "number",  # of points
    OF_ROWS: tl.constexpr,  # whether log_weight is (points, components)
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    C: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    # Products of sizes may need 64 bits.
    point_count, component_count = point_count.to(tl.int64), component_count.to(tl.int64)
    block = program % blocks
    points, inside = _indices(block, point_count, ROWS)
    components, real = _indices(program // blocks, component_count, COLUMNS)
    weights = _weights(log_weight, weight_stride, points, inside, components, real)
    share = tl.zeros((ROWS, COLUMNS), C)
    if joint is not None:
        x = _joint_log_density(
            z,
            mu,
            root,
            base,
            weights,
            dims,
            points,
            inside,
            components,
            real,
            point_count,
            component_count,
        )
        value, grad = _usable(tl.load(joint + points, inside, 0.0), tl.load(grad_joint + points, inside, 0.0))
        share += _share(x, value[:, None]) * grad[:, None]
    if each is not None:
        for d in range(0, dims):
            _, square, _ = _standardised(
                z, mu, root, d, points, inside, components, real, point_count, component_count
            )
            constant = tl.load(term + d * component_count + components, real, 0.0)[None, :]
            x = tl.where(real[None, :], constant + weights - square, -_INFINITY)
            places = points * dims + d
            value, grad = _usable(
                tl.load(each + places, inside, 0.0), tl.load(grad_each + places, inside, 0.0)
            )
            share += _share(x, value[:, None]) * grad[:, None]
    if OF_ROWS:
        places = points[:, None] * component_count + components[None, :]
        tl.store(result + places, share, inside[:, None] & real[None, :])
    else:
        share = tl.where(inside[:, None], share, 0.0)
        tl.store(result + block * component_count + components, tl.sum(share, 0), real)


class _Mixture:
    """The arguments as the kernels read them. They are small beside the work, so they are simply converted."""

    def __init__(self, z: Tensor, mu: Tensor, logvar: Tensor, log_weight: Tensor | None) -> None:
        self.dtype = row_dtype(z)
        self.points, self.dims = z.shape
        self.components = mu.shape[0]
        self.of_rows = log_weight is not None and log_weight.dim() == 2
        self.z = self._transposed(z)
        self.mu = self._transposed(mu)
        logvar = self._transposed(logvar)
        lowest = -1418.0 if self.dtype == torch.float64 else -176.0
        self.root = (logvar.clamp(min=lowest) * -0.5).exp() * math.sqrt(0.5)
        self.term = (logvar.clamp(min=-1e30) + math.log(2 * math.pi)) * -0.5
        self.base = self.term.sum(0)
        if log_weight is None:
            log_weight = self.base.new_full((self.components,), -math.log(self.components))
        self.log_weight = log_weight.to(self.dtype).contiguous()

    def _transposed(self, t: Tensor) -> Tensor:
        return t.to(self.dtype).t().contiguous()

    def arguments(self, each: bool) -> tuple[Tensor, ...]:
        return self.z, self.mu, self.root, self.term if each else self.base, self.log_weight

    @property
    def sizes(self) -> tuple[int, ...]:
        return self.points, self.components, self.dims, self.components if self.of_rows else 0

    def division(self, each: bool, of_points: bool) -> "_Division":
        """How the programs share the work, which depends only on the shape and the tuning table."""
        chosen = choice("mixture", self.points * self.components * self.dims, self.z.device)
        columns = min(64, chosen.tile)
        rows = max(1, chosen.tile // columns)
        point_blocks, component_blocks = -(-self.points // rows), -(-self.components // columns)
        blocks, others = (point_blocks, component_blocks) if of_points else (component_blocks, point_blocks)
        dims = self.dims if each else 1
        splits = min(max(1, chosen.programs // max(1, blocks * dims)), others)
        tiles = -(-others // splits)
        return _Division(rows, columns, blocks, -(-others // tiles), tiles, dims, chosen.warps)


class _Division(NamedTuple):
    rows: int
    columns: int
    blocks: int
    splits: int
    tiles: int
    dims: int
    warps: int

    @property
    def programs(self) -> int:
        return self.blocks * self.splits * self.dims


def gaussian_mixture_log_prob_forward(
    z: Tensor, mu: Tensor, logvar: Tensor, log_weight: Tensor | None, joint: bool, per_dimension: bool
) -> tuple[Tensor, Tensor]:
    """(joint, per_dimension), of which the one that is not requested is empty."""
    mixture = _Mixture(z, mu, logvar, log_weight)
    empty = mixture.z.new_empty(0)
    return (
        _value(mixture, False) if joint else empty,
        _value(mixture, True) if per_dimension else empty.clone(),
    )


def _value(mixture: _Mixture, each: bool) -> Tensor:
    shape = (mixture.points, mixture.dims) if each else (mixture.points,)
    if 0 in shape:
        return mixture.z.new_empty(shape)
    cut = mixture.division(each, True)
    result = mixture.z.new_empty((cut.splits, *shape))
    launch(
        value_kernel,
        cut.programs,
        result.device,
        *mixture.arguments(each),
        result,
        *mixture.sizes,
        cut.blocks,
        cut.splits,
        cut.tiles,
        EACH=each,
        ROWS=cut.rows,
        COLUMNS=cut.columns,
        C=COMPUTE[mixture.dtype],
        num_warps=cut.warps,
    )
    return result[0] if cut.splits == 1 else torch.logsumexp(result, 0)


def gaussian_mixture_log_prob_backward(
    grad_joint: Tensor | None,
    grad_per_dimension: Tensor | None,
    z: Tensor,
    mu: Tensor,
    logvar: Tensor,
    log_weight: Tensor | None,
    joint: Tensor,
    per_dimension: Tensor,
    needs: int,
) -> list[Tensor]:
    """Return the gradients that `needs` asks for, in the order of its bits."""
    mixture = _Mixture(z, mu, logvar, log_weight)
    if mixture.points == 0 or (mixture.dims == 0 and grad_joint is None):
        inputs = (z, mu, logvar, log_weight)
        return [
            torch.zeros_like(t, memory_format=torch.contiguous_format)
            for i, t in enumerate(inputs)
            if t is not None and needs >> i & 1
        ]
    pairs = {
        each: (value, grad.to(mixture.dtype).contiguous())
        for each, value, grad in ((False, joint, grad_joint), (True, per_dimension, grad_per_dimension))
        if grad is not None
    }
    gradients: list[Tensor] = []

    def add(like: Tensor, factor: int, of_each_form: list[Tensor]) -> None:
        total = of_each_form[0] if len(of_each_form) == 1 else of_each_form[0] + of_each_form[1]
        gradients.append((total * factor).t().to(like.dtype).contiguous())

    if needs & POINTS:
        add(z, -2, [_gradients(mixture, each, *pair, True, False)[0] for each, pair in pairs.items()])
    if needs & (MEANS | LOGVARS):
        with_second = needs & LOGVARS != 0
        parts = [_gradients(mixture, each, *pair, False, with_second) for each, pair in pairs.items()]
        if needs & MEANS:
            add(mu, 2, [part[0] for part in parts])
        if with_second:
            add(logvar, 1, [part[1] for part in parts])
    if needs & LOG_WEIGHTS and log_weight is not None:
        gradients.append(_weight_gradient(mixture, pairs).to(log_weight.dtype))
    return gradients


def _gradients(
    mixture: _Mixture, each: bool, value: Tensor, grad: Tensor, of_points: bool, with_second: bool
) -> list[Tensor]:
    """The sums of the gradients of z, or of mu and logvar, (dims, points) or (dims, components)."""
    cut = mixture.division(each, of_points)
    shape = (cut.splits, mixture.dims, mixture.points if of_points else mixture.components)
    results = [mixture.z.new_empty(shape) for _ in range(1 + with_second)]
    if mixture.dims == 0:
        return [result[0] for result in results]
    launch(
        gradient_kernel,
        cut.programs,
        grad.device,
        *mixture.arguments(each),
        value,
        grad,
        results[0],
        results[1] if with_second else None,
        *mixture.sizes,
        cut.blocks,
        cut.splits,
        cut.tiles,
        EACH=each,
        OF_POINTS=of_points,
        ROWS=cut.rows,
        COLUMNS=cut.columns,
        C=COMPUTE[mixture.dtype],
        num_warps=cut.warps,
    )
    return [result[0] if cut.splits == 1 else result.sum(0) for result in results]


def _weight_gradient(mixture: _Mixture, pairs: dict[bool, tuple[Tensor, Tensor]]) -> Tensor:
    cut = mixture.division(False, True)
    rows = mixture.points if mixture.of_rows else cut.blocks
    result = mixture.z.new_empty((rows, mixture.components))
    none = (None, None)
    launch(
        weight_gradient_kernel,
        cut.blocks * -(-mixture.components // cut.columns),
        result.device,
        mixture.z,
        mixture.mu,
        mixture.root,
        mixture.base,
        mixture.term,
        mixture.log_weight,
        *pairs.get(False, none),
        *pairs.get(True, none),
        result,
        *mixture.sizes,
        cut.blocks,
        OF_ROWS=mixture.of_rows,
        ROWS=cut.rows,
        COLUMNS=cut.columns,
        C=COMPUTE[mixture.dtype],
        num_warps=cut.warps,
    )
    return result if mixture.of_rows else result.sum(0)
