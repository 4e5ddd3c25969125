"""The kernels that sample from the posterior and compute its KL and their gradients, and the functions behind the ops.

The forward and the backward each take one launch. The noise is generated where it is used, from its position, and
generated again in the backward. If rows are split over programs, a second launch adds up their KL. C is the type of
computation, as in elementwise.py.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..reference.noise import draw_seed
from .elementary import exp, exp_minus_1_minus, inverse_root
from .launch import (
    COMPUTE,
    dense_rows,
    divisor,
    event_size,
    kernel,
    launch,
    number,
    partition,
    row_dtype,
    splits_at_a_time,
)
from .noise import normals
from .tiles import first_column, row_size, row_totals, tile_columns, tile_rows
from .tuning import choice

# The bits of `needs` say which gradients a backward computes. It returns them in this order.
MU, LOGVAR, PRIOR_MU, PRIOR_LOGVAR, EPS = 1, 2, 4, 8, 16

# ---------------------------------------------------------------------------------------------------------------------
# Kernels
# ---------------------------------------------------------------------------------------------------------------------


@triton.jit
def noise_tile(
    seed, draw, rows, start, size, row_offset, ROWS: tl.constexpr, COLUMNS: tl.constexpr, C: tl.constexpr
):
    """The normals of the columns from `start` on (a multiple of 4), (ROWS, COLUMNS)."""
    quads = start // 4 + tl.arange(0, COLUMNS // 4)
    blocks = (row_offset + rows) * ((size + 3) // 4)
    return normals(seed, draw, blocks[:, None] + quads[None, :], ROWS, COLUMNS, C)


@triton.jit
def divergence(mean, logvar, exp_logvar, prior_mean, prior_logvar, PRIOR: tl.constexpr):
    """The KL of an element in nats, and its derivatives by mean, logvar and prior_logvar.

    The derivative by prior_mean is minus that by mean. The KL is
    1/2 [ (mu - mu_p)^2 e^-v_p + expm1(v - v_p) - (v - v_p) ]. Without PRIOR, mu_p = v_p = 0, and `exp_logvar` is e^v.
    """
    if PRIOR:
        v = logvar - prior_logvar
        exp_v = exp(v)
        root = inverse_root(0.5 * prior_logvar)
        scaled = (mean - prior_mean) * root * root
        by_mean = scaled * root * root
        square = scaled * scaled
    else:
        v = logvar
        exp_v = exp_logvar
        by_mean = mean
        square = mean * mean
    rest = exp_minus_1_minus(v, exp_v)
    minus_1 = tl.where(tl.abs(v) < 1.0, rest + v, exp_v - 1.0)
    return 0.5 * (square + rest), by_mean, 0.5 * minus_1, -0.5 * (square + minus_1)


@kernel
def sample_kernel(
    mu,  # (rows, size), as all tensors here, with any stride of rows where one is given below
    logvar,
    prior_mu,  # or None, with prior_logvar
    prior_logvar,
    eps,  # (draws, rows, size), or None if the noise is generated from `seed`
    seed,  # (2,) int64
    z,  # out, or None: (draws, rows, size)
    row_kl,  # out, or None: (rows, splits) in C
    element_kl,  # out, or None: (rows, size) in C
    row_count: "number",
    size: "number",  # this and all strides in units of UNIT elements
    mu_stride: "number",
    logvar_stride: "number",
    prior_mu_stride: "number",
    prior_logvar_stride: "number",
    draws: "number",
    row_offset: "number",
    splits: "number",
    tiles: "number",
    UNIT: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    WIDE: tl.constexpr,
    C: tl.constexpr,
):
    rows, split = tile_rows(splits, ROWS)
    inside_rows = rows < row_count
    size = row_size(size, UNIT, WIDE)
    mu += rows[:, None] * mu_stride * UNIT
    logvar += rows[:, None] * logvar_stride * UNIT
    if prior_mu is not None:
        prior_mu += rows[:, None] * prior_mu_stride * UNIT
        prior_logvar += rows[:, None] * prior_logvar_stride * UNIT
    dense = rows[:, None] * size
    draw_stride = row_count.to(tl.int64) * size
    kl = tl.zeros((ROWS, COLUMNS), C)
    start = first_column(split, tiles, COLUMNS, WIDE)
    for i in range(0, tiles):
        first = start + i * COLUMNS
        columns = tile_columns(first, COLUMNS, WIDE)[None, :]
        inside = inside_rows[:, None] & (columns < size)
        mean = tl.load(mu + columns, inside, 0.0).to(C)
        v = tl.load(logvar + columns, inside, 0.0).to(C)
        sigma = exp(0.5 * v)
        if row_kl is not None or element_kl is not None:
            if prior_mu is not None:
                prior_mean = tl.load(prior_mu + columns, inside, 0.0).to(C)
                prior_v = tl.load(prior_logvar + columns, inside, 0.0).to(C)
                value, _, _, _ = divergence(mean, v, sigma, prior_mean, prior_v, True)
            else:
                value, _, _, _ = divergence(mean, v, sigma * sigma, mean, v, False)
            if element_kl is not None:
                tl.store(element_kl + dense + columns, value, inside)
            if row_kl is not None:
                # Outside, mu = logvar = 0, and so are those of the prior, so the KL is 0 there.
                kl += value
        if z is not None:
            for draw in range(0, draws):
                here = draw * draw_stride + dense + columns
                if eps is not None:
                    noise = tl.load(eps + here, inside, 0.0).to(C)
                else:
                    noise = noise_tile(seed, draw, rows, first, size, row_offset, ROWS, COLUMNS, C)
                tl.store(z + here, (mean + sigma * noise).to(z.dtype.element_ty), inside)
    if row_kl is not None:
        tl.store(row_kl + rows * splits + split, tl.sum(kl, 1), inside_rows)


@kernel
def kl_kernel(row_kl, kl, row_count: "number", splits: "number", ROWS: tl.constexpr, SPLITS: tl.constexpr):
    """Adds up the splits of each row."""
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = rows < row_count
    tl.store(kl + rows, row_totals(row_kl, rows, inside, splits, ROWS, SPLITS), inside)


@kernel
def sample_gradient_kernel(
    grad_z,  # (draws, rows, size), or None
    grad_kl,  # (rows,), or (rows, size) where PER_ELEMENT, or None
    mu,
    logvar,
    prior_mu,  # or None, with prior_logvar
    prior_logvar,
    eps,  # as in sample_kernel
    seed,
    mu_gradient,  # out, or None: these and the next three (rows, size)
    logvar_gradient,
    prior_mu_gradient,
    prior_logvar_gradient,
    eps_gradient,  # out, or None: (draws, rows, size)
    row_count: "number",
    size: "number",  # this and the strides up to `draws` in units of UNIT elements
    mu_stride: "number",
    logvar_stride: "number",
    prior_mu_stride: "number",
    prior_logvar_stride: "number",
    draws: "number",
    row_offset: "number",
    grad_kl_stride: "number",
    splits: "number",
    tiles: "number",
    PER_ELEMENT: tl.constexpr,
    UNIT: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    WIDE: tl.constexpr,
    C: tl.constexpr,
):
    rows, split = tile_rows(splits, ROWS)
    inside_rows = rows < row_count
    size = row_size(size, UNIT, WIDE)
    mu += rows[:, None] * mu_stride * UNIT
    logvar += rows[:, None] * logvar_stride * UNIT
    if prior_mu is not None:
        prior_mu += rows[:, None] * prior_mu_stride * UNIT
        prior_logvar += rows[:, None] * prior_logvar_stride * UNIT
    dense = rows[:, None] * size
    draw_stride = row_count.to(tl.int64) * size
    if grad_kl is not None and not PER_ELEMENT:
        by_kl = tl.load(grad_kl + rows * grad_kl_stride, inside_rows, 0.0).to(C)[:, None]
    start = first_column(split, tiles, COLUMNS, WIDE)
    for i in range(0, tiles):
        first = start + i * COLUMNS
        columns = tile_columns(first, COLUMNS, WIDE)[None, :]
        inside = inside_rows[:, None] & (columns < size)
        mean = tl.load(mu + columns, inside, 0.0).to(C)
        v = tl.load(logvar + columns, inside, 0.0).to(C)
        sigma = exp(0.5 * v)
        d_mean = tl.zeros((ROWS, COLUMNS), C)
        d_logvar = tl.zeros((ROWS, COLUMNS), C)
        if grad_z is not None:
            for draw in range(0, draws):
                here = draw * draw_stride + dense + columns
                by_z = tl.load(grad_z + here, inside, 0.0).to(C)
                if eps_gradient is not None:
                    tl.store(eps_gradient + here, (by_z * sigma).to(eps_gradient.dtype.element_ty), inside)
                d_mean += by_z
                if logvar_gradient is not None:
                    if eps is not None:
                        noise = tl.load(eps + here, inside, 0.0).to(C)
                    else:
                        noise = noise_tile(seed, draw, rows, first, size, row_offset, ROWS, COLUMNS, C)
                    d_logvar += by_z * noise
            # z = mu + e^(logvar / 2) eps
            d_logvar *= 0.5 * sigma
        if grad_kl is not None:
            if PER_ELEMENT:
                by_kl = tl.load(grad_kl + rows[:, None] * grad_kl_stride + columns, inside, 0.0).to(C)
            if prior_mu is not None:
                prior_mean = tl.load(prior_mu + columns, inside, 0.0).to(C)
                prior_v = tl.load(prior_logvar + columns, inside, 0.0).to(C)
                _, by_mean, by_logvar, by_prior = divergence(mean, v, sigma, prior_mean, prior_v, True)
            else:
                _, by_mean, by_logvar, by_prior = divergence(mean, v, sigma * sigma, mean, v, False)
            d_mean += by_kl * by_mean
            d_logvar += by_kl * by_logvar
        here = dense + columns
        if mu_gradient is not None:
            tl.store(mu_gradient + here, d_mean.to(mu_gradient.dtype.element_ty), inside)
        if logvar_gradient is not None:
            tl.store(logvar_gradient + here, d_logvar.to(logvar_gradient.dtype.element_ty), inside)
        if prior_mu_gradient is not None:
            if grad_kl is not None:
                d_prior_mean = -by_kl * by_mean
            else:
                d_prior_mean = tl.zeros((ROWS, COLUMNS), C)
            tl.store(prior_mu_gradient + here, d_prior_mean.to(prior_mu_gradient.dtype.element_ty), inside)
        if prior_logvar_gradient is not None:
            if grad_kl is not None:
                d_prior_logvar = by_kl * by_prior
            else:
                d_prior_logvar = tl.zeros((ROWS, COLUMNS), C)
            tl.store(
                prior_logvar_gradient + here,
                d_prior_logvar.to(prior_logvar_gradient.dtype.element_ty),
                inside,
            )


# ---------------------------------------------------------------------------------------------------------------------
# Launches
# ---------------------------------------------------------------------------------------------------------------------


class _Posterior:
    """mu and logvar of the posterior and the prior, with dense rows. `unit` divides their strides and their size."""

    def __init__(
        self, mu: Tensor, logvar: Tensor, prior_mu: Tensor | None, prior_logvar: Tensor | None
    ) -> None:
        self.rows, self.size = mu.shape[0], event_size(mu)
        self.tensors = [
            dense_rows(t) if t is not None else None for t in (mu, logvar, prior_mu, prior_logvar)
        ]
        strides = [t.stride(0) if t is not None else 0 for t in self.tensors]
        self.unit = divisor(self.size, *strides)
        self.numbers = (self.rows, self.size // self.unit, *(stride // self.unit for stride in strides))
        self.dtype = row_dtype(mu)


def reparameterize_kl_forward(
    mu: Tensor,
    logvar: Tensor,
    prior_mu: Tensor | None,
    prior_logvar: Tensor | None,
    samples: int | None,
    seed: Tensor | None,
    row_offset: int,
    eps: Tensor | None,
    generator: torch.Generator | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (z, kl, the seed that was used). The seed is int64 (2,), or (0,) where eps is given."""
    if eps is not None:
        used_seed = mu.new_empty(0, dtype=torch.int64)
    elif seed is not None:
        used_seed = seed.clone()  # an op must not return what it was given
    else:
        used_seed = draw_seed(mu.device, generator)
    shape = mu.shape if samples is None else (samples, *mu.shape)
    z = torch.empty(shape, dtype=mu.dtype, device=mu.device)
    kl, _ = _sample(
        _Posterior(mu, logvar, prior_mu, prior_logvar),
        eps.contiguous() if eps is not None else None,
        used_seed,
        z,
        samples or 1,
        row_offset,
        per_element=False,
    )
    return z, kl, used_seed


def gaussian_kl_forward(
    mu: Tensor, logvar: Tensor, prior_mu: Tensor | None, prior_logvar: Tensor | None, per_element: bool
) -> Tensor:
    posterior = _Posterior(mu, logvar, prior_mu, prior_logvar)
    rows, elements = _sample(posterior, None, None, None, 0, 0, per_element=per_element)
    return elements.view(mu.shape) if per_element else rows


def _sample(
    posterior: _Posterior,
    eps: Tensor | None,
    seed: Tensor | None,
    z: Tensor | None,
    draws: int,
    row_offset: int,
    *,
    per_element: bool,
) -> tuple[Tensor, Tensor]:
    """Run sample_kernel, which writes z, and return (kl of the rows, kl of the elements), one of which is empty."""
    mu, rows, size = posterior.tensors[0], posterior.rows, posterior.size
    assert mu is not None
    cut = partition(rows, size, choice("sample", rows * size * max(1, draws), mu.device), narrowest=4)
    partials = mu.new_empty((0 if per_element else rows, cut.splits), dtype=posterior.dtype)
    elements = mu.new_empty((rows, size) if per_element else 0, dtype=posterior.dtype)
    launch(
        sample_kernel,
        cut.programs,
        mu.device,
        *posterior.tensors,
        eps,
        seed,
        z,
        None if per_element else partials,
        elements if per_element else None,
        *posterior.numbers,
        draws,
        row_offset,
        cut.splits,
        cut.tiles,
        UNIT=posterior.unit,
        ROWS=cut.rows,
        COLUMNS=cut.columns,
        WIDE=cut.wide,
        C=COMPUTE[posterior.dtype],
        num_warps=cut.warps,
    )
    if per_element or cut.splits == 1:
        return partials.view(-1), elements
    kl = partials.new_empty(rows)
    splits = splits_at_a_time(cut.splits)
    group = 1024 // splits
    launch(
        kl_kernel,
        -(-rows // group),
        mu.device,
        partials,
        kl,
        rows,
        cut.splits,
        ROWS=group,
        SPLITS=splits,
        num_warps=4,
    )
    return kl, elements


def reparameterize_kl_backward(
    grad_z: Tensor | None,
    grad_kl: Tensor | None,
    mu: Tensor,
    logvar: Tensor,
    prior_mu: Tensor | None,
    prior_logvar: Tensor | None,
    samples: int | None,
    seed: Tensor,
    row_offset: int,
    eps: Tensor | None,
    needs: int,
) -> list[Tensor]:
    """Return the gradients that `needs` asks for, in the order of its bits."""
    return _gradients(
        _Posterior(mu, logvar, prior_mu, prior_logvar),
        mu,
        grad_z.contiguous() if grad_z is not None else None,
        grad_kl,
        eps.contiguous() if eps is not None else None,
        seed,
        samples or 1,
        row_offset,
        needs,
        per_element=False,
    )


def gaussian_kl_backward(
    grad_kl: Tensor,
    mu: Tensor,
    logvar: Tensor,
    prior_mu: Tensor | None,
    prior_logvar: Tensor | None,
    needs: int,
) -> list[Tensor]:
    """Return the gradients that `needs` asks for. grad_kl is (B,), or has mu's shape."""
    per_element = grad_kl.dim() != 1 or mu.dim() == 1
    return _gradients(
        _Posterior(mu, logvar, prior_mu, prior_logvar),
        mu,
        None,
        dense_rows(grad_kl) if per_element else grad_kl,
        None,
        None,
        0,
        0,
        needs,
        per_element=per_element,
    )


def _gradients(
    posterior: _Posterior,
    like: Tensor,
    grad_z: Tensor | None,
    grad_kl: Tensor | None,
    eps: Tensor | None,
    seed: Tensor | None,
    draws: int,
    row_offset: int,
    needs: int,
    *,
    per_element: bool,
) -> list[Tensor]:
    rows, size = posterior.rows, posterior.size
    results: list[Tensor | None] = [
        torch.empty(like.shape, dtype=like.dtype, device=like.device) if needs & bit else None
        for bit in (MU, LOGVAR, PRIOR_MU, PRIOR_LOGVAR)
    ]
    results.append(torch.empty_like(eps) if needs & EPS and eps is not None else None)
    elements = rows * size * max(1, draws)
    cut = partition(rows, size, choice("sample_gradient", elements, like.device), narrowest=4)
    launch(
        sample_gradient_kernel,
        cut.programs,
        like.device,
        grad_z,
        grad_kl,
        *posterior.tensors,
        eps,
        seed,
        *results,
        *posterior.numbers,
        draws,
        row_offset,
        grad_kl.stride(0) if grad_kl is not None else 0,
        cut.splits,
        cut.tiles,
        PER_ELEMENT=per_element,
        UNIT=posterior.unit,
        ROWS=cut.rows,
        COLUMNS=cut.columns,
        WIDE=cut.wide,
        C=COMPUTE[posterior.dtype],
        num_warps=cut.warps,
    )
    return [result for result in results if result is not None]
