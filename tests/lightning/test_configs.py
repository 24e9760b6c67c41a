"""Each schedule in configs/schedules is run on real text: what it plans is what happens."""

import ast
import contextlib
import re
import sysconfig
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch

from partial_embedding import Position, Schedule, Vocabulary
from partial_embedding.cli import main
from partial_embedding.rows.vocabulary_file import read_vocabulary
from partial_embedding.schedule.preview import plan
from partial_embedding.torch import FrozenRowAudit, PartialEmbedding, grow_table, rowwise

SCHEDULES = Path(__file__).parents[2] / "configs" / "schedules"
OF_WORDS = sorted(path.stem for path in SCHEDULES.glob("*.yaml") if path.stem != "new_items")
EPOCHS = 8


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("vectors")


@pytest.mark.parametrize("name", OF_WORDS)
def test_a_schedule_of_words_runs_as_planned(
    name: str, cache: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = SCHEDULES / f"{name}.yaml"
    with contextlib.chdir(tmp_path):
        args = [
            f"--rows.schedule={path}",
            f"--data.cache={cache}",
            "--data.batch_size=64",
            "--data.dimension=8",
            "--model.encoder=mean",
            "--model.lr=0.01",
            f"--trainer.max_epochs={EPOCHS}",
            "--trainer.limit_train_batches=12",
            "--trainer.limit_val_batches=2",
            "--trainer.accelerator=cpu",
            "--trainer.enable_progress_bar=false",
        ]
        assert main(["fit", *args]) == 0
        vocabulary = read_vocabulary("runs/version_0/vocabulary.tsv")
    out = capfd.readouterr().out
    assert re.search(r"audit: embedding: frozen rows by stage: .*; changed a bit: 0\n", out)
    said = re.findall(r"embedding: (stage .+?): ([\d,]+) rows train", out)
    schedule = Schedule.parse(path)
    steps = _steps_per_epoch(tmp_path)
    planned = plan(schedule, len(vocabulary), vocabulary, EPOCHS, steps, padding=0)
    if name == "plateau":
        # When validation stops improving is not for a plan to know; what comes then is.
        rows = [stage.rows.resolve(len(vocabulary), vocabulary) for stage in schedule.stages]
        expected = [f"{np.count_nonzero(ids):,}" for ids in rows]
        assert 1 < len(said) <= 3
        assert [trainable for _, trainable in said] == expected[: len(said)]
    else:
        assert said == [(step.place, f"{step.trainable:,}") for step in planned]


def _steps_per_epoch(folder: Path) -> int:
    checkpoint = torch.load(
        folder / "runs/version_0/checkpoints/last.ckpt", weights_only=True, map_location="cpu"
    )
    return int(checkpoint["global_step"]) // EPOCHS


def standard_imports() -> list[tuple[str, str]]:
    """Who imports whom in the standard library: modules as users, their imports as items."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    pairs = []
    for file in sorted(folder.glob("*.py")):
        tree = ast.parse(file.read_bytes())
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                pairs += [(file.stem, alias.name.partition(".")[0]) for alias in node.names]
    return sorted(set(pairs))


def test_new_items_of_a_recommender_run_as_planned() -> None:
    pairs = standard_imports()
    users = sorted({user for user, _ in pairs})
    seen = [item for _, item in pairs]
    items = sorted(set(seen), key=lambda item: (-seen.count(item), item))
    new = items[-20:]
    schedule = Schedule.parse(SCHEDULES / "new_items.yaml")
    vocabulary = Vocabulary(items)
    torch.manual_seed(0)
    of_users = torch.nn.Embedding(len(users), 8)
    table = PartialEmbedding(len(items) - 20, 8, trainable_rows="none")
    model = torch.nn.ModuleList([of_users, table])
    optimizer = rowwise(torch.optim.AdamW(model.parameters(), 0.02, weight_decay=0.1), model)
    grow_table(model, table, 20, init=torch.nn.init.normal_, trainable=False)
    user_ids = torch.tensor([users.index(user) for user, _ in pairs])
    item_ids = torch.tensor([vocabulary.index[item] for _, item in pairs])
    others = torch.from_numpy(np.random.default_rng(0).integers(len(items), size=len(pairs)))
    losses, trainable = [], []
    for epoch in range(10):
        # A plain loop asks the schedule for its rows.
        stage_state = schedule.state_at(Position(epoch))
        rows = schedule.rows_at(stage_state)
        if len(rows.resolve(len(items), new=table.new_rows)) != len(table.trainable_rows):
            table.set_trainable_rows(rows, **asdict(schedule.rate_scale_at(stage_state)))
        audit = FrozenRowAudit(table)
        for chosen in torch.arange(len(pairs)).split(64):
            vectors = of_users(user_ids[chosen])
            liked = (vectors * table(item_ids[chosen])).sum(1)
            unseen = (vectors * table(others[chosen])).sum(1)
            loss = torch.nn.functional.softplus(unseen - liked).mean()  # BPR
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        audit.check()
        trainable.append(len(table.trainable_rows))
        losses.append(loss.item())
    steps = plan(schedule, len(items), epochs=10, new=table.new_rows)
    planned = {step.epoch: step.trainable for step in steps}
    assert trainable == [planned[max(e for e in planned if e <= epoch)] for epoch in range(10)]
    assert new == [items[row] for row in table.trainable_rows.tolist()]
    assert losses[-1] < 0.7 * losses[0]
