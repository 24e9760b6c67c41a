"""A command that was killed goes on as if nothing had happened; how data are replayed."""

from pathlib import Path
from typing import Any

import torch
from once import run_script
from oracle import differences

from partial_embedding.cli import main
from partial_embedding.recipes.resume import ReplayableLoader

# The second stage of the small schedule is the epochs 2 and 3, of 6 or 7 batches each.
PLACE = (3, 3)
# The last one before the end lies inside the epoch.
CHECKPOINTS = "--last.every_n_train_steps=5"


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
    for part in ("state_dict", "optimizer_states"):
        assert differences(one[part], other[part]) == []
    vectors = Path("version_0/vectors.vec")
    assert ("whole" / vectors).read_bytes() == ("killed" / vectors).read_bytes()
    assert not (Path("killed") / "version_1").exists()


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
