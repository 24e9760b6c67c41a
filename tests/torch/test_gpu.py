"""What needs a GPU: `make test-gpu`.

Each row is looked up once a step, since sums have no order there.
"""

import copy
import io
import os
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import CASES_ON_GPU, GRADIENTS, Case, case_of, crossed
from oracle import assert_same_bits
from steps import train_save_and_load
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

from partial_embedding.torch import (
    FrozenRowAudit,
    PartialEmbedding,
    PartialLinear,
    rowwise,
    split_rows,
)
from partial_embedding.torch.rowcopy import write_rows

DEVICE = torch.device("cuda")
if not torch.cuda.is_available():
    pytest.skip("these tests need a GPU", allow_module_level=True)

V, D, STEPS = 400, 8, 6
FIRST, LATE = list(range(3, 90, 2)), list(range(100, 160))
FROZEN = [row for row in range(V) if row not in FIRST and row not in LATE]


def start() -> Tensor:
    return torch.randn(V, D, generator=torch.Generator().manual_seed(0))


def batch(step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    ids = torch.randperm(V, generator=generator)[: V // 2]
    return ids.to(DEVICE), torch.randn(len(ids), D, generator=generator).to(DEVICE)


def small_tables(case: Case) -> dict[int, Tensor]:
    """The rows of each cohort, trained in a plain table of their own."""
    found = {}
    for listed, since in ((FIRST, 0), (LATE, 3)):
        rows = torch.tensor(listed, device=DEVICE)
        table = nn.Embedding.from_pretrained(
            start()[listed], freeze=False, sparse=case.sparse_only
        ).to(DEVICE)
        optimizer = case.make(table.parameters())
        for step in range(since, STEPS):
            ids, up = batch(step)
            mine = torch.isin(ids, rows)
            slots = torch.searchsorted(rows, ids[mine])
            optimizer.zero_grad()
            table(slots).backward(up[mine])
            optimizer.step()
        found[since] = table.weight.detach()
    return found


def saved_and_loaded(state: Any, device: str) -> Any:
    """What another machine finds in a file."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, map_location=device)


def train(
    model: Callable[[Tensor], Tensor],
    table: PartialEmbedding,
    optimizer: torch.optim.Optimizer,
    after: Callable[[int], object] = lambda step: None,
) -> None:
    """All steps, of which the late rows join in the midst."""
    for step in range(STEPS):
        if step == 3:
            table.unfreeze_rows(LATE)
        ids, up = batch(step)
        optimizer.zero_grad()
        model(ids).backward(up)
        optimizer.step()
        after(step)


@pytest.mark.parametrize(("case", "sparse"), crossed(CASES_ON_GPU, GRADIENTS))
def test_rows_move_as_if_alone(case: Case, sparse: bool) -> None:
    table = PartialEmbedding.from_pretrained(start(), trainable_rows=FIRST, sparse=sparse)
    table.to(DEVICE)

    def check(step: int) -> None:
        assert_same_bits(table.weight[FROZEN].cpu(), start()[FROZEN], f"frozen at {step}")

    train(table, table, case.make(table.parameters()), check)
    small = small_tables(case)
    assert_same_bits(table.weight[FIRST], small[0], "the first rows")
    assert_same_bits(table.weight[LATE], small[3], "the late rows")


@pytest.mark.parametrize("name", ["AdamW-weight_decay=0.1", "SGD-momentum=0.9", "Adagrad"])
def test_lazily_the_rows_touched_move_as_if_alone(name: str) -> None:
    case = case_of(name)
    table = PartialEmbedding.from_pretrained(start(), trainable_rows=FIRST).to(DEVICE)
    optimizer = rowwise(case.make(table.parameters()), lazy=True)
    small = nn.Embedding.from_pretrained(start()[FIRST], freeze=False).to(DEVICE)
    other = case.make(small.parameters())
    rows = torch.tensor(FIRST, device=DEVICE)
    for step in range(STEPS):
        up = batch(step)[1][: len(FIRST)]
        for one, ids, module in (
            (optimizer, rows, table),
            (other, torch.arange(len(FIRST), device=DEVICE), small),
        ):
            one.zero_grad()
            module(ids).backward(up)
            one.step()
    assert_same_bits(table.weight[FIRST], small.weight, "the rows")
    assert_same_bits(table.weight[FROZEN].cpu(), start()[FROZEN], "frozen rows")


@pytest.mark.parametrize(("here", "there"), [("cuda", "cpu"), ("cpu", "cuda")])
def test_a_run_goes_on_on_another_device(here: str, there: str) -> None:
    def begun(device: str) -> tuple[PartialEmbedding, torch.optim.Optimizer]:
        table = PartialEmbedding.from_pretrained(start(), trainable_rows=FIRST).to(device)
        return table, rowwise(torch.optim.AdamW(table.parameters(), lr=0.1))

    def train(table: PartialEmbedding, optimizer: torch.optim.Optimizer, steps: range) -> None:
        for step in steps:
            if step == 3:
                table.unfreeze_rows(LATE)
            ids, up = batch(step)
            optimizer.zero_grad()
            table(ids.to(table.weight.device)).backward(up.to(table.weight.device))
            optimizer.step()

    table, optimizer = begun(here)
    train(table, optimizer, range(4))
    again, other = begun(there)
    again.set_trainable_rows([*FIRST, *LATE])
    again.load_state_dict(saved_and_loaded(table.state_dict(), there))
    other.load_state_dict(saved_and_loaded(optimizer.state_dict(), there))
    train(table, optimizer, range(4, STEPS))
    train(again, other, range(4, STEPS))
    assert_same_bits(again.weight[FROZEN].cpu(), start()[FROZEN], "frozen rows")
    torch.testing.assert_close(again.weight.cpu(), table.weight.cpu(), rtol=1e-5, atol=1e-6)


def test_a_table_goes_to_the_gpu_and_back_in_the_midst_of_training() -> None:
    table = PartialEmbedding.from_pretrained(start(), trainable_rows=FIRST)
    optimizer = torch.optim.AdamW(table.parameters(), lr=0.1, weight_decay=0.1)
    for step in range(STEPS):
        device = DEVICE if step % 2 else torch.device("cpu")
        table.to(device)
        ids, up = batch(step)
        optimizer.zero_grad()
        table(ids.to(device)).backward(up.to(device))
        optimizer.step()
    frozen = [row for row in range(V) if row not in FIRST]
    assert_same_bits(table.weight[frozen].cpu(), start()[frozen], "frozen rows")


def test_a_stream_of_ones_own_gives_the_gradient_of_the_default_one() -> None:
    table = PartialEmbedding.from_pretrained(start(), trainable_rows=FIRST).to(DEVICE)
    gradients = []
    for stream in (torch.cuda.current_stream(), torch.cuda.Stream()):
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            ids, up = batch(0)
            table.weight.grad = None
            table(ids).backward(up)
        torch.cuda.current_stream().wait_stream(stream)
        assert table.weight.grad is not None
        gradients.append(table.weight.grad.to_dense())
        # Memory that is used again too early would change what was kept.
        torch.randn(4 * V, D, device=DEVICE)
    assert_same_bits(*gradients, "the gradient")


def test_scaling_finds_infinities_and_skips_the_step() -> None:
    table = PartialEmbedding.from_pretrained(start(), trainable_rows=FIRST).to(DEVICE)
    optimizer = torch.optim.AdamW(table.parameters(), lr=0.1, fused=True)
    scaler = torch.amp.GradScaler(init_scale=16.0)
    for step in range(3):
        before = table.weight.detach().clone()
        ids, up = batch(step)
        up[ids == FIRST[0]] = float("inf") if step == 1 else 1.0
        ids = torch.cat([ids, torch.tensor(FIRST[:1], device=DEVICE)])
        up = torch.cat([up, torch.full((1, D), float("inf") if step == 1 else 1.0, device=DEVICE)])
        optimizer.zero_grad()
        with torch.autocast("cuda"):
            out = table(ids)
        scaler.scale((out * up).sum()).backward()
        scaler.step(optimizer)
        scaler.update()
        assert torch.equal(table.weight, before) == (step == 1)


def waits(call: Callable[[], object]) -> int:
    """How often a call makes the host wait for the GPU."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            call()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(one.message) for one in caught)


@pytest.mark.parametrize("clipped", [False, True], ids=["plain", "clipped"])
@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "sparse"])
def test_a_step_hardly_waits(sparse: bool, clipped: bool) -> None:
    """The host must learn how many sparse entries are of trainable rows; and of how many rows."""
    table = PartialEmbedding.from_pretrained(start(), trainable_rows=FIRST, sparse=sparse)
    optimizer = torch.optim.AdamW(table.to(DEVICE).parameters())
    ids, up = batch(0)

    def step() -> None:
        optimizer.zero_grad()
        table(ids).backward(up)
        if clipped:
            nn.utils.clip_grad_norm_(table.parameters(), 1.0)
        optimizer.step()

    step()
    waits(step)  # what is loaded when it is first used may wait
    assert waits(step) == sparse + (sparse and clipped)


@pytest.mark.parametrize("width", [8, 6, 64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_are_written_by_wide_elements_to_the_bit(dtype: torch.dtype, width: int) -> None:
    table = torch.randn(V, width, device=DEVICE).to(dtype)
    rows = torch.tensor(FIRST, device=DEVICE)
    # Every pattern of bits, so that there are numbers that are none.
    shape = (len(FIRST), width * dtype.itemsize)
    values = torch.randint(256, shape, dtype=torch.uint8, device=DEVICE).view(dtype)
    wanted = table.clone()
    wanted[rows] = values
    write_rows(table, rows, None, values)
    assert_same_bits(table, wanted, "the table")


def test_memory_follows_the_rows() -> None:
    wide, few = 64, range(0, 1_000_000, 100)
    weight = torch.zeros(1_000_000, wide, device=DEVICE)
    table = PartialEmbedding.from_pretrained(weight, trainable_rows=few)
    optimizer = torch.optim.AdamW(table.parameters())
    ids = torch.randint(1_000_000, (4096,), device=DEVICE)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    for _ in range(3):
        optimizer.zero_grad()
        table(ids).sum().backward()
        optimizer.step()
    of_rows = len(few) * wide * weight.itemsize
    added = torch.cuda.max_memory_allocated() - before
    # Mask and slots take five bytes a row of the table; its values are 256.
    assert added < 12 * of_rows + 9 * len(weight)


def test_a_compiled_model_trains_as_the_plain_one() -> None:
    def trained(compiled: bool) -> Tensor:
        torch.manual_seed(0)
        table = PartialEmbedding.from_pretrained(start(), trainable_rows=FIRST)
        model = nn.Sequential(table, nn.Linear(D, D)).to(DEVICE)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.1)
        run = torch.compile(model) if compiled else model
        train(run, table, optimizer)
        assert_same_bits(table.weight[FROZEN].cpu(), start()[FROZEN], "frozen rows")
        return table.weight.detach()

    torch.testing.assert_close(trained(True), trained(False), rtol=1e-3, atol=1e-3)


def test_averages_and_an_audit_see_frozen_rows_that_stay() -> None:
    table = PartialEmbedding.from_pretrained(start(), trainable_rows=FIRST).to(DEVICE)
    average = AveragedModel(table, use_buffers=True)
    optimizer = torch.optim.AdamW(table.parameters(), lr=0.1)
    audit = FrozenRowAudit(table)
    for step in range(STEPS):
        ids, up = batch(step)
        optimizer.zero_grad()
        table(ids).backward(up)
        optimizer.step()
        average.update_parameters(table)
        audit.check(step)
    frozen = [row for row in range(V) if row not in FIRST]
    assert_same_bits(average.module.weight[frozen].cpu(), start()[frozen], "frozen rows")
    assert not torch.equal(average.module.weight[FIRST].cpu(), start()[FIRST])


def test_a_step_is_captured_and_replayed() -> None:
    """By dense gradients: to find the trainable ones among sparse entries, the host must wait."""

    def trained(captured: bool) -> Tensor:
        table = PartialEmbedding.from_pretrained(start(), trainable_rows=FIRST, sparse=False)
        table.to(DEVICE)
        optimizer = torch.optim.AdamW(
            table.parameters(), lr=torch.tensor(0.1, device=DEVICE), capturable=True
        )
        ids, up = batch(0)

        def step() -> None:
            optimizer.zero_grad()
            table(ids).backward(up)
            optimizer.step()

        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                step()
        torch.cuda.current_stream().wait_stream(stream)
        if captured:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                step()
            for _ in range(4):
                graph.replay()
        else:
            for _ in range(4):
                step()
        return table.weight.detach()

    assert_same_bits(trained(captured=True), trained(captured=False), "the table")


def test_a_head_that_is_tied_to_a_table_in_bfloat16() -> None:
    table = PartialEmbedding.from_pretrained(start().bfloat16(), trainable_rows=FIRST)
    head = PartialLinear(D, V, bias=False, trainable_rows=FIRST)
    head.weight = table.weight
    model = nn.ModuleList([table, head]).to(DEVICE)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.1)
    for step in range(3):
        optimizer.zero_grad()
        ids, _ = batch(step)
        nn.functional.cross_entropy(head(table(ids)).float(), ids).backward()
        optimizer.step()
    frozen = [row for row in range(V) if row not in FIRST]
    assert_same_bits(table.weight[frozen].cpu(), start().bfloat16()[frozen], "frozen rows")
    assert not torch.equal(table.weight[FIRST].cpu(), start().bfloat16()[FIRST])


@pytest.fixture
def nccl(tmp_path: Path) -> Iterator[None]:
    """This process, as a group of one."""
    os.environ.setdefault("NCCL_SOCKET_IFNAME", "lo")
    dist.init_process_group("nccl", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def by_ddp(model: nn.Sequential) -> nn.Module:
    return DistributedDataParallel(model)


def by_fsdp(model: nn.Sequential) -> nn.Module:
    mesh = init_device_mesh("cuda", (1,))
    fully_shard(model[0], mesh=mesh)
    sharded: nn.Module = fully_shard(model, mesh=mesh)
    return sharded


def by_split_rows(model: nn.Sequential) -> nn.Module:
    split_rows(model[0], init_device_mesh("cuda", (1,)))
    return model


@pytest.mark.parametrize("share", [by_ddp, by_fsdp, by_split_rows])
def test_one_process_under_nccl_trains_as_it_does_alone(
    share: Callable[[nn.Sequential], nn.Module], nccl: None
) -> None:
    def trained(model: nn.Module, table: PartialEmbedding) -> Tensor:
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.1)
        train(model, table, optimizer)
        weight = table.weight.detach()
        return weight.to_local() if hasattr(weight, "to_local") else weight

    torch.manual_seed(0)
    table = PartialEmbedding.from_pretrained(start(), trainable_rows=FIRST)
    alone = nn.Sequential(table, nn.Linear(D, D)).to(DEVICE)
    model = copy.deepcopy(alone)
    shared = trained(share(model), model[0])
    assert_same_bits(shared[FROZEN].cpu(), start()[FROZEN], "frozen rows")
    assert_same_bits(shared, trained(alone, table), "the table")


def test_a_default_device_is_for_what_users_make(tmp_path: Path) -> None:
    for device in ("cpu", "cuda"):
        table = PartialEmbedding.from_pretrained(start().to(device), trainable_rows=FIRST)
        with torch.device("cuda"):
            again = train_save_and_load(table, tmp_path)
        assert_same_bits(again.weight, table.weight, "the table")


def test_a_pinned_table_stays_with_the_cpu_and_feeds_the_gpu() -> None:
    table = PartialEmbedding.from_pretrained(start().pin_memory(), trainable_rows=FIRST)
    optimizer = torch.optim.SGD(table.parameters(), lr=0.1)
    ids, up = batch(0)
    out = table(ids.cpu()).to(DEVICE, non_blocking=True)
    (out * up).sum().backward()
    optimizer.step()
    frozen = [row for row in range(V) if row not in FIRST]
    assert table.weight.is_pinned()
    assert_same_bits(table.weight[frozen], start()[frozen], "frozen rows")
