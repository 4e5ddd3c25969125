"""`fastvae train counts`: runs, reading files of counts, and errors for bad files."""

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.sparse
import torch
from counts_files import CELLS, GENES, example_arrays
from PIL import Image

from fastvae.cli import main
from fastvae.train import counts
from fastvae.train.counts import cells
from fastvae.train.counts.callbacks import posterior_means
from fastvae.train.counts.recipe import Counts
from fastvae.train.errors import InputError

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*torch.jit.script_method:DeprecationWarning"),
    # The recipe also works if the kernels of its likelihood are missing.
    pytest.mark.filterwarnings("default:fastvae runs the likelihood:RuntimeWarning"),
]


def train(out: Path, data: Path, *more: str) -> int:
    options = ["--epochs", "2", "--batch-size", "32", "--hidden", "16", "--latent", "4", "--warmup", "none"]
    return main(["train", "counts", "--data", str(data), "--out", str(out), *options, *more])


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "cells.npz"
    np.savez(path, **example_arrays())
    return path


def read_metrics(run: Path) -> list[dict[str, str]]:
    with (run / "metrics.csv").open() as lines:
        return [{k: v for k, v in row.items() if k != "seconds"} for row in csv.DictReader(lines)]


# --- Training ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        (),
        pytest.param(("--likelihood", "nb"), marks=pytest.mark.slow),
        ("--likelihood", "poisson"),
        pytest.param(("--dispersion", "gene-cell"), marks=pytest.mark.slow),
        ("--likelihood", "nb", "--dispersion", "gene-cell", "--layers", "2"),
    ],
    ids=" ".join,
)
def test_train_and_evaluate_write_their_files(
    file: Path, tmp_path: Path, capsys: Any, options: tuple[str, ...]
) -> None:
    run = tmp_path / "run"
    assert train(run, file, *options, "--epochs", "4") == 0
    rows = read_metrics(run)
    assert len(rows) == 4
    assert float(rows[-1]["val_neg_elbo"]) < float(rows[0]["val_neg_elbo"])
    assert {"config.toml", "cells.json", "latents.png", "loss.png", "checkpoints"} <= {
        p.name for p in run.iterdir()
    }
    output = capsys.readouterr().out
    assert "75 training cells, 15 validation cells, 30 genes" in output
    assert "fastvae sample" not in output

    assert main(["evaluate", str(run), "--samples", "5"]) == 0
    written = json.loads((run / "evaluation.json").read_text())
    assert written["cells"] == 15
    assert written["iw_nll"] < written["neg_elbo"]
    assert abs(written["neg_elbo"] - written["reconstruction"] - written["kl"]) < 1e-6
    assert "nats per cell" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "metric"),
    [(("beta-tc", "--beta", "6"), "train_total_correlation"), (("info", "--mmd-weight", "50"), "train_mmd")],
    ids=["beta-tc", "info"],
)
def test_objectives_of_a_batch_train(
    file: Path, tmp_path: Path, options: tuple[str, ...], metric: str
) -> None:
    assert train(tmp_path / "run", file, "--epochs", "1", "--objective", *options) == 0
    (row,) = read_metrics(tmp_path / "run")
    assert np.isfinite(float(row["train_nll"]))
    assert float(row[metric]) != 0


def test_resumed_run_equals_uninterrupted_run(file: Path, tmp_path: Path) -> None:
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    assert train(whole, file, "--epochs", "3") == 0
    assert train(stopped, file, "--epochs", "2") == 0
    assert main(["resume", str(stopped), "--epochs", "3"]) == 0
    assert read_metrics(stopped) == read_metrics(whole)
    weights = [
        torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
        for run in (whole, stopped)
    ]
    assert weights[0].keys() == weights[1].keys()
    for name in weights[0]:
        assert torch.equal(weights[0][name], weights[1][name]), name


@pytest.mark.slow
def test_latent_means_separate_cell_types(file: Path, tmp_path: Path) -> None:
    """The latent mean of a cell is closest to the centre of its own type."""
    run = tmp_path / "run"
    assert train(run, file, "--epochs", "60", "--lr", "0.01") == 0
    opened = counts.load(run)
    data = opened.cells
    mu = posterior_means(opened.model, data, data.val)
    labels = data.labels[data.val]
    trained = posterior_means(opened.model, data, data.train)
    centres = torch.stack([trained[data.labels[data.train] == kind].mean(0) for kind in range(3)])
    assert (torch.cdist(mu, centres).argmin(1) == labels).float().mean() > 0.9
    picture = np.asarray(Image.open(run / "latents.png").convert("RGB")).reshape(-1, 3)
    assert len(np.unique(picture, axis=0)) > 10  # the picture has colours


def test_batch_covariate_is_numbered_as_in_training(file: Path, tmp_path: Path) -> None:
    """Batches of other data are numbered as in the run, and unknown ones are refused."""
    arrays = example_arrays()
    batch = np.where(np.arange(CELLS) < 45, "first", "second")
    np.savez(file, **arrays, batch=batch)
    run = tmp_path / "run"
    assert train(run, file) == 0
    opened = counts.load(run)
    assert opened.sizes.batches == ("first", "second")
    assert opened.model.encoder.layers[0].in_features == GENES + 2
    assert (opened.cells.batches == torch.tensor(batch == "second").long()).all()

    second = tmp_path / "second.npz"
    np.savez(second, x=arrays["x"][50:], batch=batch[50:])
    assert (counts.load(run, data=str(second)).cells.batches == 1).all()
    np.savez(second, x=arrays["x"][50:], batch=np.full(40, "third"))
    with pytest.raises(InputError, match=r"the batch 'third' is not one of those .*: 'first', 'second'"):
        _ = counts.load(run, data=str(second)).cells
    np.savez(second, x=arrays["x"][50:], lane=batch[50:])
    words = r"second.npz: the column `batch` is missing, which the run was trained with; the file has only lane \(the"
    with pytest.raises(InputError, match=words):
        _ = counts.load(run, data=str(second)).cells


def test_batches_of_other_data_are_ignored_by_a_run_without(file: Path, tmp_path: Path) -> None:
    run, other = tmp_path / "run", tmp_path / "other.npz"
    assert train(run, file, "--epochs", "1") == 0
    np.savez(other, **example_arrays(), batch=np.arange(CELLS) % 2)
    data = counts.load(run, data=str(other)).cells
    assert data.batch_names == ("",)
    assert not data.batches.any()


def test_the_genes_of_other_data_are_those_of_the_run(file: Path, tmp_path: Path, capsys: Any) -> None:
    arrays, names = example_arrays(), [f"gene {i}" for i in range(GENES)]
    np.savez(file, **arrays, genes=names)
    run, other = tmp_path / "run", tmp_path / "other.npz"
    assert train(run, file, "--epochs", "1") == 0
    assert json.loads((run / "cells.json").read_text())["gene_names"] == names
    np.savez(other, **arrays)  # without names, nothing is compared
    assert counts.load(run, data=str(other)).cells.genes == GENES
    order = [*range(7), 8, 7, *range(9, GENES)]
    np.savez(other, x=arrays["x"][:, order], genes=np.array(names)[order])
    words = f"gene 7 is 'gene 8', but 'gene 7' there; `gene_names` in {run / 'cells.json'} lists them"
    for command in ("evaluate", "reconstruct", "encode --out z.npz", "resume --epochs 2"):
        capsys.readouterr()
        name, *more = command.split()
        assert main([name, str(run), "--data", str(other), *more]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.endswith(words)
    # Older runs have no names.
    table = json.loads((run / "cells.json").read_text())
    del table["gene_names"]
    (run / "cells.json").write_text(json.dumps(table))
    assert counts.load(run, data=str(other)).cells.genes == GENES


@pytest.mark.parametrize("command", ["sample", "interpolate", "traverse", "inpaint"])
def test_image_commands_on_count_run_fail(file: Path, tmp_path: Path, capsys: Any, command: str) -> None:
    run = tmp_path / "run"
    assert train(run, file, "--epochs", "1") == 0
    assert main([command, str(run)]) == 2
    assert capsys.readouterr().err.splitlines() == [
        f"fastvae: {run}: this is a run of counts, which supports only evaluate, encode, reconstruct and resume"
    ]
    if command == "interpolate":
        assert main([command, str(run), "one sentence", "another"]) == 2
        assert "this is a run of counts, which supports only" in capsys.readouterr().err
    if command == "sample":
        assert main([command, str(run), "--best", "4"]) == 2
        assert (
            capsys.readouterr().err
            == "fastvae: --best only applies to runs of images; this is a run of counts\n"
        )


# --- Files ------------------------------------------------------------------------------------------------------------


def load(path: Path, **settings: Any) -> cells.Cells:
    return cells.load(Counts(data=str(path), **settings))


@pytest.mark.parametrize(
    "form",
    ["x", "counts", "csr", "csc", "bsr", "coo", "dia", "float", "half", "other byte order", "half csr"],
)
def test_load_reads_all_matrix_formats(tmp_path: Path, form: str) -> None:
    arrays, path = example_arrays(), tmp_path / "cells.npz"
    if form in ("csr", "csc", "bsr", "coo", "dia"):
        scipy.sparse.save_npz(path, getattr(scipy.sparse, f"{form}_matrix")(arrays["x"]))
    elif form == "half csr":  # scipy can neither create nor save it
        csr = scipy.sparse.csr_array(arrays["x"])
        parts = {"indices": csr.indices, "indptr": csr.indptr, "shape": csr.shape, "format": b"csr"}
        np.savez(path, data=csr.data.astype(">f2"), **parts)
    elif form in ("float", "half", "other byte order"):
        kind = {"float": "f8", "half": "f2", "other byte order": ">i4"}[form]
        np.savez(path, x=arrays["x"].astype(kind))
    else:
        np.savez(path, **{form: arrays["x"]})
    data = load(path)
    assert data.labels is None
    all_indices = torch.cat((data.val, data.train))
    assert sorted(all_indices.tolist()) == list(range(CELLS))
    batch = cells.make_batch(data, all_indices)
    assert batch.counts.layout == torch.sparse_csr
    dense = batch.counts.to_dense()
    assert np.array_equal(dense.numpy(), arrays["x"][all_indices.numpy()])
    assert torch.equal(batch.library, dense.sum(1, keepdim=True))


def test_load_with_unused_pickled_column_ignores_it(tmp_path: Path) -> None:
    path = tmp_path / "CELLS.NPZ"
    with path.open("wb") as file:
        np.savez(file, **example_arrays(), cell_type=np.array(["T", None] * (CELLS // 2), dtype=object))
    assert load(path).label_names == ("B", "NK", "T")
    with pytest.raises(InputError, match="`cell_type` is stored as pickled Python objects"):
        load(path, label="cell_type")


def test_load_splits_by_seed(file: Path) -> None:
    assert torch.equal(load(file).val, load(file).val)
    assert not torch.equal(load(file).val, load(file, seed=1).val)


def test_load_reads_labels(file: Path) -> None:
    data = load(file)
    assert data.label_names == ("B", "NK", "T")
    assert [data.label_names[i] for i in data.labels[:3]] == ["B", "NK", "T"]
    np.savez(file, **example_arrays(), kind=np.arange(CELLS) % 2)
    assert load(file, label="kind").label_names == ("0", "1")


@pytest.mark.parametrize("likelihood", ["zinb", "nb", "poisson", "multinomial"])
def test_empty_cells_train(file: Path, tmp_path: Path, capsys: Any, likelihood: str) -> None:
    """They are counted before training, and add nothing to the loss but their KL."""
    arrays = example_arrays()
    arrays["x"][[4, 5, 77]] = 0
    np.savez(file, **arrays)
    data = load(file)
    assert sorted(torch.cat((data.val, data.train)).tolist()) == list(range(CELLS))
    assert train(tmp_path / "run", file, "--likelihood", likelihood) == 0
    output = capsys.readouterr().out
    assert "warning: 3 of the 90 cells have no counts; they are trained on as they are" in output
    assert "skipped" not in output
    opened = counts.load(tmp_path / "run")
    batch = cells.make_batch(opened.cells, torch.tensor([4, 5]))
    z = torch.randn(2, 4, requires_grad=True)
    nll = opened.model.nll(z, batch)
    (gradient,) = torch.autograd.grad(nll.sum(), z)
    assert not nll.any()
    assert not gradient.any()
    assert main(["evaluate", str(tmp_path / "run"), "--samples", "3"]) == 0


def arrays_with(**arrays: Any) -> dict[str, Any]:
    return {name: value for name, value in {**example_arrays(), **arrays}.items() if value is not None}


def with_count(value: float) -> np.ndarray:
    x = example_arrays()["x"].astype(float)
    x[2, 5] = value
    return x


BAD = {
    "no file": (None, "no such file"),
    "negative": (arrays_with(x=with_count(-1)), "a count is negative: -1 in cell 2, gene 5"),
    "fractional": (
        arrays_with(x=with_count(0.5)),
        "a count is fractional, but raw counts are needed (normalised or log-transformed?): 0.5 in cell 2, gene 5",
    ),
    "infinite": (arrays_with(x=with_count(np.inf)), "a count is not finite: inf in cell 2, gene 5"),
    "no genes": (
        arrays_with(x=np.zeros((CELLS, 0))),
        f"there are no genes: the counts have shape ({CELLS}, 0)",
    ),
    "no cells": (
        arrays_with(x=np.zeros((0, 3)), label=None),
        "there are no cells: the counts have shape (0, 3)",
    ),
    "one cell": (
        arrays_with(x=np.ones((1, 3)), label=None),
        "expected at least 2 cells, for training and validation, got 1",
    ),
    "words": (arrays_with(x=np.full((CELLS, 3), "a")), "the counts must be numbers, got <U1"),
    "a cube": (arrays_with(x=np.zeros((3, 4, 5))), "must be a matrix, cells by genes, got shape (3, 4, 5)"),
    "labels of others": (
        arrays_with(label=np.arange(7)),
        f"`label` must have one value for each of the {CELLS} cells, got shape (7,)",
    ),
    "batches of others": (arrays_with(batch=np.arange(7)), "`batch` must have one value for each"),
    "no matrix": (
        arrays_with(x=None),
        "the file contains label; save the counts, cells by genes, with scipy.sparse.save_npz(path",
    ),
    "a sparse matrix that is none": (
        arrays_with(
            x=None, data=np.ones(3), indices=np.zeros(3), indptr=np.array([0, 9]), shape=np.array([1, 2])
        ),
        "not a valid sparse matrix",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_train_with_bad_file_fails_in_one_line(tmp_path: Path, capsys: Any, name: str) -> None:
    arrays, words = BAD[name]
    path = tmp_path / "cells.npz"
    if arrays is not None:
        np.savez(path, **arrays)
    assert train(tmp_path / "run", path) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert words in line
    assert not (tmp_path / "run").exists()


BAD_OPTIONS = {
    "no data": (["train", "counts"], "--data is missing"),
    "another file": (["train", "counts", "--data", __file__], "the file must end in .npz, .h5ad or .zarr"),
    "no such label": (["--label", "kind"], "has no such column, only label"),
    "no such likelihood": (
        ["--likelihood", "normal"],
        "--likelihood must be one of zinb, nb, poisson, multinomial",
    ),
    "no such decoder": (["--decoder", "conv"], "--decoder must be one of mlp, linear, topics, got 'conv'"),
    "dispersion of a multinomial": (
        ["--likelihood", "multinomial", "--dispersion", "gene-cell"],
        "--dispersion only applies to --likelihood zinb or nb, got multinomial",
    ),
    "all of the input dropped": (
        ["--input-dropout", "1"],
        "--input-dropout must be at least 0 and below 1, got 1",
    ),
    "dispersion of none": (
        ["--likelihood", "poisson", "--dispersion", "gene-cell"],
        "--dispersion only applies to --likelihood zinb or nb, got poisson",
    ),
}


@pytest.mark.parametrize("name", BAD_OPTIONS)
def test_train_with_bad_options_fails_in_one_line(file: Path, tmp_path: Path, capsys: Any, name: str) -> None:
    options, words = BAD_OPTIONS[name]
    if options[0] != "train":
        options = ["train", "counts", "--data", str(file), *options]
    assert main([*options, "--out", str(tmp_path / "run")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert words in line


def test_train_with_damaged_file_fails(tmp_path: Path, capsys: Any) -> None:
    path = tmp_path / "cells.npz"
    path.write_bytes(b"PK\x03\x04 and nothing more")
    assert train(tmp_path / "run", path) == 2
    assert "the file was cut short; copy or download it again" in capsys.readouterr().err


def test_commands_with_other_genes_or_missing_data_fail(file: Path, tmp_path: Path, capsys: Any) -> None:
    run = tmp_path / "run"
    assert train(run, file, "--epochs", "1") == 0
    other = tmp_path / "other.npz"
    np.savez(other, x=example_arrays(genes=12)["x"])
    capsys.readouterr()
    assert main(["evaluate", str(run), "--data", str(other)]) == 2
    assert f"expected {GENES} genes as in {run}, got 12" in capsys.readouterr().err
    file.unlink()
    assert main(["resume", str(run), "--epochs", "2"]) == 2
    assert f"(the data of {run}; use --data to give other data)" in capsys.readouterr().err
