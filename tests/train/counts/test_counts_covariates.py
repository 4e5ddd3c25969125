"""Covariates of cells, and dispersions of batches and labels."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from counts_files import CELLS, example_arrays, write_h5ad
from run_files import read_metrics, weights

from fastvae import functional
from fastvae.cli import main
from fastvae.train import counts, runs
from fastvae.train.counts import cells, sources
from fastvae.train.counts.conditions import Conditions
from fastvae.train.counts.recipe import Counts
from fastvae.train.errors import InputError

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*torch.jit.script_method:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta state"),
    pytest.mark.usefixtures("one_thread", "no_pictures"),
]

DONOR = np.array(["ann", "bob", "eve"])[np.arange(CELLS) // 2 % 3]
AGE = 40 + 10 * np.random.default_rng(5).standard_normal(CELLS)
BATCH = np.array(["first", "second"])[np.arange(CELLS) // 45]
COVARIATES = ("--covariates", "donor, age,run")


def arrays(**more: Any) -> dict[str, Any]:
    return {
        **example_arrays(),
        "batch": BATCH,
        "donor": DONOR,
        "age": AGE,
        "run": np.arange(CELLS) % 2,
        **more,
    }


@pytest.fixture
def file(tmp_path: Path) -> Path:
    np.savez(tmp_path / "cells.npz", **arrays())
    return tmp_path / "cells.npz"


def train(out: Path, data: Path, *more: str) -> int:
    options = ["--epochs", "2", "--batch-size", "24", "--hidden", "16", "--latent", "4", "--warmup", "none"]
    return main(["train", "counts", "--data", str(data), "--out", str(out), *options, *more])


# --- Covariates -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batches", [1, 3])
@pytest.mark.parametrize("categories", [(), (0,), (2, 0, 3)])
def test_columns_are_the_same_for_sparse_and_dense_rows(batches: int, categories: tuple[int, ...]) -> None:
    rng = np.random.default_rng(0)
    x = torch.from_numpy(rng.poisson(0.5, (7, 5))).float()
    batch = torch.arange(7) % batches
    covariates = torch.tensor(
        [[rng.integers(c) if c else rng.normal() for c in categories] for _ in x]
    ).float()
    conditions = Conditions(batches, categories)
    dense = conditions.append(x, batch, covariates)
    parts = [x] + ([torch.eye(batches)[batch]] if batches > 1 else [])
    for i, count in enumerate(categories):
        parts.append(torch.eye(count)[covariates[:, i].long()] if count else covariates[:, i : i + 1])
    assert torch.equal(dense, torch.cat(parts, 1))
    assert dense.shape[1] == 5 + conditions.width
    rows = conditions.append(x.to_sparse_csr(), batch, covariates)
    torch.sparse_csr_tensor(  # raises an error unless the columns ascend
        rows.crow_indices(), rows.col_indices(), rows.values(), rows.shape, check_invariants=True
    )
    assert torch.equal(rows.to_dense(), dense)


def test_covariates_are_read_and_stored(file: Path, tmp_path: Path, capsys: Any) -> None:
    run = tmp_path / "run"
    assert train(run, file, *COVARIATES) == 0
    written = capsys.readouterr().out
    assert "covariate donor: 3 categories" in written
    assert "covariate age: continuous" in written
    assert "covariate run: 2 categories" in written
    opened = counts.load(run)
    stored = json.loads((run / "cells.json").read_text())["covariates"]
    of_train = AGE[opened.cells.train]
    assert [each["name"] for each in stored] == ["donor", "age", "run"]
    assert [each["categories"] for each in stored] == [["ann", "bob", "eve"], [], ["0", "1"]]
    assert stored[1]["mean"] == pytest.approx(of_train.mean())
    assert stored[1]["scale"] == pytest.approx(of_train.std())
    assert opened.model.encoder.layers[0].in_features == 30 + 2 + 3 + 1 + 2
    assert opened.model.decoder.layers[0].in_features == 4 + 2 + 3 + 1 + 2
    given = cells.make_batch(opened.cells, torch.arange(CELLS)).covariates
    expected = [
        np.unique(DONOR, return_inverse=True)[1],
        (AGE - of_train.mean()) / of_train.std(),
        np.arange(CELLS) % 2,
    ]
    assert np.allclose(given.numpy(), np.stack(expected, 1), atol=1e-5)


@pytest.mark.parametrize("from_disk", [False, True])
def test_runs_with_covariates_resume_and_serve_every_command(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, from_disk: bool
) -> None:
    if from_disk:
        monkeypatch.setattr(sources.Source, "nbytes", property(lambda self: 1 << 40))
        monkeypatch.delattr(sources.DenseSource, "nbytes")
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    options = (*COVARIATES, "--prior", "vamp", "--components", "6", "--samples", "2")
    assert train(whole, file, *options) == 0
    assert train(stopped, file, *options, "--epochs", "1") == 0
    assert main(["resume", str(stopped), "--epochs", "2"]) == 0
    a, b = weights(stopped), weights(whole)
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert a["pseudo_covariates"].shape == (6, 3)
    for command in ("evaluate --samples 2", "encode --out z.npz", "reconstruct --out x.npz"):
        name, *more = command.split()
        more = [str(tmp_path / each) if each.endswith("npz") else each for each in more]
        assert main([name, str(whole), *more]) == 0
    # Both networks depend on the covariates.
    model, data = counts.load(whole).model, counts.load(whole).cells
    batch = cells.make_batch(data, torch.arange(8))
    other = batch._replace(covariates=batch.covariates + torch.tensor([0.0, 1.0, 0.0]))
    with torch.no_grad():
        z = model.encode(batch)[0]
        assert not torch.allclose(z, model.encode(other)[0])
        assert not torch.allclose(model.denoised(z, batch), model.denoised(z, other))


def test_covariates_of_other_data_are_those_of_the_run(file: Path, tmp_path: Path) -> None:
    run, other = tmp_path / "run", tmp_path / "other.npz"
    assert train(run, file, *COVARIATES, "--epochs", "1") == 0

    def load(**changes: Any) -> cells.Batch:
        chosen = {name: values[50:60] for name, values in arrays(**changes).items()}
        np.savez(other, **chosen)
        return cells.make_batch(counts.load(run, data=str(other)).cells, torch.arange(10))

    expected = cells.make_batch(counts.load(run).cells, torch.arange(50, 60)).covariates
    assert torch.equal(load().covariates, expected)
    bob = np.full(CELLS, "bob")
    assert load(donor=bob).covariates[:, 0].tolist() == [1] * 10
    rounded = load(age=AGE.round().astype(int)).covariates
    assert np.allclose(rounded, load(age=AGE.round()).covariates)
    for changes, words in (
        (
            {"donor": np.full(CELLS, "zoe")},
            "the covariate donor 'zoe' is not one of those that .*: 'ann', 'bob'",
        ),
        ({"donor": AGE}, "the covariate donor '.*' is not one of those"),
        ({"age": DONOR}, "`age` must be numbers, as in the data that the run was trained on, got "),
        ({"run": np.full(CELLS, 7)}, "the covariate run '7' is not one of those"),
    ):
        with pytest.raises(InputError, match=words):
            load(**changes)
    (run / "config.toml").write_text((run / "config.toml").read_text().replace("donor, age,run", "age"))
    with pytest.raises(InputError, match="the run was trained with other covariates: donor, age, run"):
        _ = counts.load(run).cells
    (run / "config.toml").write_text((run / "config.toml").read_text().replace('"age"', '"donor,age,run"'))
    np.savez(other, x=example_arrays()["x"], donor=DONOR, batch=BATCH)
    with pytest.raises(InputError, match=r"--covariates age: .* has no such column, only donor, batch"):
        _ = counts.load(run, data=str(other)).cells


def test_numbers_in_h5ad_files_are_continuous_if_they_are_floats(tmp_path: Path) -> None:
    h5py = pytest.importorskip("h5py")
    path = write_h5ad(tmp_path / "cells.h5ad", example_arrays()["x"], label=DONOR)
    with h5py.File(path, "r+") as root:
        root["obs"].attrs["column-order"] = ["kind", "age", "run", "treated"]
        root["obs"]["age"], root["obs"]["run"] = AGE, np.arange(CELLS) % 3
        root["obs"]["treated"] = np.arange(CELLS) % 2 == 0
    data = cells.load(Counts(data=str(path), covariates="kind,age,run,treated"))
    assert [covariate.categories for covariate in data.covariates] == [
        ("ann", "bob", "eve"),
        (),
        ("0", "1", "2"),
        ("False", "True"),
    ]
    assert np.allclose(data.covariate_values[:, 1], AGE)


BAD = {
    "no such column": (
        arrays(),
        "donor,sex",
        "--covariates sex: {file} has no such column, only label, batch",
    ),
    "twice": (arrays(), "age,donor,age", "--covariates age,donor,age: age is given twice"),
    "not finite": (
        arrays(age=np.where(np.arange(CELLS) == 3, np.nan, AGE)),
        "age",
        "{file}: `age` must be finite, got nan in cell 3",
    ),
    "of others": (arrays(age=AGE[:5]), "age", "{file}: `age` must have one value for each of the 90 cells"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_covariates_fail_in_one_line(file: Path, tmp_path: Path, capsys: Any, name: str) -> None:
    stored, keys, words = BAD[name]
    np.savez(file, **stored)
    assert train(tmp_path / "run", file, "--covariates", keys) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert words.format(file=file) in line
    assert not (tmp_path / "run").exists()


def test_whole_numbers_with_too_many_values_are_refused(tmp_path: Path) -> None:
    x = np.tile(example_arrays()["x"], (2, 1))
    np.savez(tmp_path / "cells.npz", x=x, total=np.arange(2 * CELLS))
    with pytest.raises(
        InputError, match="180 different whole numbers would be as many categories; save them"
    ):
        cells.load(Counts(data=str(tmp_path / "cells.npz"), covariates="total"))


def test_more_categories_than_bfloat16_can_count_are_refused(tmp_path: Path, capsys: Any) -> None:
    x = np.tile(example_arrays()["x"], (3, 1))
    np.savez(tmp_path / "cells.npz", x=x, donor=np.array([f"d{i}" for i in range(len(x))]))
    options = ("--covariates", "donor", "--precision", "bf16-true")
    assert train(tmp_path / "run", tmp_path / "cells.npz", *options) == 2
    assert (
        "bfloat16 tells only 256 categories apart, but the covariate donor has 270" in capsys.readouterr().err
    )


# --- Dispersions ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("likelihood", ["nb", "zinb"])
@pytest.mark.parametrize("dispersion", ["gene-batch", "gene-label"])
def test_each_group_has_dispersions_of_its_own(
    file: Path, tmp_path: Path, capsys: Any, likelihood: str, dispersion: str
) -> None:
    run = tmp_path / "run"
    options = ("--likelihood", likelihood, "--dispersion", dispersion)
    assert train(run, file, *options, "--samples", "2") == 0
    assert f"one dispersion for each gene in each {dispersion[5:]}" in capsys.readouterr().out
    assert main(["evaluate", str(run), "--samples", "2"]) == 0
    opened = counts.load(run)
    model, group = opened.model, opened.cells.batches if dispersion == "gene-batch" else opened.cells.labels
    groups = 2 if dispersion == "gene-batch" else 3
    assert model.log_dispersions.shape == (groups, 30)
    assert (model.log_dispersions != 0).all()
    assert not hasattr(model.likelihood, "log_dispersion")
    assert any(parameter is model.log_dispersions for parameter in model.scale_parameters())
    # The loss is that of each cell with the dispersions of its group.
    index = torch.tensor([3, 70, 8, 51, 4])
    batch = cells.make_batch(opened.cells, index)
    z = torch.randn(10, 4)
    with torch.no_grad():
        found = model.likelihood.nll(model.params(z, batch), batch.counts.to_dense().repeat(2, 1))
        logits, *zi = model.decoder(z, batch.batch.repeat(2))
        rate = batch.library.repeat(2, 1) * logits.softmax(1)
        theta = model.log_dispersions.exp()[group[index]].repeat(2, 1)
        target = batch.counts.to_dense().repeat(2, 1)
        if likelihood == "nb":
            expected = functional.negative_binomial_nll(rate, target, theta)
        else:
            expected = functional.zero_inflated_negative_binomial_nll(rate, target, theta, zi[0])
    assert torch.allclose(found, expected, rtol=1e-4)


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "64-true"])
def test_covariates_and_dispersions_train_in_every_precision(
    file: Path, tmp_path: Path, precision: str
) -> None:
    options = (*COVARIATES, "--dispersion", "gene-batch", "--precision", precision)
    assert train(tmp_path / "run", file, *options, "--epochs", "1") == 0
    assert (counts.load(tmp_path / "run").model.log_dispersions != 0).any()


def test_dispersions_of_a_resumed_run_equal_those_of_an_uninterrupted_one(file: Path, tmp_path: Path) -> None:
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    assert train(whole, file, "--dispersion", "gene-label") == 0
    assert train(stopped, file, "--dispersion", "gene-label", "--epochs", "1") == 0
    assert main(["resume", str(stopped), "--epochs", "2"]) == 0
    a, b = weights(stopped), weights(whole)
    assert torch.equal(a["log_dispersions"], b["log_dispersions"])
    assert [row["val_neg_elbo"] for row in read_metrics(stopped)] == [
        row["val_neg_elbo"] for row in read_metrics(whole)
    ]


def test_a_new_model_starts_at_the_dispersions_of_the_others(file: Path) -> None:
    """With dispersions of 1, the loss is the same as with one for each gene."""
    data = cells.load(Counts(data=str(file)))
    batch, losses = cells.make_batch(data, torch.arange(9)), []
    for dispersion in ("gene", "gene-batch", "gene-label"):
        settings = Counts(data=str(file), dispersion=dispersion, latent=4)
        model = runs.new_model(counts.KIND, settings, counts.KIND.make_form(settings, data), data)
        losses.append(model.nll(torch.ones(9, 4), batch))
    assert torch.allclose(losses[0], losses[1])
    assert torch.allclose(losses[0], losses[2])


def test_labels_of_other_data_are_numbered_as_in_the_run(file: Path, tmp_path: Path, capsys: Any) -> None:
    run, other = tmp_path / "run", tmp_path / "other.npz"
    assert train(run, file, "--dispersion", "gene-label", "--epochs", "1") == 0
    stored = arrays()
    np.savez(other, **{**stored, "label": np.full(CELLS, "T")})
    assert (counts.load(run, data=str(other)).cells.labels == 2).all()
    np.savez(other, **{**stored, "label": np.full(CELLS, "Treg")})
    with pytest.raises(InputError, match=r"the label 'Treg' is not one of those .*: 'B', 'NK', 'T'"):
        _ = counts.load(run, data=str(other)).cells
    np.savez(other, x=stored["x"], batch=BATCH)
    capsys.readouterr()
    assert main(["evaluate", str(run), "--data", str(other)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line == (f"fastvae: {other}: labels are missing, which --dispersion gene-label of {run} needs")


@pytest.mark.parametrize(("dispersion", "option"), [("gene-batch", "batches"), ("gene-label", "labels")])
def test_dispersions_of_missing_groups_are_refused(
    tmp_path: Path, capsys: Any, dispersion: str, option: str
) -> None:
    np.savez(tmp_path / "cells.npz", x=example_arrays()["x"])
    assert train(tmp_path / "run", tmp_path / "cells.npz", "--dispersion", dispersion) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"--dispersion {dispersion} needs the {option} of the cells; give their key with" in line
    assert not (tmp_path / "run").exists()


def test_older_runs_are_read(file: Path, tmp_path: Path) -> None:
    """Their cells.json has neither labels nor covariates."""
    run = tmp_path / "run"
    assert train(run, file, "--epochs", "1") == 0
    table = json.loads((run / "cells.json").read_text())
    (run / "cells.json").write_text(json.dumps({name: table[name] for name in ("genes", "batches")}))
    opened = counts.load(run)
    assert dataclasses.asdict(opened.form) == {
        "genes": 30, "batches": ("first", "second"), "labels": (), "covariates": (), "gene_names": (),
    }  # fmt: skip
    assert opened.cells.covariates == ()
