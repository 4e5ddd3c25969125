"""The forms in which an encoder gives the scale of a posterior."""

from dataclasses import dataclass, field
from typing import Any

from .checks import check_choice, checked_not_negative, checked_positive
from .continuous import checked_bounds

__all__ = ["LogStd", "LogVar", "ScaleForm", "Softplus", "Variance"]

# float32 cannot hold the inverse of a smaller scale.
_LEAST = 1e-30


def _checked_eps(where: str, eps: Any) -> float:
    value = checked_not_negative(where, "eps", eps)
    if 0.0 < value < _LEAST:
        raise ValueError(f"fastvae.{where}: `eps` must be 0 or at least {_LEAST}, got {value}")
    return value


@dataclass(frozen=True)
class ScaleForm:
    """What the second tensor of a posterior means. Use one of its subclasses, or their names: `"logvar"`, `"log_std"`,
    `"softplus"` or `"variance"`."""

    kernel: tuple[str, list[float]] = field(init=False, repr=False, compare=False)
    """The name of the form in the backends, and its constants."""

    def _set(self, name: str, *constants: float) -> None:
        object.__setattr__(self, "kernel", (name, list(constants)))


@dataclass(frozen=True)
class LogVar(ScaleForm):
    """The encoder gives the log-variance v: sigma^2 = e^v (Kingma and Welling 2014).

    Args:
        clamp: (lo, hi), a hard clamp, with no gradient outside. Latent diffusion and diffusers use (-30, 20).
        bounds: (lo, hi), the smooth clamp of `fastvae.likelihoods.Gaussian`, which has a gradient outside too:
            mid + half tanh((v - mid) / half), with the middle and half the width of the bounds.
    """

    clamp: tuple[float, float] | None = None
    bounds: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        if self.clamp is not None and self.bounds is not None:
            raise ValueError(
                "fastvae.posteriors.LogVar: `clamp` and `bounds` exclude each other, got "
                f"{self.clamp} and {self.bounds}"
            )
        for name in ("clamp", "bounds"):
            given = getattr(self, name)
            if given is not None:
                # A tuple, because a form is a value, which a list would keep from being hashed.
                pair = checked_bounds("posteriors.LogVar", given, name)
                object.__setattr__(self, name, pair)
                self._set(f"logvar_{name}", *pair)
                return
        self._set("logvar")


@dataclass(frozen=True)
class LogStd(ScaleForm):
    """The encoder gives log sigma: sigma = e^v + eps.

    VDVAE uses it plainly. NVAE is `LogStd(soft_clamp=5, eps=1e-2)`.

    Args:
        soft_clamp: c, with which v and **also the mean** first become c tanh(v / c) and c tanh(mu / c).
        eps: added to the standard deviation, after the clamp.
    """

    soft_clamp: float | None = None
    eps: float = 0.0

    def __post_init__(self) -> None:
        where = "posteriors.LogStd"
        soft = 0.0 if self.soft_clamp is None else checked_positive(where, "soft_clamp", self.soft_clamp)
        self._set("log_std", soft, _checked_eps(where, self.eps))


@dataclass(frozen=True)
class Softplus(ScaleForm):
    """The standard deviation is softplus(v) + eps = log(1 + e^v) + eps, as in stable-audio-tools and RAVE."""

    eps: float = 1e-4

    def __post_init__(self) -> None:
        self._set("softplus", _checked_eps("posteriors.Softplus", self.eps))


@dataclass(frozen=True)
class Variance(ScaleForm):
    """The variance is e^v + eps, as in scvi-tools."""

    eps: float = 1e-4

    def __post_init__(self) -> None:
        self._set("variance", _checked_eps("posteriors.Variance", self.eps))


_BY_NAME: dict[str, ScaleForm] = {
    "logvar": LogVar(),
    "log_std": LogStd(),
    "softplus": Softplus(),
    "variance": Variance(),
}
_KERNELS = {name: form.kernel for name, form in _BY_NAME.items()}


def kernel_form(where: str, form: Any) -> tuple[str, list[float]]:
    """Return the name and the constants with which the backends are called."""
    if isinstance(form, str) and form in _KERNELS:
        return _KERNELS[form]
    return checked_form(where, "form", form).kernel


def spelled(form: ScaleForm) -> str:
    """Return what to write for a form: its name, or the call that makes it."""
    for name, kernel in _KERNELS.items():
        if form.kernel == kernel:
            return repr(name)
    return f"fastvae.posteriors.{form}"


def checked_form(where: str, name: str, form: Any) -> ScaleForm:
    """Return the form that `form`, a form or the name of one, stands for."""
    if isinstance(form, ScaleForm) and type(form) is not ScaleForm:
        return form
    if isinstance(form, str):
        check_choice(where, name, form, tuple(_BY_NAME))
        return _BY_NAME[form]
    raise TypeError(
        f"fastvae.{where}: `{name}` must be a form of fastvae.posteriors or the name of one, "
        f"{', '.join(map(repr, _BY_NAME))}, got {form!r}"
    )
