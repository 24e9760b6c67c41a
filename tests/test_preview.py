"""A plan lists what a schedule does in a run, and nothing else."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from partial_embedding import Position, Schedule, Vocabulary
from partial_embedding.schedule import Evaluation
from partial_embedding.schedule.preview import plan, plan_text

V, EPOCHS, STEPS = 100, 12, 40
VOCABULARY = Vocabulary(
    [f"w{i}" for i in range(V)], counts=[V // (i + 1) for i in range(V)], missing=range(60, V)
)
GROWN = {"step": 300, "rows": "all", "grow": {"shape": "cosine", "increments": 5}}
SCHEDULES: dict[str, Any] = {
    path.stem: path for path in (Path(__file__).parents[1] / "configs" / "schedules").glob("*.yaml")
} | {
    "one_stage": {"stages": [{"epoch": 0, "rows": "none"}]},
    "by_steps": {"stages": [{"step": 0, "rows": "missing"}, GROWN]},
    "cycle": {"stages": [{"epoch": 0, "rows": [1]}, {"epoch": 2, "rows": "all"}], "cycle": 4},
}


@pytest.mark.parametrize("value", SCHEDULES.values(), ids=SCHEDULES)
def test_a_plan_names_every_change_of_rows_and_no_other(value: Any) -> None:
    schedule = Schedule.parse(value)
    new = np.arange(V - 20, V)
    planned = plan(schedule, V, VOCABULARY, EPOCHS, STEPS, new=new)
    # Metrics that get better for ever are what a plan supposes.
    best = {"min": -1.0, "max": 1.0}
    seen = [
        Evaluation(e, (e + 1) * STEPS, {"val_accuracy": best["max"] * e * 10})
        for e in range(EPOCHS)
    ]
    before: set[int] = set()
    trainable: dict[int, int] = {}
    for step in range(EPOCHS * STEPS):
        epoch = step // STEPS
        position = Position(epoch, step, EPOCHS * STEPS, tuple(seen[:epoch]))
        rows = set(schedule.trainable_rows(position).resolve(V, VOCABULARY, new=new).tolist())
        if rows != before or step == 0:
            trainable[step] = len(rows)
        before = rows
    listed = {one.step: one.trainable for one in planned}
    assert trainable.items() <= listed.items()
    # A band of rows that are all missing ones changes nothing, and is a stage all the same.
    assert len(listed) == len(planned) == len({one.place for one in planned})
    total = 0
    for one in planned:
        total += one.joining - one.leaving
        assert total == one.trainable


def test_a_plan_says_what_it_cannot_foresee_and_what_the_run_does_not_reach() -> None:
    schedule = Schedule(
        [
            {"epoch": 0, "rows": [1]},
            {"plateau": "val_loss", "rows": [2]},
            {"epoch": 50, "rows": "all"},
        ]
    )
    lines = plan_text(schedule, plan(schedule, V, epochs=EPOCHS), V, EPOCHS)
    assert lines[-2] == "stage 1 at a plateau of val_loss, which no plan can foresee"
    assert lines[-1] == "stage 2 at epoch 50, which this run does not reach"
