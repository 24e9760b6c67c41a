"""An output head of which only chosen rows train, tied to an embedding or not."""

from __future__ import annotations

import warnings
from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.jit import is_scripting  # type: ignore[attr-defined]

from partial_embedding.errors import check_flags
from partial_embedding.rows.rows import RowsLike
from partial_embedding.torch.fused_losses import serve_fused_losses
from partial_embedding.torch.hooks import by_rows, is_rewritten
from partial_embedding.torch.shards import is_sharded
from partial_embedding.torch.table import PartialTable, tables_of


class PartialLinear(PartialTable, nn.Linear):  # type: ignore[misc]  # one weight, two views
    """An `nn.Linear` of which only chosen rows, the scores of chosen tokens, train.

    It takes all arguments of `nn.Linear`, has its `state_dict` and gives its outputs. Its backward
    pass computes the weight's gradient for the trainable rows alone, in O(K·D) memory; where the
    weight is tied to a `PartialEmbedding`, that adds to the embedding's own sparse gradient. The
    bias of frozen rows is frozen too.

    Args:
        in_features: The columns D of the weight.
        out_features: The rows V of the weight, one for each score.
        bias: Whether there is a bias, shape (V,).
        device: The device of the parameters.
        dtype: The dtype of the parameters.
        sparse: Give `weight` a sparse gradient. False makes a dense one, V×D; so does
            `DistributedDataParallel` in a model of which nothing trains but heads, and
            `torch.compile` where the weight is tied.
        trainable_rows: `"all"`, `"none"`, ids, a boolean mask of length V, a `range`, a `slice` or
            `Rows`. With nothing frozen the gradient is that of `nn.Linear`.

    Raises:
        InputError: The rows do not fit the weight.

    Example:
        >>> head = PartialLinear(4, 10, trainable_rows=[7, 2])
        >>> head(torch.ones(3, 4)).sum().backward()
        >>> head.weight.grad.coalesce().indices()
        tensor([[2, 7]])
        >>> head.bias.grad
        tensor([0., 0., 3., 0., 0., 0., 0., 3., 0., 0.])
    """

    row_parameters: ClassVar[tuple[str, ...]] = ("weight", "bias")

    sparse = True

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        sparse: bool = True,
        trainable_rows: RowsLike = "all",
    ) -> None:
        check_flags(sparse=sparse)
        super().__init__(in_features, out_features, bias, device, dtype)
        self.sparse = sparse
        self.set_trainable_rows(trainable_rows)

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002  # the parent's name
        """Score features.

        Args:
            input: Features, shape (*, D).

        Returns:
            One score per row, shape (*, V).
        """
        if is_scripting():
            return F.linear(input, self.weight, self.bias)
        return self._score(input)

    @torch.jit.unused
    def _score(self, input: Tensor) -> Tensor:  # noqa: A002  # as in `forward`
        weight = self._weight_in_use()
        if weight is not None:
            return F.linear(input, weight, self._masked_bias())
        if not self._counts_by_row(input):
            return super().forward(input)
        rows = self.row_set.order
        sparse = self.gives_sparse_gradient()
        if torch.compiler.is_compiling() and not sparse:
            self._told = True  # of a gradient that is dense in graphs
        weight = by_rows(self.weight, self) if sparse else self.weight
        # In two dimensions, where `linear` gives a tensor of its own and no view of one.
        features = input.reshape(-1, input.shape[-1])
        scores: Tensor = _RowGradients.apply(  # type: ignore[no-untyped-call]  # torch's own
            features,
            self.weight.detach(),
            None if self.bias is None else self.bias.detach(),
            rows,
            # A lookup, since its backward pass makes the sparse gradient, compiled or not.
            F.embedding(rows, weight, sparse=sparse),
            None if self.bias is None else self.bias.index_select(0, rows),
        )
        # Nor a view of that one, whose hooks FSDP2 could not rely on.
        shaped: Tensor = torch.ops.aten._unsafe_view(scores, [*input.shape[:-1], scores.shape[1]])
        return shaped

    def train(self, mode: bool = True) -> Self:
        """As in the parent class; trainers whose losses do not call the module call this first.

        Args:
            mode: Whether to train.
        """
        serve_fused_losses()
        return super().train(mode)

    def take_dense(self, grad: Tensor) -> None:
        """Say once that something multiplies by the weight itself, at the cost of all rows.

        Args:
            grad: The gradient of a parameter.
        """
        weight = self._parameters.get("weight")
        if weight is None or grad.dim() != 2 or "_told" in vars(self):
            return  # pruned, of a bias, or said already
        by_row = self.gives_sparse_gradient() and all(t.sparse for t in tables_of(weight))
        if not (by_row and self.has_frozen_rows):
            return
        vars(self)["_told"] = True
        warnings.warn(
            "a PartialLinear computes the gradients of its trainable rows where it is called. Its "
            f"weight got one of all rows, {grad.shape[0]:,}×{grad.shape[1]:,} numbers in each "
            "step, since something reads the weight and does not call the module, as losses do "
            "that are fused with a head. Frozen rows stay exact; to save it, take the loss of what "
            "the module gives, of some features at a time.",
            stacklevel=2,
        )

    def _counts_by_row(self, input: Tensor) -> bool:  # noqa: A002  # as in `forward`
        """Whether to compute gradients by row; otherwise the hook masks the whole one."""
        # Tensor parallelism scores by shards, and knows `linear`; what FSDP2 lends is whole.
        if is_rewritten(input) or is_sharded(self.weight):
            return False
        if not (self.has_frozen_rows and torch.is_grad_enabled()):
            return False
        return self.weight.requires_grad or (self.bias is not None and self.bias.requires_grad)

    def gives_sparse_gradient(self) -> bool:
        """Whether the weight gets a gradient of the trainable rows alone."""
        sparse = super().gives_sparse_gradient()
        if sparse and self.is_left_to_ddp:
            # DDP asks the kind of module whether a gradient will be, and an embedding says so.
            return any(t.sparse for t in tables_of(self.weight) if not isinstance(t, nn.Linear))
        return sparse

    def _masked_bias(self) -> Tensor | None:
        if self.bias is None or not self.has_frozen_rows:
            return self.bias
        return torch.where(self.row_set.mask, self.bias, self.bias.detach())


class _RowGradients(torch.autograd.Function):
    """`linear`, whose weight and bias get their gradients by way of rows that were taken from them.

    The weight itself is given detached, so that nothing computes its gradient of V×D.
    """

    @staticmethod
    def forward(
        ctx: Any,
        features: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        rows: Tensor,
        weight_rows: Tensor,
        bias_rows: Tensor | None,
    ) -> Tensor:
        ctx.save_for_backward(features, weight, rows, weight_rows)
        return F.linear(features, weight, bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads  # in the dtype that autocast chose for the scores
        features, weight, rows, weight_rows = ctx.saved_tensors
        of_features, _, _, _, of_weight, of_bias = ctx.needs_input_grad
        part = grad.index_select(1, rows)
        if of_features and torch.is_grad_enabled():
            # A second derivative looks for the rows in the weight.
            weight = weight.index_copy(0, rows, weight_rows)
        return (
            (grad @ weight.to(grad.dtype)).to(features.dtype) if of_features else None,
            None,
            None,
            None,
            (part.t() @ features.to(part.dtype)).to(weight_rows.dtype) if of_weight else None,
            part.sum(0).to(weight_rows.dtype) if of_bias else None,
        )
