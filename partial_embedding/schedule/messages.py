"""What runs say about their rows, in the same words for every framework."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

import numpy as np

from partial_embedding.errors import InputError
from partial_embedding.rows.kinds import shown
from partial_embedding.rows.rows import Rows
from partial_embedding.rows.vocabulary import Ids, Vocabulary
from partial_embedding.schedule.position import Position
from partial_embedding.schedule.schedule import Schedule
from partial_embedding.schedule.starts import Plateau


@dataclass(frozen=True)
class AuditResult:
    """How many of a table's rows were frozen during one stage, and how many changed a bit."""

    table: str
    stage: int
    frozen: int
    changed: int


def table_line(table: str, trainable: int, num_rows: int, width: int, elsewhere: int | None) -> str:
    """The true number of trainable parameters, which a model summary cannot know.

    Example:
        >>> table_line("embedding", 20, 1000, 8, 500)
        'embedding: 20 of 1,000 rows train (160 of 8,000 parameters), 500 parameters elsewhere'
    """
    return (
        f"{table}: {trainable:,} of {num_rows:,} rows train ({trainable * width:,} of "
        f"{num_rows * width:,} parameters)"
        + ("" if elsewhere is None else f", {elsewhere:,} parameters elsewhere")
    )


def stage_line(
    table: str, place: str, ids: Ids, num_rows: int, vocabulary: Vocabulary | None = None
) -> str:
    """One line for a stage, or an increment of one, that begins at a place of `place_text`.

    Example:
        >>> import numpy as np
        >>> vocabulary = Vocabulary("abcd", counts=[5, 1, 3, 1])
        >>> stage_line("words", "stage 1 from epoch 4", np.array([0, 2]), 4, vocabulary)
        'words: stage 1 from epoch 4: 2 rows train, 50.0 % of the table, 80.0 % of training tokens'
    """
    line = f"{table}: {place}: {len(ids):,} rows train, {percent(len(ids), num_rows)} of the table"
    if vocabulary is not None and vocabulary.counts is not None:
        covered = int(vocabulary.counts[ids].sum())
        line += f", {percent(covered, int(vocabulary.counts.sum()))} of training tokens"
    return line


def place_text(schedule: Schedule, position: Position) -> str:
    """Where a position is in a schedule.

    Example:
        >>> schedule = Schedule([{"epoch": 0, "rows": "none"}, {"epoch": 2, "rows": "all"}])
        >>> place_text(schedule, Position(epoch=3, step=90))
        'stage 1 from epoch 3'
    """
    stage_state = schedule.state_at(position)
    within = schedule.moves_within_epochs
    place = f"step {position.step:,}" if within else f"epoch {position.epoch}"
    text = f"stage {stage_state.stage} from {place}"
    if isinstance(start := schedule.stages[stage_state.stage].start, Plateau):
        text += f" after {start}"
    if stage_state.increment:
        text += f", increment {stage_state.increment} of {stage_state.increments}"
        text += f" towards stage {stage_state.stage + 1}"
    return text + (f", cycle {stage_state.cycle_index}" if stage_state.cycle_index else "")


def resumed_lines(
    table: str,
    then: Schedule,
    now: Schedule,
    before: Position,
    position: Position,
    resolve: Callable[[Rows], Ids],
) -> list[str]:
    """What a resumed run says of a schedule that was changed since its checkpoint.

    A schedule may be changed wherever the rows that train at the checkpoint's position stay the
    same. Rows that train already keep the rate_scale that they joined with. The position is where
    the checkpoint's rows were set last, and the same place as the run sees it, whose length may
    have changed.

    Example:
        >>> then = Schedule([{"epoch": 0, "rows": [1]}, {"epoch": 3, "rows": "all"}])
        >>> now = Schedule([{"epoch": 0, "rows": [1]}, {"epoch": 5, "rows": "all"}])
        >>> place = Position(epoch=1)
        >>> resumed_lines("words", then, now, place, place, lambda rows: rows.resolve(9))
        ["words: the schedule is not the checkpoint's: stages[1].epoch: 3 became 5"]
    """
    changed = changes(then, now)
    if "share" in now.units and before.total_steps != position.total_steps:
        changed.append(f"total_steps: {before.total_steps} became {position.total_steps}")
    if not changed:
        return []
    old, new = then.trainable_rows(before), now.trainable_rows(position)
    if not np.array_equal(resolve(old), resolve(new)):
        raise InputError(
            f"{table}: a resumed run trains the rows that the checkpoint trained in "
            f"{place_text(then, before)}, {shown(old.to_config())}. Received: "
            f"{shown(new.to_config())}, since {'; '.join(changed)}. Change only what lies ahead."
        )
    return [f"{table}: the schedule is not the checkpoint's: {change}" for change in changed]


def audit_line(results: Sequence[AuditResult]) -> str:
    """The proof at the end of a run: frozen rows of each stage, and how many changed a bit.

    Example:
        >>> audit_line([AuditResult("words", 0, 90, 0), AuditResult("words", 1, 40, 0)])
        'audit: words: frozen rows by stage: 90, 40; changed a bit: 0'
    """
    tables = dict.fromkeys(result.table for result in results)
    parts = []
    for table in tables:
        own = [result for result in results if result.table == table]
        frozen = ", ".join(f"{result.frozen:,}" for result in own)
        changed = sum(result.changed for result in own)
        parts.append(f"{table}: frozen rows by stage: {frozen}; changed a bit: {changed:,}")
    return "audit: " + "; ".join(parts)


def not_reached_line(table: str, schedule: Schedule, stages: Sequence[int]) -> str:
    """What a run says at its end of stages that it never came to.

    Example:
        >>> schedule = Schedule([{"epoch": 0, "rows": "none"}, {"plateau": "loss", "rows": "all"}])
        >>> not_reached_line("words", schedule, [1])
        'words: the run ended before stage 1, at a plateau of loss'
    """
    named = "; ".join(f"stage {i}, at {schedule.stages[i].start}" for i in stages)
    return f"{table}: the run ended before {named}"


def stopper_text(stopper: str, monitor: str) -> str:
    """What a run says at its start of something that may end it before later stages.

    Example:
        >>> print(stopper_text("EarlyStopping", "val_loss"))
        EarlyStopping may end the run before stages that wait for a plateau of val_loss: it counts on from stage to stage, and the schedule begins anew with each. Let it monitor another metric, or let max_epochs end the run.
    """  # noqa: E501  # a message is shown as it is printed
    return (
        f"{stopper} may end the run before stages that wait for a plateau of {monitor}: it counts "
        "on from stage to stage, and the schedule begins anew with each. Let it monitor another "
        "metric, or let max_epochs end the run."
    )


def moved_text(table: str, ids: Sequence[int], step: int | None, suspect: str) -> str:
    """What the audit says of frozen rows that moved.

    Example:
        >>> moved_text("words", [3], 12, "a cast of the model")
        'words: 1 frozen row changed by step 12: 3. Most likely: a cast of the model.'
    """
    count = "1 frozen row" if len(ids) == 1 else f"{len(ids)} frozen rows"
    when = "" if step is None else f" by step {step}"
    listed = ", ".join(map(str, ids[:10])) + (", …" if len(ids) > 10 else "")
    return f"{table}: {count} changed{when}: {listed}. Most likely: {suspect}."


def percent(part: int, whole: int) -> str:
    """A share, as it is said; 0 % of nothing."""
    return f"{100 * part / whole if whole else 0:.1f} %"


# What differs between two schedules


def changes(before: Schedule, after: Schedule) -> list[str]:
    """List the keys that are not the same in two schedules, in their order.

    Example:
        >>> before = Schedule([{"epoch": 0, "rows": [1]}, {"epoch": 3, "rows": "all"}])
        >>> after = Schedule([{"epoch": 0, "rows": [1]}, {"epoch": 5, "rows": "all"}])
        >>> changes(before, after)
        ['stages[1].epoch: 3 became 5']
    """
    lines: list[str] = []
    _compare("", before.to_config(), after.to_config(), lines)
    return lines


def _compare(place: str, before: Any, after: Any, lines: list[str]) -> None:
    if before is _ABSENT:
        lines.append(f"{place}: {shown(after)} was added")
    elif after is _ABSENT:
        lines.append(f"{place}: {shown(before)} was removed")
    elif isinstance(before, dict) and isinstance(after, dict):
        for key in dict.fromkeys([*before, *after]):
            inner = f"{place}.{key}" if place else key
            _compare(inner, before.get(key, _ABSENT), after.get(key, _ABSENT), lines)
    elif place == "stages":
        for i, (old, new) in enumerate(zip_longest(before, after, fillvalue=_ABSENT)):
            _compare(f"{place}[{i}]", old, new, lines)
    elif repr(before) != repr(after):  # 1 is a number of rows and 1.0 a share, though equal
        lines.append(f"{place}: {shown(before)} became {shown(after)}")


_ABSENT = object()
