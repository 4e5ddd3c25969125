"""Runs of images for the tests of commands."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from run_files import train_mlp


@pytest.fixture(scope="session")
def trained_run(tmp_path_factory) -> Path:
    """A run that was trained on the digits."""
    return train_mlp(tmp_path_factory.mktemp("finished") / "run", "--lr", "0.01")


@pytest.fixture(scope="session")
def colour_run(tmp_path_factory) -> Path:
    """A run with a Gaussian likelihood that was trained on 30 colour images."""
    folder = tmp_path_factory.mktemp("colour")
    rng = np.random.default_rng(0)
    x = rng.integers(0, 60, (36, 9, 7, 3), dtype=np.uint8)
    x[::2, 1:5] += 180
    np.savez(folder / "colour.npz", x_train=x[:30], x_test=x[30:])
    return train_mlp(folder / "run", "--data", str(folder / "colour.npz"))


@pytest.fixture
def run(trained_run, tmp_path) -> Path:
    """A copy of the run, which a test may change."""
    return Path(shutil.copytree(trained_run, tmp_path / "run"))
