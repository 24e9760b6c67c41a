"""Word-vector files: a table, its vocabulary and the rows that were missing."""

from partial_embedding.recipes.vectors.formats import WordVectors
from partial_embedding.recipes.vectors.reading import read_vectors
from partial_embedding.recipes.vectors.tables import build_table, save_vectors, train_vectors

__all__ = ["WordVectors", "build_table", "read_vectors", "save_vectors", "train_vectors"]
