"""A product of likelihoods for data of several parts."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..functional.checks import checked_int
from .base import Likelihood, nll_of_module
from .names import get

__all__ = ["Product"]


class Product(Likelihood):
    """A product of likelihoods for several parts of the data, which are independent given z: their nlls add up.

    `parts` maps a name for each part to a likelihood: its name, or an `nn.Module` with `nll`. The decoder's output and
    the data are dicts with the same keys::

        likelihood = Product({"image": DiscretizedLogisticMixture(10), "label": "bernoulli"})
        elbo = fastvae.ELBO(likelihood)
        out = elbo({"image": a, "label": b}, {"image": x, "label": y}, kl=kl)

    `mean`, `sample` and `channels` also take and return such dicts. In `self.parts` and in the state_dict, an
    underscore is appended to a name that is an attribute of `nn.ModuleDict`, such as "type" or "values".
    """

    def __init__(self, parts: Mapping[str, str | nn.Module]) -> None:
        super().__init__()
        if not isinstance(parts, Mapping):
            raise TypeError(
                f"fastvae.likelihoods.Product: `parts` must be a dict of likelihoods, got {type(parts).__name__}"
            )
        if not parts:
            raise ValueError(
                "fastvae.likelihoods.Product: `parts` must name at least one likelihood, got none"
            )
        self.parts = nn.ModuleDict()
        self._keys: dict[str, str] = {}  # part name -> its key in `self.parts`
        for name, part in parts.items():
            if not isinstance(name, str):
                raise TypeError(
                    f"fastvae.likelihoods.Product: `parts` must have strings as keys, got {name!r}"
                )
            if not name or "." in name:
                raise ValueError(
                    "fastvae.likelihoods.Product: the keys of `parts` must not be empty or contain dots, got "
                    f"{name!r}"
                )
            key = name
            while hasattr(self.parts, key) or (key != name and key in parts):
                key += "_"
            self._keys[name] = key
            self.parts[key] = get(part, "likelihoods.Product", f"parts[{name!r}]")

    def nll(
        self,
        params: Any,
        target: Any,
        *,
        validate: bool = False,
        weight: Any = None,
        draws: int | None = None,
    ) -> Tensor:
        nlls = self.nll_of_parts(params, target, validate=validate, weight=weight, draws=draws)
        return torch.stack(list(nlls.values())).sum(0)

    def nll_of_parts(
        self,
        params: Mapping[str, Any],
        target: Mapping[str, Any],
        *,
        validate: bool = False,
        weight: Mapping[str, Any] | None = None,
        draws: int | None = None,
    ) -> dict[str, Tensor]:
        """Compute the nll of each part, (B,) each. `weight` holds the weights of some or all parts, and `draws` is K if
        the parameters have K * B rows; see `Likelihood.nll`. The data are repeated only for parts whose `nll` has no
        argument `draws`."""
        self._check("params", params)
        self._check("target", target)
        if draws is not None:
            checked_int("likelihoods.Product", "draws", draws, 1, None)
        weights = self._weights(weight)

        def nll_of(part: Any, params: Any, target: Any, weight: Any) -> Tensor:
            return nll_of_module(part, "likelihoods.Product", params, target, weight, validate, draws)

        nlls = self._call_parts(nll_of, (params, target, weights))
        first = next(iter(nlls))
        for name, nll in nlls.items():
            if nll.shape != nlls[first].shape:
                raise ValueError(
                    f"fastvae.likelihoods.Product: every part must have the same number of rows, got "
                    f"{tuple(nlls[first].shape)} of {first!r} and {tuple(nll.shape)} of {name!r}"
                )
        return nlls

    def mean(self, params: Any) -> Any:
        self._check("params", params)
        return self._call_parts("mean", (params,))

    def sample(self, params: Any, generator: torch.Generator | None = None) -> Any:
        self._check("params", params)
        return self._call_parts("sample", (params,), generator)

    def channels(self, c: Any) -> Any:
        self._check("c", c)
        return self._call_parts("channels", (c,))

    def _weights(self, weight: Any) -> dict[str, Any]:
        """The weight of each part, or None."""
        if weight is None:
            return dict.fromkeys(self._keys)
        if not isinstance(weight, Mapping) or not weight.keys() <= self._keys.keys():
            found = type(weight).__name__ if not isinstance(weight, Mapping) else list(weight)
            raise (ValueError if isinstance(weight, Mapping) else TypeError)(
                f"fastvae.likelihoods.Product: `weight` must be a dict with some of the keys "
                f"{', '.join(map(repr, self._keys))}, got {found}"
            )
        return {name: weight.get(name) for name in self._keys}

    def _call_parts(
        self, method: str | Callable[..., Any], values: Sequence[Mapping[str, Any]], *rest: Any
    ) -> dict[str, Any]:
        """Call a method of every part, by its name or as a function of the part, with its entries of `values`. An error
        names the part in which it occurred."""
        results = {}
        for name, key in self._keys.items():
            part = self.parts[key]
            call = getattr(part, method) if isinstance(method, str) else partial(method, part)
            arguments = [*(value[name] for value in values), *rest]
            if torch.compiler.is_compiling():  # not every version of torch can trace a try block
                results[name] = call(*arguments)
                continue
            try:
                results[name] = call(*arguments)
            except (TypeError, ValueError) as error:
                # This keeps the exception and its class; add_note() needs Python 3.11.
                error.args = (f"fastvae.likelihoods.Product: in part {name!r}: {error}",)
                raise
        return results

    def _check(self, name: str, value: Any) -> None:
        if not isinstance(value, Mapping):
            raise TypeError(
                f"fastvae.likelihoods.Product: `{name}` must be a dict with the keys "
                f"{', '.join(map(repr, self._keys))}, got {type(value).__name__}"
            )
        if value.keys() != self._keys.keys():
            missing = [key for key in self._keys if key not in value]
            unknown = [key for key in value if key not in self._keys]
            differences = [
                f"{problem} {', '.join(map(repr, keys))}"
                for problem, keys in (("missing", missing), ("unknown", unknown))
                if keys
            ]
            raise ValueError(
                f"fastvae.likelihoods.Product: `{name}` must have the keys {', '.join(map(repr, self._keys))}, "
                f"got {list(value)}: {'; '.join(differences)}"
            )
