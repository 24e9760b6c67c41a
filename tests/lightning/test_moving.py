"""`RowUnfreezing` along every kind of schedule: steps, shares, plateaus, growth and rate_scales."""

import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import (
    EarlyStopping,
    ModelCheckpoint,
    RichProgressBar,
    TQDMProgressBar,
)
from small_runs import (
    BATCHES,
    EPOCHS,
    Net,
    data,
    fit,
    loader,
    replayable,
    trainer,
)

from partial_embedding import InputError
from partial_embedding.callbacks.lightning import RowUnfreezing
from partial_embedding.schedule import RateScale
from partial_embedding.torch.saved_state import cohorts_of

STEPS = EPOCHS * BATCHES


class RowWitness(pl.Callback):
    """Keeps the rows that trained in each batch, and the optimizer step that it was for."""

    def __init__(self) -> None:
        self.rows: list[list[int]] = []
        self.steps: list[int] = []
        self.bar: list[dict[str, Any]] = []

    def on_before_zero_grad(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        assert len(optimizer.param_groups) == 1

    def on_train_batch_start(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        self.rows.append(pl_module.words.trainable_rows.tolist())
        self.steps.append(trainer.global_step)

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        self.bar.append(dict(trainer.progress_bar_metrics))


class Validated(Net):
    """Logs a metric that follows a script, epoch by epoch; the sanity check sees the first one."""

    script: tuple[float, ...] = ()

    def validation_step(self, batch: Any, index: int) -> None:
        self.log("val_loss", self.script[min(self.current_epoch, len(self.script) - 1)])


def watch(net: Any, schedule: Any, *more: pl.Callback, **options: Any) -> RowWitness:
    """A run along a schedule, with an audit at the end of each stage."""
    witness = RowWitness()
    made = trainer(RowUnfreezing(schedule, audit=True), witness, *more, **options)
    validation = loader(data(1)) if isinstance(net, Validated) else None
    made.fit(net, loader(data()), validation, ckpt_path=options.pop("ckpt_path", None))
    return witness


# Where rows move

BY_STEP = {
    "stages": [
        {"epoch": 0, "rows": [1]},
        {"step": 4, "rows": [1, 2]},
        {"epoch": 2, "rows": [3]},
        {"step": 8, "rows": "all"},
    ]
}


def test_a_stage_may_begin_at_any_step() -> None:
    seen = watch(Net().build(), BY_STEP)
    assert seen.rows == 4 * [[1]] + 2 * [[1, 2]] + 2 * [[3]] + 4 * [list(range(12))]


def test_steps_are_those_of_the_optimizer() -> None:
    seen = watch(Net().build(), BY_STEP, accumulate_grad_batches=2)
    by_step = dict(zip(seen.steps, seen.rows, strict=True))
    assert sorted(by_step) == list(range(8))  # two batches, then the odd one, in each epoch
    assert by_step[3] == [1]
    assert by_step[4] == [3]  # epoch 2 begins with step 4, and is the later stage


@pytest.mark.parametrize("limits", [{"max_epochs": EPOCHS}, {"max_steps": STEPS, "max_epochs": -1}])
def test_a_stage_may_begin_at_a_share_of_the_run(limits: dict[str, int]) -> None:
    schedule = {"stages": [{"share": 0, "rows": [1]}, {"share": 0.75, "rows": [2]}]}
    seen = watch(Net().build(), schedule, **limits)
    assert seen.rows == 9 * [[1]] + 3 * [[2]]


def test_a_share_of_an_endless_run_is_refused_before_any_step() -> None:
    net = Net().build()
    schedule = {"stages": [{"share": 0, "rows": [1]}, {"share": 0.75, "rows": [2]}]}
    with pytest.raises(InputError, match=r"run of unknown length.*max_steps"):
        watch(net, schedule, max_epochs=-1, max_time={"seconds": 20})
    assert net.steps_begun == 0


def test_rows_grow_step_by_step_and_audits_watch_each_part(
    capsys: pytest.CaptureFixture[str],
) -> None:
    grow = {"shape": "linear", "order": "ids", "increments": 4}
    schedule = {
        "stages": [{"step": 0, "rows": [11]}, {"step": 8, "rows": [2, 3, 4, 5, 11], "grow": grow}]
    }
    seen = watch(Net().build(), schedule)
    assert seen.rows[::2] == [[11], [2, 11], [2, 3, 11], [2, 3, 4, 11], *2 * [[2, 3, 4, 5, 11]]]
    said = capsys.readouterr().out
    assert "words: stage 0 from step 4, increment 2 of 4 towards stage 1: 3 rows train" in said
    assert "audit: words: frozen rows by stage: 11, 7; changed a bit: 0" in said


# Metrics


PLATEAU = {"stages": [{"epoch": 0, "rows": [1]}, {"plateau": "val_loss", "rows": [2]}]}


def validated(*script: float) -> Any:
    net = Validated().build()
    net.script = script
    return net


@pytest.mark.parametrize(
    ("script", "epochs_before"),
    [((3.0, 2.0, 2.0, 1.0), 3), ((3.0, 3.0, 2.0), 2), ((4.0, 3.0, 2.0, 1.0), 4)],
)
@pytest.mark.parametrize("sanity", [0, 2])
def test_a_plateau_starts_a_stage_with_the_next_batch(
    script: tuple[float, ...], epochs_before: int, sanity: int
) -> None:
    seen = watch(validated(*script), PLATEAU, num_sanity_val_steps=sanity)
    before = epochs_before * BATCHES
    assert seen.rows == before * [[1]] + (STEPS - before) * [[2]]


def test_a_plateau_within_an_epoch_starts_a_stage_within_it() -> None:
    seen = watch(validated(1.0), PLATEAU, val_check_interval=1, num_sanity_val_steps=0)
    assert seen.rows == 2 * [[1]] + (STEPS - 2) * [[2]]


WITHOUT_VALIDATION: dict[str, tuple[type[Net], bool, dict[str, Any]]] = {
    "no_validation_data": (Validated, False, {}),
    "no_validation_step": (Net, True, {}),
    "no_batch_of_it": (Validated, True, {"limit_val_batches": 0}),
    "beyond_the_end": (Validated, True, {"check_val_every_n_epoch": 9}),
}


@pytest.mark.parametrize("case", WITHOUT_VALIDATION)
def test_stages_that_wait_are_refused_where_nothing_validates(case: str) -> None:
    kind, with_data, options = WITHOUT_VALIDATION[case]
    net = kind().build()
    made = trainer(RowUnfreezing(PLATEAU), **options)
    why = r"check_val_every_n_epoch=9 of \d" if case == "beyond_the_end" else "limit_val_batches=0"
    with pytest.raises(InputError, match=rf"'val_loss'.* never validates: .*{why}"):
        made.fit(net, loader(data()), loader(data(1)) if with_data else None)
    assert net.steps_begun == 0


def test_early_stopping_by_the_metric_that_stages_wait_for_is_warned_of() -> None:
    class Gentle(EarlyStopping):
        """A subclass of one's own."""

    def run(*more: pl.Callback, schedule: Any = PLATEAU) -> list[str]:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            watch(validated(1.0), schedule, *more)
        return [str(w.message) for w in caught if "end the run" in str(w.message)]

    (told,) = run(Gentle("val_loss", patience=9))
    assert told.startswith("Gentle may end the run before stages that wait for a plateau of val_")
    # As it says: another metric, or none.
    assert run(EarlyStopping("lr", strict=False)) == run() == []
    assert run(EarlyStopping("val_loss"), schedule=BY_STEP) == []


def test_a_validation_outside_fit_counts_for_nothing() -> None:
    net, unfreezing = validated(1.0), RowUnfreezing(PLATEAU)
    made = trainer(unfreezing, max_epochs=1)
    made.validate(net, loader(data(1)))
    made.fit(net, loader(data()), loader(data(1)))
    seen = unfreezing.state_dict()["position"]["evaluations"]
    made.validate(net, loader(data(1)))
    assert unfreezing.state_dict()["position"]["evaluations"] == seen == [[0, 3, {"val_loss": 1.0}]]


def test_a_fit_begins_anew_after_a_checkpoint_was_validated(tmp_path: Path) -> None:
    saving = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1)
    alone = watch(validated(1.0), PLATEAU, saving, enable_checkpointing=True)
    witness, net = RowWitness(), validated(1.0)
    made = trainer(RowUnfreezing(PLATEAU), witness)
    made.validate(net, loader(data(1)), ckpt_path=tmp_path / "epoch=2.ckpt")
    made.fit(net, loader(data()), loader(data(1)))
    assert witness.rows == alone.rows


@pytest.mark.parametrize("interval", [1, 2, 3])
def test_no_validation_is_left_out_or_counted_twice_on_resume(
    interval: int, tmp_path: Path
) -> None:
    class ByStep(Validated):
        def validation_step(self, batch: Any, index: int) -> None:
            self.log("val_loss", float(self.trainer.global_step % 5))

    waits = {"plateau": "val_loss"}
    stages = [{"epoch": 0, "rows": [1]}, {**waits, "rows": [2]}, {**waits, "rows": [3]}]

    def run(*more: pl.Callback, **options: Any) -> tuple[list[Any], list[list[int]]]:
        callback, witness = RowUnfreezing({"stages": stages}), RowWitness()
        checkpoint = options.pop("ckpt_path", None)
        made = trainer(callback, witness, *more, val_check_interval=interval, **options)
        made.fit(ByStep().build(), replayable(data()), loader(data(1)), ckpt_path=checkpoint)
        return callback.state_dict()["position"]["evaluations"], witness.rows

    saving = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=1, save_top_k=-1)
    seen, rows = run(saving, enable_checkpointing=True)
    assert [1] in rows
    assert [2] in rows
    # Within an epoch, at the end of one, before and after what a validation started.
    for step in (1, 2, 3, 4, 6, 8, STEPS - 1):
        assert run(ckpt_path=tmp_path / f"step={step}.ckpt") == (seen, rows[step:])


# Rates of their own


def test_an_optimizer_that_has_one_rate_is_refused_before_any_step() -> None:
    net = Net().build(make=lambda p: [torch.optim.LBFGS([x for part in p.values() for x in part])])
    schedule = {"stages": [{"epoch": 0, "rows": [1]}, {"epoch": 9, "rows": [2], "lr_scale": 0.5}]}
    with pytest.raises(InputError, match=r"words: stages\[1\].*LBFGS"):
        fit(net, schedule=schedule)
    assert net.steps_begun == 0


# What is shown


def test_progress_bars_show_stage_and_rows() -> None:
    seen = watch(Net().build(), BY_STEP)
    shown = [bar["words"] for bar in seen.bar]
    assert shown[:5] == 4 * ["stage 0: 1 rows"] + ["stage 1: 2 rows"]
    assert shown[-1] == "stage 3: 12 rows"


@pytest.mark.parametrize("bar", [TQDMProgressBar, RichProgressBar])
def test_the_bars_of_lightning_print_it(bar: type, capsys: pytest.CaptureFixture[str]) -> None:
    watch(Net().build(), BY_STEP, bar(), enable_progress_bar=True)
    captured = capsys.readouterr()
    printed = " ".join(re.sub(r"\x1b\[[0-9;]*m", "", captured.out + captured.err).split())
    assert "stage 3: 12 rows" in printed


# Resuming with another schedule


def changed(*stages: dict[str, Any]) -> dict[str, Any]:
    return {"stages": list(stages)}


def test_rows_that_trained_keep_the_rate_with_which_they_joined(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = {"epoch": 0, "rows": [1]}, {"step": 4, "rows": [1, 2]}
    saving = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=5)
    watch(Net().build(), changed(first, second), saving, max_steps=5, enable_checkpointing=True)
    slower = changed(first, {**second, "lr_scale": 0.5})
    witness = RowWitness()
    made = trainer(RowUnfreezing(slower), witness)
    made.fit(Net().build(), loader(data()), ckpt_path=tmp_path / "step=5.ckpt")
    told = "words: the schedule is not the checkpoint's: stages[1].lr_scale: 0.5 was added\n"
    assert told in capsys.readouterr().out
    assert witness.rows[0] == [1, 2]
    saved = cohorts_of(made.optimizers[0].state_dict()["state"][0]["rowwise"]).values()
    assert all(cohort.rate_scale.is_plain for cohort in saved)


def test_a_run_of_another_length_is_a_change_where_shares_count(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    schedule = changed({"share": 0, "rows": [1]}, {"share": 0.5, "rows": [2]})
    saving = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=3, save_top_k=-1)
    watch(Net().build(), schedule, saving, enable_checkpointing=True)
    witness, net = RowWitness(), Net().build()
    longer = trainer(RowUnfreezing(schedule), witness, max_epochs=2 * EPOCHS)
    longer.fit(net, loader(data()), ckpt_path=tmp_path / "step=3.ckpt")
    assert "total_steps: 12 became 24" in capsys.readouterr().out
    assert witness.rows == 9 * [[1]] + 12 * [[2]]
    # At step 9 of 24 other rows would train than those that did.
    net, longer = Net().build(), trainer(RowUnfreezing(schedule), max_epochs=2 * EPOCHS)
    with pytest.raises(InputError, match=r"total_steps: 12 became 24"):
        longer.fit(net, loader(data()), ckpt_path=tmp_path / "step=9.ckpt")
    assert net.steps_begun == 0


def test_a_checkpoint_with_rates_loads_without_the_callback_and_back(
    tmp_path: Path,
) -> None:
    class Keep(pl.Callback):
        def on_train_end(self, trainer: Any, pl_module: Any) -> None:
            trainer.save_checkpoint(tmp_path / "made.ckpt")

    schedule = changed({"epoch": 0, "rows": [1, 2], "lr_scale": 0.5, "warmup_steps": 5})
    watch(Net().build(), schedule, Keep(), max_epochs=1)
    saved = torch.load(tmp_path / "made.ckpt", weights_only=True)
    (cohort,) = cohorts_of(saved["optimizer_states"][0]["state"][0]["rowwise"]).values()
    assert (cohort.rate_scale, cohort.steps) == (RateScale(0.5, 5), 3)
    plain = Net().build(plain=True)
    trainer(Keep(), max_epochs=2).fit(plain, loader(data()), ckpt_path=tmp_path / "made.ckpt")
    witness = RowWitness()
    made = trainer(RowUnfreezing(schedule), witness, max_epochs=3)
    made.fit(Net().build(), loader(data()), ckpt_path=tmp_path / "made.ckpt")
    assert witness.rows == BATCHES * [[1, 2]]
    cohorts = cohorts_of(made.optimizers[0].state_dict()["state"][0]["rowwise"]).values()
    assert [cohort.steps for cohort in cohorts] == [3]  # they joined with this run
