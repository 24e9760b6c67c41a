"""What a schedule will do to a table, before any training."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from partial_embedding.errors import refused_at
from partial_embedding.rows.vocabulary import Ids, Vocabulary, covered_share
from partial_embedding.schedule import (
    Evaluation,
    Plateau,
    Position,
    RateScale,
    Schedule,
    StageState,
)
from partial_embedding.schedule.messages import place_text
from partial_embedding.schedule.schedule import first_other

_BAR = 24


@dataclass(frozen=True)
class Planned:
    """One stage of a plan, or one increment of growing into the next: where, and how many rows."""

    epoch: int
    step: int
    stage: int
    place: str  # all of these in words
    trainable: int
    joining: int
    leaving: int
    covered: float | None  # the share of the training data's tokens, where that is known
    rate: str  # of the joining rows, where it is not the optimizer's own


def plan(
    schedule: Schedule,
    num_rows: int,
    vocabulary: Vocabulary | None = None,
    epochs: int = 1,
    steps_per_epoch: int = 1,
    padding: int | None = None,
    new: Ids | None = None,
) -> list[Planned]:
    """List what a schedule does in a run, in order, as `boundaries` finds it.

    The row of padding never trains, also when it is among those of a stage; `new` are the rows by
    which the table grew last.

    Example:
        >>> schedule = Schedule([{"epoch": 0, "rows": [7]}, {"epoch": 2, "rows": "all"}])
        >>> [(step.place, step.trainable) for step in plan(schedule, 10, epochs=5)]
        [('stage 0 from epoch 0', 1), ('stage 1 from epoch 2', 10)]
    """
    planned: list[Planned] = []
    before = np.zeros(0, np.int64)
    for position, stage_state in boundaries(schedule, epochs, steps_per_epoch):
        # Rows that grow are asked for by the stage that they grow into.
        with refused_at(f"stages[{stage_state.stage + bool(stage_state.increment)}]"):
            ids = schedule.rows_at(stage_state).resolve(num_rows, vocabulary, new=new)
        if padding is not None:
            ids = ids[ids != padding]
        joining = np.setdiff1d(ids, before, assume_unique=True).size
        planned.append(
            Planned(
                position.epoch,
                position.step,
                stage_state.stage,
                place_text(schedule, position),
                ids.size,
                joining,
                before.size - (ids.size - joining),
                covered_share(ids, vocabulary),
                _rate_text(schedule.rate_scale_at(stage_state)),
            )
        )
        before = ids
    return planned


def plan_text(
    schedule: Schedule, planned: Sequence[Planned], num_rows: int, epochs: int
) -> list[str]:
    r"""A plan as lines to print, with a bar for the share of the table that trains.

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
        text += f", {step.rate}" if step.rate else ""
        lines.append(text)
    reached = {step.stage for step in planned}
    for i, stage in enumerate(schedule.stages):
        if i in reached:
            continue
        waits = isinstance(stage.start, Plateau)
        lines.append(
            f"stage {i} at {stage.start}, "
            + ("which no plan can foresee" if waits else "which this run does not reach")
        )
    return lines


def boundaries(
    schedule: Schedule, epochs: int, steps_per_epoch: int
) -> Iterator[tuple[Position, StageState]]:
    """The positions of a run at which a stage or an increment begins, in order.

    No plan can foresee when a metric stops improving: a stage that waits for it begins where
    `max_wait` lets it at the latest, with one validation an epoch, and not at all without it.

    Example:
        >>> schedule = Schedule([{"step": 0, "rows": "none"}, {"step": 9_999_999, "rows": "all"}])
        >>> [position.step for position, _ in boundaries(schedule, 10, 10**6)]
        [0, 9999999]
    """
    total = epochs * steps_per_epoch
    stride = 1 if schedule.moves_within_epochs else steps_per_epoch
    evaluations: tuple[Evaluation, ...] = ()
    step = 0
    while step < total:
        epoch = step // steps_per_epoch
        here = Position(epoch, step, total, evaluations)
        now = schedule.state_at(here)
        yield here, now
        wait, end = schedule.plateau_after(now.stage), total
        most = None if wait is None else wait.max_wait
        if most is not None:
            end = min(total, (epoch + most) * steps_per_epoch)
        later = range(step + stride, end, stride)
        step += stride * (1 + first_other(schedule, here, later, steps_per_epoch))
        if wait is not None and most is not None:
            better = (1 + wait.min_delta) * (1 if wait.mode == "max" else -1)
            evaluations += tuple(
                Evaluation(e, (e + 1) * steps_per_epoch, {wait.monitor: e * better})
                for e in range(epoch, step // steps_per_epoch)
            )


def _rate_text(rate_scale: RateScale) -> str:
    rate, warmup = rate_scale.lr_scale, rate_scale.warmup_steps
    parts = [f"lr × {rate:.3g}"] * (rate != 1) + [f"warm-up of {warmup:,} steps"] * bool(warmup)
    return ", ".join(parts)
