"""Multi-sample bounds: `IWAE`, with three estimators of its gradient.

Sources: [B] Burda, Grosse and Salakhutdinov 2016, Importance Weighted Autoencoders; [R] Roeder, Wu and Duvenaud 2017,
Sticking the Landing; [T] Tucker, Lawson, Gu and Maddison 2019, Doubly Reparameterized Gradient Estimators.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .backends import choose
from .elbo import ELBO
from .functional import sample_log_probs
from .functional.checks import check_choice, checked_int
from .functional.forms import ScaleForm
from .functional.ranges import warn_of_non_finite_weights
from .functional.values import check_weight_values
from .likelihoods.base import has_kernel, nll_of_draws
from .priors import Prior
from .reference.loss import reduce_rows

__all__ = ["IWAE", "IWAEOutput", "PosteriorDraws"]

ESTIMATORS = ("iwae", "stl", "dreg")


class PosteriorDraws(NamedTuple):
    """K draws from the posterior of every row, and their densities."""

    z: Tensor
    """(K, B, ...): the draws."""
    log_q: Tensor
    """log q(z | x), (K, B), in nats. With the estimators "stl" and "dreg" it has no gradient but the one through z."""
    log_p: Tensor
    """log p(z) under the prior, (K, B), in nats."""


class IWAEOutput(NamedTuple):
    """The result of an `IWAE` call. Only the loss has a gradient."""

    loss: Tensor
    """The negative bound, reduced: a scalar, or (B,) with reduction "none". Its gradient is that of the estimator."""
    bound: Tensor
    """The lower bound of log p(x) of every row, (B,), in nats."""
    nll: Tensor
    """-log p(x | z) of every draw, (K, B), in nats."""
    kl: Tensor
    """log q(z | x) - log p(z) of every draw, (K, B), in nats. Its mean over draws estimates the KL."""
    ess: Tensor
    """The effective sample size of every row, 1 / sum of squared normalised weights, from 1 to K, (B,)."""


class IWAE(ELBO):
    """The importance-weighted bound of log p(x) from K draws of z ([B], equation 8), in nats::

        iwae = fastvae.IWAE("bernoulli", samples=50, estimator="dreg")

        for x in loader:
            mu, logvar = encoder(x)
            out = iwae(decoder, x, mu, logvar)
            optimizer.zero_grad()
            out.loss.backward()
            optimizer.step()

    The bound of a row is log 1/K sum_k w_k with log w = log p(x | z) + log p(z) - log q(z | x). It grows with K towards
    log p(x); with K = 1 it is the ELBO with a KL estimated from the draw. The data are read in place and not repeated.

    Args:
        likelihood: as for `fastvae.ELBO`.
        samples: K, the number of draws for each row.
        estimator: how the gradient is estimated. All estimators give the same value of the bound.

            - `"iwae"`: the gradient of the bound ([B], equation 14). The signal-to-noise ratio of the encoder's
              gradient falls with K, as K^-1/2 (Rainforth et al. 2018).
            - `"dreg"`: the doubly reparameterised gradient ([T], equation 8), unbiased like the first; the ratio rises
              with K, as K^1/2. The decoder's gradient is the same.
            - `"stl"`: omits the score of q ([R]). For K = 1, it is unbiased, and has no variance if q is the true
              posterior. For larger K, it is biased ([T], section 4).
        beta: the factor of log q - log p in the weights. Only 1 gives a bound of log p(x).
        reduction: `"mean"` (or `"batchmean"`), `"sum"` or `"none"`, over rows, as for `fastvae.ELBO`.
        chunk: the number of draws to evaluate at a time, to save memory. The decoder then runs once more in the
            backward pass, so it must be passed as a function.
        posterior: the form of the scale, as for `fastvae.ELBO`.
        prior: a module of `fastvae.priors`; None is the standard normal. The bound takes its density, so it need not
            have an analytic KL. Its parameters are trained like the decoder's, with every estimator. If `posterior` is
            not `"logvar"`, a `VampPrior` must be given its `form`.
    """

    _where = "IWAE"

    def __init__(
        self,
        likelihood: str | nn.Module,
        samples: int,
        estimator: str = "iwae",
        *,
        beta: float | Tensor = 1.0,
        reduction: str = "mean",
        chunk: int | None = None,
        posterior: str | ScaleForm = "logvar",
        prior: Prior | None = None,
    ) -> None:
        super().__init__(likelihood, beta=beta, reduction=reduction, posterior=posterior, prior=prior)
        self.samples: int = checked_int("IWAE", "samples", samples, 1, None)
        check_choice("IWAE", "estimator", estimator, ESTIMATORS)
        self.estimator = estimator
        self.chunk = None if chunk is None else checked_int("IWAE", "chunk", chunk, 1, None)

    def sample(
        self,
        mu: Tensor,
        logvar: Tensor | None = None,
        *,
        generator: torch.Generator | None = None,
        seed: Tensor | None = None,
        row_offset: int = 0,
    ) -> PosteriorDraws:
        """Draw K samples z from the posterior of every row, and compute their densities. See
        `fastvae.functional.sample_log_probs`.

        Args:
            mu, logvar: the posterior, (B, ...), floating, of one dtype and shape; or a packed head (B, 2 L, ...) alone.
            generator, seed, row_offset: as for `fastvae.functional.reparameterize_kl`, which generates the noise.
        """
        if self.prior is not None:
            self.prior.check_posterior(mu, logvar)
        dtype = mu.dtype if isinstance(mu, Tensor) else None
        is_half = self.prior is not None and dtype in (torch.float16, torch.bfloat16)
        if is_half:
            # The distance of z from mu must not be lost in the rounding of half precision.
            mu, logvar = mu.float(), logvar.float() if isinstance(logvar, Tensor) else logvar
        draws = PosteriorDraws(
            *sample_log_probs(
                mu,
                logvar,
                form=self.posterior,
                samples=self.samples,
                stl=self.estimator != "iwae",
                generator=generator,
                seed=seed,
                row_offset=row_offset,
            )
        )
        if self.prior is None:
            return draws
        z = points = draws.z
        if is_half:
            # The density is that of the exact z, but its gradient must pass the z of the result, which has a hook.
            z = z.to(dtype)
            points = z.float() + (points - z.float()).detach()
        log_p = self.prior.log_prob(points.flatten(0, 1)).unflatten(0, (self.samples, -1))
        return PosteriorDraws(z, draws.log_q, log_p)

    def forward(
        self,
        decoder: Callable[[Tensor], Any] | Any,
        x: Any,
        mu: Tensor | None = None,
        logvar: Tensor | None = None,
        *,
        draws: PosteriorDraws | None = None,
        validate: bool = False,
        weight: Any = None,
    ) -> IWAEOutput:
        """Compute the bound of a batch, as `iwae(decoder, x, mu, logvar)`, or from separate draws, as
        `draws = iwae.sample(mu, logvar)` and `iwae(decoder(draws.z.flatten(0, 1)), x, draws=draws)`.

        Args:
            decoder: a function of z, (K * B, ...), that returns the parameters of the likelihood, with K * B rows; or,
                with `draws`, its result.
            x: the data, (B, ...), as for `fastvae.ELBO`.
            mu, logvar: the posterior, (B, ...), or a packed head (B, 2 L, ...) alone.
            draws: the result of `sample`, in place of the posterior.
            validate: check the values, as for `fastvae.ELBO`: those of the weight before a draw, and the others when
                the decoder's output is known.
            weight: the weight of each element of `x`, shared by the draws, as for `fastvae.ELBO`. With a weight of 0
                for what is missing, this is the bound of MIWAE (Mattei and Frellsen 2019, equation 4).

        Raises:
            TypeError: If neither or both of the posterior and the draws are passed, the decoder's output is passed
                without draws, or `chunk` is set and the decoder is not a function.
            ValueError: If a shape or device is wrong, with the estimator "dreg" the draws are not reparameterised, or
                `validate` finds an invalid value.
        """
        if (mu is None and logvar is not None) or (mu is None) == (draws is None):
            raise TypeError(
                "fastvae.IWAE: call iwae(decoder, x, mu, logvar) or iwae(recon, x, draws=iwae.sample(mu, logvar)): the "
                "posterior or its draws"
            )
        if validate:
            check_weight_values("IWAE", weight)
            for name, part in weight.items() if isinstance(weight, Mapping) else ():
                check_weight_values("IWAE", part, f"weight[{name!r}]")
        is_function = callable(decoder) and not isinstance(decoder, Tensor)
        if draws is None:
            if not is_function:
                raise TypeError(
                    "fastvae.IWAE: `decoder` must be a function of z where `mu` and `logvar` are given, got "
                    f"{type(decoder).__name__}; sample first: draws = iwae.sample(mu, logvar), and then "
                    "iwae(decoder(draws.z.flatten(0, 1)), x, draws=draws)"
                )
            draws = self.sample(mu, logvar)  # type: ignore[arg-type]
        elif self.chunk is not None and not is_function:
            raise TypeError(
                f"fastvae.IWAE: `chunk` needs the decoder as a function of z, got {type(decoder).__name__}"
            )
        z, log_q, log_p = draws
        if z.dim() < 3 or z.shape[0] != self.samples:
            raise ValueError(
                f"fastvae.IWAE: `draws.z` must have shape (K, B, ...) with K = `samples` = {self.samples}, got "
                f"{tuple(z.shape)}"
            )
        if self.estimator == "dreg" and log_q.requires_grad and not z.requires_grad:
            raise ValueError(
                "fastvae.IWAE: the estimator 'dreg' needs draws that are reparameterised, so that `draws.z` has a "
                "gradient, but it has none; take the draws from iwae.sample(mu, logvar), or use estimator='iwae'"
            )

        if self.chunk is None or self.chunk >= self.samples or not is_function:
            recon = decoder(z.flatten(0, 1)) if is_function else decoder
            # The values are checked in `nll_of_draws`.
            results = None if validate else self._fused(recon, x, draws, weight)
            if results is None:
                nll = nll_of_draws("IWAE", self.likelihood, recon, x, self.samples, weight, validate)
                results = self._bound_of(nll, log_q - log_p)
        else:

            def nll_of(part: Tensor) -> Tensor:
                return nll_of_draws(
                    "IWAE", self.likelihood, decoder(part.flatten(0, 1)), x, len(part), weight, validate
                )

            parts = [checkpoint(nll_of, part, use_reentrant=False) for part in z.split(self.chunk)]
            results = self._bound_of(torch.cat(parts), log_q - log_p)
        loss, bound, nll, kl, ess, weights = results
        if not torch.compiler.is_compiling():
            warn_of_non_finite_weights(nll, kl, self.beta, bound)
        if self.estimator == "dreg" and z.requires_grad:
            of_z = weights.reshape(*weights.shape, *[1] * (z.dim() - 2)).to(z.dtype)
            # The path through z needs the square of the weight, and everything else the weight itself. The densities
            # have no gradient but the one through z, which does not pass the tensor z: one kernel makes all three. A
            # prior computes its density from z, and its own parameters need the weight itself, like the decoder's.
            of_draws = ((log_q, weights),) if self.prior is not None else ((log_q, weights), (log_p, weights))
            for tensor, factor in ((z, of_z), *of_draws):
                # A hook gets None where nothing depends on the tensor.
                tensor.register_hook(lambda grad, factor=factor: None if grad is None else grad * factor)
        return IWAEOutput(loss, bound, nll, kl, ess)

    def _fused(self, recon: Any, x: Any, draws: PosteriorDraws, weight: Any) -> tuple[Tensor, ...] | None:
        """Compute what `_bound_of` returns with the CPU kernel that also computes the nll, if it serves the call."""
        likelihood: Any = self.likelihood
        if choose.fast_path is None or torch.compiler.is_compiling() or not has_kernel(likelihood):
            return None
        name, params, constants = likelihood.kernel_call(recon)
        fused: tuple[Tensor, ...] | None = choose.fast_path.iwae(
            name, params, x, constants, draws.log_q, draws.log_p, self.beta, self._reduction, weight
        )
        return fused

    def _bound_of(self, nll: Tensor, kl: Tensor) -> tuple[Tensor, ...]:
        """Return the loss, the bound, nll and kl without gradients, the effective sample size and the weights."""
        log_weights = -nll - self.beta.to(kl.device) * kl
        exact = log_weights.detach()
        weights = torch.softmax(exact, 0)
        ess = weights.square().sum(0).reciprocal()
        bound = torch.logsumexp(exact, 0) - math.log(self.samples)
        # An impossible draw has weight 0, and its part of the sum below is 0, the limit, and not 0 times infinity.
        impossible = exact == -math.inf
        weights, log_weights = weights.masked_fill(impossible, 0), log_weights.masked_fill(impossible, 0)
        rows = _with_gradient(-bound, -(weights * log_weights).sum(0))
        return reduce_rows(rows, self._reduction), bound, nll.detach(), kl.detach(), ess, weights

    def extra_repr(self) -> str:
        chunk = "" if self.chunk is None else f", chunk={self.chunk}"
        return f"estimator={self.estimator!r}{chunk}, {super().extra_repr()}"


def _with_gradient(value: Tensor, surrogate: Tensor) -> Tensor:
    """Return `value` with the gradient of `surrogate`."""
    return value.detach() + (surrogate - surrogate.detach())
