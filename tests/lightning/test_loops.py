"""Every training loop of Lightning: frozen rows keep their bits, the others train as if alone."""

import subprocess
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from oracle import rows_that_differ, same_bits
from pytorch_lightning.callbacks import (
    EMAWeightAveraging,
    LearningRateMonitor,
    StochasticWeightAveraging,
    WeightAveraging,
)
from pytorch_lightning.loggers import CSVLogger
from pytorch_lightning.plugins import MixedPrecision
from small_runs import (
    BATCH,
    BATCHES,
    BY_NAME,
    EPOCHS,
    OTHER_STAGES,
    SCHEDULE,
    STAGES,
    Core,
    Net,
    Parts,
    Reference,
    Witness,
    assert_close_run,
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

from partial_embedding.callbacks.lightning import RowUnfreezing
from partial_embedding.torch import PartialEmbedding


def check_run(net: Any, witness: Witness, expected: list[dict[str, torch.Tensor]]) -> None:
    """Bits of every weight after every batch, of frozen rows, and of what the module holds now."""
    assert_frozen_rows_kept_their_bits(witness, starting_table(dtype=net.words.weight.dtype))
    assert_same_run(witness, expected)
    assert same_bits(net.words.weight, expected[-1]["words.weight"])


def bfloat16() -> AbstractContextManager[Any]:
    return torch.autocast("cpu", torch.bfloat16)


def float16() -> AbstractContextManager[Any]:
    return torch.autocast("cpu", torch.float16)


# Precision

PRECISIONS: dict[str, tuple[torch.dtype, Callable[[], AbstractContextManager[Any]]]] = {
    "32-true": (torch.float32, nullcontext),
    "64-true": (torch.float64, nullcontext),
    "bf16-true": (torch.bfloat16, nullcontext),
    "bf16-mixed": (torch.float32, bfloat16),
}


@pytest.mark.parametrize(
    ("precision", "sparse"), [*((each, True) for each in PRECISIONS), ("32-true", False)]
)
def test_rows_train_as_small_tables_would(precision: str, sparse: bool) -> None:
    dtype, context = PRECISIONS[precision]
    # In bfloat16, sums of a word's gradients depend on how they are summed.
    dataset = data(duplicates=dtype != torch.bfloat16)
    expected = reference_run(Net().build().to(dtype), dataset=dataset, context=context)
    net = Net().build(sparse=sparse)
    witness = fit(net, dataset=dataset, precision=precision)
    assert net.words.weight.dtype == dtype
    check_run(net, witness, expected)


@pytest.mark.parametrize("skipped", [0, 3], ids=["no_step_skipped", "three_steps_skipped"])
@pytest.mark.parametrize("clip_norm", [None, 0.3], ids=["unclipped", "clipped"])
def test_a_scaler_skips_steps_and_rows_train_as_small_tables_would(
    skipped: int, clip_norm: float | None
) -> None:
    def scaler() -> torch.amp.GradScaler:
        # Gradients of this size overflow in float16 until the scale was halved often enough.
        return torch.amp.GradScaler("cpu", init_scale=2.0 ** (17 + skipped if skipped else 8))

    def clip(parameters: list[nn.Parameter]) -> None:
        if clip_norm is not None:
            nn.utils.clip_grad_norm_(parameters, clip_norm)

    own = scaler()
    expected = reference_run(Net().build(), context=float16, scaler=own, clip=clip)
    net, given = Net().build(), scaler()
    mixed = MixedPrecision("16-mixed", "cpu", given)
    witness = fit(net, plugins=[mixed], gradient_clip_val=clip_norm)

    quiet = [same_bits(seen["words.weight"], starting_table()) for seen in witness.seen]
    assert quiet.index(False) >= skipped
    assert quiet.index(False) <= 2 * skipped
    assert given.get_scale() == own.get_scale()
    if clip_norm is None:
        check_run(net, witness, expected)
        return
    assert_frozen_rows_kept_their_bits(witness, starting_table())
    # The norm is that of the same numbers, summed in another order.
    assert_close_run(witness, expected)


class ThreeSteps(pl.LightningModule):
    """Makes three steps in each batch by hand, the first of which a scaler has to skip."""

    def __init__(self, sparse: bool) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.words = PartialEmbedding(8, 4, sparse=sparse)
        self.moved: list[list[int]] = []

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer = self.optimizers()
        for scale in (float("inf"), 1.0, 1.0):
            before = self.words.weight.detach().clone()
            optimizer.zero_grad()
            self.manual_backward(self.words(torch.tensor([1, 2, 5])).sum() * scale)
            optimizer.step()
            self.moved.append(rows_that_differ(self.words.weight, before))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.mark.parametrize("sparse", [True, False], ids=["sparse", "dense"])
def test_steps_by_hand_go_on_in_the_batch_in_which_a_scaler_skipped_one(sparse: bool) -> None:
    net = ThreeSteps(sparse)
    mixed = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=2.0))
    schedule = {"stages": [{"epoch": 0, "rows": [1, 2, 3]}]}
    trainer(RowUnfreezing(schedule), max_epochs=1, plugins=[mixed]).fit(net, [0])
    assert net.moved == [[], [1, 2], [1, 2]]


# Clipping, accumulation and what else changes gradients


def clip_by_norm(parameters: list[nn.Parameter]) -> None:
    nn.utils.clip_grad_norm_(parameters, 0.15)


def clip_by_value(parameters: list[nn.Parameter]) -> None:
    nn.utils.clip_grad_value_(parameters, 0.02)


CLIPPING: dict[str, tuple[Callable[[list[nn.Parameter]], None], dict[str, Any]]] = {
    "norm": (clip_by_norm, {"gradient_clip_val": 0.15}),
    "value": (clip_by_value, {"gradient_clip_val": 0.02, "gradient_clip_algorithm": "value"}),
}


@pytest.mark.parametrize(("clipping", "sparse"), [("norm", True), ("value", True), ("norm", False)])
def test_clipping_sees_the_trainable_rows_and_nothing_else(clipping: str, sparse: bool) -> None:
    clip, options = CLIPPING[clipping]
    expected = reference_run(Net().build(), clip=clip)
    unclipped = reference_run(Net().build())
    assert not same_bits(expected[0]["words.weight"], unclipped[0]["words.weight"])
    net = Net().build(sparse=sparse)
    check_run(net, fit(net, **options), expected)


@pytest.mark.parametrize(("sparse", "clipped"), [(True, False), (True, True), (False, True)])
def test_gradients_accumulate_over_batches(sparse: bool, clipped: bool) -> None:
    clip, options = CLIPPING["norm"] if clipped else (lambda parameters: None, {})
    expected = reference_run(Net().build(), accumulate=2, clip=clip)
    net = Net().build(sparse=sparse)
    witness = fit(net, accumulate_grad_batches=2, **options)
    assert_frozen_rows_kept_their_bits(witness, starting_table())
    # Sums over batches are rounded in another order.
    assert_close_run(witness, expected)
    # Between steps nothing moves at all: batches 0 and 3 of each epoch only accumulate.
    for first in range(BATCHES, EPOCHS * BATCHES, BATCHES):
        before, after = witness.seen[first - 1], witness.seen[first]
        assert same_bits(before["words.weight"], after["words.weight"])


def test_accumulation_is_exact_where_each_word_is_in_one_batch() -> None:
    dataset = data(batches=2)
    ids = dataset.tensors[0]
    ids[:BATCH], ids[BATCH:] = ids[:BATCH] % 6, ids[BATCH:] % 6 + 6
    expected = reference_run(Net().build(), accumulate=2, dataset=dataset)
    net = Net().build()
    check_run(net, fit(net, dataset=dataset, accumulate_grad_batches=2), expected)


class SometimesNone(Net):
    """Leaves out the second batch of each epoch."""

    def training_step(self, batch: Any, index: int) -> torch.Tensor | None:
        loss = super().training_step(batch, index)
        return None if index == 1 else loss


@pytest.mark.parametrize("precision", ["32-true", "16-mixed"])
def test_a_training_step_may_return_none(precision: str) -> None:
    options: dict[str, Any] = {}
    given: dict[str, Any] = {}
    if precision == "16-mixed":
        given = {"context": float16, "scaler": torch.amp.GradScaler("cpu", init_scale=256.0)}
        own = torch.amp.GradScaler("cpu", init_scale=256.0)
        options = {"plugins": [MixedPrecision("16-mixed", "cpu", own)]}
    expected = reference_run(Net().build(), skip=lambda index: index == 1, **given)
    net = SometimesNone().build()
    check_run(net, fit(net, **options), expected)


# Optimizers, groups and schedulers


def two_groups(parts: Parts) -> list[torch.optim.Optimizer]:
    (tables, *_), head = [p for name, p in parts.items() if name != "head"], parts["head"]
    groups = [
        {"params": head, "lr": 0.02, "weight_decay": 0.0},
        {"params": tables, "lr": 0.1, "betas": (0.5, 0.9)},
    ]
    return [torch.optim.AdamW(groups, weight_decay=0.3)]


def sgd(parts: Parts) -> list[torch.optim.Optimizer]:
    parameters = [p for part in parts.values() for p in part]
    return [torch.optim.SGD(parameters, lr=0.1, momentum=0.9, weight_decay=0.1, nesterov=True)]


def rmsprop(parts: Parts) -> list[torch.optim.Optimizer]:
    parameters = [p for part in parts.values() for p in part]
    return [torch.optim.RMSprop(parameters, lr=0.02, momentum=0.5, weight_decay=0.1)]


OPTIMIZERS = {"two_groups": two_groups, "sgd_momentum": sgd, "rmsprop": rmsprop}


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_optimizers_and_groups_keep_their_own_options(make: Any) -> None:
    expected = reference_run(Net().build(make=make))
    net = Net().build(make=make)
    check_run(net, fit(net), expected)


class Scheduled(Net):
    """A step of the learning rate after each epoch, or after each batch."""

    interval = "epoch"

    def configure_optimizers(self) -> Any:
        (optimizer,) = super().configure_optimizers()
        scheduler = self.scheduler_of(optimizer)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": scheduler, "interval": self.interval},
        }

    def scheduler_of(self, optimizer: torch.optim.Optimizer) -> Any:
        return torch.optim.lr_scheduler.ExponentialLR(optimizer, gamma=0.5)


class Warming(Scheduled):
    """A rate that is a function of the step, with one function for each group."""

    interval = "step"

    def scheduler_of(self, optimizer: torch.optim.Optimizer) -> Any:
        return torch.optim.lr_scheduler.LambdaLR(optimizer, [lambda step: 1 / (1 + step)])


@pytest.mark.parametrize("kind", [Scheduled, Warming], ids=["each_epoch", "each_step"])
def test_learning_rate_schedulers_reach_the_rows(kind: type[Scheduled], tmp_path: Any) -> None:
    schedulers: list[Any] = []

    def prepare(reference: Reference) -> None:
        schedulers.append(kind().scheduler_of(reference.optimizers[0]))

    def advance(reference: Reference) -> None:
        schedulers[0].step()

    when = "after_step" if kind is Warming else "after_epoch"
    expected = reference_run(Net().build(), prepare=prepare, **{when: advance})
    unscheduled = reference_run(Net().build())
    assert not same_bits(expected[-1]["words.weight"], unscheduled[-1]["words.weight"])
    # The monitor of rates must find the groups that the user made and no others.
    monitor = LearningRateMonitor(logging_interval="step")
    net = kind().build()
    witness = fit(net, monitor, logger=CSVLogger(tmp_path), log_every_n_steps=1)
    check_run(net, witness, expected)
    assert len(monitor.lrs) == 1


def one_for_each_table(parts: Parts) -> list[torch.optim.Optimizer]:
    return [
        torch.optim.AdamW(parts["words"], lr=0.1, weight_decay=0.3),
        torch.optim.SGD([*parts["items"], *parts["head"]], lr=0.2, momentum=0.9, weight_decay=0.1),
    ]


class Manual(Net):
    """Manual optimization of all optimizers, with clipping by norm where it is asked for."""

    max_norm: float | None = None

    def build(self, *arguments: Any, **options: Any) -> Any:
        self.automatic_optimization = False
        return super().build(*arguments, **options)

    def training_step(self, batch: Any, index: int) -> None:
        optimizers = self.optimizers()
        optimizers = optimizers if isinstance(optimizers, list) else [optimizers]
        for optimizer in optimizers:
            optimizer.zero_grad()
        self.manual_backward(super().training_step(batch, index))
        if self.max_norm is not None:
            nn.utils.clip_grad_norm_(self.parameters(), self.max_norm)
        for optimizer in optimizers:
            optimizer.step()


class ManualClosure(Manual):
    """Manual optimization in which the optimizer evaluates a closure."""

    def training_step(self, batch: Any, index: int) -> None:
        optimizer = self.optimizers()

        def closure() -> torch.Tensor:
            optimizer.zero_grad()
            loss = Core.training_step(self, batch, index)
            self.manual_backward(loss)
            return loss

        optimizer.step(closure=closure)


class ManualClipped(Manual):
    """Clips in the training step, where gradients are still those of whole tables."""

    max_norm = 0.15


@pytest.mark.parametrize("kind", [Manual, ManualClosure], ids=["plain", "with_closure"])
def test_manual_optimization_trains_rows_as_small_tables_would(kind: type[Manual]) -> None:
    expected = reference_run(Net().build())
    net = kind().build()
    check_run(net, fit(net), expected)


def test_manual_optimization_clips_as_small_tables_would() -> None:
    expected = reference_run(Net().build(), clip=clip_by_norm)
    net = ManualClipped().build()
    witness = fit(net)
    assert_frozen_rows_kept_their_bits(witness, starting_table())
    # The norm is that of the same numbers, summed in another order.
    assert_close_run(witness, expected)


@pytest.mark.parametrize("split", [True, False], ids=["two_optimizers", "one_optimizer"])
def test_tables_follow_schedules_of_their_own(split: bool) -> None:
    tables = ("words", "items")
    stages = {"words": STAGES, "items": OTHER_STAGES}
    options: dict[str, Any] = {"make": one_for_each_table} if split else {}
    expected = reference_run(Net().build(tables, **options), stages=stages)
    # Several optimizers need manual optimization in Lightning 2.
    net = (Manual() if split else Net()).build(tables, **options)
    witness = fit(net, schedule=BY_NAME)
    for seed, (name, own) in enumerate(stages.items()):
        assert_frozen_rows_kept_their_bits(witness, starting_table(seed), name=name, stages=own)
    assert_same_run(witness, expected)


def test_a_table_without_a_schedule_trains_whole() -> None:
    net = Net().build(("words", "items"))
    start = starting_table(1)
    witness = fit(net, schedule={"words": SCHEDULE})
    assert_frozen_rows_kept_their_bits(witness, starting_table(0))
    assert rows_that_differ(net.items.weight, start) == list(range(12))


# Callbacks that write into the weights: an average of equal numbers is that number, but for -0.0,
# which may come out as 0.0.


def without_negative_zero() -> Any:
    net = Net().build()
    net.words.weight.data.abs_()
    return net


def test_stochastic_weight_averaging_leaves_frozen_rows_alone() -> None:
    net = without_negative_zero()
    start = net.words.weight.detach().clone()
    averaging = StochasticWeightAveraging(swa_lrs=0.05, swa_epoch_start=1, annealing_epochs=1)
    witness = fit(net, averaging, schedule={"stages": [{"epoch": 0, "rows": [1, 4, 6]}]})
    assert rows_that_differ(net.words.weight, start) == [1, 4, 6]
    # It averages the weights as they were when epochs began.
    begins = [witness.seen[BATCHES * epoch - 1]["words.weight"] for epoch in range(1, EPOCHS)]
    mean = torch.stack([start, *begins]).mean(0)[[1, 4, 6]]
    torch.testing.assert_close(net.words.weight.detach()[[1, 4, 6]], mean)
    assert not same_bits(net.words.weight, witness.seen[-1]["words.weight"])


def test_an_average_of_ones_own_that_rounds_leaves_frozen_rows_alone() -> None:
    net = Net().build()  # with -0.0 in the table, or without
    start = net.words.weight.detach().clone()
    averaging = StochasticWeightAveraging(
        swa_lrs=0.05, swa_epoch_start=1, avg_fn=lambda mean, now, _: 0.7 * mean + 0.3 * now
    )
    fit(net, averaging, schedule={"stages": [{"epoch": 0, "rows": [1, 4, 6]}]})
    assert rows_that_differ(net.words.weight, start) == [1, 4, 6]


GROWING = {"stages": [{"epoch": 0, "rows": [1, 4]}, {"epoch": 2, "rows": [1, 2, 4, 6, 8, 9]}]}


@pytest.mark.parametrize("averages", ["ema", "mean"])
def test_weight_averaging_leaves_rows_alone_that_never_trained(averages: str) -> None:
    net = without_negative_zero()
    start = net.words.weight.detach().clone()
    averaging = EMAWeightAveraging(decay=0.5) if averages == "ema" else WeightAveraging()
    witness = fit(net, averaging, schedule=GROWING)
    assert rows_that_differ(net.words.weight, start) == [1, 2, 4, 6, 8, 9]
    assert not same_bits(net.words.weight, witness.seen[-1]["words.weight"])
    # While it trains, the module itself goes the way that it goes without averaging.
    alone = without_negative_zero()
    assert_same_run(witness, fit(alone, schedule=GROWING).seen)


def test_validation_between_steps_sees_whole_tables() -> None:
    class Validated(Net):
        seen: list[torch.Tensor]

        def validation_step(self, batch: Any, index: int) -> None:
            self.seen.append(self.words.weight.detach().clone())

    net = Validated().build()
    net.seen = []
    callback, witness = RowUnfreezing(SCHEDULE), Witness()
    trainer(callback, witness, val_check_interval=1, num_sanity_val_steps=0).fit(
        net, loader(data()), loader(data(1))
    )
    assert len(net.seen) == len(witness.seen)
    for seen, after in zip(net.seen, witness.seen, strict=True):
        assert same_bits(seen, after["words.weight"])


# The other package of the same name


def test_a_trainer_of_the_other_package_takes_the_callback() -> None:
    lightning = pytest.importorskip("lightning.pytorch", reason="lightning is not installed")

    class Other(Core, lightning.LightningModule):
        """The same module for `lightning.pytorch`."""

    class OtherWitness(Witness, lightning.Callback):
        """The same witness for `lightning.pytorch`."""

    expected = reference_run(Net().build(), clip=clip_by_norm)
    net, witness = Other().build(), OtherWitness()
    made = trainer(
        RowUnfreezing(SCHEDULE, audit=1), witness, package=lightning, gradient_clip_val=0.15
    )
    assert not isinstance(made, pl.Trainer)
    made.fit(net, loader(data()))
    check_run(net, witness, expected)


OTHER_CLI = """
import torch
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.cli import LightningCLI
from partial_embedding.torch import PartialEmbedding

class Mean(LightningModule):
    def __init__(self):
        super().__init__()
        self.embedding = PartialEmbedding(9, 2)
    def training_step(self, batch, index):
        return self.embedding(batch).mean()
    def train_dataloader(self):
        return torch.utils.data.DataLoader(torch.arange(8))
    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters())

cli = LightningCLI(Mean, save_config_callback=None, args=["fit", "--config", "run.yaml"])
assert cli.model.embedding.trainable_rows.tolist() == [3]
assert sum(callback.__module__.startswith("partial") for callback in cli.trainer.callbacks) == 2
"""
OTHER_CONFIG = """
trainer:
  max_epochs: 1
  barebones: true
  callbacks:
    - class_path: partial_embedding.callbacks.lightning.RowUnfreezing
      init_args: {schedule: {stages: [{epoch: 0, rows: [3]}]}, audit: true}
    - class_path: partial_embedding.callbacks.lightning.RowMonitor
"""


def test_the_cli_of_the_other_package_takes_the_callbacks_by_name(tmp_path: Path) -> None:
    pytest.importorskip("lightning.pytorch", reason="lightning is not installed")
    (tmp_path / "run.py").write_text(OTHER_CLI)
    (tmp_path / "run.yaml").write_text(OTHER_CONFIG)
    command = [sys.executable, "run.py"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "stage 0 from epoch 0: 1 rows train" in done.stdout
