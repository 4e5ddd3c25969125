"""`fastvae resume`: continuing stopped and killed runs. Also moving averages, and which files may be replaced."""

import os
import signal
from pathlib import Path

import pytest
import torch
from run_files import QUICK, assert_same_run, error_line, read_metrics, run_python, train, weights

from fastvae import cli
from fastvae.train import callbacks, files, image
from fastvae.train.errors import InputError
from fastvae.train.image import callbacks as image_callbacks
from fastvae.train.image import module

pytestmark = pytest.mark.usefixtures("one_thread", "no_pictures")


VARIANTS = {
    "plain": (),
    "everything": (
        *("--ema", "0.9", "--binarize", "dynamic", "--clip", "5"),
        *("--warmup", "cyclical", "--warmup-epochs", "4", "--cycles", "2", "--beta", "0.8"),
    ),
    "gaussian": ("--likelihood", "gaussian"),
    "mixture": ("--likelihood", "dmol", "--components", "2"),
}


@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)
def test_resumed_run_equals_uninterrupted_run(tmp_path, recwarn, options):
    uninterrupted, parts = tmp_path / "whole", tmp_path / "parts"
    assert train(uninterrupted, *options, "--epochs", "4") == 0
    assert train(parts, *options, "--epochs", "1") == 0
    assert cli.main(["resume", str(parts), "--epochs", "3"]) == 0
    # The best epoch is still known after the run folder was moved.
    moved = parts.rename(tmp_path / "moved")
    assert cli.main(["resume", str(moved), "--epochs", "4"]) == 0
    assert_same_run(moved, uninterrupted)
    assert not [str(warning.message) for warning in recwarn if "lightning" in warning.filename]


def test_moving_average_is_saved_and_validated(tmp_path):
    assert train(tmp_path / "run", "--ema", "0.99", "--epochs", "2") == 0
    saved = torch.load(tmp_path / "run" / "checkpoints" / "last.ckpt", weights_only=True)
    name = "encoder.1.weight"
    assert not torch.equal(saved["state_dict"][name], saved["current_model_state"][name])
    run = image.load(tmp_path / "run", checkpoint="last")
    assert torch.equal(run.model.state_dict()[name], saved["state_dict"][name])


def test_moving_average_decays_faster_in_the_first_steps():
    update = callbacks.weight_average(0.5)._kwargs["multi_avg_fn"]
    for steps, share in ((0, 0.9), (2, 1 - 3 / 12), (1000, 0.5)):
        averaged = [torch.zeros(3)]
        update(averaged, [torch.ones(3)], steps)
        assert torch.allclose(averaged[0], torch.full((3,), share))


@pytest.mark.usefixtures("with_pictures")
def test_moving_average_is_used_for_pictures(tmp_path, monkeypatch):
    weights_drawn = []
    draw = image_callbacks.SaveImages.save_examples
    monkeypatch.setattr(
        image_callbacks.SaveImages,
        "save_examples",
        lambda self, model: (
            weights_drawn.append(model.encoder[1].weight.detach().clone()),
            draw(self, model),
        ),
    )
    assert train(tmp_path / "run", "--ema", "0.99", "--epochs", "1") == 0
    assert torch.equal(weights_drawn[0], weights(tmp_path / "run")["encoder.1.weight"])


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_clip_limits_the_gradient(tmp_path, precision):
    """Adam divides by the size of the gradients, unless they are far below its epsilon of 1e-8."""
    assert train(tmp_path / "run", "--epochs", "1", "--clip", "1e-12", "--precision", precision) == 0
    settings = image.load(tmp_path / "run").settings
    torch.manual_seed(0)
    fresh = settings.build((8, 8, 1))[0][1].weight.detach()
    trained = weights(tmp_path / "run")["encoder.1.weight"]
    assert not torch.equal(trained, fresh)
    assert (trained - fresh).abs().max() < 1e-5


def test_each_step_has_its_own_noise_seed(tmp_path, monkeypatch):
    forward, seeds = module.ImageVAE.forward, []

    def record(self, x, seed, row_offset):
        if self.training:
            seeds.append(seed.tolist())
        return forward(self, x, seed, row_offset)

    monkeypatch.setattr(module.ImageVAE, "forward", record)
    assert train(tmp_path / "run", "--epochs", "2", "--seed", "3") == 0
    assert seeds == [[3, 4 * step] for step in range(24)]


def test_failed_write_keeps_the_old_file(tmp_path, monkeypatch):
    file = tmp_path / "metrics.csv"
    files.write(file, b"old")
    write = Path.write_bytes

    def full(self, content):
        write(self, content[:1])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(InputError, match=r"metrics\.csv: cannot be written: no space left"):
        files.write(file, b"new")
    assert file.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [file]


def test_checkpoint_on_full_disk_keeps_the_old_file(tmp_path):
    resource = pytest.importorskip("resource")
    file = tmp_path / "last.ckpt"
    file.write_bytes(b"old")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(InputError, match=r"last\.ckpt: cannot be written: file too large"):
            callbacks.AtomicCheckpoints().save_checkpoint({"weights": torch.zeros(100_000)}, file)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert file.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [file]


def test_interrupted_run_can_be_resumed(tmp_path, capsys, monkeypatch):
    step = module.ImageVAE.training_step

    def interrupted(self, batch, batch_idx):
        if (self.current_epoch, batch_idx) == (1, 5):
            raise KeyboardInterrupt
        return step(self, batch, batch_idx)

    monkeypatch.setattr(module.ImageVAE, "training_step", interrupted)
    handler = signal.getsignal(signal.SIGINT)
    assert train(tmp_path / "run", "--epochs", "3") == 130
    assert f"fastvae resume {tmp_path / 'run'}" in error_line(capsys)
    assert signal.getsignal(signal.SIGINT) is handler
    monkeypatch.undo()
    monkeypatch.setattr("fastvae.train.callbacks.should_save_examples", lambda trainer: False)
    assert cli.main(["resume", str(tmp_path / "run")]) == 0
    assert train(tmp_path / "whole", "--epochs", "3") == 0
    assert_same_run(tmp_path / "run", tmp_path / "whole")


KILLED = """
import os, signal, sys, torch
from fastvae import cli
from fastvae.train import callbacks
from fastvae.train.image import module

def die():
    os.kill(os.getpid(), signal.SIGKILL)

callbacks.should_save_examples = lambda trainer: False
place, *arguments = sys.argv[1:]
step, save, saved = module.ImageVAE.training_step, torch.save, 0

def training_step(self, batch, batch_idx):
    if (self.current_epoch, batch_idx) == {"first": (0, 3), "training": (1, 7)}.get(place):
        die()
    return step(self, batch, batch_idx)

def save_half(checkpoint, file):
    global saved
    saved += 1
    save(checkpoint, file)
    # The first two are best.ckpt and last.ckpt of the first epoch, followed by those of the second.
    if saved == {"saving best": 3, "saving last": 4}.get(place):
        file.truncate(file.tell() // 2)
        die()

module.ImageVAE.training_step, torch.save = training_step, save_half
cli.main(arguments)
"""


@pytest.mark.parametrize(
    "place",
    [
        "saving last",
        *(pytest.param(place, marks=pytest.mark.slow) for place in ("first", "training", "saving best")),
    ],
)
def test_killed_run_can_be_resumed(tmp_path, place):
    run, uninterrupted = tmp_path / "run", tmp_path / "whole"
    process = run_python("-c", KILLED, place, "train", "mlp", "--out", str(run), *QUICK, "--epochs", "3")
    assert process.returncode == -signal.SIGKILL, process.stderr
    parts = [path.name for path in run.rglob("*.part")]
    assert bool(parts) is place.startswith("saving")

    assert cli.main(["resume", str(run)]) == 0
    assert not list(run.rglob("*.part"))
    assert train(uninterrupted, "--epochs", "3") == 0
    assert_same_run(run, uninterrupted)


@pytest.mark.parametrize(("before", "after"), [("lr = 0.001", "lr = 0.01"), ("beta = 1.0", "beta = 0.25")])
def test_resume_uses_edited_settings(tmp_path, before, after):
    run = tmp_path / "run"
    assert train(run, "--epochs", "1", "--likelihood", "gaussian") == 0
    config = run / "config.toml"
    assert before in config.read_text()
    config.write_text(config.read_text().replace(before, after))
    assert cli.main(["resume", str(run), "--epochs", "2"]) == 0
    saved = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    rates = [group["lr"] for group in saved["optimizer_states"][0]["param_groups"]]
    assert rates == ([0.01, 0.1] if "lr" in after else [0.001, 0.01])
    assert float(read_metrics(run)[-1]["beta"]) == (1.0 if "lr" in after else 0.25)


def test_run_in_use_by_another_process_is_refused(tmp_path, capsys):
    fcntl = pytest.importorskip("fcntl")
    run = tmp_path / "run"
    assert train(run, "--epochs", "1") == 0
    before = (run / "config.toml").read_bytes()
    other = os.open(run, os.O_RDONLY)
    fcntl.flock(other, fcntl.LOCK_EX)
    capsys.readouterr()
    for command in (
        ["resume", str(run), "--epochs", "2"],
        ["train", "mlp", "--out", str(run), *QUICK, "--overwrite"],
    ):
        assert cli.main(command) == 2
        assert f"{run}: another process is training this run" in error_line(capsys)
    assert (run / "config.toml").read_bytes() == before
    assert len(read_metrics(run)) == 1
    os.close(other)
    assert cli.main(["resume", str(run), "--epochs", "2"]) == 0


def test_resume_of_complete_run_fails(tmp_path, capsys):
    assert train(tmp_path / "run", "--epochs", "1") == 0
    capsys.readouterr()
    assert cli.main(["resume", str(tmp_path / "run")]) == 2
    assert "--epochs" in error_line(capsys)


def test_existing_run_is_replaced_only_with_overwrite(tmp_path, capsys):
    run = tmp_path / "run"
    assert train(run, "--epochs", "2") == 0
    (run / "notes.txt").write_text("mine")
    before = (run / "metrics.csv").read_text()
    capsys.readouterr()
    assert train(run, "--epochs", "1") == 2
    error = error_line(capsys)
    assert f"fastvae resume {run}" in error
    assert "--overwrite" in error
    assert (run / "metrics.csv").read_text() == before
    assert train(run, "--epochs", "1", "--overwrite") == 0
    assert len(read_metrics(run)) == 1
    assert (run / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("overwrite", [(), ("--overwrite",)], ids=["", "overwrite"])
@pytest.mark.parametrize(
    "name", ["checkpoints/other.ckpt", "tensorboard/events.1", "samples.png", "metrics.csv"]
)
def test_folder_with_foreign_files_is_refused(tmp_path, capsys, name, overwrite):
    file = tmp_path / "project" / name
    file.parent.mkdir(parents=True)
    file.write_text("mine")
    assert train(tmp_path / "project", "--epochs", "1", *overwrite) == 2
    assert f"{tmp_path / 'project' / Path(name).parts[0]}: this file would be replaced" in error_line(capsys)
    assert file.read_text() == "mine"
    assert not (tmp_path / "project" / "config.toml").exists()


def test_overwrite_removes_only_files_of_a_run(tmp_path):
    pytest.importorskip("tensorboard")
    run = tmp_path / "run"
    assert train(run, "--epochs", "1", "--logger", "tensorboard") == 0
    own_files = [
        run / "checkpoints" / "other.ckpt",
        run / "tensorboard" / "notes.txt",
        run / "data" / "x.npz",
    ]
    for path in own_files:
        path.parent.mkdir(exist_ok=True)
        path.write_text("mine")
    (run / "checkpoints" / ".last.ckpt.1.part").write_text("half")
    for command in ("evaluate", "interpolate", "traverse", "inpaint"):
        assert cli.main([command, str(run)]) == 0
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.is_file()}
    assert train(run, "--epochs", "1", "--overwrite") == 0
    unchanged = {path for path in run.rglob("*") if before.get(path) == path.stat().st_mtime_ns}
    assert unchanged == set(own_files)
    assert not list((run / "tensorboard").glob("events.*"))
