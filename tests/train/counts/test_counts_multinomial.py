"""Runs with a multinomial likelihood: items of users, words of documents, their ranking and their topics."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.sparse
import torch
from counts_files import example_arrays

from fastvae.cli import main
from fastvae.train import counts
from fastvae.train.counts import cells, ranking
from fastvae.train.counts.recipe import Counts
from fastvae.train.counts.topics import top_genes

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*torch.jit.script_method:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta state"),
    pytest.mark.usefixtures("one_thread", "no_pictures"),
]

GROUPS, PER_GROUP = 6, 40


def users(count: int = 420) -> np.ndarray:
    """Users who choose most of their items from the 40 of their group, and popular items more often than others."""
    rng = np.random.default_rng(0)
    popularity = rng.gamma(2, 1, GROUPS * PER_GROUP)
    group = np.arange(GROUPS * PER_GROUP) // PER_GROUP
    weight = np.where(group == (np.arange(count) % GROUPS)[:, None], 1.0, 0.02) * popularity
    x = np.zeros((count, GROUPS * PER_GROUP), np.int8)
    for user in range(count):
        items = rng.integers(3, 20)
        x[user, rng.choice(len(popularity), items, replace=False, p=weight[user] / weight[user].sum())] = 1
    return x


def train(out: Path, data: Path, *more: str) -> int:
    options = ["--epochs", "2", "--batch-size", "64", "--hidden", "32", "--latent", "8", "--warmup", "none"]
    options += ["--likelihood", "multinomial"]
    return main(["train", "counts", "--data", str(data), "--out", str(out), *options, *more])


@pytest.fixture
def file(tmp_path: Path) -> Path:
    np.savez(tmp_path / "cells.npz", **example_arrays())
    return tmp_path / "cells.npz"


# --- The measures -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [3, 7, 30])
def test_measures_equal_those_of_loops(length: int) -> None:
    rng = np.random.default_rng(1)
    hits = rng.random((6, 20)) < 0.3
    held_out = hits.sum(1) + np.array([1, 0, 4, 9, 2, 1])
    expected = []
    for row, number in zip(hits.tolist(), held_out.tolist(), strict=True):
        found = sum(row[:length])
        gain = sum(1 / math.log2(place + 2) for place, hit in enumerate(row[:length]) if hit)
        ideal = sum(1 / math.log2(place + 2) for place in range(min(number, length)))
        expected.append((found / min(length, number), gain / ideal))
    given = torch.from_numpy(hits), torch.from_numpy(held_out), length
    found_recall, found_ndcg = ranking.recall(*given), ranking.ndcg(*given)
    assert torch.allclose(torch.stack((found_recall, found_ndcg), 1), torch.tensor(expected).double())


def test_a_fifth_of_the_items_is_held_out() -> None:
    x = scipy.sparse.random_array((50, 80), density=0.2, format="csr", random_state=np.random.default_rng(2))
    index = np.arange(100, 150)
    given, held = ranking.hold_out(x, index, seed=3)
    assert ((given != 0) + (held != 0)).nnz == given.nnz + held.nnz == x.nnz
    assert np.array_equal((given + held).toarray(), x.toarray())
    assert np.array_equal(np.diff(held.indptr), np.diff(x.indptr) // 5)
    # What is drawn for a row depends on the seed and on the row alone.
    some = np.array([7, 3, 30])
    _, again = ranking.hold_out(x[some], index[some], seed=3)
    assert np.array_equal(again.toarray(), held.toarray()[some])
    assert (ranking.hold_out(x, index, seed=4)[1] != held).nnz


def test_a_trained_run_ranks_held_out_items(tmp_path: Path, capsys: Any) -> None:
    """Far above their popularity, and the same again with the same seed."""
    x, run = users(), tmp_path / "run"
    scipy.sparse.save_npz(tmp_path / "users.npz", scipy.sparse.csr_array(x))
    options = ("--epochs", "30", "--lr", "0.01", "--input-dropout", "0.5", "--beta", "0.2")
    assert train(run, tmp_path / "users.npz", *options) == 0
    found = []
    for seed in ("0", "0", "1"):
        assert main(["evaluate", str(run), "--samples", "2", "--seed", seed]) == 0
        found.append(json.loads((run / "evaluation.json").read_text())["ranking"])
    assert found[0] == found[1] != found[2]
    assert "recall@20" in capsys.readouterr().out

    # The loops of the definition, with the scores of the run and with the popularity in the training rows.
    data = counts.load(run).cells
    given, held = ranking.hold_out(scipy.sparse.csr_array(x[data.val]), data.val.numpy(), 0)
    popularity = x[data.train].sum(0)
    opened, by_model, by_popularity = counts.load(run), [], []
    for row in range(len(data.val)):
        items = set(held[[row]].indices.tolist())
        if x[data.val[row]].sum() < ranking.FEWEST:
            continue
        shown = torch.from_numpy(given[[row]].toarray()).float()
        batch = cells.Batch(shown, shown.sum(1, keepdim=True), torch.zeros(1, dtype=torch.int64))
        with torch.no_grad():
            logits = opened.model.params(opened.model.encode(batch)[0], batch)[0].numpy()
        for scores, values in ((logits, by_model), (popularity, by_popularity)):
            order = [i for i in np.argsort(-scores, kind="stable").tolist() if not shown[0, i]]
            values.append(len(items & set(order[:20])) / min(20, len(items)))
    assert found[0]["rows"] == len(by_model)
    assert found[0]["rows"] + found[0]["left_out"] == len(data.val)
    assert found[0]["left_out"] > 0
    assert found[0]["recall@20"]["mean"] == pytest.approx(np.mean(by_model))
    error = np.std(by_model, ddof=1) / math.sqrt(len(by_model))
    assert found[0]["recall@20"]["standard_error"] == pytest.approx(error)
    assert np.mean(by_model) > 0.55 > 0.3 > np.mean(by_popularity)


def test_rows_with_few_items_are_left_out(tmp_path: Path, capsys: Any) -> None:
    x = np.zeros((30, 12), int)
    x[:, :4] = 3
    np.savez(tmp_path / "few.npz", x=x)
    assert train(tmp_path / "run", tmp_path / "few.npz", "--epochs", "1") == 0
    assert main(["evaluate", str(tmp_path / "run"), "--samples", "2"]) == 0
    found = json.loads((tmp_path / "run" / "evaluation.json").read_text())["ranking"]
    assert found == {
        **{name: {"mean": None, "standard_error": None} for name in ("recall@20", "recall@50", "ndcg@100")},
        "rows": 0,
        "left_out": 5,
    }
    assert "ranking of held-out items, 0 rows (5 have too few items)" in capsys.readouterr().out


# --- The networks -----------------------------------------------------------------------------------------------------


def test_the_encoder_reads_rows_of_unit_length() -> None:
    x = torch.from_numpy(example_arrays()["x"]).float()
    x[3] = 0
    encoder, _ = Counts(likelihood="multinomial").networks(30, 1)
    expected = x / x.norm(dim=1, keepdim=True).clamp(min=1e-12)
    assert torch.allclose(encoder.transform(x), expected)
    assert torch.allclose(encoder.transform(x.to_sparse_csr()).to_dense(), expected)


def test_dropout_of_the_input_applies_in_training_only() -> None:
    settings = Counts(likelihood="multinomial", input_dropout=0.5, dropout=0.0)
    encoder, _ = settings.networks(30, 1)
    x = torch.from_numpy(example_arrays()["x"]).float().to_sparse_csr()
    batch = cells.Batch(x, torch.ones(90, 1), torch.zeros(90, dtype=torch.int64))
    assert not torch.equal(encoder(batch), encoder(batch))
    encoder.eval()
    assert torch.equal(encoder(batch), encoder(batch))


def test_pseudo_inputs_start_at_rows_of_unit_length(file: Path, tmp_path: Path) -> None:
    options = ("--prior", "vamp", "--components", "9", "--lr", "1e-6", "--precision", "bf16-mixed")
    assert train(tmp_path / "run", file, *options) == 0
    model = counts.load(tmp_path / "run").model
    assert torch.allclose(model.prior.pseudo_inputs.norm(dim=1), torch.ones(9), atol=1e-3)


@pytest.mark.parametrize("decoder", ["linear", "topics"])
@pytest.mark.parametrize("likelihood", ["zinb", "nb", "poisson", "multinomial"])
def test_linear_decoders_are_linear(likelihood: Any, decoder: Any) -> None:
    settings = Counts(likelihood=likelihood, decoder=decoder, latent=4)
    _, network = settings.networks(30, 2)
    z, batch = torch.randn(5, 4), torch.tensor([0, 1, 0, 1, 1])
    inputs = torch.cat((z.softmax(1) if decoder == "topics" else z, torch.eye(2)[batch]), 1)
    weight, bias = network.heads[0].weight, network.heads[0].bias
    assert torch.allclose(network(z, batch)[0], inputs @ weight.T + bias, atol=1e-6)
    assert sum(p.numel() for p in network.parameters()) == len(network.heads) * 30 * 7
    # A step along a dimension, or to a single topic.
    base, directions = network.directions()
    k, first = 2, torch.zeros(1, dtype=torch.int64)
    if decoder == "topics":
        end = torch.full((1, 4), -1e4)
        end[0, k] = 0
        start = torch.zeros(1, 4)
    else:
        start, end = torch.zeros(1, 4), torch.eye(4)[[k]]
    with torch.no_grad():
        assert torch.allclose(network(start, first)[0][0], base, atol=1e-5)
        assert torch.allclose(network(end, first)[0][0], base + directions[k], atol=1e-5)


# --- Topics -----------------------------------------------------------------------------------------------------------


def test_top_genes_have_the_largest_terms_of_the_kl() -> None:
    base, direction = torch.tensor([5.0, 0.0, -9.0, 1.0]), torch.tensor([0.1, 2.0, 4.0, -1.0])
    p0, p = torch.softmax(base, 0), torch.softmax(base + direction, 0)
    terms = [(p[i] * (p[i] / p0[i]).log()).item() for i in range(4)]
    assert top_genes(base, direction, 3).tolist() == sorted(range(4), key=lambda i: -terms[i])[:3]


def test_topics_are_groups_of_words(tmp_path: Path, capsys: Any) -> None:
    """Each of three topics has ten words of its own."""
    x, words = example_arrays(300)["x"], np.array([f"{'abc'[i % 3]}{i}" for i in range(30)])
    np.savez(tmp_path / "documents.npz", x=x, vocab=words)
    run = tmp_path / "run"
    options = ("--decoder", "topics", "--latent", "3", "--epochs", "20", "--lr", "0.03")
    assert train(run, tmp_path / "documents.npz", *options) == 0
    capsys.readouterr()
    assert main(["evaluate", str(run), "--samples", "2"]) == 0
    lines = (run / "topics.txt").read_text().splitlines()
    assert "\n".join(lines) in capsys.readouterr().out
    found = []
    for k, line in enumerate(lines):
        name, _, of_topic = line.partition(": ")
        assert name == f"topic {k}"
        assert len(of_topic.split()) == 10
        found.append({word[0] for word in of_topic.split()})
    assert sorted(map("".join, found)) == ["a", "b", "c"]


def test_a_linear_decoder_has_two_directions_of_each_dimension(tmp_path: Path, capsys: Any) -> None:
    arrays, run = example_arrays(), tmp_path / "run"
    np.savez(tmp_path / "cells.npz", **arrays, genes=[f"g{i}" for i in range(30)])
    options = ("--decoder", "linear", "--likelihood", "nb", "--latent", "4")
    assert train(run, tmp_path / "cells.npz", *options) == 0
    assert main(["evaluate", str(run), "--samples", "2"]) == 0
    lines = (run / "topics.txt").read_text().splitlines()
    assert [line.partition(":")[0] for line in lines] == [
        f"z{k} {end}" for k in range(4) for end in ("rising", "falling")
    ]
    assert f"and 3 further lines in {run / 'topics.txt'}" in capsys.readouterr().out
    assert json.loads((run / "evaluation.json").read_text())["ranking"] is None

    np.savez(tmp_path / "cells.npz", **arrays)
    (run / "topics.txt").unlink()
    assert main(["evaluate", str(run), "--samples", "2"]) == 0
    assert "topics.txt was not written: the data have no names" in capsys.readouterr().out
    assert not (run / "topics.txt").exists()
