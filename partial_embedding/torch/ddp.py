"""Tables among several processes: their gradients are averaged at the cost of their rows.

`DistributedDataParallel` reduces a dense gradient as one block of V×D, and a sparse one only where
the backend can, which NCCL cannot. Tables that it is told to ignore are averaged here instead.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn.parallel import DistributedDataParallel

from partial_embedding.errors import InputError
from partial_embedding.torch.head import PartialLinear
from partial_embedding.torch.rowcopy import distinct, sum_rows
from partial_embedding.torch.rowset import RowSet
from partial_embedding.torch.table import PartialTable, tables_in

# Where `DistributedDataParallel` keeps what it ignores: in the module, and in each parameter.
_NAMES, _MARK = "_ddp_params_and_buffers_to_ignore", "_ddp_ignored"
_NONE, _SPARSE, _DENSE = 0, 1, 2


def ignore_in_ddp(
    model: nn.Module, tables: Iterable[PartialTable] | None = None, ignore: bool = True
) -> None:
    """Make `DistributedDataParallel` leave tables of a model to `rowwise` and `average_gradients`.

    Call it in every process before the model is wrapped. `rowwise` then gives all processes the
    rows of the first one, and `average_gradients` the same gradients. A model of which nothing but
    tables trains needs no wrapping. The Lightning callback does all of it by itself.

    Args:
        model: The module that will be wrapped.
        tables: The tables to ignore; by default, all of the model's.
        ignore: False takes it back, for when the model is wrapped again.

    Example:
        >>> from partial_embedding.torch import PartialEmbedding
        >>> model = nn.Sequential(PartialEmbedding(10, 4, trainable_rows=[2]), nn.Linear(4, 2))
        >>> ignore_in_ddp(model)
        >>> is_ignored(model[0].weight), is_ignored(model[1].weight)
        (True, False)
    """
    if not ignore and not hasattr(model, _NAMES):
        return
    chosen = [table for _, table in tables_in(model)] if tables is None else tables
    weights = {id(table.weight) for table in chosen}
    # A tied weight has a name in each module.
    named = dict(model.named_parameters(remove_duplicate=False))
    own = {name: weight for name, weight in named.items() if id(weight) in weights}
    names = [name for name in getattr(model, _NAMES, ()) if name not in own]
    if ignore:
        names += own
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, names)
    if not ignore:
        for weight in own.values():
            vars(weight).pop(_MARK, None)


class IgnoredWhenWrapped:
    """The names that `DistributedDataParallel` ignores, chosen at the time when it asks.

    Lightning wraps a module after the hooks in which users build it and freeze parts of it.

    Args:
        model: The module that will be wrapped.
        choose: Gives the tables to ignore.
    """

    def __init__(self, model: nn.Module, choose: Callable[[], list[PartialTable]]) -> None:
        self.model = model
        self.choose = choose
        self.others: Iterable[str] = getattr(model, _NAMES, ())
        setattr(model, _NAMES, self)

    def __iter__(self) -> Iterator[str]:
        setattr(self.model, _NAMES, list(self.others))
        tables = self.choose()
        own = {id(table.weight) for table in tables}
        for parameter in self.model.parameters():
            if parameter.requires_grad and id(parameter) not in own and not is_ignored(parameter):
                break
        else:
            tables = []  # DDP refuses a module of which nothing is left to it
        ignore_in_ddp(self.model, tables)
        return iter(getattr(self.model, _NAMES))


def is_ignored(weight: nn.Parameter) -> bool:
    """Whether `DistributedDataParallel` leaves a parameter alone.

    Args:
        weight: Any parameter.
    """
    return bool(getattr(weight, _MARK, False))


def is_among_others() -> bool:
    """Whether several processes train together."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def check_backend(tables: Mapping[str, PartialTable]) -> None:
    """Refuse a process group in which DDP cannot reduce the gradients of tables.

    Args:
        tables: Tables by name; of those that are tied, one.

    Raises:
        InputError: A table that is not ignored is sparse and the group is NCCL's, or it is a head
            that is tied to no embedding.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return
    for name, table in tables.items():
        if not getattr(table, "sparse", False) or is_ignored(table.weight):
            continue
        if dist.get_backend() == "nccl":
            raise InputError(
                "NCCL cannot reduce sparse gradients. Received the sparse table "
                f"{name!r}. Make it with sparse=False."
            )
        if isinstance(table, PartialLinear):
            raise InputError(
                "DistributedDataParallel takes sparse gradients of embeddings alone. Received "
                f"the sparse head {name!r}, which is tied to none. Make it with sparse=False."
            )


@torch.no_grad()
def begin_alike(weight: nn.Parameter) -> None:
    """Give all processes the rows of the first one, as `DistributedDataParallel` does.

    Args:
        weight: A table, shape (V, …); nothing is done for one that is not ignored.
    """
    if is_ignored(weight) and is_among_others():
        dist.broadcast(weight.detach(), 0)


@torch.no_grad()
def average_gradient(name: str, weight: nn.Parameter, rows: RowSet) -> None:
    """Replace the gradient of a table by its mean over all processes, which all call this.

    Dense gradients cost K×D numbers, whatever V; where all are sparse, only rows that some process
    touched are exchanged. A process without a gradient counts as zero, unless none has one. As DDP
    does, each process divides before the sum, so that half precision does not overflow.

    Args:
        name: The table's name, for messages.
        weight: The table, shape (V, …).
        rows: The rows that train, the same in all processes.

    Raises:
        InputError: Processes train different rows; all raise the same.
    """
    grad, size = weight.grad, dist.get_world_size()
    touched, values = _own_rows(weight, grad, rows)
    kinds, counts = _tell_each_other(name, weight, rows, _kind(grad), len(touched))
    if max(kinds) == _DENSE:
        mean = _reduced(_by_slot(weight, grad, rows).div_(size))
        if _kind(grad) != _DENSE:
            weight.grad = torch.zeros_like(weight)
        weight.grad.index_copy_(0, rows.order, mean)  # type: ignore[union-attr]
    elif max(kinds) == _SPARSE:
        slots, mean = _mean_of_touched(touched, values.div_(size), counts, len(rows))
        ids = rows.order.index_select(0, slots).unsqueeze(0)
        weight.grad = torch.sparse_coo_tensor(ids, mean, weight.shape, check_invariants=False)


def _kind(grad: Tensor | None) -> int:
    if grad is None:
        return _NONE
    return _SPARSE if grad.layout == torch.sparse_coo else _DENSE


def _own_rows(weight: nn.Parameter, grad: Tensor | None, rows: RowSet) -> tuple[Tensor, Tensor]:
    """The slots that a sparse gradient has entries for, rising, and the sum of each."""
    if grad is None or grad.layout != torch.sparse_coo:
        return rows.order[:0], weight.new_zeros(0, *weight.shape[1:])
    slots = rows.slots.index_select(0, grad._indices()[0]).long()
    touched, places = distinct(slots, len(rows) + 1)
    summed = sum_rows(places, grad._values(), len(touched))
    # The last slot is that of frozen rows.
    number = int(torch.searchsorted(touched, len(rows)))
    return touched[:number], summed[:number]


def _by_slot(weight: nn.Parameter, grad: Tensor | None, rows: RowSet) -> Tensor:
    """A gradient of the trainable rows, in memory of its own, shape (K, …)."""
    if grad is None:
        return weight.new_zeros(len(rows), *weight.shape[1:])
    if grad.layout == torch.sparse_coo:
        slots = rows.slots.index_select(0, grad._indices()[0])
        return sum_rows(slots, grad._values(), len(rows) + 1)[: len(rows)]
    return grad.index_select(0, rows.order)


def _tell_each_other(
    name: str, weight: nn.Parameter, rows: RowSet, kind: int, count: int
) -> tuple[list[int], list[int]]:
    own = torch.tensor([kind, count, rows.fingerprint], device=weight.device)
    everyone = [torch.empty_like(own) for _ in range(dist.get_world_size())]
    dist.all_gather(everyone, own)
    kinds, counts, fingerprints = torch.stack(everyone).t().tolist()
    for rank, fingerprint in enumerate(fingerprints):
        if fingerprint != fingerprints[0]:
            raise InputError(
                f"all processes train the same rows of {name!r}, which joined at the same times. "
                f"Received others in process {rank} than in process 0. Set the same rows in each."
            )
    return kinds, counts


def _mean_of_touched(
    touched: Tensor, values: Tensor, counts: list[int], height: int
) -> tuple[Tensor, Tensor]:
    """The slots that any process touched, rising, and the sums of their values."""
    everyone = _gathered(touched.int(), counts)
    union, places = distinct(torch.cat(everyone).long(), height)
    total = values.new_zeros(len(union), *values.shape[1:])
    # A ring that gathers sends about N times the most rows of one process, one that reduces twice
    # the union, which is less where many processes touch the same rows.
    if len(counts) * max(counts) <= 2 * len(union):
        total.index_add_(0, places, torch.cat(_gathered(values, counts)))
    else:
        total.index_copy_(0, places.split(counts)[dist.get_rank()], values)
        _reduced(total)
    return union, total


def _gathered(own: Tensor, counts: list[int]) -> list[Tensor]:
    """The rows that each process gives, of which there are so many."""
    padded = own.new_zeros(max(counts), *own.shape[1:])
    padded[: len(own)] = own
    everyone = [torch.empty_like(padded) for _ in counts]
    if max(counts):
        dist.all_gather(everyone, padded)
    return [theirs[:count] for theirs, count in zip(everyone, counts, strict=True)]


def _reduced(values: Tensor) -> Tensor:
    """The sums over all processes, in the same memory."""
    if len(values):
        dist.all_reduce(values)
    return values
