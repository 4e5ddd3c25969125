"""The call that every likelihood ends in: its checks, and the backend that serves it."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .._spec import VARIANTS
from ..backends import choose
from ..reference import REDUCTIONS
from . import ranges
from .checks import check_elements, check_kl, checked_int, is_dense, layout_message

# By family, what checks a call of a likelihood that is not elementwise, with the arguments and the result of
# `check_elements`. The files of the families add theirs.
CHECKS: dict[str, Callable[..., Sequence[Tensor]]] = {}


def nll(
    likelihood: str,
    params: Sequence[Tensor],
    target: Tensor,
    constants: Sequence[float] = (),
    kl: Tensor | None = None,
    beta: Tensor | None = None,
    reduction: int = REDUCTIONS["none"],
    *,
    caller: str | None = None,
    given: Tensor | None = None,
    draws: int | None = None,
) -> tuple[Tensor, Tensor]:
    """(loss, nll): nll (B,) of a likelihood's row, loss = reduce(nll + beta kl); one call of the backend for all of it.

    `reduction` is a value of `REDUCTIONS`. With a `caller` ("ELBO"), messages name it and its arguments, `recon` and
    `x`, in place of the likelihood's function and its. `given`: the probabilities that logits were made from.
    With `draws`, see `_nll_of_draws`; there is neither KL nor reduction then.
    """
    if draws is not None:
        rows = _nll_of_draws(likelihood, params, target, constants, draws)
        return rows, rows
    variant = VARIANTS[likelihood]
    if caller is None and not torch.compiler.is_compiling() and likelihood in ranges.unseen:
        return _first_nll(likelihood, params, target, constants, kl, beta, reduction, given)
    if choose.fast_path is not None and not torch.compiler.is_compiling():
        result = choose.fast_path.nll(likelihood, params, target, constants, kl, beta, reduction)
        if result is not None:
            return result
    if caller is None:
        where, names, name = variant.function, variant.tensors, "target"
    else:
        where, names, name = caller, ("recon", *variant.tensors[1:]), "x"
    check = check_elements if variant.element else CHECKS[variant.family]
    params = check(where, names, variant, params, target, name, constants)
    first = params[0]
    if kl is not None:
        check_kl(where, kl, names[0], first)
        # A KL of the user's own may be half; sums are never kept in half.
        if kl.dtype not in (torch.float32, torch.float64):
            kl = kl.float()
        # As torch does with 0-dim operands: a beta left on the CPU, or cast along with a model, still serves.
        if beta is not None and (beta.device != first.device or beta.dtype != torch.float32):
            # To a GPU nobody waits for so few bytes, which the driver has taken when the call returns.
            beta = beta.to(first.device, torch.float32, non_blocking=beta.is_cpu)
    chosen = choose.for_tensor(first, likelihood)
    if target.layout == torch.sparse_csr and chosen.name != "reference":
        # Ops take no sparse tensors: its positions travel behind the parameters.
        positions = (target.crow_indices().long(), target.col_indices().long())
        params, target = (*params, *positions), target.values()
    return chosen.nll(likelihood, params, target, constants, kl, beta, reduction)


def _nll_of_draws(
    likelihood: str,
    params: Sequence[Tensor],
    target: Tensor,
    constants: Sequence[float],
    draws: int,
) -> Tensor:
    """nll (K, B) of K = `draws` draws of the parameters, (K, B, ...), against one target, (B, ...), read in place."""
    variant = VARIANTS[likelihood]
    where, names = variant.function, variant.tensors
    checked_int(where, "draws", draws, 1, None)
    flat, of_one = list(params), list(params)
    for i, (name, value) in enumerate(zip(names, params, strict=True)):
        # A learned scale has no dimension, and a dispersion of every feature one: they serve all rows of all draws.
        if i > 0 and isinstance(value, Tensor) and value.dim() < 2:
            continue
        if not isinstance(value, Tensor) or not is_dense(value) or value.dim() < 2 or value.shape[0] != draws:
            found = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(
                f"fastvae.{where}: `{name}` must have shape (K, B, ...) with K = `draws` = {draws}, got {found}"
            )
        flat[i], of_one[i] = value.flatten(0, 1), value[0]
    check = check_elements if variant.element else CHECKS[variant.family]
    of_one = list(check(where, names, variant, of_one, target, "target", constants))
    for i, value in enumerate(of_one):  # a library of (B, 1) is checked, and has become (B,)
        if flat[i].dim() != value.dim():
            flat[i] = flat[i].flatten()
    chosen = choose.for_tensor(flat[0], likelihood)
    if target.layout == torch.sparse_csr and chosen.name != "reference":
        positions = (target.crow_indices().long(), target.col_indices().long())
        flat, target = [*flat, *positions], target.values()
    rows = chosen.nll(likelihood, flat, target, constants, None, None, REDUCTIONS["none"])[1]
    return rows.unflatten(0, (draws, -1))


def _first_nll(
    likelihood: str, params: Sequence[Tensor], target: Tensor, *rest: Any
) -> tuple[Tensor, Tensor]:
    """`nll`, and a look at the values; where there were none to look at, the next call is the first."""
    variant = VARIANTS[likelihood]
    *others, given = rest
    ranges.unseen.discard(likelihood)
    looked = False
    try:
        result = nll(likelihood, params, target, *others)
        names = variant.tensors[0], "target"
        looked = ranges.look(variant.function, names, likelihood, params, target, others[0], given)
    finally:
        if not looked:
            ranges.unseen.add(likelihood)
    return result


def nll_elements(
    likelihood: str,
    params: Sequence[Tensor],
    target: Tensor,
    constants: Sequence[float] = (),
    weight: float = 1.0,
) -> Tensor:
    """The nll of each element, of a likelihood's row that has `elements`: the target's shape.

    It is multiplied by `weight`, as are its gradients, at no cost: -1 makes log-probabilities.
    """
    variant = VARIANTS[likelihood]
    if isinstance(target, Tensor) and not is_dense(target):
        message = layout_message(variant.function, "target", target)
        raise TypeError(f"{message} (sparse targets go with reduction='event')")
    check = check_elements if variant.element else CHECKS[variant.family]
    params = check(variant.function, variant.tensors, variant, params, target, "target", constants)
    chosen = choose.for_tensor(params[0], likelihood, "nll_elements")
    return chosen.nll_elements(likelihood, params, target, constants, weight)
