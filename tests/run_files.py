"""Helpers for tests that train, run commands, and read the files of a run."""

import csv
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fastvae import cli

QUICK = ("--accelerator", "cpu", "--hidden", "32", "--latent", "4")
QUICK_TEXT = (
    "--accelerator",
    "cpu",
    "--hidden",
    "24",
    "--embedding",
    "12",
    "--latent",
    "3",
    "--batch-size",
    "16",
)
QUICK_IMAGES = ("--accelerator", "cpu", "--channels", "4", "--latent", "3", "--batch-size", "16")


def train(out: Path, *options: str, recipe: str = "mlp") -> int:
    quick = QUICK if recipe == "mlp" else QUICK[:2]
    return cli.main(["train", recipe, "--out", str(out), *quick, *options])


def train_mlp(out: Path, *options: str) -> Path:
    """Train a small run of `mlp` for two epochs, and return its folder."""
    small = ("--epochs", "2", "--hidden", "50", "--latent", "6", "--accelerator", "cpu")
    assert cli.main(["train", "mlp", *small, "--out", str(out), *options]) == 0
    return out


def train_images(recipe: str, out: Path, data: Path, *options: str) -> int:
    return cli.main(["train", recipe, "--data", str(data), "--out", str(out), *QUICK_IMAGES, *options])


def train_text(out: Path, data: Path | str, *options: str) -> int:
    return cli.main(["train", "text", "--out", str(out), "--data", str(data), *QUICK_TEXT, *options])


def run_command(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """Run a command that must succeed, and return what it prints."""
    capsys.readouterr()
    assert cli.main([str(argument) for argument in arguments]) == 0
    output, errors = capsys.readouterr()
    assert errors == ""
    return output


def run_lines(capsys: pytest.CaptureFixture[str], *arguments: object) -> list[str]:
    return run_command(capsys, *arguments).splitlines()


def command_error(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """Run a command that must fail with exit code 2 before it prints anything, and return its one line on stderr."""
    capsys.readouterr()
    assert cli.main([str(argument) for argument in arguments]) == 2
    output, errors = capsys.readouterr()
    assert output == ""
    assert errors.startswith("fastvae: ")
    assert errors.count("\n") == 1, errors
    return errors


def read_metrics(out: Path) -> list[dict[str, str]]:
    """Read metrics.csv without the time, which differs between runs."""
    with (out / "metrics.csv").open() as file:
        return [
            {name: value for name, value in row.items() if name != "seconds"} for row in csv.DictReader(file)
        ]


def weights(out: Path, name: str = "last") -> dict[str, torch.Tensor]:
    return torch.load(out / "checkpoints" / f"{name}.ckpt", weights_only=True)["state_dict"]


def assert_same_run(ours: Path, theirs: Path) -> None:
    assert read_metrics(ours) == read_metrics(theirs)
    assert (ours / "kl_per_dimension.csv").read_text() == (theirs / "kl_per_dimension.csv").read_text()
    for name in ("last", "best"):
        a, b = weights(ours, name), weights(theirs, name)
        assert a.keys() == b.keys()
        assert all(torch.equal(a[key], b[key]) for key in a)


def error_line(capsys) -> str:
    """Return the one line on stderr."""
    error = capsys.readouterr().err
    assert error.startswith("fastvae: ")
    assert error.count("\n") == 1, error
    return error


def run_python(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def read_grid(path: Path, columns: int, rows: int, side: int = 64) -> np.ndarray:
    """Read the images of a plain grid, (rows, columns, side, side)."""
    with Image.open(path) as picture:
        assert picture.size == (columns * (side + 2) + 2, rows * (side + 2) + 2)
        pixels = np.asarray(picture)
    return np.stack(
        [
            [pixels[2 + r * (side + 2) :, 2 + c * (side + 2) :][:side, :side] for c in range(columns)]
            for r in range(rows)
        ]
    )


def save_picture(
    path: Path, size: tuple[int, int], value: object = 100, mode: str = "L", **save: object
) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, value).save(path, **save)
