"""What the runner asks of a framework; `TorchTables` and `KerasTables` answer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Protocol

from partial_embedding.rows.vocabulary import Ids
from partial_embedding.schedule.rank_consistency import RankView
from partial_embedding.schedule.stages import RateScale


class Audit(Protocol):
    """The bits of a table's frozen rows, as they were when it was made."""

    @property
    def num_frozen(self) -> int:
        """How many rows were frozen then."""

    def check(self, step: int | None = None) -> None:
        """Raise `FrozenRowsMoved` where one of them changed a bit."""


class Adapter(Protocol):
    """What a framework does to the tables of one model, each known by its name."""

    @property
    def shapes(self) -> Mapping[str, tuple[int, int]]:
        """The rows V and the columns D of each table."""

    @property
    def processes(self) -> int:
        """How many processes train the model together."""

    def gather(self, view: RankView) -> Sequence[RankView]:
        """What all processes hand in, by rank; each of them calls this."""

    def check_rows(self, name: str, ids: Ids) -> None:
        """Refuse rows that a stage trains and the table cannot."""

    def check_rate_scale(self, name: str, rate_scale: RateScale) -> None:
        """Refuse a rate that the optimizer of a table cannot keep."""

    def trainable_rows(self, name: str) -> Ids:
        """The rows that train now, rising."""

    def new_rows(self, name: str) -> Ids | None:
        """The rows by which the table grew last, rising, if it did."""

    def set_rows(
        self, name: str, ids: Ids, rate_scale: RateScale, *, all_join: bool = False
    ) -> None:
        """Train these rows and no others; those that join, or all, learn at this rate."""

    def watch(self, name: str) -> Audit:
        """Keep what the frozen rows hold now."""

    def parameters_elsewhere(self, names: Iterable[str]) -> int | None:
        """How many parameters train outside of these tables, where that is known already."""
