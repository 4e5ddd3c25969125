"""Images to train on: scikit-learn's digits, or a .npz file of the user's own."""

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

__all__ = ["Images", "InputError", "digits", "npz"]


class InputError(Exception):
    """Something that a user can mend: the message is one line, to be shown without a traceback."""


class Images(NamedTuple):
    """Images as uint8 (N, H, W, C), 0 to 255, C being 1 or 3."""

    name: str
    train: Tensor
    held_out: Tensor


def digits(seed: int) -> Images:
    """The 1797 handwritten digits of 8 x 8 pixels that ship inside scikit-learn; a sixth of them held out."""
    from sklearn.datasets import load_digits

    # 17 grey levels, 0 to 16.
    grey = torch.from_numpy(np.round(load_digits().images * (255 / 16)).astype(np.uint8))
    return _split("scikit-learn's digits", grey.unsqueeze(-1), seed)


def npz(path: Path, seed: int) -> Images:
    """A file in the layout of Keras: `x_train` and perhaps `x_test`, uint8 (N, H, W) or (N, H, W, C).

    Without `x_test` a sixth of the images, drawn by `seed`, is held out. Nothing is unpickled.

    Raises InputError for a file that cannot be read, and for one that holds something else.
    """
    arrays = _read(path, ("x_train", "x_test"))
    if "x_train" not in arrays:
        raise InputError(f"{path}: there is no array `x_train` in this file")
    train = _images(path, "x_train", arrays["x_train"])
    if "x_test" not in arrays:
        if len(train) < 2:
            raise InputError(
                f"{path}: one image is too few: some are held out from `x_train`, or give `x_test`"
            )
        return _split(path.name, train, seed)
    held_out = _images(path, "x_test", arrays["x_test"])
    if held_out.shape[1:] != train.shape[1:]:
        raise InputError(
            f"{path}: `x_test` must hold images of the size of `x_train` {tuple(train.shape[1:])}, "
            f"got {tuple(held_out.shape[1:])}"
        )
    return Images(path.name, train, held_out)


def _read(path: Path, names: tuple[str, ...]) -> dict[str, Any]:
    try:
        file = np.load(path, allow_pickle=False)
        if not isinstance(file, np.lib.npyio.NpzFile):
            raise InputError(f"{path}: not a .npz file, but a single array")
        with file:
            return {name: file[name] for name in names if name in file.files}
    except InputError:
        raise
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror or 'damaged'}") from error
    # What a damaged or foreign file makes zipfile, zlib and numpy raise is many things; each means the same here.
    except Exception as error:
        if "allow_pickle" in str(error):
            raise InputError(
                f"{path}: not a .npz file of plain arrays (pickled objects are refused)"
            ) from error
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise InputError(f"{path}: not a .npz file that numpy can read: {reason}") from error


def _images(path: Path, name: str, array: Any) -> Tensor:
    if not isinstance(array, np.ndarray):
        raise InputError(f"{path}: `{name}` is not an array")
    if array.dtype != np.uint8:
        raise InputError(f"{path}: `{name}` must be uint8, 0 to 255, got {array.dtype}")
    if array.ndim not in (3, 4):
        raise InputError(f"{path}: `{name}` must be (N, H, W) or (N, H, W, C), got shape {array.shape}")
    if array.ndim == 4 and array.shape[3] not in (1, 3):
        raise InputError(f"{path}: `{name}` must have 1 or 3 channels, last, got shape {array.shape}")
    if array.size == 0:
        raise InputError(f"{path}: `{name}` is empty, shape {array.shape}")
    images = torch.from_numpy(np.ascontiguousarray(array))
    return images if images.dim() == 4 else images.unsqueeze(-1)


def _split(name: str, images: Tensor, seed: int) -> Images:
    # Shuffled first: files are often sorted, by class or by who wrote.
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    held_out = max(1, len(images) // 6)
    return Images(name, images[order[held_out:]], images[order[:held_out]])
