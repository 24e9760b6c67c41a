"""State of optimizers: its size, and stopping and going on."""

from collections import defaultdict
from collections.abc import Callable

import pytest
import torch
from cases import CASES, DEFAULTS, FEW, GRADIENTS, MANY, Case, by_id, case_of, crossed
from models import (
    ROWS,
    D,
    V,
    assert_same_model,
    batches,
    follow,
    model_of,
    partial_table,
    prepared,
    quiet_at,
    starting_table,
    train,
)
from oracle import assert_same_bits, rows_that_differ, same_bits, through_a_file
from steps import closure_of
from torch import Tensor, nn

from partial_embedding import InputError
from partial_embedding.torch import PartialEmbedding, detach_rowwise, rowwise
from partial_embedding.torch.optimizer import prepared as handle_of


def tensors_in(value: object) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        return [t for part in value.values() for t in tensors_in(part)]
    if isinstance(value, list | tuple):
        return [t for part in value for t in tensors_in(part)]
    return []


@pytest.mark.parametrize(("case", "sparse"), crossed(MANY, GRADIENTS))
def test_state_is_as_large_as_the_trainable_rows(case: Case, sparse: bool) -> None:
    table = PartialEmbedding(5000, D, trainable_rows=ROWS, sparse=sparse)
    optimizer = rowwise(case.make(table.parameters()), table)
    largest = 4 * (100 * len(ROWS) * D if case.one_history else 2 * len(ROWS) * D)  # bytes
    ids = torch.tensor([1, 4, 4, 77, 6, 9])
    closure = closure_of(optimizer, lambda: table(ids).square().sum())
    for step in range(3):
        if step == 2:
            table.unfreeze_rows([77])
        optimizer.step(closure)
        for where in (dict(optimizer.state), optimizer.state_dict()):
            assert all(t.nbytes <= largest for t in tensors_in(where))
    held = tensors_in(optimizer.state_dict())
    assert sum(t.nbytes for t in held) <= max(largest, 4 * 8 * (len(ROWS) + 1) * (D + 3))


@pytest.mark.parametrize(
    ("case", "sparse"), crossed([c for c in CASES if c.implementation != "forloop"], GRADIENTS)
)
def test_a_run_that_is_resumed_goes_on_exactly(
    case: Case, sparse: bool, record_property: Callable[[str, object], None]
) -> None:
    model, optimizer, oracle = prepared(case, partial_table(sparse=sparse))
    # Two cohorts, one of which has lost a row.
    follow(case, model, optimizer, oracle, batches(5), {2: (1, 4, 6, 9, 2, 7), 4: (1, 4, 9, 2, 7)})
    state = through_a_file(optimizer.state_dict(), weights_only=True)

    fresh = model_of(case, partial_table(model.table.trainable_rows, sparse=sparse))
    fresh.load_state_dict(model.state_dict())
    resumed = rowwise(case.make(fresh.parameters()), fresh)
    resumed.load_state_dict(state)
    for step, batch in enumerate(batches(7, quiet=1)):
        if step in (3, 5):
            for one in (model.table.set_trainable_rows, fresh.table.set_trainable_rows):
                one((1, 2, 9) if step == 3 else (1, 2, 4, 9))
            oracle.set_rows((1, 2, 9) if step == 3 else (1, 2, 4, 9))
        train(case, model, optimizer, batch)
        train(case, fresh, resumed, batch)
        oracle.step(batch.ids, batch.loss_of)
        assert_same_model(model, oracle, f"{step} after saving")
        for name, parameter in model.named_parameters():
            assert_same_bits(fresh.get_parameter(name), parameter, f"{name}, {step} after resuming")
    record_property("configuration: resumed exactly", case.id)


# torch itself loses the count of fused optimizers in half precision, where they are not prepared.
RESUMED = [
    *((case, True) for case in FEW),
    *((case, False) for case in [*FEW, case_of("LBFGS")] if not case.fused),
]


@pytest.mark.parametrize(
    ("case", "calls"),
    [pytest.param(*one, id=f"{one[0].id}-{'rowwise' if one[1] else 'no_call'}") for one in RESUMED],
)
@pytest.mark.parametrize(("rows", "dim"), [(400, 5), (2**24 + 10, 1)], ids=["V=400", "V=2**24+10"])
def test_row_ids_survive_a_resume_in_half_precision(
    case: Case, calls: bool, rows: int, dim: int
) -> None:
    """Row ids cast to the dtype of the weight would come back as other rows."""
    trainable = [3, 255, 257, 301, rows - 1, rows - 2, rows - 7]

    def make() -> tuple[PartialEmbedding, torch.optim.Optimizer]:
        table = partial_table(trainable, torch.full((rows, dim), 2**-7, dtype=torch.bfloat16))
        optimizer = case.make(table.parameters())
        return table, rowwise(optimizer, table) if calls else optimizer

    def step(table: PartialEmbedding, optimizer: torch.optim.Optimizer, seed: int) -> None:
        up = torch.randn(8, dim, generator=torch.Generator().manual_seed(seed)).bfloat16()
        ids = torch.tensor([*trainable, 0])
        optimizer.step(closure_of(optimizer, lambda: (table(ids) * up).sum()))

    table, optimizer = make()
    for seed in range(3):
        step(table, optimizer, seed)
    other, resumed = make()
    other.load_state_dict(table.state_dict())
    resumed.load_state_dict(through_a_file(optimizer.state_dict(), weights_only=True))
    assert (handle_of(resumed) is not None) == calls
    for seed in range(3, 6):
        step(table, optimizer, seed)
        step(other, resumed, seed)
        assert_same_bits(other.weight, table.weight, "after a resume")
    assert resumed.state_dict().keys() == optimizer.state_dict().keys()
    untrained, _ = make()
    assert rows_that_differ(untrained.weight, table.weight) == sorted(trainable)


@pytest.mark.parametrize("case", DEFAULTS, ids=by_id)
def test_state_of_other_rows_is_refused(case: Case) -> None:
    model, optimizer, _ = prepared(case, partial_table())
    train(case, model, optimizer, batches()[0])
    state = optimizer.state_dict()
    for rows in ((1, 4, 6), (1, 4, 6, 8), (1, 4, 6, 8, 9), ()):
        fresh, other, _ = prepared(case, partial_table(rows))
        with pytest.raises(InputError):
            other.load_state_dict(state)
        assert fresh.table.trainable_rows.tolist() == list(rows)


@pytest.mark.parametrize("case", [c for c in DEFAULTS + FEW if not c.one_history], ids=by_id)
def test_saved_state_loads_into_a_stock_optimizer(case: Case) -> None:
    model, optimizer, oracle = prepared(case, partial_table())
    follow(case, model, optimizer, oracle, batches(3))
    table = nn.Embedding(V, D, sparse=case.sparse_only)
    plain = model_of(case, table)
    plain.load_state_dict(model.state_dict())
    stock = case.make(plain.parameters())
    stock.load_state_dict(through_a_file(optimizer.state_dict(), weights_only=True))
    with torch.no_grad():
        table.weight.nan_to_num_(0.5, 0.5, 0.5)
    companions = [p for name, p in plain.named_parameters() if name != "table.weight"]
    before = [p.detach().clone() for p in (*companions, table.weight)]

    # The companions go on where they were, with their state.
    for batch in quiet_at(0, 1)[:2]:
        train(case, plain, stock, batch)
        train(case, model, optimizer, batch)
    for name, parameter in plain.companions.named_parameters():
        expected = model.companions.get_parameter(name)
        assert_same_bits(parameter, expected, f"companion {name} in the stock optimizer")
    for batch in batches(2):
        train(case, plain, stock, batch)
    for old, now in zip(before, (*companions, table.weight), strict=True):
        assert not same_bits(old, now)
        assert now.isfinite().all()


def of_the_table(optimizer: torch.optim.Optimizer) -> None:
    del optimizer.state[optimizer.param_groups[0]["params"][0]]


def another(optimizer: torch.optim.Optimizer) -> None:
    optimizer.state = defaultdict(dict)


@pytest.mark.parametrize("empty", [lambda o: o.state.clear(), another, of_the_table])
@pytest.mark.parametrize("case", FEW, ids=by_id)
def test_state_that_somebody_empties_begins_afresh(
    case: Case, empty: Callable[[torch.optim.Optimizer], None]
) -> None:
    tables = [partial_table(sparse=case.sparse_only) for _ in range(3)]
    emptied, fresh, loaded = (case.make(table.parameters()) for table in tables)
    for step, batch in enumerate(batches(8, quiet=-1)):
        if step == 4:
            empty(emptied)
            fresh, loaded = (case.make(table.parameters()) for table in tables[1:])
            loaded.load_state_dict(emptied.state_dict())
        for table, optimizer in zip(tables, (emptied, fresh, loaded), strict=True):

            def loss(table: nn.Embedding = table, ids: Tensor = batch.ids) -> Tensor:
                return table(ids).nan_to_num().square().sum()  # type: ignore[no-any-return]

            optimizer.step(closure_of(optimizer, loss))
            assert_same_bits(table.weight, tables[0].weight, f"after step {step}")


@pytest.mark.parametrize("case", [c for c in DEFAULTS + FEW if not c.one_history], ids=by_id)
def test_detaching_leaves_a_stock_optimizer(case: Case) -> None:
    start = starting_table().nan_to_num(0.5, 0.5, 0.5)
    model, optimizer, oracle = prepared(case, partial_table(ROWS, start, sparse=case.sparse_only))
    follow(case, model, optimizer, oracle, batches(3))
    detach_rowwise(optimizer)
    assert not optimizer._optimizer_step_pre_hooks
    assert not optimizer._optimizer_step_post_hooks
    held = [p for group in optimizer.param_groups for p in group["params"]]
    assert [id(p) for p in held] == [id(p) for p in model.parameters()]

    # From here on it is what a stock optimizer with the companions' state is.
    model.table.set_trainable_rows("all")
    plain = model_of(case, nn.Embedding(V, D, sparse=case.sparse_only))
    plain.load_state_dict(model.state_dict())
    stock = case.make(plain.parameters())
    order = [name for name, _ in model.named_parameters()]
    for name, parameter in plain.named_parameters():
        if name != "table.weight":
            stock.state[parameter] = {
                key: value.clone() if isinstance(value, Tensor) else value
                for key, value in optimizer.state[model.get_parameter(name)].items()
            }
    for batch in batches(4):
        train(case, model, optimizer, batch)
        train(case, plain, stock, batch)
        for name in order:
            assert_same_bits(model.get_parameter(name), plain.get_parameter(name), name)
    # And it can be attached again.
    rowwise(optimizer, model)
    train(case, model, optimizer, batches()[0])
