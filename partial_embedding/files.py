"""Files: there in full or not at all, in a folder that is one run's alone, opened where they lie.

And YAML, read as plain data.
"""

from __future__ import annotations

import errno
import mmap
import os
import re
import shutil
import sys
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import yaml
from numpy.typing import NDArray

from partial_embedding.errors import InputError

# Far more than any configuration has; aliases of aliases can stand for billions.
_MOST_NODES = 100_000
_MOST_DIGITS = 18
# Linux's own number; Python has no name for it everywhere.
_NORESERVE = 0x4000


@contextmanager
def write_atomically(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Give a temporary path beside `path`, which takes its place when the block succeeds.

    When the block fails, also by an interrupt or a full disk, the temporary file is removed and
    what `path` held before is left as it was. The temporary name ends as `path` does, so that
    writers which look at the suffix behave the same. Permissions of a replaced file and a link at
    `path` are kept. The folder must exist, and the block must create a file.

    Raises:
        InputError: A folder is in its place, or a device, which a file must not replace.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     target = Path(folder) / "table.txt"
        ...     with write_atomically(target) as temporary:
        ...         _ = temporary.write_text("all of it")
        ...     target.read_text(), len(list(Path(folder).iterdir()))
        ('all of it', 1)
    """
    refuse_no_file(path, "what is written is a file")
    target = Path(os.path.realpath(path))
    if not target.parent.is_dir():  # writers of other packages say so in their own ways
        code = errno.ENOTDIR if target.parent.exists() else errno.ENOENT
        raise OSError(code, os.strerror(code), str(path))
    temporary = target.with_name(f".{uuid.uuid4().hex}-{target.name}")
    try:
        yield temporary
        # Some file systems report a full disk only here, and a rename may reach the disk first.
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        if target.exists():
            shutil.copymode(target, temporary)
        temporary.replace(target)
    except OSError as error:
        if error.filename == str(temporary):  # a name that nobody gave
            error.filename = str(path)
        raise
    finally:
        with suppress(FileNotFoundError, NotADirectoryError):
            temporary.unlink()


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write a text in UTF-8, in full or not at all, as `write_atomically` does."""
    with write_atomically(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def claim_version(root: str | os.PathLike[str]) -> int:
    """Make the folder `version_N` with the next number, which no other process has, and give N.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     claim_version(folder), claim_version(folder)
        (0, 1)
    """
    root = Path(root)
    root.mkdir(parents=True, exist_ok=True)
    taken = [p.name.removeprefix("version_") for p in root.glob("version_*")]
    number = 1 + max((int(n) for n in taken if n.isascii() and n.isdigit()), default=-1)
    while True:
        try:
            (root / f"version_{number}").mkdir()
            return number
        except FileExistsError:
            number += 1


def shown(path: str | os.PathLike[str]) -> str:
    """The path as one would type it here."""
    absolute, here = Path(path).absolute(), Path.cwd()
    return str(absolute.relative_to(here) if absolute.is_relative_to(here) else absolute)


def newest(folder: Path, pattern: str) -> Path | None:
    """The file of a name like this below a folder that was written last, if there is one."""
    return max(folder.glob(pattern), key=lambda path: path.stat().st_mtime_ns, default=None)


def refuse_no_file(path: str | os.PathLike[str], rule: str) -> None:
    """Refuse a folder, and a device, which might never end.

    Raises:
        InputError: There is one in the place of a file; the message begins with the rule.
    """
    if Path(path).exists() and not Path(path).is_file():
        kind = "folder" if Path(path).is_dir() else "device"
        raise InputError(f"{path}: {rule}. Received a {kind}. Name a file.")


def read_lines(path: str | os.PathLike[str], rule: str) -> list[str]:
    """The lines of a text, also those with nothing on them.

    Raises:
        InputError: It is no file, cannot be read or is not UTF-8; the rule says what it holds.
    """
    refuse_no_file(path, rule)
    try:
        # Not `splitlines`, which also breaks at characters that tokens may have.
        return Path(path).read_text(encoding="utf-8-sig").removesuffix("\n").split("\n")
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise InputError(
            f"{path}: {rule}. Received: {reason}. Check the path, or convert the file."
        ) from None


# Vectors that may be larger than memory


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


# YAML


def read_yaml(path: str | os.PathLike[str], what: str) -> Any:
    """Read a YAML file in which numbers are what they are for everybody else.

    `1e-3` is a number, which YAML 1.1 reads as text. A date is text, so that none is impossible.

    Raises:
        InputError: It is no file, cannot be read, is no YAML, or has an alias that holds itself or
            too much; `what` it was to hold is in the message.
    """
    refuse_no_file(path, f"a {what} is a file")
    try:
        return parse_yaml(Path(path).read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise InputError(
            f"{path}: the {what} cannot be read: {error.strerror}. Check the path."
        ) from None
    except (yaml.YAMLError, ValueError) as error:  # ValueError: no UTF-8, or no path
        reason = " ".join(str(error).split())
        raise InputError(
            f"{path}: a {what} is YAML in UTF-8. Received: {reason}. Correct it there."
        ) from None


def parse_yaml(text: str) -> Any:
    """Read YAML as `read_yaml` does.

    Raises:
        yaml.YAMLError: It is none, or has an alias that holds itself or too much.

    Example:
        >>> parse_yaml("[1e-1, 2024-02-30]")
        [0.1, '2024-02-30']
    """
    try:
        return yaml.load(text, _PlainLoader)
    except (RecursionError, ValueError) as error:  # of 5,000 digits, which Python refuses
        raise yaml.YAMLError(str(error)) from None


class _PlainLoader(yaml.SafeLoader):
    """Constructs what `read_yaml` says."""

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        number: int = super().construct_yaml_int(node)
        # Larger ones fit neither arrays nor floating point, and would be counted to.
        if abs(number) >= 10**_MOST_DIGITS:
            raise yaml.YAMLError(f"a whole number of more than {_MOST_DIGITS} digits")
        return number

    def get_single_node(self) -> yaml.Node | None:
        node: yaml.Node | None = super().get_single_node()
        if node is not None and _size(node, {}) > _MOST_NODES:
            raise yaml.YAMLError(f"aliases that stand for more than {_MOST_NODES:,} values")
        return node


def _size(node: yaml.Node, known: dict[int, int]) -> int:
    """How many values a node stands for, with its aliases written out."""
    if id(node) in known:
        if not known[id(node)]:
            raise yaml.YAMLError("an alias that holds itself")
        return known[id(node)]
    known[id(node)] = 0  # being counted
    parts = node.value if isinstance(node, yaml.CollectionNode) else []
    # A mapping holds pairs.
    inner = [part for entry in parts for part in (entry if isinstance(entry, tuple) else (entry,))]
    known[id(node)] = 1 + sum(_size(part, known) for part in inner)
    return known[id(node)]


_PlainLoader.add_constructor("tag:yaml.org,2002:int", _PlainLoader.construct_yaml_int)
_PlainLoader.yaml_implicit_resolvers = {
    first: [(tag, form) for tag, form in forms if not tag.endswith(":timestamp")]
    for first, forms in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_PlainLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"),
    list("-+.0123456789"),
)
