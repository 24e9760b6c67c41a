"""RowMonitor: what it measures, logs and keeps."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from pytorch_lightning import LightningModule, seed_everything
from pytorch_lightning.loggers import CSVLogger, TensorBoardLogger
from pytorch_lightning.loggers.logger import DummyLogger
from small_runs import trainer
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn
from torch.utils.data import DataLoader

from partial_embedding import InputError, Vocabulary
from partial_embedding.callbacks.lightning import RowUnfreezing
from partial_embedding.callbacks.lightning_monitor import RowMonitor, _row_squares
from partial_embedding.monitor.record import read_record
from partial_embedding.monitor.sampling import TableSample
from partial_embedding.torch import PartialEmbedding, restore_embedding

V, D, BATCHES = 40, 4, 5
# Three rows occur often, the others once or never.
VOCABULARY = Vocabulary(map(str, range(V)), counts=[0, 100, 50, 20] + [1] * (V - 5) + [0])
SCHEDULE: dict[str, Any] = {
    "stages": [{"epoch": 0, "rows": [1, 2, 3]}, {"epoch": 2, "rows": "all"}]
}


class Model(LightningModule):
    def __init__(self, tables: int = 1) -> None:
        super().__init__()
        self.tables = nn.ModuleList(PartialEmbedding(V, D, padding_idx=0) for _ in range(tables))

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return torch.stack([table(batch).sum() for table in self.tables]).sum()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.125)


def ids() -> DataLoader[Tensor]:
    # Of the four tokens of a batch that are not padding, rows 1 and 2 train from the start.
    batches = [torch.tensor([0, 1, 2, 10 + i, 20 + i]) for i in range(BATCHES)]
    return DataLoader(batches, batch_size=None)  # type: ignore[arg-type]  # a list is a data set


def fit(
    folder: Path,
    monitor: RowMonitor,
    model: Model | None = None,
    schedule: Any = SCHEDULE,
    **options: Any,
) -> Model:
    seed_everything(0, verbose=False)
    model = model or Model()
    callback = RowUnfreezing(schedule, vocabulary=VOCABULARY, audit=True)
    options.setdefault("logger", CSVLogger(folder, name="", version=""))
    made = trainer(callback, monitor, default_root_dir=folder, log_every_n_steps=1, **options)
    made.fit(model, ids())
    return model


Run = tuple[Path, RowMonitor, Model]


@pytest.fixture(scope="module")
def usual(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run that is measured at each step: its folder, and what measured and was measured."""
    folder, monitor = tmp_path_factory.mktemp("usual"), RowMonitor(vocabulary=VOCABULARY)
    return folder, monitor, fit(folder, monitor)


def test_it_measures_rows_tokens_and_drift(usual: Run) -> None:
    (track,) = usual[1].tracks.values()
    assert track.trainable == [(0.0, 3), (2.0, V - 1)]
    assert [share for place, share in track.token_share if place <= 2] == [0.5] * 10
    assert [share for place, share in track.token_share if place > 2] == [1.0] * 10
    assert [(cohort.unfrozen_at, cohort.size) for cohort in track.cohorts.values()] == [
        (0, 3),
        (2, V - 4),
    ]
    # SGD moves a row by lr in each of D columns, each time that it occurs; row 3 never does.
    first = track.cohorts[0]
    place, low, middle, high = first.drift[-1]
    assert place == 4.0
    distance = 0.125 * D**0.5 * 4 * BATCHES
    assert middle == pytest.approx(distance / track.typical_length, rel=1e-5)
    assert low == pytest.approx(0.2 * middle)
    assert high == pytest.approx(middle)


def test_the_tokens_of_all_lookups_of_a_batch_count(tmp_path: Path) -> None:
    class Twice(Model):
        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            # Of seven tokens together, rows 1, 2 and 2 train from the start.
            return super().training_step(batch, batch_idx) + self.tables[0](batch[2:]).sum()

    monitor = RowMonitor()
    fit(tmp_path, monitor, Twice())
    (track,) = monitor.tracks.values()
    assert [share for place, share in track.token_share if place <= 2] == [3 / 7] * 10


def test_gradient_norm_and_update_ratio_are_those_of_the_step(usual: Run, tmp_path: Path) -> None:
    start = fit(tmp_path, RowMonitor(), max_epochs=0).tables[0].weight.detach()
    (track,) = usual[1].tracks.values()
    numbers = track.cohorts[0].numbers
    # Two of the three rows occur once in a batch, and each of D elements gets the gradient 1.
    assert [norm for _, norm in numbers["gradient_norm"]] == pytest.approx([(2 * D) ** 0.5] * 20)
    moved = 0.125 * (2 * D) ** 0.5
    first = numbers["update_ratio"][0][1]
    assert first == pytest.approx(moved / float(start[[1, 2, 3]].norm()), rel=1e-5)


def test_gradients_are_measured_before_clipping(tmp_path: Path) -> None:
    monitor = RowMonitor()
    fit(tmp_path, monitor, gradient_clip_val=0.5)
    (track,) = monitor.tracks.values()
    assert track.cohorts[0].numbers["gradient_norm"][0][1] == pytest.approx((2 * D) ** 0.5)


@pytest.mark.parametrize("sparse", [True, False])
def test_the_gradient_of_an_id_that_occurs_twice_is_summed(sparse: bool) -> None:
    table = PartialEmbedding(V, D, sparse=sparse)
    table(torch.tensor([5, 5, 7])).sum().backward()
    assert table.weight.grad is not None
    ids, squares = _row_squares(table.weight.grad)
    assert len(ids) == (2 if sparse else V)  # the cost follows the rows of the batch
    assert {i: s for i, s in zip(ids.tolist(), squares.tolist(), strict=True) if s} == {
        5: 4.0 * D,
        7: 1.0 * D,
    }


def test_rates_follow_scale_and_scheduler(tmp_path: Path) -> None:
    class Decayed(Model):
        def configure_optimizers(self) -> Any:
            optimizer = super().configure_optimizers()
            decay = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
            return [optimizer], [{"scheduler": decay, "interval": "step"}]

    slow = {"epoch": 2, "rows": "all", "lr_scale": 0.5, "warmup_steps": 2}
    monitor = RowMonitor()
    schedule = {"stages": [SCHEDULE["stages"][0], slow]}
    fit(tmp_path, monitor, Decayed(), schedule=schedule)
    (track,) = monitor.tracks.values()
    rates = [rate for _, rate in track.cohorts[0].numbers["lr"]]
    assert rates == [0.125 * 0.5**step for step in range(20)]
    rates = [rate for _, rate in track.cohorts[1].numbers["lr"]]
    assert rates == [0.125 * 0.5**step * 0.5 * min(1, (step - 9) / 2) for step in range(10, 20)]


class Recorded(DummyLogger):
    """A logger of any make: what it is given, in the order in which it came."""

    def __init__(self) -> None:
        super().__init__()
        self.given: list[tuple[int | None, dict[str, float]]] = []

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        self.given.append((step, dict(metrics)))


def test_every_logger_gets_the_same_numbers_under_documented_names(tmp_path: Path) -> None:
    one, other = Recorded(), Recorded()
    tensorboard = TensorBoardLogger(tmp_path, name="", version="board")
    monitor = RowMonitor(vocabulary=VOCABULARY)
    fit(tmp_path, monitor, logger=[tensorboard, one, other])
    assert one.given == other.given
    assert [step for step, _ in one.given] == list(range(1, 21))
    read = EventAccumulator(str(tmp_path / "board")).Reload()
    last = one.given[-1][1]
    for name, value in last.items():
        assert read.Scalars(name)[-1].value == pytest.approx(value)
    # The docstring names those of the first cohort and of one band, and nothing else is logged.
    assert TableSample.__doc__ is not None
    documented = set(re.findall(r"`([\w/]+)`", TableSample.__doc__))
    for name in last:
        short = re.sub(r"cohort_\d+/|seen_\w+?/", "", name.removeprefix("tables.0/"))
        assert any(short == known.rpartition("/")[2] for known in documented), name


def test_nothing_is_measured_between_measurements(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured = []
    measure = TableSample.measure

    def noted(self: TableSample, *given: Any) -> dict[str, float]:
        measured.append(self)
        return measure(self, *given)

    monkeypatch.setattr(TableSample, "measure", noted)
    model = fit(tmp_path, RowMonitor(every_n_steps=3))
    assert len(measured) == 4 * 2  # the batches 2 and 4 of each epoch
    assert not any(table._forward_pre_hooks for table in model.tables)


def test_rows_are_followed_by_how_often_they_occur(usual: Run) -> None:
    (track,) = usual[1].tracks.values()
    sizes = {name: band.size for name, band in track.bands.items()}
    assert sizes == {"seen_0": 1, "seen_1_to_9": 35, "seen_10_to_99": 2, "seen_100_to_999": 1}
    # Row 1 trains from the start and is in every batch; the only row never seen stays.
    assert track.bands["seen_100_to_999"].drift[0][1] > 0
    assert track.bands["seen_0"].drift[-1][1:] == (0.0, 0.0, 0.0)
    assert track.moved[0].token in {"1", "2"}
    assert track.moved[0].token not in track.moved[0].before


@pytest.mark.parametrize(
    "options", [{"every_n_steps": 0}, {"sample": 0}, {"sample": "all"}], ids=str
)
def test_what_would_measure_nothing_is_refused_at_once(options: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="is a whole number from 1 up"):
        RowMonitor(**options)


def test_a_model_that_has_no_table_is_refused(tmp_path: Path) -> None:
    model = Model()
    restore_embedding(model)
    made = trainer(RowMonitor(), default_root_dir=tmp_path)
    with pytest.raises(InputError, match=r"a PartialEmbedding in the model\. Received a Model"):
        made.fit(model, ids())
    assert made.global_step == 0


def test_the_record_holds_plan_scores_and_audit(usual: Run) -> None:
    record = read_record(usual[0])
    (plan,) = record.plans.values()
    assert [(step.place, step.trainable) for step in plan] == [
        ("stage 0 from epoch 0", 3),
        ("stage 1 from epoch 2", V - 1),
    ]
    assert [(report.frozen, report.changed) for report in record.audit] == [(V - 3, 0), (1, 0)]
    assert (record.length, record.epoch_steps) == (4, BATCHES)
    (track,) = record.tables.values()
    assert track.trainable == [(0.0, 3), (2.0, V - 1)]


def test_each_table_has_a_record_of_its_own(tmp_path: Path) -> None:
    fit(tmp_path, RowMonitor(), Model(tables=2))
    record = read_record(tmp_path)
    assert list(record.tables) == list(record.plans) == ["tables.0", "tables.1"]


def test_a_run_that_fails_leaves_what_was_seen(tmp_path: Path) -> None:
    class Fails(Model):
        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            if self.global_step == 7:
                raise RuntimeError("a loss that cannot be had")
            return super().training_step(batch, batch_idx)

    with pytest.raises(RuntimeError, match="cannot be had"):
        fit(tmp_path, RowMonitor(), Fails())
    (track,) = read_record(tmp_path).tables.values()
    assert track.end == pytest.approx(7 / BATCHES)


def test_a_run_with_nothing_left_to_train_leaves_no_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    fit(tmp_path / "run", RowMonitor(), max_epochs=0)
    assert not list(tmp_path.rglob("rows.json"))


def test_it_changes_neither_training_nor_random_numbers(tmp_path: Path) -> None:
    with_monitor = fit(tmp_path / "a", RowMonitor())
    after = torch.rand(1)
    without = fit(tmp_path / "b", RowMonitor(every_n_steps=10**6))
    assert torch.equal(after, torch.rand(1))
    for name, value in with_monitor.state_dict().items():
        assert torch.equal(value, without.state_dict()[name])


def test_it_goes_on_where_a_checkpoint_stood(usual: Run, tmp_path: Path) -> None:
    whole = usual[1]
    seed_everything(0, verbose=False)
    half, rest = RowMonitor(), RowMonitor()
    made = trainer(RowUnfreezing(SCHEDULE), half, max_epochs=3, default_root_dir=tmp_path)
    made.fit(Model(), ids())
    made.save_checkpoint(tmp_path / "half.ckpt")
    made = trainer(RowUnfreezing(SCHEDULE), rest, default_root_dir=tmp_path)
    made.fit(Model(), ids(), ckpt_path=tmp_path / "half.ckpt")
    assert [t.trainable for t in rest.tracks.values()] == [
        t.trainable for t in whole.tracks.values()
    ]
    assert [t.cohorts for t in rest.tracks.values()] != [t.cohorts for t in half.tracks.values()]
    for one, other in zip(rest.tracks.values(), half.tracks.values(), strict=True):
        assert one.token_share[: len(other.token_share)] == other.token_share
