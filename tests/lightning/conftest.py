"""What the tests of the Lightning half share: one thread, and a small data set as files."""

import contextlib
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml

from partial_embedding.cli import main

# The tensors are tiny: threads would only wait for each other, and the tests run in two processes.
torch.set_num_threads(1)


def pytest_collect_file() -> None:
    """Leave the folder out where there is no Lightning, which is told, and fails in CI."""
    pytest.importorskip("pytorch_lightning")


SCHEDULE = {
    "stages": [
        {"epoch": 0, "rows": "missing"},
        {"epoch": 2, "rows": {"union": ["missing", {"most_frequent": 0.3}]}},
        {"epoch": 4, "rows": "all"},
    ]
}
_GOOD = ["joy", "bright", "warm", "love", "clever", "funny", "tender", "lively"]
_BAD = ["bore", "dull", "cold", "hate", "stupid", "tedious", "flat", "hollow"]
_PLAIN = ["the", "a", "film", "plot", "of", "and", "actor", "scene", "music", "is", "with", "story"]


def write_texts(path: Path) -> None:
    draw = random.Random(0)
    lines = ["text,label"]
    for i in range(60):
        words = draw.choices(_PLAIN, k=6) + draw.choices(_GOOD if i % 2 else _BAD, k=3)
        draw.shuffle(words)
        lines.append(f"{' '.join(words)},{'pos' if i % 2 else 'neg'}")
    path.write_text("\n".join(lines) + "\n")


def write_vectors(path: Path) -> None:
    draw = random.Random(1)
    words = _PLAIN + _GOOD[::2] + _BAD[::2]
    lines = [f"{w} {' '.join(f'{draw.gauss(0, 1):.4f}' for _ in range(6))}" for w in words]
    path.write_text("\n".join(lines) + "\n")


ARGS = [
    "--data.path=texts.csv",
    "--data.vectors=vectors.txt",
    "--data.batch_size=8",
    "--rows.schedule=schedule.yaml",
    "--model.channels=4",
    "--model.lr=0.01",
    "--trainer.max_epochs=6",
    "--trainer.accelerator=cpu",
    "--trainer.enable_progress_bar=false",
]


def write_inputs(folder: Path) -> None:
    write_texts(folder / "texts.csv")
    write_vectors(folder / "vectors.txt")
    (folder / "schedule.yaml").write_text(yaml.safe_dump(SCHEDULE))


@pytest.fixture
def small_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The arguments of a run over the small data, from a working directory with nothing else."""
    monkeypatch.chdir(tmp_path)
    write_inputs(tmp_path)
    return list(ARGS)


@pytest.fixture
def complaint(capfd: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Run a command that must end with a code and, after all else, one line of error; that line."""

    def complaint(*args: str, code: int = 2) -> str:
        capfd.readouterr()
        assert main([*args]) == code
        said = capfd.readouterr().err
        (line,) = [line for line in said.splitlines() if line.startswith("error: ")]
        assert "Traceback" not in said
        assert said.endswith(f"{line}\n")
        return line

    return complaint


@pytest.fixture(scope="session")
def fitted_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fitted")
    write_inputs(folder)
    with contextlib.chdir(folder):
        assert main(["fit", *ARGS]) == 0
    return folder


@pytest.fixture
def fitted_run(fitted_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The same arguments, from a copy of a working directory in which `fit` has run."""
    shutil.copytree(fitted_folder, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return list(ARGS)
