"""The interface of every backend: functions with fixed positional signatures."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

NAMES = ("auto", "reference", "native", "triton")
OPS = (
    "reparameterize_kl",
    "gaussian_kl",
    "sample_log_probs",
    "nll",
    "nll_elements",
    "gaussian_mixture_log_prob",
)

# op -> the (backend, device type) pairs that have no kernel for it. "auto" then uses the next backend that has one.
OPS_LACKING: dict[str, tuple[tuple[str, str], ...]] = {}

CPU_OPS = ("sparse_linear",)
"""Ops of the backend "native" for the CPU. Other devices and backends use torch's own code."""

# Tensors on any other device type are served by the reference, under every setting.
DEVICES = {"cpu": "CPU", "cuda": "CUDA"}


class Backend(NamedTuple):
    """The functions of one backend, called with positional arguments:

    reparameterize_kl(mu, logvar, prior_mu, prior_logvar, form, constants, balance, per_element,
                      samples, seed, row_offset, eps, generator) -> (z, kl)
    gaussian_kl(mu, logvar, prior_mu, prior_logvar, form, constants, balance, per_element) -> kl
    sample_log_probs(mu, logvar, prior_mu, prior_logvar, form, constants, stl,
                     samples, seed, row_offset, eps, generator) -> (z, log_q, log_p)
    nll(likelihood, params, target, constants, kl, beta, reduction) -> (loss, nll)
    nll_elements(likelihood, params, target, constants, weight) -> values
    gaussian_mixture_log_prob(z, mu, logvar, log_weight, joint, per_dimension) -> (joint, per_dimension), each of which
        is empty if it is not requested
    """

    name: str
    reparameterize_kl: Callable[..., Any]
    gaussian_kl: Callable[..., Any]
    sample_log_probs: Callable[..., Any]
    nll: Callable[..., Any]
    nll_elements: Callable[..., Any]
    gaussian_mixture_log_prob: Callable[..., Any]


class Missing(Exception):
    """A backend cannot be loaded. The message is one sentence with the reason and the command that fixes it."""


def from_ops(name: str, namespace: str) -> Backend:
    ops = getattr(torch.ops, namespace)
    # Calling the overload itself skips the choice that the overload packet makes in every call.
    return Backend(name, *(getattr(ops, op).default for op in OPS))
