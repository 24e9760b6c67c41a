"""Other libraries' checkpoints on disk hold the state of rows, and a run goes on from them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from oracle import assert_alike, assert_same_bits
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict

from partial_embedding.errors import InputError
from partial_embedding.torch import PartialEmbedding, PartialEmbeddingBag, PartialLinear, rowwise

V, D = 12, 4
IDS = torch.tensor([[1, 2, 2, 7], [11, 9, 4, 3]])
OPTIMIZERS: dict[str, dict[str, Any]] = {
    "AdamW": {"lr": 0.1, "weight_decay": 0.1},
    "SGD": {"lr": 0.01, "momentum": 0.9},
    "Adagrad": {"lr": 0.1},
}


class Net(nn.Module):
    """Each kind of table."""

    def __init__(self) -> None:
        super().__init__()
        self.table = PartialEmbedding(V, D, trainable_rows=[3, 7])
        self.bag = PartialEmbeddingBag(V, D, trainable_rows=[1])
        self.head = PartialLinear(D, V, trainable_rows=[2])

    def forward(self, ids: Tensor) -> Tensor:
        out: Tensor = self.head(self.table(ids).mean(1) + self.bag(ids))
        return out


class Loop:
    """A plain loop. Others hand the model, its optimizer and the backward pass to a library."""

    def __init__(self, optimizer: str) -> None:
        torch.manual_seed(0)
        self.net = Net()
        made = getattr(torch.optim, optimizer)(self.net.parameters(), **OPTIMIZERS[optimizer])
        self.model, self.optimizer = self.prepare(self.net, made)

    def prepare(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[Any, Any]:
        return model, optimizer

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def train(self, steps: int) -> None:
        for _ in range(steps):
            self.optimizer.zero_grad()
            self.backward(self.model(IDS).square().sum())
            self.optimizer.step()

    def save(self, folder: Path) -> None:
        saved = {"model": self.net.state_dict(), "optimizer": self.optimizer.state_dict()}
        torch.save(saved, folder / "saved.pt")

    def load(self, folder: Path) -> None:
        saved = torch.load(folder / "saved.pt")
        self.net.load_state_dict(saved["model"])
        self.optimizer.load_state_dict(saved["optimizer"])


class Accelerate(Loop):
    def prepare(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[Any, Any]:
        self.accelerator = pytest.importorskip("accelerate").Accelerator(cpu=True)
        prepared: tuple[Any, Any] = self.accelerator.prepare(model, optimizer)
        return prepared

    def backward(self, loss: Tensor) -> None:
        self.accelerator.backward(loss)

    def save(self, folder: Path) -> None:
        self.accelerator.save_state(str(folder))

    def load(self, folder: Path) -> None:
        self.accelerator.load_state(str(folder))


class Fabric(Loop):
    def prepare(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[Any, Any]:
        fabric = pytest.importorskip("lightning.fabric")
        self.fabric = fabric.Fabric(accelerator="cpu", devices=1)
        prepared: tuple[Any, Any] = self.fabric.setup(model, optimizer)
        return prepared

    def backward(self, loss: Tensor) -> None:
        self.fabric.backward(loss)

    @property
    def _state(self) -> dict[str, Any]:
        return {"model": self.model, "optimizer": self.optimizer}

    def save(self, folder: Path) -> None:
        self.fabric.save(folder / "saved.ckpt", self._state)

    def load(self, folder: Path) -> None:
        self.fabric.load(folder / "saved.ckpt", self._state)


class Distributed(Loop):
    options = StateDictOptions()

    def save(self, folder: Path) -> None:
        model, optimizer = get_state_dict(self.net, self.optimizer, options=self.options)
        dcp.save({"model": model, "optimizer": optimizer}, checkpoint_id=folder)

    def load(self, folder: Path) -> None:
        if self.optimizer.state:
            # Adagrad makes state of the whole table when it is made, and what is loaded is asked
            # for by the names of what is there.
            rowwise(self.optimizer)
        model, optimizer = get_state_dict(self.net, self.optimizer, options=self.options)
        state = {"model": model, "optimizer": optimizer}
        dcp.load(state, checkpoint_id=folder)
        set_state_dict(
            self.net,
            self.optimizer,
            model_state_dict=state["model"],
            optim_state_dict=state["optimizer"],
            options=self.options,
        )


class Flattened(Distributed):
    options = StateDictOptions(flatten_optimizer_state_dict=True)


LOOPS: dict[str, Callable[[str], Loop]] = {
    "torch.save": Loop,
    "Accelerator.save_state": Accelerate,
    "Fabric.save": Fabric,
    "distributed.checkpoint": Distributed,
    "distributed.checkpoint, flattened": Flattened,
}


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("name", LOOPS)
def test_a_run_goes_on_from_a_checkpoint_on_disk(name: str, optimizer: str, tmp_path: Path) -> None:
    run = LOOPS[name](optimizer)
    run.train(2)
    run.net.table.set_trainable_rows([3, 7, 9])
    run.train(2)
    run.save(tmp_path)
    run.train(3)
    resumed = LOOPS[name](optimizer)
    resumed.net.table.set_trainable_rows([3, 7, 9])
    resumed.load(tmp_path)
    resumed.train(3)
    start = LOOPS[name](optimizer).net.state_dict()
    assert_alike(resumed.net, run.net)
    frozen = [row for row in range(V) if row not in (3, 7, 9)]
    assert_same_bits(resumed.net.table.weight[frozen], start["table.weight"][frozen], "frozen rows")


def test_flattened_state_that_finds_no_place_is_refused_and_finds_one_by_the_remedy() -> None:
    options = StateDictOptions(flatten_optimizer_state_dict=True)
    run = Loop("Adagrad")
    run.train(2)
    model, optimizer = get_state_dict(run.net, run.optimizer, options=options)

    def resumed(calls: bool) -> Loop:
        again = Loop("Adagrad")
        if calls:
            rowwise(again.optimizer, again.net)
        set_state_dict(
            again.net,
            again.optimizer,
            model_state_dict=model,
            optim_state_dict=optimizer,
            options=options,
        )
        return again

    unprepared, before = resumed(calls=False), run.net.table.weight.detach().clone()
    with pytest.raises(InputError, match=r"Adagrad with nothing for .*call rowwise\(optimizer"):
        unprepared.train(1)
    assert_same_bits(unprepared.net.table.weight, before, "the table")
    again = resumed(calls=True)
    for one in (run, again):
        one.train(1)
    for name, value in run.net.state_dict().items():
        assert_same_bits(again.net.state_dict()[name], value, name)
