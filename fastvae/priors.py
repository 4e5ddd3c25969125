"""Priors for an `ELBO`: `StandardNormal`, `GaussianMixture` and `VampPrior`.

A prior has `log_prob(z)` and `sample(n)`. Its KL from a posterior is exact where a closed form exists, and otherwise
estimated from the sample z: log q(z | x) - log p(z). Subclass `Prior` for one of your own.
"""

import math
import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from . import functional
from .functional.checks import check_choice, check_floating, checked_int, checked_not_negative
from .functional.continuous import checked_bounds
from .functional.forms import ScaleForm, checked_form, kernel_form
from .reference.latents import mean_and_logvar
from .regularizers import log_normal

__all__ = ["GaussianMixture", "Prior", "StandardNormal", "VampPrior"]


class Prior(nn.Module):
    """The base class of priors. A subclass defines `log_prob` and `sample`, and `analytic_kl` where there is one.

    Args:
        dim: the number of latent dimensions.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = checked_int(f"priors.{type(self).__name__}", "dim", dim, 1, None)

    @property
    def has_analytic_kl(self) -> bool:
        """Whether `analytic_kl` returns a tensor, so that no sample is needed for the KL."""
        return False

    def log_prob(self, z: Tensor) -> Tensor:
        """log p(z) of every row, in nats: (B, dim), or (B, ...) with `dim` elements per row, to (B,)."""
        raise NotImplementedError

    def sample(self, n: int, *, generator: torch.Generator | None = None, temperature: float = 1.0) -> Tensor:
        """Draw n points, (n, dim). They carry no gradient. `temperature`, at least 0, multiplies the standard deviation
        of the normal distribution, or that of each component. The priors of this module also take a tensor, (dim,),
        with one for each dimension."""
        raise NotImplementedError

    def frozen(self) -> "Prior":
        """Return a prior with the present density, for many calls without gradients: a `VampPrior` then encodes its
        pseudo-inputs once and not in every call."""
        return self

    def check_posterior(self, mu: Tensor, logvar: Tensor | None = None) -> None:
        """Raise ValueError if a posterior does not fit this prior. Without `logvar`, `mu` is a packed head.

        `ELBO.reparameterize` and `IWAE.sample` call this before they draw noise. The priors of this module need `dim`
        elements per row, on their device. This base class checks nothing, so a prior of your own may have z of another
        shape.
        """

    def _check_rows(self, mu: Tensor, logvar: Tensor | None) -> None:
        """Check that a posterior has `dim` elements per row and is on the device of the prior."""
        if not isinstance(mu, Tensor) or mu.is_nested:
            return  # The functions that take the posterior have the message.
        size = self.dim if logvar is not None else 2 * self.dim
        shape = mu.shape
        if len(shape) < 2 or math.prod(shape[1:]) != size:
            head = "" if logvar is not None else f", mean and scale of {self.dim} dimensions"
            raise ValueError(
                f"fastvae.priors.{type(self).__name__}: {'without `logvar`, ' if head else ''}`mu` must have {size} "
                f"elements per row{head}, shape (B, {size}), got {tuple(shape)}"
            )
        device = self._device()
        if device is not None and device != mu.device:
            raise ValueError(self._device_message("mu", mu, device))

    def analytic_kl(
        self,
        mu: Tensor,
        logvar: Tensor | None = None,
        *,
        form: str | ScaleForm = "logvar",
        reduction: str = "event",
    ) -> Tensor | None:
        """The KL of a posterior from this prior, (B,), or in the shape of another `reduction`; None if it has no closed
        form. The arguments are those of `fastvae.functional.gaussian_kl`."""
        return None

    def reparameterize_kl(
        self,
        mu: Tensor,
        logvar: Tensor | None = None,
        *,
        form: str | ScaleForm = "logvar",
        reduction: str = "event",
        samples: int | None = None,
        eps: Tensor | None = None,
        **noise: Any,
    ) -> tuple[Tensor, Tensor]:
        """Draw z from the posterior and return it with its KL from this prior, (B,), in nats.

        The KL is analytic where that exists, and otherwise log q(z | x) - log p(z), averaged over the samples. The
        arguments, and the shape and dtype of z, are those of `fastvae.functional.reparameterize_kl`; only an analytic
        KL has another `reduction` than "event".
        """
        self.check_posterior(mu, logvar)
        if self.has_analytic_kl:
            z, _ = functional.reparameterize_kl(mu, logvar, form=form, samples=samples, eps=eps, **noise)
            kl = self.analytic_kl(mu, logvar, form=form, reduction=reduction)
            assert kl is not None
            return z, kl
        check_choice("reparameterize_kl", "reduction", reduction, ("event",))
        check_floating("reparameterize_kl", "mu", mu)
        # The distance of z from mu must not be lost in the rounding of half precision.
        dtype = mu.dtype
        if dtype in (torch.float16, torch.bfloat16):
            mu = mu.float()
            logvar, eps = (t.float() if isinstance(t, Tensor) else t for t in (logvar, eps))
        if samples is None and isinstance(eps, Tensor):
            eps = eps.unsqueeze(0)
        draws = 1 if samples is None else samples
        z, log_q, _ = functional.sample_log_probs(mu, logvar, samples=draws, form=form, eps=eps, **noise)
        kl = (log_q - self.log_prob(z.flatten(0, 1)).unflatten(0, (draws, -1))).mean(0)
        return (z[0] if samples is None else z).to(dtype), kl

    def extra_repr(self) -> str:
        return f"dim={self.dim}"

    def _device(self) -> torch.device | None:
        """Where z must be, or None if the prior does not know it before it computes a density."""
        return None

    def _device_message(self, name: str, tensor: Tensor, found: torch.device) -> str:
        return (
            f"fastvae.priors.{type(self).__name__}: the prior must be on the device of `{name}`, {tensor.device}, got "
            f"{found}; did you mean prior.to({name}.device)?"
        )

    def _check_sample(self, n: Any, temperature: Any) -> int:
        """Check the arguments of `sample` and return `n`."""
        where = f"priors.{type(self).__name__}.sample"
        if isinstance(temperature, Tensor) and temperature.dim() > 0:
            for value in temperature.flatten().tolist():
                checked_not_negative(where, "temperature", value)
        else:
            checked_not_negative(where, "temperature", temperature)
        return checked_int(where, "n", _as_int(n), 0, None)

    def _points(self, z: Tensor) -> Tensor:
        """`z` as (B, dim), checked."""
        where = f"priors.{type(self).__name__}"
        check_floating(where, "z", z)
        points = z.flatten(1) if z.dim() > 2 else z
        if points.dim() != 2 or points.shape[1] != self.dim:
            raise ValueError(
                f"fastvae.{where}: `z` must have {self.dim} elements per row, shape (B, {self.dim}), got "
                f"{tuple(z.shape)}"
            )
        return points


class StandardNormal(Prior):
    """N(0, 1) in every dimension, with the analytic KL. `ELBO(prior=None)` computes the same without a module.

    Density and KL take z on any device; samples are on the module's.

    Args:
        dim: the number of latent dimensions.
    """

    def __init__(self, dim: int) -> None:
        super().__init__(dim)
        # It carries the device and dtype of samples.
        self.register_buffer("_like", torch.empty(0), persistent=False)

    @property
    def has_analytic_kl(self) -> bool:
        return True

    def log_prob(self, z: Tensor) -> Tensor:
        return log_normal(self._points(z))

    def sample(
        self, n: int, *, generator: torch.Generator | None = None, temperature: float | Tensor = 1.0
    ) -> Tensor:
        n = self._check_sample(n, temperature)
        like: Any = self._like
        draws = torch.randn(n, self.dim, generator=generator, device=like.device, dtype=like.dtype)
        return temperature * draws

    def check_posterior(self, mu: Tensor, logvar: Tensor | None = None) -> None:
        self._check_rows(mu, logvar)

    def analytic_kl(
        self,
        mu: Tensor,
        logvar: Tensor | None = None,
        *,
        form: str | ScaleForm = "logvar",
        reduction: str = "event",
    ) -> Tensor:
        self.check_posterior(mu, logvar)
        return functional.gaussian_kl(mu, logvar, form=form, reduction=reduction)

    def reparameterize_kl(
        self, mu: Tensor, logvar: Tensor | None = None, **options: Any
    ) -> tuple[Tensor, Tensor]:
        self.check_posterior(mu, logvar)
        return functional.reparameterize_kl(mu, logvar, **options)  # one pass for both


class _Mixture(Prior):
    """A mixture of diagonal Gaussians; a subclass provides the components."""

    def components(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """(mu, logvar, log_weight): (M, dim), (M, dim), and (M,) or None for equal weights."""
        raise NotImplementedError

    def check_posterior(self, mu: Tensor, logvar: Tensor | None = None) -> None:
        self._check_rows(mu, logvar)

    def log_prob(self, z: Tensor) -> Tensor:
        points = self._points(z)
        mu, logvar, log_weight = self.components()
        if mu.device != z.device:
            raise ValueError(self._device_message("z", z, mu.device))
        # Under autocast, z, an encoder's output and a parameter may differ in dtype.
        dtype = torch.promote_types(points.dtype, torch.promote_types(mu.dtype, logvar.dtype))
        if log_weight is not None:
            log_weight = log_weight.to(torch.float64 if dtype == torch.float64 else torch.float32)
        return functional.gaussian_mixture_log_prob(
            points.to(dtype), mu.to(dtype), logvar.to(dtype), log_weight
        )

    @torch.no_grad()
    def frozen(self) -> Prior:
        return _Frozen(self)

    @torch.no_grad()
    def sample(
        self, n: int, *, generator: torch.Generator | None = None, temperature: float | Tensor = 1.0
    ) -> Tensor:
        n = self._check_sample(n, temperature)
        mu, logvar, log_weight = self.components()
        if log_weight is None:
            chosen = torch.randint(mu.shape[0], (n,), generator=generator, device=mu.device)
        else:
            # multinomial refuses to draw nothing.
            weight = log_weight.float().exp()
            chosen = torch.multinomial(weight, max(n, 1), replacement=True, generator=generator)[:n]
        noise = torch.randn(n, self.dim, generator=generator, device=mu.device, dtype=mu.dtype)
        return mu[chosen] + temperature * torch.exp(logvar[chosen] / 2) * noise


class _Frozen(_Mixture):
    """The components of another mixture, as they were."""

    def __init__(self, prior: _Mixture) -> None:
        super().__init__(prior.dim)
        for name, tensor in zip(("_mu", "_logvar", "_log_weight"), prior.components(), strict=True):
            self.register_buffer(name, None if tensor is None else tensor.detach().clone())

    def components(self) -> tuple[Tensor, Tensor, Tensor | None]:
        mu: Any = self._mu
        logvar: Any = self._logvar
        log_weight: Any = self._log_weight
        return mu, logvar, log_weight

    def _device(self) -> torch.device:
        mu: Any = self._mu
        device: torch.device = mu.device
        return device


class GaussianMixture(_Mixture):
    """A mixture of diagonal Gaussians with learned means, log-variances and weights.

    Pass `elbo.parameters()` to the optimiser. With one component its KL is analytic.

    Args:
        components: M, the number of Gaussians.
        dim: the number of latent dimensions.
        spread: the standard deviation of the initial means around 0. Equal components would never part.

    Parameters: `mu` and `logvar`, (M, dim), and `logits`, (M,), whose softmax are the weights (None for one component).
    """

    def __init__(self, components: int, dim: int, *, spread: float = 1.0) -> None:
        super().__init__(dim)
        checked_int("priors.GaussianMixture", "components", components, 1, None)
        self.spread = checked_not_negative("priors.GaussianMixture", "spread", spread)
        self.mu = nn.Parameter(torch.empty(components, dim))
        self.logvar = nn.Parameter(torch.empty(components, dim))
        # A parameter that never gets a gradient would stop DistributedDataParallel.
        self.logits = nn.Parameter(torch.empty(components)) if components > 1 else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.mu, std=self.spread)
        nn.init.zeros_(self.logvar)
        if self.logits is not None:
            nn.init.zeros_(self.logits)

    @property
    def has_analytic_kl(self) -> bool:
        return self.mu.shape[0] == 1

    def components(self) -> tuple[Tensor, Tensor, Tensor | None]:
        return self.mu, self.logvar, None if self.logits is None else self.logits.log_softmax(0)

    def _device(self) -> torch.device:
        return self.mu.device

    def analytic_kl(
        self,
        mu: Tensor,
        logvar: Tensor | None = None,
        *,
        form: str | ScaleForm = "logvar",
        reduction: str = "event",
    ) -> Tensor | None:
        if not self.has_analytic_kl:
            return None
        check_floating("gaussian_kl", "mu", mu)
        self.check_posterior(mu, logvar)
        name, constants = kernel_form("gaussian_kl", form)
        if logvar is None or name != "logvar":
            # The prior has another form than the posterior, and the kernel takes one for both.
            dtype = torch.float64 if mu.dtype == torch.float64 else torch.float32
            mu, logvar = mean_and_logvar(mu, logvar, name, constants, dtype)
        prior_mu, prior_logvar = (t.to(mu.dtype).reshape(1, *mu.shape[1:]) for t in (self.mu, self.logvar))
        return functional.gaussian_kl(
            mu, logvar, prior_mu.expand_as(mu), prior_logvar.expand_as(mu), reduction=reduction
        )

    def extra_repr(self) -> str:
        return f"components={self.mu.shape[0]}, dim={self.dim}"


class VampPrior(_Mixture):
    """The mean of the posteriors of learned pseudo-inputs, 1/M sum_m q(z | u_m) (Tomczak and Welling 2018, equation 9).

    Every `log_prob` sends the pseudo-inputs through the encoder, in its current mode, with gradients for both. The
    encoder stays the model's own: its parameters are not the prior's, and are not in its state dict.

    Args:
        components: M, the number of pseudo-inputs.
        encoder: the model's encoder, a callable that maps (M, *input_shape) to (mu, logvar), each (M, dim), or to one
            packed tensor, (M, 2 dim), whose halves along dimension 1 are the two. Latent images, (M, L, H, W), have
            `dim` elements per row.
        dim: the number of latent dimensions.
        input_shape: the shape of one datum.
        init: the initial pseudo-inputs, (M, *input_shape), such as data; by default uniform within the bounds, or
            N(0, 1) without bounds.
        bounds: the range of data, to which pseudo-inputs are clamped before they are encoded, or None.
        form: what the encoder's second output means, as for `fastvae.functional.reparameterize_kl`. None reads it as
            `"logvar"`, but an ELBO whose `posterior` is another form then raises an error. Pass that form for the
            encoder of this posterior, or `"logvar"` for a function that returns log-variances.

    Parameter: `pseudo_inputs`, (M, *input_shape).
    """

    def __init__(
        self,
        components: int,
        encoder: Callable[[Tensor], Any],
        dim: int,
        input_shape: int | Sequence[int],
        *,
        init: Tensor | None = None,
        bounds: Sequence[float] | None = (0.0, 1.0),
        form: str | ScaleForm | None = None,
    ) -> None:
        super().__init__(dim)
        where = "priors.VampPrior"
        checked_int(where, "components", components, 1, None)
        if not callable(encoder):
            raise TypeError(
                f"fastvae.{where}: `encoder` must be a callable that returns (mu, logvar), got {type(encoder).__name__}"
            )
        self.form = None if form is None else checked_form(where, "form", form)
        shape = (components, *_checked_shape(where, input_shape))
        # In a tuple, the encoder is not registered as a module of the prior.
        self._encoder = (encoder,)
        self.bounds = None if bounds is None else checked_bounds(where, _as_tuple(bounds), "bounds")
        self.pseudo_inputs = nn.Parameter(torch.empty(shape))
        self.reset_parameters()
        if init is not None:
            if not isinstance(init, Tensor):
                raise TypeError(f"fastvae.{where}: `init` must be a Tensor, got {type(init).__name__}")
            if init.shape != shape:
                raise ValueError(f"fastvae.{where}: `init` must have shape {shape}, got {tuple(init.shape)}")
            with torch.no_grad():
                self.pseudo_inputs.copy_(init)

    def reset_parameters(self) -> None:
        if self.bounds is None:
            nn.init.normal_(self.pseudo_inputs)
        else:
            nn.init.uniform_(self.pseudo_inputs, *self.bounds)

    def components(self) -> tuple[Tensor, Tensor, None]:
        inputs: Tensor = self.pseudo_inputs
        if self.bounds is not None:
            inputs = inputs.clamp(*self.bounds)
        posterior = self._encode(inputs)
        where, rows = "priors.VampPrior", inputs.shape[0]
        mu: Tensor
        v: Tensor | None
        if isinstance(posterior, Tensor):
            mu, v = posterior, None
            packed = (rows, 2 * self.dim)
            if mu.dim() < 2 or mu.shape[1] % 2 != 0 or mu.flatten(1).shape != packed:
                raise ValueError(
                    f"fastvae.{where}: `encoder` must return the pair (mu, logvar), or both in one tensor of shape "
                    f"{packed}, for {rows} pseudo-inputs, got a tensor of shape {tuple(mu.shape)}"
                )
        else:
            pair = isinstance(posterior, (tuple, list)) and len(posterior) == 2
            if not pair or not all(isinstance(t, Tensor) for t in posterior):
                raise TypeError(
                    f"fastvae.{where}: `encoder` must return the pair (mu, logvar), or both in one tensor, got "
                    f"{type(posterior).__name__}"
                )
            mu, v = posterior
            for name, t in (("mu", mu), ("logvar", v)):
                shape = tuple(t.flatten(1).shape if t.dim() > 2 else t.shape)
                if shape != (rows, self.dim):
                    raise ValueError(
                        f"fastvae.{where}: `{name}` of the encoder must have shape {(rows, self.dim)} for {rows} "
                        f"pseudo-inputs, got {tuple(t.shape)}"
                    )
        dtype = mu.dtype
        name, constants = ("logvar", []) if self.form is None else self.form.kernel
        if name != "logvar" and dtype in (torch.float16, torch.bfloat16):
            dtype = torch.float32  # half precision would round the logarithm
        if v is None or name != "logvar":
            mu, v = mean_and_logvar(mu, v, name, constants, dtype)
        return mu.flatten(1), v.flatten(1), None

    def _encode(self, inputs: Tensor) -> Any:
        encoder = self._encoder[0]
        if torch.compiler.is_compiling():  # not every version of torch can trace a try block
            return encoder(inputs)
        try:
            return encoder(inputs)
        except RuntimeError as error:
            # The devices are compared only after a failure, because some encoders move their inputs themselves.
            module = encoder if isinstance(encoder, nn.Module) else getattr(encoder, "__self__", None)
            own = module.parameters() if isinstance(module, nn.Module) else ()
            devices = {parameter.device for parameter in own if parameter is not self.pseudo_inputs}
            if len(devices) != 1 or inputs.device in devices:
                raise
            (device,) = devices
            raise ValueError(
                f"fastvae.priors.VampPrior: the prior must be on the device of its encoder, {device}, got "
                f"{inputs.device}; did you mean prior.to('{device}')? Moving the prior does not move the encoder"
            ) from error

    def _device_message(self, name: str, tensor: Tensor, found: torch.device) -> str:
        return (
            f"fastvae.priors.VampPrior: the encoder must return tensors on the device of `{name}`, {tensor.device}, "
            f"got {found}; move both the encoder and the prior, encoder.to({name}.device) and prior.to({name}.device)"
        )

    def extra_repr(self) -> str:
        form = "" if self.form is None else f", form={self.form}"
        return f"components={self.pseudo_inputs.shape[0]}, dim={self.dim}{form}"


def _checked_shape(where: str, input_shape: Any) -> list[int]:
    sizes = _as_tuple(input_shape)
    shape = [_as_int(size) for size in (sizes if isinstance(sizes, tuple) else (sizes,))]
    if not all(isinstance(size, int) for size in shape):
        raise TypeError(
            f"fastvae.{where}: `input_shape` must be an int or a sequence of ints, got {input_shape!r}"
        )
    return [checked_int(where, "input_shape", size, 1, None) for size in shape]


def _as_int(value: Any) -> Any:
    """Return an integer of NumPy or of torch as an int, and anything else as it is."""
    if isinstance(value, int):
        return value
    try:
        return operator.index(value)
    except TypeError:
        return value


def _as_tuple(value: Any) -> Any:
    """Return the elements of a sequence or an array as a tuple, and anything else as it is."""
    try:
        return tuple(value)
    except TypeError:
        return value
