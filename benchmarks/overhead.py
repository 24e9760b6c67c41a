"""What `RowUnfreezing` and `RowMonitor` add to a step of a Lightning run, side by side.

    python benchmarks/overhead.py [--report benchmarks/overhead.md]

A run, whose optimizer `rowwise` prepared for a fixed set of rows, has the callbacks at default
settings for every second block of ten steps and goes without them for the others: two runs beside
each other would differ more by where their tables lie in memory than by what is measured, and so
would longer blocks by what else the machine does. Of a hundred steps, a round, fifty are with the
callbacks, and one of these measures, as of any fifty. What tensors are made with them and without
them lies elsewhere, which is the same throughout a run: so there are several.
"""

from __future__ import annotations

import argparse
import math
import platform
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.loggers import CSVLogger, Logger, TensorBoardLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from partial_embedding import Vocabulary
from partial_embedding.callbacks.lightning import RowMonitor, RowUnfreezing
from partial_embedding.monitor import sampling
from partial_embedding.torch import PartialEmbedding

WIDTH, TEXTS, LENGTH = 64, 64, 64
BLOCK, ROUND = 10, 100  # steps
RUNS = 8


class Texts(Dataset[tuple[Tensor, Tensor]]):
    """Batches of ids, half of which train."""

    def __init__(self, num_rows: int, trainable: int, steps: int) -> None:
        generator = torch.Generator().manual_seed(0)
        # As many as steps of a block, so that each block has them all.
        self.ids = torch.randint(num_rows, (BLOCK, TEXTS, LENGTH), generator=generator)
        self.ids[:, :, ::2] = torch.randint(
            trainable, self.ids[:, :, ::2].shape, generator=generator
        )
        self.labels = torch.randint(2, (BLOCK, TEXTS), generator=generator)
        self.steps = steps

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.ids[index % BLOCK], self.labels[index % BLOCK]


class Classifier(LightningModule):
    """The average of the rows of a text, and a linear layer."""

    def __init__(self, num_rows: int) -> None:
        super().__init__()
        self.embedding = PartialEmbedding(num_rows, WIDTH)
        self.head = nn.Linear(WIDTH, 2)

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        """The cross-entropy of a batch."""
        ids, labels = batch
        return nn.functional.cross_entropy(self.head(self.embedding(ids).mean(1)), labels)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """A plain AdamW."""
        return torch.optim.AdamW(self.parameters())


class Idle(Callback):
    """What Lightning itself takes to call the hooks of a callback."""

    def on_train_batch_start(self, *args: Any) -> None:
        """Do nothing."""

    def on_after_backward(self, *args: Any) -> None:
        """Do nothing."""

    def on_before_optimizer_step(self, *args: Any) -> None:
        """Do nothing."""

    def on_train_batch_end(self, *args: Any) -> None:
        """Do nothing."""


class Idler(Idle):
    """Another one, since Lightning wants callbacks of different classes."""


@dataclass(frozen=True)
class Way:
    """Callbacks that come and go, in a run that has both of ours.

    Args:
        chosen: Which, of ours.
        every: Steps from one measurement to the next; None for Lightning's 50.
        logger: Where the numbers go.
        products: How large a matrix product of the monitor may be at once.
    """

    chosen: Callable[[list[Callback]], list[Callback]] = lambda ours: ours
    every: int | None = None
    logger: type[Logger] = TensorBoardLogger
    products: int = sampling._PRODUCTS_ALONE


UNFREEZING = "`RowUnfreezing`"
WAYS = {
    "both": Way(),
    "both, measuring every 500 steps": Way(every=500),
    "both, logging to a CSV file": Way(logger=CSVLogger),
    "both, neighbours by one matrix product": Way(products=2**62),
    UNFREEZING: Way(lambda ours: ours[:1]),
    "`RowMonitor`": Way(lambda ours: ours[1:]),
    "two that do nothing": Way(lambda ours: [Idle(), Idler()]),
}


class Turns(Callback):
    """Takes the other callbacks away for every second block of steps, and times each round."""

    def __init__(self, others: list[Callback], with_others: bool) -> None:
        self.others = others
        self.with_others = with_others  # in the block that runs
        self.start = 0.0  # in the processor's time
        self.spent = {True: 0.0, False: 0.0}  # seconds of this round, with the others and without
        self.rounds: list[tuple[float, float]] = []  # milliseconds a step, without and with

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock."""
        self._change(trainer)

    def _change(self, trainer: Trainer) -> None:
        others = self.others if self.with_others else []
        trainer.callbacks = [*others, self]  # type: ignore[attr-defined]  # Lightning sets it
        self.start = time.process_time()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, index: int
    ) -> None:
        """Change turns after a block of steps."""
        if (index + 1) % BLOCK:
            return
        self.spent[self.with_others] += time.process_time() - self.start
        self.with_others = not self.with_others
        if (index + 1) % ROUND == 0:
            without, with_others = (2e3 * self.spent[there] / ROUND for there in (False, True))
            self.rounds.append((without, with_others))
            self.spent = {True: 0.0, False: 0.0}
        self._change(trainer)


def measure(
    num_rows: int, trainable: int, rounds: int, way: str = "both"
) -> tuple[list[float], list[float]]:
    """Milliseconds a step of each round, without the callbacks and with them."""
    found = []
    for run in range(RUNS):
        found += _run(num_rows, trainable, math.ceil(rounds / RUNS), way, run % 2 == 0)
    without, with_callbacks = zip(*found, strict=True)
    return list(without), list(with_callbacks)


def _run(
    num_rows: int, trainable: int, rounds: int, way: str, first: bool
) -> list[tuple[float, float]]:
    counts = np.maximum(1e6 / np.arange(1, num_rows + 1), 1).astype(np.int64)
    vocabulary = Vocabulary(map(str, range(num_rows)), counts)
    monitor = RowMonitor(vocabulary=vocabulary, every_n_steps=WAYS[way].every)
    ours = [RowUnfreezing(schedule_of(trainable)), monitor]
    turns = Turns(WAYS[way].chosen(ours), with_others=first)
    with patch.object(sampling, "_PRODUCTS_ALONE", WAYS[way].products):
        # The clock is read last, so that a measurement belongs to the block that it ends.
        fit(num_rows, trainable, (rounds + 1) * ROUND, WAYS[way].logger, *ours, turns)
    return turns.rounds[1:]  # the first one warms up


def schedule_of(trainable: int) -> dict[str, Any]:
    return {"stages": [{"epoch": 0, "rows": {"range": [0, trainable]}}]}


def fit(
    num_rows: int, trainable: int, steps: int, logger: type[Logger], *callbacks: Callback
) -> None:
    data = DataLoader(Texts(num_rows, trainable, steps), batch_size=None)  # type: ignore[arg-type]
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            accelerator="cpu",
            max_epochs=1,
            logger=logger(folder),
            callbacks=list(callbacks),
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(Classifier(num_rows), data)


class OwnHooks(Callback):
    """Times what `RowUnfreezing` itself does at a step, apart from how Lightning calls it."""

    def __init__(self, unfreezing: RowUnfreezing) -> None:
        self.unfreezing = unfreezing
        self.microseconds = 0.0

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, index: int
    ) -> None:
        """Make the calls of one step, often."""
        if self.microseconds:
            return
        one, times = self.unfreezing, 2000
        start = time.process_time()
        for _ in range(times):
            one.on_train_batch_start(trainer, pl_module, batch, index)
            one.on_after_backward(trainer, pl_module)
            one.on_train_batch_end(trainer, pl_module, outputs, batch, index)
        self.microseconds = 1e6 * (time.process_time() - start) / times


def own_hooks(num_rows: int, trainable: int) -> float:
    """Microseconds of a step in the hooks of `RowUnfreezing`."""
    unfreezing = RowUnfreezing(schedule_of(trainable))
    timed = OwnHooks(unfreezing)
    fit(num_rows, trainable, 20, CSVLogger, unfreezing, timed)
    return timed.microseconds


def shares(without: list[float], with_callbacks: list[float]) -> dict[str, float]:
    """The quartiles of a step with callbacks over one without."""
    ratios = [b / a for a, b in zip(without, with_callbacks, strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4)
    return {"low": low, "ratio": middle, "high": high}


def measure_callbacks(rounds: int) -> dict[str, dict[str, float]]:
    """What a step with callbacks takes over one without, by what they are."""
    return {way: shares(*measure(100_000, 10_000, rounds, way)) for way in ("both", UNFREEZING)}


def report(num_rows: int, trainable: int, rounds: int) -> str:
    lines = [
        "# What RowUnfreezing and RowMonitor add to a step",
        "",
        f"Lightning runs over a table of V = {num_rows:,} rows, D = {WIDTH}, of which K = "
        f"{trainable:,} train; {TEXTS * LENGTH:,} ids a step, half of them trainable, AdamW, "
        f"TensorBoard, optimizer prepared by `rowwise`. In each of {rounds} rounds of {ROUND} "
        f"steps, of {RUNS} runs, every second block of {BLOCK} has the callbacks, at default "
        "settings, so that one step of 50 with them measures.",
        "",
        "| callbacks | time with over without | middle half of the rounds | ms without | ms with |",
        "|---|---:|---:|---:|---:|",
    ]
    for way in WAYS:
        without, with_callbacks = measure(num_rows, trainable, rounds, way)
        low, middle, high = shares(without, with_callbacks).values()
        medians = (f"{statistics.median(times):.2f}" for times in (without, with_callbacks))
        lines.append(
            f"| {way} | **{middle:.3f}** | {low:.3f} to {high:.3f} | {' | '.join(medians)} |"
        )
    lines += [
        "",
        f"Of a step, {own_hooks(num_rows, trainable):.1f} µs are spent in the hooks of "
        "`RowUnfreezing` themselves; the rest is Lightning's way to call them, and chance.",
        "",
        f"torch {torch.__version__}, {torch.get_num_threads()} CPU thread(s), the time that it "
        f"computed, {platform.machine()}. "
        "Made by `python benchmarks/overhead.py --report benchmarks/overhead.md`.",
        "",
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--trainable", type=int, default=10_000)
    parser.add_argument("--rounds", type=int, default=80)
    parser.add_argument("--report", type=Path, help="write the result to this Markdown file")
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    text = report(args.rows, args.trainable, args.rounds)
    print(text)
    if args.report:
        args.report.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
