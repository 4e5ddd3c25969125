"""Counts in general, counts of genes in cells, and counts of items or words whose sum is given."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .._spec import VARIANTS, Variant
from . import loss
from .checks import (
    check_beside,
    check_choice,
    check_floating,
    check_like,
    check_target,
    checked_not_negative,
    is_dense,
    shape_message,
)

__all__ = [
    "multinomial_nll",
    "negative_binomial_logits_nll",
    "negative_binomial_mixture_nll",
    "negative_binomial_nll",
    "poisson_nll",
    "poisson_rate_nll",
    "zero_inflated_negative_binomial_logits_nll",
    "zero_inflated_negative_binomial_nll",
]


def poisson_nll(
    log_rate: Tensor,
    target: Tensor,
    *,
    validate: bool = False,
    draws: int | None = None,
    weight: Tensor | None = None,
) -> Tensor:
    """Compute -log Poisson(target | e^log_rate) of every row, in nats, including the term log t!.

    Per element, e^a - t a + log t! for log-rate a and count t. For large counts these terms cancel, so they are not
    computed separately: the result is as accurate for t = 1e6 as for t = 1.

    Args:
        log_rate: (B, ...), the logarithm of the expected counts.
        target: the shape of `log_rate`: counts, floating or uint8, uint16, int32 or int64, none of them scaled. It must
            not require a gradient.
        validate: check every value first, and report the first count that is negative, fractional or not finite, which
            would otherwise give a meaningless result, and the first weight that is negative, infinite or NaN. What has
            a weight of 0 is not checked. Reading the values waits for the GPU.
        draws: K if the parameters hold K draws, (K, B, ...), for one target, (B, ...), which is read without being
            repeated. The result is then (K, B). A learned scale or a (G,) dispersion is shared by all draws.
        weight: multiplies the nll of each element: bool, uint8 (read as a number, not as x / 255) or floating, at
            least 0, in the shape of `target` or with sizes of 1, which are read in place. Elements of weight 0 are
            left out: even NaN or inf there, in the parameters or in `target`, reach neither value nor gradient. It
            must not require a gradient. With `draws`, it belongs to the target and is shared by all draws.

    Returns:
        (B,), float32 (float64 for a float64 log_rate).

    Raises:
        TypeError: If an argument has the wrong type or dtype.
        ValueError: If a shape or device is wrong, the target requires a gradient, or `validate` finds an invalid count
            or weight.
    """
    return loss.nll("poisson", [log_rate], target, draws=draws, weight=weight, validate=validate)[0]


def poisson_rate_nll(
    rate: Tensor,
    target: Tensor,
    *,
    eps: float = 0.0,
    reduction: str = "event",
    validate: bool = False,
    draws: int | None = None,
    weight: Tensor | None = None,
) -> Tensor:
    """Compute -log Poisson(target | rate + eps) in nats, including the term log t!: `poisson_nll` of the rate itself.

    Per element, m - t log m + log t! at m = rate + eps for count t; t may be fractional, with t! = Gamma(t + 1). For
    large counts the three terms cancel, so they are not computed separately. At a rate of 0 with `eps=0`, a count of 0
    has the value 0, and the value of any other count is infinite.

    Args:
        rate: (B, ...), the expected counts, at least 0.
        target: the shape of `rate`: counts, floating or uint8, uint16, int32 or int64, none of them scaled. It must not
            require a gradient.
        eps: at least 0, added to `rate`; value and gradient are those at rate + eps.
        reduction: `"event"` sums every row to (B,); `"none"` keeps the elements.
        validate: check every value first, and report the first rate below 0, the first count that is negative,
            fractional or not finite, and the first weight that is negative, infinite or NaN. What has a weight of 0 is
            not checked. Reading the values waits for the GPU. Without it, fractional counts are evaluated as they are.
        draws: K if the parameters hold K draws, (K, B, ...), for one target, (B, ...), which is read without being
            repeated. The result is then (K, B). A learned scale or a (G,) dispersion is shared by all draws.
        weight: multiplies the nll of each element: bool, uint8 (read as a number, not as x / 255) or floating, at
            least 0, in the shape of `target` or with sizes of 1, which are read in place. Elements of weight 0 are
            left out: even NaN or inf there, in the parameters or in `target`, reach neither value nor gradient. It
            must not require a gradient. With `draws`, it belongs to the target and is shared by all draws.

    Returns:
        (B,), or the shape of `rate`; float32 (float64 for a float64 rate).

    Raises:
        TypeError: If an argument has the wrong type or dtype.
        ValueError: If a shape or device is wrong, `reduction` is unknown, `eps` is below 0, the target requires a
            gradient, or `validate` finds an invalid value.
    """
    eps = checked_not_negative("poisson_rate_nll", "eps", eps)
    check_choice("poisson_rate_nll", "reduction", reduction, ("event", "none"))
    if reduction == "none":
        _check_no_draws("poisson_rate_nll", draws)
        return loss.nll_elements("poisson_rate", [rate], target, (eps,), weight=weight, validate=validate)
    return loss.nll("poisson_rate", [rate], target, (eps,), draws=draws, weight=weight, validate=validate)[0]


def negative_binomial_nll(
    mean: Tensor,
    target: Tensor,
    inverse_dispersion: Tensor,
    *,
    eps: float = 0.0,
    reduction: str = "event",
    validate: bool = False,
    draws: int | None = None,
    weight: Tensor | None = None,
) -> Tensor:
    """Compute -log NB(target | mean + eps, inverse dispersion) in nats, as scvi-tools parametrises it.

    Per element, with m = mean + eps, inverse dispersion r and count t: lgamma(r) + lgamma(t + 1) - lgamma(t + r)
    - r log(r / (r + m)) - t log(m / (r + m)) (Lopez et al. 2018). The variance is m + m^2 / r. The result is accurate
    for r from 1e-4 to 1e8 and counts up to 1e6, also fractional ones (t! is Gamma(t + 1)); a zero costs one logarithm.

    Args:
        mean: (B, G); mean + eps must be above 0.
        target: counts (B, G): floating, uint8, uint16, int32 or int64, dense or (with `reduction="event"`)
            torch.sparse_csr, which is not made dense. It must not require a gradient.
        inverse_dispersion: above 0, (G,), one for every gene, or (B, G). (G,) is read in place, and its gradient is the
            sum over the batch.
        eps: at least 0, added to `mean`; value and gradients are those at mean + eps. scvi-tools adds 1e-8 inside its
            logarithms.
        reduction: `"event"` sums every row to (B,); `"none"` keeps the elements.
        validate: check every value first, and report the first that is not a count (a whole number, at least 0) or is
            out of its domain, and the first weight that is negative, infinite or NaN. What has a weight of 0 is not
            checked. Reading the values waits for the GPU. Without it, fractional counts are evaluated as they are.
        draws: K if the parameters hold K draws, (K, B, ...), for one target, (B, ...), which is read without being
            repeated. The result is then (K, B). A learned scale or a (G,) dispersion is shared by all draws.
        weight: multiplies the nll of each element: bool, uint8 or floating, at least 0: (B, G), (B, 1), (1, G) or (G,),
            one weight for every gene; also beside a sparse target. Elements of weight 0 are left out: even NaN or inf
            there, in the parameters or in `target`, reach neither value nor gradient. (A softmax of logits includes
            all genes.) It must not require a gradient. With `draws`, it belongs to the target and is shared by all
            draws.

    Returns:
        (B,), or with `reduction="none"` (B, G); float32 (float64 for a float64 mean).

    Raises:
        TypeError: If an argument has the wrong type or dtype, or a sparse target is passed with `reduction="none"`.
        ValueError: If a shape or device is wrong, `reduction` is unknown, `eps` is below 0, the target requires a
            gradient, or `validate` finds an invalid value.
    """
    return _mean_nll(
        "negative_binomial", (mean, inverse_dispersion), target, eps, reduction, validate, draws, weight
    )


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
    weight: Tensor | None = None,
) -> Tensor:
    """Compute `negative_binomial_nll` of counts with additional zeros, which have the probability sigmoid(zi_logits).

    Per element, -log( p [t = 0] + (1 - p) NB(t) ) with p = sigmoid(zi_logits) (Risso et al. 2018; Lopez et al. 2018).

    Args:
        mean, target, inverse_dispersion, eps, reduction, validate, draws, weight: as for `negative_binomial_nll`.
        zi_logits: (B, G), logits of the additional zeros; -inf for none.

    Returns and Raises are those of `negative_binomial_nll`.
    """
    params = (mean, inverse_dispersion, zi_logits)
    return _mean_nll(
        "zero_inflated_negative_binomial", params, target, eps, reduction, validate, draws, weight
    )


def negative_binomial_logits_nll(
    logits: Tensor,
    target: Tensor,
    log_dispersion: Tensor,
    library: Tensor,
    *,
    validate: bool = False,
    draws: int | None = None,
    weight: Tensor | None = None,
) -> Tensor:
    """Compute `negative_binomial_nll` from a decoder's raw outputs, with softmax and exponential in the same pass.

    mean = library * softmax(logits) over the genes of a cell, and inverse dispersion = e^log_dispersion.

    Args:
        logits: (B, G).
        target, validate, draws, weight: as for `negative_binomial_nll`.
        log_dispersion: (G,) or (B, G).
        library: (B,) or (B, 1): the expected total of a cell, above 0, or 0 if it has no counts. It gets a gradient if
            it requires one.

    Returns and Raises are those of `negative_binomial_nll`.
    """
    return loss.nll(
        "negative_binomial_logits",
        [logits, log_dispersion, library],
        target,
        draws=draws,
        weight=weight,
        validate=validate,
    )[0]


def zero_inflated_negative_binomial_logits_nll(
    logits: Tensor,
    target: Tensor,
    log_dispersion: Tensor,
    zi_logits: Tensor,
    library: Tensor,
    *,
    validate: bool = False,
    draws: int | None = None,
    weight: Tensor | None = None,
) -> Tensor:
    """Compute `negative_binomial_logits_nll` of counts with additional zeros of the probability sigmoid(zi_logits).

    Args:
        logits, target, log_dispersion, library, validate, draws, weight: as for `negative_binomial_logits_nll`.
        zi_logits: (B, G), logits of the additional zeros.

    Returns and Raises are those of `negative_binomial_nll`.
    """
    return loss.nll(
        "zero_inflated_negative_binomial_logits",
        [logits, log_dispersion, zi_logits, library],
        target,
        draws=draws,
        weight=weight,
        validate=validate,
    )[0]


def negative_binomial_mixture_nll(
    mean1: Tensor,
    target: Tensor,
    inverse_dispersion: Tensor,
    mean2: Tensor,
    mixture_logits: Tensor,
    *,
    eps: float = 0.0,
    reduction: str = "event",
    validate: bool = False,
    draws: int | None = None,
    weight: Tensor | None = None,
) -> Tensor:
    """Compute -log of a mixture of two negative binomials in nats, totalVI's likelihood of proteins.

    Per element, -log( p NB(t | mean1 + eps, r) + (1 - p) NB(t | mean2 + eps, r) ) with p = sigmoid(mixture_logits) and
    the inverse dispersion r of both (Gayoso et al. 2021; scvi-tools' NegativeBinomialMixture). NB is the density of
    `negative_binomial_nll`, and as accurate. In totalVI, the first component is the background and the second the
    foreground.

    At logits of inf and -inf, the result is that of the first and of the second component. A component whose mean + eps
    is 0 gives a count of 0 the probability 1 and any other count 0.

    Args:
        mean1: (B, G), at least 0: the mean of the component of probability p.
        target, inverse_dispersion, eps, reduction, validate, draws, weight: as for `negative_binomial_nll`.
        mean2: (B, G), at least 0: the mean of the other component.
        mixture_logits: (B, G), the logits of p.

    Returns and Raises are those of `negative_binomial_nll`.
    """
    params = (mean1, inverse_dispersion, mean2, mixture_logits)
    return _mean_nll("negative_binomial_mixture", params, target, eps, reduction, validate, draws, weight)


def multinomial_nll(
    logits: Tensor,
    target: Tensor,
    *,
    validate: bool = False,
    draws: int | None = None,
    weight: Tensor | None = None,
) -> Tensor:
    """Compute -log Multinomial(target | n, softmax(logits)) of every row, in nats, where n is the sum of its counts.

    Per row, sum_i log t_i! - log n! - sum_i t_i log p_i with p = softmax(logits) over the features (Liang et al. 2018;
    Bishop 2006, equation 2.34). This is the normalised density: it includes the multinomial coefficient, which Mult-VAE
    leaves out because no parameter changes it, so the gradients are the same: n p - t. A row without counts has the
    value and the gradient 0. Neither log_softmax nor, of a sparse target, a dense copy is stored.

    For large counts the terms cancel, so they are not computed separately: the result is as accurate for counts of 1e12
    as for 1. A logit of -inf excludes its feature, and a count there has an infinite nll. The nll is NaN if a logit is
    NaN, or if in a row with counts a logit is inf or all are -inf.

    Args:
        logits: (B, V).
        target: counts (B, V): floating, uint8, uint16, int32 or int64, not scaled, dense or torch.sparse_csr, which is
            not made dense. It must not require a gradient.
        validate: check every value first, and report the first count that is negative, fractional or not finite, the
            first logit that is NaN or inf, and the first weight that is negative, infinite or NaN. What has a weight of
            0 is not checked. Reading the values waits for the GPU. Without it, fractional counts are evaluated as they
            are, with t! = Gamma(t + 1).
        draws: K if the logits hold K draws, (K, B, V), for one target, (B, V), which is read without being repeated.
            The result is then (K, B).
        weight: bool, uint8 or floating, at least 0: (B, V), (B, 1), (1, V) or (V,); also beside a sparse target. It
            multiplies the term of each count, log t_i! - t_i log p_i - t_i/n log n!; the terms of a row sum to its nll.
            Features of weight 0 are left out of the softmax and of n as well, as if they did not exist: even NaN or inf
            there, in the logits or in `target`, reach neither value nor gradient. It must not require a gradient. With
            `draws`, it belongs to the target and is shared by all draws.

    Returns:
        (B,), float32 (float64 for float64 logits).

    Raises:
        TypeError: If an argument has the wrong type or dtype.
        ValueError: If a shape or device is wrong, the target requires a gradient, or `validate` finds an invalid value.
    """
    return loss.nll("multinomial", [logits], target, draws=draws, weight=weight, validate=validate)[0]


def _mean_nll(
    likelihood: str,
    params: Sequence[Tensor],
    target: Tensor,
    eps: float,
    reduction: str,
    validate: bool,
    draws: int | None,
    weight: Tensor | None,
) -> Tensor:
    variant = VARIANTS[likelihood]
    eps = checked_not_negative(variant.function, "eps", eps)
    check_choice(variant.function, "reduction", reduction, ("event", "none"))
    if reduction == "none":
        _check_no_draws(variant.function, draws)
        return loss.nll_elements(likelihood, params, target, (eps,), weight=weight, validate=validate)
    return loss.nll(likelihood, params, target, (eps,), draws=draws, weight=weight, validate=validate)[0]


def _check_no_draws(where: str, draws: int | None) -> None:
    if draws is not None:
        raise ValueError(
            f"fastvae.{where}: `draws` must be None with `reduction` 'none', got {draws!r}; sum the elements of each "
            "draw with 'event'"
        )


def _check_counts_call(
    where: str,
    names: Sequence[str],
    variant: Variant,
    params: Sequence[Any],
    target: Any,
    name: str,
    constants: Sequence[float] = (),
) -> tuple[Tensor, ...]:
    """Check the parameters of (B, G) counts. The dispersion may be (G,), one for every gene. `library` is (B,) or
    (B, 1), and is returned as (B,)."""
    first = params[0]
    check_floating(where, names[0], first)
    if first.dim() != 2:
        raise ValueError(
            f"fastvae.{where}: `{names[0]}` must have shape (B, G), batch and features, got {tuple(first.shape)}"
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
