"""The optimizer state of cohorts as tensors of one row for each row that trains, and back.

Their shapes follow from how many rows train, and not from when each of them joined: what loads
into tensors that are there already, as torch.distributed.checkpoint does, finds them alike. Rows of
which processes have some each are put together as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from partial_embedding.errors import InputError
from partial_embedding.schedule import RateScale
from partial_embedding.torch.blocks import Cohort
from partial_embedding.torch.dry_run import State

# What a cohort has under a key: nothing, a tensor by row, or what all of its rows share.
_NOTHING, _ROWS, _TENSOR, _NONE, _FLOAT, _INT, _BOOL = range(7)
_NUMBERS: dict[type, int] = {float: _FLOAT, int: _INT, bool: _BOOL}
_TYPES = {kind: type_ for type_, kind in _NUMBERS.items()}


def by_row(
    cohorts: Mapping[int, Cohort], per_row: frozenset[str], one_row: State, start: int
) -> State:
    """What an optimizer remembers of cohorts.

    Args:
        cohorts: The cohorts by number.
        per_row: The keys of the state whose tensors have a row for each.
        one_row: What the state of one row would be, where some cohort has not stepped.
        start: The row of the table that the cohorts count from.

    Returns:
        Nested dictionaries of tensors of shape (K, …), in the order of cohorts.
    """
    every, sizes = list(cohorts.values()), [len(cohort.ids) for cohort in cohorts.values()]
    ids = torch.cat(
        [torch.empty(0, dtype=torch.int64, device="cpu"), *(c.ids.cpu() for c in every)]
    )
    rates = [(c.rate_scale.lr_scale, c.rate_scale.warmup_steps, c.steps) for c in every]
    by_cohort = torch.tensor(rates, dtype=torch.float64, device="cpu").view(-1, 3)
    numbers = torch.tensor(list(cohorts), dtype=torch.int64, device="cpu")
    return {
        "rows": _as_bytes(ids.add(start)),
        "cohorts": _as_bytes(_repeated(numbers, sizes)),
        "rate_scales": _as_bytes(_repeated(by_cohort, sizes)),
        "state": _columns([cohort.state for cohort in every], sizes, per_row, one_row),
        "group_state": _columns([cohort.group_state for cohort in every], sizes),
    }


def joined(own: State, gather: Callable[[Any], list[Any]], chunk_bytes: int) -> State:
    """What processes have that share a table, in the order of cohorts; they all call this.

    Args:
        own: What `by_row` gave here.
        gather: Gives what each process hands in; they all call it together.
        chunk_bytes: About how much of its rows a process hands in at once.

    Returns:
        Nested dictionaries as those of `by_row`, on the CPU.
    """
    ids, of_row = rows_in(own), _from_bytes(own["cohorts"])
    row_bytes = sum(column.nbytes for column in tree_leaves(own)) // max(1, len(ids))
    height = max(1, chunk_bytes // max(1, row_bytes))
    heads = gather((ids, of_row, _cut(own, slice(0)), height))
    rows, cohorts = (torch.cat([head[i] for head in heads]) for i in (0, 1))
    by_id = rows.argsort(stable=True)
    order = by_id[cohorts[by_id].argsort(stable=True)]
    places = torch.empty_like(order).index_copy_(
        0, order, torch.arange(len(order), device=order.device)
    )
    whole: State = {}
    for _, _, empty, _ in heads:
        # A process that has no row of any cohort may not know what there is of others.
        _make_room(whole, empty, len(order))
    places_of = places.split([len(theirs) for theirs, *_ in heads])
    for number in range(max(-(-len(theirs) // tall) for theirs, _, _, tall in heads)):
        parts = gather(_cut(own, slice(number * height, (number + 1) * height)))
        for part, at, (*_, tall) in zip(parts, places_of, heads, strict=True):
            _put(whole, part, at[number * tall : (number + 1) * tall])
    return whole


def _cut(columns: State, here: slice) -> State:
    # A copy, since what is pickled of a view is all that it is a view of.
    cut: State = tree_map(lambda column: column[here].cpu().clone(), columns)
    return cut


def _make_room(whole: State, like: State, num_rows: int) -> None:
    for key, value in like.items():
        if isinstance(value, Tensor):
            whole.setdefault(key, value.new_zeros(num_rows, *value.shape[1:]))
        else:
            _make_room(whole.setdefault(key, {}), value, num_rows)


def _put(whole: State, part: State, places: Tensor) -> None:
    for key, value in part.items():
        if isinstance(value, Tensor):
            whole[key].index_copy_(0, places, value)
        else:
            _put(whole[key], value, places)


def cohorts_of(entry: State) -> dict[int, Cohort]:
    """The cohorts in what `by_row` gave, cast or moved since, in memory of their own."""
    # What flattens nested dictionaries loses empty ones.
    ids, of_row = rows_in(entry), _from_bytes(entry["cohorts"])
    numbers, sizes = of_row.unique_consecutive(return_counts=True)
    starts = (sizes.cumsum(0) - sizes).tolist()
    cohorts = {}
    for number, first, size in zip(numbers.tolist(), starts, sizes.tolist(), strict=True):
        here = slice(first, first + size)
        rates = _from_bytes(entry["rate_scales"][first : first + 1], torch.float64).tolist()
        cohorts[number] = Cohort(
            ids[here].clone(),
            _values(entry.get("state", {}), here),
            _values(entry.get("group_state", {}), here),
            RateScale(rates[0], int(rates[1])),
            int(rates[2]),
        )
    return cohorts


def rows_in(entry: State) -> Tensor:
    """The rows that were saved, in the order of cohorts, int64, shape (K,)."""
    return _from_bytes(entry["rows"])


def rate_scales_in(entry: State) -> list[RateScale]:
    """The rates that were saved, each once."""
    rates = _from_bytes(entry["rate_scales"], torch.float64).view(-1, 3)[:, :2].unique(dim=0)
    return [RateScale(lr_scale, int(warmup)) for lr_scale, warmup in rates.tolist()]


def _columns(
    states: Sequence[Mapping[str, Any]],
    sizes: list[int],
    per_row: frozenset[str] = frozenset(),
    one_row: Mapping[str, Any] = MappingProxyType({}),
) -> State:
    columns: State = {}
    # The last one has no rows, and only tells what they would be like.
    states, sizes = [*states, one_row], [*sizes, 0]
    for key in dict.fromkeys(key for state in states for key in state):
        kinds = [_kind(key, state.get(key, ...), per_row) for state in states]
        of_cohort = torch.tensor(kinds, dtype=torch.uint8, device="cpu")
        columns[key] = {"kind": _repeated(of_cohort, sizes)}
        parts = [
            _rows(state[key], size, kind) if kind not in (_NOTHING, _NONE) else None
            for state, size, kind in zip(states, sizes, kinds, strict=True)
        ]
        if (like := next((part for part in parts if part is not None), None)) is not None:
            filled = [
                like.new_zeros(size, *like.shape[1:]) if part is None else part
                for part, size in zip(parts, sizes, strict=True)
            ]
            columns[key]["value"] = filled[0] if len(filled) == 2 else torch.cat(filled)
    return columns


def _kind(key: str, value: Any, per_row: frozenset[str]) -> int:
    if value is ...:
        return _NOTHING
    if value is None:
        return _NONE
    if isinstance(value, Tensor):
        return _ROWS if key in per_row else _TENSOR
    if type(value) not in _NUMBERS:
        raise InputError(
            "what an optimizer remembers of rows is saved as tensors and numbers. Received a "
            f"{type(value).__name__} as {key!r}. Take another optimizer, or save without its state."
        )
    return _NUMBERS[type(value)]


def _rows(value: Any, size: int, kind: int) -> Tensor:
    if kind == _ROWS:
        value = value[:size]
    else:
        one = value
        if kind != _TENSOR:
            one = _as_bytes(torch.tensor([value], dtype=torch.float64, device="cpu"))[0]
        value = one.repeat(size, *[1] * one.dim())
    rows: Tensor = value
    return rows


def _values(columns: State, here: slice) -> State:
    kinds = {key: int(column["kind"][here.start]) for key, column in columns.items()}
    return {
        key: _value(columns[key].get("value"), kind, here)
        for key, kind in kinds.items()
        if kind != _NOTHING
    }


def _value(column: Tensor | None, kind: int, here: slice) -> Any:
    if column is None or kind == _NONE:
        return None
    if kind in (_ROWS, _TENSOR):
        return column[here if kind == _ROWS else here.start].clone()
    return _TYPES[kind](_from_bytes(column[here.start : here.start + 1], torch.float64).item())


def _repeated(values: Tensor, sizes: list[int]) -> Tensor:
    # Of no sizes, where no row trains, torch would make floating-point numbers.
    counts = torch.tensor(sizes, dtype=torch.int64, device=values.device)
    return values.repeat_interleave(counts, dim=0)


def _as_bytes(numbers: Tensor) -> Tensor:
    # An optimizer that is not prepared yet casts all that it loads to the dtype of the weight, in
    # which 257 may be 256. Each dtype has the numbers of a byte.
    rows = numbers if numbers.dim() > 1 else numbers.unsqueeze(-1)
    return rows.contiguous().view(torch.uint8)


def _from_bytes(numbers: Tensor, dtype: torch.dtype = torch.int64) -> Tensor:
    return numbers.to("cpu", torch.uint8).contiguous().view(dtype).flatten()
