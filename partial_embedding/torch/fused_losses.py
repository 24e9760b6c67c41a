"""Losses of TRL that multiply by a head's weight themselves, without a gradient of all its rows.

TRL's trainers score features and take a loss of the scores in one function, tile by tile, and call
no head. Backward treats each row of the weight by itself, given what forward found for each token
over all rows. So it is called twice: with the whole weight, for the gradient of the features alone;
and with the trainable rows in the weight's place, for theirs.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from partial_embedding.torch.row_gradient import RowGradient
from partial_embedding.torch.rowset import RowSet
from partial_embedding.torch.table import PartialTable, tables_of
from partial_embedding.torch.trainable_rows import used_frozen

Backward = Callable[..., tuple[Tensor | None, ...]]

# By module and name, the arguments that a function saves first, for its backward pass. The first
# three are the features, the weight and the bias that gradients are for.
_FUNCTIONS = {
    ("trl.kernels.chunked_logprob", "ChunkedLogProbFunction"): (
        "hidden",
        "weight",
        "bias",
        "targets",
    ),
    ("trl.kernels.chunked_divergence", "ChunkedDivergenceFunction"): (
        "student_hidden",
        "student_weight",
        "student_bias",
        "teacher_hidden",
        "teacher_weight",
        "teacher_bias",
    ),
}


def serve_fused_losses() -> None:
    """Have the losses that this process has loaded compute gradients of trainable rows alone."""
    for (module, name), names in _FUNCTIONS.items():
        function: Any = getattr(sys.modules.get(module), name, None)
        if function is None or hasattr(function.backward, "of_rows"):
            continue
        _, *given = inspect.signature(function.forward).parameters
        # What another version saves is not known: its whole gradient is masked and told of.
        if tuple(given[: len(names)]) == names:
            by_row = _by_row(function.backward, names)
            by_row.of_rows = True  # type: ignore[attr-defined]
            function.backward = staticmethod(by_row)


def _by_row(backward: Backward, names: tuple[str, ...]) -> Backward:
    def of_rows(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        features, weight, bias = ctx.needs_input_grad[:3]
        saved = ctx.saved_tensors
        head = _head_of(saved[1])
        if head is not None and not weight:
            used_frozen.add(head)
        if head is None or not weight or torch.is_grad_enabled():
            return backward(ctx, *grads)

        def asked_for(saved: tuple[Any, ...], *needs: bool) -> tuple[Tensor | None, ...]:
            asked = SimpleNamespace(**vars(ctx), saved_tensors=saved, needs_input_grad=needs)
            return backward(asked, *grads)

        _, of_weight, of_bias, *others = asked_for(
            _of_rows(saved, names, head.row_set), False, True, bias
        )
        of_features = asked_for(saved, True, False, False)[0] if features else None
        if of_weight is not None:  # there may be no gradient to take it from
            of_weight = RowGradient(head.row_set.order, of_weight, len(saved[1]))
            of_weight = of_weight.to_sparse() if head.is_left_to_ddp else of_weight
        if of_bias is not None:
            of_bias = torch.zeros_like(saved[2]).index_copy(0, head.row_set.order, of_bias)
        return of_features, of_weight, of_bias, *others

    return of_rows


def _head_of(weight: Tensor) -> PartialTable | None:
    """The head whose weight it is, if gradients of its rows are enough."""
    for table in tables_of(weight):
        if isinstance(table, nn.Linear):
            return table if table.has_frozen_rows and table.gives_sparse_gradient() else None
    return None


def _of_rows(saved: tuple[Any, ...], names: tuple[str, ...], rows: RowSet) -> tuple[Any, ...]:
    """What was saved, for a vocabulary of the trainable rows alone."""
    cut = []
    for name, value in zip(names, saved, strict=False):
        if value is not None and name.endswith(("weight", "bias")):
            value = value.detach().index_select(0, rows.order)
        elif name == "targets":
            value = rows.slots.to(value.dtype)[value]  # of a frozen row, one past the end
        cut.append(value)
    return *cut, *saved[len(names) :]
