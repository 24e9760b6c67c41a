"""Runs the cases of a script in several processes, and reads what each of them returned."""

from pathlib import Path
from typing import Any

import pytest
import torch
from once import failure_of, once

PROGRAM = Path(__file__).with_name("run_forked.py")
Seen = dict[int, dict[str, list[Any]]]


def run_processes(factory: pytest.TempPathFactory, script: str, *numbers: int) -> tuple[Path, Seen]:
    """Run the cases with each of these numbers of processes, one number after the other.

    Returns:
        The folder that all of them shared, and what each returned, by number and by case.
    """
    folder = once(factory, script, lambda made: failure_of(PROGRAM, script, made, *numbers))
    seen: Seen = {number: {} for number in numbers}
    for number in numbers:
        for path in sorted((folder / str(number)).glob("*.pt")):
            case, _, _ = path.stem.rpartition("-")
            seen[number].setdefault(case, []).append(torch.load(path, weights_only=True))
    return folder, seen
