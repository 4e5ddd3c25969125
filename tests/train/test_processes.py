"""Training in several processes."""

import math
import types

import pytest
import torch
from run_files import QUICK, read_metrics, run_python, weights

from fastvae.train import kinds
from fastvae.train.image import data, loader

pytestmark = pytest.mark.usefixtures("one_thread", "no_pictures")


RANKS = """
import sys
from fastvae import cli
from fastvae.train.image import module
step = module.ImageVAE.training_step

def training_step(self, batch, batch_idx):
    loss = step(self, batch, batch_idx)
    if (self.current_epoch, batch_idx) == (0, 0):
        x, first = batch
        sys.stderr.write(f"rank={self.global_rank} rows={len(x)} first={first} loss={loss.item():.9g}\\n")
    if (self.current_epoch, batch_idx, self.global_rank) == (1, 2, self.trainer.world_size - 1):
        self.steps.losses[-1].fill_(torch.nan)  # only in one process, and not in the one that prints
        self.steps.nll[-1].fill_(torch.nan)
    return loss

import torch
module.ImageVAE.training_step = training_step
sys.exit(cli.main(sys.argv[1:]))
"""


@pytest.mark.slow
def test_two_processes_train_like_one(tmp_path):
    options = (*QUICK, "--epochs", "3", "--binarize", "dynamic", "--batch-size", "96")
    script = tmp_path / "train.py"  # Lightning starts the second process with the same file
    script.write_text(RANKS)
    first = {}
    for devices in ("1", "2"):
        result = run_python(
            str(script), "train", "mlp", "--out", str(tmp_path / devices), *options, "--devices", devices,
            "--strategy", "auto" if devices == "1" else "ddp",
        )  # fmt: skip
        assert result.returncode == 0, result.stderr
        lines = sorted(
            line for line in result.stderr.replace("rank=", "\nrank=").splitlines() if "rows=" in line
        )
        first[devices] = [dict(word.split("=") for word in line.split()) for line in lines]
        assert result.stdout.count("backend native") == 1  # only one process prints
    assert [(r["rank"], r["rows"], r["first"]) for r in first["2"]] == [("0", "48", "0"), ("1", "48", "48")]
    (wholes,) = first["1"]
    halves = [float(r["loss"]) for r in first["2"]]
    assert sum(halves) / 2 == pytest.approx(float(wholes["loss"]), rel=1e-6)
    assert abs(halves[0] - halves[1]) > 1e-3

    assert "1 of 16 steps were skipped because the NLL of step 3" in result.stdout
    one, two = read_metrics(tmp_path / "1"), read_metrics(tmp_path / "2")
    assert [row["skipped_steps"] for row in two] == ["0", "1", "0"]
    for a, b in zip(one, two, strict=True):
        assert a.keys() == b.keys()
        for name in a:
            assert float(a[name]) == pytest.approx(float(b[name]), rel=1e-4), name
    a, b = weights(tmp_path / "1"), weights(tmp_path / "2")
    assert any(
        not torch.equal(a[name], b[name]) for name in a
    )  # rounding differs, so there really were two processes
    for name in a:
        assert torch.allclose(a[name], b[name], atol=1e-4), name


def train(out, devices, *options):
    options = (*QUICK, "--epochs", "2", "--batch-size", "96", *options)
    result = run_python(
        "-m", "fastvae.cli", "train", "mlp", "--out", str(out), *options, "--devices", devices,
        "--strategy", "auto" if devices == "1" else "ddp",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    return read_metrics(out)


@pytest.mark.slow
def test_two_processes_train_a_vamp_prior_like_one(tmp_path):
    one, two = (train(tmp_path / n, n, "--prior", "vamp", "--components", "7") for n in ("1", "2"))
    for a, b in zip(one, two, strict=True):
        for name in a.keys() - {"seconds"}:
            assert float(a[name]) == pytest.approx(float(b[name]), rel=1e-4), name


@pytest.mark.slow
@pytest.mark.parametrize("objective", ["beta-tc", "info"])
def test_objectives_of_a_batch_train_in_two_processes(tmp_path, objective):
    """The estimate is that of each process, of its half of the batch, so the losses differ from one process's."""
    metrics = train(tmp_path / "run", "2", "--objective", objective)
    assert all(math.isfinite(float(row["val_neg_elbo"])) for row in metrics)
    assert float(metrics[-1]["val_neg_elbo"]) < float(metrics[0]["val_neg_elbo"])


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("n", [23, 24])
def test_batches_of_all_processes_form_the_whole_batches(world, n):
    x = torch.arange(n, dtype=torch.uint8).view(n, 1, 1, 1)
    images = data.Images("numbers", x, x)
    settings = kinds.recipes()["mlp"](batch_size=6, likelihood="gaussian", devices=world)

    def parts(val, epoch, world=world):
        per_process = []
        for rank in range(world):
            module = loader.ImageData(images, settings)
            module.trainer = types.SimpleNamespace(global_rank=rank, world_size=world, current_epoch=epoch)
            batches = module.val_dataloader() if val else module.train_dataloader()
            per_process.append(list(batches))
            assert len(per_process[-1]) == len(batches)
        return per_process

    for epoch in (0, 1):
        (one,) = parts(False, epoch, 1)
        per_process = parts(False, epoch)
        wholes = [torch.cat([x for x, _ in batch]) for batch in zip(*per_process, strict=True)]
        assert all(len({len(x) for x, _ in batch}) == 1 for batch in zip(*per_process, strict=True))
        assert [first for _, first in per_process[-1]] == [
            len(batch) * (world - 1) // world for batch in wholes
        ]
        dropped = sum(size % world for size in [6] * (n // 6) + ([n % 6] if n % 6 else []))
        assert sum(map(len, wholes)) == n - dropped
        assert len(one) == len(wholes)
        assert all(torch.equal(a, b[: len(a)]) for a, (b, _) in zip(wholes, one, strict=True))
    val = torch.cat([x for batch in zip(*parts(True, 0), strict=True) for x, _ in batch])
    assert torch.equal((val.flatten() * 256).floor(), torch.arange(n).float())
    assert not torch.equal(parts(False, 0)[0][0][0], parts(False, 1)[0][0][0])
