"""Frozen rows keep their bits, and trainable rows train as if alone, under every Keras optimizer.

The reference is a variable of the reserved rows alone, stepped by the same optimizer with the
gradient that numpy sums, zero for rows that are not live, which are put back after each step.
"""

from collections.abc import Mapping
from functools import cache
from types import MappingProxyType
from typing import Any, NamedTuple

import keras
import numpy as np
import pytest
import tensorflow as tf
from cohorts import MATRIX, NUM_ROWS, RESERVED, batches, gradient, product

from partial_embedding.tensorflow import PartialEmbedding

# Two programs that differ elsewhere are fused, and so rounded, differently.
tf.config.optimizer.set_experimental_options({"disable_meta_optimizer": True})

OPTIMIZERS: dict[str, tuple[str, dict[str, Any]]] = {
    "SGD": ("SGD", {}),
    "SGD-momentum": ("SGD", {"momentum": 0.9}),
    "SGD-nesterov": ("SGD", {"momentum": 0.9, "nesterov": True}),
    "RMSprop": ("RMSprop", {}),
    "RMSprop-momentum": ("RMSprop", {"momentum": 0.9}),
    "RMSprop-centered": ("RMSprop", {"centered": True}),
    "Adam": ("Adam", {}),
    "Adam-amsgrad": ("Adam", {"amsgrad": True}),
    "AdamW": ("AdamW", {}),
    "Adamax": ("Adamax", {}),
    "Nadam": ("Nadam", {}),
    "Adagrad": ("Adagrad", {}),
    "Adadelta": ("Adadelta", {}),
    "Adafactor": ("Adafactor", {}),
    "Ftrl": ("Ftrl", {}),
    "Lion": ("Lion", {}),
    "Lamb": ("Lamb", {}),
    "Muon-adamw": ("Muon", {}),
    "Muon": ("Muon", {"exclude_embeddings": False}),
    "ScheduleFreeAdamW": ("ScheduleFreeAdamW", {"warmup_steps": 2}),
}


class Option(NamedTuple):
    """How a run differs from the plain one."""

    optimizer: Mapping[str, Any] = MappingProxyType({})
    compile: Mapping[str, Any] = MappingProxyType({})
    half: bool = False


OPTIONS = {
    "plain": Option(),
    "weight_decay": Option({"weight_decay": 0.1}),
    "use_ema": Option({"use_ema": True, "ema_overwrite_frequency": 2}),
    "clipnorm": Option({"clipnorm": 0.5}),
    "global_clipnorm": Option({"global_clipnorm": 0.5}),
    "clipvalue": Option({"clipvalue": 0.25}),
    "accumulation": Option({"gradient_accumulation_steps": 2}),
    "loss_scale_factor": Option({"loss_scale_factor": 8.0}),
    "mixed_float16": Option(half=True),
    "jit": Option(compile={"jit_compile": True}),
    "eager": Option(compile={"run_eagerly": True}),
}

# The rows that train at each step.
SCENARIOS = {
    "frozen_from_the_start": [[2, 7, 8]] * 5,
    "trained_then_frozen": [[1, 2, 7, 8]] * 3 + [[2, 7]] * 3,
    "unfrozen_late": [[2, 7]] * 3 + [[2, 5, 7, 11]] * 3,
}


def _cases() -> list[Any]:
    cases = []
    for i, optimizer in enumerate(OPTIMIZERS):
        for j, option in enumerate(OPTIONS):
            for k, scenario in enumerate(SCENARIOS):
                is_quick = (
                    option == "plain"
                    or (optimizer in ("SGD", "Adam") and (j + k) % 3 != 0)
                    or (i + j) % len(OPTIONS) == k == 0
                )
                marks = [] if is_quick else [pytest.mark.full]
                case = (optimizer, option, scenario)
                cases.append(pytest.param(*case, id="-".join(case), marks=marks))
    return cases


def _optimizer(name: str, option: Option) -> Any:
    kind, settings = OPTIMIZERS[name]
    made = getattr(keras.optimizers, kind)(learning_rate=0.05, **{**settings, **option.optimizer})
    return keras.optimizers.LossScaleOptimizer(made) if option.half else made


def _set(optimizer: Any, values: list[Any]) -> None:
    for variable, value in zip(optimizer.variables, values, strict=True):
        variable.assign(value)


# Traced once for all scenarios, which begin with what the variables held first.


@cache
def _partial(name: str, option: str) -> tuple[Any, list[Any]]:
    how = OPTIONS[option]
    dtype = "mixed_float16" if how.half else "float32"
    layer = PartialEmbedding.from_matrix(
        MATRIX, trainable_rows="none", reserve_rows=RESERVED, dtype=dtype
    )
    model = keras.Sequential([keras.Input((None,), dtype="int64"), layer])
    model.compile(_optimizer(name, how), loss=product, **how.compile)
    # Keras would build it inside the traced step, where ScheduleFreeAdamW loses its first state.
    model.optimizer.build(model.trainable_variables)
    return model, [v.numpy() for v in model.optimizer.variables]


def _train_partial(name: str, option: str, scenario: list[list[int]]) -> list[Any]:
    model, start = _partial(name, option)
    (layer,) = model.layers
    layer.set_trainable_rows(scenario[0])
    layer.set_weights([MATRIX])
    _set(model.optimizer, start)
    tables = [layer.get_weights()[0]]
    for rows, (ids, upstream) in zip(scenario, batches(), strict=False):
        layer.set_trainable_rows(rows)
        model.train_on_batch(ids, upstream)
        tables.append(layer.get_weights()[0])
    return tables


@cache
def _alone(name: str, option: str) -> tuple[Any, Any, list[Any], Any]:
    how = OPTIONS[option]
    optimizer = _optimizer(name, how)
    table = keras.Variable(MATRIX[RESERVED], name="embeddings")
    optimizer.build([table])

    def step(own: Any, live: Any) -> None:
        before = tf.identity(table.value)
        optimizer.apply([optimizer.scale_loss(own)], [table])
        table.assign(tf.where(live, table.value, before))

    if not how.compile.get("run_eagerly"):
        step = tf.function(step, jit_compile=how.compile.get("jit_compile"))
    return table, optimizer, [v.numpy() for v in optimizer.variables], step


def _train_alone(name: str, option: str, scenario: list[list[int]]) -> list[Any]:
    table, optimizer, start, step = _alone(name, option)
    table.assign(MATRIX[RESERVED])
    _set(optimizer, start)
    tables = [table.numpy()]
    for rows, batch in zip(scenario, batches(), strict=False):
        live = np.isin(RESERVED, rows)[:, np.newaxis]
        step(tf.constant(np.where(live, gradient(*batch)[RESERVED], 0)), tf.constant(live))
        tables.append(table.numpy())
    return tables


@pytest.mark.parametrize(("optimizer", "option", "scenario"), _cases())
def test_frozen_rows_keep_their_bits_and_others_train_as_if_alone(
    optimizer: str, option: str, scenario: str
) -> None:
    arguments = optimizer, option, SCENARIOS[scenario]
    partial, alone = _train_partial(*arguments), _train_alone(*arguments)

    for step, rows in enumerate(SCENARIOS[scenario]):
        frozen = np.setdiff1d(np.arange(NUM_ROWS), rows)
        assert partial[step + 1][frozen].tobytes() == partial[step][frozen].tobytes()
    moved = np.flatnonzero((partial[-1] != MATRIX).any(axis=1))
    assert set(moved) == set(np.concatenate(SCENARIOS[scenario]))
    for got, expected in zip(partial, alone, strict=True):
        # XLA fuses the two programs differently, which rounds differently.
        if option == "jit":
            np.testing.assert_allclose(got[RESERVED], expected, rtol=1e-5, atol=1e-7)
        else:
            assert got[RESERVED].tobytes() == expected.tobytes()
