"""Likelihoods by name, for `fastvae.ELBO`."""

from typing import Any

from torch import nn

from .._spec import SPECS
from ..functional.checks import check_choice
from . import categorical, continuous, counts, discretized
from .base import Likelihood

FAMILIES: dict[str, Any] = {
    "continuous": continuous,
    "counts": counts,
    "categorical": categorical,
    "discretized": discretized,
}
# The likelihoods whose module needs no arguments.
BY_NAME: dict[str, type[Likelihood]] = {
    spec.name: getattr(FAMILIES[spec.family], spec.module) for spec in SPECS if spec.by_name
}


def get(likelihood: str | nn.Module, where: str = "ELBO", name: str = "likelihood") -> nn.Module:
    """Return the likelihood module of a name, or the module itself. Messages call the argument `name` of `where`.

    Raises ValueError for an unknown name, and TypeError for an object that cannot be a likelihood.
    """
    if isinstance(likelihood, str):
        check_choice(where, name, likelihood, tuple(BY_NAME))
        return BY_NAME[likelihood]()
    if isinstance(likelihood, nn.Module) and callable(getattr(likelihood, "nll", None)):
        return likelihood
    found = f"the class {likelihood.__name__}" if isinstance(likelihood, type) else type(likelihood).__name__
    raise TypeError(
        f"fastvae.{where}: `{name}` must be one of {', '.join(map(repr, BY_NAME))}, or an nn.Module with a method "
        f"`nll(params, target)`, got {found}"
    )
