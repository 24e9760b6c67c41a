"""Train only part of an embedding table, and unfreeze more of it as training goes on.

This package imports no framework. The layers are in `partial_embedding.torch` and
`partial_embedding.tensorflow`, the callbacks in `partial_embedding.callbacks`.
"""

from partial_embedding.errors import FrozenRowsMoved, InputError
from partial_embedding.growth import Growth
from partial_embedding.rows import Rows
from partial_embedding.schedule import Pace, Plateau, Position, Schedule, Seen, Stage, Start
from partial_embedding.version import __version__
from partial_embedding.vocabulary import Vocabulary

__all__ = [
    "FrozenRowsMoved",
    "Growth",
    "InputError",
    "Pace",
    "Plateau",
    "Position",
    "Rows",
    "Schedule",
    "Seen",
    "Stage",
    "Start",
    "Vocabulary",
    "__version__",
]
