"""Tables that are opened where they lie, and may be larger than memory."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from steps import take_steps

from partial_embedding import InputError, open_vectors
from partial_embedding.torch import PartialEmbedding, rowwise

PROGRAM = Path(__file__).with_name("run_mapped.py")
NUM_ROWS, WIDTH = 500_000, 100


def sparse_file(path: Path, shape: tuple[int, int]) -> Path:
    """A file of zeros that takes no room on the disk."""
    with path.open("wb") as file:
        header = {"descr": "<f4", "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(file, header)
        file.truncate(file.tell() + 4 * shape[0] * shape[1])
    return path


@pytest.fixture
def vectors(tmp_path: Path) -> Path:
    np.save(tmp_path / "vectors.npy", np.random.default_rng(0).random((20, 4), np.float32))
    return tmp_path / "vectors.npy"


def trained(weight: torch.Tensor) -> torch.Tensor:
    table = PartialEmbedding.from_pretrained(weight, trainable_rows=[3, 7])
    optimizer = rowwise(torch.optim.AdamW(table.parameters(), weight_decay=0.1), table)
    take_steps(optimizer, lambda: table(torch.arange(10)).pow(2).sum(), 3)
    return table.weight.detach()


def test_a_mapped_table_trains_as_one_in_memory_and_leaves_its_file(vectors: Path) -> None:
    before = np.load(vectors)
    mapped = trained(torch.from_numpy(open_vectors(vectors)))
    assert torch.equal(mapped, trained(torch.from_numpy(before.copy())))
    assert not np.array_equal(mapped.numpy(), before)
    assert np.array_equal(np.load(vectors), before)


@pytest.mark.skipif(sys.platform != "linux", reason="limits and counts memory as Linux does")
def test_rows_train_in_less_memory_than_the_table_takes(tmp_path: Path) -> None:
    path = sparse_file(tmp_path / "vectors.npy", (NUM_ROWS, WIDTH))
    done = subprocess.run(
        [sys.executable, PROGRAM, path, str(NUM_ROWS), str(WIDTH)],
        capture_output=True,
        text=True,
        # One thread and one arena, since each takes address space of its own, and large blocks go
        # back to the system at once.
        env={
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "MALLOC_ARENA_MAX": "1",
            "MALLOC_MMAP_THRESHOLD_": "65536",
        },
    )
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout)
    # Nine bytes for each row, and 4 MB for the 150 rows that train, each on pages of its own.
    assert seen.pop("after_training") < 9 * NUM_ROWS + 4_000_000
    assert seen == {"refuses_copies": True, "trained": True}
    assert not np.load(path, mmap_mode="r")[:200].any()


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the system has its own rules")
def test_a_file_larger_than_all_memory_is_opened(tmp_path: Path) -> None:
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    path = sparse_file(tmp_path / "vectors.npy", (3 * memory // 40_000, 10_000))
    weight = torch.from_numpy(open_vectors(path))
    table = PartialEmbedding.from_pretrained(weight)
    assert table(torch.tensor([len(weight) - 1])).sum() == 0


@pytest.mark.parametrize(
    ("array", "reason"),
    [
        (np.zeros(3, np.float32), "matrix of rows by columns"),
        (np.zeros((3, 2), np.int64), "floating-point numbers"),
        (np.zeros((3, 2), ">f4"), "byte order"),
        (np.zeros((2, 3), np.float32).T, "column by column"),
    ],
    ids=["a_vector", "integers", "another_byte_order", "columns_first"],
)
def test_other_arrays_are_refused(array: np.ndarray, reason: str, tmp_path: Path) -> None:
    np.save(tmp_path / "other.npy", array)
    with pytest.raises(InputError, match=reason):
        open_vectors(tmp_path / "other.npy")
    # The remedies, followed.
    mended = np.atleast_2d(array).astype(np.float32)
    np.save(tmp_path / "mended.npy", np.ascontiguousarray(mended))
    assert np.array_equal(open_vectors(tmp_path / "mended.npy"), mended)


def test_a_file_that_was_cut_short_is_refused(vectors: Path) -> None:
    # Reading beyond its end would end the process.
    vectors.write_bytes(vectors.read_bytes()[:-4])
    with pytest.raises(InputError, match="cut short"):
        open_vectors(vectors)


@pytest.mark.parametrize("content", [b"", b"the 0.1 0.2\n", b"\x93NUMPY\x01\x00\x09"])
def test_files_of_another_kind_are_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "vectors.npy").write_bytes(content)
    with pytest.raises(InputError, match=r"numpy\.save"):
        open_vectors(tmp_path / "vectors.npy")


def test_vectors_of_no_rows_are_opened(tmp_path: Path) -> None:
    np.save(tmp_path / "none.npy", np.zeros((0, 4), np.float32))
    assert open_vectors(tmp_path / "none.npy").shape == (0, 4)
