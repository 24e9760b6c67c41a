"""A PyTorch Lightning callback that watches rows: how many are awake, and how far they went."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from torch import Tensor

from partial_embedding.drift import GroupTrack, RowTrack, drift_quantiles, sample
from partial_embedding.files import write_atomically
from partial_embedding.pictures import row_picture
from partial_embedding.torch.rowset import RowSet
from partial_embedding.torch.table import PartialTable, tables_in

_MOST_GROUPS = 16


@dataclass
class _Watched:
    """One table, what is known of it, and the sampled rows as they were when they woke."""

    table: PartialTable
    track: RowTrack
    starts: dict[int, tuple[Tensor, Tensor]]
    rows: RowSet | None = None
    token_share: float | None = None


class RowMonitor(Callback):
    """Logs which rows of the tables train and how far they went, and draws a picture of it.

    To every logger go, for each table: `rows_awake`; `tokens_that_train`, the share of the batch's
    tokens (without padding) whose rows train; and, for each group of rows that woke together, the
    median and the 90th percentile of the distance from where they woke, divided by the length of a
    typical row. Distances are measured on a sample: at most `sample` rows of each of the first 16
    groups are kept and compared, so a measurement costs at most 16 × `sample` × D numbers, whatever
    the size of the table. Between measurements nothing is done.

    Put it after `RowUnfreezing` in the list of callbacks.

    Args:
        every_n_steps: Optimizer steps between measurements; by default the trainer's
            `log_every_n_steps`. The first and the last batch of an epoch are measured too.
        sample: The most rows of a group that are measured.
        picture: The format of the picture that is drawn when `fit` ends, as `rows.png` in the run's
            log folder (`rows-NAME.png` where there are several tables); None draws nothing.

    Raises:
        OSError: The picture cannot be written.

    Example:
        >>> RowMonitor(every_n_steps=50).every_n_steps
        50
    """

    def __init__(
        self,
        every_n_steps: int | None = None,
        sample: int = 256,
        picture: Literal["png", "svg", "pdf"] | None = "png",
    ) -> None:
        self.every_n_steps = every_n_steps
        self.sample = sample
        self.picture = picture
        self.path: Path | None = None
        self._watched: dict[str, _Watched] = {}
        self._restored: dict[str, Any] = {}
        self._hooks: list[torch.utils.hooks.RemovableHandle] = []

    @property
    def tracks(self) -> dict[str, RowTrack]:
        """What was seen so far, by the name of the table."""
        return {name: watched.track for name, watched in self._watched.items()}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look at the tables, and go on where a checkpoint stood."""
        self._watched = {}
        for name, table in tables_in(pl_module):
            if (saved := self._restored.get(name)) is not None:
                track = RowTrack.from_state(saved["track"])
                self._watched[name] = _Watched(table, track, dict(saved["starts"]))
            else:
                unit = "step" if trainer.num_training_batches == float("inf") else "epoch"
                track = RowTrack(table.weight.shape[0], _typical_length(table, self.sample), unit)
                self._watched[name] = _Watched(table, track, {})
        self._restored = {}

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Note which rows woke, and listen to the lookups of a batch that is measured."""
        for watched in self._watched.values():
            rows = watched.table.row_set
            if watched.rows is not rows:
                watched.rows = rows
                self._note_rows(watched, rows, _place(trainer, watched.track, batch_idx))
            watched.token_share = None
            if self._is_due(trainer, batch_idx):
                hook = watched.table.register_forward_pre_hook(_TokenShare(watched))
                self._hooks.append(hook)

    def _note_rows(self, watched: _Watched, rows: RowSet, place: float) -> None:
        track = watched.track
        if not track.awake or track.awake[-1][1] != len(rows):
            track.awake.append((place, len(rows)))
        for number, ids in rows.cohorts.items():
            if number in track.groups or len(track.groups) >= _MOST_GROUPS:
                continue
            chosen = torch.from_numpy(sample(ids.cpu().numpy(), self.sample))
            watched.starts[number] = (chosen, _rows_of(watched.table, chosen))
            track.groups[number] = GroupTrack(place, len(ids), [(place, 0.0, 0.0, 0.0)])

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Measure and log."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        due = self._is_due(trainer, batch_idx)
        for name, watched in self._watched.items():
            watched.track.end = _place(trainer, watched.track, batch_idx + 1)
            if due:
                numbers = self._measure(watched)
                metrics = {f"{name}/{key}": value for key, value in numbers.items()}
                for logger in trainer.loggers:
                    logger.log_metrics(metrics, step=trainer.global_step)

    def _is_due(self, trainer: Trainer, batch_idx: int) -> bool:
        every = self.every_n_steps or getattr(trainer, "log_every_n_steps", 0) or 1
        return batch_idx % every == 0 or batch_idx + 1 == trainer.num_training_batches

    def _measure(self, watched: _Watched) -> dict[str, float]:
        track, rows = watched.track, watched.table.row_set
        numbers: dict[str, float] = {"rows_awake": len(rows)}
        if watched.token_share is not None:
            numbers["tokens_that_train"] = watched.token_share
            track.token_share.append((track.end, watched.token_share))
        for number, (ids, start) in watched.starts.items():
            # Rows that fell asleep, and woke again in another group, are no longer this group's.
            still = torch.isin(ids, rows.cohorts.get(number, ids[:0]).cpu())
            if not still.any():
                continue
            distances = (_rows_of(watched.table, ids[still]) - start[still]).norm(dim=1).numpy()
            low, middle, high = drift_quantiles(distances, track.typical_length)
            track.groups[number].drift.append((track.end, low, middle, high))
            numbers[f"drift_median_of_group_{number}"] = middle
            numbers[f"drift_p90_of_group_{number}"] = high
        track.thin()
        return numbers

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw the picture."""
        if self.picture is None or not trainer.is_global_zero:
            return
        folder = Path(trainer.log_dir or trainer.default_root_dir)
        folder.mkdir(parents=True, exist_ok=True)
        for name, watched in self._watched.items():
            which = f"-{name}" if len(self._watched) > 1 else ""
            path = folder / f"rows{which}.{self.picture}"
            with write_atomically(path) as temporary:
                row_picture(watched.track).savefig(temporary)
            self.path = path

    def state_dict(self) -> dict[str, Any]:
        """What was seen so far, and where the sampled rows began."""
        return {
            name: {"track": watched.track.to_state(), "starts": dict(watched.starts)}
            for name, watched in self._watched.items()
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Remember what was seen until `fit` starts.

        Args:
            state_dict: What `state_dict` gave.
        """
        self._restored = state_dict


class _TokenShare:
    """A hook on a table's lookup: the share of tokens, without padding, whose rows train."""

    def __init__(self, watched: _Watched) -> None:
        self.watched = watched

    def __call__(self, table: PartialTable, args: tuple[Tensor, ...]) -> None:
        ids = args[0]
        if ids.is_floating_point():
            return  # a head is given features and no tokens
        if table.padding_idx is not None:
            ids = ids[ids != table.padding_idx]
        if ids.numel():
            self.watched.token_share = float(table.row_set.is_trainable(ids).float().mean())


def _place(trainer: Trainer, track: RowTrack, batch: int) -> float:
    if track.unit == "step":
        return float(trainer.global_step)
    return trainer.current_epoch + batch / trainer.num_training_batches


def _rows_of(table: PartialTable, ids: Tensor) -> Tensor:
    weight = table.weight.detach()
    return weight[ids.to(weight.device)].float().cpu()


def _typical_length(table: PartialTable, most: int) -> float:
    ids = sample(np.arange(table.weight.shape[0], dtype=np.int64), most)
    lengths = _rows_of(table, torch.from_numpy(ids)).norm(dim=1)
    return float(lengths.median())
