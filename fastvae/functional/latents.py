"""z and its KL."""

from typing import Any

import torch
from torch import Tensor

from ..backends import choose
from ..reference.noise import draw_seed
from .checks import (
    check_choice,
    check_floating,
    check_like,
    device_message,
    dtype_name,
    is_dense,
    layout_message,
)

__all__ = ["gaussian_kl", "reparameterize_kl"]


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
    """Draw z from the posterior N(mu, e^logvar) and give its KL from the prior, in one pass.

    z = mu + e^(logvar / 2) eps (Kingma and Welling 2014, section 2.4); the KL is that of `gaussian_kl`. The noise is
    never stored: the backward pass makes it again.

    Args:
        mu, logvar: (B, ...), one floating dtype. Both halves of a `chunk(2, dim=1)` are read in place.
        prior_mu, prior_logvar: like `mu`, together; without them the prior is N(0, 1).
        samples: None gives z the shape of `mu`; K gives (K, B, ...), K independent draws. There is one KL either way.
        generator: draws the seed from this torch.Generator (on mu's device) and not from torch's default one. It cannot
            be traced by torch.compile.
        seed: (seed, offset), int64 (2,), on mu's device: the same integers of noise on every device and backend.
            Without it, what a generator's state makes of a GPU's noise is the backend's, and differs in compiled code.
            Excludes `generator`.
        row_offset: the place of row 0 in the noise, so that a piece of a batch gets its rows of the batch's noise.
        eps: noise to use, of mu's dtype and z's shape. Excludes `seed` and `generator`.

    Returns:
        (z, kl): z of mu's dtype; kl (B,) in nats, float32 (float64 for float64).

    Raises:
        TypeError: a dtype or kind that does not fit, or half a prior.
        ValueError: a shape, device or value that does not fit, or two sources of noise.
    """
    if choose.fast_path is not None and not torch.compiler.is_compiling():
        usual = prior_mu is None and prior_logvar is None and samples is None
        usual = usual and generator is None and seed is None and eps is None
        if usual and type(row_offset) is int and row_offset == 0:
            result = choose.fast_path.reparameterize_kl(mu, logvar)
            if result is not None:
                return result
    where = "reparameterize_kl"
    _check_posterior(where, mu, logvar, prior_mu, prior_logvar)
    if samples is not None:
        if not isinstance(samples, int):
            raise TypeError(
                f"fastvae.{where}: `samples` must be an int or None, got {type(samples).__name__}"
            )
        if samples < 1:
            raise ValueError(f"fastvae.{where}: `samples` must be at least 1, got {samples}")
    if not isinstance(row_offset, int):
        raise TypeError(f"fastvae.{where}: `row_offset` must be an int, got {type(row_offset).__name__}")
    if not 0 <= row_offset < 2**63:
        raise ValueError(f"fastvae.{where}: `row_offset` must be at least 0 and below 2^63, got {row_offset}")
    if eps is not None:
        if seed is not None or generator is not None:
            raise ValueError(
                f"fastvae.{where}: `eps` is the noise itself; it excludes `{'generator' if seed is None else 'seed'}`"
            )
        _check_eps(where, eps, mu, samples)
    elif seed is not None:
        if generator is not None:
            raise ValueError(f"fastvae.{where}: `seed` and `generator` exclude each other, got both")
        _check_seed(where, seed, mu)
    elif generator is not None:
        _check_generator(where, generator, mu)

    if eps is None and seed is None and torch.compiler.is_compiling():
        if generator is not None:
            raise RuntimeError(
                f"fastvae.{where}: `generator` cannot be traced by torch.compile; pass `seed`, or use torch.manual_seed"
            )
        # Two draws inside the ops would look identical to the compiler, and it would merge them. randint it knows to
        # be random.
        seed = draw_seed(mu.device)
    return choose.for_tensor(mu).reparameterize_kl(
        mu, logvar, prior_mu, prior_logvar, samples, seed, row_offset, eps, generator
    )


def gaussian_kl(
    mu: Tensor,
    logvar: Tensor,
    prior_mu: Tensor | None = None,
    prior_logvar: Tensor | None = None,
    *,
    reduction: str = "event",
) -> Tensor:
    """KL divergence of the diagonal Gaussian N(mu, e^logvar) from the prior, in nats.

    Per element 1/2 [ (mu - prior_mu)^2 e^-prior_logvar + e^v - 1 - v ] with v = logvar - prior_logvar (Kingma and
    Welling 2014, appendix B, for the standard normal prior; Rasmussen and Williams 2006, equation A.23, for any).
    Computed so that a posterior close to its prior keeps its digits.

    Args:
        mu, logvar: (B, ...), one floating dtype.
        prior_mu, prior_logvar: like `mu`, together; without them the prior is N(0, 1).
        reduction: `"event"` sums every row to (B,); `"none"` keeps the elements, for free bits or the KL per dimension.

    Returns:
        (B,), or the shape of `mu`; float32 (float64 for float64).

    Raises:
        TypeError: a dtype or kind that does not fit, or half a prior.
        ValueError: a shape or device that does not fit, or an unknown reduction.
    """
    usual = prior_mu is None and prior_logvar is None and reduction in ("event", "none")
    if usual and choose.fast_path is not None and not torch.compiler.is_compiling():
        result = choose.fast_path.gaussian_kl(mu, logvar, reduction == "none")
        if result is not None:
            return result
    _check_posterior("gaussian_kl", mu, logvar, prior_mu, prior_logvar)
    check_choice("gaussian_kl", "reduction", reduction, ("event", "none"))
    return choose.for_tensor(mu).gaussian_kl(mu, logvar, prior_mu, prior_logvar, reduction == "none")


def _check_posterior(where: str, mu: Any, logvar: Any, prior_mu: Any, prior_logvar: Any) -> None:
    check_floating(where, "mu", mu)
    check_like(where, "logvar", logvar, "mu", mu)
    if prior_mu is not None or prior_logvar is not None:
        if prior_mu is None or prior_logvar is None:
            absent = "prior_mu" if prior_mu is None else "prior_logvar"
            raise TypeError(
                f"fastvae.{where}: `prior_mu` and `prior_logvar` go together, `{absent}` is missing"
            )
        check_like(where, "prior_mu", prior_mu, "mu", mu)
        check_like(where, "prior_logvar", prior_logvar, "mu", mu)


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
    # Of tensors without a device of their own (meta), every index will do.
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
