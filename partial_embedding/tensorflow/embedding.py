"""A `keras.layers.Embedding` of which only chosen rows train."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
import tensorflow as tf

from partial_embedding.errors import InputError
from partial_embedding.rows import Rows
from partial_embedding.rows.vocabulary import Ids
from partial_embedding.schedule import RateScale
from partial_embedding.tensorflow.lr_scale import check_kept
from partial_embedding.tensorflow.reserve import compact
from partial_embedding.tensorflow.table_state import Split, over_ids


@keras.saving.register_keras_serializable("partial_embedding", "PartialEmbedding")
class PartialEmbedding(keras.layers.Embedding):
    """An embedding table of which only chosen rows train, under any Keras optimizer.

    Rows that do not train keep their bits through every step. Which rows train may change between
    steps, within the reserved rows, without tracing the training step again. With every row
    trainable and none reserved, this is the plain layer with its single variable; otherwise the
    reserved rows, R of V, are the one trainable variable, and time and memory of a step follow R.

    Files hold one matrix of shape (V, D) as those of `keras.layers.Embedding` do, and either layer
    loads the other's. A regularizer and a constraint apply to the reserved rows, as they would in
    a table of those rows alone.

    Args:
        input_dim: Number of rows V.
        output_dim: Number of columns D.
        trainable_rows: Rows that train from the start, in any form that `Rows.parse` reads.
        reserve_rows: Rows that may train at any time, in the same forms. By default those that
            train from the start. A layer that trains every row and will freeze some needs "all".
        freeze_padding: Row 0, which stands for padding, never trains, also when it is among
            `trainable_rows`. Keras trains it, also under `mask_zero=True`.
        **kwargs: All that `keras.layers.Embedding` takes.

    Raises:
        InputError: Rows lie outside [0, V), or trainable rows are not reserved, or LoRA is asked
            for, which would move frozen rows.

    Example:
        >>> layer = PartialEmbedding(5, 2, trainable_rows=[3], reserve_rows=[3, 4])
        >>> layer(np.array([[0, 3]])).shape
        TensorShape([1, 2, 2])
        >>> layer.unfreeze_rows([4])
        >>> layer.trainable_rows
        array([3, 4])
    """

    built: bool

    def __init__(
        self,
        input_dim: int,
        output_dim: int,
        *,
        trainable_rows: object = "all",
        reserve_rows: object = None,
        freeze_padding: bool = False,
        **kwargs: Any,
    ) -> None:
        weights = kwargs.pop("weights", None)
        super().__init__(input_dim, output_dim, **kwargs)
        self.freeze_padding = freeze_padding
        self._live: Ids = self._resolve(trainable_rows)
        self._reserved: Ids = self._live
        self._reserves = reserve_rows is not None
        if self._reserves:
            self._reserved = self._resolve(reserve_rows)
        self._split: Split | None = None
        self._check_reserved(self._live)
        self._check_lora(bool(self.lora_rank))
        if weights is not None:
            self.build()
            self.set_weights(weights if isinstance(weights, list) else [weights])

    @classmethod
    def from_matrix(
        cls,
        matrix: Any,
        *,
        trainable_rows: object = "all",
        reserve_rows: object = None,
        **kwargs: Any,
    ) -> PartialEmbedding:
        """Make a layer from a table.

        Args:
            matrix: The table, floating point, shape (V, D).
            trainable_rows: As in the constructor.
            reserve_rows: As in the constructor.
            **kwargs: All that `keras.layers.Embedding` takes but its shape.

        Raises:
            InputError: The table is not a matrix.

        Example:
            >>> layer = PartialEmbedding.from_matrix(np.eye(3), trainable_rows=[2])
            >>> layer.get_weights()[0][2]
            array([0., 0., 1.], dtype=float32)
        """
        shape = np.shape(matrix)
        if len(shape) != 2:
            raise InputError(f"a table is a matrix of shape (V, D). Received the shape {shape}.")
        num_rows, width = shape
        return cls(
            num_rows,
            width,
            trainable_rows=trainable_rows,
            reserve_rows=reserve_rows,
            weights=matrix,
            **kwargs,
        )

    @classmethod
    def from_layer(
        cls, layer: Any, *, trainable_rows: object = "all", reserve_rows: object = None
    ) -> PartialEmbedding:
        """Make a layer with the settings and the table of an existing one.

        Args:
            layer: A `keras.layers.Embedding`, built or not, without LoRA and not quantized, and not
                a `ReversibleEmbedding`.
            trainable_rows: As in the constructor.
            reserve_rows: As in the constructor.

        Raises:
            InputError: The layer is no such layer.

        Example:
            >>> layer = PartialEmbedding.from_layer(keras.layers.Embedding(4, 2), trainable_rows=[0])
            >>> layer.trainable_rows
            array([0])
        """  # noqa: E501  # a call that is copied stays on one line
        if (
            not isinstance(layer, keras.layers.Embedding)
            or isinstance(layer, keras.layers.ReversibleEmbedding)
            or layer.lora_enabled
            or layer.quantization_mode
        ):
            raise InputError(
                "a table comes from a keras.layers.Embedding without LoRA, not quantized and "
                f"not reversible. Received: {layer!r}. Take its matrix to "
                "PartialEmbedding.from_matrix, and tie a head to that layer's embeddings."
            )
        rows = {"trainable_rows": trainable_rows, "reserve_rows": reserve_rows}
        made: PartialEmbedding = cls.from_config({**layer.get_config(), **rows})
        if layer.built:
            made.build()
            made.set_weights(layer.get_weights())
        return made

    @property
    def trainable_rows(self) -> Ids:
        """Ids of the rows that train now: sorted, int64, shape (K,)."""
        return self._live.copy()

    @property
    def reserved_rows(self) -> Ids:
        """Ids of the rows that may train at any time: sorted, int64, shape (R,)."""
        return self._reserved.copy()

    def set_trainable_rows(self, rows: object, *, rate_scale: RateScale | None = None) -> None:
        """Train these rows from the next step on, and no others.

        Args:
            rows: Rows in any form that `Rows.parse` reads.
            rate_scale: How fast those of them learn that join, for as long as they train; by
                default at the optimizer's learning rate. Rows that made a step already keep their
                rate_scale.

        Raises:
            InputError: A row is not reserved, the layer is plain, or no optimizer keeps a
                rate_scale.

        Example:
            >>> layer = PartialEmbedding(5, 2, trainable_rows=[3], reserve_rows="all")
            >>> layer.set_trainable_rows(range(3))
            >>> layer.trainable_rows
            array([0, 1, 2])
        """
        live = self.check_trainable_rows(rows)
        self._train(live, live, rate_scale)

    def _train(self, live: Ids, begin: Ids, rate_scale: RateScale | None = None) -> None:
        """Train `live`; those of `begin` that have made no step yet begin at this rate_scale."""
        check_kept(rate_scale, self._split and self._split.rate_scales, self.name)
        if self._split is not None:
            self._split.move(self._live, live, begin, rate_scale or RateScale())
        self._live = live

    def check_trainable_rows(self, rows: object) -> Ids:
        """Refuse rows that `set_trainable_rows` would refuse, and change nothing.

        Args:
            rows: Rows in any form that `Rows.parse` reads.

        Returns:
            Their ids: sorted, int64, shape (K,).

        Raises:
            InputError: A row is not reserved, or the layer was built as a plain one.

        Example:
            >>> PartialEmbedding(5, 2, reserve_rows="all").check_trainable_rows(range(2))
            array([0, 1])
        """
        live = self._resolve(rows)
        self._check_reserved(live)
        if self.built and self._split is None and live.size != self._live.size:
            raise InputError(
                "rows of a table that was built with every row trainable and none reserved cannot "
                f"be frozen: it is a plain one. Received a wish to train {live.size} of "
                f"{self.input_dim} rows. Make the layer with reserve_rows='all'."
            )
        return live

    def unfreeze_rows(self, rows: object, *, rate_scale: RateScale | None = None) -> None:
        """Train these rows too, from the next step on.

        Args:
            rows: Rows in any form that `Rows.parse` reads.
            rate_scale: As for `set_trainable_rows`.

        Raises:
            InputError: A row is not reserved, or no optimizer keeps a rate_scale.

        Example:
            >>> layer = PartialEmbedding(5, 2, trainable_rows=[3], reserve_rows="all")
            >>> layer.unfreeze_rows([1])
            >>> layer.trainable_rows
            array([1, 3])
        """
        ids = self._resolve(rows)
        self._train(self.check_trainable_rows(np.union1d(self._live, ids)), ids, rate_scale)

    def freeze_rows(self, rows: object) -> None:
        """Train these rows no longer; they keep their bits from now on.

        Args:
            rows: Rows in any form that `Rows.parse` reads; those that do not train are left alone.

        Raises:
            InputError: The layer was built as a plain one.

        Example:
            >>> layer = PartialEmbedding(5, 2, trainable_rows=[1, 3])
            >>> layer.freeze_rows("all")
            >>> layer.trainable_rows
            array([], dtype=int64)
        """
        ids = self._resolve(rows)
        self._train(self.check_trainable_rows(np.setdiff1d(self._live, ids)), begin=ids[:0])

    def build(self, input_shape: Any = None) -> None:
        """Make the variables: one for a plain table, two for a split one."""
        is_plain = self._live.size == self.input_dim and not self._reserves
        if self.built or self.quantization_mode or is_plain:
            super().build(input_shape)
            return
        # A model without a fixed input is built while its first step is traced, and XLA cannot
        # lift the second variable, which begins with rows of the first, out of that.
        with tf.init_scope():
            self._build_split()
        self.built = True

    @property
    def embeddings(self) -> Any:
        """The table of shape (V, D): the variable of a plain table, a tensor of a split one.

        A head tied to the tensor, `x @ transpose(layer.embeddings)`, trains the trainable rows. It
        reads the tensor in the `call` of a layer or model: the one that it got at another time is
        of that time.
        """
        return self._split.merged() if self._split is not None else super().embeddings

    def call(self, inputs: Any) -> Any:
        """Look up ids of any shape; dense, ragged or sparse."""
        if self.lora_enabled:
            return super().call(inputs)
        if inputs.dtype not in ("int32", "int64"):
            inputs = keras.ops.cast(inputs, "int32")
        rows = over_ids(self.rows, inputs, self.input_dim)
        return keras.ops.cast(rows, self.compute_dtype)

    def rows(self, ids: Any) -> Any:
        """The rows of a dense tensor of ids, at the precision in which they are stored.

        Args:
            ids: Integers in [0, V), any shape.

        Returns:
            A tensor of shape (*ids.shape, D).

        Example:
            >>> PartialEmbedding.from_matrix(np.eye(2)).rows(np.array([1])).numpy()
            array([[0., 1.]], dtype=float32)
        """
        if self._split is not None:
            return self._split.look_up(ids)
        # Not `keras.ops.take`, which copies the whole table once a row of it has been assigned.
        return tf.gather(self._embeddings.value, ids)

    def get_config(self) -> dict[str, Any]:
        """The constructor's arguments, with the rows that train now."""
        is_default = not self._reserves and np.array_equal(self._reserved, self._live)
        return {
            **super().get_config(),
            "trainable_rows": compact(self._live, self.input_dim),
            "freeze_padding": self.freeze_padding,
            "reserve_rows": None if is_default else compact(self._reserved, self.input_dim),
        }

    def get_weights(self) -> list[Any]:
        """The table as one array of shape (V, D) in a list, as the plain layer gives it."""
        if self._split is None:
            return super().get_weights()  # type: ignore[no-any-return]
        return [self._split.merged().numpy()]

    def set_weights(self, weights: list[Any]) -> None:
        """Write the table, one array of shape (V, D) in a list, as the plain layer takes it."""
        if self._split is None:
            super().set_weights(weights)
            return
        if len(weights) != 1 or np.shape(weights[0]) != (self.input_dim, self.output_dim):
            raise InputError(
                f"the weights are one table of shape {(self.input_dim, self.output_dim)}. "
                f"Received the shapes {[np.shape(w) for w in weights]}. Was the vocabulary resized?"
            )
        self._split.assign(weights[0])

    def save_own_variables(self, store: Any) -> None:
        """Write one matrix, as the plain layer does."""
        if self._split is None:
            super().save_own_variables(store)
        else:
            store["0"] = self._split.merged()

    def load_own_variables(self, store: Any) -> None:
        """Read one matrix, as the plain layer does."""
        if self._split is None:
            super().load_own_variables(store)
            return
        if list(store.keys()) != ["0"]:
            raise InputError(
                f"a file holds one table for the layer {self.name!r}. Received "
                f"{len(store.keys())} arrays. Was it saved from a model of another structure?"
            )
        self.set_weights([store["0"]])

    def enable_lora(self, rank: int, *args: Any, **kwargs: Any) -> None:
        """Train a low-rank change of every row, which only a table with no frozen row allows."""
        self._check_lora(True)
        super().enable_lora(rank, *args, **kwargs)

    def quantize(self, mode: Any = None, type_check: bool = True, config: Any = None) -> None:
        """Quantize the table for inference, as `keras.layers.Embedding` does; no row trains then.

        Args:
            mode: "int8" or "int4".
            type_check: Whether to refuse subclasses of this layer.
            config: A Keras quantization configuration.
        """
        if type_check and type(self) is not PartialEmbedding:
            raise self._not_implemented_error(self.quantize)
        if self._split is not None:
            self._merge()
        super().quantize(mode, type_check=False, config=config)
        self._live = self._reserved = np.zeros(0, np.int64)
        self._reserves = False

    def _build_split(self) -> None:
        self._embeddings = self.add_weight(
            shape=(self.input_dim, self.output_dim),
            initializer=self.embeddings_initializer,
            name="frozen_embeddings",
            trainable=False,
            # Under an outer layer's autocast, reading the variable would convert all of it.
            autocast=False,
        )
        if self._reserved.size:
            self._trained = self._add_reserved_weight()
            self._split = Split(self._embeddings, self._trained, self._reserved, self._live)
            self._split.constrained = self.embeddings_constraint is not None
            # Where `rowwise` finds them.
            self._trained.partial_rows = self._split

    def _add_reserved_weight(self) -> Any:
        return self.add_weight(
            shape=(self._reserved.size, self.output_dim),
            initializer=self._initial_rows,
            name="embeddings",  # Muon knows an embedding by its name
            regularizer=self._regularize if self.embeddings_regularizer else None,
            # Optimizers apply a constraint last, after decay and moving averages.
            constraint=self._constrain,
            autocast=False,
            # What each replica computes is the same, and a mean of more than two could round.
            aggregation="only_first_replica",
        )

    def _initial_rows(self, shape: Any, dtype: Any = None) -> Any:
        return tf.gather(self._embeddings.value, self._reserved)

    def _regularize(self, weights: Any) -> Any:
        return self.embeddings_regularizer(self._split.stop_frozen(weights))  # type: ignore[union-attr]

    def _constrain(self, weights: Any) -> Any:
        # Every optimizer comes by here while its first step is traced, but for lazy ones.
        self._split.check_optimizer(self.name)  # type: ignore[union-attr]
        if self.embeddings_constraint:
            weights = self.embeddings_constraint(weights)
        return self._split.pin(weights)  # type: ignore[union-attr]

    def _merge(self) -> None:
        (matrix,) = self.get_weights()
        self._split = None
        del self._embeddings, self._trained
        self._embeddings = self.add_weight(
            shape=matrix.shape, initializer="zeros", name="embeddings"
        )
        self._embeddings.assign(matrix)

    def _resolve(self, rows: object) -> Ids:
        ids = Rows.parse(rows).resolve(self.input_dim)
        return ids[ids != 0] if self.freeze_padding else ids

    def _check_reserved(self, live: Ids) -> None:
        if (beyond := np.setdiff1d(live, self._reserved, assume_unique=True)).size:
            raise InputError(
                f"trainable rows are among the {self._reserved.size} reserved ones. Received: "
                f"{beyond[0]}{f' and {beyond.size - 1} more' if beyond.size > 1 else ''}. "
                "Make the layer with reserve_rows= all rows that will ever train."
            )

    def _check_lora(self, wanted: bool) -> None:
        frozen = self._reserves or self._live.size != self.input_dim
        if wanted and frozen and not self.quantization_mode:
            raise InputError(
                "LoRA moves every row of a table. Received a wish for it on a table with frozen "
                "rows. Use either of the two."
            )


# Keras finds a layer in a weight file by its class's name, in snake case and numbered. Under the
# parent's name, files of plain models fit and plain models load the files of partial ones.
PartialEmbedding.__name__ = keras.layers.Embedding.__name__
