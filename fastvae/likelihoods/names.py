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
# Of those whose module needs no arguments.
BY_NAME: dict[str, type[Likelihood]] = {
    spec.name: getattr(FAMILIES[spec.family], spec.module) for spec in SPECS if spec.by_name
}


def get(likelihood: str | nn.Module, where: str = "ELBO", name: str = "likelihood") -> nn.Module:
    """The likelihood module of a name, or the module itself. `where` and `name`: whose argument it is, for messages.

    Raises ValueError for an unknown name and TypeError for something that cannot be a likelihood.
    """
    if isinstance(likelihood, str):
        check_choice(where, name, likelihood, tuple(BY_NAME))
        return BY_NAME[likelihood]()
    if isinstance(likelihood, nn.Module) and callable(getattr(likelihood, "nll", None)):
        return likelihood
    found = likelihood.__name__ + ", a class" if isinstance(likelihood, type) else type(likelihood).__name__
    raise TypeError(
        f"fastvae.{where}: `{name}` must be one of {', '.join(map(repr, BY_NAME))}, or an nn.Module with a method "
        f"`nll(params, target)`, got {found}"
    )
