"""One rank of runs that Lightning shards over two, for `test_sharded_runs.py`.

What it saw, batch by batch, is written to `{folder}/{case}-{rank}.pt`.
"""

import json
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.strategies import ModelParallelStrategy
from small_runs import ShardWitness, trainer
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import RowwiseParallel, parallelize_module
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader

from partial_embedding.callbacks.lightning import RowMonitor, RowUnfreezing
from partial_embedding.torch import PartialEmbedding, PartialLinear

V, D, STEPS, SAVED_AT = 11, 4, 10, 5
SCHEDULE = {
    "stages": [
        {"step": 0, "rows": [1, 7, 9]},
        {"step": 3, "rows": [0, 1, 5, 7, 9], "lr_scale": 0.5, "warmup_steps": 3},
        {"step": 7, "rows": [0, 5, 9, 10]},
    ]
}


class Inner(nn.Module):
    """What is sharded: a table, a hidden layer, and a head of rows."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = PartialEmbedding(V, D)
        self.hidden = nn.Linear(D, D)
        self.head = PartialLinear(D, V)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.hidden(self.table(ids)))


def batch(step: int, rank: int) -> tuple[Tensor, Tensor]:
    made = torch.Generator().manual_seed(100 * step + rank)
    return torch.randint(V, (4, 3), generator=made), torch.randint(V, (4, 3), generator=made)


def loss_of(inner: nn.Module, step: int, rank: int) -> Tensor:
    ids, labels = batch(step, rank)
    return cross_entropy(inner(ids).flatten(0, 1), labels.flatten())


def optimizer_of(parameters: Iterator[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=0.1, weight_decay=0.1)


class Net(pl.LightningModule):
    """Trains on batches that follow from the step, so that a resumed run sees the same ones."""

    def __init__(self, tensor: bool = False) -> None:
        super().__init__()
        self.inner = Inner()
        self.tensor = tensor

    def configure_model(self) -> None:
        mesh = self.device_mesh
        assert mesh is not None
        if self.tensor:
            by_rows = RowwiseParallel(input_layouts=Replicate(), output_layouts=Replicate())
            parallelize_module(self.inner, mesh["tensor_parallel"], {"table": by_rows})
        fully_shard(self.inner.table, mesh=mesh["data_parallel"])
        fully_shard(self.inner.head, mesh=mesh["data_parallel"])
        fully_shard(self.inner, mesh=mesh["data_parallel"])

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        assert self.device_mesh is not None
        rank = self.device_mesh["data_parallel"].get_local_rank()
        return loss_of(self.inner, self.trainer.global_step, rank)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return optimizer_of(self.parameters())


def fit(folder: Path, in_folder: bool, resume: bool, tensor: bool = False) -> dict[str, Any]:
    path = folder / ("saved" if in_folder else "saved.ckpt")
    unfreezing, monitor = RowUnfreezing(SCHEDULE, audit=1), RowMonitor(every_n_steps=2)
    witness = ShardWitness(None if resume or tensor else SAVED_AT, path)
    strategy = ModelParallelStrategy(
        data_parallel_size=1 if tensor else 2,
        tensor_parallel_size=2 if tensor else 1,
        save_distributed_checkpoint=in_folder,
    )
    made = trainer(
        unfreezing,
        monitor,
        witness,
        devices=2,
        strategy=strategy,
        max_epochs=1,
        max_steps=STEPS,
        default_root_dir=folder,
    )
    net = Net(tensor)
    loader = DataLoader(torch.arange(2 * STEPS), batch_size=1)  # type: ignore[arg-type]
    made.fit(net, loader, ckpt_path=path if resume else None)
    return {
        "seen": [{k.removeprefix("inner."): v for k, v in at.items()} for at in witness.seen],
        "rows": net.inner.table.trainable_rows,
        "audit": [(one.table, one.frozen, one.changed) for one in unfreezing.audit_results],
        "record": json.loads(monitor.path.read_text()) if monitor.path else None,
    }


def main(folder: Path) -> None:
    rank = os.environ["LOCAL_RANK"]
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    for in_folder in (True, False):
        for resume in (False, True):
            kept = fit(folder, in_folder, resume)
            kind = "folder" if in_folder else "file"
            torch.save(kept, folder / f"{kind}-{resume}-{rank}.pt")
    torch.save(fit(folder, True, False, tensor=True), folder / f"tensor-{rank}.pt")
