"""Starts scripts that are one process among several, and reads what each of them wrote."""

import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[2]


def failure_of(script: str, number: int, folder: Path) -> str:
    """Run so many processes of a script, and give what they said where one of them failed."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    command = [sys.executable, str(Path(__file__).with_name(script)), str(folder)]
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            [*command, str(rank), str(number)],
            env=environment,
            stderr=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        for rank in range(number)
    ]
    try:
        said = [process.communicate(timeout=240)[1].decode() for process in processes]
    except subprocess.TimeoutExpired as error:
        return str(error)
    finally:
        for process in processes:
            process.kill()
    return "\n".join(said) if any(process.returncode for process in processes) else ""


def run_processes(
    script: str, number: int, cases: Iterable[str], folder: Path
) -> dict[str, list[Any]]:
    """What each of so many processes returned, for each case."""
    said = failure_of(script, number, folder)
    assert not said, said
    return {
        case: [
            torch.load(path, weights_only=True)
            for rank in range(number)
            if (path := folder / f"{case}-{rank}.pt").exists()  # not of one that was to die
        ]
        for case in cases
    }
