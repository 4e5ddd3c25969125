"""One of several classes at every position."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .._spec import Variant
from ..backends import choose
from . import loss
from .checks import check_floating, device_message, dtype_name, is_dense, layout_message
from .values import check_values

__all__ = ["categorical_nll"]


def categorical_nll(
    logits: Tensor,
    target: Tensor,
    *,
    ignore_index: int = -100,
    validate: bool = False,
    draws: int | None = None,
    weight: Tensor | None = None,
) -> Tensor:
    """Compute -log Categorical(target | softmax(logits)) of every row, in nats, summed over its positions.

    Per position, log sum_v e^a_v - a_t for logits a and class t (Bishop 2006, equations 4.104 and 4.108), which is what
    `F.cross_entropy(..., reduction="sum")` computes, but for each row. The classes are in the last dimension, as a
    decoder's linear layer returns them: sentences of T tokens have logits (B, T, V) and a target (B, T); single labels
    have (B, V) and (B,).

    Args:
        logits: (B, ..., V).
        target: (B, ...), int64: the class of each position, 0 to V - 1, or `ignore_index`.
        ignore_index: positions with this target (padding) add nothing to the loss and get no gradient.
        validate: check every value first, and report the first weight that is negative, infinite or NaN, or the first
            class that does not exist and that has a weight above 0. Reading the values waits for the GPU. On the CPU,
            every call checks all classes, with or without `validate`, and whatever their weights.
        draws: K if the parameters hold K draws, (K, B, ...), for one target, (B, ...), which is read without being
            repeated. The result is then (K, B). A learned scale or a (G,) dispersion is shared by all draws.
        weight: multiplies the nll of each position: bool, uint8 or floating, at least 0, in the shape of `target` or
            with sizes of 1, which are read in place. Positions of weight 0 are left out: even NaN or inf in their
            logits reach neither value nor gradient. It must not require a gradient. With `draws`, it belongs to the
            target and is shared by all draws.

    Returns:
        (B,), float32 (float64 for float64 logits).

    Raises:
        TypeError: If an argument has the wrong type or dtype.
        ValueError: If a shape or device is wrong, `validate` finds an invalid value, or, on the CPU, a class does not
            exist.
    """
    return loss.nll(
        "categorical",
        [logits],
        target,
        [checked_index("categorical_nll", ignore_index)],
        draws=draws,
        weight=weight,
        validate=validate,
    )[0]


def checked_index(where: str, index: Any) -> float:
    if not isinstance(index, int) or isinstance(index, bool):
        raise TypeError(f"fastvae.{where}: `ignore_index` must be an int, got {index!r}")
    if abs(index) >= 2**53:  # constants are passed as floats
        raise ValueError(f"fastvae.{where}: `ignore_index` must be within ±2^53, got {index}")
    return float(index)


def _check(
    where: str,
    names: Sequence[str],
    variant: Variant,
    params: Sequence[Any],
    target: Any,
    name: str,
    constants: Sequence[float],
) -> Sequence[Tensor]:
    logits = params[0]
    check_floating(where, names[0], logits)
    if isinstance(target, Tensor) and not is_dense(target):
        raise TypeError(layout_message(where, name, target))
    _check_classes(where, names[0], logits, name, target)
    if target.is_cpu and type(target) is Tensor and target.numel() > 0 and _has_values():
        # GPU tensors are left to the kernel, because reading them would block.
        low, high = torch.aminmax(target)
        if int(low) < 0 or int(high) >= logits.shape[-1]:  # a class that does not exist, or the ignored index
            check_values(where, names, variant, params, target, name, constants, None)
    return params


loss.CHECKS["categorical"] = _check


def _check_classes(where: str, name: str, logits: Tensor, target_name: str, target: Any) -> None:
    if not isinstance(target, Tensor):
        raise TypeError(f"fastvae.{where}: `{target_name}` must be a Tensor, got {type(target).__name__}")
    if target.dtype != torch.int64:
        raise TypeError(
            f"fastvae.{where}: `{target_name}` must be int64 class indices, got {dtype_name(target.dtype)}; "
            f"did you mean {target_name}.long()?"
        )
    if target.device != logits.device:
        raise ValueError(device_message(where, target_name, target, name, logits))
    shape, found = tuple(logits.shape), tuple(target.shape)
    if len(shape) < 2 or shape[-1] < 1:
        raise ValueError(
            f"fastvae.{where}: `{name}` must have shape (B, ..., V), with the V classes last, got {shape}"
        )
    if found != shape[:-1]:
        hint = ""
        if len(shape) > 2 and found == (shape[0], *shape[2:]):
            hint = f"; the classes must be in the last dimension: did you mean {name}.movedim(1, -1)?"
        raise ValueError(
            f"fastvae.{where}: `{target_name}` must have the shape {shape[:-1]} for `{name}` {shape}, got {found}{hint}"
        )


def _has_values() -> bool:
    """Whether values can be read, which is not the case in a trace or a transform."""
    return (
        not torch.compiler.is_compiling()
        and torch._C._len_torch_dispatch_stack() == 0
        and choose.transform_level() is None
    )
