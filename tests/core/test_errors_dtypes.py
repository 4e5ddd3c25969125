"""The messages for inputs of wrong type, dtype, layout or device."""

import pytest
import torch
from torch import nn
from wrong_inputs import (
    CSR,
    FLAT,
    HEAD,
    LEVELS,
    META,
    MIXED,
    ROWS,
    SEED,
    Wrong,
    check_raises,
    elbo,
    nested,
)

import fastvae
import fastvae.functional as fv
from fastvae.likelihoods import (
    Bernoulli,
    Gaussian,
)

WRONG = {
    # Dtypes and kinds
    "integer latents": Wrong(
        lambda: fv.reparameterize_kl(FLAT.long(), FLAT.long()),
        TypeError,
        "fastvae.reparameterize_kl: `mu` must be float32, bfloat16, float16 or float64, got int64",
    ),
    "integer recon": Wrong(
        lambda: elbo(FLAT.int(), FLAT, kl=ROWS),
        TypeError,
        "fastvae.ELBO: `recon` must be float32, bfloat16, float16 or float64, got int32",
    ),
    "mixed latents": Wrong(
        lambda: fv.gaussian_kl(FLAT, FLAT.half()),
        TypeError,
        "fastvae.gaussian_kl: `logvar` must be float32, like `mu`, got float16; did you mean logvar.to(mu.dtype)?",
    ),
    "float32 logvar of a half mu": Wrong(
        lambda: elbo(FLAT, FLAT, FLAT.bfloat16(), FLAT),
        TypeError,
        "fastvae.gaussian_kl: `logvar` must be bfloat16, like `mu`, got float32; did you mean mu.float()?",
    ),
    "learned prior of a half posterior": Wrong(
        lambda: fv.reparameterize_kl(FLAT.half(), FLAT.half(), FLAT, FLAT),
        TypeError,
        "fastvae.reparameterize_kl: `prior_mu` must be float16, like `mu`, got float32; did you mean mu.float()?",
    ),
    "float32 logvar of a half mean": Wrong(
        lambda: fv.gaussian_nll(FLAT.half(), FLAT, FLAT),
        TypeError,
        "fastvae.gaussian_nll: `logvar` must be float16, like `mean`, got float32; did you mean mean.float()?",
    ),
    "float32 noise of a half posterior": Wrong(
        lambda: fv.reparameterize_kl(FLAT.half(), FLAT.half(), eps=FLAT),
        TypeError,
        "fastvae.reparameterize_kl: `eps` must be float16, like `mu`, got float32; did you mean eps.to(mu.dtype)?",
    ),
    "float64 target": Wrong(
        lambda: elbo(FLAT, FLAT.double(), kl=ROWS),
        TypeError,
        "fastvae.ELBO: `x` must be float32, uint8 or bool for a float32 `recon`, got float64; "
        "did you mean x.to(recon.dtype)?",
    ),
    "int64 target": Wrong(
        lambda: fv.bernoulli_nll(FLAT.half(), FLAT.long()),
        TypeError,
        "fastvae.bernoulli_nll: `target` must be float16, float32, uint8 or bool for a float16 `logits`, got int64; "
        "did you mean target.to(logits.dtype)?",
    ),
    "bool target of a Gaussian": Wrong(
        lambda: fv.gaussian_nll(FLAT, FLAT.bool()),
        TypeError,
        "fastvae.gaussian_nll: `target` must be float32 or uint8 for a float32 `mean`, got bool",
    ),
    "array target": Wrong(
        lambda: elbo(FLAT, FLAT.numpy(), kl=ROWS),
        TypeError,
        "fastvae.ELBO: `x` must be a Tensor, got ndarray",
    ),
    "integer kl": Wrong(
        lambda: elbo(FLAT, FLAT, kl=ROWS.long()),
        TypeError,
        "fastvae.ELBO: `kl` must be float32, bfloat16, float16 or float64, got int64",
    ),
    "kl a number": Wrong(
        lambda: elbo(FLAT, FLAT, kl=1.0), TypeError, "fastvae.ELBO: `kl` must be a Tensor, got float"
    ),
    "seed a number": Wrong(
        lambda: fv.reparameterize_kl(FLAT, FLAT, seed=3),
        TypeError,
        "fastvae.reparameterize_kl: `seed` must be an int64 Tensor (seed, offset), got int; "
        "did you mean torch.tensor([seed, 0])?",
    ),
    "float seed": Wrong(
        lambda: fv.reparameterize_kl(FLAT, FLAT, seed=SEED.float()),
        TypeError,
        "fastvae.reparameterize_kl: `seed` must be int64, got float32",
    ),
    "generator a number": Wrong(
        lambda: fv.reparameterize_kl(FLAT, FLAT, generator=3),
        TypeError,
        "fastvae.reparameterize_kl: `generator` must be a torch.Generator, got int",
    ),
    "samples a float": Wrong(
        lambda: fv.reparameterize_kl(FLAT, FLAT, samples=2.0),
        TypeError,
        "fastvae.reparameterize_kl: `samples` must be an int or None, got float",
    ),
    "scale a tensor": Wrong(
        lambda: fv.gaussian_nll(FLAT, FLAT, scale=torch.tensor(1.0)),
        TypeError,
        "fastvae.gaussian_nll: `scale` must be a float, got Tensor; pass a variance that is a tensor as `logvar`",
    ),
    "module scale a tensor": Wrong(
        lambda: Gaussian(torch.tensor(1.0)),
        TypeError,
        "fastvae.likelihoods.Gaussian: `scale` must be a positive float, 'learned' or 'per_element', got a Tensor",
    ),
    "likelihood a class": Wrong(
        lambda: fastvae.ELBO(Bernoulli),
        TypeError,
        "fastvae.ELBO: `likelihood` must be one of 'bernoulli', 'gaussian', 'laplace', 'continuous_bernoulli', "
        "'poisson', 'categorical', or an nn.Module with a method `nll(params, target)`, got the class Bernoulli",
    ),
    "likelihood without nll": Wrong(
        lambda: fastvae.ELBO(nn.Identity()), TypeError, "`nll(params, target)`, got Identity"
    ),
    "half a prior": Wrong(
        lambda: fv.gaussian_kl(FLAT, FLAT, FLAT),
        TypeError,
        "fastvae.gaussian_kl: `prior_mu` and `prior_logvar` must be passed together, but `prior_logvar` is missing",
    ),
    "the other half": Wrong(
        lambda: fv.reparameterize_kl(FLAT, FLAT, prior_logvar=FLAT),
        TypeError,
        "fastvae.reparameterize_kl: `prior_mu` and `prior_logvar` must be passed together, but `prior_mu` is missing",
    ),
    "neither kl nor posterior": Wrong(
        lambda: elbo(FLAT, FLAT),
        TypeError,
        "fastvae.ELBO: expected either `kl` or the posterior, as in elbo(recon, x, kl=kl) or "
        "elbo(recon, x, mu, logvar), got neither",
    ),
    "half a posterior": Wrong(
        lambda: elbo(FLAT, FLAT, logvar=FLAT),
        TypeError,
        "elbo(recon, x, mu, logvar), got only `logvar`",
    ),
    "kl and posterior": Wrong(
        lambda: elbo(FLAT, FLAT, FLAT, FLAT, kl=ROWS), TypeError, "elbo(recon, x, mu, logvar), got both"
    ),
    # Layouts
    "sparse logits": Wrong(
        lambda: fv.bernoulli_nll(FLAT.to_sparse(), FLAT),
        TypeError,
        "fastvae.bernoulli_nll: `logits` must be dense, got torch.sparse_coo; did you mean logits.to_dense()?",
    ),
    "mkldnn recon": Wrong(
        lambda: elbo(FLAT.to_mkldnn(), FLAT, kl=ROWS),
        TypeError,
        "fastvae.ELBO: `recon` must be dense, got torch._mkldnn; did you mean recon.to_dense()?",
    ),
    "sparse mu": Wrong(
        lambda: fv.reparameterize_kl(FLAT.to_sparse(), FLAT),
        TypeError,
        "fastvae.reparameterize_kl: `mu` must be dense, got torch.sparse_coo; did you mean mu.to_dense()?",
    ),
    "sparse logvar": Wrong(
        lambda: fv.gaussian_kl(FLAT, FLAT.to_sparse()),
        TypeError,
        "fastvae.gaussian_kl: `logvar` must be dense, got torch.sparse_coo; did you mean logvar.to_dense()?",
    ),
    "CSR counts of a Poisson": Wrong(
        lambda: elbo(FLAT, CSR, kl=ROWS, likelihood="poisson"),
        TypeError,
        "fastvae.ELBO: `x` must be dense, got torch.sparse_csr; did you mean x.to_dense()?",
    ),
    "CSR target": Wrong(
        lambda: fv.gaussian_nll(FLAT, CSR),
        TypeError,
        "fastvae.gaussian_nll: `target` must be dense, got torch.sparse_csr; did you mean target.to_dense()?",
    ),
    "sparse classes": Wrong(
        lambda: fv.categorical_nll(FLAT.unsqueeze(1), ROWS.long().unsqueeze(1).to_sparse()),
        TypeError,
        "fastvae.categorical_nll: `target` must be dense, got torch.sparse_coo; did you mean target.to_dense()?",
    ),
    "sparse probabilities": Wrong(
        lambda: elbo(FLAT.to_sparse(), FLAT, kl=ROWS, likelihood=Bernoulli(from_probs=True)),
        TypeError,
        "fastvae.ELBO: `recon` must be dense, got torch.sparse_coo; did you mean recon.to_dense()?",
    ),
    "CSR probabilities": Wrong(
        lambda: Bernoulli(from_probs=True).nll(CSR, FLAT),
        TypeError,
        "fastvae.bernoulli_nll: `logits` must be dense, got torch.sparse_csr; did you mean logits.to_dense()?",
    ),
    "nested probabilities": Wrong(
        lambda: elbo(nested(torch.strided), FLAT, kl=ROWS, likelihood=Bernoulli(from_probs=True)),
        TypeError,
        "fastvae.ELBO: `recon` must be dense, got a nested tensor",
    ),
    "sparse levels to validate": Wrong(
        lambda: fv.discretized_logistic_nll(HEAD, LEVELS.to_sparse(), validate=True),
        TypeError,
        "fastvae.discretized_logistic_nll: `target` must be dense, got torch.sparse_coo; "
        "did you mean target.to_dense()?",
    ),
    "sparse levels of a mixture to validate": Wrong(
        lambda: fv.discretized_logistic_mixture_nll(MIXED, LEVELS.to_sparse(), components=5, validate=True),
        TypeError,
        "fastvae.discretized_logistic_mixture_nll: `target` must be dense, got torch.sparse_coo; "
        "did you mean target.to_dense()?",
    ),
    "sparse levels": Wrong(
        lambda: fv.discretized_logistic_nll(HEAD, LEVELS.to_sparse()),
        TypeError,
        "fastvae.discretized_logistic_nll: `target` must be dense, got torch.sparse_coo; "
        "did you mean target.to_dense()?",
    ),
    "CSR mean of counts": Wrong(
        lambda: fv.negative_binomial_nll(CSR, FLAT, FLAT[0]),
        TypeError,
        "fastvae.negative_binomial_nll: `mean` must be dense, got torch.sparse_csr; did you mean mean.to_dense()?",
    ),
    "sparse dispersion": Wrong(
        lambda: fv.negative_binomial_nll(FLAT, FLAT, FLAT[0].to_sparse()),
        TypeError,
        "fastvae.negative_binomial_nll: `inverse_dispersion` must be dense, got torch.sparse_coo; "
        "did you mean inverse_dispersion.to_dense()?",
    ),
    "sparse kl": Wrong(
        lambda: elbo(FLAT, FLAT, kl=ROWS.to_sparse()),
        TypeError,
        "fastvae.ELBO: `kl` must be dense, got torch.sparse_coo; did you mean kl.to_dense()?",
    ),
    "sparse kl of every dimension": Wrong(
        lambda: fastvae.ELBO("bernoulli", free_bits=0.25)(FLAT, FLAT, kl=FLAT.to_sparse()),
        TypeError,
        "fastvae.ELBO: `kl` must be dense, got torch.sparse_coo; did you mean kl.to_dense()?",
    ),
    "sparse seed": Wrong(
        lambda: fv.reparameterize_kl(FLAT, FLAT, seed=SEED.to_sparse()),
        TypeError,
        "fastvae.reparameterize_kl: `seed` must be dense, got torch.sparse_coo; did you mean seed.to_dense()?",
    ),
    "sparse eps": Wrong(
        lambda: fv.reparameterize_kl(FLAT, FLAT, eps=FLAT.to_sparse()),
        TypeError,
        "fastvae.reparameterize_kl: `eps` must be dense, got torch.sparse_coo; did you mean eps.to_dense()?",
    ),
    "jagged logits": Wrong(
        lambda: fv.bernoulli_nll(nested(torch.jagged), FLAT),
        TypeError,
        "fastvae.bernoulli_nll: `logits` must be dense, got a nested tensor",
    ),
    "nested logits": Wrong(
        lambda: fv.bernoulli_nll(nested(torch.strided), FLAT),
        TypeError,
        "fastvae.bernoulli_nll: `logits` must be dense, got a nested tensor",
    ),
    "jagged x": Wrong(
        lambda: elbo(FLAT, nested(torch.jagged), FLAT, FLAT),
        TypeError,
        "fastvae.ELBO: `x` must be dense, got a nested tensor",
    ),
    "nested x": Wrong(
        lambda: elbo(FLAT, nested(torch.strided), FLAT, FLAT),
        TypeError,
        "fastvae.ELBO: `x` must be dense, got a nested tensor",
    ),
    "jagged counts of genes": Wrong(
        lambda: fv.negative_binomial_nll(FLAT, nested(torch.jagged), FLAT[0]),
        TypeError,
        "fastvae.negative_binomial_nll: `target` must be dense or torch.sparse_csr, got a nested tensor",
    ),
    # Devices
    "target elsewhere": Wrong(
        lambda: fv.bernoulli_nll(FLAT, META),
        ValueError,
        "fastvae.bernoulli_nll: `target` must be on the device of `logits`, cpu, got meta; "
        "did you mean target.to(logits.device)?",
    ),
    "logvar elsewhere": Wrong(
        lambda: fv.gaussian_kl(FLAT, META),
        ValueError,
        "fastvae.gaussian_kl: `logvar` must be on the device of `mu`, cpu, got meta",
    ),
    "kl elsewhere": Wrong(
        lambda: elbo(FLAT, FLAT, kl=ROWS.to("meta")),
        ValueError,
        "fastvae.ELBO: `kl` must be on the device of `recon`, cpu, got meta; did you mean kl.to(recon.device)?",
    ),
    "seed elsewhere": Wrong(
        lambda: fv.reparameterize_kl(FLAT, FLAT, seed=SEED.to("meta")),
        ValueError,
        "fastvae.reparameterize_kl: `seed` must be on the device of `mu`, cpu, got meta",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_input_raises_the_same_message_on_every_backend(backend: str, name: str) -> None:
    check_raises(backend, WRONG[name])
