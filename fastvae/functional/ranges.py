"""Warnings about values that a likelihood cannot have, on its first call.

The check takes a pass over the arguments of the first call of each likelihood in `functional`, and over the first batch
of each ELBO. Each kind of mistake is reported once per process. `set_range_warnings(False)` turns the check off.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .._spec import VARIANTS
from .._warn import warn

# The variants whose first call through `functional` has not been checked yet.
unchecked: set[str] = set(VARIANTS)
# The (density, kind of mistake) pairs that have been reported.
_warned: set[tuple[str, str]] = set()
_enabled = True

# Rounding may take data this far out of their range; real mistakes go further.
TOLERANCE = 1e-4
# Fewer values than this may all lie in [0, 1] by chance.
_MIN_VALUES = 64


def set_range_warnings(enabled: bool) -> None:
    """Turn the check of values in first calls on or off, for this process.

    It is on by default: fastvae takes a pass over the first batch of each `ELBO`, and over the first call of each
    likelihood in `fastvae.functional`, and warns of values that the likelihood cannot have: data outside [0, 1] for a
    Bernoulli, negative counts, levels beyond the number of bits, probabilities where logits are expected. On a GPU,
    that call waits for the kernel. After the check is turned on again, the next call of each likelihood counts as its
    first.
    """
    global _enabled
    _enabled = bool(enabled)
    unchecked.clear()
    if _enabled:
        unchecked.update(VARIANTS)


def warn_of_impossible_values(
    caller: str,
    names: Sequence[str],
    likelihood: str,
    params: Sequence[Tensor],
    target: Tensor,
    constants: Sequence[float],
    probs: Tensor | None = None,
    weight: Tensor | None = None,
) -> bool:
    """Warn of probabilities in place of logits (or the reverse), and of data that the likelihood cannot have.

    `names` are the user's names of the first parameter and of the data. `probs` holds the probabilities from which the
    logits of a Bernoulli were computed. Data of weight 0 may be anything. Returns whether the values could be read.
    """
    if not _enabled:
        return True
    values = target.values() if target.layout == torch.sparse_csr else target
    # Fake and meta tensors, traces, transforms, CUDA graphs under capture and empty tensors have no values to read.
    if not has_values(params[0]) or not has_values(values) or values.numel() == 0:
        return False
    if values.is_cuda and torch.cuda.is_current_stream_capturing():
        return False
    variant = VARIANTS[likelihood]
    density, where, (first, data) = variant.density, f"fastvae.{caller}", names
    if weight is not None:
        _warn_of_wrong_weight(where, density, weight)
        if values is target and weight.dim() == target.dim():
            values = values[(weight != 0).expand_as(values)]
            if values.numel() == 0:
                return False
    if density in ("bernoulli", "continuous_bernoulli"):
        _warn_of_wrong_logits(where, first, density, params[0], probs)
    low, high = _bounds(values)
    extent = f"(from {low:.4g} to {high:.4g})"
    if density in ("bernoulli", "continuous_bernoulli"):
        if values.is_floating_point() and (low < -TOLERANCE or high > 1 + TOLERANCE):
            _warn(
                density,
                "target",
                f"{where}: `{data}` has values outside [0, 1] {extent}, for which the Bernoulli likelihood is not "
                "defined; rescale the data, or use fastvae.ELBO('gaussian')",
            )
        elif values.dtype == torch.uint8 and high == 1:
            _warn(
                density,
                "binary",
                f"{where}: `{data}` is uint8 with no value above 1, and uint8 is read as x / 255; for binary data, "
                f"pass {data}.bool()",
            )
    elif variant.counts and low < 0:
        _warn(
            density, "target", f"{where}: `{data}` must not be negative, but it has values below 0 {extent}"
        )
    elif density == "gamma" and low <= 0:
        _warn(
            density,
            "target",
            f"{where}: `{data}` must be positive for a gamma likelihood, but it has values of 0 or less {extent}",
        )
    elif variant.family == "discretized":
        position = [constant.name for constant in variant.constants].index("bits")
        bits = int(constants[position])
        highest = 2**bits - 1
        if high > highest:
            _warn(
                density,
                "target",
                f"{where}: `{data}` has levels above {highest}, the highest one of {bits} bits {extent}, and they "
                "count as the highest; shift the data right, or increase `bits`",
            )
    return True


def warn_of_non_finite_weights(nll: Tensor, kl: Tensor, beta: Tensor, bound: Tensor) -> None:
    """Warn of an importance weight that is NaN or infinite, by its draw and row.

    Its logarithm is -(nll + beta kl), for nll and kl (K, B), and `bound` is that of each row, (B,). Only the CPU's are
    read, where nothing has to wait.
    """
    if not _enabled or bound.device.type != "cpu" or not has_values(bound) or bool(bound.isfinite().all()):
        return
    log_weights = -nll - beta.to(kl.device) * kl  # as in IWAE, where beta may have stayed on another device
    wrong = (log_weights.isnan() | (log_weights == math.inf)).t().nonzero()  # a weight of 0 is possible
    if len(wrong):
        row, draw = wrong[0].tolist()
        _warn(
            "iwae",
            "weight",
            f"fastvae.IWAE: the log-weight of draw {draw} of row {row} is {log_weights[draw, row].item()}, so this row "
            f"has no bound; look for NaN and infinite values in row {row} of the data, of the posterior and of the "
            "decoder's output",
        )


def _warn_of_wrong_weight(where: str, density: str, weight: Tensor) -> None:
    low, high = _bounds(weight)
    if not low >= 0 or not high < math.inf:  # a NaN fails both
        _warn(
            density,
            "weight",
            f"{where}: `weight` must hold finite numbers that are at least 0, but its values are from {low:.4g} to "
            f"{high:.4g}",
        )


def _warn_of_wrong_logits(where: str, name: str, density: str, logits: Tensor, probs: Tensor | None) -> None:
    low, high = _bounds(logits if probs is None else probs)
    # A decoder that starts at zero returns exact zeros, which are valid logits.
    if probs is None and low >= 0 and 0 < high <= 1 and logits.numel() >= _MIN_VALUES:
        advice = "remove the decoder's sigmoid"
        if density == "bernoulli":
            advice += ", or use fastvae.ELBO(fastvae.likelihoods.Bernoulli(from_probs=True))"
        _warn(
            density,
            "probabilities",
            f"{where}: all values of `{name}` lie in [0, 1], so they look like probabilities, but logits are "
            f"expected; {advice}",
        )
    if probs is not None and (low < -TOLERANCE or high > 1 + TOLERANCE):
        _warn(
            density,
            "logits",
            f"{where}: `{name}` has values outside [0, 1], so they look like logits, but Bernoulli(from_probs=True) "
            "expects probabilities; use fastvae.ELBO('bernoulli')",
        )


def _bounds(values: Tensor) -> tuple[float, float]:
    values = values.detach()
    if values.dtype in (torch.bool, torch.uint16):  # torch cannot compare these on every device
        values = values.int()
    low, high = (bound.item() for bound in torch.aminmax(values))
    return low, high


def has_values(t: Tensor) -> bool:
    """Whether the values of a tensor can be read, unlike those of fake and meta tensors, traces and transforms."""
    if torch._C._len_torch_dispatch_stack() > 0 or t.is_meta:
        return False
    return type(t) in _PLAIN and not torch._C._functorch.is_functorch_wrapped_tensor(t)


_PLAIN = (Tensor, torch.nn.Parameter)


def _warn(density: str, kind: str, message: str) -> None:
    if (density, kind) not in _warned:
        _warned.add((density, kind))
        warn(message, UserWarning)
