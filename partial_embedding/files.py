"""Files that are there in full or not at all, folders that are one run's alone, and YAML."""

from __future__ import annotations

import errno
import os
import re
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import yaml

from partial_embedding.errors import InputError

# Far more than any configuration has; aliases of aliases can stand for billions.
_MOST_NODES = 100_000
_MOST_DIGITS = 18


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
