"""Texts with labels, and a split of them that stays the same."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from partial_embedding.errors import InputError


@dataclass(frozen=True, eq=False)
class LabelledTexts:
    """Texts, the class of each, and the names of the classes.

    Args:
        texts: One text per example.
        labels: The class of each text as an index into `names`, shape (N,), int64.
        names: The names of the classes, sorted.

    Raises:
        InputError: There is not one label per text, or a label is no index into `names`.

    Example:
        >>> films = LabelledTexts(("a joy", "a bore"), np.array([1, 0]), ("neg", "pos"))
        >>> len(films), films.names[films.labels[0]]
        (2, 'pos')
    """

    texts: tuple[str, ...]
    labels: NDArray[np.int64]
    names: tuple[str, ...]

    def __post_init__(self) -> None:
        if self.labels.shape != (len(self.texts),):
            raise InputError(
                f"each text has one label. Received: labels of shape {self.labels.shape} for "
                f"{len(self.texts)} texts. Pass one label per text."
            )
        wrong = self.labels[(self.labels < 0) | (self.labels >= len(self.names))]
        if wrong.size:
            raise InputError(
                f"labels must lie in [0, {len(self.names)}). Received: {wrong[0]}. Name every "
                "class."
            )

    def __len__(self) -> int:
        return len(self.texts)


def labelled(pairs: Sequence[tuple[str, str]]) -> LabelledTexts:
    """Gather texts with the names of their classes.

    Args:
        pairs: Texts with names.
    """
    names = tuple(sorted({name for _, name in pairs}))
    index = {name: label for label, name in enumerate(names)}
    return LabelledTexts(
        texts=tuple(text for text, _ in pairs),
        labels=np.array([index[name] for _, name in pairs], np.int64),
        names=names,
    )


def split(
    examples: LabelledTexts, validation_share: float = 0.15, seed: int = 0
) -> tuple[LabelledTexts, LabelledTexts]:
    """Divide examples into a training and a validation side by a hash of each text.

    Equal texts fall on the same side, and a text stays on its side when others are added, removed
    or moved.

    Args:
        examples: The examples to divide.
        validation_share: The expected share of the validation side, in (0, 1).
        seed: Another seed divides differently.

    Returns:
        The training side and the validation side, with the same `names`.

    Raises:
        InputError: The share does not lie in (0, 1), or leaves one side empty.

    Example:
        >>> from partial_embedding.recipes.text import stdlib_docstrings
        >>> training, validation = split(stdlib_docstrings(), validation_share=0.2)
        >>> set(training.texts).isdisjoint(validation.texts)
        True
    """
    if not 0 < validation_share < 1:
        raise InputError(
            f"validation_share must lie in (0, 1). Received: {validation_share}. 0.15 is usual."
        )
    held_out = np.array([share_of(seed, text) < validation_share for text in examples.texts], bool)
    training, validation = _select(examples, ~held_out), _select(examples, held_out)
    if not len(training) or not len(validation):
        raise InputError(
            f"both sides of a split have examples. Received: {len(training)} for training and "
            f"{len(validation)} for validation of {len(set(examples.texts))} different texts at "
            f"validation_share={validation_share}. Change the share or the seed, or add texts."
        )
    return training, validation


def _select(examples: LabelledTexts, chosen: NDArray[np.bool_]) -> LabelledTexts:
    return LabelledTexts(
        texts=tuple(examples.texts[i] for i in np.flatnonzero(chosen)),
        labels=examples.labels[chosen],
        names=examples.names,
    )


def share_of(seed: int, text: str) -> float:
    """Map a text to a number that is spread evenly over [0, 1).

    Args:
        seed: Another seed maps differently.
        text: Any text.
    """
    digest = hashlib.blake2b(f"{seed}\n{text}".encode(errors="surrogatepass"), digest_size=6)
    return int.from_bytes(digest.digest(), "big") / 2**48
