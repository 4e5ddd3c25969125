"""Errors of the commands that use a run: one line, exit code 2, and no files. Also --version and --help."""

import os

import numpy as np
import pytest
from run_files import command_error, run_command

import fastvae
from fastvae import cli
from fastvae.train import bounds
from fastvae.train.image import pictures

pytestmark = pytest.mark.usefixtures("one_thread")


BAD = [
    (["sample", "-n", "0"], "-n must be between 1 and 10000, got 0"),
    (["sample", "-n", "20000"], "-n must be between 1 and 10000, got 20000"),
    (["sample", "-n", "some"], "'-n'"),
    (["sample", "--temperature", "-1"], "--temperature must be at least 0, got -1"),
    (["sample", "--temperature", "nan"], "--temperature must be at least 0, got nan"),
    (["sample", "--seed", "-1"], "--seed must be between 0 and 4294967295, got -1"),
    (["sample", "--checkpoint", "first"], "'first' is not one of 'best', 'last'"),
    (["sample", "--out", "{tmp}/new.jpg"], "must end in .png"),
    (["sample", "--out", "{tmp}/file/new.png"], "cannot be written to: it is a file"),
    (["sample", "--out", "{tmp}/folder.png"], "cannot be written: it is a folder"),
    (["sample", "--best", "0"], "--best must be between 1 and 256 (--of), got 0"),
    (["sample", "--best", "300"], "--best must be between 1 and 256 (--of), got 300"),
    (["sample", "--best", "9", "--of", "8"], "--best must be between 1 and 8 (--of), got 9"),
    (["sample", "--best", "1", "--of", "0"], "--of must be between 1 and 10000, got 0"),
    (["sample", "--best", "1", "--of", "10001"], "--of must be between 1 and 10000, got 10001"),
    (["sample", "--best", "4", "-n", "4"], "-n and --best cannot be used together"),
    (["sample", "--of", "8"], "--of 8 only applies together with --best, the number of images to keep"),
    (["sample", "--best", "4", "--seed", "-1"], "--seed must be between 0 and 4294967295, got -1"),
    (["sample", "--best", "4", "--temperature", "-1"], "--temperature must be at least 0, got -1"),
    (["reconstruct", "-n", "0"], "-n must be between 1 and 10000, got 0"),
    (["reconstruct", "--data", "{tmp}/none.npz"], "none.npz: no such file"),
    (["reconstruct", "--data", "{tmp}/large.npz"], "the images must be 8 x 8 as in {run}, got 9 x 7"),
    (["reconstruct", "--data", "{tmp}/colour.npz"], "the images must be 8 x 8 as in {run}, got 8 x 8 x 3"),
    (
        ["interpolate", "--from", "0", "--to", "299"],
        "--to must be between 0 and 298, as there are 299 validation images, got 299",
    ),
    (
        ["interpolate", "--from", "-1", "--to", "2"],
        "--from must be between 0 and 298, as there are 299 validation images, got -1",
    ),
    (["interpolate", "--from", "0"], "--from and --to must be given equally often, got 1 and 0 of them"),
    (["interpolate", "--steps", "1"], "--steps must be between 2 and 100, got 1"),
    (
        ["traverse", "--image", "1000"],
        "--image must be between 0 and 298, as there are 299 validation images, got 1000",
    ),
    (["traverse", "-n", "0"], "-n must be at least 1, got 0"),
    (["traverse", "--steps", "101"], "--steps must be between 2 and 100, got 101"),
    (["inpaint", "--mask", "middle"], "--mask must be one of left, right, top, bottom, center, or a box"),
    (["inpaint", "--mask", "1,2,3"], "or a box x0,y0,x1,y1 in pixels, got '1,2,3'"),
    (
        ["inpaint", "--mask", "0,0,9,8"],
        "--mask 0,0,9,8: the box must lie inside the image of 8 x 8 pixels (width x height)",
    ),
    (["inpaint", "--mask", "-1,0,4,4"], "--mask -1,0,4,4: the box must lie inside"),
    (["inpaint", "--mask", "4,4,4,8"], "--mask 4,4,4,8: the box must lie inside"),
    (["inpaint", "--steps", "0"], "--steps must be at least 1, got 0"),
    (["inpaint", "-n", "0"], "-n must be between 1 and 1000, got 0"),
    (["evaluate", "--samples", "0"], "--samples must be at least 1, got 0"),
    (["evaluate", "--limit", "0"], "--limit must be at least 1, got 0"),
    (["evaluate", "--seed", "-5"], "--seed must be between 0 and 4294967295, got -5"),
]


@pytest.mark.parametrize(("arguments", "words"), BAD, ids=[" ".join(arguments) for arguments, _ in BAD])
def test_commands_with_bad_arguments_fail_in_one_line(trained_run, tmp_path, capsys, arguments, words):
    (tmp_path / "file").write_text("text")
    (tmp_path / "folder.png").mkdir()
    np.savez(tmp_path / "large.npz", x_train=np.zeros((4, 9, 7), np.uint8))
    np.savez(tmp_path / "colour.npz", x_train=np.zeros((4, 8, 8, 3), np.uint8))
    command, *options = arguments
    before = {path: path.stat().st_mtime_ns for path in trained_run.rglob("*")}
    num_files = len(os.listdir(tmp_path))
    line = command_error(capsys, command, trained_run, *(option.format(tmp=tmp_path) for option in options))
    assert words.format(run=trained_run) in line
    assert {path: path.stat().st_mtime_ns for path in trained_run.rglob("*")} == before
    assert len(os.listdir(tmp_path)) == num_files


COMMANDS = ("sample", "reconstruct", "interpolate", "traverse", "inpaint", "evaluate")


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_without_a_run_fail(tmp_path, capsys, command):
    assert f"{tmp_path / 'none'}: no such run directory" in command_error(capsys, command, tmp_path / "none")
    assert "not a run directory" in command_error(capsys, command, tmp_path)
    assert "RUN" in command_error(capsys, command)
    assert os.listdir(tmp_path) == []


def test_evaluate_with_checkpoint_of_other_likelihood_fails(run, capsys):
    config = run / "config.toml"
    config.write_text(config.read_text().replace('likelihood = "bernoulli"', 'likelihood = "gaussian"'))
    line = command_error(capsys, "evaluate", run)
    assert "this checkpoint belongs to another model: `elbo.likelihood.logvar` is missing" in line


def test_evaluate_without_writable_file_fails(run, capsys):
    (run / "evaluation.json").mkdir()
    assert "evaluation.json: cannot be written: it is a folder" in command_error(capsys, "evaluate", run)


def test_interrupted_commands_exit_with_130_and_write_nothing(run, capsys, monkeypatch):
    def stop(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    for command, module, name in (
        ("evaluate", bounds, "estimate_bounds"),
        ("inpaint", pictures, "save_grid"),
    ):
        monkeypatch.setattr(module, name, stop)
        capsys.readouterr()
        assert cli.main([command, str(run)]) == 130
        assert capsys.readouterr().err == "fastvae: interrupted\n"
    assert not (run / "evaluation.json").exists()
    assert not (run / "inpainting.png").exists()


def test_interrupt_during_import_exits_with_130(capsys, monkeypatch):
    def stop() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "app", stop)
    assert cli.main(["sample", "run"]) == 130
    assert capsys.readouterr().err == "fastvae: interrupted\n"


def test_version_is_printed(capsys):
    assert run_command(capsys, "--version") == f"fastvae {fastvae.__version__}\n"
    assert "--version" in run_command(capsys, "--help")


def test_help_of_each_command_names_run_and_checkpoint(capsys):
    for command in COMMANDS:
        text = run_command(capsys, command, "--help")
        assert "RUN" in text
        assert "--checkpoint" in text
