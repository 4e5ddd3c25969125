"""What the latent variables hold: the parts of the KL, and their information about known factors of the data."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from fastvae import functional
from fastvae.regularizers import log_normal

__all__ = ["Gap", "Parts", "decompose", "mutual_information", "mutual_information_gap"]


class Parts(NamedTuple):
    """The parts of the mean KL from N(0, 1), in nats; they sum to its estimate (Chen et al. 2018, equation 2)."""

    mutual_information: float
    total_correlation: float
    dimension_wise_kl: float


class Gap(NamedTuple):
    """The mutual information gap of one factor (Chen et al. 2018, equation 6)."""

    gap: float
    """How much more the best dimension of z knows of the factor than the second best, as a share of its entropy."""
    dimension: int
    """The best dimension."""
    information: float
    """The mutual information of the best dimension and the factor, in nats."""
    entropy: float
    """The entropy of the factor, in nats."""


@torch.no_grad()
def mutual_information(mu: Tensor, logvar: Tensor, z: Tensor) -> float:
    """Estimate I(x; z) in nats under q(z | x) and N data points. The estimate is at most log N.

    This is the mean over n of log q(z_n | x_n) - log 1/N sum_m q(z_n | x_m), where z_n (N, L) is drawn from the
    posterior of x_n. It equals the mean KL minus the KL of the aggregate posterior from the prior (Hoffman and Johnson
    2016, equation 6), with the aggregate over the same N points (as in Dieng et al. 2019, section 5).
    """
    mean, log_variance, points = _in_double(mu, logvar, z)
    joint = functional.gaussian_mixture_log_prob(points, mean, log_variance)
    return float((log_normal(points, mean, log_variance) - joint).mean())


@torch.no_grad()
def decompose(mu: Tensor, logvar: Tensor, z: Tensor) -> Parts:
    """Estimate the parts of the KL from N(0, 1) for a data set of the N points given: z_n (N, L) is drawn from the
    posterior of x_n, and the aggregate posterior is the mean of all N posteriors."""
    mean, log_variance, points = _in_double(mu, logvar, z)
    joint, of_each = functional.gaussian_mixture_log_prob(points, mean, log_variance, per_dimension="both")
    marginals = of_each.sum(1)
    information = log_normal(points, mean, log_variance) - joint
    parts = (information, joint - marginals, marginals - log_normal(points))
    return Parts(*(float(part.mean()) for part in parts))


@torch.no_grad()
def mutual_information_gap(mu: Tensor, logvar: Tensor, z: Tensor, factor: Tensor) -> Gap:
    """Estimate the mutual information gap of a factor with the values 0, 1, ..., int64 (N,), for N data points.

    I(z_j; v) is the mean over n of log q(z_nj | v_n) - log q(z_nj), where z_n (N, L) is drawn from the posterior of
    x_n, q(z_j) is the mean of all posteriors of z_j, and q(z_j | v) that of the data with this value of the factor.
    With a single latent dimension, the gap is its share alone.
    """
    mean, log_variance, points = _in_double(mu, logvar, z)
    marginals = functional.gaussian_mixture_log_prob(points, mean, log_variance, per_dimension=True).mean(0)
    counts = torch.bincount(factor)
    conditional = torch.zeros_like(marginals)
    for value in range(len(counts)):
        rows = (factor == value).nonzero().squeeze(1)
        if len(rows):
            of_each = functional.gaussian_mixture_log_prob(
                points[rows], mean[rows], log_variance[rows], per_dimension=True
            )
            conditional += of_each.sum(0) / len(points)
    information = conditional - marginals
    shares = counts[counts > 0].double() / len(factor)
    entropy = float(-(shares * shares.log()).sum())
    best = information.topk(min(2, len(information)))
    second = float(best.values[1]) if len(information) > 1 else 0.0
    first = float(best.values[0])
    gap = (first - second) / entropy if entropy else math.nan
    return Gap(gap, int(best.indices[0]), first, entropy)


def _in_double(*tensors: Tensor) -> list[Tensor]:
    return [tensor.double().flatten(1) for tensor in tensors]
