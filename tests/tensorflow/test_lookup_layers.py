"""The vocabularies of Keras's own lookup layers: each token has the row that the layer gives it."""

from typing import Any

import keras
import pytest

from partial_embedding import InputError, Rows, Vocabulary


def _adapted() -> Any:
    layer = keras.layers.TextVectorization()
    layer.adapt(["the the the of of zyzzyva"])
    return layer


LAYERS: dict[str, tuple[Any, tuple[str, ...], list[Any]]] = {
    "lookup": (
        lambda: keras.layers.StringLookup(vocabulary=["the", "of"]),
        ("[UNK]", "the", "of"),
        ["the", "of"],
    ),
    "lookup_with_mask_and_several_rows_for_unknown_tokens": (
        lambda: keras.layers.StringLookup(
            vocabulary=["the", "of"], num_oov_indices=2, mask_token="<pad>"
        ),
        ("<pad>", "[UNK]", "<row 2>", "the", "of"),
        ["<pad>", "the", "of"],
    ),
    "integer_lookup": (
        lambda: keras.layers.IntegerLookup(vocabulary=[30, 7]),
        ("-1", "30", "7"),
        [30, 7],
    ),
    "text_vectorization": (
        _adapted,
        ("", "[UNK]", "the", "of", "zyzzyva"),
        ["the", "of", "zyzzyva"],
    ),
}


@pytest.mark.parametrize(("make", "tokens", "looked_up"), LAYERS.values(), ids=LAYERS)
def test_tokens_have_the_rows_that_the_layer_gives_them(
    make: Any, tokens: tuple[str, ...], looked_up: list[Any]
) -> None:
    layer = make()
    vocabulary = Vocabulary.of(layer, layer.vocabulary_size())
    assert vocabulary.tokens == tokens
    assert all(type(token) is str for token in vocabulary.tokens)
    with pytest.raises(
        InputError, match=rf"\[0, {len(tokens) - 1}\)\. Received: {len(tokens) - 1}"
    ):
        Vocabulary.of(layer, len(tokens) - 1)
    for token in looked_up:
        # One token a text; a lookup gives a row for each.
        (row,) = keras.ops.convert_to_numpy(layer([token])).flatten().tolist()
        assert Rows.parse({"tokens": [str(token)]}).resolve(len(tokens), vocabulary) == [row]
