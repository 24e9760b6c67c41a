"""The tables of a torch module, as the runner of schedules moves them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import distributed as dist
from torch import nn
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from partial_embedding.errors import InputError
from partial_embedding.rows.vocabulary import Ids
from partial_embedding.schedule import RateScale
from partial_embedding.schedule.rank_consistency import RankView
from partial_embedding.torch.audit import FrozenRowAudit
from partial_embedding.torch.optimizer import is_left_alone, prepared, rowwise
from partial_embedding.torch.table import tables_in


class TorchTables:
    """The tables of a module; an `Adapter` of the runner.

    Args:
        model: The module.

    Raises:
        InputError: It has no table.

    Example:
        >>> from partial_embedding import Schedule
        >>> from partial_embedding.schedule.runner import Runner
        >>> from partial_embedding.torch import PartialEmbedding
        >>> model = nn.Sequential(PartialEmbedding(10, 4))
        >>> schedule = Schedule([{"epoch": 0, "rows": [2]}, {"epoch": 3, "rows": "all"}])
        >>> runner = Runner(TorchTables(model), {None: schedule}, say=print)
        >>> begun = runner.advance(epoch=0, step=0)
        0: 1 of 10 rows train (4 of 40 parameters), 0 parameters elsewhere
        0: stage 0 from epoch 0: 1 rows train, 10.0 % of the table
        >>> runner.advance(epoch=1, step=5)
        False
        >>> model[0].trainable_rows
        tensor([2])
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        every = dict(tables_in(model))
        # A teacher, which was copied and takes no gradients, follows no schedule.
        taught = {n: t for n, t in every.items() if t.leaf_weight.requires_grad or not t.is_copy}
        self.tables = taught or every
        if not self.tables:
            raise InputError(
                "unfreezing rows needs a PartialEmbedding in the model. Received a "
                f"{type(model).__name__} without one. Take it for nn.Embedding, or call "
                "replace_embedding(model, name)."
            )

    def prepare(
        self, names: Iterable[str], optimizers: Iterable[Optimizer], lazy: bool = False
    ) -> None:
        """Make optimizers step the trainable rows alone; those that were told how stay so.

        Raises:
            InputError: A table belongs to none of them, or one cannot keep frozen rows exact.
        """
        left = {id(self.tables[name].leaf_weight): name for name in names}
        for optimizer in optimizers:
            held = {id(p) for group in optimizer.param_groups for p in group["params"]}
            told = prepared(optimizer) is not None or is_left_alone(optimizer)
            if held & left.keys() and not told:
                rowwise(optimizer, self.model, lazy=lazy)
            left = {weight: name for weight, name in left.items() if weight not in held}
        for name in left.values():
            raise InputError(
                f"each scheduled table belongs to an optimizer. Received none with {name!r}. "
                "Build the optimizer from the model's parameters()."
            )

    # What the runner asks for

    @property
    def shapes(self) -> Mapping[str, tuple[int, int]]:
        """The rows V and the columns D of each table."""
        shapes = {name: table.leaf_weight.shape for name, table in self.tables.items()}
        return {name: (num_rows, width) for name, (num_rows, width) in shapes.items()}

    @property
    def processes(self) -> int:
        """How many processes train the model together."""
        there = dist.is_available() and dist.is_initialized()
        return dist.get_world_size() if there else 1

    def gather(self, view: RankView) -> Sequence[RankView]:
        """What all processes hand in, by rank; each of them calls this."""
        views: list[Any] = [None] * self.processes
        dist.all_gather_object(views, view)
        return views

    def check_rows(self, name: str, ids: Ids) -> None:
        """Refuse rows that cannot train, since their weight takes no gradient."""
        if len(ids) and not self.tables[name].leaf_weight.requires_grad:
            raise InputError(
                f"rows train where the weight requires gradients. Received {len(ids):,} rows to "
                "train in a weight with requires_grad=False, as from_pretrained(freeze=True), "
                "freeze() of a module, and peft's get_peft_model make it. Call "
                f"requires_grad_(True) on the weight of {name!r} after them."
            )

    def check_rate_scale(self, name: str, rate_scale: RateScale) -> None:
        """Refuse a rate that the optimizer of a table cannot keep."""
        self.tables[name].check_rate_scale(rate_scale)

    def trainable_rows(self, name: str) -> Ids:
        """The rows that train now, rising, int64, shape (K,)."""
        ids: Ids = self.tables[name].row_set.ids.cpu().numpy()
        return ids

    def new_rows(self, name: str) -> Ids | None:
        """The rows by which the table grew last, rising, int64, or None."""
        return self.tables[name].new_rows

    def set_rows(
        self, name: str, ids: Ids, rate_scale: RateScale, *, all_join: bool = False
    ) -> None:
        """Train these rows and no others; with `all_join` those that train already join, too."""
        table = self.tables[name]
        if all_join and (table.rate_scales or not rate_scale.is_plain):
            # Rows that train already would keep the rate that they joined with.
            table.set_trainable_ids(ids[:0])
        table.set_trainable_ids(ids, rate_scale)

    def watch(self, name: str) -> FrozenRowAudit:
        """Keep what the frozen rows hold now."""
        return FrozenRowAudit(self.tables[name], name)

    def parameters_elsewhere(self, names: Iterable[str]) -> int | None:
        """How many parameters train outside of these tables, but for lazy ones without a shape."""
        own = {id(self.tables[name].leaf_weight) for name in names}
        others = [p for p in self.model.parameters() if p.requires_grad and id(p) not in own]
        return None if any(map(is_lazy, others)) else sum(p.numel() for p in others)
