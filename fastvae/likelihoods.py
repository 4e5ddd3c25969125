"""Likelihoods: what the decoder's output means. Each is a small module that an `ELBO` takes by name or by object.

Your own: any `nn.Module` with `nll(params, target) -> (B,)` works in `fastvae.ELBO`. Subclass `Likelihood` and give
`row` instead of `nll` to have a fused kernel serve it.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn

from . import functional
from .functional import _checked_positive, _checked_scale
from .reference import _BERNOULLI_NUMBERS

__all__ = [
    "Bernoulli",
    "Categorical",
    "ContinuousBernoulli",
    "Gaussian",
    "Laplace",
    "Likelihood",
    "NegativeBinomial",
    "Poisson",
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
    if not isinstance(probs, Tensor) or not probs.is_floating_point():
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
    """

    def __init__(self, scale: float | str = 1.0) -> None:
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
        self.scale = scale
        if scale == "learned":
            self.logvar = nn.Parameter(torch.zeros(()))

    def row(self, params: Any) -> Row:
        if self.scale == "learned":
            return "gaussian_learned", [params, self.logvar], []
        if self.scale == "per_element":
            if _is_pair(params):
                return "gaussian_per_element", list(params), []
            return "gaussian_head", [params], []
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
            return mean, torch.exp(logvar / 2)
        if self.scale == "learned":
            return params, torch.exp(self.logvar / 2)
        return params, float(self.scale)

    def channels(self, c: int) -> int:
        return 2 * c if self.scale == "per_element" else c

    def extra_repr(self) -> str:
        return f"scale={self.scale!r}"


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


BY_NAME: dict[str, type[Likelihood]] = {
    "bernoulli": Bernoulli,
    "gaussian": Gaussian,
    "laplace": Laplace,
    "continuous_bernoulli": ContinuousBernoulli,
    "poisson": Poisson,
    "categorical": Categorical,
}


def get(likelihood: str | nn.Module) -> nn.Module:
    """The likelihood module of a name, or the module itself.

    Raises ValueError for an unknown name and TypeError for something that cannot be a likelihood.
    """
    if isinstance(likelihood, str):
        functional._check_choice("ELBO", "likelihood", likelihood, tuple(BY_NAME))
        return BY_NAME[likelihood]()
    if isinstance(likelihood, nn.Module) and callable(getattr(likelihood, "nll", None)):
        return likelihood
    found = likelihood.__name__ + ", a class" if isinstance(likelihood, type) else type(likelihood).__name__
    raise TypeError(
        f"fastvae.ELBO: `likelihood` must be one of {', '.join(map(repr, BY_NAME))}, or an nn.Module with a method "
        f"`nll(params, target)`, got {found}"
    )
