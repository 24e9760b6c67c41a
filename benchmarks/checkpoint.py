"""Checkpoints of a run in Lightning: bytes and seconds, with whole tables and with rows alone.

    python benchmarks/checkpoint.py [--rows 1000000] [--dim 64] [--trainable 10000] [--report PATH]

Beside the sizes stands what must be in a file: the rows that trained and, once for each of Adam's
two moments, their optimizer state.
"""

from __future__ import annotations

import argparse
import platform
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from partial_embedding.callbacks.lightning import RowUnfreezing
from partial_embedding.torch import PartialEmbedding


class Net(pl.LightningModule):
    """A table and a small head."""

    def __init__(self, num_rows: int, dim: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.words = PartialEmbedding(num_rows, dim)
        self.head = nn.Linear(dim, 2)

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        """The loss of one batch."""
        ids, labels = batch
        return F.cross_entropy(self.head(self.words(ids)), labels)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """One plain optimizer over everything."""
        return torch.optim.AdamW(self.parameters())


def measure(checkpoint: str, folder: Path, num_rows: int, dim: int, count: int) -> dict[str, float]:
    """The bytes of a checkpoint, and the seconds to write it and to load it again."""
    rows = np.sort(np.random.default_rng(0).permutation(num_rows)[:count])
    ids = torch.tensor(rows)[torch.randint(count, (4096,))]
    batches = DataLoader(TensorDataset(ids, ids % 2), batch_size=1024)
    schedule = {"stages": [{"epoch": 0, "rows": {"ids": rows.tolist()}}]}
    silent = dict.fromkeys(("logger", "enable_progress_bar", "enable_model_summary"), False)
    trainer = pl.Trainer(
        callbacks=[RowUnfreezing(schedule, checkpoint=checkpoint)],
        max_epochs=1,
        accelerator="cpu",
        enable_checkpointing=False,
        **silent,
    )
    net, path = Net(num_rows, dim), folder / f"{checkpoint}.ckpt"
    trainer.fit(net, batches)
    trainer.save_checkpoint(path)  # the first one reads the table
    start = time.perf_counter()
    trainer.save_checkpoint(path)
    written = time.perf_counter() - start
    again = Net(num_rows, dim)
    start = time.perf_counter()
    again.load_state_dict(torch.load(path, weights_only=True)["state_dict"])
    loaded = time.perf_counter() - start
    assert torch.equal(again.words.weight, net.words.weight)
    return {"bytes": path.stat().st_size, "written": written, "loaded": loaded}


def report(num_rows: int, dim: int, count: int) -> str:
    needed = 3 * 4 * dim * count
    lines = [
        "# Checkpoints that follow the rows",
        "",
        f"V = {num_rows:,}, D = {dim}, K = {count:,}, AdamW. The rows that trained and their "
        f"optimizer state are {needed / 1e6:.2f} MB.",
        f"torch {torch.__version__}, pytorch-lightning {version('pytorch-lightning')}, "
        f"{platform.machine()}. Made by `python benchmarks/checkpoint.py --report "
        "benchmarks/checkpoint.md`.",
        "",
        "| checkpoint | MB | over what is needed | seconds to write | seconds to load |",
        "|---|---:|---:|---:|---:|",
    ]
    with tempfile.TemporaryDirectory() as folder:
        for checkpoint in ("table", "rows"):
            found = measure(checkpoint, Path(folder), num_rows, dim, count)
            lines.append(
                f'| `checkpoint="{checkpoint}"` | {found["bytes"] / 1e6:.2f} '
                f"| {found['bytes'] / needed:.2f} | {found['written']:.3f} "
                f"| {found['loaded']:.3f} |"
            )
    lines += ["", "Loading rows reads the table once, to compare it with that of the checkpoint."]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--trainable", type=int, default=10_000)
    parser.add_argument("--report", type=Path)
    arguments = parser.parse_args()
    text = report(arguments.rows, arguments.dim, arguments.trainable)
    print(text)
    if arguments.report:
        arguments.report.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
