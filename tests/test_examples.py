"""Each example runs from top to bottom, in names and a folder of its own."""

import os
import re
import runpy
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
NEEDS = {"tensorflow", "torch", "pytorch_lightning", "peft"}


def packages_of(path: Path) -> set[str]:
    """What an example imports, of the packages that one environment has and another lacks."""
    text = path.read_text(encoding="utf-8")
    imported = set(
        re.findall(r"^(?:from|import) (?:partial_embedding\.)?(\w+)", text, re.MULTILINE)
    )
    return {"tensorflow" if name == "keras" else name for name in imported} & {"torch", *NEEDS}


def run_by_two_processes(path: Path) -> None:
    """Run an example as its first lines say."""
    search = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", path],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": search, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_runs(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    needed, text = packages_of(path), path.read_text(encoding="utf-8")
    for package in needed:
        if find_spec(package) is None:
            pytest.skip(f"this example runs where {package} is installed")
    if "tensorflow" in needed and "torch" in sys.modules:
        pytest.skip("torch and TensorFlow in one process can crash; runs where torch is not loaded")
    monkeypatch.chdir(tmp_path)
    if "torchrun" in text:
        run_by_two_processes(path)
    else:
        # In names of its own, and in this process: frameworks take longer to load than to train.
        runpy.run_path(str(path), run_name="__main__")
    # An assertion that is never reached would prove nothing.
    assert "assert " in text


def test_the_notebook_is_the_example() -> None:
    if find_spec("torch") is None:
        pytest.skip("read in the torch environment, which has the tools of the site")
    jupytext = pytest.importorskip("jupytext")
    (written,) = (ROOT / "examples").glob("*.ipynb")
    notebook, script = jupytext.read(written), jupytext.read(written.with_suffix(".py"))
    cells = [[(cell.cell_type, cell.source) for cell in one.cells] for one in (notebook, script)]
    assert cells[0] == cells[1], f"run `jupytext --to ipynb {written.with_suffix('.py')}`"


def test_examples_are_short() -> None:
    assert EXAMPLES
    lengths = {path.name: len(path.read_text(encoding="utf-8").splitlines()) for path in EXAMPLES}
    assert {name: lines for name, lines in lengths.items() if lines > 110} == {}
