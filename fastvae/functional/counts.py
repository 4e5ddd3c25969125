"""Counts: of anything, element by element, and of genes in cells."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .._spec import VARIANTS, Variant
from . import loss
from .checks import (
    check_beside,
    check_choice,
    check_elements,
    check_floating,
    check_like,
    check_target,
    checked_not_negative,
    is_dense,
    shape_message,
)

__all__ = [
    "negative_binomial_logits_nll",
    "negative_binomial_nll",
    "poisson_nll",
    "poisson_rate_nll",
    "zero_inflated_negative_binomial_logits_nll",
    "zero_inflated_negative_binomial_nll",
]


def poisson_nll(
    log_rate: Tensor, target: Tensor, *, validate: bool = False, draws: int | None = None
) -> Tensor:
    """-log Poisson(target | e^log_rate) of every row, in nats, with its term log t!.

    Per element e^a - t a + log t! for log-rate a and count t. The three terms of a large count, which cancel, are not
    made: the result is as exact for t = 1e6 as for t = 1.

    Args:
        log_rate: (B, ...), the logarithm of the expected counts.
        target: the shape of `log_rate`: counts, floating or uint8, uint16, int32 or int64, each as it is. It must not
            require a gradient.
        validate: look for counts that are negative, fractional or not finite, which otherwise give meaningless numbers.
            This reads the values, which on a GPU waits for them.
        draws: K says that the parameters hold K draws, (K, B, ...), for one target, (B, ...), which is read and not
            repeated; the result is (K, B). A learned scale or a (G,) dispersion serves all draws.

    Returns:
        (B,), float32 (float64 for a float64 log_rate).

    Raises:
        TypeError: a dtype or kind that does not fit.
        ValueError: a shape or device that does not fit, a target that requires a gradient, or with `validate` a count
            that is none.
    """
    if validate:
        if draws is None:  # else the loss checks shapes
            check_elements(
                "poisson_nll", ("log_rate",), VARIANTS["poisson"], [log_rate], target, "target", ()
            )
        _check_counts("poisson_nll", "target", target)
    return loss.nll("poisson", [log_rate], target, draws=draws)[0]


def poisson_rate_nll(
    rate: Tensor,
    target: Tensor,
    *,
    eps: float = 0.0,
    reduction: str = "event",
    validate: bool = False,
    draws: int | None = None,
) -> Tensor:
    """-log Poisson(target | rate + eps) in nats, with its term log t!: `poisson_nll` by the rate itself.

    Per element m - t log m + log t! at m = rate + eps for count t; a fractional t is allowed, t! = Gamma(t + 1). The
    three terms of a large count, which cancel, are not made. A rate of 0 is certain of a count of 0, whose value is 0;
    with `eps=0` that of any other count is infinite.

    Args:
        rate: (B, ...), the expected counts, 0 or more.
        target: the shape of `rate`: counts, floating or uint8, uint16, int32 or int64, each as it is. It must not
            require a gradient.
        eps: 0 or more, added to `rate`: value and gradient are those at rate + eps.
        reduction: `"event"` sums every row to (B,); `"none"` keeps the elements.
        validate: look for rates below 0 and counts that are negative, fractional or not finite. This reads the values,
            which on a GPU waits for them. Without it fractional counts are evaluated as they are.
        draws: K says that the parameters hold K draws, (K, B, ...), for one target, (B, ...), which is read and not
            repeated; the result is (K, B). A learned scale or a (G,) dispersion serves all draws.

    Returns:
        (B,), or the shape of `rate`; float32 (float64 for a float64 rate).

    Raises:
        TypeError: a dtype or kind that does not fit.
        ValueError: a shape or device that does not fit, an unknown reduction, an eps below 0, a target that requires a
            gradient, or with `validate` a value that is out of its domain.
    """
    eps = checked_not_negative("poisson_rate_nll", "eps", eps)
    check_choice("poisson_rate_nll", "reduction", reduction, ("event", "none"))
    if validate:
        variant = VARIANTS["poisson_rate"]
        if draws is None:  # else the loss checks shapes
            check_elements(variant.function, variant.tensors, variant, [rate], target, "target", (eps,))
        _check_counts(variant.function, "target", target)
        _check_values(
            variant.function, "rate", rate, (rate >= 0) & (rate < math.inf), "finite numbers, 0 or more"
        )
    if reduction == "none":
        _check_no_draws("poisson_rate_nll", draws)
        return loss.nll_elements("poisson_rate", [rate], target, (eps,))
    return loss.nll("poisson_rate", [rate], target, (eps,), draws=draws)[0]


def negative_binomial_nll(
    mean: Tensor,
    target: Tensor,
    inverse_dispersion: Tensor,
    *,
    eps: float = 0.0,
    reduction: str = "event",
    validate: bool = False,
    draws: int | None = None,
) -> Tensor:
    """-log NB(target | mean + eps, inverse dispersion) in nats, as scvi-tools parametrises it.

    Per element, with m = mean + eps, inverse dispersion r and count t: lgamma(r) + lgamma(t + 1) - lgamma(t + r)
    - r log(r / (r + m)) - t log(m / (r + m)) (Lopez et al. 2018). The variance is m + m^2 / r. Computed so that r from
    1e-4 to 1e8 and counts to 1e6 keep their digits, fractional counts too (t! is Gamma(t + 1)); zeros cost one
    logarithm.

    Args:
        mean: (B, G); mean + eps must be above 0.
        target: counts (B, G): floating, uint8, uint16, int32 or int64, dense or (with `reduction="event"`)
            torch.sparse_csr, which is read as it is. It must not require a gradient.
        inverse_dispersion: above 0: (G,), one for every gene, or (B, G). One of (G,) is read in place, and its gradient
            is the sum over rows.
        eps: 0 or more, added to `mean`: value and gradients are those at mean + eps. 1e-8 is what scvi-tools adds
            inside of its logarithms.
        reduction: `"event"` sums every row to (B,); `"none"` keeps the elements.
        validate: look at every value first, and name the first that is no count (a whole number, 0 or more) or leaves
            its domain. Without it fractional counts are evaluated as they are.
        draws: K says that the parameters hold K draws, (K, B, ...), for one target, (B, ...), which is read and not
            repeated; the result is (K, B). A learned scale or a (G,) dispersion serves all draws.

    Returns:
        (B,), or with `reduction="none"` (B, G); float32 (float64 for a float64 mean).

    Raises:
        TypeError: a dtype or kind that does not fit, or a sparse target with `reduction="none"`.
        ValueError: a shape, device or value that does not fit, an unknown reduction, an eps below 0, or a target that
            requires a gradient.
    """
    return _mean_nll("negative_binomial", (mean, inverse_dispersion), target, eps, reduction, validate, draws)


def zero_inflated_negative_binomial_nll(
    mean: Tensor,
    target: Tensor,
    inverse_dispersion: Tensor,
    zi_logits: Tensor,
    *,
    eps: float = 0.0,
    reduction: str = "event",
    validate: bool = False,
    draws: int | None = None,
) -> Tensor:
    """`negative_binomial_nll` of counts that are 0 with probability sigmoid(zi_logits) besides.

    Per element -log( p [t = 0] + (1 - p) NB(t) ), p = sigmoid(zi_logits) (Risso et al. 2018; Lopez et al. 2018).

    Args:
        mean, target, inverse_dispersion, eps, reduction, validate, draws: as for `negative_binomial_nll`.
        zi_logits: (B, G), logits of the additional zeros.

    Returns and raises as `negative_binomial_nll` does.
    """
    params = (mean, inverse_dispersion, zi_logits)
    return _mean_nll("zero_inflated_negative_binomial", params, target, eps, reduction, validate, draws)


def negative_binomial_logits_nll(
    logits: Tensor,
    target: Tensor,
    log_dispersion: Tensor,
    library: Tensor,
    *,
    validate: bool = False,
    draws: int | None = None,
) -> Tensor:
    """`negative_binomial_nll` from a decoder's raw outputs, softmax and exponential in the same pass.

    mean = library * softmax(logits) over the genes of a cell, inverse dispersion = e^log_dispersion.

    Args:
        logits: (B, G).
        target, validate, draws: as for `negative_binomial_nll`.
        log_dispersion: (G,) or (B, G).
        library: (B,) or (B, 1), above 0: the expected total of a cell. Its gradient is given where it requires one.

    Returns and raises as `negative_binomial_nll` does.
    """
    return _dispersed_nll(
        "negative_binomial_logits", (logits, log_dispersion, library), target, validate, draws
    )


def zero_inflated_negative_binomial_logits_nll(
    logits: Tensor,
    target: Tensor,
    log_dispersion: Tensor,
    zi_logits: Tensor,
    library: Tensor,
    *,
    validate: bool = False,
    draws: int | None = None,
) -> Tensor:
    """`negative_binomial_logits_nll` of counts that are 0 with probability sigmoid(zi_logits) besides.

    Args:
        logits, target, log_dispersion, library, validate, draws: as for `negative_binomial_logits_nll`.
        zi_logits: (B, G), logits of the additional zeros.

    Returns and raises as `negative_binomial_nll` does.
    """
    params = (logits, log_dispersion, zi_logits, library)
    return _dispersed_nll("zero_inflated_negative_binomial_logits", params, target, validate, draws)


def _mean_nll(
    likelihood: str,
    params: Sequence[Tensor],
    target: Tensor,
    eps: float,
    reduction: str,
    validate: bool,
    draws: int | None,
) -> Tensor:
    variant = VARIANTS[likelihood]
    eps = checked_not_negative(variant.function, "eps", eps)
    check_choice(variant.function, "reduction", reduction, ("event", "none"))
    if validate:
        _check_all_values(variant, params, target, draws, eps)
    if reduction == "none":
        _check_no_draws(variant.function, draws)
        return loss.nll_elements(likelihood, params, target, (eps,))
    return loss.nll(likelihood, params, target, (eps,), draws=draws)[0]


def _check_no_draws(where: str, draws: int | None) -> None:
    if draws is not None:
        raise ValueError(
            f"fastvae.{where}: `draws` must be None with `reduction` 'none', got {draws!r}; sum the elements of each "
            "draw with 'event'"
        )


def _dispersed_nll(
    likelihood: str, params: Sequence[Tensor], target: Tensor, validate: bool, draws: int | None
) -> Tensor:
    if validate:
        _check_all_values(VARIANTS[likelihood], params, target, draws)
    return loss.nll(likelihood, params, target, draws=draws)[0]


def _check_all_values(
    variant: Variant, params: Sequence[Tensor], target: Tensor, draws: int | None, eps: float = 0.0
) -> None:
    if draws is None:  # else the loss checks shapes
        _check_counts_call(variant.function, variant.tensors, variant, params, target, "target")
    _check_counts(variant.function, "target", target)
    for name, value in zip(variant.tensors, params, strict=True):
        good, what = value.isfinite(), "finite numbers"
        if name == "mean" and eps > 0:
            good, what = good & (value >= 0), "finite numbers, 0 or more"
        elif name in ("mean", "inverse_dispersion", "library"):
            good, what = good & (value > 0), "positive, finite numbers"
        _check_values(variant.function, name, value, good, what)


def _check_counts_call(
    where: str,
    names: Sequence[str],
    variant: Variant,
    params: Sequence[Any],
    target: Any,
    name: str,
    constants: Sequence[float] = (),
) -> tuple[Tensor, ...]:
    """Parameters of (B, G) counts. The dispersion may be (G,), one for every gene; `library` is (B,) or (B, 1), and
    (B,) where it is returned."""
    first = params[0]
    check_floating(where, names[0], first)
    if first.dim() != 2:
        raise ValueError(
            f"fastvae.{where}: `{names[0]}` must have shape (B, G), rows and features, got {tuple(first.shape)}"
        )
    rows, features = first.shape
    checked = [first]
    for argument, label, value in zip(variant.tensors[1:], names[1:], params[1:], strict=True):
        if argument == "library":
            check_beside(where, label, value, names[0], first)
            if value.shape not in ((rows,), (rows, 1)):
                raise ValueError(
                    f"fastvae.{where}: `{label}` must have one value per row of `{names[0]}`, shape ({rows},) or "
                    f"({rows}, 1), got {tuple(value.shape)}"
                )
            value = value.reshape(rows)
        elif argument.endswith("dispersion") and isinstance(value, Tensor) and value.dim() == 1:
            check_beside(where, label, value, names[0], first)
            if value.shape[0] != features:
                raise ValueError(
                    f"fastvae.{where}: `{label}` must have the shape ({features},), one for every feature of "
                    f"`{names[0]}`, or {tuple(first.shape)}, got {tuple(value.shape)}"
                )
        else:
            check_like(where, label, value, names[0], first)
        checked.append(value)
    if isinstance(target, Tensor) and target.layout != torch.sparse_csr and not is_dense(target):
        found = (
            "a nested tensor"
            if target.is_nested
            else f"{target.layout}; did you mean {name}.to_sparse_csr()?"
        )
        raise TypeError(f"fastvae.{where}: `{name}` must be dense or torch.sparse_csr, got {found}")
    check_target(where, names, variant, first, target, name)
    if target.shape != first.shape:
        raise ValueError(shape_message(where, name, target, names[0], first, tuple(first.shape)))
    return tuple(checked)


loss.CHECKS["counts"] = _check_counts_call


def _check_counts(where: str, name: str, counts: Tensor) -> None:
    """Every value of `counts`, dense or sparse CSR, is a whole number, 0 or more."""
    what = "counts: whole numbers, 0 or more"
    stored = counts.values() if counts.layout == torch.sparse_csr else counts
    if stored.is_floating_point():
        good = (stored >= 0) & (stored.floor() == stored) & (stored < math.inf)
    else:
        good = stored.to(torch.int64) >= 0
    if counts.layout == torch.sparse_csr and not good.all():
        i = int((~good).nonzero()[0])
        row = int((counts.crow_indices() > i).nonzero()[0]) - 1
        position = (row, int(counts.col_indices()[i]))
        raise ValueError(f"fastvae.{where}: `{name}` must hold {what}, got {stored[i].item()} at {position}")
    _check_values(where, name, stored, good, what)


def _check_values(where: str, name: str, values: Tensor, good: Tensor, what: str) -> None:
    """`good` holds everywhere, else the first position where it does not is named."""
    if not good.all():
        position = tuple((~good).nonzero()[0].tolist())
        raise ValueError(
            f"fastvae.{where}: `{name}` must hold {what}, got {values[position].item()} at {position}"
        )
