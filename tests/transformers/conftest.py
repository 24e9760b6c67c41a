"""Settings for the tests of language models in the trainers of transformers, and of PEFT."""

import pytest


def pytest_collect_file() -> None:
    """Leave the folder out where there is no such package, which is told, and fails in CI."""
    for package in ("transformers", "accelerate", "peft"):
        pytest.importorskip(package)
