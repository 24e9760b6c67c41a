"""Runs in which a model is sharded over two processes: what each of them saw, batch by batch."""

import json
from functools import cache, partial
from typing import Any

import pytorch_lightning as pl
import torch
from launch import of_all, shared_folder
from lightning_fabric import Fabric
from lightning_fabric.strategies import ModelParallelStrategy as FabricStrategy
from pytorch_lightning.strategies import DDPStrategy, ModelParallelStrategy
from small_runs import (
    CLASSES,
    EPOCHS,
    SCHEDULE,
    STAGES,
    Net,
    Scored,
    V,
    Witness,
    data,
    known_rank,
    loader,
    trainer,
    weights_of,
)
from torch import Tensor
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import RowwiseParallel, parallelize_module
from torch.utils.data import Subset

from partial_embedding.callbacks.lightning import RowMonitor, RowUnfreezing
from partial_embedding.torch import average_gradients, keep_whole, split_rows

# By default Lightning takes the processes of one machine for tensor parallelism.
BY_DATA = {"data_parallel_size": 2, "tensor_parallel_size": 1}
BY_TENSOR = {"data_parallel_size": 1, "tensor_parallel_size": 2}


class Whole(Net):
    """Its table stays whole; the head is sharded."""

    def configure_model(self) -> None:
        beside_whole_tables(self, self.device_mesh)


def beside_whole_tables(net: Any, mesh: Any) -> Any:
    keep_whole(net)
    fully_shard(net.head, mesh=mesh["data_parallel"])
    return net


class Split(Net):
    """The rows of its table are split; the head is sharded."""

    def configure_model(self) -> None:
        mesh = self.device_mesh["data_parallel"]
        split_rows(self.words, mesh)
        fully_shard(self.head, mesh=mesh)


class Sharded(Scored):
    """FSDP2 shards each part of it."""

    def configure_model(self) -> None:
        for part in (self.words, self.scores, self.head):
            fully_shard(part, mesh=self.device_mesh["data_parallel"])


class Parallel(Sharded):
    """The rows of its table are those of tensor parallelism."""

    def configure_model(self) -> None:
        by_rows = RowwiseParallel(input_layouts=Replicate(), output_layouts=Replicate())
        parallelize_module(self, self.device_mesh["tensor_parallel"], {"words": by_rows})
        super().configure_model()


# Runs beside what DDP makes of the same batches


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
    return loader(Subset(every, range(known_rank(), len(every), 2)))


def begun_apart(kind: type[Net]) -> Any:
    """Another table in each process; Lightning makes the head alike under DDP alone."""
    net = kind().build(seed=known_rank())
    net.head.load_state_dict(Net().build().head.state_dict())
    return net


def on_two(*callbacks: pl.Callback, strategy: Any, **options: Any) -> Any:
    made = strategy(process_group_backend="gloo")
    return trainer(*callbacks, strategy=made, devices=2, use_distributed_sampler=False, **options)


@cache
def ranks(name: str) -> list[dict[str, Any]]:
    """What each of the two ranks saw, of a case that is run once."""
    return of_all(run_fabric() if name == "fabric" else run(name))


def run(name: str) -> dict[str, Any]:
    options = dict(CASES[name])
    net = begun_apart(options.pop("kind"))
    strategy: Any = (
        DDPStrategy if name.startswith("ddp") else partial(ModelParallelStrategy, **BY_DATA)
    )
    callback, witness = RowUnfreezing(SCHEDULE, audit=1), Witness()
    made = on_two(callback, witness, strategy=strategy, **options)
    made.fit(net, own_batches())
    return {"weights": witness.seen, "reports": [r.changed for r in callback.audit_results]}


def run_fabric() -> dict[str, Any]:
    """A loop of Fabric's, whose rows are set by hand."""
    strategy = FabricStrategy(beside_whole_tables, **BY_DATA, process_group_backend="gloo")
    fabric = Fabric(accelerator="cpu", devices=2, strategy=strategy)
    fabric.launch()
    net = begun_apart(Net)
    module = fabric.setup_module(net)
    optimizer = fabric.setup_optimizers(*net.configure_optimizers())
    batches = fabric.setup_dataloaders(own_batches(), use_distributed_sampler=False)
    seen = []
    for epoch in range(EPOCHS):
        if epoch in STAGES:
            net.words.set_trainable_rows(list(STAGES[epoch]))
        for index, batch in enumerate(batches):
            optimizer.zero_grad()
            fabric.backward(module.training_step(batch, index))
            average_gradients(optimizer)
            fabric.clip_gradients(module, optimizer, max_norm=1e9)
            optimizer.step()
            seen.append(weights_of(net))
    return {"weights": seen, "reports": []}


# Runs that are saved at a step, and resumed from there


SAVED_AT = 5
# Rows join and leave before and after that step.
ROWS = {0: [1, 4, 6], 3: [1, 2, 4, 6, 8], 8: [2, 8, 9]}
RATE = {"lr_scale": 0.5, "warmup_steps": 3}  # of those that join at step 3
BY_STEP = {
    "stages": [
        {"step": step, "rows": rows, **(RATE if step == 3 else {})} for step, rows in ROWS.items()
    ]
}
# What is sharded, and whether each process writes a part of a folder.
SAVED: dict[str, tuple[type[Net], bool]] = {
    "whole in a folder": (Whole, True),
    "split in a file": (Split, False),
    "sharded in a folder": (Sharded, True),
    "sharded in a file": (Sharded, False),
    "parallel in a folder": (Parallel, True),
}


def batch_of(step: int, rank: int) -> list[Tensor]:
    drawn = torch.Generator().manual_seed(2 * step + rank)
    return [
        torch.randint(V, (4, 3), generator=drawn),
        torch.randint(CLASSES, (4,), generator=drawn),
    ]


class Replayed(pl.Callback):
    """Gives each step the batch of its number."""

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, index: int) -> None:
        rank = pl_module.device_mesh["data_parallel"].get_local_rank()
        for part, made in zip(batch, batch_of(trainer.global_step, rank), strict=True):
            part.copy_(made)


@cache
def saved_ranks(name: str) -> list[dict[str, Any]]:
    """What each of the two ranks saw of a whole run, and of one that goes on from its save."""
    known_rank()
    kind, in_parts = SAVED[name]
    path, kept = shared_folder() / f"{name}.ckpt", {}
    strategy: Any = partial(
        ModelParallelStrategy,
        save_distributed_checkpoint=in_parts,
        **(BY_TENSOR if kind is Parallel else BY_DATA),
    )
    for way, begins in (("whole", None), ("resumed", path)):
        net, witness = kind().build(), Witness(None if begins else SAVED_AT, path)
        unfreezing, monitor = RowUnfreezing(BY_STEP, audit=1), RowMonitor(every_n_steps=2)
        callbacks = [unfreezing, monitor, witness, Replayed()]
        made = on_two(*callbacks, strategy=strategy, default_root_dir=path.parent)
        made.fit(net, own_batches(), ckpt_path=begins)
        kept[way] = {
            "seen": witness.seen,
            "rows": net.words.trainable_rows,
            "audit": [(one.table, one.frozen, one.changed) for one in unfreezing.audit_results],
            "record": json.loads(monitor.path.read_text()) if monitor.path else None,
        }
    return of_all(kept)
