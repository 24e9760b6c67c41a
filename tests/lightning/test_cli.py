"""The command `partial-embedding`: what it leaves behind, and what it says to bad input."""

import errno
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from gensim.models import KeyedVectors
from pytorch_lightning import Callback, LightningModule, Trainer

from partial_embedding.cli import main
from partial_embedding.monitor.record import read_record
from partial_embedding.recipes.text_classifier import TextClassifier

ROOT = Path(__file__).parents[2]
RUN = Path("runs/version_0")


def files_below(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def test_fit_leaves_log_checkpoints_vectors_and_page_and_says_where(
    small_run: list[str], capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(["fit", *small_run]) == 0

    out = capfd.readouterr().out
    assert re.search(r"embedding: \d+ of 30 rows train \(\d+ of 180 parameters\), \d+", out)
    assert [int(e) for e in re.findall(r"stage \d from epoch (\d)", out)] == [0, 2, 4]
    assert re.search(r"\nvalidation accuracy: \d+\.\d %\n", out)
    assert re.search(r"audit: embedding: frozen rows by stage: .*; changed a bit: 0\n", out)
    for what, file in {
        "log": RUN,
        "checkpoint": RUN / "checkpoints/last.ckpt",
        "best checkpoint": RUN / "checkpoints/best.ckpt",
        "vectors": RUN / "vectors.vec",
        "page": RUN / "report.html",
    }.items():
        assert f"\n{what}: {file}\n" in out
        assert file.exists()
    assert any(name.startswith("events.out.tfevents") for name in files_below(RUN))
    assert not any(name.startswith(".") for name in files_below(RUN))


def test_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    out = capsys.readouterr().out
    for command in ("fit", "validate", "test", "predict", "compare", "schedule", "report"):
        assert re.search(rf"^  {command} ", out, re.MULTILINE)


@pytest.mark.parametrize("args", [[], ["train"]], ids=["none", "unknown"])
def test_a_command_that_is_none_is_refused_with_the_list(args: list[str], complaint: Any) -> None:
    assert "fit, validate, test, predict, compare, schedule, report" in complaint(*args)


def test_a_checkpoint_is_enough_to_load_the_model(fitted_run: list[str]) -> None:
    model = TextClassifier.load_from_checkpoint(RUN / "checkpoints/last.ckpt")
    assert model.names == ("neg", "pos")
    assert model.vocabulary is not None
    assert model(torch.tensor([[model.vocabulary.index["film"]] * 5])).shape == (1, 2)


def test_the_printed_config_is_a_config(
    small_run: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["fit", *small_run, "--print_config"])
    assert stopped.value.code == 0
    printed = capsys.readouterr().out
    assert yaml.safe_load(printed)["data"]["init_args"]["path"] == "texts.csv"
    (tmp_path / "printed.yaml").write_text(printed)
    assert main(["fit", "--config=printed.yaml", "--trainer.fast_dev_run=true"]) == 0


@pytest.mark.parametrize("name", ["quickstart.yaml", "text_classification.yaml"])
def test_a_config_of_the_repository_runs(
    name: str, small_run: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    own = [f"--config={ROOT / 'configs' / name}"]
    if name == "text_classification.yaml":
        own += ["--data.path=texts.csv", "--data.vectors=vectors.txt", "--data.dimension=null"]
    quick = ["--trainer.limit_train_batches=2", "--trainer.limit_val_batches=1"]
    where = ["--trainer.default_root_dir=runs", "--trainer.enable_progress_bar=false"]
    assert main(["fit", *own, *quick, *where]) == 0
    assert {"vectors.vec", "rows.json", "report.html"} <= files_below(RUN)


# Bad input. Each case prepares something in the working directory and gives the arguments to add
# to those of the small run, and a part of the message.

Case = tuple[Callable[[], object], list[str], str]


def write(name: str, text: str | bytes) -> Callable[[], object]:
    data = text.encode() if isinstance(text, str) else text
    return lambda: Path(name).write_bytes(data)


def schedule(*stages: dict[str, Any]) -> Callable[[], object]:
    return write("bad.yaml", yaml.safe_dump({"stages": list(stages)}))


def nothing() -> None:
    pass


def early_stopping() -> None:
    stopping = {"class_path": "EarlyStopping", "init_args": {"monitor": "val_accurracy"}}
    Path("stop.yaml").write_text(yaml.safe_dump({"trainer": {"callbacks": [stopping]}}))


def stage(epoch: int, rows: object = "all") -> dict[str, Any]:
    return {"epoch": epoch, "rows": rows}


EARLY = "{class_path: EarlyStopping, init_args: {monitor: val_loss, %s}}"
BAD_SCHEDULE = ["--rows.schedule=bad.yaml"]
BAD_VECTORS = ["--data.vectors=bad.txt"]
BAD_TEXTS = ["--data.path=bad.csv"]
BAD_CHECKPOINT = ["--ckpt_path=bad.ckpt"]
CASES: dict[str, Case] = {
    "config_missing": (nothing, ["--config=none.yaml"], "none.yaml"),
    "config_folder": (nothing, ["--config=."], "a configuration is a file. Received a folder"),
    "root_file": (
        nothing,
        ["--trainer.default_root_dir=texts.csv"],
        "Received: a file where a folder is meant for texts.csv. Check the path",
    ),
    "checkpoint_folder": (
        nothing,
        ["--ckpt_path=."],
        "a checkpoint is a file. Received a folder. Name a file.",
    ),
    "config_no_yaml": (write("c.yaml", "trainer: [1, {"), ["--config=c.yaml"], "c.yaml"),
    "config_unknown_key": (write("c.yaml", "trainerz: 1"), ["--config=c.yaml"], "trainerz"),
    "option_unknown": (nothing, ["--data.pathz=x"], "pathz"),
    "option_of_wrong_type": (nothing, ["--data.batch_size=many"], "batch_size"),
    "option_out_of_range": (nothing, ["--data.batch_size=0"], "at least 1. Received: 0"),
    "schedule_missing": (nothing, ["--rows.schedule=none.yaml"], "none.yaml"),
    "schedule_unknown_key_in_stage": (
        schedule({"epoch": 0, "rowz": "all"}),
        BAD_SCHEDULE,
        "stages[0]: the keys are ['epoch', 'grow', 'lr_scale', 'plateau', 'rows', 'share', 'step', "
        "'warmup_steps']. Received: 'rowz'",
    ),
    "rows_outside_in_a_later_stage": (
        schedule(stage(0), stage(5, [30])),
        BAD_SCHEDULE,
        "[0, 30). Received: 30",
    ),
    "vectors_missing": (nothing, BAD_VECTORS, "bad.txt, which is missing"),
    "vectors_ragged": (write("bad.txt", "film 1 2\nplot 1\n"), BAD_VECTORS, "line 2"),
    "vectors_of_other_words": (write("bad.txt", "qqq 1 2\n"), BAD_VECTORS, "language"),
    "vectors_of_other_dimension": (nothing, ["--data.dimension=7"], "7 values each. Received: 6"),
    "texts_missing": (nothing, BAD_TEXTS, "bad.csv, which is missing"),
    "texts_no_text_column": (write("bad.csv", "txt,label\na,b\n"), BAD_TEXTS, "'text'"),
    "texts_share": (nothing, ["--data.validation_share=1.5"], "(0, 1). Received: 1.5"),
    "checkpoint_missing": (nothing, BAD_CHECKPOINT, "bad.ckpt, which is missing"),
    "checkpoint_no_checkpoint": (write("bad.ckpt", "PK no zip"), BAD_CHECKPOINT, "bad.ckpt"),
    "checkpoint_of_nothing": (
        lambda: torch.save({"state_dict": {}}, "bad.ckpt"),
        BAD_CHECKPOINT,
        "bad.ckpt",
    ),
    "checkpoint_last_of_no_run": (nothing, ["--ckpt_path=last"], "which holds none"),
    "data_option": (nothing, ["--data.batchsize=3"], "Did you mean '--data.batch_size'?"),
    "trainer_option": (nothing, ["--trainer.max_epoch=3"], "Did you mean '--trainer.max_epochs'?"),
    "key_of_a_mapping": (
        write("typo.yaml", "rows: {schedul: {stages: []}}"),
        ["--config=typo.yaml"],
        "--rows.schedul is no option. Did you mean '--rows.schedule'?",
    ),
    "key_of_an_empty_mapping": (
        write("typo.yaml", "rows: {schedul: {}}"),
        ["--config=typo.yaml"],
        "--rows.schedul is no option. Did you mean '--rows.schedule'? See",
    ),
    "part_of_an_empty_mapping": (
        write("typo.yaml", "trainr: {}"),
        ["--config=typo.yaml"],
        "--trainr is no option.",
    ),
    "empty_mapping_of_a_class": (
        write("typo.yaml", "data: {init_args: {pathh: {}}}"),
        ["--config=typo.yaml"],
        "--data.pathh is no option. Did you mean '--data.path'? See",
    ),
    "empty_mapping_of_a_callback": (
        write("typo.yaml", f"trainer: {{callbacks: [{EARLY % 'patienc: {}'}]}}"),
        ["--config=typo.yaml"],
        "--trainer.callbacks.patienc is no option.",
    ),
    "number": (nothing, ["--model.lr=fast"], "--model.lr is float. Received: fast"),
    "choice": (nothing, ["--model.encoder=lstm"], "one of 'cnn', 'mean'. Received: lstm"),
    "trainer_value": (nothing, ["--trainer.accelerator=abacus"], "abacus"),
    "trainer_number": (nothing, ["--trainer.max_epochs=-5"], "You passed in -5. See"),
    "channels": (nothing, ["--model.channels=0"], "channels is at least 1. Received: 0. Leave"),
    "dropout": (nothing, ["--model.dropout=1"], "dropout lies in [0, 1). Received: 1.0. Leave"),
    "rate": (nothing, ["--model.lr=-1"], "lr is at least 0. Received: -1.0. Leave"),
    "audit": (nothing, ["--rows.audit=-3"], "audit is true, false, or the number"),
    "no_value": (nothing, ["--data.path"], "expected one argument. See"),
    "class": (nothing, ["--model=NoModel"], "path of a class, as in my_module.MyModel. Received"),
    "config_list": (
        write("c.yaml", "[1]"),
        ["--config=c.yaml"],
        "a configuration is a mapping with parts",
    ),
    "config_part": (write("c.yaml", "model: 3"), ["--config=c.yaml"], "LightningModule. See"),
    "early_stopping": (early_stopping, ["--config=stop.yaml"], "`val_accurracy` which is not"),
    "best_monitor": (nothing, ["--best.monitor=val_acc"], "val_acc"),
    "not_a_number": (nothing, ["--model.lr=1e30"], "loss is a finite number"),
}
# What is only found once a run has begun, which leaves a folder.
BEGUN = ("early_stopping", "best_monitor", "not_a_number")


@pytest.mark.parametrize("case", CASES)
def test_bad_input_gets_one_line_and_leaves_no_file(
    case: str, small_run: list[str], complaint: Any
) -> None:
    prepare, args, part = CASES[case]
    prepare()
    before = files_below(Path())
    assert part in complaint("fit", *small_run, "--trainer.max_epochs=1", *args)
    assert (files_below(Path()) == before) == (case not in BEGUN)


def test_empty_mappings_of_known_keys_say_nothing(small_run: list[str]) -> None:
    callback = EARLY % "patience: 3"
    Path("empty.yaml").write_text(
        "data: {}\nmodel: {class_path: TextClassifier, init_args: {}, dict_kwargs: {}}\n"
        f"rows: {{}}\nmonitor: {{}}\ntrainer: {{callbacks: [{callback}]}}\n"
    )
    quick = ["--config=empty.yaml", "--trainer.fast_dev_run=true"]
    assert main(["fit", *small_run, *quick]) == 0


@pytest.mark.parametrize(
    ("args", "part"),
    [
        (["--data.seed=5"], "vocabulary it was trained on"),
        (["--data.path=other.csv"], "vocabulary it was trained on"),
        (["--data.vectors=wide.txt"], "6 values each"),
        (["--rows.schedule={stages: [{epoch: 0, rows: none}]}"], "a resumed run trains the rows"),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_refused(
    args: list[str], part: str, fitted_run: list[str], complaint: Any
) -> None:
    Path("other.csv").write_text(Path("texts.csv").read_text().replace("film", "book"))
    write_wide_vectors()
    before = {name: Path(name).read_bytes() for name in files_below(Path())}
    more = ["--ckpt_path=last", "--trainer.max_epochs=7"]
    assert part in complaint("fit", *fitted_run, *args, *more)
    assert {name: Path(name).read_bytes() for name in files_below(Path())} == before


def write_wide_vectors() -> None:
    lines = Path("vectors.txt").read_text().splitlines()
    Path("wide.txt").write_text("".join(f"{line} 0.5\n" for line in lines))


def test_a_full_disk_gets_one_line_and_leaves_no_half_of_a_file(
    small_run: list[str], complaint: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write_half(self: KeyedVectors, fname: str, **_: object) -> None:
        Path(fname).write_text("30 6\n<pad> 0")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(KeyedVectors, "save_word2vec_format", write_half)
    line = complaint("fit", *small_run, "--trainer.max_epochs=1")
    assert "No space left on device" in line
    assert not [name for name in files_below(RUN) if "vectors" in name]


class MovesFrozenRows(Callback):
    """What an optimizer that rowwise did not prepare would do."""

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        assert isinstance(pl_module, TextClassifier)
        pl_module.embedding.weight.data += 1e-3


def test_frozen_rows_that_moved_fail_the_command(
    small_run: list[str], complaint: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(TextClassifier, "configure_callbacks", lambda _: [MovesFrozenRows()])
    line = complaint("fit", *small_run, code=1)
    assert re.match(r"error: embedding: \d+ frozen rows changed by step \d+", line)
    assert "vectors.vec" not in files_below(RUN)
    (found,) = read_record(RUN).audit
    assert (found.stage, found.frozen) == (0, found.changed)


def test_bad_input_ends_a_real_process_with_code_2() -> None:
    command = [sys.executable, "-m", "partial_embedding.cli", "train"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 2
    assert re.fullmatch(r"error: [^\n]*fit, validate, test[^\n]*\n", done.stderr)


def test_checkpoints_keep_the_last_epoch_also_when_it_is_not_the_best(small_run: list[str]) -> None:
    assert main(["fit", *small_run, "--model.lr=0"]) == 0
    epochs = {
        name: torch.load(RUN / f"checkpoints/{name}.ckpt", weights_only=True)["epoch"]
        for name in ("last", "best")
    }
    assert epochs == {"last": 5, "best": 0}
