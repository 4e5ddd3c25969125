"""How much a posterior tells of the data."""

import math

import torch
from torch import Tensor

__all__ = ["mutual_information"]

_ROWS = 500  # of the table of N x N densities, at a time


@torch.no_grad()
def mutual_information(mu: Tensor, logvar: Tensor, z: Tensor) -> float:
    """An estimate of I(x; z) under q(z | x) and N data, in nats: at most log N.

    The mean over n of log q(z_n | x_n) - log 1/N sum_m q(z_n | x_m), with z_n (N, L) drawn from the posterior of x_n:
    the KL's mean less the KL of the aggregate posterior from the prior (Hoffman and Johnson 2016, equation 6), with the
    aggregate over the same N data (as Dieng et al. 2019, section 5).
    """
    mean, log_variance, at = (t.double().flatten(1) for t in (mu, logvar, z))
    precision = torch.exp(-log_variance)
    # The exponent of q(z_n | x_m), as three products of matrices; the constants cancel.
    own = -((at - mean).square() * precision + log_variance).sum(1) / 2
    offset = (mean.square() * precision + log_variance).sum(1)
    total = torch.zeros((), dtype=torch.float64, device=mean.device)
    for first in range(0, len(at), _ROWS):
        some = at[first : first + _ROWS]
        table = -(some.square() @ precision.T - 2 * some @ (mean * precision).T + offset) / 2
        total += (own[first : first + _ROWS] - table.logsumexp(1)).sum()
    return float(total / len(at)) + math.log(len(at))
