"""What a run makes of all cells, in the order of the data: their latent means, and denoised counts."""

import shutil
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastvae.train import files, registry
from fastvae.train.errors import InputError

from .callbacks import posterior_means
from .cells import Batch, list_files, make_batch, to_device
from .formats import read_cell_names
from .run import CellRun

__all__ = ["OBSM", "encode", "reconstruct"]

OBSM = "X_fastvae"
"""The key of the latent means in `obsm`."""

_ROWS = 500  # the number of cells to decode at a time


def encode(run: CellRun, out: Path) -> int:
    """Write the latent means of all cells to an .npz file, as `z` (cells, latents), float32, or into obsm of an .h5ad.

    An .h5ad file that exists gets them in addition. Otherwise it becomes a copy of the data, which must be an .h5ad
    file as well. Returns the number of cells. Raises InputError if the file cannot be written, is an .npz file of the
    data, or has other cells.
    """
    suffix = out.suffix.lower()
    if suffix not in (".npz", ".h5ad"):
        raise InputError(f"--out {out}: the file must end in .npz or .h5ad")
    template = None
    if suffix == ".h5ad":
        template = _template(run, out)
    else:
        _refuse_to_replace_data(run, out)
    files.prepare_folder(out.parent, [out.name])
    cells = run.cells
    count = len(cells.library)
    if template is not None:
        _check_cells(template, count, list_files(run.settings.data))
    z = posterior_means(run.model, cells, torch.arange(count)).numpy()
    with files.replacing(out) as part:
        if template is None:
            with part.open("wb") as file:
                np.savez(file, z=z)
        else:
            _write_obsm(template, part, z)
    return count


def _refuse_to_replace_data(run: CellRun, out: Path) -> None:
    """Raises InputError if the file belongs to the data, those given or those that the run was trained on."""
    if not out.exists():
        return
    _, trained, _ = registry.read_run(run.path)
    for data in (run.settings.data, trained.data):
        try:
            paths = list_files(data)
        except InputError:  # the data that the run was trained on may have been moved
            continue
        if any(out.samefile(path) for path in paths):
            raise InputError(
                f"--out {out}: this file holds counts of the data, which would be lost; give another name"
            )


def _template(run: CellRun, out: Path) -> Path:
    """Return the .h5ad file to which the latent means are added."""
    if out.exists():
        return out
    paths = list_files(run.settings.data)
    if len(paths) != 1 or paths[0].suffix.lower() != ".h5ad":
        raise InputError(
            f"--out {out}: no such file, and the data of the run are not one .h5ad file that could be copied; give an "
            ".h5ad file with these cells, or an .npz file"
        )
    return paths[0]


def _check_cells(path: Path, count: int, data: Sequence[Path]) -> None:
    """Raises InputError unless the file has so many cells, and with the names that they have in the data, if any."""
    import h5py

    try:
        with h5py.File(path, "r") as file:
            obs = file["obs"]
            if not isinstance(obs, h5py.Group) or isinstance(file.get("obsm"), h5py.Dataset):
                raise InputError(
                    f"{path}: written by an old version of anndata; write it again with a newer one"
                )
            found = len(obs[obs.attrs.get("_index", "_index")])
    except (OSError, KeyError) as error:
        raise InputError(f"{path}: cannot be read as an .h5ad file: {error}") from error
    if found != count:
        raise InputError(f"{path}: expected the {count} cells of the data, got {found}")
    of_data, names = [read_cell_names(file) for file in data], read_cell_names(path)
    if names is None or any(part is None for part in of_data):
        return
    expected = np.concatenate(of_data)
    different = np.flatnonzero(names != expected)
    if len(different):
        cell = int(different[0])
        raise InputError(
            f"{path}: expected the cells of the data in the same order: cell {cell} is {str(names[cell])!r}, but "
            f"{str(expected[cell])!r} in the data; the latent means can be written to an .npz file instead"
        )


def _write_obsm(template: Path, part: Path, z: Any) -> None:
    import h5py

    shutil.copyfile(template, part)
    with h5py.File(part, "r+") as file:
        group = file.require_group("obsm")
        group.attrs["encoding-type"], group.attrs["encoding-version"] = "dict", "0.1.0"
        if OBSM in group:
            del group[OBSM]
        array = group.create_dataset(OBSM, data=z)
        array.attrs["encoding-type"], array.attrs["encoding-version"] = "array", "0.2.0"


def reconstruct(run: CellRun, out: Path, n: int | None = None) -> tuple[int, int]:
    """Write denoised counts of all cells, or the first n, as `x` (cells, genes), float32, to an .npz file.

    They are the means of the likelihood at the posterior mean of z, with the cell's own library size. The additional
    zeros of a ZINB, which are no biology, are left out of the mean (Lopez et al. 2018). Little memory is used, but the
    file has four bytes for each cell and gene. Returns its shape. Raises InputError if it cannot be written, or belongs
    to the data.
    """
    if out.suffix.lower() != ".npz":
        raise InputError(
            f"--out {out}: denoised counts are written as an array, so the name must end in .npz"
        )
    if n is not None and n < 1:
        raise InputError(f"-n must be at least 1, got {n}")
    _refuse_to_replace_data(run, out)
    files.prepare_folder(out.parent, [out.name])
    shape = (min(len(run.cells.library), n or len(run.cells.library)), run.cells.genes)
    header = {"descr": "<f4", "fortran_order": False, "shape": shape}
    with (
        files.replacing(out) as part,
        zipfile.ZipFile(part, "w") as archive,
        archive.open("x.npy", "w", force_zip64=True) as member,
    ):
        np.lib.format.write_array_header_1_0(member, header)
        for means in _denoised(run, torch.arange(shape[0])):
            member.write(means.cpu().numpy().astype("<f4").tobytes())
    return shape


@torch.no_grad()
def _denoised(run: CellRun, indices: Tensor) -> Iterator[Tensor]:
    parts = indices.split(_ROWS)
    for part, rows in zip(parts, run.cells.counts.batches([p.numpy() for p in parts]), strict=True):
        batch: Batch = to_device(make_batch(run.cells, part, rows), run.device)
        mu, _ = run.model.encode(batch)
        yield run.model.denoised(mu, batch).float()
