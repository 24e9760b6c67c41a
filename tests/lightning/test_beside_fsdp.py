"""FSDP2 shards a model, in Lightning and Fabric: its tables learn what they learn under DDP."""

from typing import Any

import pytest

pytest.importorskip("pytorch_lightning", reason="these tests run in the Lightning environment")

import torch
from beside_fsdp_worker import CASES, EPOCHS, SAVED_AT
from once import ON_TWO_RANKS, run_ranks, seen_by_ranks
from small_runs import BATCHES, STAGES, rows_that_differ, same_bits, starting_table

pytestmark = ON_TWO_RANKS
ALL = [*CASES, "fabric"]
SAVED = [("whole", True), ("split", False)]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    """What each of the two ranks saw, for each case."""
    resumed = [f"resumed-{kind}-{distributed}" for kind, distributed in SAVED]
    return seen_by_ranks(run_ranks(tmp_path_factory, "beside_fsdp_worker"), [*ALL, *resumed])


@pytest.mark.parametrize("case", ALL)
def test_ranks_hold_the_same_bits_and_frozen_rows_those_of_before(
    case: str, ranks: dict[str, list[dict[str, Any]]]
) -> None:
    zero, one = ranks[case]
    assert len(zero["weights"]) == len(one["weights"]) == EPOCHS * BATCHES
    before, rows = starting_table(), STAGES[0]
    for i, (a, b) in enumerate(zip(zero["weights"], one["weights"], strict=True)):
        assert all(same_bits(a[name], b[name]) for name in a)
        rows = STAGES.get(i // BATCHES, rows)
        after = a["words.weight"]
        assert set(rows_that_differ(before, after)) <= set(rows)
        before = after
    assert set(rows_that_differ(starting_table(), before)) == set().union(*STAGES.values())
    assert zero["reports"] == [0] * (3 if case != "fabric" else 0)


@pytest.mark.parametrize(
    ("case", "other"),
    [
        ("whole", "ddp"),
        ("split", "ddp"),
        ("fabric", "ddp"),
        ("whole clipped", "ddp clipped"),
        ("split clipped", "ddp clipped"),
    ],
)
def test_weights_are_those_of_a_run_under_ddp(
    case: str, other: str, ranks: dict[str, list[dict[str, Any]]]
) -> None:
    for found, wanted in zip(ranks[case][0]["weights"], ranks[other][0]["weights"], strict=True):
        for name in wanted:
            torch.testing.assert_close(found[name], wanted[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("kind", "distributed"), SAVED)
def test_a_run_that_is_resumed_ends_as_the_one_that_was_not_stopped(
    kind: str, distributed: bool, ranks: dict[str, list[dict[str, Any]]]
) -> None:
    for rank in ranks[f"resumed-{kind}-{distributed}"]:
        assert len(rank["resumed"]) == EPOCHS * BATCHES - SAVED_AT
        for found, wanted in zip(rank["resumed"], rank["whole"][SAVED_AT:], strict=True):
            assert all(same_bits(found[name], wanted[name]) for name in wanted)
