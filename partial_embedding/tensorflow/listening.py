"""Hearing what a training step of Keras looks up, and which gradients it makes.

`fit` shows callbacks neither of them. Each step is traced once and then runs without Python, so
what hears it is part of the traced step, where it does nothing until a variable says that it
should; nothing is traced again when it does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import numpy as np
import tensorflow as tf
from numpy.typing import NDArray

from partial_embedding.rows.vocabulary import Ids
from partial_embedding.tensorflow.adapter import innermost
from partial_embedding.tensorflow.embedding import PartialEmbedding
from partial_embedding.tensorflow.sparse_update import summed


class Heard:
    """What was heard of one table, in variables that neither layer nor model knows of.

    Args:
        layer: The table, built.
    """

    def __init__(self, layer: PartialEmbedding) -> None:
        self.layer = layer
        self.weights = layer._embeddings if layer._split is None else layer._split.weights
        self._tokens = tf.Variable([0, 0], trainable=False, dtype=tf.int64)
        self._squares = tf.Variable(tf.zeros(self.weights.shape[0]), trainable=False)
        self._is_stepped = tf.Variable(False, trainable=False)

    def forget(self) -> None:
        """Begin again."""
        self._tokens.assign([0, 0])
        self._is_stepped.assign(False)

    def note_lookup(self, ids: Any) -> None:
        """Count the tokens of a lookup.

        Args:
            ids: Integers in [0, V), any shape.
        """
        split = self.layer._split
        # Without a split, all rows train or none.
        some = self.layer._live.size > 0
        trains = tf.fill(tf.shape(ids), some) if split is None else tf.gather(split.slots, ids) >= 0
        has_padding = self.layer.freeze_padding or self.layer.mask_zero
        is_token = ids != 0 if has_padding else tf.fill(tf.shape(ids), True)
        counted = [tf.math.count_nonzero(chosen) for chosen in (trains & is_token, is_token)]
        self._tokens.assign_add(tf.stack(counted))

    def note_gradient(self, gradient: Any) -> None:
        """Sum the squares of each row's gradient.

        Args:
            gradient: Dense or `tf.IndexedSlices`, of the shape of the table's trainable variable.
        """
        if isinstance(gradient, tf.IndexedSlices):
            num_rows = self.weights.shape[0]
            gradient = summed(gradient, num_rows)
            places = tf.where(gradient.indices < num_rows, gradient.indices, -1)
            squares = tf.math.unsorted_segment_sum(_squares(gradient.values), places, num_rows)
        else:
            squares = _squares(gradient)
        self._squares.assign(squares)
        self._is_stepped.assign(True)

    def token_share(self) -> float | None:
        """The share of the tokens, without padding, whose rows train; None if there were none."""
        training, tokens = self._tokens.numpy().tolist()
        return training / tokens if tokens else None

    def row_squares(self) -> tuple[Ids, NDArray[np.float32]] | None:
        """The rows whose gradient is not zero, and the sums of its squares.

        Returns:
            Sorted ids, int64, shape (n,), and float32, shape (n,); None if there was no step.
        """
        if not self._is_stepped.numpy():
            return None
        squares = self._squares.numpy()
        slots = np.flatnonzero(squares)
        return self.layer._reserved[slots], squares[slots]


class StepListener:
    """The training function of a model, which also hears the steps that it is asked to.

    What is heard are the ids of every lookup, and the gradients where Keras clips them: unscaled,
    averaged over accumulated batches, and only of steps that the optimizer makes. An optimizer that
    does all that otherwise is not heard, nor are several replicas. While the model trains, this
    stands in for its `train_function`; its layers and its optimizer are as they were but while a
    step is traced. Of several listeners of a model, the one that was attached last hears.

    Args:
        model: A compiled model.
        layers: Those of its tables that are listened to, built.

    Example:
        >>> import keras
        >>> layer = PartialEmbedding.from_matrix(np.eye(4), trainable_rows=[1])
        >>> model = keras.Sequential([layer])
        >>> model.compile("sgd", "mse")
        >>> listener = StepListener(model, [layer])
        >>> model.make_train_function()
        >>> listener.attach()
        >>> listener.is_due = True
        >>> _ = model.fit(np.array([[0, 1, 2, 3]]), np.zeros((1, 4, 4)), verbose=0)
        >>> listener.detach()
        >>> heard = listener.heard[0]
        >>> heard.token_share(), heard.row_squares() is None
        (0.25, False)
    """

    def __init__(self, model: Any, layers: Iterable[PartialEmbedding]) -> None:
        self.model = model
        self.is_due = False
        self.heard = [Heard(layer) for layer in layers]
        self._listens = tf.Variable(False, trainable=False)
        self._train_step: Any = None
        self._own: Any = None
        self._function: Any = None

    def attach(self) -> None:
        """Stand in for the model's training function from now on."""
        model, found = self.model, self.model.train_function
        if model.distribute_strategy.num_replicas_in_sync > 1:
            return
        # One that an exception left behind.
        self._own = found._own if isinstance(found, StepListener) else found
        self._train_step = model.train_step
        with _replaced(model, "train_step", self._step):
            model.make_train_function(force=True)
        self._function, model.train_function = model.train_function, self

    def detach(self) -> None:
        """Give the model its own training function back, with all that it has traced."""
        if self.model.train_function is self:
            self.model.train_function = self._own

    def __call__(self, iterator: Any) -> Any:
        """Train on the batches of one execution, and hear them if that is due."""
        if self.is_due:
            for heard in self.heard:
                heard.forget()
            self._listens.assign(True)
        try:
            return self._function(iterator)
        except (StopIteration, tf.errors.OutOfRangeError):  # an epoch of unknown length ended
            raise
        except BaseException:  # an interrupt too: `fit` then ends without a word to callbacks
            self.detach()
            raise
        finally:
            if self.is_due:
                self._listens.assign(False)

    # While a step is traced, or made eagerly

    def _step(self, data: Any) -> Any:
        with ExitStack() as stack:
            for heard in self.heard:
                look_up = partial(self._look_up, heard, heard.layer.rows)
                stack.enter_context(_replaced(heard.layer, "rows", look_up))
            optimizer = innermost(self.model.optimizer)
            apply = partial(self._apply, optimizer, optimizer._backend_apply_gradients)
            stack.enter_context(_replaced(optimizer, "_backend_apply_gradients", apply))
            return self._train_step(data)

    def _look_up(self, heard: Heard, look_up: Callable[[Any], Any], ids: Any) -> Any:
        tf.cond(self._listens, lambda: heard.note_lookup(ids), lambda: None)
        return look_up(ids)

    def _apply(self, optimizer: Any, apply: Any, gradients: Any, variables: Any) -> None:
        clip = optimizer._clip_gradients

        def listen_and_clip(gradients: Any) -> Any:
            own = [
                (heard, gradient)
                for heard in self.heard
                for gradient, variable in zip(gradients, variables, strict=True)
                if variable is heard.weights
            ]

            def note() -> None:
                for heard, gradient in own:
                    heard.note_gradient(gradient)

            if own:
                tf.cond(self._listens, note, lambda: None)
            return clip(gradients)

        with _replaced(optimizer, "_clip_gradients", listen_and_clip):
            apply(gradients, variables)


def _squares(gradients: Any) -> Any:
    return tf.reduce_sum(tf.square(tf.cast(gradients, tf.float32)), axis=1)


@contextmanager
def _replaced(owner: Any, name: str, method: Any) -> Iterator[None]:
    """Give an object another method for a while, unknown to what tracks its attributes."""
    own = vars(owner)
    before = {name: own[name]} if name in own else {}
    own[name] = method
    try:
        yield
    finally:
        del own[name]
        own.update(before)
