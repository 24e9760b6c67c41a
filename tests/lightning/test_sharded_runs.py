"""A model is sharded over two processes, in Lightning and Fabric: its tables learn as in one."""

import pytest
import torch
from launch import all_same, in_processes, same
from oracle import rows_that_differ
from sharded_runs import CASES, RATE, ROWS, SAVED, SAVED_AT, batch_of, ranks, saved_ranks
from small_runs import (
    BATCHES,
    EPOCHS,
    STAGES,
    Scored,
    V,
    starting_table,
    weights_of,
)

Weights = dict[str, torch.Tensor]

STEPS = EPOCHS * BATCHES
BY_EPOCH = [*CASES, "fabric"]


def assert_close(found: Weights, wanted: Weights) -> None:
    for name in wanted:
        torch.testing.assert_close(found[name], wanted[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("case", BY_EPOCH)
@in_processes(2)
def test_ranks_hold_the_same_bits_and_frozen_rows_those_of_before(case: str) -> None:
    zero, one = ranks(case)
    assert len(zero["weights"]) == len(one["weights"]) == STEPS
    before, rows = starting_table(), STAGES[0]
    for i, (a, b) in enumerate(zip(zero["weights"], one["weights"], strict=True)):
        assert same(a, b)
        rows = STAGES.get(i // BATCHES, rows)
        after = a["words.weight"]
        assert set(rows_that_differ(before, after)) <= set(rows)
        before = after
    assert set(rows_that_differ(starting_table(), before)) == set().union(*STAGES.values())
    assert zero["reports"] == [0] * (3 if case != "fabric" else 0)


@pytest.mark.parametrize("case", [case for case in BY_EPOCH if not case.startswith("ddp")])
@in_processes(2)
def test_weights_are_those_of_a_run_under_ddp(case: str) -> None:
    under_ddp = "ddp clipped" if case.endswith("clipped") else "ddp"
    for found, wanted in zip(
        ranks(case)[0]["weights"], ranks(under_ddp)[0]["weights"], strict=True
    ):
        assert_close(found, wanted)


@pytest.mark.parametrize("case", SAVED)
@in_processes(2)
def test_a_run_that_is_resumed_ends_bit_for_bit_as_the_one_that_was_not_stopped(case: str) -> None:
    for rank in saved_ranks(case):
        whole, resumed = rank["whole"]["seen"][SAVED_AT:], rank["resumed"]["seen"]
        assert len(resumed) == STEPS - SAVED_AT
        assert all_same(whole, resumed)
        assert rank["whole"]["rows"].tolist() == rank["resumed"]["rows"].tolist() == ROWS[8]


def alone(processes: int) -> list[Weights]:
    """The weights after each step of one process that has the batches of all."""
    net, seen = Scored().build(), []
    (optimizer,) = net.configure_optimizers()
    for step in range(STEPS):
        for table in (net.words, net.scores) if step in ROWS else ():
            table.set_trainable_rows(ROWS[step], **(RATE if step == 3 else {}))
        optimizer.zero_grad()
        for rank in range(processes):
            (net.loss(batch_of(step, rank)) / processes).backward()
        optimizer.step()
        seen.append(weights_of(net))
    return seen


@pytest.mark.parametrize("case", ["sharded in a folder", "sharded in a file"])
@in_processes(2)
def test_a_sharded_run_ends_bit_for_bit_as_one_process_does(case: str) -> None:
    for rank in saved_ranks(case):
        assert all_same(rank["whole"]["seen"], alone(2))


@in_processes(2)
def test_tensor_parallelism_follows_the_schedule() -> None:
    for rank in saved_ranks("parallel in a folder"):
        before, trainable = weights_of(Scored().build()), ROWS[0]
        for step, now in enumerate(rank["whole"]["seen"]):
            trainable = ROWS.get(step, trainable)
            for name in ("words.weight", "scores.weight"):
                assert rows_that_differ(now[name], before[name]) == trainable
            before = now
        assert_close(before, alone(1)[-1])


@pytest.mark.parametrize("case", [case for case in SAVED if case.startswith("sharded")])
@in_processes(2)
def test_the_audit_counts_the_frozen_rows_of_all_processes(case: str) -> None:
    frozen = [V - len(rows) for rows in ROWS.values()]
    for rank in saved_ranks(case):
        for table in ("words", "scores"):
            own = [found[1:] for found in rank["whole"]["audit"] if found[0] == table]
            assert own == [(number, 0) for number in frozen]


@pytest.mark.parametrize("case", SAVED)
@in_processes(2)
def test_the_monitor_measures_rows_of_all_processes(case: str) -> None:
    first, other = (rank["whole"]["record"] for rank in saved_ranks(case))
    assert other is None
    moved = {int(row["token"].split()[-1]) for row in first["tables"]["words"]["moved"]}
    assert moved == set().union(*ROWS.values())
