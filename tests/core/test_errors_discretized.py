"""The messages for wrong inputs of discretised likelihoods, mixtures and products."""

import pytest
import torch
from wrong_inputs import (
    BOTH,
    FLAT,
    HEAD,
    IMAGE,
    LEVELS,
    MIXED,
    ROWS,
    Wrong,
    check_raises,
    elbo,
)

import fastvae.functional as fv
from fastvae.likelihoods import (
    Bernoulli,
    DiscretizedLogistic,
    DiscretizedLogisticMixture,
    Product,
)

WRONG = {
    # Levels and mixtures
    "float data as levels": Wrong(
        lambda: fv.discretized_logistic_nll(HEAD, IMAGE),
        TypeError,
        "fastvae.discretized_logistic_nll: `target` must be uint8 levels, got float32; "
        "for data in [0, 1], pass (target * 255).round().to(torch.uint8); "
        "for data in [-1, 1], pass ((target + 1) * 127.5).round().to(torch.uint8)",
    ),
    "float x as levels": Wrong(
        lambda: elbo(MIXED, IMAGE, kl=ROWS, likelihood=DiscretizedLogisticMixture(5)),
        TypeError,
        "fastvae.ELBO: `x` must be uint8 levels, got float32; "
        "for data in [0, 1], pass (x * 255).round().to(torch.uint8); "
        "for data in [-1, 1], pass ((x + 1) * 127.5).round().to(torch.uint8)",
    ),
    "float data as levels of 5 bits": Wrong(
        lambda: DiscretizedLogisticMixture(5, bits=5).nll(MIXED, IMAGE),
        TypeError,
        "fastvae.discretized_logistic_mixture_nll: `target` must be uint8 levels, got "
        "float32; for data in [0, 1], pass (target * 31).round().to(torch.uint8); "
        "for data in [-1, 1], pass ((target + 1) * 15.5).round().to(torch.uint8)",
    ),
    "int64 levels": Wrong(
        lambda: fv.discretized_logistic_nll(HEAD, LEVELS.long()),
        TypeError,
        "fastvae.discretized_logistic_nll: `target` must be uint8 levels, got int64; "
        "did you mean target.to(torch.uint8)?",
    ),
    "bool levels": Wrong(
        lambda: elbo(HEAD, LEVELS.bool(), kl=ROWS, likelihood=DiscretizedLogistic(1)),
        TypeError,
        "fastvae.ELBO: `x` must be uint8 levels, got bool; did you mean x.to(torch.uint8)?",
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
        "fastvae.likelihoods.Product: every part must have the same number of rows, got "
        "(4,) of 'image' and (2,) of 'label'",
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
        "fastvae.likelihoods.Product: the keys of `parts` must not be empty or contain dots, got ''",
    ),
    "a part's name with a dot": Wrong(
        lambda: Product({"a.b": "bernoulli"}),
        ValueError,
        "fastvae.likelihoods.Product: the keys of `parts` must not be empty or contain dots, got 'a.b'",
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
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_input_raises_the_same_message_on_every_backend(backend: str, name: str) -> None:
    check_raises(backend, WRONG[name])
