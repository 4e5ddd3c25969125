"""The latent variable z and its KL."""

import math
from typing import Any

import torch
from torch import Tensor

from ..backends import choose
from ..reference.noise import draw_seed
from .checks import (
    check_choice,
    check_floating,
    check_like,
    checked_int,
    checked_not_negative,
    device_message,
    dtype_name,
    is_dense,
    layout_message,
)
from .forms import ScaleForm, kernel_form
from .ranges import has_values

__all__ = ["gaussian_kl", "group_coefficients", "reparameterize_kl", "sample_log_probs"]


_REDUCTIONS = ("event", "channel", "none")


def reparameterize_kl(
    mu: Tensor,
    logvar: Tensor | None = None,
    prior_mu: Tensor | None = None,
    prior_logvar: Tensor | None = None,
    *,
    form: str | ScaleForm = "logvar",
    balance: float | None = None,
    reduction: str = "event",
    samples: int | None = None,
    generator: torch.Generator | None = None,
    seed: Tensor | None = None,
    row_offset: int = 0,
    eps: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Draw z from a diagonal Gaussian posterior N(mu, sigma^2) and compute its KL from the prior, in one pass.

    z = mu + sigma eps (Kingma and Welling 2014, section 2.4), and the KL is that of `gaussian_kl`. The noise is never
    stored; the backward pass generates it again.

    Args:
        mu, logvar: (B, ...), of one floating dtype. Without `logvar`, `mu` is a packed head (B, 2 L, ...), whose halves
            along dimension 1 are the two; it is read in place and gets one gradient. The two halves of a
            `chunk(2, dim=1)` are read in place as well.
        prior_mu, prior_logvar: like z, both or neither; without them the prior is N(0, 1). Beside a packed posterior,
            `prior_mu` may also be a packed head.
        form: what `logvar` (or the second half of the head) and `prior_logvar` mean: `"logvar"` for log sigma^2,
            `"log_std"` for log sigma, `"softplus"` for sigma = softplus(v) + 1e-4, `"variance"` for
            sigma^2 = e^v + 1e-4; or one of `fastvae.posteriors`, for clamps and other constants.
        balance: as for `gaussian_kl`.
        reduction: `"event"` gives one KL per row, `"channel"` and `"none"` those of `gaussian_kl`.
        samples: None gives z the shape of `mu`. K gives z of shape (K, B, ...), K independent draws. In both cases
            there is one KL per row.
        generator: a torch.Generator on mu's device that draws the seed in place of torch's default one. It cannot be
            traced by torch.compile.
        seed: (seed, offset), int64 (2,), on mu's device. It gives the same random integers on every device and backend.
            Without it, the noise that a generator's state gives on a GPU depends on the backend, and is different in
            compiled code. It excludes `generator`.
        row_offset: the position of row 0 in the noise. A part of a batch thus gets its own rows of the batch's noise.
        eps: the noise to use, of mu's dtype and z's shape. It excludes `seed` and `generator`.

    Returns:
        (z, kl): z has mu's dtype; kl is (B,) in nats, float32 (float64 for float64).

    Raises:
        TypeError: If an argument has the wrong type or dtype, or only one of the prior's tensors is passed.
        ValueError: If a shape, device or value is wrong, or there are two sources of noise.
    """
    where = "reparameterize_kl"
    name, constants = kernel_form(where, form)
    if choose.fast_path is not None and not torch.compiler.is_compiling():
        default = prior_mu is None and prior_logvar is None and samples is None and balance is None
        default = default and generator is None and seed is None and eps is None
        default = default and (reduction == "event" or reduction == "none")
        if default and type(row_offset) is int and row_offset == 0:
            result = choose.fast_path.reparameterize_kl(mu, logvar, name, constants, reduction == "none")
            if result is not None:
                return result
    mean = _check_posterior(where, mu, logvar, prior_mu, prior_logvar)
    check_choice(where, "reduction", reduction, _REDUCTIONS)
    balance = _checked_balance(where, balance, prior_mu)
    if samples is not None:
        if not isinstance(samples, int):
            raise TypeError(
                f"fastvae.{where}: `samples` must be an int or None, got {type(samples).__name__}"
            )
        if samples < 1:
            raise ValueError(f"fastvae.{where}: `samples` must be at least 1, got {samples}")
    seed = _checked_noise(where, mean, samples, generator, seed, row_offset, eps)
    z, kl = choose.for_tensor(mu).reparameterize_kl(
        mu,
        logvar,
        prior_mu,
        prior_logvar,
        name,
        constants,
        balance,
        reduction != "event",
        samples,
        seed,
        row_offset,
        eps,
        generator,
    )
    return z, _per_channel(kl) if reduction == "channel" else kl


def gaussian_kl(
    mu: Tensor,
    logvar: Tensor | None = None,
    prior_mu: Tensor | None = None,
    prior_logvar: Tensor | None = None,
    *,
    form: str | ScaleForm = "logvar",
    balance: float | None = None,
    reduction: str = "event",
) -> Tensor:
    """KL divergence of the diagonal Gaussian N(mu, sigma^2) from the prior, in nats.

    Per element, 1/2 [ (mu - prior_mu)^2 e^-prior_logvar + e^v - 1 - v ] with v = logvar - prior_logvar (Kingma and
    Welling 2014, appendix B, for the standard normal prior; Rasmussen and Williams 2006, equation A.23, for any).
    It is computed without cancellation for a posterior close to its prior.

    Args:
        mu, logvar: (B, ...), of one floating dtype; or a packed head (B, 2 L, ...) alone.
        prior_mu, prior_logvar: like `mu` and `logvar`, both or neither; without them the prior is N(0, 1). Beside a
            packed posterior, `prior_mu` may also be a packed head.
        form: what `logvar` and `prior_logvar` mean, as for `reparameterize_kl`.
        balance: the share of the gradient that reaches the prior, from 0 to 1; the rest reaches the posterior. It is
            that of balance KL(sg(q) || p) + (1 - balance) KL(q || sg(p)), where sg stops the gradient (the KL balancing
            of DreamerV2, Hafner et al. 2021, equation 2). The value does not change. It needs a prior.
        reduction: `"event"` sums every row to (B,); `"channel"` sums over all dimensions but the first two, to (B, C),
            which also gives the KL by group if `mu` is (B, groups, size); `"none"` keeps the elements.

    Returns:
        (B,), (B, C), or the shape of `mu`; float32 (float64 for float64).

    Raises:
        TypeError: If an argument has the wrong type or dtype, or only one of the prior's tensors is passed.
        ValueError: If a shape, device or value is wrong, or `reduction` or `form` is unknown.
    """
    where = "gaussian_kl"
    name, constants = kernel_form(where, form)
    default = prior_mu is None and prior_logvar is None and balance is None
    default = default and (reduction == "event" or reduction == "none")
    if default and choose.fast_path is not None and not torch.compiler.is_compiling():
        result = choose.fast_path.gaussian_kl(mu, logvar, name, constants, reduction == "none")
        if result is not None:
            return result
    _check_posterior(where, mu, logvar, prior_mu, prior_logvar)
    check_choice(where, "reduction", reduction, _REDUCTIONS)
    balance = _checked_balance(where, balance, prior_mu)
    kl: Tensor = choose.for_tensor(mu).gaussian_kl(
        mu, logvar, prior_mu, prior_logvar, name, constants, balance, reduction != "event"
    )
    return _per_channel(kl) if reduction == "channel" else kl


def sample_log_probs(
    mu: Tensor,
    logvar: Tensor | None = None,
    prior_mu: Tensor | None = None,
    prior_logvar: Tensor | None = None,
    *,
    samples: int,
    form: str | ScaleForm = "logvar",
    stl: bool = False,
    generator: torch.Generator | None = None,
    seed: Tensor | None = None,
    row_offset: int = 0,
    eps: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Draw K samples z from the posterior of every row, and compute log q(z | x) and log p(z), in one pass.

    These are what bounds with several draws need (Burda et al. 2016) and estimates of log p(x). The noise is never
    stored; the backward pass generates it again.

    Args:
        mu, logvar, prior_mu, prior_logvar, form: as for `reparameterize_kl`; `mu` alone is a packed head.
        samples: K, the number of draws for each row.
        stl: leave the score out of the gradient of log q: it then has no gradient but the one through z ("Sticking the
            Landing", Roeder et al. 2017). The values are the same.
        generator, seed, row_offset: as for `reparameterize_kl`, which generates the same noise.
        eps: the noise to use, (K, B, ...), of mu's dtype. It gets no gradient.

    Returns:
        (z, log_q, log_p): z is (K, B, ...), in mu's dtype; log_q and log_p are (K, B) in nats, with their constants,
        float32 (float64 for float64).

    Raises:
        TypeError: If an argument has the wrong type or dtype, or only one of the prior's tensors is passed.
        ValueError: If a shape, device or value is wrong, `eps` requires a gradient, or there are two sources of noise.
    """
    where = "sample_log_probs"
    name, constants = kernel_form(where, form)
    mean = _check_posterior(where, mu, logvar, prior_mu, prior_logvar)
    checked_int(where, "samples", samples, 1, None)
    if isinstance(eps, Tensor) and eps.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            f"fastvae.{where}: `eps` requires a gradient, which it does not get; pass eps.detach()"
        )
    seed = _checked_noise(where, mean, samples, generator, seed, row_offset, eps)
    z, log_q, log_p = choose.for_tensor(mu).sample_log_probs(
        mu, logvar, prior_mu, prior_logvar, name, constants, stl, samples, seed, row_offset, eps, generator
    )
    return z, log_q, log_p


def group_coefficients(kl: Tensor, alpha: Tensor | None = None) -> Tensor:
    """NVAE's coefficients of the KL of every group of latents, (G,), with mean 1 and no gradient.

    The coefficient of a group is proportional to its mean KL over the batch plus 0.01, divided by alpha (Vahdat and
    Kautz 2020, section 3.2, and the function kl_balancer of their code). A group with a small KL thus costs less::

        kl = torch.stack([kl of every group], 1)               # (B, G)
        kl = (kl * functional.group_coefficients(kl)).sum(1)   # (B,)

    Args:
        kl: (B, G), the KL of every row and group, as from `reduction="channel"`.
        alpha: (G,), the size of every group relative to the smallest; 1 for every group by default.

    Raises:
        TypeError: If an argument is not a floating-point tensor.
        ValueError: If a shape or device is wrong, or an `alpha` is not positive and finite. Its values are checked on
            the CPU only, because reading them would wait for the GPU.
    """
    where = "group_coefficients"
    check_floating(where, "kl", kl)
    if kl.dim() != 2:
        raise ValueError(f"fastvae.{where}: `kl` must have shape (B, G), got {tuple(kl.shape)}")
    with torch.no_grad():
        size = kl.abs().mean(0) + 0.01
        if alpha is not None:
            check_floating(where, "alpha", alpha)
            if alpha.shape != kl.shape[1:]:
                raise ValueError(
                    f"fastvae.{where}: `alpha` must have one value per group of `kl`, shape {tuple(kl.shape[1:])}, "
                    f"got {tuple(alpha.shape)}"
                )
            if alpha.device != kl.device:
                raise ValueError(device_message(where, "alpha", alpha, "kl", kl))
            if not torch.compiler.is_compiling() and alpha.is_cpu and has_values(alpha):
                for group, value in enumerate(alpha.tolist()):
                    if not 0.0 < value < math.inf:
                        raise ValueError(
                            f"fastvae.{where}: `alpha` must be positive and finite, got {value} for group {group}"
                        )
            size = size / alpha
        return size / size.mean()


def _per_channel(kl: Tensor) -> Tensor:
    return kl.flatten(2).sum(2) if kl.dim() > 2 else kl


def _check_posterior(where: str, mu: Any, logvar: Any, prior_mu: Any, prior_logvar: Any) -> Tensor:
    """Check the tensors and return the mean, which is the first half of a packed head."""
    check_floating(where, "mu", mu)
    if logvar is None:
        if mu.dim() < 2 or mu.shape[1] % 2 != 0:
            raise ValueError(
                f"fastvae.{where}: without `logvar`, `mu` must be a packed head (B, 2 L, ...), mean and scale along "
                f"dimension 1, got {tuple(mu.shape)}"
            )
        mean: Tensor = mu.narrow(1, 0, mu.shape[1] // 2)
    else:
        check_like(where, "logvar", logvar, "mu", mu)
        mean = mu
    if logvar is None and prior_mu is not None and prior_logvar is None:
        check_like(where, "prior_mu", prior_mu, "mu", mu)
    elif prior_mu is not None or prior_logvar is not None:
        if prior_mu is None or prior_logvar is None:
            missing = "prior_mu" if prior_mu is None else "prior_logvar"
            raise TypeError(
                f"fastvae.{where}: `prior_mu` and `prior_logvar` must be passed together, but `{missing}` is missing"
            )
        check_like(where, "prior_mu", prior_mu, "mu", mean)
        check_like(where, "prior_logvar", prior_logvar, "mu", mean)
    return mean


def _checked_balance(where: str, balance: Any, prior_mu: Tensor | None) -> float | None:
    if balance is None:
        return None
    value = checked_not_negative(where, "balance", balance)
    if value > 1.0:
        raise ValueError(f"fastvae.{where}: `balance` must be from 0 to 1, got {value}")
    if prior_mu is None:
        raise ValueError(f"fastvae.{where}: `balance` {value} needs `prior_mu` and `prior_logvar`")
    return value


def _checked_noise(
    where: str, mean: Tensor, samples: int | None, generator: Any, seed: Any, row_offset: Any, eps: Any
) -> Tensor | None:
    """Check the source of the noise and return the seed, which compiled code needs."""
    if not isinstance(row_offset, int):
        raise TypeError(f"fastvae.{where}: `row_offset` must be an int, got {type(row_offset).__name__}")
    if not 0 <= row_offset < 2**63:
        raise ValueError(f"fastvae.{where}: `row_offset` must be at least 0 and below 2^63, got {row_offset}")
    if eps is not None:
        if seed is not None or generator is not None:
            raise ValueError(
                f"fastvae.{where}: `eps` and `{'generator' if seed is None else 'seed'}` exclude each other, got both"
            )
        _check_eps(where, eps, mean, samples)
    elif seed is not None:
        if generator is not None:
            raise ValueError(f"fastvae.{where}: `seed` and `generator` exclude each other, got both")
        _check_seed(where, seed, mean)
    elif generator is not None:
        _check_generator(where, generator, mean)

    if eps is None and seed is None and torch.compiler.is_compiling():
        if generator is not None:
            raise RuntimeError(
                f"fastvae.{where}: `generator` cannot be traced by torch.compile; pass `seed`, or use torch.manual_seed"
            )
        # The compiler would merge two draws inside the ops, because they look identical to it. It knows that randint is
        # random.
        return draw_seed(mean.device)
    return seed


def _check_seed(where: str, seed: Any, mu: Tensor) -> None:
    if not isinstance(seed, Tensor):
        raise TypeError(
            f"fastvae.{where}: `seed` must be an int64 Tensor (seed, offset), got {type(seed).__name__}; "
            f"did you mean torch.tensor([seed, 0])?"
        )
    if not is_dense(seed):
        raise TypeError(layout_message(where, "seed", seed))
    if seed.dtype != torch.int64:
        raise TypeError(f"fastvae.{where}: `seed` must be int64, got {dtype_name(seed.dtype)}")
    if seed.dim() != 1 or seed.shape[0] != 2:
        raise ValueError(
            f"fastvae.{where}: `seed` must have shape (2,): (seed, offset), got {tuple(seed.shape)}"
        )
    if seed.device != mu.device:
        raise ValueError(device_message(where, "seed", seed, "mu", mu))


def _check_generator(where: str, generator: Any, mu: Tensor) -> None:
    if not isinstance(generator, torch.Generator):
        raise TypeError(
            f"fastvae.{where}: `generator` must be a torch.Generator, got {type(generator).__name__}; "
            f"did you mean torch.Generator().manual_seed(...)?"
        )
    # Meta tensors have no real device, so any index is accepted for them.
    known = generator.device.index is not None and mu.device.index is not None
    if generator.device.type != mu.device.type or (known and generator.device.index != mu.device.index):
        raise ValueError(
            f"fastvae.{where}: `generator` must be on the device of `mu`, {mu.device}, got {generator.device}; "
            f"did you mean torch.Generator(mu.device)?"
        )


def _check_eps(where: str, eps: Any, mu: Tensor, samples: int | None) -> None:
    if samples is None:
        check_like(where, "eps", eps, "mu", mu)
        return
    if not isinstance(eps, Tensor):
        raise TypeError(f"fastvae.{where}: `eps` must be a Tensor, got {type(eps).__name__}")
    expected = (samples, *mu.shape)
    if eps.shape != expected:
        raise ValueError(
            f"fastvae.{where}: `eps` must have shape (samples, *mu.shape) = {tuple(expected)}, got {tuple(eps.shape)}"
        )
    if eps.shape[0] > 0:
        check_like(where, "eps", eps[0], "mu", mu)
