"""Make a torch optimizer step the trainable rows of tables, and nothing else of them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, TypeVar

from torch import nn
from torch._compile import _disable_dynamo
from torch.optim import SGD, Optimizer, SparseAdam
from torch.optim.optimizer import register_optimizer_step_pre_hook

from partial_embedding.errors import InputError, check_flags
from partial_embedding.torch.dry_run import is_dry_run
from partial_embedding.torch.hooks import is_any_hook
from partial_embedding.torch.inspection import KEY
from partial_embedding.torch.row_average import average
from partial_embedding.torch.row_gradient import RowGradient
from partial_embedding.torch.row_optimizer import (
    Arguments,
    Rowwise,
    held_tables,
    with_gradients,
)
from partial_embedding.torch.saving import begin_afresh
from partial_embedding.torch.shards import is_sharded, local, replicate_gradients, sharded_like
from partial_embedding.torch.table import row_parameters_in
from partial_embedding.torch.unheld import refuse_unheld

OptimizerT = TypeVar("OptimizerT", bound=Optimizer)

# Wrappers whose step is that of the optimizer inside, and where they keep it.
_SEEN_THROUGH = {
    "AcceleratedOptimizer": "optimizer",
    "_FabricOptimizer": "_optimizer",
    "LightningOptimizer": "_optimizer",
}


def rowwise(
    optimizer: OptimizerT, model: nn.Module | None = None, lazy: bool = False
) -> OptimizerT:
    """Make an optimizer step only the trainable rows of its tables.

    Any optimizer is made so the first time that it steps a table with frozen rows; this is for
    `lazy`, and for learning early whether it can be. The optimizer's own maths then sees, in the
    place of a table, compact parameters, one for each cohort of rows, and the rows are written back
    after it. Frozen rows are thus out of reach of weight decay, momentum and everything else,
    trainable ones move as parameters of their own, and time and memory follow their number.

    Args:
        optimizer: Any `torch.optim.Optimizer` whose state is per row or shared by all rows, wrapped
            by Accelerate, Fabric or Lightning or not.
        model: The module whose tables the optimizer holds, for their names in messages.
        lazy: Step only the rows that the batch touched, as `torch.optim.SparseAdam` does; the step
            count is shared by the cohort. For optimizers that move each row by itself.

    Returns:
        The same optimizer. A deep copy of it is a plain one: torch copies no hooks.

    Raises:
        InputError: The optimizer cannot be served exactly, is prepared already, or holds no table;
            or the weight of a table does not require gradients while rows are to train.

    Example:
        >>> import torch
        >>> from partial_embedding.torch import PartialEmbedding
        >>> table = PartialEmbedding(10, 4, trainable_rows=[7, 2])
        >>> before = table.weight.detach().clone()
        >>> optimizer = rowwise(torch.optim.AdamW(table.parameters(), weight_decay=0.1))
        >>> table(torch.tensor([1, 2])).sum().backward()
        >>> optimizer.step()
        >>> (table.weight != before).any(dim=1).nonzero().flatten()
        tensor([2, 7])
    """
    if prepared(optimizer) is not None:
        raise InputError(
            "an optimizer is prepared once. Received one that is: rowwise was called, or it has "
            "stepped. Call detach_rowwise first."
        )
    check_flags(lazy=lazy)
    named = {} if model is None else {id(p): name for name, _, p in row_parameters_in(model)}
    Rowwise(_inside(optimizer), lazy, named)
    return optimizer


def masked_gradient_only(optimizer: OptimizerT) -> OptimizerT:
    """Let an optimizer step tables with frozen rows as if they were plain ones.

    A way out for optimizers that cannot be served. All that is kept is that frozen rows have no
    gradient. What is given up: weight decay, momentum and the like still move them, rows that join
    late begin with the step count and averages of the whole table, and time and memory follow V.

    Args:
        optimizer: An optimizer that was not prepared.

    Returns:
        The same optimizer.

    Raises:
        InputError: It was prepared.

    Example:
        >>> import torch
        >>> from partial_embedding.torch import PartialEmbedding
        >>> table = PartialEmbedding(10, 4, trainable_rows=[2])
        >>> sgd = masked_gradient_only(torch.optim.SGD(table.parameters(), weight_decay=0.1))
        >>> before = table.weight.detach().clone()
        >>> table(torch.tensor([1, 2])).sum().backward()
        >>> sgd.step()
        >>> bool((table.weight != before).any(dim=1).all())
        True
    """
    if prepared(optimizer) is not None:
        raise InputError(
            "a masked gradient alone is for an optimizer that was not prepared. Received one that "
            "keeps frozen rows exact. Call detach_rowwise first."
        )
    vars(_inside(optimizer))["_masked_gradient_only"] = True
    return optimizer


def detach_rowwise(optimizer: Optimizer) -> None:
    """Make an optimizer a plain one again; its state of the tables begins afresh.

    Its next step of a table with frozen rows prepares it again. This is for preparing it in another
    way, and for `masked_gradient_only`.

    Args:
        optimizer: An optimizer that was prepared.

    Raises:
        InputError: It was not prepared.

    Example:
        >>> import torch
        >>> from partial_embedding.torch import PartialEmbedding
        >>> table = PartialEmbedding(10, 4, trainable_rows=[7])
        >>> optimizer = rowwise(torch.optim.AdamW(table.parameters()))
        >>> detach_rowwise(optimizer)
        >>> optimizer = rowwise(optimizer, lazy=True)
    """
    handle = prepared(optimizer)
    if handle is None:
        raise InputError(
            f"only an optimizer that was prepared can be detached. Received a plain "
            f"{type(optimizer).__name__}. Leave out the call."
        )
    handle.detach()


def average_gradients(optimizer: Optimizer) -> None:
    """Average the gradients of tables that `keep_whole` left out of an engine.

    Call it in every process after each backward pass that a step follows, before gradients are
    unscaled or clipped and before other rows are set. The Lightning callback does so by itself.
    Beside `DistributedDataParallel` it is done by itself, but where backward is called within the
    module that is wrapped, as in Lightning's manual optimization.

    Args:
        optimizer: An optimizer that holds tables.

    Raises:
        InputError: Processes train different rows.

    Example:
        >>> import torch
        >>> from partial_embedding.torch import PartialEmbedding
        >>> table = PartialEmbedding(10, 4, trainable_rows=[7])
        >>> optimizer = torch.optim.AdamW(table.parameters())
        >>> table(torch.tensor([7])).sum().backward()
        >>> average_gradients(optimizer)  # one process alone has nothing to average
        >>> optimizer.step()
    """
    handle = prepared(optimizer)
    states = {} if handle is None else handle.tables
    names = {key: state.name for key, state in states.items()}
    optimizer = _inside(optimizer)
    tables = [(parameter, table) for _, parameter, table in held_tables(optimizer)]
    average(tables, names)
    others = (parameter for group in optimizer.param_groups for parameter in group["params"])
    replicate_gradients((parameter for parameter, _ in tables), others)


def prepared(optimizer: Optimizer) -> Rowwise | None:
    """What keeps the frozen rows of an optimizer's tables exact, or None before it is prepared."""
    return vars(_inside(optimizer)).get("_rowwise")


def is_left_alone(optimizer: Optimizer) -> bool:
    """Whether `masked_gradient_only` was called for an optimizer, wrapped or not."""
    return bool(vars(_inside(optimizer)).get("_masked_gradient_only"))


# The optimizer itself


def _inside(optimizer: Optimizer) -> Optimizer:
    """The optimizer that steps, without wrappers that only pass on."""
    for base in type(optimizer).__mro__:
        if (attribute := _SEEN_THROUGH.get(base.__name__)) is not None:
            return _inside(getattr(optimizer, attribute))
    if not hasattr(optimizer, "param_groups"):
        raise InputError(
            f"an optimizer of torch is meant. Received a {type(optimizer).__name__}. Pass the "
            "optimizer first, and the model after it."
        )
    return optimizer


# Without a call


def _before_any_step(
    optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Arguments | None:
    """Prepare an optimizer that is about to step frozen rows; runs before each step of each."""
    if is_dry_run(optimizer) or not is_any_hook():
        return None
    given: Arguments | None = _prepare(optimizer, args, kwargs)
    return given


@_disable_dynamo  # which sees no table behind a parameter; torch.optim does so too
def _prepare(
    optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Arguments | None:
    refuse_unheld(optimizer)
    if (handle := vars(optimizer).get("_rowwise")) is not None:
        handle.stand_closest()  # its own hook comes after those of others
        return None
    tables = [(parameter, table) for _, parameter, table in held_tables(optimizer)]
    exact = not is_left_alone(optimizer)
    loaded = [p for p, one in optimizer.state.items() if isinstance(one, dict) and KEY in one]
    by_rows = any(table.has_frozen_rows or table.earlier_sizes for _, table in tables)
    if exact and tables and (loaded or by_rows):
        Rowwise(optimizer, False, {}).stand_closest()
        return None
    if loaded:  # state of rows, which says nothing of the plain tables that there are
        begin_afresh(optimizer, set(map(id, loaded)))
    if not tables:
        return None
    parameters = [parameter for parameter, _ in tables]
    return with_gradients(args, kwargs, lambda: _settle_gradients(optimizer, parameters))


def _settle_gradients(optimizer: Optimizer, parameters: Iterable[nn.Parameter]) -> None:
    """Give an optimizer that sees the tables themselves tensors with memory of their own."""
    # One that reads a gradient once, at the cost of its rows, and keeps nothing of it.
    reads_rows = type(optimizer) is SGD and not any(g["momentum"] for g in optimizer.param_groups)
    for parameter in parameters:
        if (grad := parameter.grad) is None:
            continue
        own = local(grad) if is_sharded(grad) else grad
        if isinstance(own, RowGradient) and not reads_rows:
            own = own.to_sparse() if isinstance(optimizer, SparseAdam) else own.to_dense()
        if own is not grad:
            parameter.grad = sharded_like(own, parameter) if is_sharded(parameter) else own


# Once for the process, since nothing else is called for an optimizer that nobody tells us of.
register_optimizer_step_pre_hook(_before_any_step)
