"""Missing words first, in Keras: those without a pre-trained vector learn, later all do.

The data is made here: words are good, bad or neither, and a text has the sentiment of most of its
words. The vectors tell good from bad words; every second word has none.
"""

import keras
import numpy as np

from partial_embedding.callbacks.keras import RowUnfreezing
from partial_embedding.tensorflow import PartialEmbedding, rowwise

keras.utils.set_random_seed(0)
NUM_WORDS, WIDTH = 200, 16
random = np.random.default_rng(0)
sentiment = random.integers(-1, 2, NUM_WORDS)
missing = np.arange(0, NUM_WORDS, 2)
vectors = random.normal(size=(NUM_WORDS, WIDTH)).astype("float32")
vectors[:, 0] += 2 * sentiment
vectors[missing] *= 0.1

texts = random.integers(NUM_WORDS, size=(2000, 9))
labels = (sentiment[texts].sum(axis=1) > 0).astype("int32")
train, test = slice(0, 1600), slice(1600, None)

schedule = {"stages": [{"epoch": 0, "rows": missing}, {"epoch": 6, "rows": "all"}]}
table = PartialEmbedding.from_matrix(vectors)
model = keras.Sequential([table, keras.layers.GlobalAveragePooling1D(), keras.layers.Dense(2)])
model.compile(
    rowwise(keras.optimizers.AdamW(0.01)),  # rows that join late begin as if training had begun
    keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    metrics=["accuracy"],
)
model.fit(
    texts[train],
    labels[train],
    epochs=8,
    callbacks=[RowUnfreezing(schedule, audit=True)],
    verbose=0,
)

_, right = model.evaluate(texts[test], labels[test], verbose=0)
print(f"accuracy on texts not seen: {right:.1%}")
assert right > 0.8
