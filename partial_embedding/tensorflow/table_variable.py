"""What stands for a whole table where Keras and TensorFlow ask for one variable."""

from __future__ import annotations

from typing import Any

import keras
import tensorflow as tf
from keras.src.backend.common.variables import Variable

from partial_embedding.tensorflow.table_state import TableState


# Not `keras.Variable`, which layers and TensorFlow keep as a weight of whatever it is an attribute
# of, such as a head: the layer of the table keeps what is there.
class TableVariable(Variable, tf.__internal__.types.Tensor):
    """A view of shape (V, D) on the variables of a split table, used as a Keras variable is.

    It holds nothing itself: it is read from the frozen table and the reserved rows, and assigned to
    both. Its gradient is that of the reserved rows, as `tf.IndexedSlices`.
    """

    # For tapes, which take it for a variable then.
    _should_act_as_resource_variable = True

    # Not the parent's constructor, which would make a variable.
    def __init__(self, state: TableState, path: str) -> None:
        table = state.table
        self._state = state
        self._path, self._name = path, path.rsplit("/", 1)[-1]
        self._shape, self._ndim, self._dtype = table.shape, 2, table.dtype
        # What is asked of a variable. The reserved rows are what trains.
        self._trainable = self._overwrite_with_gradient = False
        self._autocast = True
        self._aggregation, self._synchronization = "none", "auto"
        self._regularizer = self._constraint = None

    @property
    def value(self) -> Any:
        """The whole table as a tensor."""
        return self._maybe_autocast(self._state.merged())

    def numpy(self) -> Any:
        """The whole table, shape (V, D)."""
        return self.value.numpy()

    def _direct_assign(self, value: Any) -> None:
        self._state.assign(tf.cast(value, self._dtype))

    def _convert_to_tensor(self, value: Any, dtype: Any = None) -> Any:
        return keras.ops.convert_to_tensor(value, dtype)

    def __tf_tensor__(self, dtype: Any = None, name: str | None = None) -> Any:
        return tf.convert_to_tensor(self.value, dtype, name=name)

    @property
    def _unique_id(self) -> Any:
        # By which optimizers know a variable that is excluded from weight decay.
        return self._state.rows.value._unique_id

    @property
    def handle(self) -> Any:
        """What tapes take for the variable."""
        return _GradientSource(self._state)


class _GradientSource(tf.__internal__.CompositeTensor):
    """Stands for a table where tapes ask what it is made of."""

    def __init__(self, state: TableState) -> None:
        self.state = state
        self.__composite_gradient__ = self

    @property
    def _type_spec(self) -> Any:  # abstract in TensorFlow's class
        raise NotImplementedError("tapes ask for the two methods below alone")

    def get_gradient_components(self, value: Any) -> Any:
        """The variable that is differentiated."""
        return self.state.rows.value.handle

    def replace_gradient_components(self, value: Any, gradient: Any) -> Any:
        """The gradient of the table, of that of the reserved rows."""
        return None if gradient is None else self.state.table_gradient(gradient)


class WeightList(list[Any]):
    """The weights of a layer that train, or the others.

    The sum of both, in which Keras's older `.h5` files hold a layer, is that of the plain layer:
    one table. This way either loads the other's.
    """

    def __init__(self, weights: list[Any], layer: Any) -> None:
        super().__init__(weights)
        self.layer = layer

    def __add__(self, other: Any) -> Any:
        is_whole = isinstance(other, WeightList) and other.layer is self.layer
        if is_whole and self.layer.table_state is not None:
            return [self.layer.embeddings]
        return super().__add__(other)
