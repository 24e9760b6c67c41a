"""Lightning shards a model over two processes: its tables follow their schedule as in one."""

from typing import Any

import pytest

pytest.importorskip("pytorch_lightning", reason="these tests run in the Lightning environment")

import torch
from once import ON_TWO_RANKS, run_ranks, seen_by_ranks
from sharded_runs_worker import SAVED_AT, STEPS, Inner, V, loss_of, optimizer_of

ROWS = {0: [1, 7, 9], 3: [0, 1, 5, 7, 9], 7: [0, 5, 9, 10]}
KINDS = pytest.mark.parametrize("kind", ["folder", "file"])

pytestmark = ON_TWO_RANKS


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    """What each process saw, of runs that went through and of those that went on from a save."""
    folder = run_ranks(tmp_path_factory, "sharded_runs_worker")
    names = ["folder-False", "folder-True", "file-False", "file-True", "tensor"]
    return seen_by_ranks(folder, names)


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def alone(processes: int) -> list[dict[str, torch.Tensor]]:
    """The weights after each step of one process that has the batches of all."""
    inner, seen = Inner(), []
    optimizer = optimizer_of(inner.parameters())
    for table in (inner.table, inner.head):
        table.set_trainable_rows("none")
    for step in range(STEPS):
        for table in (inner.table, inner.head) if step in ROWS else ():
            rate = {"lr_scale": 0.5, "warmup_steps": 3} if step == 3 else {}
            table.set_trainable_rows(ROWS[step], **rate)
        optimizer.zero_grad()
        for rank in range(processes):
            (loss_of(inner, step, rank) / processes).backward()
        optimizer.step()
        seen.append({name: p.detach().clone() for name, p in inner.named_parameters()})
    return seen


def test_a_sharded_run_ends_bit_for_bit_as_one_process_does(
    runs: dict[str, list[dict[str, Any]]],
) -> None:
    wanted = alone(2)
    for process in runs["folder-False"] + runs["file-False"]:
        assert all(same(a, b) for a, b in zip(process["seen"], wanted, strict=True))
        assert process["rows"].tolist() == ROWS[7]


def test_tensor_parallelism_follows_the_schedule(runs: dict[str, list[dict[str, Any]]]) -> None:
    trainable: list[int] = []
    before = {name: p.detach() for name, p in Inner().named_parameters()}
    for process in runs["tensor"]:
        for step, now in enumerate(process["seen"]):
            trainable = ROWS.get(step, trainable)
            last = process["seen"][step - 1] if step else before
            for name in ("table.weight", "head.weight"):
                moved = (now[name] != last[name]).any(1).nonzero().flatten().tolist()
                assert moved == trainable
        for name, value in alone(1)[-1].items():
            torch.testing.assert_close(process["seen"][-1][name], value, rtol=1e-4, atol=1e-5)


@KINDS
def test_a_run_that_is_resumed_ends_bit_for_bit_as_the_uninterrupted_one(
    kind: str, runs: dict[str, list[dict[str, Any]]]
) -> None:
    for whole, resumed in zip(runs[f"{kind}-False"], runs[f"{kind}-True"], strict=True):
        assert len(resumed["seen"]) == STEPS - SAVED_AT
        went_on = zip(whole["seen"][SAVED_AT:], resumed["seen"], strict=True)
        assert all(same(a, b) for a, b in went_on)
        assert resumed["rows"].tolist() == ROWS[7]


def test_the_audit_counts_the_frozen_rows_of_all_processes(
    runs: dict[str, list[dict[str, Any]]],
) -> None:
    for process in runs["folder-False"]:
        frozen = [V - len(rows) for rows in ROWS.values()]
        for table in ("inner.table", "inner.head"):
            own = [found[1:] for found in process["audit"] if found[0] == table]
            assert own == [(number, 0) for number in frozen]


def test_the_monitor_measures_rows_of_all_processes(
    runs: dict[str, list[dict[str, Any]]],
) -> None:
    first, other = runs["folder-False"]
    assert other["record"] is None
    track = first["record"]["tables"]["inner.table"]
    assert {int(row["token"].split()[-1]) for row in track["moved"]} == {0, 1, 5, 7, 9, 10}
