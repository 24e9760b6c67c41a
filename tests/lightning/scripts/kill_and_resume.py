"""Runs one schedule to its end, and again with a death at each of several places.

Usage: kill_and_resume.py FOLDER RUNS, where RUNS is JSON of the kinds by place, by precision and
number of processes, as in {"32-true-2": {"at_the_end_of_an_epoch": ["last"]}}.

Each run is a process of its own, or two, forked from this one so that imports are paid for once.
For each place a run is killed by SIGKILL, or by an exception that is followed by SIGKILL; runs that
are resumed from the kinds of checkpoints that are named, which these left, write how they ended to
`{folder}/{run}/{place}-{kind}-{rank}.pt`, beside `whole-{rank}.pt`.
"""

import json
import os
import signal
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from forked import in_processes
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.strategies import DDPStrategy
from small_runs import Net, adamw, data, replayable, trainer
from torch import Tensor

from partial_embedding.callbacks.lightning import RowUnfreezing
from partial_embedding.recipes.resume import RandomState

# Five batches an epoch. The plateau is reached by what is measured after step 15, and the share by
# step 25.
SCHEDULE = {
    "stages": [
        {"epoch": 0, "rows": [1, 4]},
        {"step": 4, "rows": [1, 4, 6], "lr_scale": 2.0, "warmup_steps": 3},
        {
            "step": 12,
            "rows": [1, 2, 4, 6, 8, 9],
            "grow": {"shape": "linear", "order": "ids", "increments": 3},
            "lr_scale": 0.5,
            "warmup_steps": 6,
        },
        {
            "plateau": {"monitor": "val_loss", "max_wait": 1},
            "rows": [2, 6, 8, 9, 10],
            "lr_scale": 0.3,
        },
        {"share": 5 / 6, "rows": "all", "warmup_steps": 4},
    ]
}
EPOCHS = 6
# The hook in which a run dies, and the optimizer steps that it has made by then.
PLACES = {
    "in_the_middle_of_an_epoch": ("training_step", 17),
    "in_the_middle_of_growth": ("training_step", 8),
    "just_before_a_stage": ("on_train_batch_end", 12),
    "just_after_a_stage_began": ("training_step", 12),
    "between_a_metric_and_its_stage": ("on_train_epoch_end", 15),
    "at_the_end_of_an_epoch": ("on_train_epoch_end", 20),
    "before_the_validation_of_an_epoch": ("on_validation_start", 15),
}
KINDS = ("last", "steps", "exception")


class DeathError(Exception):
    """What a run dies of that leaves a checkpoint behind."""


class TinyNet(Net):
    """Draws random numbers in each step, and validates."""

    die: Callable[[str, int], None] = staticmethod(lambda hook, step: None)

    def training_step(self, batch: Any, index: int) -> Tensor:
        self.die("training_step", self.trainer.global_step)
        return self.loss(batch) * (1 + torch.rand(()))

    def validation_step(self, batch: Any, index: int) -> None:
        self.log("val_loss", self.loss(batch), sync_dist=True)

    def on_train_batch_end(self, *_: Any) -> None:
        self.die("on_train_batch_end", self.trainer.global_step)

    def on_train_epoch_end(self) -> None:
        self.die("on_train_epoch_end", self.trainer.global_step)

    def on_validation_start(self) -> None:
        self.die("on_validation_start", self.trainer.global_step)

    def configure_optimizers(self) -> Any:
        (optimizer,) = adamw(self.parts())
        return [optimizer], [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)]


def fit(
    folder: Path,
    precision: str,
    processes: int,
    rank: int,
    *,
    keep: str | None = None,
    die: Callable[[str, int], None] | None = None,
    resume: Path | None = None,
    out: str | None = None,
) -> None:
    """One run in this process."""
    net = TinyNet().build(seed=0 if resume is None else 9)
    if die is not None:
        net.die = die
    unfreezing = RowUnfreezing(SCHEDULE, audit=True)
    callbacks: list[pl.Callback] = [RandomState(seed=3), unfreezing]
    if keep == "exception":
        callbacks.append(
            ModelCheckpoint(folder / keep, "cut", save_on_exception=True, save_top_k=0)
        )
    elif keep is not None:
        callbacks.append(ModelCheckpoint(folder / "last", "one", save_last=True))
        callbacks.append(ModelCheckpoint(folder / "steps", "one", every_n_train_steps=1))
    options: dict[str, Any] = {}
    if processes > 1:
        options["strategy"] = DDPStrategy(process_group_backend="gloo")
    made = trainer(
        *callbacks,
        max_epochs=EPOCHS,
        precision=precision,
        devices=processes,
        enable_checkpointing=keep is not None,
        use_distributed_sampler=False,
        num_sanity_val_steps=1,
        **options,
    )
    training, validation = (
        replayable(data(5 * processes, seed=seed), shuffle, rank=rank, world_size=processes)
        for seed, shuffle in ((1, 7), (2, None))
    )
    made.fit(net, training, validation, ckpt_path=resume)
    assert made.global_step == 5 * EPOCHS
    kept = {
        "weights": net.state_dict(),
        "optimizer": made.optimizers[0].state_dict(),
        "schedule": unfreezing.state_dict(),
        "reports": [(result.stage, result.frozen) for result in unfreezing.audit_results],
    }
    torch.save(kept, folder.parent / f"{out}-{rank}.pt")


def killer(place: tuple[str, int], *, first_raise: bool) -> Callable[[str, int], None]:
    def die(hook: str, step: int) -> None:
        if (hook, step) == place:
            if first_raise:
                raise DeathError
            os.kill(os.getpid(), signal.SIGKILL)

    return die


def main(folder: Path, name: str, places: dict[str, list[str]]) -> None:
    """The runs of one precision and number of processes."""
    precision, _, number = name.rpartition("-")
    processes = int(number)
    folder.mkdir()

    def run(where: Path, **options: Any) -> None:
        def of_rank(rank: int) -> None:
            try:
                fit(where, precision, processes, rank, **options)
            except DeathError:
                os.kill(os.getpid(), signal.SIGKILL)

        codes = in_processes(processes, of_rank)
        dead = options.get("die") is not None
        assert codes == [-signal.SIGKILL if dead else 0] * processes, (where, options, codes)

    run(folder / "whole", out="whole")
    for place, kinds in places.items():
        die = partial(killer, PLACES[place])
        if {"last", "steps"} & {*kinds}:
            run(folder / place, keep="last", die=die(first_raise=False))
        if "exception" in kinds:
            run(folder / place, keep="exception", die=die(first_raise=True))
        for kind in kinds:
            glob = "last.ckpt" if kind == "last" else "*.ckpt"
            (checkpoint,) = (folder / place / kind).glob(glob)
            run(folder / place, resume=checkpoint, out=f"{place}-{kind}")


if __name__ == "__main__":
    for of_run, killed in json.loads(sys.argv[2]).items():
        main(Path(sys.argv[1]) / of_run, of_run, killed)
