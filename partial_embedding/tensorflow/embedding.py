"""A `keras.layers.Embedding` of which only chosen rows train."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
import tensorflow as tf

from partial_embedding.errors import InputError, check_flags
from partial_embedding.rows import Rows, RowsLike
from partial_embedding.rows.vocabulary import Ids
from partial_embedding.schedule import RateScale
from partial_embedding.tensorflow.one_table import OneTable
from partial_embedding.tensorflow.table_state import compact, over_ids


# Keras names the package where a file is loaded without its import.
@keras.saving.register_keras_serializable("partial_embedding.tensorflow", "PartialEmbedding")
class PartialEmbedding(OneTable):
    """An embedding table of which only chosen rows train, under any Keras optimizer.

    Rows that do not train keep their bits through every step. Which rows train may change between
    steps, within the reserved rows, without tracing the training step again. With every row
    trainable and none reserved, this is the plain layer with its single variable; otherwise the
    reserved rows, R of V, are the one trainable variable, and time and memory of a step follow R.

    The weights of this layer, in files and in `get_weights`, are one matrix of shape (V, D) as
    those of `keras.layers.Embedding`, and either layer takes the other's. A model lists variables:
    here those of the reserved rows, of the frozen table, and of which rows are unfrozen. Models
    with partial tables exchange all of them; `plain_weights` and `set_plain_weights` lead to models
    with plain tables and back. A regularizer and a constraint apply to the reserved rows, as they
    would in a table of those rows alone.

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
        >>> import numpy as np
        >>> from partial_embedding.tensorflow import PartialEmbedding
        >>> layer = PartialEmbedding(5, 2, trainable_rows=[3], reserve_rows=[3, 4])
        >>> layer(np.array([[0, 3]])).shape
        TensorShape([1, 2, 2])
        >>> layer.unfreeze_rows([4])
        >>> layer.trainable_rows
        array([3, 4])
    """

    def __init__(
        self,
        input_dim: int,
        output_dim: int,
        *,
        trainable_rows: RowsLike = "all",
        reserve_rows: RowsLike | None = None,
        freeze_padding: bool = False,
        **kwargs: Any,
    ) -> None:
        check_flags(freeze_padding=freeze_padding)
        weights = kwargs.pop("weights", None)
        super().__init__(input_dim, output_dim, **kwargs)
        self.freeze_padding = freeze_padding
        # The rows by which the table grew last.
        self.new_rows: Ids | None = None
        # How often rows were set. What watches a run reads them again then: each read waits for
        # the device, and copies.
        self.times_set = 0
        # What a layer is built with. Once it is, its variables know which rows train.
        self._first_rows: Ids = self._resolve(trainable_rows)
        # Whether it was said which rows may train at any time.
        self.reserves_rows = reserve_rows is not None
        self._reserved: Ids = (
            self._first_rows if reserve_rows is None else self._resolve(reserve_rows)
        )
        self._check_reserved(self._first_rows)
        self._check_lora(bool(self.lora_rank), self._can_freeze)
        if weights is not None:
            self._build_of(weights if isinstance(weights, list) else [weights])

    @classmethod
    def from_matrix(
        cls,
        matrix: Any,
        *,
        trainable_rows: RowsLike = "all",
        reserve_rows: RowsLike | None = None,
        **kwargs: Any,
    ) -> PartialEmbedding:
        """Make a layer from a table.

        Args:
            matrix: The table, floating point, shape (V, D).
            trainable_rows: As in the constructor.
            reserve_rows: As in the constructor.
            **kwargs: All that `keras.layers.Embedding` takes but its shape.

        Raises:
            InputError: The table is no matrix of real numbers.

        Example:
            >>> layer = PartialEmbedding.from_matrix(np.eye(3), trainable_rows=[2])
            >>> layer.get_weights()[0][2]
            array([0., 0., 1.], dtype=float32)
        """
        try:
            # A tensor of TensorFlow is left where it is.
            given = matrix if hasattr(matrix, "dtype") else np.array(matrix)
        except ValueError:  # rows of several lengths
            given = np.array(None)
        shape, dtype = np.shape(given), tf.as_dtype(given.dtype)
        if len(shape) != 2 or not (dtype.is_floating or dtype.is_integer):
            raise InputError(
                "a table is a matrix of real numbers, of shape (V, D). Received the shape "
                f"{shape}, {dtype.name}. Reshape or convert it."
            )
        options = {"trainable_rows": trainable_rows, "reserve_rows": reserve_rows, **kwargs}
        return cls(shape[0], shape[1], weights=given, **options)

    @classmethod
    def from_layer(
        cls, layer: Any, *, trainable_rows: RowsLike = "all", reserve_rows: RowsLike | None = None
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
        if self.table_state is not None:
            return self.table_state.trainable_rows
        return self._first_rows.copy()

    @property
    def reserved_rows(self) -> Ids:
        """Ids of the rows that may train at any time: sorted, int64, shape (R,)."""
        return self._reserved.copy()

    def set_trainable_rows(
        self, rows: RowsLike, *, lr_scale: float = 1.0, warmup_steps: int = 0
    ) -> None:
        """Train these rows from the next step on, and no others.

        Args:
            rows: Rows in any form that `Rows.parse` reads.
            lr_scale: The factor on the learning rate of those of them that join, above 0, for as
                long as they train. Rows that made a step already keep theirs.
            warmup_steps: The steps over which the rate of those that join rises to the full one.

        Raises:
            InputError: A row is not reserved, the layer is plain, or rows are to have a rate of
                their own that no optimizer keeps.

        Example:
            >>> layer = PartialEmbedding(5, 2, trainable_rows=[3], reserve_rows="all")
            >>> layer.set_trainable_rows(range(3))
            >>> layer.trainable_rows
            array([0, 1, 2])
        """
        after = self.check_trainable_rows(rows)
        self._train(after, after, RateScale(lr_scale, warmup_steps))

    def _train(self, after: Ids, begin: Ids, rate_scale: RateScale) -> None:
        """Train `after`; those of `begin` that made no step yet begin at this rate."""
        state = self.table_state
        if not rate_scale.is_plain and (state is None or state.optimizer is None):
            raise InputError(
                "a learning rate of rows is what rowwise(optimizer) keeps, once it is built. "
                f"Received: {rate_scale} for {self.name!r}, which none was built for. Make the "
                "layer with reserve_rows=, and call optimizer.build(model.trainable_variables) "
                "first."
            )
        if state is not None:
            state.move(after, begin, rate_scale)
        self._first_rows = after
        self.times_set += 1

    def check_trainable_rows(self, rows: RowsLike) -> Ids:
        """Refuse rows that `set_trainable_rows` would refuse, and change nothing.

        Args:
            rows: Rows in any form that `Rows.parse` reads.

        Returns:
            Their ids: sorted, int64, shape (K,).

        Raises:
            InputError: A row is not reserved, or the layer was built as a plain one, or it has LoRA
                or is quantized.

        Example:
            >>> PartialEmbedding(5, 2, reserve_rows="all").check_trainable_rows(range(2))
            array([0, 1])
        """
        after = self._resolve(rows)
        self.check_kind(after)
        self._check_reserved(after)
        if self.built and self.table_state is None and after.size != self._first_rows.size:
            raise InputError(
                "rows of a table that was built with every row trainable and none reserved cannot "
                f"be frozen: it is a plain one. Received a wish to train {after.size} of "
                f"{self.input_dim} rows. Make the layer with reserve_rows='all'."
            )
        return after

    def check_kind(self, rows: Ids) -> None:
        """Refuse rows, by their ids, in a table that trains as a whole or not at all.

        Raises:
            InputError: The layer has LoRA and these are not all rows, or it is quantized.
        """
        if self.quantization_mode and rows.size:
            raise InputError(
                "no row of a quantized table trains. Received a wish to train "
                f"{rows.size} of {self.name!r}. Train first, and quantize for inference."
            )
        self._check_lora(bool(self.lora_rank), rows.size != self.input_dim)

    def unfreeze_rows(
        self, rows: RowsLike, *, lr_scale: float = 1.0, warmup_steps: int = 0
    ) -> None:
        """Train these rows too, from the next step on.

        Args:
            rows: Rows in any form that `Rows.parse` reads.
            lr_scale: As for `set_trainable_rows`.
            warmup_steps: As for `set_trainable_rows`.

        Raises:
            InputError: As for `set_trainable_rows`.

        Example:
            >>> layer = PartialEmbedding(5, 2, trainable_rows=[3], reserve_rows="all")
            >>> layer.unfreeze_rows([1])
            >>> layer.trainable_rows
            array([1, 3])
        """
        ids = self._resolve(rows)
        after = self.check_trainable_rows(np.union1d(self.trainable_rows, ids))
        self._train(after, ids, RateScale(lr_scale, warmup_steps))

    def freeze_rows(self, rows: RowsLike) -> None:
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
        after = self.check_trainable_rows(np.setdiff1d(self.trainable_rows, ids))
        self._train(after, ids[:0], RateScale())

    def reserve_rows(self, rows: RowsLike) -> None:
        """Let these rows train at any time and no others; what trains now and is not of them stops.

        The variables are others afterwards, so this comes before an optimizer is built for them and
        before a function is traced with them, which fails from then on.

        Args:
            rows: Rows in any form that `Rows.parse` reads.

        Raises:
            InputError: The layer has LoRA or is quantized.

        Example:
            >>> layer = PartialEmbedding(5, 2)
            >>> layer.reserve_rows([1, 3])
            >>> layer.freeze_rows([1])
            >>> layer.trainable_rows, layer.reserved_rows
            (array([3]), array([1, 3]))
        """
        reserved = self._resolve(rows)
        self.check_kind(reserved)
        self._check_lora(bool(self.lora_rank), True)
        self._first_rows = np.intersect1d(self.trainable_rows, reserved)
        is_other = not np.array_equal(reserved, self._reserved)
        self._reserved, self.reserves_rows = reserved, True
        if self.built and (is_other or self.table_state is None):
            # Keras lets no layer that is built make variables.
            self._tracker.unlock()
            self._split(reserved, self._first_rows)
            self._tracker.lock()

    def grow(self, rows: Any, trainable: bool) -> None:
        """Add rows, of shape (n, D), that train or not; for `grow_table`, which knows the model.

        Raises:
            InputError: They are not to train, and the layer can freeze none.
        """
        if self.built and self.table_state is None and not trainable:
            raise InputError(
                "rows of a table that was built with every row trainable and none reserved cannot "
                "be frozen. Received trainable=False. Make the layer with reserve_rows='all'."
            )
        (matrix,) = self.get_weights()
        before = self.input_dim
        self.input_dim = before + len(rows)
        self.earlier_sizes += (before,)
        self.new_rows = np.arange(before, self.input_dim, dtype=np.int64)
        trained = self.trainable_rows
        self._first_rows = np.append(trained, self.new_rows) if trainable else trained
        self._reserved = np.append(self._reserved, self.new_rows)
        self._tracker.unlock()
        state = self.table_state
        self._drop(self._embeddings, *([] if state is None else [state.rows, state.unfrozen]))
        self.table_state, self.built = None, False
        self._build_of([np.concatenate([matrix, rows.astype(matrix.dtype)])])

    @property
    def rows_variable(self) -> Any:
        """The variable that optimizers step: of the reserved rows, or of a plain table."""
        return self._embeddings if self.table_state is None else self.table_state.rows

    def build(self, input_shape: Any = None) -> None:
        """Make the variables: one for a plain table, three for a split one.

        Raises:
            InputError: Variables are to be laid out over devices, which Keras does not do here.
        """
        is_plain = self._first_rows.size == self.input_dim and not self.reserves_rows
        if self.built or self.quantization_mode or is_plain:
            super().build(input_shape)
            return
        if isinstance(keras.distribution.distribution(), keras.distribution.ModelParallel):
            raise InputError(
                "a table lies whole on each device. Received keras.distribution.ModelParallel, "
                "which on TensorFlow Keras accepts and does not follow. Call "
                "keras.distribution.set_distribution(None), and take "
                "tf.distribute.MirroredStrategy."
            )
        # A model without a fixed input is built while its first step is traced, and XLA cannot
        # lift the second variable, which begins with rows of the first, out of that.
        with tf.init_scope():
            self._split(self._reserved, self._first_rows)
        self.built = True

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
        if self.table_state is not None:
            return self.table_state.look_up(ids)
        # Not `keras.ops.take`, which copies the whole table once a row of it has been assigned.
        return tf.gather(self._embeddings.value, ids)

    def get_config(self) -> dict[str, Any]:
        """The constructor's arguments, with the rows that train now."""
        rows = self.trainable_rows
        is_default = not self.reserves_rows and np.array_equal(self._reserved, rows)
        return {
            **super().get_config(),
            "trainable_rows": compact(rows, self.input_dim),
            "freeze_padding": self.freeze_padding,
            "reserve_rows": None if is_default else compact(self._reserved, self.input_dim),
        }

    def enable_lora(self, rank: int, *args: Any, **kwargs: Any) -> None:
        """Train a low-rank change of every row, which only a table with no frozen row allows."""
        self._check_lora(True, self._can_freeze)
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
        if self.table_state is not None:
            self._merge()
        super().quantize(mode, type_check=False, config=config)
        self._first_rows = self._reserved = np.zeros(0, np.int64)
        self.reserves_rows = False

    def _resolve(self, rows: RowsLike) -> Ids:
        ids = Rows.parse(rows).resolve(self.input_dim, new=self.new_rows)
        return ids[ids != 0] if self.freeze_padding else ids

    def _check_reserved(self, rows: Ids) -> None:
        if (beyond := np.setdiff1d(rows, self._reserved, assume_unique=True)).size:
            raise InputError(
                f"trainable rows are among the {self._reserved.size} reserved ones. Received: "
                f"{beyond[0]}{f' and {beyond.size - 1} more' if beyond.size > 1 else ''}. "
                "Make the layer with reserve_rows= all rows that will ever train."
            )

    @property
    def _can_freeze(self) -> bool:
        return self.reserves_rows or self._first_rows.size != self.input_dim

    def _check_lora(self, has_lora: bool, freezes: bool) -> None:
        if has_lora and freezes and not self.quantization_mode:
            raise InputError(
                "LoRA adds a change of low rank to every row of a table, frozen ones too. Received "
                "a wish for it on a table of which only reserved rows may train. Use "
                "keras.layers.Embedding for LoRA, or leave it out."
            )


# Keras finds a layer in a weight file by its class's name, in snake case and numbered. Under the
# parent's name, files of plain models fit and plain models load the files of partial ones.
PartialEmbedding.__name__ = keras.layers.Embedding.__name__
PartialEmbedding.__module__ = "partial_embedding.tensorflow"
