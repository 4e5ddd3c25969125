"""Terms of objectives that compare the aggregate posterior with its marginals or with the prior.

The aggregate posterior q(z) = 1/N sum_n q(z | x_n) belongs to the whole data set; a batch only gives estimates of it.
`total_correlation` and `decompose_kl` estimate it by a mixture whose components are the posteriors of the batch (Chen,
Li, Grosse and Duvenaud 2018, "Isolating Sources of Disentanglement in VAEs"). `mmd` compares samples (Zhao, Song and
Ermon 2019, InfoVAE; Tolstikhin et al. 2018, WAE). All are differentiable, and none builds a tensor of B x B x D
elements. Under DistributedDataParallel, each process makes an estimate from its own rows, with the size of the whole
data set.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .functional import gaussian_mixture_log_prob
from .functional.checks import (
    check_choice,
    check_floating,
    check_like,
    checked_int,
    checked_positive,
    device_message,
    dtype_name,
)
from .functional.forms import ScaleForm, kernel_form
from .reference.latents import mean_and_logvar

__all__ = ["KLDecomposition", "decompose_kl", "mmd", "total_correlation"]

_ESTIMATORS = ("mss", "mws")


class KLDecomposition(NamedTuple):
    """The three parts of the KL from the standard normal prior, in nats; they sum to the KL (Chen et al. 2018,
    equation 2)."""

    mutual_information: Tensor
    """Index-code mutual information I(z; n): log q(z | x) - log q(z)."""
    total_correlation: Tensor
    """Total correlation of the latent dimensions: log q(z) - sum_j log q(z_j)."""
    dimension_wise_kl: Tensor
    """KL of every dimension's marginal from N(0, 1), summed: sum_j [log q(z_j) - log p(z_j)]."""


def total_correlation(
    z: Tensor,
    mu: Tensor,
    logvar: Tensor | None,
    dataset_size: int,
    estimator: str = "mss",
    *,
    form: str | ScaleForm = "logvar",
) -> Tensor:
    """Total correlation of the aggregate posterior, E_q(z)[log q(z) - sum_j log q(z_j)], estimated from a batch.

    The beta-TC-VAE weighs this term of the KL: its loss is nll + kl + (beta - 1) * total_correlation.

    Args:
        z: one sample of every posterior, (B, D), floating point.
        mu, logvar: the posteriors of the batch, (B, D), with z's dtype. With `logvar` None, `mu` is a packed head,
            (B, 2 D), whose halves along dimension 1 are the two.
        dataset_size: N, the number of data from which the batch was drawn without replacement.
        estimator: how the batch stands for the data set. `"mss"`, stratified sampling, weighs a point's own posterior
            1/N and each other (N - 1) / (N (B - 1)). This is Chen et al.'s appendix C.2, averaged over the order of the
            batch: the estimate of q(z) is unbiased and does not depend on the order. `"mws"`, weighted sampling
            (appendix C.1), weighs all 1 / (N B), so that its expectation is
            [q(z | n) + (B - 1) / (N - 1) sum of the others] / (N B). Where posteriors overlap, that is q(z) / N, and
            TC is too large by (D - 1) log N, a constant without gradient.
        form: what `logvar` (or the second half of the head) means, as for `fastvae.functional.reparameterize_kl`.

    The logarithm of an estimate is biased even if the estimate is not (Jensen's inequality), and in many dimensions the
    posteriors of a finite data set hardly overlap, so that independent dimensions look dependent: see docs/priors.md.

    Returns:
        The mean over the batch, a scalar; float32 (float64 for float64).

    Raises:
        TypeError: If an argument has the wrong type or dtype.
        ValueError: If a shape or device is wrong, N is smaller than B, or `estimator` or `form` is unknown.
    """
    where = "total_correlation"
    posteriors = _checked_posteriors(where, z, mu, logvar, form)
    joint, of_each = _log_aggregate(where, *posteriors, dataset_size, estimator)
    return (joint - of_each.sum(1)).mean()


def decompose_kl(
    z: Tensor,
    mu: Tensor,
    logvar: Tensor | None,
    dataset_size: int,
    estimator: str = "mss",
    *,
    form: str | ScaleForm = "logvar",
    reduction: str = "mean",
) -> KLDecomposition:
    """Decompose the KL from N(0, 1) into index-code mutual information, total correlation and dimension-wise KL.

    (Chen et al. 2018, equation 2.) The sum of the parts is log q(z | x) - log p(z), whose mean is the KL. The arguments
    are those of `total_correlation`; `reduction` is `"mean"` over the batch, or `"none"` for (B,).

    Raises:
        As `total_correlation`, and ValueError if `reduction` is unknown.
    """
    where = "decompose_kl"
    check_choice(where, "reduction", reduction, ("mean", "none"))
    z, mean, log_variance = _checked_posteriors(where, z, mu, logvar, form)
    joint, of_each = _log_aggregate(where, z, mean, log_variance, dataset_size, estimator)
    marginals = of_each.sum(1)
    parts = KLDecomposition(
        log_normal(z, mean, log_variance) - joint, joint - marginals, marginals - log_normal(z)
    )
    return parts if reduction == "none" else KLDecomposition(*(part.mean() for part in parts))


def log_normal(z: Tensor, mu: Tensor | None = None, logvar: Tensor | None = None) -> Tensor:
    """log N(z; mu, e^logvar) of every row, summed over all other dimensions; N(0, 1) by default."""
    dtype = torch.float64 if z.dtype == torch.float64 else torch.float32
    distance = z.to(dtype)
    if mu is not None and logvar is not None:
        log_variance = logvar.to(dtype)
        distance = (distance - mu.to(dtype)) * torch.exp(log_variance / -2)
        elements = distance * distance + log_variance
    else:
        elements = distance * distance
    return ((elements + math.log(2 * math.pi)) / -2).flatten(1).sum(1)


def mmd(
    z: Tensor,
    prior_sample: Tensor | None = None,
    *,
    bandwidth: float | Sequence[float] | None = None,
    unbiased: bool = True,
) -> Tensor:
    """Squared maximum mean discrepancy between samples, with the kernel k(x, y) = exp(-|x - y|^2 / (2 bandwidth^2)).

    MMD^2 = E k(z, z') - 2 E k(z, p) + E k(p, p') (Gretton et al. 2012, equation 1). No tensor of all pairs is kept.

    Args:
        z: samples of the aggregate posterior, (B, D), floating point.
        prior_sample: samples of the prior, (P, D), with z's dtype. Without it the prior is N(0, 1), and expectations
            over it are exact (Rustamov 2021, "Closed-form expressions for maximum mean discrepancy with applications to
            Wasserstein auto-encoders"), which leaves the noise of one sample instead of two.
        bandwidth: of the kernel, or several, whose kernels are averaged. By default sqrt(D): then 2 bandwidth^2 is the
            mean squared distance of two points of N(0, 1).
        unbiased: leave the pairs of a sample with itself out of the means (Gretton et al. 2012, equation 3). The
            estimate may then be negative.

    Returns:
        A scalar; float32 (float64 for float64).

    Raises:
        TypeError: If an argument has the wrong type or dtype.
        ValueError: If a shape, device or value is wrong, or `unbiased` is asked of fewer than two samples.
    """
    where = "mmd"
    _check_points(where, "z", z)
    if prior_sample is not None:
        _check_points(where, "prior_sample", prior_sample)
        if prior_sample.dtype != z.dtype:
            raise TypeError(
                f"fastvae.{where}: `prior_sample` must be {dtype_name(z.dtype)}, like `z`, got "
                f"{dtype_name(prior_sample.dtype)}; did you mean prior_sample.to(z.dtype)?"
            )
        if prior_sample.device != z.device:
            raise ValueError(device_message(where, "prior_sample", prior_sample, "z", z))
        if prior_sample.shape[1] != z.shape[1]:
            raise ValueError(
                f"fastvae.{where}: `prior_sample` must have shape (P, {z.shape[1]}) for `z` {tuple(z.shape)}, got "
                f"{tuple(prior_sample.shape)}"
            )
    for name, sample in (("z", z), ("prior_sample", prior_sample)):
        least = 2 if unbiased else 1
        if sample is not None and sample.shape[0] < least:
            raise ValueError(
                f"fastvae.{where}: `{name}` must have at least {least} rows, got shape {tuple(sample.shape)}"
                + ("; did you mean unbiased=False?" if sample.shape[0] == 1 else "")
            )
    dims = z.shape[1]
    if bandwidth is None:
        bandwidth = math.sqrt(max(1, dims))
    widths = [bandwidth] if not isinstance(bandwidth, Sequence) or isinstance(bandwidth, str) else bandwidth
    if not widths:
        raise ValueError(f"fastvae.{where}: `bandwidth` must have at least one value, got {bandwidth!r}")
    total: Tensor | float = 0.0
    for width in (checked_positive(where, "bandwidth", width) for width in widths):
        total = total + _mmd(z, prior_sample, width, unbiased)
    assert isinstance(total, Tensor)
    return total / len(widths)


def _mmd(z: Tensor, prior_sample: Tensor | None, width: float, unbiased: bool) -> Tensor:
    own = _mean_kernel(z, z, width, unbiased)
    if prior_sample is not None:
        cross = _mean_kernel(z, prior_sample, width, False)
        return own - 2 * cross + _mean_kernel(prior_sample, prior_sample, width, unbiased)
    dims, square = z.shape[1], width * width
    # E_p k(z, p) is the convolution of the kernel with N(0, 1), and E k(p, p') that of it with N(0, 2), at 0.
    dtype = torch.float64 if z.dtype == torch.float64 else torch.float32
    norms = z.to(dtype).square().sum(1)
    cross = ((dims / 2) * math.log(square / (square + 1)) - norms / (2 * (square + 1))).exp().mean()
    return own - 2 * cross + math.exp((dims / 2) * math.log(square / (square + 2)))


def _mean_kernel(x: Tensor, y: Tensor, width: float, without_own: bool) -> Tensor:
    """The mean of k(x_i, y_j) over all pairs, or over the pairs of different rows if x and y are the same.

    The mean over j is a mixture's density. Points are scaled so that the kernel is a Gaussian with variance 1 / (2 pi),
    whose normaliser is 1.
    """
    scale = 1 / (width * math.sqrt(2 * math.pi))
    x, y = (t if t.dtype == torch.float64 else t.float() for t in (x, y))
    logvar = torch.full_like(y, -math.log(2 * math.pi))
    means = gaussian_mixture_log_prob(x * scale, y * scale, logvar).exp()
    rows = y.shape[0]
    if without_own:
        means = (rows * means - 1) / (rows - 1)
    return means.mean()


def _check_points(where: str, name: str, value: Any) -> None:
    check_floating(where, name, value)
    if value.dim() != 2:
        hint = f"; did you mean {name}.flatten(1)?" if value.dim() > 2 else ""
        raise ValueError(f"fastvae.{where}: `{name}` must have shape (B, D), got {tuple(value.shape)}{hint}")


def _checked_posteriors(
    where: str, z: Tensor, mu: Tensor, logvar: Tensor | None, form: str | ScaleForm
) -> tuple[Tensor, Tensor, Tensor]:
    """z, mean and log-variance, (B, D) each and of one dtype."""
    name, constants = kernel_form(where, form)
    _check_points(where, "z", z)
    if logvar is not None:
        check_like(where, "mu", mu, "z", z)
        check_like(where, "logvar", logvar, "z", z)
        if name == "logvar":
            return z, mu, logvar
    else:
        check_floating(where, "mu", mu)
        packed = (z.shape[0], 2 * z.shape[1])
        if mu.shape != packed:
            raise ValueError(
                f"fastvae.{where}: without `logvar`, `mu` must be a packed head {packed}, mean and scale along "
                f"dimension 1, for `z` {tuple(z.shape)}, got {tuple(mu.shape)}"
            )
        check_like(where, "mu", mu.narrow(1, 0, z.shape[1]), "z", z)
    # Half precision would round the log-variance of another form.
    half = z.dtype in (torch.float16, torch.bfloat16) and name != "logvar"
    dtype = torch.float32 if half else z.dtype
    return (z.to(dtype), *mean_and_logvar(mu, logvar, name, constants, dtype))


def _log_aggregate(
    where: str, z: Tensor, mu: Tensor, logvar: Tensor, dataset_size: int, estimator: str
) -> tuple[Tensor, Tensor]:
    """log q(z), (B,), and log q(z_j) of every dimension, (B, D). The posteriors have been checked."""
    check_choice(where, "estimator", estimator, _ESTIMATORS)
    rows = z.shape[0]
    checked_int(where, "dataset_size", dataset_size, 1, None)
    if dataset_size < rows:
        raise ValueError(
            f"fastvae.{where}: `dataset_size` must be at least the {rows} rows of `z`, got {dataset_size}; it is the "
            "number of data in the whole training set"
        )
    least = 2 if estimator == "mss" and dataset_size > 1 else 1
    if rows < least:
        raise ValueError(
            f"fastvae.{where}: `z` must have at least {least} rows for the estimator {estimator!r}, got shape "
            f"{tuple(z.shape)}; a DataLoader with drop_last=True gives no smaller last batch"
        )
    weights = _log_weights(z, dataset_size, estimator)
    return gaussian_mixture_log_prob(z, mu, logvar, weights, per_dimension="both")


def _log_weights(z: Tensor, size: int, estimator: str) -> Tensor:
    rows = z.shape[0]
    dtype = torch.float64 if z.dtype == torch.float64 else torch.float32
    if estimator == "mws":
        # The logarithm is taken of a tensor: under torch.compile, the number of rows may be symbolic.
        return z.new_full((rows,), 1 / (size * rows), dtype=dtype).log()
    others = (size - 1) / (size * (rows - 1)) if size > 1 else 1.0
    return z.new_full((rows, rows), others, dtype=dtype).log().fill_diagonal_(-math.log(size))
