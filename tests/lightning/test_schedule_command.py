"""`partial-embedding schedule` shows what a schedule will do, before any training."""

from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import pytest
import yaml

from partial_embedding import Vocabulary
from partial_embedding.cli import main
from partial_embedding.rows.vocabulary_file import write_vocabulary


@pytest.fixture
def files(small_run: list[str]) -> None:
    vocabulary = Vocabulary([f"w{i}" for i in range(10)], counts=range(10), missing=[0, 1])
    write_vocabulary("vocabulary.tsv", vocabulary)
    stages = yaml.safe_load(Path("schedule.yaml").read_text())
    by_step = {"stages": [{"step": 0, "rows": [3]}, {"step": 10, "rows": "all"}]}
    Path("by_step.yaml").write_text(yaml.safe_dump(by_step))
    cycle = {"stages": [{"epoch": 0, "rows": [1]}, {"epoch": 1, "rows": "all"}], "cycle": 2}
    Path("cycle.yaml").write_text(yaml.safe_dump(cycle))
    Path("list.yaml").write_text("[1]")
    Path("typo.yaml").write_text("{stages: [{epoch: 0, rowz: all}]}")
    Path("tables.yaml").write_text(yaml.safe_dump({"users": stages, "items": by_step}))


def test_a_schedule_is_printed_and_drawn_for_a_vocabulary(
    files: None, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["schedule", "schedule.yaml", "--vocab=vocabulary.tsv", "--picture=p.svg"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "10 rows, 5 epochs"
    assert lines[1].startswith("stage 0 from epoch 0  █████·")
    assert lines[1].endswith("2 rows (20.0 %), 2.2 % of training tokens, 2 join")
    assert lines[3].endswith("10 rows (100.0 %), 100.0 % of training tokens, 5 join")
    assert lines[4] == "picture: p.svg"
    assert ET.parse("p.svg").getroot().tag.endswith("}svg")


def test_steps_and_tables_are_chosen(files: None, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["schedule", "tables.yaml", "--rows=50", "--epochs=3", "--steps-per-epoch=8"]
    assert main([*command, "--table=items"]) == 0
    out = capsys.readouterr().out
    assert "stage 0 from step 0 " in out
    assert "stage 1 from step 10" in out


def test_rows_that_are_new_are_told(files: None, complaint: Any, capfd: Any) -> None:
    Path("new.yaml").write_text("stages: [{epoch: 0, rows: new}, {epoch: 2, rows: all}]")
    command = ["schedule", "new.yaml", "--rows=50"]
    assert "To plan it, pass --new." in complaint(*command)
    assert main([*command, "--new=7"]) == 0  # the remedy
    assert "  7 rows (14.0 %), 7 join" in capfd.readouterr().out
    assert "at most 50. Received: 51" in complaint(*command, "--new=51")


def test_a_configuration_brings_its_own_texts(
    small_run: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    data = {"path": "texts.csv", "vectors": "vectors.txt", "batch_size": 8}
    config = {"data": data, "rows": {"schedule": "schedule.yaml"}, "trainer": {"max_epochs": 6}}
    Path("config.yaml").write_text(yaml.safe_dump(config))
    assert main(["schedule", "config.yaml"]) == 0
    planned = capsys.readouterr().out
    assert main(["fit", *small_run]) == 0
    trained = capsys.readouterr().out
    stages = [line.split(": ", 1)[1] for line in trained.splitlines() if ": stage " in line]
    assert "\n30 rows, 6 epochs\n" in planned
    for stage in stages:
        place, _, rest = stage.partition(": ")
        assert f"{place}  " in planned
        assert f"  {rest.split(' ')[0]} rows (" in planned
    of_run = ["--vocab=runs/version_0/vocabulary.tsv", "--epochs=6"]
    assert main(["schedule", "schedule.yaml", *of_run]) == 0
    assert planned.endswith(capsys.readouterr().out)


def test_a_vocabulary_is_counted_from_texts(
    files: None, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--texts=texts.csv", "--vectors=vectors.txt"]
    assert main(["schedule", "schedule.yaml", *options]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "30 rows, 5 epochs"
    assert lines[-1].startswith("stage 2 from epoch 4")
    assert "29 rows (96.7 %), 100.0 % of training tokens" in lines[-1]


@pytest.mark.parametrize(("given", "planned"), [(7, 7), (-1, 5)])  # -1 has no end
def test_the_epochs_of_a_configuration_are_its_own(
    given: int, planned: int, files: None, capsys: pytest.CaptureFixture[str]
) -> None:
    config = {"rows": {"schedule": "schedule.yaml"}, "trainer": {"max_epochs": given}}
    Path("config.yaml").write_text(yaml.safe_dump(config))
    assert main(["schedule", "config.yaml", "--vocab=vocabulary.tsv"]) == 0
    assert capsys.readouterr().out.startswith(f"10 rows, {planned} epochs\n")


def test_rates_are_shown(files: None, capsys: pytest.CaptureFixture[str]) -> None:
    stages = "{stages: [{epoch: 0, rows: [1], lr_scale: 1e-1, warmup_steps: 20}]}"
    Path("slow.yaml").write_text(stages)
    assert main(["schedule", "slow.yaml", "--rows=9"]) == 0
    assert "lr × 0.1, warm-up of 20 steps" in capsys.readouterr().out


def test_a_table_of_any_name_is_chosen(files: None, capsys: pytest.CaptureFixture[str]) -> None:
    stages = {"stages": [{"epoch": 0, "rows": [1]}]}
    Path("named.yaml").write_text(yaml.safe_dump({"encoder/words": stages, "b": stages}))
    assert main(["schedule", "named.yaml", "--rows=9", "--table=encoder/words"]) == 0
    assert "1 rows" in capsys.readouterr().out


def test_a_plan_without_end_is_cut(files: None, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["schedule", "cycle.yaml", "--rows=9", "--epochs=1500"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1001
    assert lines[-1] == "and 501 changes more"


def test_a_long_run_is_planned_at_once(files: None, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["schedule", "by_step.yaml", "--rows=9", "--epochs=1000"]
    assert main([*command, "--steps-per-epoch=10000000"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 3


REFUSED = {
    "no_mapping": (["list.yaml", "--rows=5"], "list.yaml: a schedule is a mapping with the key"),
    "no_key": (["typo.yaml", "--rows=5"], "typo.yaml: stages[0]: the keys are"),
    "no_size": (["schedule.yaml"], "Received neither --vocab nor --rows."),
    "no_end": (["cycle.yaml", "--rows=9", "--epochs=100000000"], "up to 10,000 changes"),
    "no_folder_of_texts": (["schedule.yaml", "--texts=none.csv"], "none.csv, which is missing"),
    "no_file": (["absent.yaml", "--rows=3"], "absent.yaml: the schedule cannot be read"),
    "no_steps": (["by_step.yaml", "--rows=50"], "--steps-per-epoch"),
    "no_such_table": (["tables.yaml", "--rows=5", "--table=x"], "one of ['items', 'users']"),
    "one_table": (["schedule.yaml", "--rows=5", "--table=x"], "one schedule for all tables"),
    "no_vocabulary": (["schedule.yaml", "--rows=5"], "pass --vocab or --texts."),
    "no_such_option": (["schedule.yaml", "--colour=red"], "--colour=red"),
    "nothing": ([], "file"),
    "no_folder": (["schedule.yaml", "--vocab=vocabulary.tsv", "--picture=a/p.svg"], "a/"),
    "no_format": (["schedule.yaml", "--vocab=vocabulary.tsv", "--picture=p.png"], ".svg"),
}


@pytest.mark.parametrize(("args", "named"), REFUSED.values(), ids=REFUSED)
def test_bad_input_gets_one_line_and_exit_code_2(
    args: list[str], named: str, files: None, complaint: Any
) -> None:
    assert named in complaint("schedule", *args)
