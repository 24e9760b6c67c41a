"""Runs along a schedule: audited, kept and gone on with, and told in the same words everywhere."""

import ast
import inspect
from pathlib import Path
from typing import Any

import pytest
from reference import (
    HISTORIES,
    MATRIX,
    MEASURED,
    OPTIMIZERS,
    SCHEDULES,
    batches_of,
    same_bits,
    told,
    written,
)

from partial_embedding import InputError
from partial_embedding.errors import FrozenRowsMoved

SGD = OPTIMIZERS["SGD"]
EVER = [1, 2, 4, 5, 6, 7]
BATCHES = batches_of(0)
CALLBACKS = Path(__file__).parents[2] / "callbacks"


# Audits


@pytest.mark.parametrize(("audit", "found"), [(2, 2), (5, 5), (20, 12), (True, 12)])
def test_audits_come_after_every_so_many_steps_of_the_run(
    adapter: Any, audit: int, found: int, tmp_path: Path
) -> None:
    schedule = written(tmp_path, HISTORIES["frozen_from_the_start"])
    # Three steps make an epoch, and no stage ends before the run does.
    assert len(BATCHES) == 3
    with pytest.raises(FrozenRowsMoved) as moved:
        adapter.fit(MATRIX, schedule, SGD, BATCHES, 4, [2, 5, 7], audit=audit, write=(1, 3))
    assert str(moved.value).startswith(f"words: 1 frozen row changed by step {found}: 3. Most")
    assert moved.value.rows == (3,)


# Kept, and gone on with


# A run of another length is another run to a schedule by shares.
@pytest.mark.parametrize(
    ("name", "first"), [("steps", 1), ("plateau", 2), ("plateau", 3), ("cycles", 2)]
)
def test_a_run_that_goes_on_ends_in_the_same_bits(
    adapter: Any, name: str, first: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    schedule = written(tmp_path, SCHEDULES[name])
    whole, _ = adapter.fit(MATRIX, schedule, SGD, BATCHES, 4, EVER, MEASURED)
    said = told(capsys.readouterr().out)
    begun, _ = adapter.fit(
        MATRIX, schedule, SGD, BATCHES, first, EVER, MEASURED, folder=tmp_path / "kept"
    )
    capsys.readouterr()
    rest, _ = adapter.fit(
        MATRIX, schedule, SGD, BATCHES, 4, EVER, MEASURED, folder=tmp_path / "kept"
    )
    tables = [*begun, *rest]
    assert len(tables) == len(whole) == 4
    assert all(same_bits(*pair, range(len(MATRIX))) for pair in zip(tables, whole, strict=True))
    # It says how many rows train where it goes on, and then what it would have said.
    lines = told(capsys.readouterr().out)
    assert lines[0].endswith("parameters elsewhere")
    assert [line for line in lines[2:-1] if line not in said] == []
    assert lines[-1].startswith("audit: words: frozen rows by stage: ")


def test_what_is_kept_of_a_run_is_the_same(adapter: Any, tmp_path: Path) -> None:
    schedule = written(tmp_path, SCHEDULES["plateau"])
    _, kept = adapter.fit(
        MATRIX, schedule, SGD, BATCHES, 3, EVER, MEASURED, folder=tmp_path / "kept"
    )
    assert kept["schedules"] == {"words": SCHEDULES["plateau"].to_config()}
    assert kept["acted_on"] == 2
    position = kept["position"]
    assert (position["epoch"], position["total_steps"]) == (2, None)
    assert [list(seen) for seen in position["evaluations"]] == [
        [epoch, 3 * epoch + 3, {"val_measured": value}] for epoch, value in enumerate(MEASURED[:3])
    ]


def test_a_schedule_that_was_changed_is_told_of_or_refused_in_the_same_words(
    adapter: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stages = [{"epoch": 0, "rows": [1, 2]}, {"epoch": 3, "rows": [4, 5]}]

    def fit(epochs: int, *changed: dict[str, Any]) -> list[str]:
        schedule = written(tmp_path, {"stages": list(changed)})
        adapter.fit(MATRIX, schedule, SGD, BATCHES, epochs, EVER, folder=tmp_path / "kept")
        return told(capsys.readouterr().out)

    fit(2, *stages)
    assert fit(3, stages[0], {"epoch": 5, "rows": [4]}) == [
        "words: the schedule is not the checkpoint's: stages[1].epoch: 3 became 5",
        "words: the schedule is not the checkpoint's: stages[1].rows.ids: [4, 5] became [4]",
        "words: 2 of 10 rows train (6 of 30 parameters), 0 parameters elsewhere",
        "words: stage 0 from epoch 2: 2 rows train, 20.0 % of the table",
        "words: the run ended before stage 1, at epoch 5",
        "audit: words: frozen rows by stage: 8; changed a bit: 0",
    ]
    with pytest.raises(InputError) as refused:
        fit(4, {"epoch": 0, "rows": [1]})
    assert str(refused.value) == (
        "words: a resumed run trains the rows that the checkpoint trained in stage 0 from epoch 2, "
        "{'ids': [1, 2]}. Received: {'ids': [1]}, since stages[0].rows.ids: [1, 2] became [1]; "
        "stages[1]: {'epoch': 5, 'rows': {'ids': [4]}} was removed. Change only what lies ahead."
    )


def test_a_metric_that_nothing_measures_is_refused_by_its_name(
    adapter: Any, tmp_path: Path
) -> None:
    waits = {"stages": [{"epoch": 0, "rows": [1]}, {"plateau": "val_lost", "rows": [2]}]}
    with pytest.raises(InputError, match=r"a stage waits for .*'val_lost'.*\. Received"):
        adapter.fit(MATRIX, written(tmp_path, waits), SGD, BATCHES, 2, EVER)
    with pytest.raises(InputError, match=r"'val_lost'\. Received: \[.*'val_measured'\]\. Log it"):
        adapter.fit(MATRIX, written(tmp_path, waits), SGD, BATCHES, 2, EVER, MEASURED)


# Arguments


def arguments_of(path: Path) -> dict[str, str]:
    """The keyword-only arguments of a module's `RowUnfreezing`, with their defaults."""
    (found,) = (
        node
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.ClassDef) and node.name == "RowUnfreezing"
    )
    (made,) = (
        node for node in found.body if isinstance(node, ast.FunctionDef) and node.name == "__init__"
    )
    assert [argument.arg for argument in made.args.args] == ["self", "schedule"]
    assert made.args.kwarg is made.args.vararg is None
    return {
        argument.arg: ast.unparse(default)
        for argument, default in zip(made.args.kwonlyargs, made.args.kw_defaults, strict=True)
        if default is not None
    }


def test_callbacks_take_the_same_arguments_by_name_alone(adapter: Any) -> None:
    everywhere = {"vocabulary": "None", "lazy": "False", "audit": "False"}
    # In Keras another callback says what a checkpoint holds of a table.
    of_torch = {**everywhere, "checkpoint": "'table'"}
    assert arguments_of(CALLBACKS / "transformers.py") == of_torch
    assert arguments_of(CALLBACKS / "lightning.py") == of_torch
    # In Keras rowwise(lazy=True) is given to compile, and a backup is another callback's.
    everywhere.pop("lazy")
    assert arguments_of(CALLBACKS / "keras.py") == {**everywhere, "backup_dir": "None"}
    # As Python sees it, where the framework is.
    parameters = inspect.signature(adapter.RowUnfreezing).parameters
    kinds = {name: parameter.kind for name, parameter in parameters.items()}
    assert kinds.pop("schedule") == inspect.Parameter.POSITIONAL_OR_KEYWORD
    assert set(kinds.values()) == {inspect.Parameter.KEYWORD_ONLY}
    with pytest.raises(TypeError):
        adapter.RowUnfreezing({"stages": [{"epoch": 0, "rows": "all"}]}, None)


WRONG_KEYS = {
    "lr": ({"epoch": 1, "rows": [1], "lr": 0.3}, "lr_scale"),
    "warmup": ({"epoch": 1, "rows": [1], "warmup": 3}, "warmup_steps"),
    "metric": ({"plateau": {"metric": "val_loss"}, "rows": [1]}, "monitor"),
    "min_change": ({"plateau": {"monitor": "x", "min_change": 1}, "rows": [1]}, "min_delta"),
    "parts": ({"epoch": 9, "rows": [1], "grow": {"parts": 3}}, "increments"),
    "misspelt": ({"epoch": 1, "rows": [1], "lr_scal": 0.3}, "lr_scale"),
    "epochs": ({"epochs": 1, "rows": [1]}, "epoch"),
    "pateince": ({"plateau": {"monitor": "x", "pateince": 1}, "rows": [1]}, "patience"),
}


@pytest.mark.parametrize(("stage", "meant"), WRONG_KEYS.values(), ids=WRONG_KEYS)
def test_a_wrong_key_names_the_right_one(adapter: Any, stage: dict[str, Any], meant: str) -> None:
    with pytest.raises(InputError, match=rf"^stages\[1\].* Did you mean '{meant}'\?$"):
        adapter.RowUnfreezing({"stages": [{"epoch": 0, "rows": "none"}, stage]})
