"""Schedules: the warm-up of the KL and its effect on the loss, and the learning rate."""

import math

import numpy as np
import pytest
import torch
from run_files import assert_same_run, read_metrics, train

from fastvae import cli
from fastvae.train import schedules
from fastvae.train.image import module

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


def test_burda_learning_rate_follows_the_paper():
    """Burda et al. 2016, section 5: 3^i epochs at 0.001 * 10^(-i / 7), for i = 0, ..., 7."""
    factors = [schedules.learning_rate_factor("burda", epoch, 3280) for epoch in range(3280)]
    expected = [10 ** (-i / 7) for i in range(8) for _ in range(3**i)]
    assert factors == pytest.approx(expected, rel=1e-12)
    # A shorter run passes through the same stages in proportion.
    shorter = [schedules.learning_rate_factor("burda", epoch / 10, 328) for epoch in range(3280)]
    assert shorter == pytest.approx(expected, rel=1e-12)
    assert schedules.learning_rate_factor("burda", 3280, 3280) == pytest.approx(0.1)


def test_cosine_learning_rate_falls_to_zero():
    factors = [schedules.learning_rate_factor("cosine", passed, 8) for passed in (0, 2, 4, 6, 8)]
    assert factors == pytest.approx([1, (1 + math.sqrt(0.5)) / 2, 0.5, (1 - math.sqrt(0.5)) / 2, 0])
    assert schedules.learning_rate_factor("constant", 5, 8) == 1


def record_rates(monkeypatch) -> list[list[float]]:
    """Return a list that receives the learning rates of every step, one for each group of parameters."""
    rates, step = [], torch.optim.Adam.step

    def record(self, *args, **kwargs):
        result = step(self, *args, **kwargs)  # this includes the whole training step
        rates.append([group["lr"] for group in self.param_groups])
        return result

    monkeypatch.setattr(torch.optim.Adam, "step", record)
    return rates


@pytest.mark.parametrize("schedule", ["constant", "cosine", "burda"])
def test_learning_rate_reaches_every_step(tmp_path, monkeypatch, schedule):
    """The learned variance has ten times the rate of the networks."""
    rates = record_rates(monkeypatch)
    options = ("--lr-schedule", schedule, "--lr", "0.002", "--likelihood", "gaussian", "--epochs", "2")
    assert train(tmp_path / "run", *options) == 0
    expected = [0.002 * schedules.learning_rate_factor(schedule, step / 12, 2) for step in range(24)]
    np.testing.assert_allclose(rates, [[rate, 10 * rate] for rate in expected], rtol=1e-12)


def test_interrupted_run_continues_its_schedule(tmp_path, monkeypatch):
    step = module.ImageVAE.training_step

    def interrupted(self, batch, batch_idx):
        if (self.current_epoch, batch_idx) == (1, 2):
            raise KeyboardInterrupt
        return step(self, batch, batch_idx)

    options = ("--lr-schedule", "cosine", "--batch-size", "300", "--epochs", "3")
    with monkeypatch.context() as patched:
        patched.setattr(module.ImageVAE, "training_step", interrupted)
        assert train(tmp_path / "run", *options) == 130
    assert cli.main(["resume", str(tmp_path / "run")]) == 0
    assert train(tmp_path / "whole", *options) == 0
    assert_same_run(tmp_path / "run", tmp_path / "whole")
