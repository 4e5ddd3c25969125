"""Warm-up of the KL: its schedules, and their effect on the loss."""

import numpy as np
import pytest
from run_files import read_metrics, train

from fastvae.train import schedules

pytestmark = pytest.mark.usefixtures("one_thread", "no_pictures")


def test_kl_weight_follows_each_schedule():
    def at(schedule, *passed, cycles=1):
        return [schedules.kl_weight(schedule, p, 10.0, cycles) for p in passed]

    assert at("none", 0, 5, 20) == [1, 1, 1]
    assert at("linear", 0, 2.5, 5, 10, 20) == [0, 0.25, 0.5, 1, 1]
    assert at("cyclical", 0, 1.25, 2.5, 4.9, 5, 6.25, 7.5, 10, 12, cycles=2) == pytest.approx(
        [0, 0.5, 1, 1, 0, 0.5, 1, 1, 1]
    )
    sigmoid = at("sigmoid", 0, 5, 9.999, 10)
    assert sigmoid == pytest.approx([0.00247, 0.5, 0.99753, 1], abs=1e-4)
    for schedule in ("linear", "sigmoid"):
        values = at(schedule, *np.linspace(0, 12, 50))
        assert values == sorted(values)


@pytest.mark.parametrize("schedule", ["linear", "cyclical", "sigmoid"])
def test_warmup_changes_beta_and_the_loss(tmp_path, capsys, schedule):
    options = ("--warmup", schedule, "--warmup-epochs", "2", "--beta", "0.5")
    if schedule == "cyclical":
        options += ("--cycles", "1")
    assert train(tmp_path / "run", *options, "--epochs", "3") == 0
    assert "warning" not in capsys.readouterr().out
    # The logged value is that of the last of the 12 steps.
    expected = [0.5 * schedules.kl_weight(schedule, epoch + 11 / 12, 2.0) for epoch in range(3)]
    assert [float(row["beta"]) for row in read_metrics(tmp_path / "run")] == pytest.approx(expected)
    last = {name: float(value) for name, value in read_metrics(tmp_path / "run")[-1].items()}
    assert last["train_loss"] == pytest.approx(last["train_nll"] + 0.5 * last["train_kl"], rel=1e-5)
    assert last["val_neg_elbo"] == pytest.approx(last["val_nll"] + last["val_kl"], rel=1e-6)


def test_warmup_longer_than_the_run_warns(tmp_path, capsys):
    assert train(tmp_path / "run", "--warmup", "linear", "--epochs", "1") == 0
    assert "warning: the warm-up takes 10 epochs, but the run has only 1" in capsys.readouterr().out
