"""Small models and batches for several processes, and what one process makes of all batches."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from partial_embedding.torch import PartialEmbedding, PartialLinear, rowwise
from partial_embedding.torch.row_gradient import RowGradient

V, D, STEPS = 31, 4, 7
SAVED_AT, AFTER = 4, range(4, 7)
# The rows from a step on: more at each of some, late ones, some frozen again, one that comes back.
ROWS = {
    0: [3, 4],
    1: [3, 4, 9],
    2: [3, 4, 9, 20],
    3: [3, 4, 9, 20, 21, 30],
    4: [3, 9, 21, 30],
    5: [3, 4, 9, 21, 30],
}
ALWAYS_FROZEN = [row for row in range(V) if not any(row in rows for rows in ROWS.values())]
# A batch of each process has a size of its own.
SIZES = (12, 5, 7)

OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.2),
    "AdamW-foreach": lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.2, foreach=True),
    "SGD": lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9, weight_decay=0.2),
    "Adagrad": lambda p: torch.optim.Adagrad(p, lr=0.1, weight_decay=0.2),
}


class Net(nn.Module):
    """A table, a hidden layer, and no head, or one that is a table too."""

    def __init__(self, head: str = "none", seed: int = 0, **options: Any) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.table = PartialEmbedding(V, D, trainable_rows=ROWS[0], **options)
        self.hidden = nn.Linear(D, D)
        self.head: nn.Module = nn.Identity()
        if head != "none":
            self.head = PartialLinear(D, V, bias=head == "untied", trainable_rows=ROWS[0])
        if head == "tied":
            self.head.weight = self.table.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.hidden(self.table(ids)))


def loss_of(made: Tensor) -> Tensor:
    return made.square().sum() * 0.05


def set_rows(net: Net, step: int) -> None:
    if step in ROWS:
        net.table.set_trainable_rows(ROWS[step])
        if isinstance(net.head, PartialLinear) and net.head.weight is not net.table.weight:
            net.head.set_trainable_rows(ROWS[step])


def batch(step: int, rank: int, part: int = 0, some_empty: bool = False) -> Tensor:
    size = 0 if some_empty and step == rank == 1 else SIZES[rank]
    drawn = torch.Generator().manual_seed(1000 * part + 100 * step + rank)
    return torch.randint(V, (size,), generator=drawn)


def own_rows(net: Net) -> dict[str, nn.Parameter]:
    """The parameters of which only rows train, tied ones once."""
    found = {"table": net.table.weight}
    if isinstance(net.head, PartialLinear) and net.head.weight is not net.table.weight:
        found["head"] = net.head.weight
    if getattr(net.head, "bias", None) is not None:
        found["bias"] = net.head.bias
    return found


def snapshot(net: Net) -> dict[str, Tensor]:
    return {name: whole(p).detach().clone() for name, p in own_rows(net).items()}


def gradients(net: Net) -> dict[str, Tensor | None]:
    found = {name: p.grad for name, p in own_rows(net).items()}
    return {name: None if g is None else dense(g) for name, g in found.items()}


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def dense(grad: Tensor) -> Tensor:
    """All rows of a gradient, whatever holds them."""
    if hasattr(grad, "_local_tensor"):
        grad = type(grad)(
            grad._local_tensor.to_dense().clone(), grad._spec, requires_grad=False
        ).full_tensor()
    return grad.to_dense().clone()


def by_row(grad: Tensor) -> RowGradient:
    ids = grad.ne(0).any(1).nonzero().flatten()
    return RowGradient(ids, grad[ids], len(grad))


def moments(net: Net, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The first moments of the rows of each parameter; all processes call this."""
    found, state = {}, optimizer.state_dict()
    places = [p for group in optimizer.param_groups for p in group["params"]]
    for name, parameter in own_rows(net).items():
        (index,) = [i for i, one in enumerate(places) if one is parameter]
        found[name] = state["state"][index]["rowwise"]["state"]["exp_avg"]["value"].clone()
    return found


def save(net: Net, optimizer: torch.optim.Optimizer, path: Path) -> None:
    model, states = get_state_dict(net, optimizer)
    dcp.save({"model": model, "optimizer": states}, checkpoint_id=path)


def load(net: Net, optimizer: torch.optim.Optimizer, path: Path) -> None:
    model, states = get_state_dict(net, optimizer)
    dcp.load({"model": model, "optimizer": states}, checkpoint_id=path)
    set_state_dict(net, optimizer, model_state_dict=model, optim_state_dict=states)


def alone(
    name: str,
    head: str,
    world: int,
    accumulate: int = 1,
    max_norm: float | None = None,
    lazy: bool = False,
) -> Iterator[tuple[dict[str, Tensor], float | None]]:
    """The rows after each step of one process that has the batches of all, and the norm."""
    net = Net(head)
    optimizer = rowwise(OPTIMIZERS[name](net.parameters()), net, lazy=lazy)
    for step in range(STEPS):
        set_rows(net, step)
        optimizer.zero_grad()
        for part in range(accumulate):
            for rank in range(world):
                (loss_of(net(batch(step, rank, part))) / world).backward()
        norm = None
        if max_norm is not None:
            norm = float(nn.utils.clip_grad_norm_(net.parameters(), max_norm))
        optimizer.step()
        yield snapshot(net), norm


def joined(
    name: str, head: str, world: int, max_norm: float | None = None, lazy: bool = False
) -> Iterator[tuple[dict[str, Tensor], float | None]]:
    """As `alone`, but that the table looks up the batches of all at once."""
    net = Net(head)
    optimizer = rowwise(OPTIMIZERS[name](net.parameters()), net, lazy=lazy)
    for step in range(STEPS):
        set_rows(net, step)
        optimizer.zero_grad()
        ids = [batch(step, rank, some_empty=True) for rank in range(world)]
        parts = net.table(torch.cat(ids)).split([len(one) for one in ids])
        sum(loss_of(net.head(net.hidden(part))) / world for part in parts).backward()
        norm = None
        if max_norm is not None:
            norm = float(nn.utils.clip_grad_norm_(net.parameters(), max_norm))
        optimizer.step()
        yield snapshot(net), norm


def replayed(
    name: str, head: str, recorded: list[dict[str, Tensor | None]], lazy: bool = False
) -> Iterator[dict[str, Tensor]]:
    """The rows after each step of one process that is given the gradients of all steps."""
    net = Net(head)
    optimizer = rowwise(OPTIMIZERS[name](own_rows(net).values()), net, lazy=lazy)
    for step, given in enumerate(recorded):
        set_rows(net, step)
        for which, parameter in own_rows(net).items():
            grad = given[which]
            parameter.grad = by_row(grad) if lazy and grad is not None else grad
        optimizer.step()
        yield snapshot(net)
