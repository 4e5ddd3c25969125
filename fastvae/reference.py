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
  [S17] Salimans, Karpathy, Chen and Kingma, "PixelCNN++", ICLR 2017; and its code, github.com/openai/pixel-cnn.
  [R]   Rybkin, Daniilidis and Levine, "Simple and Effective VAE Training with Calibrated Decoders", ICML 2021.
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


def gaussian_nll(mean: Tensor, target: Tensor, logvar: Tensor | None = None, *, scale: float = 1.0) -> Tensor:
    """-log N(target | mean, variance), (B,), with its constant ([KW], appendix C.2, equation 12).

    Per element 1/2 [ log 2 pi + log s^2 + (x - m)^2 / s^2 ]. The variance s^2 is `scale`^2, or e^logvar for a `logvar`
    of mean's shape, or one e^logvar for all where `logvar` is 0-dimensional (the learned scale of [R]).
    """
    dtype = _compute_dtype(mean)
    distance = _read_target(target, dtype) - mean.to(dtype)
    if logvar is None:
        standardised, log_variance = distance / scale, 2 * math.log(scale)
        return _sum_event((standardised * standardised + (math.log(2 * math.pi) + log_variance)) / 2)
    log_variances = logvar.to(dtype)
    standardised = distance * torch.exp(log_variances / -2)
    return _sum_event((standardised * standardised + (math.log(2 * math.pi) + log_variances)) / 2)


def gaussian_head_nll(params: Tensor, target: Tensor) -> Tensor:
    """`gaussian_nll` with mean and log-variance packed along dimension 1: `params` (B, 2C, ...), mean first."""
    mean, logvar = params.chunk(2, dim=1)
    return gaussian_nll(mean, target, logvar)


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
