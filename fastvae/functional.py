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
| target of a categorical                  | int64 and nothing else                                                    |
| target of counts                         | that of the parameters, float32, uint8 (as it is), uint16, int32, int64   |
| (G,) dispersion, library                 | that of the parameters; beside half types float32 too                     |
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
from .reference import REDUCTIONS, bounded_logvar, draw_seed

__all__ = [
    "bernoulli_nll",
    "categorical_nll",
    "continuous_bernoulli_nll",
    "discretized_logistic_mixture_nll",
    "discretized_logistic_nll",
    "gaussian_head_nll",
    "gaussian_kl",
    "gaussian_nll",
    "laplace_head_nll",
    "laplace_nll",
    "negative_binomial_logits_nll",
    "negative_binomial_nll",
    "poisson_nll",
    "reparameterize_kl",
    "student_t_head_nll",
    "student_t_nll",
    "zero_inflated_negative_binomial_logits_nll",
    "zero_inflated_negative_binomial_nll",
]

# ---------------------------------------------------------------------------------------------------------------------
# Checks. They run in every call that `backend.plain` leaves to them: comparisons, and no work for the message until one
# fails.
# ---------------------------------------------------------------------------------------------------------------------

_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _list(dtypes: Sequence[torch.dtype]) -> str:
    names = [_name(dtype) for dtype in dict.fromkeys(dtypes)]
    return " or ".join(filter(None, (", ".join(names[:-1]), names[-1])))


def _is_dense(value: Tensor) -> bool:
    return value.layout == torch.strided and not value.is_nested


def _layout_message(where: str, name: str, value: Tensor) -> str:
    if value.is_nested:
        return f"fastvae.{where}: `{name}` must be dense, got a nested tensor"
    return f"fastvae.{where}: `{name}` must be dense, got {value.layout}; did you mean {name}.to_dense()?"


def _check_floating(where: str, name: str, value: Any) -> None:
    """`value` is a dense floating tensor with a batch dimension."""
    if not isinstance(value, Tensor):
        raise TypeError(f"fastvae.{where}: `{name}` must be a Tensor, got {type(value).__name__}")
    if not _is_dense(value):
        raise TypeError(_layout_message(where, name, value))
    if value.dtype not in _FLOATS:
        raise TypeError(f"fastvae.{where}: `{name}` must be {_list(_FLOATS)}, got {_name(value.dtype)}")
    if value.dim() == 0:
        raise ValueError(
            f"fastvae.{where}: `{name}` must have a batch dimension, got a 0-dimensional tensor; "
            f"did you mean {name}.unsqueeze(0)?"
        )


def _widened(value: Tensor, like: Tensor) -> bool:
    """Whether `value` is float32 beside a half `like`, as autocast makes of a model with a float32 layer."""
    return value.dtype == torch.float32 and like.dtype in (torch.float16, torch.bfloat16)


def _check_like(where: str, name: str, value: Any, like_name: str, like: Tensor) -> None:
    """`value` is a dense tensor of the dtype, device and shape of `like`."""
    if not isinstance(value, Tensor):
        raise TypeError(f"fastvae.{where}: `{name}` must be a Tensor, got {type(value).__name__}")
    if not _is_dense(value):
        raise TypeError(_layout_message(where, name, value))
    if value.dtype != like.dtype:
        # The digits are kept by widening the other. Noise has none to keep.
        hint = (
            f"{like_name}.float()"
            if _widened(value, like) and name != "eps"
            else f"{name}.to({like_name}.dtype)"
        )
        raise TypeError(
            f"fastvae.{where}: `{name}` must be {_name(like.dtype)} as `{like_name}`, got {_name(value.dtype)}; "
            f"did you mean {hint}?"
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
    if not _is_dense(seed):
        raise TypeError(_layout_message(where, "seed", seed))
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
    classes: bool = (
        False  # the first has a further dimension, last: the logits of the classes; the target names one
    )
    halves: str = "mean and log-variance"  # of a packed one
    genes: bool = False  # (B, G) counts: see _check_genes
    levels: bool = (
        False  # the target is uint8 and means what it says; `_check_levels` knows the channels of the first
    )


_COUNTS = (torch.uint8, torch.uint16, torch.int32, torch.int64)  # integers that a target of counts may be


_ROWS = {
    "bernoulli": _Row("bernoulli_nll", ("logits",), (torch.uint8, torch.bool), False),
    "gaussian": _Row("gaussian_nll", ("mean",), (torch.uint8,), True),
    "gaussian_learned": _Row("gaussian_nll", ("mean", "logvar"), (torch.uint8,), True, scalar=True),
    "gaussian_per_element": _Row("gaussian_nll", ("mean", "logvar"), (torch.uint8,), True),
    "gaussian_head": _Row("gaussian_head_nll", ("params",), (torch.uint8,), True, packed=True),
    "gaussian_bounded_per_element": _Row("gaussian_nll", ("mean", "logvar"), (torch.uint8,), True),
    "gaussian_bounded_head": _Row("gaussian_head_nll", ("params",), (torch.uint8,), True, packed=True),
    "laplace": _Row("laplace_nll", ("loc",), (torch.uint8,), True),
    "laplace_learned": _Row("laplace_nll", ("loc", "log_scale"), (torch.uint8,), True, scalar=True),
    "laplace_per_element": _Row("laplace_nll", ("loc", "log_scale"), (torch.uint8,), True),
    "laplace_head": _Row(
        "laplace_head_nll", ("params",), (torch.uint8,), True, packed=True, halves="location and log-scale"
    ),
    "continuous_bernoulli": _Row("continuous_bernoulli_nll", ("logits",), (torch.uint8,), False),
    "poisson": _Row("poisson_nll", ("log_rate",), _COUNTS, False),
    "student_t": _Row("student_t_nll", ("loc",), (torch.uint8,), True),
    "student_t_learned": _Row("student_t_nll", ("loc", "log_scale"), (torch.uint8,), True, scalar=True),
    "student_t_per_element": _Row("student_t_nll", ("loc", "log_scale"), (torch.uint8,), True),
    "student_t_head": _Row(
        "student_t_head_nll", ("params",), (torch.uint8,), True, packed=True, halves="location and log-scale"
    ),
    "categorical": _Row("categorical_nll", ("logits",), (torch.int64,), False, classes=True),
    "negative_binomial": _Row(
        "negative_binomial_nll", ("mean", "inverse_dispersion"), _COUNTS, False, genes=True
    ),
    "zero_inflated_negative_binomial": _Row(
        "zero_inflated_negative_binomial_nll",
        ("mean", "inverse_dispersion", "zi_logits"),
        _COUNTS,
        False,
        genes=True,
    ),
    "negative_binomial_logits": _Row(
        "negative_binomial_logits_nll", ("logits", "log_dispersion", "library"), _COUNTS, False, genes=True
    ),
    "zero_inflated_negative_binomial_logits": _Row(
        "zero_inflated_negative_binomial_logits_nll",
        ("logits", "log_dispersion", "zi_logits", "library"),
        _COUNTS,
        False,
        genes=True,
    ),
    "discretized_logistic": _Row("discretized_logistic_nll", ("params",), (torch.uint8,), False, levels=True),
    "discretized_logistic_mixture": _Row(
        "discretized_logistic_mixture_nll", ("params",), (torch.uint8,), False, levels=True
    ),
}


def _check_learned(where: str, name: str, value: Any, like_name: str, like: Tensor) -> None:
    """`value` is a 0-dim parameter."""
    _check_beside(where, name, value, like_name, like)
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
    if isinstance(target, Tensor) and not _is_dense(target):
        raise TypeError(_layout_message(where, name, target))
    if row.classes:
        _check_classes(where, names[0], first, name, target)
        return
    if row.levels:
        _check_levels(where, names[0], first, name, target, constants)
        return
    _check_target(where, names, row, first, target, name)
    if row.packed:
        _check_head(where, names[0], first, row.halves, name, target)
    elif target.shape != first.shape:
        raise ValueError(_shape_message(where, name, target, names[0], first, tuple(first.shape)))


def _check_target(where: str, names: Sequence[str], row: _Row, first: Tensor, target: Any, name: str) -> None:
    if not isinstance(target, Tensor):
        raise TypeError(f"fastvae.{where}: `{name}` must be a Tensor, got {type(target).__name__}")
    dtype = target.dtype
    if dtype != first.dtype and dtype != torch.float32 and dtype not in row.integers:
        accepted = _list((first.dtype, torch.float32, *row.integers))
        raise TypeError(
            f"fastvae.{where}: `{name}` must be {accepted} for a {_name(first.dtype)} `{names[0]}`, "
            f"got {_name(dtype)}; did you mean {name}.to({names[0]}.dtype)?"
        )
    if target.device != first.device:
        raise ValueError(_device_message(where, name, target, names[0], first))
    if target.requires_grad and not row.differentiates_target and torch.is_grad_enabled():
        raise ValueError(
            f"fastvae.{where}: `{name}` requires a gradient, which this likelihood does not give; "
            f"pass {name}.detach(), or differentiate fastvae.reference.{row.function}"
        )


def _check_head(where: str, name: str, params: Tensor, halves: str, target_name: str, target: Tensor) -> None:
    if params.dim() < 2 or params.shape[1] % 2 != 0:
        raise ValueError(
            f"fastvae.{where}: `{name}` must have shape (B, 2C, ...), {halves} packed along dimension 1, "
            f"got {tuple(params.shape)}"
        )
    expected = (params.shape[0], params.shape[1] // 2, *params.shape[2:])
    if target.shape != expected:
        raise ValueError(_shape_message(where, target_name, target, name, params, tuple(expected)))


def _check_classes(where: str, name: str, logits: Tensor, target_name: str, target: Any) -> None:
    if not isinstance(target, Tensor):
        raise TypeError(f"fastvae.{where}: `{target_name}` must be a Tensor, got {type(target).__name__}")
    if target.dtype != torch.int64:
        raise TypeError(
            f"fastvae.{where}: `{target_name}` must be int64, the classes' numbers, got {_name(target.dtype)}; "
            f"did you mean {target_name}.long()?"
        )
    if target.device != logits.device:
        raise ValueError(_device_message(where, target_name, target, name, logits))
    shape, found = tuple(logits.shape), tuple(target.shape)
    if len(shape) < 2 or shape[-1] < 1:
        raise ValueError(
            f"fastvae.{where}: `{name}` must have shape (B, ..., V), one logit for each of V classes last, got {shape}"
        )
    if found != shape[:-1]:
        hint = ""
        if len(shape) > 2 and found == (shape[0], *shape[2:]):
            hint = f"; the classes come last here: did you mean {name}.movedim(1, -1)?"
        raise ValueError(
            f"fastvae.{where}: `{target_name}` must have the shape {shape[:-1]} for `{name}` {shape}, got {found}{hint}"
        )


def _check_class_numbers(where: str, name: str, target: Tensor, classes: int, ignore_index: int) -> None:
    """That every class exists. Only where looking waits for nothing: on a GPU it is left to the kernel."""
    if type(target) is not Tensor or target.device.type != "cpu" or target.numel() == 0 or not _has_values():
        return
    low, high = torch.aminmax(target)
    if int(low) >= 0 and int(high) < classes:
        return
    wrong = target[(target != ignore_index) & ((target < 0) | (target >= classes))]
    if wrong.numel() > 0:
        raise ValueError(
            f"fastvae.{where}: `{name}` must be from 0 to {classes - 1}, or {ignore_index} (ignore_index), "
            f"got {wrong[0].item()}"
        )


def _has_values() -> bool:
    """Not in a trace or a transform, where tensors cannot be looked at."""
    return (
        not torch.compiler.is_compiling()
        and torch._C._len_torch_dispatch_stack() == 0
        and backend._transform_level() is None
    )


def _check_genes(
    where: str, names: Sequence[str], row: _Row, params: Sequence[Any], target: Any, name: str
) -> tuple[Tensor, ...]:
    """Parameters of (B, G) counts. The dispersion may be (G,), one for every gene; `library` is (B,) or (B, 1), and
    (B,) where it is returned."""
    first = params[0]
    _check_floating(where, names[0], first)
    if first.dim() != 2:
        raise ValueError(
            f"fastvae.{where}: `{names[0]}` must have shape (B, G), cells and genes, got {tuple(first.shape)}"
        )
    rows, genes = first.shape
    checked = [first]
    for argument, label, value in zip(row.params[1:], names[1:], params[1:], strict=True):
        if argument == "library":
            _check_beside(where, label, value, names[0], first)
            if value.shape not in ((rows,), (rows, 1)):
                raise ValueError(
                    f"fastvae.{where}: `{label}` must have one value per row of `{names[0]}`, shape ({rows},) or "
                    f"({rows}, 1), got {tuple(value.shape)}"
                )
            value = value.reshape(rows)
        elif argument.endswith("dispersion") and isinstance(value, Tensor) and value.dim() == 1:
            _check_beside(where, label, value, names[0], first)
            if value.shape[0] != genes:
                raise ValueError(
                    f"fastvae.{where}: `{label}` must have the shape ({genes},), one for every gene of `{names[0]}`, "
                    f"or {tuple(first.shape)}, got {tuple(value.shape)}"
                )
        else:
            _check_like(where, label, value, names[0], first)
        checked.append(value)
    if isinstance(target, Tensor) and target.layout != torch.sparse_csr and not _is_dense(target):
        found = (
            "a nested tensor"
            if target.is_nested
            else f"{target.layout}; did you mean {name}.to_sparse_csr()?"
        )
        raise TypeError(f"fastvae.{where}: `{name}` must be dense or torch.sparse_csr, got {found}")
    _check_target(where, names, row, first, target, name)
    if target.shape != first.shape:
        raise ValueError(_shape_message(where, name, target, names[0], first, tuple(first.shape)))
    return tuple(checked)


def _check_beside(where: str, name: str, value: Any, like_name: str, like: Tensor) -> None:
    """`value` is a dense tensor of the dtype and device of `like`; beside half tensors it may be float32, which is
    what autocast makes of a model."""
    if not isinstance(value, Tensor):
        raise TypeError(f"fastvae.{where}: `{name}` must be a Tensor, got {type(value).__name__}")
    if not _is_dense(value):
        raise TypeError(_layout_message(where, name, value))
    if value.dtype != like.dtype and not _widened(value, like):
        raise TypeError(
            f"fastvae.{where}: `{name}` must be {_name(like.dtype)} as `{like_name}`, got {_name(value.dtype)}; "
            f"did you mean {name}.to({like_name}.dtype)?"
        )
    if value.device != like.device:
        raise ValueError(_device_message(where, name, value, like_name, like))


def _check_levels(
    where: str, name: str, params: Tensor, target_name: str, target: Any, constants: Sequence[float]
) -> None:
    """The target of a discretised likelihood and the channels that the decoder must have for it."""
    if not isinstance(target, Tensor):
        raise TypeError(f"fastvae.{where}: `{target_name}` must be a Tensor, got {type(target).__name__}")
    if target.dtype != torch.uint8:
        scaled = f"({target_name} * {2 ** int(constants[-3]) - 1}).round()"
        levels = scaled if target.is_floating_point() else target_name
        raise TypeError(
            f"fastvae.{where}: `{target_name}` must be uint8, the levels of the data as they are, got "
            f"{_name(target.dtype)}; did you mean {levels}.to(torch.uint8)?"
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
    if not _is_dense(kl):
        raise TypeError(_layout_message(where, "kl", kl))
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
    if backend.plain is not None and not torch.compiler.is_compiling():
        usual = prior_mu is None and prior_logvar is None and samples is None
        usual = usual and generator is None and seed is None and eps is None
        if usual and type(row_offset) is int and row_offset == 0:
            result = backend.plain.reparameterize_kl(mu, logvar)
            if result is not None:
                return result
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
    if not 0 <= row_offset < 2**63:
        raise ValueError(f"fastvae.{where}: `row_offset` must be at least 0 and below 2^63, got {row_offset}")
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
    usual = prior_mu is None and prior_logvar is None and reduction in ("event", "none")
    if usual and backend.plain is not None and not torch.compiler.is_compiling():
        result = backend.plain.gaussian_kl(mu, logvar, reduction == "none")
        if result is not None:
            return result
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
    if backend.plain is not None and not torch.compiler.is_compiling():
        result = backend.plain.nll(likelihood, params, target, constants, kl, beta, reduction)
        if result is not None:
            return result
    if caller is None:
        where, names, name = row.function, row.params, "target"
    else:
        where, names, name = caller, ("recon", *row.params[1:]), "x"
    if row.genes:
        params = _check_genes(where, names, row, params, target, name)
    else:
        _check_nll(where, names, row, params, target, name, constants)
    first = params[0]
    if row.classes:
        _check_class_numbers(where, name, target, first.shape[-1], int(constants[0]))
    if kl is not None:
        _check_kl(where, kl, names[0], first)
        # A KL of the user's own may be half; sums are never kept in half.
        if kl.dtype not in (torch.float32, torch.float64):
            kl = kl.float()
        # As torch does with 0-dim operands: a beta left on the CPU, or cast along with a model, still serves.
        if beta is not None and (beta.device != first.device or beta.dtype != torch.float32):
            beta = beta.to(first.device, torch.float32)
    chosen = backend.choose(first, likelihood)
    if target.layout == torch.sparse_csr and chosen.name != "reference":
        # Ops take no sparse tensors: its positions travel behind the parameters.
        positions = (target.crow_indices().long(), target.col_indices().long())
        params, target = (*params, *positions), target.values()
    return chosen.nll(likelihood, params, target, constants, kl, beta, reduction)


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


def gaussian_nll(
    mean: Tensor,
    target: Tensor,
    logvar: Tensor | None = None,
    *,
    scale: float = 1.0,
    logvar_bounds: tuple[float, float] | None = None,
) -> Tensor:
    """-log N(target | mean, variance) of every row, in nats, with the constant 1/2 log 2 pi of each element.

    Per element 1/2 [ log 2 pi + log s^2 + (x - m)^2 / s^2 ] (Kingma and Welling 2014, appendix C.2).

    Args:
        mean: (B, ...).
        target: the shape of `mean`: floating, or uint8 read as x / 255. Its gradient is given where it requires one.
        logvar: the log-variance log s^2: the shape of `mean` (per element), or 0-dimensional (one learned variance).
        scale: the standard deviation s where there is no `logvar`; a positive number.
        logvar_bounds: (lo, hi): log s^2 is not `logvar` v but mid + half tanh((v - mid) / half), mid = (lo + hi) / 2,
            half = (hi - lo) / 2. Where a model fits some data exactly, flat parts of an image, the best variance is
            0 and the loss has no lower end; this smooth clamp gives it one. In the middle it is v, and it has a
            gradient outside of the bounds too.

    Returns:
        (B,), float32 (float64 for a float64 mean).

    Raises:
        TypeError: a dtype or kind that does not fit (a learned scale is a `logvar`).
        ValueError: a shape, device, scale or bounds that do not fit, both `logvar` and `scale`, or `logvar_bounds`
            without `logvar`.
    """
    if isinstance(scale, Tensor):
        raise TypeError(
            "fastvae.gaussian_nll: `scale` must be a float, got Tensor; pass a variance that is a tensor as "
            "`logvar` = 2 * scale.log()"
        )
    scale = _checked_scale("gaussian_nll", scale)
    if logvar is None:
        if logvar_bounds is not None:
            raise ValueError(
                f"fastvae.gaussian_nll: `logvar_bounds` bound a `logvar`, which is missing, got {logvar_bounds!r}"
            )
        return _nll("gaussian", [mean], target, [scale])[0]
    if scale != 1.0:
        raise ValueError(
            f"fastvae.gaussian_nll: `logvar` and `scale` exclude each other, got `scale` {scale}"
        )
    learned = isinstance(logvar, Tensor) and isinstance(mean, Tensor) and logvar.shape != mean.shape
    if logvar_bounds is None:
        return _nll("gaussian_learned" if learned else "gaussian_per_element", [mean, logvar], target, [])[0]
    bounds = _checked_bounds("gaussian_nll", logvar_bounds)
    if not learned:
        return _nll("gaussian_bounded_per_element", [mean, logvar], target, list(bounds))[0]
    _check_floating("gaussian_nll", "mean", mean)
    _check_learned("gaussian_nll", "logvar", logvar, "mean", mean)
    return _nll("gaussian_learned", [mean, _bounded(logvar, bounds)], target, [])[0]


def _bounded(logvar: Tensor, bounds: Sequence[float]) -> Tensor:
    """`bounded_logvar` of a tensor that may be half, in float32."""
    return bounded_logvar(logvar if logvar.dtype == torch.float64 else logvar.float(), bounds)


def _checked_bounds(where: str, bounds: Any) -> tuple[float, float]:
    if not isinstance(bounds, (tuple, list)) or len(bounds) != 2:
        kind = ValueError if isinstance(bounds, (tuple, list)) else TypeError
        raise kind(f"fastvae.{where}: `logvar_bounds` must be a pair of floats (lo, hi), got {bounds!r}")
    try:
        lo, hi = float(bounds[0]), float(bounds[1])
    except (TypeError, ValueError) as error:
        raise TypeError(
            f"fastvae.{where}: `logvar_bounds` must be a pair of floats (lo, hi), got {bounds!r}"
        ) from error
    if not -math.inf < lo < hi < math.inf:
        raise ValueError(f"fastvae.{where}: `logvar_bounds` must be finite, lo < hi, got {(lo, hi)}")
    return lo, hi


def _checked_scale(where: str, scale: Any) -> float:
    return _checked_positive(where, "scale", scale)


def _checked_positive(where: str, name: str, number: Any) -> float:
    try:
        value = float(number)
    except (TypeError, ValueError) as error:
        raise TypeError(f"fastvae.{where}: `{name}` must be a float, got {number!r}") from error
    if not 0.0 < value < math.inf:
        raise ValueError(f"fastvae.{where}: `{name}` must be positive and finite, got {value}")
    return value


def gaussian_head_nll(
    params: Tensor, target: Tensor, *, logvar_bounds: tuple[float, float] | None = None
) -> Tensor:
    """`gaussian_nll` with mean and log-variance packed in one tensor, whose gradient comes packed too.

    Args:
        params: (B, 2C, ...): the C channels of the mean, then the C channels of the log-variance.
        target: (B, C, ...): floating, or uint8 read as x / 255. Its gradient is given where it requires one.
        logvar_bounds: (lo, hi): a smooth clamp of the log-variance, mid + half tanh((v - mid) / half), as for
            `gaussian_nll`; it takes no memory.

    Returns:
        (B,) in nats, float32 (float64 for float64 params).

    Raises:
        TypeError: a dtype or kind that does not fit.
        ValueError: a shape, device or bounds that do not fit.
    """
    if logvar_bounds is None:
        return _nll("gaussian_head", [params], target, [])[0]
    bounds = _checked_bounds("gaussian_head_nll", logvar_bounds)
    return _nll("gaussian_bounded_head", [params], target, list(bounds))[0]


def laplace_nll(
    loc: Tensor, target: Tensor, log_scale: Tensor | None = None, *, scale: float = 1.0
) -> Tensor:
    """-log Laplace(target | loc, scale) of every row, in nats: the normalised form of an L1 loss.

    Per element log 2b + |x - m| / b for a scale b. Where x = m the gradient is 0.

    Args:
        loc: (B, ...), the median and mean m.
        target: the shape of `loc`: floating, or uint8 read as x / 255. Its gradient is given where it requires one.
        log_scale: log b: the shape of `loc` (per element), or 0-dimensional (one learned scale).
        scale: b where there is no `log_scale`; a positive number.

    Returns:
        (B,), float32 (float64 for a float64 loc).

    Raises:
        TypeError: a dtype or kind that does not fit (a learned scale is a `log_scale`).
        ValueError: a shape, device or scale that does not fit, or both `log_scale` and `scale`.
    """
    name, params, fixed = _scale_row("laplace", loc, log_scale, scale)
    return _nll(name, params, target, fixed)[0]


def laplace_head_nll(params: Tensor, target: Tensor) -> Tensor:
    """`laplace_nll` with location and log-scale packed in one tensor, whose gradient comes packed too.

    Args:
        params: (B, 2C, ...): the C channels of the location, then the C channels of the log-scale.
        target: (B, C, ...): floating, or uint8 read as x / 255. Its gradient is given where it requires one.

    Returns:
        (B,) in nats, float32 (float64 for float64 params).

    Raises:
        TypeError: a dtype or kind that does not fit.
        ValueError: a shape or device that does not fit.
    """
    return _nll("laplace_head", [params], target)[0]


def student_t_nll(
    loc: Tensor, target: Tensor, log_scale: Tensor | None = None, *, df: float, scale: float = 1.0
) -> Tensor:
    """-log of Student's t with `df` degrees of freedom, of every row, in nats: robust where a Gaussian is not.

    Per element, for z = (x - m) / s and v degrees of freedom: (v + 1)/2 log(1 + z^2 / v) + log s + log B(v/2, 1/2) +
    1/2 log v (Lange, Little and Taylor 1989). An outlier's gradient falls off as 1 / z.

    Args:
        loc: (B, ...), the centre m.
        target: the shape of `loc`: floating, or uint8 read as x / 255. Its gradient is given where it requires one.
        log_scale: log s: the shape of `loc` (per element), or 0-dimensional (one learned scale).
        df: the degrees of freedom v, a positive number: 1 is the Cauchy, and towards infinity it is the Gaussian.
        scale: s where there is no `log_scale`; a positive number.

    Returns:
        (B,), float32 (float64 for a float64 loc).

    Raises:
        TypeError: a dtype or kind that does not fit (a learned scale is a `log_scale`).
        ValueError: a shape, device, df or scale that does not fit, or both `log_scale` and `scale`.
    """
    df = _checked_positive("student_t_nll", "df", df)
    name, params, fixed = _scale_row("student_t", loc, log_scale, scale)
    return _nll(name, params, target, [df, *fixed])[0]


def student_t_head_nll(params: Tensor, target: Tensor, *, df: float) -> Tensor:
    """`student_t_nll` with location and log-scale packed in one tensor, whose gradient comes packed too.

    Args:
        params: (B, 2C, ...): the C channels of the location, then the C channels of the log-scale.
        target: (B, C, ...): floating, or uint8 read as x / 255. Its gradient is given where it requires one.
        df: the degrees of freedom, a positive number.

    Returns:
        (B,) in nats, float32 (float64 for float64 params).

    Raises:
        TypeError: a dtype or kind that does not fit.
        ValueError: a shape, device or df that does not fit.
    """
    return _nll("student_t_head", [params], target, [_checked_positive("student_t_head_nll", "df", df)])[0]


def _scale_row(family: str, loc: Any, log_scale: Any, scale: Any) -> tuple[str, list[Tensor], list[float]]:
    """Which row of a family serves a scale that is fixed, learned or given per element: (name, params, constants)."""
    where = f"{family}_nll"
    if isinstance(scale, Tensor):
        raise TypeError(
            f"fastvae.{where}: `scale` must be a float, got Tensor; pass a scale that is a tensor as "
            "`log_scale` = scale.log()"
        )
    scale = _checked_scale(where, scale)
    if log_scale is None:
        return family, [loc], [scale]
    if scale != 1.0:
        raise ValueError(f"fastvae.{where}: `log_scale` and `scale` exclude each other, got `scale` {scale}")
    learned = isinstance(log_scale, Tensor) and isinstance(loc, Tensor) and log_scale.shape != loc.shape
    return f"{family}_learned" if learned else f"{family}_per_element", [loc, log_scale], []


def continuous_bernoulli_nll(logits: Tensor, target: Tensor) -> Tensor:
    """-log of the continuous Bernoulli of every row, in nats: a density of grey values, which `bernoulli_nll` is not.

    Per element log((e^a - 1) / a) - a t for logit a and target t in [0, 1] (Loaiza-Ganem and Cunningham 2019), which
    is `bernoulli_nll` less the log of its missing normaliser. Exact near a = 0, too. It is a density, and so may be
    negative.

    Args:
        logits: (B, ...), before the sigmoid. The mean is not their sigmoid: see likelihoods.ContinuousBernoulli.
        target: the shape of `logits`, in [0, 1]: floating, or uint8 read as x / 255. It must not require a gradient.

    Returns:
        (B,), float32 (float64 for float64 logits).

    Raises:
        TypeError: a dtype or kind that does not fit.
        ValueError: a shape or device that does not fit, or a target that requires a gradient.
    """
    return _nll("continuous_bernoulli", [logits], target)[0]


def poisson_nll(log_rate: Tensor, target: Tensor, *, validate: bool = False) -> Tensor:
    """-log Poisson(target | e^log_rate) of every row, in nats, with its term log t!.

    Per element e^a - t a + log t! for log-rate a and count t. The three terms of a large count, which cancel, are not
    made: the result is as exact for t = 1e6 as for t = 1.

    Args:
        log_rate: (B, ...), the logarithm of the expected counts.
        target: the shape of `log_rate`: counts, floating or uint8, uint16, int32 or int64, each as it is. It must not
            require a gradient.
        validate: look for counts that are negative, fractional or not finite, which otherwise give meaningless numbers.
            This reads the values, which on a GPU waits for them.

    Returns:
        (B,), float32 (float64 for a float64 log_rate).

    Raises:
        TypeError: a dtype or kind that does not fit.
        ValueError: a shape or device that does not fit, a target that requires a gradient, or with `validate` a count
            that is none.
    """
    if validate:
        _check_nll("poisson_nll", ("log_rate",), _ROWS["poisson"], [log_rate], target, "target", ())
        _check_counts("poisson_nll", "target", target)
    return _nll("poisson", [log_rate], target)[0]


def categorical_nll(logits: Tensor, target: Tensor, *, ignore_index: int = -100) -> Tensor:
    """-log Categorical(target | softmax(logits)) of every row, in nats, summed over its positions.

    Per position log sum_v e^a_v - a_t for logits a and the class t (Bishop 2006, equations 4.104 and 4.108): what
    `F.cross_entropy(..., reduction="sum")` gives, for each row. The classes come last, as a decoder's linear layer
    leaves them: sentences of T tokens are logits (B, T, V) and a target (B, T), one label each is (B, V) and (B,).

    Args:
        logits: (B, ..., V).
        target: (B, ...), int64: the class of each position, 0 to V - 1, or `ignore_index`.
        ignore_index: positions of this target (padding) add nothing and pass no gradient.

    Returns:
        (B,), float32 (float64 for float64 logits).

    Raises:
        TypeError: a dtype or kind that does not fit.
        ValueError: a shape or device that does not fit, or (of tensors on the CPU) a class that there is not.
    """
    return _nll("categorical", [logits], target, [_checked_index("categorical_nll", ignore_index)])[0]


def _checked_index(where: str, index: Any) -> float:
    if not isinstance(index, int) or isinstance(index, bool):
        raise TypeError(f"fastvae.{where}: `ignore_index` must be an int, got {index!r}")
    if abs(index) >= 2**53:  # constants travel as floats
        raise ValueError(f"fastvae.{where}: `ignore_index` must be within ±2^53, got {index}")
    return float(index)


# ---------------------------------------------------------------------------------------------------------------------
# Counts of genes
# ---------------------------------------------------------------------------------------------------------------------


def negative_binomial_nll(
    mean: Tensor, target: Tensor, inverse_dispersion: Tensor, *, validate: bool = False
) -> Tensor:
    """-log NB(target | mean, inverse dispersion) of every row, in nats, as scvi-tools parametrises it.

    Per element, with mean m, inverse dispersion r and count t: lgamma(r) + lgamma(t + 1) - lgamma(t + r)
    - r log(r / (r + m)) - t log(m / (r + m)) (Lopez et al. 2018). The variance is m + m^2 / r. Computed so that r from
    1e-4 to 1e8 and counts to 1e6 keep their digits; zeros cost one logarithm.

    Args:
        mean: (B, G), above 0.
        target: counts (B, G): floating, uint8, uint16, int32 or int64, dense or torch.sparse_csr, which is read as it
            is. It must not require a gradient.
        inverse_dispersion: above 0: (G,), one for every gene, or (B, G).
        validate: look at every value first, and name the first that is no count or leaves its domain.

    Returns:
        (B,), float32 (float64 for a float64 mean).

    Raises:
        TypeError: a dtype or kind that does not fit.
        ValueError: a shape, device or value that does not fit, or a target that requires a gradient.
    """
    return _genes_nll("negative_binomial", (mean, inverse_dispersion), target, validate)


def zero_inflated_negative_binomial_nll(
    mean: Tensor, target: Tensor, inverse_dispersion: Tensor, zi_logits: Tensor, *, validate: bool = False
) -> Tensor:
    """`negative_binomial_nll` of counts that are 0 with probability sigmoid(zi_logits) besides.

    Per element -log( p [t = 0] + (1 - p) NB(t) ), p = sigmoid(zi_logits) (Risso et al. 2018; Lopez et al. 2018).

    Args:
        mean, target, inverse_dispersion, validate: as for `negative_binomial_nll`.
        zi_logits: (B, G), logits of the additional zeros.

    Returns and raises as `negative_binomial_nll` does.
    """
    return _genes_nll(
        "zero_inflated_negative_binomial", (mean, inverse_dispersion, zi_logits), target, validate
    )


def negative_binomial_logits_nll(
    logits: Tensor, target: Tensor, log_dispersion: Tensor, library: Tensor, *, validate: bool = False
) -> Tensor:
    """`negative_binomial_nll` from a decoder's raw outputs, softmax and exponential in the same pass.

    mean = library * softmax(logits) over the genes of a cell, inverse dispersion = e^log_dispersion.

    Args:
        logits: (B, G).
        target, validate: as for `negative_binomial_nll`.
        log_dispersion: (G,) or (B, G).
        library: (B,) or (B, 1), above 0: the expected total of a cell. Its gradient is given where it requires one.

    Returns and raises as `negative_binomial_nll` does.
    """
    return _genes_nll("negative_binomial_logits", (logits, log_dispersion, library), target, validate)


def zero_inflated_negative_binomial_logits_nll(
    logits: Tensor,
    target: Tensor,
    log_dispersion: Tensor,
    zi_logits: Tensor,
    library: Tensor,
    *,
    validate: bool = False,
) -> Tensor:
    """`negative_binomial_logits_nll` of counts that are 0 with probability sigmoid(zi_logits) besides.

    Args:
        logits, target, log_dispersion, library, validate: as for `negative_binomial_logits_nll`.
        zi_logits: (B, G), logits of the additional zeros.

    Returns and raises as `negative_binomial_nll` does.
    """
    params = (logits, log_dispersion, zi_logits, library)
    return _genes_nll("zero_inflated_negative_binomial_logits", params, target, validate)


def _genes_nll(likelihood: str, params: Sequence[Tensor], target: Tensor, validate: bool) -> Tensor:
    if validate:
        row = _ROWS[likelihood]
        _check_genes(row.function, row.params, row, params, target, "target")
        _check_counts(row.function, "target", target)
        for name, value in zip(row.params, params, strict=True):
            if name in ("mean", "inverse_dispersion", "library"):
                _check_values(
                    row.function, name, value, (value > 0) & (value < math.inf), "positive, finite numbers"
                )
            else:
                _check_values(row.function, name, value, value.isfinite(), "finite numbers")
    return _nll(likelihood, params, target)[0]


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
    # The checks of the loss have the words for what is none.
    levels = isinstance(target, Tensor) and target.dtype == torch.uint8 and _is_dense(target)
    if levels and target.numel() > 0:
        highest = int(target.max())
        if highest >= 2**bits:
            raise ValueError(
                f"fastvae.{where}: `{name}` must have levels from 0 to {2**bits - 1} with `bits` {bits}, got {highest}"
            )
