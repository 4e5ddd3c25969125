"""The objective a user calls: `ELBO`."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from . import functional, likelihoods
from .functional.checks import check_choice, check_kl, is_dense, layout_message
from .functional.loss import nll as loss_and_nll
from .functional.ranges import has_values, look
from .likelihoods import Bernoulli, Likelihood
from .reference import REDUCTIONS, free_bits

__all__ = ["ELBO", "ELBOOutput"]

_ALIASES = {"batchmean": "mean"}


class ELBOOutput(NamedTuple):
    """What `ELBO` returns, all of it differentiable: train on `loss`, log the rest."""

    loss: Tensor
    """nll + beta * kl, reduced: a scalar, or (B,) with reduction "none". With free bits, the KL in it is theirs."""
    nll: Tensor
    """-log p(x | z) of every row, (B,), in nats."""
    kl: Tensor
    """KL( q(z | x) || p(z) ) of every row, (B,), in nats; the true one, with free bits too."""

    @property
    def elbo(self) -> Tensor:
        """The evidence lower bound of every row, (B,): -(nll + kl), whatever beta is."""
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

    A model that samples z itself passes the posterior instead: `elbo(recon, x, mu, logvar).loss`.

    Args:
        likelihood: `"bernoulli"`, `"continuous_bernoulli"`, `"gaussian"`, `"laplace"`, `"poisson"`, `"categorical"`, a
            module of `fastvae.likelihoods`, or any `nn.Module` with a method `nll(params, target) -> (B,)`. It may have
            parameters (a learned scale): pass `elbo.parameters()` to the optimiser, and under DDP put the ELBO inside
            the module that is wrapped.
        beta: the weight of the KL, a float or a 0-dim tensor, at least 0. Kept as a buffer (not in the state dict: it
            is a setting), so that a schedule may write `elbo.beta = 0.5` between steps, under torch.compile too. It
            stays float32 when a model is cast. No gradient flows to it. Of an ELBO that was not moved to the GPU, the
            first call moves it there, and there it stays.
        reduction: `"mean"` (or `"batchmean"`): summed over each datum, mean over the batch: nats per datum.
            `"sum"`: over all. `"none"`: one loss per row.
        free_bits: nats of KL that each latent dimension may have at no cost: in the loss, a dimension with less counts
            as having that much, and so nothing pushes it to collapse (Kingma et al. 2016, appendix C.8). 0: none.
            `reparameterize` then returns the KL of every dimension, of the shape of `mu`, which is what a call takes;
            `out.kl` stays the true KL of every row.
        free_bits_mean: whether a dimension is judged by its mean over the batch (of this process), as in the paper, or,
            if False, in each datum by itself.

    Called as `elbo(recon, x, kl=kl)` or `elbo(recon, x, mu, logvar)`; see `forward`.
    """

    beta: Tensor

    # TorchScript compiles a model that holds an ELBO, as long as what it compiles does not call it.
    __jit_unused_properties__ = ("free_bits",)

    def __init__(
        self,
        likelihood: str | nn.Module,
        *,
        beta: float | Tensor = 1.0,
        reduction: str = "mean",
        free_bits: float = 0.0,
        free_bits_mean: bool = True,
    ) -> None:
        super().__init__()
        self.likelihood = likelihoods.get(likelihood)
        self.reduction = reduction
        # None, not 0: torch.compile makes a float a variable of the graph, on which no branch is taken once for all.
        self._free_bits = _checked("free_bits", "float", free_bits) or None
        self.free_bits_mean = free_bits_mean
        # Without a device of its own a number follows torch's default device, like every other parameter.
        device = beta.device if isinstance(beta, Tensor) else None
        self._beta = _checked_beta(beta)
        self.register_buffer(
            "beta", torch.tensor(self._beta, dtype=torch.float32, device=device), persistent=False
        )
        self._first_batch_checked = False

    def reset_parameters(self) -> None:
        """Writes `beta` anew, the last that was given as a number: a module made on the meta device has none after
        `to_empty`, and no checkpoint brings it."""
        self.beta.fill_(self._beta)

    def _load_from_state_dict(
        self, state_dict: Any, prefix: str, local_metadata: dict[str, Any], *args: Any, **kwargs: Any
    ) -> None:
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args, **kwargs)
        # `load_state_dict(assign=True)` fills a model made on the meta device, and no checkpoint holds beta.
        if self.beta.is_meta and local_metadata.get("assign_to_params_buffers", False):
            self._buffers["beta"] = torch.tensor(self._beta, dtype=torch.float32, device="cpu")

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "ELBO":
        before = self.beta
        super()._apply(fn, recurse)
        # `model.half()` would round it for good: it follows to another device and to no other dtype.
        if before.dtype == torch.float32 and self.beta.dtype != torch.float32:
            self._buffers["beta"] = before.to(self.beta.device)
        return self

    @property
    def free_bits(self) -> float:
        return self._free_bits or 0.0

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "beta" and "beta" in self.__dict__.get("_buffers", ()):
            # In place: compiled code and CUDA graphs hold on to this very tensor.
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
        """`fastvae.functional.reparameterize_kl`: z ~ N(mu, e^logvar), and the row's KL, (B,).

        With free bits, the KL of every dimension, of the shape of `mu`: hand it on as `kl=`, sum it to look at it.
        Draws in training and in evaluation alike; use `mu` itself for a z without noise.

        With `samples=K`, z is (K, B, ...), and the loss averages over the samples where each is a row of its own:
        `elbo(decoder(z.flatten(0, 1)), x.repeat(K, *[1] * (x.dim() - 1)), kl=kl.repeat(K))`, of flat data
        `x.repeat(K, 1)`; with free bits the KL of every dimension repeats as x does.
        """
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
        """The loss of a batch.

        Args:
            recon: what the decoder returned, (B, ...): the parameters of the likelihood.
            x: the data, (B, ...), of the shape that the likelihood expects for `recon`.
            mu, logvar: the posterior, (B, ...), for a KL from N(0, 1);
            kl: or else the KL of every row, (B,), as `reparameterize` returns it; with free bits, of every dimension,
                (B, ...).

        Raises:
            TypeError: neither posterior nor `kl`, or both; a dtype or kind that does not fit.
            ValueError: a shape or device that does not fit; an x that requires a gradient that the likelihood lacks.
        """
        if kl is None:
            if mu is None or logvar is None:
                raise TypeError(_call_forms("neither" if mu is logvar else "only one of `mu` and `logvar`"))
            tensors = isinstance(mu, Tensor) and isinstance(x, Tensor)
            if tensors and not mu.is_nested and not x.is_nested and mu.shape[:1] != x.shape[:1]:
                raise ValueError(
                    f"fastvae.ELBO: `mu` must have as many rows as `x` {tuple(x.shape)}, got {tuple(mu.shape)}"
                )
            kl = functional.gaussian_kl(mu, logvar, reduction="event" if self._free_bits is None else "none")
        elif mu is not None or logvar is not None:
            raise TypeError(_call_forms("both"))
        true_kl = kl
        if self._free_bits is not None:
            _check_dimensions(kl)
            # Half would not hold their sum.
            kl = kl if kl.dtype == torch.float64 else kl.float()
            true_kl = kl.flatten(1).sum(1)
            kl = free_bits(kl, self._free_bits, batch_mean=self.free_bits_mean)

        # Not self.likelihood and self.beta, which nn.Module looks up in Python: with a small batch it shows.
        likelihood: Any = self._modules["likelihood"]
        beta: Any = self._buffers["beta"]
        if not torch.compiler.is_compiling() and beta.is_cpu and isinstance(kl, Tensor) and not kl.is_cpu:
            _move_beta(beta, kl)
        if not isinstance(likelihood, Likelihood) or type(likelihood).nll is not Likelihood.nll:
            composed = _compose(likelihood.nll(recon, x), kl, beta, self._reduction)
            return composed._replace(kl=true_kl)
        name, params, constants = likelihood.kernel_call(recon)
        loss, nll = loss_and_nll(name, params, x, constants, kl, beta, self._reduction, caller="ELBO")
        if not self._first_batch_checked and not torch.compiler.is_compiling():
            given = recon if isinstance(likelihood, Bernoulli) and likelihood.from_probs else None
            self._first_batch_checked = look("ELBO", ("recon", "x"), name, params, x, constants, given)
        return ELBOOutput(loss, nll, true_kl)

    def extra_repr(self) -> str:
        beta = "?" if self.beta.is_meta else f"{self.beta.item():g}"
        free = f", free_bits={self.free_bits:g}" if self.free_bits else ""
        return f"beta={beta}, reduction={self.reduction!r}{free}"


def _move_beta(beta: Tensor, kl: Tensor) -> None:
    """Moves a beta on the CPU, once, to the GPU of the loss.

    A copy in every call would make Python wait for the GPU, and no graph can capture one. It stays the tensor that
    others hold, and goes back only with `elbo.to()`, because a captured graph reads it where it is.
    """
    if has_values(kl) and has_values(beta):
        # A tensor made in inference mode could not be written to afterwards.
        with torch.inference_mode(False), torch.no_grad():
            beta.data = beta.to(kl.device)


def _check_dimensions(kl: Any) -> None:
    if not isinstance(kl, Tensor):
        raise TypeError(f"fastvae.ELBO: `kl` must be a Tensor, got {type(kl).__name__}")
    if not is_dense(kl):
        raise TypeError(layout_message("ELBO", "kl", kl))
    if not kl.is_floating_point():
        raise TypeError(f"fastvae.ELBO: `kl` must be floating point, got {kl.dtype}")
    if kl.dim() < 2:
        raise ValueError(
            "fastvae.ELBO: with `free_bits`, `kl` must be that of every dimension, (B, ...), as elbo.reparameterize "
            f'and functional.gaussian_kl(..., reduction="none") give it, got shape {tuple(kl.shape)}'
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


def _call_forms(found: str) -> str:
    return f"fastvae.ELBO: call elbo(recon, x, kl=kl) or elbo(recon, x, mu, logvar): `kl` or the posterior, got {found}"


def _compose(nll: Tensor, kl: Tensor, beta: Tensor, reduction: int) -> ELBOOutput:
    """The loss around a likelihood that no kernel serves."""
    if not isinstance(nll, Tensor) or nll.dim() != 1:
        found = tuple(nll.shape) if isinstance(nll, Tensor) else type(nll).__name__
        raise ValueError(
            f"fastvae.ELBO: the likelihood's `nll` must return one value per row, shape (B,), got {found}"
        )
    check_kl("ELBO", kl, "nll", nll)
    loss = nll + beta * (kl if kl.dtype == torch.float64 else kl.float())
    if reduction == REDUCTIONS["sum"]:
        loss = loss.sum()
    elif reduction == REDUCTIONS["mean"]:
        loss = loss.mean()
    return ELBOOutput(loss, nll, kl)
