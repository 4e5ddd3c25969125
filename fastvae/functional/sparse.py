"""Linear layers of sparse input."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import reference
from ..backends import choose
from .checks import FLOATS, device_message, dtype_name, dtype_names, is_dense

__all__ = ["sparse_linear"]

_INPUTS = (*FLOATS, torch.uint8, torch.uint16, torch.int32, torch.int64)
_BY_TORCH = ("cuda",)  # the devices on which torch's own product is used


def sparse_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, log1p: bool = False) -> Tensor:
    """Compute x W^T + b, or log(1 + x) W^T + b, for a sparse matrix x, without making x dense.

    The time and the memory are those of the stored values, forward and backward; only the weight's gradient, which is
    dense, has the weight's size. On a CPU this is a kernel of ours. On a GPU it is torch's own sparse product, which
    may differ in the last bits from run to run and does not check the columns of `x`. Everything is computed in
    float32, or in float64 for float64 weights.

    Args:
        x: (B, I), torch.sparse_csr, or dense, for which this is torch's `linear`: floating, uint8, uint16, int32 or
            int64 (bytes are not scaled). It must not require a gradient if it is sparse.
        weight: (O, I), floating. It is read without a copy if it is stored by columns (`weight.t()` is contiguous), as
            that of `fastvae.nn.SparseLinear` is.
        bias: (O,), in the dtype of `weight`.
        log1p: take the logarithm of 1 + x first, as encoders of counts do. It leaves zeros zero.

    Returns:
        (B, O), in the dtype of `weight`, or in that of autocast.

    Raises:
        TypeError: If an argument has the wrong type, dtype or layout.
        ValueError: If a shape or device is wrong, or a sparse `x` requires a gradient.
        IndexError: On a CPU, if a column of `x` does not exist.
    """
    _check(x, weight, bias)
    if is_dense(x):
        if not x.is_floating_point():
            x = x.to(weight.dtype)
        return F.linear(torch.log1p(x) if log1p else x, weight, bias)
    kind = x.device.type
    dtype = weight.dtype
    if torch.is_autocast_enabled(kind) and dtype != torch.float64:
        dtype = torch.get_autocast_dtype(kind)
    working = torch.float64 if weight.dtype == torch.float64 else torch.float32
    with torch.autocast(kind, enabled=False):
        values = x.values().to(working)
        if log1p:
            values = torch.log1p(values)
        weight, bias = weight.to(working), None if bias is None else bias.to(working)
        return _product(x, values, weight, bias).to(dtype)


def _product(x: Tensor, values: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    starts, columns = x.crow_indices(), x.col_indices()
    backend = choose.serving.get(x.device.type)
    # The ops support no transforms of torch.func and no forward-mode AD; for_tensor has the message.
    if backend is not None and backend.name != "reference":
        choose.for_tensor(weight)
    if backend is not None and backend.name == "native" and x.device.type == "cpu":
        return torch.ops.fastvae.sparse_linear.default(values, starts.long(), columns.long(), weight, bias)
    if choose.setting != "reference" and x.device.type in _BY_TORCH:
        product = torch.sparse.mm(torch.sparse_csr_tensor(starts, columns, values, x.shape), weight.t())
        return product if bias is None else product + bias
    return reference.sparse_linear(values, starts.long(), columns.long(), weight, bias)


def _check(x: Any, weight: Any, bias: Any) -> None:
    where = "fastvae.sparse_linear"
    for name, value in (("x", x), ("weight", weight), *([] if bias is None else [("bias", bias)])):
        if not isinstance(value, Tensor):
            raise TypeError(f"{where}: `{name}` must be a Tensor, got {type(value).__name__}")
        if value.layout != torch.strided and not (name == "x" and value.layout == torch.sparse_csr):
            hint = "to_sparse_csr" if name == "x" else "to_dense"
            wanted = "torch.sparse_csr or dense" if name == "x" else "dense"
            raise TypeError(
                f"{where}: `{name}` must be {wanted}, got {value.layout}; did you mean {name}.{hint}()?"
            )
    if weight.dtype not in FLOATS:
        raise TypeError(f"{where}: `weight` must be {dtype_names(FLOATS)}, got {dtype_name(weight.dtype)}")
    if x.dtype not in _INPUTS:
        raise TypeError(f"{where}: `x` must be {dtype_names(_INPUTS)}, got {dtype_name(x.dtype)}")
    if weight.dim() != 2:
        raise ValueError(f"{where}: `weight` must have shape (O, I), got {tuple(weight.shape)}")
    outputs, inputs = weight.shape
    if x.layout == torch.sparse_csr and x.dim() != 2:
        raise ValueError(f"{where}: a sparse `x` must have shape (B, {inputs}), got {tuple(x.shape)}")
    if x.dim() == 0 or x.shape[-1] != inputs:
        raise ValueError(
            f"{where}: `x` must have {inputs} columns, as `weight` {tuple(weight.shape)} has, got {tuple(x.shape)}"
        )
    if bias is not None:
        if bias.dtype != weight.dtype:
            raise TypeError(
                f"{where}: `bias` must be {dtype_name(weight.dtype)}, like `weight`, got {dtype_name(bias.dtype)}"
            )
        if bias.shape != (outputs,):
            raise ValueError(
                f"{where}: `bias` must have shape ({outputs},), one value per row of `weight`, got "
                f"{tuple(bias.shape)}"
            )
    for name, value in (("weight", weight), *([] if bias is None else [("bias", bias)])):
        if value.device != x.device:
            raise ValueError(device_message("sparse_linear", name, value, "x", x))
    if x.layout == torch.sparse_csr and x.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            f"{where}: a sparse `x` requires a gradient, which this layer does not provide; pass x.detach(), or "
            "x.to_dense()"
        )
