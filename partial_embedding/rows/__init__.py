"""Which: rows of a table, the ways of naming them, their vocabularies, and how they grow."""

from partial_embedding.rows.growth import Growth
from partial_embedding.rows.rows import Config, Rows, RowsLike
from partial_embedding.rows.vocabulary import Ids, Vocabulary

__all__ = ["Config", "Growth", "Ids", "Rows", "RowsLike", "Vocabulary"]
