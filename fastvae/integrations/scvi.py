"""Speed up scvi-tools' training with fastvae's loss.

    from fastvae.integrations.scvi import accelerate

    accelerate()           # or for one block: with accelerate(): ...
    model.train()

scvi-tools' modules build a distribution and call its `log_prob`, which returns one value for each cell and gene. Its
eager formulas take about thirty passes over memory, forward and backward. This module replaces `log_prob` of
scvi-tools' NegativeBinomial, ZeroInflatedNegativeBinomial and Poisson with one op that computes values and gradients in
a single pass. It thus serves every model whose loss calls them, including your own. Calls that the op does not serve,
such as those with several samples at a time, still use scvi-tools' formula; `status()` reports how many, and why.
"""

import functools
import importlib
import inspect
import sys
import warnings
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from types import TracebackType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .._spec import COUNTS
from ..backends import choose
from ..functional.loss import nll_elements

__all__ = ["VERSIONS", "Acceleration", "Status", "accelerate", "status", "undo"]

VERSIONS = ("1.4.2", "1.5.1")
"""The versions of scvi-tools that this module accepts and has been tested with."""

LogProb = Callable[[Any, Tensor], Tensor]

ZINB_EPS = (
    1e-8  # as in scvi-tools' ZeroInflatedNegativeBinomial.log_prob; NegativeBinomial has its own `_eps`
)


class Acceleration:
    """The handle that `accelerate` returns. The acceleration ends with `undo()`, or with its `with` block."""

    def __init__(self, strict: bool, fused_adam: bool) -> None:
        self.strict = strict
        self.fused_adam = fused_adam

    def undo(self) -> None:
        """End this acceleration. Once no other one is active, scvi-tools is restored. A second call does nothing."""
        if self in _active:
            _active.remove(self)
        if not _active:
            _remove_patches()

    def __enter__(self) -> "Acceleration":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.undo()


@dataclass(frozen=True, repr=False)
class Status:
    """The result of `status`. You can `print` it, or read its fields."""

    active: bool
    version: str | None
    """The version of scvi-tools, or None if `accelerate` has not been called."""
    strict: bool
    fused_adam: bool
    served: dict[str, int]
    """The number of calls that the op served, by what was called. Calls in compiled code are not counted."""
    fell_back: dict[str, dict[str, int]]
    """The number of calls that scvi-tools' own code served, by what was called and by reason."""

    def __str__(self) -> str:
        if not self.version:
            return "fastvae.integrations.scvi: off; accelerate() has not been called"
        state = ["on" if self.active else "off"]
        if self.active:
            state += ["strict"] * self.strict + ["fused Adam"] * self.fused_adam
        lines = [f"fastvae.integrations.scvi: {', '.join(state)}; scvi-tools {self.version}"]
        for name in sorted({*self.served, *self.fell_back}):
            lines.append(f"  {name}: {self.served.get(name, 0)} served")
            for reason, count in self.fell_back.get(name, {}).items():
                lines.append(f"    {count} by scvi-tools' own code: {reason}")
        if len(lines) == 1:
            lines.append("  no calls yet")
        return "\n".join(lines)

    __repr__ = __str__


def accelerate(*, strict: bool = False, fused_adam: bool = False) -> Acceleration:
    """Replace `log_prob` of scvi-tools' count distributions with fastvae's op, for every model of this process.

    A plain call is in effect until `undo()` of the returned object (or of this module); as a context manager, it is in
    effect until its block ends. Calls may be nested and repeated: scvi-tools is restored when the last one ends, and
    the options are those of the latest call that is still active. Models are not changed: they save, load and train
    without fastvae.

    The op serves matrices (cells, genes) of float32 or float64 on a device for which fastvae has kernels. Everything
    else silently uses scvi-tools' own formula.

    Args:
        strict: raise an error, with the reason, when a call would use scvi-tools' own formula.
        fused_adam: create scvi-tools' optimiser, Adam or AdamW, with `fused=True` if every parameter is a plain
            floating-point tensor on a CPU or CUDA device: the same formula in one pass. From version 1.5, scvi-tools
            does this by itself.

    Raises:
        ImportError: If scvi-tools is missing, or its version is not in `VERSIONS`. Nothing is changed then.
    """
    global _version
    version = _checked_version()
    acceleration = Acceleration(bool(strict), bool(fused_adam))
    if not _active:
        patches = _patches()  # this may fail, so it runs before anything is changed
        _served.clear()
        _fell_back.clear()
        _version = version
        for patch in patches:
            patch.apply()
        _installed.extend(patches)
    _active.append(acceleration)
    return acceleration


def undo() -> None:
    """End all active accelerations and restore scvi-tools."""
    for acceleration in list(_active):
        acceleration.undo()


def status() -> Status:
    """Report the calls served since `accelerate` was called, and those that used scvi-tools' own code, with reasons."""
    latest = _active[-1] if _active else None
    return Status(
        active=latest is not None,
        version=_version,
        strict=latest is not None and latest.strict,
        fused_adam=latest is not None and latest.fused_adam,
        served=dict(_served),
        fell_back={name: dict(reasons) for name, reasons in _fell_back.items()},
    )


class _Patch:
    """An attribute of a class or module of scvi-tools, and its replacement."""

    def __init__(self, owner: Any, name: str, replacement: Any) -> None:
        self.owner, self.name, self.replacement = owner, name, replacement
        self.inherited = name not in vars(owner)
        self.original = None if self.inherited else vars(owner)[name]

    def apply(self) -> None:
        setattr(self.owner, self.name, self.replacement)

    def revert(self) -> None:
        # If someone else has patched the attribute since, their patch stays. It may call our replacement, which then
        # only calls the original.
        if vars(self.owner).get(self.name) is not self.replacement:
            return
        if self.inherited:
            delattr(self.owner, self.name)
        else:
            setattr(self.owner, self.name, self.original)


_active: list[Acceleration] = []
_installed: list[_Patch] = []
_version: str | None = None
_served: defaultdict[str, int] = defaultdict(int)
_fell_back: defaultdict[str, defaultdict[str, int]] = defaultdict(lambda: defaultdict(int))


def _checked_version() -> str:
    """Return the version of scvi-tools without importing it, or raise an ImportError with advice."""
    recommended = VERSIONS[0] if sys.version_info < (3, 12) else VERSIONS[-1]
    advice = f'pip install "scvi-tools=={recommended}"'
    if sys.version_info < (3, 11):
        advice = f"use Python 3.11 or newer, and {advice}"
    try:
        found = metadata.version("scvi-tools")
    except metadata.PackageNotFoundError:
        raise ImportError(
            f"fastvae.integrations.scvi needs scvi-tools, which is not installed: {advice}"
        ) from None
    if found not in VERSIONS:
        raise ImportError(
            f"fastvae.integrations.scvi supports scvi-tools {' and '.join(VERSIONS)}, found {found}: {advice}"
        )
    return found


def _patches() -> list[_Patch]:
    distributions = importlib.import_module("scvi.distributions")
    autozi = importlib.import_module("scvi.module").AutoZIVAE
    plan = importlib.import_module("scvi.train").TrainingPlan
    negative_binomial = distributions.NegativeBinomial
    zero_inflated = distributions.ZeroInflatedNegativeBinomial
    poisson = distributions.Poisson
    patches = [
        _Patch(negative_binomial, "log_prob", _negative_binomial_log_prob(negative_binomial.log_prob)),
        _Patch(zero_inflated, "log_prob", _zero_inflated_log_prob(zero_inflated.log_prob)),
        _Patch(poisson, "log_prob", _poisson_log_prob(poisson.log_prob)),
        _Patch(
            autozi,
            "get_reconstruction_loss",
            _autozi_loss(autozi.get_reconstruction_loss, zero_inflated),
        ),
    ]
    # These two modules use torch's Poisson, which we must not patch. They get scvi-tools' subclass of it instead.
    for name in ("scvi.module._multivae", "scvi.external.gimvi._module"):
        patches.append(_Patch(importlib.import_module(name), "Poisson", poisson))
    if "fused_optimizer" not in inspect.signature(plan.__init__).parameters:
        patches.append(
            _Patch(plan, "_optimizer_creator_fn", _fused_optimizer_creator(plan._optimizer_creator_fn))  # noqa: SLF001
        )
    return patches


def _remove_patches() -> None:
    for patch in reversed(_installed):
        patch.revert()
    _installed.clear()


def _negative_binomial_log_prob(original: LogProb) -> LogProb:
    @functools.wraps(original)
    def log_prob(self: Any, value: Tensor) -> Tensor:
        if not _active:
            return original(self, value)
        reason = _fallback_reason(value, self.mu, self.theta)
        # Only distributions with argument validation warn, and scvi-tools' models do not enable it.
        if not reason and self._validate_args and not _validate_counts(value):
            reason = _NEGATIVE
        if reason:
            return _fall_back(self, reason, original, value)
        _count_call(type(self).__name__)
        return _log_prob("negative_binomial", (self.mu, _per_gene(self.theta)), value, self._eps)

    return log_prob


def _zero_inflated_log_prob(original: LogProb) -> LogProb:
    @functools.wraps(original)
    def log_prob(self: Any, value: Tensor) -> Tensor:
        if not _active:
            return original(self, value)
        reason = _fallback_reason(value, self.mu, self.theta, self.zi_logits)
        # scvi-tools always validates, and its formula treats a negative value as a zero. Reading the values would wait
        # for a GPU in every step.
        validate = self._validate_args or value.device.type == "cpu"
        if not reason and validate and not _validate_counts(value):
            reason = _NEGATIVE
        if reason:
            return _fall_back(self, reason, original, value)
        _count_call(type(self).__name__)
        params = (self.mu, _per_gene(self.theta), self.zi_logits)
        return _log_prob("zero_inflated_negative_binomial", params, value, ZINB_EPS)

    return log_prob


def _poisson_log_prob(original: LogProb) -> LogProb:
    @functools.wraps(original)
    def log_prob(self: Any, value: Tensor) -> Tensor:
        if not _active:
            return original(self, value)
        reason = _fallback_reason(value, self.rate)
        # torch's Poisson refuses values that are not counts, unless it was created with validate_args=False.
        if not reason and self._validate_args and not _are_counts(value):
            reason = "values that are not counts"
        if reason:
            return _fall_back(self, reason, original, value)
        _count_call(type(self).__name__)
        return _log_prob("poisson_rate", (self.rate,), value, 0.0)

    return log_prob


def _autozi_loss(original: Callable[..., Tensor], distribution: Any) -> Callable[..., Tensor]:
    @functools.wraps(original)
    def get_reconstruction_loss(
        self: Any,
        x: Tensor,
        px_rate: Tensor,
        px_r: Tensor,
        px_dropout: Tensor,
        bernoulli_params: Tensor,
        eps_log: float = 1e-8,
        **kwargs: Any,
    ) -> Tensor:
        """AutoZI (Clivio et al. 2019) mixes a ZINB and an NB with the same mean and dispersion, which is again a ZINB.

        Let d be the weight of the NB and a the logit of the additional zeros. The fraction sigmoid(-a) of the ZINB is
        an NB too, so the weights of a certain zero and of the NB are (1 - d) sigmoid(a) and d + (1 - d) sigmoid(-a).
        The logarithm of their ratio is a + log(1 - d) - log(1 + d e^a). scvi-tools adds `eps_log` to d and to 1 - d.
        """
        if not _active or _fallback_reason(x, px_rate, px_r, px_dropout) or bernoulli_params.dim() > 2:
            # The log_prob of its distributions records the reason.
            return original(self, x, px_rate, px_r, px_dropout, bernoulli_params, eps_log, **kwargs)
        log_keep = torch.log(1.0 - bernoulli_params + eps_log)
        log_d = torch.log(bernoulli_params + eps_log)
        zi_logits = px_dropout + log_keep - F.softplus(px_dropout + log_d)
        return -distribution(mu=px_rate, theta=px_r, zi_logits=zi_logits).log_prob(x).sum(dim=-1)

    return get_reconstruction_loss


def _fused_optimizer_creator(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def create_optimizer_fn(self: Any, optimizer_cls: Any) -> Callable[..., torch.optim.Optimizer]:
        if not (
            _active and _active[-1].fused_adam and optimizer_cls in (torch.optim.Adam, torch.optim.AdamW)
        ):
            return original(self, optimizer_cls)

        def create_optimizer(params: Any) -> torch.optim.Optimizer:
            params = list(params)
            plain = all(
                type(p) in (torch.nn.Parameter, Tensor)
                and p.is_floating_point()
                and p.layout == torch.strided
                and p.device.type in ("cpu", "cuda")
                for p in params
            )
            _count_call(
                "fused Adam", "" if plain else "parameters that are not plain floats on a CPU or CUDA device"
            )
            return original(self, functools.partial(optimizer_cls, fused=True) if plain else optimizer_cls)(
                params
            )

        return create_optimizer

    return create_optimizer_fn


_NEGATIVE = "negative values"
_SHAPES = "shapes that are not all the same (cells, genes), as with several samples at a time"


def _fallback_reason(value: Any, mean: Tensor, *others: Tensor) -> str:
    """Why the op cannot serve a call, or an empty string if it can."""
    if not isinstance(value, Tensor) or value.layout != torch.strided:
        return "values that are not a dense tensor"
    if mean.dim() != 2 or value.shape != mean.shape or any(other.shape != mean.shape for other in others):
        return _SHAPES
    if mean.numel() == 0:
        return "an empty batch"
    device = mean.device.type
    # The reference is no faster than scvi-tools, so it serves only if the user has chosen it.
    if choose.with_kernel("nll_elements", device) is None:
        return f"no kernels for {device} tensors; fastvae doctor says why"
    if value.device != mean.device:
        return "values on another device than the distribution's"
    if mean.dtype not in (torch.float32, torch.float64):
        return f"{str(mean.dtype).removeprefix('torch.')} means"
    if not all(other.is_floating_point() and other.itemsize <= mean.itemsize for other in others):
        return "parameters wider than the means"
    if value.dtype not in (mean.dtype, torch.float32, *COUNTS):
        return f"{str(value.dtype).removeprefix('torch.')} values"
    if value.requires_grad:
        return "values that require a gradient"
    if not torch.compiler.is_compiling() and choose.transform_level() is not None:
        return "a transform of torch.func"
    return ""


def _fall_back(distribution: Any, reason: str, original: LogProb, value: Any) -> Tensor:
    """Call scvi-tools' own code, or raise an error if `strict` is set."""
    name = type(distribution).__name__
    if _active[-1].strict:
        found = ""
        if isinstance(value, Tensor):
            mean = distribution.mean
            found = (
                f" (values {tuple(value.shape)} {value.dtype}, means {tuple(mean.shape)} {mean.dtype}, "
                f"on {mean.device})"
            )
        raise RuntimeError(
            f"fastvae.integrations.scvi: {name}.log_prob cannot be served: {reason}{found}; without strict=True, "
            "scvi-tools' own formula serves such calls"
        )
    _count_call(name, reason)
    return original(distribution, value)


def _count_call(name: str, fallback_reason: str = "") -> None:
    if torch.compiler.is_compiling():
        return
    if fallback_reason:
        _fell_back[name][fallback_reason] += 1
    else:
        _served[name] += 1


def _log_prob(variant: str, params: tuple[Tensor, ...], value: Tensor, eps: float) -> Tensor:
    """Compute log p of each element. Parameters that autocast left in half precision are converted."""
    params = tuple(param.to(params[0].dtype) for param in params)
    return nll_elements(variant, params, value, (eps,), -1.0)


def _per_gene(theta: Tensor) -> Tensor:
    """Return theta as (G,) if scvi-tools' constructor has broadcast it to (B, G), or else unchanged."""
    if theta.stride(0) != 0:
        return theta
    if not torch.compiler.is_compiling():
        # The tensor that was broadcast, so that autograd does not need a gradient for every cell.
        base = theta._base
        if (
            base is not None
            and base.shape == theta.shape[1:]
            and base.stride(0) == theta.stride(1)
            and base.data_ptr() == theta.data_ptr()
            and base.dtype == theta.dtype
            and base.requires_grad == theta.requires_grad
        ):
            return base
    return theta[0]


def _are_counts(value: Tensor) -> bool:
    """Whether all values are whole numbers of at least 0. This checks `support` in a tenth of the time."""
    if not value.is_floating_point():
        return bool(value.min() >= 0)
    # The sum of the absolute fractions is 0 only if all of them are, and a NaN makes it NaN.
    return bool((value.frac().abs_().sum() == 0) & (value.min() >= 0))


def _validate_counts(value: Tensor) -> bool:
    """Whether no value is negative. As scvi-tools does, this warns of values that are not counts."""
    if _are_counts(value):
        return True
    if bool(value.min() < 0):
        return False  # scvi-tools' own log_prob warns of it
    settings = importlib.import_module("scvi").settings
    warnings.warn(
        "The value argument must be within the support of the distribution",
        UserWarning,
        stacklevel=settings.warnings_stacklevel + 1,
    )
    return True
