"""Images to train on: scikit-learn's digits, or the user's own: a .npz file, a folder, a Hugging Face dataset."""

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
from fastvae.train.arrays import Arrays
from fastvae.train.errors import InputError

__all__ = ["Images", "Shape", "digits", "folder", "hugging_face", "load", "npz", "shape_of", "size_of"]

DEFAULT_SIDE = 64  # pixels, of images that come in several sizes, or large

Shape = tuple[int, int, int]
"""Of an image: H, W, C."""


class Images(NamedTuple):
    """Images as uint8 (N, H, W, C), 0 to 255, C being 1 or 3."""

    name: str
    train: Tensor
    held_out: Tensor
    train_labels: Tensor | None = None
    """(N,) int64, where the data has labels."""
    held_out_labels: Tensor | None = None
    notes: tuple[str, ...] = ()
    """Lines to tell the user: what was skipped."""
    label_names: tuple[str, ...] = ()
    """Of the labels 0, 1, ..., where they have names."""


def shape_of(images: Images) -> Shape:
    height, width, channels = images.train.shape[1:]
    return height, width, channels


def size_of(shape: tuple[int, ...]) -> str:
    """H x W, or H x W x C where C is not 1."""
    return " x ".join(str(n) for n in (shape if shape[2] > 1 else shape[:2]))


def load(
    spec: str, *, seed: int = 0, size: int = 0, shape: Shape | None = None, whole: bool = False
) -> Images:
    """The images of `--data`: "digits", a .npz file, a folder, or the name of a Hugging Face dataset.

    `size` is for the last two: the side to which images are cut and resized. 0 leaves them as they are if all have one
    size of at most 64 pixels, and makes them 64 x 64 if not. With `shape` (H, W, C) they are brought to just that. All
    images of a folder are held out if it is to be taken as a `whole`.

    Raises InputError for what cannot be read, and for what holds no images.
    """
    if spec == "digits":
        return digits(seed)
    path = Path(spec).expanduser()
    if path.is_dir():
        return folder(path, seed, size, shape, whole)
    if path.suffix.lower() == ".npz":
        return npz(path, seed)
    if path.exists():
        raise InputError(f"{spec}: neither a .npz file nor a folder of images")
    if re.fullmatch(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?", spec):
        return hugging_face(spec, seed, size, shape)
    raise InputError(f"{spec}: no such file or folder")


def digits(seed: int) -> Images:
    """The 1797 handwritten digits of 8 x 8 pixels that ship inside scikit-learn; a sixth of them held out."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    # 17 grey levels, 0 to 16.
    grey = torch.from_numpy(np.round(bunch.images * (255 / 16)).astype(np.uint8))
    return _split("scikit-learn's digits", grey.unsqueeze(-1), seed, torch.from_numpy(bunch.target).long())


def npz(path: Path, seed: int) -> Images:
    """A file in the layout of Keras: `x_train` and perhaps `x_test`, uint8 (N, H, W) or (N, H, W, C); labels are
    `y_train` and `y_test`, integers (N,), and may be missing.

    Without `x_test` a sixth of the images, drawn by `seed`, is held out. Nothing is unpickled.

    Raises InputError for a file that cannot be read, and for one that holds something else.
    """
    with Arrays(path) as arrays:
        if "x_train" not in arrays:
            raise InputError(
                f"{path}: there is no array `x_train` in this file, only {arrays.contents()}; images are stored with "
                "np.savez(path, x_train=images), uint8 (N, H, W) or (N, H, W, C)"
            )
        train = _images(path, "x_train", arrays.read("x_train"))
        held_out = _images(path, "x_test", arrays.read("x_test")) if "x_test" in arrays else None
        notes: list[str] = []
        train_labels = _labels(arrays, "y_train", len(train), notes)
        held_out_labels = None if held_out is None else _labels(arrays, "y_test", len(held_out), notes)
    if held_out is None:
        if len(train) < 2:
            raise InputError(
                f"{path}: one image is too few: some are held out from `x_train`, or give `x_test`"
            )
        return _split(path.name, train, seed, train_labels, tuple(notes))
    if held_out.shape[1:] != train.shape[1:]:
        raise InputError(
            f"{path}: `x_test` must hold images of the size of `x_train` {tuple(train.shape[1:])}, "
            f"got {tuple(held_out.shape[1:])}"
        )
    return Images(path.name, train, held_out, train_labels, held_out_labels, tuple(notes))


def _images(path: Path, name: str, array: Any) -> Tensor:
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
        raise InputError(f"{path}: `{name}` must have 1 or 3 channels, last, got shape {array.shape}{hint}")
    if array.size == 0:
        raise InputError(f"{path}: `{name}` is empty, shape {array.shape}")
    images = torch.from_numpy(np.ascontiguousarray(array))
    return images if images.dim() == 4 else images.unsqueeze(-1)


def _labels(arrays: Arrays, name: str, n: int, notes: list[str]) -> Tensor | None:
    """Labels colour a picture, so whatever is not one integer for each image is left aside, and noted."""
    if name not in arrays:
        return None
    try:
        array = arrays.read(name)
    except InputError as error:
        notes.append(f"no labels: {error}")
        return None
    if array.dtype.kind not in "iu" or array.size != n:
        notes.append(
            f"no labels: `{name}` must hold one integer for each of the {n} images, got {array.dtype} of shape "
            f"{array.shape}"
        )
        return None
    return torch.from_numpy(array.reshape(n).astype(np.int64))


# ---------------------------------------------------------------------------------------------------------------------
# Image files
# ---------------------------------------------------------------------------------------------------------------------


def folder(
    path: Path,
    seed: int,
    size: int = 0,
    shape: Shape | None = None,
    whole: bool = False,
) -> Images:
    """All images in a folder and below it; a sixth, drawn by `seed`, is held out, or all of a `whole`.

    Folders of runs are left out: there are pictures in them. The folders of the first level are the labels, if there
    are several. Files that cannot be read as images are skipped, and `notes` names them. They are grey if every image
    is, else RGB; EXIF rotations are applied.

    Raises InputError where fewer than two images are left, or none for a `whole`.
    """
    from PIL import Image

    suffixes = Image.registered_extensions()
    try:
        below = list(_walk(path))
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
        raise InputError(f"{path}: there are no images in this folder (*.png, *.jpg, ...)")
    parents = [file.relative_to(path).parts[0] if file.parent != path else "." for file in files]
    images, kept, notes = _decode(
        str(path), files, [str(file.relative_to(path)) for file in files], size, shape, whole
    )
    parents = [parents[place] for place in kept.tolist()]
    names = sorted(set(parents))
    labels = torch.tensor([names.index(parent) for parent in parents]) if len(names) > 1 else None
    if whole:
        return Images(path.name, images[:0], images, None, labels, notes, tuple(names))
    return _split(path.name, images, seed, labels, notes)._replace(label_names=tuple(names))


def _walk(top: Path) -> Iterator[Path]:
    """All files below a folder, behind links too; a folder that links lead to again is entered once."""
    entered = set()
    for folder, folders, names in os.walk(top, followlinks=True, onerror=_raise):
        folders.sort()
        where = os.path.realpath(folder)
        if where in entered:
            folders.clear()
            continue
        entered.add(where)
        yield from (Path(folder, name) for name in names)


def _raise(error: OSError) -> None:
    raise error


def hugging_face(name: str, seed: int, size: int = 0, shape: Shape | None = None) -> Images:
    """A dataset of the Hugging Face hub: its first column of images, and the first of class labels if there is one.

    The split `train` is trained on; `test`, or else `validation`, is held out, and without either a sixth of `train`.

    Raises InputError where the package `datasets` is missing, and for what cannot be loaded or holds no images.
    """
    loaded = hub.splits(name)
    import datasets

    train = loaded["train"]
    column = next((key for key, kind in train.features.items() if isinstance(kind, datasets.Image)), None)
    if column is None:
        raise InputError(f"{name}: this dataset has no column of images, only {', '.join(train.features)}")
    label = next((key for key, kind in train.features.items() if isinstance(kind, datasets.ClassLabel)), None)

    label_names = tuple(getattr(train.features[label], "names", ()) if label is not None else ())

    def rows(split: Any) -> tuple[list[IO[bytes] | str | None], Tensor | None]:
        # Not decoded by `datasets`: it stops at the first damaged image.
        raw = split.cast_column(column, datasets.Image(decode=False))[column]
        sources = [
            io.BytesIO(row["bytes"]) if row and row["bytes"] is not None else row and row["path"]
            for row in raw
        ]
        if label is None:
            return sources, None
        return sources, torch.tensor([-1 if kind is None else kind for kind in split[label]])

    other = next((key for key in ("test", "validation") if key in loaded), None)
    sources, labels = rows(train)
    first = len(sources)
    names = [f"train[{i}]" for i in range(first)]
    if other is not None:
        more, more_labels = rows(loaded[other])
        sources += more
        names += [f"{other}[{i}]" for i in range(len(more))]
        labels = torch.cat([labels, more_labels]) if labels is not None and more_labels is not None else None
    images, kept, notes = _decode(name, sources, names, size, shape)
    if labels is not None:
        labels = labels[kept]
    if other is None:
        return _split(name, images, seed, labels, notes)._replace(label_names=label_names)
    trained = kept < first
    for split, some in (("train", trained.any()), (other, (~trained).any())):
        if not some:
            raise InputError(f"{name}: the split `{split}` holds no image that can be read")
    return Images(
        name,
        images[trained],
        images[~trained],
        None if labels is None else labels[trained],
        None if labels is None else labels[~trained],
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
    whole: bool = False,
) -> tuple[Tensor, Tensor, tuple[str, ...]]:
    """(images (N, H, W, C), the places in `sources` that they come from (N,), what was skipped)."""
    from PIL import Image

    unreadable: dict[int, str] = {}

    def each(function: Callable[[Any], Any], places: Sequence[int]) -> dict[int, Any]:
        def attempt(place: int) -> Any:
            try:
                return function(sources[place])
            except Exception as error:  # Pillow raises many things for a damaged file
                unreadable[place] = _why_unreadable(error)
                return None

        # Pillow decodes outside the interpreter's lock.
        with warnings.catch_warnings(), ThreadPoolExecutor(max_workers=torch.get_num_threads()) as pool:
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # a large photograph is welcome
            done = dict(zip(places, pool.map(attempt, places), strict=True))
        return {place: result for place, result in done.items() if result is not None}

    headers = each(_header, range(len(sources)))
    shapes = {(header.height, header.width) for header in headers.values()}
    height, width = size or DEFAULT_SIDE, size or DEFAULT_SIDE
    if not size and len(shapes) == 1 and max(own := shapes.pop()) <= DEFAULT_SIDE:
        height, width = own
    grey = all(header.grey for header in headers.values())
    if shape is not None:
        height, width, grey = *shape[:2], shape[2] == 1
    decoded = each(partial(_pixels, height=height, width=width, grey=grey), list(headers))

    notes: tuple[str, ...] = ()
    if unreadable:
        bad = [f"{names[place]} ({unreadable[place]})" for place in sorted(unreadable)]
        more = f", and {len(bad) - 5} more" if len(bad) > 5 else ""
        notes = (
            f"{len(bad)} of {len(sources)} images cannot be read and are skipped: {', '.join(bad[:5])}{more}",
        )
    if not decoded:
        raise InputError(f"{where}: not one image can be read: {notes[0].partition(': ')[2]}")
    if len(decoded) < 2 and not whole:
        raise InputError(f"{where}: one image is too few: some are held out")
    images = torch.from_numpy(np.stack(list(decoded.values())))
    return images, torch.tensor(list(decoded)), notes


def _why_unreadable(error: Exception) -> str:
    from PIL import Image, UnidentifiedImageError

    if isinstance(error, UnidentifiedImageError):
        return "not an image"
    if isinstance(error, Image.DecompressionBombError):
        return f"more than {2 * (Image.MAX_IMAGE_PIXELS or 0):,} pixels, which Pillow takes for an attack"
    return str(error).partition("\n")[0] if isinstance(error, OSError) else type(error).__name__


def _open(source: Any) -> Any:
    from PIL import Image

    if source is None:
        raise OSError("no image")
    if isinstance(source, io.BytesIO):
        source = io.BytesIO(source.getbuffer())
    return Image.open(source)


def _header(source: Any) -> _Header:
    with _open(source) as image:
        # A PNG has 16 bits of it at most; in other files, and of floats, nobody knows which value is white.
        if image.mode == "F" or (image.mode == "I" and image.format != "PNG"):
            raise OSError(f"pixels of mode {image.mode}, of unknown range")
        sideways = image.getexif().get(0x0112, 1) >= 5  # EXIF's orientation
        width, height = reversed(image.size) if sideways else image.size
        return _Header(
            width, height, image.mode in ("1", "L", "LA", "I", "F") or image.mode.startswith("I;16")
        )


def _pixels(source: Any, height: int, width: int, grey: bool) -> Any:
    from PIL import Image, ImageOps

    with _open(source) as opened:
        opened.draft(None, (4 * width, 4 * height))  # a large JPEG need not be decoded in full
        image = ImageOps.exif_transpose(opened)
        if image.mode.startswith("I"):  # 16 bits: Pillow would clip them to 255
            image = Image.fromarray((np.asarray(image).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8))
        if image.mode in ("LA", "PA", "RGBA") or "transparency" in image.info:
            # Otherwise what is transparent shows the colour that happens to be stored there, mostly black.
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
    # Shuffled first: files are often sorted, by class or by who wrote.
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    held_out, train = order.tensor_split([max(1, len(images) // 6)])
    if labels is None:
        return Images(name, images[train], images[held_out], notes=notes)
    return Images(name, images[train], images[held_out], labels[train], labels[held_out], notes)
