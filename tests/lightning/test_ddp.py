"""Two processes: ranks hold the same bits after every batch, and frozen rows keep theirs."""

import re
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("pytorch_lightning", reason="these tests run in the Lightning environment")

import torch
from ddp_worker import CASES
from once import ON_TWO_RANKS, run_ranks, seen_by_ranks
from small_runs import (
    BATCHES,
    STAGES,
    Net,
    Reference,
    Witness,
    assert_frozen_rows_kept_their_bits,
    same_bits,
    starting_table,
)

STAGES_OF = {
    **dict.fromkeys(CASES, STAGES),
    "none_first": {0: (), 1: (5,)},
    "failing": {0: STAGES[0]},  # the second run has no callback
}
# The reference has an untied head, steps all rows, and begins with some.
AS_ONE = ["sparse", "dense", "accumulate", "clipped", "built_in_setup", "prepared_early"]

pytestmark = ON_TWO_RANKS


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where both ranks left what they saw."""
    return run_ranks(tmp_path_factory, "ddp_worker")


@pytest.fixture(scope="module")
def ranks(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """What each of the two ranks saw, for each case."""
    said = "\n".join((folder / f"{rank}.log").read_text() for rank in range(2))
    # Lines are printed once, and not by each rank.
    assert said.count("audit: words") == len(CASES)
    return seen_by_ranks(folder, CASES)


@pytest.mark.parametrize("case", CASES)
def test_ranks_hold_the_same_bits_after_every_batch(
    case: str, ranks: dict[str, list[dict[str, Any]]]
) -> None:
    zero, one = ranks[case]
    assert zero["epochs"] == one["epochs"]
    assert len(zero["weights"]) == len(one["weights"]) == 4 * BATCHES
    for a, b in zip(zero["weights"], one["weights"], strict=True):
        assert a.keys() == b.keys()
        assert all(same_bits(a[name], b[name]) for name in a)
    # They saw different data, so that it is the exchange that keeps them together.
    for (ids, _), (others, _) in zip(zero["batches"], one["batches"], strict=True):
        assert not torch.equal(ids, others)


@pytest.mark.parametrize("case", CASES)
def test_frozen_rows_keep_their_bits_on_every_rank(
    case: str, ranks: dict[str, list[dict[str, Any]]]
) -> None:
    for rank in ranks[case]:
        witness = Witness()
        witness.seen, witness.epochs = rank["weights"], rank["epochs"]
        stages = STAGES_OF[case]
        assert_frozen_rows_kept_their_bits(witness, starting_table(), stages=stages)
        frozen = [(12 - len(rows), 0) for rows in stages.values()]
        assert rank["reports"] == frozen


# LBFGS remembers the loss of its own process.
@pytest.mark.parametrize("case", [case for case in CASES if case != "lbfgs"])
def test_ranks_hold_the_same_optimizer_state(
    case: str, ranks: dict[str, list[dict[str, Any]]]
) -> None:
    zero, one = (str(rank["optimizer"]) for rank in ranks[case])
    assert zero == one
    assert "exp_avg" in zero


def test_a_gradient_that_overflows_on_one_rank_is_skipped_by_both(
    ranks: dict[str, list[dict[str, Any]]],
) -> None:
    for rank in ranks["overflowing"]:
        seen = [weights["words.weight"] for weights in rank["weights"]]
        skipped = [i for i in range(1, len(seen)) if torch.equal(seen[i - 1], seen[i])]
        assert skipped == [4]


@pytest.mark.parametrize("case", CASES)
def test_ddp_is_not_given_the_tables_with_the_callback_and_without(
    case: str, ranks: dict[str, list[dict[str, Any]]]
) -> None:
    ignored = {
        "untied": ["scores.weight", "words.weight"],
        "two_tables": ["tags.weight", "words.weight"],
        "own_names": ["head.bias", "words.weight"],
    }
    for rank in ranks[case]:
        assert rank["ignored"] == ignored.get(case, ["words.weight"])
        assert rank["ignored_later"] == (["head.bias"] if case == "own_names" else [])


def test_tables_are_averaged_once_for_each_step(ranks: dict[str, list[dict[str, Any]]]) -> None:
    steps = 4 * BATCHES
    for rank in range(2):
        counts = {case: ranks[case][rank]["averaged"] for case in CASES}
        assert counts["sparse"] == counts["manual"] == [1] * steps
        assert counts["two_tables"] == [1] * (2 * steps)  # by hand, for each optimizer
        assert counts["untied"] == [2] * steps
        assert counts["accumulate"] == [1] * (4 * 2)  # of three batches the last one is alone


def test_a_run_of_two_processes_is_recorded_once(ranks: dict[str, Any], folder: Path) -> None:
    assert ranks["monitored"]
    assert (folder / "monitored" / "version_0" / "rows.json").exists()


@pytest.mark.parametrize("case", AS_ONE)
def test_two_processes_train_rows_as_one_with_both_batches(
    case: str, ranks: dict[str, list[dict[str, Any]]]
) -> None:
    zero, one = ranks[case]
    options = CASES[case].get("trainer", {})
    accumulate = options.get("accumulate_grad_batches", 1)
    max_norm = options.get("gradient_clip_val", 1e9)
    reference = Reference(Net().build(), {"words": STAGES})
    for i, seen in enumerate(zero["weights"]):
        epoch, index = divmod(i, BATCHES)
        if index == 0:
            reference.begin_epoch(epoch)
        for rank in (zero, one):
            reference.backward(rank["batches"][i], scale=lambda loss: loss / (2 * accumulate))
        if (index + 1) % accumulate == 0 or index + 1 == BATCHES:
            torch.nn.utils.clip_grad_norm_(reference.parameters(), max_norm)
            reference.step()
        # Ranks sum what each of them summed: the order differs.
        for name, wanted in reference.weights().items():
            torch.testing.assert_close(seen[name], wanted, rtol=1e-4, atol=1e-5)


# Processes that would part


DISAGREE = {
    "metrics": r"same metrics\. Received: \{'val_loss': 1\.0\} .*\{'val_loss': 1\.5\}.*sync_dist",
    "a_metric_of_one": r"same metrics\. Received: \{\} in process 0 and \{'also': 10\.0\}",
    "metrics_in_sync": "nothing",
    "first_rows": r"same rows of 'words'\. Received: 2 rows \(\w+\) .* 2 rows \(\w+\).*vocabulary",
    "rows_of_a_later_part": r"same rows of 'words'\. Received: 6 rows .* 6 rows",
}


@pytest.mark.parametrize("case", DISAGREE)
def test_processes_that_would_train_different_rows_stop_together(
    case: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = run_ranks(tmp_path_factory, "disagree_worker")
    zero, one = ((folder / f"{case}-{rank}").read_text() for rank in range(2))
    assert zero == one
    assert re.fullmatch(f".*{DISAGREE[case]}.*", zero)
