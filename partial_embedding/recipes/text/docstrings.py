"""Real text that is on every machine with Python: the docstrings of its standard library."""

import importlib
import inspect
import json
import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from types import ModuleType

from partial_embedding.errors import InputError
from partial_embedding.recipes.text.labelled import LabelledTexts, labelled, share_of

_SENTENCE_END = re.compile(r"(?<=[.!?]) (?=[A-Z(\"'])")
_PLAIN_WORD = re.compile(r"[A-Za-z]{2,}")

_DOCUMENTED_MODULES = """
    codecs collections configparser decimal difflib doctest email.message enum http.cookiejar
    imaplib inspect io ipaddress logging mailbox re shutil smtplib socket statistics tarfile
    threading unittest.mock xml.etree.ElementTree
"""
_MOST_PER_MODULE = 150


def stdlib_docstrings() -> LabelledTexts:
    """Give sentences from the standard library's documentation, labelled by module.

    A small data set that every Python has: which of some twenty modules does this sentence
    document? The text changes a little with the version of Python. Sentences that occur in two
    modules are left out, and no module has more than 150. The order is always the same.

    Raises:
        InputError: Python runs without docstrings (`-OO`).

    Example:
        >>> sentences = stdlib_docstrings()
        >>> len(sentences) > 2000, "threading" in sentences.names
        (True, True)
    """
    if sys.flags.optimize >= 2:
        raise InputError(
            "the texts are docstrings. Received: Python's option -OO, which strips them. Run "
            "without it, or name a file."
        )
    pieces = _pieces_in_a_fresh_process()
    modules_with = Counter(piece for found in pieces.values() for piece in found)
    pairs = []
    for name, found in pieces.items():
        own = [piece for piece in found if modules_with[piece] == 1]
        # Ordered by a number of their own: that of `split` would favour one of its sides.
        own.sort(key=lambda piece: share_of(0, f"a docstring: {piece}"))
        pairs += [(piece, name) for piece in own[:_MOST_PER_MODULE]]
    return labelled(pairs)


def _pieces_in_a_fresh_process() -> dict[str, list[str]]:
    """The sentences of each module, before anybody changed it.

    Frameworks put functions of their own into modules such as `inspect` and `logging`, so that the
    same code would find other sentences beside torch than beside TensorFlow.
    """
    code = f"from {__name__} import print_pieces; print_pieces()"
    done = subprocess.run(
        [sys.executable, "-c", code],
        stdout=subprocess.PIPE,
        check=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    pieces: dict[str, list[str]] = json.loads(done.stdout)
    return pieces


def print_pieces() -> None:
    """Print the sentences of each documented module, as JSON."""
    json.dump({name: sorted(_pieces_of(name)) for name in _DOCUMENTED_MODULES.split()}, sys.stdout)


def _pieces_of(module_name: str) -> set[str]:
    try:
        module = importlib.import_module(module_name)
    except ImportError:  # Some builds of Python leave out a module.
        return set()
    return {
        piece
        for docstring in _docstrings(module)
        for paragraph in re.split(r"\n\s*\n", inspect.cleandoc(docstring))
        if ">>>" not in paragraph
        for piece in _SENTENCE_END.split(" ".join(paragraph.split()))
        if sum(bool(_PLAIN_WORD.search(word)) for word in piece.split()) >= 4
    }


def _docstrings(module: ModuleType) -> Iterator[str]:
    # Written in C or not, `decimal` and `_decimal` are one module to its readers.
    homes = {module.__name__, f"_{module.__name__}"}
    found: list[object] = [module]
    for value in vars(module).values():
        if getattr(value, "__module__", None) in homes:
            found.append(value)
            if isinstance(value, type):
                found += vars(value).values()
    for value in found:
        docstring = getattr(value, "__doc__", None)
        # An instance shows the docstring of its class, which may come from another module.
        if isinstance(docstring, str) and docstring != type(value).__doc__:
            yield docstring
