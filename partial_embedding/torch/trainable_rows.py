"""Which rows of a table train: what is set, what is read, and who is asked before."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING
from weakref import WeakSet

import numpy as np
import torch
from torch import Tensor, nn

from partial_embedding.rows import Rows
from partial_embedding.rows.rows import RowsLike
from partial_embedding.rows.vocabulary import Ids
from partial_embedding.schedule import RateScale
from partial_embedding.torch.engines import lost_weight, refuse_flat
from partial_embedding.torch.hooks import tables_of
from partial_embedding.torch.rowset import RowSet
from partial_embedding.torch.shards import check_sharding
from partial_embedding.torch.shared_rows import SharedRows

if TYPE_CHECKING:
    from partial_embedding.torch.table_state import TableState

# Tables whose rows were set, and that no optimizer has stepped since; and those of which rows were
# looked up, to be learned from, while their weights took no gradients. `unheld` judges them.
waiting: WeakSet[TrainableRows] = WeakSet()
used_frozen: WeakSet[TrainableRows] = WeakSet()


class TrainableRows(nn.Module):
    """A mix-in: the row set of a weight, which is replaced whenever other rows are to train."""

    if TYPE_CHECKING:  # jit.script reads annotations, and knows few
        _shared: SharedRows
        _shards: Mapping[str, nn.Parameter]

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
        for table in {self, *tables_of(self.leaf_weight)}:
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
        for table in {self, *tables_of(self.leaf_weight)}:
            for stepper in table.steppers:
                stepper.check_rate_scale(rate_scale)

    @property
    def steppers(self) -> WeakSet[TableState]:
        """What optimizers remember of the table; asked before its rows get rates of their own."""
        # Weak, since a table does not keep its optimizers alive.
        found: WeakSet[TableState] = self.__dict__.setdefault("_steppers", WeakSet())
        return found

    # The parameter that they are rows of

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
