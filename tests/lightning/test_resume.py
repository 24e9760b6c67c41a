"""Killed anywhere and resumed, a run ends bit for bit where the uninterrupted one does."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from once import run_script
from pytorch_lightning import Callback, Trainer, seed_everything
from pytorch_lightning.callbacks import ModelCheckpoint

from partial_embedding.callbacks.lightning import RowUnfreezing
from partial_embedding.callbacks.lightning_monitor import RowMonitor
from partial_embedding.cli import main
from partial_embedding.recipes.resume import RandomState, ReplayableLoader
from partial_embedding.recipes.text_classifier import TextClassifier, TextData

# The second stage of the small schedule is the epochs 2 and 3, of 6 or 7 batches each.
PLACE = (3, 3)
# The last one before the end lies inside the epoch.
CHECKPOINTS = "--last.every_n_train_steps=5"


def same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return bool(a == b)


def last_checkpoint(root: str) -> dict[str, Any]:
    (path,) = Path(root).glob("version_0/checkpoints/last.ckpt")
    checkpoint: dict[str, Any] = torch.load(path, weights_only=True)
    return checkpoint


def test_a_killed_run_goes_on_as_if_nothing_had_happened(small_run: list[str]) -> None:
    killed = [*small_run, CHECKPOINTS, "--trainer.default_root_dir=killed"]
    assert run_script("killed_and_resumed.py", *PLACE, *killed) == ""
    before = int(Path("before.txt").read_text())
    assert main(["fit", *small_run, CHECKPOINTS, "--trainer.default_root_dir=whole"]) == 0

    one, other = last_checkpoint("whole"), last_checkpoint("killed")
    assert before < other["global_step"] == one["global_step"]
    assert same(one["state_dict"], other["state_dict"])
    assert same(one["optimizer_states"], other["optimizer_states"])
    vectors = Path("version_0/vectors.vec")
    assert ("whole" / vectors).read_bytes() == ("killed" / vectors).read_bytes()
    assert not (Path("killed") / "version_1").exists()


def fit(callbacks: list[Callback], ckpt_path: Path | None = None) -> tuple[Trainer, TextClassifier]:
    seed_everything(0, verbose=False)
    if ckpt_path is not None:
        torch.rand(7)  # a resumed process may have drawn any number of times
    model = TextClassifier(channels=4, lr=0.01)
    trainer = Trainer(
        max_epochs=6,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=ckpt_path is None,
        callbacks=[
            RandomState(),
            RowUnfreezing("schedule.yaml", audit=True),
            RowMonitor(),
            *callbacks,
        ],
    )
    data = TextData(path="texts.csv", vectors="vectors.txt", batch_size=8)
    trainer.fit(model, data, ckpt_path=ckpt_path)
    return trainer, model


def all_checkpoints() -> list[Callback]:
    """Checkpoints at every stage_state that Lightning offers."""
    stage_states: dict[str, dict[str, Any]] = {
        "step": {"every_n_train_steps": 1},
        "epoch": {"save_on_train_epoch_end": True},
        "validation": {"save_on_train_epoch_end": False, "monitor": "val_loss"},
    }
    return [
        ModelCheckpoint("checkpoints", f"{name}-{{step:02d}}", save_top_k=-1, **options)
        for name, options in stage_states.items()
    ]


def differences() -> Iterator[str]:
    """The checkpoints from which a resumed run ends elsewhere."""
    whole, model = fit(all_checkpoints())
    steps = whole.global_step
    paths = sorted(Path("checkpoints").glob("*.ckpt"))
    assert len(paths) == steps + 6 + 6
    per_epoch = steps // 6
    # All kinds of place: the first and the last batch of epochs, stage boundaries, in between.
    wanted = {1, per_epoch, per_epoch + 1, 2 * per_epoch, 3 * per_epoch + 2, 4 * per_epoch, steps}
    for path in paths:
        if int(path.stem.split("=")[1].split("-")[0]) not in wanted:
            continue
        again, other = fit([], path)
        if not (
            again.global_step == steps
            and same(model.state_dict(), other.state_dict())
            and same(whole.optimizers[0].state_dict(), again.optimizers[0].state_dict())
        ):
            yield path.name


def test_a_run_resumes_exactly_from_every_kind_of_checkpoint(small_run: list[str]) -> None:
    assert list(differences()) == []


def forget_random_state(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(RandomState, "on_train_batch_start", lambda *_: None)


def forget_the_place_in_the_epoch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ReplayableLoader, "load_state_dict", lambda *_: None)


def shuffle_without_epoch(monkeypatch: pytest.MonkeyPatch) -> None:
    def order(self: ReplayableLoader[Any]) -> Any:
        return torch.randperm(self.size).numpy()

    monkeypatch.setattr(ReplayableLoader, "_order", order)


@pytest.mark.parametrize(
    "forget", [forget_random_state, forget_the_place_in_the_epoch, shuffle_without_epoch]
)
def test_each_part_of_the_recipe_is_needed(
    forget: Callable[[pytest.MonkeyPatch], None],
    small_run: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    forget(monkeypatch)
    assert next(differences(), None) is not None


def test_processes_share_the_examples_evenly() -> None:
    loaders = [
        ReplayableLoader(lambda ids: ids.tolist(), 7, 2, seed=0, rank=rank, world_size=3)
        for rank in range(3)
    ]
    seen = [[i for batch in loader for i in batch] for loader in loaders]
    assert [len(own) for own in seen] == [3, 3, 3]
    assert set().union(*seen) == set(range(7))
    assert len({len(loader) for loader in loaders}) == 1


def test_epochs_are_shuffled_differently_and_repeatably() -> None:
    loader = ReplayableLoader(lambda ids: ids.tolist(), 50, 50, seed=0)
    first = list(loader)
    loader.set_epoch(1)
    second = list(loader)
    loader.set_epoch(0)
    assert first == list(loader) != second
