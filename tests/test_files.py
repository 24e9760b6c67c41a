import errno
import os
from pathlib import Path

import pytest

from partial_embedding.files import write_atomically


def test_a_new_file_appears_under_its_name_only(tmp_path: Path) -> None:
    with write_atomically(tmp_path / "a.txt.gz") as temporary:
        assert temporary.parent == tmp_path
        assert temporary.name.endswith("a.txt.gz")
        temporary.write_text("new")
        assert not (tmp_path / "a.txt.gz").exists()
    assert [file.name for file in tmp_path.iterdir()] == ["a.txt.gz"]
    assert (tmp_path / "a.txt.gz").read_text() == "new"


def test_a_string_names_the_file_too(tmp_path: Path) -> None:
    with write_atomically(str(tmp_path / "a")) as temporary:
        temporary.write_text("new")
    assert (tmp_path / "a").read_text() == "new"


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "full"), KeyboardInterrupt(), ValueError()]
)
@pytest.mark.parametrize("there_before", [True, False])
def test_a_failure_leaves_what_was_there(
    tmp_path: Path, error: BaseException, there_before: bool
) -> None:
    target = tmp_path / "a.txt"
    if there_before:
        target.write_text("old")

    def fail() -> None:
        with write_atomically(target) as temporary:
            temporary.write_text("half")
            assert len(list(tmp_path.iterdir())) == 1 + there_before
            raise error

    with pytest.raises(type(error)):
        fail()
    assert [file.read_text() for file in tmp_path.iterdir()] == ["old"] * there_before


def test_a_disk_that_is_full_at_the_end_leaves_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "a.txt"
    target.write_text("old")

    def refuse(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(OSError, match="No space left"), write_atomically(target) as temporary:
        temporary.write_text("new")
    assert [file.read_text() for file in tmp_path.iterdir()] == ["old"]


def test_a_block_that_writes_nothing_fails(tmp_path: Path) -> None:
    target = tmp_path / "a.txt"
    target.write_text("old")
    with pytest.raises(FileNotFoundError), write_atomically(target):
        pass
    assert target.read_text() == "old"


def test_a_missing_folder_fails(tmp_path: Path) -> None:
    with (
        pytest.raises(FileNotFoundError),
        write_atomically(tmp_path / "no" / "a.txt") as temporary,
    ):
        temporary.write_text("new")
    assert list(tmp_path.iterdir()) == []


def test_permissions_and_links_are_kept(tmp_path: Path) -> None:
    target, link = tmp_path / "a.txt", tmp_path / "link.txt"
    target.write_text("old")
    target.chmod(0o600)
    link.symlink_to(target)
    with write_atomically(link) as temporary:
        temporary.write_text("new")
    assert link.is_symlink()
    assert target.read_text() == "new"
    assert target.stat().st_mode & 0o777 == 0o600
