"""What runs say about their rows, in the same words for every framework."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from partial_embedding.schedule import Plateau, Position, Schedule
from partial_embedding.vocabulary import Ids, Vocabulary


@dataclass(frozen=True)
class StageReport:
    """What happened to a table's frozen rows during one stage.

    Args:
        table: The table's name.
        stage: The stage's index.
        frozen: How many rows were frozen.
        changed: How many of them changed a bit.
    """

    table: str
    stage: int
    frozen: int
    changed: int


def table_line(table: str, trainable: int, num_rows: int, width: int, elsewhere: int) -> str:
    """The true number of trainable parameters, which a model summary cannot know.

    Args:
        table: The table's name.
        trainable: The rows that train.
        num_rows: All rows V.
        width: The columns D.
        elsewhere: Trainable parameters outside the table.

    Example:
        >>> table_line("embedding", 20, 1000, 8, 500)
        'embedding: 20 of 1,000 rows train (160 of 8,000 parameters), 500 parameters elsewhere'
    """
    return (
        f"{table}: {trainable:,} of {num_rows:,} rows train ({trainable * width:,} of "
        f"{num_rows * width:,} parameters), {elsewhere:,} parameters elsewhere"
    )


def stage_line(
    table: str,
    place: str,
    ids: Ids,
    num_rows: int,
    vocabulary: Vocabulary | None = None,
) -> str:
    """One line for a stage, or a part of one, that begins.

    Args:
        table: The table's name.
        place: Where that is, as `place_text` says it.
        ids: The rows that train, shape (K,).
        num_rows: All rows V.
        vocabulary: Where counts say how many training tokens the rows cover.

    Example:
        >>> import numpy as np
        >>> vocabulary = Vocabulary("abcd", counts=[5, 1, 3, 1])
        >>> stage_line("words", "stage 1 from epoch 4", np.array([0, 2]), 4, vocabulary)
        'words: stage 1 from epoch 4: 2 rows train, 50.0 % of the table, 80.0 % of training tokens'
    """
    line = f"{table}: {place}: {len(ids):,} rows train, {_percent(len(ids), num_rows)} of the table"
    if vocabulary is not None and vocabulary.counts is not None:
        covered = int(vocabulary.counts[ids].sum())
        line += f", {_percent(covered, int(vocabulary.counts.sum()))} of training tokens"
    return line


def place_text(schedule: Schedule, position: Position) -> str:
    """Where a position is in a schedule.

    Args:
        schedule: The schedule.
        position: Where training stands.

    Example:
        >>> schedule = Schedule([{"epoch": 0, "rows": "none"}, {"epoch": 2, "rows": "all"}])
        >>> place_text(schedule, Position(epoch=3, step=90))
        'stage 1 from epoch 3'
    """
    moment = schedule.moment(position)
    within = schedule.moves_within_epochs
    place = f"step {position.step:,}" if within else f"epoch {position.epoch}"
    text = f"stage {moment.stage} from {place}"
    if isinstance(start := schedule.stages[moment.stage].start, Plateau):
        text += f" after {start}"
    if moment.part:
        text += f", part {moment.part} of {moment.parts} towards stage {moment.stage + 1}"
    return text + (f", cycle {moment.turn}" if moment.turn else "")


def audit_line(reports: Sequence[StageReport]) -> str:
    """The proof at the end of a run: frozen rows of each stage, and how many changed a bit.

    Args:
        reports: One for each table and stage, in order.

    Example:
        >>> audit_line([StageReport("words", 0, 90, 0), StageReport("words", 1, 40, 0)])
        'audit: words: frozen rows by stage: 90, 40; changed a bit: 0'
    """
    tables = dict.fromkeys(report.table for report in reports)
    parts = []
    for table in tables:
        own = [report for report in reports if report.table == table]
        frozen = ", ".join(f"{report.frozen:,}" for report in own)
        changed = sum(report.changed for report in own)
        parts.append(f"{table}: frozen rows by stage: {frozen}; changed a bit: {changed:,}")
    return "audit: " + "; ".join(parts)


def _percent(part: int, whole: int) -> str:
    return f"{100 * part / whole if whole else 0:.1f} %"
