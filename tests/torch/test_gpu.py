"""What needs a GPU: `make test-gpu`.

Each row is looked up once a step, since sums have no order there. Written without a GPU at hand,
and so not run yet but for what a CPU can do of it.
"""

import copy
import os
from typing import Any

import pytest
import torch
from oracle import assert_same_bits
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn.parallel import DistributedDataParallel

from partial_embedding.torch import PartialEmbedding, PartialLinear

DEVICE = torch.device("cuda")
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="these tests need a GPU")

V, D, STEPS = 400, 8, 6
FIRST, LATE = list(range(3, 90, 2)), list(range(100, 160))
FROZEN = [row for row in range(V) if row not in FIRST and row not in LATE]
OPTIMIZERS: dict[str, tuple[str, dict[str, Any]]] = {
    "AdamW": ("AdamW", {"weight_decay": 0.1}),
    "AdamW, one by one": ("AdamW", {"weight_decay": 0.1, "foreach": False}),
    "AdamW, fused": ("AdamW", {"weight_decay": 0.1, "fused": True}),
    "AdamW, capturable": ("AdamW", {"weight_decay": 0.1, "capturable": True}),
    "SGD, fused": ("SGD", {"momentum": 0.9, "weight_decay": 0.1, "fused": True}),
    "SGD": ("SGD", {}),
    "Adagrad": ("Adagrad", {}),
    "RMSprop, capturable": ("RMSprop", {"capturable": True}),
}


def start() -> Tensor:
    return torch.randn(V, D, generator=torch.Generator().manual_seed(0))


def made(kind: str, parameters: Any) -> torch.optim.Optimizer:
    name, options = OPTIMIZERS[kind]
    optimizer: torch.optim.Optimizer = getattr(torch.optim, name)(parameters, lr=0.1, **options)
    return optimizer


def batch(step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    ids = torch.randperm(V, generator=generator)[: V // 2]
    return ids.to(DEVICE), torch.randn(len(ids), D, generator=generator).to(DEVICE)


def small_tables(kind: str) -> dict[int, Tensor]:
    """The rows of each cohort, trained in a plain table of their own."""
    found = {}
    for rows, since in ((FIRST, 0), (LATE, 3)):
        table = nn.Embedding.from_pretrained(start()[rows], freeze=False).to(DEVICE)
        optimizer = made(kind, table.parameters())
        for step in range(since, STEPS):
            ids, up = batch(step)
            mine = torch.isin(ids, torch.tensor(rows, device=DEVICE))
            slots = torch.searchsorted(torch.tensor(rows, device=DEVICE), ids[mine])
            optimizer.zero_grad()
            table(slots).backward(up[mine])
            optimizer.step()
        found[since] = table.weight.detach()
    return found


@pytest.mark.parametrize("sparse", [True, False], ids=["sparse", "dense"])
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_rows_move_as_if_alone(kind: str, sparse: bool) -> None:
    table = PartialEmbedding.from_pretrained(start(), trainable_rows=FIRST, sparse=sparse)
    table.to(DEVICE)
    optimizer = made(kind, table.parameters())
    for step in range(STEPS):
        if step == 3:
            table.unfreeze_rows(LATE)
        ids, up = batch(step)
        optimizer.zero_grad()
        table(ids).backward(up)
        optimizer.step()
        assert_same_bits(table.weight[FROZEN].cpu(), start()[FROZEN], f"frozen at {step}")
    small = small_tables(kind)
    assert_same_bits(table.weight[FIRST], small[0], "the first rows")
    assert_same_bits(table.weight[LATE], small[3], "the late rows")


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


def test_one_process_under_nccl_trains_as_it_does_alone(tmp_path: Any) -> None:
    def trained(model: nn.Module, table: PartialEmbedding) -> Tensor:
        optimizer = torch.optim.AdamW(table.parameters(), lr=0.1)
        for step in range(STEPS):
            ids, up = batch(step)
            optimizer.zero_grad()
            model(ids).backward(up)
            optimizer.step()
        return table.weight.detach()

    alone = PartialEmbedding.from_pretrained(start(), trainable_rows=FIRST).to(DEVICE)
    shared = copy.deepcopy(alone)
    shared.set_trainable_rows(FIRST)
    os.environ.setdefault("NCCL_SOCKET_IFNAME", "lo")
    dist.init_process_group("nccl", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model = DistributedDataParallel(nn.Sequential(shared, nn.Linear(D, D).to(DEVICE)))
        assert model(batch(0)[0]).shape == (V // 2, D)
        assert_same_bits(trained(shared, shared), trained(alone, alone), "the table")
    finally:
        dist.destroy_process_group()


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
