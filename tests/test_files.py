import errno
import os
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest

from partial_embedding.errors import InputError
from partial_embedding.files import parse_yaml, read_yaml, write_atomically


def test_a_new_file_appears_under_its_name_only(tmp_path: Path) -> None:
    with write_atomically(tmp_path / "a.txt.gz") as temporary:
        assert temporary.parent == tmp_path
        assert temporary.name.endswith("a.txt.gz")
        temporary.write_text("new")
        assert not (tmp_path / "a.txt.gz").exists()
    assert [file.name for file in tmp_path.iterdir()] == ["a.txt.gz"]
    assert (tmp_path / "a.txt.gz").read_text() == "new"


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


def test_only_a_file_is_replaced(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    for name, kind in (("folder", "folder"), ("pipe", "device")):
        with (
            pytest.raises(
                InputError, match=f"{name}: what is written is a file. Received a {kind}"
            ),
            write_atomically(tmp_path / name) as temporary,
        ):
            temporary.write_text("new")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder", "pipe"]
    assert (tmp_path / "pipe").is_fifo()


def test_an_error_names_the_file_that_was_to_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for folder in ("no", "file"):
        target = tmp_path / folder / "a.txt"
        with pytest.raises(OSError) as failed, write_atomically(target) as temporary:  # noqa: PT011
            temporary.write_text("new")
        assert failed.value.filename == str(target)


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


FAULTY_YAML = {
    "alias_of_itself": ("&all [*all]", "holds itself"),
    "aliases_of_aliases": (
        "a: &a [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]\n"
        + "".join(f"{n}: &{n} [{', '.join([f'*{b}'] * 10)}]\n" for b, n in pairwise("abcdefgh")),
        "more than 100,000 values",
    ),
    "400_digits": ("epoch: " + "9" * 400, "more than 18 digits"),
    "5000_digits": ("epoch: " + "9" * 5000, "digits"),
    "too_deep": ("a: " + "[" * 20_000, "recursion"),
}


@pytest.mark.parametrize(("text", "said"), FAULTY_YAML.values(), ids=FAULTY_YAML)
def test_yaml_that_would_fill_the_memory_is_refused(text: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(text)
    with pytest.raises(InputError, match=rf"a\.yaml: a schedule is YAML.*{said}"):
        read_yaml(tmp_path / "a.yaml", "schedule")


def test_yaml_numbers_and_dates_are_what_they_look_like() -> None:
    text = "[1e-3, 1E5, -2.5e+1, .5e1, 1_000, 2024-02-30, 2024-01-01, 12, 1.5, e5, 999999999999]"
    values = [0.001, 1e5, -25.0, 5.0, 1000, "2024-02-30", "2024-01-01", 12, 1.5, "e5", 999999999999]
    assert parse_yaml(text) == values


def test_yaml_is_read_from_files_alone(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for place, kind in ((tmp_path, "folder"), (tmp_path / "pipe", "device")):
        with pytest.raises(InputError, match=f"a configuration is a file. Received a {kind}"):
            read_yaml(place, "configuration")


def test_processes_that_start_together_claim_different_versions(tmp_path: Path) -> None:
    code = (
        "import sys; from partial_embedding.files import claim_version;"
        "sys.stdin.readline(); print(*(claim_version(sys.argv[1]) for _ in range(40)))"
    )
    started = [
        subprocess.Popen(
            [sys.executable, "-c", code, tmp_path / "runs"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(3)
    ]
    for process in started:
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()
    claimed = [int(n) for process in started for n in process.communicate()[0].split()]
    assert sorted(claimed) == list(range(120))
