"""The layer and the optimizer wrapper for Keras on TensorFlow."""

from partial_embedding.tensorflow.embedding import PartialEmbedding

__all__ = ["PartialEmbedding"]
