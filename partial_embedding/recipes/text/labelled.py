"""Texts with labels, and a split of them that stays the same."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from partial_embedding.errors import InputError


@dataclass(frozen=True, eq=False)
class LabelledTexts:
    """Texts, the class of each as an index, shape (N,), and the names of the classes, sorted."""

    texts: tuple[str, ...]
    labels: NDArray[np.int64]
    names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.texts)


def labelled(pairs: Sequence[tuple[str, str]]) -> LabelledTexts:
    """Gather texts with the names of their classes, of which there is one at least."""
    texts, classes = zip(*pairs, strict=True)
    names, labels = np.unique(np.array(classes, object), return_inverse=True)
    return LabelledTexts(texts, labels.astype(np.int64), tuple(names))


def split(
    examples: LabelledTexts, validation_share: float = 0.15, seed: int = 0
) -> tuple[LabelledTexts, LabelledTexts]:
    """Divide examples into a training and a validation side, neither empty, by a hash of each text.

    Equal texts fall on the same side, and a text stays on its side when others are added, removed
    or moved.

    Example:
        >>> from partial_embedding.recipes.text import stdlib_docstrings
        >>> training, validation = split(stdlib_docstrings(), validation_share=0.2)
        >>> set(training.texts).isdisjoint(validation.texts)
        True
    """
    held_out = np.array(are_held_out(examples.texts, validation_share, seed), bool)
    texts, labels, names = np.array(examples.texts, object), examples.labels, examples.names
    training, validation = (
        LabelledTexts(tuple(texts[side]), labels[side], names) for side in (~held_out, held_out)
    )
    if not len(training) or not len(validation):
        raise InputError(
            f"both sides of a split have examples. Received: {len(training)} for training and "
            f"{len(validation)} for validation of {len(set(examples.texts))} different texts at "
            f"validation_share={validation_share}. Change the share or the seed, or add texts."
        )
    return training, validation


def are_held_out(texts: Sequence[str], share: float, seed: int) -> list[bool]:
    """Whether each of some texts is validated on."""
    if not 0 < share < 1:
        raise InputError(f"validation_share lies in (0, 1). Received: {share}. 0.15 is usual.")
    return [share_of(seed, text) < share for text in texts]


def share_of(seed: int, text: str) -> float:
    """Map a text to a number that is spread evenly over [0, 1)."""
    digest = hashlib.blake2b(f"{seed}\n{text}".encode(errors="surrogatepass"), digest_size=6)
    return int.from_bytes(digest.digest(), "big") / 2**48
