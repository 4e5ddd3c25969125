"""Likelihoods: what the decoder's output means. Each is a small module that an `ELBO` takes by name or by object.

Your own: any `nn.Module` with `nll(params, target) -> (B,)` works in `fastvae.ELBO`. Subclass `Likelihood` and give
`row` instead of `nll` to have a fused kernel serve it.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import functional, reference
from .functional import _bounded, _checked_bounds, _checked_positive, _checked_scale
from .reference import _BERNOULLI_NUMBERS

__all__ = [
    "Bernoulli",
    "Categorical",
    "ContinuousBernoulli",
    "DiscretizedLogistic",
    "DiscretizedLogisticMixture",
    "Gaussian",
    "Laplace",
    "Likelihood",
    "NegativeBinomial",
    "Poisson",
    "Product",
    "StudentT",
    "ZeroInflatedNegativeBinomial",
]

# A backend's row: the likelihood's name there, its tensors and its constants.
Row = tuple[str, list[Tensor], list[float]]


class Likelihood(nn.Module):
    """p(data | params): the base of the likelihood modules. `params` is what the decoder returns.

    A subclass gives `row`, `mean` and `sample`, or replaces `nll` altogether.
    """

    def row(self, params: Any) -> Row:
        """The kernel that serves this likelihood: (name, tensors, constants) for the backend."""
        raise NotImplementedError(f"{type(self).__name__} must define `row` or `nll`")

    def nll(self, params: Any, target: Tensor) -> Tensor:
        """-log p(target | params) of every row, (B,), in nats."""
        name, tensors, constants = self.row(params)
        return functional._nll(name, tensors, target, constants)[0]

    def mean(self, params: Any) -> Tensor:
        """The expected data, differentiable: what to show as a reconstruction."""
        raise NotImplementedError(f"{type(self).__name__} must define `mean`")

    def sample(self, params: Any, generator: torch.Generator | None = None) -> Tensor:
        """A draw of data, without a gradient."""
        raise NotImplementedError(f"{type(self).__name__} must define `sample`")

    def channels(self, c: int) -> int:
        """How many channels the decoder must give for `c` channels of data."""
        return c


class Bernoulli(Likelihood):
    """Independent binary data. `params` are logits: the decoder ends without a sigmoid.

    `from_probs=True` is for a decoder that does end with one: `params` are probabilities. The loss is then the same
    number as `F.binary_cross_entropy` gives, its limits included: an exact 0 or 1 counts as a logit of -100 or 100, and
    passes no gradient. Logits are the better choice: they are exact there, faster, and learn from sure mistakes.
    """

    def __init__(self, from_probs: bool = False) -> None:
        super().__init__()
        self.from_probs = from_probs

    def row(self, params: Tensor) -> Row:
        return "bernoulli", [_logit(params) if self.from_probs else params], []

    def mean(self, params: Tensor) -> Tensor:
        return params if self.from_probs else torch.sigmoid(params)

    @torch.no_grad()
    def sample(self, params: Tensor, generator: torch.Generator | None = None) -> Tensor:
        return torch.bernoulli(self.mean(params), generator=generator)

    def extra_repr(self) -> str:
        return "from_probs=True" if self.from_probs else ""


def _logit(probs: Tensor) -> Tensor:
    """log(p / (1 - p)), finite on all of [0, 1], in the dtype of `probs`."""
    if not isinstance(probs, Tensor) or not probs.is_floating_point() or not functional._is_dense(probs):
        return probs  # the checks of the loss have the words for it
    p = probs if probs.dtype == torch.float64 else probs.float()
    limits = torch.finfo(p.dtype)
    # Clamped before the logarithm: clamping after it would leave a gradient of 0 * inf at the ends.
    inside = torch.logit(p.clamp(limits.tiny, 1 - limits.eps / 2))
    ends = torch.where(p >= 1, 100.0, torch.where(p <= 0, -100.0, inside))
    return ends.to(probs.dtype)


class Gaussian(Likelihood):
    """Independent normal data; `params` is the mean, or mean and log-variance. Where the variance comes from:

    - `scale=s`, a positive float: the standard deviation, the same everywhere.
    - `scale="learned"`: one variance for all elements, trained: `logvar`, a parameter of this module that starts at 0.
      Give it to the optimiser with `elbo.parameters()`.
    - `scale="per_element"`: from the decoder, which returns mean and log-variance packed along dimension 1,
      (B, 2C, ...) for data (B, C, ...), or as a pair.

    `logvar_bounds=(lo, hi)` keeps a log-variance v that is learned or given per element between bounds: in its place
    stands mid + half tanh((v - mid) / half), mid = (lo + hi) / 2 and half = (hi - lo) / 2, which is v in the middle and
    has a gradient beyond them. Without it a decoder that meets some data exactly, flat parts of an image, drives its
    variance to 0 there and the loss to minus infinity.
    """

    def __init__(self, scale: float | str = 1.0, *, logvar_bounds: tuple[float, float] | None = None) -> None:
        super().__init__()
        if isinstance(scale, Tensor) or (isinstance(scale, str) and scale not in ("learned", "per_element")):
            kind = TypeError if isinstance(scale, Tensor) else ValueError
            found = "a Tensor" if isinstance(scale, Tensor) else repr(scale)
            raise kind(
                "fastvae.likelihoods.Gaussian: `scale` must be a positive float, 'learned' or 'per_element', "
                f"got {found}"
            )
        if not isinstance(scale, str):
            scale = _checked_scale("likelihoods.Gaussian", scale)
            if logvar_bounds is not None:
                raise ValueError(
                    "fastvae.likelihoods.Gaussian: `logvar_bounds` must be None unless `scale` is 'learned' or "
                    f"'per_element', got {logvar_bounds!r} with `scale` {scale}"
                )
        self.scale = scale
        self.logvar_bounds = (
            None if logvar_bounds is None else _checked_bounds("likelihoods.Gaussian", logvar_bounds)
        )
        if scale == "learned":
            self.logvar = nn.Parameter(torch.zeros(()))

    def row(self, params: Any) -> Row:
        bounds = self.logvar_bounds
        if self.scale == "learned":
            logvar = self.logvar if bounds is None else _bounded(self.logvar, bounds)
            return "gaussian_learned", [params, logvar], []
        if self.scale == "per_element":
            family, constants = ("gaussian", []) if bounds is None else ("gaussian_bounded", list(bounds))
            if _is_pair(params):
                return f"{family}_per_element", list(params), constants
            return f"{family}_head", [params], constants
        return "gaussian", [params], [float(self.scale)]

    def mean(self, params: Any) -> Tensor:
        return self._moments(params)[0]

    @torch.no_grad()
    def sample(self, params: Any, generator: torch.Generator | None = None) -> Tensor:
        mean, std = self._moments(params)
        noise = torch.randn(mean.shape, dtype=mean.dtype, device=mean.device, generator=generator)
        return mean + std * noise

    def _moments(self, params: Any) -> tuple[Tensor, Tensor | float]:
        if self.scale == "per_element":
            mean, logvar = params if _is_pair(params) else params.chunk(2, dim=1)
            return mean, self._std(logvar)
        if self.scale == "learned":
            return params, self._std(self.logvar)
        return params, float(self.scale)

    def _std(self, logvar: Tensor) -> Tensor:
        if self.logvar_bounds is None:
            return torch.exp(logvar / 2)
        return torch.exp(_bounded(logvar, self.logvar_bounds) / 2).to(logvar.dtype)

    def channels(self, c: int) -> int:
        return 2 * c if self.scale == "per_element" else c

    def extra_repr(self) -> str:
        bounds = "" if self.logvar_bounds is None else f", logvar_bounds={self.logvar_bounds}"
        return f"scale={self.scale!r}{bounds}"


class _ScaleFamily(Likelihood):
    """A location and a scale, which come in the ways that `Laplace` describes."""

    family: str

    def __init__(self, scale: float | str = 1.0) -> None:
        super().__init__()
        if isinstance(scale, Tensor) or (isinstance(scale, str) and scale not in ("learned", "per_element")):
            kind = TypeError if isinstance(scale, Tensor) else ValueError
            found = "a Tensor" if isinstance(scale, Tensor) else repr(scale)
            raise kind(
                f"fastvae.likelihoods.{type(self).__name__}: `scale` must be a positive float, 'learned' or "
                f"'per_element', got {found}"
            )
        if not isinstance(scale, str):
            scale = _checked_scale(f"likelihoods.{type(self).__name__}", scale)
        self.scale = scale
        if scale == "learned":
            self.log_scale = nn.Parameter(torch.zeros(()))

    def row(self, params: Any) -> Row:
        if self.scale == "learned":
            return f"{self.family}_learned", [params, self.log_scale], []
        if self.scale == "per_element":
            if _is_pair(params):
                return f"{self.family}_per_element", list(params), []
            return f"{self.family}_head", [params], []
        return self.family, [params], [float(self.scale)]

    def mean(self, params: Any) -> Tensor:
        return self._location_and_scale(params)[0]

    @torch.no_grad()
    def sample(self, params: Any, generator: torch.Generator | None = None) -> Tensor:
        loc, scale = self._location_and_scale(params)
        return loc + scale * self._standard(loc, generator)

    def _standard(self, like: Tensor, generator: torch.Generator | None) -> Tensor:
        """A draw with location 0 and scale 1, in the shape and type of `like`."""
        raise NotImplementedError

    def _location_and_scale(self, params: Any) -> tuple[Tensor, Tensor | float]:
        if self.scale == "per_element":
            loc, log_scale = params if _is_pair(params) else params.chunk(2, dim=1)
            return loc, torch.exp(log_scale)
        if self.scale == "learned":
            return params, torch.exp(self.log_scale)
        return params, float(self.scale)

    def channels(self, c: int) -> int:
        return 2 * c if self.scale == "per_element" else c

    def extra_repr(self) -> str:
        return f"scale={self.scale!r}"


class Laplace(_ScaleFamily):
    """Independent data with the Laplace density e^(-|x - m| / b) / 2b: an L1 loss, normalised.

    `params` is the location m, or location and log-scale. Where the scale b comes from:

    - `scale=b`, a positive float: the same everywhere.
    - `scale="learned"`: one scale for all elements, trained: `log_scale`, a parameter of this module that starts at 0.
      Give it to the optimiser with `elbo.parameters()`.
    - `scale="per_element"`: from the decoder, which returns location and log-scale packed along dimension 1,
      (B, 2C, ...) for data (B, C, ...), or as a pair.
    """

    family = "laplace"

    def _standard(self, like: Tensor, generator: torch.Generator | None) -> Tensor:
        signs = torch.rand(like.shape, dtype=like.dtype, device=like.device, generator=generator) < 0.5
        size = torch.empty_like(like).exponential_(generator=generator)
        return torch.where(signs, -size, size)


class StudentT(_ScaleFamily):
    """Independent data with Student's t of `df` degrees of freedom: a Gaussian that outliers do not drag along.

    `params` is the centre, or centre and log-scale. `scale` as for `Laplace`. The mean exists for df > 1; `mean` gives
    the centre for any.
    """

    family = "student_t"

    def __init__(self, df: float, scale: float | str = 1.0) -> None:
        super().__init__(scale)
        self.df = _checked_positive("likelihoods.StudentT", "df", df)

    def row(self, params: Any) -> Row:
        name, tensors, constants = super().row(params)
        return name, tensors, [self.df, *constants]

    def _standard(self, like: Tensor, generator: torch.Generator | None) -> Tensor:
        normal = torch.randn(like.shape, dtype=like.dtype, device=like.device, generator=generator)
        shape = torch.full_like(normal, self.df / 2, dtype=torch.float64)
        # Small df: a gamma that underflows would make an infinite draw.
        gamma = torch._standard_gamma(shape, generator=generator).clamp(min=torch.finfo(torch.float64).tiny)
        return (normal.double() * torch.rsqrt(gamma / shape)).to(like.dtype)

    def extra_repr(self) -> str:
        return f"df={self.df:g}, {super().extra_repr()}"


class ContinuousBernoulli(Likelihood):
    """Independent data in [0, 1], grey values: the Bernoulli's formula made a density. `params` are logits.

    Loaiza-Ganem and Cunningham 2019. The expected value is not the sigmoid of the logits, as for `Bernoulli`, but
    1 / (1 - e^-a) - 1 / a for a logit a: `mean` gives it.
    """

    def row(self, params: Tensor) -> Row:
        return "continuous_bernoulli", [params], []

    def mean(self, params: Tensor) -> Tensor:
        a = params if params.dtype == torch.float64 else params.float()
        near = a.abs() < 0.5
        # Near 0 by its series; both branches are kept finite outside of their range.
        small, large = torch.where(near, a, 0.0), torch.where(near, 1.0, a)
        series = torch.zeros_like(a)
        for n, number in reversed(list(enumerate(_BERNOULLI_NUMBERS, 1))):
            series = series * small * small + number / math.factorial(2 * n)
        far = -1 / torch.expm1(-large) - 1 / large
        return torch.where(near, 0.5 + small * series, far).to(params.dtype)

    @torch.no_grad()
    def sample(self, params: Tensor, generator: torch.Generator | None = None) -> Tensor:
        a = params.double()
        u = torch.rand(a.shape, dtype=a.dtype, device=a.device, generator=generator)
        # The inverse of the distribution function, for a negative logit: of a positive one it is the mirror image.
        size = a.abs()
        tilted = -torch.log1p(u * torch.expm1(-size)) / size
        draw = torch.where(size == 0, u, tilted)
        return torch.where(a > 0, 1 - draw, draw).to(params.dtype)


class Poisson(Likelihood):
    """Independent counts. `params` are log-rates: the decoder ends without an exponential.

    The data are whole numbers in any type, integers read as they are; `functional.poisson_nll(..., validate=True)`
    looks whether they are.
    """

    def row(self, params: Tensor) -> Row:
        return "poisson", [params], []

    def mean(self, params: Tensor) -> Tensor:
        return torch.exp(params)

    @torch.no_grad()
    def sample(self, params: Tensor, generator: torch.Generator | None = None) -> Tensor:
        return torch.poisson(torch.exp(params), generator=generator)


def _is_pair(params: Any) -> bool:
    return isinstance(params, (tuple, list)) and len(params) == 2


class Categorical(Likelihood):
    """One of V classes at every position: the tokens of a text, or a label. `params` are logits (B, ..., V), classes
    last; the data are the classes' numbers, int64 (B, ...).

    `ignore_index`: data of this number (padding) count for nothing.
    """

    def __init__(self, ignore_index: int = -100) -> None:
        super().__init__()
        functional._checked_index("likelihoods.Categorical", ignore_index)
        self.ignore_index = ignore_index

    def row(self, params: Tensor) -> Row:
        return "categorical", [params], [float(self.ignore_index)]

    def mean(self, params: Tensor) -> Tensor:
        """The classes' probabilities, (B, ..., V)."""
        return torch.softmax(params, -1)

    @torch.no_grad()
    def sample(self, params: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Classes drawn, int64 (B, ...)."""
        dtype = torch.float64 if params.dtype == torch.float64 else torch.float32
        probs = torch.softmax(params, -1, dtype=dtype).flatten(0, -2)
        return torch.multinomial(probs, 1, generator=generator).view(params.shape[:-1])

    def channels(self, c: int) -> int:
        """For c classes: a logit for each."""
        return c

    def extra_repr(self) -> str:
        return f"ignore_index={self.ignore_index}"


class NegativeBinomial(Likelihood):
    """Counts of genes in cells, with the variance mean + mean^2 / theta (Lopez et al. 2018, scvi-tools).

    `params` is a tuple of the decoder's raw outputs: `(logits, library)`, with `dispersion="gene-cell"` also
    `log_dispersion` (B, genes): mean = library * softmax(logits) over the genes, theta = e^log_dispersion. `logits`
    (B, genes); `library` (B,) or (B, 1), usually the cell's total count. The data are counts, integer or floating,
    dense or torch.sparse_csr.

    `dispersion="gene"`: one theta for every gene, trained: `log_dispersion`, a parameter of this module that starts at
    0. Give it to the optimiser with `elbo.parameters()`.
    """

    _inflated = False

    def __init__(self, genes: int, dispersion: str = "gene") -> None:
        super().__init__()
        where = f"likelihoods.{type(self).__name__}"
        if not isinstance(genes, int) or isinstance(genes, bool):
            raise TypeError(f"fastvae.{where}: `genes` must be an int, got {type(genes).__name__}")
        if genes < 1:
            raise ValueError(f"fastvae.{where}: `genes` must be at least 1, got {genes}")
        functional._check_choice(where, "dispersion", dispersion, ("gene", "gene-cell"))
        self.genes, self.dispersion = genes, dispersion
        if dispersion == "gene":
            self.log_dispersion = nn.Parameter(torch.zeros(genes))

    def row(self, params: Any) -> Row:
        logits, library, log_dispersion, zi_logits = self._parts(params)
        if zi_logits is None:
            return "negative_binomial_logits", [logits, log_dispersion, library], []
        return "zero_inflated_negative_binomial_logits", [logits, log_dispersion, zi_logits, library], []

    def mean(self, params: Any) -> Tensor:
        logits, library, _, zi_logits = self._parts(params)
        rate = library.reshape(-1, 1) * torch.softmax(logits, dim=1)
        return rate if zi_logits is None else rate * torch.sigmoid(-zi_logits)

    @torch.no_grad()
    def sample(self, params: Any, generator: torch.Generator | None = None) -> Tensor:
        """Counts as numbers of the type of the logits (float32 for half types), from a Poisson with a Gamma rate."""
        logits, library, log_dispersion, zi_logits = (
            p if p is None or p.dtype == torch.float64 else p.float() for p in self._parts(params)
        )
        rate = library.reshape(-1, 1) * torch.softmax(logits, dim=1)
        theta = torch.exp(log_dispersion).expand_as(rate)
        rate = torch._standard_gamma(theta.contiguous(), generator=generator) * (rate / theta)
        counts = torch.poisson(rate, generator=generator)
        if zi_logits is not None:
            counts = counts * torch.bernoulli(torch.sigmoid(-zi_logits), generator=generator)
        return counts

    def _parts(self, params: Any) -> tuple[Any, Any, Any, Any]:
        """(logits, library, log_dispersion, zi_logits); without additional zeros the last is None."""
        expected = ["logits", "library"]
        expected += ["log_dispersion"] * (self.dispersion == "gene-cell") + ["zi_logits"] * self._inflated
        if not isinstance(params, (tuple, list)) or len(params) != len(expected):
            many = isinstance(params, (tuple, list))
            found = f"{len(params)} values" if many else type(params).__name__
            raise TypeError(
                f"fastvae.likelihoods.{type(self).__name__}: `params` must be the tuple ({', '.join(expected)}), "
                f"got {found}"
            )
        parts = dict(zip(expected, params, strict=True))
        log_dispersion = self.log_dispersion if self.dispersion == "gene" else parts["log_dispersion"]
        return parts["logits"], parts["library"], log_dispersion, parts.get("zi_logits")

    def channels(self, c: int) -> int:
        """Decoder outputs for `c` genes, the library not among them."""
        return c * (1 + (self.dispersion == "gene-cell") + self._inflated)

    def extra_repr(self) -> str:
        return f"{self.genes}, dispersion={self.dispersion!r}"


class ZeroInflatedNegativeBinomial(NegativeBinomial):
    """`NegativeBinomial` where a count is 0 with probability sigmoid(zi_logits) besides (Risso et al. 2018).

    `params` ends with `zi_logits` (B, genes): `(logits, library, zi_logits)`, with `dispersion="gene-cell"`
    `(logits, library, log_dispersion, zi_logits)`.
    """

    _inflated = True


class DiscretizedLogistic(Likelihood):
    """Bytes, and data of fewer `bits`, as levels: a logistic for each, cut into bins (Kingma et al. 2016).

    `params` is (B, 2C, ...), mean and log-scale packed along dimension 1, with data scaled to [-1, 1]; data are uint8
    (B, C, ...), read as they are. nll / (dimensions * ln 2) is the number of bits per dimension: nothing is added.
    Options as in `fastvae.functional.discretized_logistic_nll`.

    With fewer than 8 `bits` higher levels in the data count as the highest one;
    `functional.discretized_logistic_nll(..., validate=True)` looks whether there are any.

    `mean` is a float in [0, 1], for pictures; `sample` gives uint8 levels.
    """

    def __init__(
        self,
        bits: int = 8,
        *,
        log_scale_floor: float = -7.0,
        small_mass: float = 1e-5,
    ) -> None:
        super().__init__()
        self.constants = functional._logistic_constants(
            f"likelihoods.{type(self).__name__}", bits, log_scale_floor, small_mass
        )
        self.bits, self.log_scale_floor, self.small_mass = bits, log_scale_floor, small_mass

    def row(self, params: Tensor) -> Row:
        return "discretized_logistic", [params], self.constants

    def mean(self, params: Tensor) -> Tensor:
        """The expected data over the highest level, right to half a level where the scale is narrower than a bin."""
        mean, log_scale = self._parts(params)
        return ((_clipped_mean(mean, self._scale(log_scale)) + 1) / 2).to(params.dtype)

    @torch.no_grad()
    def sample(self, params: Tensor, generator: torch.Generator | None = None) -> Tensor:
        mean, log_scale = self._parts(params)
        x = mean + self._scale(log_scale) * _logistic_noise(mean, generator)
        return self._level(x).to(torch.uint8)

    def channels(self, c: int) -> int:
        return 2 * c

    def _parts(self, params: Any) -> tuple[Tensor, ...]:
        """Mean and log-scale, float32 at least."""
        params = self._wide(params)
        if params.dim() < 2 or params.shape[1] % 2 != 0:
            raise ValueError(
                f"fastvae.likelihoods.DiscretizedLogistic: `params` must have shape (B, 2C, ...), mean and log-scale "
                f"packed along dimension 1, got {tuple(params.shape)}"
            )
        return params.chunk(2, dim=1)

    def _wide(self, params: Any) -> Tensor:
        functional._check_floating(f"likelihoods.{type(self).__name__}", "params", params)
        wide: Tensor = params if params.dtype == torch.float64 else params.float()
        return wide

    def _scale(self, log_scale: Tensor) -> Tensor:
        return torch.exp(log_scale.clamp(min=self.log_scale_floor))

    def _level(self, x: Tensor) -> Tensor:
        """The level whose bin has x in it."""
        highest = 2**self.bits - 1
        return torch.round((x + 1) / 2 * highest).clamp(0, highest)

    def extra_repr(self) -> str:
        options = {"log_scale_floor": (self.log_scale_floor, -7.0), "small_mass": (self.small_mass, 1e-5)}
        set_ones = [f"{name}={value}" for name, (value, default) in options.items() if value != default]
        return ", ".join([f"bits={self.bits}", *set_ones])


class DiscretizedLogisticMixture(DiscretizedLogistic):
    """PixelCNN++'s likelihood of bytes, and NVAE's and VDVAE's: `k` logistics for each pixel (Salimans et al. 2017).

    `params` is (B, 10k, ...) for colour and (B, 3k, ...) for grey images, in the order of PixelCNN++'s code; data are
    uint8 (B, 3, ...) or (B, 1, ...), read as they are. Green depends on the pixel's red, blue on both. Options as in
    `fastvae.functional.discretized_logistic_mixture_nll`.

    With fewer than 8 `bits` higher levels in the data count as the highest one;
    `functional.discretized_logistic_mixture_nll(..., validate=True)` looks whether there are any.

    `mean` is a float in [0, 1], for pictures; `sample` gives uint8 levels, red first and the others given it.
    """

    def __init__(
        self,
        k: int = 10,
        bits: int = 8,
        *,
        log_scale_floor: float = -7.0,
        small_mass: float = 1e-5,
    ) -> None:
        super().__init__(bits, log_scale_floor=log_scale_floor, small_mass=small_mass)
        self.k = functional._whole("likelihoods.DiscretizedLogisticMixture", "k", k, 1, None)
        self.constants = [k, *self.constants]

    def row(self, params: Tensor) -> Row:
        return "discretized_logistic_mixture", [params], self.constants

    def mean(self, params: Tensor) -> Tensor:
        """The expected data over the highest level; of green and blue, given the expected channels before.

        Right to half a level where a scale is narrower than a bin, and where a channel seldom leaves [-1, 1].
        """
        logits, mean, log_scale, coefficients = self._parts(params)
        weights = torch.softmax(logits, 1)
        channels: list[Tensor] = []  # (B, K, ...) each: every component has its own red
        for c in range(mean.shape[1]):
            at = mean[:, c]
            # As in reference.mixture_means, whose x is one for all components.
            for j, before in enumerate(channels):
                at = at + coefficients[:, c - 1 + j] * before
            channels.append(_clipped_mean(at, self._scale(log_scale[:, c])))
        x = torch.stack([(weights * channel).sum(1) for channel in channels], 1)
        return ((x + 1) / 2).to(params.dtype)

    @torch.no_grad()
    def sample(self, params: Tensor, generator: torch.Generator | None = None) -> Tensor:
        logits, mean, log_scale, coefficients = self._parts(params)
        # The largest of logits plus Gumbel noise is a draw from their softmax.
        uniform = _uniform(logits, generator)
        chosen = (logits - torch.log(-torch.log(uniform))).argmax(1, keepdim=True)
        noise = _logistic_noise(mean[:, :, 0], generator)
        highest = 2**self.bits - 1
        levels: list[Tensor] = []
        for c in range(mean.shape[1]):
            x = [2 * level / highest - 1 for level in levels]
            at = reference.mixture_means(mean, coefficients, x)[c].gather(1, chosen)[:, 0]
            scale = self._scale(log_scale[:, c].gather(1, chosen)[:, 0])
            levels.append(self._level(at + scale * noise[:, c]))
        return torch.stack(levels, 1).to(torch.uint8)

    def channels(self, c: int) -> int:
        if c not in (1, 3):
            raise ValueError(
                f"fastvae.likelihoods.DiscretizedLogisticMixture: data must have 1 or 3 channels, got {c}"
            )
        return functional._planes(self.k, c)

    def _parts(self, params: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """As `reference.mixture_parts`, float32 at least."""
        params = self._wide(params)
        planes = params.shape[1] if params.dim() > 1 else 0
        for channels in (3, 1):
            if planes == functional._planes(self.k, channels):
                return reference.mixture_parts(params, self.k, channels)
        raise ValueError(
            f"fastvae.likelihoods.DiscretizedLogisticMixture: `params` must have shape (B, {10 * self.k}, ...) or "
            f"(B, {3 * self.k}, ...) for {self.k} components, got {tuple(params.shape)}"
        )

    def extra_repr(self) -> str:
        return f"k={self.k}, {super().extra_repr()}"


def _clipped_mean(mean: Tensor, scale: Tensor) -> Tensor:
    """E[clip(x, -1, 1)] of a logistic x: -1 plus the integral over [-1, 1] of P(x > t)."""
    narrow = scale * (F.softplus((mean + 1) / scale) - F.softplus((mean - 1) / scale))
    # The same without the difference, whose digits a wide scale cancels.
    wide = scale.clamp(min=1)
    integral = wide * torch.log1p(torch.sigmoid((mean - 1) / wide) * torch.expm1(2 / wide))
    return (torch.where(scale < 1, narrow, integral) - 1).clamp(-1, 1)  # past the ends by rounding


def _uniform(like: Tensor, generator: torch.Generator | None) -> Tensor:
    """Numbers in the open interval (0, 1), float32."""
    uniform = torch.rand(like.shape, device=like.device, generator=generator)
    return uniform.clamp(2.0**-26, 1 - 2.0**-24)


def _logistic_noise(like: Tensor, generator: torch.Generator | None) -> Tensor:
    return torch.logit(_uniform(like, generator))


class Product(Likelihood):
    """Several heads for several parts of the data, independent given z: their negative log-likelihoods add up.

    `parts` names a likelihood, or an `nn.Module` with `nll`, for each; decoder and data come as dicts with these keys::

        likelihood = Product({"image": DiscretizedLogisticMixture(10), "label": "bernoulli"})
        elbo = fastvae.ELBO(likelihood)
        out = elbo({"image": a, "label": b}, {"image": x, "label": y}, kl=kl)

    `mean`, `sample` and `channels` take and give such dicts too. In `self.parts`, and in the state_dict, a name that
    `nn.ModuleDict` needs for itself, such as "type" or "values", ends with "_".
    """

    def __init__(self, parts: Mapping[str, str | nn.Module]) -> None:
        super().__init__()
        if not isinstance(parts, Mapping):
            raise TypeError(
                f"fastvae.likelihoods.Product: `parts` must be a dict of likelihoods, got {type(parts).__name__}"
            )
        if not parts:
            raise ValueError(
                "fastvae.likelihoods.Product: `parts` must name at least one likelihood, got none"
            )
        self.parts = nn.ModuleDict()
        self._keys: dict[str, str] = {}  # of the parts in `self.parts`, by their names
        for name, part in parts.items():
            if not isinstance(name, str):
                raise TypeError(
                    f"fastvae.likelihoods.Product: `parts` must have strings as keys, got {name!r}"
                )
            if not name or "." in name:
                raise ValueError(
                    f"fastvae.likelihoods.Product: `parts` must have keys that are not empty and without dots, got "
                    f"{name!r}"
                )
            key = name
            while hasattr(self.parts, key) or (key != name and key in parts):
                key += "_"
            self._keys[name] = key
            self.parts[key] = get(part, "likelihoods.Product", f"parts[{name!r}]")

    def nll(self, params: Any, target: Any) -> Tensor:
        return torch.stack(list(self.nll_of_parts(params, target).values())).sum(0)

    def nll_of_parts(self, params: Mapping[str, Any], target: Mapping[str, Any]) -> dict[str, Tensor]:
        """What each part contributes to `nll`, (B,) each."""
        self._check("params", params)
        self._check("target", target)
        nlls = self._each("nll", (params, target))
        first = next(iter(nlls))
        for name, nll in nlls.items():
            if nll.shape != nlls[first].shape:
                raise ValueError(
                    f"fastvae.likelihoods.Product: every part must have the same rows, got "
                    f"{tuple(nlls[first].shape)} of {first!r} and {tuple(nll.shape)} of {name!r}"
                )
        return nlls

    def mean(self, params: Any) -> Any:
        self._check("params", params)
        return self._each("mean", (params,))

    def sample(self, params: Any, generator: torch.Generator | None = None) -> Any:
        self._check("params", params)
        return self._each("sample", (params,), generator)

    def channels(self, c: Any) -> Any:
        self._check("c", c)
        return self._each("channels", (c,))

    def _each(self, method: str, values: Sequence[Mapping[str, Any]], *rest: Any) -> dict[str, Any]:
        """What a method of every part returns for its `values`; an error says in which part it was."""
        found = {}
        for name, key in self._keys.items():
            call = getattr(self.parts[key], method)
            arguments = [*(value[name] for value in values), *rest]
            if torch.compiler.is_compiling():  # a trace, in which not every version of torch takes a try
                found[name] = call(*arguments)
                continue
            try:
                found[name] = call(*arguments)
            except (TypeError, ValueError) as error:
                # The same exception, whatever its class; add_note() came with Python 3.11.
                error.args = (f"fastvae.likelihoods.Product: in part {name!r}: {error}",)
                raise
        return found

    def _check(self, name: str, value: Any) -> None:
        if not isinstance(value, Mapping):
            raise TypeError(
                f"fastvae.likelihoods.Product: `{name}` must be a dict with the keys "
                f"{', '.join(map(repr, self._keys))}, got {type(value).__name__}"
            )
        if value.keys() != self._keys.keys():
            missing = [key for key in self._keys if key not in value]
            unknown = [key for key in value if key not in self._keys]
            found = [
                f"{what} {', '.join(map(repr, keys))}"
                for what, keys in (("missing", missing), ("unknown", unknown))
                if keys
            ]
            raise ValueError(
                f"fastvae.likelihoods.Product: `{name}` must have the keys {', '.join(map(repr, self._keys))}, "
                f"got {list(value)}: {'; '.join(found)}"
            )


BY_NAME: dict[str, type[Likelihood]] = {
    "bernoulli": Bernoulli,
    "gaussian": Gaussian,
    "laplace": Laplace,
    "continuous_bernoulli": ContinuousBernoulli,
    "poisson": Poisson,
    "categorical": Categorical,
}


def get(likelihood: str | nn.Module, where: str = "ELBO", name: str = "likelihood") -> nn.Module:
    """The likelihood module of a name, or the module itself. `where` and `name`: whose argument it is, for messages.

    Raises ValueError for an unknown name and TypeError for something that cannot be a likelihood.
    """
    if isinstance(likelihood, str):
        functional._check_choice(where, name, likelihood, tuple(BY_NAME))
        return BY_NAME[likelihood]()
    if isinstance(likelihood, nn.Module) and callable(getattr(likelihood, "nll", None)):
        return likelihood
    found = likelihood.__name__ + ", a class" if isinstance(likelihood, type) else type(likelihood).__name__
    raise TypeError(
        f"fastvae.{where}: `{name}` must be one of {', '.join(map(repr, BY_NAME))}, or an nn.Module with a method "
        f"`nll(params, target)`, got {found}"
    )
