"""The call in which every likelihood ends: it checks the arguments and passes them to the backend."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .._spec import VARIANTS, Variant
from ..backends import choose
from ..reference import REDUCTIONS
from . import ranges
from .checks import (
    check_elements,
    check_kl,
    checked_int,
    checked_weight,
    is_dense,
    layout_message,
)
from .values import check_values, check_weight_values

# For each family, the function that checks the arguments of a likelihood that is not elementwise. It has the signature
# of `check_elements` and returns the same. The modules of the families register theirs here.
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
    probs: Tensor | None = None,
    draws: int | None = None,
    weight: Tensor | None = None,
    validate: bool = False,
) -> tuple[Tensor, Tensor]:
    """Compute (loss, nll) in one call of the backend: nll (B,) of a variant, and loss = reduce(nll + beta kl).

    `reduction` is a value of `REDUCTIONS`. If there is a `caller` ("ELBO"), messages name it and its arguments `recon`
    and `x` instead of the likelihood's function and arguments. `probs` holds the probabilities from which logits were
    computed. With `draws`, see `_nll_of_draws`, there is neither KL nor reduction. `weight` multiplies the nll of each
    element; see `_checked_weight` for its shapes. `validate` checks every value first; see `values`.
    """
    if draws is not None:
        rows = _nll_of_draws(likelihood, params, target, constants, draws, weight, caller, validate)
        return rows, rows
    variant = VARIANTS[likelihood]
    if validate:
        _validate(variant, params, target, constants, caller, weight)
    if caller is None and not torch.compiler.is_compiling() and likelihood in ranges.unchecked:
        return _first_nll(likelihood, params, target, constants, kl, beta, reduction, probs, weight)
    if choose.fast_path is not None and not torch.compiler.is_compiling():
        result = choose.fast_path.nll(likelihood, params, target, constants, kl, beta, reduction, weight)
        if result is not None:
            return result
    where, names, name = _names(variant, caller)
    check = check_elements if variant.element else CHECKS[variant.family]
    params = check(where, names, variant, params, target, name, constants)
    first = params[0]
    weight = _checked_weight(where, variant, weight, name, target)
    if kl is not None:
        check_kl(where, kl, names[0], first)
        # A KL that the user computed may be half precision; sums are never accumulated in half.
        if kl.dtype not in (torch.float32, torch.float64):
            kl = kl.float()
        # As with torch's 0-dim operands, a beta that was left on the CPU or cast with the model is accepted.
        if beta is not None and (beta.device != first.device or beta.dtype != torch.float32):
            # A copy to the GPU of so few bytes has left host memory when the call returns, so it need not block.
            beta = beta.to(first.device, torch.float32, non_blocking=beta.is_cpu)
    return _call_backend(likelihood, params, target, constants, kl, beta, reduction, weight)


def _names(variant: Variant, caller: str | None) -> tuple[str, Sequence[str], str]:
    """What messages name: the function, its parameters and the target, as the user knows them."""
    if caller is None:
        return variant.function, variant.tensors, "target"
    return caller, ("recon", *variant.tensors[1:]), "x"


def rows_of(target: Any) -> int | None:
    """The number of rows of the data, or None if they are no tensor with rows."""
    if not isinstance(target, Tensor) or target.is_nested or target.dim() == 0:
        return None
    return target.shape[0]


def _validate(
    variant: Variant,
    params: Sequence[Tensor],
    target: Tensor,
    constants: Sequence[float],
    caller: str | None,
    weight: Tensor | None,
) -> None:
    """Check the arguments of a call without draws, and all their values."""
    where, names, name = _names(variant, caller)
    check = check_elements if variant.element else CHECKS[variant.family]
    params = check(where, names, variant, params, target, name, constants)
    view = _checked_weight(where, variant, weight, name, target)
    check_weight_values(where, weight)
    check_values(where, names, variant, params, target, name, constants, view)


def _checked_weight(
    where: str, variant: Variant, weight: Tensor | None, name: str, target: Tensor
) -> Tensor | None:
    """Check a weight of the shape of the checked target, or with sizes of 1, and return it with as many dimensions.

    Counts accept one weight per feature, (G,). A mixture of discretised logistics needs one weight per pixel: (B, ...)
    without the channels, or (B, 1, ...).
    """
    if weight is None:
        return None
    expected, of = tuple(target.shape), "element"
    if variant.family == "counts" and not variant.element:
        of = "feature"
    elif variant.density == "discretized_logistic_mixture":
        expected, of = (expected[0], 1, *expected[2:]), "pixel"
    return checked_weight(where, weight, name, target, expected, of)


def _call_backend(
    likelihood: str, params: Sequence[Tensor], target: Tensor, *rest: Any
) -> tuple[Tensor, Tensor]:
    """Call the backend that serves the checked arguments; `rest` are its arguments from `constants` on."""
    chosen = choose.for_tensor(params[0], likelihood)
    if target.layout == torch.sparse_csr and chosen.name != "reference":
        # Ops take no sparse tensors, so the positions are passed after the parameters.
        positions = (target.crow_indices().long(), target.col_indices().long())
        params, target = (*params, *positions), target.values()
    result: tuple[Tensor, Tensor] = chosen.nll(likelihood, params, target, *rest)
    return result


def _nll_of_draws(
    likelihood: str,
    params: Sequence[Tensor],
    target: Tensor,
    constants: Sequence[float],
    draws: int,
    weight: Tensor | None,
    caller: str | None,
    validate: bool,
) -> Tensor:
    """Compute the nll (K, B) of K = `draws` draws of the parameters, (K, B, ...), and one target, (B, ...)."""
    variant = VARIANTS[likelihood]
    where, names, target_name = _names(variant, caller)
    count = rows_of(target)
    checked_int(where, "draws", draws, 1, None)
    merged, first_draw = list(params), list(params)
    for i, (name, value) in enumerate(zip(names, params, strict=True)):
        # A learned scale (0-dimensional) or a dispersion per feature (1-dimensional) is shared by all draws.
        if i > 0 and isinstance(value, Tensor) and value.dim() < 2:
            continue
        if not isinstance(value, Tensor) or not is_dense(value) or value.dim() < 2 or value.shape[0] != draws:
            raise ValueError(_draws_message(where, name, value, draws, count))
        merged[i], first_draw[i] = value.flatten(0, 1), value[0]
    if count is not None and count != params[0].shape[1]:
        raise ValueError(
            f"fastvae.{where}: `{target_name}` must have B = {params[0].shape[1]} rows for the (K, B, ...) of "
            f"`{names[0]}` {tuple(params[0].shape)}, got {tuple(target.shape)}"
        )
    check = check_elements if variant.element else CHECKS[variant.family]
    first_draw = list(check(where, names, variant, first_draw, target, target_name, constants))
    view = _checked_weight(where, variant, weight, target_name, target)
    if validate:
        check_weight_values(where, weight)
        # A library of (K, B, 1) becomes (K, B).
        of_draws = [
            one if value.dim() < 2 else value.reshape(draws, *one.shape)
            for value, one in zip(params, first_draw, strict=True)
        ]
        check_values(where, names, variant, of_draws, target, target_name, constants, view)
    for i, value in enumerate(first_draw):  # the check returns a library of (B, 1) as (B,)
        if merged[i].dim() != value.dim():
            merged[i] = merged[i].flatten()
    rows = _call_backend(likelihood, merged, target, constants, None, None, REDUCTIONS["none"], view)[1]
    return rows.unflatten(0, (draws, -1))


def _draws_message(where: str, name: str, value: Any, draws: int, rows: int | None) -> str:
    """`value` is not (K, B, ...), where the target has B = `rows`."""
    if not isinstance(value, Tensor) or not is_dense(value):
        found = type(value).__name__ if not isinstance(value, Tensor) else str(value.layout)
        return f"fastvae.{where}: `{name}` must be a dense Tensor of shape (K, B, ...), got {found}"
    shape, expected, hint = tuple(value.shape), "(K, B, ...)", ""
    if rows is not None and shape[:1] == (draws * rows,):
        expected = f"(K, B, ...) = {(draws, rows, *shape[1:])}"
        hint = f"; did you mean {name}.unflatten(0, ({draws}, -1))?"
    return (
        f"fastvae.{where}: `{name}` must have shape {expected} with K = `draws` = {draws}, got {shape}{hint}"
    )


def _first_nll(
    likelihood: str, params: Sequence[Tensor], target: Tensor, *rest: Any
) -> tuple[Tensor, Tensor]:
    """Compute `nll` and check the values. If they cannot be read, the next call is checked instead."""
    variant = VARIANTS[likelihood]
    *arguments, probs, weight = rest
    ranges.unchecked.discard(likelihood)
    checked = False
    try:
        result = nll(likelihood, params, target, *arguments, weight=weight)
        names = variant.tensors[0], "target"
        checked = ranges.warn_of_impossible_values(
            variant.function, names, likelihood, params, target, arguments[0], probs, weight
        )
    finally:
        if not checked:
            ranges.unchecked.add(likelihood)
    return result


def nll_elements(
    likelihood: str,
    params: Sequence[Tensor],
    target: Tensor,
    constants: Sequence[float] = (),
    factor: float = 1.0,
    weight: Tensor | None = None,
    validate: bool = False,
) -> Tensor:
    """Compute the nll of each element, in the target's shape, for a variant that has `elements`.

    The values and their gradients are multiplied by `factor` at no extra cost: -1 gives log-probabilities. `weight` and
    `validate` are as for `nll`.
    """
    variant = VARIANTS[likelihood]
    if isinstance(target, Tensor) and not is_dense(target):
        message = layout_message(variant.function, "target", target)
        raise TypeError(f"{message} (sparse targets need reduction='event')")
    if validate:
        _validate(variant, params, target, constants, None, weight)
    check = check_elements if variant.element else CHECKS[variant.family]
    params = check(variant.function, variant.tensors, variant, params, target, "target", constants)
    weight = _checked_weight(variant.function, variant, weight, "target", target)
    chosen = choose.for_tensor(params[0], likelihood, "nll_elements")
    return chosen.nll_elements(likelihood, params, target, constants, factor, weight)
