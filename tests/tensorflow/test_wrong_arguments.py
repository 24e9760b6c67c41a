"""What is no model, and what is neither true nor false, is refused wherever it is taken."""

from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import pytest

from partial_embedding.errors import InputError
from partial_embedding.tensorflow import (
    PartialEmbedding,
    grow_table,
    plain_weights,
    rowwise,
    set_plain_weights,
)


def model_of() -> Any:
    layer = PartialEmbedding(4, 2, trainable_rows=[1], name="items")
    return keras.Sequential([keras.Input((1,)), layer])


TAKES_A_MODEL: dict[str, Callable[[Any], object]] = {
    "grow_table": lambda model: grow_table(model, "items", 1),
    "plain_weights": plain_weights,
    "set_plain_weights": lambda model: set_plain_weights(model, [np.ones((4, 2))]),
}


@pytest.mark.parametrize("call", TAKES_A_MODEL.values(), ids=TAKES_A_MODEL)
def test_what_is_no_model_is_refused(call: Callable[[Any], object]) -> None:
    for kind, wrong in (("str", "model"), ("SGD", keras.optimizers.SGD())):
        with pytest.raises(InputError, match=f"a keras.Model. Received a {kind}. Pass"):
            call(wrong)
    call(model_of())


def several() -> Any:
    return keras.optimizers.MultiOptimizer(keras.optimizers.OptimizerMap(keras.optimizers.SGD()))


TAKES_A_FLAG: dict[str, tuple[str, Callable[[Any], object]]] = {
    "rowwise": ("lazy", lambda flag: rowwise("sgd", lazy=flag)),
    "rowwise of several": ("lazy", lambda flag: rowwise(several(), lazy=flag)),
    "PartialEmbedding": ("freeze_padding", lambda f: PartialEmbedding(4, 2, freeze_padding=f)),
    "grow_table": ("trainable", lambda flag: grow_table(model_of(), "items", 1, trainable=flag)),
}


@pytest.mark.parametrize(("name", "call"), TAKES_A_FLAG.values(), ids=TAKES_A_FLAG)
def test_a_word_is_not_taken_for_true(name: str, call: Callable[[Any], object]) -> None:
    for wrong in ("no", 1, None):
        with pytest.raises(InputError, match=f"^{name} is True or False. Received: {wrong!r}."):
            call(wrong)
    for flag in (True, False):
        call(flag)


def test_a_table_grows_by_a_number_of_numpy() -> None:
    model = model_of()
    assert grow_table(model, "items", np.int64(2)) == [4, 5]  # type: ignore[arg-type]  # a number
    with pytest.raises(InputError, match="from 1 up"):
        grow_table(model, "items", np.bool_(True))  # type: ignore[arg-type]
