"""scvi-tools' own training with fastvae's loss in it.

    from fastvae.integrations.scvi import accelerate

    accelerate()           # or, for a while: with accelerate(): ...
    model.train()

scvi-tools' modules build a distribution and ask it for `log_prob`, one value for each cell and gene, which their eager
formulas make in some thirty passes over memory, forward and backward. Here one op takes their place, value and
gradients in a single pass, behind the `log_prob` of scvi-tools' NegativeBinomial, ZeroInflatedNegativeBinomial and
Poisson: every model whose loss asks them is served, a user's own included. What the op does not serve, such as
several samples at a time, stays with scvi-tools' formula; `status()` tells how often, and why.
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
"""The versions of scvi-tools that this module has been tested with, and accepts."""

LogProb = Callable[[Any, Tensor], Tensor]

ZINB_EPS = 1e-8  # of scvi-tools' ZeroInflatedNegativeBinomial.log_prob; a NegativeBinomial knows its own


class Acceleration:
    """What `accelerate` returns: ends with `undo()`, or with the `with` block that it opened."""

    def __init__(self, strict: bool, fused_adam: bool) -> None:
        self.strict = strict
        self.fused_adam = fused_adam

    def undo(self) -> None:
        """End this acceleration. scvi-tools is as it was once no other is left; a second call does nothing."""
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
    """What `status` returns; `print` it, or read its fields."""

    active: bool
    version: str | None
    """Of scvi-tools; None where `accelerate` has not been called."""
    strict: bool
    fused_adam: bool
    served: dict[str, int]
    """Calls that the op took, by what was called. Calls in compiled code are not counted."""
    fell_back: dict[str, dict[str, int]]
    """Calls that scvi-tools' own code took, by what was called and by reason."""

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
                lines.append(f"    {count} by scvi-tools: {reason}")
        if len(lines) == 1:
            lines.append("  no calls yet")
        return "\n".join(lines)

    __repr__ = __str__


def accelerate(*, strict: bool = False, fused_adam: bool = False) -> Acceleration:
    """Put fastvae's op behind `log_prob` of scvi-tools' count distributions, for every model of this process.

    A plain call lasts until `undo()` of what it returns (or of this module); as a context manager, until its block is
    left. Calls may be nested and repeated: scvi-tools is as it was once the last of them has ended, and the options
    are those of the latest that is still active. Models carry nothing of it: they save, load and train without fastvae.

    Served are matrices (cells, genes) of float32 or float64 on a device that fastvae has kernels for; everything else
    goes to scvi-tools' own formula, silently.

    Args:
        strict: a call that goes to scvi-tools' own formula is an error, which says why.
        fused_adam: scvi-tools' optimiser, Adam or AdamW, is made with `fused=True` where every parameter is a plain
            floating-point tensor on a CPU or a CUDA device: the same formula in one pass. From 1.5 on scvi-tools does
            that by itself.

    Raises:
        ImportError: scvi-tools is missing, or of a version that is not in `VERSIONS`. Nothing has been changed then.
    """
    global _version
    version = _checked_version()
    acceleration = Acceleration(bool(strict), bool(fused_adam))
    if not _active:
        patches = _patches()  # what may fail comes first
        _served.clear()
        _fell_back.clear()
        _version = version
        for patch in patches:
            patch.put()
        _installed.extend(patches)
    _active.append(acceleration)
    return acceleration


def undo() -> None:
    """End every acceleration that is active: scvi-tools is as it was."""
    for acceleration in list(_active):
        acceleration.undo()


def status() -> Status:
    """What has been served since `accelerate` was called, what fell back on scvi-tools' own code, and why."""
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
    """An attribute of a class or module of scvi-tools, and what takes its place."""

    def __init__(self, owner: Any, name: str, ours: Any) -> None:
        self.owner, self.name, self.ours = owner, name, ours
        self.inherited = name not in vars(owner)
        self.theirs = None if self.inherited else vars(owner)[name]

    def put(self) -> None:
        setattr(self.owner, self.name, self.ours)

    def take_back(self) -> None:
        # Whoever has put something of their own over it since keeps that; what it calls of ours is inert then.
        if vars(self.owner).get(self.name) is not self.ours:
            return
        if self.inherited:
            delattr(self.owner, self.name)
        else:
            setattr(self.owner, self.name, self.theirs)


_active: list[Acceleration] = []
_installed: list[_Patch] = []
_version: str | None = None
_served: defaultdict[str, int] = defaultdict(int)
_fell_back: defaultdict[str, defaultdict[str, int]] = defaultdict(lambda: defaultdict(int))


def _checked_version() -> str:
    """The version of scvi-tools, read without importing it."""
    wanted = VERSIONS[0] if sys.version_info < (3, 12) else VERSIONS[-1]
    advice = f'pip install "scvi-tools=={wanted}"'
    if sys.version_info < (3, 11):
        advice = f"Python 3.11 or newer, and there {advice}"
    try:
        found = metadata.version("scvi-tools")
    except metadata.PackageNotFoundError:
        raise ImportError(
            f"fastvae.integrations.scvi needs scvi-tools, which is not installed: {advice}"
        ) from None
    if found not in VERSIONS:
        raise ImportError(
            f"fastvae.integrations.scvi serves scvi-tools {' and '.join(VERSIONS)}, found {found}: {advice}"
        )
    return found


def _patches() -> list[_Patch]:
    distributions = importlib.import_module("scvi.distributions")
    autozi = importlib.import_module("scvi.module").AutoZIVAE
    plan = importlib.import_module("scvi.train").TrainingPlan
    negative_binomial = distributions.NegativeBinomial
    inflated = distributions.ZeroInflatedNegativeBinomial
    poisson = distributions.Poisson
    patches = [
        _Patch(negative_binomial, "log_prob", _negative_binomial(negative_binomial.log_prob)),
        _Patch(inflated, "log_prob", _zero_inflated(inflated.log_prob)),
        _Patch(poisson, "log_prob", _poisson(poisson.log_prob)),
        _Patch(
            autozi,
            "get_reconstruction_loss",
            _autozi(autozi.get_reconstruction_loss, inflated),
        ),
    ]
    # These two take torch's Poisson, which is not for us to change: they get scvi-tools', which is a subclass of it.
    for name in ("scvi.module._multivae", "scvi.external.gimvi._module"):
        patches.append(_Patch(importlib.import_module(name), "Poisson", poisson))
    if "fused_optimizer" not in inspect.signature(plan.__init__).parameters:
        patches.append(
            _Patch(plan, "_optimizer_creator_fn", _fused_optimizer(plan._optimizer_creator_fn))  # noqa: SLF001
        )
    return patches


def _remove_patches() -> None:
    for patch in reversed(_installed):
        patch.take_back()
    _installed.clear()


def _negative_binomial(theirs: LogProb) -> LogProb:
    @functools.wraps(theirs)
    def log_prob(self: Any, value: Tensor) -> Tensor:
        if not _active:
            return theirs(self, value)
        obstacle = _obstacle(value, self.mu, self.theta)
        # A distribution that asks for its arguments to be checked warns; scvi-tools' models do not ask.
        if not obstacle and self._validate_args and not _warned_of(value):
            obstacle = _NEGATIVE
        if obstacle:
            return _left(self, obstacle, theirs, value)
        _count(type(self).__name__)
        return _elements("negative_binomial", (self.mu, _per_gene(self.theta)), value, self._eps)

    return log_prob


def _zero_inflated(theirs: LogProb) -> LogProb:
    @functools.wraps(theirs)
    def log_prob(self: Any, value: Tensor) -> Tensor:
        if not _active:
            return theirs(self, value)
        obstacle = _obstacle(value, self.mu, self.theta, self.zi_logits)
        # A negative value counts as a zero in scvi-tools' formula.
        if not obstacle and not _warned_of(value):
            obstacle = _NEGATIVE
        if obstacle:
            return _left(self, obstacle, theirs, value)
        _count(type(self).__name__)
        params = (self.mu, _per_gene(self.theta), self.zi_logits)
        return _elements("zero_inflated_negative_binomial", params, value, ZINB_EPS)

    return log_prob


def _poisson(theirs: LogProb) -> LogProb:
    @functools.wraps(theirs)
    def log_prob(self: Any, value: Tensor) -> Tensor:
        if not _active:
            return theirs(self, value)
        obstacle = _obstacle(value, self.rate)
        # torch's Poisson refuses what is no count, unless it was made with validate_args=False.
        if not obstacle and self._validate_args and not _are_counts(value):
            obstacle = "values that are no counts"
        if obstacle:
            return _left(self, obstacle, theirs, value)
        _count(type(self).__name__)
        return _elements("poisson_rate", (self.rate,), value, 0.0)

    return log_prob


def _autozi(theirs: Callable[..., Tensor], distribution: Any) -> Callable[..., Tensor]:
    @functools.wraps(theirs)
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
        """AutoZI (Clivio et al. 2019) mixes a ZINB and an NB of one mean and dispersion, which is again a ZINB.

        With d the weight of the NB and a the logit of the additional zeros, sigmoid(-a) of the ZINB is NB, too: the
        weights of a certain zero and of the NB are (1 - d) sigmoid(a) and d + (1 - d) sigmoid(-a). The logarithm of
        their ratio is a + log(1 - d) - log(1 + d e^a). scvi-tools adds `eps_log` to d and to 1 - d.
        """
        if not _active or _obstacle(x, px_rate, px_r, px_dropout) or bernoulli_params.dim() > 2:
            # Its distributions say why.
            return theirs(self, x, px_rate, px_r, px_dropout, bernoulli_params, eps_log, **kwargs)
        log_keep = torch.log(1.0 - bernoulli_params + eps_log)
        log_d = torch.log(bernoulli_params + eps_log)
        zi_logits = px_dropout + log_keep - F.softplus(px_dropout + log_d)
        return -distribution(mu=px_rate, theta=px_r, zi_logits=zi_logits).log_prob(x).sum(dim=-1)

    return get_reconstruction_loss


def _fused_optimizer(theirs: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(theirs)
    def creator(self: Any, optimizer_cls: Any) -> Callable[..., torch.optim.Optimizer]:
        if not (
            _active and _active[-1].fused_adam and optimizer_cls in (torch.optim.Adam, torch.optim.AdamW)
        ):
            return theirs(self, optimizer_cls)

        def create(params: Any) -> torch.optim.Optimizer:
            params = list(params)
            plain = all(
                type(p) in (torch.nn.Parameter, Tensor)
                and p.is_floating_point()
                and p.layout == torch.strided
                and p.device.type in ("cpu", "cuda")
                for p in params
            )
            _count(
                "fused Adam", "" if plain else "parameters other than plain floats on a CPU or a CUDA device"
            )
            return theirs(self, functools.partial(optimizer_cls, fused=True) if plain else optimizer_cls)(
                params
            )

        return create

    return creator


_NEGATIVE = "negative values"
_SHAPES = "shapes other than one (cells, genes) of all, as for several samples at a time"


def _obstacle(value: Any, mean: Tensor, *others: Tensor) -> str:
    """Why the op does not serve a call, in words; empty where it does."""
    if not isinstance(value, Tensor) or value.layout != torch.strided:
        return "values that are no dense tensor"
    if mean.dim() != 2 or value.shape != mean.shape or any(other.shape != mean.shape for other in others):
        return _SHAPES
    if mean.numel() == 0:
        return "nothing to compute"
    device = mean.device.type
    # The reference serves only who has chosen it: it is no faster than scvi-tools.
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


def _left(distribution: Any, obstacle: str, theirs: LogProb, value: Any) -> Tensor:
    """The call by scvi-tools' own code, or with `strict` an error."""
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
            f"fastvae.integrations.scvi: {name}.log_prob cannot be served: {obstacle}{found}; without strict=True "
            "scvi-tools' own formula takes such calls"
        )
    _count(name, obstacle)
    return theirs(distribution, value)


def _count(name: str, obstacle: str = "") -> None:
    if torch.compiler.is_compiling():
        return
    if obstacle:
        _fell_back[name][obstacle] += 1
    else:
        _served[name] += 1


def _elements(row: str, params: tuple[Tensor, ...], value: Tensor, eps: float) -> Tensor:
    """log p of each element. Parameters that autocast left in half precision are taken as the numbers they are."""
    params = tuple(param.to(params[0].dtype) for param in params)
    return nll_elements(row, params, value, (eps,), -1.0)


def _per_gene(theta: Tensor) -> Tensor:
    """(G,) where theta (B, G) is one row for all cells, which is how scvi-tools' constructors broadcast it."""
    if theta.stride(0) != 0:
        return theta
    if not torch.compiler.is_compiling():
        # What was broadcast, so that autograd does not go through a gradient of every cell.
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
    """Whether every value is a whole number, 0 or more: what their `support` asks, in a tenth of the time."""
    if not value.is_floating_point():
        return bool(value.min() >= 0)
    # The sum is 0 if and only if every fraction is: none is negative, and a NaN stays one.
    return bool((value.frac().abs_().sum() == 0) & (value.min() >= 0))


def _warned_of(value: Tensor) -> bool:
    """Whether no value is negative. Warns, as scvi-tools does, of values that are no counts."""
    if _are_counts(value):
        return True
    if bool(value.min() < 0):
        return False  # scvi-tools' own log_prob will warn
    settings = importlib.import_module("scvi").settings
    warnings.warn(
        "The value argument must be within the support of the distribution",
        UserWarning,
        stacklevel=settings.warnings_stacklevel + 1,
    )
    return True
