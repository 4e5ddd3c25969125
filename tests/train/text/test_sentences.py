"""Sentences, tokens and batches of the recipe `text`."""

import json
import math
import re
import sys
import types
from typing import Any

import pytest
import torch

from fastvae.train import hub
from fastvae.train.errors import InputError
from fastvae.train.text import loader as sentence_loader
from fastvae.train.text import sentences
from fastvae.train.text.recipe import Text
from fastvae.train.text.sentences import END, PAD, START, UNKNOWN

pytestmark = pytest.mark.usefixtures("one_thread")


def test_words_tokenizer_separates_words_and_punctuation(tmp_path):
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
def test_vocabulary_with_special_token_names_in_text_reads_them_as_words(tokens):
    lines = ["one <pad> two </s> three", "<s> four <unk>"]
    vocabulary = sentences.Vocabulary.train(lines, Text(data="x", tokens=tokens, vocabulary=60))
    numbers = vocabulary.encode(lines)
    assert not {PAD, START, END} & {n for line in numbers for n in line}
    assert vocabulary.decode(numbers[0]).endswith("three")


def test_bpe_decoding_restores_the_text():
    lines = ["the lower the slower", "a newer tower", "low power"]
    vocabulary = sentences.Vocabulary.train(lines, Text(data="x", tokens="bpe", vocabulary=30))
    assert len(vocabulary) == 30
    for line, numbers in zip(lines, vocabulary.encode(lines), strict=True):
        assert vocabulary.decode(numbers) == line
    assert vocabulary.decode(vocabulary.encode(["slowest towers"])[0]) == "slowest towers"


def test_vocabulary_keeps_the_most_frequent_tokens():
    lines = ["a a a b b c", "a b d"]
    vocabulary = sentences.Vocabulary.train(lines, Text(data="x", vocabulary=8))
    assert len(vocabulary) == 8
    assert vocabulary.decode([4, 5]) == "a b"
    small = sentences.Vocabulary.train(["a a b b c d e f g"], Text(data="x", vocabulary=8))
    assert sum(n == UNKNOWN for n in small.encode(["a b c d e f g"])[0]) == 3


def test_tokenizer_file_is_read_back_and_checked(tmp_path):
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


def test_batch_has_encoder_input_decoder_input_and_target():
    table = sentences.token_table([[5, 6, 7], [8]])
    batch = sentences.make_batch(table)
    assert batch.words.tolist() == [[5, 6, 7], [8, PAD, PAD]]
    assert batch.before.tolist() == [[START, 5, 6, 7], [START, 8, PAD, PAD]]
    assert batch.after.tolist() == [[5, 6, 7, END], [8, END, PAD, PAD]]


def test_word_dropout_hides_a_share_of_the_decoder_input():
    table = sentences.token_table([[5 + i % 90 for i in range(200)]] * 50 + [[4]])
    batch = sentences.make_batch(table, 0.3, torch.Generator().manual_seed(0))
    assert (batch.before[:, 0] == START).all()
    assert torch.equal(batch.words, sentences.make_batch(table).words)  # the encoder gets all words
    assert torch.equal(batch.after, sentences.make_batch(table).after)
    hidden = batch.before[:50, 1:] == UNKNOWN
    assert hidden.float().mean().item() == pytest.approx(0.3, abs=0.02)
    assert torch.equal(batch.before[:50, 1:][~hidden], batch.words[:50][~hidden])
    assert (batch.before[50, 2:] == PAD).all()
    assert (sentences.make_batch(table, 1.0).before[:50, 1:] == UNKNOWN).all()


def test_training_batches_contain_sentences_of_similar_length():
    """Every epoch contains each sentence once, in an order that depends on the epoch but not on the run."""
    lengths = [1 + i * 7 % 40 for i in range(1000)]
    table = sentences.token_table([[4 + i % 50] * n for i, n in enumerate(lengths)])
    loader = sentence_loader.SentenceData(table, table, Text(data="x", batch_size=16))
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


def test_unigram_perplexity_agrees_with_its_formula():
    table = sentences.token_table([[4, 4], [5]])
    # The tokens 1, 3, 4 and 5 (of 6) occur 0, 2, 2 and 1 times, and one is added to each count.
    counts = {UNKNOWN: 1, END: 3, 4: 3, 5: 2}
    nats = -sum(math.log(counts[token] / 9) for token in (4, 4, END, 5, END))
    assert sentences.unigram_perplexity(table, table, 6) == pytest.approx(math.exp(nats / 5))


def test_read_lines_splits_only_at_line_ends(tmp_path):
    """str.splitlines would also split at line separators and form feeds, which occur in scraped text."""
    path = tmp_path / "lines.txt"
    odd = "\u2028\u2029\u0085\x0c\x0b\x1c"
    path.write_bytes(f"a{odd}b\nc\r\nd\re\n".encode())
    assert sentences.read_lines(path) == [f"a{odd}b", "c", "d", "e"]


def test_load_filters_lines_by_number_of_words(corpus_file):
    corpus = sentences.load(Text(data=str(corpus_file), min_words=5, max_words=6))
    assert all(5 <= len(line.split()) <= 6 for line in corpus.train + corpus.val)
    (note,) = corpus.notes
    assert re.match(r"skipped \d+ of 180 lines: ", note)
    assert "--min-words" in note
    assert "--max-words" in note
    everything = sentences.load(Text(data=str(corpus_file)))
    assert everything.notes == ()
    assert len(everything.val) == 30
    assert len(set(everything.train + everything.val)) == 180
    assert sentences.load(Text(data=str(corpus_file), seed=1)).val != everything.val


def test_read_lines_drops_blank_lines_and_byte_order_mark(tmp_path):
    (tmp_path / "x.txt").write_bytes(b"\xef\xbb\xbfone two\r\n\r\n   \nthree\n")
    assert sentences.read_lines(tmp_path / "x.txt") == ["one two", "three"]


def fake_datasets(monkeypatch, **splits: dict[str, list[Any]]) -> None:
    """Install a fake module `datasets` with columns of strings and integers."""

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


def test_load_reads_hugging_face_datasets(monkeypatch):
    train = {"label": [1, 2], "title": ["t", "u"], "text": ["One  two\nthree", "four"]}
    fake_datasets(monkeypatch, train=train, test={"label": [1], "title": ["t"], "text": ["five"]})
    corpus = sentences.load(Text(data="somebody/imdb"))
    assert corpus.train == ["One two three", "four"]
    assert corpus.val == ["five"]
    assert sentences.load(Text(data="somebody/imdb", column="title")).train == ["t", "u"]
    for column in ("label", "nothing"):
        with pytest.raises(InputError, match=f"--column {column}: .* only title, text"):
            sentences.load(Text(data="somebody/imdb", column=column))
    fake_datasets(monkeypatch, train={"words": ["a b", "c d", "e f"]})
    assert len(sentences.load(Text(data="imdb")).train) == 2
    fake_datasets(monkeypatch, train={"label": [1, 2]})
    with pytest.raises(InputError, match="no text column, only label"):
        sentences.load(Text(data="imdb"))
    fake_datasets(monkeypatch, train={"text": ["a"]}, test={"text": ["b " * 60]})
    with pytest.raises(InputError, match="validation split: no lines left"):
        sentences.load(Text(data="imdb"))
    assert hub.load_splits("imdb")["test"]["text"] == ["b " * 60]
