"""The base class of the likelihood modules."""

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .._spec import VARIANTS
from ..functional import loss
from ..functional.checks import check_floating, checked_int

__all__ = ["Likelihood"]

# (name of the variant, its tensors, its constants): what a backend needs to evaluate the likelihood.
KernelCall = tuple[str, list[Tensor], list[float]]


class Likelihood(nn.Module):
    """The base class of likelihoods p(data | params), where `params` is the output of the decoder.

    A subclass defines `kernel_call`, `mean` and `sample`, or overrides `nll` instead of `kernel_call`.
    """

    def kernel_call(self, params: Any) -> KernelCall:
        """Return the arguments (name, tensors, constants) with which a backend evaluates this likelihood."""
        raise NotImplementedError(f"{type(self).__name__} must define `kernel_call` or `nll`")

    def nll(
        self,
        params: Any,
        target: Tensor,
        *,
        validate: bool = False,
        weight: Tensor | None = None,
        draws: int | None = None,
    ) -> Tensor:
        """Compute -log p(target | params) of every row, (B,), in nats.

        Args:
            params: the output of the decoder, (B, ...).
            target: the data, (B, ...).
            validate: check every value of the weight and of the data first, and of the parameters of counts, as the
                function of this likelihood in `fastvae.functional` does, and raise ValueError for the first that is
                out of its range. Reading the values waits for the GPU.
            weight: multiplies the nll of each element, or of each position of a categorical and each pixel of a mixture
                of discretised logistics, as in the function of this likelihood in `fastvae.functional`.
            draws: K if `params` has K * B rows, which hold K draws for each row of `target` one after another, as
                `decoder(z.flatten(0, 1))` returns them for z (K, B, ...). The result is then (K, B), and `target` and
                `weight` are read without being repeated.
        """
        name, tensors, constants = self.kernel_call(params)
        if draws is not None:
            where = f"likelihoods.{type(self).__name__}"
            checked_int(where, "draws", draws, 1, None)
            first = tensors[0]
            check_floating(where, "params", first)
            rows = loss.rows_of(target)
            if first.shape[0] % draws != 0 or (rows is not None and first.shape[0] != draws * rows):
                found = f"{first.shape[0]} rows" + ("" if rows is None else f" for {rows} of `target`")
                hint = _flatten_hint("params", params, draws, rows)
                raise ValueError(
                    f"fastvae.{where}: `params` must have K * B rows with K = `draws` = {draws}, got {found}{hint}"
                )
            tensors = by_draw(name, tensors, draws)
        probs = params if getattr(self, "from_probs", False) else None
        return loss.nll(
            name, tensors, target, constants, probs=probs, draws=draws, weight=weight, validate=validate
        )[0]

    def mean(self, params: Any) -> Tensor:
        """The expected data, differentiable, for instance to show as a reconstruction."""
        raise NotImplementedError(f"{type(self).__name__} must define `mean`")

    def sample(self, params: Any, generator: torch.Generator | None = None) -> Tensor:
        """Draw data, without a gradient."""
        raise NotImplementedError(f"{type(self).__name__} must define `sample`")

    def channels(self, c: int) -> int:
        """The number of channels that the decoder must return for `c` channels of data."""
        return c


def by_draw(name: str, tensors: list[Tensor], draws: int) -> list[Tensor]:
    """Divide the tensors of a variant, with K * B rows, into K = `draws` draws, (K, B, ...). Those that all rows share,
    a learned scale or a dispersion per feature, are left as they are. `draws` must divide the number of rows."""
    size = tensors[0].shape[0] // draws
    return [
        p.unflatten(0, (draws, size)) if p.dim() > 1 or (p.dim() == 1 and part == "library") else p
        for part, p in zip(VARIANTS[name].tensors, tensors, strict=True)
    ]


def sampling_dtype(like: Tensor) -> torch.dtype:
    """The most precise dtype for draws: float64, or float32 on MPS devices, which have no float64."""
    return torch.float32 if like.device.type == "mps" else torch.float64


def is_pair(params: Any) -> bool:
    return isinstance(params, (tuple, list)) and len(params) == 2


def has_kernel(likelihood: Any) -> bool:
    """Whether the nll of a module is computed from its `kernel_call`, and not by a method of its own."""
    return isinstance(likelihood, Likelihood) and type(likelihood).nll is Likelihood.nll


@functools.lru_cache
def _arguments(method: Callable[..., Any] | None) -> frozenset[str]:
    """The names of a method's arguments, with "**" if it takes any keyword."""
    if method is None:  # a wrapper, whose instances pass the call on
        return frozenset({"**"})
    parameters = inspect.signature(method).parameters.values()
    return frozenset("**" if p.kind is p.VAR_KEYWORD else p.name for p in parameters)


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _takes_draws(kind: type) -> bool:
    """Whether the `nll` of a class has the argument `draws`. torch.compile need not trace how this is found out."""
    return "draws" in _arguments(getattr(kind, "nll", None))


def nll_of_module(
    likelihood: Any,
    where: str,
    recon: Any,
    x: Any,
    weight: Any,
    validate: bool = False,
    draws: int | None = None,
) -> Tensor:
    """Call the `nll` of a module that has no kernel, with the weight and `validate` only if they are set. Messages name
    `where`.

    With K = `draws`, `recon` holds K draws, as for `nll_of_draws`, and the result is (K, B). The data and their weight
    are repeated for a module whose `nll` has no argument `draws`.
    """
    options: dict[str, Any] = {} if weight is None else {"weight": weight}
    if validate:
        options["validate"] = True
    if options and not torch.compiler.is_compiling():
        accepted = _arguments(getattr(type(likelihood), "nll", None))
        for name, default in (("weight", None), ("validate", False)):
            if name in options and name not in accepted and "**" not in accepted:
                raise TypeError(
                    f"fastvae.{where}: `{name}` needs a likelihood with nll(params, target, *, {name}={default}), got "
                    f"{type(likelihood).__name__}.nll without `{name}`"
                )
    if draws is None:
        nll: Tensor = likelihood.nll(recon, x, **options)
        return nll
    rows = loss.rows_of(x)
    if _takes_draws(type(likelihood)):
        nll = likelihood.nll(recon, x, **options, draws=draws)
        _check_nll(where, likelihood, nll, "(K, B)", (draws, rows))
        return nll
    if weight is not None:
        options["weight"] = _repeated_weight(weight, x, draws)
    nll = likelihood.nll(recon, _repeated(x, draws), **options)
    _check_nll(where, likelihood, nll, "(B,)", (None if rows is None else draws * rows,))
    return nll.unflatten(0, (draws, -1))


def _check_nll(where: str, likelihood: Any, nll: Any, letters: str, sizes: tuple[int | None, ...]) -> None:
    """Check the shape of the result of a module's `nll`, because a wrong one may broadcast against the KL. Sizes that
    are not known are None."""
    shape = tuple(nll.shape) if isinstance(nll, Tensor) else None
    fits = shape is not None and len(shape) == len(sizes)
    if fits and all(size is None or size == found for size, found in zip(sizes, shape or (), strict=True)):
        return
    hint = ""
    if len(sizes) == 2 and sizes[1] is not None and shape == (sizes[0] * sizes[1],):  # type: ignore[operator]
        hint = f"; did you mean to return nll.unflatten(0, ({sizes[0]}, -1))?"
    raise ValueError(
        f"fastvae.{where}: `nll` of {type(likelihood).__name__} must return the shape {letters}"
        f"{'' if None in sizes else f' = {sizes}'}, got {type(nll).__name__ if shape is None else shape}{hint}"
    )


def nll_of_draws(
    where: str, likelihood: Any, recon: Any, x: Any, draws: int, weight: Any = None, validate: bool = False
) -> Tensor:
    """Compute -log p(x | z) of K = `draws` draws of z for every row of `x`, (K, B), in nats.

    `recon` is the decoder's output for K * B rows, of which the first B belong to the first draw. The data and their
    weight are read in place and not repeated, except for a module of the user without the argument `draws`. `where` is
    the caller, which messages name.
    """
    if not has_kernel(likelihood):
        if isinstance(recon, Tensor) and not recon.is_nested and recon.dim() > 0:
            _check_rows(where, recon, recon.shape[0], x, draws)
        return nll_of_module(likelihood, where, recon, x, weight, validate, draws)
    name, params, constants = likelihood.kernel_call(recon)
    check_floating(where, "recon", params[0])
    _check_rows(where, recon, params[0].shape[0], x, draws)
    tensors = by_draw(name, params, draws)
    return loss.nll(name, tensors, x, constants, caller=where, draws=draws, weight=weight, validate=validate)[
        1
    ]


def _check_rows(where: str, recon: Any, count: int, x: Any, draws: int) -> None:
    """Check that the decoder's output `recon`, of `count` rows, has K times as many as the data."""
    rows = loss.rows_of(x)
    if count % draws != 0 or (rows is not None and count != draws * rows):
        found = f"{count}" if rows is None else f"{count} for {rows} rows of `x`"
        raise ValueError(
            f"fastvae.{where}: the decoder must return K * B rows, {draws} times those of `x`, got {found}"
            + _flatten_hint("recon", recon, draws, rows)
        )


def _flatten_hint(name: str, value: Any, draws: int, rows: int | None) -> str:
    """The advice for parameters (K, B, ...) where K * B rows are expected."""
    apart = isinstance(value, Tensor) and tuple(value.shape[:2]) == (draws, rows)
    return f"; did you mean {name}.flatten(0, 1)?" if apart else ""


def _repeated(x: Any, draws: int) -> Any:
    if isinstance(x, dict):
        return {name: _repeated(value, draws) for name, value in x.items()}
    return x.expand(draws, *x.shape).flatten(0, 1)


def _repeated_weight(weight: Any, x: Any, draws: int) -> Any:
    """Repeat a weight like `_repeated` the data; one that all rows share, with size 1, needs no copies."""
    if isinstance(weight, dict):
        return {
            name: _repeated_weight(part, x[name], draws) for name, part in weight.items() if part is not None
        }
    return _repeated(weight, draws) if len(weight) == len(x) else weight
