"""Columns of files of counts, with a value for each cell: labels, batches and covariates."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastvae.train.errors import InputError

from .formats import CountsFile

__all__ = ["Covariate", "read_categories", "read_covariates"]

_MOST = 100  # the largest number of different whole numbers that are taken for categories


@dataclass(frozen=True)
class Covariate:
    """A property of the cells that encoder and decoder get, so that z need not contain it."""

    name: str
    categories: tuple[str, ...] = ()
    """The names of its categories; without any, it is continuous."""
    mean: float = 0.0
    scale: float = 1.0
    """Mean and standard deviation of a continuous covariate in the training cells."""


def read_categories(
    files: Sequence[CountsFile], key: str, option: str, usual: tuple[str, ...], *, needed: bool = False
) -> tuple[Tensor | None, tuple[str, ...]]:
    """Return the values of a column as integers, and their names. Without `key`, use a column with a usual name.

    `needed` says that the run was trained with such a column.

    Raises InputError if there is no such column, or not exactly one value for each cell.
    """
    if key:
        _check_key(files, key, option)
    name = key or next((name for name in usual if all(name in file.columns for file in files)), "")
    if not name and needed:
        file = next(file for file in files if usual[0] not in file.columns)
        raise InputError(
            f"{file.path}: the column `{usual[0]}` is missing, which the run was trained with; the file has only "
            f"{', '.join(file.columns) or 'the counts'}"
        )
    if not name:
        return None, ()
    parts = _read_parts(files, name, lambda file: file.read(name))
    return _number(parts)


def read_covariates(
    files: Sequence[CountsFile], keys: str, train: Tensor, known: Sequence[Covariate] | None = None
) -> tuple[Tensor, tuple[Covariate, ...]]:
    """Return the values of the covariates `keys`, which are separated by commas, and what they are.

    The values are float64 (N, K): the number of the category, or the number itself if the column has fractional
    numbers. `known` are those of an existing run, which say which of the two each is.

    Raises InputError as `read_categories` does, if a number is not finite, and if a key is given twice.
    """
    names = [name.strip() for name in keys.split(",") if name.strip()]
    for i, name in enumerate(names):
        if name in names[:i]:
            raise InputError(f"--covariates {keys}: {name} is given twice")
    if known is not None and [covariate.name for covariate in known] != names:
        trained = ", ".join(covariate.name for covariate in known) or "none"
        raise InputError(f"--covariates {keys}: the run was trained with other covariates: {trained}")
    values, covariates = [], []
    for i, name in enumerate(names):
        _check_key(files, name, "--covariates")
        parts = _read_parts(files, name, lambda file, name=name: file.read_stored(name))  # type: ignore[misc]
        parts = [part.astype(str) if part.dtype.kind == "S" else part for part in parts]
        is_number = all(part.dtype.kind in "iuf" for part in parts)
        if known is None:
            continuous = is_number and any(part.dtype.kind == "f" for part in parts)
        else:
            continuous = not known[i].categories
        if continuous:
            column = _read_numbers(files, name, parts)
            of_train = column[train]
            scale = of_train.std(correction=0).item()
            covariates.append(Covariate(name, (), of_train.mean().item(), scale if scale > 0 else 1.0))
        else:
            numbers, categories = _number(parts)
            if known is None and is_number and len(categories) > _MOST:
                raise InputError(
                    f"--covariates {name}: {len(categories)} different whole numbers would be as many categories; "
                    "save them as floats if this covariate is continuous"
                )
            column = numbers.double()
            covariates.append(Covariate(name, categories))
        values.append(column)
    cells = sum(file.source.shape[0] for file in files)
    return torch.stack(values, 1) if values else torch.empty(cells, 0, dtype=torch.float64), tuple(covariates)


def _check_key(files: Sequence[CountsFile], key: str, option: str) -> None:
    for file in files:
        if key not in file.columns:
            raise InputError(
                f"{option} {key}: {file.path} has no such column, only {', '.join(file.columns) or 'the counts'}"
            )


def _read_parts(files: Sequence[CountsFile], name: str, read: Callable[[CountsFile], Any]) -> list[Any]:
    """Return the values of each file as an array."""
    parts = []
    for file in files:
        values, cells = np.asarray(read(file)), file.source.shape[0]
        if values.shape != (cells,):
            raise InputError(
                f"{file.path}: `{name}` must have one value for each of the {cells} cells, got shape {values.shape}"
            )
        parts.append(values)
    return parts


def _number(parts: list[Any]) -> tuple[Tensor, tuple[str, ...]]:
    """Return the place of each value of all files among the different values, and the names of these."""
    if len({part.dtype.kind for part in parts}) > 1:
        parts = [part.astype(str) for part in parts]
    names, numbers = np.unique(np.concatenate(parts), return_inverse=True)
    return torch.from_numpy(numbers.astype(np.int64)), tuple(str(value) for value in names.tolist())


def _read_numbers(files: Sequence[CountsFile], name: str, parts: Sequence[Any]) -> Tensor:
    for file, part in zip(files, parts, strict=True):
        if part.dtype.kind not in "iuf":
            raise InputError(
                f"{file.path}: `{name}` must be numbers, as in the data that the run was trained on, got {part[0]!s}"
            )
        if not np.isfinite(part).all():
            cell = int((~np.isfinite(part)).argmax())
            raise InputError(f"{file.path}: `{name}` must be finite, got {part[cell]:g} in cell {cell}")
    return torch.from_numpy(np.concatenate([part.astype(np.float64) for part in parts]))
