"""Where a gradient of zero moves nothing, touched rows are stepped alone, to the same bits."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from oracle import assert_same_bits
from torch import Tensor

from partial_embedding.torch import PartialEmbedding, rowwise
from partial_embedding.torch.optimizer import prepared

V, D = 6000, 3  # three columns: no register is filled by whole rows
FIRST, LATE = list(range(0, 4500, 2)), list(range(1, 3001, 2))
RESTING: dict[str, tuple[str, dict[str, Any]]] = {
    "SGD": ("SGD", {"lr": 0.1}),
    "SGD, foreach": ("SGD", {"lr": 0.1, "foreach": True}),
    "SGD, fused": ("SGD", {"lr": 0.1, "fused": True}),
    "Adagrad": ("Adagrad", {"lr": 0.1}),
    "Adagrad, decaying rate": ("Adagrad", {"lr": 0.1, "lr_decay": 0.1}),
    "Adagrad, begun": ("Adagrad", {"lr": 0.1, "initial_accumulator_value": 0.5}),
}
MOVING: dict[str, tuple[str, dict[str, Any]]] = {
    "SGD, momentum": ("SGD", {"lr": 0.1, "momentum": 0.9}),
    "SGD, decay": ("SGD", {"lr": 0.1, "weight_decay": 0.1}),
    "SGD, decay, from a rate of zero": ("SGD", {"lr": 0.0, "weight_decay": 0.1}),
    "SGD, upwards": ("SGD", {"lr": 0.1, "maximize": True}),  # makes zero of minus zero
    "Adagrad, without eps": ("Adagrad", {"lr": 0.1, "eps": 0.0}),  # divides zero by zero
    "Adagrad, decay": ("Adagrad", {"lr": 0.1, "weight_decay": 0.1}),
    # What rounds to nothing at values near one, in one step, does not in all of them.
    "SGD, little decay": ("SGD", {"lr": 0.1, "weight_decay": 1e-6}),
    "SGD, very little decay": ("SGD", {"lr": 0.1, "weight_decay": 1e-9}),
    "SGD, dampened": ("SGD", {"lr": 0.1, "momentum": 0.9, "dampening": 1.0}),
    "Adam": ("Adam", {}),
    "RMSprop": ("RMSprop", {}),
}


def batch(step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    ids = torch.randint(V, (90,), generator=generator)
    return ids, torch.randn(90, D, generator=generator)


def run(
    make: Callable[..., torch.optim.Optimizer], dtype: torch.dtype, by_row: bool, steps: int = 8
) -> Tensor:
    """Train rows that join and leave, with gradients by row, or with the same ones dense."""
    table = PartialEmbedding(V, D, sparse=by_row, dtype=dtype, trainable_rows=FIRST)
    with torch.no_grad():
        table.weight.copy_(torch.randn(V, D, generator=torch.Generator().manual_seed(0)))
        table.weight[::5] = -0.0
    optimizer = rowwise(make(table.parameters()))
    for step in range(steps):
        if step == 3:
            table.set_trainable_rows([*FIRST, *LATE], lr_scale=0.5, warmup_steps=3)
        if step == 6:
            table.freeze_rows(FIRST[:900])
        if step == 7:
            optimizer.param_groups[0]["weight_decay"] = 0.1
        ids, up = batch(step)
        optimizer.zero_grad()
        table(ids).backward(up.to(dtype))
        optimizer.step()
    return table.weight.detach()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", RESTING)
def test_the_bits_are_those_of_the_step_of_all_trainable_rows(
    name: str, dtype: torch.dtype
) -> None:
    kind, options = RESTING[name]

    def make(parameters: Any) -> torch.optim.Optimizer:
        made: torch.optim.Optimizer = getattr(torch.optim, kind)(parameters, **options)
        return made

    assert_same_bits(run(make, dtype, True), run(make, dtype, False), "the table")


@pytest.mark.parametrize("name", [*RESTING, *MOVING])
def test_it_is_found_out_by_a_dry_run(name: str) -> None:
    kind, options = {**RESTING, **MOVING}[name]
    table = PartialEmbedding(V, D, trainable_rows=FIRST)
    optimizer = rowwise(getattr(torch.optim, kind)(table.parameters(), **options))
    handle = prepared(optimizer)
    assert handle is not None
    (state,) = handle.tables.values()
    assert state.layout.rests == (name in RESTING)


def test_a_step_does_not_read_the_rows_that_no_id_touched() -> None:
    table = PartialEmbedding(V, D, trainable_rows=FIRST)
    sizes: list[int] = []

    class Seen(torch.optim.Adagrad):
        def step(self, closure: Any = None) -> Any:
            sizes.extend(len(p) for group in self.param_groups for p in group["params"])
            return super().step(closure)

    optimizer = rowwise(Seen(table.parameters()))
    sizes.clear()  # of dry runs
    for step in range(3):
        ids, up = batch(step)
        optimizer.zero_grad()
        table(ids).backward(up)
        optimizer.step()
    assert max(sizes) <= 90 < len(FIRST)
