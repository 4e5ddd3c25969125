"""The registry of the kinds of data. Each kind registers itself when it is imported; `kinds` imports them all."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

from . import run_folder
from .errors import InputError
from .kind import Kind
from .settings import Settings

__all__ = ["kind_of", "read_run", "recipes", "register", "set_order"]

AnyKind = Kind[Any, Any, Any, Any]
K = TypeVar("K", bound=AnyKind)

_KINDS: dict[str, AnyKind] = {}


def register(kind: K) -> K:
    """Register a kind, so that its runs can be trained and read. Returns the kind."""
    _KINDS[kind.name] = kind
    return kind


def set_order(names: Sequence[str]) -> None:
    """Set the order in which the recipes of the kinds are listed."""
    for name in names:
        _KINDS[name] = _KINDS.pop(name)


def recipes() -> dict[str, type[Settings]]:
    """Return all recipes by name."""
    return {recipe.recipe: recipe for kind in _KINDS.values() for recipe in kind.recipes}


def kind_of(settings: Settings) -> AnyKind:
    return _KINDS[settings.kind]


def read_run(path: Path) -> tuple[AnyKind, Settings, dict[str, Any]]:
    """Return the kind of a run, its settings, and the values of `Kind.form_keys` in its config.toml.

    Raises InputError if the folder is not a run, if another version of fastvae wrote it, and if config.toml has a wrong
    key or value.
    """
    file, known = path / run_folder.CONFIG, recipes()
    table = run_folder.read_config(path)
    name = table.pop("recipe", None)
    version, run_format = table.pop("fastvae", "0.1"), table.pop("format", 1)
    if name is not None and run_format != run_folder.FORMAT:
        raise InputError(
            f"{file}: fastvae {version} wrote this run in format {run_format}, but this version reads format "
            f"{run_folder.FORMAT}; train the run again, or use the version that wrote it"
        )
    if name not in known:
        raise InputError(f"{file}: `recipe` must be one of {', '.join(known)}, got {name!r}")
    kind = _KINDS[known[name].kind]
    form_values = {key: table.pop(key, None) for key in kind.form_keys}
    return kind, known[name].read(table, str(file)), form_values
