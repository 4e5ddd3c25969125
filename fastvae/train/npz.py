"""Reading .npz files one array at a time, with errors that explain what is wrong."""

import shutil
import zipfile
import zlib
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from . import files
from .errors import InputError

__all__ = ["NpzFile"]


class NpzFile:
    """An open .npz file. Nothing is unpickled, and only arrays that are asked for are read.

    Raises InputError if the file cannot be read or is not an .npz file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with path.open("rb") as file:
                start = file.read(64)
            if not start.startswith(b"PK"):
                raise InputError(f"{path}: not an .npz file: {_describe_content(start)}")
            self._file: Any = np.load(path, allow_pickle=False)
        except InputError:
            raise
        except FileNotFoundError:
            raise InputError(f"{path}: no such file") from None
        except OSError as error:
            raise InputError(f"{path}: cannot be read: {files.error_reason(error)}") from error
        except (ValueError, zipfile.BadZipFile) as error:
            # The list of arrays is at the end of the file.
            if str(error) == "File is not a zip file":
                raise InputError(f"{path}: the file was cut short; copy or download it again") from error
            raise InputError(f"{path}: not an .npz file that numpy can read: {_first_line(error)}") from error
        self.names: tuple[str, ...] = tuple(self._file.files)

    def __contains__(self, name: str) -> bool:
        return name in self.names

    def __enter__(self) -> "NpzFile":
        return self

    def __exit__(self, *ignored: object) -> None:
        self._file.close()

    def read(self, name: str) -> Any:
        """Read one array, converted to the byte order of this machine.

        Raises InputError if it is damaged or consists of pickled objects.
        """
        try:
            array = self._file[name]
        except Exception as error:  # zipfile, zlib and numpy raise many types for damaged files
            if "allow_pickle" in str(error):
                raise InputError(
                    f"{self.path}: `{name}` is stored as pickled Python objects, which are not read; store numbers or "
                    f"strings instead, for example np.asarray({name}.tolist())"
                ) from error
            raise InputError(f"{self.path}: `{name}` cannot be read: {_first_line(error)}") from error
        if not isinstance(array, np.ndarray):
            raise InputError(f"{self.path}: `{name}` is not an array")
        return array.astype(array.dtype.newbyteorder("="), copy=False)

    def shape(self, name: str) -> tuple[int, ...] | None:
        """Return the shape of an array without reading it; None if its header cannot be read."""
        place = self.locate(name)
        return None if place is None else place[2]

    def locate(self, name: str) -> tuple[int, Any, tuple[int, ...], bool] | None:
        """Return where the numbers of an array lie, for reading a part of them: (offset, dtype, shape, compressed).

        The offset counts bytes of the file or, if the array is compressed, of the array as `unpack` writes it. None for
        an array in Fortran's order, or one that cannot be read like this.
        """
        read_header = np.lib.format.read_array_header_1_0, np.lib.format.read_array_header_2_0
        try:
            member = self._file.zip.getinfo(f"{name}.npy")
            with self._file.zip.open(member) as stream:
                version = np.lib.format.read_magic(stream)
                shape, fortran, dtype = read_header[version[0] - 1](stream)
                start = stream.tell()
            if fortran or dtype.hasobject:
                return None
            if member.compress_type != zipfile.ZIP_STORED:
                return start, dtype, shape, True
            with self.path.open("rb") as file:
                # The local header of the member is 30 bytes, its name and further fields, whose sizes are in it.
                file.seek(member.header_offset)
                header = file.read(30)
            sizes = int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")
            return member.header_offset + 30 + sizes + start, dtype, shape, False
        except (KeyError, IndexError, ValueError, OSError, zipfile.BadZipFile):
            return None  # `read` says what is wrong

    def open(self) -> BinaryIO:
        """Open the file itself, for reading what `locate` has found."""
        return self.path.open("rb")

    def unpack(self, name: str, to: BinaryIO) -> None:
        """Write an array as a file would hold it, a little at a time.

        Raises InputError if the array is damaged, and OSError if it cannot be written.
        """
        with self._file.zip.open(f"{name}.npy") as stream:
            try:
                shutil.copyfileobj(stream, to, 1 << 20)
            except (zipfile.BadZipFile, zlib.error, EOFError) as error:
                raise InputError(f"{self.path}: `{name}` cannot be read: {_first_line(error)}") from error
        to.flush()

    def contents(self) -> str:
        """Return the names of the arrays, for a message."""
        return ", ".join(self.names) or "nothing"


def _describe_content(start: bytes) -> str:
    if start.startswith(b"\x93NUMPY"):
        return "it is a single array (.npy); save it with np.savez(path, name=array)"
    if not start:
        return "it is empty"
    text = start.lstrip()
    if text[:1] == b"<":
        return f"it begins with {text[:15].decode('ascii', 'replace')!r}, so it may be a web page"
    return f"it begins with {start[:15]!r}"


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__
