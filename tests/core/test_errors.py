"""Wrong inputs: one row each, with the exact words. The message names the argument, what it must be and what came."""

import re
import warnings
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import nn

import fastvae
import fastvae.functional as fv
from fastvae.likelihoods import (
    Bernoulli,
    DiscretizedLogistic,
    DiscretizedLogisticMixture,
    Gaussian,
    Product,
)

FLAT = torch.zeros(4, 12)
IMAGE = torch.zeros(4, 3, 2, 2)
HEAD = torch.zeros(4, 6, 2, 2)
LEVELS = torch.zeros(4, 3, 2, 2, dtype=torch.uint8)
MIXED = torch.zeros(4, 50, 2, 2)
BOTH = Product({"image": DiscretizedLogisticMixture(5), "label": "bernoulli"})
ROWS = torch.zeros(4)
SEED = torch.tensor([1, 0])
META = torch.zeros(4, 12, device="meta")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # torch's, of a layout in beta state
    CSR = FLAT.to_sparse_csr()


def elbo(*args: object, likelihood: str | nn.Module = "bernoulli", **kwargs: object) -> object:
    return fastvae.ELBO(likelihood)(*args, **kwargs)


def nested(layout: torch.layout) -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's, of a prototype
        return torch.nested.nested_tensor([FLAT[0], FLAT[0, :5], FLAT[0], FLAT[0]], layout=layout)


class Wrong(NamedTuple):
    call: Callable[[], object]
    kind: type[Exception]
    message: str


class Unsummed(nn.Module):
    """A user's likelihood that forgot to sum."""

    def nll(self, params: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return (params - target) ** 2


WRONG = {
    # Levels and mixtures
    "float data as levels": Wrong(
        lambda: fv.discretized_logistic_nll(HEAD, IMAGE),
        TypeError,
        "fastvae.discretized_logistic_nll: `target` must be uint8, the levels of the data as they are, got float32; "
        "of data in [0, 1] these are (target * 255).round().to(torch.uint8), "
        "of data in [-1, 1] ((target + 1) * 127.5).round().to(torch.uint8)",
    ),
    "float x as levels": Wrong(
        lambda: elbo(MIXED, IMAGE, kl=ROWS, likelihood=DiscretizedLogisticMixture(5)),
        TypeError,
        "fastvae.ELBO: `x` must be uint8, the levels of the data as they are, got float32; "
        "of data in [0, 1] these are (x * 255).round().to(torch.uint8), "
        "of data in [-1, 1] ((x + 1) * 127.5).round().to(torch.uint8)",
    ),
    "float data as levels of 5 bits": Wrong(
        lambda: DiscretizedLogisticMixture(5, bits=5).nll(MIXED, IMAGE),
        TypeError,
        "fastvae.discretized_logistic_mixture_nll: `target` must be uint8, the levels of the data as they are, got "
        "float32; of data in [0, 1] these are (target * 31).round().to(torch.uint8), "
        "of data in [-1, 1] ((target + 1) * 15.5).round().to(torch.uint8)",
    ),
    "int64 levels": Wrong(
        lambda: fv.discretized_logistic_nll(HEAD, LEVELS.long()),
        TypeError,
        "fastvae.discretized_logistic_nll: `target` must be uint8, the levels of the data as they are, got int64; "
        "did you mean target.to(torch.uint8)?",
    ),
    "bool levels": Wrong(
        lambda: elbo(HEAD, LEVELS.bool(), kl=ROWS, likelihood=DiscretizedLogistic(1)),
        TypeError,
        "fastvae.ELBO: `x` must be uint8, the levels of the data as they are, got bool; "
        "did you mean x.to(torch.uint8)?",
    ),
    "integer params of a mixture": Wrong(
        lambda: fv.discretized_logistic_mixture_nll(LEVELS, LEVELS, components=5),
        TypeError,
        "fastvae.discretized_logistic_mixture_nll: `params` must be float32, bfloat16, float16 or float64, got uint8",
    ),
    "another decoder": Wrong(
        lambda: fv.discretized_logistic_mixture_nll(MIXED, LEVELS, components=10),
        ValueError,
        "fastvae.discretized_logistic_mixture_nll: `params` must have shape (4, 100, 2, 2), 10 components for "
        "`target` (4, 3, 2, 2), got (4, 50, 2, 2)",
    ),
    "half a decoder": Wrong(
        lambda: fv.discretized_logistic_nll(IMAGE, LEVELS),
        ValueError,
        "fastvae.discretized_logistic_nll: `params` must have shape (4, 6, 2, 2), mean and log-scale for `target` "
        "(4, 3, 2, 2), got (4, 3, 2, 2)",
    ),
    "two channels": Wrong(
        lambda: fv.discretized_logistic_mixture_nll(MIXED, LEVELS[:, :2], components=5),
        ValueError,
        "fastvae.discretized_logistic_mixture_nll: `target` must have shape (B, 3, ...) or (B, 1, ...), "
        "got (4, 2, 2, 2)",
    ),
    "two channels of a decoder": Wrong(
        lambda: DiscretizedLogisticMixture(5).channels(2),
        ValueError,
        "fastvae.likelihoods.DiscretizedLogisticMixture: data must have 1 or 3 channels, got 2",
    ),
    "mean of another decoder": Wrong(
        lambda: DiscretizedLogisticMixture(4).mean(MIXED),
        ValueError,
        "fastvae.likelihoods.DiscretizedLogisticMixture: `params` must have shape (B, 40, ...) or (B, 12, ...) "
        "for 4 components, got (4, 50, 2, 2)",
    ),
    "samples of one dimension of a mixture": Wrong(
        lambda: DiscretizedLogisticMixture(4).sample(FLAT[0]),
        ValueError,
        "fastvae.likelihoods.DiscretizedLogisticMixture: `params` must have shape (B, 40, ...) or (B, 12, ...) "
        "for 4 components, got (12,)",
    ),
    "mean of an odd number of planes": Wrong(
        lambda: DiscretizedLogistic().mean(torch.zeros(2, 5, 3)),
        ValueError,
        "fastvae.likelihoods.DiscretizedLogistic: `params` must have shape (B, 2C, ...), mean and log-scale packed "
        "along dimension 1, got (2, 5, 3)",
    ),
    "samples of one dimension": Wrong(
        lambda: DiscretizedLogistic().sample(torch.zeros(4)),
        ValueError,
        "fastvae.likelihoods.DiscretizedLogistic: `params` must have shape (B, 2C, ...), mean and log-scale packed "
        "along dimension 1, got (4,)",
    ),
    "mean of a list": Wrong(
        lambda: DiscretizedLogistic().mean([0.0, 1.0]),
        TypeError,
        "fastvae.likelihoods.DiscretizedLogistic: `params` must be a Tensor, got list",
    ),
    "mean of integers": Wrong(
        lambda: DiscretizedLogisticMixture(5).mean(MIXED.long()),
        TypeError,
        "fastvae.likelihoods.DiscretizedLogisticMixture: `params` must be float32, bfloat16, float16 or float64, "
        "got int64",
    ),
    "no components": Wrong(
        lambda: fv.discretized_logistic_mixture_nll(MIXED, LEVELS, components=0),
        ValueError,
        "fastvae.discretized_logistic_mixture_nll: `components` must be at least 1, got 0",
    ),
    "half a component": Wrong(
        lambda: DiscretizedLogisticMixture(2.5),
        TypeError,
        "fastvae.likelihoods.DiscretizedLogisticMixture: `components` must be an int, got 2.5",
    ),
    "nine bits": Wrong(
        lambda: DiscretizedLogistic(9),
        ValueError,
        "fastvae.likelihoods.DiscretizedLogistic: `bits` must be from 1 to 8, got 9",
    ),
    "floor": Wrong(
        lambda: DiscretizedLogistic(log_scale_floor=-float("inf")),
        ValueError,
        "fastvae.likelihoods.DiscretizedLogistic: `log_scale_floor` must be between -60 and 60, got -inf",
    ),
    "small mass": Wrong(
        lambda: fv.discretized_logistic_nll(HEAD, LEVELS, min_mass=1.0),
        ValueError,
        "fastvae.discretized_logistic_nll: `min_mass` must be at least 0 and below 1, got 1.0",
    ),
    "levels on another device": Wrong(
        lambda: fv.discretized_logistic_nll(HEAD, LEVELS.to("meta")),
        ValueError,
        "fastvae.discretized_logistic_nll: `target` must be on the device of `params`, cpu, got meta; "
        "did you mean target.to(params.device)?",
    ),
    # Products
    "a part is missing": Wrong(
        lambda: elbo({"image": MIXED}, {"image": LEVELS, "label": FLAT}, kl=ROWS, likelihood=BOTH),
        ValueError,
        "fastvae.likelihoods.Product: `params` must have the keys 'image', 'label', got ['image']: missing 'label'",
    ),
    "a part too many": Wrong(
        lambda: BOTH.nll({"image": MIXED, "label": FLAT}, {"image": LEVELS, "label": FLAT, "text": FLAT}),
        ValueError,
        "fastvae.likelihoods.Product: `target` must have the keys 'image', 'label', got "
        "['image', 'label', 'text']: unknown 'text'",
    ),
    "a part by another name": Wrong(
        lambda: BOTH.mean({"image": MIXED, "labels": FLAT}),
        ValueError,
        "got ['image', 'labels']: missing 'label'; unknown 'labels'",
    ),
    "no dict": Wrong(
        lambda: elbo(MIXED, LEVELS, kl=ROWS, likelihood=BOTH),
        TypeError,
        "fastvae.likelihoods.Product: `params` must be a dict with the keys 'image', 'label', got Tensor",
    ),
    "parts of different batches": Wrong(
        lambda: BOTH.nll({"image": MIXED, "label": FLAT[:2]}, {"image": LEVELS, "label": FLAT[:2]}),
        ValueError,
        "fastvae.likelihoods.Product: every part must have the same rows, got (4,) of 'image' and (2,) of 'label'",
    ),
    "no parts": Wrong(
        lambda: Product({}),
        ValueError,
        "fastvae.likelihoods.Product: `parts` must name at least one likelihood, got none",
    ),
    "parts without names": Wrong(
        lambda: Product([Bernoulli()]),
        TypeError,
        "fastvae.likelihoods.Product: `parts` must be a dict of likelihoods, got list",
    ),
    "a part that is a number": Wrong(
        lambda: Product({"a": 3}),
        TypeError,
        "fastvae.likelihoods.Product: `parts['a']` must be one of 'bernoulli', 'gaussian', ",
    ),
    "a part that nobody knows": Wrong(
        lambda: Product({"image": "bernoulli", "label": "softmax"}),
        ValueError,
        "fastvae.likelihoods.Product: `parts['label']` must be one of 'bernoulli', 'gaussian', ",
    ),
    "a part named by a number": Wrong(
        lambda: Product({3: "bernoulli"}),
        TypeError,
        "fastvae.likelihoods.Product: `parts` must have strings as keys, got 3",
    ),
    "a part without a name": Wrong(
        lambda: Product({"": "bernoulli"}),
        ValueError,
        "fastvae.likelihoods.Product: `parts` must have keys that are not empty and without dots, got ''",
    ),
    "a part's name with a dot": Wrong(
        lambda: Product({"a.b": "bernoulli"}),
        ValueError,
        "fastvae.likelihoods.Product: `parts` must have keys that are not empty and without dots, got 'a.b'",
    ),
    "a shape in a part": Wrong(
        lambda: elbo(
            {"image": MIXED, "label": FLAT}, {"image": LEVELS, "label": ROWS}, kl=ROWS, likelihood=BOTH
        ),
        ValueError,
        "fastvae.likelihoods.Product: in part 'label': fastvae.bernoulli_nll: `target` must have the shape of "
        "`logits` (4, 12), got (4,)",
    ),
    "a type in a part of a part": Wrong(
        lambda: Product({"all": BOTH}).nll(
            {"all": {"image": MIXED, "label": FLAT}}, {"all": {"image": LEVELS, "label": "cat"}}
        ),
        TypeError,
        "fastvae.likelihoods.Product: in part 'all': fastvae.likelihoods.Product: in part 'label': "
        "fastvae.bernoulli_nll: `target` must be a Tensor, got str",
    ),
    "a mean of a part": Wrong(
        lambda: BOTH.mean({"image": FLAT, "label": FLAT}),
        ValueError,
        "fastvae.likelihoods.Product: in part 'image': fastvae.likelihoods.DiscretizedLogisticMixture: `params` must",
    ),
    # Shapes
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
        "fastvae.gamma_nll: `target` requires a gradient, which this likelihood does not give; "
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
        "fastvae.poisson_nll: `target` requires a gradient, which this likelihood does not give; "
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
        "fastvae.negative_binomial_nll: `eps` must be 0 or more, and finite, got -1e-08",
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
        "(sparse targets go with reduction='event')",
    ),
    "elements of counts with a gradient": Wrong(
        lambda: fv.poisson_rate_nll(FLAT, FLAT.abs().requires_grad_(), reduction="none"),
        ValueError,
        "fastvae.poisson_rate_nll: `target` requires a gradient, which this likelihood does not give; "
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
        "fastvae.poisson_rate_nll: `rate` must hold finite numbers, 0 or more, got -1.0 at (0, 0)",
    ),
    "a mean below 0": Wrong(
        lambda: fv.negative_binomial_nll(FLAT - 1, FLAT, FLAT, eps=1e-8, validate=True),
        ValueError,
        "fastvae.negative_binomial_nll: `mean` must hold finite numbers, 0 or more, got -1.0 at (0, 0)",
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
        "fastvae.likelihoods.Laplace: `log_scale_bounds` must be finite, lo < hi, got (2.0, -6.0)",
    ),
    "bounds in the wrong order": Wrong(
        lambda: Gaussian("learned", logvar_bounds=(2, -6)),
        ValueError,
        "fastvae.likelihoods.Gaussian: `logvar_bounds` must be finite, lo < hi, got (2.0, -6.0)",
    ),
    "bounds at one point": Wrong(
        lambda: fv.gaussian_head_nll(HEAD, IMAGE, logvar_bounds=(1.0, 1.0)),
        ValueError,
        "fastvae.gaussian_head_nll: `logvar_bounds` must be finite, lo < hi, got (1.0, 1.0)",
    ),
    "an infinite bound": Wrong(
        lambda: Gaussian("per_element", logvar_bounds=(-6.0, float("inf"))),
        ValueError,
        "fastvae.likelihoods.Gaussian: `logvar_bounds` must be finite, lo < hi, got (-6.0, inf)",
    ),
    "a bound that is no number": Wrong(
        lambda: fv.gaussian_nll(FLAT, FLAT, FLAT, logvar_bounds=(float("nan"), 2.0)),
        ValueError,
        "fastvae.gaussian_nll: `logvar_bounds` must be finite, lo < hi, got (nan, 2.0)",
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
        "fastvae.gaussian_nll: `logvar_bounds` bound a `logvar`, which is missing, got (-6.0, 2.0)",
    ),
    "bounded learned logvar": Wrong(
        lambda: fv.gaussian_nll(FLAT, FLAT, ROWS, logvar_bounds=(-6.0, 2.0)),
        ValueError,
        "fastvae.gaussian_nll: `logvar` must be 0-dimensional or have the shape of `mean` (4, 12), got (4,)",
    ),
    "bounded integer logvar": Wrong(
        lambda: fv.gaussian_nll(FLAT, FLAT, torch.tensor(1), logvar_bounds=(-6.0, 2.0)),
        TypeError,
        "fastvae.gaussian_nll: `logvar` must be float32 as `mean`, got int64; did you mean logvar.to(mean.dtype)?",
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
        "fastvae.ELBO: the likelihood's `nll` must return one value per row, shape (B,), got (4, 12)",
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
        "fastvae.gaussian_kl: `logvar` must be float32 as `mu`, got float16; did you mean logvar.to(mu.dtype)?",
    ),
    "float32 logvar of a half mu": Wrong(
        lambda: elbo(FLAT, FLAT, FLAT.bfloat16(), FLAT),
        TypeError,
        "fastvae.gaussian_kl: `logvar` must be bfloat16 as `mu`, got float32; did you mean mu.float()?",
    ),
    "learned prior of a half posterior": Wrong(
        lambda: fv.reparameterize_kl(FLAT.half(), FLAT.half(), FLAT, FLAT),
        TypeError,
        "fastvae.reparameterize_kl: `prior_mu` must be float16 as `mu`, got float32; did you mean mu.float()?",
    ),
    "float32 logvar of a half mean": Wrong(
        lambda: fv.gaussian_nll(FLAT.half(), FLAT, FLAT),
        TypeError,
        "fastvae.gaussian_nll: `logvar` must be float16 as `mean`, got float32; did you mean mean.float()?",
    ),
    "float32 noise of a half posterior": Wrong(
        lambda: fv.reparameterize_kl(FLAT.half(), FLAT.half(), eps=FLAT),
        TypeError,
        "fastvae.reparameterize_kl: `eps` must be float16 as `mu`, got float32; did you mean eps.to(mu.dtype)?",
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
        "'poisson', 'categorical', or an nn.Module with a method `nll(params, target)`, got Bernoulli, a class",
    ),
    "likelihood without nll": Wrong(
        lambda: fastvae.ELBO(nn.Identity()), TypeError, "`nll(params, target)`, got Identity"
    ),
    "half a prior": Wrong(
        lambda: fv.gaussian_kl(FLAT, FLAT, FLAT),
        TypeError,
        "fastvae.gaussian_kl: `prior_mu` and `prior_logvar` go together, `prior_logvar` is missing",
    ),
    "the other half": Wrong(
        lambda: fv.reparameterize_kl(FLAT, FLAT, prior_logvar=FLAT),
        TypeError,
        "fastvae.reparameterize_kl: `prior_mu` and `prior_logvar` go together, `prior_mu` is missing",
    ),
    "neither kl nor posterior": Wrong(
        lambda: elbo(FLAT, FLAT),
        TypeError,
        "fastvae.ELBO: call elbo(recon, x, kl=kl) or elbo(recon, x, mu, logvar): `kl` or the posterior, got neither",
    ),
    "half a posterior": Wrong(
        lambda: elbo(FLAT, FLAT, FLAT), TypeError, "`kl` or the posterior, got only one of `mu` and `logvar`"
    ),
    "kl and posterior": Wrong(
        lambda: elbo(FLAT, FLAT, FLAT, FLAT, kl=ROWS), TypeError, "`kl` or the posterior, got both"
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
    # Values
    "unknown likelihood": Wrong(
        lambda: fastvae.ELBO("bernouilli"),
        ValueError,
        "fastvae.ELBO: `likelihood` must be one of 'bernoulli', 'gaussian', 'laplace', 'continuous_bernoulli', "
        "'poisson', 'categorical', got 'bernouilli'",
    ),
    "unknown reduction": Wrong(
        lambda: fastvae.ELBO("bernoulli", reduction="avg"),
        ValueError,
        "fastvae.ELBO: `reduction` must be one of 'none', 'sum', 'mean', 'batchmean', got 'avg'",
    ),
    "unknown kl reduction": Wrong(
        lambda: fv.gaussian_kl(FLAT, FLAT, reduction="mean"),
        ValueError,
        "fastvae.gaussian_kl: `reduction` must be one of 'event', 'none', got 'mean'",
    ),
    "unknown backend": Wrong(
        lambda: fastvae.set_backend("cuda"),
        ValueError,
        "fastvae.set_backend: `name` must be one of 'auto', 'reference', 'native', 'triton', got 'cuda'",
    ),
    "unknown scale": Wrong(
        lambda: Gaussian("learnt"),
        ValueError,
        "fastvae.likelihoods.Gaussian: `scale` must be a positive float, 'learned' or 'per_element', got 'learnt'",
    ),
    "negative scale": Wrong(
        lambda: fv.gaussian_nll(FLAT, FLAT, scale=-1.0),
        ValueError,
        "fastvae.gaussian_nll: `scale` must be positive and finite, got -1.0",
    ),
    "zero module scale": Wrong(
        lambda: Gaussian(0.0),
        ValueError,
        "fastvae.likelihoods.Gaussian: `scale` must be positive and finite, got 0.0",
    ),
    "nan scale": Wrong(
        lambda: Gaussian(float("nan")), ValueError, "`scale` must be positive and finite, got nan"
    ),
    "logvar and scale": Wrong(
        lambda: fv.gaussian_nll(FLAT, FLAT, FLAT, scale=2.0),
        ValueError,
        "fastvae.gaussian_nll: `logvar` and `scale` exclude each other, got `scale` 2.0",
    ),
    "negative beta": Wrong(
        lambda: fastvae.ELBO("bernoulli", beta=-1.0),
        ValueError,
        "fastvae.ELBO: `beta` must be finite and at least 0, got -1.0",
    ),
    "beta per row": Wrong(
        lambda: fastvae.ELBO("bernoulli", beta=ROWS),
        ValueError,
        "fastvae.ELBO: `beta` must be a float or a 0-dim tensor, got shape (4,)",
    ),
    "beta a string": Wrong(
        lambda: fastvae.ELBO("bernoulli", beta="high"),
        TypeError,
        "fastvae.ELBO: `beta` must be a float or a 0-dim tensor, got 'high'",
    ),
    "target with a gradient": Wrong(
        lambda: fv.bernoulli_nll(FLAT, FLAT.clone().requires_grad_()),
        ValueError,
        "fastvae.bernoulli_nll: `target` requires a gradient, which this likelihood does not give; "
        "pass target.detach(), or differentiate fastvae.reference.bernoulli_nll",
    ),
    "x with a gradient": Wrong(
        lambda: elbo(FLAT, FLAT.clone().requires_grad_(), kl=ROWS),
        ValueError,
        "fastvae.ELBO: `x` requires a gradient, which this likelihood does not give; pass x.detach()",
    ),
    "seed and generator": Wrong(
        lambda: fv.reparameterize_kl(FLAT, FLAT, seed=SEED, generator=torch.Generator()),
        ValueError,
        "fastvae.reparameterize_kl: `seed` and `generator` exclude each other, got both",
    ),
    "eps and seed": Wrong(
        lambda: fv.reparameterize_kl(FLAT, FLAT, eps=FLAT, seed=SEED),
        ValueError,
        "fastvae.reparameterize_kl: `eps` is the noise itself; it excludes `seed`",
    ),
    "eps and generator": Wrong(
        lambda: fv.reparameterize_kl(FLAT, FLAT, eps=FLAT, generator=torch.Generator()),
        ValueError,
        "fastvae.reparameterize_kl: `eps` is the noise itself; it excludes `generator`",
    ),
    "no samples": Wrong(
        lambda: fv.reparameterize_kl(FLAT, FLAT, samples=0),
        ValueError,
        "fastvae.reparameterize_kl: `samples` must be at least 1, got 0",
    ),
    "negative row_offset": Wrong(
        lambda: fv.reparameterize_kl(FLAT, FLAT, row_offset=-1),
        ValueError,
        "fastvae.reparameterize_kl: `row_offset` must be at least 0 and below 2^63, got -1",
    ),
    "row_offset that no int64 holds": Wrong(
        lambda: fv.reparameterize_kl(FLAT, FLAT, row_offset=2**70),
        ValueError,
        "fastvae.reparameterize_kl: `row_offset` must be at least 0 and below 2^63, got 1180591620717411303424",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_input(backend: str, name: str) -> None:
    """The same error on every backend, before any work: no random number is drawn, no setting moves."""
    call, kind, message = WRONG[name]
    state = torch.get_rng_state()
    with pytest.raises(kind, match=re.escape(message)) as caught:
        call()
    assert caught.type is kind  # not torch's own subclass, from further down
    assert torch.equal(torch.get_rng_state(), state)
    assert fastvae.backends.choose.setting == backend


@pytest.mark.parametrize("value", [-1.0, float("nan"), torch.ones(2)], ids=str)
def test_a_refused_beta_changes_nothing(value: object) -> None:
    elbo = fastvae.ELBO("bernoulli", beta=0.5)
    with pytest.raises(ValueError, match="`beta`"):
        elbo.beta = value
    assert elbo.beta.item() == 0.5


def test_a_target_with_a_gradient_is_fine_where_none_is_recorded(backend: str) -> None:
    x = torch.rand(4, 12, requires_grad=True)
    with torch.no_grad():
        assert fv.bernoulli_nll(FLAT, x).shape == (4,)


def test_the_ops_check_too() -> None:
    """Called past the Python checks, the native ops still refuse what would make them read out of bounds."""
    ops = torch.ops.fastvae
    for wrong in (
        lambda: ops.nll("bernoulli", [FLAT], FLAT[:2], [], None, None, 0),
        lambda: ops.nll("bernoulli", [FLAT, FLAT], FLAT, [], None, None, 0),
        lambda: ops.nll("gaussian", [FLAT], FLAT, [], None, None, 0),
        lambda: ops.nll("bernoulli", [FLAT], FLAT, [], ROWS[:2], None, 0),
        lambda: ops.nll("bernoulli", [FLAT], FLAT, [], None, None, 3),
        lambda: ops.nll("no such", [FLAT], FLAT, [], None, None, 0),
        lambda: ops.gaussian_kl(FLAT, FLAT[:2], None, None, False),
        lambda: ops.gaussian_kl(FLAT, FLAT, FLAT, None, False),
        lambda: ops.reparameterize_kl(FLAT, FLAT, None, None, 0, None, 0, None, None),
        lambda: ops.reparameterize_kl(FLAT, FLAT, None, None, None, SEED[:1], 0, None, None),
        lambda: ops.reparameterize_kl(FLAT, FLAT, None, None, None, None, 0, FLAT[:2], None),
    ):
        with pytest.raises(ValueError, match="fastvae"):
            wrong()


def test_a_generator_of_another_gpu() -> None:
    """Where there is none: what torch says of the two devices is played."""
    from types import SimpleNamespace

    from fastvae.functional.latents import _check_generator

    class Played(torch.Generator):
        device = torch.device("cuda:0")

    mu = SimpleNamespace(device=torch.device("cuda:1"))
    with pytest.raises(
        ValueError, match=r"must be on the device of `mu`, cuda:1, got cuda:0; .*Generator\(mu\.device\)"
    ):
        _check_generator("reparameterize_kl", Played(), mu)
    _check_generator("reparameterize_kl", Played(), SimpleNamespace(device=torch.device("cuda:0")))
    _check_generator("reparameterize_kl", torch.Generator(), SimpleNamespace(device=torch.device("cpu")))
