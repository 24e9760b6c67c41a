"""Partly trainable embedding tables for PyTorch, and what makes optimizers respect them."""

from partial_embedding.errors import FrozenRowsMoved
from partial_embedding.torch import averaging as averaging
from partial_embedding.torch import ddp as ddp
from partial_embedding.torch.audit import FrozenRowAudit
from partial_embedding.torch.embedding import PartialEmbedding, PartialEmbeddingBag
from partial_embedding.torch.grow import grow_table
from partial_embedding.torch.head import PartialLinear
from partial_embedding.torch.optimizer import (
    average_gradients,
    detach_rowwise,
    masked_gradient_only,
    rowwise,
)
from partial_embedding.torch.replace import replace_embedding, restore_embedding
from partial_embedding.torch.split import split_rows
from partial_embedding.torch.tokens import add_tokens
from partial_embedding.torch.transfer import transfer_vocabulary
from partial_embedding.torch.whole import keep_whole

__all__ = [
    "FrozenRowAudit",
    "FrozenRowsMoved",
    "PartialEmbedding",
    "PartialEmbeddingBag",
    "PartialLinear",
    "add_tokens",
    "average_gradients",
    "detach_rowwise",
    "grow_table",
    "keep_whole",
    "masked_gradient_only",
    "replace_embedding",
    "restore_embedding",
    "rowwise",
    "split_rows",
    "transfer_vocabulary",
]
