"""Two replicas of a model hold the same rows after every unfreeze."""

from collections.abc import Callable
from typing import Any

import pytest


@pytest.mark.parametrize(
    "optimizers", [("lazy Adam",), pytest.param((), id="all", marks=pytest.mark.full)]
)
def test_replicas_are_identical_after_every_unfreeze(
    optimizers: tuple[str, ...], start: Callable[..., Any]
) -> None:
    # In a process of its own, since logical devices are made before TensorFlow starts.
    run = start("run_mirrored.py", *optimizers)
    output, errors = run.communicate()
    assert run.returncode == 0, errors[-3000:]
    assert output.splitlines()[-1] == "replicas agree"
