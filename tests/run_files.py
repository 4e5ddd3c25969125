"""What the tests of training read of a run, and of what it says."""

import csv
import os
import subprocess
import sys
from pathlib import Path

import torch
from PIL import Image

from fastvae import cli

QUICK = ("--accelerator", "cpu", "--hidden", "32", "--latent", "4")


def train(out: Path, *options: str, recipe: str = "mlp") -> int:
    quick = QUICK if recipe == "mlp" else QUICK[:2]
    return cli.main(["train", recipe, "--out", str(out), *quick, *options])


def read_metrics(out: Path) -> list[dict[str, str]]:
    """metrics.csv, without the time, which is never the same."""
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
    """What stands on stderr: one line, and no traceback."""
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


def save_picture(
    path: Path, size: tuple[int, int], value: object = 100, mode: str = "L", **save: object
) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, value).save(path, **save)
