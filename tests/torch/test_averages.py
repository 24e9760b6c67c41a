"""What is averaged of tables that DDP leaves to us: what is sent, when, and what is refused."""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
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

V, STEPS = 30, 6
FIRST, LATER = [3, 4, 9, 20], [2, 3, 9, 20, 21]


def net(sparse: bool = True, head: str = "none", num_rows: int = V) -> Net:
    """Another one in each process."""
    return Net(head, FIRST, num_rows, seed=dist.get_rank(), sparse=sparse)


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return rowwise(torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.2), model)


def batch(step: int) -> Tensor:
    made = torch.Generator().manual_seed(100 * step + dist.get_rank())
    return torch.randint(V, (16,), generator=made)


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def train(model: Net, group: Any) -> list[dict[str, Tensor]]:
    """The weights after each step, of which the rows change in the middle."""
    ddp, optimizer = DistributedDataParallel(model, process_group=group), adamw(model)
    seen = []
    for step in range(STEPS):
        if step == STEPS // 2:
            model.table.set_trainable_rows(LATER)
        optimizer.zero_grad()
        ddp(batch(step)).backward()
        optimizer.step()
        seen.append(weights(model))
    return seen


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
    table.alive = [DistributedDataParallel(model)]  # a list, so that it is no module of its own
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
    steps = train(model, pair if rank else single)
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
    wrapper, optimizer = DistributedDataParallel(model), adamw(model)
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
    assert same(weights(DistributedDataParallel(model).module), zero)


@pytest.mark.parametrize("sparse", [True, False], ids=["sparse", "dense"])
@in_processes(2)
def test_a_gradient_that_overflows_in_one_process_is_skipped_by_all(sparse: bool) -> None:
    model = net(sparse)
    ddp, optimizer = DistributedDataParallel(model), adamw(model)
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
    ddp = DistributedDataParallel(net(sparse=False, num_rows=1_000))
    in_buckets = ddp._get_ddp_logging_data()["total_parameter_size_bytes"]
    assert in_buckets == 4 * (D * D + D)  # of the hidden layer


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
    again = COPIES[how](DistributedDataParallel(model))
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
        return sorted(DistributedDataParallel(model).parameters_to_ignore)

    def followed() -> nn.Sequential:
        return nn.Sequential(PartialEmbedding(V, D, trainable_rows=FIRST), nn.Linear(D, D))

    table = PartialEmbedding(V, D, trainable_rows=FIRST)
    ddp, optimizer = DistributedDataParallel(table), adamw(table)
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
    ddp, optimizer = DistributedDataParallel(model), adamw(model)
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
    ddp, optimizer = DistributedDataParallel(model), adamw(model)

    made = MadeTensors()
    for step in range(2):  # DDP makes its buckets anew after a first one
        optimizer.zero_grad()
        with made:
            ddp(batch(step)[:2]).backward()
            optimizer.step()
    assert 0 < made.largest <= 2 * 1_000  # the scores of a batch, with V = 1,000 and D = 4


# Refused


def averaged_with(first: list[int], later: list[int]) -> None:
    table, optimizer = one_table(trainable=first)
    table.unfreeze_rows(later)
    table(torch.arange(V)).sum().backward()
    average_gradients(optimizer)


def joined_by_ddp() -> None:
    ddp = DistributedDataParallel(net())
    with ddp.join():
        ddp(batch(0))


SAME_ROWS = r"all processes train the same rows of 'tables.0'.*in process 1 than in process 0"
# What is done in a process, by its number.
REFUSED: dict[str, tuple[Callable[[int], object], str]] = {
    "other_rows": (lambda rank: averaged_with([1 + rank], [7]), SAME_ROWS),
    "rows_in_another_order": (lambda rank: averaged_with([2 - rank], [1 + rank]), SAME_ROWS),
    "other_shapes": (
        lambda rank: one_table(V + rank, trainable=[1]),
        r"\(30, 4, 'torch.float32'\)} in process 0 and .*"
        r"\(31, 4, 'torch.float32'\)} in process 1. Build the same vocabulary in each.",
    ),
    "uneven_inputs": (
        lambda rank: joined_by_ddp(),
        r"Received a pass within DistributedDataParallel.join\(\)",
    ),
    "max_norm": (
        lambda rank: one_table(max_norm=1.0),
        "Received it for 'tables.0'. Leave it out, or use one process.",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
@in_processes(2)
def test_what_would_part_processes_is_refused_by_all_in_the_same_words(case: str) -> None:
    act, rule = REFUSED[case]
    with pytest.raises(InputError, match=rule) as refused:
        act(dist.get_rank())
    assert len(set(of_all(str(refused.value)))) == 1


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
