"""Argument checks, which run before any work, and the wording of their messages.

They run in every call that `choose.fast_path` does not handle. They are cheap comparisons; a message is built only when
one of them fails.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .._spec import Variant

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def dtype_names(dtypes: Sequence[torch.dtype]) -> str:
    names = [dtype_name(dtype) for dtype in dict.fromkeys(dtypes)]
    return " or ".join(filter(None, (", ".join(names[:-1]), names[-1])))


def is_dense(value: Tensor) -> bool:
    return value.layout == torch.strided and not value.is_nested


def layout_message(where: str, name: str, value: Tensor) -> str:
    if value.is_nested:
        return f"fastvae.{where}: `{name}` must be dense, got a nested tensor"
    return f"fastvae.{where}: `{name}` must be dense, got {value.layout}; did you mean {name}.to_dense()?"


def device_message(where: str, name: str, value: Tensor, like_name: str, like: Tensor) -> str:
    return (
        f"fastvae.{where}: `{name}` must be on the device of `{like_name}`, {like.device}, got {value.device}; "
        f"did you mean {name}.to({like_name}.device)?"
    )


def shape_message(
    where: str, name: str, value: Tensor, like_name: str, like: Tensor, expected: tuple[int, ...]
) -> str:
    shape = tuple(value.shape)
    # The elements are the same in another arrangement, so the hint says how to rearrange them.
    hint = ""
    if shape[:1] == expected[:1] and math.prod(shape) == math.prod(expected):
        if len(expected) == 2 < len(shape):
            hint = f"; did you mean {name}.flatten(1)?"
        elif len(shape) == 2 < len(expected) and expected == tuple(like.shape):
            hint = f"; did you mean {like_name}.flatten(1)?"
        else:
            hint = f"; did you mean {name}.reshape({expected})?"
    required = f"the shape of `{like_name}` {expected}"
    if expected != tuple(like.shape):
        required = f"the shape {expected} for `{like_name}` {tuple(like.shape)}"
    return f"fastvae.{where}: `{name}` must have {required}, got {shape}{hint}"


def check_choice(where: str, name: str, value: Any, choices: Sequence[str]) -> None:
    if value not in choices:
        raise ValueError(
            f"fastvae.{where}: `{name}` must be one of {', '.join(map(repr, choices))}, got {value!r}"
        )


def checked_positive(where: str, name: str, number: Any) -> float:
    try:
        value = float(number)
    except (TypeError, ValueError) as error:
        raise TypeError(f"fastvae.{where}: `{name}` must be a float, got {number!r}") from error
    if not 0.0 < value < math.inf:
        raise ValueError(f"fastvae.{where}: `{name}` must be positive and finite, got {value}")
    return value


def checked_not_negative(where: str, name: str, number: Any) -> float:
    try:
        value = float(number)
    except (TypeError, ValueError) as error:
        raise TypeError(f"fastvae.{where}: `{name}` must be a float, got {number!r}") from error
    if not 0.0 <= value < math.inf:
        raise ValueError(f"fastvae.{where}: `{name}` must be finite and at least 0, got {value}")
    return value


def checked_scale(where: str, scale: Any) -> float:
    return checked_positive(where, "scale", scale)


def checked_int(where: str, name: str, value: Any, minimum: int, maximum: int | None) -> int:
    """Return `value` if it is an int between the two bounds."""
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"fastvae.{where}: `{name}` must be an int, got {value!r}")
    if value < minimum or (maximum is not None and value > maximum):
        bounds = f"at least {minimum}" if maximum is None else f"from {minimum} to {maximum}"
        raise ValueError(f"fastvae.{where}: `{name}` must be {bounds}, got {value}")
    return value


def check_floating(where: str, name: str, value: Any) -> None:
    """Check that `value` is a dense floating-point tensor with a batch dimension."""
    if not isinstance(value, Tensor):
        raise TypeError(f"fastvae.{where}: `{name}` must be a Tensor, got {type(value).__name__}")
    if not is_dense(value):
        raise TypeError(layout_message(where, name, value))
    if value.dtype not in FLOATS:
        raise TypeError(
            f"fastvae.{where}: `{name}` must be {dtype_names(FLOATS)}, got {dtype_name(value.dtype)}"
        )
    if value.dim() == 0:
        raise ValueError(
            f"fastvae.{where}: `{name}` must have a batch dimension, got a 0-dimensional tensor; "
            f"did you mean {name}.unsqueeze(0)?"
        )


def _is_float32_beside_half(value: Tensor, like: Tensor) -> bool:
    """Whether `value` is float32 and `like` half precision, as under autocast in a model with a float32 layer."""
    return value.dtype == torch.float32 and like.dtype in (torch.float16, torch.bfloat16)


def check_like(where: str, name: str, value: Any, like_name: str, like: Tensor) -> None:
    """Check that `value` is a dense tensor with the dtype, device and shape of `like`."""
    if not isinstance(value, Tensor):
        raise TypeError(f"fastvae.{where}: `{name}` must be a Tensor, got {type(value).__name__}")
    if not is_dense(value):
        raise TypeError(layout_message(where, name, value))
    if value.dtype != like.dtype:
        # Widening the other tensor keeps the precision of this one. Noise has none to keep.
        hint = (
            f"{like_name}.float()"
            if _is_float32_beside_half(value, like) and name != "eps"
            else f"{name}.to({like_name}.dtype)"
        )
        raise TypeError(
            f"fastvae.{where}: `{name}` must be {dtype_name(like.dtype)}, like `{like_name}`, got "
            f"{dtype_name(value.dtype)}; did you mean {hint}?"
        )
    if value.device != like.device:
        raise ValueError(device_message(where, name, value, like_name, like))
    if value.shape != like.shape:
        message = shape_message(where, name, value, like_name, like, tuple(like.shape))
        if "did you mean" not in message and _broadcasts(value, like):
            message += f"; did you mean {name}.expand_as({like_name})?"
        raise ValueError(message)


def _broadcasts(value: Tensor, like: Tensor) -> bool:
    """Whether `value.expand_as(like)` is possible."""
    sizes = zip(reversed(value.shape), reversed(like.shape), strict=False)
    return value.dim() <= like.dim() and all(size in (1, wanted) for size, wanted in sizes)


def check_beside(where: str, name: str, value: Any, like_name: str, like: Tensor) -> None:
    """Check that `value` is a dense tensor with the dtype and device of `like`. If `like` is half precision, float32 is
    accepted too, because autocast produces such pairs."""
    if not isinstance(value, Tensor):
        raise TypeError(f"fastvae.{where}: `{name}` must be a Tensor, got {type(value).__name__}")
    if not is_dense(value):
        raise TypeError(layout_message(where, name, value))
    if value.dtype != like.dtype and not _is_float32_beside_half(value, like):
        raise TypeError(
            f"fastvae.{where}: `{name}` must be {dtype_name(like.dtype)}, like `{like_name}`, got "
            f"{dtype_name(value.dtype)}; did you mean {name}.to({like_name}.dtype)?"
        )
    if value.device != like.device:
        raise ValueError(device_message(where, name, value, like_name, like))


def check_learned(where: str, name: str, value: Any, like_name: str, like: Tensor) -> None:
    """Check that `value` is a 0-dimensional tensor that fits `like`."""
    check_beside(where, name, value, like_name, like)
    if value.dim() != 0:
        hint = f"; did you mean {name}.expand_as({like_name})?" if _broadcasts(value, like) else ""
        raise ValueError(
            f"fastvae.{where}: `{name}` must be 0-dimensional or have the shape of `{like_name}` "
            f"{tuple(like.shape)}, got {tuple(value.shape)}{hint}"
        )


def check_elements(
    where: str,
    names: Sequence[str],
    variant: Variant,
    params: Sequence[Any],
    target: Any,
    name: str,
    constants: Sequence[float],
) -> Sequence[Tensor]:
    """Check the arguments of an elementwise likelihood and return `params`.

    `names` are the names of `params`, and `name` that of `target`, as the user knows them.
    """
    first = params[0]
    check_floating(where, names[0], first)
    for i in range(1, len(params)):
        check = check_learned if variant.has_scalar and i == len(params) - 1 else check_like
        check(where, names[i], params[i], names[0], first)
    if isinstance(target, Tensor) and not is_dense(target):
        raise TypeError(layout_message(where, name, target))
    check_target(where, names, variant, first, target, name)
    if variant.packed:
        _check_head(where, names[0], first, variant.halves, name, target)
    elif target.shape != first.shape:
        raise ValueError(shape_message(where, name, target, names[0], first, tuple(first.shape)))
    return params


def check_target(
    where: str, names: Sequence[str], variant: Variant, first: Tensor, target: Any, name: str
) -> None:
    if not isinstance(target, Tensor):
        raise TypeError(f"fastvae.{where}: `{name}` must be a Tensor, got {type(target).__name__}")
    dtype = target.dtype
    if dtype != first.dtype and dtype != torch.float32 and dtype not in variant.integers:
        accepted = dtype_names((first.dtype, torch.float32, *variant.integers))
        raise TypeError(
            f"fastvae.{where}: `{name}` must be {accepted} for a {dtype_name(first.dtype)} `{names[0]}`, "
            f"got {dtype_name(dtype)}; did you mean {name}.to({names[0]}.dtype)?"
        )
    if target.device != first.device:
        raise ValueError(device_message(where, name, target, names[0], first))
    if target.requires_grad and not variant.is_location and torch.is_grad_enabled():
        raise ValueError(
            f"fastvae.{where}: `{name}` requires a gradient, which this likelihood does not provide; "
            f"pass {name}.detach(), or differentiate fastvae.reference.{variant.function}"
        )


def _check_head(where: str, name: str, params: Tensor, halves: str, target_name: str, target: Tensor) -> None:
    if params.dim() < 2 or params.shape[1] % 2 != 0:
        raise ValueError(
            f"fastvae.{where}: `{name}` must have shape (B, 2C, ...), {halves} packed along dimension 1, "
            f"got {tuple(params.shape)}"
        )
    expected = (params.shape[0], params.shape[1] // 2, *params.shape[2:])
    if target.shape != expected:
        raise ValueError(shape_message(where, target_name, target, name, params, tuple(expected)))


WEIGHTS = (torch.bool, torch.uint8, *FLOATS)


def checked_weight(
    where: str, weight: Any, like_name: str, like: Tensor, expected: tuple[int, ...], of: str = "element"
) -> Tensor:
    """Check a weight for data `like` whose elements (or pixels, as `of` says) have the shape `expected`, and return it
    with as many dimensions, each of which has the expected size or 1."""
    if not isinstance(weight, Tensor):
        raise TypeError(f"fastvae.{where}: `weight` must be a Tensor, got {type(weight).__name__}")
    if not is_dense(weight):
        raise TypeError(layout_message(where, "weight", weight))
    if weight.dtype not in WEIGHTS:
        hint = "weight.bool()" if not weight.is_complex() else "weight.real"
        raise TypeError(
            f"fastvae.{where}: `weight` must be {dtype_names(WEIGHTS)}, got {dtype_name(weight.dtype)}; did you mean "
            f"{hint} or weight.float()?"
        )
    if weight.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            f"fastvae.{where}: `weight` requires a gradient, which the loss does not provide; pass weight.detach()"
        )
    if weight.device != like.device:
        raise ValueError(device_message(where, "weight", weight, like_name, like))
    found = tuple(weight.shape)
    view = weight
    if of == "pixel" and weight.dim() == len(expected) - 1:
        view = weight.unsqueeze(1)
    elif of == "feature" and weight.dim() == 1:
        view = weight.unsqueeze(0)
    if view.dim() != len(expected) or any(
        size not in (1, wanted) for size, wanted in zip(view.shape, expected, strict=True)
    ):
        raise ValueError(_weight_message(where, found, like_name, tuple(like.shape), expected, of))
    return view


def _weight_message(
    where: str,
    found: tuple[int, ...],
    like_name: str,
    data: tuple[int, ...],
    expected: tuple[int, ...],
    of: str,
) -> str:
    required = f"the shape {expected}, in which any size may be 1, for `{like_name}` {data}"
    if of == "pixel":
        required = f"one value per pixel: {required}"
    elif of == "feature":
        required = f"{required}, or ({expected[1]},), one value for every feature"
    hint = ""
    if len(found) < len(expected):
        rest = len(expected) - len(found)
        for view in ((*found, *[1] * rest), (*found[:1], *[1] * rest, *found[1:])):
            if all(size in (1, wanted) for size, wanted in zip(view, expected, strict=True)):
                hint = f"; did you mean weight.reshape({view})?"
                break
    return f"fastvae.{where}: `weight` must have {required}, got {found}{hint}"


def check_kl(where: str, kl: Any, like_name: str, like: Tensor) -> None:
    if not isinstance(kl, Tensor):
        raise TypeError(f"fastvae.{where}: `kl` must be a Tensor, got {type(kl).__name__}")
    if not is_dense(kl):
        raise TypeError(layout_message(where, "kl", kl))
    if kl.dtype not in FLOATS:
        raise TypeError(f"fastvae.{where}: `kl` must be {dtype_names(FLOATS)}, got {dtype_name(kl.dtype)}")
    if kl.dim() != 1 or kl.shape[0] != like.shape[0]:
        raise ValueError(
            f"fastvae.{where}: `kl` must have one value per row of `{like_name}`, shape ({like.shape[0]},), "
            f"got {tuple(kl.shape)}"
        )
    if kl.device != like.device:
        raise ValueError(device_message(where, "kl", kl, like_name, like))
