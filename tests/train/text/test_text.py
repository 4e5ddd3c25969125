"""The recipe for text: sentences and tokens, the run, and what is done with it."""

import csv
import itertools
import json
import math
import shutil
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch

import fastvae
from fastvae import cli
from fastvae.train import bounds, hub, information
from fastvae.train import text as text_runs
from fastvae.train.errors import InputError
from fastvae.train.text import decoding, sentences
from fastvae.train.text import loader as sentence_loader
from fastvae.train.text.module import TextVAE
from fastvae.train.text.recipe import Text
from fastvae.train.text.sentences import END, PAD, START, UNKNOWN

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
QUICK = ("--accelerator", "cpu", "--hidden", "24", "--embedding", "12", "--latent", "3", "--batch-size", "16")


def little_text(path: Path) -> Path:
    """180 different sentences of 4 to 6 tokens; the comma is a token too."""
    subjects = ("the cat", "a dog", "my old friend", "nobody")
    verbs = ("sees", "likes", "hears", "wants", "finds")
    objects = ("it", "the house", "a tree", "water", "the big moon", "them", "music", "us", "red wine")
    lines = [f"{s} {v} {o} ." for s, v, o in itertools.product(subjects, verbs, objects)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    return little_text(tmp_path_factory.mktemp("text") / "little.txt")


def train(out: Path, text: Path | str, *options: str) -> int:
    return cli.main(["train", "text", "--out", str(out), "--data", str(text), *QUICK, *options])


@pytest.fixture(scope="module")
def finished(tmp_path_factory, text) -> Path:
    out = tmp_path_factory.mktemp("finished") / "run"
    assert train(out, text, "--epochs", "3", "--lr", "0.01") == 0
    return out


@pytest.fixture
def run(finished, tmp_path) -> Path:
    """A copy, to write into."""
    return Path(shutil.copytree(finished, tmp_path / "run"))


def done(capsys, *arguments: object) -> list[str]:
    capsys.readouterr()
    assert cli.main([str(argument) for argument in arguments]) == 0
    out, errors = capsys.readouterr()
    assert errors == ""
    return out.splitlines()


def failed(capsys, *arguments: object) -> str:
    capsys.readouterr()
    assert cli.main([str(argument) for argument in arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("fastvae: ")
    assert error.count("\n") == 1, error
    return error


def read_metrics(out: Path) -> list[dict[str, str]]:
    """metrics.csv, without the time, which is never the same."""
    with (out / "metrics.csv").open() as file:
        return [{k: v for k, v in row.items() if k != "seconds"} for row in csv.DictReader(file)]


# ---------------------------------------------------------------------------------------------------------------------
# Sentences and tokens
# ---------------------------------------------------------------------------------------------------------------------


def test_words_and_marks(tmp_path):
    settings = Text(data="x")
    vocabulary = sentences.Vocabulary.train(["Don't stop, mother-in-law!! ``No'' 3.5 é"], settings)
    (numbers,) = vocabulary.encode(["Don't stop, mother-in-law!! ``No'' 3.5 É"])
    assert vocabulary.decode(numbers) == "don't stop , mother-in-law !! `` no '' 3.5 é"
    assert vocabulary.decode([*vocabulary.encode(["stop zebra"])[0], END, 7]) == "stop <unk>"
    assert sentences.Vocabulary.train(["No no"], Text(data="x", lowercase=False)).decode([4, 5]) in (
        "No no",
        "no No",
    )


@pytest.mark.parametrize("tokens", ["words", "bpe"])
def test_a_text_may_hold_the_names_of_special_tokens(tokens):
    lines = ["one <pad> two </s> three", "<s> four <unk>"]
    vocabulary = sentences.Vocabulary.train(lines, Text(data="x", tokens=tokens, vocabulary=60))
    numbers = vocabulary.encode(lines)
    assert not {PAD, START, END} & {n for line in numbers for n in line}
    assert vocabulary.decode(numbers[0]).endswith("three")


def test_bpe_comes_back_as_it_was():
    lines = ["the lower the slower", "a newer tower", "low power"]
    vocabulary = sentences.Vocabulary.train(lines, Text(data="x", tokens="bpe", vocabulary=30))
    assert len(vocabulary) == 30
    for line, numbers in zip(lines, vocabulary.encode(lines), strict=True):
        assert vocabulary.decode(numbers) == line
    assert vocabulary.decode(vocabulary.encode(["slowest towers"])[0]) == "slowest towers"


def test_vocabulary_keeps_the_most_frequent():
    lines = ["a a a b b c", "a b d"]
    vocabulary = sentences.Vocabulary.train(lines, Text(data="x", vocabulary=8))
    assert len(vocabulary) == 8
    assert vocabulary.decode([4, 5]) == "a b"
    small = sentences.Vocabulary.train(["a a b b c d e f g"], Text(data="x", vocabulary=8))
    assert sum(n == UNKNOWN for n in small.encode(["a b c d e f g"])[0]) == 3


def test_tokenizer_is_kept(tmp_path):
    vocabulary = sentences.Vocabulary.train(["one two"], Text(data="x"))
    vocabulary.write(tmp_path / "tokenizer.json")
    again = sentences.Vocabulary.read(tmp_path / "tokenizer.json")
    assert again.encode(["two one"]) == vocabulary.encode(["two one"])
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(InputError, match="not a tokenizer, or damaged"):
        sentences.Vocabulary.read(tmp_path / "tokenizer.json")
    other = json.loads(vocabulary.tokenizer.to_str())
    other["model"]["vocab"]["<blank>"] = other["model"]["vocab"].pop("<pad>")
    other["added_tokens"] = []
    (tmp_path / "tokenizer.json").write_text(json.dumps(other))
    with pytest.raises(InputError, match="not the tokenizer of a run"):
        sentences.Vocabulary.read(tmp_path / "tokenizer.json")


def test_batch():
    some = sentences.token_table([[5, 6, 7], [8]])
    batch = sentences.make_batch(some)
    assert batch.words.tolist() == [[5, 6, 7], [8, PAD, PAD]]
    assert batch.before.tolist() == [[START, 5, 6, 7], [START, 8, PAD, PAD]]
    assert batch.after.tolist() == [[5, 6, 7, END], [8, END, PAD, PAD]]


def test_word_dropout():
    some = sentences.token_table([[5 + i % 90 for i in range(200)]] * 50 + [[4]])
    batch = sentences.make_batch(some, 0.3, torch.Generator().manual_seed(0))
    assert (batch.before[:, 0] == START).all()
    assert torch.equal(batch.words, sentences.make_batch(some).words)  # the encoder sees all
    assert torch.equal(batch.after, sentences.make_batch(some).after)
    hidden = batch.before[:50, 1:] == UNKNOWN
    assert hidden.float().mean().item() == pytest.approx(0.3, abs=0.02)
    assert torch.equal(batch.before[:50, 1:][~hidden], batch.words[:50][~hidden])
    assert (batch.before[50, 2:] == PAD).all()
    assert (sentences.make_batch(some, 1.0).before[:50, 1:] == UNKNOWN).all()


def test_buckets():
    """Every sentence once an epoch, like lengths together, another order in every epoch and the same in every run."""
    lengths = [1 + i * 7 % 40 for i in range(1000)]
    held = sentences.token_table([[4 + i % 50] * n for i, n in enumerate(lengths)])
    loader = sentence_loader.SentenceData(held, held, Text(data="x", batch_size=16))
    first, again = ([b for b, _ in loader.train_dataloader()] for _ in range(2))
    assert all(torch.equal(a.before, b.before) for a, b in zip(first, again, strict=True))
    assert len(first) == len(loader.train_dataloader()) == 63
    assert sum(len(batch.words) for batch in first) == 1000
    assert sorted(int((row != PAD).sum()) for b in first for row in b.words) == sorted(lengths)
    padding = sum(int((batch.words == PAD).sum()) for batch in first)
    assert padding < 0.1 * sum(lengths)
    assert sum(int((b.words == PAD).sum()) for b, _ in loader.val_dataloader()) < 0.05 * sum(lengths)
    batches = sentence_loader.SentenceBatches(loader, val=False)
    orders = [batches.buckets(torch.Generator().manual_seed(seed)) for seed in (0, 1)]
    assert not torch.equal(orders[0][0], orders[1][0])


def test_unigram_perplexity():
    held = sentences.token_table([[4, 4], [5]])
    # Shares of the tokens 1, 3, 4, 5 (of 6): counts 0, 2, 2, 1, and one more each.
    counts = {UNKNOWN: 1, END: 3, 4: 3, 5: 2}
    nats = -sum(math.log(counts[token] / 9) for token in (4, 4, END, 5, END))
    assert sentences.unigram_perplexity(held, held, 6) == pytest.approx(math.exp(nats / 5))


def test_only_ends_of_lines_end_sentences(tmp_path):
    """Not what str.splitlines takes for one: scraped text holds line separators and form feeds."""
    path = tmp_path / "lines.txt"
    odd = "\u2028\u2029\u0085\x0c\x0b\x1c"
    path.write_bytes(f"a{odd}b\nc\r\nd\re\n".encode())
    assert sentences.read_lines(path) == [f"a{odd}b", "c", "d", "e"]


def test_lengths_are_counted_in_words(text):
    corpus = sentences.load(Text(data=str(text), min_words=5, max_words=6))
    assert all(5 <= len(line.split()) <= 6 for line in corpus.train + corpus.val)
    (note,) = corpus.notes
    assert note.startswith("skipped, out of 180 lines: ")
    assert "--min-words" in note
    assert "--max-words" in note
    everything = sentences.load(Text(data=str(text)))
    assert everything.notes == ()
    assert len(everything.val) == 30
    assert len(set(everything.train + everything.val)) == 180
    assert sentences.load(Text(data=str(text), seed=1)).val != everything.val


def test_blank_lines_and_marks_of_order(tmp_path):
    (tmp_path / "x.txt").write_bytes(b"\xef\xbb\xbfone two\r\n\r\n   \nthree\n")
    assert sentences.read_lines(tmp_path / "x.txt") == ["one two", "three"]


def hugging_face(monkeypatch, **splits: dict[str, list[Any]]) -> None:
    """A stand-in for the package `datasets`: columns of texts and of integers."""

    class Split(dict):  # type: ignore[type-arg]
        @property
        def features(self) -> dict[str, Any]:
            kinds = {str: "string", int: "int64"}
            return {
                name: types.SimpleNamespace(dtype=kinds[type(values[0])]) for name, values in self.items()
            }

    found = {name: Split(columns) for name, columns in splits.items()}
    module = types.SimpleNamespace(load_dataset=lambda name: found)
    monkeypatch.setitem(sys.modules, "datasets", module)


def test_hugging_face(monkeypatch):
    train = {"label": [1, 2], "title": ["t", "u"], "text": ["One  two\nthree", "four"]}
    hugging_face(monkeypatch, train=train, test={"label": [1], "title": ["t"], "text": ["five"]})
    corpus = sentences.load(Text(data="somebody/imdb"))
    assert corpus.train == ["One two three", "four"]
    assert corpus.val == ["five"]
    assert sentences.load(Text(data="somebody/imdb", column="title")).train == ["t", "u"]
    for column in ("label", "nothing"):
        with pytest.raises(InputError, match=f"--column {column}: .* only title, text"):
            sentences.load(Text(data="somebody/imdb", column=column))
    hugging_face(monkeypatch, train={"words": ["a b", "c d", "e f"]})
    assert len(sentences.load(Text(data="imdb")).train) == 2
    hugging_face(monkeypatch, train={"label": [1, 2]})
    with pytest.raises(InputError, match="no text column, only label"):
        sentences.load(Text(data="imdb"))
    hugging_face(monkeypatch, train={"text": ["a"]}, test={"text": ["b " * 60]})
    with pytest.raises(InputError, match="validation split: no lines left"):
        sentences.load(Text(data="imdb"))
    assert hub.load_splits("imdb")["test"]["text"] == ["b " * 60]


# ---------------------------------------------------------------------------------------------------------------------
# The model
# ---------------------------------------------------------------------------------------------------------------------


def small_model(**options: Any) -> TextVAE:
    torch.manual_seed(0)
    settings = Text(data="x", hidden=8, embedding=6, latent=3, **options)
    vocabulary = sentences.Vocabulary.train(["a b c d e f g h"], settings)
    return text_runs.KIND.build(settings, vocabulary).eval()


OPTIONS = [{"cell": c, "bidirectional": b} for c in ("lstm", "gru") for b in (True, False)]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@torch.no_grad()
def test_padding_changes_nothing(options):
    """A sentence gives the same alone and beside longer ones."""
    model = small_model(**options)
    alone = sentences.make_batch(sentences.token_table([[5, 6, 7]]))
    beside = sentences.make_batch(sentences.token_table([[5, 6, 7], [8, 9, 10, 11, 4, 5, 6]]))
    z = torch.randn(1, 3)
    for a, b in zip(model.encode(alone), model.encode(beside), strict=True):
        torch.testing.assert_close(a[0], b[0])
    torch.testing.assert_close(model.nll(z, alone)[0], model.nll(z.expand(2, 3), beside)[0])


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@torch.no_grad()
def test_step_by_step_is_the_whole(options):
    model = small_model(**options)
    decoder, z = model.decoder, torch.randn(2, 3)
    tokens = torch.tensor([[START, 5, 6], [START, 7, 8]])
    state, logits = decoder.begin(z), []
    for t in range(3):
        now, state = decoder.advance(z, tokens[:, t : t + 1], state)
        logits.append(now)
    torch.testing.assert_close(torch.cat(logits, 1), decoder(z, tokens))


def log_prob(model: Any, z: torch.Tensor, tokens: list[int], longest: int) -> float:
    """Of writing these, with the END where there is room, from the tokens that may be written."""
    after = [*tokens, END] if len(tokens) < longest else tokens
    logits = model.decoder(z, torch.tensor([[START, *after[:-1]]]))[0].double()
    log_probs = logits.log_softmax(-1)  # as beam search scores them
    return sum(log_probs[t, token].item() for t, token in enumerate(after))


@pytest.mark.parametrize("end", [1.0, -30.0], ids=["some end", "none end"])
@torch.no_grad()
def test_beam_finds_the_best(end):
    """With as many beams as there are beginnings it is an exhaustive search."""
    model = small_model()
    for parameter in model.decoder.parameters():
        parameter *= 3  # so that what was written before matters
    model.decoder.rnn.weight_hh_l0 *= 5
    model.decoder.logits.bias[END] = end
    longest, words = 3, range(4, 12)
    z = torch.randn(12, 3)
    found = decoding.decode(model, z, decoding.Decoding("beam", beams=100, longest=longest))
    likeliest = 0
    for row, got in zip(z.split(1), found, strict=True):
        candidates = [list(c) for n in range(longest + 1) for c in itertools.product(words, repeat=n)]
        log_probs = {tuple(c): log_prob(model, row, c, longest) for c in candidates}
        lengths = {c: min(len(c) + 1, longest) for c in log_probs}
        best = max(log_probs, key=lambda c: log_probs[c] / ((5 + lengths[c]) / 6) ** 0.6)
        assert got == list(best)
        likeliest += best == max(log_probs, key=log_probs.__getitem__)
    assert end < 0 or 0 < likeliest < len(z), "this test needs sentences that the length decides, and others"


@torch.no_grad()
def test_greedy_and_nucleus():
    model = small_model()
    z = torch.randn(40, 3)
    greedy = decoding.decode(model, z, decoding.Decoding("greedy", longest=12))
    assert decoding.decode(model, z, decoding.Decoding("beam", beams=1, longest=12)) == greedy
    # A nucleus so small that it holds the likeliest token alone.
    assert decoding.decode(model, z, decoding.Decoding("nucleus", top_p=1e-6, longest=12)) == greedy
    model.decoder.logits.bias[[PAD, UNKNOWN, START]] = 50.0  # whatever the model says
    draws = [
        decoding.decode(
            model, z, decoding.Decoding("nucleus", top_p=1.0, longest=12), torch.Generator().manual_seed(s)
        )
        for s in (0, 0, 1)
    ]
    assert draws[0] == draws[1] != draws[2]
    written = {token for line in draws[0] for token in line}
    assert not written & {PAD, UNKNOWN, START, END}
    assert max(map(len, draws[0])) <= 12


@torch.no_grad()
def test_nucleus_keeps_its_share():
    model = small_model()
    model.decoder.logits.weight.zero_()
    model.decoder.logits.bias.copy_(torch.full((12,), -30.0))
    model.decoder.logits.bias[[4, 5, 6]] = torch.tensor([0.5, 0.3, 0.2]).log()
    z = torch.zeros(3000, 3)
    (first,) = zip(
        *decoding.decode(model, z, decoding.Decoding("nucleus", top_p=0.7, longest=1)), strict=True
    )
    share = first.count(4) / len(first)
    assert set(first) == {4, 5}
    assert share == pytest.approx(0.5 / 0.8, abs=0.03)


def test_mutual_information():
    torch.manual_seed(0)
    mu = torch.randn(700, 2)
    # As far from one another as can be told: log N. All alike: nothing.
    far = torch.arange(700.0).unsqueeze(1).expand(700, 2) * 100
    apart = information.mutual_information(far, torch.zeros(700, 2), far + torch.randn(700, 2))
    assert apart == pytest.approx(math.log(700), abs=1e-6)
    same = torch.zeros(700, 2)
    assert information.mutual_information(same, same, torch.randn(700, 2)) == pytest.approx(0, abs=1e-9)
    # Of jointly normal x and z, with var(mu) = 1 and a posterior variance v, it is log(1 + 1 / v) / 2 a dimension.
    v = 0.5
    z = mu + v**0.5 * torch.randn(700, 2)
    got = information.mutual_information(mu, torch.full((700, 2), math.log(v)), z)
    assert got == pytest.approx(math.log(1 + 1 / v), abs=0.1)


# ---------------------------------------------------------------------------------------------------------------------
# A run
# ---------------------------------------------------------------------------------------------------------------------


def test_what_a_run_leaves(finished, tmp_path, text, capsys):
    assert {path.name for path in finished.iterdir()} == FILES
    first, *_, last = read_metrics(finished)
    assert float(last["train_loss"]) < float(first["train_loss"])
    assert "val_bits_per_dim" not in last
    vocabulary = sentences.Vocabulary.read(finished / "tokenizer.json")
    val = sentences.token_table(vocabulary.encode(sentences.load(Text(data=str(text))).val))
    each = val.lengths.double().mean().item() + 1
    neg_elbo = float(last["val_neg_elbo"])
    assert float(last["val_perplexity"]) == pytest.approx(math.exp(neg_elbo / each), rel=1e-5)
    assert float(last["val_nll"]) + float(last["val_kl"]) == pytest.approx(neg_elbo)
    assert 0 <= float(last["mutual_information"]) <= math.log(30) + 0.1
    assert len((finished / "samples.txt").read_text().splitlines()) == 20
    assert len((finished / "reconstructions.txt").read_text().splitlines()) == 20

    out = tmp_path / "short"
    said = "\n".join(
        done(
            capsys, "train", "text", "--data", text, "--out", out, *QUICK, "--epochs", "1", "--max-words", "5"
        )
    )
    assert "skipped" in said
    assert "perplexity of a unigram model on the validation sentences" in said
    assert "% of those in the validation sentences are unknown" in said
    assert "samples.txt" in said
    assert f"fastvae resume {out}" in said


def test_free_bits_are_in_the_loss_and_not_in_the_kl(tmp_path, text):
    options = ("--epochs", "1", "--warmup", "none", "--free-bits", "4")
    assert train(tmp_path / "run", text, *options) == 0
    (row,) = read_metrics(tmp_path / "run")
    assert float(row["train_kl"]) < 8
    # Three dimensions below 4 nats each count as 4.
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
def test_resumed_run_is_the_uninterrupted_one(tmp_path, text, options, monkeypatch):
    monkeypatch.setattr("fastvae.train.callbacks.should_save_examples", lambda trainer: False)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert train(whole, text, *options, "--epochs", "3") == 0
    assert train(parts, text, *options, "--epochs", "1") == 0
    moved = parts.rename(tmp_path / "moved")
    assert cli.main(["resume", str(moved), "--epochs", "3"]) == 0
    assert read_metrics(moved) == read_metrics(whole)
    states = [
        torch.load(out / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
        for out in (whole, moved)
    ]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    # The file may move as well.
    other = shutil.copy(text, tmp_path / "other.txt")
    assert cli.main(["resume", str(moved), "--epochs", "4", "--data", str(other)]) == 0
    assert len(read_metrics(moved)) == 4


# ---------------------------------------------------------------------------------------------------------------------
# With a run
# ---------------------------------------------------------------------------------------------------------------------


def test_sample(run, tmp_path, capsys):
    said = done(capsys, "sample", run, "-n", "5")
    assert len(said) == 7
    assert said[:5] == (run / "samples.txt").read_text().splitlines()
    assert done(capsys, "sample", run, "-n", "5")[:5] == said[:5]
    assert done(capsys, "sample", run, "-n", "5", "--seed", "1")[:5] != said[:5]
    out = tmp_path / "new" / "mine.txt"
    (line,) = done(capsys, "sample", run, "-n", "3", "--out", out, "--decoding", "beam", "--beams", "3")
    assert str(out) in line
    assert len(out.read_text().splitlines()) == 3
    assert done(capsys, "sample", run, "--decoding", "greedy")[-1].startswith(
        f"{run / 'samples.txt'}: 20 new"
    )


def test_reconstruct(run, tmp_path, capsys):
    said = done(capsys, "reconstruct", run, "-n", "4")
    assert len(said) == 10
    assert said[:8:2] == sentences.load(text_runs.load(run).settings).val[:4]
    assert all(line.startswith("  ") for line in said[1:8:2])
    mine = tmp_path / "mine.txt"
    mine.write_text("The cat sees water .\n\na zebra sees " + "us " * 60 + ".\n")
    said = done(capsys, "reconstruct", run, "--data", mine)
    assert said[0] == f"warning: {mine}: 1 unknown word, read as <unk>"
    assert "1 line of more than 50 words" in said[1]
    assert said[2] == "The cat sees water ."
    assert "2 sentences" in said[-1]


def test_interpolate(run, capsys):
    said = done(capsys, "interpolate", run, "the cat sees it .", "nobody wants water .", "--steps", "4")
    assert said[0] == "the cat sees it ."
    assert said[5] == "nobody wants water ."
    assert all(line.startswith("  ") for line in said[1:5])
    assert said[:6] == (run / "interpolations.txt").read_text().splitlines()


def test_ends_of_an_interpolation_are_reconstructions(run, tmp_path, capsys):
    ends = ["the cat sees it .", "nobody wants the big moon ."]
    (tmp_path / "ends.txt").write_text("\n".join(ends))
    made = done(capsys, "reconstruct", run, "--data", tmp_path / "ends.txt")
    way = done(capsys, "interpolate", run, *ends, "--steps", "3")
    assert [way[1], way[3]] == [made[1], made[3]]


def test_evaluate(run, capsys):
    said = "\n".join(done(capsys, "evaluate", run, "--samples", "3", "--checkpoint", "last"))
    found = json.loads((run / "evaluation.json").read_text())
    assert (found["sentences"], found["samples"], found["latents"], found["epoch"]) == (30, 3, 3, 3)
    assert found["reconstruction"] + found["kl"] == pytest.approx(found["neg_elbo"])
    assert found["neg_elbo"] == pytest.approx(float(read_metrics(run)[-1]["val_neg_elbo"]), rel=0.05)
    assert found["kl"] == pytest.approx(float(read_metrics(run)[-1]["val_kl"]), rel=1e-4)
    assert found["iw_nll"] <= found["neg_elbo"] + 0.01
    each = found["tokens"] / 30
    assert found["perplexity"] == pytest.approx(math.exp(found["neg_elbo"] / each))
    assert found["iw_perplexity"] == pytest.approx(math.exp(found["iw_nll"] / each))
    assert 1 < found["unigram_perplexity"] < found["vocabulary"]
    assert f"{found['unigram_perplexity']:.1f}" in said
    assert "mutual information" in said
    assert "30 validation sentences of little.txt; epoch 3 (last)" in said
    assert done(capsys, "evaluate", run, "--samples", "1", "--limit", "4")[0].startswith(
        f"{run}: 4 validation"
    )


@torch.no_grad()
def test_importance_weighting_by_hand(run):
    """`bounds` on sentences, against log-sum-exp of the weights written out."""
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


# ---------------------------------------------------------------------------------------------------------------------
# What does not fit
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", ("this file contains no text",)),
        (b" \n\n\t\n", ("this file contains no text",)),
        (b"fine\nnot \xff fine\n", ("UTF-8", "0xff", "line 2")),
        (
            b"one line\n",
            ("expected at least 2 sentences, one per line, for training and validation, got 1 sentence",),
        ),
        (b"a b c\n" * 5, ("no lines left", "5 more than 2", "--max-words")),
    ],
    ids=["empty", "blank", "binary", "one line", "too long"],
)
def test_bad_files(tmp_path, capsys, content, words):
    (tmp_path / "x.txt").write_bytes(content)
    error = failed(
        capsys, "train", "text", "--data", tmp_path / "x.txt", "--out", tmp_path / "run", "--max-words", "2"
    )
    assert all(word in error for word in words), error
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("train", "text"), ("--data is missing", ".txt")),
        (("train", "text", "--data", "nowhere.txt"), ("nowhere.txt: no such file",)),
        (("train", "text", "--data", "no where"), ("no where: no such file",)),
        (("train", "text", "--data", "."), ("this is a folder",)),
        (("train", "text", "--data", "TEXT", "--tokens", "letters"), ("letters",)),
        (
            ("train", "text", "--data", "TEXT", "--vocabulary", "7"),
            ("--vocabulary must be at least 8, got 7",),
        ),
        (
            ("train", "text", "--data", "TEXT", "--word-dropout", "1.5"),
            ("--word-dropout must be", "at most 1"),
        ),
        (("train", "text", "--data", "TEXT", "--dropout", "1"), ("--dropout must be", "below 1")),
        (("train", "text", "--data", "TEXT", "--free-bits", "-1"), ("--free-bits must be at least 0",)),
        (
            ("train", "text", "--data", "TEXT", "--min-words", "60"),
            ("--min-words must be at most --max-words 50, got 60",),
        ),
        (("sample", "RUN", "--top-p", "0"), ("--top-p must be above 0",)),
        (("sample", "RUN", "--beams", "3"), ("--beams only applies to --decoding beam, got nucleus",)),
        (
            ("sample", "RUN", "--decoding", "beam", "--top-p", "0.5"),
            ("--top-p only applies to --decoding nucleus",),
        ),
        (("sample", "RUN", "--out", "x.png"), (".txt",)),
        (("sample", "RUN", "-n", "0"), ("-n must be",)),
        (("sample", "RUN", "--best", "4"), ("--best only applies to runs of images; this is a run of text",)),
        (("sample", "RUN", "--of", "40"), ("--of only applies to runs of images; this is a run of text",)),
        (("interpolate", "RUN"), ('"FIRST" "SECOND"',)),
        (("interpolate", "RUN", "a", "b", "--from", "1"), ("--from",)),
        (("interpolate", "RUN", "", "b"), ("empty",)),
        (("interpolate", "RUN", "a", "b", "--steps", "1"), ("--steps must be",)),
        (("traverse", "RUN"), ("a run of text", "no pictures")),
        (("inpaint", "RUN"), ("a run of text", "no pictures")),
        (("reconstruct", "RUN", "--data", "nowhere.txt"), ("nowhere.txt: no such file",)),
        (("evaluate", "RUN", "--samples", "0"), ("--samples must be at least 1",)),
        (("evaluate", "RUN", "--data", "nowhere.txt"), ("nowhere.txt: no such file",)),
        (("sample", "nothing"), ("no such run",)),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else None,
)
def test_bad_arguments(finished, text, tmp_path, capsys, monkeypatch, arguments, words):
    monkeypatch.chdir(tmp_path)
    places = {"RUN": finished, "TEXT": text}
    error = failed(capsys, *(places.get(a, a) for a in arguments))
    assert all(word in error for word in words), error
    assert not list(tmp_path.iterdir())


def test_tokenizer_that_is_gone(run, capsys):
    (run / "tokenizer.json").unlink()
    assert "tokenizer.json: no such file" in failed(capsys, "sample", run)
    assert "tokenizer.json: no such file" in failed(capsys, "resume", run, "--epochs", "9")


def test_options_of_text_on_a_run_of_images(tmp_path, capsys):
    out = tmp_path / "images"
    quick = ("--epochs", "1", "--hidden", "8", "--latent", "2", "--accelerator", "cpu")
    assert cli.main(["train", "mlp", "--out", str(out), *quick]) == 0
    assert "--decoding only applies to runs of text" in failed(capsys, "sample", out, "--decoding", "beam")
    assert "--from and --to" in failed(capsys, "interpolate", out, "a", "b")


def test_without_the_package(text, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    error = failed(capsys, "train", "text", "--data", text, "--out", tmp_path / "run")
    assert "tokenizers is not installed" in error
    assert "fastvae-elbo[train]" in error
