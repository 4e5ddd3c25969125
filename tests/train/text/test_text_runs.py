"""Runs of text: training, resuming, and the commands that use them."""

import json
import math
import shutil

import pytest
import torch
from run_files import QUICK_TEXT, read_metrics, run_lines, train_text

import fastvae
from fastvae import cli
from fastvae.train import bounds
from fastvae.train import text as text_runs
from fastvae.train.text import sentences
from fastvae.train.text.recipe import Text

pytestmark = pytest.mark.usefixtures("one_thread")


FILES = {
    "config.toml",
    "tokenizer.json",
    "metrics.csv",
    "kl_per_dimension.csv",
    "checkpoints",
    "samples.txt",
    "reconstructions.txt",
    "loss.png",
}


def test_training_writes_files_and_metrics(trained_run, tmp_path, corpus_file, capsys):
    assert {path.name for path in trained_run.iterdir()} == FILES
    first, *_, last = read_metrics(trained_run)
    assert float(last["train_loss"]) < float(first["train_loss"])
    assert "val_bits_per_dim" not in last
    vocabulary = sentences.Vocabulary.read(trained_run / "tokenizer.json")
    val = sentences.token_table(vocabulary.encode(sentences.load(Text(data=str(corpus_file))).val))
    each = val.lengths.double().mean().item() + 1
    neg_elbo = float(last["val_neg_elbo"])
    assert float(last["val_perplexity"]) == pytest.approx(math.exp(neg_elbo / each), rel=1e-5)
    assert float(last["val_nll"]) + float(last["val_kl"]) == pytest.approx(neg_elbo)
    assert 0 <= float(last["mutual_information"]) <= math.log(30) + 0.1
    assert len((trained_run / "samples.txt").read_text().splitlines()) == 20
    assert len((trained_run / "reconstructions.txt").read_text().splitlines()) == 20

    out = tmp_path / "short"
    output = "\n".join(
        run_lines(
            capsys,
            "train",
            "text",
            "--data",
            corpus_file,
            "--out",
            out,
            *QUICK_TEXT,
            "--epochs",
            "1",
            "--max-words",
            "5",
        )
    )
    assert "skipped" in output
    assert "perplexity of a unigram model on the validation sentences" in output
    assert "% of those in the validation sentences are unknown" in output
    assert "samples.txt" in output
    assert f"fastvae resume {out}" in output


def test_free_bits_change_the_loss_but_not_the_kl(tmp_path, corpus_file):
    options = ("--epochs", "1", "--warmup", "none", "--free-bits", "4")
    assert train_text(tmp_path / "run", corpus_file, *options) == 0
    (row,) = read_metrics(tmp_path / "run")
    assert float(row["train_kl"]) < 8
    # Three dimensions with less than 4 nats count as 4 each.
    assert float(row["train_loss"]) == pytest.approx(float(row["train_nll"]) + 12, rel=1e-5)


@pytest.mark.parametrize(
    "options",
    [
        (),
        (
            "--ema",
            "0.9",
            "--warmup",
            "cyclical",
            "--warmup-epochs",
            "3",
            "--cell",
            "gru",
            "--no-bidirectional",
        ),
        ("--tokens", "bpe", "--vocabulary", "60", "--no-lowercase", "--word-dropout", "0", "--dropout", "0"),
    ],
    ids=["plain", "everything", "bpe"],
)
def test_resumed_run_equals_uninterrupted_run(tmp_path, corpus_file, options, monkeypatch):
    monkeypatch.setattr("fastvae.train.callbacks.should_save_examples", lambda trainer: False)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert train_text(whole, corpus_file, *options, "--epochs", "3") == 0
    assert train_text(parts, corpus_file, *options, "--epochs", "1") == 0
    moved = parts.rename(tmp_path / "moved")
    assert cli.main(["resume", str(moved), "--epochs", "3"]) == 0
    assert read_metrics(moved) == read_metrics(whole)
    states = [
        torch.load(out / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
        for out in (whole, moved)
    ]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    # The text file may be moved as well.
    other = shutil.copy(corpus_file, tmp_path / "other.txt")
    assert cli.main(["resume", str(moved), "--epochs", "4", "--data", str(other)]) == 0
    assert len(read_metrics(moved)) == 4


def test_sample_writes_sentences(run, tmp_path, capsys):
    output = run_lines(capsys, "sample", run, "-n", "5")
    assert len(output) == 7
    assert output[:5] == (run / "samples.txt").read_text().splitlines()
    assert run_lines(capsys, "sample", run, "-n", "5")[:5] == output[:5]
    assert run_lines(capsys, "sample", run, "-n", "5", "--seed", "1")[:5] != output[:5]
    out = tmp_path / "new" / "mine.txt"
    (line,) = run_lines(capsys, "sample", run, "-n", "3", "--out", out, "--decoding", "beam", "--beams", "3")
    assert str(out) in line
    assert len(out.read_text().splitlines()) == 3
    assert run_lines(capsys, "sample", run, "--decoding", "greedy")[-1].startswith(
        f"{run / 'samples.txt'}: 20 new"
    )


def test_reconstruct_writes_pairs_of_sentences(run, tmp_path, capsys):
    output = run_lines(capsys, "reconstruct", run, "-n", "4")
    assert len(output) == 10
    assert output[:8:2] == sentences.load(text_runs.load(run).settings).val[:4]
    assert all(line.startswith("  ") for line in output[1:8:2])
    mine = tmp_path / "mine.txt"
    mine.write_text("The cat sees water .\n\na zebra sees " + "us " * 60 + ".\n")
    output = run_lines(capsys, "reconstruct", run, "--data", mine)
    assert output[0] == f"warning: {mine}: 1 unknown word, read as <unk>"
    assert "1 line of more than 50 words" in output[1]
    assert output[2] == "The cat sees water ."
    assert "2 sentences" in output[-1]


def test_interpolate_writes_sentences_between_two(run, capsys):
    output = run_lines(
        capsys, "interpolate", run, "the cat sees it .", "nobody wants water .", "--steps", "4"
    )
    assert output[0] == "the cat sees it ."
    assert output[5] == "nobody wants water ."
    assert all(line.startswith("  ") for line in output[1:5])
    assert output[:6] == (run / "interpolations.txt").read_text().splitlines()


def test_interpolate_starts_and_ends_with_the_reconstructions(run, tmp_path, capsys):
    ends = ["the cat sees it .", "nobody wants the big moon ."]
    (tmp_path / "ends.txt").write_text("\n".join(ends))
    reconstructions = run_lines(capsys, "reconstruct", run, "--data", tmp_path / "ends.txt")
    interpolation = run_lines(capsys, "interpolate", run, *ends, "--steps", "3")
    assert [interpolation[1], interpolation[3]] == [reconstructions[1], reconstructions[3]]


def test_evaluate_agrees_with_training_metrics(run, capsys):
    output = "\n".join(run_lines(capsys, "evaluate", run, "--samples", "3", "--checkpoint", "last"))
    results = json.loads((run / "evaluation.json").read_text())
    assert (results["sentences"], results["samples"], results["latents"], results["epoch"]) == (30, 3, 3, 3)
    assert results["reconstruction"] + results["kl"] == pytest.approx(results["neg_elbo"])
    assert results["neg_elbo"] == pytest.approx(float(read_metrics(run)[-1]["val_neg_elbo"]), rel=0.05)
    assert results["kl"] == pytest.approx(float(read_metrics(run)[-1]["val_kl"]), rel=1e-4)
    assert results["iw_nll"] <= results["neg_elbo"] + 0.01
    each = results["tokens"] / 30
    assert results["perplexity"] == pytest.approx(math.exp(results["neg_elbo"] / each))
    assert results["iw_perplexity"] == pytest.approx(math.exp(results["iw_nll"] / each))
    assert 1 < results["unigram_perplexity"] < results["vocabulary"]
    assert f"{results['unigram_perplexity']:.1f}" in output
    assert "mutual information" in output
    assert "30 validation sentences of little.txt; epoch 3 (last)" in output
    assert run_lines(capsys, "evaluate", run, "--samples", "1", "--limit", "4")[0].startswith(
        f"{run}: 4 validation"
    )


@torch.no_grad()
def test_bound_agrees_with_explicit_importance_weights(run):
    """The expected value is the log-sum-exp of explicit weights."""
    opened = text_runs.load(run)
    numbers = opened.vocabulary.encode(opened.corpus.val[:5])
    x = sentences.make_batch(sentences.token_table(numbers))
    got, mu = bounds.estimate_bounds(opened.model, x, 4, seed=9)
    _, logvar = opened.model.encode(x)
    weights = []
    for k in range(4):
        z, _ = fastvae.functional.reparameterize_kl(mu, logvar, seed=torch.tensor([9, 4 * k]))
        prior = torch.distributions.Normal(0.0, 1.0).log_prob(z).sum(1)
        own = torch.distributions.Normal(mu, (logvar / 2).exp()).log_prob(z).sum(1)
        weights.append(prior - own - opened.model.nll(z, x))
    want = math.log(4) - torch.stack(weights).logsumexp(0)
    torch.testing.assert_close(got.nll.float(), want, rtol=1e-4, atol=1e-4)
    assert (got.kl > 0).all()
    assert got.kl.shape == (5,)
