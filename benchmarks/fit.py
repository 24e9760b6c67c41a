"""What Lightning and the callback add to a step: a bare loop, `fit`, `fit` with the callback."""

from __future__ import annotations

import itertools
import logging
import statistics
import time
import warnings
from typing import Any

import pytorch_lightning as pl
import torch
from contenders import Work, drawn
from torch import Tensor
from torch.utils.data import DataLoader

from partial_embedding.callbacks.lightning import RowUnfreezing
from partial_embedding.torch import PartialEmbedding, rowwise

STEPS = 60
SKIPPED = 10  # the first steps, in which things are made that later ones use


class Net(pl.LightningModule):
    """A table, a gradient for what it gives, and the usual optimizer."""

    def __init__(self, work: Work, prepare: bool) -> None:
        super().__init__()
        self.prepare = prepare
        rows = drawn(work).rows
        self.words = PartialEmbedding.from_pretrained(work.table(), trainable_rows=rows)

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        """A loss whose gradient is the one that comes with the batch."""
        ids, gradient = batch
        return (self.words(ids) * gradient).sum()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """AdamW, prepared here where no callback does it."""
        optimizer = torch.optim.AdamW(self.parameters())
        return rowwise(optimizer, self) if self.prepare else optimizer


class Stopwatch(pl.Callback):
    """Milliseconds from the beginning of each batch to the beginning of the next."""

    def __init__(self) -> None:
        self.taken: list[float] = []

    def on_train_batch_start(self, *_: Any) -> None:
        """Take the time."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        now = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
        self.taken.append(now())

    @property
    def spans(self) -> list[float]:
        """What lies between, without the first steps."""
        pairs = itertools.pairwise(self.taken)
        return [1e3 * (end - start) for start, end in pairs][SKIPPED:]


def bare_loop(net: Net, batches: list[list[Tensor]], watch: Stopwatch) -> None:
    optimizer = net.configure_optimizers()
    for index, batch in enumerate(batches):
        watch.on_train_batch_start()
        optimizer.zero_grad()
        net.training_step(batch, index).backward()
        optimizer.step()


def fit(net: Net, batches: list[list[Tensor]], watch: Stopwatch, *callbacks: pl.Callback) -> None:
    quiet = {
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
    }
    accelerator = "gpu" if torch.cuda.is_available() else "cpu"
    trainer = pl.Trainer(
        max_epochs=1, accelerator=accelerator, devices=1, callbacks=[*callbacks, watch], **quiet
    )
    trainer.fit(net, DataLoader(batches, batch_size=None))


def measure_fits(work: Work, rounds: int) -> dict[str, float]:
    """Median milliseconds of a step, the three ways taking turns."""
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="pytorch_lightning")
    made = drawn(work).batches
    batches = [list(made[i % len(made)]) for i in range(STEPS)]
    schedule = {"stages": [{"epoch": 0, "rows": {"ids": drawn(work).rows.tolist()}}]}
    found: dict[str, list[float]] = {"loop": [], "fit": [], "callback": []}
    for _ in range(rounds):
        for way, spans in found.items():
            net, watch = Net(work, prepare=way != "callback").to(work.device), Stopwatch()
            if way == "loop":
                bare_loop(net, batches, watch)
            else:
                fit(net, batches, watch, *([RowUnfreezing(schedule)] if way == "callback" else []))
            spans += watch.spans
    return {way: statistics.median(spans) for way, spans in found.items()}
