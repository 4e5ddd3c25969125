"""Small image data for the tests of image recipes."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image


@pytest.fixture(scope="session")
def colours(tmp_path_factory) -> Path:
    """60 images of 16 x 20 pixels with a bright or dark upper half, 20 of them for validation."""
    path = tmp_path_factory.mktemp("colours") / "colours.npz"
    rng = np.random.default_rng(0)
    x = rng.integers(0, 40, (60, 16, 20, 3), dtype=np.uint8) + np.array([200, 100, 20], np.uint8)
    x[::2, :8] -= 20
    np.savez(path, x_train=x[:40], x_test=x[40:])
    return path


@pytest.fixture(scope="session")
def pictures(tmp_path_factory) -> Path:
    """A folder of 24 pictures of different sizes."""
    folder = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    for i in range(24):
        pixels = rng.integers(0, 256, (40 + i, 60, 3), dtype=np.uint8)
        pixels[: 10 + i] = 255
        Image.fromarray(pixels).save(folder / f"{i}.png")
    return folder
