"""Known factors of the data, for the mutual information gap."""

import csv
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from . import files
from .errors import InputError
from .npz import NpzFile

__all__ = ["Factors", "read"]


class Factors(NamedTuple):
    """Discrete factors of each datum."""

    names: tuple[str, ...]
    values: Tensor
    """(N, K) int64. The values of each factor are numbered from 0."""


def read(path: Path, rows: int, what: str) -> Factors:
    """Read the factors of `rows` data: a .csv file with names in its first line and one line per datum; an .npy file
    with an array (N,) or (N, K); or an .npz file with such arrays. `what` names a datum in messages.

    Raises InputError if the file cannot be read, has another number of rows, or holds something else than discrete
    factors with at least two values.
    """
    where = f"--factors {path}"
    readers = {".csv": _read_csv, ".npy": _read_npy, ".npz": _read_npz}
    if path.suffix.lower() not in readers:
        raise InputError(
            f"{where}: the file must end in .csv, .npy or .npz, got {path.suffix or 'no ending'}"
        )
    columns = readers[path.suffix.lower()](path, where)
    if not columns:
        raise InputError(f"{where}: expected at least one factor, found none")
    values = []
    for name, column in columns.items():
        if len(column) != rows:
            raise InputError(
                f"{where}: expected {rows} rows, one for each {what}, got {len(column)} for `{name}`"
            )
        if column.dtype.kind == "f" and not np.isfinite(column).all():
            raise InputError(f"{where}: `{name}` contains NaN or infinity")
        kinds, numbers = np.unique(column, return_inverse=True)
        if len(kinds) < 2:
            raise InputError(f"{where}: `{name}` must have at least two values, got only {kinds[0]}")
        if len(kinds) > rows / 2:
            raise InputError(
                f"{where}: `{name}` must be discrete, so that many data share each value, got {len(kinds)} values in "
                f"{rows} rows; divide it into a few intervals, for example with numpy.digitize"
            )
        values.append(torch.from_numpy(numbers.reshape(-1).astype(np.int64)))
    return Factors(tuple(columns), torch.stack(values, 1))


def _read_csv(path: Path, where: str) -> dict[str, Any]:
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            lines = [line for line in csv.reader(file) if line]
    except OSError as error:
        raise InputError(f"{where}: cannot be read: {files.error_reason(error)}") from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{where}: not a valid .csv file: {error}") from error
    if not lines:
        raise InputError(f"{where}: the file is empty")
    names, *rows = ([cell.strip() for cell in line] for line in lines)
    for number, row in enumerate(rows, 2):
        if len(row) != len(names):
            raise InputError(
                f"{where}: line {number} must have {len(names)} values, one for each of {', '.join(names)}, got "
                f"{len(row)}"
            )
    return {name: np.array([row[i] for row in rows], dtype=str) for i, name in enumerate(names)}


def _read_npy(path: Path, where: str) -> dict[str, Any]:
    try:
        array = np.load(path, allow_pickle=False)
    except OSError as error:
        raise InputError(f"{where}: cannot be read: {files.error_reason(error)}") from error
    except (ValueError, EOFError) as error:
        raise InputError(f"{where}: not an .npy file that numpy can read") from error
    if not isinstance(array, np.ndarray):
        raise InputError(f"{where}: this is an .npz file; rename it")
    return _columns("factor", array, where)


def _read_npz(path: Path, where: str) -> dict[str, Any]:
    columns: dict[str, Any] = {}
    with NpzFile(path) as arrays:
        for name in arrays.names:
            columns |= _columns(name, arrays.read(name), where)
    return columns


def _columns(name: str, array: Any, where: str) -> dict[str, Any]:
    if array.ndim not in (1, 2) or array.dtype.kind not in "iufbUS":
        raise InputError(
            f"{where}: `{name}` must be numbers or strings of shape (N,) or (N, K), got {array.dtype} of shape "
            f"{array.shape}"
        )
    if array.ndim == 1:
        return {name: array}
    return {f"{name}[{i}]": array[:, i] for i in range(array.shape[1])}
