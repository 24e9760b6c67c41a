"""From texts to tokens, and from tokens to a vocabulary."""

import re
from collections import Counter
from collections.abc import Iterable, Sequence

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

    Example:
        >>> tokenize("It isn't a feel-good film ... it's 3.5 stars!")
        ['it', 'is', "n't", 'a', 'feel-good', 'film', '...', 'it', "'s", '3.5', 'stars', '!']
    """
    if lowercase:
        text = text.lower()
    return _TOKEN.findall(text.replace("\u2019", "'"))


def count_tokens(documents: Iterable[Sequence[str]], min_count: int = 1) -> Vocabulary:
    """Make a vocabulary of the tokens that occur in documents, the most frequent ones first.

    `<pad>` and `<unk>` come before them, equally frequent ones in the order of the alphabet; those
    that occur fewer than `min_count` times are left out. None at all is refused.

    Example:
        >>> vocabulary = count_tokens([["b", "a"], ["c", "a"]])
        >>> vocabulary.tokens, vocabulary.counts.tolist()
        (('<pad>', '<unk>', 'a', 'b', 'c'), [0, 0, 2, 1, 1])
    """
    counter = Counter(token for document in documents for token in document)
    del counter[PADDING], counter[UNKNOWN]
    kept = [(token, count) for token, count in counter.items() if count >= min_count]
    if not kept:
        raise InputError(
            f"at least one token occurs min_count={min_count} times. Received: "
            f"{len(counter)} different tokens, the most frequent "
            f"{max(counter.values(), default=0)} times. Lower min_count, or add documents."
        )
    tokens, counts = zip(*sorted(kept, key=lambda pair: (-pair[1], pair[0])), strict=True)
    return Vocabulary([PADDING, UNKNOWN, *tokens], [0, 0, *counts])
