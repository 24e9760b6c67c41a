"""From texts to tokens, from tokens to a vocabulary and to rows of a table."""

import re
import reprlib
from collections import Counter
from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from partial_embedding.errors import InputError
from partial_embedding.rows.vocabulary import Vocabulary

PADDING = "<pad>"
UNKNOWN = "<unk>"

# Marks that belong to the letter before them, which `\w` leaves out: Latin, Hebrew, Arabic, the
# scripts of India, Thai. Without them a Hindi word would fall apart at each of its vowels.
_MARKS = "\u0300-\u036f\u0591-\u05bd\u064b-\u065f\u0900-\u0963\u0966-\u0dff\u0e31-\u0e4e"
_WORD = rf"\w[\w{_MARKS}]*"
_TOKEN = re.compile(
    rf"""
    <\w+>                           # marks such as <unk> or <user>
    | n't\b                         # the negation that stands alone in tokenized text,
    | {_WORD}?(?=n't\b)             # and the word before it: do|n't
    | '(?:s|re|ve|ll|d|m)\b         # it|'s, we|'ll
    | \d+(?:[.,]\d+)+               # 3.5, 1,000
    | {_WORD}(?:-{_WORD})*          # words, coming-of-age
    | \.\.+ | --+                   # an ellipsis, a dash
    | \S                            # any other character by itself
    """,
    re.VERBOSE | re.IGNORECASE,
)


def tokenize(text: str, lowercase: bool = True) -> list[str]:
    """Cut a text into words, numbers and punctuation.

    Words keep inner hyphens (`coming-of-age`); `n't` and `'s`, `'re`, `'ve`, `'ll`, `'d`, `'m` are
    tokens of their own, as in the vocabularies of GloVe; so are marks such as `<user>`. Runs of
    dots and of dashes stay together, every other character stands alone. Text that was cut this
    way before passes unchanged. The typographic apostrophe becomes the plain one.

    Args:
        text: The text.
        lowercase: Whether to lower-case it first, as most word vectors need.

    Returns:
        The tokens in order, none of which contains whitespace.

    Example:
        >>> tokenize("It isn't a feel-good film ... it's 3.5 stars!")
        ['it', 'is', "n't", 'a', 'feel-good', 'film', '...', 'it', "'s", '3.5', 'stars', '!']
    """
    if lowercase:
        text = text.lower()
    return _TOKEN.findall(text.replace("\u2019", "'"))


def count_tokens(
    documents: Iterable[Sequence[str]],
    min_count: int = 1,
    max_size: int | None = None,
    specials: Sequence[str] = (PADDING, UNKNOWN),
) -> Vocabulary:
    """Make a vocabulary of the tokens that occur in documents, the most frequent ones first.

    Args:
        documents: The tokens of each document.
        min_count: Leave out tokens that occur fewer times than this, at least 1.
        max_size: Keep no more rows than this, `specials` included; None keeps all.
        specials: Tokens of the first rows, with count 0.

    Returns:
        `specials`, then the tokens by falling frequency, equally frequent ones alphabetically,
        with their counts.

    Raises:
        InputError: A document is a string, a number is out of range, or no token is left.

    Example:
        >>> vocabulary = count_tokens([["b", "a"], ["c", "a"]])
        >>> vocabulary.tokens, vocabulary.counts.tolist()
        (('<pad>', '<unk>', 'a', 'b', 'c'), [0, 0, 2, 1, 1])
    """
    if min_count < 1:
        raise InputError(f"min_count is at least 1. Received: {min_count}. 1 keeps every token.")
    if max_size is not None and max_size <= len(specials):
        raise InputError(
            f"max_size leaves room beyond the {len(specials)} special tokens. Received: "
            f"{max_size}. Raise it, or pass None."
        )
    counter: Counter[str] = Counter()
    for document in documents:
        if isinstance(document, str):
            raise InputError(
                "a document is a list of tokens. Received the string "
                f"{reprlib.repr(document)}. Tokenize it first."
            )
        counter.update(document)
    for special in specials:
        counter.pop(special, None)
    ranked = sorted(
        ((token, count) for token, count in counter.items() if count >= min_count),
        key=lambda pair: (-pair[1], pair[0]),
    )
    if max_size is not None:
        ranked = ranked[: max_size - len(specials)]
    if not ranked:
        raise InputError(
            f"at least one token occurs min_count={min_count} times. Received: "
            f"{len(counter)} different tokens, the most frequent "
            f"{max(counter.values(), default=0)} times. Lower min_count, or add documents."
        )
    return Vocabulary(
        [*specials, *(token for token, _ in ranked)],
        counts=[0] * len(specials) + [count for _, count in ranked],
    )


def encode(tokens: Sequence[str], vocabulary: Vocabulary, max_length: int) -> list[int]:
    """Give the row of each token; tokens without one get the row of `<unk>`.

    Args:
        tokens: The tokens of one document.
        vocabulary: The tokens of the table's rows.
        max_length: Cut the document after this many tokens, at least 1.

    Returns:
        At most `max_length` ids of rows.

    Raises:
        InputError: `max_length` is below 1, or a token is unknown and there is no `<unk>`.

    Example:
        >>> encode(["a", "zyzzyva", "a"], Vocabulary(["<pad>", "<unk>", "a"]), max_length=2)
        [2, 1]
    """
    if max_length < 1:
        raise InputError(f"max_length is at least 1. Received: {max_length}.")
    index = vocabulary.index
    unknown = index.get(UNKNOWN)
    rows: list[int] = []
    for token in tokens[:max_length]:
        row = index.get(token, unknown)
        if row is None:
            raise InputError(
                f"each token has a row. Received {reprlib.repr(token)}, which has none. Add "
                f"{UNKNOWN!r} to the vocabulary."
            )
        rows.append(row)
    return rows


def pad(
    sequences: Sequence[Sequence[int]], padding: int = 0, min_length: int = 1
) -> NDArray[np.int64]:
    """Put sequences of different lengths into one array, filled up at the end.

    Args:
        sequences: The ids of each document.
        padding: The id that fills up.
        min_length: The least number of columns, for example the width of a convolution.

    Returns:
        The ids, shape (len(sequences), max(min_length, longest)), int64.

    Example:
        >>> pad([[5, 6, 7], [8]]).tolist()
        [[5, 6, 7], [8, 0, 0]]
    """
    longest = max((len(sequence) for sequence in sequences), default=0)
    padded = np.full((len(sequences), max(min_length, longest)), padding, np.int64)
    for row, sequence in zip(padded, sequences, strict=True):
        row[: len(sequence)] = sequence
    return padded
