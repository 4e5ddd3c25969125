"""Loading images: scikit-learn's digits, an .npz file, a folder of images, or a Hugging Face dataset."""

import io
import os
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastvae.train import hub
from fastvae.train.errors import InputError
from fastvae.train.npz import NpzFile

__all__ = [
    "Images",
    "Shape",
    "format_size",
    "load",
    "load_digits",
    "load_folder",
    "load_hugging_face",
    "load_npz",
    "shape_of",
]

DEFAULT_SIDE = 64  # pixels, for images that are large or have different sizes

Shape = tuple[int, int, int]
"""The shape of an image: H, W, C."""


class Images(NamedTuple):
    """Images as uint8 (N, H, W, C) from 0 to 255, where C is 1 or 3."""

    name: str
    train: Tensor
    val: Tensor
    train_labels: Tensor | None = None
    """(N,) int64, if the data have labels."""
    val_labels: Tensor | None = None
    notes: tuple[str, ...] = ()
    """Messages for the user about what was skipped."""
    label_names: tuple[str, ...] = ()
    """The names of the labels 0, 1, ..., if they have names."""
    val_rows: Tensor | None = None
    """If the validation images were drawn from all images, where they are among them, (N,) int64."""
    test: Tensor | None = None
    """Images that are neither for training nor for validation."""


def shape_of(images: Images) -> Shape:
    height, width, channels = images.train.shape[1:]
    return height, width, channels


def format_size(shape: tuple[int, ...]) -> str:
    """Return "H x W", or "H x W x C" if C is not 1."""
    return " x ".join(str(n) for n in (shape if shape[2] > 1 else shape[:2]))


def load(
    spec: str,
    *,
    seed: int = 0,
    size: int = 0,
    shape: Shape | None = None,
    validation_only: bool = False,
    val: int = 0,
) -> Images:
    """Load the images of `--data`: "digits", an .npz file, a folder, or the name of a Hugging Face dataset.

    `size` applies to folders and datasets: it is the side length that images are cropped and resized to. 0 keeps images
    that all have the same size of at most 64 pixels, and resizes others to 64 x 64. `shape` (H, W, C) overrides it.
    With `validation_only`, all images of a folder are validation images. With `val`, the last so many training images
    are validation images, and what was for validation is for a test.

    Raises InputError for data that cannot be read or contain no images, and if `val` leaves none to train on.
    """
    images = _load(spec, seed, size, shape, validation_only)
    if not val:
        return images
    if val >= len(images.train):
        raise InputError(
            f"--val must be less than the {len(images.train)} training images of {spec}, got {val}"
        )
    labels = images.train_labels
    return images._replace(
        train=images.train[:-val],
        val=images.train[-val:],
        train_labels=None if labels is None else labels[:-val],
        val_labels=None if labels is None else labels[-val:],
        val_rows=None,
        test=images.val,
    )


def _load(spec: str, seed: int, size: int, shape: Shape | None, validation_only: bool) -> Images:
    if spec == "digits":
        return load_digits(seed)
    path = Path(spec).expanduser()
    if path.is_dir():
        return load_folder(path, seed, size, shape, validation_only)
    if path.suffix.lower() == ".npz":
        return load_npz(path, seed)
    if path.exists():
        raise InputError(f"{spec}: neither an .npz file nor a folder of images")
    if re.fullmatch(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?", spec):
        return load_hugging_face(spec, seed, size, shape)
    raise InputError(f"{spec}: no such file or folder")


def load_digits(seed: int) -> Images:
    """Load the 1797 handwritten digits of 8 x 8 pixels from scikit-learn. A sixth of them is for validation."""
    from sklearn.datasets import load_digits as sklearn_digits

    bunch = sklearn_digits()
    # The digits have 17 grey levels, 0 to 16.
    grey = torch.from_numpy(np.round(bunch.images * (255 / 16)).astype(np.uint8))
    return _split("scikit-learn's digits", grey.unsqueeze(-1), seed, torch.from_numpy(bunch.target).long())


def load_npz(path: Path, seed: int) -> Images:
    """Load a file in Keras' layout: `x_train` and optionally `x_test`, uint8 (N, H, W) or (N, H, W, C), and optionally
    the labels `y_train` and `y_test`, integers (N,).

    Without `x_test`, a sixth of the images, drawn by `seed`, is for validation. Nothing is unpickled.

    Raises InputError if the file cannot be read or contains something else.
    """
    with NpzFile(path) as arrays:
        if "x_train" not in arrays:
            raise InputError(
                f"{path}: the array `x_train` is missing, found only {arrays.contents()}; save images with "
                "np.savez(path, x_train=images), uint8 (N, H, W) or (N, H, W, C)"
            )
        train = _check_images(path, "x_train", arrays.read("x_train"))
        val = _check_images(path, "x_test", arrays.read("x_test")) if "x_test" in arrays else None
        notes: list[str] = []
        train_labels = _check_labels(arrays, "y_train", len(train), notes)
        val_labels = None if val is None else _check_labels(arrays, "y_test", len(val), notes)
    if val is None:
        if len(train) < 2:
            raise InputError(
                f"{path}: one image is not enough: training and validation need one each; add images or `x_test`"
            )
        return _split(path.name, train, seed, train_labels, tuple(notes))
    if val.shape[1:] != train.shape[1:]:
        raise InputError(
            f"{path}: `x_test` must have images of the same size as `x_train`, {tuple(train.shape[1:])}, "
            f"got {tuple(val.shape[1:])}"
        )
    return Images(path.name, train, val, train_labels, val_labels, tuple(notes))


def _check_images(path: Path, name: str, array: Any) -> Tensor:
    if array.dtype != np.uint8:
        how = (
            f"if they lie between 0 and 1, store (255 * {name}).round().astype(np.uint8)"
            if array.dtype.kind == "f"
            else f"if they lie between 0 and 255, store {name}.astype(np.uint8)"
        )
        raise InputError(f"{path}: `{name}` must be uint8, 0 to 255, got {array.dtype}; {how}")
    if array.ndim not in (3, 4):
        raise InputError(f"{path}: `{name}` must be (N, H, W) or (N, H, W, C), got shape {array.shape}")
    if array.ndim == 4 and array.shape[3] not in (1, 3):
        first = array.shape[1] in (1, 3)
        hint = f"; store {name}.transpose(0, 2, 3, 1)" if first else ""
        raise InputError(
            f"{path}: `{name}` must have 1 or 3 channels in the last dimension, got shape {array.shape}{hint}"
        )
    if array.size == 0:
        raise InputError(f"{path}: `{name}` is empty, got shape {array.shape}")
    images = torch.from_numpy(np.ascontiguousarray(array))
    return images if images.dim() == 4 else images.unsqueeze(-1)


def _check_labels(arrays: NpzFile, name: str, n: int, notes: list[str]) -> Tensor | None:
    """Return the labels, or None with a note if they are unusable: they only colour a picture."""
    if name not in arrays:
        return None
    try:
        array = arrays.read(name)
    except InputError as error:
        notes.append(f"the labels are ignored: {error}")
        return None
    if array.dtype.kind not in "iu" or array.size != n:
        notes.append(
            f"the labels are ignored: `{name}` must have one integer for each of the {n} images, got {array.dtype} "
            f"of shape {array.shape}"
        )
        return None
    return torch.from_numpy(array.reshape(n).astype(np.int64))


# ---------------------------------------------------------------------------------------------------------------------
# Image files
# ---------------------------------------------------------------------------------------------------------------------


def load_folder(
    path: Path,
    seed: int,
    size: int = 0,
    shape: Shape | None = None,
    validation_only: bool = False,
) -> Images:
    """Load all images in a folder and its subfolders. A sixth of them, drawn by `seed`, is for validation.

    Folders of runs are skipped, because they contain pictures. If there are several subfolders, they are the labels.
    Files that cannot be read as images are skipped and listed in `notes`. The images are grey if all of them are, and
    RGB otherwise. EXIF rotations are applied.

    Raises InputError if fewer than two images are left, or none with `validation_only`.
    """
    from PIL import Image

    suffixes = Image.registered_extensions()
    try:
        below = list(_walk_files(path))
        runs = {
            file.parent
            for file in below
            if file.name == "config.toml" and (file.parent / "checkpoints").is_dir()
        }
        files = sorted(
            file
            for file in below
            if runs.isdisjoint(file.parents)
            and file.suffix.lower() in suffixes
            and not any(part.startswith(".") for part in file.relative_to(path).parts)
            and file.is_file()
        )
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from error
    if not files:
        raise InputError(f"{path}: this folder contains no images (*.png, *.jpg, ...)")
    parents = [file.relative_to(path).parts[0] if file.parent != path else "." for file in files]
    images, indices, notes = _decode(
        str(path), files, [str(file.relative_to(path)) for file in files], size, shape, validation_only
    )
    parents = [parents[index] for index in indices.tolist()]
    names = sorted(set(parents))
    labels = torch.tensor([names.index(parent) for parent in parents]) if len(names) > 1 else None
    if validation_only:
        return Images(path.name, images[:0], images, None, labels, notes, tuple(names))
    return _split(path.name, images, seed, labels, notes)._replace(label_names=tuple(names))


def _walk_files(top: Path) -> Iterator[Path]:
    """Yield all files below a folder. Links are followed, but no folder is entered twice."""
    visited = set()
    for folder, folders, names in os.walk(top, followlinks=True, onerror=_raise):
        folders.sort()
        where = os.path.realpath(folder)
        if where in visited:
            folders.clear()
            continue
        visited.add(where)
        yield from (Path(folder, name) for name in names)


def _raise(error: OSError) -> None:
    raise error


def load_hugging_face(name: str, seed: int, size: int = 0, shape: Shape | None = None) -> Images:
    """Load a dataset of the Hugging Face hub: its first image column, and its first column of class labels, if any.

    The split `train` is used for training and `test` or `validation` for validation. If there is neither, a sixth of
    `train` is used for validation.

    Raises InputError if the package `datasets` is missing, or if the dataset cannot be loaded or has no images.
    """
    splits = hub.load_splits(name)
    import datasets

    train = splits["train"]
    column = next((key for key, kind in train.features.items() if isinstance(kind, datasets.Image)), None)
    if column is None:
        raise InputError(f"{name}: this dataset has no column of images, only {', '.join(train.features)}")
    label = next((key for key, kind in train.features.items() if isinstance(kind, datasets.ClassLabel)), None)

    label_names = tuple(getattr(train.features[label], "names", ()) if label is not None else ())

    def read_split(split: Any) -> tuple[list[IO[bytes] | str | None], Tensor | None]:
        # Decoding in `datasets` would stop at the first damaged image.
        raw = split.cast_column(column, datasets.Image(decode=False))[column]
        sources = [
            io.BytesIO(item["bytes"]) if item and item["bytes"] is not None else item and item["path"]
            for item in raw
        ]
        if label is None:
            return sources, None
        return sources, torch.tensor([-1 if kind is None else kind for kind in split[label]])

    other = next((key for key in ("test", "validation") if key in splits), None)
    sources, labels = read_split(train)
    first = len(sources)
    names = [f"train[{i}]" for i in range(first)]
    if other is not None:
        more, more_labels = read_split(splits[other])
        sources += more
        names += [f"{other}[{i}]" for i in range(len(more))]
        labels = torch.cat([labels, more_labels]) if labels is not None and more_labels is not None else None
    images, indices, notes = _decode(name, sources, names, size, shape)
    if labels is not None:
        labels = labels[indices]
    if other is None:
        return _split(name, images, seed, labels, notes)._replace(label_names=label_names)
    is_train = indices < first
    for split, exists in (("train", is_train.any()), (other, (~is_train).any())):
        if not exists:
            raise InputError(f"{name}: the split `{split}` has no image that can be read")
    return Images(
        name,
        images[is_train],
        images[~is_train],
        None if labels is None else labels[is_train],
        None if labels is None else labels[~is_train],
        notes,
        label_names,
    )


class _Header(NamedTuple):
    width: int
    height: int
    grey: bool


def _decode(
    where: str,
    sources: Sequence[Any],
    names: Sequence[str],
    size: int,
    shape: Shape | None = None,
    validation_only: bool = False,
) -> tuple[Tensor, Tensor, tuple[str, ...]]:
    """Return the images (N, H, W, C), their indices in `sources` (N,), and notes on what was skipped."""
    from PIL import Image

    unreadable: dict[int, str] = {}

    def decode_all(function: Callable[[Any], Any], indices: Sequence[int]) -> dict[int, Any]:
        def attempt(index: int) -> Any:
            try:
                return function(sources[index])
            except Exception as error:  # Pillow raises many types for damaged files
                unreadable[index] = _why_unreadable(error)
                return None

        # Pillow releases the interpreter's lock while it decodes.
        with warnings.catch_warnings(), ThreadPoolExecutor(max_workers=torch.get_num_threads()) as pool:
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # large photographs are fine
            results = dict(zip(indices, pool.map(attempt, indices), strict=True))
        return {index: result for index, result in results.items() if result is not None}

    headers = decode_all(_read_header, range(len(sources)))
    shapes = {(header.height, header.width) for header in headers.values()}
    height, width = size or DEFAULT_SIDE, size or DEFAULT_SIDE
    if not size and len(shapes) == 1 and max(own := shapes.pop()) <= DEFAULT_SIDE:
        height, width = own
    grey = all(header.grey for header in headers.values())
    if shape is not None:
        height, width, grey = *shape[:2], shape[2] == 1
    decoded = decode_all(partial(_read_pixels, height=height, width=width, grey=grey), list(headers))

    notes: tuple[str, ...] = ()
    if unreadable:
        bad = [f"{names[index]} ({unreadable[index]})" for index in sorted(unreadable)]
        more = f", and {len(bad) - 5} more" if len(bad) > 5 else ""
        notes = (
            f"{len(bad)} of {len(sources)} images cannot be read and were skipped: {', '.join(bad[:5])}{more}",
        )
    if not decoded:
        raise InputError(f"{where}: none of the images can be read: {notes[0].partition(': ')[2]}")
    if len(decoded) < 2 and not validation_only:
        raise InputError(f"{where}: one image is not enough: training and validation need one each")
    images = torch.from_numpy(np.stack(list(decoded.values())))
    return images, torch.tensor(list(decoded)), notes


def _why_unreadable(error: Exception) -> str:
    from PIL import Image, UnidentifiedImageError

    if isinstance(error, UnidentifiedImageError):
        return "not an image"
    if isinstance(error, Image.DecompressionBombError):
        return f"more than {2 * (Image.MAX_IMAGE_PIXELS or 0):,} pixels, which Pillow treats as an attack"
    return str(error).partition("\n")[0] if isinstance(error, OSError) else type(error).__name__


def _open_image(source: Any) -> Any:
    from PIL import Image

    if source is None:
        raise OSError("no image")
    if isinstance(source, io.BytesIO):
        source = io.BytesIO(source.getbuffer())
    return Image.open(source)


def _read_header(source: Any) -> _Header:
    with _open_image(source) as image:
        # In a PNG these modes have at most 16 bits; in other formats, and for floats, the value of white is unknown.
        if image.mode == "F" or (image.mode == "I" and image.format != "PNG"):
            raise OSError(f"pixels of mode {image.mode}, whose range is unknown")
        sideways = image.getexif().get(0x0112, 1) >= 5  # the EXIF orientation
        width, height = reversed(image.size) if sideways else image.size
        return _Header(
            width, height, image.mode in ("1", "L", "LA", "I", "F") or image.mode.startswith("I;16")
        )


def _read_pixels(source: Any, height: int, width: int, grey: bool) -> Any:
    from PIL import Image, ImageOps

    with _open_image(source) as file_image:
        file_image.draft(None, (4 * width, 4 * height))  # avoids decoding a large JPEG in full
        image = ImageOps.exif_transpose(file_image)
        if image.mode.startswith("I"):  # 16 bits, which Pillow would clip to 255
            image = Image.fromarray((np.asarray(image).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8))
        if image.mode in ("LA", "PA", "RGBA") or "transparency" in image.info:
            # Otherwise transparent parts would show the colour that is stored there, which is mostly black.
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        image = image.convert("L" if grey else "RGB")
        if image.size != (width, height):
            image = ImageOps.fit(image, (width, height), Image.Resampling.LANCZOS)
        pixels = np.asarray(image)
    return pixels[..., None] if grey else pixels


def _split(
    name: str, images: Tensor, seed: int, labels: Tensor | None = None, notes: tuple[str, ...] = ()
) -> Images:
    # Files are often sorted by class or by author, so shuffle first.
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    val, train = order.tensor_split([max(1, len(images) // 6)])
    if labels is None:
        return Images(name, images[train], images[val], notes=notes, val_rows=val)
    return Images(name, images[train], images[val], labels[train], labels[val], notes, val_rows=val)
