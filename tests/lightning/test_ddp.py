"""Two processes: ranks hold the same bits after every batch, and frozen rows keep theirs."""

import pytest
import torch
from ddp_runs import CASES, ranks
from launch import all_same, in_processes, shared_folder
from oracle import differences
from small_runs import (
    BATCHES,
    STAGES,
    Net,
    Reference,
    Witness,
    assert_frozen_rows_kept_their_bits,
    starting_table,
)

STAGES_OF = {
    **dict.fromkeys(CASES, STAGES),
    "none_first": {0: (), 1: (5,)},
    "failing": {0: STAGES[0]},  # the second run has no callback
}
# The reference has an untied head, steps all rows, and begins with some.
AS_ONE = ["sparse", "dense", "accumulate", "clipped", "built_in_setup", "prepared_early"]


@pytest.mark.parametrize("case", CASES)
@in_processes(2)
def test_ranks_hold_the_same_bits_after_every_batch(case: str) -> None:
    zero, one = ranks(case)
    assert zero["epochs"] == one["epochs"]
    assert len(zero["weights"]) == len(one["weights"]) == 4 * BATCHES
    assert all_same(zero["weights"], one["weights"])
    # They saw different data, so that it is the exchange that keeps them together.
    for (ids, _), (others, _) in zip(zero["batches"], one["batches"], strict=True):
        assert not torch.equal(ids, others)


@pytest.mark.parametrize("case", CASES)
@in_processes(2)
def test_frozen_rows_keep_their_bits_on_every_rank(case: str) -> None:
    for rank in ranks(case):
        witness = Witness()
        witness.seen, witness.epochs = rank["weights"], rank["epochs"]
        stages = STAGES_OF[case]
        assert_frozen_rows_kept_their_bits(witness, starting_table(), stages=stages)
        frozen = [(12 - len(rows), 0) for rows in stages.values()]
        assert rank["reports"] == frozen


# LBFGS remembers the loss of its own process.
@pytest.mark.parametrize("case", [case for case in CASES if case != "lbfgs"])
@in_processes(2)
def test_ranks_hold_the_same_optimizer_state(case: str) -> None:
    zero, one = (rank["optimizer"] for rank in ranks(case))
    assert differences(zero, one) == []
    assert "exp_avg" in str(zero)


@in_processes(2)
def test_a_gradient_that_overflows_on_one_rank_is_skipped_by_both() -> None:
    for rank in ranks("overflowing"):
        seen = [weights["words.weight"] for weights in rank["weights"]]
        skipped = [i for i in range(1, len(seen)) if torch.equal(seen[i - 1], seen[i])]
        assert skipped == [4]


@pytest.mark.parametrize("case", CASES)
@in_processes(2)
def test_ddp_is_not_given_the_tables_with_the_callback_and_without(case: str) -> None:
    ignored = {
        "untied": ["scores.weight", "words.weight"],
        "two_tables": ["tags.weight", "words.weight"],
        "own_names": ["head.bias", "words.weight"],
    }
    for rank in ranks(case):
        assert rank["ignored"] == ignored.get(case, ["words.weight"])
        assert rank["ignored_later"] == (["head.bias"] if case == "own_names" else [])


@in_processes(2)
def test_tables_are_averaged_once_for_each_step() -> None:
    counts = {
        "sparse": [1] * 4 * BATCHES,
        "manual": [1] * 4 * BATCHES,
        "two_tables": [1] * (2 * 4 * BATCHES),  # by hand, for each optimizer
        "untied": [2] * 4 * BATCHES,
        "accumulate": [1] * (4 * 2),  # of three batches the last one is alone
    }
    for case, wanted in counts.items():
        assert [rank["averaged"] for rank in ranks(case)] == [wanted] * 2


@pytest.mark.parametrize("case", CASES)
@in_processes(2)
def test_lines_are_printed_once_and_not_by_each_rank(case: str) -> None:
    zero, one = ranks(case)
    assert zero["said"].count("audit: words") == 1
    assert "audit" not in one["said"]


@in_processes(2)
def test_a_run_of_two_processes_is_recorded_once() -> None:
    assert ranks("monitored")
    assert (shared_folder() / "monitored" / "version_0" / "rows.json").exists()


@pytest.mark.parametrize("case", AS_ONE)
@in_processes(2)
def test_two_processes_train_rows_as_one_with_both_batches(case: str) -> None:
    zero, one = ranks(case)
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
