"""New tokens in Hugging Face's Trainer on two processes, with no call of this library."""

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")
pytest.importorskip("peft")

import torch  # noqa: E402  # after the packages that may be missing
from oracle import assert_same_bits, rows_that_differ  # noqa: E402
from tiny_language_models import NEW_ROWS  # noqa: E402
from trainer_worker import CASES, SHARDED  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
WORKER = ROOT / "tests" / "torch" / "trainer_worker.py"
TABLES = ("embed_tokens.weight", "lm_head.weight")

pytestmark = pytest.mark.skipif(
    not torch.distributed.is_available(), reason="this torch was built without torch.distributed"
)


def start(folder: Path, processes: int) -> None:
    """Run all cases on so many processes; what they wrote goes to a folder."""
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        port = str(bound.getsockname()[1])
    common = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
        "OMP_NUM_THREADS": "1",
    }
    own = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(processes)}
    started = [
        subprocess.Popen(
            [sys.executable, str(WORKER), str(folder), str(processes)],
            env={**common, **own, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            if processes > 1
            else common,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(processes)
    ]
    try:
        said = [process.communicate(timeout=300)[0] for process in started]
    finally:
        for process in started:
            process.kill()
    for process, text in zip(started, said, strict=True):
        assert process.returncode == 0, text[-3000:]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trainer")
    start(folder, 1)
    start(folder, 2)
    return folder


@pytest.mark.parametrize("case", CASES)
def test_ranks_end_alike_where_one_process_does(case: str, runs: Path) -> None:
    alone, *ranks = (
        torch.load(runs / f"{case}-{end}.pt") for end in ("0-of-1", "0-of-2", "1-of-2")
    )
    learned: dict[str, Any] = {}
    for name, before in ranks[0]["before"].items():
        after = ranks[0]["after"][name]
        assert_same_bits(ranks[1]["after"][name], after, f"{name} of the other rank")
        torch.testing.assert_close(after, alone["after"][name], rtol=1e-4, atol=1e-5)
        moved = rows_that_differ(before, after)
        if name.endswith(TABLES):
            learned[name] = moved
        elif "lora_after" in case:
            assert not moved or "lora" in name, name
    assert set(map(tuple, learned.values())) == {tuple(NEW_ROWS)}


@pytest.mark.parametrize("case", CASES)
def test_no_process_makes_a_gradient_of_the_size_of_a_table(case: str, runs: Path) -> None:
    for rank in range(2):
        seen = torch.load(runs / f"{case}-{rank}-of-2.pt")
        assert seen["like_tables"] == []
        names = [name for name in seen["before"] if name.endswith(TABLES)]
        assert set(names) <= set(seen["ignored"])


@pytest.mark.parametrize("case", SHARDED)
def test_rows_that_fsdp2_shards_end_where_one_process_does_and_resume(
    case: str, runs: Path
) -> None:
    alone, *ranks = (
        torch.load(runs / f"{case}-{end}.pt") for end in ("0-of-1", "0-of-2", "1-of-2")
    )
    for rank in ranks:
        tables = [name for name in rank["before"] if name.endswith(TABLES)]
        assert set(tables) <= set(rank["sharded"])
        for name, after in rank["after"].items():
            assert_same_bits(ranks[0]["after"][name], after, name)
            assert_same_bits(rank["again"]["after"][name], after, f"{name}, resumed")
            torch.testing.assert_close(after, alone["after"][name], rtol=1e-4, atol=1e-5)
        for name in tables:
            moved = rows_that_differ(rank["before"][name], rank["after"][name])
            assert moved == [1, *NEW_ROWS]


def test_a_checkpoint_of_rows_alone_is_refused_where_fsdp2_shards_them(runs: Path) -> None:
    for rank in range(2):
        said = torch.load(runs / f"refused-{rank}.pt")
        assert "checkpoint='rows' with fsdp. Leave checkpoint out" in said
