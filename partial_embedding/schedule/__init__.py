"""When: a pure function from the position in training to the rows that train there."""

from partial_embedding.schedule.position import Evaluation, Position
from partial_embedding.schedule.schedule import (
    AnySchedule,
    Schedule,
    StageState,
    schedules_by_table,
)
from partial_embedding.schedule.stages import RateScale, Stage
from partial_embedding.schedule.starts import Plateau, Start

__all__ = [
    "AnySchedule",
    "Evaluation",
    "Plateau",
    "Position",
    "RateScale",
    "Schedule",
    "Stage",
    "StageState",
    "Start",
    "schedules_by_table",
]
