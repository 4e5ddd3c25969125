"""One function per operation: what it computes, what it accepts, and the call of the backend that serves it.

Every function checks its inputs before any work and then hands them to `backend.choose(tensor)`: a compiled kernel or
`fastvae.reference`, where each formula is written out with its source. Dimension 0 is the batch, every further
dimension belongs to the event and is summed; results are in nats, float32 per row (float64 for float64 inputs).

Accepted dtypes, the same on every backend:

| argument                                 | dtypes                                                                    |
|------------------------------------------|---------------------------------------------------------------------------|
| logits, mean, params, mu                 | float16, bfloat16, float32, float64                                       |
| logvar, prior_mu, prior_logvar, eps      | that of the line above (a 0-dim logvar of a half mean also: float32)      |
| target                                   | that of the parameters, float32, or uint8, which is read as x / 255       |
| target of a Bernoulli                    | bool too                                                                  |
| target of a discretised logistic         | uint8 alone, which is the level itself                                    |
| seed                                     | int64                                                                     |

A value or shape that does not fit is a ValueError, as is a wrong device; a wrong dtype or kind is a TypeError.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import backend
from .reference import REDUCTIONS, draw_seed

__all__ = [
    "bernoulli_nll",
    "discretized_logistic_mixture_nll",
    "discretized_logistic_nll",
    "gaussian_head_nll",
    "gaussian_kl",
    "gaussian_nll",
    "reparameterize_kl",
]

# ---------------------------------------------------------------------------------------------------------------------
# Checks. They run in every call: plain comparisons, and no work for the message until one fails.
# ---------------------------------------------------------------------------------------------------------------------

_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _list(dtypes: Sequence[torch.dtype]) -> str:
    names = [_name(dtype) for dtype in dict.fromkeys(dtypes)]
    return " or ".join(filter(None, (", ".join(names[:-1]), names[-1])))


def _check_floating(where: str, name: str, value: Any) -> None:
    """`value` is a floating tensor with a batch dimension."""
    if not isinstance(value, Tensor):
        raise TypeError(f"fastvae.{where}: `{name}` must be a Tensor, got {type(value).__name__}")
    if value.dtype not in _FLOATS:
        raise TypeError(f"fastvae.{where}: `{name}` must be {_list(_FLOATS)}, got {_name(value.dtype)}")
    if value.dim() == 0:
        raise ValueError(
            f"fastvae.{where}: `{name}` must have a batch dimension, got a 0-dimensional tensor; "
            f"did you mean {name}.unsqueeze(0)?"
        )


def _check_like(where: str, name: str, value: Any, like_name: str, like: Tensor) -> None:
    """`value` is a tensor of the dtype, device and shape of `like`."""
    if not isinstance(value, Tensor):
        raise TypeError(f"fastvae.{where}: `{name}` must be a Tensor, got {type(value).__name__}")
    if value.dtype != like.dtype:
        raise TypeError(
            f"fastvae.{where}: `{name}` must be {_name(like.dtype)} as `{like_name}`, got {_name(value.dtype)}; "
            f"did you mean {name}.to({like_name}.dtype)?"
        )
    if value.device != like.device:
        raise ValueError(_device_message(where, name, value, like_name, like))
    if value.shape != like.shape:
        raise ValueError(_shape_message(where, name, value, like_name, like, tuple(like.shape)))


def _device_message(where: str, name: str, value: Tensor, like_name: str, like: Tensor) -> str:
    return (
        f"fastvae.{where}: `{name}` must be on the device of `{like_name}`, {like.device}, got {value.device}; "
        f"did you mean {name}.to({like_name}.device)?"
    )


def _shape_message(
    where: str, name: str, value: Tensor, like_name: str, like: Tensor, expected: tuple[int, ...]
) -> str:
    shape = tuple(value.shape)
    # The same elements in another arrangement: say how to arrange them.
    hint = ""
    if shape[:1] == expected[:1] and math.prod(shape) == math.prod(expected):
        if len(expected) == 2:
            hint = f"; did you mean {name}.flatten(1)?"
        elif len(shape) == 2 and expected == tuple(like.shape):
            hint = f"; did you mean {like_name}.flatten(1)?"
        else:
            hint = f"; did you mean {name}.reshape({expected})?"
    what = f"the shape of `{like_name}` {expected}"
    if expected != tuple(like.shape):
        what = f"the shape {expected} for `{like_name}` {tuple(like.shape)}"
    return f"fastvae.{where}: `{name}` must have {what}, got {shape}{hint}"


def _check_choice(where: str, name: str, value: Any, choices: Sequence[str]) -> None:
    if value not in choices:
        raise ValueError(
            f"fastvae.{where}: `{name}` must be one of {', '.join(map(repr, choices))}, got {value!r}"
        )


def _check_posterior(where: str, mu: Any, logvar: Any, prior_mu: Any, prior_logvar: Any) -> None:
    _check_floating(where, "mu", mu)
    _check_like(where, "logvar", logvar, "mu", mu)
    if prior_mu is not None or prior_logvar is not None:
        if prior_mu is None or prior_logvar is None:
            absent = "prior_mu" if prior_mu is None else "prior_logvar"
            raise TypeError(
                f"fastvae.{where}: `prior_mu` and `prior_logvar` go together, `{absent}` is missing"
            )
        _check_like(where, "prior_mu", prior_mu, "mu", mu)
        _check_like(where, "prior_logvar", prior_logvar, "mu", mu)


def _check_seed(where: str, seed: Any, mu: Tensor) -> None:
    if not isinstance(seed, Tensor):
        raise TypeError(
            f"fastvae.{where}: `seed` must be an int64 Tensor (seed, offset), got {type(seed).__name__}; "
            f"did you mean torch.tensor([seed, 0])?"
        )
    if seed.dtype != torch.int64:
        raise TypeError(f"fastvae.{where}: `seed` must be int64, got {_name(seed.dtype)}")
    if seed.dim() != 1 or seed.shape[0] != 2:
        raise ValueError(
            f"fastvae.{where}: `seed` must have shape (2,): (seed, offset), got {tuple(seed.shape)}"
        )
    if seed.device != mu.device:
        raise ValueError(_device_message(where, "seed", seed, "mu", mu))


def _check_generator(where: str, generator: Any, mu: Tensor) -> None:
    if not isinstance(generator, torch.Generator):
        raise TypeError(
            f"fastvae.{where}: `generator` must be a torch.Generator, got {type(generator).__name__}; "
            f"did you mean torch.Generator().manual_seed(...)?"
        )
    if generator.device.type != mu.device.type:
        raise ValueError(
            f"fastvae.{where}: `generator` must be on the device of `mu`, {mu.device}, got {generator.device}; "
            f"did you mean torch.Generator(mu.device)?"
        )


def _check_eps(where: str, eps: Any, mu: Tensor, samples: int | None) -> None:
    if samples is None:
        _check_like(where, "eps", eps, "mu", mu)
        return
    if not isinstance(eps, Tensor):
        raise TypeError(f"fastvae.{where}: `eps` must be a Tensor, got {type(eps).__name__}")
    expected = (samples, *mu.shape)
    if eps.shape != expected:
        raise ValueError(
            f"fastvae.{where}: `eps` must have shape (samples, *mu.shape) = {tuple(expected)}, got {tuple(eps.shape)}"
        )
    if eps.shape[0] > 0:
        _check_like(where, "eps", eps[0], "mu", mu)


class _Row(NamedTuple):
    """What the checks and their messages know of a likelihood."""

    function: str
    params: tuple[str, ...]
    integers: tuple[torch.dtype, ...]  # target dtypes that are accepted beside the floating ones
    differentiates_target: bool
    scalar: bool = False  # the last of `params` is 0-dimensional; the others have the shape of the first
    packed: bool = False  # the first holds the parameters of 2C channels for a target of C
    levels: bool = (
        False  # the target is uint8 and means what it says; `_check_levels` knows the channels of the first
    )


_ROWS = {
    "bernoulli": _Row("bernoulli_nll", ("logits",), (torch.uint8, torch.bool), False),
    "gaussian": _Row("gaussian_nll", ("mean",), (torch.uint8,), True),
    "gaussian_learned": _Row("gaussian_nll", ("mean", "logvar"), (torch.uint8,), True, scalar=True),
    "gaussian_per_element": _Row("gaussian_nll", ("mean", "logvar"), (torch.uint8,), True),
    "gaussian_head": _Row("gaussian_head_nll", ("params",), (torch.uint8,), True, packed=True),
    "discretized_logistic": _Row("discretized_logistic_nll", ("params",), (torch.uint8,), False, levels=True),
    "discretized_logistic_mixture": _Row(
        "discretized_logistic_mixture_nll", ("params",), (torch.uint8,), False, levels=True
    ),
}


def _check_learned(where: str, name: str, value: Any, like_name: str, like: Tensor) -> None:
    """`value` is a 0-dim parameter; beside half tensors it may be float32, which is what autocast makes of a model."""
    if not isinstance(value, Tensor):
        raise TypeError(f"fastvae.{where}: `{name}` must be a Tensor, got {type(value).__name__}")
    autocast = value.dtype == torch.float32 and like.dtype in (torch.float16, torch.bfloat16)
    if value.dtype != like.dtype and not autocast:
        raise TypeError(
            f"fastvae.{where}: `{name}` must be {_name(like.dtype)} as `{like_name}`, got {_name(value.dtype)}; "
            f"did you mean {name}.to({like_name}.dtype)?"
        )
    if value.device != like.device:
        raise ValueError(_device_message(where, name, value, like_name, like))
    if value.dim() != 0:
        raise ValueError(
            f"fastvae.{where}: `{name}` must be 0-dimensional or have the shape of `{like_name}` "
            f"{tuple(like.shape)}, got {tuple(value.shape)}"
        )


def _check_nll(
    where: str,
    names: Sequence[str],
    row: _Row,
    params: Sequence[Any],
    target: Any,
    name: str,
    constants: Sequence[float],
) -> None:
    """`names` are those of `params`, `name` that of `target`, as the user knows them."""
    first = params[0]
    _check_floating(where, names[0], first)
    for i in range(1, len(params)):
        check = _check_learned if row.scalar and i == len(params) - 1 else _check_like
        check(where, names[i], params[i], names[0], first)

    if not isinstance(target, Tensor):
        raise TypeError(f"fastvae.{where}: `{name}` must be a Tensor, got {type(target).__name__}")
    if row.levels:
        _check_levels(where, names[0], first, name, target, constants)
        return
    dtype = target.dtype
    if dtype != first.dtype and dtype != torch.float32 and dtype not in row.integers:
        accepted = _list((first.dtype, torch.float32, *row.integers))
        raise TypeError(
            f"fastvae.{where}: `{name}` must be {accepted} for a {_name(first.dtype)} `{names[0]}`, "
            f"got {_name(dtype)}; did you mean {name}.to({names[0]}.dtype)?"
        )
    if target.device != first.device:
        raise ValueError(_device_message(where, name, target, names[0], first))
    if row.packed:
        _check_head(where, names[0], first, name, target)
    elif target.shape != first.shape:
        raise ValueError(_shape_message(where, name, target, names[0], first, tuple(first.shape)))
    if target.requires_grad and not row.differentiates_target and torch.is_grad_enabled():
        raise ValueError(
            f"fastvae.{where}: `{name}` requires a gradient, which this likelihood does not give; "
            f"pass {name}.detach(), or differentiate fastvae.reference.{row.function}"
        )


def _check_head(where: str, name: str, params: Tensor, target_name: str, target: Tensor) -> None:
    if params.dim() < 2 or params.shape[1] % 2 != 0:
        raise ValueError(
            f"fastvae.{where}: `{name}` must have shape (B, 2C, ...), mean and log-variance packed along dimension 1, "
            f"got {tuple(params.shape)}"
        )
    expected = (params.shape[0], params.shape[1] // 2, *params.shape[2:])
    if target.shape != expected:
        raise ValueError(_shape_message(where, target_name, target, name, params, tuple(expected)))


def _check_levels(
    where: str, name: str, params: Tensor, target_name: str, target: Tensor, constants: Sequence[float]
) -> None:
    """The target of a discretised likelihood and the channels that the decoder must have for it."""
    if target.dtype != torch.uint8:
        raise TypeError(
            f"fastvae.{where}: `{target_name}` must be uint8, the levels of the data as they are, got "
            f"{_name(target.dtype)}; did you mean ({target_name} * 255).round().to(torch.uint8)?"
        )
    if target.device != params.device:
        raise ValueError(_device_message(where, target_name, target, name, params))
    components = int(constants[0]) if len(constants) == 4 else None
    if target.dim() < 2 or (components is not None and target.shape[1] not in (1, 3)):
        wanted = "(B, C, ...)" if components is None else "(B, 3, ...) or (B, 1, ...)"
        raise ValueError(
            f"fastvae.{where}: `{target_name}` must have shape {wanted}, got {tuple(target.shape)}"
        )
    channels = target.shape[1]
    planes = 2 * channels if components is None else _planes(components, channels)
    expected = (target.shape[0], planes, *target.shape[2:])
    if params.shape != expected:
        what = "mean and log-scale" if components is None else f"{components} components"
        raise ValueError(
            f"fastvae.{where}: `{name}` must have shape {tuple(expected)}, {what} for `{target_name}` "
            f"{tuple(target.shape)}, got {tuple(params.shape)}"
        )


def _planes(components: int, channels: int) -> int:
    """Of a mixture's decoder: logits, means and log-scales, and of three channels as many coefficients."""
    return components * (10 if channels == 3 else 3)


def _check_kl(where: str, kl: Any, like_name: str, like: Tensor) -> None:
    if not isinstance(kl, Tensor):
        raise TypeError(f"fastvae.{where}: `kl` must be a Tensor, got {type(kl).__name__}")
    if kl.dtype not in _FLOATS:
        raise TypeError(f"fastvae.{where}: `kl` must be {_list(_FLOATS)}, got {_name(kl.dtype)}")
    if kl.dim() != 1 or kl.shape[0] != like.shape[0]:
        raise ValueError(
            f"fastvae.{where}: `kl` must have one value per row of `{like_name}`, shape ({like.shape[0]},), "
            f"got {tuple(kl.shape)}"
        )
    if kl.device != like.device:
        raise ValueError(_device_message(where, "kl", kl, like_name, like))


# ---------------------------------------------------------------------------------------------------------------------
# The posterior
# ---------------------------------------------------------------------------------------------------------------------


def reparameterize_kl(
    mu: Tensor,
    logvar: Tensor,
    prior_mu: Tensor | None = None,
    prior_logvar: Tensor | None = None,
    *,
    samples: int | None = None,
    generator: torch.Generator | None = None,
    seed: Tensor | None = None,
    row_offset: int = 0,
    eps: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Draw z from the posterior N(mu, e^logvar) and give its KL from the prior, in one pass.

    z = mu + e^(logvar / 2) eps (Kingma and Welling 2014, section 2.4); the KL is that of `gaussian_kl`. The noise is
    never stored: the backward pass makes it again.

    Args:
        mu, logvar: (B, ...), one floating dtype. Both halves of a `chunk(2, dim=1)` are read in place.
        prior_mu, prior_logvar: like `mu`, together; without them the prior is N(0, 1).
        samples: None gives z the shape of `mu`; K gives (K, B, ...), K independent draws. There is one KL either way.
        generator: draws the seed from this torch.Generator (on mu's device) and not from torch's default one. It cannot
            be traced by torch.compile.
        seed: (seed, offset), int64 (2,), on mu's device: the same integers of noise on every device and backend.
            Excludes `generator`.
        row_offset: the place of row 0 in the noise, so that a piece of a batch gets its rows of the batch's noise.
        eps: noise to use, of mu's dtype and z's shape. Excludes `seed` and `generator`.

    Returns:
        (z, kl): z of mu's dtype; kl (B,) in nats, float32 (float64 for float64).

    Raises:
        TypeError: a dtype or kind that does not fit, or half a prior.
        ValueError: a shape, device or value that does not fit, or two sources of noise.
    """
    where = "reparameterize_kl"
    _check_posterior(where, mu, logvar, prior_mu, prior_logvar)
    if samples is not None:
        if not isinstance(samples, int):
            raise TypeError(
                f"fastvae.{where}: `samples` must be an int or None, got {type(samples).__name__}"
            )
        if samples < 1:
            raise ValueError(f"fastvae.{where}: `samples` must be at least 1, got {samples}")
    if not isinstance(row_offset, int):
        raise TypeError(f"fastvae.{where}: `row_offset` must be an int, got {type(row_offset).__name__}")
    if row_offset < 0:
        raise ValueError(f"fastvae.{where}: `row_offset` must be at least 0, got {row_offset}")
    if eps is not None:
        if seed is not None or generator is not None:
            raise ValueError(
                f"fastvae.{where}: `eps` is the noise itself; it excludes `{'generator' if seed is None else 'seed'}`"
            )
        _check_eps(where, eps, mu, samples)
    elif seed is not None:
        if generator is not None:
            raise ValueError(f"fastvae.{where}: `seed` and `generator` exclude each other, got both")
        _check_seed(where, seed, mu)
    elif generator is not None:
        _check_generator(where, generator, mu)

    if eps is None and seed is None and torch.compiler.is_compiling():
        if generator is not None:
            raise RuntimeError(
                f"fastvae.{where}: `generator` cannot be traced by torch.compile; pass `seed`, or use torch.manual_seed"
            )
        # Two draws inside the ops would look identical to the compiler, and it would merge them. randint it knows to
        # be random.
        seed = draw_seed(mu.device)
    return backend.choose(mu).reparameterize_kl(
        mu, logvar, prior_mu, prior_logvar, samples, seed, row_offset, eps, generator
    )


def gaussian_kl(
    mu: Tensor,
    logvar: Tensor,
    prior_mu: Tensor | None = None,
    prior_logvar: Tensor | None = None,
    *,
    reduction: str = "event",
) -> Tensor:
    """KL divergence of the diagonal Gaussian N(mu, e^logvar) from the prior, in nats.

    Per element 1/2 [ (mu - prior_mu)^2 e^-prior_logvar + e^v - 1 - v ] with v = logvar - prior_logvar (Kingma and
    Welling 2014, appendix B, for the standard normal prior; Rasmussen and Williams 2006, equation A.23, for any).
    Computed so that a posterior close to its prior keeps its digits.

    Args:
        mu, logvar: (B, ...), one floating dtype.
        prior_mu, prior_logvar: like `mu`, together; without them the prior is N(0, 1).
        reduction: `"event"` sums every row to (B,); `"none"` keeps the elements, for free bits or the KL per dimension.

    Returns:
        (B,), or the shape of `mu`; float32 (float64 for float64).

    Raises:
        TypeError: a dtype or kind that does not fit, or half a prior.
        ValueError: a shape or device that does not fit, or an unknown reduction.
    """
    _check_posterior("gaussian_kl", mu, logvar, prior_mu, prior_logvar)
    _check_choice("gaussian_kl", "reduction", reduction, ("event", "none"))
    return backend.choose(mu).gaussian_kl(mu, logvar, prior_mu, prior_logvar, reduction == "none")


# ---------------------------------------------------------------------------------------------------------------------
# The likelihoods
# ---------------------------------------------------------------------------------------------------------------------


def _nll(
    likelihood: str,
    params: Sequence[Tensor],
    target: Tensor,
    constants: Sequence[float] = (),
    kl: Tensor | None = None,
    beta: Tensor | None = None,
    reduction: int = REDUCTIONS["none"],
    *,
    caller: str | None = None,
) -> tuple[Tensor, Tensor]:
    """(loss, nll): nll (B,) of a likelihood's row, loss = reduce(nll + beta kl); one call of the backend for all of it.

    `reduction` is a value of `REDUCTIONS`. With a `caller` ("ELBO"), messages name it and its arguments, `recon` and
    `x`, in place of the likelihood's function and its.
    """
    row = _ROWS[likelihood]
    if caller is None:
        where, names, name = row.function, row.params, "target"
    else:
        where, names, name = caller, ("recon", *row.params[1:]), "x"
    _check_nll(where, names, row, params, target, name, constants)
    first = params[0]
    if kl is not None:
        _check_kl(where, kl, names[0], first)
        # A KL of the user's own may be half; sums are never kept in half.
        if kl.dtype not in (torch.float32, torch.float64):
            kl = kl.float()
        # As torch does with 0-dim operands: a beta left on the CPU, or cast along with a model, still serves.
        if beta is not None and (beta.device != first.device or beta.dtype != torch.float32):
            beta = beta.to(first.device, torch.float32)
    return backend.choose(first).nll(likelihood, params, target, constants, kl, beta, reduction)


def bernoulli_nll(logits: Tensor, target: Tensor) -> Tensor:
    """-log Bernoulli(target | sigmoid(logits)) of every row, in nats.

    Per element max(a, 0) - a t + log(1 + e^-|a|) for logit a and target t (Kingma and Welling 2014, appendix C.1).
    Grey targets, strictly between 0 and 1, give the cross-entropy, which is not normalised: no bits per dimension.

    Args:
        logits: (B, ...), before the sigmoid.
        target: the shape of `logits`, in [0, 1]: floating, bool, or uint8 read as x / 255. It must not require a
            gradient.

    Returns:
        (B,), float32 (float64 for float64 logits).

    Raises:
        TypeError: a dtype or kind that does not fit.
        ValueError: a shape or device that does not fit, or a target that requires a gradient.
    """
    return _nll("bernoulli", [logits], target, [])[0]


def gaussian_nll(mean: Tensor, target: Tensor, logvar: Tensor | None = None, *, scale: float = 1.0) -> Tensor:
    """-log N(target | mean, variance) of every row, in nats, with the constant 1/2 log 2 pi of each element.

    Per element 1/2 [ log 2 pi + log s^2 + (x - m)^2 / s^2 ] (Kingma and Welling 2014, appendix C.2).

    Args:
        mean: (B, ...).
        target: the shape of `mean`: floating, or uint8 read as x / 255. Its gradient is given where it requires one.
        logvar: the log-variance log s^2: the shape of `mean` (per element), or 0-dimensional (one learned variance).
        scale: the standard deviation s where there is no `logvar`; a positive number.

    Returns:
        (B,), float32 (float64 for a float64 mean).

    Raises:
        TypeError: a dtype or kind that does not fit (a learned scale is a `logvar`).
        ValueError: a shape, device or scale that does not fit, or both `logvar` and `scale`.
    """
    if isinstance(scale, Tensor):
        raise TypeError(
            "fastvae.gaussian_nll: `scale` must be a float, got Tensor; pass a variance that is a tensor as "
            "`logvar` = 2 * scale.log()"
        )
    scale = _checked_scale("gaussian_nll", scale)
    if logvar is None:
        return _nll("gaussian", [mean], target, [scale])[0]
    if scale != 1.0:
        raise ValueError(
            f"fastvae.gaussian_nll: `logvar` and `scale` exclude each other, got `scale` {scale}"
        )
    learned = isinstance(logvar, Tensor) and isinstance(mean, Tensor) and logvar.shape != mean.shape
    return _nll("gaussian_learned" if learned else "gaussian_per_element", [mean, logvar], target, [])[0]


def _checked_scale(where: str, scale: Any) -> float:
    try:
        value = float(scale)
    except (TypeError, ValueError) as error:
        raise TypeError(f"fastvae.{where}: `scale` must be a float, got {scale!r}") from error
    if not 0.0 < value < math.inf:
        raise ValueError(f"fastvae.{where}: `scale` must be positive and finite, got {value}")
    return value


def gaussian_head_nll(params: Tensor, target: Tensor) -> Tensor:
    """`gaussian_nll` with mean and log-variance packed in one tensor, whose gradient comes packed too.

    Args:
        params: (B, 2C, ...): the C channels of the mean, then the C channels of the log-variance.
        target: (B, C, ...): floating, or uint8 read as x / 255. Its gradient is given where it requires one.

    Returns:
        (B,) in nats, float32 (float64 for float64 params).

    Raises:
        TypeError: a dtype or kind that does not fit.
        ValueError: a shape or device that does not fit.
    """
    return _nll("gaussian_head", [params], target, [])[0]


def discretized_logistic_nll(
    params: Tensor,
    target: Tensor,
    *,
    bits: int = 8,
    log_scale_floor: float = -7.0,
    small_mass: float = 1e-5,
    validate: bool = False,
) -> Tensor:
    """-log P(target | params) of every row under discretised logistics, in nats: a true likelihood of bytes.

    Data of 2^`bits` levels are scaled to x in [-1, 1]; a level has the mass that a logistic puts into its bin, which
    reaches half way to its neighbours and, at both ends, to infinity (Salimans et al. 2017, equation 2; Kingma et al.
    2016). As in the code of PixelCNN++, a mass below `small_mass` is that of the density in the middle of the bin, so
    that its logarithm and gradient stay finite.

    Args:
        params: (B, 2C, ...): the C channels of the mean, in units of x, then the C channels of the log-scale.
        target: uint8 (B, C, ...), the levels 0, ..., 2^bits - 1 as they are. Higher ones count as the highest.
        bits: 1 to 8.
        log_scale_floor: log-scales below it count as it, and get no gradient; between -60 and 60.
        small_mass: at least 0 and below 1; with 0 every mass is that of its bin, and the masses of all levels sum to
            1 exactly.
        validate: look for levels above the highest, and raise. It reads the target once more, and waits for a GPU.

    Returns:
        (B,), float32 (float64 for float64 params).

    Raises:
        TypeError: a dtype or kind that does not fit.
        ValueError: a shape, device or number that does not fit; with `validate`, a level out of range.
    """
    where = "discretized_logistic_nll"
    constants = _logistic_constants(where, bits, log_scale_floor, small_mass)
    if validate:
        _check_range(where, "target", target, bits)
    return _nll("discretized_logistic", [params], target, constants)[0]


def discretized_logistic_mixture_nll(
    params: Tensor,
    target: Tensor,
    *,
    components: int,
    bits: int = 8,
    log_scale_floor: float = -7.0,
    small_mass: float = 1e-5,
    validate: bool = False,
) -> Tensor:
    """-log P(target | params) of every row under mixtures of discretised logistics, in nats: PixelCNN++'s likelihood.

    A pixel has one component for all its channels, -log sum_k pi_k prod_c P(channel c | k), with the masses of
    `discretized_logistic_nll`. Of three channels, red green blue, the mean of green is m_g + a r and that of blue
    m_b + b r + c g, r and g being the pixel's own (Salimans et al. 2017, equation 3).

    Args:
        params: (B, 10K, ...) for three channels, in the order of PixelCNN++'s code (and NVAE's and VDVAE's): K logits;
            for each channel in turn K means, K log-scales, and K numbers whose tanh are a (in red's place), b (in
            green's) and c (in blue's). (B, 3K, ...) for one channel: K logits, K means, K log-scales.
        target: uint8 (B, 3, ...) or (B, 1, ...), as there.
        components: K, at least 1.
        bits, log_scale_floor, small_mass, validate: as there.

    Returns:
        (B,), float32 (float64 for float64 params).

    Raises:
        TypeError: a dtype or kind that does not fit.
        ValueError: a shape, device or number that does not fit; with `validate`, a level out of range.
    """
    where = "discretized_logistic_mixture_nll"
    constants = [
        _whole(where, "components", components, 1, None),
        *_logistic_constants(where, bits, log_scale_floor, small_mass),
    ]
    if validate:
        _check_range(where, "target", target, bits)
    return _nll("discretized_logistic_mixture", [params], target, constants)[0]


def _whole(where: str, name: str, value: Any, least: int, most: int | None) -> int:
    """`value`, an int between the two."""
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"fastvae.{where}: `{name}` must be an int, got {value!r}")
    if value < least or (most is not None and value > most):
        bounds = f"at least {least}" if most is None else f"from {least} to {most}"
        raise ValueError(f"fastvae.{where}: `{name}` must be {bounds}, got {value}")
    return value


def _logistic_constants(where: str, bits: Any, log_scale_floor: Any, small_mass: Any) -> list[float]:
    _whole(where, "bits", bits, 1, 8)
    for name, value in (("log_scale_floor", log_scale_floor), ("small_mass", small_mass)):
        if not isinstance(value, (int, float)) or isinstance(value, bool):
            raise TypeError(f"fastvae.{where}: `{name}` must be a float, got {value!r}")
    if not -60 <= log_scale_floor <= 60:
        raise ValueError(
            f"fastvae.{where}: `log_scale_floor` must be between -60 and 60, got {log_scale_floor}"
        )
    if not 0 <= small_mass < 1:
        raise ValueError(f"fastvae.{where}: `small_mass` must be at least 0 and below 1, got {small_mass}")
    # Whole numbers stay int: torch.compile takes a module's ints for constants, and its floats for inputs.
    return [bits, float(log_scale_floor), float(small_mass)]


def _check_range(where: str, name: str, target: Any, bits: int) -> None:
    if isinstance(target, Tensor) and target.dtype == torch.uint8 and target.numel() > 0:
        highest = int(target.max())
        if highest >= 2**bits:
            raise ValueError(
                f"fastvae.{where}: `{name}` must have levels from 0 to {2**bits - 1} with `bits` {bits}, got {highest}"
            )
