"""Tables of the site, made of the data that tests and benchmarks keep."""

from __future__ import annotations

import ast
import contextlib
import importlib
import io
import json
import sys
from collections import Counter
from collections.abc import Iterable
from itertools import product
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]


def _imported(folder: str, name: str) -> Any:
    """A module of the tests or benchmarks, which import each other by name from their folder."""
    sys.path.insert(0, str(ROOT / folder))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(str(ROOT / folder))


def _markdown_table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def _written(options: dict[str, Any]) -> str:
    return ", ".join(f"{key}={value}" for key, value in options.items())


def torch_optimizers() -> str:
    """What torch ships, in how many configurations it is tested, and what `lazy` does with it."""
    cases = _imported("tests/torch", "cases").CASES
    tested = Counter(case.name for case in cases)
    lazy = {case.name: case.element_wise for case in cases}
    rows = [
        [f"`{name}`", str(count), "yes" if lazy[name] else "no"]
        for name, count in sorted(tested.items())
    ]
    return _markdown_table(["optimizer", "configurations tested", "`lazy=True`"], rows)


def other_optimizers() -> str:
    """Optimizers of other packages that are served exactly."""
    rows = []
    for name, case in _imported("tests/torch", "test_other_optimizers").FROM_ELSEWHERE.items():
        options = _written(case.options)
        rows.append([f"`{name.partition('-')[0]}`", f"`{options}`" if options else "defaults"])
    return _markdown_table(["optimizer", "with"], rows)


def refused_optimizers() -> str:
    """Optimizers that are refused, in the words of the error."""
    import schedulefree

    from partial_embedding import InputError
    from partial_embedding.torch import PartialEmbedding, rowwise

    blockwise = _imported("tests/torch", "test_other_optimizers").BlockwiseAdam
    rows = []
    for kind in (schedulefree.AdamWScheduleFree, blockwise):
        table = PartialEmbedding(12, 5, trainable_rows=[3, 4])
        try:
            rowwise(kind(table.parameters()), table)
        except InputError as error:
            message = " ".join(str(error).split())
            said = kind.__doc__.split("\n")[0] if kind is blockwise else "Schedule-free AdamW."
            rows.append([said, message])
        else:
            raise AssertionError(f"{kind.__name__} is served: say so on the page")
    return _markdown_table(["optimizer", "the error"], rows)


def _assigned(path: str, name: str) -> Any:
    """What a module of Keras's tests gives a name, read without TensorFlow beside torch."""
    tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
    (value,) = (
        node.value
        for node in tree.body
        if isinstance(node, ast.AnnAssign | ast.Assign)
        and ast.unparse(node.targets[0] if isinstance(node, ast.Assign) else node.target) == name
    )
    return value


def keras_optimizers() -> str:
    """What Keras ships, and the options that it is tested with."""
    cases = _assigned("tests/tensorflow/test_every_optimizer.py", "OPTIMIZERS")
    options: dict[str, list[str]] = {}
    for name, given in ast.literal_eval(cases).values():
        written = _written(given)
        options.setdefault(name, []).append(f"`{written}`" if written else "defaults")
    rows = [[f"`{name}`", "; ".join(options[name])] for name in sorted(options)]
    return _markdown_table(["optimizer", "tested with"], rows)


def _matrix(tested: Iterable[tuple[str, str]]) -> str:
    """What is tested under what: a mark where a test is."""
    pairs = list(tested)
    doors, columns = (list(dict.fromkeys(names)) for names in zip(*pairs, strict=True))
    rows = [
        [door, *("✓" if (door, column) in pairs else "" for column in columns)] for door in doors
    ]
    return _markdown_table(["", *columns], rows)


def torch_doors() -> str:
    """By what a weight, a gradient or a state is reached, and which rows trained meanwhile."""
    tests = _imported("tests/torch", "test_doors")
    made = [f"`{name}({_written(options)})`" for name, options in tests.OPTIMIZERS.items()]
    matrix = _matrix((case.values[0], case.values[1]) for case in tests.CASES)
    return f"{matrix}\n\nEach under {', '.join(made)}."


def torch_checkpoints() -> str:
    """By what a run is saved from which another goes on, under which optimizer."""
    tests = _imported("tests/torch", "test_checkpointers")
    return _matrix(product(tests.LOOPS, tests.OPTIMIZERS))


def keras_doors() -> str:
    """By what a model goes out and comes back in the middle of a run, under which optimizer."""
    path = "tests/tensorflow/test_doors.py"
    doors = [ast.literal_eval(door) for door in _assigned(path, "DOORS").keys]
    kinds = [ast.unparse(made.body) for made in _assigned(path, "KINDS").values]
    return _matrix(
        product(
            doors,
            [
                f"`{kind.replace('keras.optimizers.', '').replace('schedules.', '')}`"
                for kind in kinds
            ],
        )
    )


def cost() -> str:
    """The table of the README."""
    results = json.loads((ROOT / "benchmarks/results.json").read_text(encoding="utf-8"))
    return str(_imported("benchmarks", "report").readme_section(results))


def command_help() -> str:
    """What `partial-embedding --help` prints."""
    from partial_embedding.cli import main

    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        main(["--help"])
    return f"```text\n{printed.getvalue()}```"


def examples() -> str:
    """Each file in `examples/`, whole."""
    parts = []
    for path in sorted((ROOT / "examples").glob("*.py")):
        code = path.read_text(encoding="utf-8")
        title = path.stem.replace("_", " ").capitalize()
        parts.append(
            f"## {title}\n\n[{path.name}](../examples/{path.name})\n\n```python\n{code}```"
        )
    return "\n\n".join(parts)
