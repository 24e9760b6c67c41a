"""Files as they are shipped: packed in any of the usual ways, whatever their name says."""

from __future__ import annotations

import bz2
import gzip
import lzma
import sys
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from importlib import import_module
from importlib.util import find_spec
from io import BufferedReader
from pathlib import Path
from typing import Any

from partial_embedding.errors import InputError
from partial_embedding.files import refuse_no_file

_BUFFER = 1 << 20  # bytes
_ZSTANDARD = "backports.zstd"
# A bar for less would be gone before it is seen.
_SHOWN_FROM = 1 << 24
# What a member of a zip raises; RuntimeError is its word for a password.
_DAMAGES: tuple[type[Exception], ...] = (
    OSError,
    EOFError,
    zlib.error,
    lzma.LZMAError,
    zipfile.BadZipFile,
    RuntimeError,
)
try:
    # The same module under two names.
    zstd: Any = import_module("compression.zstd" if sys.version_info >= (3, 14) else _ZSTANDARD)
except ModuleNotFoundError:  # an optional package
    zstd = None
else:
    _DAMAGES = (*_DAMAGES, zstd.ZstdError)
_PACKED = (".gz", ".bz2", ".xz", ".zst", ".zip")


@contextmanager
def opened(path: Path) -> Iterator[tuple[BufferedReader, str]]:
    """Give the content of a file, unpacked, and its name without the suffix of the packing.

    How it is packed is told from its first bytes: gzip, bzip2, xz, Zstandard, or zip with one file.
    A bar shows how much of it was read.

    Raises:
        InputError: It is missing, none, damaged, packed with others, or packed in a way that needs
            a package.
    """
    refuse_no_file(path, "the word vectors are in a file")
    try:
        with ExitStack() as stack:
            raw = stack.enter_context(_with_bar(path))
            stream, name = _unpacked(path, raw, stack)
            yield BufferedReader(stream, _BUFFER), name
    except FileNotFoundError as error:
        raise InputError(
            f"the word vectors are in a file. Received: {path}, which is missing. Check the path."
        ) from error
    except _DAMAGES as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(
            f"the word vectors can be read. Received: {reason} for {path}. Check its permissions, "
            "or get it again if it is cut off."
        ) from error


@contextmanager
def _with_bar(path: Path) -> Iterator[Any]:
    size = path.stat().st_size
    with path.open("rb") as raw:
        if size < _SHOWN_FROM or not sys.stderr.isatty() or find_spec("rich") is None:
            yield raw
            return
        from rich.console import Console
        from rich.progress import wrap_file

        console = Console(stderr=True)
        with wrap_file(raw, size, description=path.name, console=console, transient=True) as bar:
            yield bar


def _unpacked(path: Path, raw: Any, stack: ExitStack) -> tuple[Any, str]:
    magic = raw.read(6)
    raw.seek(0)
    name = path.stem if path.suffix in _PACKED else path.name
    if magic.startswith(b"\x1f\x8b") or path.suffix == ".gz":
        return stack.enter_context(gzip.GzipFile(fileobj=raw)), name
    if magic.startswith(b"BZh"):
        return stack.enter_context(bz2.BZ2File(raw)), name
    if magic == b"\xfd7zXZ\0":
        return stack.enter_context(lzma.LZMAFile(raw)), name
    if magic.startswith(b"\x28\xb5\x2f\xfd"):
        return stack.enter_context(_zstandard(path, raw)), name
    if magic.startswith(b"PK\3\4"):
        archive = stack.enter_context(zipfile.ZipFile(raw))
        member = _only_member(path, archive)
        return stack.enter_context(archive.open(member)), Path(member).name
    return raw, name


def _zstandard(path: Path, raw: Any) -> Any:
    if zstd is None:
        raise InputError(
            f"files packed by Zstandard need the package {_ZSTANDARD}. Received none for {path}. "
            f"pip install {_ZSTANDARD}, or unpack the file: zstd -d {path.name}"
        )
    return zstd.ZstdFile(raw)


def _only_member(path: Path, archive: zipfile.ZipFile) -> str:
    members = [
        info.filename
        for info in archive.infolist()
        # What macOS adds are no files of anybody.
        if not info.is_dir() and not info.filename.startswith("__MACOSX/")
    ]
    if len(members) != 1:
        raise InputError(
            f"a zip holds one file. Received: {path}, which holds {len(members)}: "
            f"{', '.join(members[:5])}. Unpack it (python -m zipfile -e {path.name} .) and name "
            "one of them."
        )
    return members[0]
