"""`ELBO`, the training objective of a VAE."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from . import functional, likelihoods
from .functional.checks import check_choice, check_kl, is_dense, layout_message
from .functional.loss import nll as loss_and_nll
from .functional.ranges import has_values, warn_of_impossible_values
from .likelihoods import Bernoulli, Likelihood
from .priors import Prior
from .reference import REDUCTIONS, free_bits
from .reference.loss import reduce_rows

__all__ = ["ELBO", "ELBOOutput"]

_ALIASES = {"batchmean": "mean"}


class ELBOOutput(NamedTuple):
    """The result of an `ELBO` call. Every field is differentiable: train on `loss` and log the others."""

    loss: Tensor
    """nll + beta * kl, reduced: a scalar, or (B,) with reduction "none". With free bits, this uses the KL after
    them."""
    nll: Tensor
    """-log p(x | z) of every row, (B,), in nats."""
    kl: Tensor
    """KL( q(z | x) || p(z) ) of every row, (B,), in nats. With free bits, this is still the true KL."""

    @property
    def elbo(self) -> Tensor:
        """The evidence lower bound of every row, (B,): -(nll + kl), without beta."""
        return -(self.nll + self.kl)


class ELBO(nn.Module):
    """The VAE loss: nll + beta * kl, the negative evidence lower bound (Kingma and Welling 2014, equation 3), in nats.

    The encoder gives `mu` and `logvar` of the posterior; the decoder gives the parameters of the likelihood, which for
    the Bernoulli are logits (no sigmoid)::

        elbo = fastvae.ELBO("bernoulli")

        for x in loader:
            mu, logvar = encoder(x)
            z, kl = elbo.reparameterize(mu, logvar)
            out = elbo(decoder(z), x, kl=kl)
            optimizer.zero_grad()
            out.loss.backward()
            optimizer.step()

    A model that samples z itself can pass the posterior instead: `elbo(recon, x, mu, logvar).loss`.

    Args:
        likelihood: `"bernoulli"`, `"continuous_bernoulli"`, `"gaussian"`, `"laplace"`, `"poisson"`, `"categorical"`, a
            module of `fastvae.likelihoods`, or any `nn.Module` with a method `nll(params, target) -> (B,)`. It may have
            parameters (a learned scale): pass `elbo.parameters()` to the optimiser, and under DDP put the ELBO inside
            the module that is wrapped.
        beta: the weight of the KL, a float or a 0-dim tensor, at least 0. It is stored as a buffer, but not in the
            state dict, because it is a setting. A schedule may assign `elbo.beta = 0.5` between steps, also under
            torch.compile. It stays float32 when the model is cast, and no gradient flows to it. If the ELBO was not
            moved to the GPU, its first call with GPU tensors moves beta there permanently.
        reduction: `"mean"` (or `"batchmean"`) sums over each datum and averages over the batch, which gives nats per
            datum. `"sum"` sums over everything. `"none"` gives one loss per row.
        free_bits: the nats of KL that each latent dimension may have at no cost. In the loss, a dimension with less KL
            counts as having this much, so nothing pushes it to collapse (Kingma et al. 2016, appendix C.8). 0 disables
            them. With free bits, `reparameterize` returns the KL of every dimension, in the shape of `mu`, and `kl=`
            expects the same; `out.kl` is still the true KL of every row.
        prior: a module of `fastvae.priors`; None is the standard normal. Where its KL has no closed form,
            `reparameterize` returns the KL of its sample, log q(z | x) - log p(z). The parameters of a learned prior
            are among `elbo.parameters()`.
        free_bits_mean: if True, as in the paper, the threshold applies to the mean KL of a dimension over the batch (of
            this process); if False, it applies to each datum separately.

    Call it as `elbo(recon, x, kl=kl)` or `elbo(recon, x, mu, logvar)`; see `forward`.
    """

    beta: Tensor

    # TorchScript can compile a model that contains an ELBO, provided the compiled code does not call it.
    __jit_unused_properties__ = ("free_bits",)

    def __init__(
        self,
        likelihood: str | nn.Module,
        *,
        beta: float | Tensor = 1.0,
        reduction: str = "mean",
        free_bits: float = 0.0,
        free_bits_mean: bool = True,
        prior: Prior | None = None,
    ) -> None:
        super().__init__()
        self.likelihood = likelihoods.get(likelihood)
        self.reduction = reduction
        # None rather than 0: torch.compile turns a float into a graph input, and a branch on it cannot be resolved
        # at compile time.
        self._free_bits = _checked("free_bits", "float", free_bits) or None
        self.free_bits_mean = free_bits_mean
        _check_prior(prior, self._free_bits)
        self.prior = prior
        # A plain number has no device, so beta is created on torch's default device, like every other parameter.
        device = beta.device if isinstance(beta, Tensor) else None
        self._beta = _checked_beta(beta)
        self.register_buffer(
            "beta", torch.tensor(self._beta, dtype=torch.float32, device=device), persistent=False
        )
        self._first_batch_checked = False

    def reset_parameters(self) -> None:
        """Write the last numeric `beta` into the buffer again. A module created on the meta device has no value for it
        after `to_empty`, and checkpoints do not contain it."""
        self.beta.fill_(self._beta)

    def _load_from_state_dict(
        self, state_dict: Any, prefix: str, local_metadata: dict[str, Any], *args: Any, **kwargs: Any
    ) -> None:
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args, **kwargs)
        # `load_state_dict(assign=True)` fills a model created on the meta device, but checkpoints do not contain beta.
        if self.beta.is_meta and local_metadata.get("assign_to_params_buffers", False):
            self._buffers["beta"] = torch.tensor(self._beta, dtype=torch.float32, device="cpu")

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "ELBO":
        before = self.beta
        super()._apply(fn, recurse)
        # `model.half()` would round beta permanently, so it follows a change of device but not of dtype.
        if before.dtype == torch.float32 and self.beta.dtype != torch.float32:
            self._buffers["beta"] = before.to(self.beta.device)
        return self

    @property
    def free_bits(self) -> float:
        return self._free_bits or 0.0

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "beta" and "beta" in self.__dict__.get("_buffers", ()):
            # Written in place because compiled code and CUDA graphs hold a reference to this tensor.
            with torch.no_grad():
                if isinstance(value, Tensor) and value.dim() == 0:
                    self.beta.copy_(value)
                else:
                    self._beta = _checked_beta(value)
                    self.beta.fill_(self._beta)
            return
        if name == "reduction":
            check_choice("ELBO", name, value, (*REDUCTIONS, *_ALIASES))
            self._reduction = REDUCTIONS[_ALIASES.get(value, value)]
        super().__setattr__(name, value)

    def reparameterize(
        self,
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
        """Draw z ~ N(mu, e^logvar) and compute the KL of every row, (B,). See `fastvae.functional.reparameterize_kl`.

        With free bits, the KL is that of every dimension, in the shape of `mu`: pass it on as `kl=`, or sum it to log
        it. This draws noise in evaluation mode too; for a z without noise, use `mu` itself.

        With `samples=K`, z is (K, B, ...). To average the loss over the samples, make each a row of its own:
        `elbo(decoder(z.flatten(0, 1)), x.repeat(K, *[1] * (x.dim() - 1)), kl=kl.repeat(K))`; for flat data,
        `x.repeat(K, 1)` is enough. With free bits, repeat the KL in the same way as x.

        With `prior=`, the KL is that from the prior, averaged over the samples if it is estimated from them.
        """
        prior: Any = self._modules.get("prior")
        if prior is not None:
            if prior_mu is not None or prior_logvar is not None:
                raise ValueError(
                    "fastvae.ELBO: `prior_mu` and the ELBO's `prior` exclude each other, got both"
                )
            noise = {"generator": generator, "seed": seed, "row_offset": row_offset, "eps": eps}
            z, kl = prior.reparameterize_kl(mu, logvar, samples=samples, **noise)
            return z, kl if self._free_bits is None else prior.analytic_kl(mu, logvar, reduction="none")
        z, kl = functional.reparameterize_kl(
            mu,
            logvar,
            prior_mu,
            prior_logvar,
            samples=samples,
            generator=generator,
            seed=seed,
            row_offset=row_offset,
            eps=eps,
        )
        if self._free_bits is not None:
            kl = functional.gaussian_kl(mu, logvar, prior_mu, prior_logvar, reduction="none")
        return z, kl

    @torch.jit.ignore  # type: ignore[untyped-decorator]
    def forward(
        self,
        recon: Any,
        x: Tensor,
        mu: Tensor | None = None,
        logvar: Tensor | None = None,
        *,
        kl: Tensor | None = None,
    ) -> ELBOOutput:
        """Compute the loss of a batch.

        Args:
            recon: the output of the decoder, (B, ...), which holds the parameters of the likelihood.
            x: the data, (B, ...), in the shape that the likelihood expects for `recon`.
            mu, logvar: the posterior, (B, ...). Its KL from N(0, 1) is computed here.
            kl: the KL of every row, (B,), as `reparameterize` returns it; with free bits, the KL of every dimension,
                (B, ...). Pass either `kl` or the posterior.

        Raises:
            TypeError: If neither or both of the posterior and `kl` are passed, or an argument has a wrong type or
                dtype.
            ValueError: If a shape or device is wrong, or `x` requires a gradient that the likelihood does not provide.
        """
        if kl is None:
            if mu is None or logvar is None:
                raise TypeError(
                    _kl_or_posterior_message("neither" if mu is logvar else "only one of `mu` and `logvar`")
                )
            tensors = isinstance(mu, Tensor) and isinstance(x, Tensor)
            if tensors and not mu.is_nested and not x.is_nested and mu.shape[:1] != x.shape[:1]:
                raise ValueError(
                    f"fastvae.ELBO: `mu` must have as many rows as `x` {tuple(x.shape)}, got {tuple(mu.shape)}"
                )
            kl = _analytic_kl(
                self._modules.get("prior"), mu, logvar, "event" if self._free_bits is None else "none"
            )
        elif mu is not None or logvar is not None:
            raise TypeError(_kl_or_posterior_message("both"))
        true_kl = kl
        if self._free_bits is not None:
            _check_kl_per_dimension(kl)
            # Half precision could overflow in the sum.
            kl = kl if kl.dtype == torch.float64 else kl.float()
            true_kl = kl.flatten(1).sum(1)
            kl = free_bits(kl, self._free_bits, batch_mean=self.free_bits_mean)

        # Attribute access such as self.likelihood goes through nn.Module.__getattr__, which is noticeably slow for
        # small batches.
        likelihood: Any = self._modules["likelihood"]
        beta: Any = self._buffers["beta"]
        if not torch.compiler.is_compiling() and beta.is_cpu and isinstance(kl, Tensor) and not kl.is_cpu:
            _move_beta(beta, kl)
        if not isinstance(likelihood, Likelihood) or type(likelihood).nll is not Likelihood.nll:
            output = _output_from_nll(likelihood.nll(recon, x), kl, beta, self._reduction)
            return output._replace(kl=true_kl)
        name, params, constants = likelihood.kernel_call(recon)
        loss, nll = loss_and_nll(name, params, x, constants, kl, beta, self._reduction, caller="ELBO")
        if not torch.compiler.is_compiling() and not self._first_batch_checked:
            probs = recon if isinstance(likelihood, Bernoulli) and likelihood.from_probs else None
            self._first_batch_checked = warn_of_impossible_values(
                "ELBO", ("recon", "x"), name, params, x, constants, probs
            )
        return ELBOOutput(loss, nll, true_kl)

    def extra_repr(self) -> str:
        beta = "?" if self.beta.is_meta else f"{self.beta.item():g}"
        free_bits = f", free_bits={self.free_bits:g}" if self.free_bits else ""
        return f"beta={beta}, reduction={self.reduction!r}{free_bits}"


def _check_prior(prior: Any, free_bits: float | None) -> None:
    if prior is None:
        return
    if not isinstance(prior, Prior):
        raise TypeError(
            f"fastvae.ELBO: `prior` must be a module of fastvae.priors or None, got {type(prior).__name__}; subclass "
            "fastvae.priors.Prior for one of your own"
        )
    if free_bits is not None and not prior.has_analytic_kl:
        raise ValueError(
            f"fastvae.ELBO: `free_bits` need the KL of every dimension, which has no closed form with the prior "
            f"{type(prior).__name__}; use free_bits=0"
        )


def _analytic_kl(prior: Any, mu: Tensor, logvar: Tensor, reduction: str) -> Tensor:
    if prior is None:
        return functional.gaussian_kl(mu, logvar, reduction=reduction)
    kl = prior.analytic_kl(mu, logvar, reduction=reduction)
    if kl is None:
        raise TypeError(
            f"fastvae.ELBO: with the prior {type(prior).__name__}, the KL depends on z: pass `kl`, as in "
            "z, kl = elbo.reparameterize(mu, logvar) and elbo(decoder(z), x, kl=kl)"
        )
    return kl


def _move_beta(beta: Tensor, kl: Tensor) -> None:
    """Move a beta that is on the CPU to the GPU of the loss, once.

    Copying it in every call would make Python wait for the GPU and could not be captured in a CUDA graph. The tensor
    object stays the same, and only `elbo.to()` moves it back, because a captured graph reads it at its address.
    """
    if has_values(kl) and has_values(beta):
        # A tensor created in inference mode could not be written to afterwards.
        with torch.inference_mode(False), torch.no_grad():
            beta.data = beta.to(kl.device)


def _check_kl_per_dimension(kl: Any) -> None:
    if not isinstance(kl, Tensor):
        raise TypeError(f"fastvae.ELBO: `kl` must be a Tensor, got {type(kl).__name__}")
    if not is_dense(kl):
        raise TypeError(layout_message("ELBO", "kl", kl))
    if not kl.is_floating_point():
        raise TypeError(f"fastvae.ELBO: `kl` must be floating point, got {kl.dtype}")
    if kl.dim() < 2:
        raise ValueError(
            "fastvae.ELBO: with `free_bits`, `kl` must be the KL of every dimension, (B, ...), as returned by "
            'elbo.reparameterize and functional.gaussian_kl(..., reduction="none"), '
            f"got shape {tuple(kl.shape)}"
        )


def _checked_beta(beta: Any) -> float:
    if isinstance(beta, Tensor) and beta.dim() != 0:
        raise ValueError(
            f"fastvae.ELBO: `beta` must be a float or a 0-dim tensor, got shape {tuple(beta.shape)}"
        )
    return _checked("beta", "float or a 0-dim tensor", beta)


def _checked(name: str, kind: str, number: Any) -> float:
    try:
        value = float(number)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"fastvae.ELBO: `{name}` must be a {kind}, got {number!r}") from error
    if not 0.0 <= value < math.inf:
        raise ValueError(f"fastvae.ELBO: `{name}` must be finite and at least 0, got {value}")
    return value


def _kl_or_posterior_message(found: str) -> str:
    return (
        "fastvae.ELBO: expected either `kl` or the posterior, as in elbo(recon, x, kl=kl) or "
        f"elbo(recon, x, mu, logvar), got {found}"
    )


def _output_from_nll(nll: Tensor, kl: Tensor, beta: Tensor, reduction: int) -> ELBOOutput:
    """Combine the nll of a likelihood that has no kernel with the KL."""
    if not isinstance(nll, Tensor) or nll.dim() != 1:
        found = tuple(nll.shape) if isinstance(nll, Tensor) else type(nll).__name__
        raise ValueError(
            f"fastvae.ELBO: `nll` of the likelihood must return one value per row, shape (B,), got {found}"
        )
    check_kl("ELBO", kl, "nll", nll)
    loss = nll + beta * (kl if kl.dtype == torch.float64 else kl.float())
    return ELBOOutput(reduce_rows(loss, reduction), nll, kl)
