"""`RowUnfreezing`: what it says, what it refuses, checkpoints, resuming and the audit."""

import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from oracle import rows_that_differ, same_bits
from pytorch_lightning.callbacks import StochasticWeightAveraging, WeightAveraging
from pytorch_lightning.strategies import SingleDeviceStrategy
from small_runs import (
    BATCH,
    BATCHES,
    BY_NAME,
    EPOCHS,
    NEVER_TRAINED,
    OTHER,
    SCHEDULE,
    STAGES,
    Net,
    Parts,
    V,
    Witness,
    adamw,
    assert_frozen_rows_kept_their_bits,
    assert_same_run,
    data,
    fit,
    loader,
    reference_run,
    starting_table,
    trainer,
)
from torch import nn

from partial_embedding import InputError, Rows, Vocabulary
from partial_embedding.callbacks.lightning import RowUnfreezing
from partial_embedding.errors import FrozenRowsMoved
from partial_embedding.torch import masked_gradient_only
from partial_embedding.torch.optimizer import prepared


def stages(**rows_by_epoch: Any) -> dict[str, Any]:
    """A schedule from `epoch_0=[1, 2]` and the like."""
    made = [{"epoch": int(k.removeprefix("epoch_")), "rows": v} for k, v in rows_by_epoch.items()]
    return {"stages": made}


# Schedules and vocabularies


@pytest.mark.parametrize("owner", ["argument", "datamodule", "module"])
def test_rows_that_need_a_vocabulary_find_it(owner: str) -> None:
    vocabulary = Vocabulary(map(str, range(12)), counts=range(12), missing=[2, 5])
    schedule = stages(epoch_0="missing", epoch_1={"union": ["missing", {"most_frequent": 3}]})
    net, witness = Net().build(), Witness()
    callback = RowUnfreezing(schedule, vocabulary=vocabulary if owner == "argument" else None)
    datamodule = pl.LightningDataModule()
    datamodule.train_dataloader = lambda: loader(data())
    if owner != "argument":
        (datamodule if owner == "datamodule" else net).vocabulary = vocabulary
    trainer(callback, witness).fit(net, datamodule=datamodule)
    rows = {0: (2, 5), 1: (2, 5, 9, 10, 11)}
    assert_frozen_rows_kept_their_bits(witness, starting_table(), stages=rows)


def test_a_vocabulary_may_be_a_plain_list_of_tokens() -> None:
    tokens = [f"w{row}" for row in range(12)]
    schedule = stages(epoch_0={"tokens": ["w1", "w4"]})
    witness = fit(Net().build(), unfreezing=RowUnfreezing(schedule, vocabulary=tokens))
    assert_frozen_rows_kept_their_bits(witness, starting_table(), stages={0: (1, 4)})
    with pytest.raises(InputError, match=r"a vocabulary is a mapping .*Received: str"):
        RowUnfreezing(schedule, vocabulary="w1")


# Several callbacks


def two_callbacks() -> list[RowUnfreezing]:
    return [RowUnfreezing({name: schedule}, audit=1) for name, schedule in BY_NAME.items()]


@pytest.mark.parametrize("saved_after", [0, 2])
def test_two_callbacks_move_two_tables_as_one_would(saved_after: int, tmp_path: Path) -> None:
    tables = ("words", "items")
    one, two = Net().build(tables), Net().build(tables)
    expected = fit(one, unfreezing=RowUnfreezing(BY_NAME, audit=1))
    first, second = two_callbacks()
    got = fit(two, second, Keep(tmp_path), unfreezing=first)
    assert_same_run(got, expected.seen)
    assert [report.table for report in first.audit_results] == 3 * ["words"]
    assert [report.table for report in second.audit_results] == 2 * ["items"]
    first, second = two_callbacks()
    resumed = Net().build(tables, seed=9)
    rest = fit(resumed, second, unfreezing=first, ckpt_path=tmp_path / f"{saved_after}.ckpt")
    assert_same_run(rest, expected.seen[-len(rest.seen) :])
    assert len(rest.seen) == (EPOCHS - 1 - saved_after) * BATCHES


@pytest.mark.parametrize("schedule", [{"words": OTHER}, OTHER], ids=["by_name", "all_tables"])
def test_two_callbacks_for_one_table_are_refused(schedule: Any) -> None:
    net = Net().build(("words", "items"))
    with pytest.raises(InputError, match=r"one schedule\. Received two RowUnfreezing for 'words'"):
        fit(net, RowUnfreezing(schedule), unfreezing=RowUnfreezing(BY_NAME))
    assert net.steps_begun == 0


# What it says


def test_without_audit_no_audit_is_reported(capsys: pytest.CaptureFixture[str]) -> None:
    fit(Net().build(("words", "items")), unfreezing=RowUnfreezing({"items": SCHEDULE}))
    lines = capsys.readouterr().out.splitlines()
    # The other table trains whole, and counts among the parameters elsewhere.
    assert lines[0].startswith("items: 3 of 12 rows train (12 of 48 parameters), 63 parameters")
    assert len(lines) == 1 + len(STAGES)
    assert not any("audit" in line for line in lines)


class Lazy(Net):
    """Has a layer that gets its size in the first step."""

    def build(self, **options: Any) -> Any:
        super().build(**options)
        self.head = nn.LazyLinear(3)
        return self


def test_a_lazy_layer_counts_for_nothing_before_it_has_a_size(
    capsys: pytest.CaptureFixture[str],
) -> None:
    fit(Lazy().build())
    assert capsys.readouterr().out.splitlines()[0].endswith("rows train (12 of 48 parameters)")


# What it refuses, before any step


def without_the_table(parts: Parts) -> list[torch.optim.Optimizer]:
    return [torch.optim.AdamW(parts["head"])]


def adafactor(parts: Parts) -> list[torch.optim.Optimizer]:
    return [torch.optim.Adafactor([p for part in parts.values() for p in part])]


REFUSED: dict[str, tuple[Callable[[], Any], Any, tuple[str, ...]]] = {
    "no_table": (lambda: Net().build(plain=True), SCHEDULE, ("PartialEmbedding", "Net")),
    "no_optimizer_holds_it": (
        lambda: Net().build(make=without_the_table),
        SCHEDULE,
        ("optimizer", "'words'"),
    ),
    "one_of_two_without_optimizer": (
        lambda: Net().build(
            ("words", "items"), make=lambda p: adamw({"a": [*p["words"], *p["head"]]})
        ),
        SCHEDULE,
        ("optimizer", "'items'"),
    ),
    "lazy_across_rows": (lambda: Net().build(make=adafactor), SCHEDULE, ("lazy", "Adafactor")),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_fit_is_refused_before_any_step(case: str) -> None:
    make, schedule, named = REFUSED[case]
    net = make()
    callback = RowUnfreezing(schedule, lazy=case.startswith("lazy"))
    with pytest.raises(InputError) as refused:
        fit(net, unfreezing=callback)
    for part in named:
        assert part in str(refused.value)
    assert "\n" not in str(refused.value)
    assert net.steps_begun == 0
    assert same_bits(net.words.weight, starting_table())


def test_a_checkpoint_of_rows_is_refused_where_it_is_loaded_into_shards() -> None:
    strategy = pl.strategies.ModelParallelStrategy()
    fake = SimpleNamespace(strategy=strategy, callbacks=[])
    with pytest.raises(InputError, match=r"ModelParallelStrategy\. Leave checkpoint out"):
        RowUnfreezing(SCHEDULE, checkpoint="rows").setup(fake, Net().build(), "fit")


@pytest.mark.parametrize("name", ["FSDPStrategy", "DeepSpeedStrategy"])
def test_a_strategy_that_flattens_is_refused_when_fit_starts(name: str) -> None:
    # By name, as both of Lightning's packages have it; the real ones want a GPU.
    strategy = type("Custom", (type(name, (SingleDeviceStrategy,), {}),), {})
    net = Net().build()
    with pytest.raises(InputError, match=r"Custom.*DDP"):
        fit(net, strategy=strategy(device=torch.device("cpu")))
    assert net.steps_begun == 0


def test_an_optimizer_that_was_left_alone_stays_so() -> None:
    def make(parts: Parts) -> list[torch.optim.Optimizer]:
        parameters = [p for part in parts.values() for p in part]
        return [masked_gradient_only(torch.optim.AdamW(parameters, lr=0.1, weight_decay=0.3))]

    schedule = stages(epoch_0=[1, 4])
    net = Net().build(make=make)
    made = trainer(RowUnfreezing(schedule), max_epochs=1)
    made.fit(net, loader(data()))
    assert prepared(made.optimizers[0]) is None
    with pytest.raises(FrozenRowsMoved, match="masked_gradient_only"):
        fit(Net().build(make=make), schedule=schedule)


# Checkpoints


class Keep(pl.Callback):
    """Keeps a checkpoint after each epoch."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        trainer.save_checkpoint(self.folder / f"{trainer.current_epoch}.ckpt")


def plain_fit(net: Any, *more: pl.Callback, ckpt_path: Any = None, **options: Any) -> Witness:
    """A run without `RowUnfreezing`."""
    witness = Witness()
    trainer(*more, witness, **options).fit(net, loader(data()), ckpt_path=ckpt_path)
    return witness


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
@pytest.mark.parametrize("plain", [True, False], ids=["plain", "partial"])
def test_a_checkpoint_of_the_callback_goes_on_without_it(plain: bool, tmp_path: Path) -> None:
    witness = fit(Net().build(), Keep(tmp_path))
    where = {"ckpt_path": tmp_path / "1.ckpt", "max_epochs": 3}
    after = plain_fit(Net().build(plain=plain, seed=9), **where)
    assert after.epochs == [2] * BATCHES
    start = witness.seen[2 * BATCHES - 1]["words.weight"]
    assert rows_that_differ(after.seen[-1]["words.weight"], start) == list(range(V))
    # All rows train now, those that did go on with their state where a table knows which they are,
    # and the others begin, with a first step that is lr long.
    ids = loader(data()).dataset.tensors[0][:BATCH].unique()
    begun = ids if plain else ids[~torch.isin(ids, torch.tensor(STAGES[1]))]
    assert len(begun)
    first = after.seen[0]["words.weight"][begun] - start[begun] * (1 - 0.1 * 0.3)
    torch.testing.assert_close(first.abs(), torch.full_like(first, 0.1), rtol=1e-3, atol=1e-4)
    if not plain:
        net = Net().build(seed=9)
        net.words.set_trainable_rows(STAGES[1])
        assert_same_run(plain_fit(net, **where), witness.seen[2 * BATCHES : 3 * BATCHES])


def test_a_checkpoint_of_a_plain_run_loads_with_the_callback(tmp_path: Path) -> None:
    plain_fit(Net().build(plain=True), Keep(tmp_path), max_epochs=2)
    saved = torch.load(tmp_path / "1.ckpt", weights_only=True)
    start = saved["state_dict"]["words.weight"]
    net = Net().build(seed=9)
    schedule = stages(epoch_0=[1, 4])
    # Nobody saved where the schedule stood: it stands where the trainer's epoch does.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        witness = fit(net, schedule=schedule, ckpt_path=tmp_path / "1.ckpt")
    assert_frozen_rows_kept_their_bits(witness, start, stages={0: (1, 4)})
    # The rows that train go on with their part of the stage_states, as the plain run would.
    plain = Net().build(plain=True, seed=9)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        went_on = plain_fit(plain, ckpt_path=tmp_path / "1.ckpt")
    first, wanted = witness.seen[0]["words.weight"], went_on.seen[0]["words.weight"]
    torch.testing.assert_close(first[[1, 4]], wanted[[1, 4]])


def test_a_callback_serves_one_fit_after_another(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    callback = RowUnfreezing(SCHEDULE, audit=1)
    first, second, third = Net().build(), Net().build(), Net().build(seed=9)
    run = fit(first, Keep(tmp_path), unfreezing=callback)
    printed = capsys.readouterr().out
    again = fit(second, unfreezing=callback)
    assert_same_run(again, run.seen)
    assert capsys.readouterr().out == printed
    # After a resumed run, too, a new one begins at the beginning.
    fit(third, unfreezing=callback, ckpt_path=tmp_path / "1.ckpt")
    capsys.readouterr()
    fourth = Net().build()
    assert_same_run(fit(fourth, unfreezing=callback), run.seen)
    assert capsys.readouterr().out == printed


def test_a_trainer_goes_on_where_it_stopped() -> None:
    expected = reference_run(Net().build())
    net, witness = Net().build(), Witness()
    made = trainer(RowUnfreezing(SCHEDULE), witness, max_epochs=1)
    made.fit(net, loader(data()))
    begun = len(witness.seen)
    assert_same_run(witness, expected[:begun])
    before = net.words.weight.detach().clone()
    made.fit_loop.max_epochs = EPOCHS
    made.fit(net, loader(data()))
    # A new optimizer was made, so numbers differ; which rows train does not.
    witness.seen, witness.epochs = witness.seen[begun:], witness.epochs[begun:]
    later = {epoch: rows for epoch, rows in STAGES.items() if epoch > 0}
    assert_frozen_rows_kept_their_bits(witness, before, stages=later)


# The audit


AVERAGING = {
    "stochastic": lambda: StochasticWeightAveraging(swa_lrs=0.05, swa_epoch_start=1),
    "mean": WeightAveraging,
}


@pytest.mark.parametrize("average", AVERAGING.values(), ids=AVERAGING)
def test_the_audit_sees_averages_that_are_put_into_frozen_rows_at_the_end(average: Any) -> None:
    net = Net().build()
    with torch.no_grad():
        net.words.weight.abs_()  # an average of -0.0 may be 0.0
    # Rows 4 and 6 train, then freeze; their averages over the run are other values.
    schedule = stages(epoch_0=[1, 4, 6], epoch_2=[1])
    callback = RowUnfreezing(schedule, audit=True)
    with pytest.raises(FrozenRowsMoved, match=r"words: 2 frozen rows .*: 4, 6\b.*averages"):
        fit(net, average(), unfreezing=callback)


def test_a_run_that_raises_leaves_a_whole_model() -> None:
    class Breaks(pl.Callback):
        """Fails in the middle of an optimizer step, after the table was replaced."""

        def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
            if trainer.global_step == 5:
                raise KeyError("broken")

    net = Net().build()
    weight = net.words.weight
    witness = Witness()
    made = trainer(RowUnfreezing(SCHEDULE), Breaks(), witness)
    with pytest.raises(KeyError, match="broken"):
        made.fit(net, loader(data()))
    assert net.words.weight is weight
    held = [p for group in made.optimizers[0].param_groups for p in group["params"]]
    assert {id(p) for p in held} == {id(p) for p in net.parameters()}
    assert same_bits(weight, witness.seen[-1]["words.weight"])
    frozen = list(NEVER_TRAINED)
    assert same_bits(weight[frozen], starting_table()[frozen])


def test_schedules_may_freeze_everything_and_padding_never_trains() -> None:
    net = Net().build()
    net.words.padding_idx = 0
    schedule = stages(epoch_0="none", epoch_1="all", epoch_2=Rows.none(), epoch_3=[0, 1])
    witness = fit(net, schedule=schedule)
    rows = {0: (), 1: tuple(range(1, 12)), 2: (), 3: (1,)}
    assert_frozen_rows_kept_their_bits(witness, starting_table(), stages=rows)
