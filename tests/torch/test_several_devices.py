"""Tables among several processes learn what one process does that has the batches of all."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from device_nets import (
    ALWAYS_FROZEN,
    OPTIMIZERS,
    ROWS,
    SAVED_AT,
    STEPS,
    D,
    Net,
    V,
    alone,
    batch,
    joined,
    load,
    moments,
    replayed,
    set_rows,
    snapshot,
)
from device_processes import CASES
from launch import Seen, run_processes

from partial_embedding import InputError
from partial_embedding.torch import keep_whole, rowwise

pytestmark = pytest.mark.skipif(
    not torch.distributed.is_available(), reason="this torch was built without torch.distributed"
)

TRAINED = [
    (number, name)
    for number in (2, 3)
    for name in CASES[number]
    if name.startswith(("whole ", "split "))
]


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Seen]:
    return run_processes(tmp_path_factory, "device_processes", 2, 3)


@pytest.fixture(scope="module")
def folder(ended: tuple[Path, Seen]) -> Path:
    """Where two processes have saved what others read."""
    return ended[0]


@pytest.fixture(scope="module")
def seen(ended: tuple[Path, Seen]) -> Seen:
    """What each of 2 and of 3 processes returned, for each case."""
    return ended[1]


def options_of(case: str) -> tuple[str, str, dict[str, Any]]:
    _, name, head, *others = case.split()
    options = {
        "accumulate": 2 if "accumulated" in others else 1,
        "max_norm": 0.05 if "clipped" in others else None,
        "lazy": "lazy" in others,
    }
    return name, head, options


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize(("number", "case"), TRAINED)
def test_all_processes_hold_the_same_bits_and_frozen_rows_those_of_before(
    number: int, case: str, seen: Seen
) -> None:
    first, *others = [process["rows"] for process in seen[number][case]]
    assert len(first) == STEPS
    for other in others:
        assert all(same(a, b) for a, b in zip(first, other, strict=True))
    before, rows = snapshot(Net(options_of(case)[1])), ROWS[0]
    for step, after in enumerate(first):
        rows = ROWS.get(step, rows)
        for name in after:
            moved = (after[name] != before[name]).view(len(after[name]), -1).any(1)
            assert set(moved.nonzero().flatten().tolist()) <= set(rows), (step, name)
        before = after
    begun = snapshot(Net(options_of(case)[1]))
    for name, ended in first[-1].items():
        assert torch.equal(ended[ALWAYS_FROZEN], begun[name][ALWAYS_FROZEN])
        assert not torch.equal(ended[ROWS[0]], begun[name][ROWS[0]])


@pytest.mark.parametrize(("number", "case"), TRAINED)
def test_the_rows_are_those_of_one_process_with_the_gradients_of_all(
    number: int, case: str, seen: Seen
) -> None:
    (name, head, options), first = options_of(case), seen[number][case][0]
    steps = zip(
        first["rows"], replayed(name, head, first["gradients"], options["lazy"]), strict=True
    )
    for step, (found, wanted) in enumerate(steps):
        assert same(found, wanted), step


@pytest.mark.parametrize(("number", "case"), TRAINED)
def test_the_rows_are_those_of_one_process_with_the_batches_of_all(
    number: int, case: str, seen: Seen
) -> None:
    (name, head, options), first = options_of(case), seen[number][case][0]
    # Two processes divide by two, which is exact, in which order ever; three do not, nor does the
    # norm of a sum of squares in another order. A tied gradient is summed in another order.
    exact = number == 2 and options["max_norm"] is None and head != "tied"
    if case.startswith("split"):
        del options["accumulate"]
        exact = exact and head == "none"  # a head sums what comes of each batch by itself
        reference = joined(name, head, number, **options)
    else:
        reference = alone(name, head, number, **options)
    steps = zip(first["rows"], reference, strict=True)
    for step, (found, (wanted, norm)) in enumerate(steps):
        if norm is not None:
            assert first["norms"][step] == pytest.approx(norm, rel=1e-5)
        for which in wanted:
            if exact:
                assert torch.equal(found[which], wanted[which]), (step, which)
            torch.testing.assert_close(found[which], wanted[which], rtol=1e-4, atol=1e-5)


# Refused, and what becomes of faults


def test_keep_whole_needs_processes_and_tables() -> None:
    with pytest.raises(InputError, match=r"Call torch.distributed.init_process_group first"):
        keep_whole(Net())


MESSAGES = {
    "other_rows": r"all processes train the same rows of 'table'.* in process 1 than in process 0",
    "never_averaged": r"Call average_gradients\(optimizer\) after backward",
    "sharded_first": r"Call keep_whole\(model\) first",
    "on_meta": "Received 'table' on the meta device",
    "with_max_norm": "max_norm scales the rows",
    "looked_up_wrongly": r"ids lie in \[0, 31\). Received others in process 1",
    "split_with_other_rows": "all processes train the same rows of a table",
}


@pytest.mark.parametrize("case", MESSAGES)
def test_what_would_part_processes_is_refused_by_all(case: str, seen: Seen) -> None:
    for message in seen[2][case]:
        assert re.search(MESSAGES[case], message)


@pytest.mark.parametrize("case", ["too_few_batches", "a_process_dies"])
def test_a_process_that_does_not_step_ends_the_others_with_an_error(case: str, seen: Seen) -> None:
    stopped = seen[3][case][:2]
    assert len(stopped) == 2
    for error, *notes in stopped:
        assert error != "nothing failed"
        assert "made fewer steps" in "".join(notes)


def test_what_processes_do_together_waits_for_a_while_and_names_who_did_not_come(
    seen: Seen,
) -> None:
    zero, one = seen[2]["called_by_one"]
    assert "in process 0, for which 0.2 s long process 1 did not come" in zero["alone"]
    for process in (zero, one):  # later all come, and what one did alone is forgotten
        assert process["rows"] == len(ROWS[0])


WAYS = {
    "head": "ColwiseParallel and loss_parallel",
    "tied": "tied to a head, which needs all of them",
    "bags": "for bags look rows up and reduce them",
    "twice": "Call split_rows before fully_shard",
    "max_norm": "max_norm looks at all that is looked up",
    "other size": "all processes have the same tables",
}


@pytest.mark.parametrize("way", WAYS)
def test_what_cannot_be_split_is_refused_with_what_can(way: str, seen: Seen) -> None:
    for process in seen[2]["split_in_other_ways"]:
        assert WAYS[way] in process[way]


# What else is split


def test_a_split_table_of_which_all_rows_train_is_stepped_by_a_plain_optimizer(seen: Seen) -> None:
    touched = torch.cat([batch(0, 0), batch(0, 1)]).unique()
    for process in seen[2]["split_of_all_rows"]:
        assert process["is_plain"]
        moved = process["rows"].any(1).nonzero().flatten()
        assert torch.equal(moved, touched)


def test_a_table_is_split_before_it_has_rows(seen: Seen) -> None:
    processes = seen[2]["split_on_meta"]
    assert [process["local"] for process in processes] == [16, 15]
    assert [process["held"] for process in processes] == [16 * 4 * D, 15 * 4 * D]
    for process in processes:
        assert process["padding"] == [0.0] * D
        assert process["moved"] == [1, 29]
        # As `torch.func` calls it, with a weight that is whole.
        assert torch.equal(process["given"], torch.eye(V, D))


def test_ddp_leaves_a_split_table_alone(seen: Seen) -> None:
    zero, one = seen[2]["split_beside_ddp"]
    assert zero["ignored"] == ["head.weight", "table.weight"]
    assert all(same(a, b) for a, b in zip(zero["rows"], one["rows"], strict=True))
    for found, (wanted, _) in zip(zero["rows"], joined("AdamW", "untied", 2), strict=True):
        assert torch.equal(found["table"], wanted["table"])


def test_rows_of_a_split_table_are_written_by_one_and_read_by_all(seen: Seen) -> None:
    rows = ROWS[max(ROWS)]
    begun = snapshot(Net())["table"]
    for process in seen[2]["row_files"]:
        trained = process["trained"]["table"]
        assert process["written"] == {"table.weight": rows}
        assert torch.equal(process["alone"]["table"][rows], trained[rows])
        others = [row for row in range(V) if row not in rows]
        assert torch.equal(process["alone"]["table"][others], begun[others])
        torch.testing.assert_close(process["again"], process["alone"]["table"])
        assert "rows of two files are not the same ones" in process["refused"]


def test_what_is_kept_whole_comes_in_the_order_of_the_model(seen: Seen) -> None:
    for process in seen[2]["many_in_order"]:
        assert process == list(range(40))


def test_what_is_sent_for_a_split_table_follows_the_ids_and_not_the_table(seen: Seen) -> None:
    for process in seen[2]["split_traffic"]:
        for ids in (40, 50):
            # A header of 32 bytes; ids, rows, and whether each trains; gradients of those, a half.
            wanted = 32 + ids * (8 + 4 * D + 1) + ids // 2 * 4 * D
            assert process[f"1000 {ids}"] == process[f"100000 {ids}"] == wanted


# Checkpoints


@pytest.mark.parametrize("number", [2, 3])
def test_what_two_processes_saved_is_read_by_as_many_and_by_more(number: int, seen: Seen) -> None:
    saved = seen[2]["saved"][0]
    for process in seen[number]["read"]:
        assert same(process["rows"], saved["rows"])
        assert same(process["moments"], saved["moments"])
        if number == 2:
            pairs = zip(process["later"], saved["later"], strict=True)
            assert all(same(a, b) for a, b in pairs)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_what_two_processes_saved_is_read_by_one(seen: Seen, folder: Path) -> None:
    net, saved = Net("untied"), seen[2]["saved"][0]
    set_rows(net, max(step for step in ROWS if step < SAVED_AT))
    optimizer = rowwise(OPTIMIZERS["AdamW"](net.parameters()), net)
    load(net, optimizer, folder / "checkpoint")
    assert same(snapshot(net), saved["rows"])
    assert same(moments(net, optimizer), saved["moments"])
