"""Writing a file so that it is there in full or not at all."""

import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def write_atomically(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Give a temporary path beside `path`, which takes its place when the block succeeds.

    When the block fails, also by an interrupt or a full disk, the temporary file is removed and
    what `path` held before is left as it was. The temporary name ends as `path` does, so that
    writers which look at the suffix behave the same. Permissions of a replaced file and a link at
    `path` are kept.

    Args:
        path: The file to write. Its folder must exist.

    Yields:
        The path to write to; the block must create a file there.

    Raises:
        OSError: The file cannot be written, for example because the disk is full.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     target = Path(folder) / "table.txt"
        ...     with write_atomically(target) as temporary:
        ...         _ = temporary.write_text("all of it")
        ...     target.read_text(), len(list(Path(folder).iterdir()))
        ('all of it', 1)
    """
    target = Path(os.path.realpath(path))
    temporary = target.with_name(f".{uuid.uuid4().hex}-{target.name}")
    try:
        yield temporary
        # Some file systems report a full disk only here, and a rename may reach the disk first.
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        if target.exists():
            shutil.copymode(target, temporary)
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)
