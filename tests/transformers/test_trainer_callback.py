"""RowUnfreezing in Hugging Face's Trainer, on a tiny random GPT-2."""

import json
import warnings
from pathlib import Path
from typing import Any

import pytest

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

import torch  # noqa: E402  # after the packages that may be missing
from oracle import rows_that_differ  # noqa: E402
from tiny_language_models import training_arguments  # noqa: E402
from torch import Tensor  # noqa: E402

from partial_embedding import InputError  # noqa: E402
from partial_embedding.callbacks.transformers import RowUnfreezing  # noqa: E402
from partial_embedding.torch import FrozenRowsMoved, PartialEmbedding  # noqa: E402

SCHEDULE = {"stages": [{"epoch": 0, "rows": [3, 4]}, {"epoch": 2, "rows": {"range": [0, 10]}}]}


def train(
    folder: Path,
    resume: Path | None = None,
    sparse: bool = False,
    callbacks: tuple[Any, ...] = (),
    schedule: Any = SCHEDULE,
    partial_positions: bool = False,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """Train four epochs of four steps; the table before and after."""
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=50, n_positions=16, n_embd=8, n_layer=1, n_head=2, tie_word_embeddings=False
    )
    model = transformers.GPT2LMHeadModel(config)
    table = PartialEmbedding.from_pretrained(
        model.get_input_embeddings().weight.data.clone(), sparse=sparse
    )
    model.set_input_embeddings(table)
    if partial_positions:
        positions = model.transformer.wpe.weight.data.clone()
        model.transformer.wpe = PartialEmbedding.from_pretrained(positions, sparse=sparse)
    before = table.weight.detach().clone()
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
    transformers.Trainer(
        model,
        arguments,
        train_dataset=examples,
        eval_dataset=examples[:8],
        callbacks=[*([RowUnfreezing(schedule, audit=2)] if schedule else []), *callbacks],
    ).train(resume_from_checkpoint=str(resume) if resume else None)
    return before, table.weight.detach().clone()


def test_only_scheduled_rows_move(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before, after = train(tmp_path)
    assert rows_that_differ(before, after) == list(range(10))
    printed = capsys.readouterr().out
    assert "stage 0 from epoch 0: 2 rows train" in printed
    assert "stage 1 from epoch 2: 10 rows train" in printed
    assert "audit: transformer.wte: frozen rows by stage: 48, 40; changed a bit: 0" in printed


@pytest.mark.parametrize("epoch", [1, 2, 3])
def test_a_resumed_run_ends_where_the_uninterrupted_one_does(tmp_path: Path, epoch: int) -> None:
    _, after = train(tmp_path)
    _, resumed = train(tmp_path, resume=tmp_path / f"checkpoint-{4 * epoch}")
    assert not rows_that_differ(after, resumed)


def test_a_sparse_table_is_clipped_as_a_dense_one(tmp_path: Path) -> None:
    before, dense = train(tmp_path / "a", max_grad_norm=0.1)
    _, sparse = train(tmp_path / "b", max_grad_norm=0.1, sparse=True)
    assert rows_that_differ(before, sparse) == list(range(10))
    torch.testing.assert_close(sparse, dense)
    _, unclipped = train(tmp_path / "c", max_grad_norm=1e9)
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
    tmp_path: Path, step: int
) -> None:
    _, after = train(tmp_path, schedule=MIXED, **EVERY_STEP)
    resumed = train(
        tmp_path / "again", tmp_path / f"checkpoint-{step}", schedule=MIXED, **EVERY_STEP
    )
    assert not rows_that_differ(after, resumed[1])


def test_where_the_schedule_stands_is_in_the_trainers_state(tmp_path: Path) -> None:
    train(tmp_path, schedule=MIXED, **EVERY_STEP)
    read = json.loads((tmp_path / "checkpoint-5" / "trainer_state.json").read_text())
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


def test_the_trainer_may_restore_the_schedule_itself(tmp_path: Path) -> None:
    _, after = train(tmp_path, schedule=MIXED, **EVERY_STEP)
    resumed = train(
        tmp_path / "again",
        tmp_path / "checkpoint-6",
        schedule=SCHEDULE,
        restore_callback_states_from_checkpoint=True,
        **EVERY_STEP,
    )
    assert not rows_that_differ(after, resumed[1])


def test_a_metric_that_is_not_evaluated_is_one_error(tmp_path: Path) -> None:
    waits = {"stages": [{"epoch": 0, "rows": [3]}, {"plateau": "eval_f1", "rows": [4]}]}
    with pytest.raises(InputError, match=r"'eval_f1'. Received: .*'eval_loss'"):
        train(tmp_path, schedule=waits, eval_strategy="epoch")


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
    def run(
        folder: Path, resume: Path | None = None, schedule: Any = SCHEDULE
    ) -> tuple[Tensor, Tensor]:
        other = {"stages": [{"epoch": 0, "rows": [1]}, {"epoch": 3, "rows": [1, 2]}]}
        second = RowUnfreezing({"transformer.wpe": other}, audit=1)
        positions: list[Tensor] = []

        class Swaps(transformers.TrainerCallback):
            """Takes the table of positions out at the end."""

            def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
                positions.append(kwargs["model"].transformer.wpe.weight.detach().clone())

        _, words = train(
            folder,
            resume,
            callbacks=(second, Swaps()),
            schedule={"transformer.wte": schedule},
            partial_positions=True,
        )
        return words, positions[0]

    whole = run(tmp_path / "a")
    for step in (4, 12):
        # Each is told of its own schedule.
        longer = {"stages": [*SCHEDULE["stages"], {"epoch": 9, "rows": [1]}]}
        resumed = run(tmp_path / "b", tmp_path / "a" / f"checkpoint-{step}", longer)
        told = [line for line in capsys.readouterr().out.splitlines() if "checkpoint's" in line]
        assert [line.partition(" ")[0] for line in told] == ["transformer.wte:"]
        for one, other in zip(whole, resumed, strict=True):
            assert not rows_that_differ(one, other)
