"""Several processes, plain loops: tables that DDP ignores learn the same in each, as under DDP."""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from device_nets import D, Net
from launch import all_same, in_processes, of_all, same
from made_tensors import MadeTensors
from oracle import through_a_file
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn.parallel import DistributedDataParallel

from partial_embedding import InputError
from partial_embedding.torch import PartialEmbedding, average_gradients, rowwise
from partial_embedding.torch.row_gradient import RowGradient
from partial_embedding.torch.table import PartialTable

V, STEPS = 30, 6
FIRST, LATER = [3, 4, 9, 20], [2, 3, 9, 20, 21]


def net(sparse: bool = True, head: str = "none", num_rows: int = V) -> Net:
    """Another one in each process."""
    return Net(head, FIRST, num_rows, seed=dist.get_rank(), sparse=sparse)


def adamw(model: nn.Module, lazy: bool = False) -> torch.optim.Optimizer:
    made = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.2)
    return rowwise(made, model, lazy=lazy)


def wrapped(model: nn.Module, ours: bool = True, group: Any = None) -> nn.Module:
    """A model in DDP, which reduces all of it if it does not know the tables."""
    hooks = torch.nn.modules.module._global_module_registration_hooks
    known = dict(hooks)
    if not ours:
        hooks.clear()
        for module in model.modules():
            if isinstance(module, PartialTable):
                module.leave_to_ddp()
    try:
        return DistributedDataParallel(model, process_group=group)
    finally:
        hooks.update(known)


def batch(step: int) -> Tensor:
    made = torch.Generator().manual_seed(100 * step + dist.get_rank())
    return torch.randint(V, (16,), generator=made)


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def train(
    model: Net,
    ours: bool,
    lazy: bool = False,
    accumulate: int = 1,
    max_norm: float | None = None,
    rowwise_first: bool = False,
    group: Any = None,
) -> list[dict[str, Tensor]]:
    """The weights after each step, of which the rows change in the middle."""
    if rowwise_first:
        optimizer, ddp = adamw(model, lazy), wrapped(model, ours, group)
    else:
        ddp, optimizer = wrapped(model, ours, group), adamw(model, lazy)
    seen = []
    for step in range(STEPS):
        if step == STEPS // 2:
            model.table.set_trainable_rows(LATER)
        optimizer.zero_grad()
        for part in range(accumulate):
            with nullcontext() if part + 1 == accumulate else ddp.no_sync():
                ddp(batch(accumulate * step + part)).backward()
        if max_norm is not None:
            torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm)
        optimizer.step()
        seen.append(weights(model))
    return seen


# How a model is built and trained.
BESIDE_DDP: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "dense": ({"sparse": False}, {}),
    "sparse": ({}, {}),
    "sparse_lazy": ({}, {"lazy": True}),
    "rowwise_first": ({"sparse": False}, {"rowwise_first": True}),
    "dense_accumulated": ({"sparse": False}, {"accumulate": 3}),
    "dense_clipped": ({"sparse": False}, {"max_norm": 0.01}),
    "sparse_accumulated": ({}, {"accumulate": 3}),
    "sparse_clipped": ({}, {"max_norm": 0.01}),
    "dense_tied": ({"sparse": False, "head": "tied_dense"}, {}),
    "dense_tied_accumulated": ({"sparse": False, "head": "tied_dense"}, {"accumulate": 3}),
    "sparse_tied_to_dense": ({"head": "tied_dense"}, {}),
    "tied_head_of_rows": ({"head": "tied_rows"}, {}),
    "untied_sparse_head": ({"head": "untied"}, {}),
}
# DDP sums the entries of a sparse gradient in another order.
EXACT = ("dense", "dense_accumulated", "dense_tied", "dense_tied_accumulated", "rowwise_first")


@pytest.mark.parametrize("case", BESIDE_DDP)
@in_processes(2)
def test_processes_hold_the_same_bits_and_train_rows_as_where_ddp_reduces_the_table(
    case: str,
) -> None:
    build, options = BESIDE_DDP[case]
    steps = train(net(**build), ours=True, **options)
    zero, one = of_all(steps)
    assert all_same(zero, one)
    for step in range(1, STEPS):
        rows = FIRST if step < STEPS // 2 else LATER
        moved = (steps[step]["table.weight"] != steps[step - 1]["table.weight"]).any(1)
        assert set(moved.nonzero().flatten().tolist()) <= set(rows)
    begun, ended = steps[0]["table.weight"], steps[-1]["table.weight"]
    assert (begun != ended).any(1)[LATER].all()
    if case == "sparse_tied_to_dense":
        return  # which DDP itself cannot reduce
    by_ddp = train(net(**build), ours=False, **options)
    for step, (ours, ddp) in enumerate(zip(steps, by_ddp, strict=True)):
        if case in EXACT:
            assert same(ours, ddp), step
        for name, wanted in ddp.items():
            torch.testing.assert_close(ours[name], wanted, rtol=1e-4, atol=1e-5)


class Tables(nn.Module):
    """Tables, and a parameter that stays with DDP."""

    def __init__(self, *tables: PartialEmbedding) -> None:
        super().__init__()
        self.tables = nn.ModuleList(tables)
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, ids: Tensor) -> Tensor:
        return self.scale * sum(table(ids).square().sum() for table in self.tables)


def one_table(
    rows: int = V, trainable: Any = FIRST, **options: Any
) -> tuple[PartialEmbedding, torch.optim.Optimizer]:
    model = Tables(PartialEmbedding(rows, D, trainable_rows=trainable, **options))
    table = model.tables[0]
    table.alive = [wrapped(model)]  # a list, so that it is no module of its own
    return table, adamw(model)


@contextmanager
def counting() -> Iterator[list[tuple[str, int]]]:
    """The calls to the process group, and the bytes that each one gives it."""
    calls: list[tuple[str, int]] = []

    def counted(call: Any, which: int) -> Any:
        def wrapper(*arguments: Any, group: Any) -> Any:
            calls.append((call.__name__, arguments[which].nbytes))
            return call(*arguments, group=group)

        return wrapper

    before = dist.all_reduce, dist.all_gather
    dist.all_reduce, dist.all_gather = counted(before[0], 0), counted(before[1], 1)
    try:
        yield calls
    finally:
        dist.all_reduce, dist.all_gather = before


@pytest.mark.parametrize("sparse", [True, False], ids=["sparse", "dense"])
@in_processes(2)
def test_a_process_without_a_gradient_counts_as_zero(sparse: bool) -> None:
    table, optimizer = one_table(sparse=sparse)
    if dist.get_rank() == 1:
        table(batch(0)).square().sum().backward()
    own = table.weight.grad
    zero, one = of_all(None if own is None else own.to_dense().clone())
    assert zero is None
    assert one.any()
    average_gradients(optimizer)
    assert torch.equal(table.weight.grad.to_dense(), one / 2)
    assert isinstance(table.weight.grad, RowGradient) == sparse
    before = table.weight.detach().clone()
    optimizer.step()
    assert not torch.equal(before, table.weight)


@in_processes(2)
def test_no_gradient_anywhere_is_none() -> None:
    table, optimizer = one_table()
    average_gradients(optimizer)
    before = table.weight.detach().clone()
    optimizer.step()
    assert table.weight.grad is None
    assert torch.equal(before, table.weight)


@in_processes(2)
def test_a_sparse_gradient_and_a_dense_one_have_a_dense_mean() -> None:
    table, optimizer = one_table(sparse=dist.get_rank() == 0)
    table(batch(0)).square().sum().backward()
    zero, one = of_all(table.weight.grad.to_dense().clone())
    assert not torch.equal(zero, one)
    for _ in range(2):
        average_gradients(optimizer)
        assert torch.equal(table.weight.grad, zero / 2 + one / 2)


@pytest.mark.parametrize("ids", ["same", "other"])
@in_processes(3)
def test_three_processes_gather_rows_or_reduce_them_whichever_sends_less(ids: str) -> None:
    table, optimizer = one_table(trainable=range(20))
    rank = dist.get_rank()
    mine = [3, 1, 3, 19, 25] if ids == "same" else [3, *range(7 * rank, 5 * rank + 5)]
    ((2 + rank) * table(torch.tensor(mine)).square()).sum().backward()
    mean = sum(own / 3 for own in of_all(table.weight.grad.to_dense().clone()))
    with counting() as calls:
        average_gradients(optimizer)
    assert calls[-1][0] == ("all_reduce" if ids == "same" else "all_gather")
    found = of_all(table.weight.grad.to_dense())
    assert all(torch.equal(one, found[0]) for one in found)
    torch.testing.assert_close(found[0], mean)


@in_processes(3)
def test_processes_outside_of_the_group_have_no_part() -> None:
    single, pair = dist.new_group([0]), dist.new_group([1, 2])
    model, rank = net(), dist.get_rank()
    own = of_all(weights(model)["table.weight"])
    steps = train(model, True, group=pair if rank else single)
    for a, b, c in zip(*of_all(steps), strict=True):
        assert same(b, c)
        for name in ("table.weight", "hidden.weight"):
            assert not torch.equal(a[name], b[name])
    frozen = [row for row in range(V) if row not in {*FIRST, *LATER}]
    begun = own[min(rank, 1)]  # that of the first of each group
    assert torch.equal(steps[-1]["table.weight"][frozen], begun[frozen])


@in_processes(2)
def test_tables_of_several_kinds_are_averaged_together() -> None:
    kinds = [
        {"sparse": True, "trainable_rows": [3, 4]},
        {"sparse": False, "trainable_rows": [0, 7]},
        {"sparse": True, "trainable_rows": range(20)},
        {"sparse": False},  # all rows, where they are
        {"sparse": True, "dtype": torch.float64},
        {"sparse": False, "trainable_rows": [9]},
        {"sparse": True, "trainable_rows": [29]},  # which no batch touches
    ]
    model = Tables(*(PartialEmbedding(V, D, **kind) for kind in kinds))
    model.tables[2].unfreeze_rows([25, 2])
    wrapper, optimizer = wrapped(model), adamw(model)
    with wrapper.no_sync():
        wrapper(batch(0) % 29).backward()
    zero, one = of_all([table.weight.grad.to_dense().clone() for table in model.tables])
    with counting() as calls:
        average_gradients(optimizer)
    for table, a, b in zip(model.tables, zero, one, strict=True):
        assert torch.equal(table.weight.grad.to_dense(), a / 2 + b / 2)
    # One header; what is dense, in one; slots and rows of what is sparse, by dtype.
    assert [name for name, _ in calls] == ["all_gather", "all_reduce", *["all_gather"] * 4]


@pytest.mark.parametrize("first", ["wrapper", "rowwise"])
@in_processes(2)
def test_all_processes_begin_with_the_rows_of_the_first(first: str) -> None:
    torch.manual_seed(dist.get_rank())
    model = Tables(PartialEmbedding(V, D, trainable_rows=FIRST))
    zero, one = of_all(weights(model))
    assert not same(zero, one)
    if first == "rowwise":
        adamw(model)
    assert same(weights(wrapped(model).module), zero)


@pytest.mark.parametrize("sparse", [True, False], ids=["sparse", "dense"])
@in_processes(2)
def test_a_gradient_that_overflows_in_one_process_is_skipped_by_all(sparse: bool) -> None:
    model = net(sparse)
    ddp, optimizer = wrapped(model), adamw(model)
    scaler, seen = torch.amp.GradScaler("cpu", init_scale=4.0), [weights(model)]
    for step in range(3):
        optimizer.zero_grad()
        loss = ddp(torch.tensor([FIRST[0], 1]))
        if step == 0 and dist.get_rank() == 1:
            # Of the table alone, so that only what is averaged tells the other process.
            loss = loss + model.table(torch.tensor(FIRST)).sum() * float("inf")
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        seen.append(weights(model))
    zero, one = of_all(seen)
    assert all_same(zero, one)
    begun, skipped, stepped, _ = seen
    assert same(begun, skipped)
    assert not same(skipped, stepped)
    assert stepped["table.weight"].isfinite().all()


@pytest.mark.parametrize("ids", [10, 50])
@pytest.mark.parametrize("trainable", [100, 800])
@pytest.mark.parametrize("sparse", [True, False], ids=["sparse", "dense"])
@in_processes(2)
def test_bytes_follow_the_rows_and_not_the_table(sparse: bool, trainable: int, ids: int) -> None:
    for rows in (1_000, 100_000):
        table, optimizer = one_table(rows, range(trainable), sparse=sparse)
        table(torch.arange(ids)).square().sum().backward()
        with counting() as calls:
            average_gradients(optimizer)
        # A header of 32 bytes; where sparse the touched slots, as int32, and their rows.
        row = 4 * D
        wanted = ids * (row + 4) if sparse else trainable * row
        assert sum(size for _, size in calls) == 32 + wanted, rows


@in_processes(2)
def test_ddp_has_no_bucket_for_an_ignored_table() -> None:
    ours, ddp = (
        wrapped(net(sparse=False, num_rows=1_000), is_ours)._get_ddp_logging_data()[
            "total_parameter_size_bytes"
        ]
        for is_ours in (True, False)
    )
    assert ours == 4 * (D * D + D)
    assert ddp == ours + 4 * 1_000 * D


COPIES: dict[str, Callable[[nn.Module], nn.Module]] = {
    "deepcopy": copy.deepcopy,
    "pickle": through_a_file,
    "copied": lambda wrapper: DistributedDataParallel(copy.deepcopy(wrapper.module)),
    "wrapped_again": lambda wrapper: DistributedDataParallel(wrapper.module),
}


@pytest.mark.parametrize("how", COPIES)
@in_processes(2)
def test_copies_of_a_wrapper_and_of_a_model_average_their_own_tables(how: str) -> None:
    model = net(sparse=False)
    model._ddp_params_and_buffers_to_ignore = ["hidden.bias"]
    again = COPIES[how](wrapped(model))
    assert model._ddp_params_and_buffers_to_ignore == ["hidden.bias"]
    assert set(again.parameters_to_ignore) >= {"table.weight"}
    copied, seen = again.module, []
    optimizer = adamw(copied)
    with torch.no_grad():
        copied.hidden.bias.zero_()
    copied.hidden.bias.requires_grad_(False)  # which DDP ignores in all of these
    for step in range(2):
        optimizer.zero_grad()
        again(batch(step)).backward()
        optimizer.step()
        seen.append(weights(copied))
    zero, one = of_all(seen)
    assert all_same(zero, one)


@in_processes(2)
def test_one_table_stays_with_ddp_where_nothing_else_trains() -> None:
    def ignored(model: nn.Module) -> list[str]:
        return sorted(wrapped(model).parameters_to_ignore)

    def followed() -> nn.Sequential:
        return nn.Sequential(PartialEmbedding(V, D, trainable_rows=FIRST), nn.Linear(D, D))

    table = PartialEmbedding(V, D, trainable_rows=FIRST)
    ddp, optimizer = wrapped(table), adamw(table)
    assert sorted(ddp.parameters_to_ignore) == []
    ddp(batch(0)).square().sum().backward()
    optimizer.step()
    zero, one = of_all(weights(table))
    assert same(zero, one)
    frozen, left_out, head = followed(), followed(), net(head="untied")
    frozen[1].requires_grad_(False)
    assert ignored(frozen) == []
    left_out._ddp_params_and_buffers_to_ignore = ["1.weight", "1.bias"]
    assert ignored(left_out) == ["1.bias", "1.weight"]
    head.hidden.requires_grad_(False)
    head.head.bias.requires_grad_(False)
    assert ignored(head) == ["head.weight"]


@in_processes(2)
def test_what_ddp_averaged_by_itself_is_not_averaged_again() -> None:
    model = net()
    ddp, optimizer = wrapped(model), adamw(model)
    ddp(batch(0)).backward()
    mean = model.table.weight.grad.to_dense().clone()
    with counting() as calls:
        average_gradients(optimizer)
    assert len(calls) == 1  # which asks whether any is new
    assert torch.equal(mean, model.table.weight.grad.to_dense())
    model.table.set_trainable_rows([1 + dist.get_rank()])
    model.zero_grad()
    other = ddp(torch.arange(V))
    with pytest.raises(InputError, match="all processes train the same rows of 'table'"):
        other.backward()


@in_processes(2)
def test_a_step_beside_ddp_makes_no_tensor_of_the_size_of_a_table() -> None:
    model = net(head="untied", num_rows=1_000)
    ddp, optimizer = wrapped(model), adamw(model)

    made = MadeTensors()
    for step in range(2):  # DDP makes its buckets anew after a first one
        optimizer.zero_grad()
        with made:
            ddp(batch(step)[:2]).backward()
            optimizer.step()
    assert 0 < made.largest <= 2 * 1_000  # the scores of a batch, with V = 1,000 and D = 4


# Refused


@pytest.mark.parametrize("differ", ["rows", "order"])
@in_processes(2)
def test_processes_that_train_different_rows_stop_together(differ: str) -> None:
    one = dist.get_rank() == 1
    first, later = ([1 + one], [7]) if differ == "rows" else ([1 + (not one)], [1 + one])
    table, optimizer = one_table(trainable=first)
    table.unfreeze_rows(later)
    table(torch.arange(V)).sum().backward()
    rule = r"all processes train the same rows of 'tables.0'.*in process 1 than in process 0"
    with pytest.raises(InputError, match=rule) as refused:
        average_gradients(optimizer)
    assert len(set(of_all(str(refused.value)))) == 1


@in_processes(2)
def test_tables_of_other_shapes_are_refused_before_anything_is_sent() -> None:
    rule = (
        r"\(30, 4, 'torch.float32'\)} in process 0 and .*"
        r"\(31, 4, 'torch.float32'\)} in process 1. Build the same vocabulary in each."
    )
    with pytest.raises(InputError, match=rule) as refused:
        one_table(V + dist.get_rank(), trainable=[1])
    assert len(set(of_all(str(refused.value)))) == 1


@in_processes(2)
def test_uneven_inputs_are_refused() -> None:
    ddp = wrapped(net())
    rule = r"Received a pass within DistributedDataParallel.join\(\)"
    with ddp.join(), pytest.raises(InputError, match=rule):
        ddp(batch(0))


@in_processes(2)
def test_max_norm_is_refused_among_several_processes() -> None:
    rule = "Received it for 'tables.0'. Leave it out, or use one process."
    with pytest.raises(InputError, match=rule):
        one_table(max_norm=1.0)


@pytest.mark.parametrize("how", ["never", "before_more", "in_a_skipped_step", "in_the_last_step"])
@in_processes(2)
def test_a_step_on_gradients_that_were_not_averaged_is_refused(how: str) -> None:
    table, optimizer = one_table()
    if how != "never":
        table(batch(0)).sum().backward()
        average_gradients(optimizer)
        if how == "in_the_last_step":
            optimizer.step()
        if how != "before_more":
            optimizer.zero_grad()
    table(batch(1)).sum().backward()
    rule = r"Call average_gradients\(optimizer\) after backward"
    with pytest.raises(InputError, match=rule):
        optimizer.step()
