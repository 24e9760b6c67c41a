"""RowMonitor: what it measures, logs, keeps and draws."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pytorch_lightning import LightningModule, Trainer, seed_everything
from pytorch_lightning.loggers import CSVLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader

from partial_embedding.callbacks.lightning import RowUnfreezing
from partial_embedding.callbacks.lightning_monitor import RowMonitor
from partial_embedding.drift import CohortTrack, RowTrack
from partial_embedding.pictures import row_picture
from partial_embedding.torch import PartialEmbedding
from partial_embedding.watch import TableWatch

V, D, BATCHES = 40, 4, 5
SCHEDULE = {"stages": [{"epoch": 0, "rows": [1, 2, 3]}, {"epoch": 2, "rows": "all"}]}


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


def fit(folder: Path, monitor: RowMonitor, model: Model | None = None, **options: Any) -> Model:
    seed_everything(0, verbose=False)
    model = model or Model()
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=4,
        logger=CSVLogger(folder, name="", version=""),
        default_root_dir=folder,
        enable_progress_bar=False,
        enable_model_summary=False,
        log_every_n_steps=1,
        callbacks=[RowUnfreezing(SCHEDULE), monitor],
        **{"enable_checkpointing": False, **options},
    )
    trainer.fit(model, ids())
    return model


def test_it_measures_rows_tokens_and_drift(tmp_path: Path) -> None:
    monitor = RowMonitor()
    fit(tmp_path, monitor)
    (track,) = monitor.tracks.values()
    assert track.awake == [(0.0, 3), (2.0, V - 1)]
    assert [share for place, share in track.token_share if place <= 2] == [0.5] * 10
    assert [share for place, share in track.token_share if place > 2] == [1.0] * 10
    assert [(cohort.woke, cohort.size) for cohort in track.cohorts.values()] == [(0, 3), (2, V - 4)]
    # SGD moves a row by lr in each of D columns, each time that it occurs; row 3 never does.
    first = track.cohorts[0]
    place, low, middle, high = first.drift[-1]
    assert place == 4.0
    distance = 0.125 * D**0.5 * 4 * BATCHES
    assert middle == pytest.approx(distance / track.typical_length, rel=1e-5)
    assert low == pytest.approx(0.2 * middle)
    assert high == pytest.approx(middle)


def test_it_logs_to_any_logger(tmp_path: Path) -> None:
    fit(tmp_path, RowMonitor())
    table = np.genfromtxt(tmp_path / "metrics.csv", delimiter=",", names=True, dtype=None)
    names = table.dtype.names
    assert names is not None
    assert {"tables0rows_awake", "tables0tokens_that_train"} <= set(names)
    assert table["tables0rows_awake"].tolist() == [3] * 10 + [V - 1] * 10


def test_nothing_is_measured_between_measurements(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured = []
    measure = TableWatch.measure

    def noted(self: TableWatch, *given: Any) -> dict[str, float]:
        measured.append(self)
        return measure(self, *given)

    monkeypatch.setattr(TableWatch, "measure", noted)
    model = fit(tmp_path, RowMonitor(every_n_steps=3))
    assert len(measured) == 4 * 2  # the batches 2 and 4 of each epoch
    assert not any(table._forward_pre_hooks for table in model.tables)


def test_the_sample_bounds_what_is_kept(tmp_path: Path) -> None:
    monitor = RowMonitor(sample=2)
    fit(tmp_path, monitor)
    (state,) = monitor.state_dict()["tables"].values()
    assert [tuple(start.shape) for _, start, _ in state["cohorts"].values()] == [(2, D), (2, D)]
    assert tuple(state["pool"][1].shape) == (8, D)


def test_it_changes_neither_training_nor_random_numbers(tmp_path: Path) -> None:
    with_monitor = fit(tmp_path / "a", RowMonitor())
    after = torch.rand(1)
    without = fit(tmp_path / "b", RowMonitor(every_n_steps=10**6, picture=None))
    assert torch.equal(after, torch.rand(1))
    for name, value in with_monitor.state_dict().items():
        assert torch.equal(value, without.state_dict()[name])


def test_it_goes_on_where_a_checkpoint_stood(tmp_path: Path) -> None:
    whole = RowMonitor()
    fit(tmp_path / "whole", whole)
    seed_everything(0, verbose=False)
    half, rest = RowMonitor(), RowMonitor()
    options: dict[str, Any] = {
        "accelerator": "cpu",
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "default_root_dir": tmp_path,
    }
    trainer = Trainer(max_epochs=3, callbacks=[RowUnfreezing(SCHEDULE), half], **options)
    trainer.fit(Model(), ids())
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    trainer = Trainer(max_epochs=4, callbacks=[RowUnfreezing(SCHEDULE), rest], **options)
    trainer.fit(Model(), ids(), ckpt_path=tmp_path / "half.ckpt")
    assert [t.awake for t in rest.tracks.values()] == [t.awake for t in whole.tracks.values()]
    assert [t.cohorts for t in rest.tracks.values()] != [t.cohorts for t in half.tracks.values()]
    for one, other in zip(rest.tracks.values(), half.tracks.values(), strict=True):
        assert one.token_share[: len(other.token_share)] == other.token_share


@pytest.mark.parametrize(("tables", "files"), [(1, ["rows.png"]), (2, None)])
def test_it_draws_one_picture_per_table(
    tables: int, files: list[str] | None, tmp_path: Path
) -> None:
    fit(tmp_path, RowMonitor(), Model(tables))
    drawn = sorted(path.name for path in tmp_path.glob("*.png"))
    assert drawn == (files or ["rows-tables.0.png", "rows-tables.1.png"])
    for name in drawn:
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    "track",
    [
        RowTrack(10, 1.0),
        RowTrack(10, 1.0, awake=[(0, 0)], end=1.0),
        RowTrack(10, 0.0, "step", [(0, 10)], [], {0: CohortTrack(0, 10, [(0, 0, 0, 0)])}, 7.0),
        RowTrack(
            10**6,
            1.0,
            awake=[(i, 10 * i) for i in range(16)],
            cohorts={i: CohortTrack(i, 10, [(i, 0, 0, 0), (16, 1, 2, 3)]) for i in range(16)},
            end=16.0,
        ),
    ],
    ids=["nothing", "no_row_awake", "steps", "many_groups"],
)
def test_a_picture_is_drawn_of_any_track(track: RowTrack, tmp_path: Path) -> None:
    row_picture(track).savefig(tmp_path / "rows.png")
    assert (tmp_path / "rows.png").stat().st_size > 0


def test_a_long_track_stays_short_enough_for_a_checkpoint() -> None:
    track = RowTrack(10, 1.0, cohorts={0: CohortTrack(0, 1)})
    for i in range(5000):
        track.token_share.append((i, 1.0))
        track.cohorts[0].drift.append((i, 0, 0, 0))
        track.thin()
    assert len(track.token_share) <= 1000
    assert track.cohorts[0].drift[0] == (0, 0, 0, 0)
