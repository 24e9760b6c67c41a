"""A small module with tables, a run of it, and a plain loop over small tables to compare with.

`Reference` knows nothing of `partial_embedding`: it holds each table as a bare tensor, and each
cohort of rows as an `nn.Embedding(K, D)` of its own; all of them are parameters of one stock
optimizer. A cohort that joins is one more parameter, so that its state begins there.
"""

import copy
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from oracle import rows_that_differ
from pytorch_lightning.utilities import rank_zero_only
from torch import Tensor, nn
from torch import distributed as dist
from torch.utils.data import DataLoader, TensorDataset

from partial_embedding.callbacks.lightning import RowUnfreezing
from partial_embedding.recipes.resume import ReplayableLoader
from partial_embedding.torch import PartialEmbedding, PartialLinear

# The tensors are tiny: threads would only wait for each other, and the tests run in two processes.
torch.set_num_threads(1)

V, D, CLASSES = 12, 4, 3
# Rows leave, stay and join: the first cohort goes on, then leaves whole while a third one joins.
STAGES = {0: (1, 4, 6), 1: (1, 2, 4, 6, 8), 3: (2, 8, 9)}
NEVER_TRAINED = (0, 3, 5, 7, 10, 11)
EPOCHS, BATCHES, BATCH = 4, 3, 4
OTHER_STAGES = {0: (0, 11), 2: (0, 5, 11)}
SCHEDULE, OTHER = (
    {"stages": [{"epoch": epoch, "rows": list(rows)} for epoch, rows in stages.items()]}
    for stages in (STAGES, OTHER_STAGES)
)
BY_NAME = {"words": SCHEDULE, "items": OTHER}

Parts = Mapping[str, list[nn.Parameter]]
MakeOptimizers = Callable[[Parts], list[torch.optim.Optimizer]]


def starting_table(seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """A table whose never trained rows hold values that careless arithmetic would change."""
    table = torch.randn(V, D, generator=torch.Generator().manual_seed(seed))
    table[10] = torch.tensor([-0.0, 1e-40, 0.0, 3.0])
    return table.to(dtype)


def data(batches: int = BATCHES, *, seed: int = 5, duplicates: bool = True) -> TensorDataset:
    """Texts of three words; without duplicates each word is in a batch once."""
    generator = torch.Generator().manual_seed(seed)
    if duplicates:
        ids = torch.randint(V, (batches * BATCH, 3), generator=generator)
    else:
        orders = [torch.randperm(V, generator=generator) for _ in range(batches)]
        ids = torch.cat(orders).view(batches * BATCH, 3)
    return TensorDataset(ids, torch.randint(CLASSES, (len(ids),), generator=generator))


def loader(dataset: TensorDataset) -> DataLoader[Any]:
    return DataLoader(dataset, batch_size=BATCH)


def replayable(dataset: TensorDataset, seed: int | None = None, **ranks: int) -> Any:
    """A loader that goes on within an epoch, as `loader` does not."""
    return ReplayableLoader(
        lambda chosen: dataset[torch.from_numpy(chosen)],
        size=len(dataset),
        batch_size=BATCH,
        seed=seed,
        **ranks,
    )


def adamw(parts: Parts) -> list[torch.optim.Optimizer]:
    """The plain optimizer over all parameters that the callback promises to serve."""
    parameters = [p for part in parts.values() for p in part]
    return [torch.optim.AdamW(parameters, lr=0.1, weight_decay=0.3)]


class Core:
    """What is the same for the LightningModules of both packages."""

    words: nn.Embedding
    head: nn.Linear

    def build(
        self,
        tables: Sequence[str] = ("words",),
        *,
        make: MakeOptimizers = adamw,
        plain: bool = False,
        sparse: bool = True,
        seed: int = 0,
    ) -> Any:
        self.make, self.names = make, tuple(tables)
        for i, name in enumerate(tables):
            # A plain optimizer takes no sparse gradients, so a plain table gives dense ones.
            table: nn.Embedding
            if plain:
                table = nn.Embedding.from_pretrained(starting_table(seed + i), freeze=False)
            else:
                table = PartialEmbedding.from_pretrained(starting_table(seed + i), sparse=sparse)
            setattr(self, name, table)
        torch.manual_seed(seed)
        self.head = nn.Linear(D, CLASSES)
        self.steps_begun = 0
        return self

    def loss(self, batch: Any) -> Tensor:
        ids, labels = batch
        return loss_of(self.head, [getattr(self, name)(ids) for name in self.names], labels)

    def training_step(self, batch: Any, index: int) -> Tensor | None:
        self.steps_begun += 1
        return self.loss(batch)

    def parts(self) -> Parts:
        tables = {name: [getattr(self, name).weight] for name in self.names}
        return {**tables, "head": list(self.head.parameters())}

    def configure_optimizers(self) -> Any:
        return self.make(self.parts())


class Net(Core, pl.LightningModule):
    """Tables, their mean, a linear head, and one stock AdamW over everything."""


class Scored(Net):
    """Has a head of rows too, with rows and a bias of its own."""

    def build(self, **options: Any) -> Any:
        super().build(**options)
        self.scores = PartialLinear(D, V)
        return self

    def loss(self, batch: Any) -> Tensor:
        ids, labels = batch
        hidden = self.words(ids).mean(1)
        return F.cross_entropy(self.scores(hidden), labels) + self.head(hidden).square().mean()

    def parts(self) -> Parts:
        return {**super().parts(), "scores": list(self.scores.parameters())}


def loss_of(head: nn.Module, looked_up: Iterable[Tensor], labels: Tensor) -> Tensor:
    return F.cross_entropy(head(sum(rows.mean(1) for rows in looked_up)), labels)


def whole_of(tensor: Tensor) -> Tensor:
    """A tensor, or all that the ranks hold of a sharded one."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def weights_of(module: nn.Module) -> dict[str, Tensor]:
    return {n: whole_of(p).detach().clone() for n, p in module.named_parameters()}


class Witness(pl.Callback):
    """Keeps all weights as they were after each batch, whole; saves after a step where told to."""

    def __init__(self, save_at: int | None = None, path: Any = None) -> None:
        self.save_at, self.path = save_at, path
        self.seen: list[dict[str, Tensor]] = []
        self.epochs: list[int] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        self.seen.append(weights_of(pl_module))
        self.epochs.append(trainer.current_epoch)
        if trainer.global_step == self.save_at:
            trainer.save_checkpoint(self.path)


def known_rank() -> int:
    """The rank of this process, which Lightning then knows too."""
    rank_zero_only.rank = dist.get_rank()
    os.environ.update(LOCAL_RANK=str(dist.get_rank()), NODE_RANK="0")
    return dist.get_rank()


def trainer(*callbacks: pl.Callback, package: Any = pl, **options: Any) -> Any:
    """A silent trainer on one CPU."""
    silent = dict.fromkeys(
        ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False
    )
    options = {"max_epochs": EPOCHS, "accelerator": "cpu", "devices": 1, **silent, **options}
    return package.Trainer(callbacks=list(callbacks), **options)


def fit(
    net: Any,
    *more: pl.Callback,
    schedule: Any = SCHEDULE,
    dataset: TensorDataset | None = None,
    package: Any = pl,
    ckpt_path: Any = None,
    unfreezing: RowUnfreezing | None = None,
    **options: Any,
) -> Witness:
    """A run with `RowUnfreezing` and an audit of every step."""
    witness = Witness()
    callback = unfreezing or RowUnfreezing(schedule, audit=1)
    made = trainer(callback, *more, witness, package=package, **options)
    made.fit(net, loader(dataset or data()), ckpt_path=ckpt_path)
    return witness


class Reference:
    """A plain loop in which each cohort is a table of its own."""

    def __init__(self, net: Any, stages: Mapping[str, Mapping[int, Sequence[int]]]) -> None:
        self.stages = stages
        self.tables = {name: getattr(net, name).weight.detach().clone() for name in net.names}
        self.head = copy.deepcopy(net.head)
        self.cohorts: dict[str, list[tuple[Tensor, nn.Embedding]]] = {n: [] for n in net.names}
        for name in net.names:
            self._join(name, stages[name][0])
        self.optimizers = net.make(self.parts())

    def parts(self) -> Parts:
        small = {n: [table.weight for _, table in made] for n, made in self.cohorts.items()}
        return {**small, "head": list(self.head.parameters())}

    def parameters(self) -> list[nn.Parameter]:
        return [p for part in self.parts().values() for p in part]

    def _join(self, name: str, rows: Sequence[int]) -> nn.Embedding:
        ids = torch.tensor(sorted(rows))
        small = nn.Embedding.from_pretrained(self.tables[name][ids], freeze=False)
        self.cohorts[name].append((ids, small))
        return small

    def begin_epoch(self, epoch: int) -> None:
        """Let cohorts leave and join where a stage begins."""
        for name, stages in self.stages.items():
            if epoch == 0 or epoch not in stages:
                continue
            wanted, cohorts = set(stages[epoch]), self.cohorts[name]
            last = cohorts[-1][1].weight
            group = next(
                group
                for optimizer in self.optimizers
                for group in optimizer.param_groups
                if any(p is last for p in group["params"])
            )
            have = {row for ids, _ in cohorts for row in ids.tolist()}
            joined = [self._join(name, sorted(wanted - have)).weight] if wanted - have else []
            at = next(i for i, p in enumerate(group["params"]) if p is last) + 1
            group["params"][at:at] = joined
            for ids, small in list(cohorts):
                staying = wanted & set(ids.tolist())
                assert staying in (set(), set(ids.tolist())), "only whole cohorts leave here"
                if not staying:
                    cohorts[:] = [pair for pair in cohorts if pair[1] is not small]
                    group["params"][:] = [p for p in group["params"] if p is not small.weight]

    def backward(
        self,
        batch: Sequence[Tensor],
        *,
        scale: Callable[[Tensor], Tensor] = lambda loss: loss,
        context: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ) -> None:
        """Add the gradients of one batch."""
        ids, labels = batch
        looked_up = {n: table[ids].requires_grad_() for n, table in self.tables.items()}
        with context():
            loss = loss_of(self.head, looked_up.values(), labels)
        scale(loss).backward()
        for name, upstream in looked_up.items():
            for rows, small in self.cohorts[name]:
                mine = torch.isin(ids, rows)
                if mine.any():
                    small(torch.searchsorted(rows, ids[mine])).backward(upstream.grad[mine])
                elif small.weight.grad is None:
                    small.weight.grad = torch.zeros_like(small.weight)

    def step(self, move: Callable[[torch.optim.Optimizer], Any] | None = None) -> None:
        """Step every optimizer, write the rows back and forget the gradients."""
        for optimizer in self.optimizers:
            optimizer.step() if move is None else move(optimizer)
            optimizer.zero_grad()
        with torch.no_grad():
            for name, cohorts in self.cohorts.items():
                for rows, small in cohorts:
                    self.tables[name][rows] = small.weight

    def weights(self) -> dict[str, Tensor]:
        """What a module's `state_dict` holds, as a copy."""
        tables = {f"{name}.weight": table.clone() for name, table in self.tables.items()}
        head = {f"head.{k}": v.detach().clone() for k, v in self.head.state_dict().items()}
        return {**tables, **head}


def reference_run(
    net: Any,
    *,
    stages: Mapping[str, Mapping[int, Sequence[int]]] | None = None,
    dataset: TensorDataset | None = None,
    accumulate: int = 1,
    clip: Callable[[list[nn.Parameter]], Any] = lambda parameters: None,
    context: Callable[[], AbstractContextManager[Any]] = nullcontext,
    scaler: torch.amp.GradScaler | None = None,
    prepare: Callable[[Reference], Any] = lambda reference: None,
    after_epoch: Callable[[Reference], Any] = lambda reference: None,
    after_step: Callable[[Reference], Any] = lambda reference: None,
    skip: Callable[[int], bool] = lambda index: False,
    epochs: int = EPOCHS,
) -> list[dict[str, Tensor]]:
    """The weights after each batch of a plain loop, for a module that was not trained yet."""
    reference = Reference(net, stages or dict.fromkeys(net.names, STAGES))
    prepare(reference)
    scale = (lambda loss: loss) if scaler is None else scaler.scale
    seen = []

    def move(optimizer: torch.optim.Optimizer) -> None:
        if scaler is None:
            clip(reference.parameters())
            optimizer.step()
            return
        scaler.unscale_(optimizer)
        clip(reference.parameters())
        scaler.step(optimizer)
        scaler.update()

    for epoch in range(epochs):
        reference.begin_epoch(epoch)
        batches = list(loader(dataset or data()))
        for i, batch in enumerate(batches):
            if not skip(i):
                reference.backward(
                    batch, scale=lambda loss: scale(loss / accumulate), context=context
                )
                if (i + 1) % accumulate == 0 or i + 1 == len(batches):
                    reference.step(move)
                    after_step(reference)
            seen.append(reference.weights())
        after_epoch(reference)
    return seen


def assert_same_run(witness: Witness, expected: Sequence[Mapping[str, Tensor]]) -> None:
    """Fail unless all weights had the expected bits after every batch."""
    assert len(witness.seen) == len(expected) > 0
    for i, (seen, wanted) in enumerate(zip(witness.seen, expected, strict=True)):
        assert seen.keys() == wanted.keys()
        for name in seen:
            differ = rows_that_differ(seen[name], wanted[name])
            gap = (seen[name].double() - wanted[name].double()).abs().max()
            assert not differ, f"{name}, batch {i}: rows {differ} differ, by {gap:.3g} at most"


def assert_close_run(witness: Witness, expected: Sequence[Mapping[str, Tensor]]) -> None:
    """Fail unless all weights were near the expected ones; frozen rows must still be exact."""
    assert len(witness.seen) == len(expected) > 0
    for seen, wanted in zip(witness.seen, expected, strict=True):
        for name in seen:
            torch.testing.assert_close(seen[name], wanted[name], rtol=1e-5, atol=1e-6)


def assert_frozen_rows_kept_their_bits(
    witness: Witness,
    start: Tensor,
    *,
    name: str = "words",
    stages: Mapping[int, Sequence[int]] = STAGES,
) -> None:
    """Fail unless rows moved in no batch of a stage in which they were frozen, and others did."""
    before, moved = start, set()
    for seen, epoch in zip(witness.seen, witness.epochs, strict=True):
        now = seen[f"{name}.weight"]
        trainable = stages[max(first for first in stages if first <= epoch)]
        changed = set(rows_that_differ(now, before))
        assert changed <= set(trainable)
        moved |= changed
        before = now
    assert moved == {row for rows in stages.values() for row in rows}
