"""Killed at any place of a schedule and resumed, a run ends as the uninterrupted one does."""

import json
import os

import pytest
import torch
from once import once, run_script
from oracle import differences
from scripts.kill_and_resume import KINDS, PLACES

from partial_embedding.schedule import RateScale
from partial_embedding.torch.saved_state import cohorts_of

pytestmark = pytest.mark.skipif(
    not hasattr(os, "fork"), reason="the runs that are killed are forked from one process"
)


# All places and all kinds of checkpoints together in one process; elsewhere each with one other.
RUNS = {
    name: {
        place: KINDS if number == 0 else (KINDS[(i + number) % len(KINDS)],)
        for i, place in enumerate(PLACES)
    }
    for number, name in enumerate(("32-true-1", "32-true-2", "bf16-true-1"))
}
FULL = {name: dict.fromkeys(PLACES, KINDS) for name in ("32-true-2", "bf16-true-1", "bf16-true-2")}
CASES = [
    pytest.param(
        runs, run, place, kind, marks=[pytest.mark.full] * full,
        id=f"{run}-{place}-{kind}{'-full' * full}",
    )
    for full, runs in enumerate((RUNS, FULL))
    for run, places in runs.items()
    for place, kinds in places.items()
    for kind in kinds
]  # fmt: skip


@pytest.mark.parametrize(("runs", "run", "place", "kind"), CASES)
def test_a_killed_run_resumes_exactly(
    runs: dict[str, dict[str, tuple[str, ...]]],
    run: str,
    place: str,
    kind: str,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    folder = once(
        tmp_path_factory,
        f"killed{'-full' * (runs is FULL)}",
        lambda made: run_script("kill_and_resume.py", made, json.dumps(runs)),
    )
    for rank in range(int(run[-1])):
        whole, resumed = (
            torch.load(folder / run / f"{which}-{rank}.pt", weights_only=True)
            for which in ("whole", f"{place}-{kind}")
        )
        for part in ("weights", "optimizer", "schedule"):
            assert differences(whole[part], resumed[part]) == []
        # What was compared is a schedule that went through all of its stages and rate_scales.
        assert [stage for stage, _ in whole["reports"]] == [0, 1, 2, 3, 4]
        assert [stage for stage, _ in resumed["reports"]][-1] == 4
        cohorts = cohorts_of(whole["optimizer"]["state"][0]["rowwise"]).values()
        assert [(cohort.rate_scale, cohort.steps) for cohort in cohorts] == [
            (RateScale(2.0, 3), 26),
            (RateScale(0.5, 6), 23),
            (RateScale(0.5, 6), 20),
            (RateScale(0.5, 6), 18),
            (RateScale(0.3), 15),
            (RateScale(1.0, 4), 5),
        ]
        assert len(whole["schedule"]["position"]["evaluations"]) == 6
