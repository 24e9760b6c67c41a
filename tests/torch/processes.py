"""Cases of plain loops on two processes or more, for `test_averages.py`."""

import copy
import io
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from partial_embedding import InputError
from partial_embedding.torch import (
    PartialEmbedding,
    PartialLinear,
    average_gradients,
    rowwise,
)
from partial_embedding.torch.row_gradient import RowGradient
from partial_embedding.torch.table import PartialTable

V, D, STEPS = 30, 4, 6
FIRST, LATER = [3, 4, 9, 20], [2, 3, 9, 20, 21]


class Net(nn.Module):
    """A table, a hidden layer, and a head of any kind; each process makes other ones."""

    def __init__(self, sparse: bool = True, head: str = "none", rows: int = V) -> None:
        super().__init__()
        torch.manual_seed(dist.get_rank())
        self.table = PartialEmbedding(rows, D, sparse=sparse, trainable_rows=FIRST)
        self.hidden = nn.Linear(D, D)
        self.head: nn.Module = nn.Identity()
        if head == "tied_dense":
            self.head = nn.Linear(D, rows, bias=False)
        elif head != "none":
            self.head = PartialLinear(D, rows, bias=head == "untied", trainable_rows=FIRST)
        if head.startswith("tied"):
            self.head.weight = self.table.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.hidden(self.table(ids))).square().mean()


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


def beside_ddp(**options: Any) -> Callable[[], Any]:
    build = {key: options.pop(key) for key in ("sparse", "head") if key in options}
    return lambda: {who: train(Net(**build), who == "ours", **options) for who in ("ours", "ddp")}


def alone(**options: Any) -> Callable[[], Any]:
    """For models that DDP itself cannot reduce."""
    build = {key: options.pop(key) for key in ("sparse", "head") if key in options}
    return lambda: train(Net(**build), ours=True, **options)


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
    wrapper = wrapped(model)
    model.alive = [wrapper]  # a list, so that it is no module of its own
    return model.tables[0], adamw(model)


def without_a_gradient(sparse: bool, ranks: tuple[int, ...]) -> Any:
    """Gradients before and after, where only some processes have one."""
    table, optimizer = one_table(sparse=sparse)
    if dist.get_rank() in ranks:
        table(batch(0)).square().sum().backward()
    own = None if table.weight.grad is None else table.weight.grad.to_dense().clone()
    average_gradients(optimizer)
    mean = table.weight.grad
    before = weights(table)
    optimizer.step()
    return {
        "own": own,
        "mean": None if mean is None else mean.to_dense(),
        "sparse": isinstance(mean, RowGradient),
        "moved": not torch.equal(before["weight"], table.weight),
    }


def of_both_kinds() -> Any:
    table, optimizer = one_table(sparse=dist.get_rank() == 0)
    table(batch(0)).square().sum().backward()
    own = table.weight.grad.to_dense().clone()
    average_gradients(optimizer)
    once = table.weight.grad.clone()
    average_gradients(optimizer)
    return {"own": own, "mean": once, "twice": table.weight.grad}


def several_tables() -> Any:
    """Tables of several kinds: what each had, and the mean."""
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
    own = [table.weight.grad.to_dense().clone() for table in model.tables]
    with counting() as calls:
        average_gradients(optimizer)
    return {
        "own": own,
        "mean": [table.weight.grad.to_dense() for table in model.tables],
        "calls": [name for name, _ in calls],
    }


def begun_apart(first: str) -> Any:
    torch.manual_seed(dist.get_rank())
    model = Tables(PartialEmbedding(V, D, trainable_rows=FIRST))
    own = weights(model)
    if first == "rowwise":
        adamw(model)
    wrapper = wrapped(model)
    return {"own": own, "after": weights(wrapper.module)}


def scaled(sparse: bool) -> Any:
    """One process has a gradient that is not finite in its first step."""
    model = Net(sparse)
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
    return seen


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


def traffic(sparse: bool, rows: int, trainable: int, ids: int) -> int:
    table, optimizer = one_table(rows, range(trainable), sparse=sparse)
    table(torch.arange(ids)).square().sum().backward()
    with counting() as calls:
        average_gradients(optimizer)
    return sum(size for _, size in calls)


def of_many(ids: Callable[[int], list[int]]) -> Any:
    """The gradient of each process, their mean, and how it was made."""
    table, optimizer = one_table(trainable=range(20))
    rank = dist.get_rank()
    ((2 + rank) * table(torch.tensor(ids(rank))).square()).sum().backward()
    own = table.weight.grad.to_dense().clone()
    with counting() as calls:
        average_gradients(optimizer)
    return {"own": own, "mean": table.weight.grad.to_dense(), "last": calls[-1][0]}


def in_a_group() -> Any:
    """The last two of three processes train together, the first one by itself."""
    single, pair = dist.new_group([0]), dist.new_group([1, 2])
    model = Net()
    own = weights(model)
    return {"own": own, "seen": train(model, True, group=pair if dist.get_rank() else single)}


def all_traffic() -> Any:
    return {
        f"{'sparse' if sparse else 'dense'} {rows} {trainable} {ids}": traffic(
            sparse, rows, trainable, ids
        )
        for sparse in (True, False)
        for rows in (1_000, 100_000)
        for trainable in (100, 800)
        for ids in (10, 50)
    }


def buckets() -> Any:
    """How many bytes DDP reduces, with and without the table."""
    return {
        who: wrapped(Net(sparse=False, rows=1_000), who == "ours")._get_ddp_logging_data()[
            "total_parameter_size_bytes"
        ]
        for who in ("ours", "ddp")
    }


def refusal(act: Callable[[], Any]) -> str:
    try:
        act()
    except InputError as error:
        return str(error)
    return "nothing was refused"


def refused(rows: list[int], more: list[int]) -> str:
    table, optimizer = one_table(trainable=rows)
    table.unfreeze_rows(more)
    table(torch.arange(V)).sum().backward()
    return refusal(lambda: average_gradients(optimizer))


def not_averaged(how: str) -> str:
    """A step on gradients of which not all were averaged."""
    table, optimizer = one_table()
    if how != "never":
        table(batch(0)).sum().backward()
        average_gradients(optimizer)
        if how == "after_a_step":
            optimizer.step()
        if how != "before_more":
            optimizer.zero_grad()
    table(batch(1)).sum().backward()
    return refusal(optimizer.step)


def with_max_norm() -> str:
    return refusal(lambda: one_table(max_norm=1.0))


def within_join() -> str:
    ddp = wrapped(Net())
    with ddp.join():
        return refusal(lambda: ddp(batch(0)))


def averaged_by_itself() -> Any:
    """Whether a call changes what is averaged, and what processes that train other rows get."""
    model = Net()
    ddp, optimizer = wrapped(model), adamw(model)
    ddp(batch(0)).backward()
    mean = model.table.weight.grad.to_dense().clone()
    with counting() as calls:
        average_gradients(optimizer)
    same = torch.equal(mean, model.table.weight.grad.to_dense())
    model.table.set_trainable_rows([1 + dist.get_rank()])
    model.zero_grad()
    other = ddp(torch.arange(V))
    return {"calls": len(calls), "same": same, "refused": refusal(other.backward)}


def largest_tensor() -> Any:
    """The most elements of any tensor that a step makes, for an untied head of V rows."""
    model = Net(head="untied", rows=1_000)
    ddp, optimizer = wrapped(model), adamw(model)

    class Sizes(TorchDispatchMode):
        made = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None):
            result = func(*args, **(kwargs or {}))
            for one in tree_leaves(result):
                if not isinstance(one, Tensor) or isinstance(one, RowGradient):
                    continue
                # The weights themselves and their aliases are as large as they are.
                if one.layout == torch.strided and one.data_ptr() not in own:
                    Sizes.made = max(Sizes.made, one.numel())
            return result

    own = {parameter.data_ptr() for parameter in model.parameters()}
    for step in range(2):  # DDP makes its buckets anew after a first one
        optimizer.zero_grad()
        with Sizes():
            ddp(batch(step)[:2]).backward()
            optimizer.step()
    return Sizes.made


def other_shapes() -> str:
    rows = V + dist.get_rank()
    return refusal(lambda: one_table(rows, trainable=[1]))


def copied(how: str) -> Any:
    """A copy of a wrapped model that plain DDP wraps, and what the model keeps."""
    model = Net(sparse=False)
    model._ddp_params_and_buffers_to_ignore = ["hidden.bias"]
    wrapper = wrapped(model)
    if how == "deepcopy":
        again = copy.deepcopy(wrapper)
    elif how == "pickle":
        file = io.BytesIO()
        torch.save(wrapper, file)
        file.seek(0)
        again = torch.load(file, weights_only=False)
    elif how == "of_the_model":
        again = DistributedDataParallel(copy.deepcopy(model))
    else:  # the model itself, once its wrapper is gone
        del wrapper
        again = DistributedDataParallel(model)
    return {
        "ignored": sorted(again.parameters_to_ignore),
        "kept": model._ddp_params_and_buffers_to_ignore,
        "seen": train_by_itself(again, again.module),
    }


def train_by_itself(ddp: nn.Module, model: Net) -> list[dict[str, Tensor]]:
    optimizer, seen = adamw(model), []
    with torch.no_grad():
        model.hidden.bias.zero_()
    model.hidden.bias.requires_grad_(False)  # which DDP ignores in all of these
    for step in range(2):
        optimizer.zero_grad()
        ddp(batch(step)).backward()
        optimizer.step()
        seen.append(weights(model))
    return seen


def tables_alone() -> Any:
    """A model of which nothing is left to DDP: what it ignores, and the weights."""
    table = PartialEmbedding(V, D, trainable_rows=FIRST)
    found = {"root": wrapped(table)}
    model = nn.Sequential(PartialEmbedding(V, D, trainable_rows=FIRST), nn.Linear(D, D))
    model[1].requires_grad_(False)
    found["frozen"] = wrapped(model)
    model = nn.Sequential(PartialEmbedding(V, D, trainable_rows=FIRST), nn.Linear(D, D))
    model._ddp_params_and_buffers_to_ignore = ["1.weight", "1.bias"]
    found["ignored"] = wrapped(model)
    head = Net(head="untied")
    head.hidden.requires_grad_(False)
    head.head.bias.requires_grad_(False)
    found["head"] = wrapped(head)
    return {name: sorted(wrapper.parameters_to_ignore) for name, wrapper in found.items()}


CASES: dict[int, dict[str, Callable[[], Any]]] = {}
CASES[2] = {
    "dense": beside_ddp(sparse=False),
    "sparse": beside_ddp(),
    "sparse_lazy": beside_ddp(lazy=True),
    "rowwise_first": beside_ddp(sparse=False, rowwise_first=True),
    "dense_accumulated": beside_ddp(sparse=False, accumulate=3),
    "dense_clipped": beside_ddp(sparse=False, max_norm=0.01),
    "sparse_accumulated": beside_ddp(accumulate=3),
    "sparse_clipped": beside_ddp(max_norm=0.01),
    "dense_tied": beside_ddp(sparse=False, head="tied_dense"),
    "tied_head_of_rows": beside_ddp(head="tied_rows"),
    "sparse_tied_to_dense": alone(head="tied_dense"),
    "untied_sparse_head": beside_ddp(head="untied"),
    "one_without_sparse": lambda: without_a_gradient(True, (1,)),
    "one_without_dense": lambda: without_a_gradient(False, (1,)),
    "none_sparse": lambda: without_a_gradient(True, ()),
    "of_both_kinds": of_both_kinds,
    "several_tables": several_tables,
    "begun_apart": lambda: begun_apart("wrapper"),
    "begun_apart_rowwise_first": lambda: begun_apart("rowwise"),
    "scaled_sparse": lambda: scaled(True),
    "scaled_dense": lambda: scaled(False),
    "traffic": all_traffic,
    "buckets": buckets,
    "other_rows": lambda: refused([1 + dist.get_rank()], [7]),
    "other_order": lambda: refused(*(([1], [2]) if dist.get_rank() else ([2], [1]))),
    "other_shapes": other_shapes,
    "with_max_norm": with_max_norm,
    "within_join": within_join,
    "averaged_by_itself": averaged_by_itself,
    "largest_tensor": largest_tensor,
    "never_averaged": lambda: not_averaged("never"),
    "averaged_before_more": lambda: not_averaged("before_more"),
    "averaged_in_a_skipped_step": lambda: not_averaged("in_a_skipped_step"),
    "averaged_in_the_last_step": lambda: not_averaged("after_a_step"),
    "deepcopy": lambda: copied("deepcopy"),
    "pickle": lambda: copied("pickle"),
    "copied": lambda: copied("of_the_model"),
    "wrapped_again": lambda: copied("again"),
    "tables_alone": tables_alone,
}
CASES[3] = {
    "same_ids": lambda: of_many(lambda rank: [3, 1, 3, 19, 25]),
    "other_ids": lambda: of_many(lambda rank: [3, *range(7 * rank, 5 * rank + 5)]),
    "in_a_group": in_a_group,
}


def cases(number: int, folder: Path) -> Iterator[tuple[str, Callable[[], Any]]]:
    yield from CASES[number].items()
    dist.barrier()
