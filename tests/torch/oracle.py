"""What must come out: each cohort as a plain table of its own, in a stock optimizer of its own.

Nothing here knows how `partial_embedding` works. An `Oracle` holds the whole table as a bare tensor
and each cohort as an `nn.Embedding(K, D)`. It looks rows up in the bare tensor, sends the gradient
that arrives there through each cohort's own backward pass with the ids mapped, lets the stock
optimizers step, and writes the cohorts back into the bare tensor.

Every cohort has a fresh optimizer, made when it first gets a gradient, so that "a cohort that joins
late is a parameter of a fresh optimizer" is what is replayed, literally. For every optimizer that
treats its parameters one by one this equals one optimizer over the list of cohorts. LBFGS does not:
it gets one optimizer over the list, made anew whenever the rows change.

Rows that leave are replayed in one of two ways:

* as *ghosts*: the cohort goes on at its full size, and the rows that left get no gradient and are
  no longer read. This says literally that those that stay do not notice;
* by *slicing*: the rows that stay go on as a smaller table with the same rows of every state. That
  is what a cohort is for optimizers that look at the whole matrix, and it keeps the block shape for
  fused kernels, whose last few elements are computed by other instructions than the rest.
"""

import copy
import io
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

Factory = Callable[[list[nn.Parameter]], torch.optim.Optimizer]
# What the learning rate is multiplied by, from the number of steps that were made.
Factor = Callable[[int], float]
LossOf = Callable[[nn.ModuleList, Tensor | None], Tensor]

# State of optimizers that factor a matrix: which of it has one entry per row. All other state is
# either of the parameter's own shape or not about rows at all.
PER_ROW_STATE = ("row_var", "exp_avg_sq_row")
NOT_PER_ROW_STATE = ("col_var", "exp_avg_sq_col")


def bits(tensor: Tensor) -> Tensor:
    """The bytes of a tensor, so that NaN equals NaN and -0.0 differs from 0.0."""
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8)


def same_bits(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and torch.equal(bits(a), bits(b))


def rows_that_differ(a: Tensor, b: Tensor) -> list[int]:
    """The rows that are not the same bit for bit; of a vector, its entries."""
    return (bits(a) != bits(b)).reshape(len(a), -1).any(1).nonzero().flatten().tolist()


def assert_same_bits(actual: Tensor, expected: Tensor, what: str) -> None:
    """Fail with the rows that differ and by how much."""
    assert actual.shape == expected.shape, what
    assert actual.dtype == expected.dtype, what
    if same_bits(actual, expected):
        return
    rows = rows_that_differ(actual, expected)
    gap = (actual.detach().double() - expected.detach().double()).abs()[rows].max()
    raise AssertionError(f"{what}: rows {rows} differ, by {gap.item():.3g} at most")


def differences(a: Any, b: Any, place: str = "") -> list[str]:
    """The places at which two nested states differ in a bit."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return [] if same_bits(a, b) else [place]
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        a, b = dict(enumerate(a)), dict(enumerate(b))
    if isinstance(a, dict) and isinstance(b, dict) and a.keys() == b.keys():
        return [found for key in a for found in differences(a[key], b[key], f"{place}/{key}")]
    return [] if type(a) is type(b) and a == b else [f"{place}: {a!r}, {b!r}"]


def assert_alike(model: nn.Module, expected: nn.Module | Mapping[str, Tensor]) -> None:
    """Fail unless a model has the bits of another one, or of a state_dict."""
    wanted = expected.state_dict() if isinstance(expected, nn.Module) else expected
    for name, value in model.state_dict().items():
        assert_same_bits(value, wanted[name], name)


@contextmanager
def unchanged(model: nn.Module) -> Iterator[None]:
    """Fail if a bit of a model, or the class of a module, is another one in the end."""
    before, kinds = copy.deepcopy(model.state_dict()), [type(m) for m in model.modules()]
    yield
    assert [type(m) for m in model.modules()] == kinds
    assert_alike(model, before)


def through_a_file(value: Any, weights_only: bool = False) -> Any:
    """What torch reads of what it has written."""
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=weights_only)


class Cohort:
    """Rows that joined together: a plain table, and the stock optimizer that trains it alone."""

    def __init__(self, rows: Tensor, values: Tensor, **options: Any) -> None:
        self.rows = rows
        self.alive = torch.ones(len(rows), dtype=torch.bool)
        self.optimizer: torch.optim.Optimizer | None = None
        self.factor: Factor | None = None
        self.steps = 0
        self.options = options
        self._hold(values)

    def _hold(self, values: Tensor) -> None:
        self.table = nn.Embedding(*values.shape, dtype=values.dtype, **self.options)
        with torch.no_grad():
            self.table.weight.copy_(values)

    @property
    def weight(self) -> nn.Parameter:
        return self.table.weight

    def receive(self, ids: Tensor, upstream: Tensor) -> None:
        """Add the gradient of the looked-up entries that are mine, through a plain backward."""
        ids, upstream = ids.flatten(), upstream.reshape(-1, upstream.shape[-1])
        mine = torch.isin(ids, self.rows[self.alive])
        slots = torch.searchsorted(self.rows, ids[mine])
        self.table(slots).backward(upstream[mine])

    def step(self, make: Factory, group: dict[str, Any]) -> None:
        if self.optimizer is None:
            # A cohort's life begins with its first gradient, as that of any parameter does.
            if self.weight.grad is None:
                return
            self.optimizer = make([self.weight])
        self.optimizer.param_groups[0].update(copy.deepcopy(group))
        if self.factor is not None:
            self.optimizer.param_groups[0]["lr"] = group["lr"] * self.factor(self.steps)
        self.steps += self.weight.grad is not None
        self.optimizer.step()

    def keep(self, alive: Tensor, make: Factory, *, slicing: bool) -> None:
        """Let some rows leave."""
        if not slicing:
            self.alive &= alive
            return
        old, state = self.weight, {}
        if self.optimizer is not None:
            state = self.optimizer.state[old]
        self.rows, self.alive = self.rows[alive], self.alive[alive]
        self._hold(old.detach()[alive])
        if self.optimizer is not None:
            self.optimizer = make([self.weight])
            self.optimizer.state[self.weight] = {
                name: value[alive].clone() if _is_per_row(name, value, old) else value
                for name, value in state.items()
            }


def _is_per_row(name: str, value: object, weight: Tensor) -> bool:
    if not isinstance(value, Tensor) or name in NOT_PER_ROW_STATE:
        return False
    if name in PER_ROW_STATE:
        return True
    assert value.shape in (weight.shape, ()), f"the oracle knows no state named {name}"
    return value.shape == weight.shape


class Oracle:
    """The expected table, its cohorts and the other parameters of the model.

    Args:
        make: makes the stock optimizer for a list of parameters.
        weight: the V x D table at the start.
        rows: the rows that are trainable at the start.
        companions: the model's other modules, in the order of its parameters; copied.
        table_at: how many of the companions come before the table (LBFGS sums in that order).
        one_history: whether the optimizer has one state for all of its parameters (LBFGS).
        slicing: how rows leave; see the module's docstring.
        make_others: makes the optimizer of the companions, where their group has its own options.
        options: options of the cohorts' `nn.Embedding`, such as `sparse` or `scale_grad_by_freq`.
    """

    def __init__(
        self,
        make: Factory,
        weight: Tensor,
        rows: Iterable[int],
        companions: Sequence[nn.Module] = (),
        *,
        table_at: int = 0,
        one_history: bool = False,
        slicing: bool = False,
        make_others: Factory | None = None,
        **options: Any,
    ) -> None:
        self.make = make
        self.table = weight.detach().clone()
        self.companions = copy.deepcopy(nn.ModuleList(companions))
        self.table_at = table_at
        self.one_history = one_history
        self.slicing = slicing
        self.options = {"sparse": False} | options
        self.cohorts: list[Cohort] = []
        self.trainable: set[int] = set()
        # What a scheduler would change: written into every group before each step.
        self.group: dict[str, Any] = {}
        others = list(self.companions.parameters())
        self.others = (make_others or make)(others) if others and not one_history else None
        self.whole: torch.optim.Optimizer | None = None
        self.set_rows(rows)
        if one_history:
            self._begin_history()

    def set_rows(self, rows: Iterable[int], factor: Factor | None = None) -> None:
        """Make these rows the trainable ones: those that are new are one more cohort."""
        rows = set(rows)
        joining = torch.tensor(sorted(rows - self.trainable), dtype=torch.int64)
        staying = torch.tensor(sorted(rows & self.trainable), dtype=torch.int64)
        changed = rows != self.trainable
        self.trainable = rows
        for cohort in self.cohorts:
            alive = torch.isin(cohort.rows, staying) & cohort.alive
            if not alive[cohort.alive].all():
                cohort.keep(alive, self.make, slicing=self.slicing)
        self.cohorts = [cohort for cohort in self.cohorts if cohort.alive.any()]
        if len(joining):
            self.cohorts.append(Cohort(joining, self.table[joining], **self.options))
            self.cohorts[-1].factor = factor
        if changed and self.one_history:
            self._begin_history()

    def _begin_history(self) -> None:
        before = nn.ModuleList(self.companions[: self.table_at]).parameters()
        after = nn.ModuleList(self.companions[self.table_at :]).parameters()
        self.whole = self.make([*before, *(cohort.weight for cohort in self.cohorts), *after])

    def step(self, ids: Tensor | None, loss_of: LossOf) -> Tensor:
        """One optimizer step on a loss of what is looked up (nothing, if `ids` is None)."""

        def closure() -> Tensor:
            self._publish()
            self._forget_gradients()
            looked_up = None if ids is None else self.table[ids].requires_grad_()
            with torch.enable_grad():
                loss = loss_of(self.companions, looked_up)
                loss.backward()
                if ids is not None:
                    for cohort in self.cohorts:
                        cohort.receive(ids, looked_up.grad)
            return loss.detach()

        if self.whole is not None:
            self.whole.param_groups[0].update(copy.deepcopy(self.group))
            loss = self.whole.step(closure)
            self._publish()
            return loss
        loss = closure()
        self.move()
        return loss

    def step_with_gradient(self, gradient: Tensor | None) -> None:
        """One optimizer step on a given V x D gradient of the table, of which rows are taken."""
        self._forget_gradients()
        if gradient is not None:
            for cohort in self.cohorts:
                compact = gradient.detach()[cohort.rows]
                cohort.weight.grad = compact.to_sparse(1) if self.options["sparse"] else compact
        self.move()

    def move(self) -> None:
        """Step every optimizer with the gradients that are there."""
        if self.others is not None:
            self.others.param_groups[0].update(copy.deepcopy(self.group))
            self.others.step()
        for cohort in self.cohorts:
            cohort.step(self.make, self.group)
        self._publish()

    def _forget_gradients(self) -> None:
        for parameter in [*self.companions.parameters(), *(c.weight for c in self.cohorts)]:
            parameter.grad = None

    def _publish(self) -> None:
        with torch.no_grad():
            for cohort in self.cohorts:
                self.table[cohort.rows[cohort.alive]] = cohort.weight[cohort.alive]
