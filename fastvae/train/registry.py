"""The kinds of data that are there. Each registers itself when it is imported; `kinds` imports them all."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

from . import folder
from .errors import InputError
from .kind import Kind
from .settings import Settings

__all__ = ["arrange", "kind_of", "read_run", "recipes", "register"]

AnyKind = Kind[Any, Any, Any, Any]
K = TypeVar("K", bound=AnyKind)

_KINDS: dict[str, AnyKind] = {}


def register(kind: K) -> K:
    """Let runs of this kind be trained and read; returns it."""
    _KINDS[kind.name] = kind
    return kind


def arrange(names: Sequence[str]) -> None:
    """Put the kinds in this order, in which their recipes are listed."""
    for name in names:
        _KINDS[name] = _KINDS.pop(name)


def recipes() -> dict[str, type[Settings]]:
    """By their names."""
    return {recipe.recipe: recipe for kind in _KINDS.values() for recipe in kind.recipes}


def kind_of(settings: Settings) -> AnyKind:
    return _KINDS[settings.kind]


def read_run(path: Path) -> tuple[AnyKind, Settings, dict[str, Any]]:
    """The kind of a run, its settings, and what its config.toml says of the form of its model (see `Kind.head`).

    Raises InputError for a folder that is no run, and for a wrong key or value in config.toml.
    """
    file, known = path / folder.CONFIG, recipes()
    table = folder.read_config(path)
    name = table.pop("recipe", None)
    table.pop("fastvae", None)
    if name not in known:
        raise InputError(f"{file}: `recipe` must be one of {', '.join(known)}, got {name!r}")
    kind = _KINDS[known[name].kind]
    head = {key: table.pop(key, None) for key in kind.head}
    return kind, known[name].read(table, str(file)), head
