"""Reading .npz files, and the errors for those that cannot be read."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fastvae.train.errors import InputError
from fastvae.train.npz import NpzFile

WEB_PAGE = b"\n <!DOCTYPE html><html><title>404</title></html>"


def array(values: Any) -> bytes:
    file = io.BytesIO()
    np.save(file, values)
    return file.getvalue()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (
            WEB_PAGE,
            "not an .npz file: it begins with '<!DOCTYPE html>', so it may be a web page",
        ),
        (
            array([1]),
            "not an .npz file: it is a single array (.npy); save it with np.savez(path, name=array)",
        ),
        (b"", "not an .npz file: it is empty"),
        (b"\x1f\x8b\x08 a gzip", "not an .npz file: it begins with b'\\x1f\\x8b\\x08 a gzip'"),
        (b"PK\x03\x04 and nothing more", "the file was cut short; copy or download it again"),
    ],
)
def test_npz_file_with_other_content_says_what_it_is(tmp_path: Path, content: bytes, words: str) -> None:
    path = tmp_path / "file.npz"
    path.write_bytes(content)
    with pytest.raises(InputError) as caught:
        NpzFile(path)
    assert str(caught.value).startswith(f"{path}: {words}")


def test_read_of_pickled_array_fails(tmp_path: Path) -> None:
    path = tmp_path / "file.npz"
    np.savez(path, x=np.arange(3, dtype=">i4"), kind=np.array(["a", None, "b"], dtype=object))
    with NpzFile(path) as arrays:
        assert arrays.names == ("x", "kind")
        x = arrays.read("x")
        assert x.dtype == np.int32
        assert x.dtype.isnative
        assert x.tolist() == [0, 1, 2]
        with pytest.raises(InputError, match="`kind` is stored as pickled Python objects"):
            arrays.read("kind")


def test_read_of_damaged_array_fails(tmp_path: Path) -> None:
    path = tmp_path / "file.npz"
    np.savez(path, x=np.arange(1000))
    content = bytearray(path.read_bytes())
    content[500:600] = bytes(100)
    path.write_bytes(content)
    with NpzFile(path) as arrays, pytest.raises(InputError, match="`x` cannot be read: Bad CRC-32"):
        arrays.read("x")
