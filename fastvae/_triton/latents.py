"""The kernels that sample from the posterior and compute its KL and their gradients, and the functions behind the ops.

The forward and the backward each take one launch. The noise is generated where it is used, from its position, and
generated again in the backward. If rows are split over programs, a second launch adds up their KL. C is the type of
computation, as in elementwise.py.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..reference.noise import draw_seed
from .elementary import exp, exp_minus_1_minus, inverse_root, log1p, tanh
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
from .tuning import Choice, choice

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
def soft_clamp(x, bound):
    """(bound tanh(x / bound), its derivative)."""
    value, grad = tanh(x / bound)
    return bound * value, grad


@triton.jit
def log_of_shifted(v, low):
    """(log(e^v + e^low), its derivative by v)."""
    t = exp(-tl.abs(v - low))
    inverse = 1.0 / (1.0 + t)
    return tl.where(v < low, low, v) + log1p(t), tl.where(v < low, t * inverse, inverse)


@triton.jit
def log_of_softplus(v, eps):
    """(log((log(1 + e^v) + eps)^2), its derivative by v)."""
    t = exp(-tl.abs(v))
    inverse = 1.0 / (1.0 + t)
    sigma = tl.where(v < 0.0, 0.0, v) + log1p(t) + eps
    # Far below 0, softplus(v) is e^v, which may underflow: without eps, its logarithm is v.
    FAR: tl.constexpr = -40.0 if v.dtype == tl.float64 else -20.0
    tail = v < tl.where(eps > 0.0, float("-inf"), FAR)
    positive = tl.where(tail, 1.0, sigma)
    slope = tl.where(tail, 1.0, tl.where(v < 0.0, t * inverse, inverse) / positive)
    return 2.0 * tl.where(tail, v, tl.log(positive)), 2.0 * slope


@triton.jit
def log_variance(v, first, second, third, soft, FORM: tl.constexpr, SOFT: tl.constexpr):
    """(log sigma^2, its derivative) for the number v of an encoder. `_Form` lists the forms and their constants."""
    by_v = tl.full(v.shape, 1.0, v.dtype)
    if SOFT:
        v, by_v = soft_clamp(v, soft)
    if FORM == "clamped":
        outside = (v < first) | (v > second)
        v = tl.where(v < first, first, tl.where(v > second, second, v))
        grad = tl.where(outside, 0.0, by_v)
    elif FORM == "bounded":
        position, grad = tanh((v - first) * third)
        v = first + second * position
    elif FORM == "log_std":
        v = 2.0 * v
        grad = 2.0 * by_v
    elif FORM == "shifted_log_std":
        v, grad = log_of_shifted(v, first)
        v = 2.0 * v
        grad = 2.0 * grad * by_v
    elif FORM == "softplus":
        v, grad = log_of_softplus(v, first)
    elif FORM == "shifted_variance":
        v, grad = log_of_shifted(v, first)
    else:
        grad = by_v
    return v, grad


@triton.jit
def chained(grad, factor):
    """`grad` times `factor`. A factor of 0 gives 0 even for an infinite gradient."""
    return tl.where(factor == 0.0, 0.0, grad * factor)


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
    kl = tl.zeros((ROWS, COLUMNS), C)
    start = first_column(split, tiles, COLUMNS, WIDE)
    for i in range(0, tiles):
        first = start + i * COLUMNS
        columns = tile_columns(first, COLUMNS, WIDE)[None, :]
        inside = inside_rows[:, None] & (columns < size)
        mean = tl.load(mu + columns, inside, 0.0).to(C)
        v = tl.load(logvar + columns, inside, 0.0).to(C)
        if SOFT:
            mean, _ = soft_clamp(mean, soft)
        v, _ = log_variance(v, form_0, form_1, form_2, soft, FORM, SOFT)
        sigma = exp(0.5 * v)
        if row_kl is not None or element_kl is not None:
            if prior_mu is not None:
                prior_mean = tl.load(prior_mu + columns, inside, 0.0).to(C)
                prior_v = tl.load(prior_logvar + columns, inside, 0.0).to(C)
                if SOFT:
                    prior_mean, _ = soft_clamp(prior_mean, soft)
                prior_v, _ = log_variance(prior_v, form_0, form_1, form_2, soft, FORM, SOFT)
                value, _, _, _ = divergence(mean, v, sigma, prior_mean, prior_v, True)
            else:
                value, _, _, _ = divergence(mean, v, sigma * sigma, mean, v, False)
            if element_kl is not None:
                tl.store(element_kl + dense + columns, value, inside)
            if row_kl is not None:
                kl += tl.where(inside, value, 0.0)
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
    gradient_rows: "number",  # the distance between rows of the posterior's gradients, in rows of `size` elements
    prior_gradient_rows: "number",
    splits: "number",
    tiles: "number",
    form_0: tl.float64,  # this and the next three: the constants of the form
    form_1: tl.float64,
    form_2: tl.float64,
    soft: tl.float64,
    posterior_weight: tl.float64,
    prior_weight: tl.float64,
    PER_ELEMENT: tl.constexpr,
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
    if grad_kl is not None and not PER_ELEMENT:
        by_kl = tl.load(grad_kl + rows * grad_kl_stride, inside_rows, 0.0).to(C)[:, None]
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
                if SOFT:
                    prior_mean, prior_mean_factor = soft_clamp(prior_mean, soft)
                prior_v, prior_factor = log_variance(prior_v, form_0, form_1, form_2, soft, FORM, SOFT)
                _, by_mean, by_logvar, by_prior = divergence(mean, v, sigma, prior_mean, prior_v, True)
                by_prior_kl = by_kl * tl.full((), prior_weight, C)
                by_kl *= tl.full((), posterior_weight, C)
            else:
                _, by_mean, by_logvar, by_prior = divergence(mean, v, sigma * sigma, mean, v, False)
            d_mean += by_kl * by_mean
            d_logvar += by_kl * by_logvar
        if SOFT:
            d_mean = chained(d_mean, mean_factor)
        if SOFT or FORM != "logvar":
            d_logvar = chained(d_logvar, factor)
        here = dense * gradient_rows + columns
        if mu_gradient is not None:
            tl.store(mu_gradient + here, d_mean.to(mu_gradient.dtype.element_ty), inside)
        if logvar_gradient is not None:
            tl.store(logvar_gradient + here, d_logvar.to(logvar_gradient.dtype.element_ty), inside)
        here = dense * prior_gradient_rows + columns
        if prior_mu_gradient is not None:
            if grad_kl is not None:
                d_prior_mean = -by_prior_kl * by_mean
                if SOFT:
                    d_prior_mean = chained(d_prior_mean, prior_mean_factor)
            else:
                d_prior_mean = tl.zeros((ROWS, COLUMNS), C)
            tl.store(prior_mu_gradient + here, d_prior_mean.to(prior_mu_gradient.dtype.element_ty), inside)
        if prior_logvar_gradient is not None:
            if grad_kl is not None:
                d_prior_logvar = by_prior_kl * by_prior
                if SOFT or FORM != "logvar":
                    d_prior_logvar = chained(d_prior_logvar, prior_factor)
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


class _Form(NamedTuple):
    """The form of the scale as the kernels take it; csrc/math/scale_form.h describes the kinds and their constants."""

    kind: str
    numbers: tuple[float, float, float, float]  # three constants, and the bound of the soft clamp

    @staticmethod
    def of(name: str, constants: Sequence[float]) -> "_Form":
        first, second = (*constants, 0.0, 0.0)[:2]
        if name == "logvar_clamp":
            return _Form("clamped", (first, second, 0.0, 0.0))
        if name == "logvar_bounds":
            half = (second - first) / 2
            return _Form("bounded", (first + half, half, 1 / half, 0.0))
        if name == "softplus":
            return _Form("softplus", (first, 0.0, 0.0, 0.0))
        eps = second if name == "log_std" else first
        soft = first if name == "log_std" else 0.0
        shift = math.log(eps) if eps > 0 else 0.0
        if name == "log_std":
            return _Form("shifted_log_std" if eps > 0 else "log_std", (shift, 0.0, 0.0, soft))
        return _Form("shifted_variance" if eps > 0 else "logvar", (shift, 0.0, 0.0, 0.0))


class Posterior:
    """The posterior and the prior, with dense rows. `unit` divides their strides and their size."""

    def __init__(
        self,
        mu: Tensor,
        logvar: Tensor | None,
        prior_mu: Tensor | None,
        prior_logvar: Tensor | None,
        form: str,
        constants: Sequence[float],
        balance: float | None,
    ) -> None:
        # The tensors that the gradients belong to, which may be packed heads.
        self.given = mu, logvar, prior_mu, prior_logvar
        mean, scale = mu.chunk(2, 1) if logvar is None else (mu, logvar)
        prior_mean, prior_scale = prior_mu, prior_logvar
        if prior_mu is not None and prior_logvar is None:
            prior_mean, prior_scale = prior_mu.chunk(2, 1)
        self.shape = mean.shape
        self.rows, self.size = mean.shape[0], event_size(mean)
        self.tensors = [
            dense_rows(t) if t is not None else None for t in (mean, scale, prior_mean, prior_scale)
        ]
        strides = [t.stride(0) if t is not None else 0 for t in self.tensors]
        self.unit = divisor(self.size, *strides)
        self.numbers = (self.rows, self.size // self.unit, *(stride // self.unit for stride in strides))
        self.dtype = row_dtype(mu)
        self.form = _Form.of(form, constants)
        self.weights = (1.0, 1.0) if balance is None else (1 - balance, balance)

    @property
    def gradient_rows(self) -> tuple[int, int]:
        """The distance between rows of the gradients of the posterior and of the prior, in rows."""
        return (2 if self.given[1] is None else 1, 2 if self.given[3] is None else 1)

    def new_gradients(self, needs: int) -> tuple[list[Tensor | None], list[Tensor | None]]:
        """The gradients that `needs` asks for, for each given tensor, and the same with the halves of packed heads
        apart."""
        gradients: list[Tensor | None] = []
        views: list[Tensor | None] = []
        for bit, t, other in zip((MU, PRIOR_MU), self.given[::2], self.given[1::2], strict=True):
            pair = [
                torch.empty(g.shape, dtype=g.dtype, device=g.device) if g is not None and needs & b else None
                for g, b in ((t, bit), (other, bit << 1))
            ]
            gradients += pair
            views += pair[0].chunk(2, 1) if other is None and pair[0] is not None else pair
        return gradients, views

    def choice(self, kernel: str, elements: int) -> Choice:
        tuned = choice(kernel, elements, self.given[0].device)
        # With four soft clamps, a full tile would spill registers.
        four = self.form.numbers[3] != 0 and self.given[2] is not None
        return tuned._replace(tile=tuned.tile // 2) if four else tuned


def reparameterize_kl_forward(
    mu: Tensor,
    logvar: Tensor | None,
    prior_mu: Tensor | None,
    prior_logvar: Tensor | None,
    form: str,
    constants: Sequence[float],
    balance: float | None,
    per_element: bool,
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
    posterior = Posterior(mu, logvar, prior_mu, prior_logvar, form, constants, balance)
    shape = posterior.shape if samples is None else (samples, *posterior.shape)
    z = torch.empty(shape, dtype=mu.dtype, device=mu.device)
    rows, elements = _sample(
        posterior,
        eps.contiguous() if eps is not None else None,
        used_seed,
        z,
        samples or 1,
        row_offset,
        per_element=per_element,
    )
    return z, elements.view(posterior.shape) if per_element else rows, used_seed


def gaussian_kl_forward(
    mu: Tensor,
    logvar: Tensor | None,
    prior_mu: Tensor | None,
    prior_logvar: Tensor | None,
    form: str,
    constants: Sequence[float],
    balance: float | None,
    per_element: bool,
) -> Tensor:
    posterior = Posterior(mu, logvar, prior_mu, prior_logvar, form, constants, balance)
    rows, elements = _sample(posterior, None, None, None, 0, 0, per_element=per_element)
    return elements.view(posterior.shape) if per_element else rows


def _sample(
    posterior: Posterior,
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
    cut = partition(rows, size, posterior.choice("sample", rows * size * max(1, draws)), narrowest=4)
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
    logvar: Tensor | None,
    prior_mu: Tensor | None,
    prior_logvar: Tensor | None,
    form: str,
    constants: Sequence[float],
    balance: float | None,
    samples: int | None,
    seed: Tensor,
    row_offset: int,
    eps: Tensor | None,
    needs: int,
) -> list[Tensor]:
    """Return the gradients that `needs` asks for, in the order of its bits."""
    return _gradients(
        Posterior(mu, logvar, prior_mu, prior_logvar, form, constants, balance),
        grad_z.contiguous() if grad_z is not None else None,
        grad_kl,
        eps.contiguous() if eps is not None else None,
        seed,
        samples or 1,
        row_offset,
        needs,
    )


def gaussian_kl_backward(
    grad_kl: Tensor,
    mu: Tensor,
    logvar: Tensor | None,
    prior_mu: Tensor | None,
    prior_logvar: Tensor | None,
    form: str,
    constants: Sequence[float],
    balance: float | None,
    needs: int,
) -> list[Tensor]:
    """Return the gradients that `needs` asks for. grad_kl is (B,), or has the shape of the mean."""
    posterior = Posterior(mu, logvar, prior_mu, prior_logvar, form, constants, balance)
    return _gradients(posterior, None, grad_kl, None, None, 0, 0, needs)


def _gradients(
    posterior: Posterior,
    grad_z: Tensor | None,
    grad_kl: Tensor | None,
    eps: Tensor | None,
    seed: Tensor | None,
    draws: int,
    row_offset: int,
    needs: int,
) -> list[Tensor]:
    rows, size = posterior.rows, posterior.size
    per_element = grad_kl is not None and (grad_kl.dim() != 1 or len(posterior.shape) == 1)
    if grad_kl is not None and per_element:
        grad_kl = dense_rows(grad_kl)
    gradients, views = posterior.new_gradients(needs)
    gradients.append(torch.empty_like(eps) if needs & EPS and eps is not None else None)
    elements = rows * size * max(1, draws)
    device = posterior.given[0].device
    cut = partition(rows, size, posterior.choice("sample_gradient", elements), narrowest=4)
    launch(
        sample_gradient_kernel,
        cut.programs,
        device,
        grad_z,
        grad_kl,
        *posterior.tensors,
        eps,
        seed,
        *views,
        gradients[-1],
        *posterior.numbers,
        draws,
        row_offset,
        grad_kl.stride(0) if grad_kl is not None else 0,
        *posterior.gradient_rows,
        cut.splits,
        cut.tiles,
        *posterior.form.numbers,
        *posterior.weights,
        PER_ELEMENT=per_element,
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
