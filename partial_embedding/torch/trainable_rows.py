"""Which rows of a table train, who is asked before, and which parameters they are rows of."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar, Protocol
from weakref import WeakSet

import numpy as np
import torch
from torch import Tensor, nn
from torch import distributed as dist

from partial_embedding.errors import InputError
from partial_embedding.rows import Rows
from partial_embedding.rows.rows import RowsLike
from partial_embedding.rows.vocabulary import Ids
from partial_embedding.schedule import RateScale
from partial_embedding.torch.engines import lost_weight, refuse_flat
from partial_embedding.torch.origin import Origin
from partial_embedding.torch.rowset import RowSet
from partial_embedding.torch.shards import check_sharding
from partial_embedding.torch.shared_rows import SharedRows

ProcessGroup = Any  # torch has it only where it was built with torch.distributed

# Tables whose rows were set, and that no optimizer has stepped since; and those of which rows were
# looked up, to be learned from, while their weights took no gradients. `unheld` judges them.
waiting: WeakSet[TrainableRows] = WeakSet()
used_frozen: WeakSet[TrainableRows] = WeakSet()


class Stepper(Protocol):
    """What steps a table's rows."""

    def check_rate_scale(self, rate_scale: RateScale) -> None:
        """Refuse a rate that it cannot keep."""


class TrainableRows(nn.Module):
    """A mix-in: what a table is, but for the hooks that keep it so.

    Its row set is replaced whenever other rows are to train.
    """

    if TYPE_CHECKING:  # jit.script reads annotations, and knows few
        _shared: SharedRows
        _shards: Mapping[str, nn.Parameter]
        _averaged: Mapping[str, Callable[[], ProcessGroup | None]] | None

    # The parameters with an entry for each row.
    row_parameters: ClassVar[tuple[str, ...]] = ("weight",)

    # Whether backward left a gradient here since `average` last made it that of all processes.
    awaits_average = False

    # What gives the processes over which each of these parameters is averaged by row; None where
    # `DistributedDataParallel` reduces the table itself.
    _averaged = MappingProxyType({})

    # The row parameters of which this process has some rows. While a pass runs FSDP2 puts whole
    # ones in their places, which are not what is stepped, saved or looked at.
    _shards = MappingProxyType({})

    # Whether the table was made by copying another, as teachers and references are, and no rows of
    # it were set since: nobody has said that it is to train.
    is_copy = False

    @property
    def trainable_rows(self) -> Tensor:
        """The ids of the rows that train, rising, int64, shape (K,)."""
        return self.row_set.ids.clone()

    def set_trainable_rows(
        self, rows: RowsLike, *, lr_scale: float = 1.0, warmup_steps: int = 0
    ) -> None:
        """Train exactly these rows from the next step on.

        Rows that trained before and still do keep their optimizer state and their rate; rows that
        join begin as if training had just started; rows that leave keep their values from here on.

        Args:
            rows: `"all"`, `"none"`, ids, a boolean mask of length V, a `range`, a `slice` or
                `Rows`. The padding row never trains, also when it is among them.
            lr_scale: What the optimizer's rate is multiplied by for the rows that join, for as long
                as they train. A table that is made with `trainable_rows="none"` has no rows that
                trained before.
            warmup_steps: The steps in which their rate rises to that; 0 for none.

        Raises:
            InputError: The rows do not fit the table, or its optimizer cannot keep such a rate.

        Example:
            >>> from partial_embedding.torch import PartialEmbedding
            >>> table = PartialEmbedding(10, 4, trainable_rows=[7])
            >>> table.set_trainable_rows([2, 7], lr_scale=0.5)
            >>> table.trainable_rows, list(table.rate_scales.values())
            (tensor([2, 7]), [RateScale(lr_scale=0.5, warmup_steps=0)])
        """
        self.set_trainable_ids(self._resolve(rows), RateScale(lr_scale, warmup_steps))

    def unfreeze_rows(
        self, rows: RowsLike, *, lr_scale: float = 1.0, warmup_steps: int = 0
    ) -> None:
        """Train these rows too, as a cohort of their own.

        Args:
            rows: As for `set_trainable_rows`.
            lr_scale: Likewise.
            warmup_steps: Likewise.

        Raises:
            InputError: As for `set_trainable_rows`.
        """
        more, mask = self._resolve(rows), self.row_set.mask.cpu().numpy()
        # Of two rising runs, which a stable sort merges.
        ids = np.concatenate([self.row_set.ids.cpu().numpy(), more[~mask[more]]])
        ids.sort(kind="stable")
        self.set_trainable_ids(ids, RateScale(lr_scale, warmup_steps))

    def freeze_rows(self, rows: RowsLike) -> None:
        """Stop training these rows; they lose their optimizer state.

        Args:
            rows: As for `set_trainable_rows`.

        Raises:
            InputError: The rows do not fit the table.
        """
        frozen = np.zeros(self.row_set.num_rows, dtype=bool)
        frozen[self._resolve(rows)] = True
        now = self.row_set.ids.cpu().numpy()
        self.set_trainable_ids(now[~frozen[now]])

    @property
    def _row_set(self) -> RowSet | None:
        return self._shared.row_set

    @property
    def row_set(self) -> RowSet:
        """The rows that train, by cohort, on the device of the weight."""
        weight, rows = self.leaf_weight, self._row_set
        # A meta device would forget the ids; they wait on the CPU until there is a real weight.
        device = torch.device("cpu") if weight.is_meta else weight.device
        if rows is not None and rows.num_rows == weight.shape[0] and rows.device == device:
            return rows
        refuse_flat(weight, self)
        self.row_set = rows = self._row_set_for(weight.shape[0]).to(device)
        return rows

    @row_set.setter
    def row_set(self, row_set: RowSet) -> None:
        self._shared.row_set = row_set
        waiting.add(self)
        if self._shared.origin is not None:
            self._shared.origin.include(self.leaf_weight, row_set.ids)
        for table in self._tied():
            for told in vars(table).get("_before_training", ()):
                told(row_set.ids)

    def _row_set_for(self, num_rows: int) -> RowSet:
        rows = self._row_set
        if rows is None:
            return RowSet(num_rows, {0: self._all_ids()}, 1)
        if rows.num_rows == num_rows:
            return rows
        # Whoever resized the vocabulary did so on the weight alone (transformers does).
        nothing_frozen = len(rows) == self._most_trainable(rows.num_rows)
        rows = rows.resized_to(num_rows)
        return rows.changed_to(self._all_ids().to(rows.device)) if nothing_frozen else rows

    @property
    def rate_scales(self) -> Mapping[int, RateScale]:
        """How fast cohorts learn, by number, where that is not the optimizer's own rate."""
        return {} if self._row_set is None else self.row_set.rate_scales

    @property
    def has_frozen_rows(self) -> bool:
        """Whether some row other than padding does not train."""
        if self._row_set is None:
            return False
        rows = self.row_set
        return len(rows) < self._most_trainable(rows.num_rows)

    @property
    def new_rows(self) -> Ids | None:
        """The rows by which the table grew last, sorted, or None."""
        return self._shared.new_rows

    @property
    def earlier_sizes(self) -> tuple[int, ...]:
        """How many rows there were each time before the table grew."""
        return self._shared.earlier_sizes

    def note_growth(self, earlier_size: int, new_rows: Ids) -> None:
        """Know that rows, sorted, were added, or got a meaning that were there already."""
        if earlier_size != self.leaf_weight.shape[0]:
            self._shared.earlier_sizes += (earlier_size,)
        self._shared.new_rows = new_rows

    def forget_rows(self) -> None:
        """Know that rows have other meanings now: none trains, and nothing is known of them."""
        self.set_trainable_ids(np.empty(0, np.int64))
        shared = self._shared
        shared.earlier_sizes, shared.new_rows, shared.origin = (), None, None

    def remember_origin(self) -> None:
        """Remember, from here on, what rows hold before they train; see `rows_saved_alone`."""
        if self.is_sharded:
            raise InputError(
                "rows are saved alone of a table that is whole in each process. Received a "
                f"{type(self).__name__} whose weight is sharded. Save it whole, with "
                "checkpoint='table'."
            )
        if self._shared.origin is None:
            origin = self._shared.origin = Origin(self.leaf_weight)
            every = self._row_set is None
            origin.include(self.leaf_weight, self._all_ids() if every else self.row_set.ids)

    def _most_trainable(self, num_rows: int) -> int:
        # While a graph is traced the size of an axis is a tensor, which takes no bool away.
        return num_rows - int(self.padding_row is not None)

    def _all_ids(self) -> Tensor:
        # Named, since the default device may be the meta device, which would forget the ids.
        ids = torch.arange(self.leaf_weight.shape[0], device="cpu")
        return ids[ids != self.padding_row] if self.padding_row is not None else ids

    @property
    def padding_row(self) -> int | None:
        """The row that never trains, if there is one."""
        # A head has none of its own, and may be tied to a table that has one.
        return self._shared.padding_row

    def _set_padding_row(self, row: int | None) -> None:
        self._shared.padding_row, rows = row, self._row_set
        if row is None or rows is None:
            return
        others = rows.ids[rows.ids != row]
        if len(others) < len(rows):
            self.row_set = rows.changed_to(others)

    def _resolve(self, rows: RowsLike) -> Ids:
        refuse_flat(self.leaf_weight, self)
        if isinstance(rows, Tensor):
            rows = rows.detach().cpu().numpy()
        return Rows.parse(rows).resolve(self.leaf_weight.shape[0], new=self._shared.new_rows)

    def set_trainable_ids(self, ids: Ids, rate_scale: RateScale | None = None) -> None:
        """Train exactly these rows, given as `Rows.resolve` gives them; there may be none."""
        self.check_rate_scale(rate_scale)
        self.__dict__.pop("is_copy", None)
        if self.padding_row is not None:
            ids = ids[ids != self.padding_row]
        for parameter in self._shards.values():
            check_sharding(parameter, self)
        if self._row_set is None:
            num_rows = self.leaf_weight.shape[0]
            if len(ids) < self._most_trainable(num_rows):  # or every row trains already
                # Those that stay are the first cohort. All rows, which leave, are not written down.
                self.row_set = RowSet(num_rows, {0: torch.tensor(ids, device="cpu")}, 1)
            return
        before = self.row_set
        self.row_set = before.changed_to(torch.tensor(ids, device=before.device), rate_scale)

    def check_rate_scale(self, rate_scale: RateScale | None) -> None:
        """Refuse a rate that the table's optimizer cannot keep."""
        if rate_scale is None:
            return
        for table in self._tied():
            for stepper in table.steppers:
                stepper.check_rate_scale(rate_scale)

    @property
    def steppers(self) -> WeakSet[Stepper]:
        """What steps the rows, and is asked before they get a rate of their own."""
        # Weak, since a table does not keep its optimizers alive.
        found: WeakSet[Stepper] = self.__dict__.setdefault("_steppers", WeakSet())
        return found

    def _tied(self) -> set[TrainableRows]:
        """The living tables of the same weight, as far as they are known: this one."""
        return {self}

    def take_dense(self, grad: Tensor) -> None:
        """Know that backward made a dense gradient of the weight; for tables that are to say so."""

    # The parameters that they are rows of

    @property
    def leaf_weight(self) -> nn.Parameter:
        """The parameter that `weight` is, or that it is computed from.

        Pruning and parametrizations, such as `spectral_norm`, put the parameter aside.
        """
        weight = self.find_leaf_weight()
        if weight is None:
            raise lost_weight(self)
        return weight

    def find_leaf_weight(self) -> nn.Parameter | None:
        """The same, or None where no one parameter has the rows of the weight."""
        weight = self._shards.get("weight") if self._shards else None
        if weight is None:
            weight = self._parameters.get("weight")
        if weight is not None:
            return weight
        if (computed := self._modules.get("parametrizations")) is not None:
            return computed._modules["weight"]._parameters.get("original")  # type: ignore[union-attr]
        return self._parameters.get("weight_orig")

    def hookable_parameters(self) -> Iterator[nn.Parameter]:
        """The parameters with an entry for each row, now; and what an engine lends for a pass."""
        for name in self.row_parameters:
            if (parameter := self.row_parameter(name)) is not None:
                yield parameter
            if self._shards and (lent := self._parameters.get(name)) is not None:
                yield lent

    def row_parameter(self, name: str) -> nn.Parameter | None:
        """The parameter that one of `row_parameters` names, if there is one."""
        if name == "weight":
            return self.leaf_weight
        return self._shards.get(name, self._parameters.get(name))

    @property
    def is_sharded(self) -> bool:
        """Whether this process has some rows of the weight only."""
        return "weight" in self._shards

    # Among processes

    def average_over(
        self, names: Iterable[str], group_of: Callable[[], ProcessGroup | None]
    ) -> None:
        """Have parameters averaged by row from now on, until `group_of` gives no processes more."""
        self.__dict__["_averaged"] = dict.fromkeys(names, group_of)

    def leave_to_ddp(self) -> None:
        """Know that `DistributedDataParallel` reduces the table itself."""
        self.__dict__["_averaged"] = None

    @property
    def is_left_to_ddp(self) -> bool:
        """Whether `DistributedDataParallel` reduces the table itself."""
        return self._averaged is None

    def averaging_group(self, parameter: nn.Parameter) -> ProcessGroup | None:
        """The processes over which a parameter is averaged by row, or None where it is not."""
        for name, group_of in (self._averaged or {}).items():
            if self.row_parameter(name) is parameter:
                group = group_of()
                return None if group is None or dist.get_world_size(group) == 1 else group
        return None
