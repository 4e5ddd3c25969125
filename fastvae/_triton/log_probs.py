"""The kernels that draw several samples from the posterior with their log-densities, and the functions behind the ops.

As in latents.py, the forward and the backward each take one launch, the noise is generated where it is used, and if
rows are split over programs, a further launch adds up their densities.
"""

from collections.abc import Sequence

import torch
import triton.language as tl
from torch import Tensor

from ..reference.noise import draw_seed
from .elementary import exp, inverse_root
from .latents import Posterior, chained, kl_kernel, log_variance, noise_tile, soft_clamp
from .launch import COMPUTE, kernel, launch, number, partition, splits_at_a_time
from .tiles import first_column, row_size, tile_columns, tile_rows

_LOG_2PI: tl.constexpr = tl.constexpr(1.8378770664093453)

# ---------------------------------------------------------------------------------------------------------------------
# Kernels
# ---------------------------------------------------------------------------------------------------------------------


@kernel
def log_probs_kernel(
    mu,  # (rows, size), as all tensors here, with any stride of rows where one is given below
    logvar,
    prior_mu,  # or None, with prior_logvar
    prior_logvar,
    eps,  # (draws, rows, size), or None if the noise is generated from `seed`
    seed,  # (2,) int64
    z,  # out: (draws, rows, size)
    log_q,  # out: (draws, rows, splits) in C
    log_p,  # out, the same
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
    form_0: tl.float64,  # this and the next three: the constants of the form
    form_1: tl.float64,
    form_2: tl.float64,
    soft: tl.float64,
    FORM: tl.constexpr,
    SOFT: tl.constexpr,
    UNIT: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    WIDE: tl.constexpr,
    C: tl.constexpr,
):
    form_0 = tl.full((), form_0, C)
    form_1 = tl.full((), form_1, C)
    form_2 = tl.full((), form_2, C)
    soft = tl.full((), soft, C)
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
    start = first_column(split, tiles, COLUMNS, WIDE)
    for draw in range(0, draws):
        # -2 times the log-densities
        of_q = tl.zeros((ROWS, COLUMNS), C)
        of_p = tl.zeros((ROWS, COLUMNS), C)
        for i in range(0, tiles):
            first = start + i * COLUMNS
            columns = tile_columns(first, COLUMNS, WIDE)[None, :]
            inside = inside_rows[:, None] & (columns < size)
            mean = tl.load(mu + columns, inside, 0.0).to(C)
            v = tl.load(logvar + columns, inside, 0.0).to(C)
            if SOFT:
                mean, _ = soft_clamp(mean, soft)
            v, _ = log_variance(v, form_0, form_1, form_2, soft, FORM, SOFT)
            here = draw * draw_stride + dense + columns
            if eps is not None:
                noise = tl.load(eps + here, inside, 0.0).to(C)
            else:
                noise = noise_tile(seed, draw, rows, first, size, row_offset, ROWS, COLUMNS, C)
            sample = mean + exp(0.5 * v) * noise
            tl.store(z + here, sample.to(z.dtype.element_ty), inside)
            of_q += tl.where(inside, noise * noise + v + _LOG_2PI, 0.0)
            if prior_mu is not None:
                prior_mean = tl.load(prior_mu + columns, inside, 0.0).to(C)
                prior_v = tl.load(prior_logvar + columns, inside, 0.0).to(C)
                if SOFT:
                    prior_mean, _ = soft_clamp(prior_mean, soft)
                prior_v, _ = log_variance(prior_v, form_0, form_1, form_2, soft, FORM, SOFT)
                root = inverse_root(0.5 * prior_v)
                standard = (sample - prior_mean) * root * root
                of_p += tl.where(inside, standard * standard + prior_v + _LOG_2PI, 0.0)
            else:
                of_p += tl.where(inside, sample * sample + _LOG_2PI, 0.0)
        place = (draw * row_count.to(tl.int64) + rows) * splits + split
        tl.store(log_q + place, -0.5 * tl.sum(of_q, 1), inside_rows)
        tl.store(log_p + place, -0.5 * tl.sum(of_p, 1), inside_rows)


@kernel
def log_probs_gradient_kernel(
    grad_z,  # (draws, rows, size), or None
    grad_log_q,  # (draws, rows), or None
    grad_log_p,  # the same
    mu,
    logvar,
    prior_mu,  # or None, with prior_logvar
    prior_logvar,
    eps,  # as in log_probs_kernel
    seed,
    mu_gradient,  # out, or None
    logvar_gradient,
    prior_mu_gradient,
    prior_logvar_gradient,
    row_count: "number",
    size: "number",
    mu_stride: "number",
    logvar_stride: "number",
    prior_mu_stride: "number",
    prior_logvar_stride: "number",
    draws: "number",
    row_offset: "number",
    gradient_rows: "number",  # the distance between rows of the posterior's gradients, in rows of `size` elements
    prior_gradient_rows: "number",
    splits: "number",
    tiles: "number",
    form_0: tl.float64,
    form_1: tl.float64,
    form_2: tl.float64,
    soft: tl.float64,
    STL: tl.constexpr,
    FORM: tl.constexpr,
    SOFT: tl.constexpr,
    UNIT: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    WIDE: tl.constexpr,
    C: tl.constexpr,
):
    form_0 = tl.full((), form_0, C)
    form_1 = tl.full((), form_1, C)
    form_2 = tl.full((), form_2, C)
    soft = tl.full((), soft, C)
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
    start = first_column(split, tiles, COLUMNS, WIDE)
    for i in range(0, tiles):
        first = start + i * COLUMNS
        columns = tile_columns(first, COLUMNS, WIDE)[None, :]
        inside = inside_rows[:, None] & (columns < size)
        mean = tl.load(mu + columns, inside, 0.0).to(C)
        v = tl.load(logvar + columns, inside, 0.0).to(C)
        if SOFT:
            mean, mean_factor = soft_clamp(mean, soft)
        v, factor = log_variance(v, form_0, form_1, form_2, soft, FORM, SOFT)
        sigma = exp(0.5 * v)
        if prior_mu is not None:
            prior_mean = tl.load(prior_mu + columns, inside, 0.0).to(C)
            prior_v = tl.load(prior_logvar + columns, inside, 0.0).to(C)
            if SOFT:
                prior_mean, prior_mean_factor = soft_clamp(prior_mean, soft)
            prior_v, prior_factor = log_variance(prior_v, form_0, form_1, form_2, soft, FORM, SOFT)
            root = inverse_root(0.5 * prior_v)
            d_prior_mean = tl.zeros((ROWS, COLUMNS), C)
            d_prior_v = tl.zeros((ROWS, COLUMNS), C)
        by_z = tl.zeros((ROWS, COLUMNS), C)
        by_z_noise = tl.zeros((ROWS, COLUMNS), C)
        by_q = tl.zeros((ROWS, COLUMNS), C)
        by_q_noise = tl.zeros((ROWS, COLUMNS), C)
        for draw in range(0, draws):
            here = draw * draw_stride + dense + columns
            row = draw * row_count.to(tl.int64) + rows
            if eps is not None:
                noise = tl.load(eps + here, inside, 0.0).to(C)
            else:
                noise = noise_tile(seed, draw, rows, first, size, row_offset, ROWS, COLUMNS, C)
            if grad_z is not None:
                d = tl.load(grad_z + here, inside, 0.0).to(C)
            else:
                d = tl.zeros((ROWS, COLUMNS), C)
            if grad_log_p is not None:
                by_log_p = tl.load(grad_log_p + row, inside_rows, 0.0).to(C)[:, None]
                if prior_mu is not None:
                    standard = (mean + sigma * noise - prior_mean) * root * root
                    slope = by_log_p * standard * root * root
                    d -= slope
                    d_prior_mean += slope
                    d_prior_v += 0.5 * by_log_p * (standard * standard - 1.0)
                else:
                    d -= by_log_p * (mean + sigma * noise)
            if grad_log_q is not None:
                by_log_q = tl.load(grad_log_q + row, inside_rows, 0.0).to(C)[:, None]
                if STL:
                    # log q by z is -noise / sigma
                    by_q += by_log_q * noise
                    by_q_noise += by_log_q * noise * noise
                else:
                    by_q_noise += by_log_q
            by_z += d
            by_z_noise += d * noise
        d_mean = by_z
        if STL and grad_log_q is not None:
            d_mean -= tl.where(by_q == 0.0, 0.0, by_q / sigma)
        # A sum of 0 stays 0 if sigma is infinite.
        d_v = 0.5 * (tl.where(by_z_noise == 0.0, 0.0, sigma * by_z_noise) - by_q_noise)
        if SOFT:
            d_mean = chained(d_mean, mean_factor)
        if SOFT or FORM != "logvar":
            d_v = chained(d_v, factor)
        here = dense * gradient_rows + columns
        if mu_gradient is not None:
            tl.store(mu_gradient + here, d_mean.to(mu_gradient.dtype.element_ty), inside)
        if logvar_gradient is not None:
            tl.store(logvar_gradient + here, d_v.to(logvar_gradient.dtype.element_ty), inside)
        if prior_mu is not None:
            if SOFT:
                d_prior_mean = chained(d_prior_mean, prior_mean_factor)
            if SOFT or FORM != "logvar":
                d_prior_v = chained(d_prior_v, prior_factor)
            here = dense * prior_gradient_rows + columns
            if prior_mu_gradient is not None:
                tl.store(
                    prior_mu_gradient + here, d_prior_mean.to(prior_mu_gradient.dtype.element_ty), inside
                )
            if prior_logvar_gradient is not None:
                tl.store(
                    prior_logvar_gradient + here, d_prior_v.to(prior_logvar_gradient.dtype.element_ty), inside
                )


# ---------------------------------------------------------------------------------------------------------------------
# Launches
# ---------------------------------------------------------------------------------------------------------------------


def sample_log_probs_forward(
    mu: Tensor,
    logvar: Tensor | None,
    prior_mu: Tensor | None,
    prior_logvar: Tensor | None,
    form: str,
    constants: Sequence[float],
    stl: bool,
    samples: int,
    seed: Tensor | None,
    row_offset: int,
    eps: Tensor | None,
    generator: torch.Generator | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return (z, log_q, log_p, the seed that was used)."""
    if eps is not None:
        used_seed = mu.new_empty(0, dtype=torch.int64)
    elif seed is not None:
        used_seed = seed.clone()  # an op must not return what it was given
    else:
        used_seed = draw_seed(mu.device, generator)
    posterior = Posterior(mu, logvar, prior_mu, prior_logvar, form, constants, None)
    rows, size = posterior.rows, posterior.size
    z = torch.empty((samples, *posterior.shape), dtype=mu.dtype, device=mu.device)
    cut = partition(rows, size, posterior.choice("sample", rows * size * samples), narrowest=4)
    log_q, log_p = (mu.new_empty((samples * rows, cut.splits), dtype=posterior.dtype) for _ in range(2))
    launch(
        log_probs_kernel,
        cut.programs,
        mu.device,
        *posterior.tensors,
        eps.contiguous() if eps is not None else None,
        used_seed,
        z,
        log_q,
        log_p,
        *posterior.numbers,
        samples,
        row_offset,
        cut.splits,
        cut.tiles,
        *posterior.form.numbers,
        FORM=posterior.form.kind,
        SOFT=posterior.form.numbers[3] != 0,
        UNIT=posterior.unit,
        ROWS=cut.rows,
        COLUMNS=cut.columns,
        WIDE=cut.wide,
        C=COMPUTE[posterior.dtype],
        num_warps=cut.warps,
    )
    return z, _total(log_q).view(samples, rows), _total(log_p).view(samples, rows), used_seed


def _total(partials: Tensor) -> Tensor:
    """The sums of the splits."""
    rows, splits = partials.shape
    if splits == 1:
        return partials
    totals = partials.new_empty(rows)
    at_a_time = splits_at_a_time(splits)
    group = 1024 // at_a_time
    launch(
        kl_kernel,
        -(-rows // group),
        partials.device,
        partials,
        totals,
        rows,
        splits,
        ROWS=group,
        SPLITS=at_a_time,
        num_warps=4,
    )
    return totals


def sample_log_probs_backward(
    grad_z: Tensor | None,
    grad_log_q: Tensor | None,
    grad_log_p: Tensor | None,
    mu: Tensor,
    logvar: Tensor | None,
    prior_mu: Tensor | None,
    prior_logvar: Tensor | None,
    form: str,
    constants: Sequence[float],
    stl: bool,
    samples: int,
    seed: Tensor,
    row_offset: int,
    eps: Tensor | None,
    needs: int,
) -> list[Tensor]:
    """Return the gradients that `needs` asks for, in the order of its bits."""
    posterior = Posterior(mu, logvar, prior_mu, prior_logvar, form, constants, None)
    gradients, views = posterior.new_gradients(needs)
    rows, size = posterior.rows, posterior.size
    cut = partition(rows, size, posterior.choice("sample_gradient", rows * size * samples), narrowest=4)
    launch(
        log_probs_gradient_kernel,
        cut.programs,
        mu.device,
        *(t.contiguous() if t is not None else None for t in (grad_z, grad_log_q, grad_log_p)),
        *posterior.tensors,
        eps.contiguous() if eps is not None else None,
        seed,
        *views,
        *posterior.numbers,
        samples,
        row_offset,
        *posterior.gradient_rows,
        cut.splits,
        cut.tiles,
        *posterior.form.numbers,
        STL=stl,
        FORM=posterior.form.kind,
        SOFT=posterior.form.numbers[3] != 0,
        UNIT=posterior.unit,
        ROWS=cut.rows,
        COLUMNS=cut.columns,
        WIDE=cut.wide,
        C=COMPUTE[posterior.dtype],
        num_warps=cut.warps,
    )
    return [gradient for gradient in gradients if gradient is not None]
