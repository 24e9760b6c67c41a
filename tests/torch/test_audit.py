"""The audit: one bit of one frozen row that moves is found, named and explained."""

import struct
from collections.abc import Callable

import pytest
import torch
from oracle import assert_same_bits, rows_that_differ
from small_tables import FROZEN, ROWS, D, V, table_of
from steps import take_steps
from torch import Tensor, nn

from partial_embedding.errors import FrozenRowsMoved, InputError
from partial_embedding.torch import (
    PartialEmbedding,
    PartialEmbeddingBag,
    masked_gradient_only,
    rowwise,
)
from partial_embedding.torch import fingerprint as fingerprint_module
from partial_embedding.torch.audit import FrozenRowAudit
from partial_embedding.torch.fingerprint import fingerprints

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
OF_EACH_DTYPE = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def bytes_of(table: nn.Module) -> Tensor:
    """The memory of the weight, to write into: shape (V, bytes in a row)."""
    weight: Tensor = table.weight.data
    return weight.view(torch.uint8)


def set_bytes(table: nn.Module, row: int, column: int, value: bytes) -> None:
    size = table.weight.element_size()
    assert len(value) == size
    place = bytes_of(table)[row, column * size : (column + 1) * size]
    place.copy_(torch.tensor(list(value), dtype=torch.uint8))


@OF_EACH_DTYPE
def test_every_single_bit_of_a_frozen_row_is_watched(dtype: torch.dtype) -> None:
    table = table_of(dtype=dtype)
    audit = FrozenRowAudit(table)
    memory = bytes_of(table)
    flipped = 0
    for row in (0, 3):
        for place in range(memory.shape[1]):
            for bit in range(8):
                memory[row, place] ^= 1 << bit
                assert audit.changed().tolist() == [row], (place, bit)
                memory[row, place] ^= 1 << bit
                flipped += 1
    assert flipped == 2 * D * torch.finfo(dtype).bits
    assert audit.changed().tolist() == []


# What a comparison of numbers would miss: (before, after), as little-endian bytes of a float32.
UNSEEN_BY_NUMBERS = {
    "sign_of_zero": (struct.pack("<f", 0.0), struct.pack("<f", -0.0)),
    "payload_of_nan": (struct.pack("<I", 0x7FC00000), struct.pack("<I", 0x7FC00123)),
    "sign_of_nan": (struct.pack("<I", 0x7FC00000), struct.pack("<I", 0xFFC00000)),
    "quiet_and_signalling_nan": (struct.pack("<I", 0x7FC00001), struct.pack("<I", 0x7F800001)),
    "subnormal_and_zero": (struct.pack("<I", 1), struct.pack("<I", 0)),
}


@pytest.mark.parametrize("name", UNSEEN_BY_NUMBERS)
def test_bits_are_compared_and_not_numbers(name: str) -> None:
    before, after = UNSEEN_BY_NUMBERS[name]
    table = table_of()
    set_bytes(table, 5, 1, before)
    audit = FrozenRowAudit(table)
    audit.check()  # a NaN that stays is no change
    set_bytes(table, 5, 1, after)
    assert audit.changed().tolist() == [5]
    set_bytes(table, 5, 1, before)
    assert audit.changed().tolist() == []


def test_swapped_and_shifted_values_are_found() -> None:
    table = table_of()
    audit = FrozenRowAudit(table)
    weight = table.weight.data
    start = weight.clone()
    weight[0] = start[0].flip(0)  # the same values in another order
    weight[[2, 3]] = start[[3, 2]]  # two rows that changed places
    weight[6] = start[6].roll(1)
    assert audit.changed().tolist() == [0, 2, 3, 6]
    weight.copy_(start)
    audit.check()


def test_changes_that_cancel_in_a_sum_are_found() -> None:
    # One bit up here and the same bit down there, in every pair of bytes of the row.
    table = table_of("none")
    memory = bytes_of(table)
    memory.zero_()
    memory[0] = 1
    audit = FrozenRowAudit(table)
    for first in range(memory.shape[1]):
        for second in range(memory.shape[1]):
            if first != second:
                memory[0, first], memory[0, second] = 0, 2
                assert audit.changed().tolist() == [0], (first, second)
                memory[0] = 1


@pytest.mark.parametrize("dim", [1, 3, 300])
def test_fingerprints_of_random_rows_differ(dim: int) -> None:
    weight = torch.randn(5_000, dim, generator=torch.Generator().manual_seed(1))
    prints = fingerprints(weight, torch.arange(5_000))
    assert prints.dtype == torch.int64
    assert len(prints.unique()) == len(weight.unique(dim=0))


def test_fingerprints_depend_on_no_layout_and_leave_random_numbers_alone() -> None:
    weight = torch.randn(V, D)
    ids = torch.tensor([4, 0])
    expected = fingerprints(weight, ids)
    state = torch.get_rng_state()
    torch.manual_seed(123)
    mine = torch.get_rng_state()
    transposed = weight.t().contiguous().t()
    assert not transposed.is_contiguous()
    assert_same_bits(fingerprints(transposed, ids), expected, "the fingerprints")
    assert_same_bits(torch.get_rng_state(), mine, "a user's random state")
    torch.set_rng_state(state)


@pytest.mark.parametrize("rows_at_once", [1, 2, 3, 100])
def test_a_table_is_read_in_chunks(monkeypatch: pytest.MonkeyPatch, rows_at_once: int) -> None:
    table = table_of()
    whole = fingerprints(table.weight, torch.arange(V))
    monkeypatch.setattr(fingerprint_module, "_CHUNK", rows_at_once * D * 4)
    sizes = []
    select = Tensor.index_select

    def watched(self: Tensor, dim: int, index: Tensor) -> Tensor:
        sizes.append(len(index))
        return select(self, dim, index)

    monkeypatch.setattr(Tensor, "index_select", watched)
    assert_same_bits(fingerprints(table.weight, torch.arange(V)), whole, "the fingerprints")
    assert sum(sizes) == V
    assert max(sizes) == min(rows_at_once, V)
    audit = FrozenRowAudit(table)
    for row in FROZEN:
        bytes_of(table)[row, 0] ^= 1
        assert audit.changed().tolist() == [row]
        bytes_of(table)[row, 0] ^= 1


def test_fingerprints_take_8_bytes_for_each_frozen_row() -> None:
    audit = FrozenRowAudit(table_of())
    assert audit._prints.shape == (len(FROZEN),)
    assert audit._prints.element_size() == 8


# Which rows are watched

WATCHED: dict[str, tuple[Callable[[], nn.Module], list[int]]] = {
    "some": (table_of, FROZEN),
    "none": (lambda: table_of("all"), []),
    "all": (lambda: table_of("none"), list(range(V))),
    "padding_too": (lambda: PartialEmbedding(V, D, 1, trainable_rows=ROWS), [1, *FROZEN]),
    "of_bags": (lambda: PartialEmbeddingBag(V, D, trainable_rows=ROWS), FROZEN),
}


@pytest.mark.parametrize("which", WATCHED)
def test_frozen_rows_are_watched_and_no_others(which: str) -> None:
    make, rows = WATCHED[which]
    table = make()
    before, version = table.weight.detach().clone(), table.weight._version
    audit = FrozenRowAudit(table)
    audit.check()
    assert_same_bits(table.weight, before, "a weight that was audited")
    assert table.weight._version == version
    table.weight.data.add_(1)
    assert audit.changed().dtype == torch.int64
    assert audit.changed().tolist() == sorted(rows)


@pytest.mark.parametrize("shape", [(0, D), (V, 0), (0, 0)], ids=str)
def test_a_table_without_values_passes(shape: tuple[int, int]) -> None:
    table = PartialEmbedding.from_pretrained(torch.zeros(shape), trainable_rows="none")
    FrozenRowAudit(table).check()


# Rows that change


def test_a_row_unfrozen_since_may_move() -> None:
    table = table_of()
    audit = FrozenRowAudit(table)
    table.unfreeze_rows([0])
    table.weight.data[[0, 3]] += 1
    assert audit.changed().tolist() == [3]


def test_a_row_frozen_since_is_watched_from_a_restart_on() -> None:
    table = table_of()
    audit = FrozenRowAudit(table)
    table.freeze_rows([1])
    table.weight.data[1] += 1  # before anybody took its fingerprint
    audit.check()
    table.weight.data[FROZEN] += 1
    assert audit.changed().tolist() == FROZEN
    audit.restart()  # forgives what has moved
    audit.check()
    table.weight.data[1] += 1
    assert audit.changed().tolist() == [1]


# What the message says


def message_of(audit: FrozenRowAudit, step: int | None = None) -> str:
    with pytest.raises(FrozenRowsMoved) as caught:
        audit.check(step)
    return str(caught.value)


def test_message_names_the_table_the_rows_and_the_step() -> None:
    table = table_of()
    audit = FrozenRowAudit(table, "encoder.words")
    table.weight.data[[0, 5]] += 1
    message = message_of(audit, 12)
    assert message.startswith("encoder.words: 2 frozen rows changed by step 12: 0, 5. ")
    assert "Most likely" in message
    assert "masked_gradient_only" in message
    assert "step" not in message_of(audit).partition("Most likely")[0]


def test_message_lists_ten_rows_and_no_more() -> None:
    table = PartialEmbedding(20, D, trainable_rows="none")
    audit = FrozenRowAudit(table)
    table.weight.data[:10] += 1
    assert "10 frozen rows changed: 0, 1, 2, 3, 4, 5, 6, 7, 8, 9. " in message_of(audit)
    table.weight.data[10:] += 1
    assert "20 frozen rows changed: 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, …" in message_of(audit)


CASTS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "bfloat16": lambda table: table.bfloat16(),
    "float16": lambda table: table.half(),
    "float64": lambda table: table.double(),
}


@pytest.mark.parametrize("name", CASTS)
def test_a_cast_of_the_model_is_recognised(name: str) -> None:
    table = table_of()
    audit = FrozenRowAudit(table, "words")
    CASTS[name](table)
    message = message_of(audit, 3)
    assert "words: 5 frozen rows changed by step 3: 0, 2, 3, 5, 6" in message
    assert f"cast of the model from torch.float32 to torch.{name}" in message
    audit.restart()
    audit.check()


def test_a_cast_is_recognised_where_all_bits_are_zero_before_and_after() -> None:
    table = table_of()
    table.weight.data.zero_()
    audit = FrozenRowAudit(table)
    table.bfloat16()
    assert audit.changed().tolist() == FROZEN
    assert "cast" in message_of(audit)


def test_a_cast_there_and_back_is_found_by_what_it_rounded() -> None:
    table = table_of()
    table.weight.data[2] = torch.tensor([1.0, 2.0, 0.5])  # exact in bfloat16
    audit = FrozenRowAudit(table)
    table.bfloat16().float()
    assert audit.changed().tolist() == [0, 3, 5, 6]


def test_a_cast_of_a_table_that_trains_in_full_is_nobodys_business() -> None:
    table = table_of("all")
    audit = FrozenRowAudit(table)
    table.bfloat16()
    audit.check()


# In a plain loop


def loop(table: PartialEmbedding, optimizer: torch.optim.Optimizer, steps: int = 3) -> int:
    """Train with an audit of every step; how many steps passed it."""
    audit = FrozenRowAudit(table, "words")
    for step in range(steps):
        take_steps(optimizer, lambda: table(torch.arange(V)).square().sum())
        audit.check(step)
    return steps


def test_a_plain_loop_with_rowwise_passes() -> None:
    table = PartialEmbedding(V, D, trainable_rows=ROWS)
    optimizer = rowwise(torch.optim.AdamW(table.parameters(), lr=0.1, weight_decay=0.1), table)
    before = table.weight.detach().clone()
    assert loop(table, optimizer) == 3
    assert rows_that_differ(before, table.weight) == ROWS


def test_a_plain_loop_with_a_masked_gradient_alone_is_caught_at_its_first_step() -> None:
    table = PartialEmbedding(V, D, sparse=False, trainable_rows=ROWS)
    optimizer = torch.optim.AdamW(table.parameters(), lr=0.1, weight_decay=0.1)
    masked_gradient_only(optimizer)
    with pytest.raises(FrozenRowsMoved, match=r"words: 5 frozen rows changed by step 0.*masked"):
        loop(table, optimizer)


OUTSIDE_WRITES: dict[str, Callable[[nn.Module], object]] = {
    "in_place": lambda table: table.weight.data.mul_(0.999),
    "load_state_dict": lambda table: table.load_state_dict(PartialEmbedding(V, D).state_dict()),
    "reset_parameters": lambda table: table.reset_parameters(),
    "another_parameter": lambda table: setattr(table, "weight", nn.Parameter(torch.ones(V, D))),
    "swapped_data": lambda table: setattr(table.weight, "data", torch.ones(V, D)),
}


@pytest.mark.parametrize("name", OUTSIDE_WRITES)
def test_writes_from_outside_are_found(name: str) -> None:
    table = table_of()
    audit = FrozenRowAudit(table)
    OUTSIDE_WRITES[name](table)
    message = message_of(audit)
    assert "5 frozen rows changed: 0, 2, 3, 5, 6. " in message
    assert "a write into the weight from outside" in message


def resized(table: nn.Module, rows: int) -> None:
    old = table.weight.data
    new = torch.ones(rows, D)
    new[: min(rows, len(old))] = old[:rows]
    table.weight.data = new
    table.num_embeddings = rows


def test_a_larger_vocabulary_is_no_movement_of_old_rows() -> None:
    table = table_of()
    audit = FrozenRowAudit(table)
    resized(table, 9)
    audit.check()
    table.weight.data[3] += 1
    assert audit.changed().tolist() == [3]


def test_a_smaller_vocabulary_is_answered_by_a_message() -> None:
    table = table_of()
    audit = FrozenRowAudit(table, "words")
    resized(table, 4)
    message = message_of(audit, 2)
    assert message.startswith("words: 2 frozen rows changed by step 2: 5, 6. ")


def test_what_is_no_table_is_refused() -> None:
    with pytest.raises(InputError, match=r"Received a Sequential\. Pass the table itself"):
        FrozenRowAudit(nn.Sequential(table_of()))  # type: ignore[arg-type]
