"""On several devices replicas hold the same rows, and what Keras does not follow is refused."""

from collections.abc import Callable, Iterator
from typing import Any

import keras
import pytest

from partial_embedding import InputError
from partial_embedding.tensorflow import PartialEmbedding


@pytest.fixture
def model_parallel() -> Iterator[None]:
    mesh = keras.distribution.DeviceMesh((1, 1), ("batch", "model"), ["cpu:0"])
    layouts = keras.distribution.LayoutMap(mesh)
    layouts[".*embeddings"] = ("model", None)
    made = keras.distribution.ModelParallel(layout_map=layouts, batch_dim_name="batch")
    before = keras.distribution.distribution()
    keras.distribution.set_distribution(made)
    yield
    keras.distribution.set_distribution(before)


@pytest.mark.usefixtures("model_parallel")
def test_model_parallel_is_refused_when_a_partial_table_is_built() -> None:
    layer = PartialEmbedding(10, 4, trainable_rows=[2])
    with pytest.raises(InputError, match=r"ModelParallel.*set_distribution\(None\)"):
        layer.build()
    PartialEmbedding(10, 4).build()  # a plain table is as any other layer
    keras.distribution.set_distribution(None)
    layer.build()
    assert layer.trainable_rows.tolist() == [2]


@pytest.mark.parametrize(
    "optimizers", [("lazy Adam",), pytest.param((), id="all", marks=pytest.mark.full)]
)
def test_replicas_are_identical_after_every_unfreeze(
    optimizers: tuple[str, ...], start: Callable[..., Any]
) -> None:
    # In a process of its own, since logical devices are made before TensorFlow starts.
    run = start("run_mirrored.py", *optimizers)
    output, errors = run.communicate()
    assert run.returncode == 0, errors[-3000:]
    assert output.splitlines()[-1] == "replicas agree"
