"""Steps as users write them, without a closure and with one."""

import copy
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from partial_embedding.torch import FrozenRowAudit, PartialEmbedding
from partial_embedding.torch.row_files import load_rows, save_rows
from partial_embedding.torch.table_files import rows_saved_alone

Loss = Callable[[], Tensor]


def closure_of(optimizer: torch.optim.Optimizer, loss_of: Loss) -> Loss:
    """What makes the gradients of a loss anew."""

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = loss_of()
        loss.backward()
        return loss

    return closure


def take_steps(optimizer: torch.optim.Optimizer, loss_of: Loss, count: int = 1) -> None:
    """Make so many steps on the gradients of a loss."""
    closure = closure_of(optimizer, loss_of)
    for _ in range(count):
        closure()
        optimizer.step()


def train_save_and_load(table: PartialEmbedding, folder: Path) -> PartialEmbedding:
    """What happens to a table in the course of time; the one that its rows were loaded into."""
    again = copy.deepcopy(table)
    for one in (table, again):
        one.remember_origin()
    model = nn.ModuleDict({"words": table})
    optimizer = torch.optim.SGD(table.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
    audit = FrozenRowAudit(table)
    ids = torch.arange(len(table.weight), device=table.weight.device)
    take_steps(optimizer, lambda: table(ids).square().sum(), 2)
    audit.check(2)
    table.unfreeze_rows([0])
    take_steps(optimizer, lambda: table(ids).square().sum(), 2)
    with rows_saved_alone([table]):
        torch.save((table.state_dict(), optimizer.state_dict()), folder / "saved.pt")
    of_table, of_optimizer = torch.load(folder / "saved.pt")
    again.set_trainable_rows(table.trainable_rows)
    again.load_state_dict(of_table)
    other = torch.optim.SGD(again.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
    other.load_state_dict(of_optimizer)
    for one, own in ((table, optimizer), (again, other)):
        take_steps(own, lambda one=one: one(ids).square().sum())
    save_rows(model, folder / "rows.safetensors")
    load_rows(model, folder / "rows.safetensors")
    return again
