"""Counts in general, counts of genes in cells, and counts of items or words whose sum is given."""

from typing import Any

import torch
from torch import Tensor, nn

from ..functional.checks import check_choice
from .base import KernelCall, Likelihood

__all__ = [
    "Multinomial",
    "NegativeBinomial",
    "NegativeBinomialMixture",
    "Poisson",
    "ZeroInflatedNegativeBinomial",
]


class Poisson(Likelihood):
    """Independent counts. `params` are log-rates: the decoder must not end with an exponential.

    The data are whole numbers of any dtype, and integers are not scaled. `nll(..., validate=True)` checks that they are
    counts.
    """

    def kernel_call(self, params: Tensor) -> KernelCall:
        return "poisson", [params], []

    def mean(self, params: Tensor) -> Tensor:
        return torch.exp(params)

    @torch.no_grad()
    def sample(self, params: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Draw counts in the dtype of `params`. Raises ValueError if a rate is out of the range of this dtype."""
        return _poisson("Poisson", torch.exp(params), generator)


# torch.poisson computes in int64. Larger counts are drawn from a normal distribution, which is within float64's
# rounding.
_MAX_POISSON_RATE = 1e16


def _poisson(name: str, rate: Tensor, generator: torch.Generator | None) -> Tensor:
    limit = min(_MAX_POISSON_RATE, torch.finfo(rate.dtype).max)
    large = rate > limit
    counts = torch.poisson(rate.clamp(max=limit), generator=generator)
    if not large.any():
        return counts
    if not rate.isfinite().all():
        raise ValueError(
            f"fastvae.likelihoods.{name}.sample: `params` must give rates within the range of "
            f"{str(rate.dtype).removeprefix('torch.')}, at most {torch.finfo(rate.dtype).max:.2g}, got "
            f"{rate.max().item()}"
        )
    noise = torch.randn(rate.shape, dtype=rate.dtype, device=rate.device, generator=generator)
    return torch.where(large, rate + rate.sqrt() * noise, counts)


def _gamma_rate(mean: Tensor, log_dispersion: Tensor, generator: torch.Generator | None) -> Tensor:
    """Draw the rates of Poisson counts that are negative binomial with this mean."""
    # Beyond these limits the counts are Poisson, or 0 but for one cell in e^60, and theta would over- or underflow.
    theta = torch.exp(log_dispersion.clamp(-60.0, 60.0)).expand_as(mean)
    return torch._standard_gamma(theta.contiguous(), generator=generator) * (mean / theta)


def _check_features(where: str, features: int) -> None:
    if not isinstance(features, int) or isinstance(features, bool):
        raise TypeError(f"fastvae.{where}: `features` must be an int, got {type(features).__name__}")
    if features < 1:
        raise ValueError(f"fastvae.{where}: `features` must be at least 1, got {features}")


def _with_features(likelihood: Any, name: str, value: Any) -> Any:
    """Return `value` after a check that it has the features of the likelihood. The loss checks all else."""
    if isinstance(value, Tensor) and value.dim() == 2 and value.shape[1] != likelihood.features:
        raise ValueError(
            f"fastvae.likelihoods.{type(likelihood).__name__}: `{name}` must have {likelihood.features} features, got "
            f"shape {tuple(value.shape)}"
        )
    return value


class NegativeBinomial(Likelihood):
    """Counts of genes in cells, with variance mean + mean^2 / theta (Lopez et al. 2018, scvi-tools).

    `params` is a tuple of the decoder's raw outputs, `(logits, library)`; with `dispersion="gene-cell"`, it is
    `(logits, library, log_dispersion)`. The mean is library * softmax(logits) over the genes, and theta is
    e^log_dispersion. `logits` and `log_dispersion` are (B, features); `library` is (B,) or (B, 1), usually the total
    count of the cell. The data are counts, integer or floating, dense or torch.sparse_csr.

    With `dispersion="gene"`, every gene has one trained theta: `log_dispersion` is a parameter of this module that
    starts at 0. Pass it to the optimiser with `elbo.parameters()`.
    """

    _zero_inflated = False

    def __init__(self, features: int, dispersion: str = "gene") -> None:
        super().__init__()
        where = f"likelihoods.{type(self).__name__}"
        _check_features(where, features)
        check_choice(where, "dispersion", dispersion, ("gene", "gene-cell"))
        self.features, self.dispersion = features, dispersion
        if dispersion == "gene":
            self.log_dispersion = nn.Parameter(torch.empty(features))
            self.reset_parameters()

    def reset_parameters(self) -> None:
        """Reset the log-dispersion of every gene to its initial value, 0, for instance after `to_empty`."""
        if self.dispersion == "gene":
            nn.init.zeros_(self.log_dispersion)

    def kernel_call(self, params: Any) -> KernelCall:
        logits, library, log_dispersion, zi_logits = self._split(params)
        if zi_logits is None:
            return "negative_binomial_logits", [logits, log_dispersion, library], []
        return "zero_inflated_negative_binomial_logits", [logits, log_dispersion, zi_logits, library], []

    def mean(self, params: Any) -> Tensor:
        logits, library, _, zi_logits = self._split(params)
        rate = library.reshape(-1, 1) * torch.softmax(logits, dim=1)
        return rate if zi_logits is None else rate * torch.sigmoid(-zi_logits)

    @torch.no_grad()
    def sample(self, params: Any, generator: torch.Generator | None = None) -> Tensor:
        """Draw counts in the dtype of the logits (float32 for half types), from a Poisson with a Gamma rate."""
        logits, library, log_dispersion, zi_logits = (
            p if p is None or p.dtype == torch.float64 else p.float() for p in self._split(params)
        )
        rate = library.reshape(-1, 1) * torch.softmax(logits, dim=1)
        counts = _poisson(type(self).__name__, _gamma_rate(rate, log_dispersion, generator), generator)
        if zi_logits is not None:
            counts = counts * torch.bernoulli(torch.sigmoid(-zi_logits), generator=generator)
        return counts

    def _split(self, params: Any) -> tuple[Any, Any, Any, Any]:
        """Return (logits, library, log_dispersion, zi_logits); zi_logits is None without zero inflation."""
        expected = ["logits", "library"]
        expected += ["log_dispersion"] * (self.dispersion == "gene-cell") + [
            "zi_logits"
        ] * self._zero_inflated
        if not isinstance(params, (tuple, list)) or len(params) != len(expected):
            is_sequence = isinstance(params, (tuple, list))
            found = f"{len(params)} values" if is_sequence else type(params).__name__
            raise TypeError(
                f"fastvae.likelihoods.{type(self).__name__}: `params` must be the tuple ({', '.join(expected)}), "
                f"got {found}"
            )
        parts = dict(zip(expected, params, strict=True))
        log_dispersion = self.log_dispersion if self.dispersion == "gene" else parts["log_dispersion"]
        logits = _with_features(self, "logits", parts["logits"])
        return logits, parts["library"], log_dispersion, parts.get("zi_logits")

    def channels(self, c: int) -> int:
        """The number of decoder outputs for `c` genes, without the library."""
        return c * (1 + (self.dispersion == "gene-cell") + self._zero_inflated)

    def extra_repr(self) -> str:
        return f"{self.features}, dispersion={self.dispersion!r}"


class ZeroInflatedNegativeBinomial(NegativeBinomial):
    """`NegativeBinomial` with additional zeros, which have the probability sigmoid(zi_logits) (Risso et al. 2018).

    `params` ends with `zi_logits` (B, features): it is `(logits, library, zi_logits)`, or with `dispersion="gene-cell"`
    `(logits, library, log_dispersion, zi_logits)`.
    """

    _zero_inflated = True


class NegativeBinomialMixture(Likelihood):
    """Counts of proteins in cells, some of which are background: a mixture of two negative binomials.

    This is the likelihood of proteins in totalVI (Gayoso et al. 2021; scvi-tools' NegativeBinomialMixture). `params` is
    a tuple of the decoder's outputs, `(mean1, mean2, mixture_logits)`, each (B, features). With the probability
    sigmoid(mixture_logits) a count belongs to the first component, in totalVI the background, of mean `mean1`, and
    otherwise to the second, of mean `mean2`. Means are above 0. Every feature has one trained theta for both
    components, with the variances mean + mean^2 / theta: its logarithm is the parameter `log_dispersion` (features,),
    which starts at 0. Pass it to the optimiser with `elbo.parameters()`. A theta for each cell, (B, features), may be
    passed to `functional.negative_binomial_mixture_nll`.

    The data are counts, integer or floating, dense or torch.sparse_csr.
    """

    def __init__(self, features: int) -> None:
        super().__init__()
        _check_features("likelihoods.NegativeBinomialMixture", features)
        self.features = features
        self.log_dispersion = nn.Parameter(torch.empty(features))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Reset the log-dispersion of every feature to its initial value, 0, for instance after `to_empty`."""
        nn.init.zeros_(self.log_dispersion)

    def kernel_call(self, params: Any) -> KernelCall:
        mean1, mean2, mixture_logits = self._split(params)
        # From e^60 on the counts are Poisson to all digits, and an infinite theta would have no gradient but NaN.
        theta = torch.exp(self.log_dispersion.clamp(max=60.0))
        return "negative_binomial_mixture", [mean1, theta, mean2, mixture_logits], [0.0]

    def mean(self, params: Any) -> Tensor:
        mean1, mean2, mixture_logits = self._split(params)
        return torch.sigmoid(mixture_logits) * mean1 + torch.sigmoid(-mixture_logits) * mean2

    @torch.no_grad()
    def sample(self, params: Any, generator: torch.Generator | None = None) -> Tensor:
        """Draw counts in the dtype of the means (float32 for half types), from a Poisson with a Gamma rate."""
        mean1, mean2, mixture_logits = (
            p if p.dtype == torch.float64 else p.float() for p in self._split(params)
        )
        is_first = torch.bernoulli(torch.sigmoid(mixture_logits), generator=generator) == 1
        mean = torch.where(is_first, mean1, mean2)
        rate = _gamma_rate(mean, self.log_dispersion.to(mean.dtype), generator)
        return _poisson("NegativeBinomialMixture", rate, generator)

    def _split(self, params: Any) -> tuple[Tensor, Tensor, Tensor]:
        if not isinstance(params, (tuple, list)) or len(params) != 3:
            found = f"{len(params)} values" if isinstance(params, (tuple, list)) else type(params).__name__
            raise TypeError(
                "fastvae.likelihoods.NegativeBinomialMixture: `params` must be the tuple (mean1, mean2, "
                f"mixture_logits), got {found}"
            )
        mean1, mean2, mixture_logits = params
        return _with_features(self, "mean1", mean1), mean2, mixture_logits

    def channels(self, c: int) -> int:
        """The number of decoder outputs for `c` features."""
        return 3 * c

    def extra_repr(self) -> str:
        return str(self.features)


class Multinomial(Likelihood):
    """Counts of which only the sum of each row is given, such as the items of a user or the words of a document.

    `params` are logits (B, features): the decoder must not end with a softmax. The data are counts (B, features),
    integer or floating, dense or torch.sparse_csr; of each row, its sum n is given, and every one of the n draws falls
    on a feature with the probability softmax(logits). This is the likelihood of Mult-VAE (Liang et al. 2018) and of
    topic models, including the multinomial coefficient; see `functional.multinomial_nll`.
    """

    def __init__(self, features: int) -> None:
        super().__init__()
        _check_features("likelihoods.Multinomial", features)
        self.features = features

    def kernel_call(self, params: Tensor) -> KernelCall:
        return "multinomial", [_with_features(self, "params", params)], []

    def mean(self, params: Tensor) -> Tensor:
        """The probabilities of the features, (B, features): the expected counts of a row whose sum is 1."""
        return torch.softmax(params, 1)

    @torch.no_grad()
    def sample(
        self, params: Tensor, generator: torch.Generator | None = None, *, total: int | Tensor = 1
    ) -> Tensor:
        """Draw counts (B, features) in the dtype of `params` (float32 for half types). Each row sums to its `total`.

        `total` is an int, or an integer tensor (B,). Raises TypeError or ValueError if it is neither, or below 0.
        """
        totals = self._totals(params, total)
        dtype = torch.float64 if params.dtype == torch.float64 else torch.float32
        probs = torch.softmax(params, 1, dtype=dtype)
        counts, most = torch.zeros_like(probs), int(totals.max()) if len(totals) else 0
        for start in range(0, most, _DRAWS_AT_A_TIME):
            size = min(_DRAWS_AT_A_TIME, most - start)
            drawn = torch.multinomial(probs, size, replacement=True, generator=generator)
            wanted = torch.arange(start, start + size, device=totals.device) < totals.unsqueeze(1)
            counts.scatter_add_(1, drawn, wanted.to(dtype))
        return counts

    def _totals(self, params: Tensor, total: int | Tensor) -> Tensor:
        where, rows = "likelihoods.Multinomial.sample", len(params)
        if isinstance(total, int) and not isinstance(total, bool):
            total = torch.full((rows,), total, device=params.device)
        if not isinstance(total, Tensor) or total.is_floating_point():
            found = f"a tensor of {total.dtype}" if isinstance(total, Tensor) else type(total).__name__
            raise TypeError(f"fastvae.{where}: `total` must be an int or a tensor of integers, got {found}")
        if total.shape != (rows,):
            raise ValueError(
                f"fastvae.{where}: `total` must be an int or have the shape ({rows},), one for every row of `params`, "
                f"got {tuple(total.shape)}"
            )
        if (total < 0).any():
            raise ValueError(f"fastvae.{where}: `total` must be at least 0, got {total.min().item()}")
        return total.to(params.device)

    def extra_repr(self) -> str:
        return str(self.features)


# The draws of a row that `Multinomial.sample` holds in memory at a time.
_DRAWS_AT_A_TIME = 1024
