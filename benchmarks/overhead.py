"""What `RowUnfreezing` and `RowMonitor` add to a step of a Lightning run, side by side.

    python benchmarks/overhead.py [--report benchmarks/overhead.md]

One run, whose optimizer `rowwise` prepared for a fixed set of rows, has the callbacks at default
settings for every second block of steps and goes without them for the others. Two runs beside each
other would differ more by where their tables lie in memory than by what is measured.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.loggers import TensorBoardLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from partial_embedding import Vocabulary
from partial_embedding.callbacks.lightning import RowMonitor, RowUnfreezing
from partial_embedding.torch import PartialEmbedding

WIDTH, TEXTS, LENGTH = 64, 64, 64
BLOCK = 50  # steps: as many as from one measurement to the next


class Texts(Dataset[tuple[Tensor, Tensor]]):
    """Batches of ids, half of which train."""

    def __init__(self, num_rows: int, trainable: int, steps: int) -> None:
        generator = torch.Generator().manual_seed(0)
        self.ids = torch.randint(num_rows, (20, TEXTS, LENGTH), generator=generator)
        self.ids[:, :, ::2] = torch.randint(
            trainable, self.ids[:, :, ::2].shape, generator=generator
        )
        self.labels = torch.randint(2, (20, TEXTS), generator=generator)
        self.steps = steps

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.ids[index % 20], self.labels[index % 20]


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


# Which callbacks come and go, of those that a run needs.
WAYS: dict[str, Callable[[list[Callback]], list[Callback]]] = {
    "both": lambda ours: ours,
    "both, measuring every 500 steps": lambda ours: ours,
    "`RowUnfreezing`": lambda ours: ours[:1],
    "two that do nothing": lambda ours: [Idle(), Idler()],
}


class Turns(Callback):
    """Takes the other callbacks away for every second block of steps, and times each block."""

    def __init__(self, others: list[Callback]) -> None:
        self.others = others
        self.milliseconds: dict[bool, list[float]] = {True: [], False: []}
        self.with_others = True
        self.start = 0.0  # in the processor's time

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock."""
        self.start = time.process_time()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, index: int
    ) -> None:
        """Change turns after a block of steps."""
        if (index + 1) % BLOCK == 0:
            took = 1e3 * (time.process_time() - self.start) / BLOCK
            self.milliseconds[self.with_others].append(took)
            self.with_others = not self.with_others
            others = self.others if self.with_others else []
            trainer.callbacks = [*others, self]  # type: ignore[attr-defined]  # Lightning sets it
            self.start = time.process_time()


def measure(
    num_rows: int, trainable: int, pairs: int, way: str = "both"
) -> tuple[list[float], list[float]]:
    """Milliseconds a step of each block, without the callbacks and with them."""
    schedule = {"stages": [{"epoch": 0, "rows": {"range": [0, trainable]}}]}
    counts = np.maximum(1e6 / np.arange(1, num_rows + 1), 1).astype(np.int64)
    vocabulary = Vocabulary(map(str, range(num_rows)), counts)
    every = 500 if way.endswith("500 steps") else None
    ours = [RowUnfreezing(schedule), RowMonitor(vocabulary=vocabulary, every_n_steps=every)]
    turns = Turns(WAYS[way](ours))
    steps = 2 * (pairs + 1) * BLOCK
    data = DataLoader(Texts(num_rows, trainable, steps), batch_size=None)  # type: ignore[arg-type]
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            accelerator="cpu",
            max_epochs=1,
            logger=TensorBoardLogger(folder),
            # The clock is read last, so that a measurement belongs to the block that it ends.
            callbacks=[*ours, turns],
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(Classifier(num_rows), data)
    # The first of each warms up.
    return turns.milliseconds[False][1:], turns.milliseconds[True][1:]


def measure_callbacks(pairs: int) -> dict[str, float]:
    """Over and above a step without callbacks: the quartiles of both callbacks' share of it."""
    without, with_callbacks = measure(100_000, 10_000, pairs)
    ratios = [b / a for a, b in zip(without, with_callbacks, strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4)
    return {"low": low, "ratio": middle, "high": high}


def report(num_rows: int, trainable: int, pairs: int) -> str:
    lines = [
        "# What RowUnfreezing and RowMonitor add to a step",
        "",
        f"Lightning runs over a table of V = {num_rows:,} rows, D = {WIDTH}, of which K = "
        f"{trainable:,} train; {TEXTS * LENGTH:,} ids a step, half of them trainable, AdamW, "
        "TensorBoard, optimizer prepared by `rowwise`. Callbacks at default settings, so with one "
        f"measurement every {BLOCK} steps, are there for every second block of {BLOCK} steps; "
        f"{pairs} pairs of blocks.",
        "",
        "| callbacks | time with over without | middle half of the pairs | ms without | ms with |",
        "|---|---:|---:|---:|---:|",
    ]
    for way in WAYS:
        without, with_callbacks = measure(num_rows, trainable, pairs, way)
        ratios = [b / a for a, b in zip(without, with_callbacks, strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        medians = (f"{statistics.median(times):.2f}" for times in (without, with_callbacks))
        lines.append(
            f"| {way} | **{middle:.3f}** | {low:.3f} to {high:.3f} | {' | '.join(medians)} |"
        )
    lines += [
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
    parser.add_argument("--pairs", type=int, default=80)
    parser.add_argument("--report", type=Path, help="write the result to this Markdown file")
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    text = report(args.rows, args.trainable, args.pairs)
    print(text)
    if args.report:
        args.report.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
