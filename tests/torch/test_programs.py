"""Random programs of what users do between steps, against small tables of their own.

`make test` runs 4 of them for each configuration and `make test-full` 125, 1,000 in all. Hypothesis
prints a program that fails and what reproduces it.
"""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, precondition, rule, run_state_machine_as_test
from oracle import Oracle, assert_same_bits
from torch import Tensor, nn

from partial_embedding.torch import PartialEmbedding, rowwise

V, D = 6, 3
Make = Callable[[Any], torch.optim.Optimizer]
MAKERS: dict[str, Make] = {
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.1),
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1),
    "Adagrad": lambda p: torch.optim.Adagrad(p, lr=0.1, weight_decay=0.1),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=0.05, momentum=0.5),
}
ROWS = st.lists(st.integers(0, V - 1), max_size=V, unique=True).map(sorted)


class Program(RuleBasedStateMachine):
    """One table beside small ones, its cohorts; each rule is done to both."""

    make: Make
    sparse = True

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = PartialEmbedding(V, D, sparse=self.sparse, trainable_rows="none")
        self.optimizer = type(self).make(self.table.parameters())
        self.oracle = Oracle(type(self).make, self.table.weight, [])
        self.lr = self.optimizer.param_groups[0]["lr"]

    def check(self) -> None:
        assert_same_bits(self.table.weight, self.oracle.table, "the table")

    @property
    def has_gradient(self) -> bool:
        return self.table.weight.grad is not None

    @precondition(lambda self: not self.has_gradient)
    @rule(rows=ROWS)
    def set_rows(self, rows: list[int]) -> None:
        self.table.set_trainable_rows(rows or "none")
        self.oracle.set_rows(rows)

    @rule(ids=st.lists(st.integers(0, V - 1), min_size=1, max_size=8), seed=st.integers(0, 99))
    def backward(self, ids: list[int], seed: int) -> None:
        up = torch.randn(len(ids), D, generator=torch.Generator().manual_seed(seed))
        (self.table(torch.tensor(ids)) * up).sum().backward()
        for cohort in self.oracle.cohorts:
            cohort.receive(torch.tensor(ids), up)

    @precondition(lambda self: self.has_gradient)
    @rule(limit=st.sampled_from([0.1, 1.0]), foreach=st.booleans())
    def clip_by_value(self, limit: float, foreach: bool) -> None:
        nn.utils.clip_grad_value_(self.table.weight, limit, foreach=foreach)
        for cohort in self.oracle.cohorts:
            nn.utils.clip_grad_value_(cohort.weight, limit, foreach=foreach)

    @precondition(lambda self: self.has_gradient)
    @rule(factor=st.sampled_from([0.5, 0.3, 3.0]))
    def scale(self, factor: float) -> None:
        self.table.weight.grad.mul_(factor)
        for cohort in self.oracle.cohorts:
            cohort.weight.grad.mul_(factor)

    @precondition(lambda self: self.has_gradient)
    @rule(row=st.integers(0, V - 1))
    def edit_a_row(self, row: int) -> None:
        self.table.weight.grad[row] += 1.0
        for cohort in self.oracle.cohorts:
            cohort.weight.grad[(cohort.rows == row) & cohort.alive] += 1.0

    @rule(to_none=st.booleans())
    def zero_grad(self, to_none: bool) -> None:
        self.optimizer.zero_grad(set_to_none=to_none)
        for cohort in self.oracle.cohorts:
            cohort.table.zero_grad(set_to_none=to_none)

    @rule()
    def step(self) -> None:
        self.optimizer.step()
        self.oracle.move()
        self.check()

    @rule(ids=st.lists(st.integers(0, V - 1), min_size=1, max_size=4))
    def step_with_a_closure(self, ids: list[int]) -> None:
        def closure() -> Tensor:
            self.zero_grad(True)
            self.backward(ids, 7)
            return torch.zeros(())

        self.optimizer.step(closure)
        self.oracle.move()
        self.check()

    @rule()
    def step_that_fails(self) -> None:
        def fail(*_: Any) -> None:
            raise MemoryError

        hook = self.optimizer.register_step_pre_hook(fail)
        with pytest.raises(MemoryError):
            self.optimizer.step()
        hook.remove()
        (held,) = self.optimizer.param_groups[0]["params"]
        assert held is self.table.weight

    @rule(factor=st.sampled_from([0.5, 2.0]))
    def change_the_rate(self, factor: float) -> None:
        self.lr *= factor
        self.optimizer.param_groups[0]["lr"] = self.lr
        self.oracle.group = {"lr": self.lr}

    @rule(prepares=st.booleans())
    def resume(self, prepares: bool) -> None:
        saved = copy.deepcopy([self.table.state_dict(), self.optimizer.state_dict()])
        grad = self.table.weight.grad
        row_set = self.table.row_set
        self.table = PartialEmbedding(V, D, sparse=self.sparse)
        # A program that goes on sets its rows as they came, one stage after the other.
        self.table.row_set = row_set
        self.table.load_state_dict(saved[0])
        self.optimizer = type(self).make(self.table.parameters())
        if prepares:
            rowwise(self.optimizer)
        self.optimizer.load_state_dict(saved[1])
        # What was loaded is compared with the rows of its first step, before others may train.
        self.optimizer.step()
        self.table.weight.grad = grad

    @rule()
    def copy_the_table(self) -> None:
        copied = copy.deepcopy(self.table)
        copied(torch.arange(V)).sum().backward()
        self.check()


@pytest.mark.parametrize("programs", [4, pytest.param(125, marks=pytest.mark.full)])
@pytest.mark.parametrize("sparse", [True, False], ids=["sparse", "dense"])
@pytest.mark.parametrize("name", MAKERS)
def test_programs_do_to_rows_what_they_do_to_small_tables(
    name: str, sparse: bool, programs: int
) -> None:
    members = {"make": staticmethod(MAKERS[name]), "sparse": sparse}
    run_state_machine_as_test(
        type(f"{name}Program", (Program,), members),
        settings=settings(
            max_examples=programs,
            stateful_step_count=20,
            deadline=None,
            derandomize=programs < 100,
            print_blob=True,
            # Shrinking takes hours: each program prepares optimizers anew.
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        ),
    )
