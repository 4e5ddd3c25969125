"""Errors of `fastvae train` and `fastvae resume`: one line, exit code 2, and no file is lost."""

import math
import os
import pickle

import numpy as np
import pytest
import torch
from run_files import error_line, run_python, save_picture, train

import fastvae
from fastvae import cli
from fastvae.train import checkpoints, image
from fastvae.train.errors import InputError

pytestmark = pytest.mark.usefixtures("one_thread", "no_pictures")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--lr", "0"), "--lr must be above 0, got 0"),
        (("--lr", "nan"), "--lr must be above 0 and finite, got nan"),
        (("--lr", "inf"), "--lr must be above 0 and finite, got inf"),
        (("--hidden", "10000000000000"), "cannot build this model: "),
        (("--lr", "fast"), "--lr"),
        (("--ema", "1"), "--ema must be at least 0 and below 1"),
        (("--batch-size", "0"), "--batch-size must be at least 1"),
        (("--warmup", "cosine"), "--warmup must be one of none, linear, cyclical, sigmoid, got 'cosine'"),
        (
            ("--likelihood", "gaussian", "--binarize", "dynamic"),
            "--binarize only applies to --likelihood bernoulli",
        ),
        (
            ("--size", "16"),
            "--size only applies to folders and datasets; the images of digits keep their size",
        ),
        (
            ("--cycles", "2", "--warmup", "linear"),
            "--cycles only applies to --warmup cyclical",
        ),
        (
            ("--warmup-epochs", "2"),
            "--warmup-epochs only applies to --warmup linear, cyclical or sigmoid",
        ),
        (("--data", "/no/such.npz"), "/no/such.npz: no such file"),
        (("--data", "./none"), "./none: no such file or folder"),
        (("--data", __file__), "neither an .npz file nor a folder of images"),
        (("--accelerator", "abacus"), "Lightning does not accept --accelerator abacus"),
        (("--strategy", "ddq"), "Lightning does not accept --accelerator cpu --strategy ddq"),
        (("--precision", "7"), "Lightning does not accept --accelerator cpu --precision 7"),
        (
            ("--precision", "16-true"),
            "--precision 16-true: Adam's squared gradients overflow or underflow in float16",
        ),
        (("--devices", "200"), "--devices 200"),
        (("--colour", "red"), "No such option"),
    ],
)
def test_train_with_bad_options_fails_in_one_line(tmp_path, capsys, options, message):
    chosen = ("--accelerator", "cpu") if "--accelerator" not in options else ()
    assert cli.main(["train", "mlp", "--out", str(tmp_path / "run"), *chosen, *options]) == 2
    assert message in error_line(capsys)
    assert not (tmp_path / "run").exists()


def test_train_on_folder_without_images_fails(tmp_path, capsys):
    (tmp_path / "words").mkdir()
    (tmp_path / "words" / "a.txt").write_text("text")
    assert train(tmp_path / "run", "--data", str(tmp_path / "words")) == 2
    assert "this folder contains no images" in error_line(capsys)
    (tmp_path / "words" / "a.png").write_text("text")
    assert train(tmp_path / "run", "--data", str(tmp_path / "words")) == 2
    assert "none of the images can be read: a.png (not an image)" in error_line(capsys)
    save_picture(tmp_path / "words" / "b.png", (8, 8))
    assert train(tmp_path / "run", "--data", str(tmp_path / "words")) == 2
    assert "one image is not enough" in error_line(capsys)
    assert not (tmp_path / "run").exists()


def test_train_conv_on_tiny_images_fails(tmp_path, capsys):
    np.savez(tmp_path / "small.npz", x_train=np.zeros((9, 8, 7), dtype=np.uint8))
    assert train(tmp_path / "run", "--data", str(tmp_path / "small.npz"), recipe="conv") == 2
    assert "at least 8 x 8 pixels, got 8 x 7; mlp takes any size" in error_line(capsys)


@pytest.fixture(scope="module")
def trained_run(tmp_path_factory):
    out = tmp_path_factory.mktemp("finished") / "run"
    assert train(out, "--epochs", "1") == 0
    return out


@pytest.fixture
def run(trained_run, tmp_path):
    """A copy of the run, which a test may damage."""
    import shutil

    return shutil.copytree(trained_run, tmp_path / "run")


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ("hidden", "hiden", "unknown setting `hiden`; did you mean `hidden`?"),
        ("hidden", "colour", "unknown setting `colour`; the settings are data, latent"),
        ("lr = 0.001", 'lr = "x"', "`lr` must be a number, got 'x'"),
        ("epochs = 1", "epochs = 1.5", "`epochs` must be a whole number, got 1.5"),
        ("clip = 0.0", "clip = -1", "`clip` must be at least 0, got -1"),
        ('logger = "csv"', 'logger = "paper"', "`logger` must be one of csv, tensorboard, got 'paper'"),
        (
            'recipe = "mlp"',
            'recipe = "unet"',
            "`recipe` must be one of mlp, conv, conv-lstm, resnet, photos, vae-gan, text, counts, got 'unet'",
        ),
        ("shape = [8, 8, 1]", "shape = [8, 8]", "`shape` must be [height, width, channels], got [8, 8]"),
        ("recipe", "= recipe", "not valid TOML"),
        (
            "hidden = 32",
            "hidden = 30",
            "`encoder.1.weight` must be (30, 64) for this config.toml, got (32, 64)",
        ),
        ("[8, 8, 1]", "[9, 8, 1]", "the images must be 9 x 8 as in"),
        ('data = "digits"', 'data = "/gone.npz"', "/gone.npz: no such file"),
    ],
)
def test_resume_with_wrong_config_fails(run, capsys, before, after, message):
    config = run / "config.toml"
    assert before in config.read_text()
    config.write_text(config.read_text().replace(before, after, 1))
    assert cli.main(["resume", str(run), "--epochs", "2"]) == 2
    assert message in error_line(capsys)


@pytest.mark.parametrize("recipe", ["mlp", "gaussian"])
def test_run_of_version_0_1_is_refused_in_one_line(run, tmp_path, capsys, recipe):
    config = run / "config.toml"
    text = config.read_text().replace("format = 2\n", "").replace('recipe = "mlp"', f'recipe = "{recipe}"')
    config.write_text(text.replace(f'fastvae = "{fastvae.__version__}"', 'fastvae = "0.1.0"'))
    message = (
        "fastvae 0.1.0 wrote this run in format 1, but this version reads format 2; train the run again, or"
    )
    for command in (
        ["resume", str(run), "--epochs", "2"],
        ["sample", str(run)],
        ["evaluate", str(run)],
        ["train", "mlp", "--out", str(tmp_path / "other"), "--init-from", str(run)],
    ):
        assert cli.main(command) == 2
        assert error_line(capsys).startswith(f"fastvae: {config}: {message}")
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("name", ["accelerator", "strategy"])
def test_resume_with_bad_lightning_option_names_config_file(run, capsys, name):
    config = run / "config.toml"
    before = {"accelerator": '"cpu"', "strategy": '"auto"'}[name]
    config.write_text(config.read_text().replace(f"{name} = {before}", f'{name} = "abacus"'))
    assert cli.main(["resume", str(run), "--epochs", "2"]) == 2
    error = error_line(capsys)
    assert f"Lightning does not accept {config}: " in error
    assert f"{name} abacus" in error
    assert "--" not in error


def test_resume_with_foreign_or_damaged_checkpoint_fails(run, capsys):
    file = run / "checkpoints" / "last.ckpt"
    original = file.read_bytes()

    def refused() -> str:
        capsys.readouterr()
        assert cli.main(["resume", str(run), "--epochs", "2"]) == 2
        with pytest.raises(InputError):
            image.load(run, checkpoint="last")
        return error_line(capsys)

    for content in (b"text", original[: len(original) // 2], b""):
        file.write_bytes(content)
        assert "not a fastvae checkpoint, or damaged" in refused()
    torch.save({"weights": torch.zeros(2)}, file)
    assert "not a fastvae checkpoint" in refused()
    file.write_bytes(original)
    saved = torch.load(file, weights_only=True)
    saved["state_dict"]["other.weight"] = torch.zeros(2)
    torch.save(saved, file)
    assert "`other.weight` is not expected" in refused()
    del saved["state_dict"]["other.weight"]
    saved["state_dict"]["decoder.0.bias"][0] = math.nan
    torch.save(saved, file)
    assert "`decoder.0.bias` contains NaN or infinity" in refused()
    del saved["state_dict"]["decoder.0.bias"]
    torch.save(saved, file)
    assert "`decoder.0.bias` is missing" in refused()
    file.unlink()
    with pytest.raises(InputError, match=r"checkpoints/last.ckpt does not exist yet"):
        image.load(run, checkpoint="last")


def test_resume_runs_no_code_of_a_checkpoint(run):
    """Neither our checks nor Lightning run code that a foreign checkpoint contains."""

    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(run / "evil"),)

    torch.save(
        {"state_dict": {}, "epoch": 0, "loops": {}, "optimizer_states": Evil()},
        run / "checkpoints" / "last.ckpt",
    )
    assert cli.main(["resume", str(run), "--epochs", "2"]) == 2
    assert not (run / "evil").exists()


def test_lightning_runs_no_code_of_a_checkpoint(run, monkeypatch):
    """Lightning does not run it either if our checks are bypassed."""

    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(run / "evil"),)

    file = run / "checkpoints" / "last.ckpt"
    saved = torch.load(file, weights_only=True)
    torch.save({**saved, "optimizer_states": Evil()}, file)
    monkeypatch.setattr(checkpoints, "read_checkpoint", lambda file, model: saved)
    with pytest.raises(pickle.UnpicklingError, match=r"[Ww]eights.only"):
        cli.main(["resume", str(run), "--epochs", "2"])
    assert not (run / "evil").exists()


def test_resume_of_no_run_fails(tmp_path, capsys):
    assert cli.main(["resume", str(tmp_path / "none")]) == 2
    assert "no such run directory" in error_line(capsys)
    assert cli.main(["resume", str(tmp_path)]) == 2
    assert "not a run directory: config.toml is missing" in error_line(capsys)


def test_resume_with_moved_data_needs_the_data_option(tmp_path, capsys):
    x = np.random.default_rng(0).integers(0, 255, (40, 8, 9), dtype=np.uint8)
    np.savez(tmp_path / "old.npz", x_train=x)
    assert train(tmp_path / "run", "--data", str(tmp_path / "old.npz"), "--epochs", "1") == 0
    (tmp_path / "old.npz").rename(tmp_path / "new.npz")
    capsys.readouterr()
    assert cli.main(["resume", str(tmp_path / "run"), "--epochs", "2"]) == 2
    assert "--data" in error_line(capsys)
    assert (
        cli.main(["resume", str(tmp_path / "run"), "--epochs", "2", "--data", str(tmp_path / "new.npz")]) == 0
    )
    assert cli.main(["resume", str(tmp_path / "run"), "--epochs", "3"]) == 0


def test_train_help_imports_no_slow_packages_and_lists_options(capsys):
    result = run_python(
        "-c",
        "import sys; from fastvae import cli; code = cli.main(['train', 'mlp', '--help']);"
        "sys.exit(code or 'lightning' in sys.modules or 'matplotlib' in sys.modules)",
    )
    assert result.returncode == 0, result.stderr
    for option in ("--hidden", "--layers", "--latent", "--warmup", "--out"):
        assert option in result.stdout
    assert "--channels" not in result.stdout
