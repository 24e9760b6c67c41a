"""What a step of a table costs each of two processes: in FSDP2, whole beside it, and split."""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from ddp import sent
from peft import TrainableTokensConfig, inject_adapter_in_model
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict
from torch.distributed.fsdp import fully_shard
from torch.profiler import ProfilerActivity, profile

from partial_embedding.torch import PartialEmbedding, average_gradients, keep_whole, split_rows

PROCESSES, STEPS, SKIPPED = 2, 6, 2
SIZES = (10**5, 10**6)
WIDTH, TRAINABLE, IDS = 16, 1000, 2000
WAYS = {
    "plain": "nn.Embedding in FSDP2",
    "peft": "PEFT's trainable tokens in FSDP2",
    "inside": "PartialEmbedding in FSDP2",
    "whole": "keep_whole, beside FSDP2",
    "split": "split_rows, beside FSDP2",
}


class Net(nn.Module):
    """A table and a layer that FSDP2 shards."""

    def __init__(self, way: str, rows: int) -> None:
        super().__init__()
        self.table: nn.Embedding = nn.Embedding(rows, WIDTH)
        last = range(rows - TRAINABLE, rows)
        if way not in ("plain", "peft"):
            self.table = PartialEmbedding(rows, WIDTH, trainable_rows=last, sparse=way != "inside")
        self.hidden = nn.Linear(WIDTH, WIDTH)
        if way == "peft":
            tokens = TrainableTokensConfig(target_modules=["table"], token_indices=list(last))
            inject_adapter_in_model(tokens, self)
            self.hidden.requires_grad_(True)

    def forward(self, ids: Tensor) -> Tensor:
        """Look rows up."""
        return self.hidden(self.table(ids)).square().mean()


def batch(step: int, rank: int, rows: int) -> Tensor:
    """Ids, of which one in ten is of a row that trains."""
    made = torch.Generator().manual_seed(10 * step + rank)
    few = IDS // 10
    frozen = torch.randint(rows - TRAINABLE, (IDS - few,), generator=made)
    return torch.cat([frozen, torch.randint(rows - TRAINABLE, rows, (few,), generator=made)])


def bytes_in(folder: Path) -> int:
    """What the files of a folder hold."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def measure_one(rank: int, folder: Path, way: str, rows: int) -> dict[str, Any]:
    """What one process has, allocates and sends in a step, and what both save."""
    torch.set_num_threads(1)
    store = dist.FileStore(str(folder / "store"), PROCESSES)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=PROCESSES)
    mesh = dist.init_device_mesh("cpu", (PROCESSES,))
    net, ours = Net(way, rows), set()
    if way == "whole":
        ours = keep_whole(net)
    elif way == "split":
        ours = split_rows(net.table, mesh)
    fully_shard(net, mesh=mesh, ignored_params=ours)
    optimizer = torch.optim.AdamW(net.parameters())

    def step(number: int) -> None:
        optimizer.zero_grad()
        net(batch(number, rank, rows)).backward()
        average_gradients(optimizer)
        optimizer.step()

    sizes = []
    for number in range(STEPS):
        dist.barrier()
        before = sent()
        dist.barrier()
        step(number)
        dist.barrier()
        sizes.append((sent() - before) / PROCESSES)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        step(STEPS)
    dcp.save(
        {"optimizer": get_optimizer_state_dict(net, optimizer)}, checkpoint_id=folder / "saved"
    )
    held = sum(
        one.to_local().nbytes if hasattr(one, "to_local") else one.nbytes
        for one in net.table.parameters()
    )
    return {
        "way": way,
        "rows": rows,
        "weights": held,
        "largest": max(event.cpu_memory_usage for event in seen.events()),
        "sent": statistics.median(sizes[SKIPPED:]),
        "saved": bytes_in(folder / "saved"),
    }


def measure(way: str, rows: int) -> dict[str, Any]:
    """What `measure_one` gives in the first of two fresh processes."""
    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
        processes = [
            subprocess.Popen(
                [sys.executable, __file__, "--one", str(rank), folder, way, str(rows)],
                stdout=subprocess.PIPE,
                text=True,
                env=environment,
            )
            for rank in range(PROCESSES)
        ]
        said = [process.communicate()[0] for process in processes]
    if any(process.returncode for process in processes):
        raise RuntimeError(f"a process of the way {way!r} failed")
    found: dict[str, Any] = json.loads(said[0].splitlines()[-1])
    return found


def report(results: list[dict[str, Any]]) -> str:
    """The page of what was measured."""
    lines = [
        "# A table among two processes",
        "",
        f"D = {WIDTH}, K = {TRAINABLE:,}, AdamW, {IDS:,} ids a step in each of {PROCESSES} gloo "
        "processes on one CPU, one in ten of a row that trains. What is sent is counted at the "
        "loopback interface, headers and the other layer's few bytes included. "
        f"torch {torch.__version__}, {platform.machine()}. Made by "
        "`python benchmarks/several_devices.py --report benchmarks/several_devices.md`.",
        "",
        "| | V | weights in a process | largest allocation in a step | sent by a process in a step "
        "| optimizer checkpoint |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for result in results:
        numbers = [result[key] for key in ("weights", "largest", "sent", "saved")]
        shown = " | ".join(f"{number / 1e6:,.2f} MB" for number in numbers)
        lines.append(f"| {WAYS[result['way']]} | {result['rows']:,} | {shown} |")
    return "\n".join([*lines, ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--report", type=Path, help="where the page goes; by default it is printed")
    parser.add_argument("--one", nargs=4, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        rank, folder, way, rows = args.one
        print(json.dumps(measure_one(int(rank), Path(folder), way, int(rows))), flush=True)
        os._exit(0)  # threads of the process group may abort an interpreter that ends with them
    page = report([measure(way, rows) for way in WAYS for rows in SIZES])
    if args.report is None:
        print(page)
    else:
        args.report.write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()
