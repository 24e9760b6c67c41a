"""Labelled texts for both frameworks' recipes: read, split, tokenize, count."""

from partial_embedding.recipes.text.docstrings import stdlib_docstrings
from partial_embedding.recipes.text.labelled import LabelledTexts, split
from partial_embedding.recipes.text.reading import read_labelled, read_texts
from partial_embedding.recipes.text.tokens import PADDING, UNKNOWN, count_tokens, tokenize

__all__ = [
    "PADDING",
    "UNKNOWN",
    "LabelledTexts",
    "count_tokens",
    "read_labelled",
    "read_texts",
    "split",
    "stdlib_docstrings",
    "tokenize",
]
