"""What the Keras half shows says what it is, by an example that runs as a doctest."""

import importlib
import inspect
from typing import Any

import pytest

pytest.importorskip("tensorflow")

MODULES = (
    "partial_embedding.tensorflow",
    "partial_embedding.tensorflow.gradients",
    "partial_embedding.callbacks.keras",
)


def shown(module: str) -> list[Any]:
    imported = importlib.import_module(module)
    values = [getattr(imported, name) for name in getattr(imported, "__all__", vars(imported))]
    return [
        value
        for value in values
        if (inspect.isclass(value) or inspect.isfunction(value))
        and value.__module__.startswith("partial_embedding")
        and not value.__name__.startswith("_")
        and not (inspect.isclass(value) and issubclass(value, Exception))
    ]


@pytest.mark.parametrize("module", MODULES)
def test_every_public_name_has_an_example(module: str) -> None:
    names = shown(module)
    assert len(names) >= 3
    # `vars`, since `getdoc` would find the docstring of a base class.
    lacking = [
        v
        for v in names
        if "Example:" not in str(vars(v).get("__doc__") if inspect.isclass(v) else v.__doc__)
    ]
    assert lacking == []


@pytest.mark.parametrize("module", MODULES)
def test_every_public_method_says_what_it_does(module: str) -> None:
    lacking = [
        f"{value.__name__}.{name}"
        for value in shown(module)
        if inspect.isclass(value)
        for base in inspect.getmro(value)
        if base.__module__.startswith("partial_embedding")
        for name, method in vars(base).items()
        if not name.startswith("_")
        if isinstance(method, property | classmethod) or inspect.isfunction(method)
        if not method.__doc__
    ]
    assert lacking == []
