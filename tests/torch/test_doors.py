"""Every tool that reaches a weight, a gradient or a state, by another way than ours.

A door is used on a table of which rows train, and on the tables of those rows alone: one for each
cohort. Frozen rows keep their bits, trainable ones are those of the small tables.
"""

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from oracle import assert_same_bits
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_avg_fn, get_ema_multi_avg_fn

from partial_embedding.torch import PartialEmbedding, row_gradient, rowwise
from partial_embedding.torch.row_gradient import RowGradient

V, D, STEPS = 12, 4, 8
FIRST, LATE = [1, 4, 7], [0, 9]
OPTIMIZERS: dict[str, dict[str, Any]] = {
    "AdamW": {"lr": 0.1, "weight_decay": 0.1},
    "SGD": {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.1},
    "Adagrad": {"lr": 0.1},
}
# The rows that train from a step on; what is no longer among them is frozen again.
LIVES: dict[str, dict[int, list[int]]] = {
    "frozen": {0: FIRST},
    "late": {0: FIRST, 3: [*FIRST, *LATE]},
    "refrozen": {0: [*FIRST, 9], 4: FIRST},
}


class Run:
    """A model, its optimizer and the weights that are watched, stepped through a door.

    Args:
        cohorts: The rows of each table by themselves, or None for one table of all rows.
        optimizer: The name of the optimizer.
        start: The rows' values.
    """

    def __init__(self, cohorts: list[list[int]] | None, optimizer: str, start: Tensor) -> None:
        torch.manual_seed(0)
        self.layer = nn.Linear(D, 3)
        self.cohorts = cohorts
        self.tables = nn.ModuleList()
        if cohorts is None:
            self.tables.append(PartialEmbedding.from_pretrained(start.clone()))
        else:
            self.tables.extend(
                nn.Embedding.from_pretrained(start[rows].clone(), freeze=False) for rows in cohorts
            )
        self.model = nn.ModuleDict({"tables": self.tables, "layer": self.layer})
        self.kind = getattr(torch.optim, optimizer)
        self.options = OPTIMIZERS[optimizer]
        self.optimizer = self.make(self.model.parameters())
        self.extra: dict[str, Any] = {}

    def make(self, parameters: Any, **more: Any) -> torch.optim.Optimizer:
        made: torch.optim.Optimizer = self.kind(parameters, **self.options, **more)
        return made

    def backward(self, ids: Tensor, up: Tensor, factor: float = 1.0) -> Tensor:
        """One backward pass, in which a frozen row of a small table has no part."""
        loss = self.layer.weight.square().sum()
        if self.cohorts is None:
            loss = loss + (self.tables[0](ids) * up).sum()
        else:
            for table, rows in zip(self.tables, self.cohorts, strict=True):
                mine = torch.isin(ids, torch.tensor(rows))
                slots = torch.searchsorted(torch.tensor(rows), ids[mine])
                if len(slots) and table.weight.requires_grad:
                    loss = loss + (table(slots) * up[mine]).sum()
        (loss * factor).backward()
        return loss.detach()

    def weights(self) -> list[Tensor]:
        return [table.weight for table in self.tables]


Door = Callable[[Run, Tensor, Tensor, int], None]


def plain(run: Run, ids: Tensor, up: Tensor, step: int) -> None:
    run.optimizer.zero_grad()
    run.backward(ids, up)
    run.optimizer.step()


def closure(run: Run, ids: Tensor, up: Tensor, step: int) -> None:
    def loss() -> Tensor:
        run.optimizer.zero_grad()
        return run.backward(ids, up)

    run.optimizer.step(loss)


def accumulated(run: Run, ids: Tensor, up: Tensor, step: int) -> None:
    run.optimizer.zero_grad(set_to_none=step % 2 == 0)
    for _ in range(3):
        run.backward(ids, up, 1 / 3)
    run.optimizer.step()


def clipped(change: Callable[[list[Tensor]], object]) -> Door:
    def door(run: Run, ids: Tensor, up: Tensor, step: int) -> None:
        run.optimizer.zero_grad()
        run.backward(ids, up)
        change(run.weights())
        run.optimizer.step()

    return door


def scaled(run: Run, ids: Tensor, up: Tensor, step: int) -> None:
    scaler = run.extra.setdefault("scaler", torch.amp.GradScaler("cpu", init_scale=16.0))
    run.optimizer.zero_grad()
    run.backward(ids, up, float(scaler.scale(torch.ones(()))))
    scaler.unscale_(run.optimizer)
    scaler.step(run.optimizer)
    scaler.update()


def scaled_with_an_infinity(run: Run, ids: Tensor, up: Tensor, step: int) -> None:
    up = up.clone()
    if step in (2, 5):  # in a frozen row, which is none of the scaler's business, and in another
        up[0 if step == 2 else FIRST[0], 0] = float("inf")
    scaled(run, ids, up, step)


def scheduled(run: Run, ids: Tensor, up: Tensor, step: int) -> None:
    if "scheduler" not in run.extra:
        run.extra["scheduler"] = torch.optim.lr_scheduler.ExponentialLR(run.optimizer, 0.8)
    plain(run, ids, up, step)
    run.extra["scheduler"].step()


def saved_and_loaded(run: Run, ids: Tensor, up: Tensor, step: int) -> None:
    plain(run, ids, up, step)
    state = copy.deepcopy(run.optimizer.state_dict())
    run.optimizer = run.make(run.model.parameters())
    run.optimizer.load_state_dict(state)


def accelerated(run: Run, ids: Tensor, up: Tensor, step: int) -> None:
    accelerate = pytest.importorskip("accelerate")
    if step == 0:
        run.extra["accelerator"] = accelerator = accelerate.Accelerator(cpu=True)
        run.optimizer = accelerator.prepare(run.optimizer)
    run.optimizer.zero_grad()
    run.backward(ids, up)
    run.extra["accelerator"].clip_grad_value_(run.weights(), 0.3)
    run.optimizer.step()


def in_fabric(run: Run, ids: Tensor, up: Tensor, step: int) -> None:
    fabric = pytest.importorskip("lightning.fabric")
    if step == 0:
        run.extra["fabric"] = fabric.Fabric(accelerator="cpu", devices=1)
        _, run.optimizer = run.extra["fabric"].setup(run.model, run.optimizer)
    plain(run, ids, up, step)


def averaged(use_buffers: bool, **options: Any) -> Door:
    def door(run: Run, ids: Tensor, up: Tensor, step: int) -> None:
        if step == 0:
            run.extra["average"] = AveragedModel(run.model, use_buffers=use_buffers, **options)
        plain(run, ids, up, step)
        run.extra["average"].update_parameters(run.model)

    return door


def compiled(run: Run, ids: Tensor, up: Tensor, step: int) -> None:
    if step == 0 and run.cohorts is None:
        run.tables[0] = torch.compile(run.tables[0], backend="aot_eager")
    plain(run, ids, up, step)


# By the names that a user knows: the site shows them.
DOORS: dict[str, Door] = {
    "a plain step": plain,
    "a closure": closure,
    "accumulated gradients": accumulated,
    "clip_grad_norm_": clipped(lambda w: [nn.utils.clip_grad_norm_(one, 0.5) for one in w]),
    "clip_grad_norm_, infinity, foreach": clipped(
        lambda w: [nn.utils.clip_grad_norm_(one, 0.5, float("inf"), foreach=True) for one in w]
    ),
    "clip_grad_value_": clipped(lambda w: nn.utils.clip_grad_value_(w, 0.3)),
    "clip_grad_value_, foreach": clipped(lambda w: nn.utils.clip_grad_value_(w, 0.3, foreach=True)),
    "a gradient edited in place": clipped(
        lambda w: [one.grad.mul_(0.5) for one in w if one.grad is not None]
    ),
    "GradScaler": scaled,
    "GradScaler, an infinity": scaled_with_an_infinity,
    "a learning-rate scheduler": scheduled,
    "state_dict into another optimizer": saved_and_loaded,
    "Accelerate, clipping": accelerated,
    "Fabric": in_fabric,
    "averages, EMA": averaged(False, avg_fn=get_ema_avg_fn(0.9)),
    "averages, EMA, foreach": averaged(False, multi_avg_fn=get_ema_multi_avg_fn(0.9)),
    "averages, EMA, buffers": averaged(True, avg_fn=get_ema_avg_fn(0.9)),
    "averages, SWA": averaged(False),
    "torch.compile": compiled,
}
# Where the norm of several tables together is not that of each, to the bit or at all.
BY_TABLE = {"clip_grad_norm_", "clip_grad_norm_, infinity, foreach"}


def cases() -> Iterator[Any]:
    """Each door with each life; as few always as show it with each optimizer and both calls."""
    for i, door in enumerate(DOORS):
        for j, life in enumerate(LIVES if door not in BY_TABLE else ["frozen"]):
            for k, optimizer in enumerate(OPTIMIZERS):
                for calls in (False, True):
                    always = door in BY_TABLE or ((i + j) % 3 == k and (i + j) % 2 == calls)
                    yield pytest.param(
                        door,
                        life,
                        optimizer,
                        calls,
                        id=f"{door}-{life}-{optimizer}-{'rowwise' if calls else 'no_call'}",
                        marks=[] if always else [pytest.mark.full],
                    )


CASES = list(cases())


def go_through(door: str, life: str, optimizer: str, calls: bool) -> None:
    """Train through a door, and compare after each step."""
    stages = LIVES[life]
    torch.manual_seed(7)
    start = torch.randn(V, D)
    ours = Run(None, optimizer, start)
    ours.tables[0].set_trainable_rows("none")
    ours.tables[0].set_trainable_rows(stages[0])
    if calls:
        rowwise(ours.optimizer)
    rows = sorted(stages[0])
    cohorts = [rows, LATE] if life == "late" else [rows]
    theirs = Run(cohorts, optimizer, start)
    if life == "late":
        theirs.tables[1].weight.requires_grad_(False)
    kept, average_kept = start.clone(), start.clone()
    frozen = [row for row in range(V) if row not in rows]
    for step in range(STEPS):
        if step in stages and step:
            ours.tables[0].set_trainable_rows(stages[step])
            if life == "late":
                theirs.tables[1].weight.requires_grad_(True)
                if "average" in theirs.extra:  # it begins here, and has not rounded before
                    mean = theirs.extra["average"].module["tables"][1].weight
                    mean.detach().copy_(theirs.tables[1].weight)
                frozen = [row for row in frozen if row not in LATE]
            else:
                # The rows that stay go on; of the one that left nothing is compared.
                left = [row for row in rows if row not in stages[step]]
                kept[left] = ours.tables[0].weight.detach()[left]
                frozen += left
        # Each row that trains is looked up, since an optimizer moves those that are not, too.
        ids = torch.cat([torch.arange(V), torch.randint(V, (6,))])
        up = torch.randn(len(ids), D)
        for run in (ours, theirs):
            mine = up.clone()
            if life == "refrozen" and step >= 4 and run is theirs:
                mine[ids == 9] = 0
            DOORS[door](run, ids, mine, step)
        table = ours.tables[0].weight
        assert_same_bits(table[frozen], kept[frozen], f"frozen rows after step {step}")
        for small, its in zip(theirs.tables, cohorts, strict=True):
            stay = [row for row in its if row not in frozen]
            places = [its.index(row) for row in stay]
            assert_same_bits(table[stay], small.weight[places], f"rows after step {step}")
        if "average" in ours.extra and life != "refrozen":
            mean = ours.extra["average"].module["tables"][0].weight
            assert_same_bits(mean[frozen], average_kept[frozen], f"the average's at {step}")
            means = theirs.extra["average"].module["tables"]
            for small, its in zip(means, cohorts, strict=True):
                stay = [row for row in its if row not in frozen]
                places = [its.index(row) for row in stay]
                assert_same_bits(mean[stay], small.weight[places], f"the average at {step}")


@pytest.mark.parametrize(("door", "life", "optimizer", "calls"), CASES)
def test_rows_go_through_a_door_as_small_tables_do(
    door: str,
    life: str,
    optimizer: str,
    calls: bool,
    record_property: Callable[[str, object], None],
) -> None:
    go_through(door, life, optimizer, calls)
    record_property("configuration: door", f"{door}-{life}-{optimizer}-{calls}")


# What a door needs beside an optimizer that prepares itself, and how to take it away.
Break = Callable[[pytest.MonkeyPatch], None]


def never_prepared(patch: pytest.MonkeyPatch) -> None:
    patch.setattr("partial_embedding.torch.optimizer._prepare", lambda *step: None)


def with_old_gradients(patch: pytest.MonkeyPatch) -> None:
    def too_early(args: Any, kwargs: Any, then: Callable[[], None], *before: Any) -> Any:
        then()
        return args, kwargs

    patch.setattr("partial_embedding.torch.row_optimizer.with_gradients", too_early)


def without_restoring(patch: pytest.MonkeyPatch) -> None:
    patch.setattr("partial_embedding.torch.row_optimizer.restore", lambda *state: None)


def without_averaging(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(AveragedModel, "update_parameters", AveragedModel.update_parameters.__wrapped__)


def without_sums(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(RowGradient, "_add", lambda *added: None)


def does_nothing(func: Any, target: Any, *others: Any) -> Any:
    return None if isinstance(target, list) else target


def without(*functions: Any, instead: Callable[..., Any] = does_nothing) -> Break:
    def forget(patch: pytest.MonkeyPatch) -> None:
        for function in functions:
            patch.setitem(row_gradient._BY_ROW, function, instead)

    return forget


def finds_nothing(func: Any, grads: Any, found: Tensor, scale: Tensor) -> None:
    row_gradient._changed(func, grads, torch.zeros_like(found), scale)


aten = torch.ops.aten
BREAKS: dict[str, Break] = {
    "a closure": with_old_gradients,
    "accumulated gradients": without_sums,
    "clip_grad_norm_": without(
        aten.linalg_vector_norm.default, instead=lambda *norm, **options: torch.zeros(())
    ),
    "clip_grad_norm_, infinity, foreach": without(
        aten._foreach_norm.Scalar, instead=lambda *norm, **options: [torch.zeros(())]
    ),
    "clip_grad_value_": without(aten.clamp_.default),
    "clip_grad_value_, foreach": without(
        aten._foreach_clamp_min_.Scalar, aten._foreach_clamp_max_.Scalar
    ),
    "GradScaler": without(aten._amp_foreach_non_finite_check_and_unscale_.default),
    "GradScaler, an infinity": without(
        aten._amp_foreach_non_finite_check_and_unscale_.default, instead=finds_nothing
    ),
    "state_dict into another optimizer": without_restoring,
    "averages, EMA": without_averaging,
    "averages, EMA, buffers": without_averaging,
    "a gradient edited in place": without(aten.mul_.Tensor),
}


@pytest.mark.parametrize("door", DOORS)
def test_a_door_is_seen_to_fail_without_its_mechanism(
    door: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    BREAKS.get(door, never_prepared)(monkeypatch)

    def go_through_all() -> None:
        for life in LIVES:
            go_through(door, life, "SGD", calls=False)

    with pytest.raises(AssertionError):
        go_through_all()


def test_the_doors_do_not_shrink_unseen() -> None:
    assert len(CASES) >= 318
    always = [case.values for case in CASES if not case.marks]
    for door in DOORS:
        shown = [values[1:] for values in always if values[0] == door]
        lives = {"frozen"} if door in BY_TABLE else set(LIVES)
        assert [set(each) for each in zip(*shown, strict=True)] == [
            lives,
            set(OPTIMIZERS),
            {False, True},
        ]
    assert set(BREAKS) < set(DOORS)
