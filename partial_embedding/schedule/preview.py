"""What a schedule will do to a table, before any training."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from partial_embedding.errors import InputError
from partial_embedding.rows.vocabulary import Ids, Vocabulary
from partial_embedding.schedule import (
    Evaluation,
    Plateau,
    Position,
    RateScale,
    Schedule,
    StageState,
)
from partial_embedding.schedule.messages import place_text

_BAR = 24


@dataclass(frozen=True)
class Planned:
    """One stage of a plan, or one increment of growing into the next.

    Args:
        position: Where in training it begins.
        place: The same in words.
        trainable: How many rows train.
        joining: How many of them did not train before.
        leaving: How many trained before and no longer do.
        covered: The share of the training data's tokens whose rows train; None without counts.
        rate_scale: How fast the joining rows learn.
    """

    position: Position
    place: str
    trainable: int
    joining: int
    leaving: int
    covered: float | None
    rate_scale: RateScale


def plan(
    schedule: Schedule,
    num_rows: int,
    vocabulary: Vocabulary | None = None,
    epochs: int = 1,
    steps_per_epoch: int = 1,
    padding: int | None = None,
    new: Ids | None = None,
) -> list[Planned]:
    """List what a schedule does in a run, in order.

    No plan can foresee when a metric stops improving: a stage that waits for it is planned at the
    last stage_state that `max_wait` allows, with one validation an epoch, and left out without it.

    Args:
        schedule: The schedule.
        num_rows: The rows V of the table.
        vocabulary: What rows mean, for schedules that ask for it.
        epochs: The epochs of the run.
        steps_per_epoch: Optimizer steps in an epoch.
        padding: A row that never trains, also when it is among those of a stage.
        new: The rows by which the table grew last, sorted ids, int64, for schedules that name them.

    Raises:
        InputError: The rows do not fit the table or the vocabulary.

    Example:
        >>> schedule = Schedule([{"epoch": 0, "rows": [7]}, {"epoch": 2, "rows": "all"}])
        >>> [(step.place, step.trainable) for step in plan(schedule, 10, epochs=5)]
        [('stage 0 from epoch 0', 1), ('stage 1 from epoch 2', 10)]
    """
    planned: list[Planned] = []
    before = np.zeros(0, np.int64)
    last: StageState | None = None
    for position in _positions(schedule, epochs, steps_per_epoch):
        stage_state = schedule.state_at(position)
        if stage_state == last:
            continue
        last = stage_state
        try:
            ids = schedule.rows_at(stage_state).resolve(num_rows, vocabulary, new=new)
        except InputError as error:
            # Rows that grow are asked for by the stage that they grow into.
            raise InputError(
                f"stages[{stage_state.stage + bool(stage_state.increment)}]: {error}"
            ) from None
        ids = ids[ids != padding]
        joining = np.setdiff1d(ids, before, assume_unique=True).size
        planned.append(
            Planned(
                position,
                place_text(schedule, position),
                ids.size,
                joining,
                before.size - (ids.size - joining),
                _covered(ids, vocabulary),
                schedule.rate_scale_at(stage_state),
            )
        )
        before = ids
    return planned


def plan_text(
    schedule: Schedule, planned: Sequence[Planned], num_rows: int, epochs: int
) -> list[str]:
    r"""A plan as lines to print, with a bar for the share of the table that trains.

    Args:
        schedule: The schedule.
        planned: What `plan` listed of it.
        num_rows: The rows V of the table.
        epochs: The epochs of the run.

    Example:
        >>> schedule = Schedule([{"epoch": 0, "rows": [7]}, {"epoch": 2, "rows": "all"}])
        >>> print(*plan_text(schedule, plan(schedule, 10, epochs=5), 10, 5), sep="\n")
        10 rows, 5 epochs
        stage 0 from epoch 0  ██······················  1 rows (10.0 %), 1 join
        stage 1 from epoch 2  ████████████████████████  10 rows (100.0 %), 9 join
    """
    lines = [f"{num_rows:,} rows, {epochs:,} epochs"]
    width = max(len(step.place) for step in planned)
    for step in planned:
        share = step.trainable / num_rows if num_rows else 0.0
        filled = round(share * _BAR) or int(step.trainable > 0)
        text = f"{step.place:<{width}}  {'█' * filled}{'·' * (_BAR - filled)}"
        text += f"  {step.trainable:,} rows ({100 * share:.1f} %)"
        if step.covered is not None:
            text += f", {100 * step.covered:.1f} % of training tokens"
        text += f", {step.joining:,} join" if step.joining else ""
        text += f", {step.leaving:,} leave" if step.leaving else ""
        text += f", lr × {step.rate_scale.lr_scale:.3g}" if step.rate_scale.lr_scale != 1 else ""
        text += (
            f", warm-up of {step.rate_scale.warmup_steps:,} steps"
            if step.rate_scale.warmup_steps
            else ""
        )
        lines.append(text)
    reached = {schedule.state_at(step.position).stage for step in planned}
    for i, stage in enumerate(schedule.stages):
        if i in reached:
            continue
        waits = isinstance(stage.start, Plateau)
        lines.append(
            f"stage {i} at {stage.start}, "
            + ("which no plan can foresee" if waits else "which this run does not reach")
        )
    return lines


def _positions(schedule: Schedule, epochs: int, steps_per_epoch: int) -> Iterator[Position]:
    total = epochs * steps_per_epoch
    within = range(steps_per_epoch) if schedule.moves_within_epochs else range(1)
    evaluations = _improving(schedule, epochs, steps_per_epoch)
    for epoch in range(epochs):
        for step in within:
            yield Position(epoch, epoch * steps_per_epoch + step, total, evaluations[:epoch])


def _improving(schedule: Schedule, epochs: int, steps_per_epoch: int) -> tuple[Evaluation, ...]:
    """Validations in which every metric that is waited for gets better."""
    waited = [s.start for s in schedule.stages if isinstance(s.start, Plateau)]
    return tuple(
        Evaluation(
            epoch,
            (epoch + 1) * steps_per_epoch,
            {
                plateau.monitor: (epoch if plateau.mode == "max" else -epoch)
                * (1 + max(p.min_delta for p in waited))
                for plateau in waited
            },
        )
        for epoch in range(epochs)
    )


def _covered(ids: Ids, vocabulary: Vocabulary | None) -> float | None:
    if vocabulary is None or vocabulary.counts is None or not vocabulary.counts.sum():
        return None
    return float(vocabulary.counts[ids].sum() / vocabulary.counts.sum())
