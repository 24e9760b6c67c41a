"""Keras's own tests of `keras.layers.Embedding`, with `PartialEmbedding` standing in for it."""

from typing import Any

import pytest

from partial_embedding.tensorflow import PartialEmbedding

suite = pytest.importorskip("keras.src.layers.core.embedding_test")

# Keras ships this many; fewer would mean that the suite was not found.
LEAST = 45


@pytest.fixture(autouse=True)
def standing_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(suite.layers, "Embedding", PartialEmbedding)


class TestStandingIn(suite.EmbeddingTest):  # type: ignore[misc, name-defined]
    pass


def test_the_suite_is_there() -> None:
    own: list[Any] = [name for name in dir(suite.EmbeddingTest) if name.startswith("test_")]
    assert len(own) >= LEAST
