"""Embedding tables of which only chosen rows train."""

from __future__ import annotations

from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.jit import is_scripting  # type: ignore[attr-defined]

from partial_embedding.errors import InputError, check_flags
from partial_embedding.rows.rows import RowsLike
from partial_embedding.torch.hooks import by_rows, is_rewritten
from partial_embedding.torch.table import PartialTable


class PartialEmbedding(PartialTable, nn.Embedding):  # type: ignore[misc]  # one weight, two views
    """An `nn.Embedding` of which only chosen rows train.

    It takes all arguments of `nn.Embedding`, has its `state_dict` and gives its outputs. A
    gradient hook keeps frozen rows out of the gradient of `weight`; an optimizer prepared with
    `rowwise` keeps them out of everything else.

    Args:
        num_embeddings: The number of rows V.
        embedding_dim: The number of columns D.
        padding_idx: A row that stays out of training altogether.
        max_norm: Rows looked up are scaled down to this norm; frozen rows never.
        norm_type: The p of that norm.
        scale_grad_by_freq: Scale gradients by how often a row occurs in the batch; needs
            `sparse=False`.
        sparse: Give `weight` a sparse gradient, so that a step costs what the rows in the batch
            cost. Unlike in the parent class this is the default.
        device: The device of `weight`.
        dtype: The dtype of `weight`.
        trainable_rows: `"all"`, `"none"`, ids, a boolean mask of length V, a `range`, a `slice` or
            `Rows`.

    Raises:
        InputError: The rows do not fit the table, or an option needs `sparse=False`.

    Example:
        >>> table = PartialEmbedding(10, 4, trainable_rows=[7, 2])
        >>> table.trainable_rows
        tensor([2, 7])
        >>> table(torch.tensor([1, 2])).sum().backward()
        >>> table.weight.grad.coalesce().indices()
        tensor([[2]])
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        padding_idx: int | None = None,
        max_norm: float | None = None,
        norm_type: float = 2.0,
        scale_grad_by_freq: bool = False,
        sparse: bool = True,
        _weight: Tensor | None = None,
        _freeze: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        trainable_rows: RowsLike = "all",
    ) -> None:
        check_sparse(sparse, scale_grad_by_freq)
        super().__init__(
            num_embeddings,
            embedding_dim,
            padding_idx,
            max_norm,
            norm_type,
            scale_grad_by_freq,
            sparse,
            _weight,
            _freeze,
            device=device,
            dtype=dtype,
        )
        self.set_trainable_rows(trainable_rows)

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002  # the parent's name
        """Look up rows.

        Args:
            input: Ids, any integer shape (*).

        Returns:
            Rows, shape (*, D).
        """
        if not is_scripting():
            weight, max_norm, sparse = _looked_up(self, input)
            # Nothing compiles how torch leaves it out of a sparse gradient; the hook does it, too.
            hooked = sparse and torch.compiler.is_compiling() and not is_rewritten(input)
            padding_idx = None if hooked else self.padding_idx
        else:
            weight, max_norm, sparse = self.weight, self.max_norm, self.sparse
            padding_idx = self.padding_idx
        return F.embedding(
            input,
            weight,
            padding_idx,
            max_norm,
            self.norm_type,
            self.scale_grad_by_freq,
            sparse,
        )

    @classmethod
    def from_pretrained(
        cls,
        embeddings: Tensor,
        freeze: bool = False,
        padding_idx: int | None = None,
        max_norm: float | None = None,
        norm_type: float = 2.0,
        scale_grad_by_freq: bool = False,
        sparse: bool = True,
        *,
        trainable_rows: RowsLike = "all",
    ) -> Self:
        """Make a table of given vectors.

        Args:
            embeddings: Shape (V, D), floating point. The table shares its memory.
            freeze: Freeze the whole table. Unlike in the parent class the default is False.
            padding_idx: As in the constructor.
            max_norm: As in the constructor.
            norm_type: As in the constructor.
            scale_grad_by_freq: As in the constructor.
            sparse: As in the constructor.
            trainable_rows: As in the constructor.

        Raises:
            InputError: The vectors are no matrix of floating point, or the rows do not fit it.

        Example:
            >>> table = PartialEmbedding.from_pretrained(torch.eye(3), trainable_rows=[2])
            >>> table.weight.requires_grad, table.trainable_rows
            (True, tensor([2]))
        """
        return cls(
            *_matrix_shape(embeddings, freeze),
            padding_idx,
            max_norm,
            norm_type,
            scale_grad_by_freq,
            sparse,
            embeddings,
            freeze,
            trainable_rows=trainable_rows,
        )


class PartialEmbeddingBag(PartialTable, nn.EmbeddingBag):  # type: ignore[misc]
    """An `nn.EmbeddingBag` of which only chosen rows train.

    It takes all arguments of `nn.EmbeddingBag`; `sparse` and `trainable_rows` are as in
    `PartialEmbedding`.

    Args:
        num_embeddings: The number of rows V.
        embedding_dim: The number of columns D.
        max_norm: Rows looked up are scaled down to this norm; frozen rows never.
        norm_type: The p of that norm.
        scale_grad_by_freq: As in `PartialEmbedding`.
        mode: `"sum"`, `"mean"` or `"max"`, which needs `sparse=False`.
        sparse: As in `PartialEmbedding`.
        include_last_offset: As in `nn.EmbeddingBag`.
        padding_idx: A row that stays out of training and out of the bags.
        device: The device of `weight`.
        dtype: The dtype of `weight`.
        trainable_rows: As in `PartialEmbedding`.

    Raises:
        InputError: The rows do not fit the table, or an option needs `sparse=False`.

    Example:
        >>> bags = PartialEmbeddingBag(10, 4, mode="sum", trainable_rows=[2])
        >>> bags(torch.tensor([[1, 2], [2, 2]])).shape
        torch.Size([2, 4])
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        max_norm: float | None = None,
        norm_type: float = 2.0,
        scale_grad_by_freq: bool = False,
        mode: str = "mean",
        sparse: bool = True,
        _weight: Tensor | None = None,
        include_last_offset: bool = False,
        padding_idx: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        trainable_rows: RowsLike = "all",
    ) -> None:
        check_sparse(sparse, scale_grad_by_freq, mode)
        super().__init__(
            num_embeddings,
            embedding_dim,
            max_norm,
            norm_type,
            scale_grad_by_freq,
            mode,
            sparse,
            _weight,
            include_last_offset,
            padding_idx,
            device,
            dtype,
        )
        self.set_trainable_rows(trainable_rows)

    def forward(
        self,
        input: Tensor,  # noqa: A002  # the parent's name
        offsets: Tensor | None = None,
        per_sample_weights: Tensor | None = None,
    ) -> Tensor:
        """Reduce bags of rows.

        Args:
            input: Ids, shape (B, N), or (N,) with `offsets`.
            offsets: Where each bag begins, shape (B,).
            per_sample_weights: A factor for each id, of the shape of `input`; for `mode="sum"`.

        Returns:
            One vector per bag, shape (B, D).
        """
        if not is_scripting():
            weight, max_norm, sparse = _looked_up(self, input)
        else:
            weight, max_norm, sparse = self.weight, self.max_norm, self.sparse
        return F.embedding_bag(
            input,
            weight,
            offsets,
            max_norm,
            self.norm_type,
            self.scale_grad_by_freq,
            self.mode,
            sparse,
            per_sample_weights,
            self.include_last_offset,
            self.padding_idx,
        )

    @classmethod
    def from_pretrained(
        cls,
        embeddings: Tensor,
        freeze: bool = False,
        max_norm: float | None = None,
        norm_type: float = 2.0,
        scale_grad_by_freq: bool = False,
        mode: str = "mean",
        sparse: bool = True,
        include_last_offset: bool = False,
        padding_idx: int | None = None,
        *,
        trainable_rows: RowsLike = "all",
    ) -> Self:
        """Make a table of given vectors.

        Args:
            embeddings: Shape (V, D), floating point. The table shares its memory.
            freeze: Freeze the whole table. Unlike in the parent class the default is False.
            max_norm: As in the constructor.
            norm_type: As in the constructor.
            scale_grad_by_freq: As in the constructor.
            mode: As in the constructor.
            sparse: As in the constructor.
            include_last_offset: As in the constructor.
            padding_idx: As in the constructor.
            trainable_rows: As in the constructor.

        Raises:
            InputError: The vectors are no matrix of floating point, or the rows do not fit it.

        Example:
            >>> PartialEmbeddingBag.from_pretrained(torch.eye(3), trainable_rows=[2]).trainable_rows
            tensor([2])
        """
        bags = cls(
            *_matrix_shape(embeddings, freeze),
            max_norm,
            norm_type,
            scale_grad_by_freq,
            mode,
            sparse,
            embeddings,
            include_last_offset,
            padding_idx,
            trainable_rows=trainable_rows,
        )
        bags.weight.requires_grad_(not freeze)
        return bags


def check_sparse(sparse: bool, by_frequency: bool, mode: str | None = None, of: str = "") -> None:
    """Refuse a sparse gradient where torch gives a dense one."""
    check_flags(sparse=sparse)
    option = "scale_grad_by_freq=True" if by_frequency else 'mode="max"'
    if sparse and (by_frequency or mode == "max"):
        raise InputError(
            f"{option} needs a dense gradient. Received sparse=True{of}. Pass sparse=False."
        )


def _matrix_shape(embeddings: Tensor, freeze: bool) -> tuple[int, int]:
    if not isinstance(embeddings, Tensor):
        raise InputError(
            f"vectors are a tensor. Received a {type(embeddings).__name__}. Pass "
            "torch.as_tensor(vectors)."
        )
    if not (freeze or embeddings.is_floating_point() or embeddings.is_complex()):
        raise InputError(
            f"vectors that train are floating point. Received {embeddings.dtype}. Pass "
            "embeddings.float()."
        )
    if embeddings.dim() != 2:
        raise InputError(
            "vectors are a matrix of rows by columns. "
            f"Received the shape {tuple(embeddings.shape)}. Reshape them."
        )
    return embeddings.shape[0], embeddings.shape[1]


def _looked_up(
    table: PartialEmbedding | PartialEmbeddingBag, ids: Tensor
) -> tuple[Tensor, float | None, bool]:
    """The weight to look rows up in, the norm to scale them to, and whether it may be sparse."""
    in_use = table._weight_in_use()
    weight, max_norm = table.weight if in_use is None else in_use, table.max_norm
    sparse = in_use is None and table.gives_sparse_gradient()
    if max_norm is not None and (table._row_set is not None or table.padding_idx is not None):
        # Not by the lookup, which would scale frozen rows too.
        if is_rewritten(ids, weight):
            return _scaled(weight, table, max_norm), None, False
        with torch.no_grad():
            ids = ids.flatten()
            ids = ids[table.row_set.is_trainable(ids)]
            torch.embedding_renorm_(weight.detach(), ids, max_norm, table.norm_type)
        max_norm = None
    by_rows_too = sparse and max_norm is None  # what the lookup scales in place is to be no view
    return by_rows(weight, table) if by_rows_too else weight, max_norm, sparse


def _scaled(
    weight: Tensor, table: PartialEmbedding | PartialEmbeddingBag, max_norm: float
) -> Tensor:
    """The weight as `embedding_renorm_` would leave it, for graphs in which nothing is written."""
    rows, norms = table._row_set, torch.linalg.vector_norm(weight, table.norm_type, 1, True)
    if rows is None:
        # Of the table's own only padding is frozen. No row set is made here, whose tensors would
        # be the exporter's.
        assert table.padding_idx is not None
        every = torch.arange(table.num_embeddings, device=weight.device)
        mask = every.ne(table.padding_idx)
    else:
        mask = rows.mask
    too_long = mask.unsqueeze(1) & (norms > max_norm)
    return torch.where(too_long, weight * (max_norm / (norms + 1e-7)), weight)
