"""Proof that frozen rows keep their bits: a fingerprint of each, compared later."""

from __future__ import annotations

import torch
from torch import Tensor

from partial_embedding.errors import FrozenRowsMoved, InputError
from partial_embedding.schedule.messages import moved_text
from partial_embedding.torch.fingerprint import fingerprints
from partial_embedding.torch.rowset import RowSet
from partial_embedding.torch.shards import gathered, local, shard_of
from partial_embedding.torch.table import PartialTable


class FrozenRowAudit:
    """Fingerprints of a table's frozen rows.

    A check reads the whole frozen part of the table once, at about the speed of memory, and the
    fingerprints take 8 bytes per frozen row. Of a table that processes share by rows, each watches
    those that it has.

    Args:
        table: The table, whose rows that are frozen now are watched.
        name: Its name in messages.

    Raises:
        InputError: It is no partly trainable table.

    Example:
        >>> from partial_embedding.torch import PartialEmbedding
        >>> table = PartialEmbedding(4, 2, trainable_rows=[3])
        >>> audit = FrozenRowAudit(table, "words")
        >>> audit.check()
        >>> table.weight.data[1] += 1
        >>> audit.changed()
        tensor([1])
    """

    def __init__(self, table: PartialTable, name: str = "table") -> None:
        if not isinstance(table, PartialTable):
            raise InputError(
                "frozen rows are watched in a partly trainable table. Received a "
                f"{type(table).__name__}. Pass the table itself, such as model.embedding."
            )
        self.table = table
        self.name = name
        self.restart()

    def restart(self) -> None:
        """Watch the rows that are frozen now, as they are now."""
        self._rows: RowSet = self.table.row_set
        self._shard = shard_of(self.table.leaf_weight)
        frozen = (~self._rows.mask).nonzero().flatten()
        self.num_frozen = len(frozen)
        self.frozen: Tensor = frozen[self._shard.has(frozen)]
        self._dtype = self.table.leaf_weight.dtype
        self._prints = self._fingerprints(self.frozen)

    def _fingerprints(self, ids: Tensor) -> Tensor:
        return fingerprints(local(self.table.leaf_weight), ids - self._shard.start)

    def changed(self) -> Tensor:
        """The watched rows that are not what they were, int64, shape (n,).

        A watched row that was unfrozen since is not watched any more.
        """
        if self.table.leaf_weight.dtype != self._dtype:
            return self.frozen
        # Lightning moves the model to the CPU when training ends.
        frozen = self.frozen.to(self.table.leaf_weight.device)
        there = frozen < self.table.leaf_weight.shape[0]  # all, but for a smaller vocabulary
        watched = frozen[there]
        now = self._fingerprints(watched)
        changed = watched[now != self._prints.to(now.device)[there]]
        if self.table.row_set is not self._rows:
            changed = changed[~self.table.row_set.is_trainable(changed)]
        return torch.cat([changed, frozen[~there]])

    def check(self, step: int | None = None) -> None:
        """Raise when a frozen row moved.

        All processes that share a table call it together, and all of them raise.

        Args:
            step: The optimizer step, for the message.

        Raises:
            FrozenRowsMoved: At least one bit of a watched row is not what it was.
        """
        every = gathered(self.changed().cpu(), self.table.leaf_weight)
        changed = torch.cat(every).sort().values.tolist()
        if changed:
            raise FrozenRowsMoved(moved_text(self.name, changed, step, self._suspect()), changed)

    def _suspect(self) -> str:
        if self.table.leaf_weight.dtype != self._dtype:
            return f"a cast of the model from {self._dtype} to {self.table.leaf_weight.dtype}"
        if len(self.frozen) and self.frozen[-1] >= self.table.leaf_weight.shape[0]:
            return "a vocabulary that was made smaller; call restart() after that"
        return (
            "an optimizer with masked_gradient_only, or a write into the weight from outside (a "
            "callback that averages or swaps weights, load_state_dict, code of your own)"
        )
