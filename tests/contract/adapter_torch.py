"""The contract's verbs in PyTorch and Lightning."""

import copy
from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import pytorch_optimizer
import torch
from reference import Array, Batch, Optimizer, TrainsRows
from torch import Tensor, nn

from partial_embedding.callbacks.lightning import RowUnfreezing
from partial_embedding.torch import PartialEmbedding, rowwise

# The tensors are tiny: threads would only wait for each other.
torch.set_num_threads(1)

FRAMEWORK = "torch"


class Training(TrainsRows):
    """One table that is trained step by step under an optimizer which `rowwise` prepared.

    Args:
        matrix: The table, shape (V, D).
        rows: What trains from the start.
        optimizer: What steps it.
        ever: What may ever train; PyTorch need not know.
        padded: Whether row 0 is the padding row.
    """

    def __init__(
        self,
        matrix: Array,
        rows: object,
        optimizer: Optimizer,
        ever: object = "all",
        padded: bool = False,
    ) -> None:
        self.layer = PartialEmbedding.from_pretrained(
            torch.tensor(matrix), padding_idx=0 if padded else None, trainable_rows=rows
        )
        self._optimizer = rowwise(_made(optimizer, self.layer), self.layer, lazy=optimizer.lazy)

    @property
    def table(self) -> Array:
        """The table, shape (V, D)."""
        return self.layer.weight.detach().numpy().copy()

    def look_up(self, ids: Array) -> Array:
        """The rows of ids of any shape."""
        looked_up: Array = self.layer(torch.tensor(ids)).detach().numpy()
        return looked_up

    def step(self, ids: Array, upstream: Array) -> None:
        """Look up, go back with given gradients, and step."""
        self._optimizer.zero_grad()
        self.layer(torch.tensor(ids)).backward(torch.tensor(upstream))
        self._optimizer.step()

    # Doors

    def plain(self) -> Array:
        """The table of a plain layer that was given the weights of this one."""
        plain = nn.Embedding(*self.layer.weight.shape)
        plain.load_state_dict(self.layer.state_dict())
        return plain.weight.detach().numpy().copy()

    def take_plain(self, table: Array) -> None:
        """Take the weights of a plain layer with this table."""
        plain = nn.Embedding.from_pretrained(torch.tensor(table))
        self.layer.load_state_dict(plain.state_dict())

    def keep(self) -> Any:
        """What a run keeps of the best weights."""
        return copy.deepcopy(self.layer.state_dict())

    def restore(self, kept: Any) -> None:
        """Put back what was kept."""
        self.layer.load_state_dict(kept)

    def save(self, folder: Path) -> None:
        """Write a checkpoint of weights and optimizer."""
        state = {"model": self.layer.state_dict(), "optimizer": self._optimizer.state_dict()}
        torch.save(state, folder / "state.pt")

    def load(self, folder: Path) -> None:
        """Read it."""
        state = torch.load(folder / "state.pt", weights_only=True)
        self.layer.load_state_dict(state["model"])
        self._optimizer.load_state_dict(state["optimizer"])

    def average(self, batches: Sequence[Batch]) -> Array:
        """Step along batches, and give the table of the framework's average of all steps."""
        averaged = torch.optim.swa_utils.AveragedModel(self.layer)
        for batch in batches:
            self.step(*batch)
            averaged.update_parameters(self.layer)
        return averaged.module.weight.detach().numpy().copy()


def fit(
    matrix: Array,
    schedule: str | PathLike[str],
    optimizer: Optimizer,
    batches: Sequence[Batch],
    epochs: int,
    ever: object,
    measured: Sequence[float] = (),
    audit: bool | int = True,
    write: tuple[int, int] | None = None,
    folder: Path | None = None,
    trains: bool = True,
) -> tuple[list[Array], Any]:
    """Train a table named "words" along a schedule with the callback, and its audit.

    Args:
        matrix: The table, shape (V, D).
        schedule: A YAML file.
        optimizer: What steps it.
        batches: Of each epoch.
        epochs: How many.
        ever: What may ever train; PyTorch need not know.
        measured: What validations log as `val_measured`, epoch by epoch.
        audit: As the callback takes it.
        write: A step and a row; the row is written to before the step.
        folder: Where the run is kept, and goes on if it was kept there before.
        trains: Whether the table's weight may train.

    Returns:
        The table after each epoch, and what is kept of the schedule.
    """
    model = _Model(matrix, optimizer, measured)
    model.words.weight.requires_grad_(trains)
    unfreezing = RowUnfreezing(schedule, lazy=optimizer.lazy, audit=audit)
    trainer = pl.Trainer(
        accelerator="cpu",
        max_epochs=epochs,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[unfreezing, *([] if write is None else [_Writes(*write)])],
    )
    pairs = [(torch.tensor(ids), torch.tensor(upstream)) for ids, upstream in batches]
    loader = torch.utils.data.DataLoader(pairs, batch_size=None)  # type: ignore[arg-type]
    kept = None if folder is None else folder / "run.ckpt"
    before = kept if kept is not None and kept.exists() else None
    trainer.fit(model, loader, loader if measured else None, ckpt_path=before)
    if kept is not None:
        trainer.save_checkpoint(kept)
    return model.tables, unfreezing.state_dict()


class _Writes(pl.Callback):
    def __init__(self, step: int, row: int) -> None:
        self.step, self.row = step, row

    def on_train_batch_start(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        if trainer.global_step == self.step:
            pl_module.words.weight.data[self.row] += 1


class _Model(pl.LightningModule):
    def __init__(self, matrix: Array, optimizer: Optimizer, measured: Sequence[float]) -> None:
        super().__init__()
        self.measured = measured
        self.words = PartialEmbedding.from_pretrained(torch.tensor(matrix))
        self.choice = optimizer
        self.tables: list[Array] = []

    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        ids, upstream = batch
        loss: Tensor = (self.words(ids) * upstream).sum()
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor]) -> None:
        self.log("val_measured", self.measured[self.current_epoch])

    def on_train_epoch_end(self) -> None:
        self.tables.append(self.words.weight.detach().numpy().copy())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return _made(self.choice, self)


def _made(optimizer: Optimizer, model: nn.Module) -> torch.optim.Optimizer:
    if optimizer.name in ("Ftrl", "ScheduleFreeAdamW"):
        pytest.skip(f"torch has no {optimizer.name}")
    words = {"epsilon": "eps", "rho": "alpha" if optimizer.name == "RMSprop" else "rho"}
    options = {words.get(key, key): value for key, value in optimizer.options.items()}
    kind = getattr(torch.optim, optimizer.name, None) or getattr(pytorch_optimizer, optimizer.name)
    made: torch.optim.Optimizer = kind(model.parameters(), lr=optimizer.learning_rate, **options)
    return made
