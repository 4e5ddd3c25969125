"""Samples from the posterior, its KL, and free bits."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .continuous import bounded_logvar
from .conventions import compute_dtype, scaled, sum_event
from .noise import draw_seed, normal_noise

__all__ = ["free_bits", "gaussian_kl", "log_variance", "reparameterize_kl", "sample_log_probs"]


def gaussian_kl(
    mu: Tensor,
    logvar: Tensor | None = None,
    prior_mu: Tensor | None = None,
    prior_logvar: Tensor | None = None,
    *,
    form: str = "logvar",
    constants: Sequence[float] = (),
    balance: float | None = None,
    reduction: str = "event",
) -> Tensor:
    """KL( N(mu, e^logvar) || N(prior_mu, e^prior_logvar) ), for diagonal covariances.

    The prior is N(0, 1) if none is given. Per element, the KL ([RW], equation A.23, for one dimension; for a standard
    normal prior [KW], appendix B) is

        1/2 [ (mu - prior_mu)^2 e^-prior_logvar + e^v - 1 - v ],    v = logvar - prior_logvar

    Without `logvar`, `mu` is a packed head, (B, 2 L, ...), and so is `prior_mu` without `prior_logvar`. `form` and
    `constants` say what `logvar` and `prior_logvar` mean (see `log_variance`). With `balance` = a, the gradient is that
    of a KL(sg(q) || p) + (1 - a) KL(q || sg(p)), where sg stops the gradient ([H], equation 2).
    `reduction="event"` sums each row to (B,), and `"none"` keeps the elements.
    """
    dtype = compute_dtype(mu)
    posterior = mean_and_logvar(mu, logvar, form, constants, dtype)
    prior = None if prior_mu is None else mean_and_logvar(prior_mu, prior_logvar, form, constants, dtype)
    return _reduced(_balanced_kl(posterior, prior, balance), reduction)


def reparameterize_kl(
    mu: Tensor,
    logvar: Tensor | None = None,
    prior_mu: Tensor | None = None,
    prior_logvar: Tensor | None = None,
    *,
    form: str = "logvar",
    constants: Sequence[float] = (),
    balance: float | None = None,
    reduction: str = "event",
    samples: int | None = None,
    generator: torch.Generator | None = None,
    seed: Tensor | None = None,
    row_offset: int = 0,
    eps: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """z = mu + e^(logvar / 2) eps, eps ~ N(0, 1) ([KW], section 2.4), and the `gaussian_kl`.

    z has mu's dtype, and mu's shape or (samples, *shape). The noise is `eps` if it is given. Otherwise it is generated
    from `seed`, or from a seed drawn from `generator` (or from torch's default generator).
    """
    dtype = compute_dtype(mu)
    # The conversion is done once for z and the KL, as in `gaussian_kl`.
    mean, v = mean_and_logvar(mu, logvar, form, constants, dtype)
    shape = mean.shape if samples is None else (samples, *mean.shape)
    if eps is None:
        if seed is None:
            seed = draw_seed(mu.device, generator)
        rows, dims, draws = mean.shape[0], math.prod(mean.shape[1:]), 1 if samples is None else samples
        eps = normal_noise(seed, row_offset, rows, dims, draws, dtype).reshape(shape)
    z = mean + torch.exp(v / 2) * eps.to(dtype)
    prior = None if prior_mu is None else mean_and_logvar(prior_mu, prior_logvar, form, constants, dtype)
    return z.to(mu.dtype), _reduced(_balanced_kl((mean, v), prior, balance), reduction)


def sample_log_probs(
    mu: Tensor,
    logvar: Tensor | None = None,
    prior_mu: Tensor | None = None,
    prior_logvar: Tensor | None = None,
    *,
    samples: int,
    form: str = "logvar",
    constants: Sequence[float] = (),
    stl: bool = False,
    generator: torch.Generator | None = None,
    seed: Tensor | None = None,
    row_offset: int = 0,
    eps: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """K draws z, (K, B, ...), with log q(z | x) and log p(z), (K, B).

    As z = mu + sigma eps, log q(z | x) = -sum (eps^2 / 2 + log sigma + log(2 pi) / 2). With `stl`, the parameters of q
    are constants in log q, so that it has no gradient but the one through z ([RWD]).
    """
    dtype = compute_dtype(mu)
    mean, v = mean_and_logvar(mu, logvar, form, constants, dtype)
    if eps is None:
        if seed is None:
            seed = draw_seed(mu.device, generator)
        rows, dims = mean.shape[0], math.prod(mean.shape[1:])
        eps = normal_noise(seed, row_offset, rows, dims, samples, dtype).reshape(samples, *mean.shape)
    eps = eps.to(dtype)
    z = mean + torch.exp(v / 2) * eps
    if stl:
        fixed_v = v.detach()
        # This is (z - mu') / sigma' for constants mu' and sigma' that equal mu and sigma. Its value is the noise, which
        # a difference of z and mu would lose where sigma is small.
        root = torch.exp(fixed_v / -4).clamp(max=torch.finfo(dtype).max)
        standard = _change(mean) * root * root + eps * torch.exp(_change(v) / 2)
        log_q = _log_density(standard.square(), fixed_v)
    else:
        log_q = _log_density(eps.square(), v)
    if prior_mu is None:
        log_p = _log_density(z.square(), torch.zeros_like(v))
    else:
        prior_mean, prior_v = mean_and_logvar(prior_mu, prior_logvar, form, constants, dtype)
        log_p = _log_density(scaled(z - prior_mean, prior_v / 2).square(), prior_v)
    # A view, so that a hook on the result sees only its own gradient, and not those of the densities.
    return z.to(mu.dtype).view_as(z), log_q, log_p


def _change(x: Tensor) -> Tensor:
    """A 0 that depends on x as x itself does."""
    return torch.where(x.isfinite(), x - x.detach(), 0)


def _log_density(square: Tensor, logvar: Tensor) -> Tensor:
    """The log-density of every draw and row, (K, B), from the squared standardised distances (K, B, ...)."""
    terms = -(square + (logvar + math.log(2 * math.pi))) / 2
    return terms.flatten(2).sum(2) if terms.dim() > 2 else terms


def log_variance(v: Tensor, form: str, constants: Sequence[float]) -> Tensor:
    """log sigma^2 for the number v of an encoder. The names and constants are those of `_spec.SCALE_FORMS`."""
    if form == "logvar":
        return v
    if form == "logvar_clamp":
        return v.clamp(*constants)
    if form == "logvar_bounds":
        return bounded_logvar(v, constants)
    if form == "log_std":
        soft, eps = constants
        v = soft_clamp(v, soft)
        return 2 * (v if eps == 0 else torch.logaddexp(v, torch.full_like(v, math.log(eps))))
    (eps,) = constants
    if form == "variance":
        return v if eps == 0 else torch.logaddexp(v, torch.full_like(v, math.log(eps)))
    if form != "softplus":
        raise ValueError(f"fastvae.reference: unknown `form` {form!r}")
    softplus = torch.logaddexp(v, torch.zeros_like(v)) + eps
    if eps > 0:
        return 2 * softplus.log()
    # Far below 0, softplus(v) is e^v, which may underflow.
    far = v < -40
    return 2 * torch.where(far, v, torch.where(far, 1.0, softplus).log())


def soft_clamp(x: Tensor, bound: float) -> Tensor:
    """bound tanh(x / bound) ([V], appendix), or x itself for a bound of 0."""
    return x if bound == 0 else bounded_logvar(x, (-bound, bound))


def mean_and_logvar(
    mu: Tensor, logvar: Tensor | None, form: str, constants: Sequence[float], dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """The mean and log sigma^2 of a Gaussian in `dtype`.

    Each tensor is converted once: with two conversions, both gradients of a half tensor would be rounded before they
    are added.
    """
    mean, v = (mu.to(dtype).chunk(2, 1)) if logvar is None else (mu.to(dtype), logvar.to(dtype))
    if form == "log_std":
        mean = soft_clamp(mean, constants[0])
    return mean, log_variance(v, form, constants)


def _balanced_kl(
    posterior: tuple[Tensor, Tensor], prior: tuple[Tensor, Tensor] | None, balance: float | None
) -> Tensor:
    if prior is None or balance is None:
        return _kl(posterior, prior)
    fixed_posterior = posterior[0].detach(), posterior[1].detach()
    fixed_prior = prior[0].detach(), prior[1].detach()
    return balance * _kl(fixed_posterior, prior) + (1 - balance) * _kl(posterior, fixed_prior)


def _kl(posterior: tuple[Tensor, Tensor], prior: tuple[Tensor, Tensor] | None) -> Tensor:
    distance, v = posterior
    if prior is not None:
        # The distance is scaled by half of the exponent before it is squared, so that the square of a large distance
        # over a large variance stays finite.
        distance = scaled(distance - prior[0], prior[1] / 2)
        v = v - prior[1]
    return distance * distance / 2 + expm1_minus(v) / 2


def _reduced(kl: Tensor, reduction: str) -> Tensor:
    return sum_event(kl) if reduction == "event" else kl


def free_bits(kl: Tensor, nats: float, *, batch_mean: bool = True) -> Tensor:
    """The KL per row with free bits, (B,). A dimension whose KL is below `nats` counts as `nats` ([K16], appendix C.8).

    `kl` is per dimension, (B, ...). With `batch_mean`, as in [K16], the mean of a dimension over the batch is compared
    with `nats`: the mean of the rows is sum_j max(nats, mean_b kl_bj), and the gradients agree too. Without it, every
    row is compared by itself: max(nats, kl_bj).
    """
    if not batch_mean:
        return sum_event(torch.where(kl > nats, kl, nats))
    # A product with zeros and ones, which is several times faster than torch.where with a mask that rows share.
    paid = kl.detach().mean(0) > nats
    return sum_event(kl * paid) + nats * (~paid).sum(dtype=kl.dtype)


def expm1_minus(v: Tensor) -> Tensor:
    """e^v - 1 - v = expm1(v) - v, accurate to the last digits also near 0, as are both derivatives.

    Near 0 the result is v^2 / 2, while expm1(v) and v are each as large as v, so their difference has no correct digit
    if v is below the square root of the precision. There, the Taylor series v^2/2 (1 + v/3 (1 + v/4 (...))) is used.
    Up to v^20 / 20! it is exact in float64 for |v| < 1. From 1 on, the subtraction costs at most two bits.
    """
    near = v.abs() < 1
    # Outside its range, the series is evaluated at 0. where() discards its value, but without this the gradient could
    # be 0 * inf, which is NaN.
    small = torch.where(near, v, 0.0)
    series = torch.ones_like(small)
    for n in range(20, 2, -1):
        series = 1 + series * small / n
    return torch.where(
        near, small * small / 2 * series, torch.exp(v) - (1 + torch.where(v == math.inf, 0.0, v))
    )
