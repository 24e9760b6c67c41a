"""Tables among several processes learn what one process does that has the batches of all."""

import sys
from collections.abc import Callable, Iterable
from datetime import timedelta
from typing import Any

import pytest
import torch
from device_nets import (
    AFTER,
    OPTIMIZERS,
    ROWS,
    SAVED_AT,
    D,
    Net,
    V,
    batch,
    joined,
    load,
    make,
    moments,
    save,
    snapshot,
    whole,
)
from device_runs import beside_fsdp2, check, split, train_here
from launch import all_same, in_processes, of_all, processes, same, shared_folder
from oracle import rows_that_differ
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from partial_embedding import InputError
from partial_embedding.torch import (
    PartialEmbedding,
    PartialEmbeddingBag,
    average_gradients,
    keep_whole,
    shards,
    split_rows,
)
from partial_embedding.torch.optimizer import prepared
from partial_embedding.torch.row_files import load_rows, save_rows

STOCK = ("AdamW", "AdamW-foreach", "SGD", "Adagrad")


def trained(whole_ones: Iterable[str], split_ones: Iterable[str]) -> list[str]:
    """Whole or split, the optimizer, the head, and what else is done."""
    return [
        *(f"whole {name} {head}" for name in whole_ones for head in ("none", "tied", "untied")),
        "whole AdamW untied clipped",
        "whole AdamW-foreach tied clipped accumulated",
        "whole SGD none fsdp1",
        "whole SGD untied fsdp1",
        "whole AdamW none zero",
        "whole AdamW untied zero",
        "whole AdamW none lazy",
        *(f"split {name} none{lazy}" for name in split_ones for lazy in ("", " lazy")),
        "split AdamW untied",
        "split AdamW-foreach untied clipped",
    ]


# What else is done where DDP has the rest; a table whose head is a plain one has a dense gradient.
IN_DDP = [
    "ddp AdamW none",
    "ddp AdamW none lazy",
    "ddp AdamW none clipped",
    "ddp AdamW none accumulated",
    "ddp AdamW none dense",
    "ddp AdamW none dense clipped",
    "ddp AdamW none dense accumulated",
    "ddp AdamW none dense rowwise_first",
    "ddp AdamW tied_dense",
    "ddp AdamW tied_dense dense",
    "ddp AdamW tied_dense dense accumulated",
    "ddp AdamW tied",
    "ddp AdamW untied",
]


@pytest.mark.parametrize("case", [*trained(STOCK, STOCK), *IN_DDP])
@in_processes(2)
def test_two_processes_train_the_rows_of_one_with_the_batches_of_both(case: str) -> None:
    check(case)


@pytest.mark.parametrize("case", trained(["AdamW"], ["SGD"]))
@in_processes(3)
def test_three_processes_train_the_rows_of_one_with_the_batches_of_all(case: str) -> None:
    check(case)


# Refused, and what becomes of faults


def test_keep_whole_needs_processes() -> None:
    with pytest.raises(InputError, match=r"Call torch.distributed.init_process_group first"):
        keep_whole(Net())


def with_other_rows(net: Net) -> Net:
    net.table.set_trainable_rows([1 + dist.get_rank()])
    return net


def averaged_with_other_rows() -> None:
    net = with_other_rows(beside_fsdp2("none"))
    optimizer = make("AdamW", net)
    net(batch(0, dist.get_rank())).backward()
    average_gradients(optimizer)


def never_averaged() -> None:
    net = beside_fsdp2("none")
    optimizer = make("AdamW", net)
    net(batch(0, dist.get_rank())).backward()
    optimizer.step()


def on_meta() -> None:
    with torch.device("meta"):
        net = Net()
    keep_whole(net)


def split_tied() -> None:
    net = Net("tied")
    split_rows(net.table, processes())


def split_twice() -> None:
    table = Net().table
    split_rows(table, processes())
    split_rows(table, processes())


# What would part processes, and what cannot be split, with what can.
REFUSED: dict[str, tuple[Callable[[], object], str]] = {
    "other_rows": (
        averaged_with_other_rows,
        r"all processes train the same rows of 'table'.* in process 1 than in process 0",
    ),
    "never_averaged": (never_averaged, r"Call average_gradients\(optimizer\) after backward"),
    "sharded_first": (
        lambda: keep_whole(fully_shard(Net(), mesh=processes())),
        r"Call keep_whole\(model\) first",
    ),
    "without_tables": (
        lambda: keep_whole(nn.Linear(D, D)),
        "Received a Linear without any. Replace its embeddings first",
    ),
    "on_meta": (on_meta, "Received 'table' on the meta device"),
    "with_max_norm": (lambda: keep_whole(Net(max_norm=1.0)), "max_norm scales the rows"),
    "looked_up_wrongly": (
        lambda: split("none").table(torch.tensor([V] if dist.get_rank() else [0])),
        r"ids lie in \[0, 31\). Received others in process 1",
    ),
    "split_with_other_rows": (
        lambda: with_other_rows(split("none")).table(torch.tensor([1])),
        "all processes train the same rows of a table",
    ),
    "split_head": (
        lambda: split_rows(Net("tied").head, processes()),
        "ColwiseParallel and loss_parallel",
    ),
    "split_tied": (split_tied, "tied to a head, which needs all of them"),
    "split_bags": (
        lambda: split_rows(PartialEmbeddingBag(V, D, trainable_rows=[1]), processes()),
        "for bags look rows up and reduce them",
    ),
    "split_twice": (split_twice, "Call split_rows before fully_shard"),
    "split_max_norm": (
        lambda: split_rows(PartialEmbedding(V, D, max_norm=1.0), processes()),
        "max_norm looks at all that is looked up",
    ),
    "split_other_size": (
        lambda: split_rows(PartialEmbedding(V + dist.get_rank(), D), processes()),
        "all processes have the same tables",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
@in_processes(2)
def test_what_cannot_be_kept_is_refused_by_all_processes(case: str) -> None:
    act, rule = REFUSED[case]
    with pytest.raises(InputError, match=rule):
        act()


@in_processes(2)
def test_what_processes_do_together_waits_for_a_while_and_names_who_did_not_come() -> None:
    net = split("none")
    optimizer = make("AdamW", net)
    patience, shards.PATIENCE = shards.PATIENCE, 0.2
    if dist.get_rank() == 0:  # a state that all have together, asked for by one
        rule = "in process 0, for which 0.2 s long process 1 did not come"
        with pytest.raises(InputError, match=rule):
            optimizer.state_dict()
    dist.barrier()
    shards.PATIENCE = patience
    # Later all come, and what one did alone is forgotten.
    assert len(optimizer.state_dict()["state"][0]["rowwise"]["rows"]) == len(ROWS[0])


# What else is split


@in_processes(2)
def test_a_split_table_of_which_all_rows_train_is_stepped_by_a_plain_optimizer() -> None:
    table = PartialEmbedding(V, D, _weight=torch.zeros(V, D))
    split_rows(table, processes())
    optimizer = torch.optim.AdamW(table.parameters(), lr=0.1, weight_decay=0.0)
    table(batch(0, dist.get_rank())).sum().backward()
    optimizer.step()
    assert prepared(optimizer) is None
    moved = whole(table.weight).any(1).nonzero().flatten()
    assert torch.equal(moved, torch.cat([batch(0, 0), batch(0, 1)]).unique())


@in_processes(2)
def test_a_table_is_split_before_it_has_rows() -> None:
    with torch.device("meta"):
        table = PartialEmbedding(V, D, padding_idx=30, trainable_rows=[1, 29])
    split_rows(table, processes())
    table.to_empty(device="cpu")
    table.reset_parameters()
    own = 15 if dist.get_rank() else 16
    assert len(table.weight.to_local()) == own
    # As `torch.func` calls it, with a weight that is whole.
    given = torch.func.functional_call(table, {"weight": torch.eye(V, D)}, (torch.arange(V),))
    assert torch.equal(given, torch.eye(V, D))
    before = whole(table.weight).detach().clone()
    assert before[30].tolist() == [0.0] * D
    optimizer = torch.optim.AdamW(table.parameters(), lr=0.1)
    table(torch.arange(V)).sum().backward()
    optimizer.step()
    assert rows_that_differ(before, whole(table.weight)) == [1, 29]
    given_alike = PartialEmbedding.from_pretrained(torch.ones(V, D))
    split_rows(given_alike, processes(), src_data_rank=None)
    assert given_alike.weight.to_local().untyped_storage().nbytes() == own * 4 * D


@in_processes(2)
def test_ddp_averages_the_rest_and_leaves_a_split_table_alone() -> None:
    net = Net("untied")
    split_rows(net.table, processes())
    ddp = DistributedDataParallel(net)
    assert sorted(ddp.parameters_to_ignore) == ["head.weight", "table.weight"]
    steps = train_here(net, make("AdamW", net), some_empty=True, model=ddp)
    seen = [found for found, *_ in steps]
    zero, one = of_all(seen)
    assert all_same(zero, one)
    for found, (wanted, *_) in zip(seen, joined("AdamW", "untied", 2), strict=True):
        assert torch.equal(found["table"], wanted["table"])


@in_processes(2)
def test_rows_of_a_split_table_are_written_by_one_and_read_by_all() -> None:
    net = split("none")
    *_, (trained, _, _) = train_here(net, make("AdamW", net))
    path = shared_folder() / "rows.safetensors"
    shards.CHUNK_BYTES = 2 * 4 * D  # of two rows
    save_rows(net, path)
    dist.barrier()
    rows, alone, again = ROWS[max(ROWS)], Net(), split("none")
    begun = alone.table.weight.detach().clone()
    load_rows(alone, path)
    found = alone.table.weight.detach()
    others = [row for row in range(V) if row not in rows]
    assert torch.equal(found[rows], trained["table"][rows])
    assert torch.equal(found[others], begun[others])
    for _ in range(2):  # once more the same
        assert load_rows(again, path) == {"table.weight": rows}
    torch.testing.assert_close(whole(again.table.weight).detach(), found)
    with torch.no_grad():
        again.table.weight.to_local()[:] += 1  # other rows now than those of the file
    with pytest.raises(InputError, match="rows of two files are not the same ones"):
        load_rows(again, path)


@in_processes(2)
def test_what_is_kept_whole_comes_in_the_order_of_the_model() -> None:
    model = nn.ModuleList(PartialEmbedding(2, 2) for _ in range(40))
    assert [id(one) for one in keep_whole(model)] == [id(table.weight) for table in model]


@in_processes(2)
def test_what_is_sent_for_a_split_table_follows_the_ids_and_not_the_table() -> None:
    real, sent = dist.all_to_all_single, []

    def counted(out: Any, given: Any, *others: Any, **options: Any) -> Any:
        sent.append(given.nbytes)
        return real(out, given, *others, **options)

    for num_rows in (1_000, 100_000):
        for ids in (40, 50):
            table = PartialEmbedding(num_rows, D, trainable_rows=range(num_rows // 2))
            split_rows(table, processes())
            sent.clear()
            dist.all_to_all_single = counted
            table(torch.arange(ids) * (num_rows // ids)).sum().backward()
            dist.all_to_all_single = real
            # A header of 32 bytes; ids, rows, and whether each trains; gradients of those, a half.
            assert sum(sent) == 32 + ids * (8 + 4 * D + 1) + ids // 2 * 4 * D, num_rows


# Checkpoints


def state_of(net: Net, optimizer: torch.optim.Optimizer) -> dict[str, dict[str, Tensor]]:
    return {"rows": snapshot(net), "moments": moments(net, optimizer)}


@in_processes(2, 3, 1)
def test_what_two_processes_saved_is_read_by_any_number() -> None:
    number, path = dist.get_world_size(), shared_folder() / "saved"
    if number == 2:
        net = split("untied")
        optimizer = make("AdamW", net)
        list(train_here(net, optimizer, steps=range(SAVED_AT)))
        save(net, optimizer, path / "checkpoint")
        half = state_of(net, optimizer)
        later = [found for found, *_ in train_here(net, optimizer, steps=AFTER)]
        if dist.get_rank() == 0:
            torch.save([half, later], path / "seen")
        dist.barrier()
    if number == 1:
        dist.destroy_process_group()
    half, later = torch.load(path / "seen", weights_only=True)
    net = Net("untied") if number == 1 else split("untied")
    net.set_rows(ROWS[max(step for step in ROWS if step < SAVED_AT)])
    optimizer = make("AdamW", net)
    load(net, optimizer, path / "checkpoint")
    found = state_of(net, optimizer)
    assert all(same(found[name], half[name]) for name in half)
    if number == 2:
        again = [found for found, *_ in train_here(net, optimizer, steps=AFTER)]
        assert all_same(again, later)


# The last one, since a process ends in it.


@pytest.mark.parametrize("how", ["makes_fewer_steps", "dies"])
@in_processes(3)
def test_a_process_that_does_not_step_ends_the_others_with_an_error(how: str) -> None:
    second = timedelta(seconds=1)
    net = Net()
    keep_whole(net, dist.new_group(timeout=second) if how == "makes_fewer_steps" else None)
    optimizer = OPTIMIZERS["AdamW"](net.parameters())

    def step() -> None:
        net(batch(0, dist.get_rank())).backward()
        average_gradients(optimizer)
        optimizer.step()

    step()
    if dist.get_rank() == 2:
        if how == "dies":
            sys.exit()
        return
    with pytest.raises(RuntimeError) as stopped:
        step()
    assert "made fewer steps" in "".join(stopped.value.__notes__)
