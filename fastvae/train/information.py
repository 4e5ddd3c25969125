"""The mutual information between data and latent variables."""

import math

import torch
from torch import Tensor

__all__ = ["mutual_information"]

_CHUNK = 500  # number of z for which the table of densities is computed at a time


@torch.no_grad()
def mutual_information(mu: Tensor, logvar: Tensor, z: Tensor) -> float:
    """Estimate I(x; z) in nats under q(z | x) and N data points. The estimate is at most log N.

    This is the mean over n of log q(z_n | x_n) - log 1/N sum_m q(z_n | x_m), where z_n (N, L) is drawn from the
    posterior of x_n. It equals the mean KL minus the KL of the aggregate posterior from the prior (Hoffman and Johnson
    2016, equation 6), with the aggregate over the same N points (as in Dieng et al. 2019, section 5).
    """
    mean, log_variance, z_double = (t.double().flatten(1) for t in (mu, logvar, z))
    precision = torch.exp(-log_variance)
    # The exponent of q(z_n | x_m) as matrix products; the constants cancel.
    own_log_density = -((z_double - mean).square() * precision + log_variance).sum(1) / 2
    offset = (mean.square() * precision + log_variance).sum(1)
    total = torch.zeros((), dtype=torch.float64, device=mean.device)
    for first in range(0, len(z_double), _CHUNK):
        chunk = z_double[first : first + _CHUNK]
        log_densities = -(chunk.square() @ precision.T - 2 * chunk @ (mean * precision).T + offset) / 2
        total += (own_log_density[first : first + _CHUNK] - log_densities.logsumexp(1)).sum()
    return float(total / len(z_double)) + math.log(len(z_double))
