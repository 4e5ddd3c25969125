"""The specification: what every backend computes, in plain PyTorch.

Read this file to learn what a number means; run it to check a kernel against it. Everything here is differentiable
twice and runs on any device. It is slow on purpose (the noise is integer arithmetic on tensors), and it checks nothing:
`fastvae.functional` checks its inputs and then calls either these functions or a compiled backend.

Conventions, everywhere:

- Dimension 0 is the batch; every further dimension belongs to the event and is summed. Results are in nats.
- float16 and bfloat16 are read into float32, computed there, and rounded once at the end where the result is of the
  input's type (`z`, gradients). Per-row results are float32, or float64 for float64 inputs.
- Variances travel as logarithms: `logvar` is log sigma^2.

Sources:
  [KW]  Kingma and Welling, "Auto-Encoding Variational Bayes", ICLR 2014.
  [RW]  Rasmussen and Williams, "Gaussian Processes for Machine Learning", MIT Press 2006.
  [S]   Salmon, Moraes, Dror and Shaw, "Parallel Random Numbers: As Easy as 1, 2, 3", SC 2011.
  [BM]  Box and Muller, "A Note on the Generation of Random Normal Deviates", Ann. Math. Statist. 29 (1958).
  [B]   Bishop, "Pattern Recognition and Machine Learning", Springer 2006.
  [K16] Kingma et al., "Improving Variational Inference with Inverse Autoregressive Flow", NeurIPS 2016.
  [LC]  Loaiza-Ganem and Cunningham, "The Continuous Bernoulli: Fixing a Pervasive Error in Variational Autoencoders",
        NeurIPS 2019.
  [LLT] Lange, Little and Taylor, "Robust Statistical Modeling Using the t Distribution", JASA 84 (1989).
  [S17] Salimans, Karpathy, Chen and Kingma, "PixelCNN++", ICLR 2017; and its code, github.com/openai/pixel-cnn.
  [R]   Rybkin, Daniilidis and Levine, "Simple and Effective VAE Training with Calibrated Decoders", ICML 2021.
  [L]   Lopez, Regier, Cole, Jordan and Yosef, "Deep generative modeling for single-cell transcriptomics", Nature
        Methods 15 (2018); the parametrisation is that of scvi-tools' log_nb_positive and log_zinb_positive.
  [ZI]  Risso, Perraudeau, Gribkova, Dudoit and Vert, "A general and flexible method for signal extraction from
        single-cell RNA-seq data", Nature Communications 9 (2018).
  [AS]  Abramowitz and Stegun, "Handbook of Mathematical Functions", 1964: 6.1.41, Stirling's series.
"""

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

# ---------------------------------------------------------------------------------------------------------------------
# Helpers
# ---------------------------------------------------------------------------------------------------------------------


def _compute_dtype(tensor: Tensor) -> torch.dtype:
    """The type that sums are kept in: float64 for float64, else float32."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def _read_target(target: Tensor, dtype: torch.dtype) -> Tensor:
    """Data as numbers: uint8 pixels are x / 255, bool is 0 or 1, floats are themselves."""
    value = target.to(dtype)
    return value / 255 if target.dtype == torch.uint8 else value


def _read_counts(target: Tensor, dtype: torch.dtype) -> Tensor:
    """Counts as numbers: every integer type is itself, uint8 too."""
    return target.to(dtype)


def _sum_event(value: Tensor) -> Tensor:
    """Sum over every dimension but the batch: (B, ...) -> (B,)."""
    # torch reads an empty list of dimensions as "all of them", so rank 1 has nothing to sum and goes its own way.
    return value.sum(tuple(range(1, value.dim()))) if value.dim() > 1 else value


def _expm1_minus(v: Tensor) -> Tensor:
    """e^v - 1 - v = expm1(v) - v, right to the last digits near 0 too, and so are both derivatives.

    Near 0 the result is v^2 / 2 while expm1(v) and v are each of size v: their difference keeps no digit once v is
    below the square root of the precision. There the Taylor series v^2/2 (1 + v/3 (1 + v/4 (...))) takes over: up to
    v^20 / 20! it is exact to float64 for |v| < 1. From 1 on the subtraction costs two bits at most.
    """
    near = v.abs() < 1
    # Outside its range the series is evaluated at 0: where() discards that value, but a gradient of 0 * inf would
    # still be NaN.
    small = torch.where(near, v, 0.0)
    series = torch.ones_like(small)
    for n in range(20, 2, -1):
        series = 1 + series * small / n
    return torch.where(near, small * small / 2 * series, torch.exp(v) - (1 + v))


# ---------------------------------------------------------------------------------------------------------------------
# Noise
# ---------------------------------------------------------------------------------------------------------------------

_WORD = 0xFFFFFFFF  # the low 32 bits


def draw_seed(device: torch.device | str = "cpu", generator: torch.Generator | None = None) -> Tensor:
    """A fresh (seed, offset), int64 (2,), from torch's generator: `torch.manual_seed` works as for `torch.randn`."""
    return torch.randint(0, 2**63 - 1, (2,), dtype=torch.int64, device=device, generator=generator)


def philox(seed: Tensor, row_offset: int, rows: int, dims: int, draws: int = 1) -> Tensor:
    """The random integers of every (draw, row, element): Philox4x32-10 ([S]).

    A counter-based generator: each output is a pure function of its coordinates, so that any thread of any device
    can make any part of the noise, and the backward pass can make it again.

    `seed` is int64 (2,): the key, and an offset into the counter (both are used modulo 2^63). One call of Philox turns
    a counter of four 32-bit words into four random words; they serve four neighbouring elements of a row:

        words 0, 1 of the counter: low and high half of  offset // 4 + draw
        words 2, 3 of the counter: low and high half of  (row_offset + row) * ceil(dims / 4) + element // 4
        element uses output word  element % 4

    Returns int64 (draws, rows, dims) holding values in [0, 2^32).
    """
    blocks = -(-dims // 4)
    key, offset = (seed & 0x7FFFFFFFFFFFFFFF).unbind()
    draw = (offset >> 2) + torch.arange(draws, device=seed.device)
    block = row_offset * blocks + torch.arange(rows * blocks, device=seed.device)

    draw = draw.view(draws, 1)
    block = block.view(1, rows * blocks)
    # Words are kept as int64 in [0, 2^32). A product of two of them wraps modulo 2^64 and its sign means nothing:
    # masking after the shift removes the copies of the sign bit.
    k0, k1 = key & _WORD, key >> 32
    c0, c1, c2, c3 = draw & _WORD, (draw >> 32) & _WORD, block & _WORD, (block >> 32) & _WORD
    for _ in range(10):
        p0, p1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = (
            ((p1 >> 32) & _WORD) ^ c1 ^ k0,
            p1 & _WORD,
            ((p0 >> 32) & _WORD) ^ c3 ^ k1,
            p0 & _WORD,
        )
        k0, k1 = (k0 + 0x9E3779B9) & _WORD, (k1 + 0xBB67AE85) & _WORD
    words = torch.stack((c0, c1, c2, c3), dim=-1)
    return words.view(draws, rows, 4 * blocks)[..., :dims]


def uniform(integers: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """32-bit integers to the open interval (0, 1): the middles of 2^23 equal cells.

    Every value is an odd multiple of 2^-24, which float32 holds exactly: all types start from the same number, and
    neither 0 nor 1 can come out.
    """
    return (2 * (integers >> 9) + 1).to(dtype) * 2.0**-24


def box_muller(u0: Tensor, u1: Tensor) -> tuple[Tensor, Tensor]:
    """Two independent standard normals from two uniforms in (0, 1) ([BM], equation 1)."""
    radius, angle = torch.sqrt(-2 * torch.log(u0)), 2 * math.pi * u1
    return radius * torch.cos(angle), radius * torch.sin(angle)


def normal_noise(
    seed: Tensor, row_offset: int, rows: int, dims: int, draws: int = 1, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Standard normals (draws, rows, dims): the noise of every backend.

    Output words 0 and 1 of a Philox call make the normals of elements 0 and 1 of its four, words 2 and 3 those of 2
    and 3. `dtype` float64 computes in float64 from the same integers, any other type in float32 (and returns that).
    """
    dtype = torch.float64 if dtype == torch.float64 else torch.float32
    padded = -(-dims // 4) * 4  # Box-Muller needs whole pairs
    u = uniform(philox(seed, row_offset, rows, padded, draws), dtype).view(draws, rows, padded // 4, 4)
    n0, n1 = box_muller(u[..., 0], u[..., 1])
    n2, n3 = box_muller(u[..., 2], u[..., 3])
    return torch.stack((n0, n1, n2, n3), dim=-1).view(draws, rows, padded)[..., :dims]


# ---------------------------------------------------------------------------------------------------------------------
# The posterior
# ---------------------------------------------------------------------------------------------------------------------


def gaussian_kl(
    mu: Tensor,
    logvar: Tensor,
    prior_mu: Tensor | None = None,
    prior_logvar: Tensor | None = None,
    *,
    reduction: str = "event",
) -> Tensor:
    """KL( N(mu, e^logvar) || N(prior_mu, e^prior_logvar) ), diagonal; the prior is N(0, 1) if none is given.

    Per element ([RW], equation A.23, for one dimension; with a standard normal prior [KW], appendix B):

        1/2 [ (mu - prior_mu)^2 e^-prior_logvar + e^v - 1 - v ],    v = logvar - prior_logvar

    `reduction="event"` sums each row to (B,), `"none"` keeps the elements.
    """
    dtype = _compute_dtype(mu)
    distance, v = mu.to(dtype), logvar.to(dtype)
    if prior_mu is not None and prior_logvar is not None:
        # Read once: a half tensor read twice would have its two gradients rounded before they are added.
        prior_v = prior_logvar.to(dtype)
        # Half of the exponent before squaring: the square of a large distance over a large variance stays finite.
        distance = (distance - prior_mu.to(dtype)) * torch.exp(prior_v / -2)
        v = v - prior_v
    kl = (distance * distance + _expm1_minus(v)) / 2
    return _sum_event(kl) if reduction == "event" else kl


def reparameterize_kl(
    mu: Tensor,
    logvar: Tensor,
    prior_mu: Tensor | None = None,
    prior_logvar: Tensor | None = None,
    *,
    samples: int | None = None,
    generator: torch.Generator | None = None,
    seed: Tensor | None = None,
    row_offset: int = 0,
    eps: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """z = mu + e^(logvar / 2) eps, eps ~ N(0, 1) ([KW], section 2.4), and the row's `gaussian_kl`.

    z has mu's type and shape, or (samples, *shape). The noise is `eps` if given, else that of `seed`, else that of a
    seed drawn from `generator` (or torch's default one).
    """
    dtype = _compute_dtype(mu)
    shape = mu.shape if samples is None else (samples, *mu.shape)
    if eps is None:
        if seed is None:
            seed = draw_seed(mu.device, generator)
        rows, dims, draws = mu.shape[0], math.prod(mu.shape[1:]), 1 if samples is None else samples
        eps = normal_noise(seed, row_offset, rows, dims, draws, dtype).reshape(shape)
    mean, v = mu.to(dtype), logvar.to(dtype)  # once, for z and the KL: see `gaussian_kl`
    z = mean + torch.exp(v / 2) * eps.to(dtype)
    return z.to(mu.dtype), gaussian_kl(mean, v, prior_mu, prior_logvar)


# ---------------------------------------------------------------------------------------------------------------------
# The likelihoods: -log p(target | parameters), per row
# ---------------------------------------------------------------------------------------------------------------------


def bernoulli_nll(logits: Tensor, target: Tensor) -> Tensor:
    """-log Bernoulli(target | sigmoid(logits)), (B,) ([KW], appendix C.1, equation 11).

    Per element -[ t log s(a) + (1 - t) log s(-a) ], s the sigmoid. That equals max(a, 0) - a t + log(1 + e^-|a|), but
    for t in [0, 1] both terms are positive, so nothing cancels where the network is sure and right. For a grey
    target, 0 < t < 1, this is a cross-entropy, not a likelihood that integrates to 1.
    """
    dtype = _compute_dtype(logits)
    a, t = logits.to(dtype), _read_target(target, dtype)
    return _sum_event(-(t * F.logsigmoid(a) + (1 - t) * F.logsigmoid(-a)))


def gaussian_nll(
    mean: Tensor,
    target: Tensor,
    logvar: Tensor | None = None,
    *,
    scale: float = 1.0,
    logvar_bounds: Sequence[float] | None = None,
) -> Tensor:
    """-log N(target | mean, variance), (B,), with its constant ([KW], appendix C.2, equation 12).

    Per element 1/2 [ log 2 pi + log s^2 + (x - m)^2 / s^2 ]. The variance s^2 is `scale`^2, or e^logvar for a `logvar`
    of mean's shape, or one e^logvar for all where `logvar` is 0-dimensional (the learned scale of [R]). With
    `logvar_bounds` (lo, hi) it is that of `bounded_logvar`.
    """
    dtype = _compute_dtype(mean)
    distance = _read_target(target, dtype) - mean.to(dtype)
    if logvar is None:
        standardised, log_variance = distance / scale, 2 * math.log(scale)
        return _sum_event((standardised * standardised + (math.log(2 * math.pi) + log_variance)) / 2)
    log_variances = logvar.to(dtype)
    if logvar_bounds is not None:
        log_variances = bounded_logvar(log_variances, logvar_bounds)
    standardised = distance * torch.exp(log_variances / -2)
    return _sum_event((standardised * standardised + (math.log(2 * math.pi) + log_variances)) / 2)


def bounded_logvar(logvar: Tensor, bounds: Sequence[float]) -> Tensor:
    """A smooth clamp: mid + half tanh((v - mid) / half), for mid and half of the interval between the bounds (lo, hi).

    In the middle it is v to second order; it never leaves [lo, hi], and its derivative, 1 - tanh^2, is positive, where
    that of a hard clamp is 0 outside.
    """
    lo, hi = bounds
    mid, half = lo / 2 + hi / 2, hi / 2 - lo / 2
    return mid + half * torch.tanh((logvar - mid) / half)


def gaussian_head_nll(
    params: Tensor, target: Tensor, *, logvar_bounds: Sequence[float] | None = None
) -> Tensor:
    """`gaussian_nll` with mean and log-variance packed along dimension 1: `params` (B, 2C, ...), mean first."""
    mean, logvar = params.chunk(2, dim=1)
    return gaussian_nll(mean, target, logvar, logvar_bounds=logvar_bounds)


def laplace_nll(
    loc: Tensor, target: Tensor, log_scale: Tensor | None = None, *, scale: float = 1.0
) -> Tensor:
    """-log Laplace(target | loc, scale), (B,), with its constant.

    Per element log 2b + |x - m| / b. The scale b is `scale`, or e^log_scale for a `log_scale` of loc's shape, or one
    e^log_scale for all where `log_scale` is 0-dimensional. The gradient in the kink x = m is 0.
    """
    dtype = _compute_dtype(loc)
    distance = _absolute(_read_target(target, dtype) - loc.to(dtype))
    if log_scale is None:
        return _sum_event(distance / scale + math.log(2 * scale))
    log_scales = log_scale.to(dtype)
    return _sum_event(distance * torch.exp(-log_scales) + (math.log(2) + log_scales))


def _absolute(x: Tensor) -> Tensor:
    """|x|, with the derivative 0 at 0 and NaN at NaN (torch's is 0 there, too)."""
    return x * torch.where(x.isnan(), x, x.sign()).detach()


def laplace_head_nll(params: Tensor, target: Tensor) -> Tensor:
    """`laplace_nll` with location and log-scale packed along dimension 1: `params` (B, 2C, ...), location first."""
    loc, log_scale = params.chunk(2, dim=1)
    return laplace_nll(loc, target, log_scale)


def continuous_bernoulli_nll(logits: Tensor, target: Tensor) -> Tensor:
    """-log CB(target | sigmoid(logits)), (B,): the density on [0, 1] that the Bernoulli's formula lacks ([LC]).

    Per element, for a logit a: the density is proportional to e^(a t), whose integral over [0, 1] is (e^a - 1) / a. So
    the nll is log((e^a - 1) / a) - a t.
    """
    dtype = _compute_dtype(logits)
    a, t = logits.to(dtype), _read_target(target, dtype)
    near = a.abs() < 0.5
    # Near 0 by the even series of log(sinh(a / 2) / (a / 2)); both branches are kept finite outside of their range.
    small, large = torch.where(near, a, 0.0), torch.where(near, 1.0, a)
    square, series = small * small, torch.zeros_like(a)
    for n, bernoulli_number in reversed(list(enumerate(_BERNOULLI_NUMBERS, 1))):
        series = (series + bernoulli_number / (2 * n * math.factorial(2 * n))) * square
    size = large.abs()
    far = torch.relu(large) - large * t + torch.log(-torch.expm1(-size) / size)
    return _sum_event(torch.where(near, small * (0.5 - t) + series, far))


# B_2, B_4, ...
_BERNOULLI_NUMBERS = (1 / 6, -1 / 30, 1 / 42, -1 / 30, 5 / 66, -691 / 2730, 7 / 6, -3617 / 510, 43867 / 798)


def poisson_nll(log_rate: Tensor, target: Tensor) -> Tensor:
    """-log Poisson(target | e^log_rate), (B,): per element e^a - t a + log t!, with log t! = log Gamma(t + 1)."""
    dtype = _compute_dtype(log_rate)
    a, t = log_rate.to(dtype), _read_counts(target, dtype)
    return _sum_event(torch.exp(a) - t * a + torch.lgamma(t + 1))


def student_t_nll(
    loc: Tensor, target: Tensor, log_scale: Tensor | None = None, *, df: float, scale: float = 1.0
) -> Tensor:
    """-log of Student's t with `df` degrees of freedom, (B,): a Gaussian with heavy tails ([LLT]).

    Per element, for z = (x - m) / s and df = v:  (v + 1)/2 log(1 + z^2 / v) + log s + log B(v/2, 1/2) + 1/2 log v. The
    scale s is `scale`, or e^log_scale as for `laplace_nll`.
    """
    dtype = _compute_dtype(loc)
    distance = (_read_target(target, dtype) - loc.to(dtype)) / math.sqrt(df)
    constant = log_beta_half(df) + math.log(df) / 2
    if log_scale is None:
        return _sum_event((df + 1) * _half_log1p_square(distance / scale) + (constant + math.log(scale)))
    log_scales = log_scale.to(dtype)
    return _sum_event(
        (df + 1) * _half_log1p_square(distance * torch.exp(-log_scales)) + (constant + log_scales)
    )


def log_beta_half(df: float) -> float:
    """log B(df / 2, 1/2) = log Gamma(x) + 1/2 log pi - log Gamma(x + 1/2), x = df / 2."""
    x = df / 2
    if df < 200:
        return math.lgamma(x) - math.lgamma(x + 0.5) + math.log(math.pi) / 2
    # The two log-gammas, each about x log x, would cancel: their difference by its asymptotic series.
    return (math.log(math.pi) - math.log(x)) / 2 + (1 / 8 - (1 / 192 - 1 / (640 * x * x)) / (x * x)) / x


def _half_log1p_square(y: Tensor) -> Tensor:
    """log(1 + y^2) / 2, for y whose square is too large a number, too."""
    near = y.abs() < 1
    small, large = torch.where(near, y, 0.0), torch.where(near, 1.0, y)
    far = torch.log(large.abs()) + torch.log1p(large**-2) / 2
    return torch.where(near, torch.log1p(small * small) / 2, far)


def student_t_head_nll(params: Tensor, target: Tensor, *, df: float) -> Tensor:
    """`student_t_nll` with location and log-scale packed along dimension 1: `params` (B, 2C, ...), location first."""
    loc, log_scale = params.chunk(2, dim=1)
    return student_t_nll(loc, target, log_scale, df=df)


def categorical_nll(logits: Tensor, target: Tensor, *, ignore_index: int = -100) -> Tensor:
    """-log Categorical(target | softmax(logits)), (B,), summed over positions ([B], equations 4.104 and 4.108).

    Per position log sum_v e^a_v - a_t for logits a, which lie along the last dimension, and the class t. Positions
    whose target is `ignore_index` (padding) add nothing and pass no gradient.
    """
    ignored = target == ignore_index
    log_probs = F.log_softmax(logits.to(_compute_dtype(logits)), dim=-1)
    chosen = log_probs.gather(-1, target.masked_fill(ignored, 0).unsqueeze(-1)).squeeze(-1)
    return _sum_event(torch.where(ignored, 0.0, -chosen))


def free_bits(kl: Tensor, nats: float, *, batch_mean: bool = True) -> Tensor:
    """The KL per row with free bits, (B,): a dimension whose KL is below `nats` counts as `nats` ([K16], appendix C.8).

    `kl` is per dimension, (B, ...). With `batch_mean` a dimension is judged by its mean over the batch, as there: the
    mean of the rows is sum_j max(nats, mean_b kl_bj), and its gradient is theirs. Without it every datum is judged by
    itself: max(nats, kl_bj).
    """
    judged = kl.mean(0, keepdim=True) if batch_mean else kl
    return _sum_event(torch.where(judged > nats, kl, nats))


# ---------------------------------------------------------------------------------------------------------------------
# Counts: negative binomial, and with additional zeros
# ---------------------------------------------------------------------------------------------------------------------

# Below, Stirling's series does not reach the precision of float64.
_STIRLING_FROM = 8.0


def _count_dtype(tensor: Tensor) -> torch.dtype:
    """Counts are computed in float64, of which 1e6! leaves eight digits, where the device has it."""
    return torch.float32 if tensor.device.type == "mps" else torch.float64


def _dense_counts(target: Tensor, dtype: torch.dtype) -> Tensor:
    """Counts as numbers; a sparse CSR matrix becomes a dense one."""
    if target.layout != torch.sparse_csr:
        return _read_counts(target, dtype)
    lengths = target.crow_indices().diff()
    rows = torch.repeat_interleave(torch.arange(lengths.numel(), device=target.device), lengths)
    dense = torch.zeros(target.shape, dtype=dtype, device=target.device)
    return dense.index_put(
        (rows, target.col_indices()), _read_counts(target.values(), dtype), accumulate=True
    )


def _stirling(z: Tensor) -> Tensor:
    """log Gamma(z) - [ (z - 1/2) log z - z + 1/2 log 2 pi ], for z >= 8 ([AS] 6.1.41)."""
    square, series = 1 / (z * z), torch.zeros_like(z)
    for numerator, denominator in (
        (-3617, 122400), (1, 156), (-691, 360360), (1, 1188), (-1, 1680), (1, 1260), (-1, 360), (1, 12),
    ):  # fmt: skip
        series = series * square + numerator / denominator
    return series / z


def _log1p_minus(e: Tensor, log_1_e: Tensor) -> Tensor:
    """log(1 + e) - e, right to the last digits near 0 too, given log(1 + e) for where that is not near.

    With s = e / (2 + e), log(1 + e) = 2 (s + s^3/3 + s^5/5 + ...) and 2 s - e = -e s.
    """
    near = e.abs() < 0.5
    small = torch.where(near, e, 0.0)
    s = small / (2 + small)
    series = torch.zeros_like(s)
    for n in range(25, 1, -2):
        series = series * (s * s) + 2 / n
    return torch.where(near, s * (s * s * series - small), log_1_e - e)


def _negative_binomial(mu: Tensor, log_mu: Tensor, theta: Tensor, t: Tensor) -> Tensor:
    """-log NB(t; mean mu, inverse dispersion theta) of each element ([L], scvi-tools' log_nb_positive without its eps):

        lgamma(theta) + lgamma(t + 1) - lgamma(t + theta) - theta log(theta / (theta + mu)) - t log(mu / (theta + mu))

    Of the three lgamma, the large ones nearly cancel, and the rest cancels against what is left of them. So where
    theta is small beside t, two of them are subtracted within Stirling's formula; where it is not, the distribution is
    nearly Poisson, and this is Poisson's -log p and what corrects it, all of it in differences d = mu - t.
    """
    n, d = t + theta, mu - t
    large = t >= _STIRLING_FROM
    some = torch.where(
        large, t, _STIRLING_FROM
    )  # in every branch, numbers that the others' gradients survive
    n_some = torch.where(n >= _STIRLING_FROM, n, _STIRLING_FROM)

    b = theta - 1
    ratio = (n_some - 0.5) * torch.log1p(b / (some + 1)) + b * (torch.log(some + 1) - 1)
    ratio = ratio + _stirling(n_some) - _stirling(some + 1)  # lgamma(t + theta) - lgamma(t + 1)
    ratio = torch.where(large, ratio, torch.lgamma(n) - torch.lgamma(t + 1))
    log1p_ratio = torch.where(
        theta < mu, torch.log1p(theta / torch.maximum(mu, theta)), torch.log(theta + mu) - log_mu
    )
    x = mu / theta
    log1p_x = torch.log1p(x)
    at_zero = torch.where(x < 0.5, mu + theta * _log1p_minus(x, log1p_x), theta * log1p_x)
    dispersed = at_zero + t * log1p_ratio + torch.lgamma(theta) - ratio

    stirling = 0.5 * torch.log(2 * math.pi * some) + _stirling(some)
    poisson = torch.where(
        large,
        stirling - some * _log1p_minus(d / some, log_mu - torch.log(some)),
        mu - t * log_mu + torch.lgamma(t + 1),
    )
    theta_some = torch.where(theta >= _STIRLING_FROM, theta, _STIRLING_FROM)
    correction = n * _log1p_minus(d / n, torch.log((theta + mu) / n)) + 0.5 * torch.log1p(t / theta)
    correction = correction + _stirling(theta_some) - _stirling(n_some)

    nearly_poisson = (theta >= _STIRLING_FROM) & (1000 * theta >= t)
    return torch.where(t == 0, at_zero, torch.where(nearly_poisson, poisson + correction, dispersed))


def _with_zeros(nll: Tensor, zi_logits: Tensor, t: Tensor) -> Tensor:
    """-log of pi [t = 0] + (1 - pi) e^-nll for each element, pi = sigmoid(zi_logits) ([ZI]; log_zinb_positive)."""
    keep = torch.sigmoid(-zi_logits)
    # At t = 0, log(pi + (1 - pi) e^-nll) = log1p((1 - pi) expm1(-nll)), but not where that is a logarithm of next to 0.
    lost = keep * torch.expm1(-nll)
    near = lost > -0.5
    zero = torch.where(
        near,
        -torch.log1p(torch.where(near, lost, 0.0)),
        F.logsigmoid(zi_logits + nll) - F.logsigmoid(zi_logits),
    )
    return torch.where(t == 0, zero, nll - F.logsigmoid(-zi_logits))


def negative_binomial_nll(mean: Tensor, target: Tensor, inverse_dispersion: Tensor) -> Tensor:
    """-log NB(target | mean, inverse_dispersion), (B,) ([L]): the variance is mean + mean^2 / inverse_dispersion.

    `inverse_dispersion` is (G,), one for every gene, or like `mean` (B, G). `target`: counts, dense or sparse CSR.
    """
    dtype = _count_dtype(mean)
    mu, theta, t = mean.to(dtype), inverse_dispersion.to(dtype), _dense_counts(target, dtype)
    nll = _negative_binomial(mu, torch.log(mu), theta.expand_as(mu), t)
    return _sum_event(nll).to(_compute_dtype(mean))


def zero_inflated_negative_binomial_nll(
    mean: Tensor, target: Tensor, inverse_dispersion: Tensor, zi_logits: Tensor
) -> Tensor:
    """`negative_binomial_nll` where an element is 0 with probability sigmoid(`zi_logits`) besides, (B,) ([ZI], [L])."""
    dtype = _count_dtype(mean)
    mu, theta, t = mean.to(dtype), inverse_dispersion.to(dtype), _dense_counts(target, dtype)
    nll = _with_zeros(_negative_binomial(mu, torch.log(mu), theta.expand_as(mu), t), zi_logits.to(dtype), t)
    return _sum_event(nll).to(_compute_dtype(mean))


def _rates(logits: Tensor, library: Tensor) -> Tensor:
    """log of library * softmax(logits): what a cell is expected to hold of every gene ([L])."""
    return torch.log(library.reshape(-1, 1)) + F.log_softmax(logits, dim=1)


def negative_binomial_logits_nll(
    logits: Tensor, target: Tensor, log_dispersion: Tensor, library: Tensor
) -> Tensor:
    """`negative_binomial_nll` from a decoder's raw outputs: mean = library * softmax(logits) over the genes of a cell,
    inverse dispersion = e^log_dispersion ([L]). `library`: (B,) or (B, 1)."""
    dtype = _count_dtype(logits)
    log_mu, theta = _rates(logits.to(dtype), library.to(dtype)), torch.exp(log_dispersion.to(dtype))
    nll = _negative_binomial(torch.exp(log_mu), log_mu, theta.expand_as(log_mu), _dense_counts(target, dtype))
    return _sum_event(nll).to(_compute_dtype(logits))


def zero_inflated_negative_binomial_logits_nll(
    logits: Tensor, target: Tensor, log_dispersion: Tensor, zi_logits: Tensor, library: Tensor
) -> Tensor:
    """`negative_binomial_logits_nll` with the additional zeros of `zero_inflated_negative_binomial_nll`."""
    dtype = _count_dtype(logits)
    log_mu, theta = _rates(logits.to(dtype), library.to(dtype)), torch.exp(log_dispersion.to(dtype))
    t = _dense_counts(target, dtype)
    nll = _negative_binomial(torch.exp(log_mu), log_mu, theta.expand_as(log_mu), t)
    return _sum_event(_with_zeros(nll, zi_logits.to(dtype), t)).to(_compute_dtype(logits))


def discretized_logistic_nll(
    params: Tensor,
    target: Tensor,
    *,
    bits: int = 8,
    log_scale_floor: float = -7.0,
    small_mass: float = 1e-5,
) -> Tensor:
    """-log of the mass of the target's levels under logistics, (B,) ([S17], equation 2, without the mixture).

    `params` (B, 2C, ...) has mean and log-scale packed along dimension 1, mean first; `target` is uint8 (B, C, ...).
    """
    dtype = _compute_dtype(params)
    mean, log_scale = params.to(dtype).chunk(2, dim=1)
    x, half_bin = read_levels(target, bits, dtype)
    return _sum_event(-_log_mass(x, mean, log_scale, half_bin, log_scale_floor, small_mass))


def discretized_logistic_mixture_nll(
    params: Tensor,
    target: Tensor,
    *,
    components: int,
    bits: int = 8,
    log_scale_floor: float = -7.0,
    small_mass: float = 1e-5,
) -> Tensor:
    """-log of the mass of each pixel under a mixture of logistics, (B,) ([S17], section 2.1 and equation 3).

    A pixel has one component for its 1 or 3 channels, log sum_k pi_k prod_c mass_kc, and the means of later channels
    depend on the channels before: `mixture_means`. `params` is what `mixture_parts` takes apart.
    """
    dtype = _compute_dtype(params)
    logits, mean, log_scale, coefficients = mixture_parts(params.to(dtype), components, target.shape[1])
    x, half_bin = read_levels(target, bits, dtype)
    mean = torch.stack(mixture_means(mean, coefficients, x.unbind(1)), 1)
    log_mass = _log_mass(x.unsqueeze(2), mean, log_scale, half_bin, log_scale_floor, small_mass)
    mixed = torch.logsumexp(torch.log_softmax(logits, 1) + log_mass.sum(1), 1)
    return _sum_event(-mixed)


def read_levels(target: Tensor, bits: int, dtype: torch.dtype) -> tuple[Tensor, float]:
    """Levels 0, ..., 2^bits - 1 as x in [-1, 1], and half their distance. Higher ones count as the highest."""
    highest = 2**bits - 1
    return (2 * target.clamp(max=highest).to(dtype) - highest) / highest, 1 / highest


def mixture_parts(params: Tensor, components: int, channels: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The parts of `params` (B, K + ..., *rest), in the order of [S17]'s code, for 1 or 3 channels of data.

    K logits (B, K, ...); then for each channel in turn K means and K log-scales, (B, C, K, ...) each, and for three
    channels K coefficients, (B, 3, K, ...), which go through tanh here. (None for one channel: (B, 1, 0, ...).)
    """
    logits, rest = params[:, :components], params[:, components:]
    blocks = 3 if channels == 3 else 2
    rest = rest.reshape(rest.shape[0], channels, blocks, components, *rest.shape[2:])
    coefficients = torch.tanh(rest[:, :, 2]) if channels == 3 else rest[:, :, 0, :0]
    return logits, rest[:, :, 0], rest[:, :, 1], coefficients


def mixture_means(mean: Tensor, coefficients: Tensor, x: Sequence[Tensor]) -> list[Tensor]:
    """The mean (B, K, ...) of each channel, given x (B, ...) of the channels before ([S17], equation 3).

    Of three channels, red green blue: m_g + a r and m_b + b r + c g, with coefficients a, b, c. More means than
    `x` has values for are not made.
    """
    means = [mean[:, 0]]
    if mean.shape[1] == 3 and len(x) > 0:
        means.append(mean[:, 1] + coefficients[:, 0] * x[0].unsqueeze(1))
    if mean.shape[1] == 3 and len(x) > 1:
        means.append(
            mean[:, 2] + coefficients[:, 1] * x[0].unsqueeze(1) + coefficients[:, 2] * x[1].unsqueeze(1)
        )
    return means


def _log_mass(
    x: Tensor, mean: Tensor, log_scale: Tensor, half_bin: float, log_scale_floor: float, small_mass: float
) -> Tensor:
    """log of the mass that a logistic puts between x - half_bin and x + half_bin, as [S17]'s code has it.

    With s the sigmoid, a and b the standardised ends of the bin: s(a) - s(b), where x = -1 and 1 take all that lies
    beyond, s(a) and 1 - s(b); and where s(a) - s(b) is less than `small_mass`, the density at x times the bin.
    Log-scales are no lower than the floor. s(a) - s(b) = s(a) s(-b) (1 - e^(b - a)), in which nothing cancels.
    """
    log_scale = log_scale.clamp(min=log_scale_floor)
    inverse = torch.exp(-log_scale)
    middle = (x - mean) * inverse
    a, b, bin_width = middle + half_bin * inverse, middle - half_bin * inverse, 2 * half_bin * inverse
    # A bin that is nothing in units of the scale belongs to the density. Its logarithm is discarded; a gradient of
    # 0 * inf would still be NaN.
    narrow = bin_width < (1e-8 if x.dtype == torch.float64 else 1e-4)
    inner = F.logsigmoid(a) + F.logsigmoid(-b) + torch.log(-torch.expm1(-torch.where(narrow, 1.0, bin_width)))
    density = F.logsigmoid(middle) + F.logsigmoid(-middle) - log_scale + math.log(2 * half_bin)
    small = narrow | (inner < (math.log(small_mass) if small_mass > 0 else -math.inf))
    # Half way to the next level: x is exact to its last bit or two.
    lowest, highest = x < half_bin - 1, x > 1 - half_bin
    edge = torch.where(lowest, F.logsigmoid(a), F.logsigmoid(-b))
    return torch.where(lowest | highest, edge, torch.where(small, density, inner))


# ---------------------------------------------------------------------------------------------------------------------
# One entry for every likelihood, the shape that all backends share
# ---------------------------------------------------------------------------------------------------------------------

# name -> nll(params, target, constants). A new likelihood is one function above and one row here.
LIKELIHOODS: dict[str, Callable[[Sequence[Tensor], Tensor, Sequence[float]], Tensor]] = {
    "bernoulli": lambda params, target, _: bernoulli_nll(params[0], target),
    "gaussian": lambda params, target, constants: gaussian_nll(params[0], target, scale=constants[0]),
    "gaussian_learned": lambda params, target, _: gaussian_nll(params[0], target, params[1]),
    "gaussian_per_element": lambda params, target, _: gaussian_nll(params[0], target, params[1]),
    "gaussian_head": lambda params, target, _: gaussian_head_nll(params[0], target),
    "gaussian_bounded_per_element": lambda params, target, bounds: gaussian_nll(
        params[0], target, params[1], logvar_bounds=bounds
    ),
    "gaussian_bounded_head": lambda params, target, bounds: gaussian_head_nll(
        params[0], target, logvar_bounds=bounds
    ),
    "categorical": lambda params, target, constants: categorical_nll(
        params[0], target, ignore_index=int(constants[0])
    ),
    "laplace": lambda params, target, constants: laplace_nll(params[0], target, scale=constants[0]),
    "laplace_learned": lambda params, target, _: laplace_nll(params[0], target, params[1]),
    "laplace_per_element": lambda params, target, _: laplace_nll(params[0], target, params[1]),
    "laplace_head": lambda params, target, _: laplace_head_nll(params[0], target),
    "continuous_bernoulli": lambda params, target, _: continuous_bernoulli_nll(params[0], target),
    "poisson": lambda params, target, _: poisson_nll(params[0], target),
    "student_t": lambda params, target, constants: student_t_nll(
        params[0], target, df=constants[0], scale=constants[1]
    ),
    "student_t_learned": lambda params, target, constants: student_t_nll(
        params[0], target, params[1], df=constants[0]
    ),
    "student_t_per_element": lambda params, target, constants: student_t_nll(
        params[0], target, params[1], df=constants[0]
    ),
    "student_t_head": lambda params, target, constants: student_t_head_nll(
        params[0], target, df=constants[0]
    ),
    "negative_binomial": lambda params, target, _: negative_binomial_nll(params[0], target, *params[1:]),
    "zero_inflated_negative_binomial": lambda params, target, _: zero_inflated_negative_binomial_nll(
        params[0], target, *params[1:]
    ),
    "negative_binomial_logits": lambda params, target, _: negative_binomial_logits_nll(
        params[0], target, *params[1:]
    ),
    "zero_inflated_negative_binomial_logits": lambda params, target, _: (
        zero_inflated_negative_binomial_logits_nll(params[0], target, *params[1:])
    ),
    "discretized_logistic": lambda params, target, constants: discretized_logistic_nll(
        params[0], target, bits=int(constants[0]), log_scale_floor=constants[1], small_mass=constants[2]
    ),
    "discretized_logistic_mixture": lambda params, target, constants: discretized_logistic_mixture_nll(
        params[0],
        target,
        components=int(constants[0]),
        bits=int(constants[1]),
        log_scale_floor=constants[2],
        small_mass=constants[3],
    ),
}

REDUCTIONS = {"none": 0, "sum": 1, "mean": 2}


def nll(
    likelihood: str,
    params: Sequence[Tensor],
    target: Tensor,
    constants: Sequence[float],
    kl: Tensor | None = None,
    beta: Tensor | None = None,
    reduction: int = 0,
) -> tuple[Tensor, Tensor]:
    """(loss, nll): nll (B,) of the likelihood, loss = reduce(nll + beta kl): the negative ELBO ([KW], equation 3).

    `reduction` is a value of `REDUCTIONS`; the mean is over the batch. Without `kl`, loss = reduce(nll).
    """
    rows = LIKELIHOODS[likelihood](params, target, constants)
    total = rows
    if kl is not None:
        total = rows + (kl if beta is None else beta * kl)
    if reduction == REDUCTIONS["sum"]:
        total = total.sum()
    elif reduction == REDUCTIONS["mean"]:
        total = total.mean()
    return total, rows
