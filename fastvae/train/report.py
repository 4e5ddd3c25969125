"""The result of an evaluation: what all kinds of data have in common, and the checks of its options."""

import dataclasses
import json
import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch import Tensor

from fastvae import functional

from . import files, information
from .errors import InputError
from .factors import Factors
from .module import ACTIVE, VAE

__all__ = ["Report", "check_options", "shared_results"]

_MOST = 10_000  # the largest number of data whose posteriors are compared with each other


@dataclass(frozen=True, kw_only=True)
class Report(ABC):
    """Base class for the results of an evaluation. Values are means over the examples in nats per example, unless noted
    otherwise."""

    run: str
    checkpoint: str
    epoch: int
    data: str
    split: str
    """The part of the data that was evaluated: val or test."""
    samples: int
    seed: int
    neg_elbo: float
    reconstruction: float
    kl: float
    iw_nll: float
    """The importance-weighted bound: its expectation lies between the true NLL and the negative ELBO."""
    active_units: int
    """Units whose posterior mean varies over the examples by more than 0.01 (Burda et al. 2016, section 5.2)."""
    latents: int
    mutual_information: float
    """The mutual information of z and the index of the datum, for at most 10,000 examples. It is at most log N."""
    total_correlation: float
    """The total correlation of the dimensions of z, for the same examples."""
    dimension_wise_kl: float | None
    """The KL of the marginal of each dimension from N(0, 1), summed; None if that is not the prior."""
    mig: float | None
    """The mean of `mig_of_factors` (Chen et al. 2018); None without known factors."""
    mig_of_factors: dict[str, dict[str, float]] | None
    """For each factor, its gap, the best dimension of z, their mutual information, and the entropy of the factor."""

    @property
    @abstractmethod
    def num_examples(self) -> int:
        """The number of examples that were used."""

    @abstractmethod
    def table(self) -> Table: ...

    def write(self, path: Path) -> None:
        """Write the results as JSON. Raises InputError if the file cannot be written."""
        # JSON has no NaN.
        values: dict[str, Any] = {
            name: None if isinstance(value, float) and not math.isfinite(value) else value
            for name, value in dataclasses.asdict(self).items()
        }
        files.write(path, (json.dumps(values, indent=2) + "\n").encode())

    def information_rows(self) -> list[tuple[str, float]]:
        """Return the names and values of the parts of the KL, for a table."""
        rows = [("mutual information of x and z", self.mutual_information)]
        rows += [("total correlation of z", self.total_correlation)]
        if self.dimension_wise_kl is not None:
            rows += [("dimension-wise KL", self.dimension_wise_kl)]
        return rows

    def latent_rows(self) -> list[tuple[str, str]]:
        """Return the names and values of what is known of the latent dimensions, for a table."""
        rows = [("active units", f"{self.active_units} of {self.latents}")]
        if self.mig is not None and self.mig_of_factors is not None:
            rows += [("mutual information gap (MIG)", f"{self.mig:.3f}")]
            rows += [
                (f"  {name}: z{found['dimension']:.0f}", f"{found['gap']:.3f}")
                for name, found in self.mig_of_factors.items()
            ]
        return rows


def shared_results(
    model: VAE,
    bounds: Tensor,
    posterior: Tensor,
    factors: Factors | None,
    *,
    seed: int,
) -> dict[str, Any]:
    """Return the measured fields of a `Report`, from the `Bounds` of all examples (3, N) and their posteriors, mu and
    logvar (2, N, L). `factors` are those of the same examples."""
    nll, reconstruction, kl = bounds
    mu, logvar = posterior
    chosen = torch.linspace(0, len(mu) - 1, min(len(mu), _MOST)).round().long()
    few = mu[chosen].float(), logvar[chosen].float()
    z, _ = functional.reparameterize_kl(*few, seed=torch.tensor([seed, 0]))
    parts = information.decompose(*few, z)
    gaps = None
    if factors is not None:
        gaps = {
            name: information.mutual_information_gap(*few, z, factors.values[chosen, i])._asdict()
            for i, name in enumerate(factors.names)
        }
    return {
        "neg_elbo": (reconstruction + kl).mean().item(),
        "reconstruction": reconstruction.mean().item(),
        "kl": kl.mean().item(),
        "iw_nll": nll.mean().item(),
        "active_units": int((mu.double().var(0, correction=0) > ACTIVE).sum()),
        "latents": model.latents,
        **parts._asdict(),
        "dimension_wise_kl": parts.dimension_wise_kl if model.prior is None else None,
        "mig": None if gaps is None else sum(found["gap"] for found in gaps.values()) / len(gaps),
        "mig_of_factors": gaps,
    }


def check_options(samples: int, limit: int | None, seed: int) -> None:
    """Raises InputError if an option is out of range."""
    if samples < 1:
        raise InputError(f"--samples must be at least 1, got {samples}")
    if limit is not None and limit < 1:
        raise InputError(f"--limit must be at least 1, got {limit}")
    if not 0 <= seed < 2**32:
        raise InputError(f"--seed must be between 0 and {2**32 - 1}, got {seed}")
