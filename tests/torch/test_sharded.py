"""Tables that processes share by rows learn as one process does that has all of their batches."""

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from launch import Seen, run_processes
from sharded_worker import (
    MATRIX,
    OPTIMIZERS,
    REFUSED,
    ROWS,
    STEPS,
    STOCK,
    D,
    Net,
    V,
    batch,
    checkpoints,
    named,
    weights,
)

IN_MATRIX = pytest.mark.parametrize(
    ("optimizer", "rows", "tied"), MATRIX, ids=[named(*one) for one in MATRIX]
)
Weights = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> Seen:
    """What each of so many processes returned for each case; two save what the others read."""
    return run_processes(tmp_path_factory, "sharded_worker", 2, 1, 3, 4)[1]


def same(a: Weights, b: Weights) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def alone(
    optimizer: str,
    rows: str,
    tied: bool,
    gradients: Callable[[Net, int], None],
) -> list[Weights]:
    """The weights after each step of one process, in which nothing is sharded."""
    model = Net(tied, ROWS[rows][0])
    # Two uses of one weight are summed in another order where they are sparse.
    model.table.sparse = model.head.sparse = not tied
    made = OPTIMIZERS[optimizer](model.parameters())
    seen = [weights(model)]
    for step in range(STEPS):
        if step in ROWS[rows]:
            model.set_rows(ROWS[rows][step])
        made.zero_grad()
        gradients(model, step)
        made.step()
        seen.append(weights(model))
    return seen


def of_batches(processes: int, share: int | None = None) -> Callable[[Net, int], None]:
    def backward(model: Net, step: int) -> None:
        for rank in range(processes):
            (model(batch(step, rank)) / (share or processes)).backward()

    return backward


def recorded(gradients: list[Weights]) -> Callable[[Net, int], None]:
    def put(model: Net, step: int) -> None:
        for name, parameter in model.named_parameters():
            parameter.grad = gradients[step][name].clone()

    return put


def check_what_moved(seen: list[Weights], rows: str) -> None:
    trainable: list[int] = []
    for step in range(STEPS):
        trainable = ROWS[rows].get(step, trainable)
        for name in {"table.weight", "head.weight", "head.bias"} & seen[0].keys():
            now, before = seen[step + 1][name], seen[step][name]
            moved = (now != before).view(V, -1).any(1).nonzero().flatten().tolist()
            assert set(moved) <= set(trainable)
            assert moved


@IN_MATRIX
def test_fsdp_learns_bit_for_bit_as_one_process_on_the_joined_batch(
    optimizer: str, rows: str, tied: bool, seen: Seen
) -> None:
    wanted = alone(optimizer, rows, tied, of_batches(2))
    for process in seen[2][f"fsdp-{named(optimizer, rows, tied)}"]:
        check_what_moved(process["seen"], rows)
        assert all(same(a, b) for a, b in zip(process["seen"], wanted, strict=True))
        assert process["trainable"].tolist() == ROWS[rows][max(ROWS[rows])]


@IN_MATRIX
def test_tensor_parallelism_steps_what_it_is_given_exactly(
    optimizer: str, rows: str, tied: bool, seen: Seen
) -> None:
    # The features' gradient is a sum over the scores of all processes, in another order.
    near = alone(optimizer, rows, tied, of_batches(1))
    for process in seen[2][f"tp-{named(optimizer, rows, tied)}"]:
        check_what_moved(process["seen"], rows)
        replayed = alone(optimizer, rows, tied, recorded(process["gradients"]))
        assert all(same(a, b) for a, b in zip(process["seen"], replayed, strict=True))
        for name, value in near[-1].items():
            torch.testing.assert_close(process["seen"][-1][name], value, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("optimizer", STOCK)
def test_three_processes_step_what_they_are_given_exactly(
    optimizer: str, tied: bool, seen: Seen
) -> None:
    # A third of each gradient is rounded, and the sum of three depends on its order.
    near = alone(optimizer, "late", tied, of_batches(3))
    for process in seen[3][f"fsdp-{named(optimizer, 'late', tied)}"]:
        check_what_moved(process["seen"], "late")
        replayed = alone(optimizer, "late", tied, recorded(process["gradients"]))
        assert all(same(a, b) for a, b in zip(process["seen"], replayed, strict=True))
        for name, value in near[-1].items():
            torch.testing.assert_close(process["seen"][-1][name], value, rtol=1e-4, atol=1e-5)


@IN_MATRIX
def test_fsdp_over_tensor_parallelism_steps_what_it_is_given_exactly(
    optimizer: str, rows: str, tied: bool, seen: Seen
) -> None:
    first, *others = seen[4][named(optimizer, rows, tied)]
    check_what_moved(first["seen"], rows)
    replayed = alone(optimizer, rows, tied, recorded(first["gradients"]))
    for process in (first, *others):
        assert all(same(a, b) for a, b in zip(process["seen"], replayed, strict=True))
    for name, value in alone(optimizer, rows, tied, of_batches(2))[-1].items():
        torch.testing.assert_close(first["seen"][-1][name], value, rtol=1e-4, atol=1e-5)


def test_a_fused_optimizer_steps_shards(seen: Seen) -> None:
    wanted = alone("adamw_fused", "late", True, of_batches(2))
    for process in seen[2]["fused"]:
        assert all(same(a, b) for a, b in zip(process["seen"], wanted, strict=True))


def test_torch_clips_shards_by_the_norm_of_all_of_them(
    seen: Seen,
) -> None:
    norms: list[torch.Tensor] = []

    def clipped(model: Net, step: int) -> None:
        of_batches(2)(model, step)
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), 0.01))

    alone("adamw_foreach", "late", False, clipped)
    for process in seen[2]["foreach_clipped"]:
        torch.testing.assert_close(process["norms"], norms)
        replayed = alone("adamw_foreach", "late", False, recorded(process["gradients"]))
        assert all(same(a, b) for a, b in zip(process["seen"], replayed, strict=True))


@pytest.mark.parametrize(
    "way",
    ["look_between", "accumulated", "bf16", "both", "copies", "meta", "double", "tied_double"],
)
def test_only_trainable_rows_move_however_a_model_is_sharded(way: str, seen: Seen) -> None:
    for process in seen[2]["other_ways"]:
        assert process[way] == [1, 7]


def test_rows_that_are_frozen_later_keep_the_state_that_torch_made(
    seen: Seen,
) -> None:
    for process in seen[2]["plain_start"]:
        model = Net(False)
        made = OPTIMIZERS["adamw"](model.parameters())
        for step, wanted in enumerate(process["seen"][1:]):
            if step == 2:
                model.set_rows([1, 7, 9])
            recorded(process["gradients"])(model, step)
            made.step()
            assert same(weights(model), wanted)


def test_a_process_may_have_no_row_at_all(seen: Seen) -> None:
    for process in seen[3]["fewer_rows"]:
        moved = (process["weight"] != 1).any(1)
        assert moved.tolist() == [False, True]
        assert process["sizes"] == {
            "step": torch.Size([1]),
            "exp_avg": torch.Size([1, D]),
            "exp_avg_sq": torch.Size([1, D]),
        }


def test_the_audit_of_all_processes_tells_of_a_row_that_one_of_them_moved(
    seen: Seen,
) -> None:
    for said in seen[2]["audited"]:
        assert said.startswith(f"words: 1 frozen row changed by step 3: {V - 1}.")


MESSAGES = {
    "columns": r"by rows, Shard\(0\)\. Received a weight of the shape \(11, 4\).*S.*1.*Rowwise",
    "columns_of_fsdp": r"by rows, Shard\(0\)\. Received .*shard_placement_fn",
    "frozen_after_columns": r"by rows, Shard\(0\)\.",
    "max_norm": r"max_norm=1\.0 in a PartialEmbedding whose weight is sharded\. Leave it out",
    "muon": r"moves each row by itself.* Received Muon\.",
    "adafactor": r"moves each row by itself.* Received Adafactor\.",
    "lbfgs": r"moves each row by itself.* Received LBFGS\.",
    "sparse_adam": r"dense gradient\. Received SparseAdam\.",
    "zero_redundancy": r"Received ZeroRedundancyOptimizer, .* AdamW\(whole\)",
    "fsdp1_with_original_parameters": r"a vector of \d+ numbers .*ignored_states=keep_whole",
    "fsdp1": r"whose weight FSDP1 has made a part of .*ignored_states=keep_whole",
}


@pytest.mark.parametrize("refused", REFUSED)
def test_what_cannot_be_kept_exact_on_shards_is_refused_before_a_row_moves(
    refused: str, seen: Seen
) -> None:
    for process in seen[2]["refusals"]:
        assert re.search(MESSAGES[refused], process[refused])


def test_a_table_that_fsdp1_has_flattened_keeps_no_other_from_its_steps(
    seen: Seen,
) -> None:
    assert seen[2]["beside_flat_tables"] == [[1, 7], [1, 7]]


# Checkpoints


def gathered(processes: list[Any], at: str) -> dict[str, Any]:
    """What processes remember of each cohort, put together by row."""
    together: dict[str, Any] = {}
    for table, cohorts in processes[0][at]["cohorts"].items():
        for number in cohorts:
            parts = [process[at]["cohorts"][table][number] for process in processes]
            rows = torch.cat([part["rows"] for part in parts])
            together[f"{table} {number}"] = {
                key: torch.cat([part[key] for part in parts])
                if isinstance(value, torch.Tensor) and value.dim()
                else value
                for key, value in parts[0].items()
            } | {"rows": rows}
    return together


def check_same_memory(a: list[Any], at: str, b: list[Any], then: str) -> None:
    for process in (*a, *b):
        assert same((process.get(at) or process[then])["weights"], a[0][at]["weights"])
    one, other = gathered(a, at), gathered(b, then)
    assert one.keys() == other.keys()
    assert len(one) == 6  # two cohorts of the table, of the head's weight and of its bias
    for cohort, state in one.items():
        for key, value in state.items():
            wanted = other[cohort][key]
            equal = torch.equal(value, wanted) if torch.is_tensor(value) else value == wanted
            assert equal, (cohort, key)


CHECKPOINTS = ["-".join(map(str, one)) for one in checkpoints()]


@pytest.mark.parametrize("checkpoint", CHECKPOINTS)
def test_saving_leaves_a_run_as_it_was(checkpoint: str, seen: Seen) -> None:
    saved = [process[checkpoint] for process in seen[2]["save"]]
    check_same_memory(saved, "before", saved, "after")


@pytest.mark.parametrize("number", [1, 2, 3])
@pytest.mark.parametrize("checkpoint", CHECKPOINTS)
def test_what_two_processes_saved_is_read_by_any_number_bit_for_bit(
    checkpoint: str, number: int, seen: Seen
) -> None:
    saved = [process[checkpoint] for process in seen[2]["save"]]
    read = [process[checkpoint] for process in seen[number]["resume"]]
    check_same_memory(saved, "before", read, "restored")
    if number == 2:
        check_same_memory(saved, "end", read, "end")
