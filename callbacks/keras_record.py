"""What a Keras run measured, epoch by epoch, in a file beside the weights of its backup."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from partial_embedding.errors import InputError
from partial_embedding.files import write_atomically
from partial_embedding.schedule import Evaluation, Position, Schedule


@dataclass(frozen=True)
class Epoch:
    """What is known of an epoch once its batches are over.

    Args:
        seen: What was measured at its end.
        moved_at: The optimizer step at which its last rows were set.
    """

    evaluation: Evaluation
    moved_at: int


@dataclass(frozen=True)
class RunRecord:
    """A run up to some epoch.

    Weights and record are two files, and a run may be stopped between writing one and the other.
    So a record is cut to the epoch that the weights are of, and never tells of later ones.

    Args:
        begun_at: The steps that the optimizer had made when the first epoch began.
        total_steps: Optimizer steps of the whole run, where they are known.
        epochs: The epochs that are over, in order.
        schedules: What the run was trained with, by table.

    Example:
        >>> record = RunRecord().ended(Epoch(Evaluation(0, 4, {"val_loss": 0.5}), moved_at=0))
        >>> record.ended(Epoch(Evaluation(1, 8, {"val_loss": 0.4}), moved_at=4)).until(1) == record
        True
    """

    begun_at: int = 0
    total_steps: int | None = None
    epochs: tuple[Epoch, ...] = ()
    schedules: Mapping[str | None, Schedule] | None = None

    @property
    def evaluations(self) -> tuple[Evaluation, ...]:
        """What was measured, in order."""
        return tuple(epoch.evaluation for epoch in self.epochs)

    @property
    def last_position(self) -> Position:
        """Where the rows were set that trained at the end of the last epoch."""
        last = self.epochs[-1]
        return Position(
            last.evaluation.epoch, last.moved_at, self.total_steps, self.evaluations[:-1]
        )

    def until(self, epoch: int) -> RunRecord:
        """The record as it was when an epoch began.

        Args:
            epoch: The epoch.
        """
        return replace(self, epochs=tuple(e for e in self.epochs if e.evaluation.epoch < epoch))

    def ended(self, epoch: Epoch) -> RunRecord:
        """The record with an epoch that is over, in place of what was known of it.

        Args:
            epoch: The epoch.
        """
        before = self.until(epoch.evaluation.epoch)
        return replace(before, epochs=(*before.epochs, epoch))

    def write(self, path: Path) -> None:
        """Write the record, in full or not at all.

        Args:
            path: The file; its folder is made.
        """
        schedules = self.schedules or {}
        state = {
            "begun_at": self.begun_at,
            "total_steps": self.total_steps,
            "schedules": [[name, one.to_config()] for name, one in schedules.items()],
            "epochs": [
                [e.evaluation.epoch, e.evaluation.step, dict(e.evaluation.metrics), e.moved_at]
                for e in self.epochs
            ],
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        with write_atomically(path) as temporary:
            temporary.write_text(json.dumps(state), encoding="utf-8")

    @staticmethod
    def read(path: Path) -> RunRecord | None:
        """Read a record.

        Args:
            path: The file.

        Returns:
            The record, or None where there is no file.

        Raises:
            InputError: The file is no record.
        """
        try:
            state: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            return RunRecord(
                state["begun_at"],
                state["total_steps"],
                tuple(
                    Epoch(Evaluation(n, step, m), moved) for n, step, m, moved in state["epochs"]
                ),
                {name: Schedule.parse(config) for name, config in state["schedules"]},
            )
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(
                f"{path}: the record of a run is the JSON that RowUnfreezing writes. Received: "
                f"{' '.join(str(error).split())}. Remove the backup to begin again."
            ) from None
