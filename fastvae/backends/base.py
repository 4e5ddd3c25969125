"""What every backend is: four functions of fixed positional signatures."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

NAMES = ("auto", "reference", "native", "triton")
OPS = ("reparameterize_kl", "gaussian_kl", "nll", "nll_elements")

# op -> the (backend, type of device) that have no kernel for it. "auto" takes the next backend that has.
OPS_LACKING: dict[str, tuple[tuple[str, str], ...]] = {"nll_elements": (("native", "cuda"),)}

# Tensors of every other device type go to the reference, whatever the setting.
DEVICES = {"cpu": "CPU", "cuda": "CUDA"}


class Backend(NamedTuple):
    """The functions of one backend, called with positional arguments:

    reparameterize_kl(mu, logvar, prior_mu, prior_logvar, samples, seed, row_offset, eps, generator) -> (z, kl)
    gaussian_kl(mu, logvar, prior_mu, prior_logvar, per_element) -> kl
    nll(likelihood, params, target, constants, kl, beta, reduction) -> (loss, nll)
    nll_elements(likelihood, params, target, constants, weight) -> values
    """

    name: str
    reparameterize_kl: Callable[..., Any]
    gaussian_kl: Callable[..., Any]
    nll: Callable[..., Any]
    nll_elements: Callable[..., Any]


class Missing(Exception):
    """Why a backend cannot be loaded: one sentence, with the command that mends it."""


def from_ops(name: str, namespace: str) -> Backend:
    ops = getattr(torch.ops, namespace)
    # The overload itself: one step less per call than asking the overload packet to pick it.
    return Backend(name, *(getattr(ops, op).default for op in OPS))
