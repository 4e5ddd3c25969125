"""Counts: of anything, and of genes in cells."""

from typing import Any

import torch
from torch import Tensor, nn

from ..functional.checks import check_choice
from .base import KernelCall, Likelihood

__all__ = ["NegativeBinomial", "Poisson", "ZeroInflatedNegativeBinomial"]


class Poisson(Likelihood):
    """Independent counts. `params` are log-rates: the decoder ends without an exponential.

    The data are whole numbers in any type, integers read as they are; `functional.poisson_nll(..., validate=True)`
    looks whether they are.
    """

    def kernel_call(self, params: Tensor) -> KernelCall:
        return "poisson", [params], []

    def mean(self, params: Tensor) -> Tensor:
        return torch.exp(params)

    @torch.no_grad()
    def sample(self, params: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Counts as numbers of the type of `params`. Raises ValueError for a rate that this type cannot hold."""
        return _poisson("Poisson", torch.exp(params), generator)


# torch.poisson counts in int64. From here on a count is a normal draw, which differs by less than float64 rounds off.
_MOST = 1e16


def _poisson(name: str, rate: Tensor, generator: torch.Generator | None) -> Tensor:
    most = min(_MOST, torch.finfo(rate.dtype).max)
    large = rate > most
    counts = torch.poisson(rate.clamp(max=most), generator=generator)
    if not large.any():
        return counts
    if not rate.isfinite().all():
        raise ValueError(
            f"fastvae.likelihoods.{name}.sample: `params` must give rates that "
            f"{str(rate.dtype).removeprefix('torch.')} can hold, at most {torch.finfo(rate.dtype).max:.2g}, got "
            f"{rate.max().item()}"
        )
    noise = torch.randn(rate.shape, dtype=rate.dtype, device=rate.device, generator=generator)
    return torch.where(large, rate + rate.sqrt() * noise, counts)


class NegativeBinomial(Likelihood):
    """Counts of genes in cells, with the variance mean + mean^2 / theta (Lopez et al. 2018, scvi-tools).

    `params` is a tuple of the decoder's raw outputs: `(logits, library)`, with `dispersion="gene-cell"` also
    `log_dispersion` (B, features): mean = library * softmax(logits) over the genes, theta = e^log_dispersion. `logits`
    (B, features); `library` (B,) or (B, 1), usually the cell's total count. The data are counts, integer or floating,
    dense or torch.sparse_csr.

    `dispersion="gene"`: one theta for every gene, trained: `log_dispersion`, a parameter of this module that starts at
    0. Give it to the optimiser with `elbo.parameters()`.
    """

    _inflated = False

    def __init__(self, features: int, dispersion: str = "gene") -> None:
        super().__init__()
        where = f"likelihoods.{type(self).__name__}"
        if not isinstance(features, int) or isinstance(features, bool):
            raise TypeError(f"fastvae.{where}: `features` must be an int, got {type(features).__name__}")
        if features < 1:
            raise ValueError(f"fastvae.{where}: `features` must be at least 1, got {features}")
        check_choice(where, "dispersion", dispersion, ("gene", "gene-cell"))
        self.features, self.dispersion = features, dispersion
        if dispersion == "gene":
            self.log_dispersion = nn.Parameter(torch.empty(features))
            self.reset_parameters()

    def reset_parameters(self) -> None:
        """Give the log-dispersion of every gene its start, 0: after `to_empty`, say."""
        if self.dispersion == "gene":
            nn.init.zeros_(self.log_dispersion)

    def kernel_call(self, params: Any) -> KernelCall:
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
        # Beyond these the counts are Poisson, or 0 but for one cell in e^60, and theta would over- or underflow.
        theta = torch.exp(log_dispersion.clamp(-60.0, 60.0)).expand_as(rate)
        rate = torch._standard_gamma(theta.contiguous(), generator=generator) * (rate / theta)
        counts = _poisson(type(self).__name__, rate, generator)
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
        return f"{self.features}, dispersion={self.dispersion!r}"


class ZeroInflatedNegativeBinomial(NegativeBinomial):
    """`NegativeBinomial` where a count is 0 with probability sigmoid(zi_logits) besides (Risso et al. 2018).

    `params` ends with `zi_logits` (B, features): `(logits, library, zi_logits)`, with `dispersion="gene-cell"`
    `(logits, library, log_dispersion, zi_logits)`.
    """

    _inflated = True
