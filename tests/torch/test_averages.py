"""Several processes, plain loops: tables that DDP ignores learn the same in each, as under DDP."""

from typing import Any

import pytest
import torch
from launch import Seen, run_processes
from processes import FIRST, LATER, STEPS, D, V

BESIDE_DDP = [
    "dense",
    "sparse",
    "sparse_lazy",
    "rowwise_first",
    "dense_accumulated",
    "dense_clipped",
    "sparse_accumulated",
    "sparse_clipped",
    "dense_tied",
    "tied_head_of_rows",
    "untied_sparse_head",
]

pytestmark = pytest.mark.skipif(
    not torch.distributed.is_available(), reason="this torch was built without torch.distributed"
)


@pytest.fixture(scope="module")
def by_number(tmp_path_factory: pytest.TempPathFactory) -> Seen:
    return run_processes(tmp_path_factory, "processes", 2, 3)[1]


@pytest.fixture(scope="module")
def seen(by_number: Seen) -> dict[str, list[Any]]:
    """What each of two processes returned, for each case."""
    return by_number[2]


@pytest.fixture(scope="module")
def seen_by_three(by_number: Seen) -> dict[str, list[Any]]:
    """What each of three processes returned, for each case."""
    return by_number[3]


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("case", [*BESIDE_DDP, "sparse_tied_to_dense"])
def test_processes_hold_the_same_bits_after_each_step(
    case: str, seen: dict[str, list[Any]]
) -> None:
    zero, one = (kept["ours"] if case in BESIDE_DDP else kept for kept in seen[case])
    assert len(zero) == len(one) == STEPS
    assert all(same(a, b) for a, b in zip(zero, one, strict=True))


@pytest.mark.parametrize("case", [*BESIDE_DDP, "sparse_tied_to_dense"])
def test_frozen_rows_keep_their_bits_and_the_others_move(
    case: str, seen: dict[str, list[Any]]
) -> None:
    steps = seen[case][0]["ours"] if case in BESIDE_DDP else seen[case][0]
    for step in range(1, STEPS):
        rows = FIRST if step < STEPS // 2 else LATER
        moved = (steps[step]["table.weight"] != steps[step - 1]["table.weight"]).any(1)
        assert set(moved.nonzero().flatten().tolist()) <= set(rows)
    begun, ended = steps[0]["table.weight"], steps[-1]["table.weight"]
    assert (begun != ended).any(1)[LATER].all()


@pytest.mark.parametrize("case", BESIDE_DDP)
def test_weights_are_those_of_a_run_in_which_ddp_reduces_the_table(
    case: str, seen: dict[str, list[Any]]
) -> None:
    for step, (ours, ddp) in enumerate(zip(*seen[case][0].values(), strict=True)):
        if case in ("dense", "dense_accumulated", "dense_tied", "rowwise_first"):
            assert same(ours, ddp), step
        for name, wanted in ddp.items():
            # DDP sums the entries of a sparse gradient in another order.
            torch.testing.assert_close(ours[name], wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("sparse", [True, False], ids=["sparse", "dense"])
def test_a_process_without_a_gradient_counts_as_zero(
    sparse: bool, seen: dict[str, list[Any]]
) -> None:
    zero, one = seen[f"one_without_{'sparse' if sparse else 'dense'}"]
    assert zero["own"] is None
    assert one["own"].any()
    for process in (zero, one):
        assert torch.equal(process["mean"], one["own"] / 2)
        assert process["sparse"] == sparse
        assert process["moved"]


def test_no_gradient_anywhere_is_none(seen: dict[str, list[Any]]) -> None:
    for process in seen["none_sparse"]:
        assert process["mean"] is None
        assert not process["moved"]


def test_a_sparse_gradient_and_a_dense_one_have_a_dense_mean(seen: dict[str, list[Any]]) -> None:
    zero, one = seen["of_both_kinds"]
    mean = zero["own"] / 2 + one["own"] / 2
    assert not torch.equal(zero["own"], one["own"])
    for process in (zero, one):
        assert torch.equal(process["mean"], mean)
        assert torch.equal(process["twice"], mean)


@pytest.mark.parametrize("case", ["same_ids", "other_ids"])
def test_three_processes_gather_rows_or_reduce_them_whichever_sends_less(
    case: str, seen_by_three: dict[str, list[Any]]
) -> None:
    processes = seen_by_three[case]
    mean = sum(process["own"] / 3 for process in processes)
    for process in processes:
        assert torch.equal(process["mean"], processes[0]["mean"])
        torch.testing.assert_close(process["mean"], mean)
        assert process["last"] == ("all_reduce" if case.endswith("same_ids") else "all_gather")


def test_processes_outside_of_the_group_have_no_part(seen_by_three: dict[str, list[Any]]) -> None:
    zero, one, two = seen_by_three["in_a_group"]
    for a, b, c in zip(zero["seen"], one["seen"], two["seen"], strict=True):
        assert same(b, c)
        for name in ("table.weight", "hidden.weight"):
            assert not torch.equal(a[name], b[name])
    frozen = [row for row in range(V) if row not in {*FIRST, *LATER}]
    for process, begun in ((zero, zero), (one, one), (two, one)):
        ended = process["seen"][-1]["table.weight"]
        assert torch.equal(ended[frozen], begun["own"]["table.weight"][frozen])


def test_tables_of_several_kinds_are_averaged_together(seen: dict[str, list[Any]]) -> None:
    zero, one = seen["several_tables"]
    for i, (a, b) in enumerate(zip(zero["own"], one["own"], strict=True)):
        for process in (zero, one):
            assert torch.equal(process["mean"][i], a / 2 + b / 2), i
    # One header; what is dense, in one; slots and rows of what is sparse, by dtype.
    for process in (zero, one):
        assert process["calls"] == ["all_gather", "all_reduce", *["all_gather"] * 4]


@pytest.mark.parametrize("case", ["begun_apart", "begun_apart_rowwise_first"])
def test_all_processes_begin_with_the_rows_of_the_first(
    case: str, seen: dict[str, list[Any]]
) -> None:
    zero, one = seen[case]
    assert not same(zero["own"], one["own"])
    assert same(zero["after"], zero["own"])
    assert same(one["after"], zero["own"])


@pytest.mark.parametrize("case", ["scaled_sparse", "scaled_dense"])
def test_a_gradient_that_overflows_in_one_process_is_skipped_by_all(
    case: str, seen: dict[str, list[Any]]
) -> None:
    zero, one = seen[case]
    assert all(same(a, b) for a, b in zip(zero, one, strict=True))
    begun, skipped, stepped, _ = zero
    assert same(begun, skipped)
    assert not same(skipped, stepped)
    assert stepped["table.weight"].isfinite().all()


def test_bytes_follow_the_rows_and_not_the_table(seen: dict[str, list[Any]]) -> None:
    for process in seen["traffic"]:
        for key, sent in process.items():
            kind, rows, trainable, ids = key.split()
            assert sent == process[f"{kind} 1000 {trainable} {ids}"], rows
            # A header of 32 bytes; where sparse the touched slots, as int32, and their rows.
            row = 4 * D
            per_row = {"sparse": int(ids) * (row + 4), "dense": int(trainable) * row}
            assert sent == 32 + per_row[kind]


def test_ddp_has_no_bucket_for_an_ignored_table(seen: dict[str, list[Any]]) -> None:
    for process in seen["buckets"]:
        assert process["ours"] == 4 * (D * D + D)
        assert process["ddp"] == process["ours"] + 4 * 1_000 * D


@pytest.mark.parametrize("case", ["deepcopy", "pickle", "copied", "wrapped_again"])
def test_copies_of_a_wrapper_and_of_a_model_average_their_own_tables(
    case: str, seen: dict[str, list[Any]]
) -> None:
    zero, one = seen[case]
    assert all(same(a, b) for a, b in zip(zero["seen"], one["seen"], strict=True))
    for process in (zero, one):
        kept = ["hidden.bias"] if case.startswith(("copied", "wrapped")) else process["kept"]
        assert process["kept"] == kept == ["hidden.bias"]
        assert set(process["ignored"]) >= {"table.weight"}


def test_one_table_stays_with_ddp_where_nothing_else_trains(seen: dict[str, list[Any]]) -> None:
    for process in seen["tables_alone"]:
        assert process == {
            "root": [],
            "frozen": [],
            "ignored": ["1.bias", "1.weight"],
            "head": ["head.weight"],
        }


def test_what_ddp_averaged_by_itself_is_not_averaged_again(seen: dict[str, list[Any]]) -> None:
    for process in seen["averaged_by_itself"]:
        assert (process["calls"], process["same"]) == (1, True)  # which asks whether any is new
        assert "all processes train the same rows of 'table'" in process["refused"]


def test_a_step_beside_ddp_makes_no_tensor_of_the_size_of_a_table(
    seen: dict[str, list[Any]],
) -> None:
    for process in seen["largest_tensor"]:
        assert 0 < process <= 2 * 1_000  # the scores of a batch, with V = 1,000 and D = 4


# Refused


@pytest.mark.parametrize("case", ["other_rows", "other_order"])
def test_processes_that_train_different_rows_stop_together(
    case: str, seen: dict[str, list[Any]]
) -> None:
    zero, one = seen[case]
    assert zero == one
    assert "all processes train the same rows of 'tables.0'" in zero
    assert "in process 1 than in process 0" in zero


def test_tables_of_other_shapes_are_refused_before_anything_is_sent(
    seen: dict[str, list[Any]],
) -> None:
    zero, one = seen["other_shapes"]
    assert zero == one
    assert "(30, 4, 'torch.float32')} in process 0 and" in zero
    assert "(31, 4, 'torch.float32')} in process 1. Build the same vocabulary in each." in zero


def test_uneven_inputs_are_refused(seen: dict[str, list[Any]]) -> None:
    for process in seen["within_join"]:
        assert r"Received a pass within DistributedDataParallel.join()" in process


def test_max_norm_is_refused_among_several_processes(seen: dict[str, list[Any]]) -> None:
    for process in seen["with_max_norm"]:
        assert "Received it for 'tables.0'. Leave it out, or use one process." in process


@pytest.mark.parametrize(
    "case",
    [
        "never_averaged",
        "averaged_before_more",
        "averaged_in_a_skipped_step",
        "averaged_in_the_last_step",
    ],
)
def test_a_step_on_gradients_that_were_not_averaged_is_refused(
    case: str, seen: dict[str, list[Any]]
) -> None:
    for process in seen[case]:
        assert "Call average_gradients(optimizer) after backward" in process
