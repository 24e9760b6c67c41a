"""What Keras accepts of several devices and does not follow is refused, with the way out."""

from collections.abc import Iterator

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
