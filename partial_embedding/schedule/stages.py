"""Stages of training, read and checked, and how fast the rows learn that join by one."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, TypeVar

from partial_embedding.errors import InputError, did_you_mean, refused_at
from partial_embedding.rows.growth import Growth
from partial_embedding.rows.kinds import is_number, is_whole
from partial_embedding.rows.rows import Rows
from partial_embedding.schedule.starts import UNITS, Plateau, Start

T = TypeVar("T")

_KEYS = [*UNITS, "plateau", "rows", "grow", "lr_scale", "warmup_steps"]


@dataclass(frozen=True)
class RateScale:
    """The learning rate of rows that joined together, relative to the optimizer's.

    Whatever a learning-rate scheduler does to the optimizer's rate, it does to theirs. The warm-up
    rises linearly and counts the steps of these rows alone (Goyal et al. 2017,
    https://arxiv.org/abs/1706.02677, section 2.2).

    Args:
        lr_scale: The factor on the learning rate, above 0.
        warmup_steps: The steps of these rows over which their rate rises to the full one.

    Raises:
        InputError: A number is out of range.

    Example:
        >>> [RateScale(lr_scale=0.5, warmup_steps=4).factor(step) for step in (0, 1, 3, 9)]
        [0.125, 0.25, 0.5, 0.5]
    """

    lr_scale: float = 1.0
    warmup_steps: int = 0

    def __post_init__(self) -> None:
        if not is_number(self.lr_scale) or not 0 < self.lr_scale < float("inf"):
            raise InputError(
                "lr_scale is a factor on the optimizer's learning rate, above 0. "
                f"Received: {self.lr_scale!r}. 1 leaves it as it is."
            )
        if not is_whole(self.warmup_steps) or self.warmup_steps < 0:
            raise InputError(
                "warmup_steps is a whole number of steps from 0 up. "
                f"Received: {self.warmup_steps!r}. 0 is none."
            )
        object.__setattr__(self, "lr_scale", float(self.lr_scale))

    @property
    def is_plain(self) -> bool:
        """Whether these rows learn at the optimizer's own rate throughout."""
        return self == _PLAIN

    def factor(self, steps: int) -> float:
        """The factor on the learning rate after so many steps of these rows."""
        risen = min(1.0, (steps + 1) / self.warmup_steps) if self.warmup_steps else 1.0
        return self.lr_scale * risen

    def to_config(self) -> dict[str, Any]:
        """Write what differs from the optimizer's own rate as plain YAML values."""
        return {key: value for key, value in vars(self).items() if value != getattr(_PLAIN, key)}


_PLAIN = RateScale()


@dataclass(frozen=True, init=False)
class Stage:
    """The rows that train from a start on, until the next stage.

    Args:
        start: Where in training it starts; a whole number is an epoch.
        rows: The rows that train during it.
        growth: How these rows are unfrozen between the start of the stage before and this one's;
            None unfreezes them together when it starts.
        rate_scale: How fast the rows learn that join by this stage, for as long as they train.

    Raises:
        InputError: The start is no place in training.

    Example:
        >>> Stage(2, Rows.all(), rate_scale=RateScale(lr_scale=0.5)).to_config()
        {'epoch': 2, 'rows': 'all', 'lr_scale': 0.5}
    """

    start: Start | Plateau
    rows: Rows
    growth: Growth | None
    rate_scale: RateScale

    def __init__(
        self,
        start: Start | Plateau | int,
        rows: Rows,
        growth: Growth | None = None,
        rate_scale: RateScale | None = None,
    ) -> None:
        set_ = object.__setattr__
        placed = isinstance(start, Start | Plateau)
        set_(self, "start", start if placed else Start("epoch", start))  # type: ignore[arg-type]
        set_(self, "rows", Rows.parse(rows))
        set_(self, "growth", None if growth is None else Growth.parse(growth))
        set_(self, "rate_scale", rate_scale or RateScale())

    def to_config(self) -> dict[str, Any]:
        """Write the stage as plain YAML values."""
        config = {**self.start.to_config(), "rows": self.rows.to_config()}
        if self.growth is not None:
            config["grow"] = self.growth.to_config()
        return {**config, **self.rate_scale.to_config()}


def parsed(stages: object, cycle: object) -> tuple[Stage, ...]:
    """Read the stages of a schedule."""
    if isinstance(stages, str | Mapping) or not isinstance(stages, Sequence) or not stages:
        raise InputError(
            "stages are a list of {epoch: …, rows: …} with at least one entry. "
            f"Received: {stages!r}. Begin with {{epoch: 0, rows: missing}}."
        )
    made = tuple(_stage(stage, f"stages[{i}]") for i, stage in enumerate(stages))
    _check_first(made[0])
    _check_order(made)
    _check_growth(made)
    if cycle is not None:
        _check_cycle(cycle, made)
    return made


def _stage(value: Stage | Mapping[str, Any], place: str) -> Stage:
    if isinstance(value, Stage):
        return value
    if not isinstance(value, Mapping):
        raise InputError(
            f"{place}: a stage is {{epoch: …, rows: …}}. Received: {value!r}. Write both keys."
        )
    starts = [key for key in (*UNITS, "plateau") if key in value]
    if len(starts) > 1:
        raise InputError(
            f"{place}: a stage has one start, epoch, step, share or plateau. Received: {starts}. "
            "Keep one."
        )
    needed = [*(starts or ["epoch"]), "rows"]
    only_keys(value, needed, [key for key in _KEYS if key not in needed], place)
    (start,) = starts
    grow = value.get("grow")
    lr_scale = _at(f"{place}.lr_scale", lambda: RateScale(value.get("lr_scale", 1.0)).lr_scale)
    return Stage(
        _at(f"{place}.{start}", lambda: _start(start, value[start])),
        _at(f"{place}.rows", lambda: Rows.parse(value["rows"])),
        None if grow is None else _at(f"{place}.grow", lambda: Growth.parse(grow)),
        _at(f"{place}.warmup_steps", lambda: RateScale(lr_scale, value.get("warmup_steps", 0))),
    )


def _start(key: str, value: Any) -> Start | Plateau:
    return Plateau.parse(value) if key == "plateau" else Start(key, value)


def _at(place: str, make: Callable[[], T]) -> T:
    with refused_at(place):
        return make()


def _check_first(stage: Stage) -> None:
    if isinstance(stage.start, Plateau):
        raise InputError(
            "stages[0].plateau: the first stage starts at epoch 0. Received a plateau. Put "
            "{epoch: 0, rows: none} first."
        )
    if stage.start.at != 0:
        raise InputError(
            f"stages[0].{stage.start.unit}: the first stage starts at {stage.start.unit} 0. "
            f"Received: {stage.start.at}. To train no row until then, put {{epoch: 0, rows: none}} "
            "first."
        )
    if stage.growth is not None:
        raise InputError(
            "stages[0].grow: rows grow from the stage before. Received the first stage. Put "
            "{epoch: 0, rows: none} first."
        )


def _check_order(stages: Sequence[Stage]) -> None:
    latest: dict[str, float] = {}
    for i, stage in enumerate(stages):
        if isinstance(start := stage.start, Plateau):
            continue
        if (before := latest.get(start.unit, -1)) >= start.at:
            raise InputError(
                f"stages[{i}].{start.unit}: stages come in rising order of {start.unit}s. "
                f"Received: {start.at} after {before}. Sort them, or merge the two."
            )
        latest[start.unit] = start.at


def _check_growth(stages: Sequence[Stage]) -> None:
    for i, (before, after) in enumerate(pairwise(stages), start=1):
        if after.growth is None:
            continue
        first, last = before.start, after.start
        if isinstance(first, Plateau) or isinstance(last, Plateau) or first.unit != last.unit:
            raise InputError(
                f"stages[{i}].grow: rows grow between two stages that both start at an epoch, a "
                f"step or a share of the run. Received {first} and {last}. Give both the same unit."
            )
        length, increments = last.at - first.at, after.growth.increments
        if increments is not None and last.unit != "share" and increments > length:
            raise InputError(
                f"stages[{i}].grow.increments: an increment is at least one {last.unit} long. "
                f"Received {increments} increments for {length} {last.unit}s. "
                "Make fewer increments, or place both stages in a finer unit."
            )


def _check_cycle(cycle: Any, stages: Sequence[Stage]) -> None:
    starts = [stage.start for stage in stages]
    placed = [start for start in starts if isinstance(start, Start)]
    if len(placed) < len(starts) or len({start.unit for start in placed}) > 1:
        raise InputError(
            "cycle: the stages of a cycle start in one unit, epoch, step or share. Received: "
            f"{[str(start) for start in starts]}. Write all in one of these."
        )
    unit, last = placed[-1].unit, placed[-1].at
    whole = is_whole(cycle) or (unit == "share" and isinstance(cycle, float))
    if not whole or not last < cycle or (unit == "share" and cycle > 1):
        raise InputError(
            f"cycle: a cycle is a number of {unit}s beyond the last stage's start, {last}. "
            f"Received: {cycle!r}. Take a larger one."
        )


def only_keys(
    value: Mapping[str, Any], needed: Sequence[str], optional: Sequence[str], place: str
) -> None:
    """Refuse a mapping with other keys, or without one that is needed."""
    known = sorted([*needed, *optional])
    if unknown := [key for key in value if key not in known]:
        raise InputError(
            f"{place}: the keys are {known}. Received: {unknown[0]!r}."
            f"{did_you_mean(value, known, ' Remove it.')}"
        )
    if lacking := [key for key in needed if key not in value]:
        raise InputError(
            f"{place}: the keys are {known}. Received none named {lacking[0]!r}. Add it."
        )
