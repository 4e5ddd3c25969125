"""The messages for inputs of wrong shape."""

import pytest
import torch
from wrong_inputs import (
    CSR,
    FLAT,
    HEAD,
    IMAGE,
    ROWS,
    SEED,
    Unsummed,
    Wrong,
    check_raises,
    elbo,
)

import fastvae
import fastvae.functional as fv
from fastvae.likelihoods import (
    Gaussian,
)

WRONG = {
    "target image for flat logits": Wrong(
        lambda: fv.bernoulli_nll(FLAT, IMAGE),
        ValueError,
        "fastvae.bernoulli_nll: `target` must have the shape of `logits` (4, 12), got (4, 3, 2, 2); "
        "did you mean target.flatten(1)?",
    ),
    "flat target for an image": Wrong(
        lambda: fv.gaussian_nll(IMAGE, FLAT),
        ValueError,
        "fastvae.gaussian_nll: `target` must have the shape of `mean` (4, 3, 2, 2), got (4, 12); "
        "did you mean mean.flatten(1)?",
    ),
    "image x for flat recon": Wrong(
        lambda: elbo(FLAT, IMAGE, kl=ROWS),
        ValueError,
        "fastvae.ELBO: `x` must have the shape of `recon` (4, 12), got (4, 3, 2, 2); did you mean x.flatten(1)?",
    ),
    "a column for a row of numbers": Wrong(
        lambda: fv.bernoulli_nll(ROWS, torch.zeros(4, 1)),
        ValueError,
        "`target` must have the shape of `logits` (4,), got (4, 1); did you mean target.reshape((4,))?",
    ),
    "a row of numbers for a column": Wrong(
        lambda: fv.bernoulli_nll(torch.zeros(4, 1), ROWS),
        ValueError,
        "`target` must have the shape of `logits` (4, 1), got (4,); did you mean target.reshape((4, 1))?",
    ),
    "a variance for each column": Wrong(
        lambda: fv.gaussian_nll(FLAT, FLAT, logvar=torch.zeros(12)),
        ValueError,
        "`logvar` must be 0-dimensional or have the shape of `mean` (4, 12), got (12,); "
        "did you mean logvar.expand_as(mean)?",
    ),
    "other arrangement": Wrong(
        lambda: fv.bernoulli_nll(IMAGE, torch.zeros(4, 2, 2, 3)),
        ValueError,
        "`target` must have the shape of `logits` (4, 3, 2, 2), got (4, 2, 2, 3); "
        "did you mean target.reshape((4, 3, 2, 2))?",
    ),
    "other size": Wrong(
        lambda: fv.bernoulli_nll(FLAT, FLAT[:2]),
        ValueError,
        "fastvae.bernoulli_nll: `target` must have the shape of `logits` (4, 12), got (2, 12)",
    ),
    "broadcast": Wrong(
        lambda: fv.gaussian_kl(FLAT, FLAT[:1]),
        ValueError,
        "fastvae.gaussian_kl: `logvar` must have the shape of `mu` (4, 12), got (1, 12); "
        "did you mean logvar.expand_as(mu)?",
    ),
    "head target": Wrong(
        lambda: fv.gaussian_head_nll(HEAD, HEAD),
        ValueError,
        "fastvae.gaussian_head_nll: `target` must have the shape (4, 3, 2, 2) for `params` (4, 6, 2, 2), "
        "got (4, 6, 2, 2)",
    ),
    "odd head": Wrong(
        lambda: fv.gaussian_head_nll(IMAGE, IMAGE),
        ValueError,
        "fastvae.gaussian_head_nll: `params` must have shape (B, 2C, ...), mean and log-variance packed along "
        "dimension 1, got (4, 3, 2, 2)",
    ),
    "odd head of a Laplace": Wrong(
        lambda: fv.laplace_head_nll(IMAGE, IMAGE),
        ValueError,
        "fastvae.laplace_head_nll: `params` must have shape (B, 2C, ...), location and log-scale packed along "
        "dimension 1, got (4, 3, 2, 2)",
    ),
    "learned log_scale": Wrong(
        lambda: fv.student_t_nll(FLAT, FLAT, ROWS, df=3),
        ValueError,
        "fastvae.student_t_nll: `log_scale` must be 0-dimensional or have the shape of `loc` (4, 12), got (4,)",
    ),
    "scale that is a tensor": Wrong(
        lambda: fv.laplace_nll(FLAT, FLAT, scale=torch.tensor(2.0)),
        TypeError,
        "fastvae.laplace_nll: `scale` must be a float, got Tensor; pass a scale that is a tensor as "
        "`log_scale` = scale.log()",
    ),
    "two scales": Wrong(
        lambda: fv.laplace_nll(FLAT, FLAT, FLAT, scale=2.0),
        ValueError,
        "fastvae.laplace_nll: `log_scale` and `scale` exclude each other, got `scale` 2.0",
    ),
    "no degrees of freedom": Wrong(
        lambda: fv.student_t_nll(FLAT, FLAT, df=0),
        ValueError,
        "fastvae.student_t_nll: `df` must be positive and finite, got 0.0",
    ),
    "no shape of a gamma": Wrong(
        lambda: fv.gamma_nll(FLAT, FLAT, shape=0),
        ValueError,
        "fastvae.gamma_nll: `shape` must be positive and finite, got 0.0",
    ),
    "shape of a gamma that is no number": Wrong(
        lambda: fastvae.likelihoods.Gamma("one"),
        TypeError,
        "fastvae.likelihoods.Gamma: `shape` must be a float, got 'one'",
    ),
    "pixels for a gamma": Wrong(
        lambda: fv.gamma_nll(FLAT, FLAT.byte(), shape=2),
        TypeError,
        "fastvae.gamma_nll: `target` must be float32 for a float32 `log_scale`, got uint8; "
        "did you mean target.to(log_scale.dtype)?",
    ),
    "positive data with a gradient": Wrong(
        lambda: fv.gamma_nll(FLAT, FLAT.abs().requires_grad_(), shape=2),
        ValueError,
        "fastvae.gamma_nll: `target` requires a gradient, which this likelihood does not provide; "
        "pass target.detach(), or differentiate fastvae.reference.gamma_nll",
    ),
    "bool counts": Wrong(
        lambda: fv.poisson_nll(FLAT, FLAT > 0),
        TypeError,
        "fastvae.poisson_nll: `target` must be float32, uint8, uint16, int32 or int64 for a float32 `log_rate`, "
        "got bool",
    ),
    "counts for a density": Wrong(
        lambda: fv.continuous_bernoulli_nll(FLAT, FLAT.int()),
        TypeError,
        "fastvae.continuous_bernoulli_nll: `target` must be float32 or uint8 for a float32 `logits`, got int32",
    ),
    "counts with a gradient": Wrong(
        lambda: fv.poisson_nll(FLAT, FLAT.abs().requires_grad_()),
        ValueError,
        "fastvae.poisson_nll: `target` requires a gradient, which this likelihood does not provide; "
        "pass target.detach()",
    ),
    "unknown reduction of counts": Wrong(
        lambda: fv.poisson_rate_nll(FLAT, FLAT, reduction="sum"),
        ValueError,
        "fastvae.poisson_rate_nll: `reduction` must be one of 'event', 'none', got 'sum'",
    ),
    "eps below 0": Wrong(
        lambda: fv.negative_binomial_nll(FLAT, FLAT, FLAT, eps=-1e-8),
        ValueError,
        "fastvae.negative_binomial_nll: `eps` must be finite and at least 0, got -1e-08",
    ),
    "eps that is no number": Wrong(
        lambda: fv.zero_inflated_negative_binomial_nll(FLAT, FLAT, FLAT, FLAT, eps="small"),
        TypeError,
        "fastvae.zero_inflated_negative_binomial_nll: `eps` must be a float, got 'small'",
    ),
    "elements of sparse counts": Wrong(
        lambda: fv.negative_binomial_nll(FLAT, CSR, FLAT, reduction="none"),
        TypeError,
        "fastvae.negative_binomial_nll: `target` must be dense, got torch.sparse_csr; did you mean target.to_dense()? "
        "(sparse targets need reduction='event')",
    ),
    "elements of counts with a gradient": Wrong(
        lambda: fv.poisson_rate_nll(FLAT, FLAT.abs().requires_grad_(), reduction="none"),
        ValueError,
        "fastvae.poisson_rate_nll: `target` requires a gradient, which this likelihood does not provide; "
        "pass target.detach(), or differentiate fastvae.reference.poisson_rate_nll",
    ),
    "elements of counts of another shape": Wrong(
        lambda: fv.negative_binomial_nll(FLAT, FLAT[:1], FLAT, reduction="none"),
        ValueError,
        "fastvae.negative_binomial_nll: `target` must have the shape of `mean` (4, 12), got (1, 12)",
    ),
    "a rate below 0": Wrong(
        lambda: fv.poisson_rate_nll(FLAT - 1, FLAT, validate=True),
        ValueError,
        "fastvae.poisson_rate_nll: `rate` must hold finite numbers that are at least 0, got -1.0 at (0, 0)",
    ),
    "a mean below 0": Wrong(
        lambda: fv.negative_binomial_nll(FLAT - 1, FLAT, FLAT, eps=1e-8, validate=True),
        ValueError,
        "fastvae.negative_binomial_nll: `mean` must hold finite numbers that are at least 0, got -1.0 at (0, 0)",
    ),
    "unknown scale of a module": Wrong(
        lambda: fastvae.likelihoods.StudentT(3.0, "fixed"),
        ValueError,
        "fastvae.likelihoods.StudentT: `scale` must be a positive float, 'learned' or 'per_element', got 'fixed'",
    ),
    "bounds of a fixed scale": Wrong(
        lambda: Gaussian(0.5, logvar_bounds=(-6.0, 2.0)),
        ValueError,
        "fastvae.likelihoods.Gaussian: `logvar_bounds` must be None unless `scale` is 'learned' or 'per_element', "
        "got (-6.0, 2.0) with `scale` 0.5",
    ),
    "bounds of a fixed log-scale": Wrong(
        lambda: fastvae.likelihoods.StudentT(3.0, 0.5, log_scale_bounds=(-6.0, 2.0)),
        ValueError,
        "fastvae.likelihoods.StudentT: `log_scale_bounds` must be None unless `scale` is 'learned' or 'per_element', "
        "got (-6.0, 2.0) with `scale` 0.5",
    ),
    "bounds of a log-scale, the upper one first": Wrong(
        lambda: fastvae.likelihoods.Laplace("learned", log_scale_bounds=(2, -6)),
        ValueError,
        "fastvae.likelihoods.Laplace: `log_scale_bounds` must be finite with lo < hi, got (2.0, -6.0)",
    ),
    "bounds in the wrong order": Wrong(
        lambda: Gaussian("learned", logvar_bounds=(2, -6)),
        ValueError,
        "fastvae.likelihoods.Gaussian: `logvar_bounds` must be finite with lo < hi, got (2.0, -6.0)",
    ),
    "bounds at one point": Wrong(
        lambda: fv.gaussian_head_nll(HEAD, IMAGE, logvar_bounds=(1.0, 1.0)),
        ValueError,
        "fastvae.gaussian_head_nll: `logvar_bounds` must be finite with lo < hi, got (1.0, 1.0)",
    ),
    "an infinite bound": Wrong(
        lambda: Gaussian("per_element", logvar_bounds=(-6.0, float("inf"))),
        ValueError,
        "fastvae.likelihoods.Gaussian: `logvar_bounds` must be finite with lo < hi, got (-6.0, inf)",
    ),
    "a bound that is no number": Wrong(
        lambda: fv.gaussian_nll(FLAT, FLAT, FLAT, logvar_bounds=(float("nan"), 2.0)),
        ValueError,
        "fastvae.gaussian_nll: `logvar_bounds` must be finite with lo < hi, got (nan, 2.0)",
    ),
    "three bounds": Wrong(
        lambda: fv.gaussian_nll(FLAT, FLAT, FLAT, logvar_bounds=(-6.0, 0.0, 2.0)),
        ValueError,
        "fastvae.gaussian_nll: `logvar_bounds` must be a pair of floats (lo, hi), got (-6.0, 0.0, 2.0)",
    ),
    "one bound": Wrong(
        lambda: Gaussian("per_element", logvar_bounds=-6.0),
        TypeError,
        "fastvae.likelihoods.Gaussian: `logvar_bounds` must be a pair of floats (lo, hi), got -6.0",
    ),
    "bounds of words": Wrong(
        lambda: Gaussian("per_element", logvar_bounds=("low", "high")),
        TypeError,
        "fastvae.likelihoods.Gaussian: `logvar_bounds` must be a pair of floats (lo, hi), got ('low', 'high')",
    ),
    "bounds of nothing": Wrong(
        lambda: fv.gaussian_nll(FLAT, FLAT, logvar_bounds=(-6.0, 2.0)),
        ValueError,
        "fastvae.gaussian_nll: `logvar_bounds` requires `logvar`, got `logvar_bounds` (-6.0, 2.0) alone",
    ),
    "bounded learned logvar": Wrong(
        lambda: fv.gaussian_nll(FLAT, FLAT, ROWS, logvar_bounds=(-6.0, 2.0)),
        ValueError,
        "fastvae.gaussian_nll: `logvar` must be 0-dimensional or have the shape of `mean` (4, 12), got (4,)",
    ),
    "bounded integer logvar": Wrong(
        lambda: fv.gaussian_nll(FLAT, FLAT, torch.tensor(1), logvar_bounds=(-6.0, 2.0)),
        TypeError,
        "fastvae.gaussian_nll: `logvar` must be float32, like `mean`, got int64; did you mean logvar.to(mean.dtype)?",
    ),
    "learned logvar": Wrong(
        lambda: fv.gaussian_nll(FLAT, FLAT, ROWS),
        ValueError,
        "fastvae.gaussian_nll: `logvar` must be 0-dimensional or have the shape of `mean` (4, 12), got (4,)",
    ),
    "no batch": Wrong(
        lambda: fv.bernoulli_nll(torch.tensor(0.0), torch.tensor(0.0)),
        ValueError,
        "fastvae.bernoulli_nll: `logits` must have a batch dimension, got a 0-dimensional tensor; "
        "did you mean logits.unsqueeze(0)?",
    ),
    "kl per element": Wrong(
        lambda: elbo(FLAT, FLAT, kl=FLAT),
        ValueError,
        "fastvae.ELBO: `kl` must have one value per row of `recon`, shape (4,), got (4, 12)",
    ),
    "kl already a mean": Wrong(
        lambda: elbo(FLAT, FLAT, kl=ROWS.mean()),
        ValueError,
        "fastvae.ELBO: `kl` must have one value per row of `recon`, shape (4,), got ()",
    ),
    "kl of another batch": Wrong(
        lambda: elbo(FLAT, FLAT, kl=torch.zeros(3)),
        ValueError,
        "fastvae.ELBO: `kl` must have one value per row of `recon`, shape (4,), got (3,)",
    ),
    "nll per element": Wrong(
        lambda: elbo(FLAT, FLAT, kl=ROWS, likelihood=Unsummed()),
        ValueError,
        "fastvae.ELBO: `nll` of the likelihood must return one value per row, shape (B,), got (4, 12)",
    ),
    "mu of another batch": Wrong(
        lambda: elbo(FLAT, FLAT, FLAT[:3], FLAT[:3]),
        ValueError,
        "fastvae.ELBO: `mu` must have as many rows as `x` (4, 12), got (3, 12)",
    ),
    "eps": Wrong(
        lambda: fv.reparameterize_kl(FLAT, FLAT, samples=2, eps=FLAT),
        ValueError,
        "fastvae.reparameterize_kl: `eps` must have shape (samples, *mu.shape) = (2, 4, 12), got (4, 12)",
    ),
    "seed shape": Wrong(
        lambda: fv.reparameterize_kl(FLAT, FLAT, seed=SEED[:1]),
        ValueError,
        "fastvae.reparameterize_kl: `seed` must have shape (2,): (seed, offset), got (1,)",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_input_raises_the_same_message_on_every_backend(backend: str, name: str) -> None:
    check_raises(backend, WRONG[name])
