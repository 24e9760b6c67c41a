"""Real text that is on every machine with Python: the docstrings of its standard library."""

import ast
import inspect
import re
from collections import Counter
from importlib import import_module

from partial_embedding.errors import InputError
from partial_embedding.recipes.text.labelled import LabelledTexts, labelled, share_of

_SENTENCE_END = re.compile(r"(?<=[.!?]) (?=[A-Z(\"'])")
_PLAIN_WORD = re.compile(r"[A-Za-z]{2,}")

_DOCUMENTED_MODULES = """
    codecs collections configparser difflib doctest email.message enum http.cookiejar http.server
    imaplib inspect ipaddress logging mailbox pdb pydoc shutil smtplib socket statistics tarfile
    threading unittest.mock urllib.request xml.etree.ElementTree
"""
_MOST_PER_MODULE = 150


def stdlib_docstrings() -> LabelledTexts:
    """Give sentences from the standard library's documentation, labelled by module.

    A small data set that every Python has: which of some twenty modules does this sentence
    document? The text changes a little with the version of Python. Sentences that occur in two
    modules are left out, and no module has more than 150. The order is always the same.

    Raises:
        InputError: Python is installed without the sources of its library.

    Example:
        >>> sentences = stdlib_docstrings()
        >>> len(sentences) > 2000, "threading" in sentences.names
        (True, True)
    """
    pieces = {name: sorted(_pieces(source_of(name))) for name in _DOCUMENTED_MODULES.split()}
    modules_with = Counter(piece for found in pieces.values() for piece in found)
    pairs = []
    for name, found in pieces.items():
        own = [piece for piece in found if modules_with[piece] == 1]
        # Ordered by a number of their own: that of `split` would favour one of its sides.
        own.sort(key=lambda piece: share_of(0, f"a docstring: {piece}"))
        pairs += [(piece, name) for piece in own[:_MOST_PER_MODULE]]
    return labelled(pairs)


def source_of(module: str) -> str:
    """The source of a module of the standard library.

    Raises:
        InputError: Python is installed without it.
    """
    try:
        return inspect.getsource(import_module(module))
    except (OSError, ImportError):  # some builds leave out modules
        raise InputError(
            "the texts are in the sources of Python's own library. Received: a Python without "
            f"that of {module}. Name a file as data.path."
        ) from None


def _pieces(source: str) -> set[str]:
    # Of the source, since frameworks put functions of their own into modules such as `inspect`.
    return {
        piece
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
        for paragraph in re.split(r"\n\s*\n", ast.get_docstring(node) or "")
        if ">>>" not in paragraph
        for piece in _SENTENCE_END.split(" ".join(paragraph.split()))
        if sum(bool(_PLAIN_WORD.search(word)) for word in piece.split()) >= 4
    }
