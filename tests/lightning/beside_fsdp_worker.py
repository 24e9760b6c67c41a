"""One rank of runs in which FSDP2 shards a model, for `test_beside_fsdp.py`.

What it saw, batch by batch, is written to `{folder}/{case}-{rank}.pt`.
"""

import os
from functools import partial
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from lightning_fabric import Fabric
from lightning_fabric.strategies import ModelParallelStrategy as FabricStrategy
from pytorch_lightning.strategies import DDPStrategy, ModelParallelStrategy
from small_runs import (
    CLASSES,
    SCHEDULE,
    STAGES,
    Net,
    ShardWitness,
    V,
    data,
    loader,
    loss_of,
    trainer,
    weights_of,
)
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.utils.data import Subset

from partial_embedding.callbacks.lightning import RowUnfreezing
from partial_embedding.torch import average_gradients, keep_whole, split_rows

EPOCHS = 4
# By default Lightning takes the processes of one machine for tensor parallelism.
# Rows join and leave before and after the step at which a run is saved.
SAVED_AT = 5
BY_STEP = {
    "stages": [
        {"step": 0, "rows": [1, 4, 6]},
        {"step": 3, "rows": [1, 2, 4, 6, 8], "lr_scale": 0.5, "warmup_steps": 3},
        {"step": 8, "rows": [2, 8, 9]},
    ]
}
SIZES = {"data_parallel_size": 2, "tensor_parallel_size": 1}


class Whole(Net):
    """Its table stays whole; the head is sharded."""

    def configure_model(self) -> None:
        keep_whole(self)
        fully_shard(self.head, mesh=self.device_mesh["data_parallel"])


class Split(Net):
    """The rows of its table are split; the head is sharded."""

    def configure_model(self) -> None:
        mesh = self.device_mesh["data_parallel"]
        split_rows(self.words, mesh)
        fully_shard(self.head, mesh=mesh)


CASES: dict[str, dict[str, Any]] = {
    "ddp": {"kind": Net},
    "whole": {"kind": Whole},
    "split": {"kind": Split},
    "ddp clipped": {"kind": Net, "gradient_clip_val": 0.05, "accumulate_grad_batches": 3},
    "whole clipped": {"kind": Whole, "gradient_clip_val": 0.05, "accumulate_grad_batches": 3},
    "split clipped": {"kind": Split, "gradient_clip_val": 0.05, "accumulate_grad_batches": 3},
}


def own_batches() -> Any:
    every = data(6)
    return loader(Subset(every, range(int(os.environ["LOCAL_RANK"]), len(every), 2)))


def run(name: str, folder: Path) -> None:
    options = dict(CASES[name])
    net = options.pop("kind")().build(seed=int(os.environ["LOCAL_RANK"]))
    # Lightning makes the head alike under DDP alone.
    net.head.load_state_dict(Net().build().head.state_dict())
    strategy: Any = (
        DDPStrategy if name.startswith("ddp") else partial(ModelParallelStrategy, **SIZES)
    )
    callback, witness = RowUnfreezing(SCHEDULE, audit=1), ShardWitness()
    made = trainer(
        callback,
        witness,
        strategy=strategy(process_group_backend="gloo"),
        devices=2,
        use_distributed_sampler=False,
        **options,
    )
    made.fit(net, own_batches())
    kept = {"weights": witness.seen, "reports": [r.changed for r in callback.audit_results]}
    torch.save(kept, folder / f"{name}-{made.global_rank}.pt")


class Replayed(pl.Callback):
    """Gives each step the batch of its number."""

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, index: int) -> None:
        drawn = torch.Generator().manual_seed(2 * trainer.global_step + trainer.global_rank)
        for part, height in zip(batch, (V, CLASSES), strict=True):
            part.copy_(torch.randint(height, part.shape, generator=drawn))


def run_and_resume(kind: str, distributed: bool, folder: Path) -> None:
    """Weights after each step, of a run and of one that goes on from its middle."""
    path, seen = folder / f"{kind}-{distributed}.ckpt", {}
    for name, save_at, begins in (("whole", SAVED_AT, None), ("resumed", None, path)):
        net = (Whole if kind == "whole" else Split)().build()
        witness = ShardWitness(save_at, path)
        strategy = ModelParallelStrategy(
            save_distributed_checkpoint=distributed, process_group_backend="gloo", **SIZES
        )
        made = trainer(
            RowUnfreezing(BY_STEP, audit=1),
            witness,
            Replayed(),
            strategy=strategy,
            devices=2,
            use_distributed_sampler=False,
            gradient_clip_val=0.05,
        )
        made.fit(net, own_batches(), ckpt_path=begins)
        seen[name] = witness.seen
    torch.save(seen, folder / f"resumed-{kind}-{distributed}-{made.global_rank}.pt")


def run_fabric(folder: Path) -> None:
    """A loop of Fabric's, whose rows are set by hand."""
    strategy = FabricStrategy(parallelize_fn=parallelize, **SIZES, process_group_backend="gloo")
    fabric = Fabric(accelerator="cpu", devices=2, strategy=strategy)
    fabric.launch()
    net = Net().build(seed=fabric.global_rank)
    net.head.load_state_dict(Net().build().head.state_dict())
    plain = Module(net.words, net.head)
    module = fabric.setup_module(plain)
    optimizer = fabric.setup_optimizers(
        torch.optim.AdamW(module.parameters(), lr=0.1, weight_decay=0.3)
    )
    batches = fabric.setup_dataloaders(own_batches(), use_distributed_sampler=False)
    seen = []
    for epoch in range(EPOCHS):
        if epoch in STAGES:
            plain.words.set_trainable_rows(list(STAGES[epoch]))
        for ids, labels in batches:
            optimizer.zero_grad()
            fabric.backward(module(ids, labels))
            average_gradients(optimizer)
            fabric.clip_gradients(module, optimizer, max_norm=1e9)
            optimizer.step()
            seen.append(weights_of(plain))
    torch.save({"weights": seen, "reports": []}, folder / f"fabric-{fabric.global_rank}.pt")


class Module(nn.Module):
    def __init__(self, words: nn.Module, head: nn.Linear) -> None:
        super().__init__()
        self.words, self.head = words, head

    def forward(self, ids: Tensor, labels: Tensor) -> Tensor:
        return loss_of(self.head, [self.words(ids)], labels)


def parallelize(module: Any, mesh: Any) -> Any:
    keep_whole(module)
    fully_shard(module.head, mesh=mesh["data_parallel"])
    return module


def main(folder: Path) -> None:
    for case_name in CASES:
        run(case_name, folder)
    for which, in_a_folder in (("whole", True), ("split", False)):
        run_and_resume(which, in_a_folder, folder)
    run_fabric(folder)
