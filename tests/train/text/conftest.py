"""A small corpus, and a run that was trained on it."""

import itertools
import shutil
from pathlib import Path

import pytest
from run_files import train_text


def write_corpus(path: Path) -> Path:
    """Write 180 different sentences of 4 to 6 tokens."""
    subjects = ("the cat", "a dog", "my old friend", "nobody")
    verbs = ("sees", "likes", "hears", "wants", "finds")
    objects = ("it", "the house", "a tree", "water", "the big moon", "them", "music", "us", "red wine")
    lines = [f"{s} {v} {o} ." for s, v, o in itertools.product(subjects, verbs, objects)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def corpus_file(tmp_path_factory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("text") / "little.txt")


@pytest.fixture(scope="session")
def trained_run(tmp_path_factory, corpus_file) -> Path:
    out = tmp_path_factory.mktemp("finished") / "run"
    assert train_text(out, corpus_file, "--epochs", "3", "--lr", "0.01") == 0
    return out


@pytest.fixture
def run(trained_run, tmp_path) -> Path:
    """A copy of the run, which a test may change."""
    return Path(shutil.copytree(trained_run, tmp_path / "run"))
