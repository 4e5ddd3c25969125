"""Image data: loading files, folders and datasets, and preparing images for the likelihood."""

import sys
import types

import numpy as np
import pytest
import torch
from PIL import Image
from run_files import error_line, save_picture, train

from fastvae import cli
from fastvae.train import image, kinds
from fastvae.train.image import data, loader
from fastvae.train.seeding import seeded_generator

pytestmark = pytest.mark.usefixtures("one_thread", "no_pictures")


def test_prepare_converts_images_for_each_likelihood():
    images = torch.arange(256, dtype=torch.uint8).repeat(2000, 1).view(2000, 16, 16, 1)
    threshold = loader.prepare(images, kinds.recipes()["mlp"](likelihood="bernoulli"))
    assert threshold.shape == (2000, 1, 16, 16)
    assert torch.equal(threshold[0].flatten(), (torch.arange(256) >= 128).float())

    dynamic = kinds.recipes()["mlp"](likelihood="bernoulli", binarize="dynamic")
    x = loader.prepare(images, dynamic, seeded_generator(1, 2))
    assert set(x.unique().tolist()) == {0.0, 1.0}
    assert (x.mean(0).flatten() - torch.arange(256) / 255).abs().max() < 5 * 0.5 / 2000**0.5
    assert x[:, 0, 0, 0].max() == 0
    assert x[:, 0, -1, -1].min() == 1
    assert torch.equal(x, loader.prepare(images, dynamic, seeded_generator(1, 2)))
    assert not torch.equal(x, loader.prepare(images, dynamic, seeded_generator(1, 3)))

    colour = torch.arange(2 * 4 * 5 * 3, dtype=torch.uint8).view(2, 4, 5, 3)
    x = loader.prepare(colour, kinds.recipes()["mlp"](likelihood="gaussian"))
    assert x.shape == (2, 3, 4, 5)
    assert x.is_contiguous()
    assert torch.equal((x * 256).floor().permute(0, 2, 3, 1), colour.float())

    x = loader.prepare(colour, kinds.recipes()["mlp"](likelihood="dmol"))
    assert x.is_contiguous()
    assert torch.equal(x.permute(0, 2, 3, 1), colour)


def test_load_folder_reads_images_and_labels_and_skips_bad_files(tmp_path, capsys):
    for i in range(6):
        save_picture(tmp_path / "cats" / f"{i}.png", (20, 12), i)
        save_picture(tmp_path / "dogs" / "more" / f"{i}.jpg", (12, 20), 200 + i)
    (tmp_path / "cats" / "6.png").write_text("no image")
    whole = (tmp_path / "cats" / "5.png").read_bytes()
    (tmp_path / "dogs" / "half.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "readme.txt").write_text("not meant as an image")
    images = data.load(str(tmp_path), size=8)
    assert images.train.shape == (10, 8, 8, 1)
    assert images.val.shape == (2, 8, 8, 1)
    for part, labels in ((images.train, images.train_labels), (images.val, images.val_labels)):
        assert torch.equal(labels, (part[:, 0, 0, 0] > 100).long())
    assert images.label_names == ("cats", "dogs")
    (note,) = images.notes
    assert note.startswith("2 of 14 images cannot be read and were skipped: ")
    assert "cats/6.png (not an image)" in note
    assert "dogs/half.png" in note
    # A run prints the note and continues.
    assert train(tmp_path / "run", "--data", str(tmp_path), "--size", "8", "--epochs", "1") == 0
    assert f"warning: {note}" in capsys.readouterr().out


def test_load_folder_follows_links_once(tmp_path):
    """Each folder is read once, even if links form a circle."""
    for i in range(3):
        save_picture(tmp_path / "elsewhere" / "cats" / f"{i}.png", (4, 4), i)
        save_picture(tmp_path / "pets" / "dogs" / f"{i}.png", (4, 4), 100 + i)
    (tmp_path / "pets" / "cats").symlink_to(tmp_path / "elsewhere" / "cats")
    (tmp_path / "pets" / "dogs" / "again").symlink_to(tmp_path / "pets")
    images = data.load(str(tmp_path / "pets"), validation_only=True)
    assert images.label_names == ("cats", "dogs")
    assert sorted(images.val[:, 0, 0, 0].tolist()) == [0, 1, 2, 100, 101, 102]


def test_load_folder_skips_images_that_are_too_large(tmp_path, monkeypatch, recwarn):
    """Above twice its limit Pillow refuses an image; below it only warns, and the image is used."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    save_picture(tmp_path / "bomb.png", (15, 15))
    for i in range(3):
        save_picture(tmp_path / f"large-{i}.png", (12, 12))
    images = data.load(str(tmp_path))
    assert len(images.train) + len(images.val) == 3
    (note,) = images.notes
    assert note.endswith("skipped: bomb.png (more than 200 pixels, which Pillow treats as an attack)")
    assert not recwarn.list


def test_load_npz_with_bad_labels_ignores_them(tmp_path):
    path = tmp_path / "IMAGES.NPZ"
    with path.open("wb") as file:
        np.savez(file, x_train=np.zeros((6, 4, 4), np.uint8), y_train=np.array([None] * 6))
    images = data.load(str(path))
    assert images.train_labels is None
    (note,) = images.notes
    assert note.startswith(f"the labels are ignored: {path}: `y_train` is stored as pickled Python objects")


def test_other_folder_is_resized_to_the_shape_of_the_run(tmp_path, capsys):
    for i in range(12):
        save_picture(tmp_path / "own" / f"{i}.png", (20, 12), 20 * i)
    assert train(tmp_path / "run", "--data", str(tmp_path / "own"), "--epochs", "1") == 0
    save_picture(tmp_path / "other" / "a.png", (90, 70), (250, 10, 10), "RGB")
    other_images = image.load(tmp_path / "run", data=str(tmp_path / "other")).images
    assert other_images.val.shape == (1, 12, 20, 1)
    save_picture(tmp_path / "other" / "b.png", (30, 30), 7)
    capsys.readouterr()
    for command in ("reconstruct", "evaluate"):
        assert cli.main([command, str(tmp_path / "run"), "--data", str(tmp_path / "other")]) == 0
        assert "2 validation images" in capsys.readouterr().out
    # Naming the run's own folder does not turn its training images into validation images.
    assert len(image.load(tmp_path / "run", data=str(tmp_path / "own")).images.val) == 2


@pytest.mark.usefixtures("with_pictures")
def test_load_folder_skips_run_folders(tmp_path, capsys):
    for i in range(12):
        save_picture(tmp_path / f"{i}.png", (20, 12), 20 * i)
    before = data.load(str(tmp_path))
    assert train(tmp_path, "--data", str(tmp_path)) == 2
    assert "this is the folder of --data" in error_line(capsys)
    assert train(tmp_path / "runs" / "first", "--data", str(tmp_path), "--epochs", "1") == 0
    after = data.load(str(tmp_path))
    assert torch.equal(before.train, after.train)
    assert after.train_labels is None


def test_load_folder_makes_transparency_white(tmp_path):
    for i in range(2):
        save_picture(tmp_path / "colour" / f"{i}.png", (9, 9), (10, 20, 30, 0), "RGBA")
        save_picture(tmp_path / "half" / f"{i}.png", (9, 9), (0, 0, 0, 127), "RGBA")
        save_picture(tmp_path / "grey" / f"{i}.png", (9, 9), (7, 0), "LA")
        save_picture(tmp_path / "palette" / f"{i}.gif", (9, 9), 3, "P", transparency=3)
    for name in ("colour", "grey", "palette"):
        assert data.load(str(tmp_path / name)).train.unique().tolist() == [255]
    assert data.load(str(tmp_path / "half")).train.unique().tolist() == [128]


def test_load_folder_skips_pixels_of_unknown_range(tmp_path):
    for i in range(3):
        save_picture(tmp_path / f"{i}.png", (9, 9), 3)
    save_picture(tmp_path / "float.tif", (9, 9), 0.5, "F")
    save_picture(tmp_path / "long.tif", (9, 9), 100_000, "I")
    (note,) = data.load(str(tmp_path)).notes
    assert (
        "float.tif (pixels of mode F, whose range is unknown), long.tif (pixels of mode I, whose range is unknown)"
        in note
    )


def test_load_folder_numbers_labels_of_readable_folders_only(tmp_path):
    for i in range(6):
        save_picture(tmp_path / "dogs" / f"{i}.png", (9, 9), 200)
        save_picture(tmp_path / "eels" / f"{i}.png", (9, 9), 10)
    (tmp_path / "cats").mkdir()
    (tmp_path / "cats" / "0.png").write_text("no image")
    images = data.load(str(tmp_path))
    assert images.label_names == ("dogs", "eels")
    assert torch.equal(images.train_labels, (images.train[:, 0, 0, 0] < 100).long())


def test_load_folder_chooses_size_and_colour(tmp_path):
    for i in range(3):
        save_picture(tmp_path / "same" / f"{i}.png", (30, 20), i)
        save_picture(tmp_path / "large" / f"{i}.png", (80, 80), i)
        save_picture(
            tmp_path / "mixed" / f"{i}.png", (30 + i, 20), (10, 20, 30) if i else 7, "RGB" if i else "L"
        )
        save_picture(tmp_path / "deep" / f"{i}.png", (9, 9), 40_000, "I;16")
    turned = Image.Exif()
    turned[0x0112] = 6
    for i in range(2):
        save_picture(tmp_path / "turned" / f"{i}.jpg", (30, 20), i, exif=turned)
        save_picture(tmp_path / "palette" / f"{i}.gif", (9, 9), 3, "P")

    def shape(name, **options):
        return tuple(data.load(str(tmp_path / name), **options).train.shape[1:])

    assert shape("same") == (20, 30, 1)
    assert shape("turned") == (30, 20, 1)
    assert shape("large") == (64, 64, 1)
    assert shape("mixed") == (64, 64, 3)
    assert shape("same", size=16) == (16, 16, 1)
    assert shape("palette") == (9, 9, 3)
    assert data.load(str(tmp_path / "deep")).train.unique().tolist() == [40_000 >> 8]
    assert data.load(str(tmp_path / "same")).train_labels is None


def fake_datasets(monkeypatch, splits, features) -> list[str]:
    """Install a fake module `datasets` whose images are encoded bytes."""
    fake = types.ModuleType("datasets")
    fake.Image = type("Image", (), {"__init__": lambda self, decode=True: setattr(self, "decode", decode)})
    fake.ClassLabel = type("ClassLabel", (), {"names": [f"kind {i}" for i in range(100)]})
    kinds = {"image": fake.Image, "label": fake.ClassLabel, "text": str}

    class Split:
        def __init__(self, columns, decode=True):
            self.columns, self.decode = columns, decode
            self.features = {name: kinds[kind]() for name, kind in features.items()}

        def cast_column(self, name, kind):
            assert features[name] == "image"
            return Split(self.columns, kind.decode)

        def __getitem__(self, name):
            assert features[name] != "image" or not self.decode
            return self.columns[name]

    requests = []

    def load_dataset(name):
        requests.append(name)
        return {name: Split(columns) for name, columns in splits.items()}

    fake.load_dataset = load_dataset
    monkeypatch.setitem(sys.modules, "datasets", fake)
    return requests


def png(value: int) -> dict[str, object]:
    import io

    file = io.BytesIO()
    Image.new("L", (10, 10), value).save(file, "PNG")
    return {"bytes": file.getvalue(), "path": None}


def test_load_reads_hugging_face_datasets(tmp_path, monkeypatch, capsys):
    train_split = {"img": [png(i) for i in range(8)] + [{"bytes": b"?", "path": None}], "y": [*range(8), 99]}
    test_split = {"img": [png(100), png(101)], "y": [5, 6]}
    features = {"y": "label", "img": "image"}
    requests = fake_datasets(monkeypatch, {"train": train_split, "test": test_split}, features)
    images = data.load("someone/pictures")
    assert requests == ["someone/pictures"]
    assert images.train.shape == (8, 10, 10, 1)
    assert torch.equal(images.train[:, 0, 0, 0].long(), images.train_labels)
    assert images.val[:, 0, 0, 0].tolist() == [100, 101]
    assert images.val_labels.tolist() == [5, 6]
    assert images.label_names[6] == "kind 6"
    assert images.notes == ("1 of 11 images cannot be read and were skipped: train[8] (not an image)",)

    fake_datasets(monkeypatch, {"train": train_split}, features)
    without_test = data.load("someone/pictures")
    assert (len(without_test.train), len(without_test.val)) == (7, 1)
    assert torch.equal(without_test.train[:, 0, 0, 0].long(), without_test.train_labels)
    assert train(tmp_path / "run", "--data", "someone/pictures", "--epochs", "1") == 0
    capsys.readouterr()

    gaps = {"img": [*map(png, range(8)), None, {"bytes": None, "path": None}], "y": [None, *range(1, 10)]}
    fake_datasets(monkeypatch, {"train": gaps, "test": test_split}, features)
    images = data.load("someone/pictures")
    assert images.notes == (
        "2 of 12 images cannot be read and were skipped: train[8] (no image), train[9] (no image)",
    )
    assert images.train_labels.tolist() == [-1, *range(1, 8)]

    fake_datasets(monkeypatch, {"train": {"t": ["words"]}}, {"t": "text"})
    assert train(tmp_path / "text", "--data", "someone/text") == 2
    assert "no column of images, only t" in error_line(capsys)
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert train(tmp_path / "none", "--data", "someone/text") == 2
    assert "pip install datasets" in error_line(capsys)


def test_val_batches_of_large_images_are_small():
    sizes = []
    for side in (8, 512, 4000):
        x = torch.zeros(1, side, side, 3, dtype=torch.uint8).expand(2001, -1, -1, -1)
        module = loader.ImageData(data.Images("large", x, x), kinds.recipes()["mlp"](likelihood="gaussian"))
        sizes.append(module.val_dataloader().size)
    assert sizes == [1000, 10, 1]


def test_val_batch_size_counts_decoder_outputs():
    """For dmol the decoder outputs ten numbers for each of 10 components of 64 x 64 pixels."""

    def size(likelihood, channels, **options):
        return loader.val_batch_size(
            kinds.recipes()["mlp"](likelihood=likelihood, **options), (64, 64, channels)
        )

    output_channels = {
        ("dmol", 3): 100,
        ("dmol", 1): 30,
        ("discretized-logistic", 3): 6,
        ("gaussian", 3): 3,
        ("bernoulli", 1): 1,
    }
    for (likelihood, channels), planes in output_channels.items():
        assert size(likelihood, channels) == min(1000, 2**23 // (planes * 64 * 64))
    assert size("gaussian", 3, variance="per-element") == size("discretized-logistic", 3)
