"""Word-vector files: a table, its vocabulary and the rows that were missing."""

from partial_embedding.vectors.reading import read_vectors
from partial_embedding.vectors.tables import build_table, train_vectors
from partial_embedding.vectors.writing import save_vectors

__all__ = ["build_table", "read_vectors", "save_vectors", "train_vectors"]
