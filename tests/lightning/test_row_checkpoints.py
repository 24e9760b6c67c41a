"""Checkpoints that hold the rows that trained: loaded, resumed, and refused by another table."""

from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from oracle import same_bits
from pytorch_lightning.callbacks import ModelCheckpoint, WeightAveraging
from small_runs import SCHEDULE, STAGES, Core, V, data, loader, trainer

from partial_embedding import InputError
from partial_embedding.callbacks.lightning import RowUnfreezing
from partial_embedding.torch import PartialEmbedding

EVER = sorted({row for rows in STAGES.values() for row in rows})


class SmallNet(Core, pl.LightningModule):
    """A module that is made anew from its class alone."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        self.build(seed=seed)

    def test_step(self, batch: Any, index: int) -> None:
        self.log("loss", self.loss(batch))


class Kept(pl.Callback):
    """The words as they were when each epoch ended."""

    def __init__(self) -> None:
        self.words: list[torch.Tensor] = []

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        self.words.append(pl_module.words.weight.detach().clone())


def run(
    folder: Path, net: SmallNet | None = None, ckpt_path: Any = None, *more: Any, **options: Any
) -> tuple[Any, SmallNet, Kept]:
    net = net or SmallNet()
    kept = Kept()
    callback = RowUnfreezing(SCHEDULE, audit=1, checkpoint=options.pop("checkpoint", "rows"))
    every = ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1)
    # Kept comes before the checkpoints, which Lightning puts last.
    made = trainer(callback, kept, every, *more, enable_checkpointing=True, **options)
    made.fit(net, loader(data()), ckpt_path=ckpt_path)
    return made, net, kept


def saved(path: Path) -> dict[str, Any]:
    return dict(torch.load(path, weights_only=True))


Whole = tuple[Path, Any, SmallNet, list[torch.Tensor]]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Whole:
    """A run that nothing interrupted: the folder of its checkpoints, and what it ended with."""
    folder = tmp_path_factory.mktemp("whole")
    made, net, kept = run(folder)
    made.save_checkpoint(folder / "after.ckpt")
    # Of weights alone, for those who have not the table as it was.
    made.save_checkpoint(folder / "weights.ckpt", weights_only=True)
    return folder, made, net, kept.words


def test_a_checkpoint_holds_the_rows_that_trained_until_then(whole: Whole) -> None:
    folder, _, net, _ = whole
    of_epochs = [f"epoch={epoch}" for epoch in range(4)]
    trained = [[1, 4, 6], [1, 2, 4, 6, 8], [1, 2, 4, 6, 8], EVER, EVER]
    for name, ever in zip([*of_epochs, "after"], trained, strict=True):
        state = saved(folder / f"{name}.ckpt")["state_dict"]
        assert state["words.weight.ids"].tolist() == ever
        assert "words.weight" not in state
        assert "head.weight" in state
    assert "words.weight" in net.state_dict()
    assert len(saved(folder / "weights.ckpt")["state_dict"]["words.weight"]) == V


class Leaves(pl.Callback):
    """Takes something out of each checkpoint, as whoever has it elsewhere does."""

    def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        del checkpoint["state_dict"]["head.weight"]


def test_what_another_callback_changed_in_a_checkpoint_stays_so(tmp_path: Path) -> None:
    own = RowUnfreezing(SCHEDULE, checkpoint="rows")
    made = trainer(Leaves(), own, max_epochs=1)
    made.fit(SmallNet(), loader(data()))
    made.save_checkpoint(tmp_path / "one.ckpt")
    state = saved(tmp_path / "one.ckpt")["state_dict"]
    assert state["words.weight.ids"].tolist() == [1, 4, 6]
    assert "head.weight" not in state


def test_the_default_is_the_whole_table(tmp_path: Path) -> None:
    _, net, _ = run(tmp_path, checkpoint="table")
    state = saved(tmp_path / "epoch=3.ckpt")["state_dict"]
    assert list(state) == list(net.state_dict())
    assert torch.equal(state["words.weight"], net.words.weight)


@pytest.mark.parametrize("epoch", range(3))
def test_a_run_that_resumes_ends_where_the_whole_one_does(
    epoch: int, whole: Whole, tmp_path: Path
) -> None:
    folder, _, net, _ = whole
    again = SmallNet()
    run(tmp_path, again, folder / f"epoch={epoch}.ckpt")
    ends = [saved(path / "epoch=3.ckpt")["state_dict"] for path in (folder, tmp_path)]
    for one, other in ((net.state_dict(), again.state_dict()), ends):
        assert one.keys() == other.keys()
        assert all(same_bits(value, other[key]) for key, value in one.items())


def test_modules_load_and_test_reads_the_rows_of_a_checkpoint(whole: Whole, tmp_path: Path) -> None:
    folder, _, _, words = whole
    for epoch, kept in enumerate(words):
        net = SmallNet.load_from_checkpoint(folder / f"epoch={epoch}.ckpt")
        assert same_bits(net.words.weight, kept)
    trained_on = run(tmp_path)[:2]
    for made, net in ((trainer(), SmallNet()), trained_on):
        made.test(net, loader(data()), ckpt_path=folder / "epoch=0.ckpt", verbose=False)
        assert same_bits(net.words.weight, words[0])


def test_another_table_is_refused_by_name(whole: Whole, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"'words\.weight'.*same vectors"):
        SmallNet.load_from_checkpoint(whole[0] / "epoch=3.ckpt", seed=1)
    with pytest.raises(InputError, match=r"'words\.weight'.*same vectors"):
        run(tmp_path, SmallNet(seed=1), whole[0] / "epoch=1.ckpt")


def test_a_second_fit_goes_on_from_the_same_origin(tmp_path: Path) -> None:
    _, net, _ = run(tmp_path)
    _, _, kept = run(tmp_path / "second", net)
    again = SmallNet.load_from_checkpoint(tmp_path / "second" / "epoch=3.ckpt")
    assert same_bits(again.words.weight, kept.words[-1])


def test_a_run_that_goes_on_from_a_whole_table_says_that_it_saves_whole_ones(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # Its rows trained before this process could know what they had been.
    run(tmp_path, checkpoint="table")
    run(tmp_path / "again", None, tmp_path / "epoch=1.ckpt")
    assert "words: saved whole" in capsys.readouterr().out
    assert "words.weight" in saved(tmp_path / "again" / "epoch=3.ckpt")["state_dict"]


def test_averaged_weights_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="WeightAveraging"):
        run(tmp_path, None, None, WeightAveraging())


def test_an_unknown_option_is_refused() -> None:
    with pytest.raises(InputError, match=r"'table' or 'rows'.*'row'"):
        RowUnfreezing(SCHEDULE, checkpoint="row")
    with pytest.raises(InputError, match="lazy is True or False"):
        RowUnfreezing(SCHEDULE, lazy="no")  # type: ignore[arg-type]  # as a file may have it


def test_tables_of_other_schedules_are_saved_whole(tmp_path: Path) -> None:
    class TwoTables(SmallNet):
        def __init__(self) -> None:
            super().__init__()
            self.other = PartialEmbedding(V, 2, trainable_rows=[1])

        def parts(self) -> Any:
            return {**super().parts(), "other": [self.other.weight]}

    callback = RowUnfreezing({"words": SCHEDULE}, checkpoint="rows")
    made = trainer(callback, max_epochs=1)
    made.fit(TwoTables(), loader(data()))
    made.save_checkpoint(tmp_path / "last.ckpt")
    state = saved(tmp_path / "last.ckpt")["state_dict"]
    assert "words.weight.rows" in state
    assert "other.weight" in state
