"""`ELBO`, the training objective of a VAE."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from . import functional, likelihoods
from .functional.checks import check_choice, check_kl, checked_int, is_dense, layout_message
from .functional.forms import LogVar, ScaleForm, checked_form, spelled
from .functional.loss import nll as loss_and_nll
from .functional.ranges import has_values, warn_of_impossible_values
from .likelihoods import Bernoulli
from .likelihoods.base import has_kernel, nll_of_draws, nll_of_module
from .priors import Prior, VampPrior
from .reference import REDUCTIONS, free_bits
from .reference.conventions import sum_event
from .reference.loss import reduce_rows

__all__ = ["ELBO", "ELBOOutput"]

_ALIASES = {"batchmean": "mean"}


class ELBOOutput(NamedTuple):
    """The result of an `ELBO` call. Every field is differentiable: train on `loss` and log the others."""

    loss: Tensor
    """nll + beta * kl, reduced: a scalar, or (B,) with reduction "none". With free bits or a capacity, this uses the KL
    after them."""
    nll: Tensor
    """-log p(x | z) of every row, (B,), in nats; with several draws of z, their average."""
    kl: Tensor
    """KL( q(z | x) || p(z) ) of every row, (B,), in nats. With free bits or a capacity, this is still the true KL."""

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
            are among `elbo.parameters()`. If `posterior` is not `"logvar"`, a `VampPrior` must be given its `form`.
        free_bits_mean: if True, as in the paper, the threshold applies to the mean KL of a dimension over the batch (of
            this process); if False, it applies to each datum separately.
        free_bits_per: what has `free_bits` nats at no cost: each `"dimension"`; each `"channel"` of a latent image,
            dimension 1 of z, as in the code of Kingma et al.; or the whole `"row"`, as Dreamer's free nats. The KL that
            `reparameterize` returns and `kl=` expects is then that of every channel, (B, C), or of every row, (B,).
        capacity: C in the loss nll + beta |KL - C|, where KL is the mean over the batch (Burgess et al. 2018,
            equation 8; their gamma is `beta`), a float or a 0-dim tensor, at least 0. It is a setting like beta:
            `elbo.capacity = 5.0` raises it between steps, also under torch.compile. It excludes `free_bits`.
        posterior: what the encoder's second output means: `"logvar"`, `"log_std"`, `"softplus"`, `"variance"`, or one
            of `fastvae.posteriors`, as for `functional.reparameterize_kl`.
        samples: K, the number of draws of z for each row, over which the nll is averaged: `reparameterize` returns z of
            shape (K, B, ...), and the decoder is called with K * B rows, as in `elbo(decoder(z.flatten(0, 1)), x,
            kl=kl)`. The data are read in place and not repeated. None means one draw, with z in the shape of `mu`.

    Call it as `elbo(recon, x, kl=kl)` or `elbo(recon, x, mu, logvar)`; see `forward`.
    """

    beta: Tensor
    capacity: Tensor | None

    # TorchScript can compile a model that contains an ELBO, provided the compiled code does not call it.
    __jit_unused_properties__ = ("free_bits",)

    _where = "ELBO"
    """The name in messages."""

    def __init__(
        self,
        likelihood: str | nn.Module,
        *,
        beta: float | Tensor = 1.0,
        reduction: str = "mean",
        free_bits: float = 0.0,
        free_bits_mean: bool = True,
        free_bits_per: str = "dimension",
        capacity: float | Tensor | None = None,
        posterior: str | ScaleForm = "logvar",
        samples: int | None = None,
        prior: Prior | None = None,
    ) -> None:
        super().__init__()
        where = self._where
        self.posterior = checked_form(where, "posterior", posterior)
        self.likelihood = likelihoods.get(likelihood)
        self.reduction = reduction
        # None rather than 0: torch.compile turns a float into a graph input, and a branch on it cannot be resolved
        # at compile time.
        self._free_bits = _checked(where, "free_bits", "float", free_bits) or None
        self.free_bits_mean = free_bits_mean
        self.samples = None if samples is None else checked_int(where, "samples", samples, 1, None)
        check_choice(where, "free_bits_per", free_bits_per, tuple(_KL_OF))
        self.free_bits_per = free_bits_per
        _check_prior(where, prior, self._free_bits, self.posterior)
        self.prior = prior
        # A plain number has no device, so beta is created on torch's default device, like every other parameter.
        device = beta.device if isinstance(beta, Tensor) else None
        self._settings: dict[str, float] = {}  # the last numbers of the buffers
        self.register_buffer("beta", self._setting("beta", beta, device), persistent=False)
        self.register_buffer("capacity", None, persistent=False)
        if capacity is not None:
            self.capacity = capacity  # type: ignore[assignment]
        self._first_batch_checked = False

    def _setting(self, name: str, value: Any, device: torch.device | None) -> Tensor:
        self._settings[name] = _checked_setting(self._where, name, value)
        return torch.tensor(self._settings[name], dtype=torch.float32, device=device)

    def reset_parameters(self) -> None:
        """Write the last numeric `beta` and `capacity` into the buffers again. A module created on the meta device has
        no values for them after `to_empty`, and checkpoints do not contain them."""
        for name, value in self._settings.items():
            self._buffers[name].fill_(value)  # type: ignore[union-attr]

    def _load_from_state_dict(
        self, state_dict: Any, prefix: str, local_metadata: dict[str, Any], *args: Any, **kwargs: Any
    ) -> None:
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args, **kwargs)
        # `load_state_dict(assign=True)` fills a model created on the meta device, but checkpoints do not contain beta.
        if self.beta.is_meta and local_metadata.get("assign_to_params_buffers", False):
            for name, value in self._settings.items():
                self._buffers[name] = torch.tensor(value, dtype=torch.float32, device="cpu")

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "ELBO":
        settings = {name: self._buffers[name] for name in ("beta", "capacity")}
        super()._apply(fn, recurse)
        # `model.half()` would round beta permanently, so it follows a change of device but not of dtype.
        for name, before in settings.items():
            after = self._buffers[name]
            if before is not None and after is not None and before.dtype == torch.float32 != after.dtype:
                self._buffers[name] = before.to(after.device)
        return self

    @property
    def free_bits(self) -> float:
        return self._free_bits or 0.0

    def __setattr__(self, name: str, value: Any) -> None:
        if name in ("beta", "capacity") and name in self.__dict__.get("_buffers", ()):
            buffer = self._buffers[name]
            if buffer is None:
                if self._free_bits is not None and value is not None:
                    raise ValueError(
                        f"fastvae.{self._where}: `capacity` and `free_bits` exclude each other, got {value} and "
                        f"{self.free_bits}"
                    )
                buffer = None if value is None else self._setting(name, value, self.beta.device)
                self._buffers[name] = buffer
                return
            if name == "capacity" and value is None:
                self._buffers[name] = None
                del self._settings[name]
                return
            # Written in place because compiled code and CUDA graphs hold a reference to this tensor.
            with torch.no_grad():
                if isinstance(value, Tensor) and value.dim() == 0:
                    buffer.copy_(value)
                else:
                    self._settings[name] = _checked_setting(self._where, name, value)
                    buffer.fill_(self._settings[name])
            return
        if name == "reduction":
            check_choice(self._where, name, value, (*REDUCTIONS, *_ALIASES))
            self._reduction = REDUCTIONS[_ALIASES.get(value, value)]
        super().__setattr__(name, value)

    def reparameterize(
        self,
        mu: Tensor,
        logvar: Tensor | None = None,
        prior_mu: Tensor | None = None,
        prior_logvar: Tensor | None = None,
        *,
        balance: float | None = None,
        samples: int | None = None,
        generator: torch.Generator | None = None,
        seed: Tensor | None = None,
        row_offset: int = 0,
        eps: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Draw z from the posterior and compute the KL of every row, (B,). See `fastvae.functional.reparameterize_kl`.

        `mu` alone is a packed head, (B, 2 L, ...). The form of `logvar` and `prior_logvar` is that of `posterior`.

        With free bits, the KL is that of every dimension, in the shape of `mu`: pass it on as `kl=`, or sum it to log
        it. This draws noise in evaluation mode too; for a z without noise, use `mu` itself.

        With `samples=K`, z is (K, B, ...). The default is the `samples` of this ELBO, whose loss averages over them. An
        ELBO without `samples` takes every draw as a row of its own: `elbo(decoder(z.flatten(0, 1)), x.repeat(K, *[1] *
        (x.dim() - 1)), kl=kl.repeat(K))`. With free bits, repeat the KL in the same way as x.

        With `prior=`, the KL is that from the prior, averaged over the draws where it is estimated from them.
        """
        prior: Any = self._modules.get("prior")
        if prior is not None:
            if prior_mu is not None or prior_logvar is not None or balance is not None:
                raise ValueError(
                    f"fastvae.{self._where}: `prior_mu`, `prior_logvar` and `balance` exclude the {self._where}'s "
                    "`prior`, got both"
                )
            drawn: tuple[Tensor, Tensor] = prior.reparameterize_kl(
                mu,
                logvar,
                form=self.posterior,
                reduction=self._kl_reduction(),
                samples=self.samples if samples is None else samples,
                generator=generator,
                seed=seed,
                row_offset=row_offset,
                eps=eps,
            )
            return drawn
        return functional.reparameterize_kl(
            mu,
            logvar,
            prior_mu,
            prior_logvar,
            form=self.posterior,
            balance=balance,
            reduction=self._kl_reduction(),
            samples=self.samples if samples is None else samples,
            generator=generator,
            seed=seed,
            row_offset=row_offset,
            eps=eps,
        )

    def _kl_reduction(self) -> str:
        return "event" if self._free_bits is None else _KL_OF[self.free_bits_per]

    @torch.jit.ignore  # type: ignore[untyped-decorator]
    def forward(
        self,
        recon: Any,
        x: Tensor,
        mu: Tensor | None = None,
        logvar: Tensor | None = None,
        *,
        kl: Tensor | None = None,
        validate: bool = False,
        weight: Any = None,
    ) -> ELBOOutput:
        """Compute the loss of a batch.

        Args:
            recon: the output of the decoder, (B, ...), which holds the parameters of the likelihood. If `samples` is K,
                it has K * B rows, of which the first B belong to the first draw.
            x: the data, (B, ...), in the shape that the likelihood expects for `recon`.
            mu, logvar: the posterior, (B, ...), or `mu` alone: a packed head, (B, 2 L, ...). Its KL from N(0, 1) is
                computed here.
            kl: the KL of every row, (B,), as `reparameterize` returns it; with free bits, the KL of every dimension,
                (B, ...). Pass either `kl` or the posterior.
            validate: check every value of the weight and of `x` first, and of the parameters of counts, and raise
                ValueError for the first that the likelihood cannot have. What the weight leaves out is not checked,
                except classes on the CPU. Reading the values waits for the GPU.
            weight: multiplies the nll of each element of `x`, for instance a mask of what is observed: bool, uint8
                (read as a number) or floating, at least 0, in the shape of `x` or with sizes of 1, as (B, 1, H, W).
                Elements of weight 0 are left out: even NaN or inf there, in `recon` or in `x`, reach neither the loss
                nor a gradient. It must not require a gradient. For the positions of a categorical, the pixels of a
                mixture of discretised logistics and for counts, see the functions in `fastvae.functional`. For a
                `Product`, a dict with the weights of some or all of its parts.

        Raises:
            TypeError: If neither or both of the posterior and `kl` are passed, or an argument has a wrong type or
                dtype.
            ValueError: If a shape or device is wrong, `x` requires a gradient that the likelihood does not provide, or
                `validate` finds an invalid value.
        """
        if kl is None:
            if mu is None:
                raise TypeError(_kl_or_posterior_message("neither" if logvar is None else "only `logvar`"))
            tensors = isinstance(mu, Tensor) and isinstance(x, Tensor)
            if tensors and not mu.is_nested and not x.is_nested and mu.shape[:1] != x.shape[:1]:
                raise ValueError(
                    f"fastvae.ELBO: `mu` must have as many rows as `x` {tuple(x.shape)}, got {tuple(mu.shape)}"
                )
            kl = _analytic_kl(self._modules.get("prior"), mu, logvar, self.posterior, self._kl_reduction())
        elif mu is not None or logvar is not None:
            raise TypeError(_kl_or_posterior_message("both"))
        true_kl = kl
        if self._free_bits is not None:
            _check_kl_shape(kl, self.free_bits_per)
            # Half precision could overflow in the sum.
            kl = kl if kl.dtype == torch.float64 else kl.float()
            true_kl = sum_event(kl)
            kl = free_bits(kl, self._free_bits, batch_mean=self.free_bits_mean)
        capacity: Any = self._buffers["capacity"]
        if capacity is not None:
            check_kl("ELBO", kl, "kl", kl)
            if not torch.compiler.is_compiling() and capacity.is_cpu and not kl.is_cpu:
                _move_setting(capacity, kl)
            distance = (kl if kl.dtype == torch.float64 else kl.float()) - capacity
            # The rows have the sign of their mean, so that the mean of the rows is |mean KL - C|.
            kl = distance * distance.detach().mean().sign()

        # Attribute access such as self.likelihood goes through nn.Module.__getattr__, which is noticeably slow for
        # small batches.
        likelihood: Any = self._modules["likelihood"]
        beta: Any = self._buffers["beta"]
        if not torch.compiler.is_compiling() and beta.is_cpu and isinstance(kl, Tensor) and not kl.is_cpu:
            _move_setting(beta, kl)
        if self.samples is not None:
            nll = nll_of_draws("ELBO", likelihood, recon, x, self.samples, weight, validate).mean(0)
            return _output_from_nll(nll, kl, beta, self._reduction)._replace(kl=true_kl)
        if not has_kernel(likelihood):
            nll = nll_of_module(likelihood, "ELBO", recon, x, weight, validate)
            output = _output_from_nll(nll, kl, beta, self._reduction)
            return output._replace(kl=true_kl)
        name, params, constants = likelihood.kernel_call(recon)
        loss, nll = loss_and_nll(
            name,
            params,
            x,
            constants,
            kl,
            beta,
            self._reduction,
            caller="ELBO",
            weight=weight,
            validate=validate,
        )
        if not torch.compiler.is_compiling() and not self._first_batch_checked:
            probs = recon if isinstance(likelihood, Bernoulli) and likelihood.from_probs else None
            self._first_batch_checked = warn_of_impossible_values(
                "ELBO", ("recon", "x"), name, params, x, constants, probs, weight
            )
        return ELBOOutput(loss, nll, true_kl)

    def extra_repr(self) -> str:
        beta = "?" if self.beta.is_meta else f"{self.beta.item():g}"
        free_bits = f", free_bits={self.free_bits:g}" if self.free_bits else ""
        samples = f", samples={self.samples}" if self.samples is not None else ""
        if self.free_bits and self.free_bits_per != "dimension":
            free_bits += f" per {self.free_bits_per}"
        if self.capacity is not None:
            free_bits += ", capacity=?" if self.capacity.is_meta else f", capacity={self.capacity.item():g}"
        posterior = "" if self.posterior.kernel == LogVar().kernel else f", posterior={self.posterior}"
        return f"beta={beta}, reduction={self.reduction!r}{free_bits}{samples}{posterior}"


def _check_prior(where: str, prior: Any, free_bits: float | None, posterior: ScaleForm) -> None:
    if prior is None:
        return
    if not isinstance(prior, Prior):
        raise TypeError(
            f"fastvae.{where}: `prior` must be a module of fastvae.priors or None, got {type(prior).__name__}; "
            "subclass fastvae.priors.Prior for one of your own"
        )
    if free_bits is not None and not prior.has_analytic_kl:
        raise ValueError(
            f"fastvae.{where}: `free_bits` need the KL of every dimension, which has no closed form with the prior "
            f"{type(prior).__name__}; use free_bits=0"
        )
    # Only the user knows whether the encoder of the prior is that of the posterior, or a function that converts.
    if isinstance(prior, VampPrior) and prior.form is None and posterior.kernel != LogVar().kernel:
        form = spelled(posterior)
        raise ValueError(
            f"fastvae.{where}: `form` of the VampPrior must be given where `posterior` is {form}, got None; write "
            f"VampPrior(..., form={form}) if its encoder returns what the posterior reads, or VampPrior(..., "
            "form='logvar') if it returns log-variances"
        )


def _analytic_kl(prior: Any, mu: Tensor, logvar: Tensor | None, form: ScaleForm, reduction: str) -> Tensor:
    if prior is None:
        return functional.gaussian_kl(mu, logvar, form=form, reduction=reduction)
    kl: Tensor | None = prior.analytic_kl(mu, logvar, form=form, reduction=reduction)
    if kl is None:
        raise TypeError(
            f"fastvae.ELBO: with the prior {type(prior).__name__}, the KL depends on z: pass `kl`, as in "
            "z, kl = elbo.reparameterize(mu, logvar) and elbo(decoder(z), x, kl=kl)"
        )
    return kl


def _move_setting(setting: Tensor, kl: Tensor) -> None:
    """Move a beta or a capacity that is on the CPU to the GPU of the loss, once.

    Copying it in every call would make Python wait for the GPU and could not be captured in a CUDA graph. The tensor
    object stays the same, and only `elbo.to()` moves it back, because a captured graph reads it at its address.
    """
    if has_values(kl) and has_values(setting):
        # A tensor created in inference mode could not be written to afterwards.
        with torch.inference_mode(False), torch.no_grad():
            setting.data = setting.to(kl.device)


# What has free bits -> the reduction that gives its KL.
_KL_OF = {"dimension": "none", "channel": "channel", "row": "event"}


def _check_kl_shape(kl: Any, free_bits_per: str) -> None:
    if not isinstance(kl, Tensor):
        raise TypeError(f"fastvae.ELBO: `kl` must be a Tensor, got {type(kl).__name__}")
    if not is_dense(kl):
        raise TypeError(layout_message("ELBO", "kl", kl))
    if not kl.is_floating_point():
        raise TypeError(f"fastvae.ELBO: `kl` must be floating point, got {kl.dtype}")
    if free_bits_per == "row" and kl.dim() != 1:
        raise ValueError(
            "fastvae.ELBO: with `free_bits_per` 'row', `kl` must be the KL of every row, (B,), got shape "
            f"{tuple(kl.shape)}"
        )
    if free_bits_per != "row" and kl.dim() < 2:
        raise ValueError(
            f"fastvae.ELBO: with `free_bits`, `kl` must be the KL of every {free_bits_per}, (B, ...), as returned by "
            f'elbo.reparameterize and functional.gaussian_kl(..., reduction="{_KL_OF[free_bits_per]}"), '
            f"got shape {tuple(kl.shape)}"
        )


def _checked_setting(where: str, name: str, value: Any) -> float:
    if isinstance(value, Tensor) and value.dim() != 0:
        raise ValueError(
            f"fastvae.{where}: `{name}` must be a float or a 0-dim tensor, got shape {tuple(value.shape)}"
        )
    return _checked(where, name, "float or a 0-dim tensor", value)


def _checked(where: str, name: str, kind: str, number: Any) -> float:
    try:
        value = float(number)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"fastvae.{where}: `{name}` must be a {kind}, got {number!r}") from error
    if not 0.0 <= value < math.inf:
        raise ValueError(f"fastvae.{where}: `{name}` must be finite and at least 0, got {value}")
    return value


def _kl_or_posterior_message(found: str) -> str:
    return (
        "fastvae.ELBO: expected either `kl` or the posterior, as in elbo(recon, x, kl=kl) or "
        f"elbo(recon, x, mu, logvar), got {found}"
    )


def _output_from_nll(nll: Tensor, kl: Tensor, beta: Tensor, reduction: int) -> ELBOOutput:
    """Combine the nll of a likelihood that has no kernel, or of several draws, with the KL."""
    if not isinstance(nll, Tensor) or nll.dim() != 1:
        found = tuple(nll.shape) if isinstance(nll, Tensor) else type(nll).__name__
        raise ValueError(
            f"fastvae.ELBO: `nll` of the likelihood must return one value per row, shape (B,), got {found}"
        )
    check_kl("ELBO", kl, "nll", nll)
    loss = nll + beta * (kl if kl.dtype == torch.float64 else kl.float())
    return ELBOOutput(reduce_rows(loss, reduction), nll, kl)
