"""Gaussian posteriors: the forms in which encoders give their scale, and a distribution with the usual methods.

| form                             | sigma                                         | used by                     |
|----------------------------------|-----------------------------------------------|-----------------------------|
| `"logvar"`, `LogVar()`           | e^(v / 2)                                     | Kingma and Welling 2014     |
| `LogVar(clamp=(-30, 20))`        | the same, v clamped hard                      | latent diffusion, diffusers |
| `LogVar(bounds=(lo, hi))`        | the same, v clamped smoothly                  |                             |
| `"log_std"`, `LogStd()`          | e^v                                           | VDVAE                       |
| `LogStd(soft_clamp=5, eps=1e-2)` | e^(5 tanh(v / 5)) + 1e-2, mean 5 tanh(mu / 5) | NVAE                        |
| `"softplus"`, `Softplus()`       | log(1 + e^v) + 1e-4                           | stable-audio-tools, RAVE    |
| `"variance"`, `Variance()`       | (e^v + 1e-4)^(1/2)                            | scvi-tools                  |

`functional.reparameterize_kl`, `functional.gaussian_kl` and `ELBO(posterior=...)` take a form or its name.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import functional
from .functional.checks import check_floating, check_like
from .functional.forms import LogStd, LogVar, ScaleForm, Softplus, Variance, checked_form
from .reference.latents import log_variance, soft_clamp

__all__ = ["DiagonalGaussian", "LogStd", "LogVar", "ScaleForm", "Softplus", "Variance"]

_DIFFUSERS = LogVar(clamp=(-30.0, 20.0))


class DiagonalGaussian:
    """The posterior N(mean, std^2) of an encoder's packed output, in place of diffusers' and latent diffusion's
    `DiagonalGaussianDistribution`::

        posterior = fastvae.posteriors.DiagonalGaussian(encoder(x))
        z, kl = posterior.reparameterize_kl()

    `sample`, `mode`, `kl` and `nll` give what theirs give: the same draws, and nats summed over all dimensions but the
    batch. They may be combined freely. `reparameterize_kl` is faster: it draws z and its KL in one pass, and the head
    gets one gradient.

    Args:
        head: (B, 2 L, ...), floating: the mean and what `form` says, along dimension 1. Like theirs, the object also
            has it as `parameters`.
        form: the form of the scale, one of this module or its name. None clamps the log-variance hard to [-30, 20], as
            theirs does.
        deterministic: whether z is the mean. `std` and `var` are then 0 while `logvar` is unchanged, `sample` returns
            the mean without drawing noise, and `kl` and `nll` are 0. These zeros have the shape that the results have
            otherwise, (B,), where theirs have one element.
    """

    def __init__(
        self, head: Tensor, form: str | ScaleForm | None = None, *, deterministic: bool = False
    ) -> None:
        check_floating("posteriors.DiagonalGaussian", "head", head)
        if head.dim() < 2 or head.shape[1] % 2 != 0:
            raise ValueError(
                "fastvae.posteriors.DiagonalGaussian: `head` must have shape (B, 2 L, ...), mean and scale packed "
                f"along dimension 1, got {tuple(head.shape)}"
            )
        self.head = head
        # None, because torch.compile cannot trace an object of ours as a default argument.
        form = _DIFFUSERS if form is None else form
        self.form = checked_form("posteriors.DiagonalGaussian", "form", form)
        self.deterministic = deterministic
        self._last_logvar: tuple[Any, Tensor] | None = None

    @property
    def parameters(self) -> Tensor:
        """The head, (B, 2 L, ...)."""
        return self.head

    @property
    def mean(self) -> Tensor:
        """(B, L, ...). It is a view of the head, except with NVAE's soft clamp."""
        mean = self.head.narrow(1, 0, self.head.shape[1] // 2)
        name, constants = self.form.kernel
        return soft_clamp(mean, constants[0]) if name == "log_std" else mean

    @property
    def logvar(self) -> Tensor:
        """log std^2, (B, L, ...). It is kept for the next call, as `std` and `var` need it too."""
        head = self.head
        size = head.shape[1] // 2
        if torch.compiler.is_compiling():  # the compiler computes it once
            return log_variance(head.narrow(1, size, size), *self.form.kernel)
        # One of a first look under torch.no_grad() would have no gradient later, and that of a head which was then
        # changed in place would be wrong. Inference tensors do not count their changes.
        version = None if head.is_inference() else head._version  # noqa: SLF001
        key = torch.is_grad_enabled(), head.requires_grad, version
        if self._last_logvar is None or self._last_logvar[0] != key:
            self._last_logvar = key, log_variance(head.narrow(1, size, size), *self.form.kernel)
        return self._last_logvar[1]

    @property
    def std(self) -> Tensor:
        """(B, L, ...)"""
        return torch.zeros_like(self.mean) if self.deterministic else torch.exp(0.5 * self.logvar)

    @property
    def var(self) -> Tensor:
        """std^2, (B, L, ...)."""
        return torch.zeros_like(self.mean) if self.deterministic else torch.exp(self.logvar)

    def sample(self, generator: torch.Generator | Sequence[torch.Generator] | None = None) -> Tensor:
        """Draw z, (B, L, ...), with the noise of `torch.randn` for `generator`.

        Args:
            generator: on the head's device, or on the CPU, where the noise is then drawn before it is moved. A list has
                one generator for each row, which draws the noise of this row; a list of one serves the whole batch. It
                cannot be traced by torch.compile.

        Raises:
            TypeError: If it is no generator.
            ValueError: If its device is another one, or the list has a wrong length.
        """
        if self.deterministic:
            return self.mean.clone()  # it may be a view of the head, and a sample may be written to
        return functional.reparameterize_kl(self.head, form=self.form, eps=self._noise(generator))[0]

    def _noise(self, generator: torch.Generator | Sequence[torch.Generator] | None) -> Tensor:
        head = self.head
        rows, *sizes = head.shape[0], head.shape[1] // 2, *head.shape[2:]
        if generator is None:
            return torch.randn(rows, *sizes, dtype=head.dtype, device=head.device)
        generators: list[Any] = list(generator) if isinstance(generator, (list, tuple)) else [generator]
        for one in generators:
            _check_generator(one, head)
        if len(generators) not in (1, rows):
            raise ValueError(
                "fastvae.posteriors.DiagonalGaussian.sample: a list as `generator` must have one generator for each of "
                f"the {rows} rows of `head`, or one for all of them, got {len(generators)}"
            )
        count = rows if len(generators) == 1 else 1
        parts = [
            torch.randn(count, *sizes, generator=one, dtype=head.dtype, device=one.device).to(head.device)
            for one in generators
        ]
        if len(parts) == 1:
            return parts[0]
        return torch.cat(parts) if parts else head.new_empty(0, *sizes)

    def mode(self) -> Tensor:
        """The mean, (B, L, ...)."""
        return self.mean

    def kl(self, other: "DiagonalGaussian | None" = None) -> Tensor:
        """The KL divergence from N(0, I), or from another posterior, of every row, (B,), in nats. It is infinite if
        only the other posterior is deterministic."""
        if other is not None:
            if not isinstance(other, DiagonalGaussian):
                raise TypeError(
                    "fastvae.posteriors.DiagonalGaussian.kl: `other` must be a DiagonalGaussian, got "
                    f"{type(other).__name__}"
                )
            check_like("posteriors.DiagonalGaussian.kl", "other.head", other.head, "head", self.head)
        if self.deterministic:
            return self._constant(0.0, self.head.shape[:1])
        if other is None:
            return functional.gaussian_kl(self.head, form=self.form)
        if other.deterministic:
            return self._constant(math.inf, self.head.shape[:1])
        if self.form.kernel == other.form.kernel:
            return functional.gaussian_kl(self.head, None, other.head, form=self.form)
        return functional.gaussian_kl(self.mean, self.logvar, other.mean, other.logvar)

    def nll(self, x: Tensor, dims: int | Sequence[int] | None = None) -> Tensor:
        """-log N(x; mean, std^2) in nats, with its constant.

        Args:
            x: (B, L, ...), like the mean.
            dims: the dimensions that are summed. None sums all but the batch, to (B,). Theirs default to [1, 2, 3],
                which is the same for images.
        """
        where = "posteriors.DiagonalGaussian.nll"
        mean, logvar = self.mean, self.logvar
        check_like(where, "x", x, "mean", mean)
        n = x.dim()
        summed = range(1, n) if dims is None else [dims] if isinstance(dims, int) else list(dims)
        if not all(isinstance(d, int) and -n <= d < n for d in summed):
            raise ValueError(
                f"fastvae.{where}: `dims` must be from {-n} to {n - 1} for `x` {tuple(x.shape)}, got {dims!r}"
            )
        inner = [d for d in range(n) if d in summed or d - n in summed]
        outer = [d for d in range(n) if d not in inner]
        shape = [x.shape[d] for d in outer]
        if self.deterministic:
            return self._constant(0.0, shape)
        if outer == [0]:
            return functional.gaussian_nll(mean, x, logvar)
        # The dimensions that remain become the rows of the kernel.
        rows = math.prod(shape), *(x.shape[d] for d in inner)
        mean, x, logvar = (t.permute(*outer, *inner).reshape(rows) for t in (mean, x, logvar))
        return functional.gaussian_nll(mean, x, logvar).reshape(shape)

    def _constant(self, value: float, shape: Sequence[int]) -> Tensor:
        """A value without a gradient, in the dtype of sums."""
        dtype = torch.float64 if self.head.dtype == torch.float64 else torch.float32
        return self.head.new_full(shape, value, dtype=dtype)

    def reparameterize_kl(self, **options: Any) -> tuple[Tensor, Tensor]:
        """(z, kl) from one pass: `fastvae.functional.reparameterize_kl` of the head, with its keyword arguments. If the
        posterior is deterministic, z is the mean and the KL is 0."""
        if self.deterministic:
            # For the shapes, and for the checks of the options.
            z, kl = functional.reparameterize_kl(self.head.detach(), form=self.form, **options)
            return self.mean.expand_as(z).clone(), torch.zeros_like(kl)
        return functional.reparameterize_kl(self.head, form=self.form, **options)


def _check_generator(generator: Any, head: Tensor) -> None:
    where = "posteriors.DiagonalGaussian.sample"
    if not isinstance(generator, torch.Generator):
        raise TypeError(
            f"fastvae.{where}: `generator` must be a torch.Generator or a list of them, got "
            f"{type(generator).__name__}; did you mean torch.Generator().manual_seed(...)?"
        )
    if generator.device.type not in ("cpu", head.device.type):
        raise ValueError(
            f"fastvae.{where}: `generator` must be on the device of `head`, {head.device}, or on the CPU, got "
            f"{generator.device}; did you mean torch.Generator()?"
        )
