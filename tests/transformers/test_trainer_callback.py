"""RowUnfreezing in Hugging Face's Trainer, on a tiny random GPT-2."""

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from oracle import assert_alike, rows_that_differ
from safetensors.torch import load_file
from tiny_language_models import training_arguments
from torch import Tensor

from partial_embedding import InputError
from partial_embedding.callbacks.transformers import RowUnfreezing
from partial_embedding.torch import FrozenRowsMoved, replace_embedding

SCHEDULE = {"stages": [{"epoch": 0, "rows": [3, 4]}, {"epoch": 2, "rows": {"range": [0, 10]}}]}


def model_of(
    sparse: bool = False, tied: bool = False, with_positions: bool = False, seed: int = 0
) -> Any:
    torch.manual_seed(seed)
    config = transformers.GPT2Config(
        vocab_size=50, n_positions=16, n_embd=8, n_layer=1, n_head=2, tie_word_embeddings=tied
    )
    model = transformers.GPT2LMHeadModel(config)
    for name in ("wte", "wpe") if with_positions else ("wte",):
        replace_embedding(model, name, trainable_rows="all", sparse=sparse)
    return model


def train(
    folder: Path,
    resume: Path | None = None,
    model: Any = None,
    callbacks: tuple[Any, ...] = (),
    schedule: Any = SCHEDULE,
    checkpoint: str = "table",
    **options: Any,
) -> Any:
    """Train four epochs of four steps."""
    model = model or model_of()
    ids = [torch.arange(i, i + 8) % 50 for i in range(32)]
    given = {
        "num_train_epochs": 4,
        "per_device_train_batch_size": 8,
        "weight_decay": 0.1,
        "learning_rate": 1e-2,
        "save_strategy": "epoch",
    }
    arguments = training_arguments(folder, **{**given, **options})
    examples = [{"input_ids": i, "labels": i} for i in ids]
    own = [RowUnfreezing(schedule, audit=2, checkpoint=checkpoint)] if schedule else []
    transformers.Trainer(
        model,
        arguments,
        train_dataset=examples,
        eval_dataset=examples[:8],
        callbacks=[*own, *callbacks],
    ).train(resume_from_checkpoint=str(resume) if resume else None)
    return model


def words_of(model: Any) -> Tensor:
    weight: Tensor = model.transformer.wte.weight.detach()
    return weight


def test_only_scheduled_rows_move(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = train(tmp_path)
    assert rows_that_differ(words_of(model_of()), words_of(model)) == list(range(10))
    printed = capsys.readouterr().out
    assert "stage 0 from epoch 0: 2 rows train" in printed
    assert "stage 1 from epoch 2: 10 rows train" in printed
    assert "audit: transformer.wte: frozen rows by stage: 48, 40; changed a bit: 0" in printed


@pytest.mark.parametrize(
    ("checkpoint", "tied"),
    [("table", False), ("rows", False), ("rows", True)],
    ids=["table", "rows", "tied_rows"],
)
def test_a_resumed_run_ends_where_the_uninterrupted_one_does(
    checkpoint: str, tied: bool, tmp_path: Path
) -> None:
    whole = train(tmp_path, model=model_of(tied=tied), checkpoint=checkpoint)
    for epoch, rows in ((1, [3, 4]), (2, [3, 4]), (3, [*range(10)])):
        place = tmp_path / f"checkpoint-{4 * epoch}"
        if checkpoint == "rows":
            saved = load_file(place / "model.safetensors")
            assert saved["transformer.wte.weight.ids"].tolist() == rows
            assert "transformer.wte.weight" not in saved
        resumed = train(tmp_path / "again", place, model_of(tied=tied), checkpoint=checkpoint)
        assert_alike(resumed, whole)


class Interrupts(transformers.TrainerCallback):
    """Ends a run as a user does in a notebook, in the midst of a step or of an evaluation."""

    def __init__(self, at: str) -> None:
        setattr(self, at, self.interrupt)

    def interrupt(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step > 5:
            raise KeyboardInterrupt


@pytest.mark.parametrize("at", ["on_step_begin", "on_optimizer_step", "on_save"])
def test_what_is_saved_after_an_interrupted_run_is_whole(at: str, tmp_path: Path) -> None:
    model, own = model_of(), RowUnfreezing(SCHEDULE, checkpoint="rows")
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, model=model, schedule=None, callbacks=(own, Interrupts(at)))
    assert "transformer.wte.weight" in model.state_dict()
    train(tmp_path, tmp_path / "checkpoint-4", model=model, schedule=None, callbacks=(own,))
    assert "transformer.wte.weight.ids" in load_file(tmp_path / "checkpoint-8/model.safetensors")
    assert "transformer.wte.weight" in model.state_dict()


def test_rows_of_another_base_are_refused(tmp_path: Path) -> None:
    train(tmp_path, checkpoint="rows", num_train_epochs=2)
    with pytest.raises(InputError, match=r"'transformer\.wte\.weight'.*same vectors"):
        train(tmp_path / "again", tmp_path / "checkpoint-8", model_of(seed=1), checkpoint="rows")


def test_a_word_is_not_taken_for_true() -> None:
    with pytest.raises(InputError, match="lazy is True or False"):
        RowUnfreezing({"stages": [{"epoch": 0, "rows": [1]}]}, lazy="no")  # type: ignore[arg-type]


def test_the_best_rows_are_loaded_at_the_end_and_saved_whole(tmp_path: Path) -> None:
    model = train(
        tmp_path,
        checkpoint="rows",
        eval_strategy="epoch",
        load_best_model_at_end=True,
        metric_for_best_model="loss",
        greater_is_better=True,  # the first one is the best
    )
    assert rows_that_differ(words_of(model_of()), words_of(model)) == [3, 4]
    assert "transformer.wte.weight" in model.state_dict()


def test_a_sparse_table_is_clipped_as_a_dense_one(tmp_path: Path) -> None:
    dense, sparse, unclipped = (
        words_of(train(tmp_path, model=model_of(sparse=sparse), max_grad_norm=norm))
        for sparse, norm in ((False, 0.1), (True, 0.1), (False, 1e9))
    )
    assert rows_that_differ(words_of(model_of()), sparse) == list(range(10))
    torch.testing.assert_close(sparse, dense)
    assert not torch.allclose(unclipped, dense, atol=1e-5)


def test_a_write_into_a_frozen_row_is_found(tmp_path: Path) -> None:
    class Vandal(transformers.TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 5:
                kwargs["model"].get_input_embeddings().weight.data[20, 0] += 1e-3

    with pytest.raises(FrozenRowsMoved, match=r"transformer.wte: 1 frozen row changed.*: 20\."):
        train(tmp_path, callbacks=(Vandal(),))


# Schedules that move within epochs and wait for metrics

MIXED = {
    "stages": [
        {"step": 0, "rows": [3]},
        {
            "step": 3,
            "rows": [3, 4, 5, 6],
            "grow": {"order": "ids", "increments": 3},
            "lr_scale": 0.5,
        },
        {"plateau": {"monitor": "eval_loss", "max_wait": 1}, "rows": [4, 5, 9], "warmup_steps": 4},
        {"share": 0.75, "rows": {"range": [0, 12]}},
    ]
}
EVERY_STEP = {
    "save_strategy": "steps",
    "save_steps": 1,
    "eval_strategy": "steps",
    "eval_steps": 4,
    "eval_on_start": True,
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """A run of which each step is saved, and its model."""
    folder = tmp_path_factory.mktemp("whole")
    return folder, train(folder, schedule=MIXED, **EVERY_STEP)


class Witness(transformers.TrainerCallback):
    """Keeps how many rows train in each step."""

    def __init__(self) -> None:
        self.rows: list[int] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.rows.append(len(kwargs["model"].get_input_embeddings().trainable_rows))


def test_rows_move_within_epochs_and_on_metrics(tmp_path: Path) -> None:
    seen = Witness()
    train(tmp_path, schedule=MIXED, callbacks=(seen,), **EVERY_STEP)
    # The evaluation after the fourth step is the first one of the stage, and the one before the
    # first step is none.
    assert seen.rows == [1, 2, 3, 4] + 8 * [3] + 4 * [12]


@pytest.mark.parametrize("step", [1, 2, 3, 4, 6, 8, 12, 13])
def test_a_run_resumed_at_any_step_ends_where_the_uninterrupted_one_does(
    step: int, whole: tuple[Path, Any], tmp_path: Path
) -> None:
    folder, model = whole
    resumed = train(tmp_path, folder / f"checkpoint-{step}", schedule=MIXED, **EVERY_STEP)
    assert_alike(resumed, model)


def test_the_trainer_may_restore_the_schedule_itself(
    whole: tuple[Path, Any], tmp_path: Path
) -> None:
    restored = {**EVERY_STEP, "restore_callback_states_from_checkpoint": True}
    resumed = train(tmp_path, whole[0] / "checkpoint-6", schedule=SCHEDULE, **restored)
    assert_alike(resumed, whole[1])


def test_where_the_schedule_stands_is_in_the_trainers_state(whole: tuple[Path, Any]) -> None:
    read = json.loads((whole[0] / "checkpoint-5" / "trainer_state.json").read_text())
    saved = read["stateful_callbacks"]["RowUnfreezing"]["attributes"]["saved"]
    ((epoch, step, metrics),) = saved["position"]["evaluations"]
    assert (epoch, step, list(metrics)) == (0, 4, ["eval_loss"])
    assert saved["position"]["total_steps"] == 16


def test_a_changed_schedule_is_refused_or_told_of(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(tmp_path, num_train_epochs=1)
    later = {"stages": [SCHEDULE["stages"][0], {"epoch": 3, "rows": [1]}]}
    train(tmp_path / "a", tmp_path / "checkpoint-4", schedule=later)
    assert "not the checkpoint's: stages[1].epoch: 2 became 3" in capsys.readouterr().out
    other = {"stages": [{"epoch": 0, "rows": [3]}]}
    with pytest.raises(InputError, match=r"\[3, 4\]}\. Received: .*\[3\]"):
        train(tmp_path / "b", tmp_path / "checkpoint-4", schedule=other)


def test_a_checkpoint_without_the_callback_resumes_with_it_and_back(tmp_path: Path) -> None:
    train(tmp_path / "a", schedule=None, num_train_epochs=1)
    train(tmp_path / "b", tmp_path / "a" / "checkpoint-4", num_train_epochs=2)
    train(tmp_path / "c", tmp_path / "b" / "checkpoint-8", schedule=None, num_train_epochs=3)
    seen = Witness()
    train(tmp_path / "d", tmp_path / "c" / "checkpoint-12", callbacks=(seen,))
    assert seen.rows == 4 * [10]


def test_a_metric_that_is_not_evaluated_is_one_error(tmp_path: Path) -> None:
    waits = {"stages": [{"epoch": 0, "rows": [3]}, {"plateau": "eval_f1", "rows": [4]}]}
    model, own = model_of(), RowUnfreezing(waits, checkpoint="rows")
    with pytest.raises(InputError, match=r"'eval_f1'. Received: .*'eval_loss'"):
        train(tmp_path, None, model, (own,), None, eval_strategy="epoch")
    assert "transformer.wte.weight" in model.state_dict()


def test_stages_that_wait_are_refused_where_nothing_evaluates(tmp_path: Path) -> None:
    waits = {"stages": [{"epoch": 0, "rows": [3]}, {"plateau": "eval_loss", "rows": [4]}]}
    with pytest.raises(InputError, match=r"'eval_loss'.* its eval_strategy is 'no'\. Set it to"):
        train(tmp_path, schedule=waits)


@pytest.mark.parametrize("other", [SCHEDULE, {"transformer.wte": SCHEDULE}], ids=["all", "named"])
def test_two_callbacks_for_one_table_are_refused(tmp_path: Path, other: Any) -> None:
    with pytest.raises(InputError, match=r"one schedule\. Received two RowUnfreezing"):
        train(tmp_path, schedule={"transformer.wte": SCHEDULE}, callbacks=(RowUnfreezing(other),))


def test_early_stopping_by_the_metric_that_stages_wait_for_is_warned_of(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    waits = {"stages": [{"epoch": 0, "rows": [3]}, {"plateau": "eval_loss", "rows": [4]}]}

    def run(folder: str, metric: str) -> None:
        train(
            tmp_path / folder,
            schedule=waits,
            callbacks=(transformers.EarlyStoppingCallback(early_stopping_patience=9),),
            eval_strategy="epoch",
            load_best_model_at_end=True,
            metric_for_best_model=metric,
        )

    with pytest.warns(UserWarning, match=r"EarlyStoppingCallback may end .* plateau of eval_loss"):
        run("a", "loss")
    assert "transformer.wte: the run ended before stage 1" in capsys.readouterr().out
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run("b", "runtime")
    assert not [w for w in caught if "end the run" in str(w.message)]


def test_two_callbacks_move_two_tables_and_are_resumed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(folder: Path, resume: Path | None = None, schedule: Any = SCHEDULE) -> Any:
        other = {"stages": [{"epoch": 0, "rows": [1]}, {"epoch": 3, "rows": [1, 2]}]}
        second = RowUnfreezing({"transformer.wpe": other}, audit=1)
        schedule = {"transformer.wte": schedule}
        model = model_of(with_positions=True)
        train(folder, resume, model, callbacks=(second,), schedule=schedule)
        # Those that ended in this process.
        ended = [(one.stage, one.changed) for one in second.audit_results]
        goes_on_late = resume is not None and resume.name == "checkpoint-12"
        assert ended == ([(1, 0)] if goes_on_late else [(0, 0), (1, 0)])
        return model

    whole = run(tmp_path / "a")
    for step in (4, 12):
        # Each is told of its own schedule.
        longer = {"stages": [*SCHEDULE["stages"], {"epoch": 9, "rows": [1]}]}
        resumed = run(tmp_path / "b", tmp_path / "a" / f"checkpoint-{step}", longer)
        told = [line for line in capsys.readouterr().out.splitlines() if "checkpoint's" in line]
        assert [line.partition(" ")[0] for line in told] == ["transformer.wte:"]
        assert_alike(resumed, whole)
