"""What `RowUnfreezing` and `RowMonitor` add to a step of a Lightning run, side by side.

    python benchmarks/overhead.py [--report benchmarks/overhead.md]

Both runs train the same model on the same batches with the same trainer; one prepares its optimizer
with `rowwise` and keeps a fixed set of rows, the other has the two callbacks at default settings.
They take turns, a block of steps each, so that the ratio holds although the machine's speed drifts.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import tempfile
import threading
import time
import warnings
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
from partial_embedding.torch import PartialEmbedding, rowwise

WIDTH, TEXTS, LENGTH = 64, 64, 64
BLOCK = 50  # steps of a turn: as many as from one measurement to the next


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

    def __init__(self, num_rows: int, trainable: int, prepared: bool) -> None:
        super().__init__()
        self.prepared = prepared
        self.embedding = PartialEmbedding(num_rows, WIDTH, trainable_rows=range(trainable))
        self.head = nn.Linear(WIDTH, 2)

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        """The cross-entropy of a batch."""
        ids, labels = batch
        return nn.functional.cross_entropy(self.head(self.embedding(ids).mean(1)), labels)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """A plain AdamW, or a prepared one where no callback prepares it."""
        optimizer = torch.optim.AdamW(self.parameters())
        return rowwise(optimizer, self) if self.prepared else optimizer


class Turns(Callback):
    """Trains a block of steps whenever it is this run's turn, and times each block."""

    def __init__(self, mine: threading.Semaphore, other: threading.Semaphore) -> None:
        self.mine, self.other = mine, other
        self.milliseconds: list[float] = []
        self.start = 0.0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Wait for the first turn."""
        self.mine.acquire()
        self.start = time.perf_counter()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, index: int
    ) -> None:
        """End a turn after a block of steps."""
        if (index + 1) % BLOCK == 0:
            self.milliseconds.append(1e3 * (time.perf_counter() - self.start) / BLOCK)
            self.other.release()
            if index + 1 < trainer.num_training_batches:
                self.mine.acquire()
            self.start = time.perf_counter()


def run(
    turns: Turns, callbacks: list[Callback], folder: Path, num_rows: int, trainable: int, steps: int
) -> None:
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=1,
        logger=TensorBoardLogger(folder),
        # The clock is read last, so that a measurement belongs to the block that it ends.
        callbacks=[*callbacks, turns],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    data = DataLoader(Texts(num_rows, trainable, steps), batch_size=None)  # type: ignore[arg-type]
    trainer.fit(Classifier(num_rows, trainable, prepared=not callbacks), data)


def measure(num_rows: int, trainable: int, blocks: int) -> tuple[list[float], list[float]]:
    """Milliseconds a step of each block, without the callbacks and with them."""
    schedule = {"stages": [{"epoch": 0, "rows": {"range": [0, trainable]}}]}
    counts = np.maximum(1e6 / np.arange(1, num_rows + 1), 1).astype(np.int64)
    vocabulary = Vocabulary(map(str, range(num_rows)), counts)
    first, second = threading.Semaphore(1), threading.Semaphore(0)
    without, with_callbacks = Turns(first, second), Turns(second, first)
    ours = [RowUnfreezing(schedule), RowMonitor(vocabulary=vocabulary, picture=None)]
    with tempfile.TemporaryDirectory() as folder:
        threads = [
            threading.Thread(
                target=run,
                args=(turns, callbacks, Path(folder) / name, num_rows, trainable, blocks * BLOCK),
            )
            for name, turns, callbacks in (("a", without, []), ("b", with_callbacks, ours))
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    return without.milliseconds[1:], with_callbacks.milliseconds[1:]  # the first block warms up


def report(num_rows: int, trainable: int, blocks: int) -> str:
    without, with_callbacks = measure(num_rows, trainable, blocks)
    ratios = [b / a for a, b in zip(without, with_callbacks, strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4)
    return "\n".join(
        [
            "# What RowUnfreezing and RowMonitor add to a step",
            "",
            f"A Lightning run over a table of V = {num_rows:,} rows, D = {WIDTH}, of which K = "
            f"{trainable:,} train; {TEXTS * LENGTH:,} ids a step, half of them trainable, AdamW, "
            "TensorBoard. One run has `rowwise` and a fixed set of rows, the other `RowUnfreezing` "
            f"and `RowMonitor` at default settings, so one measurement every {BLOCK} steps. They "
            f"take turns, {BLOCK} steps each; {len(ratios)} pairs of turns.",
            "",
            "| | median | middle half of the turns |",
            "|---|---:|---:|",
            f"| time with both callbacks, over without | **{middle:.3f}** "
            f"| {low:.3f} to {high:.3f} |",
            f"| ms a step without | {statistics.median(without):.2f} | {_half(without)} |",
            f"| ms a step with both | {statistics.median(with_callbacks):.2f} "
            f"| {_half(with_callbacks)} |",
            "",
            f"torch {torch.__version__}, {torch.get_num_threads()} CPU thread(s), "
            f"{platform.machine()}. "
            "Made by `python benchmarks/overhead.py --report benchmarks/overhead.md`.",
            "",
        ]
    )


def _half(values: list[float]) -> str:
    low, _, high = statistics.quantiles(values, n=4)
    return f"{low:.2f} to {high:.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--trainable", type=int, default=10_000)
    parser.add_argument("--blocks", type=int, default=41)
    parser.add_argument("--report", type=Path, help="write the result to this Markdown file")
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    text = report(args.rows, args.trainable, args.blocks)
    print(text)
    if args.report:
        args.report.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
