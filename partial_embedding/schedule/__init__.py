"""When: a pure function from the position in training to the rows that train there."""

from partial_embedding.schedule.changes import changes
from partial_embedding.schedule.pace import Pace
from partial_embedding.schedule.position import Position, Seen
from partial_embedding.schedule.schedule import (
    AnySchedule,
    Moment,
    Schedule,
    schedules_by_table,
)
from partial_embedding.schedule.stages import Stage
from partial_embedding.schedule.starts import Plateau, Start

__all__ = [
    "AnySchedule",
    "Moment",
    "Pace",
    "Plateau",
    "Position",
    "Schedule",
    "Seen",
    "Stage",
    "Start",
    "changes",
    "schedules_by_table",
]
