"""Reading counts: .h5ad, .zarr and .npz, in memory and in blocks from disk, one file or several, and damaged ones."""

import errno
import io
import os
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.sparse
import torch
from counts_files import CELLS, GENES, example_arrays, fill, write_h5ad, write_matrix

from fastvae.train.counts import cells, formats, loader, matrix, sources
from fastvae.train.counts.recipe import Counts
from fastvae.train.errors import InputError

BIG = 700  # cells, which are more than two blocks


def load(path: Any, **settings: Any) -> cells.Cells:
    return cells.load(Counts(data=str(path), **settings))


@pytest.fixture
def from_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave the counts on disk, however few there are."""
    monkeypatch.setattr(sources.Source, "nbytes", property(lambda self: 1 << 40))
    monkeypatch.delattr(sources.DenseSource, "nbytes")


def write_npz(path: Path, x: np.ndarray, layout: str, compressed: bool) -> Path:
    if layout == "dense":
        (np.savez_compressed if compressed else np.savez)(path, x=x)
    else:
        scipy.sparse.save_npz(path, getattr(scipy.sparse, f"{layout}_array")(x), compressed=compressed)
    return path


def write_zarr(path: Path, x: np.ndarray, layout: str) -> Path:
    zarr = pytest.importorskip("zarr")
    root = zarr.open_group(str(path), mode="w")
    write_matrix(root, "X", x, layout, {"chunks": (500,)})
    return path


FORMS = [
    "csr .npz", "csr compressed .npz", "csc .npz", "csc compressed .npz", "dense .npz", "dense compressed .npz",
    "csr .h5ad", "csc .h5ad", "dense .h5ad", "csr .zarr",
]  # fmt: skip


def write(folder: Path, form: str, x: np.ndarray) -> Path:
    layout, *middle, suffix = form.split()
    path = folder / f"cells{suffix}"
    if suffix == ".npz":
        return write_npz(path, x, layout, bool(middle))
    if suffix == ".zarr":
        return write_zarr(path, x, layout)
    pytest.importorskip("h5py")
    return write_h5ad(path, x, layout=layout)


# --- One data set, in memory or on disk -------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
def test_data_on_disk_are_those_in_memory(tmp_path: Path, form: str, request: pytest.FixtureRequest) -> None:
    x = example_arrays(BIG)["x"]
    path = write(tmp_path, form, x)
    in_memory = load(path)
    assert isinstance(in_memory.counts, matrix.MemoryCounts)
    request.getfixturevalue("from_disk")
    on_disk = load(path)
    assert isinstance(on_disk.counts, matrix.DiskCounts)
    indices = np.array([600, 3, 255, 256, 3, 699])
    for data in (in_memory, on_disk):
        rows = data.counts.rows(indices)
        assert rows.dtype == np.float32
        assert np.array_equal(rows.toarray(), x[indices])
        assert torch.equal(data.library[:, 0], torch.from_numpy(x.sum(1)).float())
        assert torch.equal(data.totals, torch.from_numpy(x[data.train.numpy()].sum(0)).double())
        assert data.counts.stored == (x > 0).sum()
        assert torch.equal(data.val.sort().values, in_memory.val.sort().values)


def test_large_data_stay_on_disk(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    x = scipy.sparse.random_array((300, 1000), density=0.5, rng=rng, format="csr")
    x.data = np.ceil(9 * x.data).astype(np.float32)
    scipy.sparse.save_npz(tmp_path / "cells.npz", x, compressed=False)
    assert isinstance(load(tmp_path / "cells.npz", memory=1.3).counts, matrix.MemoryCounts)
    assert isinstance(load(tmp_path / "cells.npz", memory=1.1).counts, matrix.DiskCounts)
    scipy.sparse.save_npz(tmp_path / "cells.npz", x.tocoo(), compressed=False)
    assert isinstance(load(tmp_path / "cells.npz", memory=1.1).counts, matrix.DiskCounts)


@pytest.mark.parametrize("layer", ["X", "counts", "spliced"])
def test_layers(tmp_path: Path, layer: str) -> None:
    pytest.importorskip("h5py")
    x = example_arrays()["x"]
    path = write_h5ad(tmp_path / "cells.h5ad", x, layer=layer)
    if layer == "spliced":  # X holds logarithms
        with pytest.raises(InputError, match="a count is fractional"):
            load(path)
    data = load(path, layer="" if layer != "spliced" else layer)
    assert np.array_equal(data.counts.rows(np.arange(CELLS)).toarray(), x)
    known = "X" if layer == "X" else f"X, {layer}"
    with pytest.raises(
        InputError, match=f"--layer ambiguous: .*/cells.h5ad has no such matrix, only {known}$"
    ):
        load(path, layer="ambiguous")


def test_raw_counts_and_their_genes(tmp_path: Path) -> None:
    h5py = pytest.importorskip("h5py")
    x = example_arrays()["x"]
    path = write_h5ad(tmp_path / "cells.h5ad", np.log1p(x[:, :12]))
    with h5py.File(path, "r+") as root:
        fill(root.create_group("raw"), x, genes=[f"raw {i}" for i in range(GENES)])
    data = load(path, layer="raw")
    assert data.genes == GENES
    assert formats.open_counts(path, "raw").genes[3] == "raw 3"
    assert formats.open_counts(path, "X").genes[3] == "gene 3"


def test_npz_layer_is_an_array(tmp_path: Path) -> None:
    x = example_arrays()["x"]
    np.savez(tmp_path / "cells.npz", x=x, twice=2 * x)
    data = load(tmp_path / "cells.npz", layer="twice")
    assert np.array_equal(data.counts.rows(np.arange(CELLS)).toarray(), 2 * x)
    with pytest.raises(InputError, match=r"--layer third: .* has no such array, only x, twice"):
        load(tmp_path / "cells.npz", layer="third")


def test_columns_of_obs(tmp_path: Path) -> None:
    """Categories, numbers, strings and values with a mask become strings; a missing value is an error with its cell."""
    h5py = pytest.importorskip("h5py")
    arrays = example_arrays()
    path = write_h5ad(tmp_path / "cells.h5ad", arrays["x"], label=arrays["label"])
    with h5py.File(path, "r+") as root:
        obs = root["obs"]
        obs.attrs["column-order"] = ["kind", "number", "word", "mask"]
        obs.create_dataset("number", data=np.where(np.arange(CELLS) == 7, np.nan, 2.0))
        obs.create_dataset("word", data=["left", "right"] * (CELLS // 2))
        nullable = obs.create_group("mask")
        nullable.create_dataset("values", data=np.arange(CELLS) % 4)
        nullable.create_dataset("mask", data=np.zeros(CELLS, bool))
    data = load(path, label="kind", batch="word")
    assert (data.label_names, data.batch_names) == (("B", "NK", "T"), ("left", "right"))
    assert [data.label_names[i] for i in data.labels] == arrays["label"].tolist()
    assert data.batches.tolist() == [0, 1] * (CELLS // 2)
    assert load(path, label="mask").label_names == ("0", "1", "2", "3")
    missing = rf"`number` has no value for 1 of the {CELLS} cells, the first of which is cell 7"
    with pytest.raises(InputError, match=missing):
        load(path, label="number")
    with h5py.File(path, "r+") as root:
        root["obs/kind/codes"][3:5] = -1
    with pytest.raises(InputError, match=r"`kind` has no value for 2 of .*, the first of which is cell 3"):
        load(path, label="kind")
    with pytest.raises(
        InputError, match=r"--label tissue: .* has no such column, only kind, number, word, mask"
    ):
        load(path, label="tissue")


@pytest.mark.slow
@pytest.mark.parametrize("suffix", [".h5ad", ".zarr"])
@pytest.mark.parametrize("layout", ["csr", "csc", "dense"])
def test_files_of_anndata(tmp_path: Path, layout: str, suffix: str) -> None:
    anndata, pandas = pytest.importorskip("anndata"), pytest.importorskip("pandas")
    arrays = example_arrays()
    x = arrays["x"] if layout == "dense" else getattr(scipy.sparse, f"{layout}_matrix")(arrays["x"])
    obs = pandas.DataFrame({"cell_type": pandas.Categorical(arrays["label"]), "batch": np.arange(CELLS) % 2})
    obs["batch"] = obs["batch"].astype("Int64")
    obs.index = obs.index.astype(str)
    data = anndata.AnnData(x, obs=obs)
    data.layers["counts"] = data.X.copy()
    path = tmp_path / f"cells{suffix}"
    (data.write_h5ad if suffix == ".h5ad" else data.write_zarr)(path)
    read = load(path)
    assert np.array_equal(read.counts.rows(np.arange(CELLS)).toarray(), arrays["x"])
    assert (read.label_names, read.batch_names) == (("B", "NK", "T"), ("0", "1"))
    assert formats.open_counts(path, "").genes.tolist() == data.var_names.tolist()


def test_several_files_are_one_data_set(
    tmp_path: Path, from_disk: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("h5py")
    arrays = example_arrays(BIG)
    x, label = arrays["x"], arrays["label"]
    folder = tmp_path / "parts"
    folder.mkdir()
    write_h5ad(folder / "a.h5ad", x[:300], label=label[:300])
    write_h5ad(folder / "b.h5ad", x[300:310], label=label[300:310])
    np.savez(folder / "c.npz", x=x[310:], kind=label[310:])
    (folder / "notes.txt").touch()
    named = ",".join(str(folder / name) for name in ("a.h5ad", "b.h5ad", "c.npz"))
    for data in (load(folder, label="kind"), load(named, label="kind")):
        assert data.name == "3 files of parts"
        assert np.array_equal(data.counts.rows(np.arange(BIG)).toarray(), x)
        assert [data.label_names[i] for i in data.labels] == label.tolist()
        assert torch.equal(data.library[:, 0], torch.from_numpy(x.sum(1)).float())
    monkeypatch.chdir(folder)
    kept = Counts(data="a.h5ad, b.h5ad").with_absolute_paths().data
    assert kept == f"{folder / 'a.h5ad'},{folder / 'b.h5ad'}"


@pytest.mark.parametrize("layout", ["coo", "bsr", "dia"])
def test_formats_without_blocks_serve_beside_data_on_disk(
    tmp_path: Path, from_disk: None, layout: str
) -> None:
    x = example_arrays(BIG)["x"]
    paths = [write_npz(tmp_path / f"{kind}.npz", x, kind, False) for kind in ("csr", layout)]
    data = load(",".join(map(str, paths)))
    assert isinstance(data.counts, matrix.DiskCounts)
    indices = np.arange(0, 2 * BIG, 3)
    assert np.array_equal(data.counts.rows(indices).toarray(), np.concatenate((x, x))[indices])
    assert torch.equal(data.library[:, 0], torch.from_numpy(x.sum(1)).float().repeat(2))


def test_half_precision_and_other_byte_orders_on_disk(tmp_path: Path, from_disk: None) -> None:
    x = example_arrays(BIG)["x"]
    csr = scipy.sparse.csr_array(x)
    parts = {"indices": csr.indices.astype(">i8"), "indptr": csr.indptr, "shape": csr.shape, "format": b"csr"}
    for values in (">f2", "<f2", ">i4"):
        np.savez(tmp_path / "cells.npz", data=csr.data.astype(values), **parts)
        assert np.array_equal(load(tmp_path / "cells.npz").counts.rows(np.arange(BIG)).toarray(), x)


# --- The order of an epoch --------------------------------------------------------------------------------------------


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("cells_", [1, 7, 128, 1000, 4096, 5003])
@pytest.mark.parametrize("batch_size", [3, 20, 128])
def test_order_has_every_cell_once(cells_: int, batch_size: int) -> None:
    indices = torch.randperm(cells_, generator=generator(5)) * 2
    order = matrix.shuffle_in_blocks(indices, indices // 64, batch_size, 4, generator())
    assert torch.equal(order.sort().values, indices.sort().values)
    again = matrix.shuffle_in_blocks(indices, indices // 64, batch_size, 4, generator())
    assert torch.equal(order, again)


def test_rounds_need_few_blocks_and_processes_need_different_ones() -> None:
    indices = torch.arange(1 << 14)
    order = matrix.shuffle_in_blocks(indices, indices // 64, 128, 16, generator())
    blocks = order.view(-1, 16, 128) // 64  # rounds of 16 batches
    for part in blocks:
        assert len(part.unique()) <= 2048 // 64 + 2 * matrix.LANES
    for world in (2, 4, 8):
        needed = [
            set(blocks[:, :, r * 128 // world : (r + 1) * 128 // world].flatten().tolist())
            for r in range(world)
        ]
        shared = sum(map(len, needed)) - len(set.union(*needed))
        assert shared < world  # at most one block at each cut
    # Cells that lie side by side in the file are spread over batches.
    batch_of = torch.empty(1 << 14, dtype=torch.int64)
    batch_of[order] = torch.arange(1 << 14) // 128
    assert len(batch_of[:64].unique()) > 12


@pytest.mark.parametrize("world", [2, 3])
def test_batches_from_disk_do_not_depend_on_the_number_of_processes(
    tmp_path: Path, from_disk: None, monkeypatch: pytest.MonkeyPatch, world: int
) -> None:
    """The parts of all processes are the batches of one, for training and validation, in every epoch."""
    monkeypatch.setattr(sources, "BLOCK", 32)
    monkeypatch.setattr(matrix, "BLOCK", 32)
    x = example_arrays(BIG)["x"]
    settings = Counts(data=str(write(tmp_path, "csr .npz", x)), batch_size=24, memory=1, epochs=1)
    data = cells.load(settings)
    data.counts.round_bytes = 20_000
    read: list[set[int]] = []

    def batches(rank: int, world: int, epoch: int, val: bool) -> list[tuple[cells.Batch, int]]:
        module = loader.CellData(data, settings)
        module.trainer = types.SimpleNamespace(global_rank=rank, world_size=world, current_epoch=epoch)
        blocks: set[int] = set()
        original = matrix.DiskCounts.read
        with monkeypatch.context() as patch:
            patch.setattr(matrix.DiskCounts, "read", lambda self, b: (blocks.add(b), original(self, b))[1])
            found = list(module.val_dataloader() if val else module.train_dataloader())
        read.append(blocks)
        return found

    for epoch, val in ((0, False), (1, False), (0, True)):
        whole = batches(0, 1, epoch, val)
        parts = [batches(rank, world, epoch, val) for rank in range(world)]
        for (batch, _), *pieces in zip(whole, *parts, strict=True):
            joined = torch.cat([part.counts.to_dense() for part, _ in pieces])
            assert torch.equal(joined, batch.counts.to_dense()[: len(joined)])
            assert len(batch.library) - len(joined) < (1 if val else world)
            assert torch.equal(batch.library[:, 0], batch.counts.to_dense().sum(1))
            assert [first for _, first in pieces] == [len(joined) * rank // world for rank in range(world)]
        if world == 2:
            one, two = read[-2:]
            assert len(one & two) <= 1
            assert one | two == read[-3]
    # One epoch is a different order of the same cells.
    first, second = (torch.cat([b.library for b, _ in batches(0, 1, e, False)]) for e in (0, 1))
    assert not torch.equal(first, second)
    assert torch.equal(first.sort(0).values, second.sort(0).values)


def test_reading_ahead_holds_two_rounds(
    tmp_path: Path, from_disk: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A round is read while the one before is in use, and no further."""
    monkeypatch.setattr(sources, "BLOCK", 32)
    monkeypatch.setattr(matrix, "BLOCK", 32)
    data = load(write(tmp_path, "csr .npz", example_arrays(BIG)["x"]))
    data.counts.round_bytes = 1.25 * 8 * data.counts.stored / BIG * 64 + 1  # 64 cells
    parts = np.split(np.arange(640), 20)  # one block each, two batches a round
    read: list[int] = []
    original = matrix.DiskCounts.read
    monkeypatch.setattr(matrix.DiskCounts, "read", lambda self, b: (read.append(b), original(self, b))[1])
    for number, rows in enumerate(data.counts.batches(parts)):
        assert rows.shape[0] == 32
        assert len(read) <= 2 * (number // 2 + 2)
    assert read == list(range(20))


# --- Bad files --------------------------------------------------------------------------------------------------------


def with_value(value: float, cell: int = 600) -> np.ndarray:
    x = example_arrays(BIG)["x"].astype(np.float64)
    x[cell, 5] = value
    return x


@pytest.mark.parametrize("form", ["csr .npz", "csc .h5ad", "dense .npz"])
@pytest.mark.parametrize(
    ("value", "words"),
    [(-1, "a count is negative: -1"), (0.5, "a count is fractional, but"), (np.nan, "a count is not finite: nan"),
     (np.inf, "a count is not finite: inf"), (1e39, "a count is too large for float32, in which")],
)  # fmt: skip
@pytest.mark.parametrize("place", ["memory", "disk"])
def test_a_bad_count_is_found_with_its_place(
    tmp_path: Path, form: str, value: float, words: str, place: str, request: pytest.FixtureRequest
) -> None:
    path = write(tmp_path, form, with_value(value))
    if place == "disk":
        request.getfixturevalue("from_disk")
    with pytest.raises(InputError, match=rf"{path}: {words}.* in cell 600, gene 5$"):
        load(path)


def test_large_counts_are_read(tmp_path: Path) -> None:
    largest = float(np.finfo(np.float32).max)
    path = write(tmp_path, "csr .npz", with_value(largest))
    assert load(path).counts.rows(np.array([600]))[0, 5] == largest


def test_files_with_other_genes(tmp_path: Path) -> None:
    pytest.importorskip("h5py")
    x = example_arrays()["x"]
    write_h5ad(tmp_path / "a.h5ad", x)
    write_h5ad(tmp_path / "b.h5ad", x[:, :12])
    with pytest.raises(
        InputError, match=r"b.h5ad: all files must have the same genes: expected 30, .*a.h5ad, got 12"
    ):
        load(tmp_path)
    genes = [f"gene {i}" for i in range(GENES)]
    write_h5ad(tmp_path / "b.h5ad", x, genes=[*genes[:4], "other", *genes[5:]])
    with pytest.raises(InputError, match=r"same order: gene 4 is 'other', but 'gene 4' in .*a.h5ad"):
        load(tmp_path)
    np.savez(tmp_path / "b.npz", x=x, genes=np.array([*genes[:-1], "last"]))
    (tmp_path / "b.h5ad").unlink()
    with pytest.raises(InputError, match=r"b.npz: .* gene 29 is 'last'"):
        load(tmp_path)


def test_missing_files(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"there is no .npz, .h5ad or .zarr in this folder"):
        load(tmp_path)
    path = write(tmp_path, "csr .npz", example_arrays()["x"])
    with pytest.raises(InputError, match=r"second.npz: no such file"):
        load(f"{path},{tmp_path / 'second.npz'}")


@pytest.mark.parametrize("form", ["csr .h5ad", "dense .h5ad", "csr .npz", "csr compressed .npz"])
def test_files_that_were_cut_short(tmp_path: Path, form: str) -> None:
    path = write(tmp_path, form, example_arrays(BIG)["x"])
    content = path.read_bytes()
    path.write_bytes(content[: len(content) * 2 // 3])
    with pytest.raises(InputError, match="cut short; copy or download it again") as caught:
        load(path)
    assert "\n" not in str(caught.value)


def test_a_file_that_is_cut_short_during_training(tmp_path: Path, from_disk: None) -> None:
    path = write(tmp_path, "csr .npz", example_arrays(BIG)["x"])
    data = load(path)
    os.truncate(path, 2000)
    with pytest.raises(InputError, match="the file was cut short"):
        data.counts.rows(np.array([650]))


def test_a_zarr_folder_without_some_of_its_chunks(tmp_path: Path) -> None:
    path = write(tmp_path, "csr .zarr", example_arrays(BIG)["x"])
    chunk = max(path.glob("X/indices/**/3"))
    chunk.unlink()
    with pytest.raises(InputError, match="damaged, or cut short: 1 chunks of X/indices are missing"):
        load(path)


@pytest.mark.parametrize("array", ["X/data", "X/indices", "X/indptr", "obs/kind/codes", "var/_index"])
@pytest.mark.parametrize("place", ["memory", "disk"])
def test_a_zarr_folder_with_a_chunk_that_was_cut_short(
    tmp_path: Path, array: str, place: str, request: pytest.FixtureRequest
) -> None:
    path, arrays = tmp_path / "cells.zarr", example_arrays(BIG)
    zarr = pytest.importorskip("zarr")
    root = zarr.open_group(str(path), mode="w")
    text = np.dtypes.StringDType()
    write_matrix(root, "X", arrays["x"], "csr", {"chunks": (500,)})
    obs = root.create_group("obs", attributes={"_index": "_index", "column-order": ["kind"]})
    kind = obs.create_group("kind")
    kind.create_array("codes", data=np.arange(BIG) % 3)
    kind.create_array("categories", data=np.array(["a", "b", "c"], dtype=text))
    var = root.create_group("var", attributes={"_index": "_index", "column-order": []})
    var.create_array("_index", data=np.array([f"gene {i}" for i in range(GENES)], dtype=text))
    if place == "disk":
        request.getfixturevalue("from_disk")
    assert load(path, label="kind").label_names == ("a", "b", "c")
    chunk = max(each for each in (path / array).glob("c/**/*") if each.is_file())
    os.truncate(chunk, chunk.stat().st_size // 2)
    with pytest.raises(InputError, match=f"{path}: damaged, or cut short: .") as caught:
        load(path, label="kind")
    assert "\n" not in str(caught.value)


def test_sparse_matrices_with_wrong_positions(tmp_path: Path, from_disk: None) -> None:
    csr = scipy.sparse.csr_array(example_arrays(BIG)["x"])
    for name, change, words in (
        (
            "indices",
            lambda a: np.where(np.arange(len(a)) == len(a) - 1, GENES, a),
            "must lie between 0 and 29",
        ),
        ("indices", lambda a: a[:-1], "`indices` must have"),
        ("indptr", lambda a: a[::-1], "`indptr` must have 701 numbers that rise from 0"),
        ("indptr", lambda a: a[:-1], "`indptr` must have 701 numbers that rise from 0"),
    ):
        parts = {key: getattr(csr, key) for key in ("data", "indices", "indptr")}
        parts[name] = change(parts[name])
        np.savez(tmp_path / "cells.npz", shape=csr.shape, format=b"csr", **parts)
        with pytest.raises(InputError, match=words):
            load(tmp_path / "cells.npz")


@pytest.mark.parametrize("form", ["csc .npz", "csr compressed .npz"])
def test_no_room_for_the_temporary_file(
    tmp_path: Path, from_disk: None, monkeypatch: pytest.MonkeyPatch, form: str
) -> None:
    class Full(io.FileIO):
        def write(self, data: Any) -> int:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    path = write(tmp_path, form, example_arrays(BIG)["x"])
    monkeypatch.setattr(sources.tempfile, "TemporaryFile", lambda **options: Full(tmp_path / "scratch", "w"))
    with pytest.raises(InputError, match=r"temporary file in .*: no space left on device; set TMPDIR"):
        load(path)


@pytest.mark.parametrize(("suffix", "package"), [(".h5ad", "h5py"), (".zarr", "zarr")])
def test_packages_that_are_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str, package: str
) -> None:
    path = tmp_path / f"cells{suffix}"
    path.mkdir() if suffix == ".zarr" else path.touch()
    original = __import__

    def importer(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == package:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return original(name, *args, **kwargs)

    monkeypatch.delitem(sys.modules, package, raising=False)
    monkeypatch.setattr("builtins.__import__", importer)
    with pytest.raises(InputError, match=f"need the package {package}: pip install {package}"):
        load(path)
