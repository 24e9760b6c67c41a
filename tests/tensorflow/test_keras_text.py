"""The text classifier in Keras: what it reads, what it learns, what it saves."""

import json
import re
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest

pytest.importorskip("gensim")

from partial_embedding import InputError, Schedule
from partial_embedding.cli import main
from partial_embedding.monitor.record import read_record
from partial_embedding.recipes import keras_commands, keras_text
from partial_embedding.recipes.prepare_texts import (
    PreparedTexts,
    TextSettings,
    padded,
    prepare_texts,
)
from partial_embedding.recipes.settings import ClassifierSettings, read_config
from partial_embedding.schedule.preview import plan

ROOT = Path(__file__).parents[2]
CONFIG = """
rows:
  schedule: {stages: [{epoch: 0, rows: missing}, {epoch: 1, rows: all}]}
  audit: true
trainer: {max_epochs: 2, default_root_dir: RUNS/text}
model: {encoder: ENCODER, channels: 4, lr: 0.01}
data: {path: RUNS/texts.csv, dimension: 4, batch_size: 8, cache: ""}
"""


@pytest.fixture
def config(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    words = {"sea": ["ship", "wave", "salt", "sail"], "sky": ["wing", "cloud", "wind", "bird"]}
    lines = ["text,label"] + [
        f"{' '.join(rng.choice(own, 6))} rare{i},{name}"
        for name, own in words.items()
        for i in range(30)
    ]
    (tmp_path / "texts.csv").write_text("\n".join(lines))
    path = tmp_path / "config.yaml"
    path.write_text(CONFIG.replace("RUNS", str(tmp_path)).replace("ENCODER", "cnn"))
    return path


@pytest.fixture
def refusal(capsys: pytest.CaptureFixture[str]) -> Callable[[list[str]], str]:
    """The one line in which a command is refused."""

    def refusal(args: list[str]) -> str:
        capsys.readouterr()
        assert main(args) == 2
        (line,) = capsys.readouterr().err.splitlines()
        return line

    return refusal


def texts_of(config: Path) -> PreparedTexts:
    return prepare_texts(keras_text.read_parts(read_config(config))["data"])


def test_a_run_says_its_stages_and_saves_a_file_that_a_fresh_process_loads(
    config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = []
    for version, encoder in enumerate(("cnn", "mean")):
        assert main(["fit", f"--config={config}", f"--model.encoder={encoder}"]) == 0
        lines = capsys.readouterr().out.splitlines()
        stages = [line.split(": ")[1] for line in lines if ": stage " in line]
        assert [stage.split(" from")[0] for stage in stages] == ["stage 0", "stage 1"]
        assert any(line.startswith("audit: embedding: ") for line in lines)
        assert any(line.endswith("changed a bit: 0") for line in lines)
        files.append(saved := config.parent / "text" / f"version_{version}" / "model.keras")
        record = read_record(saved.parent)
        assert [report.changed for report in record.audit] == [0, 0]
        track, planned = record.tables["embedding"], record.plans["embedding"]
        assert [place for place, _ in track.trainable] == [0.0, 1.0]
        assert [rows for _, rows in track.trainable] == [stage.trainable for stage in planned]
        assert {"gradient_norm", "lr"} <= track.cohorts[0].numbers.keys()
        assert record.scores[0].metrics.keys() == {"accuracy", "loss", "val_accuracy", "val_loss"}
        kept = read_config(saved.parent / "config.yaml")
        assert kept["model"].pop("encoder") == encoder
        expected = read_config(config)
        del expected["model"]["encoder"]
        assert kept == expected
    script = (
        "import keras, numpy, sys, partial_embedding.recipes.keras_text\n"
        "for file in sys.argv[1:]:\n"
        "    model = keras.models.load_model(file)\n"
        "    print(model.predict(numpy.array([[2, 3, 4, 5, 6]]), verbose=0).tolist())"
    )
    run = subprocess.run(
        [sys.executable, "-c", script, *files],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    here = [
        keras.models.load_model(f).predict(np.array([[2, 3, 4, 5, 6]]), verbose=0) for f in files
    ]
    assert run.stdout.strip().splitlines()[-2:] == [str(scores.tolist()) for scores in here]


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(path.stem, marks=[] if path.stem == "linear_growth" else pytest.mark.full)
        for path in sorted((ROOT / "configs" / "schedules").glob("*.yaml"))
        if path.stem != "new_items"
    ],
)
def test_a_schedule_of_words_runs_as_planned(
    name: str, config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, epochs = ROOT / "configs" / "schedules" / f"{name}.yaml", 8
    text = (
        config.read_text().replace("cnn", "mean").replace("max_epochs: 2", f"max_epochs: {epochs}")
    )
    first, last = text.index("{stages"), text.index("\n  audit")
    text = f"{text[:first]}{path}{text[last:]}".replace("batch_size: 8", "batch_size: 1")
    config.write_text(text)
    assert main(["fit", f"--config={config}"]) == 0
    out = capsys.readouterr().out
    assert re.search(r"audit: embedding: frozen rows by stage: .*; changed a bit: 0\n", out)
    said = re.findall(r"embedding: (stage .+?): ([\d,]+) rows train", out)
    data = texts_of(config)
    rows, steps = len(data.vocabulary), len(data.training)
    planned = plan(Schedule.parse(path), rows, data.vocabulary, epochs, steps, padding=0)
    if name == "plateau":
        # When validation stops improving is not for a plan to know; what comes then is.
        assert said[0] == (planned[0].place, f"{planned[0].trainable:,}")
        assert [place.split(" from ")[0] for place, _ in said] == ["stage 0", "stage 1", "stage 2"]
    else:
        assert said == [(step.place, f"{step.trainable:,}") for step in planned]


EVERY_START = """
    embedding:
      stages:
        - {epoch: 0, rows: missing, lr_scale: 0.5}
        - {step: 2, rows: {most_frequent: 0.5}, warmup_steps: 3}
        - {plateau: {monitor: val_loss, max_wait: 1}, rows: {least_frequent: 3}}
        - {share: 0.5, rows: {covering: 0.5}}
        - {share: 0.75, rows: all, grow: cosine}
"""


def test_it_takes_the_schedules_of_the_lightning_recipe(
    config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = config.read_text().replace("cnn", "mean").replace("max_epochs: 2", "max_epochs: 4")
    first, last = text.index("{stages"), text.index("\n  audit")
    config.write_text(f"{text[:first]}{EVERY_START}\n  lazy: true{text[last:]}")
    assert main(["fit", f"--config={config}"]) == 0
    lines = capsys.readouterr().out.splitlines()
    told = [line.split(": stage ")[1] for line in lines if line.startswith("embedding: stage ")]
    assert list(dict.fromkeys(int(line[0]) for line in told)) == [0, 1, 2, 3, 4]
    assert lines[-2].endswith("changed a bit: 0")


def test_the_order_and_the_dropout_of_an_epoch_follow_from_its_number(config: Path) -> None:
    batches = keras_text.TextBatches([[2]] * 50, np.zeros(50, np.int64), 8, seed=3)
    orders = []
    for epoch in (0, 1, 0):
        batches.set_epoch(epoch)
        orders.append(batches.order.tolist())
    assert orders[0] == orders[2] != orders[1]
    model = keras.Sequential([keras.layers.Dropout(0.5, seed=1)])
    seeds = keras_text.EpochSeeds(batches)
    seeds.set_model(model)
    drawn: list[Any] = []
    for epoch in (0, 1, 0):
        seeds.on_epoch_begin(epoch)
        drawn.append(model(np.ones((1, 50)), training=True).numpy().tolist())
    assert drawn[0] == drawn[2] != drawn[1]


def test_a_score_does_not_depend_on_the_longest_text_of_the_batch(config: Path) -> None:
    data = texts_of(config)
    model = keras_text.text_classifier(data, ClassifierSettings(channels=4))
    short = np.array([[3, 4, 5, 6, 7]])
    padded = np.pad(short, ((0, 0), (0, 9)))
    np.testing.assert_allclose(
        model.predict(padded, verbose=0), model.predict(short, verbose=0), rtol=1e-5
    )


def test_settings_of_a_model_that_are_out_of_range_are_refused() -> None:
    with pytest.raises(InputError, match=r"channels is at least 1\. Received: 0"):
        keras_text.read_parts({"model": {"channels": 0}})
    with pytest.raises(InputError, match=r"dropout lies in \[0, 1\)\. Received: 2"):
        keras_text.read_parts({"model": {"dropout": 2.0}})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model: {depth: 3}", "model has the keys .*Received: 'depth'"),
        ("model: {dropuot: 0.3}", "Did you mean 'dropout'"),
        ("data: {batch_size: many}", r"data\.batch_size is int\. Received: 'many'"),
        ("data: {batch_size: 0}", "batch_size is at least 1. Received: 0"),
        ("trainer: {max_epochs: 2.5}", r"trainer\.max_epochs is int\. Received: 2\.5"),
        ("colour: {}", "has the parts .*Received: 'colour'"),
        (
            "rows: {schedule: {items: {stages: [{epoch: 0, rows: all}]}}}",
            r"\['embedding'\]. Received: 'items'",
        ),
        ("model: {encoder: rnn}", r"model\.encoder is one of \('cnn', 'mean'\)\. Received: 'rnn'"),
        ("{", "a configuration is YAML"),
        ("rows: missing", "rows is a mapping of its settings. Received: 'missing'"),
        ("model: {class_path: TextData, init_args: 3}", "model is a mapping of its settings"),
        ("model: {class_path: a.New}", r"in Keras, model is one of .*Received: a\.New\."),
        ("model: {lazy: true}", "model has the keys .*Received: 'lazy'"),
        ("model: {schedule: rows.yaml}", "model has the keys .*Received: 'schedule'"),
        ("trainer: {max_epochs: 0}", "max_epochs is at least 1. Received: 0"),
        ("trainer: {default_root_dir: config.yaml}", "default_root_dir is a folder. Received: "),
    ],
)
def test_a_configuration_that_is_wrong_is_refused_in_one_line(
    text: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refusal: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("config.yaml").write_text(text)
    line = refusal(["fit", "--config=config.yaml"])
    assert re.search(message, line), line


@pytest.mark.parametrize("name", ["quickstart", "text_classification"])
def test_a_configuration_of_the_repository_is_read(name: str) -> None:
    config = read_config(ROOT / "configs" / f"{name}.yaml")
    assert keras_text.read_parts(config)["rows"].schedule == config["rows"]["schedule"]


def test_a_configuration_of_the_lightning_recipe_runs_with_options_and_says_what_is_left_out(
    config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = {
        "data.path": config.parent / "texts.csv",
        "data.cache": "",
        "data.dimension": 4,
        "trainer.max_epochs": 1,
        "trainer.default_root_dir": config.parent,
    }
    given = [f"--{name}={value}" for name, value in options.items()]
    assert main(["fit", "--config", str(ROOT / "configs" / "quickstart.yaml"), *given]) == 0
    out = capsys.readouterr().out
    assert "in Keras, these parts of the configuration are left out: best\n" in out
    assert "of 2 classes: sea " in out
    saved = read_config(config.parent / "version_0" / "config.yaml")
    assert saved["trainer"]["max_epochs"] == 1
    assert saved["data"]["dimension"] == 4


def test_a_checkpoint_alone_is_measured_and_asked(
    config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["fit", f"--config={config}"]) == 0
    run = config.parent / "text" / "version_0"
    model, data = keras.models.load_model(run / "model.keras"), texts_of(config)
    for file in (config, config.parent / "texts.csv"):
        file.unlink()
    new = config.parent / "new.csv"
    new.write_text("text,label\nship wave salt,sea\nwing cloud bird,sky\nship sail unheard,sky\n")
    root = f"--trainer.default_root_dir={config.parent / 'text'}"
    capsys.readouterr()
    assert main(["test", "--ckpt_path=last", root, f"--data.test_path={new}"]) == 0
    said = capsys.readouterr().out
    assert f"checkpoint: {run / 'model.keras'}\n" in said
    texts, labels = zip(
        *(line.split(",") for line in new.read_text().splitlines()[1:]), strict=True
    )
    ids = padded(TextSettings().encode(texts, data.vocabulary))
    shares = np.exp(scores := model.predict(ids, verbose=0)) / np.exp(scores).sum(1, keepdims=True)
    likely = [data.training.names[k] for k in scores.argmax(axis=1)]
    right = sum(name == label for name, label in zip(likely, labels, strict=True)) / 3
    assert f"test_accuracy: {right:.4f}\n" in said
    assert re.search(r"test_loss: \d", said)

    file = config.parent / "out" / "said.csv"
    asked = ["predict", f"--ckpt_path={run}", root, f"--data.test_path={new}", f"--output={file}"]
    assert main([*asked, "--top_k=2"]) == 0
    header, *lines = file.read_text().splitlines()
    assert header == "text,label,probability,label_2,probability_2"
    assert [line.split(",")[:2] for line in lines] == [
        list(p) for p in zip(texts, likely, strict=True)
    ]
    for line, share in zip(lines, shares, strict=True):
        said_shares = [float(cell) for cell in line.split(",")[2::2]]
        np.testing.assert_allclose(said_shares, sorted(share, reverse=True), atol=1e-4)
    capsys.readouterr()
    assert main(["predict", f"--ckpt_path={run / 'model.keras'}", "--text=ship wave salt"]) == 0
    assert f"ship wave salt,{likely[0]},{shares[0].max():.4f}\n" in capsys.readouterr().out
    assert main([*asked[:-1], f"--output={run}"]) == 2
    assert "predictions are written to a file. Received a folder." in capsys.readouterr().err


@pytest.mark.parametrize(
    ("option", "message"),
    [
        # A name stands as it is, whatever it would be in YAML.
        ("--data.path=*.csv", r"Received: \*\.csv, which is missing"),
        ("--data.path=a: b", "Received: a: b, which is missing"),
        ("--data.path=1", "Received: 1, which is missing"),
        ("--model.lr=&", "argument --model.lr: a setting is a value in YAML. Received: '&'"),
        ("--rows.schedule={stages: [", "argument --rows.schedule: a setting is a value in YAML"),
        (f"--data.seed={'9' * 20}", "argument --data.seed: a setting is a value in YAML"),
        ("--model.schedule=rows.yaml", "Did you mean '--rows.schedule'"),
    ],
)
def test_an_option_that_is_wrong_is_refused_in_one_line(
    option: str, message: str, refusal: Any
) -> None:
    line = refusal(["fit", option])
    assert re.search(message, line), line


DAMAGES: dict[str, tuple[str, Callable[[Any], object]]] = {
    "no mapping": ("list indices", lambda meaning: []),
    "no tokens": ("not iterable", lambda meaning: {**meaning, "tokens": 3}),
    "fewer tokens": ("rows and classes", lambda meaning: {**meaning, "tokens": ["<unk>"]}),
    "fewer classes": ("rows and classes", lambda meaning: {**meaning, "names": ["sea"]}),
    "another setting": ("'depth'", lambda meaning: {**meaning, "texts": {"depth": 3}}),
}


def test_a_checkpoint_that_is_damaged_is_refused_in_one_line(config: Path, refusal: Any) -> None:
    assert main(["fit", f"--config={config}", "--trainer.max_epochs=1"]) == 0
    run = config.parent / "text" / "version_0"
    whole = json.loads((run / "meaning.json").read_text())
    asked = ["predict", f"--ckpt_path={run}", "--text=ship"]
    for message, damage in DAMAGES.values():
        (run / "meaning.json").write_text(json.dumps(damage(whole)))
        line = refusal(asked)
        assert re.search(f"a checkpoint is the model.keras of a run.*{message}", line), line
    (run / "meaning.json").write_text(json.dumps(whole))
    with zipfile.ZipFile(run / "model.keras", "w") as file:
        file.writestr("metadata.json", "{}")
    assert main(asked) == 2


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["test"], "Received no --ckpt_path. Pass last"),
        (["validate", "--ckpt_path=best"], "keeps its last model.*Pass last"),
        (["test", "--ckpt_path=last"], "holds none. Pass the --trainer.default_root_dir"),
        (["predict", "--ckpt_path=model.keras"], "model.keras, which is missing"),
        (["predict", "--ckpt_path=."], "meaning.json beside.*No such file"),
        (["test", "--ckpt_path=last", "--modell.lr=1"], "unrecognized arguments"),
    ],
)
def test_what_cannot_be_measured_is_refused_in_one_line(
    args: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refusal: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    if "--ckpt_path=." in args:
        (tmp_path / "model.keras").touch()
    line = refusal(args)
    assert re.search(message, line), line


def test_a_run_that_diverges_stops_and_says_so(
    config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["fit", f"--config={config}", "--model.lr=1e30"]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert re.search(r"a loss is a finite number. Received: \S+ after \d steps, in epoch 0", error)
    assert not list(config.parent.glob("**/model.keras"))


def test_ways_of_training_are_compared(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--seeds=1", "--trainer.max_epochs=1", "--model.encoder=mean"]
    assert main(["compare", str(config), *options]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(",")[0] for line in lines[:4]] == ["frozen", "missing", "all", "staged"]
    assert any(line.startswith("best: ") for line in lines)


def test_schedules_are_shown_without_torch_and_options_that_are_meant_are_named(
    config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["schedule", str(config)]) == 0
    assert "stage 1 from epoch 1" in capsys.readouterr().out
    assert main(["fit", f"--config={config}", "--model.chanels=3"]) == 2
    assert "Did you mean '--model.channels'?" in capsys.readouterr().err


def test_the_recipe_never_imports_torch(tmp_path: Path) -> None:
    fake = tmp_path / "torch"
    fake.mkdir()
    (fake / "__init__.py").write_text("import sys; sys.exit('torch was imported')")
    script = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import {keras_commands.__name__}"
    run = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, check=False)
    assert run.returncode == 0, run.stderr[-2000:]
