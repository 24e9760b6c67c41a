"""The command as a newcomer uses it: three commands, and one line for what goes wrong."""

import csv
import io
import os
import re
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from partial_embedding.cli import main
from partial_embedding.recipes.run_folder import RunLogger, WholeCheckpoints
from partial_embedding.recipes.text_classifier import TextBatch, TextClassifier

RUN = Path("runs/version_0")
QUIET = ["--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false"]


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture
def only_the_run(fitted_run: list[str]) -> None:
    """A working directory in which all that training read is gone."""
    for name in ("texts.csv", "vectors.txt", "schedule.yaml"):
        Path(name).unlink()


# The journey


def test_a_text_classifier_takes_three_commands(
    small_run: list[str], capfd: pytest.CaptureFixture[str]
) -> None:
    Path("test.csv").write_text("text,label\na joy of a film,pos\nthe bore,neg\na dull plot,neg\n")
    Path("new.txt").write_text("a warm film\na cold plot\n")
    fit = ["fit", "--data.path=texts.csv", "--data.vectors=vectors.txt", "--trainer.max_epochs=2"]
    assert main([*fit, *QUIET]) == 0
    out = capfd.readouterr().out
    assert "texts: 45 to train on, 15 to validate on; of 2 classes: neg 23 + 7, pos 22 + 8" in out
    Path("texts.csv").unlink()
    Path("vectors.txt").unlink()
    assert main(["test", "--ckpt_path=best", "--data.test_path=test.csv", *QUIET]) == 0
    out = capfd.readouterr().out
    assert f"checkpoint: {RUN / 'checkpoints/best.ckpt'}\n" in out
    assert "test_accuracy" in out
    predict = ["predict", "--ckpt_path=best", "--data.test_path=new.txt", "--output=said.csv"]
    assert main([*predict, *QUIET]) == 0
    assert "predictions: said.csv\n" in capfd.readouterr().out
    said = rows_of(Path("said.csv"))
    assert [row["text"] for row in said] == ["a warm film", "a cold plot"]
    assert all(row["label"] in ("neg", "pos") for row in said)
    assert all(0.5 <= float(row["probability"]) <= 1 for row in said)


@pytest.mark.usefixtures("only_the_run")
@pytest.mark.parametrize("which", ["best", "last", str(RUN / "checkpoints/last.ckpt")])
def test_a_checkpoint_is_all_that_test_and_predict_need(
    which: str, capfd: pytest.CaptureFixture[str]
) -> None:
    Path("new.jsonl").write_text('{"text": "a joy", "label": "pos"}\n')
    before = set(Path().rglob("*"))
    for command in ("test", "predict"):
        where = [f"--ckpt_path={which}", "--data.test_path=new.jsonl"]
        assert main([command, *where, *QUIET]) == 0
    assert rows_of(Path("runs/predictions.csv"))[0]["text"] == "a joy"
    assert set(Path().rglob("*")) - before == {Path("runs/predictions.csv")}


@pytest.mark.usefixtures("only_the_run")
def test_a_single_text_and_lines_of_standard_input_are_answered_in_the_terminal(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = []
    for asked in (["--text=a warm, funny film"], ["--data.test_path=-"]):
        monkeypatch.setattr(sys, "stdin", io.StringIO("a warm, funny film\n"))
        assert main(["predict", "--ckpt_path=last", "--top_k=5", *asked, *QUIET]) == 0
        answers.append(capfd.readouterr().out.split("text,label")[1])
    assert answers[0] == answers[1]
    (row,) = csv.DictReader(io.StringIO(f"text,label{answers[0]}"))
    assert row["text"] == "a warm, funny film"
    assert {row["label"], row["label_2"]} == {"neg", "pos"}
    assert abs(float(row["probability"]) + float(row["probability_2"]) - 1) < 1e-3
    assert not Path("runs/predictions.csv").exists()


@pytest.mark.usefixtures("only_the_run")
def test_a_class_that_training_lacks_is_named(complaint: Any) -> None:
    Path("test.csv").write_text("text,label\na joy,pos\na bore,dull\n")
    line = complaint("test", "--ckpt_path=best", "--data.test_path=test.csv", *QUIET)
    assert "test.csv, where 1 of 2 are of 'dull', which training lacks" in line


def test_texts_to_validate_on_can_stand_in_a_file_of_their_own(
    small_run: list[str], capfd: pytest.CaptureFixture[str]
) -> None:
    Path("held_out.csv").write_text("text,label\na joy, pos\na bore,neg\n")
    options = ["--data.validation_path=held_out.csv", "--trainer.max_epochs=1"]
    assert main(["fit", *small_run, *options]) == 0
    out = capfd.readouterr().out
    assert "texts: 60 to train on, 2 to validate on; of 2 classes: neg 30 + 1, pos 30 + 1" in out
    assert main(["validate", "--ckpt_path=best", *QUIET]) == 0
    assert "val_accuracy" in capfd.readouterr().out


def test_a_configuration_of_another_class_has_that_classes_defaults(
    small_run: list[str], capfd: pytest.CaptureFixture[str]
) -> None:
    Path("own.py").write_text(
        "from pytorch_lightning import LightningDataModule\n"
        "class Own(LightningDataModule):\n"
        "    def __init__(self, batch_size: int = 7, seed: int = 3): super().__init__()\n"
    )
    sys.path.insert(0, ".")
    try:
        with pytest.raises(SystemExit):
            main(["fit", "--data=own.Own", "--data.seed=5", "--print_config"])
    finally:
        sys.path.pop(0)
    printed = yaml.safe_load(capfd.readouterr().out)
    assert printed["data"] == {"class_path": "own.Own", "init_args": {"batch_size": 7, "seed": 5}}


def test_help_shows_the_texts_and_the_model_before_lightnings_trainer(
    capsys: pytest.CaptureFixture[str],
) -> None:
    for command in ("fit", "predict"):
        with pytest.raises(SystemExit) as stopped:
            main([command, "--help"])
        assert stopped.value.code == 0
        out = capsys.readouterr().out
        places = [
            out.index(f"--{option}") for option in ("data.path", "model.lr", "trainer.devices")
        ]
        assert places == sorted(places)
        assert ("--top_k" in out) == (command == "predict")


# One line


@pytest.mark.usefixtures("only_the_run")
def test_an_output_that_cannot_be_a_file_is_refused_before_the_model_is_asked(
    complaint: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("new.txt").write_text("a warm film\n")
    Path("said").mkdir()
    monkeypatch.delattr(TextClassifier, "predict_step")
    asked = ["predict", "--ckpt_path=last", "--data.test_path=new.txt", *QUIET]
    line = complaint(*asked, "--output=said")
    assert line == "error: said: predictions are written to a file. Received a folder. Name a file."


@pytest.mark.usefixtures("only_the_run")
def test_a_path_through_a_file_is_refused(complaint: Any) -> None:
    Path("new.txt").write_text("a warm film\n")
    asked = ["predict", "--ckpt_path=last", "--data.test_path=new.txt", *QUIET]
    assert complaint(*asked, "--output=new.txt/said.csv") == (
        "error: files and folders can be read and written. Received: a file where a folder is "
        "meant for new.txt. Check the path, its permissions and the room on the disk."
    )


def test_no_seed_is_refused(complaint: Any) -> None:
    line = complaint("compare", "config.yaml", "--seeds=0")
    assert "a whole number from 1 up. Received: '0'" in line


@pytest.mark.usefixtures("small_run")
@pytest.mark.parametrize(
    ("config", "said"),
    [
        ("data: {path: texts.csv}", "config.yaml: a schedule is compared with training without"),
        ("{rows: {schedule: schedule.yaml}, trainer: 3}", "trainer is a mapping of its settings"),
    ],
)
def test_a_comparison_that_cannot_be_made_is_refused(
    config: str, said: str, complaint: Any
) -> None:
    Path("config.yaml").write_text(config)
    assert said in complaint("compare", "config.yaml")


def test_small_numbers_may_be_written_with_an_exponent(small_run: list[str]) -> None:
    data = {"path": "texts.csv", "vectors": "vectors.txt"}
    stages = "{stages: [{epoch: 0, rows: missing}, {epoch: 1, rows: all, lr_scale: 1e-1}]}"
    Path("schedule.yaml").write_text(stages)
    Path("config.yaml").write_text(
        f"data: {yaml.safe_dump(data, default_flow_style=True)}\nmodel: {{lr: 1e-3, channels: 4}}\n"
        "rows: {schedule: schedule.yaml}\ntrainer: {max_epochs: 2}\n"
    )
    assert main(["schedule", "config.yaml"]) == 0
    assert main(["fit", "--config=config.yaml", "--trainer.fast_dev_run=1", *QUIET]) == 0


@pytest.fixture
def interrupted(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[int, int]]]:
    """Interrupt training at a place, once."""
    places: list[tuple[int, int]] = []
    step = TextClassifier.training_step

    def stop(self: TextClassifier, batch: TextBatch, batch_idx: int) -> Any:
        if (self.current_epoch, batch_idx) in places:
            raise KeyboardInterrupt
        return step(self, batch, batch_idx)

    monkeypatch.setattr(TextClassifier, "training_step", stop)
    handler = signal.getsignal(signal.SIGINT)
    yield places
    # Lightning ignores further interrupts, for what would be the rest of the process.
    signal.signal(signal.SIGINT, handler)


def test_an_interrupt_says_how_to_go_on(
    interrupted: list[tuple[int, int]],
    small_run: list[str],
    complaint: Any,
    capfd: pytest.CaptureFixture[str],
) -> None:
    interrupted.append((0, 1))
    line = complaint("fit", *small_run, code=130)
    assert line == "error: interrupted before the first checkpoint"
    interrupted[:] = [(2, 1)]
    line = complaint("fit", *small_run, code=130)
    assert "--ckpt_path last goes on from runs/version_" in line
    interrupted.clear()
    assert main(["fit", *small_run, "--ckpt_path", "last"]) == 0
    assert "vectors: runs/version_" in capfd.readouterr().out


# Checkpoints


def test_runs_that_start_together_have_folders_of_their_own(tmp_path: Path) -> None:
    loggers = [RunLogger(str(tmp_path)) for _ in range(3)]
    assert [logger.version for logger in loggers] == [0, 1, 2]
    loggers[1].leave_nothing_empty()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["version_0", "version_2"]


def test_a_disk_that_fills_while_a_checkpoint_is_refreshed_leaves_the_one_before(
    tmp_path: Path, largest_file: Any
) -> None:
    path = tmp_path / "checkpoints" / "last.ckpt"
    WholeCheckpoints().save_checkpoint({"epoch": 1}, path)
    with pytest.raises(OSError, match="File too large"), largest_file(20_000):
        WholeCheckpoints().save_checkpoint({"epoch": torch.zeros(100_000)}, path)
    assert torch.load(path, weights_only=True) == {"epoch": 1}
    assert os.listdir(path.parent) == ["last.ckpt"]


def test_a_torn_checkpoint_is_refused_and_another_named(
    fitted_run: list[str], complaint: Any
) -> None:
    last = RUN / "checkpoints/last.ckpt"
    last.write_bytes(last.read_bytes()[:5000])
    line = complaint("fit", *fitted_run, "--ckpt_path=last")
    assert "last.ckpt" in line
    assert f"Try {RUN / 'checkpoints/best.ckpt'}." in line
    assert main(["fit", *fitted_run, f"--ckpt_path={RUN / 'checkpoints/best.ckpt'}"]) == 0


def test_weights_alone_are_tested_but_not_gone_on_from(
    small_run: list[str], complaint: Any
) -> None:
    weights = ["--last.save_weights_only=true", "--trainer.max_epochs=1"]
    assert main(["fit", *small_run, *weights]) == 0
    assert "holds weights alone" in complaint("fit", *small_run, "--ckpt_path=last")
    assert main(["test", "--ckpt_path=last", "--data.test_path=texts.csv", *QUIET]) == 0


# Comparing


def test_ways_of_training_are_compared_and_the_best_is_named(
    small_run: list[str], capfd: pytest.CaptureFixture[str]
) -> None:
    data = {"path": "texts.csv", "vectors": "vectors.txt", "batch_size": 8}
    rows = {"schedule": yaml.safe_load(Path("schedule.yaml").read_text())}
    trainer = {"max_epochs": 2, "accelerator": "cpu"}
    config = {"data": data, "rows": rows, "trainer": trainer, "model": {"encoder": "mean"}}
    Path("config.yaml").write_text(yaml.safe_dump(config))
    where = "--trainer.default_root_dir=ways"
    assert main(["compare", "config.yaml", "--seeds=2", "--model.lr=0.1", where]) == 0
    lines = capfd.readouterr().out.splitlines()
    ways = ("frozen", "missing", "all", "staged")
    for way in ways:
        assert sum(line.startswith(f"{way}, seed ") for line in lines) == 2
        assert {path.name for path in Path("ways", way).iterdir()} >= {"version_0", "version_1"}
    assert lines[8] == "val_accuracy, mean and range over 2 seeds"
    best = next(line for line in lines if line.startswith("best: "))
    assert best.removeprefix("best: ").split(";")[0] in ways
    assert lines[-1].startswith("partial-embedding report ways/frozen/version_0 ")


def test_a_comparison_by_what_was_not_measured_is_refused(
    small_run: list[str], complaint: Any
) -> None:
    data = {"path": "texts.csv", "vectors": "vectors.txt"}
    config = {"data": data, "rows": {"schedule": "schedule.yaml"}, "trainer": {"max_epochs": 1}}
    Path("config.yaml").write_text(yaml.safe_dump(config))
    line = complaint("compare", "config.yaml", "--metric=val_f1")
    assert "val_accuracy, val_loss. Received: 'val_f1'" in line


def test_the_bar_keeps_one_line_of_80_columns(
    small_run: list[str], capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    small_run.remove("--trainer.enable_progress_bar=false")
    assert main(["fit", *small_run, "--trainer.max_epochs=3"]) == 0
    out = capfd.readouterr().out
    bars = [line for line in re.split(r"[\r\n]", out) if "val_accuracy: 0" in line]
    assert bars
    assert all(re.match(r"Epoch \d", line) and len(line) <= 80 for line in bars)


def test_a_checkpoint_of_another_class_brings_its_own_settings(
    small_run: list[str], capfd: Any, complaint: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("linear.py").write_text(
        "import torch\n"
        "from pytorch_lightning import LightningDataModule, LightningModule\n"
        "from partial_embedding.torch import PartialEmbedding\n"
        "class Data(LightningDataModule):\n"
        "    def __init__(self, size: int = 3, batch_size: int = 4):\n"
        "        super().__init__()\n"
        "        self.save_hyperparameters()\n"
        "    def test_dataloader(self):\n"
        "        h = self.hparams\n"
        "        return torch.utils.data.DataLoader(torch.arange(h.size), h.batch_size)\n"
        "    train_dataloader = val_dataloader = test_dataloader\n"
        "class Linear(LightningModule):\n"
        "    def __init__(self, rows: int = 5, lr: float = 0.1):\n"
        "        super().__init__()\n"
        "        self.save_hyperparameters()\n"
        "        self.table = PartialEmbedding(rows, 2)\n"
        "    def training_step(self, batch, batch_idx):\n"
        "        return self.table(batch).sum()\n"
        "    def validation_step(self, batch, batch_idx):\n"
        "        self.log('val_loss', self.table(batch).sum())\n"
        "    def test_step(self, batch, batch_idx):\n"
        "        self.log('rows', float(self.table.num_embeddings * 10 + len(batch)))\n"
        "    def configure_optimizers(self):\n"
        "        return torch.optim.SGD(self.parameters(), self.hparams.lr)\n"
    )
    monkeypatch.syspath_prepend(".")
    own = ["--model=linear.Linear", "--model.rows=7", "--data=linear.Data", "--data.size=4"]
    rows = "--rows.schedule={stages: [{epoch: 0, rows: [1, 2]}]}"
    assert main(["fit", *own, rows, "--trainer.max_epochs=1", *QUIET]) == 0
    capfd.readouterr()
    assert main(["test", "--ckpt_path=last", *QUIET]) == 0
    assert "74.0" in capfd.readouterr().out
    line = complaint("predict", "--ckpt_path=last", *QUIET)
    assert "predict is of texts. Received: the data of a Data. Call the trainer's predict" in line


def test_a_checkpoint_of_rows_alone_is_gone_on_from_and_tested(
    small_run: list[str], capfd: pytest.CaptureFixture[str]
) -> None:
    rows = ["--rows.checkpoint=rows", "--rows.schedule={stages: [{epoch: 0, rows: missing}]}"]
    for folder, options in (("whole", []), ("rows", rows[:1])):
        root = f"--trainer.default_root_dir={folder}"
        ends = ["--trainer.max_epochs=2", rows[1], root, *options]
        assert main(["fit", *small_run, *ends]) == 0
    saved = torch.load("rows/version_0/checkpoints/last.ckpt", weights_only=True)["state_dict"]
    assert "embedding.weight" not in saved
    tested = []
    for folder in ("whole", "rows"):
        where = [f"--trainer.default_root_dir={folder}", "--ckpt_path=last"]
        capfd.readouterr()
        assert main(["test", *where, "--data.test_path=texts.csv", *QUIET]) == 0
        tested.append(re.findall(r"test_\w+ +│? *([\d.]+)", capfd.readouterr().out))
    assert tested[0] == tested[1] != []
    root = "--trainer.default_root_dir=rows"
    assert main(["fit", *small_run, *rows, root, "--ckpt_path=last"]) == 0
