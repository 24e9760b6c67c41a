"""Tables that grow: new items, users and words get rows, and all else stays what it was."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from partial_embedding.errors import InputError, check_flags
from partial_embedding.rows.kinds import check_added
from partial_embedding.tensorflow.embedding import PartialEmbedding
from partial_embedding.tensorflow.models import forget_traced, tables_in
from partial_embedding.tensorflow.optimizer import steppers


def grow_table(
    model: Any, name: str, rows: int, init: Any = "mean", *, trainable: bool = True
) -> list[int]:
    """Give a table more rows at its end, for items, users or words that are new.

    Heads that read the layer's `embeddings` grow with it; a `Dense` layer with an output for each
    row does not. Old rows keep their values, go on training or not as they did, and keep the state
    that the model's optimizers have of them; with `rowwise`, the new rows begin as if training had
    just started. New rows are among the reserved ones. From here on `"new"` names them wherever
    rows are named, in schedules too, and weights from before the table grew can still be loaded,
    into its old rows.

    Variables of TensorFlow do not change their shape, so those of the layer, and the optimizers
    that are attributes of the model and step it, are others afterwards. `fit`, `evaluate` and
    `predict` know it; in a loop of your own take `model.optimizer` again, and make your
    `tf.function`s anew. What was traced before fails from then on, other models of the layer too,
    which are compiled again.

    Args:
        model: A built `keras.Model`, compiled or not.
        name: The name of the layer.
        rows: How many rows the table gets, from 1 up.
        init: What they begin from: `"mean"`, the mean of the rows that are there; vectors of shape
            (rows, D); or a Keras initializer, called with that shape.
        trainable: Train the new rows from here on. Otherwise they stay as they begin, until
            `unfreeze_rows` or a schedule trains them.

    Returns:
        The ids of the new rows.

    Raises:
        InputError: There is no such layer, the vectors do not fit, or the new rows of a layer in
            which none can be frozen are not to train. The model is then as it was.

    Example:
        >>> import keras
        >>> layer = PartialEmbedding(10, 4, trainable_rows="none", name="items")
        >>> model = keras.Sequential([keras.Input((1,)), layer])
        >>> grow_table(model, "items", rows=2)
        [10, 11]
        >>> layer.trainable_rows, layer.get_weights()[0].shape
        (array([10, 11]), (12, 4))
    """
    tables = tables_in(model)
    if name not in tables:
        raise InputError(
            f"a table is named as its layer. Received: {name!r}. Name one of {sorted(tables)}."
        )
    rows = check_added(rows)
    check_flags(trainable=trainable)
    layer = tables[name]
    if layer.lora_enabled or layer.quantization_mode:
        raise InputError(
            f"a table grows without LoRA and in full precision. Received {name!r}, which has LoRA "
            "or is quantized. Call grow_table before enable_lora and quantize."
        )
    begun = _begun(layer, rows, init)
    size, before = layer.input_dim, layer.rows_variable
    parts = (model, *model._flatten_layers())
    known = {id(one): one for part in parts for one in vars(part).values() if _steps(one, before)}
    # Optimizers and variables are made for the replicas that the model is on.
    with getattr(model, "distribute_strategy", tf.distribute.get_strategy()).scope():
        # Before anything changes, since Keras cannot make every optimizer anew.
        made = {key: _anew(one) for key, one in known.items()}
        layer.grow(begun, trainable)
        for key, one in made.items():
            _go_on(known[key], one, before, layer.rows_variable)
    for part in parts:
        for attribute, value in list(vars(part).items()):
            if id(value) in made:
                setattr(part, attribute, made[id(value)])
    forget_traced(model)
    return list(range(size, size + rows))


def _begun(layer: PartialEmbedding, rows: int, init: Any) -> Any:
    shape = (rows, layer.output_dim)
    if isinstance(init, str) and init == "mean":
        (matrix,) = layer.get_weights()
        return np.broadcast_to(matrix.mean(axis=0, dtype=np.float32), shape)
    begun = init(shape) if callable(init) else init
    try:
        values = np.asarray(begun)
    except ValueError:  # rows of several lengths
        values = np.asarray(None)
    if values.shape != shape or not np.can_cast(values.dtype, np.float32, "same_kind"):
        received = values.shape if values.size > 1 else repr(init)
        raise InputError(
            "init is 'mean', an initializer, or a vector for each new row, "
            f"{shape}. Received: {received}, {values.dtype}. 'mean' is the default."
        )
    return values


def _steps(value: Any, variable: Any) -> bool:
    """Whether a value is an optimizer that was built for a variable."""
    is_optimizer = isinstance(value, keras.optimizers.Optimizer)
    return is_optimizer and any(one is variable for one in value._trainable_variables)


def _anew(optimizer: Any) -> Any:
    """The same optimizer before it was built; `_go_on` gives it what configurations leave out."""
    try:
        with _without_rates(steppers(optimizer)):
            return type(optimizer).from_config(optimizer.get_config())
    except (TypeError, ValueError, NotImplementedError) as error:
        raise InputError(
            "an optimizer of a table that grows is made anew by from_config of its get_config. "
            f"Received a {type(optimizer).__name__}: {' '.join(str(error).split())}. Write these "
            "two methods, or call grow_table before compile."
        ) from error


@contextmanager
def _without_rates(optimizers: Iterator[Any]) -> Iterator[None]:
    """Within it, optimizers can be configured whose learning rate Keras cannot write down."""
    rates = [(one, one._learning_rate) for one in optimizers]
    rates = [(one, rate) for one, rate in rates if not isinstance(rate, keras.Variable)]
    for one, _ in rates:
        one._learning_rate = None
    try:
        yield
    finally:
        for one, rate in rates:
            one._learning_rate = rate


def _go_on(optimizer: Any, made: Any, before: Any, after: Any) -> None:
    """Give an optimizer that was made anew the state of the old one, for a variable that grew."""
    made.build([after if one is before else one for one in optimizer._trainable_variables])
    for old, new in zip(steppers(optimizer), steppers(made), strict=True):
        if not isinstance(old._learning_rate, keras.Variable):
            new.learning_rate = old._learning_rate
        if excluded := getattr(old, "_exclude_from_weight_decay", None):
            keys = {old._var_key(before): old._var_key(after)}
            new._exclude_from_weight_decay = {keys.get(key, key) for key in excluded}
        new._exclude_from_weight_decay_pattern = getattr(
            old, "_exclude_from_weight_decay_pattern", None
        )
        if new.use_ema:
            averages = new._model_variables_moving_average
            for variable, average in zip(new._trainable_variables, averages, strict=True):
                average.assign(variable)  # of the new rows; Keras begins averages at 0
    # In the order in which both were built.
    for one, other in zip(optimizer.variables, made.variables, strict=True):
        value = one.value
        if one.shape != other.shape:
            value = tf.concat([value, other.value[one.shape[0] :]], axis=0)
        other.assign(value)
