"""Tables larger than memory: opened where they lie, and copied row by row as they train."""

from __future__ import annotations

import mmap
import os
import sys
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from partial_embedding.errors import InputError

# Linux's own number; Python has no name for it everywhere.
_NORESERVE = 0x4000


def open_vectors(path: str | os.PathLike[str]) -> NDArray[np.floating]:
    """Open the vectors in a `.npy` file without reading them, for a table that trains some.

    What is read comes from the file, whose pages the system drops when it needs the memory. A page
    that is written to, by a row that trains, is copied first: the file keeps its bytes, and memory
    of the process's own follows the rows that train. `numpy.load` opens a file the same way with
    `mmap_mode="c"`, but only up to the size of the machine's memory; with `"r"` a row that trains
    ends the process, and with `"r+"` it changes the file.

    Args:
        path: A `.npy` file of floating-point numbers, shape (V, D), row after row.

    Returns:
        The vectors, shape (V, D), as they are in the file; writable.

    Raises:
        InputError: The file holds something else.
        OSError: The file cannot be read.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     np.save(f"{folder}/vectors.npy", np.eye(3, dtype=np.float32))
        ...     vectors = open_vectors(f"{folder}/vectors.npy")
        ...     vectors[2] = 7  # as training would
        ...     np.load(f"{folder}/vectors.npy")[2]
        array([0., 0., 1.], dtype=float32)
    """
    with open(path, "rb") as file:
        shape, column_by_column, dtype = _read_header(path, file)
        if len(shape) != 2 or dtype.kind != "f" or not dtype.isnative:
            raise InputError(
                f"{path}: vectors are a matrix of rows by columns of floating-point numbers in "
                f"this machine's byte order. Received {dtype.str} of the shape {shape}. Save them "
                "with numpy.save(path, vectors.astype(numpy.float32))."
            )
        if column_by_column and min(shape) > 1:
            raise InputError(
                f"{path}: vectors lie row after row. Received a matrix that was saved column by "
                "column. Save it with numpy.save(path, numpy.ascontiguousarray(vectors))."
            )
        start, size = file.tell(), dtype.itemsize * shape[0] * shape[1]
        there = os.fstat(file.fileno()).st_size - start
        if there < size:
            raise InputError(
                f"{path}: {shape[0]} vectors of {shape[1]} numbers take {size:,} bytes. Received "
                f"{there:,}. Was the file cut short? Copy it again."
            )
        if not size:
            return np.empty(shape, dtype)
        return np.ndarray(shape, dtype, _copied_on_write(file), start)


def _read_header(
    path: str | os.PathLike[str], file: BinaryIO
) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    try:
        version = np.lib.format.read_magic(file)
        read = np.lib.format.read_array_header_2_0
        return (np.lib.format.read_array_header_1_0 if version == (1, 0) else read)(file)
    except ValueError as error:
        raise InputError(
            f"{path}: vectors that are opened where they lie are in a .npy file. Received another: "
            f"{error}. Save them with numpy.save."
        ) from None


def _copied_on_write(file: BinaryIO) -> mmap.mmap:
    if sys.platform != "linux":
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    # Without the flag Linux refuses a file that is larger than memory, as if all of it would train.
    flags = mmap.MAP_PRIVATE | _NORESERVE
    return mmap.mmap(file.fileno(), 0, flags, mmap.PROT_READ | mmap.PROT_WRITE)
