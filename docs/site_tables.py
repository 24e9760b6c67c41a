"""Tables of the site, made of the data that tests and benchmarks keep."""

from __future__ import annotations

import ast
import contextlib
import importlib
import io
import json
import sys
from collections import Counter
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


def torch_optimizers() -> str:
    """What torch ships, in how many configurations it is tested, and what `lazy` does with it."""
    cases = _imported("tests/torch", "cases").CASES
    tested = Counter(case.name for case in cases)
    lazy = {case.name: case.element_wise for case in cases}
    rows = [
        [f"`torch.optim.{name}`", str(count), "yes" if lazy[name] else "no"]
        for name, count in sorted(tested.items())
    ]
    return _markdown_table(["optimizer", "configurations tested", "`lazy=True`"], rows)


def other_optimizers() -> str:
    """Optimizers of other packages that are served exactly."""
    rows = []
    for name, case in _imported("tests/torch", "test_other_optimizers").FROM_ELSEWHERE.items():
        options = ", ".join(f"{key}={value}" for key, value in case.options.items())
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


def keras_optimizers() -> str:
    """What Keras ships, read without importing TensorFlow beside torch."""
    source = (ROOT / "tests/tensorflow/test_every_optimizer.py").read_text(encoding="utf-8")
    (cases,) = (
        ast.literal_eval(node.value)
        for node in ast.parse(source).body
        if isinstance(node, ast.AnnAssign) and getattr(node.target, "id", "") == "OPTIMIZERS"
        if node.value is not None
    )
    options: dict[str, list[str]] = {}
    for name, given in cases.values():
        written = ", ".join(f"{key}={value}" for key, value in given.items())
        options.setdefault(name, []).append(f"`{written}`" if written else "defaults")
    rows = [[f"`keras.optimizers.{name}`", "; ".join(options[name])] for name in sorted(options)]
    return _markdown_table(["optimizer", "tested with"], rows)


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
