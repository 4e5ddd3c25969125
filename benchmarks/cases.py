"""The table of benchmark cases: shapes, the fused call, and the same loss as users write it.

Every case has two functions of tensors, whose parameter names select the inputs that they take. Both return the tensors
that training differentiates: the loss, and z if there is one. timing.py times this forward together with
`torch.autograd.grad` for every input that requires a gradient.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

import fastvae
from fastvae import functional

Inputs = dict[str, Tensor]
Outputs = tuple[Tensor, ...]

LOG_2PI = math.log(2 * math.pi)
_BOUNDS = (-12.0, 2.0)  # bounds of a log-variance
_FREE_BITS = 0.6  # about the mean KL of a dimension


@dataclass(frozen=True)
class Case:
    name: str
    setup: Callable[[torch.device], Inputs]
    """Creates one set of inputs. If it contains `z_gradient`, the gradient that the decoder would return for z, then z
    is drawn from `mu` and `logvar`."""
    fused: Callable[[torch.device], Callable[..., Outputs]]
    """Creates the fused function from fastvae's public functions."""
    baseline: Callable[..., Outputs]
    """The baseline, which runs eagerly and under torch.compile."""
    moves: int
    """The minimum number of bytes that forward and backward must read and write, with every operand passing once."""
    floors: tuple[float, float] | None = None
    """The speedup over eager and over torch.compile that is aimed at (2 threads)."""
    avx2_floors: tuple[float, float] | None = None
    """The same with AVX2, for a case that is limited by arithmetic; None if it is `floors`."""
    most: tuple[str, float] | None = None
    """Another case, and how many times its fused time this one may take."""
    tolerance: float = 1e-5
    """The permitted difference of a gradient or the loss between two sides, relative to the largest element."""
    same_loss: bool = True
    """False if the baseline omits a constant of the loss."""


# ---------------------------------------------------------------------------------------------------------------------
# Inputs
# ---------------------------------------------------------------------------------------------------------------------


def _latents(batch: int, size: int, device: torch.device, dtype: torch.dtype = torch.float32) -> Inputs:
    return {
        "mu": torch.randn(batch, size, device=device, dtype=dtype).requires_grad_(),
        "logvar": (0.5 * torch.randn(batch, size, device=device, dtype=dtype)).requires_grad_(),
        "z_gradient": torch.randn(batch, size, device=device, dtype=dtype),
    }


def _latent_head(batch: int, size: int) -> Callable[[torch.device], Inputs]:
    """The encoder's output with mean and scale packed."""

    def setup(device: torch.device) -> Inputs:
        head = torch.randn(batch, 2 * size, device=device)
        return {"head": head.requires_grad_(), "z_gradient": torch.randn(batch, size, device=device)}

    return setup


def _draws(samples: int, batch: int, size: int, latents: int) -> Callable[[torch.device], Inputs]:
    """The posterior, data, and what the decoder returns for the draws of every row."""

    def setup(device: torch.device) -> Inputs:
        return {
            "mu": torch.randn(batch, latents, device=device).requires_grad_(),
            "logvar": (0.5 * torch.randn(batch, latents, device=device)).requires_grad_(),
            "recon": torch.randn(samples, batch, size, device=device).requires_grad_(),
            "x": (torch.rand(batch, size, device=device) > 0.5).float(),
            "z_gradient": torch.randn(samples, batch, latents, device=device),
        }

    return setup


def _reconstruction(
    shape: tuple[int, ...],
    device: torch.device,
    *,
    channels: int = 1,
    dtype: torch.dtype = torch.float32,
    data: torch.dtype | None = None,
) -> Inputs:
    """Decoder output, data in [0, 1), and a KL that the loss adds: per row for ELBO, and summed as in tutorials."""
    kl = torch.rand(shape[0], device=device)
    params = torch.randn(shape[0], channels * shape[1], *shape[2:], device=device, dtype=dtype)
    if data == torch.uint8:
        x = torch.randint(0, 256, shape, device=device, dtype=data)
    else:
        x = torch.rand(shape, device=device).to(data or dtype)
    return {
        "recon": params.requires_grad_(),
        "x": x,
        "kl": kl,
        "kld": kl.sum(),
    }


def _bernoulli(
    batch: int, size: int, dtype: torch.dtype = torch.float32, data: torch.dtype | None = None
) -> Callable[[torch.device], Inputs]:
    return lambda device: _reconstruction((batch, size), device, dtype=dtype, data=data)


def _masked(mask: tuple[int, ...], dtype: torch.dtype) -> Callable[[torch.device], Inputs]:
    """Images and a mask of what was observed, or a weight of each element, which is 0 for a quarter of them."""

    def setup(device: torch.device) -> Inputs:
        kept = torch.rand(mask, device=device) > 0.25
        weight = kept * torch.rand(mask, device=device) if dtype.is_floating_point else kept.to(dtype)
        return _reconstruction((512, 3, 32, 32), device) | {"weight": weight}

    return setup


def _per_element(device: torch.device) -> Inputs:
    inputs = _reconstruction((512, 3072), device)
    return inputs | {"recon_logvar": (0.5 * torch.randn(512, 3072, device=device)).requires_grad_()}


def _head(device: torch.device) -> Inputs:
    return _reconstruction((512, 3, 32, 32), device, channels=2)


def _levels(planes: int, *shape: int) -> Callable[[torch.device], Inputs]:
    """Decoder output with the given number of planes, and bytes."""

    def setup(device: torch.device) -> Inputs:
        inputs = _reconstruction(shape, device, data=torch.uint8)
        params = torch.randn(shape[0], planes, *shape[2:], device=device)
        return inputs | {"recon": params.requires_grad_()}

    return setup


def _categorical(rows: int, length: int, classes: int) -> Callable[[torch.device], Inputs]:
    def setup(device: torch.device) -> Inputs:
        kl = torch.rand(rows, device=device)
        return {
            "recon": torch.randn(rows, length, classes, device=device).requires_grad_(),
            "x": torch.randint(0, classes, (rows, length), device=device),
            "kl": kl,
            "kld": kl.sum(),
        }

    return setup


def _step(device: torch.device) -> Inputs:
    return _latents(128, 20, device) | _reconstruction((128, 784), device)


def _counts(
    zero_inflated: bool, raw: bool, cells: int = 128, sparse: bool = False
) -> Callable[[torch.device], Inputs]:
    """Cells of 20,000 genes with 95 % zeros. The decoder's outputs are raw, or mean and inverse dispersion. `sparse`
    adds the counts in CSR, for the fused side."""

    def setup(device: torch.device) -> Inputs:
        shape = cells, 20_000
        present = torch.rand(shape, device=device) < 0.05
        x = (1 + torch.poisson(torch.exp(torch.randn(shape, device=device)))) * present
        logits, log_theta = torch.randn(shape, device=device), torch.randn(20_000, device=device)
        inputs = {"x": x, "kl": torch.rand(cells, device=device)}
        if sparse:
            csr = x.to_sparse_csr()
            inputs |= {"starts": csr.crow_indices(), "columns": csr.col_indices(), "stored": csr.values()}
        if raw:
            inputs |= {
                "logits": logits.requires_grad_(),
                "log_theta": log_theta.requires_grad_(),
                "library": x.sum(1),
            }
        else:
            mean = x.sum(1, keepdim=True) * torch.softmax(logits, 1)
            inputs |= {"mean": mean.requires_grad_(), "theta": log_theta.exp().requires_grad_()}
        if zero_inflated:
            inputs["zi_logits"] = torch.randn(shape, device=device).requires_grad_()
        return inputs

    return setup


def _items(users: int, items: int, density: float) -> Callable[[torch.device], Inputs]:
    """Users and the items that each of them has, as a dense matrix and as the parts of a sparse one."""

    def setup(device: torch.device) -> Inputs:
        logits = torch.randn(users, items, device=device)
        x = (torch.rand(logits.shape, device=device) < density).float()
        csr = x.to_sparse_csr()
        positions = {"starts": csr.crow_indices(), "columns": csr.col_indices(), "stored": csr.values()}
        return {"logits": logits.requires_grad_(), "x": x} | positions

    return setup


# ---------------------------------------------------------------------------------------------------------------------
# Fused
# ---------------------------------------------------------------------------------------------------------------------


def _elbo(likelihood: str | torch.nn.Module, device: torch.device) -> Callable[..., Outputs]:
    elbo = fastvae.ELBO(likelihood).to(device)

    def fused(recon: Tensor, x: Tensor, kl: Tensor) -> Outputs:
        return (elbo(recon, x, kl=kl).loss,)

    return fused


def _fused_bernoulli(device: torch.device) -> Callable[..., Outputs]:
    return _elbo("bernoulli", device)


def _fused_bernoulli_rows(device: torch.device) -> Callable[..., Outputs]:
    def fused(recon: Tensor, x: Tensor) -> Outputs:
        return (fastvae.functional.bernoulli_nll(recon, x).mean(),)

    return fused


def _fused_gaussian(device: torch.device) -> Callable[..., Outputs]:
    # With the variance 1/2, the Gaussian is the squared error without a factor, up to its constant.
    return _elbo(fastvae.likelihoods.Gaussian(scale=math.sqrt(0.5)), device)


def _fused_masked_gaussian(device: torch.device) -> Callable[..., Outputs]:
    elbo = fastvae.ELBO(fastvae.likelihoods.Gaussian(scale=math.sqrt(0.5))).to(device)

    def fused(recon: Tensor, x: Tensor, kl: Tensor, weight: Tensor) -> Outputs:
        return (elbo(recon, x, kl=kl, weight=weight).loss,)

    return fused


def _fused_laplace(device: torch.device) -> Callable[..., Outputs]:
    return _elbo(fastvae.likelihoods.Laplace(), device)


def _fused_continuous_bernoulli(device: torch.device) -> Callable[..., Outputs]:
    return _elbo(fastvae.likelihoods.ContinuousBernoulli(), device)


def _fused_per_element(device: torch.device) -> Callable[..., Outputs]:
    elbo = fastvae.ELBO(fastvae.likelihoods.Gaussian(scale="per_element")).to(device)

    def fused(recon: Tensor, recon_logvar: Tensor, x: Tensor, kl: Tensor) -> Outputs:
        return (elbo((recon, recon_logvar), x, kl=kl).loss,)

    return fused


def _fused_head(device: torch.device) -> Callable[..., Outputs]:
    return _elbo(fastvae.likelihoods.Gaussian(scale="per_element"), device)


def _fused_bounded_head(device: torch.device) -> Callable[..., Outputs]:
    return _elbo(fastvae.likelihoods.Gaussian(scale="per_element", logvar_bounds=_BOUNDS), device)


def _fused_mixture(device: torch.device) -> Callable[..., Outputs]:
    return _elbo(fastvae.likelihoods.DiscretizedLogisticMixture(10), device)


def _fused_logistic(device: torch.device) -> Callable[..., Outputs]:
    return _elbo(fastvae.likelihoods.DiscretizedLogistic(), device)


def _fused_categorical(device: torch.device) -> Callable[..., Outputs]:
    return _elbo("categorical", device)


def _fused_latents(device: torch.device) -> Callable[..., Outputs]:
    def fused(mu: Tensor, logvar: Tensor) -> Outputs:
        z, kl = fastvae.functional.reparameterize_kl(mu, logvar)
        return kl.mean(), z

    return fused


def _fused_softplus(device: torch.device) -> Callable[..., Outputs]:
    def fused(head: Tensor) -> Outputs:
        z, kl = fastvae.functional.reparameterize_kl(head, form="softplus")
        return kl.mean(), z

    return fused


def _fused_free_bits(device: torch.device) -> Callable[..., Outputs]:
    elbo = fastvae.ELBO("bernoulli", free_bits=_FREE_BITS).to(device)

    def fused(mu: Tensor, logvar: Tensor) -> Outputs:
        z, kl = elbo.reparameterize(mu, logvar)
        return fastvae.reference.free_bits(kl, _FREE_BITS).mean(), z

    return fused


def _fused_iwae(device: torch.device) -> Callable[..., Outputs]:
    iwae = fastvae.IWAE("bernoulli", samples=50).to(device)

    def fused(mu: Tensor, logvar: Tensor, recon: Tensor, x: Tensor) -> Outputs:
        draws = iwae.sample(mu, logvar)
        return iwae(recon.flatten(0, 1), x, draws=draws).loss, draws.z

    return fused


def _fused_step(device: torch.device) -> Callable[..., Outputs]:
    elbo = fastvae.ELBO("bernoulli").to(device)

    def fused(mu: Tensor, logvar: Tensor, recon: Tensor, x: Tensor) -> Outputs:
        z, kl = elbo.reparameterize(mu, logvar)
        return elbo(recon, x, kl=kl).loss, z

    return fused


def _fused_nb(device: torch.device) -> Callable[..., Outputs]:
    def fused(mean: Tensor, theta: Tensor, x: Tensor) -> Outputs:
        return (fastvae.functional.negative_binomial_nll(mean, x, theta).mean(),)

    return fused


def _fused_zinb(device: torch.device) -> Callable[..., Outputs]:
    def fused(mean: Tensor, theta: Tensor, zi_logits: Tensor, x: Tensor) -> Outputs:
        return (fastvae.functional.zero_inflated_negative_binomial_nll(mean, x, theta, zi_logits).mean(),)

    return fused


def _raw_counts(likelihood: fastvae.likelihoods.NegativeBinomial, device: torch.device) -> fastvae.ELBO:
    """An ELBO whose dispersion is set from outside, so that it is an input like the others."""
    elbo = fastvae.ELBO(likelihood).to(device)
    del likelihood.log_dispersion
    return elbo


def _fused_nb_raw(device: torch.device) -> Callable[..., Outputs]:
    likelihood = fastvae.likelihoods.NegativeBinomial(20_000)
    elbo = _raw_counts(likelihood, device)

    def fused(logits: Tensor, log_theta: Tensor, library: Tensor, x: Tensor, kl: Tensor) -> Outputs:
        likelihood.log_dispersion = log_theta  # type: ignore[assignment]
        return (elbo((logits, library), x, kl=kl).loss,)

    return fused


def _fused_zinb_raw(device: torch.device) -> Callable[..., Outputs]:
    likelihood = fastvae.likelihoods.ZeroInflatedNegativeBinomial(20_000)
    elbo = _raw_counts(likelihood, device)

    def fused(
        logits: Tensor, log_theta: Tensor, zi_logits: Tensor, library: Tensor, x: Tensor, kl: Tensor
    ) -> Outputs:
        likelihood.log_dispersion = log_theta  # type: ignore[assignment]
        return (elbo((logits, library, zi_logits), x, kl=kl).loss,)

    return fused


def _fused_items(device: torch.device) -> Callable[..., Outputs]:
    def fused(logits: Tensor, starts: Tensor, columns: Tensor, stored: Tensor) -> Outputs:
        x = torch.sparse_csr_tensor(starts, columns, stored, logits.shape)
        return (functional.multinomial_nll(logits, x).mean(),)

    return fused


def _fused_dense_items(device: torch.device) -> Callable[..., Outputs]:
    def fused(logits: Tensor, x: Tensor) -> Outputs:
        return (functional.multinomial_nll(logits, x).mean(),)

    return fused


def _csr(starts: Tensor, columns: Tensor, stored: Tensor) -> Tensor:
    size = (starts.shape[0] - 1, 20_000)
    return torch.sparse_csr_tensor(starts, columns, stored, size, check_invariants=False)


def _fused_nb_csr(device: torch.device) -> Callable[..., Outputs]:
    dense = _fused_nb_raw(device)

    def fused(
        logits: Tensor,
        log_theta: Tensor,
        library: Tensor,
        starts: Tensor,
        columns: Tensor,
        stored: Tensor,
        kl: Tensor,
    ) -> Outputs:
        return dense(logits, log_theta, library, _csr(starts, columns, stored), kl)

    return fused


def _fused_zinb_csr(device: torch.device) -> Callable[..., Outputs]:
    dense = _fused_zinb_raw(device)

    def fused(
        logits: Tensor,
        log_theta: Tensor,
        zi_logits: Tensor,
        library: Tensor,
        starts: Tensor,
        columns: Tensor,
        stored: Tensor,
        kl: Tensor,
    ) -> Outputs:
        return dense(logits, log_theta, zi_logits, library, _csr(starts, columns, stored), kl)

    return fused


# ---------------------------------------------------------------------------------------------------------------------
# Baselines, as users write them
# ---------------------------------------------------------------------------------------------------------------------


def _baseline_bernoulli(recon: Tensor, x: Tensor, kld: Tensor) -> Outputs:
    bce = F.binary_cross_entropy_with_logits(recon, x, reduction="sum")
    return ((bce + kld) / x.shape[0],)


def _baseline_bernoulli_rows(recon: Tensor, x: Tensor) -> Outputs:
    return (F.binary_cross_entropy_with_logits(recon, x, reduction="sum") / x.shape[0],)


def _baseline_bernoulli_uint8(recon: Tensor, x: Tensor, kld: Tensor) -> Outputs:
    return _baseline_bernoulli(recon, x.to(recon.dtype) / 255, kld)


def _baseline_gaussian(recon: Tensor, x: Tensor, kld: Tensor) -> Outputs:
    mse = F.mse_loss(recon, x, reduction="sum")
    return ((mse + kld) / x.shape[0],)


def _baseline_masked_gaussian(recon: Tensor, x: Tensor, kld: Tensor, weight: Tensor) -> Outputs:
    mse = (weight * F.mse_loss(recon, x, reduction="none")).sum()
    return ((mse + kld) / x.shape[0],)


def _baseline_gaussian_uint8(recon: Tensor, x: Tensor, kld: Tensor) -> Outputs:
    return _baseline_gaussian(recon, x.float() / 255, kld)


def _baseline_laplace(recon: Tensor, x: Tensor, kld: Tensor) -> Outputs:
    nll = -torch.distributions.Laplace(recon, 1.0).log_prob(x).sum()
    return ((nll + kld) / x.shape[0],)


def _baseline_l1(recon: Tensor, x: Tensor, kld: Tensor) -> Outputs:
    return ((F.l1_loss(recon, x, reduction="sum") + kld) / x.shape[0],)


def _baseline_continuous_bernoulli(recon: Tensor, x: Tensor, kld: Tensor) -> Outputs:
    nll = -torch.distributions.ContinuousBernoulli(logits=recon).log_prob(x).sum()
    return ((nll + kld) / x.shape[0],)


def _baseline_per_element(recon: Tensor, recon_logvar: Tensor, x: Tensor, kld: Tensor) -> Outputs:
    nll = 0.5 * torch.sum(LOG_2PI + recon_logvar + (x - recon).pow(2) / recon_logvar.exp())
    return ((nll + kld) / x.shape[0],)


def _baseline_head(recon: Tensor, x: Tensor, kld: Tensor) -> Outputs:
    mean, logvar = recon.chunk(2, dim=1)
    return _baseline_per_element(mean, logvar, x, kld)


def _baseline_bounded_head(recon: Tensor, x: Tensor, kld: Tensor) -> Outputs:
    mean, logvar = recon.chunk(2, dim=1)
    middle, half = sum(_BOUNDS) / 2, (_BOUNDS[1] - _BOUNDS[0]) / 2
    return _baseline_per_element(mean, middle + half * torch.tanh((logvar - middle) / half), x, kld)


def _baseline_log_probs(x: Tensor, means: Tensor, log_scales: Tensor) -> Tensor:
    """The log-probabilities as in the code of PixelCNN++, and of others who copied it."""
    centered_x = x - means
    inv_stdv = torch.exp(-log_scales)
    plus_in = inv_stdv * (centered_x + 1.0 / 255.0)
    cdf_plus = torch.sigmoid(plus_in)
    min_in = inv_stdv * (centered_x - 1.0 / 255.0)
    cdf_min = torch.sigmoid(min_in)
    log_cdf_plus = plus_in - F.softplus(plus_in)
    log_one_minus_cdf_min = -F.softplus(min_in)
    cdf_delta = cdf_plus - cdf_min
    mid_in = inv_stdv * centered_x
    log_pdf_mid = mid_in - log_scales - 2.0 * F.softplus(mid_in)
    inner = torch.where(
        cdf_delta > 1e-5, torch.log(torch.clamp(cdf_delta, min=1e-12)), log_pdf_mid - math.log(127.5)
    )
    return torch.where(x < -0.999, log_cdf_plus, torch.where(x > 0.999, log_one_minus_cdf_min, inner))


def _baseline_mixture(recon: Tensor, x: Tensor, kld: Tensor) -> Outputs:
    batch, channels, height, width = x.shape
    nr_mix = recon.shape[1] // 10
    logit_probs, rest = recon[:, :nr_mix], recon[:, nr_mix:].reshape(batch, channels, -1, height, width)
    means = rest[:, :, :nr_mix]
    log_scales = torch.clamp(rest[:, :, nr_mix : 2 * nr_mix], min=-7.0)
    coeffs = torch.tanh(rest[:, :, 2 * nr_mix :])
    x = (x.float() / 127.5 - 1).unsqueeze(2).expand(-1, -1, nr_mix, -1, -1)
    m2 = means[:, 1] + coeffs[:, 0] * x[:, 0]
    m3 = means[:, 2] + coeffs[:, 1] * x[:, 0] + coeffs[:, 2] * x[:, 1]
    means = torch.stack((means[:, 0], m2, m3), dim=1)
    log_probs = _baseline_log_probs(x, means, log_scales).sum(1) + F.log_softmax(logit_probs, dim=1)
    return ((kld - torch.logsumexp(log_probs, dim=1).sum()) / batch,)


def _baseline_logistic(recon: Tensor, x: Tensor, kld: Tensor) -> Outputs:
    means, log_scales = recon.chunk(2, dim=1)
    log_probs = _baseline_log_probs(x.float() / 127.5 - 1, means, torch.clamp(log_scales, min=-7.0))
    return ((kld - log_probs.sum()) / x.shape[0],)


def _baseline_categorical(recon: Tensor, x: Tensor, kld: Tensor) -> Outputs:
    entropy = F.cross_entropy(recon.flatten(0, 1), x.flatten(), reduction="sum")
    return ((entropy + kld) / x.shape[0],)


def _baseline_sample(mu: Tensor, logvar: Tensor) -> Tensor:
    std = torch.exp(0.5 * logvar)
    eps = torch.randn_like(std)
    return mu + eps * std


def _baseline_kld(mu: Tensor, logvar: Tensor) -> Tensor:
    return -0.5 * torch.sum(1 + logvar - mu.pow(2) - logvar.exp())


def _baseline_latents(mu: Tensor, logvar: Tensor) -> Outputs:
    z = _baseline_sample(mu, logvar)
    return _baseline_kld(mu, logvar) / mu.shape[0], z


def _baseline_free_bits(mu: Tensor, logvar: Tensor) -> Outputs:
    z = _baseline_sample(mu, logvar)
    kld = -0.5 * (1 + logvar - mu.pow(2) - logvar.exp())
    return kld.mean(0).clamp(min=_FREE_BITS).sum(), z


def _baseline_softplus(head: Tensor) -> Outputs:
    """As in stable-audio-tools, but with the 1/2 of the KL, which it leaves out."""
    mean, scale = head.chunk(2, dim=1)
    stdev = F.softplus(scale) + 1e-4
    var = stdev * stdev
    logvar = torch.log(var)
    z = torch.randn_like(mean) * stdev + mean
    return 0.5 * (mean * mean + var - logvar - 1).sum(1).mean(), z


def _baseline_iwae(mu: Tensor, logvar: Tensor, recon: Tensor, x: Tensor) -> Outputs:
    std = torch.exp(0.5 * logvar)
    z = mu + std * torch.randn(len(recon), *mu.shape, device=mu.device)
    log_q = (-0.5 * ((z - mu) / std) ** 2 - torch.log(std) - 0.5 * LOG_2PI).sum(-1)
    log_p = (-0.5 * z**2 - 0.5 * LOG_2PI).sum(-1)
    bce = F.binary_cross_entropy_with_logits(recon, x.expand_as(recon), reduction="none").sum(-1)
    log_w = log_p - log_q - bce
    return -(torch.logsumexp(log_w, 0) - math.log(len(recon))).mean(), z


def _baseline_step(mu: Tensor, logvar: Tensor, recon: Tensor, x: Tensor) -> Outputs:
    z = _baseline_sample(mu, logvar)
    bce = F.binary_cross_entropy_with_logits(recon, x, reduction="sum")
    return (bce + _baseline_kld(mu, logvar)) / x.shape[0], z


_EPS = 1e-8  # scvi-tools' default


def _baseline_log_nb(x: Tensor, mean: Tensor, theta: Tensor) -> Tensor:
    """The formula of scvi-tools' log_nb_positive, term by term."""
    log_sum = torch.log(theta + mean + _EPS)
    zero = theta * (torch.log(theta + _EPS) - log_sum)
    counts = x * (torch.log(mean + _EPS) - log_sum)
    return zero + counts + torch.lgamma(x + theta) - torch.lgamma(theta) - torch.lgamma(x + 1)


def _baseline_nb(mean: Tensor, theta: Tensor, x: Tensor) -> Outputs:
    return (-_baseline_log_nb(x, mean, theta.unsqueeze(0)).sum(-1).mean(),)


def _baseline_zinb(mean: Tensor, theta: Tensor, zi_logits: Tensor, x: Tensor) -> Outputs:
    """The formula of log_zinb_positive: both cases of every element, and a mask."""
    theta = theta.unsqueeze(0)
    not_inflated = F.softplus(-zi_logits)
    log_sum = torch.log(theta + mean + _EPS)
    zero = -zi_logits + theta * (torch.log(theta + _EPS) - log_sum)
    if_zero = F.softplus(zero) - not_inflated
    counts = x * (torch.log(mean + _EPS) - log_sum)
    other = (
        -not_inflated + zero + counts + torch.lgamma(x + theta) - torch.lgamma(theta) - torch.lgamma(x + 1)
    )
    log_p = (x < _EPS).float() * if_zero + (x > _EPS).float() * other
    return (-log_p.sum(-1).mean(),)


def _baseline_nb_raw(logits: Tensor, log_theta: Tensor, library: Tensor, x: Tensor, kl: Tensor) -> Outputs:
    mean = library.unsqueeze(1) * torch.softmax(logits, dim=-1)
    return (_baseline_nb(mean, torch.exp(log_theta), x)[0] + kl.mean(),)


def _baseline_zinb_raw(
    logits: Tensor, log_theta: Tensor, zi_logits: Tensor, library: Tensor, x: Tensor, kl: Tensor
) -> Outputs:
    mean = library.unsqueeze(1) * torch.softmax(logits, dim=-1)
    return (_baseline_zinb(mean, torch.exp(log_theta), zi_logits, x)[0] + kl.mean(),)


def _baseline_items(logits: Tensor, x: Tensor) -> Outputs:
    """The loss of Mult-VAE, without the multinomial coefficient."""
    return (-(F.log_softmax(logits, 1) * x).sum(1).mean(),)


def _mixture_of(points: int, components: int, size: int) -> Callable[[torch.device], Inputs]:
    def setup(device: torch.device) -> Inputs:
        latents = _latents(components, size, device)
        return {
            "z": torch.randn(points, size, device=device).requires_grad_(),
            "mu": latents["mu"],
            "logvar": latents["logvar"],
        }

    return setup


_DATA = 50_000  # the size of the data set


def _fused_tc(device: torch.device) -> Callable[..., Outputs]:
    return lambda z, mu, logvar: (fastvae.regularizers.total_correlation(z, mu, logvar, _DATA),)


def _log_densities(z: Tensor, mu: Tensor, logvar: Tensor) -> Tensor:
    return -0.5 * ((z.unsqueeze(1) - mu) ** 2 * torch.exp(-logvar) + logvar + LOG_2PI)


def _baseline_tc(z: Tensor, mu: Tensor, logvar: Tensor) -> Outputs:
    """As in public beta-TC-VAEs, with the weights that fastvae uses."""
    rows = z.shape[0]
    others = (_DATA - 1) / (_DATA * (rows - 1))
    weights = torch.full((rows, rows), math.log(others), device=z.device).fill_diagonal_(-math.log(_DATA))
    densities = _log_densities(z, mu, logvar)
    joint = torch.logsumexp(densities.sum(2) + weights, 1)
    marginals = torch.logsumexp(densities + weights.unsqueeze(2), 1).sum(1)
    return ((joint - marginals).mean(),)


def _fused_vamp(device: torch.device) -> Callable[..., Outputs]:
    return lambda z, mu, logvar: (functional.gaussian_mixture_log_prob(z, mu, logvar).mean(),)


def _baseline_vamp(z: Tensor, mu: Tensor, logvar: Tensor) -> Outputs:
    densities = _log_densities(z, mu, logvar).sum(2) - math.log(mu.shape[0])
    return (torch.logsumexp(densities, 1).mean(),)


# ---------------------------------------------------------------------------------------------------------------------
# The table
# ---------------------------------------------------------------------------------------------------------------------

# The number of operands, in elements, that must pass through memory. A reconstruction loss reads recon and x and writes
# a gradient. Sampling reads mu and logvar and writes z; its backward reads z's gradient, mu and logvar, and writes two
# gradients.
_LOSS, _SAMPLE = 3, 8

CASES = (
    Case("Bernoulli 128 x 784", _bernoulli(128, 784), _fused_bernoulli, _baseline_bernoulli,
         4 * _LOSS * 128 * 784, (2.5, 3.0)),
    Case("Bernoulli 512 x 3072", _bernoulli(512, 3072), _fused_bernoulli, _baseline_bernoulli,
         4 * _LOSS * 512 * 3072, (6.0, 5.0)),
    Case("Bernoulli 1024 x 12288", _bernoulli(1024, 12288), _fused_bernoulli, _baseline_bernoulli,
         4 * _LOSS * 1024 * 12288, (6.0, 3.0)),
    Case("Gaussian 512 x 3072", _bernoulli(512, 3072), _fused_gaussian, _baseline_gaussian,
         4 * _LOSS * 512 * 3072, (3.0, 1.5), same_loss=False),
    Case("Gaussian, logvar per element, 512 x 3072", _per_element, _fused_per_element, _baseline_per_element,
         4 * 5 * 512 * 3072, (4.0, 2.0)),
    Case("reparameterise + KL 4096 x 256", lambda device: _latents(4096, 256, device), _fused_latents,
         _baseline_latents, 4 * _SAMPLE * 4096 * 256, (3.0, 3.0)),
    Case("softplus posterior, packed, 4096 x 256", _latent_head(4096, 256), _fused_softplus, _baseline_softplus,
         4 * _SAMPLE * 4096 * 256, (4.0, 3.0)),
    Case("free bits 4096 x 256", lambda device: _latents(4096, 256, device), _fused_free_bits, _baseline_free_bits,
         4 * (_SAMPLE + 2) * 4096 * 256, (3.0, 3.0)),
    # The sides draw other noise, on which everything depends. Tests compare the bound with the formula.
    Case("IWAE, K = 50, 100 x 784, latent 50", _draws(50, 100, 784, 50), _fused_iwae, _baseline_iwae,
         4 * (2 * 50 * 100 * 784 + 3 * 50 * 100 * 50), (6.0, 4.0), tolerance=math.inf),
    # From the decoder's raw outputs: their softmax and exponential belong to the loss on both sides. The tolerances
    # allow for the cancellation of lgamma terms in the baseline's float32, which mainly affects log_theta's gradient.
    Case("ZINB 128 x 20000", _counts(True, True), _fused_zinb_raw, _baseline_zinb_raw, 4 * 5 * 128 * 20_000, (8.0, 3.0),
         tolerance=1e-4),
    Case("NB 128 x 20000", _counts(False, True), _fused_nb_raw, _baseline_nb_raw, 4 * 3 * 128 * 20_000, (6.0, 2.5),
         tolerance=1e-3),
    # The baseline needs the counts as a dense matrix.
    Case("multinomial 256 x 50000, 0.2 % stored, CSR", _items(256, 50_000, 0.002), _fused_items, _baseline_items,
         4 * 2 * 256 * 50_000, (5.0, 3.0), same_loss=False),
    # The baseline loses digits: a difference of sigmoids is off by 1 part in 100 where it is 1e-5.
    Case("discretised logistics, 10 mixed, 16 x 3 x 32 x 32", _levels(100, 16, 3, 32, 32), _fused_mixture,
         _baseline_mixture, (4 * 2 * 100 + 3) * 16 * 32 * 32, (10.0, 3.0), tolerance=1e-2),
    Case("discretised logistics, 10 mixed, 1 x 3 x 256 x 256", _levels(100, 1, 3, 256, 256), _fused_mixture,
         _baseline_mixture, (4 * 2 * 100 + 3) * 256 * 256, (10.0, 3.0), tolerance=1e-2),
    Case("discretised logistic 64 x 3 x 32 x 32", _levels(6, 64, 3, 32, 32), _fused_logistic,
         _baseline_logistic, (4 * 2 * 2 + 1) * 64 * 3 * 32 * 32, (6.0, 2.0), tolerance=1e-2),
    Case("categorical 32 x 80 x 20000", _categorical(32, 80, 20000), _fused_categorical, _baseline_categorical,
         4 * 2 * 32 * 80 * 20000, (2.0, 1.5)),
    # The tolerance is for torch: near the logit 0, its normaliser is a difference of logarithms that nearly cancel.
    Case("continuous Bernoulli 512 x 3072", _bernoulli(512, 3072), _fused_continuous_bernoulli,
         _baseline_continuous_bernoulli, 4 * _LOSS * 512 * 3072, (6.0, 3.0), tolerance=1e-2),
    Case("Laplace 512 x 3072", _bernoulli(512, 3072), _fused_laplace, _baseline_laplace,
         4 * _LOSS * 512 * 3072, (3.0, 1.5)),
    # These are limited by arithmetic, not by memory.
    Case("beta-TC 512 x 512 x 32", _mixture_of(512, 512, 32), _fused_tc, _baseline_tc, 4 * 6 * 512 * 32, (15.0, 2.0),
         (7.5, 1.0)),
    Case("beta-TC 1024 x 1024 x 64", _mixture_of(1024, 1024, 64), _fused_tc, _baseline_tc, 4 * 6 * 1024 * 64,
         (20.0, 2.0), (10.0, 1.0)),
    Case("VampPrior 1024 x 1000 x 64", _mixture_of(1024, 1000, 64), _fused_vamp, _baseline_vamp, 4 * 6 * 1024 * 64,
         (30.0, 5.0), (15.0, 2.5)),
    # Additional cases without floors.
    Case("Laplace 512 x 3072, against F.l1_loss", _bernoulli(512, 3072), _fused_laplace, _baseline_l1,
         4 * _LOSS * 512 * 3072, same_loss=False),
    Case("ZINB 128 x 20000, mean and inverse dispersion", _counts(True, False), _fused_zinb, _baseline_zinb,
         4 * 5 * 128 * 20_000, tolerance=1e-4),
    Case("NB 128 x 20000, mean and inverse dispersion", _counts(False, False), _fused_nb, _baseline_nb,
         4 * 3 * 128 * 20_000, tolerance=1e-4),
    Case("multinomial 256 x 50000, 0.2 % of the counts, dense", _items(256, 50_000, 0.002), _fused_dense_items,
         _baseline_items, 4 * 3 * 256 * 50_000, same_loss=False),
    Case("Gaussian, packed head, 512 x 6 x 32 x 32", _head, _fused_head, _baseline_head, 4 * 5 * 512 * 3072),
    Case("Gaussian, packed head, bounded logvar, 512 x 6 x 32 x 32", _head, _fused_bounded_head, _baseline_bounded_head,
         4 * 5 * 512 * 3072),
    Case("Gaussian, uint8 data, 512 x 3072", _bernoulli(512, 3072, data=torch.uint8), _fused_gaussian,
         _baseline_gaussian_uint8, (4 + 1 + 4) * 512 * 3072, same_loss=False),
    Case("Gaussian, bool mask, 512 x 3 x 32 x 32", _masked((512, 3, 32, 32), torch.bool), _fused_masked_gaussian,
         _baseline_masked_gaussian, (4 * _LOSS + 1) * 512 * 3072, same_loss=False,
         most=("Gaussian 512 x 3072", 1.25)),
    Case("Gaussian, uint8 mask of pixels, 512 x 3 x 32 x 32", _masked((512, 1, 32, 32), torch.uint8),
         _fused_masked_gaussian, _baseline_masked_gaussian, 4 * _LOSS * 512 * 3072 + 512 * 1024, same_loss=False,
         most=("Gaussian 512 x 3072", 1.25)),
    Case("Gaussian, float weight, 512 x 3 x 32 x 32", _masked((512, 3, 32, 32), torch.float32), _fused_masked_gaussian,
         _baseline_masked_gaussian, 4 * (_LOSS + 1) * 512 * 3072, same_loss=False,
         most=("Gaussian 512 x 3072", 1.45)),
    Case("Bernoulli bf16 512 x 3072", _bernoulli(512, 3072, torch.bfloat16), _fused_bernoulli, _baseline_bernoulli,
         2 * _LOSS * 512 * 3072, tolerance=2e-2),
    Case("Bernoulli 512 x 3072, bernoulli_nll().mean()", _bernoulli(512, 3072), _fused_bernoulli_rows,
         _baseline_bernoulli_rows, 4 * _LOSS * 512 * 3072),
    Case("reparameterise + KL 128 x 20", lambda device: _latents(128, 20, device), _fused_latents,
         _baseline_latents, 4 * _SAMPLE * 128 * 20),
    Case("ELBO step: latent 128 x 20, Bernoulli 128 x 784", _step, _fused_step, _baseline_step,
         4 * (_LOSS * 128 * 784 + _SAMPLE * 128 * 20)),
)  # fmt: skip


# On a GPU: 100 million elements, far more than any L2 cache holds, in long and short rows, and the launches of a small
# model.
_BF16, _UINT8 = torch.bfloat16, torch.uint8
_IMAGES, _N = (8192, 12288), 8192 * 12288
_GPU_FLOORS, _GPU_SAMPLING = (1.5, 1.5), (1.2, 1.2)
_named = {case.name: replace(case, floors=None, avx2_floors=None, most=None) for case in CASES}

# The most important cases come first, in case the run is cut short; cases that resemble earlier ones come last.


def _gpu_counts(zero_inflated: bool, cells: int, sparse: bool) -> Case:
    """Counts as in "ZINB 128 x 20000". The baseline reads them dense, because users have no formula for CSR."""
    name = "ZINB" if zero_inflated else "NB"
    fused = {
        (True, False): _fused_zinb_raw,
        (True, True): _fused_zinb_csr,
        (False, False): _fused_nb_raw,
        (False, True): _fused_nb_csr,
    }[zero_inflated, sparse]
    # The inputs and their gradients, and the counts: dense, or the 5 % stored with their columns.
    per_count = 4 * (4 if zero_inflated else 2) + (0.05 * (4 + 8) if sparse else 4)
    return Case(
        f"{name} {cells} x 20000" + (", CSR" if sparse else ""),
        _counts(zero_inflated, True, cells, sparse),
        fused,
        _baseline_zinb_raw if zero_inflated else _baseline_nb_raw,
        int(per_count * cells * 20_000),
        tolerance=1e-4 if zero_inflated else 1e-3,
    )


def _gpu_items(users: int, sparse: bool) -> Case:
    """The multinomial of counts as dense as those of a cell."""
    return Case(
        f"multinomial {users} x 20000" + (", CSR" if sparse else ""),
        _items(users, 20_000, 0.05),
        _fused_items if sparse else _fused_dense_items,
        _baseline_items,
        int((4 * 2 + (0.05 * (4 + 8) if sparse else 4)) * users * 20_000),
        same_loss=False,
    )


GPU_CASES = (
    _named["ELBO step: latent 128 x 20, Bernoulli 128 x 784"],
    Case("Bernoulli 8192 x 12288", _bernoulli(*_IMAGES), _fused_bernoulli, _baseline_bernoulli,
         4 * _LOSS * _N, _GPU_FLOORS),
    Case("Bernoulli 8192 x 12288, uint8 data", _bernoulli(*_IMAGES, data=_UINT8), _fused_bernoulli,
         _baseline_bernoulli_uint8, (4 + 1 + 4) * _N, _GPU_FLOORS),
    Case("Bernoulli bf16 8192 x 12288", _bernoulli(*_IMAGES, _BF16), _fused_bernoulli, _baseline_bernoulli,
         2 * _LOSS * _N, _GPU_FLOORS, tolerance=2e-2),
    Case("Bernoulli bf16 8192 x 12288, uint8 data", _bernoulli(*_IMAGES, _BF16, _UINT8), _fused_bernoulli,
         _baseline_bernoulli_uint8, (2 + 1 + 2) * _N, _GPU_FLOORS, tolerance=2e-2),
    Case("reparameterise + KL 409600 x 256", lambda device: _latents(409600, 256, device), _fused_latents,
         _baseline_latents, 4 * _SAMPLE * 409600 * 256, _GPU_SAMPLING),
    Case("reparameterise + KL bf16 409600 x 256", lambda device: _latents(409600, 256, device, _BF16),
         _fused_latents, _baseline_latents, 2 * _SAMPLE * 409600 * 256, _GPU_SAMPLING, tolerance=2e-2),
    _named["Bernoulli 512 x 3072"],
    _named["ZINB 128 x 20000"],
    Case("discretised logistics, 10 mixed, 512 x 3 x 32 x 32", _levels(100, 512, 3, 32, 32), _fused_mixture,
         _baseline_mixture, (4 * 2 * 100 + 3) * 512 * 32 * 32, _GPU_FLOORS, tolerance=1e-2),
    _named["categorical 32 x 80 x 20000"],
    _named["NB 128 x 20000"],
    *(
        _gpu_counts(zero_inflated, cells, sparse)
        for zero_inflated in (True, False)
        for cells, sparse in ((128, True), (512, False), (512, True))
    ),
    *(_gpu_items(users, sparse) for users in (128, 512) for sparse in (False, True)),
    _named["beta-TC 1024 x 1024 x 64"],
    _named["VampPrior 1024 x 1000 x 64"],
    _named["Bernoulli 1024 x 12288"],
    Case("Bernoulli 131072 x 784", _bernoulli(131072, 784), _fused_bernoulli, _baseline_bernoulli,
         4 * _LOSS * 131072 * 784, _GPU_FLOORS),
    Case("Bernoulli 8 x 12582912", _bernoulli(8, 12582912), _fused_bernoulli, _baseline_bernoulli,
         4 * _LOSS * _N, _GPU_FLOORS),
    Case("Gaussian 8192 x 12288", _bernoulli(*_IMAGES), _fused_gaussian, _baseline_gaussian,
         4 * _LOSS * _N, same_loss=False),
    _named["reparameterise + KL 128 x 20"],
    Case("Gaussian, packed head, 16384 x 6 x 64 x 32",
         lambda device: _reconstruction((16384, 3, 64, 32), device, channels=2), _fused_head, _baseline_head,
         4 * 5 * 16384 * 6144),
)  # fmt: skip
