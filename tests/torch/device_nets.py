"""Small models and batches for several processes, and what one process makes of all batches."""

from collections.abc import Callable, Iterable, Iterator
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
# A batch of each process has a size of its own.
SIZES = (12, 5, 7)

OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.2),
    "AdamW-foreach": lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.2, foreach=True),
    "AdamW-fused": lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.2, fused=True),
    "SGD": lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9, weight_decay=0.2),
    "SGD-plain": lambda p: torch.optim.SGD(p, lr=0.01, weight_decay=0.2),
    "Adagrad": lambda p: torch.optim.Adagrad(p, lr=0.1, weight_decay=0.2),
}


class Net(nn.Module):
    """A table, a hidden layer, and no head, or one that is tied to the table or a table too."""

    def __init__(
        self,
        head: str = "none",
        rows: Any = tuple(ROWS[0]),
        num_rows: int = V,
        seed: int = 0,
        **options: Any,
    ) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.table = PartialEmbedding(num_rows, D, trainable_rows=rows, **options)
        self.hidden = nn.Linear(D, D)
        self.head: nn.Module = nn.Identity()
        if head == "tied_dense":
            self.head = nn.Linear(D, num_rows, bias=False)
        elif head != "none":
            self.head = PartialLinear(D, num_rows, bias=head == "untied", trainable_rows=rows)
        if head.startswith("tied"):
            self.head.weight = self.table.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.loss_of(self.table(ids))

    def loss_of(self, looked_up: Tensor) -> Tensor:
        loss: Tensor = self.head(self.hidden(looked_up)).square().sum() * 0.05
        return loss

    def set_rows(self, rows: Any, **rate: Any) -> None:
        self.table.set_trainable_rows(rows, **rate)
        if isinstance(self.head, PartialLinear) and self.head.weight is not self.table.weight:
            self.head.set_trainable_rows(rows, **rate)


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


Step = tuple[dict[str, Tensor], dict[str, Tensor | None], float | None]


def make(name: str, net: Net, lazy: bool = False) -> torch.optim.Optimizer:
    return rowwise(OPTIMIZERS[name](net.parameters()), net, lazy=lazy)


def train(
    net: Net,
    backward: Callable[[int], object],
    *optimizers: torch.optim.Optimizer,
    max_norm: float | None = None,
    steps: Iterable[int] = range(STEPS),
) -> Iterator[Step]:
    """The rows after each step, the gradients that it was made with, and their norm."""
    for step in steps:
        if step in ROWS:
            net.set_rows(ROWS[step])
        net.zero_grad()
        backward(step)
        norm = None
        if max_norm is not None:
            norm = float(whole(nn.utils.clip_grad_norm_(net.parameters(), max_norm)))
        grads = gradients(net)
        for optimizer in optimizers:
            optimizer.step()
        yield snapshot(net), grads, norm


def alone(
    name: str,
    head: str,
    world: int,
    accumulate: int = 1,
    max_norm: float | None = None,
    lazy: bool = False,
) -> Iterator[Step]:
    """As one process trains that has the batches of all."""
    net = Net(head)

    def backward(step: int) -> None:
        for part in range(accumulate):
            for rank in range(world):
                (net(batch(step, rank, part)) / world).backward()

    return train(net, backward, make(name, net, lazy), max_norm=max_norm)


def joined(
    name: str, head: str, world: int, max_norm: float | None = None, lazy: bool = False
) -> Iterator[Step]:
    """As `alone`, but that the table looks up the batches of all at once."""
    net = Net(head)

    def backward(step: int) -> None:
        ids = [batch(step, rank, some_empty=True) for rank in range(world)]
        parts = net.table(torch.cat(ids)).split([len(one) for one in ids])
        sum(net.loss_of(part) / world for part in parts).backward()

    return train(net, backward, make(name, net, lazy), max_norm=max_norm)


def replayed(
    name: str, head: str, recorded: list[dict[str, Tensor | None]], lazy: bool = False
) -> Iterator[Step]:
    """As one process trains that is given the gradients of all steps."""
    net = Net(head)

    def backward(step: int) -> None:
        for which, parameter in own_rows(net).items():
            grad = recorded[step][which]
            parameter.grad = by_row(grad) if lazy and grad is not None else grad

    return train(net, backward, rowwise(OPTIMIZERS[name](own_rows(net).values()), net, lazy=lazy))
