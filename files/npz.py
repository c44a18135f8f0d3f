"""Reading .npz files that nobody vouches for.

No pickle runs, no member is unpacked to the disk or past the size it may have, every byte is under a CRC-32.
"""
import io
import os
import zipfile
from collections.abc import Callable, Iterator
from math import prod
from typing import BinaryIO

from utils import UserError

import numpy as np

MOST_DIRECTORY_BYTES = 2**24  # of names and sizes of members: room for 100,000
HEADER_BYTES = 1024  # of an .npy, at most


def read(path: str | os.PathLike, most_bytes: Callable[[str], int]) -> Iterator[tuple[str, np.ndarray]]:
    """Yield the name, without .npy, and the array of each member, a read-only view of its bytes.

    most_bytes: name -> how many bytes its array may have; asked before memory is taken, and free to raise UserError for
    a name that is not wanted. Raises UserError, and whatever zipfile, zlib and numpy raise for a damaged file.
    """
    with open(path, "rb") as file:
        _check_directory(file)
        with zipfile.ZipFile(file) as archive:
            members = archive.infolist()
            file.seek(-12, os.SEEK_END)  # the count in the end record: zipfile overlooks entries lost to a wrong length
            if int.from_bytes(file.read(2), "little") != len(members):
                raise UserError("its directory has lost members, the file is damaged: restore it or make it anew")
            if len({member.filename for member in members}) < len(members):
                raise UserError("a member appears twice: restore the file or make it anew")
            for member in members:
                name = member.filename.removesuffix(".npy")
                most = most_bytes(name)
                known = member.compress_type in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
                if not known or not 0 < member.file_size <= most + HEADER_BYTES:
                    raise UserError(f"{name} would take {member.file_size} bytes, at most {most} make sense: restore "
                                    "the file or make it anew")
                with archive.open(member) as content:
                    raw = content.read(member.file_size)  # a bare read() inflates a bomb past the size it claims
                yield name, _array(name, raw)


def _check_directory(file: BinaryIO) -> None:
    """UserError unless the archive ends with a plain, small directory, so that zipfile takes little memory to read it.
    """
    size = file.seek(0, os.SEEK_END)
    file.seek(-min(size, 42), os.SEEK_END)
    tail = file.read()
    end = tail[-22:]
    if end[:4] != b"PK\5\6" or end[-2:] != b"\0\0":
        raise UserError("does not end as an .npz does: restore the file or make it anew")
    large = tail[:4] == b"PK\6\7"  # sizes of 64 bits, which only a file past 4 GiB needs
    if (large and size < 2**32) or (not large and int.from_bytes(end[12:16], "little") > MOST_DIRECTORY_BYTES):
        raise UserError("its directory is too large for an .npz: restore the file or make it anew")


def _array(name: str, raw: bytes) -> np.ndarray:
    """The array in an .npy, which must be one row, or a single value, of plain numbers or text."""
    header = io.BytesIO(raw)
    version = np.lib.format.read_magic(header)
    if version != (1, 0):
        raise UserError(f"{name} is an .npy of version {version}, not 1.0: restore the file or make it anew")
    shape, _, dtype = np.lib.format.read_array_header_1_0(header)
    content = memoryview(raw)[header.tell():]
    if dtype.hasobject or len(shape) > 1 or prod(shape) * dtype.itemsize != len(content):
        raise UserError(f"{name} is no row of {dtype} in {len(content)} bytes but {[*shape]}: restore the file or make "
                        "it anew")
    if dtype.kind == "U":  # numpy would make strings of numbers that are no characters
        bytes(content).decode("utf-32-be" if dtype.str[0] == ">" else "utf-32-le")
    return np.ndarray(shape, dtype, content)
