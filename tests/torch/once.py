"""What is made once for all tests of a run, however many processes they run in."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parents[1]


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
    patience = time.monotonic() + 440
    while not outcome.exists() and time.monotonic() < patience:
        time.sleep(0.2)
    assert outcome.read_text() == "", outcome.read_text()
    return folder


def failure_of(*command: object) -> str:
    """Run a program and all that it forks; what was said, where it failed."""
    folders = [TESTS.parent, TESTS / "lightning", TESTS / "torch"]
    path = [*map(str, folders), *filter(None, [os.environ.get("PYTHONPATH")])]
    process = subprocess.Popen(
        [sys.executable, *map(str, command)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(path), "OMP_NUM_THREADS": "1"},
        start_new_session=True,
    )
    try:
        said, _ = process.communicate(timeout=420)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        said = f"it took more than 420 s\n{process.communicate()[0]}"
    return (said[-6000:] or "it said nothing") if process.returncode else ""


def run_script(name: str, *arguments: object) -> str:
    """Run one of the scripts of Lightning's tests; returns what it said where it failed."""
    return failure_of(TESTS / "lightning" / "scripts" / name, *arguments)
