"""What a process of its own shows: memory, another backend, files without the import."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras
import pytest

from partial_embedding.tensorflow import PartialEmbedding, rowwise


@pytest.fixture
def lines(start: Callable[..., Any]) -> Callable[..., list[str]]:
    def lines(*arguments: object) -> list[str]:
        run = start("run_alone.py", *arguments)
        output, errors = run.communicate()
        assert run.returncode == 0, errors[-3000:]
        return list(output.splitlines())

    return lines


# Keras's own optimizers leave some 5 MB of each step that was traced, of any model without a sparse
# gradient.
@pytest.mark.parametrize(
    ("kinds", "models", "limit"),
    [
        ("split-rowwise", 7, 60),
        pytest.param("split", 20, 170, marks=pytest.mark.full),
        pytest.param("rowwise", 20, 60, marks=pytest.mark.full),
        pytest.param("lazy", 20, 60, marks=pytest.mark.full),
    ],
)
def test_models_that_were_dropped_leave_no_table(
    kinds: str, models: int, limit: int, lines: Callable[..., list[str]]
) -> None:
    # From the third model on. Two tables of either kind would be 160 MB, seventeen 1360.
    assert int(lines("leak", kinds, models)[-1]) < limit


def test_a_file_that_is_opened_without_the_import_names_it_and_numbers_may_be_checked(
    lines: Callable[..., list[str]], tmp_path: Path
) -> None:
    layer = PartialEmbedding(5, 2, trainable_rows=[1])
    model = keras.Sequential([keras.Input((3,), dtype="int64"), layer, keras.layers.Flatten()])
    model.compile(rowwise("adam"), "mse")
    paths = [tmp_path / "model.keras", tmp_path / "model.h5"]
    for path in paths:
        model.save(path)
    *_, told, checked = lines("load", *paths)
    found = ["'partial_embedding.tensorflow" in one for one in told.split(" | ")]
    assert found == [True, True]
    assert checked == "no complaint from rowwise, lazy"


IMPORT = "import partial_embedding.tensorflow"
# Without the packages of another backend, Keras itself cannot be imported.
CONFIGURED = (
    "import sys, types; config = types.SimpleNamespace(backend=lambda: 'jax')\n"
    "sys.modules['keras'] = types.SimpleNamespace(config=config)\n"
)


@pytest.mark.parametrize(
    ("code", "variables", "received"),
    [
        (IMPORT, {"KERAS_BACKEND": "jax"}, "KERAS_BACKEND=jax"),
        (IMPORT, {"KERAS_BACKEND": "numpy"}, "KERAS_BACKEND=numpy"),
        (IMPORT, {"TF_USE_LEGACY_KERAS": "1"}, "TF_USE_LEGACY_KERAS=1"),
        (CONFIGURED + IMPORT, {}, "the backend jax of Keras's configuration file"),
    ],
    ids=["jax", "numpy", "legacy", "configured"],
)
def test_another_backend_is_refused_in_one_line_when_it_is_imported(
    code: str, variables: dict[str, str], received: str
) -> None:
    environment = {**os.environ, **variables, "PYTHONPATH": str(Path(__file__).parents[2])}
    run = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False
    )
    assert run.returncode == 1
    assert "InputError: partial_embedding.tensorflow is for Keras" in run.stderr
    assert f"Received {received}" in run.stderr
