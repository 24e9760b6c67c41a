"""The layer and the optimizer wrapper for Keras on TensorFlow."""

import os

from partial_embedding.errors import FrozenRowsMoved, InputError

# Before Keras is imported, which fails in its own words where a backend is not installed.
if os.environ.get("TF_USE_LEGACY_KERAS", "").lower() in ("1", "true"):
    raise InputError(
        "partial_embedding.tensorflow is for Keras 3. Received TF_USE_LEGACY_KERAS="
        f"{os.environ['TF_USE_LEGACY_KERAS']}, with which tf.keras is Keras 2. Unset it."
    )
if (name := os.environ.get("KERAS_BACKEND", "tensorflow")) != "tensorflow":
    raise InputError(
        f"partial_embedding.tensorflow is for Keras on TensorFlow. Received KERAS_BACKEND={name}. "
        "Set it to tensorflow, or use partial_embedding.torch."
    )

import keras  # after the checks above

if keras.config.backend() != "tensorflow":
    raise InputError(
        "partial_embedding.tensorflow is for Keras on TensorFlow. Received the backend "
        f"{keras.config.backend()} of Keras's configuration file. Set KERAS_BACKEND=tensorflow."
    )

from partial_embedding.tensorflow import gradients
from partial_embedding.tensorflow.audit import FrozenRowAudit
from partial_embedding.tensorflow.embedding import PartialEmbedding
from partial_embedding.tensorflow.grow import grow_table
from partial_embedding.tensorflow.models import plain_weights, set_plain_weights
from partial_embedding.tensorflow.optimizer import rowwise
from partial_embedding.tensorflow.row_optimizer import Rowwise

__all__ = [
    "FrozenRowAudit",
    "FrozenRowsMoved",
    "PartialEmbedding",
    "Rowwise",
    "gradients",
    "grow_table",
    "plain_weights",
    "rowwise",
    "set_plain_weights",
]
