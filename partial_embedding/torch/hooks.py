"""What lies on a table's parameters, and so goes with them wherever an optimizer or a tool does."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.jit import is_tracing  # type: ignore[attr-defined]

from partial_embedding.errors import InputError
from partial_embedding.torch.engines import frozen_under_zero, is_zero
from partial_embedding.torch.row_gradient import RowGradient, sparse_entries
from partial_embedding.torch.shards import (
    Shard,
    as_placed,
    is_sharded,
    local,
    shard_of,
    sharded_like,
)
from partial_embedding.torch.trainable_rows import TrainableRows

_living: weakref.WeakSet[RowHook] = weakref.WeakSet()


class RowHook:
    """Keeps frozen rows out of the gradient of one parameter, and sparse gradients from view."""

    # The module puts one on what other processes get; torch would warn of each that is left here.
    __torch_unserializable__ = True

    def __init__(self, table: TrainableRows, parameter: nn.Parameter) -> None:
        # Weak, since the parameter may outlive the module, and must not keep it alive. The table is
        # asked for the parameter: torch swaps the insides of no tensor that has a weak reference.
        self._table = weakref.ref(table)
        self.rows = table._shared
        self._parameter_id = id(parameter)
        # A tensor takes a hook only while it requires gradients, and keeps it when it does not.
        requires_grad = parameter.requires_grad
        parameter.requires_grad_(True)
        self._handles = (
            parameter.register_hook(self),
            # A hook may not make a dense gradient of a sparse one, so this comes after it.
            parameter.register_post_accumulate_grad_hook(self._hold_rows),
        )
        parameter.requires_grad_(requires_grad)
        _living.add(self)

    @property
    def table(self) -> TrainableRows | None:
        """The table, as long as it lives and this is its parameter."""
        table = self._table()
        return table if table is not None and self._parameter_of(table) is not None else None

    def _parameter_of(self, table: TrainableRows) -> nn.Parameter | None:
        for parameter in table.hookable_parameters():
            if id(parameter) == self._parameter_id:
                return parameter
        return None

    def is_of(self, table: TrainableRows) -> bool:
        """Whether it is this table's."""
        return self._table() is table

    def remove(self) -> None:
        """Take the hook off its parameter."""
        for handle in self._handles:
            handle.remove()

    def __call__(self, grad: Tensor | None) -> Tensor | None:
        """A gradient in which frozen rows are zero, or absent if it is sparse."""
        table = self._table()
        if grad is None or table is None:
            return grad  # autograd may hand a hook None
        parameter = self._parameter_of(table)
        if parameter is None and not table.is_sharded:
            return grad  # another model's, which was the table's for one call
        table.__dict__["awaits_average"] = True  # past nn.Module, which looks for parameters
        if parameter is not None and is_zero(parameter) and table.has_frozen_rows:
            raise frozen_under_zero(parameter, table)
        if is_sharded(grad):
            return _zero_in_shard(grad, parameter, table)
        held = None if parameter is None else parameter.grad
        if parameter is not None and held is not None and is_sharded(held):
            # Backward adds to it, and it was made a `DTensor` for a norm.
            parameter.grad = held = local(held)
        if isinstance(grad, RowGradient) and (entries := grad.entries()) is not None:
            for one in entries if grad.is_cuda else ():
                # Autograd tells the allocator of a tensor's own memory where streams differ.
                one.record_stream(torch.cuda.current_stream(grad.device))
            return grad  # by way of `by_rows`, which left out the frozen ones
        if grad.layout == torch.sparse_coo:
            if table.is_left_to_ddp and parameter is not None and isinstance(held, RowGradient):
                parameter.grad = held.to_sparse()  # its own, which it adds to
            return _sparse_without_frozen(grad, table)
        # One that a second derivative needs is dense, whatever it came from.
        if not grad.requires_grad:
            table.take_dense(grad)
        return _zero_where_frozen(grad, table)

    def _hold_rows(self, parameter: Tensor) -> None:
        grad, table = parameter.grad, self._table()
        if grad is None or grad.layout != torch.sparse_coo:
            return
        if table is not None and table.is_left_to_ddp:
            # It is called next, and takes sparse gradients as such. What it puts in their place
            # it puts there when backward ends, in a call that is queued after this one.
            after_backward(lambda: after_backward(lambda: _hold_rows_of(parameter)))
        else:
            _hold_rows_of(parameter)


def is_any_hook() -> bool:
    """Whether there is any table in the process."""
    return len(_living) > 0


def hooks_on(parameter: Tensor) -> list[RowHook]:
    """The hooks of tables on a parameter; tied tables have one each."""
    hooks = parameter._backward_hooks
    return [hook for hook in hooks.values() if isinstance(hook, RowHook)] if hooks else []


def refuse_orphan(parameter: Tensor) -> None:
    """Refuse a weight with frozen rows whose table is gone, so that nothing keeps them."""
    hooks = hooks_on(parameter)
    has_frozen = any(hook.rows.has_frozen for hook in hooks)
    has_table = any(hook.table is not None for hook in hooks)
    if has_frozen and not has_table and any(hook._table() is None for hook in hooks):
        raise InputError(
            "rows of a weight are frozen for as long as its table is there. Received a weight of "
            f"the shape {tuple(parameter.shape)} whose table is gone, as where a graph was made of "
            "a model (torch.fx, jit.trace, torch.export) that nothing refers to any more. Keep the "
            "model; or, for all rows to train, make the graph after restore_embedding(model)."
        )


def _without_frozen(ids: Tensor, values: Tensor, table: TrainableRows) -> tuple[Tensor, Tensor]:
    if table._row_set is not None:
        rows = table.row_set.to(ids.device)
        if len(rows) == rows.num_rows:
            return ids, values
        keep = rows.mask.index_select(0, ids)
    elif table.padding_row is not None:
        keep = ids != table.padding_row
    else:
        return ids, values
    kept = keep.nonzero().view(-1)
    if kept.shape == ids.shape:
        return ids, values
    return ids.index_select(0, kept), values.index_select(0, kept)


def _sparse_without_frozen(grad: Tensor, table: TrainableRows) -> Tensor:
    if grad.requires_grad:
        grad = grad.coalesce()  # only then do its values take part in a second derivative
        ids, values = grad.indices()[0], grad.values()
    else:
        ids, values = sparse_entries(grad)
    kept, left = _without_frozen(ids, values, table)
    if kept is ids:
        return grad
    return torch.sparse_coo_tensor(kept.unsqueeze(0), left, grad.shape, check_invariants=False)


def _zero_where_frozen(grad: Tensor, table: TrainableRows, shard: Shard | None = None) -> Tensor:
    # Selected, not multiplied: inf * 0 is NaN.
    if table.has_frozen_rows:
        mask = table.row_set.to(grad.device).mask
        if shard is not None:
            mask = mask[shard.start : shard.stop]
        return torch.where(mask.view(-1, *[1] * (grad.dim() - 1)), grad, grad.new_zeros(()))
    if (padding := table.padding_row) is None:
        return grad
    # A lookup gives it no gradient; a head that is tied, or another use of the weight, does.
    ids = torch.tensor([padding], device=grad.device)
    return grad.index_fill(0, ids if shard is None else shard.own(ids), 0)


def _zero_in_shard(grad: Tensor, parameter: nn.Parameter | None, table: TrainableRows) -> Tensor:
    if parameter is None or not (table.has_frozen_rows or table.padding_row is not None):
        return grad
    if isinstance(local(grad), RowGradient):
        return grad  # of rows that are split, which are asked for those that train
    grad = as_placed(grad, parameter)
    return sharded_like(_zero_where_frozen(local(grad), table, shard_of(parameter)), grad)


def after_backward(call: Callable[[], None]) -> None:
    """Do something when the backward pass ends that runs now."""
    torch.autograd.Variable._execution_engine.queue_callback(call)


def _hold_rows_of(parameter: Tensor) -> None:
    grad = parameter.grad
    if grad is None or grad.layout != torch.sparse_coo:
        return
    if grad.requires_grad:
        # Its rows cannot be read without losing what a second derivative needs.
        parameter.grad = grad.to_dense()
        return
    parameter.grad = RowGradient(*sparse_entries(grad), len(grad), grad.is_coalesced())


# A sparse gradient on its way to the weight


def by_rows(weight: Tensor, table: TrainableRows) -> Tensor:
    """The weight to look rows up in, whose sparse gradient arrives as a `RowGradient`.

    A hook on the weight may not put a dense gradient in the place of a sparse one, so that
    `torch.autograd.grad` would give what hardly any code for gradients takes.
    """
    if not goes_by_rows(weight, table):
        return weight
    # Kept, since to apply a function takes half as long as a small lookup.
    through: Tensor
    passed, through = vars(table).get("_passage", (None, weight))
    if passed is not weight or not through.is_set_to(weight):
        del through
        close_passage(table)  # before: what is left of it would hold on to the weight's old shape
        through = _ByRows.apply(weight, weakref.ref(table))  # type: ignore[no-untyped-call]
        vars(table)["_passage"] = weight, through
    return through


def goes_by_rows(weight: Tensor, table: TrainableRows) -> bool:
    """Whether `by_rows` gives another way to a weight."""
    if torch.compiler.is_compiling() or is_rewritten(weight):
        return False
    learns = weight.requires_grad and torch.is_grad_enabled()
    return learns and not table.is_left_to_ddp


def close_passage(table: TrainableRows) -> None:
    """Forget the way to a weight that a table may no longer have."""
    vars(table).pop("_passage", None)


def is_rewritten(*tensors: Tensor) -> bool:
    """Whether something reads the graph or transforms it, and knows torch's functions alone."""
    for tensor in tensors:
        if isinstance(tensor, torch.fx.Proxy):
            return True
    return (
        is_tracing()
        or torch.compiler.is_exporting()
        or torch._C._are_functorch_transforms_active()
        or torch.autograd.forward_ad._current_level >= 0
    )


class _ByRows(torch.autograd.Function):
    """The weight as it is; on the way back, rows in the place of a sparse tensor."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, table: weakref.ref[TrainableRows]) -> Tensor:
        ctx.table = table
        return weight.detach()  # no view, which could not be used again once the weight has moved

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (grad,) = grads
        table = ctx.table()
        if grad.layout != torch.sparse_coo or grad.requires_grad:
            # Rows cannot be read without losing a second derivative.
            dense = grad if grad.layout == torch.strided else grad.to_dense()
            return dense if table is None else _zero_where_frozen(dense, table), None
        ids, values = sparse_entries(grad)
        if table is not None:
            ids, values = _without_frozen(ids, values, table)
        return RowGradient(ids, values, grad.shape[0], grad.is_coalesced()), None
