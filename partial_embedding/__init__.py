"""Train only part of an embedding table, and unfreeze more of it as training goes on.

This package imports no framework. The layers are in `partial_embedding.torch` and
`partial_embedding.tensorflow`, the callbacks in `partial_embedding.callbacks`.
"""

from partial_embedding.errors import FrozenRowsMoved, InputError
from partial_embedding.files import open_vectors
from partial_embedding.rows import Rows, RowsLike
from partial_embedding.rows.growth import Growth
from partial_embedding.rows.vocabulary import Vocabulary
from partial_embedding.schedule import (
    Evaluation,
    Plateau,
    Position,
    RateScale,
    Schedule,
    Stage,
    Start,
)
from partial_embedding.version import __version__

__all__ = [
    "Evaluation",
    "FrozenRowsMoved",
    "Growth",
    "InputError",
    "Plateau",
    "Position",
    "RateScale",
    "Rows",
    "RowsLike",
    "Schedule",
    "Stage",
    "Start",
    "Vocabulary",
    "__version__",
    "open_vectors",
]
