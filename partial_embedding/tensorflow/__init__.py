"""The layer and the optimizer wrapper for Keras on TensorFlow."""

from partial_embedding.errors import FrozenRowsMoved
from partial_embedding.tensorflow import gradients
from partial_embedding.tensorflow.audit import FrozenRowAudit
from partial_embedding.tensorflow.embedding import PartialEmbedding
from partial_embedding.tensorflow.optimizer import Rowwise, rowwise
from partial_embedding.tensorflow.reserve import schedule_rows

__all__ = [
    "FrozenRowAudit",
    "FrozenRowsMoved",
    "PartialEmbedding",
    "Rowwise",
    "gradients",
    "rowwise",
    "schedule_rows",
]
