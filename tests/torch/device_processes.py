"""Cases of tables among processes that shard a model, for `test_several_devices.py`."""

import os
from collections.abc import Callable, Iterable, Iterator
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
from device_nets import (
    AFTER,
    OPTIMIZERS,
    ROWS,
    SAVED_AT,
    STEPS,
    D,
    Net,
    V,
    batch,
    gradients,
    load,
    loss_of,
    moments,
    save,
    set_rows,
    snapshot,
    whole,
)
from torch import distributed as dist
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.nn.parallel import DistributedDataParallel

from partial_embedding import InputError
from partial_embedding.torch import (
    PartialEmbedding,
    PartialEmbeddingBag,
    average_gradients,
    keep_whole,
    rowwise,
    shards,
    split_rows,
)
from partial_embedding.torch.optimizer import prepared
from partial_embedding.torch.row_files import load_rows, save_rows


def mesh() -> Any:
    return dist.init_device_mesh("cpu", (dist.get_world_size(),))


def beside_fsdp2(head: str, **options: Any) -> Net:
    """A model that FSDP2 shards but for its tables; each process begins with another one."""
    net = Net(head, seed=0 if dist.get_rank() == 0 else 7, **options)
    if dist.get_rank():  # of the table alone, since FSDP2 does not make the other layers alike
        net.hidden.load_state_dict(Net(head).hidden.state_dict())
    fully_shard(net, mesh=mesh(), ignored_params=keep_whole(net))
    return net


def beside_fsdp1(head: str) -> tuple[Net, nn.Module]:
    net = Net(head)
    whole = keep_whole(net)
    return net, FullyShardedDataParallel(
        net, ignored_states=whole, device_id=torch.device("cpu"), use_orig_params=True
    )


def with_fsdp1(name: str, head: str) -> dict[str, list[Any]]:
    net, model = beside_fsdp1(head)
    return train(net, name, model=model)


def in_optimizers_of_their_own(head: str) -> dict[str, list[Any]]:
    """As beside DeepSpeed ZeRO-1: an engine has all but the tables, and steps it by itself."""
    from torch.distributed.optim import ZeroRedundancyOptimizer  # warns where it is imported

    net = Net(head)
    whole = keep_whole(net)
    rest = [parameter for parameter in net.parameters() if parameter not in whole]
    of_rest = ZeroRedundancyOptimizer(rest, torch.optim.AdamW, lr=0.1, weight_decay=0.2)
    of_tables = rowwise(OPTIMIZERS["AdamW"](list(whole)), net)
    seen: dict[str, list[Any]] = {"rows": [], "gradients": [], "norms": []}
    for step in range(STEPS):
        set_rows(net, step)
        net.zero_grad()
        loss_of(net(batch(step, dist.get_rank()))).backward()
        for parameter in rest:  # what the engine does in its backward
            dist.all_reduce(parameter.grad.div_(dist.get_world_size()))
        average_gradients(of_tables)
        seen["gradients"].append(gradients(net))
        of_tables.step()
        of_rest.step()
        seen["rows"].append(snapshot(net))
    return seen


def split(head: str) -> Net:
    """A model whose table is split, whose head is whole, and of which FSDP2 shards the rest."""
    net = Net(head, seed=0 if dist.get_rank() == 0 else 7)
    if dist.get_rank():
        others = Net(head)
        net.hidden.load_state_dict(others.hidden.state_dict())
    ours = keep_whole(net) if head != "none" else set()
    fully_shard(net, mesh=mesh(), ignored_params=ours | split_rows(net.table, mesh()))
    return net


def train(
    net: Net,
    name: str,
    some_empty: bool = False,
    accumulate: int = 1,
    max_norm: float | None = None,
    lazy: bool = False,
    model: nn.Module | None = None,
    optimizer: torch.optim.Optimizer | None = None,
    steps: range = range(STEPS),
) -> dict[str, list[Any]]:
    """The rows, gradients and norms of each step."""
    if optimizer is None:
        optimizer = rowwise(OPTIMIZERS[name](net.parameters()), net, lazy=lazy)
    seen: dict[str, list[Any]] = {"rows": [], "gradients": [], "norms": []}
    for step in steps:
        set_rows(net, step)
        optimizer.zero_grad()
        for part in range(accumulate):
            loss_of((model or net)(batch(step, dist.get_rank(), part, some_empty))).backward()
        average_gradients(optimizer)
        if max_norm is not None:
            norm = nn.utils.clip_grad_norm_(net.parameters(), max_norm)
            seen["norms"].append(float(norm.full_tensor()))
        seen["gradients"].append(gradients(net))
        optimizer.step()
        seen["rows"].append(snapshot(net))
    return seen


def refusal(act: Callable[[], Any]) -> str:
    try:
        act()
    except InputError as error:
        return str(error)
    return "nothing was refused"


def other_rows() -> str:
    net = beside_fsdp2("none")
    net.table.set_trainable_rows([1 + dist.get_rank()])
    optimizer = rowwise(OPTIMIZERS["AdamW"](net.parameters()), net)
    loss_of(net(batch(0, dist.get_rank()))).backward()
    return refusal(lambda: average_gradients(optimizer))


def never_averaged() -> str:
    net = beside_fsdp2("none")
    optimizer = rowwise(OPTIMIZERS["AdamW"](net.parameters()), net)
    loss_of(net(batch(0, dist.get_rank()))).backward()
    return refusal(optimizer.step)


def sharded_first() -> str:
    return refusal(lambda: keep_whole(fully_shard(Net(), mesh=mesh())))


def on_meta() -> str:
    with torch.device("meta"):
        net = Net()
    return refusal(lambda: keep_whole(net))


def with_max_norm() -> str:
    return refusal(lambda: keep_whole(Net(max_norm=1.0)))


def failure(act: Callable[[], Any]) -> list[str]:
    """What torch raised, and what was noted in it."""
    try:
        act()
    except RuntimeError as error:
        return [str(error), *error.__notes__]
    return ["nothing failed"]


def one_step_of(net: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    loss_of(net(batch(0, dist.get_rank()))).backward()
    average_gradients(optimizer)
    optimizer.step()


def looked_up_wrongly() -> str:
    net = split("none")
    ids = torch.tensor([V] if dist.get_rank() else [0])
    return refusal(lambda: net.table(ids))


def split_with_other_rows() -> str:
    net = split("none")
    net.table.set_trainable_rows([1 + dist.get_rank()])
    return refusal(lambda: net.table(torch.tensor([1])))


def split_in_other_ways() -> dict[str, str]:
    net, bags = Net("tied"), PartialEmbeddingBag(V, D, trainable_rows=[1])
    twice = Net().table
    split_rows(twice, mesh())
    other_size = PartialEmbedding(V + dist.get_rank(), D)
    return {
        "head": refusal(lambda: split_rows(net.head, mesh())),
        "tied": refusal(lambda: split_rows(net.table, mesh())),
        "bags": refusal(lambda: split_rows(bags, mesh())),
        "twice": refusal(lambda: split_rows(twice, mesh())),
        "max_norm": refusal(lambda: split_rows(PartialEmbedding(V, D, max_norm=1.0), mesh())),
        "other size": refusal(lambda: split_rows(other_size, mesh())),
    }


def split_of_all_rows() -> dict[str, Any]:
    """No row is frozen; the optimizer is a plain one, of which nothing was asked."""
    table = PartialEmbedding(V, D, _weight=torch.zeros(V, D))
    split_rows(table, mesh())
    optimizer = torch.optim.AdamW(table.parameters(), lr=0.1, weight_decay=0.0)
    table(batch(0, dist.get_rank())).sum().backward()
    optimizer.step()
    return {"rows": whole(table.weight).detach(), "is_plain": prepared(optimizer) is None}


def split_on_meta() -> dict[str, Any]:
    with torch.device("meta"):
        table = PartialEmbedding(V, D, padding_idx=30, trainable_rows=[1, 29])
    split_rows(table, mesh())
    table.to_empty(device="cpu")
    table.reset_parameters()
    given = torch.func.functional_call(table, {"weight": torch.eye(V, D)}, (torch.arange(V),))
    own = table.weight.to_local()
    before = whole(table.weight).detach().clone()
    optimizer = torch.optim.AdamW(table.parameters(), lr=0.1)
    table(torch.arange(V)).sum().backward()
    optimizer.step()
    given_alike = PartialEmbedding.from_pretrained(torch.ones(V, D))
    split_rows(given_alike, mesh(), src_data_rank=None)
    held = given_alike.weight.to_local().untyped_storage().nbytes()
    moved = (whole(table.weight) != before).any(1).nonzero().flatten()
    return {
        "local": len(own),
        "padding": before[30].tolist(),
        "moved": moved.tolist(),
        "given": given.detach(),
        "held": held,
    }


def split_beside_ddp() -> dict[str, Any]:
    """One table is split, and DDP averages the rest, of which a table is averaged by row."""
    net = Net("untied")
    split_rows(net.table, mesh())
    ddp = DistributedDataParallel(net)
    net.alive = [ddp]
    seen = train(net, "AdamW", some_empty=True, model=ddp)
    return {"rows": seen["rows"], "ignored": sorted(ddp.parameters_to_ignore)}


def many_in_order() -> list[int]:
    """The places, in the model, of the weights of many tables."""
    model = nn.ModuleList(PartialEmbedding(2, 2) for _ in range(40))
    place_of = {id(table.weight): i for i, table in enumerate(model)}
    return [place_of[id(parameter)] for parameter in keep_whole(model)]


def split_traffic() -> dict[str, int]:
    """Bytes that a step gives the process group, for tables of two sizes and numbers of ids."""
    found, real = {}, dist.all_to_all_single
    for num_rows in (1_000, 100_000):
        for ids in (40, 50):
            table = PartialEmbedding(num_rows, D, trainable_rows=range(num_rows // 2))
            split_rows(table, mesh())
            sent: list[int] = []

            def counted(out: Any, given: Any, *others: Any, to: Any = sent, **options: Any) -> Any:
                to.append(given.nbytes)
                return real(out, given, *others, **options)

            dist.all_to_all_single = counted
            table(torch.arange(ids) * (num_rows // ids)).sum().backward()
            dist.all_to_all_single = real
            found[f"{num_rows} {ids}"] = sum(sent)
    return found


def row_files(folder: Path) -> dict[str, Any]:
    """Rows of split tables, written by all and read by all."""
    net = split("none")
    train(net, "AdamW")
    path = folder / "rows.safetensors"
    shards.CHUNK_BYTES = 2 * 4 * D  # of two rows
    save_rows(net, path)
    dist.barrier()
    alone, again = Net(), split("none")
    load_rows(alone, path)
    written = load_rows(again, path)
    load_rows(again, path)  # once more the same
    with torch.no_grad():
        again.table.weight.to_local()[:] += 1  # other rows now than those of the file
    return {
        "trained": snapshot(net),
        "alone": snapshot(alone),
        "again": snapshot(again)["table"] - 1,
        "written": written,
        "refused": refusal(lambda: load_rows(again, path)),
    }


def saved(folder: Path) -> dict[str, Any]:
    """A run of which half is saved: a split table, a whole head, and the rest in shards."""
    net = split("untied")
    optimizer = rowwise(OPTIMIZERS["AdamW"](net.parameters()), net)
    train(net, "AdamW", optimizer=optimizer, steps=range(SAVED_AT))
    save(net, optimizer, folder / "checkpoint")
    half = {"rows": snapshot(net), "moments": moments(net, optimizer)}
    return {**half, "later": train(net, "AdamW", optimizer=optimizer, steps=AFTER)["rows"]}


def read(folder: Path) -> dict[str, Any]:
    net = split("untied")
    set_rows(net, max(step for step in ROWS if step < SAVED_AT))
    optimizer = rowwise(OPTIMIZERS["AdamW"](net.parameters()), net)
    load(net, optimizer, folder / "checkpoint")
    half = {"rows": snapshot(net), "moments": moments(net, optimizer)}
    return {**half, "later": train(net, "AdamW", optimizer=optimizer, steps=AFTER)["rows"]}


def called_by_one() -> dict[str, Any]:
    """A state that all have together, asked for by the first process alone, then by all."""
    net = split("none")
    optimizer = rowwise(OPTIMIZERS["AdamW"](net.parameters()), net)
    alone, patience = "", shards.PATIENCE
    shards.PATIENCE = 0.2
    if dist.get_rank() == 0:
        alone = refusal(optimizer.state_dict)
    dist.barrier()
    shards.PATIENCE = patience
    entry = optimizer.state_dict()["state"][0]["rowwise"]
    return {"alone": alone, "rows": len(entry["rows"])}


def too_few_batches() -> list[str]:
    """The last process makes no step, within a group that waits for a second."""
    net, processes = Net(), dist.new_group(timeout=timedelta(seconds=1))
    keep_whole(net, processes)
    optimizer = OPTIMIZERS["AdamW"](net.parameters())
    one_step_of(net, optimizer)
    last = dist.get_rank() == dist.get_world_size() - 1
    return [] if last else failure(lambda: one_step_of(net, optimizer))


def a_process_dies() -> list[str]:
    net = Net()
    keep_whole(net)
    optimizer = OPTIMIZERS["AdamW"](net.parameters())
    one_step_of(net, optimizer)
    if dist.get_rank() == dist.get_world_size() - 1:
        os._exit(0)  # as if it were killed, but that the test sees what the others do
    return failure(lambda: one_step_of(net, optimizer))


def all_whole(names: Iterable[str]) -> dict[str, Callable[[], Any]]:
    """The name of each run: whole, the optimizer, the head, and what else is done."""
    cases: dict[str, Callable[[], Any]] = {}
    for name in names:
        for head in ("none", "tied", "untied"):
            cases[f"whole {name} {head}"] = lambda n=name, h=head: train(beside_fsdp2(h), n)
    cases["whole AdamW untied clipped"] = lambda: train(
        beside_fsdp2("untied"), "AdamW", max_norm=0.05
    )
    cases["whole AdamW-foreach tied clipped accumulated"] = lambda: train(
        beside_fsdp2("tied"), "AdamW-foreach", max_norm=0.05, accumulate=2
    )
    for head in ("none", "untied"):
        cases[f"whole SGD {head} fsdp1"] = lambda h=head: with_fsdp1("SGD", h)
        cases[f"whole AdamW {head} zero"] = lambda h=head: in_optimizers_of_their_own(h)
    cases["whole AdamW none lazy"] = lambda: train(beside_fsdp2("none"), "AdamW", lazy=True)
    return cases


def all_split(names: Iterable[str]) -> dict[str, Callable[[], Any]]:
    """As `all_whole`; one process has an empty batch at one step."""
    cases: dict[str, Callable[[], Any]] = {}
    for name in names:
        for lazy in (False, True):
            cases[f"split {name} none{' lazy' * lazy}"] = lambda n=name, z=lazy: train(
                split("none"), n, some_empty=True, lazy=z
            )
    cases["split AdamW untied"] = lambda: train(split("untied"), "AdamW", some_empty=True)
    cases["split AdamW-foreach untied clipped"] = lambda: train(
        split("untied"), "AdamW-foreach", some_empty=True, max_norm=0.05
    )
    return cases


REFUSED: dict[str, Callable[[], Any]] = {
    "other_rows": other_rows,
    "never_averaged": never_averaged,
    "sharded_first": sharded_first,
    "on_meta": on_meta,
    "with_max_norm": with_max_norm,
    "looked_up_wrongly": looked_up_wrongly,
    "split_with_other_rows": split_with_other_rows,
    "split_in_other_ways": split_in_other_ways,
}
OTHERS: dict[str, Callable[[], Any]] = {
    "split_of_all_rows": split_of_all_rows,
    "split_on_meta": split_on_meta,
    "split_beside_ddp": split_beside_ddp,
    "many_in_order": many_in_order,
    "called_by_one": called_by_one,
}
IN_A_FOLDER: dict[str, Callable[[Path], Any]] = {
    "row_files": row_files,
    "saved": saved,
    "read": read,
}
FAULTS: dict[str, Callable[[], Any]] = {
    "too_few_batches": too_few_batches,
    "a_process_dies": a_process_dies,  # the last case
}
CASES = {
    2: {
        **all_whole(OPTIMIZERS),
        **all_split(OPTIMIZERS),
        "split_traffic": split_traffic,
        **REFUSED,
        **OTHERS,
    },
    3: {**all_whole(["AdamW"]), **all_split(["SGD"])},
}


def cases(number: int, folder: Path) -> Iterator[tuple[str, Callable[[], Any]]]:
    yield from CASES[number].items()
    for name in IN_A_FOLDER if number == 2 else ["read"]:
        yield name, partial(IN_A_FOLDER[name], folder)
    if number == 3:
        yield from FAULTS.items()
    else:
        dist.barrier()
