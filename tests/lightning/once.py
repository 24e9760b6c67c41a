"""What is made once for all tests of a run, however many processes they run in."""

import os
import socket
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


def free_port() -> int:
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        return int(bound.getsockname()[1])


def run_both_ranks(worker: str, folder: Path) -> str:
    """Run all cases in one pair of processes, whose files and logs go to a folder."""
    here = Path(__file__).resolve().parent
    path = os.pathsep.join(filter(None, [str(here.parents[1]), os.environ.get("PYTHONPATH")]))
    common = {
        **os.environ,
        "PYTHONPATH": path,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "OMP_NUM_THREADS": "1",
        "NODE_RANK": "0",
    }
    processes = []
    for rank in range(2):
        with (folder / f"{rank}.log").open("w") as log:
            processes.append(
                subprocess.Popen(
                    [sys.executable, str(here / worker), str(folder)],
                    env={**common, "LOCAL_RANK": str(rank)},
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    cwd=folder,
                )
            )
    try:
        for process in processes:
            process.wait(timeout=240)
    finally:
        for process in processes:
            process.kill()
        codes = [process.wait() for process in processes]
    said = "\n".join((folder / f"{rank}.log").read_text() for rank in range(2))
    return "" if codes == [0, 0] else said
