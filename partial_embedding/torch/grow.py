"""Tables that grow: new items, users and words get rows, and all else stays what it was."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from partial_embedding.errors import InputError, check_flags
from partial_embedding.rows.kinds import check_added
from partial_embedding.torch.replace import find_table, users_of
from partial_embedding.torch.table import PartialTable

Init = Literal["mean"] | Tensor | Callable[[Tensor], Any]
Name = str | nn.Module


def grow_table(
    model: nn.Module,
    name: Name | Sequence[Name] | None,
    rows: int,
    init: Init = "mean",
    *,
    trainable: bool = True,
) -> list[int]:
    """Give a table more rows at its end, for items, users or words that are new.

    All modules that are tied to the table grow with it, and a head's bias with the head. Old rows
    keep their values, go on training or not as they did, and keep their optimizer state in
    optimizers that hold the table. The new rows begin as a cohort of their own. From here on
    `"new"` names them wherever rows are named, in schedules too, and checkpoints from before the
    table grew can still be loaded, into its old rows.

    Call it between the step of an optimizer and the next backward pass, and before a model is
    wrapped for several processes: gradients that are there are let go. A table that was opened with
    `open_vectors` is copied into memory.

    Args:
        model: The model.
        name: The table, named as for `replace_embedding`; or several of one vocabulary that are not
            tied, such as an embedding and a head: `["items", "scores"]`.
        rows: How many rows it gets, from 1 up.
        init: What they begin from: `"mean"`, the mean of the rows that are there; vectors of shape
            (rows, D); or a function that fills such a tensor, as those of `torch.nn.init` do. Where
            several tables are named, vectors are those of the first, and others begin from their
            mean; so do biases.
        trainable: Train the new rows from here on. Otherwise they stay as they begin, until
            `unfreeze_rows` or a schedule trains them.

    Returns:
        The ids of the new rows.

    Raises:
        InputError: A table is not partly trainable, belongs to a model of `transformers`, or is not
            of the same size as another; or the vectors do not fit. The model is then as it was.

    Example:
        >>> from partial_embedding.torch import PartialEmbedding
        >>> model = nn.Sequential(PartialEmbedding(10, 4, trainable_rows="none"))
        >>> grow_table(model, "0", rows=2)
        [10, 11]
        >>> model
        Sequential(
          (0): PartialEmbedding(12, 4, sparse=True, trainable_rows=2)
        )
        >>> model[0].set_trainable_rows("new")
        >>> model[0].trainable_rows
        tensor([10, 11])
    """
    tables = _tables(model, name)
    rows = check_added(rows)
    check_flags(trainable=trainable)
    made = _made(model, tables, rows, init)
    size = len(tables[0].leaf_weight)
    new = np.arange(size, size + rows, dtype=np.int64)
    trained = [table.row_set for table in tables]
    for parameter, values in made:
        replace_rows(parameter, values)
    for table, row_set in zip(tables, trained, strict=True):
        note_height(model, table)
        table.note_growth(size, new)
        table.row_set = row_set.resized_to(size + rows)
        if trainable:
            table.set_trainable_ids(np.append(row_set.ids.cpu().numpy(), new))
    return new.tolist()


def replace_rows(parameter: nn.Parameter, rows: Tensor) -> None:
    """Give a parameter other values, of which there may be more or fewer rows.

    It stays the same object, so that optimizers and ties go on holding it. Its gradient, which is
    of the old shape, is let go.
    """
    # As long as an earlier graph lives, torch keeps what accumulates the gradient, and with it the
    # old shape. It makes another one where the dtype changes.
    other = torch.float32 if parameter.dtype == torch.float64 else torch.float64
    parameter.data = parameter.data.new_empty(0, dtype=other)
    parameter.data = rows
    parameter.grad = None


def note_height(model: nn.Module, table: Any) -> None:
    """Let all modules that have a table's weight know how many rows it has now."""
    for _, user in users_of(model, table):
        for attribute in ("num_embeddings", "out_features"):
            if hasattr(user, attribute):
                setattr(user, attribute, len(table.weight))


def mean_row(rows: Tensor) -> Tensor:
    """The mean of rows, shape (1, …), in their dtype."""
    return rows.float().mean(0, keepdim=True).to(rows)


def _tables(model: nn.Module, name: Name | Sequence[Name] | None) -> list[PartialTable]:
    if hasattr(model, "resize_token_embeddings"):
        raise InputError(
            "a language model grows by the tokens of its tokenizer. Received a "
            f"{type(model).__name__}. Call add_tokens."
        )
    names = [name] if name is None or isinstance(name, str | nn.Module) else list(name)
    tables: list[Any] = []
    for one in names:
        table = find_table(model, one)
        if not isinstance(table, PartialTable):
            raise InputError(
                f"a table that grows is partly trainable. Received a {type(table).__name__}. Call "
                f"replace_embedding(model, {one!r}) first."
            )
        tables.append(table)
    sizes = [len(table.weight) for table in tables]
    if len(set(sizes)) != 1:
        raise InputError(
            f"tables of one vocabulary have as many rows. Received {names!r} with {sizes}. Let "
            "each grow by itself."
        )
    for table in tables:
        for path, user in users_of(model, table):
            if not isinstance(user, PartialTable) and getattr(user, "bias", None) is not None:
                raise InputError(
                    f"a bias grows with its head. Received {path!r}, a {type(user).__name__} that "
                    f"is tied to a table. Call replace_embedding(model, {path!r}) first."
                )
    return tables


def _made(
    model: nn.Module, tables: list[PartialTable], rows: int, init: Init
) -> list[tuple[nn.Parameter, Tensor]]:
    """The parameters that grow, each once, and what they will be."""
    made: dict[int, tuple[nn.Parameter, Tensor]] = {}
    for table in tables:
        for _, user in users_of(model, table):
            for attribute in user.row_parameters if isinstance(user, PartialTable) else ():
                parameter = getattr(user, attribute)
                if parameter is None or id(parameter) in made:
                    continue
                first = parameter is tables[0].weight
                begun = _begun(parameter.detach(), rows, init if first else "mean")
                made[id(parameter)] = parameter, torch.cat([parameter.detach(), begun])
    return list(made.values())


def _begun(before: Tensor, rows: int, init: Init) -> Tensor:
    shape = (rows, *before.shape[1:])
    if isinstance(init, Tensor):
        if tuple(init.shape) != shape:
            raise InputError(
                f"init has a vector for each new row, {shape}. Received: {tuple(init.shape)}. "
                "Give it that shape."
            )
        return init.detach().to(before)
    if callable(init):
        begun = before.new_empty(shape)
        with torch.no_grad():
            init(begun)
        return begun
    if init != "mean":
        raise InputError(
            "init is 'mean', vectors, or a function that fills them, such as "
            f"torch.nn.init.normal_. Received: {init!r}. Take one of these."
        )
    return mean_row(before).expand(shape)
