"""Warnings of values that a likelihood cannot mean, in every form of call, once, and only where they are wrong."""

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import fastvae
from fastvae import functional, likelihoods
from fastvae.functional import ranges

pytestmark = pytest.mark.usefixtures("range_warnings")

B, D = 4, 32
LOGITS, UNIT = torch.linspace(-3, 3, B * D).view(B, D), torch.rand(B, D)
COUNTS = torch.randint(0, 5, (B, D)).float()
NEGATIVE = COUNTS - 1
POSITIVE = UNIT + 0.5
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # torch's, that sparse tensors are in beta
    CSR = NEGATIVE.to_sparse_csr()
THETA, LIBRARY = torch.full((D,), 2.0), torch.full((B,), 100.0)
LEVELS = torch.full((B, 3, 8), 9, dtype=torch.uint8)
PLANES = torch.randn(B, 20, 8)
MIXTURE = functional.discretized_logistic_mixture_nll

WRONG: dict[str, tuple[Callable[[], Any], str]] = {
    "Bernoulli, data": (lambda: functional.bernoulli_nll(LOGITS, LOGITS), "bernoulli_nll: `target` leaves"),
    "Bernoulli, probabilities": (
        lambda: functional.bernoulli_nll(UNIT, UNIT),
        "every value of `logits` lies in",
    ),
    "Bernoulli, bytes of bits": (
        lambda: functional.bernoulli_nll(LOGITS, (UNIT > 0.5).byte()),
        "no value above 1, .* pass target.bool",
    ),
    "continuous Bernoulli, data": (
        lambda: functional.continuous_bernoulli_nll(LOGITS, LOGITS),
        "continuous_bernoulli_nll: `target` leaves",
    ),
    "continuous Bernoulli, probabilities": (
        lambda: functional.continuous_bernoulli_nll(UNIT, UNIT),
        "every value of `logits` lies in",
    ),
    "Poisson": (
        lambda: functional.poisson_nll(LOGITS, NEGATIVE),
        r"values below 0 \(it spans -1 to 3\), and counts",
    ),
    "negative binomial": (
        lambda: functional.negative_binomial_nll(POSITIVE, NEGATIVE, THETA),
        "values below 0",
    ),
    "negative binomial, CSR": (
        lambda: functional.negative_binomial_logits_nll(LOGITS, CSR, THETA, LIBRARY),
        "values below 0",
    ),
    "gamma": (lambda: functional.gamma_nll(LOGITS, LOGITS, shape=2.0), "values that are not positive"),
    "mixture of levels": (
        lambda: MIXTURE(PLANES, LEVELS, components=2, bits=3),
        "levels above 7, the highest of 3 bits",
    ),
    "module": (lambda: likelihoods.Poisson().nll(LOGITS, NEGATIVE), "values below 0"),
    "module of probabilities": (
        lambda: likelihoods.Bernoulli(from_probs=True).nll(LOGITS, UNIT),
        "looks like logits",
    ),
    "part of a product": (
        lambda: likelihoods.Product({"a": "gaussian", "b": "poisson"}).nll(
            {"a": LOGITS, "b": LOGITS}, {"a": LOGITS, "b": NEGATIVE}
        ),
        "values below 0",
    ),
    "ELBO": (
        lambda: fastvae.ELBO(likelihoods.Gamma(2.0))(LOGITS, LOGITS, kl=torch.zeros(B)),
        "ELBO: `x` has values that are not positive",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_values_out_of_range_are_warned_of_once(name: str) -> None:
    call, message = WRONG[name]
    with pytest.warns(UserWarning, match=message) as caught:
        any(call() is None for _ in range(3))
    assert len(caught) == 1
    assert caught[0].filename == __file__


@pytest.mark.parametrize("name", WRONG)
def test_set_range_warnings_turns_the_look_off(name: str) -> None:
    fastvae.set_range_warnings(False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        WRONG[name][0]()


FINE: dict[str, Callable[[], Any]] = {
    "1.0000001": lambda: functional.bernoulli_nll(LOGITS, UNIT.clamp(1e-3, 1) * 0 + 1.0000001),
    "-1e-7": lambda: functional.continuous_bernoulli_nll(LOGITS, UNIT * 0 - 1e-7),
    "real data": lambda: functional.gaussian_nll(LOGITS, LOGITS),
    "counts": lambda: functional.poisson_nll(LOGITS, COUNTS),
    "fractions of counts": lambda: functional.negative_binomial_nll(POSITIVE, COUNTS / 2, THETA),
    "levels": lambda: MIXTURE(PLANES, LEVELS.clamp(max=7), components=2, bits=3),
    "probabilities": lambda: likelihoods.Bernoulli(from_probs=True).nll(UNIT, UNIT),
    "nothing": lambda: functional.bernoulli_nll(LOGITS[:0], LOGITS[:0]),
}


@pytest.mark.parametrize("name", FINE)
def test_values_in_range_are_silent(name: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        FINE[name]()


def test_only_the_first_call_with_values_is_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    looks = []
    found = ranges._bounds
    monkeypatch.setattr(ranges, "_bounds", lambda values: looks.append(values) or found(values))
    functional.poisson_nll(LOGITS[:0], COUNTS[:0])
    functional.poisson_nll(LOGITS.to("meta"), COUNTS.to("meta"))
    with pytest.raises(ValueError, match="must have the shape"):
        functional.poisson_nll(LOGITS, COUNTS[:1])
    assert not looks
    for _ in range(2):
        functional.poisson_nll(LOGITS, COUNTS)
    assert len(looks) == 1


def test_compiled_code_is_one_graph_and_does_not_look() -> None:
    def loss(a: Tensor, x: Tensor) -> Tensor:
        return functional.poisson_nll(a, x).sum()

    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        torch.compile(loss, fullgraph=True, backend="eager")(LOGITS, NEGATIVE)
