"""The cost of a step follows the reserved rows, not the vocabulary."""

from collections import Counter
from collections.abc import Iterator
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf

from partial_embedding.tensorflow import PartialEmbedding, rowwise
from partial_embedding.tensorflow.table_state import TableState

NUM_ROWS, WIDTH = 1000, 8


def operations_of(graph: Any) -> Iterator[Any]:
    """The operations of a graph, and of the branches in it."""
    for operation in graph.get_operations():
        yield operation
        for branch in ("then_branch", "else_branch"):
            if operation.type in ("If", "StatelessIf"):
                name = operation.get_attr(branch).name
                yield from operations_of(graph._get_function(name).graph)


def whole_table_operations(look_up: Any) -> list[str]:
    """The kinds of operation in a traced step whose result is as large as the table."""
    layer = PartialEmbedding(NUM_ROWS, WIDTH, trainable_rows=range(5))
    layer.build()
    optimizer = keras.optimizers.Adam()
    optimizer.build(layer.trainable_variables)
    ids = tf.constant(np.arange(100).reshape(10, 10))

    @tf.function
    def step() -> None:
        with tf.GradientTape() as tape:
            loss = tf.reduce_sum(look_up(layer, ids) ** 2)
        weights = layer.trainable_variables
        optimizer.apply_gradients(zip(tape.gradient(loss, weights), weights, strict=True))

    return whole_tables_of(step.get_concrete_function().graph)


def whole_tables_of(graph: Any) -> list[str]:
    return [
        operation.type
        for operation in operations_of(graph)
        for output in operation.outputs
        if output.shape.rank == 2 and output.shape[0] == NUM_ROWS
    ]


def test_no_operation_of_a_step_is_as_large_as_the_table() -> None:
    assert whole_table_operations(lambda layer, ids: layer(ids)) == []


def test_the_search_finds_an_operation_on_the_whole_table() -> None:
    found = whole_table_operations(lambda layer, ids: tf.gather(layer.embeddings, ids))
    assert "ReadVariableOp" in found


@pytest.mark.parametrize("lazy", [False, True])
def test_measuring_a_step_costs_a_question_until_it_is_due(lazy: bool) -> None:
    def graph(measured: bool) -> Any:
        layer = PartialEmbedding(NUM_ROWS, WIDTH, trainable_rows=range(5))
        model = keras.Sequential([keras.Input((10,), dtype="int64"), layer, keras.layers.Flatten()])
        model.compile(optimizer := rowwise(keras.optimizers.SGD(), lazy=lazy), "mse")
        optimizer.build(model.trainable_variables)
        if measured:
            optimizer.measure_gradients(False)
        data = tf.constant(np.arange(100).reshape(10, 10)), tf.zeros((10, 10 * WIDTH))
        return tf.function(model.train_step, autograph=False).get_concrete_function(data).graph

    measured, alone = graph(measured=True), graph(measured=False)
    assert whole_tables_of(measured) == []
    kinds, own = (Counter(o.type for o in g.get_operations()) for g in (measured, alone))
    # What it leads to is in a branch.
    assert (kinds - own)["If"] == 1
    assert set(kinds - own) <= {"If", "ReadVariableOp", "Placeholder", "Const", "Identity"}
    assert "Square" in [operation.type for operation in operations_of(measured)]


@pytest.mark.parametrize(("lazy", "reads"), [(False, [0, 1]), (True, [0, 0])])
def test_what_frozen_rows_keep_is_read_only_where_a_step_may_move_them(
    lazy: bool, reads: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []
    kept = TableState.kept
    layer = PartialEmbedding(NUM_ROWS, WIDTH, trainable_rows=range(5), reserve_rows=range(5))
    layer.build()
    optimizer = rowwise(keras.optimizers.SGD(), lazy=lazy)
    optimizer.build(weights := layer.trainable_variables)
    monkeypatch.setattr(TableState, "kept", lambda state: (calls.append(1), kept(state))[1])
    counts = []
    for rows in (range(5), range(4)):
        layer.set_trainable_rows(rows)
        calls.clear()
        with tf.GradientTape() as tape:
            loss = tf.reduce_sum(layer(np.arange(5)))
        # Not in a graph, where both branches of a question are traced.
        optimizer.apply(tape.gradient(loss, [v.value for v in weights]), weights)
        counts.append(len(calls))
    assert counts == reads
