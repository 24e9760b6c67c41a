"""Settings for the tests of the Keras half."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

# Before TensorFlow is imported: quiet logs, and the two cores that the tests are planned for.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("TF_NUM_INTRAOP_THREADS", "2")
os.environ.setdefault("TF_NUM_INTEROP_THREADS", "2")

HERE = Path(__file__).parent


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
