"""`fastvae demo`: its output, its pictures, and its errors."""

import os
import pickle
import re
import signal
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from run_files import command_error

import fastvae
from fastvae import cli
from fastvae.train.image import data, demo, pictures

PICTURES = ["reconstructions.png", "samples.png"]


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    measured = demo.time_alternately
    monkeypatch.setattr(demo, "time_alternately", lambda calls, seconds: measured(calls, 0.05))
    # Threads do not help such a small model, and slow it down while other tests are running.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def table(text: str, part: str) -> np.ndarray:
    """Return the numbers of one of the two tables."""
    lines = text.partition(part)[2].splitlines()
    rows = []
    for line in lines:
        if re.fullmatch(r"\s+\d+(\s+-?\d+\.\d+){6}", line):
            rows.append([float(word) for word in line.split()])
        elif rows:
            break
    return np.array(rows)


def images(n: int, *shape: int) -> np.ndarray:
    """Return images with bright squares on a dark background, so that there is something to learn."""
    rng = np.random.default_rng(0)
    x = rng.integers(0, 60, (n, *shape), dtype=np.uint8)
    x[::2, 1 : shape[0] // 2] += 180
    return x


# ---------------------------------------------------------------------------------------------------------------------
# The demo
# ---------------------------------------------------------------------------------------------------------------------


def test_demo_on_digits_prints_tables_and_saves_pictures(tmp_path, capsys):
    out = tmp_path / "runs" / "demo"
    assert cli.main(["demo", "--epochs", "3", "--out", str(out)]) == 0
    text, errors = capsys.readouterr()
    assert errors == ""

    capability = sys.modules["fastvae._C"].cpu_capability()
    first = text.splitlines()[0]
    assert first == (f"fastvae {fastvae.__version__} · backend native ({capability}, 1 thread)")
    assert all(len(line) < 120 for line in text.splitlines() if str(tmp_path) not in line)

    trained = table(text, "1. Trained")
    assert trained.shape == (3, 7)
    assert list(trained[:, 0]) == [1, 2, 3]
    for neg_elbo, recon, kl in (trained[:, 1:4].T, trained[:, 4:7].T):
        assert (np.diff(neg_elbo) < 0).all()
        np.testing.assert_allclose(neg_elbo, recon + kl, atol=0.011)
        assert (kl > 0).all()

    compared = table(text, "2. The same training")
    np.testing.assert_allclose(compared[:, [2, 5]], trained[:, [1, 4]], atol=1e-9)
    np.testing.assert_allclose(compared[:, [1, 4]], compared[:, [2, 5]], rtol=1e-3)
    for part in ("the loss part", "the whole training step"):
        assert re.search(rf"^{part}( \(\*\))?( +\d+ µs){{2}} +\d+\.\dx +\d+$", text, re.MULTILINE)

    assert sorted(os.listdir(out)) == PICTURES
    for name in PICTURES:
        with Image.open(out / name) as picture:
            picture.load()
            assert picture.mode == "L"
            assert min(picture.size) > 200
            assert picture.getextrema()[1] > 200  # the picture is not black


@pytest.mark.parametrize("shape", [(9, 7), (6, 8, 1), (8, 8, 3)])
@pytest.mark.parametrize("with_test", [False, True])
def test_demo_on_npz_file_trains_and_saves_pictures(tmp_path, capsys, shape, with_test):
    file = tmp_path / "images.npz"
    arrays = {"x_train": images(60, *shape), "y_train": np.zeros(60, np.uint8)}
    if with_test:
        arrays["x_test"] = images(7, *shape)
    np.savez(file, **arrays)
    out = tmp_path / "out"
    arguments = [
        "demo",
        "--data",
        str(file),
        "--out",
        str(out),
        "--epochs",
        "2",
        "--batch-size",
        "16",
        "--seed",
        "3",
    ]
    assert cli.main(arguments) == 0
    text, errors = capsys.readouterr()
    assert errors == ""
    size = " x ".join(map(str, shape if shape[2:] == (3,) else shape[:2]))
    counts = (
        "60 training images, 7 validation images" if with_test else "50 training images, 10 validation images"
    )
    assert f"images.npz, {size}, {counts}" in text
    assert (np.diff(table(text, "1. Trained")[:, [1, 4]], axis=0) < 0).all()
    assert sorted(os.listdir(out)) == PICTURES
    with Image.open(out / "samples.png") as picture:
        assert picture.mode == ("RGB" if shape[2:] == (3,) else "L")


def test_demo_on_two_images_works(tmp_path):
    file = tmp_path / "two.npz"
    np.savez(file, x_train=images(2, 4, 4))
    assert cli.main(["demo", "--data", str(file), "--out", str(tmp_path / "out"), "--epochs", "1"]) == 0
    assert sorted(os.listdir(tmp_path / "out")) == PICTURES


def test_train_with_same_seed_gives_same_losses():
    images_loaded = data.load_digits(0)
    runs = []
    for seed in (5, 5, 6):
        torch.manual_seed(seed)
        settings = demo.Settings(seed=seed)
        runs.append(list(demo.train(demo.VAE(64), fastvae.ELBO("bernoulli"), images_loaded, settings, 1)))
    assert runs[0] == runs[1]
    assert runs[0] != runs[2]


def test_hand_written_loss_equals_elbo():
    torch.manual_seed(0)
    mu, logvar, logits = torch.randn(5, 3), torch.randn(5, 3), torch.randn(5, 8)
    x, seed = torch.rand(5, 8).round(), torch.tensor([1, 8])
    ours, theirs = fastvae.ELBO("bernoulli"), demo.HandWritten()
    z, kl = ours.reparameterize(mu, logvar, seed=seed)
    z_by_hand, kl_by_hand = theirs.reparameterize(mu, logvar, seed=seed)
    torch.testing.assert_close(z, z_by_hand)
    torch.testing.assert_close(ours(logits, x, kl=kl).loss, theirs(logits, x, kl=kl_by_hand).loss)


def test_demo_on_reference_backend_says_so(tmp_path, capsys):
    file = tmp_path / "images.npz"
    np.savez(file, x_train=images(20, 4, 4))
    with fastvae.use_backend("reference"):
        assert cli.main(["demo", "--data", str(file), "--out", str(tmp_path / "out"), "--epochs", "1"]) == 0
    assert "backend reference (" in capsys.readouterr().out.splitlines()[0]


# ---------------------------------------------------------------------------------------------------------------------
# Errors: one line, exit code 2, and no files
# ---------------------------------------------------------------------------------------------------------------------


def _raw(content: bytes):
    return lambda path: path.write_bytes(content)


def _saved(**arrays: np.ndarray):
    def make(path: Path) -> None:
        with path.open("wb") as file:
            np.savez(file, **arrays)

    return make


def _single(path: Path) -> None:
    with path.open("wb") as file:
        np.save(file, images(4, 4, 4))


def _pickled(path: Path) -> None:
    path.write_bytes(pickle.dumps({"x_train": images(4, 4, 4)}))


def _other_zip(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("x_train", "no array")


def _damaged(path: Path) -> None:
    with path.open("wb") as file:
        np.savez_compressed(file, x_train=images(50, 20, 20))
    content = bytearray(path.read_bytes())
    content[200:1200] = bytes(1000)
    path.write_bytes(content)


def _truncated(path: Path) -> None:
    _saved(x_train=images(50, 20, 20))(path)
    path.write_bytes(path.read_bytes()[:5000])


good = images(10, 4, 4)
FILES = {
    "missing": (lambda path: None, "no such file"),
    "a folder": (Path.mkdir, "cannot be read: is a directory"),
    "empty": (_raw(b""), "not an .npz file: it is empty"),
    "text": (_raw(b"hello, world\n" * 20), "not an .npz file: it begins with b'hello, world"),
    "a single array": (_single, "a single array"),
    "a pickle": (_pickled, "not an .npz file: it begins with"),
    "another zip": (_other_zip, "`x_train` is not an array"),
    "damaged": (_damaged, "`x_train` cannot be read: "),
    "truncated": (_truncated, "the file was cut short; copy or download it again"),
    "no x_train": (
        _saved(images=good),
        "the array `x_train` is missing, found only images; save images with",
    ),
    "objects": (
        _saved(x_train=np.array([[[{}]]], dtype=object)),
        "`x_train` is stored as pickled Python objects",
    ),
    "floats": (
        _saved(x_train=good / 255),
        "must be uint8, 0 to 255, got float64; if they lie between 0 and 1, store (255 * x",
    ),
    "rank 2": (_saved(x_train=good[0]), "must be (N, H, W) or (N, H, W, C), got shape (4, 4)"),
    "rank 5": (_saved(x_train=good[None, None]), "must be (N, H, W) or (N, H, W, C)"),
    "channels first": (
        _saved(x_train=np.zeros((5, 2, 8, 8), np.uint8)),
        "1 or 3 channels in the last dimension",
    ),
    "planes first": (_saved(x_train=np.zeros((5, 3, 8, 8), np.uint8)), "store x_train.transpose(0, 2, 3, 1)"),
    "no images": (_saved(x_train=good[:0]), "is empty"),
    "no pixels": (_saved(x_train=good[:, :0]), "is empty"),
    "one image": (_saved(x_train=good[:1]), "one image is not enough"),
    "another x_test": (
        _saved(x_train=good, x_test=good[:, :3]),
        "`x_test` must have images of the same size",
    ),
    "empty x_test": (_saved(x_train=good, x_test=good[:0]), "`x_test` is empty"),
}


@pytest.mark.parametrize("kind", FILES)
def test_demo_with_bad_file_fails_in_one_line(tmp_path, capsys, kind):
    make, words = FILES[kind]
    file, out = tmp_path / "file.npz", tmp_path / "out"
    make(file)
    line = command_error(capsys, "demo", "--data", str(file), "--out", str(out), "--epochs", "1")
    assert str(file) in line
    assert words in line
    assert not out.exists()


@pytest.mark.parametrize("below", [False, True])
def test_demo_with_file_as_out_fails_before_training(tmp_path, capsys, monkeypatch, below):
    monkeypatch.setattr(demo, "train", None)  # the error must come before any training
    file = tmp_path / "file"
    file.write_text("kept")
    out = file / "below" if below else file
    line = command_error(capsys, "demo", "--out", str(out))
    assert line == f"fastvae: {out}: cannot be written to: {'not a directory' if below else 'it is a file'}\n"
    assert os.listdir(tmp_path) == ["file"]
    assert file.read_text() == "kept"


def test_demo_with_folder_in_place_of_picture_fails(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(demo, "train", None)
    (tmp_path / "samples.png").mkdir()
    assert "samples.png: cannot be written: it is a folder" in command_error(
        capsys, "demo", "--out", str(tmp_path)
    )
    assert os.listdir(tmp_path) == ["samples.png"]


def test_failed_picture_write_keeps_the_old_file(tmp_path, monkeypatch):
    picture = tmp_path / "samples.png"
    picture.write_text("old")

    def full(self: Path, target: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(data.InputError, match="no space left on device"):
        pictures.save_grid([torch.rand(2, 4, 4, 1)], picture)
    assert os.listdir(tmp_path) == ["samples.png"]
    assert picture.read_text() == "old"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--epochs", "0"], "--epochs must be at least 1, got 0"),
        (["--epochs", "-3"], "--epochs must be at least 1, got -3"),
        (["--batch-size", "0"], "--batch-size must be at least 1, got 0"),
        (["--seed", "-1"], "--seed must be between 0 and 4294967295, got -1"),
        (["--seed", str(2**32)], "--seed must be between"),
        (["--epochs", "many"], "'--epochs'"),
        (["--colour"], "--colour"),
        (["extra"], "extra"),
    ],
)
def test_demo_with_bad_arguments_fails_in_one_line(tmp_path, capsys, arguments, words):
    assert words in command_error(capsys, "demo", "--out", str(tmp_path / "out"), *arguments)
    assert os.listdir(tmp_path) == []


def test_unknown_command_fails(capsys):
    assert "trane" in command_error(capsys, "trane")


def test_missing_package_is_named_with_its_install_command(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    line = command_error(capsys, "demo", "--out", str(tmp_path / "out"))
    assert line == 'fastvae: sklearn is not installed; install it with: pip install "fastvae-elbo[train]"\n'
    monkeypatch.setitem(sys.modules, "typer", None)
    assert "typer is not installed" in command_error(capsys, "demo")
    assert cli.main(["doctor"]) == 0  # it must also work if packages are missing
    assert os.listdir(tmp_path) == []


def test_interrupted_demo_exits_with_130(tmp_path):
    """Sends a real Ctrl-C to a process that is training."""
    command = [sys.executable, "-m", "fastvae", "demo", "--epochs", "10000", "--out", str(tmp_path / "out")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        # A shell starts background jobs with SIGINT ignored, and this process would inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert process.stdout is not None
    for line in process.stdout:
        if re.match(r"\s+2 ", line):
            break
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 130
    assert errors == "fastvae: interrupted\n"
    assert os.listdir(tmp_path / "out") == []


# ---------------------------------------------------------------------------------------------------------------------
# Help
# ---------------------------------------------------------------------------------------------------------------------


def test_help_of_main_commands_is_printed(capsys):
    for arguments in ([], ["--help"], ["demo", "--help"], ["doctor", "--help"]):
        assert cli.main(arguments) == 0
    assert "--batch-size" in capsys.readouterr().out
