"""Cases of tables that processes share by rows, for `test_sharded.py`.

One process and three of them read the checkpoints that two have written.
"""

import copy
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import (
    FullyShardedDataParallel,
    MixedPrecisionPolicy,
    fully_shard,
)
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)

from partial_embedding import InputError
from partial_embedding.errors import FrozenRowsMoved
from partial_embedding.torch import (
    FrozenRowAudit,
    PartialEmbedding,
    PartialLinear,
    rowwise,
    shards,
)
from partial_embedding.torch.optimizer import prepared
from partial_embedding.torch.shards import shard_of

V, D, STEPS, IDS = 11, 4, 6, 12

Optimizer = torch.optim.Optimizer
OPTIMIZERS: dict[str, Callable[[Any], Optimizer]] = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.2),
    "adamw_foreach": lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.2, foreach=True),
    "adamw_fused": lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.2, fused=True),
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1),
    "sgd_plain": lambda p: torch.optim.SGD(p, lr=0.1, weight_decay=0.1),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.1, weight_decay=0.1),
}
STOCK = ("adamw", "sgd", "adagrad")
# The rows from each step on; some are in the shard of one process alone.
ROWS: dict[str, dict[int, list[int]]] = {
    "late": {0: [1, 7, 9], 3: [0, 1, 5, 7, 9]},
    "refrozen": {0: [1, 5, 7, 9], 2: [1, 9], 4: [1, 5, 9]},
    "growing": {0: [0], 1: [0, 1], 2: [0, 1, 2], 4: [0, 1, 2, 3, 10]},
}
# Each optimizer with each set of rows, both of them with a tied head and with another one.
MATRIX = [
    (optimizer, rows, (i + j) % 2 == 1)
    for i, optimizer in enumerate(STOCK)
    for j, rows in enumerate(ROWS)
]


def named(optimizer: str, rows: str, tied: bool) -> str:
    return f"{optimizer}-{rows}-{'tied' if tied else 'untied'}"


class Net(nn.Module):
    """A table, a hidden layer and a head, tied or not; the same ones in each process."""

    def __init__(self, tied: bool, rows: list[int] | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = PartialEmbedding(V, D)
        self.hidden = nn.Linear(D, D)
        self.head = PartialLinear(D, V, bias=not tied)
        if tied:
            self.head.weight = self.table.weight
        if rows is not None:
            self.set_rows(rows)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.hidden(self.table(ids))).square().mean()

    def set_rows(self, rows: Any, **rate: Any) -> None:
        self.table.set_trainable_rows(rows, **rate)
        if self.head.weight is not self.table.weight:
            self.head.set_trainable_rows(rows, **rate)


def batch(step: int, rank: int) -> Tensor:
    made = torch.Generator().manual_seed(100 * step + rank)
    return torch.randint(V, (IDS,), generator=made)


def whole(parameter: Tensor) -> Tensor:
    held: Any = parameter.detach()
    return (held.full_tensor() if hasattr(held, "full_tensor") else held).clone()


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: whole(parameter) for name, parameter in model.named_parameters()}


def processes() -> DeviceMesh:
    return init_device_mesh("cpu", (dist.get_world_size(),))


# What shards a model


def by_fsdp(model: Net, mesh: DeviceMesh | None = None) -> Net:
    """The table and the head in groups of their own; together where they have one weight."""
    mesh = mesh or processes()
    tied = model.head.weight is model.table.weight
    for module in [[model.table, model.head]] if tied else [model.table, model.head]:
        fully_shard(module, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def by_tensor_parallelism(model: Net, mesh: DeviceMesh | None = None) -> Net:
    tied = model.head.weight is model.table.weight
    plan = {
        "table": RowwiseParallel(input_layouts=Replicate(), output_layouts=Replicate()),
        "head": ColwiseParallel(output_layouts=Replicate()),
    }
    parallelize_module(model, mesh or processes(), plan)
    if tied:  # which torch parts
        model.head.weight = model.table.weight
    return model


def by_both(model: Net, tensor: int = 1) -> Net:
    """FSDP2 over tensor parallelism, of so many processes each."""
    shape = (dist.get_world_size() // tensor, tensor)
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=("data", "tensor"))
    return by_fsdp(by_tensor_parallelism(model, mesh["tensor"]), mesh["data"])


def with_copies(model: Net) -> Net:
    """FSDP2 that shards within a group of processes, of which there are several."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(), 1), mesh_dim_names=("copies", "shards"))
    return by_fsdp(model, mesh)


# Runs


def run(
    shard: Callable[[Net], Net],
    optimizer: str,
    rows: str,
    tied: bool,
    clip: float | None = None,
    alike: int = 1,
) -> Any:
    """What each step began with, its gradients, and what it ended with.

    So many processes, one after the other, have the same batches.
    """
    model = shard(Net(tied, ROWS[rows][0]))
    made = OPTIMIZERS[optimizer](model.parameters())
    audits = [FrozenRowAudit(model.table), FrozenRowAudit(model.head)]
    seen, gradients, norms = [weights(model)], [], []
    for step in range(STEPS):
        for audit in audits:
            audit.check(step)
        if step in ROWS[rows]:
            model.set_rows(ROWS[rows][step])
        for audit in audits:
            audit.restart()
        made.zero_grad()
        model(batch(step, dist.get_rank() // alike)).backward()
        if clip is not None:
            norms.append(whole(nn.utils.clip_grad_norm_(model.parameters(), clip)))
        gradients.append({name: whole(p.grad) for name, p in model.named_parameters()})
        made.step()
        seen.append(weights(model))
    trainable = model.table.trainable_rows
    return {"seen": seen, "gradients": gradients, "norms": norms, "trainable": trainable}


def moved_rows(act: Callable[[Net, Optimizer], None], model: Net) -> list[int]:
    """The rows of the table that one step moved, of those that train."""
    before = weights(model)["table.weight"]
    made = OPTIMIZERS["adamw"](model.parameters())
    act(model, made)
    made.step()
    if hasattr(model, "reshard"):
        model.reshard()
    return (weights(model)["table.weight"] != before).any(1).nonzero().flatten().tolist()


def backward(model: Net, made: Optimizer | None = None) -> None:
    model(batch(0, dist.get_rank())).backward()


def with_a_look_between(model: Net, made: Optimizer) -> None:
    """FSDP2 leaves the whole weight in the place of the shard after a forward pass of the root."""
    backward(model)
    with torch.no_grad():
        model(batch(1, 0))
    assert "_local_tensor" not in dir(model.table._parameters["weight"])


def accumulated(model: Any, made: Optimizer) -> None:
    model.set_requires_gradient_sync(False)
    backward(model)
    model.set_requires_gradient_sync(True)
    backward(model)


def in_one_group(model: Net) -> Net:
    return fully_shard(model, mesh=processes())


def in_bf16(model: Net) -> Net:
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    fully_shard(model.table, mesh=processes(), mp_policy=policy)
    return fully_shard(model, mesh=processes(), mp_policy=policy)


def made_on_meta() -> Net:
    with torch.device("meta"):
        model = Net(False, [1, 7])
    by_fsdp(model)
    model.to_empty(device="cpu")
    for module in (model.table, model.hidden, model.head):
        module.reset_parameters()
    return model


def in_other_ways() -> dict[str, list[int]]:
    return {
        "look_between": moved_rows(with_a_look_between, in_one_group(Net(False, [1, 7]))),
        "accumulated": moved_rows(accumulated, by_fsdp(Net(False, [1, 7]))),
        "bf16": moved_rows(backward, in_bf16(Net(False, [1, 7]))),
        "both": moved_rows(backward, by_both(Net(False, [1, 7]))),
        "copies": moved_rows(backward, with_copies(Net(False, [1, 7]))),
        "meta": moved_rows(backward, made_on_meta()),
        "double": moved_rows(backward, by_fsdp(Net(False, [1, 7])).double()),
        "tied_double": moved_rows(backward, by_fsdp(Net(True, [1, 7])).double()),
    }


def frozen_after_a_plain_start() -> Any:
    """Rows are frozen once torch itself has stepped all of them."""
    model = by_fsdp(Net(False))
    made = OPTIMIZERS["adamw"](model.parameters())
    seen, gradients = [weights(model)], []
    for step in range(4):
        if step == 2:
            model.set_rows([1, 7, 9])
        made.zero_grad()
        model(batch(step, dist.get_rank())).backward()
        gradients.append({name: whole(p.grad) for name, p in model.named_parameters()})
        made.step()
        seen.append(weights(model))
    return {"seen": seen, "gradients": gradients}


def fewer_rows_than_processes() -> Any:
    """A table of two rows: of three processes one has none."""
    table = PartialEmbedding(2, D, trainable_rows=[1])
    with torch.no_grad():
        table.weight.fill_(1.0)
    model = nn.Sequential(table, nn.Linear(D, D))
    fully_shard(table, mesh=processes())
    fully_shard(model, mesh=processes())
    made, audit = OPTIMIZERS["adamw_foreach"](model.parameters()), FrozenRowAudit(table)
    for _ in range(3):
        made.zero_grad()
        model(torch.tensor([0, 1, 1])).square().sum().backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.01)
        made.step()
    audit.check()
    state = made.state_dict()["state"][0]["rowwise"]["state"]
    return {"weight": whole(table.weight), "sizes": {k: v["value"].shape for k, v in state.items()}}


def own_rows_are_audited() -> str:
    """A write into a frozen row of the last process, which finds it by its number in the table."""
    model = by_fsdp(Net(False, [1]))
    audit = FrozenRowAudit(model.table, "words")
    if dist.get_rank() == dist.get_world_size() - 1:
        local: Any = model.table.weight.detach()
        local.to_local()[-1] += 1
    try:
        audit.check(3)
    except FrozenRowsMoved as error:
        return str(error)
    return "nothing moved"


# What is refused


def by_columns() -> None:
    plan = {"table": ColwiseParallel(output_layouts=Replicate())}
    parallelize_module(Net(False, [1]), processes(), plan)


def by_columns_of_fsdp() -> None:
    def second_axis(parameter: nn.Parameter) -> Shard | None:
        return Shard(1) if parameter.dim() == 2 else None

    fully_shard(Net(False, [1]), mesh=processes(), shard_placement_fn=second_axis)


def frozen_after_columns() -> None:
    model = Net(False)
    by_all_rows = {"table": ColwiseParallel(output_layouts=Replicate())}
    parallelize_module(model, processes(), by_all_rows)  # a plain table may be split so
    model.set_rows([1])


def max_norm() -> None:
    table = PartialEmbedding(V, D, max_norm=1.0, trainable_rows=[1])
    fully_shard(table, mesh=processes())


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = PartialEmbedding(V, D, sparse=False, trainable_rows=[1, 7])
        self.hidden = nn.Linear(D, D)

    def forward(self, ids: Tensor) -> Tensor:
        return self.hidden(self.table(ids)).square().mean()


def in_fsdp1(use_orig_params: bool) -> None:
    cpu = torch.device("cpu")
    model = FullyShardedDataParallel(Small(), device_id=cpu, use_orig_params=use_orig_params)
    made = OPTIMIZERS["adamw"](model.parameters())
    model(torch.arange(V)).backward()
    made.step()


def beside_flat_tables() -> list[int]:
    """The rows that an optimizer moves while a table that FSDP1 has flattened is alive."""
    cpu = torch.device("cpu")
    flat = [FullyShardedDataParallel(Small(), device_id=cpu, use_orig_params=o) for o in (0, 1)]
    table = PartialEmbedding(V, D, trainable_rows=[1, 7])
    before, made = whole(table.weight), OPTIMIZERS["adamw"](table.parameters())
    table(torch.arange(V)).sum().backward()
    made.step()
    assert flat
    return (whole(table.weight) != before).any(1).nonzero().flatten().tolist()


def by_zero_redundancy() -> None:
    # Its package scripts optimizers when it is imported, at the cost of a second and 66 warnings.
    from torch.distributed.optim import ZeroRedundancyOptimizer

    model = Small()
    made = ZeroRedundancyOptimizer(model.parameters(), torch.optim.AdamW)
    model(torch.arange(V)).backward()
    made.step()


def stepped_by(make: Callable[[list[nn.Parameter]], Optimizer]) -> Callable[[], None]:
    def step() -> None:
        table = PartialEmbedding(V, D, trainable_rows=[1, 7])
        fully_shard(table, mesh=processes())
        before, made = whole(table.weight), make(list(table.parameters()))
        table(torch.tensor([1, 7])).square().sum().backward()
        try:
            made.step()
        finally:
            assert torch.equal(before, whole(table.weight))

    return step


REFUSED: dict[str, Callable[[], None]] = {
    "columns": by_columns,
    "columns_of_fsdp": by_columns_of_fsdp,
    "frozen_after_columns": frozen_after_columns,
    "max_norm": max_norm,
    "muon": stepped_by(torch.optim.Muon),
    "adafactor": stepped_by(torch.optim.Adafactor),
    "lbfgs": stepped_by(torch.optim.LBFGS),
    "sparse_adam": stepped_by(torch.optim.SparseAdam),
    "zero_redundancy": by_zero_redundancy,
    "fsdp1_with_original_parameters": lambda: in_fsdp1(use_orig_params=True),
    "fsdp1": lambda: in_fsdp1(use_orig_params=False),
}


def refusals() -> dict[str, str]:
    said = {}
    for name, act in REFUSED.items():
        try:
            act()
        except InputError as error:
            said[name] = str(error)
    return said


# Checkpoints


def memory(model: Net, made: Optimizer) -> dict[str, Any]:
    """All that a run goes on from: weights, and what is remembered of each cohort."""
    handle: Any = prepared(made)
    kept = {}
    for state in handle.tables.values():
        shard = shard_of(state.parameter)
        assert shard is not None
        kept[state.name] = {
            number: {
                "rows": cohort.ids + shard.start,
                "steps": cohort.steps,
                "lr_scale": cohort.rate_scale.lr_scale,
                **cohort.state,
            }
            for number, cohort in state.cohorts.items()
        }
    return {"weights": weights(model), "cohorts": copy.deepcopy(kept)}


def begun(optimizer: str, only_tables: bool) -> tuple[Net, Optimizer]:
    model = Net(False, ROWS["late"][0])
    if only_tables:
        model.hidden.requires_grad_(False)
    by_fsdp(model)
    return model, rowwise(OPTIMIZERS[optimizer](model.parameters()), model)


def go_on(model: Net, made: Optimizer, steps: Iterator[int] | range) -> None:
    for step in steps:
        if step == 3:
            model.set_rows(ROWS["late"][3], lr_scale=0.5, warmup_steps=3)
        model(batch(step, dist.get_rank())).backward()
        made.step()
        made.zero_grad()


KINDS = ("folder", "flat", "file")


def options_of(kind: str) -> StateDictOptions:
    if kind == "file":
        return StateDictOptions(full_state_dict=True, cpu_offload=True)
    return StateDictOptions(flatten_optimizer_state_dict=kind == "flat")


def checkpoints() -> Iterator[tuple[str, str, bool]]:
    yield from ((kind, "adamw", False) for kind in KINDS)
    yield from (("folder", name, True) for name in ("adamw", "sgd_plain", "sgd", "adagrad"))


def save(folder: Path) -> Any:
    """Saved in the midst of a run: what was remembered there, and how the run ended."""
    shards.CHUNK_BYTES = 200  # so that rows come one by one, or two
    found = {}
    for kind, optimizer, only_tables in checkpoints():
        model, made = begun(optimizer, only_tables)
        go_on(model, made, range(4))
        before = memory(model, made)
        options = options_of(kind)
        state = {
            "model": get_model_state_dict(model, options=options),
            "optimizer": get_optimizer_state_dict(model, made, options=options),
        }
        name = f"{kind}-{optimizer}-{only_tables}"
        if kind != "file":
            dcp.save(state, checkpoint_id=folder / name)
        elif dist.get_rank() == 0:
            torch.save(state, folder / name)
        after = memory(model, made)
        go_on(model, made, range(4, STEPS))
        found[name] = {"before": before, "after": after, "end": memory(model, made)}
    return found


def resume(folder: Path) -> Any:
    """Read by so many processes, in which all rows joined at once."""
    found = {}
    for kind, optimizer, only_tables in checkpoints():
        name = f"{kind}-{optimizer}-{only_tables}"
        model, made = begun(optimizer, only_tables)
        model.set_rows("none")
        model.set_rows(ROWS["late"][3])
        if kind == "file":
            options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
            state = torch.load(folder / name, weights_only=True)
        else:
            options = options_of(kind)
            state = {
                "model": get_model_state_dict(model, options=options),
                "optimizer": get_optimizer_state_dict(model, made, options=options),
            }
            dcp.load(state, checkpoint_id=folder / name)
        set_model_state_dict(model, state["model"], options=options)
        set_optimizer_state_dict(model, made, state["optimizer"], options=options)
        restored = memory(model, made)
        go_on(model, made, range(4, STEPS))
        found[name] = {"restored": restored, "end": memory(model, made)}
    return found


def cases(number: int, folder: Path) -> Iterator[tuple[str, Callable[[], Any]]]:
    warnings.filterwarnings("ignore")
    yield from {1: of_one, 2: of_two, 3: of_three, 4: of_four}[number](folder)
    dist.barrier()


def of_one(folder: Path) -> Iterator[tuple[str, Callable[[], Any]]]:
    yield "resume", lambda: resume(folder)


def of_two(folder: Path) -> Iterator[tuple[str, Callable[[], Any]]]:
    for one in MATRIX:
        yield f"fsdp-{named(*one)}", partial(run, by_fsdp, *one)
        yield f"tp-{named(*one)}", partial(run, by_tensor_parallelism, *one, alike=2)
    yield "foreach_clipped", lambda: run(by_fsdp, "adamw_foreach", "late", False, clip=0.01)
    yield "fused", lambda: run(by_fsdp, "adamw_fused", "late", True)
    yield "other_ways", in_other_ways
    yield "plain_start", frozen_after_a_plain_start
    yield "audited", own_rows_are_audited
    yield "refusals", refusals
    yield "beside_flat_tables", beside_flat_tables
    yield "save", lambda: save(folder)
    yield "resume", lambda: resume(folder)


def of_three(folder: Path) -> Iterator[tuple[str, Callable[[], Any]]]:
    for optimizer, tied in product(STOCK, (False, True)):
        name = named(optimizer, "late", tied)
        yield f"fsdp-{name}", partial(run, by_fsdp, optimizer, "late", tied)
    yield "fewer_rows", fewer_rows_than_processes
    yield "resume", lambda: resume(folder)


def of_four(folder: Path) -> Iterator[tuple[str, Callable[[], Any]]]:
    """FSDP2 over two shards, each of two processes that tensor parallelism joins."""
    for one in MATRIX:
        yield named(*one), partial(run, partial(by_both, tensor=2), *one, alike=2)
