"""A look at the values of a first call: warnings where they cannot be what the likelihood means.

It takes a pass over the first call of each likelihood in `functional`, and over the first batch of each ELBO. Each kind
of mistake is warned of once in a process. `set_range_warnings(False)` turns the look off.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from .._spec import VARIANTS
from .._warn import warn

# The variants of `functional` whose first call is still to come.
unseen: set[str] = set(VARIANTS)
# The kinds of warning that were given.
_warned: set[tuple[str, str]] = set()
_enabled = True

# Rounding takes data this far out of its range, and no mistake so little.
_SLACK = 1e-4
# So few values may lie in [0, 1] by chance.
_FEW = 64


def set_range_warnings(enabled: bool) -> None:
    """Turn on or off, for this process, the look at the values of first calls.

    It is on at first: fastvae takes a pass over the first batch of each `ELBO`, and over the first call of each
    likelihood in `fastvae.functional`, and warns of values that the likelihood cannot mean: data outside [0, 1] for a
    Bernoulli, negative counts, levels that the number of bits does not have, probabilities where logits are expected.
    On a GPU that call waits for the kernel. Turning it on again makes first calls of the next ones.
    """
    global _enabled
    _enabled = bool(enabled)
    unseen.clear()
    if _enabled:
        unseen.update(VARIANTS)


def look(
    caller: str,
    names: Sequence[str],
    likelihood: str,
    params: Sequence[Tensor],
    target: Tensor,
    constants: Sequence[float],
    given: Tensor | None = None,
) -> bool:
    """Warn of probabilities in place of logits (or the reverse) and of data that the likelihood cannot mean.

    `names` are those of the first parameter and of the data, as the user knows them. `given`: the probabilities from
    which a Bernoulli's logits were made. Returns whether there were values to look at.
    """
    if not _enabled:
        return True
    values = target.values() if target.layout == torch.sparse_csr else target
    # No values to look at: fake and meta tensors, traces, transforms, a CUDA graph being captured, nothing at all.
    if not has_values(params[0]) or not has_values(values) or values.numel() == 0:
        return False
    if values.is_cuda and torch.cuda.is_current_stream_capturing():
        return False
    variant = VARIANTS[likelihood]
    density, where, (first, data) = variant.density, f"fastvae.{caller}", names
    if density in ("bernoulli", "continuous_bernoulli"):
        _look_at_logits(where, first, density, params[0], given)
    low, high = _bounds(values)
    spans = f"(it spans {low:.4g} to {high:.4g})"
    if density in ("bernoulli", "continuous_bernoulli"):
        if values.is_floating_point() and (low < -_SLACK or high > 1 + _SLACK):
            _warn(
                density,
                "target",
                f"{where}: `{data}` leaves [0, 1] {spans}, where the Bernoulli likelihood means nothing; rescale the "
                "data, or use fastvae.ELBO('gaussian')",
            )
        elif values.dtype == torch.uint8 and high == 1:
            _warn(
                density,
                "binary",
                f"{where}: `{data}` is uint8 with no value above 1, and uint8 is read as x / 255; for binary data pass "
                f"{data}.bool()",
            )
    elif variant.counts and low < 0:
        _warn(density, "target", f"{where}: `{data}` has values below 0 {spans}, and counts have none")
    elif density == "gamma" and low <= 0:
        _warn(
            density, "target", f"{where}: `{data}` has values that are not positive {spans}, as a gamma's are"
        )
    elif variant.family == "discretized":
        at = [constant.name for constant in variant.constants].index("bits")
        highest = 2 ** int(constants[at]) - 1
        if high > highest:
            _warn(
                density,
                "target",
                f"{where}: `{data}` has levels above {highest}, the highest of {int(constants[at])} bits "
                f"{spans}, which count as that one; shift the data right, or give more `bits`",
            )
    return True


def _look_at_logits(where: str, name: str, density: str, logits: Tensor, given: Tensor | None) -> None:
    low, high = _bounds(logits if given is None else given)
    # A decoder that starts at zero gives exact zeros, and they are logits.
    if given is None and low >= 0 and 0 < high <= 1 and logits.numel() >= _FEW:
        cure = "drop the decoder's sigmoid"
        if density == "bernoulli":
            cure += ", or use fastvae.ELBO(fastvae.likelihoods.Bernoulli(from_probs=True))"
        _warn(
            density,
            "probabilities",
            f"{where}: every value of `{name}` lies in [0, 1], which looks like probabilities where logits are meant; "
            f"{cure}",
        )
    if given is not None and (low < -_SLACK or high > 1 + _SLACK):
        _warn(
            density,
            "logits",
            f"{where}: `{name}` leaves [0, 1], which looks like logits where Bernoulli(from_probs=True) means "
            "probabilities; use fastvae.ELBO('bernoulli')",
        )


def _bounds(values: Tensor) -> tuple[float, float]:
    values = values.detach()
    if values.dtype in (torch.bool, torch.uint16):  # which torch cannot compare on every device
        values = values.int()
    low, high = (bound.item() for bound in torch.aminmax(values))
    return low, high


def has_values(t: Tensor) -> bool:
    """Not of fake and meta tensors, and of those that stand for others in traces and transforms."""
    if torch._C._len_torch_dispatch_stack() > 0 or t.is_meta:
        return False
    return type(t) in _PLAIN and not torch._C._functorch.is_functorch_wrapped_tensor(t)


_PLAIN = (Tensor, torch.nn.Parameter)


def _warn(density: str, kind: str, message: str) -> None:
    if (density, kind) not in _warned:
        _warned.add((density, kind))
        warn(message, UserWarning)
