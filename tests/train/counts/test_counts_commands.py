"""`fastvae encode` and `fastvae reconstruct` of runs of counts, and training from disk."""

import errno
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from counts_files import CELLS, GENES, example_arrays, write_h5ad
from run_files import read_metrics, run_python, weights

from fastvae.cli import main
from fastvae.train import counts
from fastvae.train.counts import cells, generate, kind, matrix, sources

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*torch.jit.script_method:DeprecationWarning"),
    pytest.mark.usefixtures("one_thread", "no_pictures"),
]


def train(out: Path, data: Path | str, *more: str) -> int:
    options = ["--epochs", "2", "--batch-size", "24", "--hidden", "16", "--latent", "4", "--warmup", "none"]
    return main(["train", "counts", "--data", str(data), "--out", str(out), *options, *more])


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("counts")
    np.savez(folder / "cells.npz", **example_arrays())
    assert train(folder / "run", folder / "cells.npz") == 0
    return folder / "run"


def fail(capsys: Any, *arguments: object) -> str:
    capsys.readouterr()
    assert main([str(argument) for argument in arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


# --- encode -----------------------------------------------------------------------------------------------------------


def expected_means(run: Path) -> torch.Tensor:
    """The means of all cells, from the dense matrix."""
    opened = counts.load(run)
    x = torch.from_numpy(example_arrays()["x"]).float()
    with torch.no_grad():
        head = opened.model.encoder(
            cells.Batch(x, x.sum(1, keepdim=True), torch.zeros(CELLS, dtype=torch.int64))
        )
    return head.chunk(2, 1)[0]


def test_encode_writes_the_means_of_all_cells(run: Path, tmp_path: Path, capsys: Any) -> None:
    out = tmp_path / "new" / "latents.npz"
    assert main(["encode", str(run), "--out", str(out)]) == 0
    assert capsys.readouterr().out == f"{out}: `z`, the latent means of 90 cells, 4 dimensions\n"
    z = np.load(out)["z"]
    assert (z.shape, z.dtype) == ((CELLS, 4), np.float32)
    assert np.allclose(z, expected_means(run), atol=1e-5)
    assert [path.name for path in out.parent.iterdir()] == ["latents.npz"]


def test_encode_adds_to_an_h5ad_file(run: Path, tmp_path: Path) -> None:
    h5py = pytest.importorskip("h5py")
    arrays = example_arrays()
    path = write_h5ad(tmp_path / "cells.h5ad", arrays["x"], label=arrays["label"])
    for _ in range(2):  # the second time replaces them
        assert main(["encode", str(run), "--out", str(path)]) == 0
    copy = tmp_path / "copy.h5ad"
    assert main(["encode", str(run), "--data", str(path), "--out", str(copy)]) == 0
    for each in (path, copy):
        with h5py.File(each) as root:
            assert np.allclose(root["obsm/X_fastvae"][:], expected_means(run), atol=1e-5)
            assert root["obsm"].attrs["encoding-type"] == "dict"
            assert root["obsm/X_fastvae"].attrs["encoding-type"] == "array"
        data = cells.load(counts.KIND.recipes[0](data=str(each), label="kind"))
        assert np.array_equal(data.counts.rows(np.arange(CELLS)).toarray(), arrays["x"])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["cells.h5ad", "copy.h5ad"]


def test_encode_compares_the_names_of_the_cells(run: Path, tmp_path: Path, capsys: Any) -> None:
    pytest.importorskip("h5py")
    x = example_arrays()["x"]
    names = [f"cell {i}" for i in range(CELLS)]
    parts = [tmp_path / "a.h5ad", tmp_path / "b.h5ad"]
    write_h5ad(parts[0], x[:50], names=names[:50])
    write_h5ad(parts[1], x[50:], names=names[50:])
    data, out = ",".join(map(str, parts)), tmp_path / "out.h5ad"
    write_h5ad(out, x, names=names)
    assert main(["encode", str(run), "--data", data, "--out", str(out)]) == 0
    write_h5ad(out, x, names=[*names[:60], names[61], names[60], *names[62:]])
    before = out.read_bytes()
    line = fail(capsys, "encode", run, "--data", data, "--out", out)
    assert "in the same order: cell 60 is 'cell 61', but 'cell 60' in the data; " in line
    assert out.read_bytes() == before
    assert main(["encode", str(run), "--out", str(out)]) == 0  # an .npz file has no names


@pytest.mark.slow
def test_anndata_reads_the_latent_means(run: Path, tmp_path: Path) -> None:
    anndata = pytest.importorskip("anndata")
    path = tmp_path / "cells.h5ad"
    anndata.AnnData(example_arrays()["x"].astype(np.float32)).write_h5ad(path)
    assert main(["encode", str(run), "--out", str(path)]) == 0
    assert np.allclose(anndata.read_h5ad(path).obsm["X_fastvae"], expected_means(run), atol=1e-5)


def test_encode_fails_in_one_line(run: Path, tmp_path: Path, capsys: Any) -> None:
    pytest.importorskip("h5py")
    assert "the file must end in .npz or .h5ad" in fail(capsys, "encode", run, "--out", tmp_path / "z.csv")
    assert "no such file, and the data of the run are not one .h5ad file" in fail(
        capsys, "encode", run, "--out", tmp_path / "none.h5ad"
    )
    few = write_h5ad(tmp_path / "few.h5ad", example_arrays()["x"][:7])
    assert f"{few}: expected the 90 cells of the data, got 7" in fail(capsys, "encode", run, "--out", few)
    few.write_bytes(b"nothing")
    assert "cannot be read as an .h5ad file" in fail(capsys, "encode", run, "--out", few)
    assert "cannot be written: it is a folder" in fail(
        capsys, "encode", run, "--out", _folder(tmp_path / "z.npz")
    )


@pytest.mark.parametrize("command", ["encode", "reconstruct"])
def test_files_of_the_data_are_not_replaced(run: Path, tmp_path: Path, capsys: Any, command: str) -> None:
    """Neither those that the run was trained on, nor those of --data, by whatever name."""
    trained, other, link = run.parent / "cells.npz", tmp_path / "other.npz", tmp_path / "link.npz"
    other.write_bytes(trained.read_bytes())
    link.symlink_to(other)
    for data, out in (
        (trained, trained),
        (other, other),
        (other, link),
        (f"{trained},{other}", other),
        (other, trained),
    ):
        assert fail(capsys, command, run, "--data", data, "--out", out) == (
            f"fastvae: --out {out}: this file holds counts of the data, which would be lost; give another name"
        )
    assert "would be lost" in fail(capsys, command, run, "--out", trained)
    for path in (trained, other):
        assert np.array_equal(np.load(path)["x"], example_arrays()["x"])


def _folder(path: Path) -> Path:
    path.mkdir()
    return path


def test_a_full_disk_leaves_nothing_half_written(
    run: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: Any, **options: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(generate.np, "savez", full)
    monkeypatch.setattr(generate.np.lib.format, "write_array_header_1_0", full)
    for command in ("encode", "reconstruct"):
        out = tmp_path / f"{command}.npz"
        assert fail(capsys, command, run, "--out", out) == (
            f"fastvae: {out}: cannot be written: no space left on device"
        )
    assert not list(tmp_path.iterdir())


# --- reconstruct ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("likelihood", ["zinb", "poisson", "multinomial"])
def test_reconstruct_writes_denoised_counts(
    run: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch, likelihood: str
) -> None:
    if likelihood != "zinb":
        run = tmp_path / "run"
        assert train(run, _data(tmp_path), "--likelihood", likelihood) == 0
    monkeypatch.setattr(generate, "_ROWS", 32)
    out = tmp_path / "denoised.npz"
    capsys.readouterr()
    assert main(["reconstruct", str(run), "--out", str(out)]) == 0
    assert capsys.readouterr().out == f"{out}: `x`, denoised counts of 90 cells and 30 genes\n"
    x = np.load(out)["x"]
    assert (x.shape, x.dtype) == ((CELLS, GENES), np.float32)
    # A cell's expected counts sum to its library size, and are those of the decoder at the mean of z.
    counted = example_arrays()["x"]
    assert np.allclose(x.sum(1), counted.sum(1), rtol=1e-5)
    opened = counts.load(run)
    with torch.no_grad():
        logits = opened.model.decoder(expected_means(run), torch.zeros(CELLS, dtype=torch.int64))[0]
    share = np.exp(logits.double().numpy())
    share /= share.sum(1, keepdims=True)
    assert np.allclose(x, share * counted.sum(1, keepdims=True), rtol=1e-4)

    assert main(["reconstruct", str(run), "-n", "40", "--out", str(out)]) == 0
    assert np.array_equal(np.load(out)["x"], x[:40])


def _data(folder: Path, count: int = CELLS) -> Path:
    np.savez(folder / "cells.npz", **example_arrays(count))
    return folder / "cells.npz"


def test_reconstruct_writes_into_the_run_by_default(run: Path, capsys: Any) -> None:
    assert main(["reconstruct", str(run), "-n", "3"]) == 0
    assert np.load(run / "reconstructions.npz")["x"].shape == (3, GENES)
    assert "the name must end in .npz" in fail(capsys, "reconstruct", run, "--out", run / "x.png")
    assert "-n must be at least 1, got 0" in fail(capsys, "reconstruct", run, "-n", "0")
    assert fail(capsys, "reconstruct", run, "--decoding", "beam") == (
        "fastvae: --decoding only applies to runs of text; this is a run of counts"
    )


# --- evaluate ---------------------------------------------------------------------------------------------------------


def test_factors_are_those_of_the_validation_cells(run: Path, tmp_path: Path, capsys: Any) -> None:
    """A file of factors has a row for each cell, of which those of the validation cells are used, in their order."""
    val = counts.load(run).cells.val.numpy()
    factor = np.zeros(CELLS, np.int64)
    factor[val] = np.arange(len(val)) % 3 + np.arange(len(val)) // 8
    file = tmp_path / "factors.npz"
    np.savez(file, place=factor)
    for limit in (len(val), 7):
        more = ("--samples", "2", "--limit", str(limit))
        assert main(["evaluate", str(run), "--factors", str(file), *more]) == 0
        found = json.loads((run / "evaluation.json").read_text())["mig_of_factors"]["place"]
        share = np.unique(factor[val[:limit]], return_counts=True)[1] / limit
        assert found["entropy"] == pytest.approx(-(share * np.log(share)).sum())
    np.savez(file, place=factor[val])
    assert f"expected {CELLS} " in fail(capsys, "evaluate", run, "--factors", file)


# --- Training from disk -----------------------------------------------------------------------------------------------


@pytest.fixture
def from_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources.Source, "nbytes", property(lambda self: 1 << 40))
    monkeypatch.delattr(sources.DenseSource, "nbytes")
    monkeypatch.setattr(sources, "BLOCK", 8)
    monkeypatch.setattr(matrix, "BLOCK", 8)
    monkeypatch.setattr(kind, "BLOCK", 8)


def without_times(run: Path) -> list[dict[str, str]]:
    return [{k: v for k, v in row.items() if k != "seconds"} for row in read_metrics(run)]


def test_a_resumed_run_from_disk_equals_an_uninterrupted_one(
    tmp_path: Path, from_disk: None, capsys: Any
) -> None:
    file, whole, stopped = _data(tmp_path), tmp_path / "whole", tmp_path / "stopped"
    assert train(whole, file, "--epochs", "3") == 0
    assert "read from disk in shuffled blocks of 8 cells, with at most 500 MB" in capsys.readouterr().out
    assert train(stopped, file, "--epochs", "1") == 0
    for epochs in ("2", "3"):
        assert main(["resume", str(stopped), "--epochs", epochs]) == 0
    assert without_times(stopped) == without_times(whole)
    a, b = weights(stopped), weights(whole)
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert main(["evaluate", str(whole), "--samples", "3"]) == 0


def test_the_validation_loss_of_a_run_does_not_depend_on_where_the_counts_are(
    tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """The evaluated cells, and so the importance-weighted bound but for its noise, are the same."""
    file = _data(tmp_path)
    assert train(tmp_path / "run", file) == 0
    opened = counts.load(tmp_path / "run")
    z = np.asarray(generate.posterior_means(opened.model, opened.cells, torch.arange(CELLS)))
    request.getfixturevalue("from_disk")
    again = counts.load(tmp_path / "run")
    assert isinstance(again.cells.counts, matrix.DiskCounts)
    indices = torch.randperm(CELLS)
    assert np.array_equal(generate.posterior_means(again.model, again.cells, indices), z[indices.numpy()])
    assert torch.equal(again.cells.val, opened.cells.val.sort().values)


def test_a_bad_count_ends_the_command(tmp_path: Path, from_disk: None, capsys: Any) -> None:
    x = example_arrays()["x"].astype(float)
    x[70, 3] = np.nan
    np.savez(tmp_path / "cells.npz", x=x)
    assert "a count is not finite: nan in cell 70, gene 3" in fail(
        capsys, "train", "counts", "--data", tmp_path / "cells.npz", "--out", tmp_path / "run"
    )
    assert not (tmp_path / "run").exists()


RANKS = """
import sys
from fastvae import cli
from fastvae.train.counts import matrix, sources
sources.Source.nbytes = property(lambda self: 1 << 40)
del sources.DenseSource.nbytes
sources.BLOCK = matrix.BLOCK = 8
sys.exit(cli.main(sys.argv[1:]))
"""


@pytest.mark.slow
def test_two_processes_train_from_disk_like_one(tmp_path: Path) -> None:
    # 72 cells are for training, in whole batches: two processes would drop the last cell of an odd batch.
    file, script = _data(tmp_path, 86), tmp_path / "train.py"
    script.write_text(RANKS)
    for devices in ("1", "2"):
        done = run_python(
            str(script), "train", "counts", "--data", str(file), "--out", str(tmp_path / devices), "--epochs", "3",
            "--batch-size", "24", "--hidden", "16", "--dropout", "0", "--accelerator", "cpu", "--devices", devices,
            "--strategy", "auto" if devices == "1" else "ddp",
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert "read from disk" in done.stdout
    one, two = read_metrics(tmp_path / "1"), read_metrics(tmp_path / "2")
    assert len(one) == len(two) == 3
    for a, b in zip(one, two, strict=True):
        for name in a.keys() - {"seconds"}:
            assert float(a[name]) == pytest.approx(float(b[name]), rel=1e-4), name
    a, b = weights(tmp_path / "1"), weights(tmp_path / "2")
    assert any(not torch.equal(a[name], b[name]) for name in a)  # there really were two processes
