"""Inputs for the tests of error messages, and the check of a message."""

import re
import warnings
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import nn

import fastvae
from fastvae.likelihoods import (
    DiscretizedLogisticMixture,
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
    warnings.simplefilter("ignore")  # torch warns that the layout is in beta
    CSR = FLAT.to_sparse_csr()


def elbo(*args: object, likelihood: str | nn.Module = "bernoulli", **kwargs: object) -> object:
    return fastvae.ELBO(likelihood)(*args, **kwargs)


def nested(layout: torch.layout) -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns that it is a prototype
        return torch.nested.nested_tensor([FLAT[0], FLAT[0, :5], FLAT[0], FLAT[0]], layout=layout)


class Wrong(NamedTuple):
    call: Callable[[], object]
    kind: type[Exception]
    message: str


class Unsummed(nn.Module):
    """A user's likelihood that does not sum over elements."""

    def nll(self, params: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return (params - target) ** 2


def check_raises(backend: str, wrong: Wrong) -> None:
    """Check that every backend raises the same error before any work: no random number is drawn, no setting changes."""
    call, kind, message = wrong
    state = torch.get_rng_state()
    with pytest.raises(kind, match=re.escape(message)) as caught:
        call()
    assert caught.type is kind  # not a subclass that torch raises further down
    assert torch.equal(torch.get_rng_state(), state)
    assert fastvae.backends.choose.setting == backend
