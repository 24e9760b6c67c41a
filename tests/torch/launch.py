"""Runs the cases of a script in several processes, and reads what each of them returned."""

import os
import signal
import subprocess
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
import torch
from once import once

HERE = Path(__file__).resolve().parent
Seen = dict[int, dict[str, list[Any]]]


def run_processes(factory: pytest.TempPathFactory, script: str, *numbers: int) -> tuple[Path, Seen]:
    """Run the cases with each of these numbers of processes, one number after the other.

    Returns:
        The folder that all of them shared, and what each returned, by number and by case.
    """
    folder = once(factory, script, lambda made: failure_of(script, numbers, made))
    seen: Seen = {number: defaultdict(list) for number in numbers}
    for number in numbers:
        for path in sorted((folder / str(number)).glob("*.pt")):
            case, _, _ = path.stem.rpartition("-")
            seen[number][case].append(torch.load(path, weights_only=True))
    return folder, seen


def failure_of(script: str, numbers: tuple[int, ...], folder: Path) -> str:
    """Run the cases, and give what was said where a process failed."""
    path = filter(None, [str(HERE.parents[1]), os.environ.get("PYTHONPATH")])
    process = subprocess.Popen(
        [sys.executable, str(HERE / "run_forked.py"), script, str(folder), *map(str, numbers)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(path), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        said, _ = process.communicate(timeout=280)
    except subprocess.TimeoutExpired as error:
        os.killpg(process.pid, signal.SIGKILL)
        return f"{error}\n{process.communicate()[0]}"
    return (said or "it said nothing") if process.returncode else ""
