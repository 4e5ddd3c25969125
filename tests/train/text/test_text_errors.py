"""Errors of `fastvae train text` and of the commands that use a run of text."""

import sys

import pytest
from run_files import command_error

from fastvae import cli

pytestmark = pytest.mark.usefixtures("one_thread")


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
def test_train_with_bad_file_fails_in_one_line(tmp_path, capsys, content, words):
    (tmp_path / "x.txt").write_bytes(content)
    error = command_error(
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
        (("interpolate", "RUN", "", "it"), ("empty",)),
        (("interpolate", "RUN", "it", "us", "--steps", "1"), ("--steps must be",)),
        (("traverse", "RUN"), ("a run of text", "no pictures")),
        (("inpaint", "RUN"), ("a run of text", "no pictures")),
        (("reconstruct", "RUN", "--data", "nowhere.txt"), ("nowhere.txt: no such file",)),
        (("evaluate", "RUN", "--samples", "0"), ("--samples must be at least 1",)),
        (("evaluate", "RUN", "--data", "nowhere.txt"), ("nowhere.txt: no such file",)),
        (("sample", "nothing"), ("no such run",)),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else None,
)
def test_commands_with_bad_arguments_fail(
    trained_run, corpus_file, tmp_path, capsys, monkeypatch, arguments, words
):
    monkeypatch.chdir(tmp_path)
    paths = {"RUN": trained_run, "TEXT": corpus_file}
    error = command_error(capsys, *(paths.get(a, a) for a in arguments))
    assert all(word in error for word in words), error
    assert not list(tmp_path.iterdir())


def test_commands_without_tokenizer_file_fail(run, capsys):
    (run / "tokenizer.json").unlink()
    assert "tokenizer.json: no such file" in command_error(capsys, "sample", run)
    assert "tokenizer.json: no such file" in command_error(capsys, "resume", run, "--epochs", "9")


def test_text_options_on_image_run_fail(tmp_path, capsys):
    out = tmp_path / "images"
    quick = ("--epochs", "1", "--hidden", "8", "--latent", "2", "--accelerator", "cpu")
    assert cli.main(["train", "mlp", "--out", str(out), *quick]) == 0
    assert "--decoding only applies to runs of text" in command_error(
        capsys, "sample", out, "--decoding", "beam"
    )
    assert "--from and --to" in command_error(capsys, "interpolate", out, "a", "b")


def test_train_without_tokenizers_package_fails(corpus_file, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    error = command_error(capsys, "train", "text", "--data", corpus_file, "--out", tmp_path / "run")
    assert "tokenizers is not installed" in error
    assert "fastvae-elbo[train]" in error
