"""Steps that are not finite: they are skipped, counted and reported. Also the formatting of messages."""

import math
from itertools import pairwise

import pytest
import torch
from run_files import error_line, read_metrics, train

from fastvae import cli
from fastvae.train import callbacks, image, messages, processes
from fastvae.train.image import module

pytestmark = pytest.mark.usefixtures("one_thread", "no_pictures")


@pytest.mark.parametrize("term", ["the NLL", "the KL", "the gradient"])
@pytest.mark.parametrize("clip", [(), ("--clip", "1")], ids=["", "clipped"])
def test_non_finite_step_is_skipped_counted_and_named(tmp_path, capsys, monkeypatch, term, clip):
    after = []

    def corrupt(name, change):
        method = getattr(module.ImageVAE, name)
        monkeypatch.setattr(module.ImageVAE, name, lambda self, value: change(self, method(self, value)))

    def is_bad_step(self):
        return self.training and (self.current_epoch, self.trainer.fit_loop.batch_idx) == (0, 4)

    if term == "the NLL":
        corrupt("decode", lambda self, recon: recon * math.nan if is_bad_step(self) else recon)
    elif term == "the gradient":

        def add_hook(self, recon):
            if is_bad_step(self):
                recon.register_hook(lambda gradient: gradient * math.inf)  # the loss itself stays finite
            return recon

        corrupt("decode", add_hook)
    else:
        corrupt(
            "encode",
            lambda self, posterior: (posterior[0] * (math.nan if is_bad_step(self) else 1), posterior[1]),
        )
    monkeypatch.setattr(
        module.ImageVAE,
        "on_train_batch_end",
        lambda self, *_: after.append(self.encoder[1].weight.detach().clone()),
        raising=False,
    )
    assert train(tmp_path / "run", "--epochs", "2", *clip) == 0
    assert f"1 of 12 steps were skipped because {term} of step 5 is not finite" in (capsys.readouterr().out)
    assert [row["skipped_steps"] for row in read_metrics(tmp_path / "run")] == ["1", "0"]
    assert all(
        math.isfinite(float(value)) for row in read_metrics(tmp_path / "run") for value in row.values()
    )
    assert [torch.equal(a, b) for a, b in pairwise(after)] == [step == 4 for step in range(1, 24)]


def test_error_in_other_process_prints_nothing(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(module.ImageVAE, "decode", lambda self, z: self.decoder(z) * math.inf)
    monkeypatch.setattr(processes, "is_main_process", lambda: False)
    (tmp_path / "run").mkdir()
    with pytest.raises(SystemExit) as ended:
        train(tmp_path / "run", "--epochs", "2")
    assert ended.value.code == 2
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("epoch", "advice"),
    [
        (1, "the initial weights already cause this, whatever --lr: check the data"),
        (2, "try a smaller --lr, or --clip 1"),
    ],
)
def test_epoch_without_a_finite_step_fails(tmp_path, capsys, monkeypatch, epoch, advice):
    """The learning rate can only be the cause after the first step."""

    def decode(self, z):
        return self.decoder(z) * (math.inf if self.training and self.current_epoch + 1 == epoch else 1)

    monkeypatch.setattr(module.ImageVAE, "decode", decode)
    assert train(tmp_path / "run", "--epochs", "2") == 2
    line = error_line(capsys)
    assert f"every step of epoch {epoch} was skipped because the NLL of step 1 is not finite; " in line
    assert advice in line
    assert (tmp_path / "run" / "checkpoints" / "last.ckpt").exists() == (epoch > 1)


@pytest.mark.usefixtures("with_pictures")
def test_epoch_with_non_finite_val_loss_saves_no_checkpoint(tmp_path, capsys, monkeypatch):
    def corrupt_epochs(epochs):
        encode = module.ImageVAE.encode

        def encode_badly(self, x):
            factor = math.nan if not self.training and self.current_epoch in epochs else 1
            return tuple(part * factor for part in encode(self, x))

        monkeypatch.setattr(module.ImageVAE, "encode", encode_badly)

    run = tmp_path / "run"
    corrupt_epochs([0])
    assert train(run, "--epochs", "1") == 0
    assert (
        "warning: the validation loss of epoch 1 is not finite, so no checkpoint was saved"
        in capsys.readouterr().out
    )
    assert not (run / "checkpoints").exists()
    assert cli.main(["sample", str(run)]) == 2
    assert "checkpoints/best.ckpt does not exist yet" in error_line(capsys)
    monkeypatch.undo()
    assert cli.main(["resume", str(run)]) == 0
    corrupt_epochs([1])
    assert cli.main(["resume", str(run), "--epochs", "2"]) == 0
    assert len(read_metrics(run)) == 2
    for name in ("last", "best"):
        assert image.load(run, checkpoint=name).epoch == 1


def test_progress_table_with_huge_numbers_keeps_columns_apart():
    names = ("train_loss", "train_nll", "train_kl", "val_neg_elbo", "val_nll", "val_kl")
    values = (1234567.891, -1e12, math.inf, 3.4e38, 99999.994, 0.5)
    row = {"epoch": 3, "active_units": 4, "seconds": 1.5, **dict(zip(names, values, strict=True))}
    line = callbacks._format_line(row, (("perplexity", "perplexity", 2), ("skipped", "x", 0)))
    got = line.split()
    assert got[:7] == ["3", "1.23e+06", "-1.00e+12", "inf", "3.40e+38", "99999.99", "0.50"]
    assert len(got) == len(line.replace("\n", "").split()) == 11


def test_shell_command_quotes_its_arguments():
    assert messages.shell_command("resume", "runs/my run's", "--epochs", 4) == (
        """fastvae resume 'runs/my run'"'"'s' --epochs 4"""
    )
