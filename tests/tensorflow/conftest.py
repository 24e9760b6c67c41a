"""Settings for the tests of the Keras half."""

import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

# Before TensorFlow is imported: quiet logs, and the two cores that the tests are planned for.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("TF_NUM_INTRAOP_THREADS", "2")
os.environ.setdefault("TF_NUM_INTEROP_THREADS", "2")

HERE = Path(__file__).parent


def pytest_collect_file() -> None:
    """Leave the folder out where there is no TensorFlow, which is told, and fails in CI."""
    pytest.importorskip("tensorflow")


@pytest.fixture
def start() -> Callable[..., "subprocess.Popen[str]"]:
    """Start a script of this folder as a process of its own."""

    def start(script: str, *arguments: object) -> "subprocess.Popen[str]":
        paths = [str(HERE.parents[1]), os.environ.get("PYTHONPATH", "")]
        return subprocess.Popen(
            [sys.executable, "-u", str(HERE / script), *map(str, arguments)],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    return start


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    doors = Counter(
        str(door)
        for report in terminalreporter.stats.get("passed", [])
        for name, door in report.user_properties
        if name == "door" and report.when == "call"
    )
    if doors:
        told = ", ".join(f"{door} {count}" for door, count in doors.items())
        terminalreporter.section("doors of Keras")
        terminalreporter.write_line(f"{doors.total()} runs went on through a door: {told}")
