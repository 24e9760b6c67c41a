"""Tables that processes share by rows learn as one process does that has all of their batches."""

import warnings
from collections.abc import Callable, Iterator
from functools import partial
from itertools import pairwise, product
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from device_nets import OPTIMIZERS, D, Net, whole
from launch import all_same, in_processes, of_all, processes, shared_folder
from oracle import differences, rows_that_differ
from sharded_nets import (
    ROWS,
    STEPS,
    Optimizer,
    V,
    alone,
    batch,
    begun,
    by_both,
    by_fsdp,
    by_tensor_parallelism,
    go_on,
    in_bf16,
    in_one_group,
    memory,
    net_of,
    of_batches,
    recorded,
    state_of,
    train,
    weights,
    with_copies,
)
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

from partial_embedding import InputError
from partial_embedding.errors import FrozenRowsMoved
from partial_embedding.torch import FrozenRowAudit, PartialEmbedding, shards

STOCK = ("AdamW", "SGD", "Adagrad")


def matrix() -> Iterator[Any]:
    """Always each optimizer with each set of rows, both with a tied head and with another one."""
    for (i, optimizer), (j, rows), tied in product(
        enumerate(STOCK), enumerate(ROWS), (True, False)
    ):
        yield pytest.param(
            optimizer,
            rows,
            tied,
            id=f"{optimizer}-{rows}-{'tied' if tied else 'untied'}",
            marks=[] if tied == ((i + j) % 2 == 1) else [pytest.mark.full],
        )


IN_MATRIX = pytest.mark.parametrize(("optimizer", "rows", "tied"), list(matrix()))


def check(
    shard: Callable[[Net], Net],
    optimizer: str,
    rows: str,
    tied: bool,
    batches: int,
    exact: str = "given its gradients",
) -> None:
    """Train beside one process with all batches; processes one after the other have the same."""
    alike = dist.get_world_size() // batches
    model = shard(net_of(tied, ROWS[rows][0]))
    made = OPTIMIZERS[optimizer](model.parameters())

    def backward(model: Net, step: int) -> None:
        model(batch(step, dist.get_rank() // alike)).backward()

    seen, gradients = train(model, made, ROWS[rows], backward)
    assert all(all_same(seen, other) for other in of_all(seen))
    assert model.table.trainable_rows.tolist() == ROWS[rows][max(ROWS[rows])]
    if dist.get_rank():
        return  # what follows is the same for all
    trainable: list[int] = []
    for step, (before, after) in enumerate(pairwise(seen)):
        trainable = ROWS[rows].get(step, trainable)
        for name in {"table.weight", "head.weight", "head.bias"} & before.keys():
            moved = rows_that_differ(before[name], after[name])
            assert moved
            assert set(moved) <= set(trainable)
    wanted = alone(optimizer, rows, tied, of_batches(batches))
    if exact == "given its batches":
        assert all_same(seen, wanted)
    elif exact == "given its gradients":
        assert all_same(seen, alone(optimizer, rows, tied, recorded(gradients)))
    for name, value in wanted[-1].items():
        torch.testing.assert_close(seen[-1][name], value, rtol=1e-4, atol=1e-5)


@IN_MATRIX
@in_processes(2)
def test_fsdp_learns_bit_for_bit_as_one_process_on_the_joined_batch(
    optimizer: str, rows: str, tied: bool
) -> None:
    check(by_fsdp, optimizer, rows, tied, batches=2, exact="given its batches")


@IN_MATRIX
@in_processes(2)
def test_tensor_parallelism_steps_what_it_is_given_exactly(
    optimizer: str, rows: str, tied: bool
) -> None:
    # The features' gradient is a sum over the scores of all processes, in another order.
    check(by_tensor_parallelism, optimizer, rows, tied, batches=1)


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("optimizer", STOCK)
@in_processes(3)
def test_three_processes_step_what_they_are_given_exactly(optimizer: str, tied: bool) -> None:
    # A third of each gradient is rounded, and the sum of three depends on its order.
    check(by_fsdp, optimizer, "late", tied, batches=3)


@IN_MATRIX
@in_processes(4)
def test_fsdp_over_tensor_parallelism_steps_what_it_is_given_exactly(
    optimizer: str, rows: str, tied: bool
) -> None:
    """FSDP2 over two shards, each of two processes that tensor parallelism joins."""
    check(partial(by_both, tensor=2), optimizer, rows, tied, batches=2)


@in_processes(2)
def test_a_fused_optimizer_steps_shards() -> None:
    # Its kernel rounds the last few numbers of a block otherwise, and a shard ends elsewhere.
    check(by_fsdp, "AdamW-fused", "late", True, batches=2, exact="never")


@in_processes(2)
def test_torch_clips_shards_by_the_norm_of_all_of_them() -> None:
    def clipped(norms: list[Tensor], backward: Callable[[Net, int], object]) -> Any:
        def clip(model: Net, step: int) -> None:
            backward(model, step)
            norms.append(whole(nn.utils.clip_grad_norm_(model.parameters(), 0.01)))

        return clip

    norms: tuple[list[Tensor], list[Tensor]] = ([], [])
    model = by_fsdp(net_of(False, ROWS["late"][0]))
    made = OPTIMIZERS["AdamW-foreach"](model.parameters())
    own = clipped(norms[0], lambda model, step: model(batch(step, dist.get_rank())).backward())
    seen, gradients = train(model, made, ROWS["late"], own)
    alone("AdamW-foreach", "late", False, clipped(norms[1], of_batches(2)))
    torch.testing.assert_close(*norms)
    assert all_same(seen, alone("AdamW-foreach", "late", False, recorded(gradients)))


def backward(model: Net) -> None:
    model(batch(0, dist.get_rank())).backward()


def with_a_look_between(model: Net) -> None:
    """FSDP2 leaves the whole weight in the place of the shard after a forward pass of the root."""
    backward(model)
    with torch.no_grad():
        model(batch(1, 0))
    assert "_local_tensor" not in dir(model.table._parameters["weight"])


def accumulated(model: Any) -> None:
    model.set_requires_gradient_sync(False)
    backward(model)
    model.set_requires_gradient_sync(True)
    backward(model)


def made_on_meta(model: Net) -> Net:
    with torch.device("meta"):
        model = net_of(False, [1, 7])
    by_fsdp(model)
    model.to_empty(device="cpu")
    for module in (model.table, model.hidden, model.head):
        module.reset_parameters()
    return model


# What shards a model, and what comes before a step.
WAYS: dict[str, tuple[Callable[[Net], Net], Callable[[Net], None]]] = {
    "look_between": (in_one_group, with_a_look_between),
    "accumulated": (by_fsdp, accumulated),
    "bf16": (in_bf16, backward),
    "both": (by_both, backward),
    "copies": (with_copies, backward),
    "meta": (made_on_meta, backward),
    "double": (lambda model: by_fsdp(model).double(), backward),
}


@pytest.mark.parametrize(
    ("way", "tied"), [*((way, False) for way in WAYS), ("double", True)], ids=str
)
@in_processes(2)
def test_only_trainable_rows_move_however_a_model_is_sharded(way: str, tied: bool) -> None:
    shard, act = WAYS[way]
    model = shard(net_of(tied, [1, 7]))
    before = weights(model)["table.weight"]
    made = OPTIMIZERS["AdamW"](model.parameters())
    act(model)
    made.step()
    if hasattr(model, "reshard"):
        model.reshard()
    assert rows_that_differ(before, weights(model)["table.weight"]) == [1, 7]


@in_processes(2)
def test_rows_that_are_frozen_later_keep_the_state_that_torch_made() -> None:
    def run(model: Net, backward: Callable[[Net, int], object]) -> Any:
        made = OPTIMIZERS["AdamW"](model.parameters())
        return train(model, made, {2: [1, 7, 9]}, backward, steps=4)

    seen, gradients = run(
        by_fsdp(net_of(False)), lambda model, step: model(batch(step, dist.get_rank())).backward()
    )
    assert all_same(seen, run(net_of(False), recorded(gradients))[0])


@in_processes(3)
def test_a_process_may_have_no_row_at_all() -> None:
    table = PartialEmbedding(2, D, trainable_rows=[1])
    with torch.no_grad():
        table.weight.fill_(1.0)
    model = nn.Sequential(table, nn.Linear(D, D))
    fully_shard(table, mesh=processes())
    fully_shard(model, mesh=processes())
    made, audit = OPTIMIZERS["AdamW-foreach"](model.parameters()), FrozenRowAudit(table)
    for _ in range(3):
        made.zero_grad()
        model(torch.tensor([0, 1, 1])).square().sum().backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.01)
        made.step()
    audit.check()
    assert (whole(table.weight) != 1).any(1).tolist() == [False, True]
    state = made.state_dict()["state"][0]["rowwise"]["state"]
    sizes = {key: list(entry["value"].shape) for key, entry in state.items()}
    assert sizes == {"step": [1], "exp_avg": [1, D], "exp_avg_sq": [1, D]}


@in_processes(2)
def test_the_audit_of_all_processes_tells_of_a_row_that_one_of_them_moved() -> None:
    model = by_fsdp(net_of(False, [1]))
    audit = FrozenRowAudit(model.table, "words")
    if dist.get_rank() == 1:
        local: Any = model.table.weight.detach()
        local.to_local()[-1] += 1  # which is found by its number in the table
    with pytest.raises(
        FrozenRowsMoved, match=rf"^words: 1 frozen row changed by step 3: {V - 1}\."
    ):
        audit.check(3)


# What is refused


def by_columns() -> None:
    plan = {"table": ColwiseParallel(output_layouts=Replicate())}
    parallelize_module(net_of(False, [1]), processes(), plan)


def by_columns_of_fsdp() -> None:
    def second_axis(parameter: nn.Parameter) -> Shard | None:
        return Shard(1) if parameter.dim() == 2 else None

    fully_shard(net_of(False, [1]), mesh=processes(), shard_placement_fn=second_axis)


def frozen_after_columns() -> None:
    model = net_of(False)
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
    made = OPTIMIZERS["AdamW"](model.parameters())
    model(torch.arange(V)).backward()
    made.step()


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
        before, made = whole(table.weight).detach().clone(), make(list(table.parameters()))
        table(torch.tensor([1, 7])).square().sum().backward()
        try:
            made.step()
        finally:
            assert torch.equal(before, whole(table.weight))

    return step


REFUSED: dict[str, tuple[Callable[[], object], str]] = {
    "columns": (
        by_columns,
        r"by rows, Shard\(0\)\. Received a weight of the shape \(11, 4\).*S.*1.*Rowwise",
    ),
    "columns_of_fsdp": (by_columns_of_fsdp, r"by rows, Shard\(0\)\. Received .*shard_placement_fn"),
    "frozen_after_columns": (frozen_after_columns, r"by rows, Shard\(0\)\."),
    "max_norm": (
        max_norm,
        r"max_norm=1\.0 in a PartialEmbedding whose weight is sharded\. Leave it out",
    ),
    "muon": (stepped_by(torch.optim.Muon), r"moves each row by itself.* Received Muon\."),
    "adafactor": (
        stepped_by(torch.optim.Adafactor),
        r"moves each row by itself.* Received Adafactor\.",
    ),
    "lbfgs": (stepped_by(torch.optim.LBFGS), r"moves each row by itself.* Received LBFGS\."),
    "sparse_adam": (stepped_by(torch.optim.SparseAdam), r"dense gradient\. Received SparseAdam\."),
    "zero_redundancy": (by_zero_redundancy, r"Received ZeroRedundancyOptimizer, .* AdamW\(whole\)"),
    "fsdp1_with_original_parameters": (
        lambda: in_fsdp1(use_orig_params=True),
        r"a vector of \d+ numbers .*ignored_states=keep_whole",
    ),
    "fsdp1": (
        lambda: in_fsdp1(use_orig_params=False),
        r"whose weight FSDP1 has made a part of .*ignored_states=keep_whole",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
@in_processes(2)
def test_what_cannot_be_kept_exact_on_shards_is_refused_before_a_row_moves(case: str) -> None:
    act, rule = REFUSED[case]
    with pytest.raises(InputError, match=rule):
        act()


@in_processes(2)
def test_a_table_that_fsdp1_has_flattened_keeps_no_other_from_its_steps() -> None:
    cpu = torch.device("cpu")
    flat = [FullyShardedDataParallel(Small(), device_id=cpu, use_orig_params=o) for o in (0, 1)]
    table = PartialEmbedding(V, D, trainable_rows=[1, 7])
    before, made = whole(table.weight).detach().clone(), OPTIMIZERS["AdamW"](table.parameters())
    table(torch.arange(V)).sum().backward()
    made.step()
    assert flat
    assert rows_that_differ(before, whole(table.weight)) == [1, 7]


# Checkpoints


@pytest.mark.parametrize(
    ("kind", "optimizer", "only_tables"),
    [
        *((kind, "AdamW", False) for kind in ("folder", "flat", "file")),
        *(("folder", name, True) for name in ("AdamW", "SGD-plain", "SGD", "Adagrad")),
    ],
)
@in_processes(2, 1, 3)
def test_what_two_processes_saved_is_read_by_any_number_bit_for_bit(
    kind: str, optimizer: str, only_tables: bool
) -> None:
    warnings.filterwarnings("ignore")
    shards.CHUNK_BYTES = 200  # so that rows come one by one, or two
    path = shared_folder() / f"{kind}-{optimizer}-{only_tables}"
    seen, number = path.with_suffix(".seen"), dist.get_world_size()
    options = StateDictOptions(flatten_optimizer_state_dict=kind == "flat")
    model, made = begun(optimizer, only_tables)
    if number == 2:
        go_on(model, made, range(4))
        before = memory(model, made)
        if kind == "file":
            whole_state = StateDictOptions(full_state_dict=True, cpu_offload=True)
            state = state_of(model, made, whole_state)
            if dist.get_rank() == 0:
                torch.save(state, path)
        else:
            dcp.save(state_of(model, made, options), checkpoint_id=path)
        assert differences(memory(model, made), before) == []  # saving leaves a run as it was
        go_on(model, made, range(4, STEPS))
        end = memory(model, made)
        if dist.get_rank() == 0:
            torch.save((before, end), seen)
        dist.barrier()
        model, made = begun(optimizer, only_tables)
    before, end = torch.load(seen, weights_only=True)
    # All rows join at once.
    model.set_rows("none")
    model.set_rows(ROWS["late"][3])
    if kind == "file":
        options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
        state = torch.load(path, weights_only=True)
    else:
        state = state_of(model, made, options)
        dcp.load(state, checkpoint_id=path)
    set_model_state_dict(model, state["model"], options=options)
    set_optimizer_state_dict(model, made, state["optimizer"], options=options)
    assert differences(memory(model, made), before) == []
    if number == 2:
        go_on(model, made, range(4, STEPS))
        assert differences(memory(model, made), end) == []
