"""New tokens in Hugging Face's Trainer on two processes, with no call of this library."""

from typing import Any

import pytest

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")
pytest.importorskip("peft")

import torch  # noqa: E402  # after the packages that may be missing
from launch import Seen, run_processes  # noqa: E402
from oracle import assert_same_bits, rows_that_differ  # noqa: E402
from tiny_language_models import NEW_ROWS  # noqa: E402
from trainer_worker import CASES, SHARDED  # noqa: E402

TABLES = ("embed_tokens.weight", "lm_head.weight")

pytestmark = pytest.mark.skipif(
    not torch.distributed.is_available(), reason="this torch was built without torch.distributed"
)


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> Seen:
    """What each of one process and of two saw, for each case."""
    return run_processes(tmp_path_factory, "trainer_worker", 1, 2)[1]


@pytest.mark.parametrize("case", CASES)
def test_ranks_end_alike_where_one_process_does(case: str, seen: Seen) -> None:
    (alone,), ranks = seen[1][case], seen[2][case]
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
def test_no_process_makes_a_gradient_of_the_size_of_a_table(case: str, seen: Seen) -> None:
    for rank in seen[2][case]:
        assert rank["like_tables"] == []
        names = [name for name in rank["before"] if name.endswith(TABLES)]
        assert set(names) <= set(rank["ignored"])


@pytest.mark.parametrize("case", SHARDED)
def test_rows_that_fsdp2_shards_end_where_one_process_does_and_resume(
    case: str, seen: Seen
) -> None:
    (alone,), ranks = seen[1][case], seen[2][case]
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


def test_a_checkpoint_of_rows_alone_is_refused_where_fsdp2_shards_them(seen: Seen) -> None:
    for said in seen[2]["refused"]:
        assert "checkpoint='rows' with fsdp. Leave checkpoint out" in said
