"""What is made once for all tests of a run, however many processes they run in."""

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest


def once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], str]) -> Path:
    """The folder that `make` has filled, in this process or in a neighbour of it.

    `make` returns what went wrong, and nothing if all is well.
    """
    folder, first = factory.getbasetemp() / name, True
    if "PYTEST_XDIST_WORKER" in os.environ:
        # Workers share the folder above their own: the first one makes it, the others wait.
        folder = factory.getbasetemp().parent / name
    try:
        folder.mkdir()
    except FileExistsError:
        first = False
    outcome = folder / "outcome"
    if first:
        said = make(folder)
        (folder / "writing").write_text(said)
        (folder / "writing").rename(outcome)
    patience = time.monotonic() + 300
    while not outcome.exists() and time.monotonic() < patience:
        time.sleep(0.2)
    assert outcome.read_text() == "", outcome.read_text()
    return folder


def run_script(name: str, *arguments: object) -> str:
    """Run one of the scripts beside the tests; returns what it said where it failed."""
    here = Path(__file__).resolve().parent
    path = os.pathsep.join(map(str, (here.parents[1], here)))
    done = subprocess.run(
        [sys.executable, str(here / "scripts" / name), *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
    )
    return "" if done.returncode == 0 else (done.stdout + done.stderr)[-6000:] or "it said nothing"


def run_both_ranks(script: str, folder: Path) -> str:
    """Run all cases on two ranks, whose files and logs go to a folder."""
    here = Path(__file__).resolve().parent
    path = os.pathsep.join(filter(None, [str(here.parents[1]), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        [sys.executable, str(here / "forked.py"), script, str(folder)],
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
    )
    said = [log.read_text() for log in sorted(folder.glob("*.log"))]
    return "" if done.returncode == 0 else "\n".join([done.stderr, *said])
