"""Many rows are stepped in parts that a processor's cache holds, to the same bits."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import CASES, Case, by_id
from models import D, batches, follow, partial_table, prepared
from oracle import assert_same_bits
from steps import take_steps

from partial_embedding.torch import PartialEmbedding, blocks, rowwise
from partial_embedding.torch.optimizer import prepared as handle_of

STAGES = {2: (1, 4, 6, 9, 2, 7, 8), 4: (1, 4, 9, 2, 7)}
ONE_BY_ONE = [case for case in CASES if case.implementation == "forloop"]


def count_parts(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    counts = []
    whole_blocks = blocks.Blocks._whole_blocks

    def counted(self: Any, *args: Any) -> Any:
        made = list(whole_blocks(self, *args))
        counts.append(sum(isinstance(block.places, slice) for block in made))
        return iter(made)

    monkeypatch.setattr(blocks.Blocks, "_whole_blocks", counted)
    return counts


@pytest.mark.parametrize("case", ONE_BY_ONE, ids=by_id)
def test_rows_that_are_stepped_in_parts_move_as_if_alone(
    case: Case, monkeypatch: pytest.MonkeyPatch, record_property: Callable[[str, object], None]
) -> None:
    monkeypatch.setattr(blocks, "_IN_CACHE", 2 * D)  # two rows a part
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    counts = count_parts(monkeypatch)
    follow(case, *prepared(case, partial_table(sparse=case.sparse_only)), batches(7), STAGES)
    if any(counts):
        record_property("configuration: optimizer in parts", case.id)


@pytest.mark.parametrize("rows", [range(3, 60), range(0, 60, 2)], ids=["side by side", "scattered"])
@pytest.mark.parametrize("kind", ["AdamW", "SGD", "Adagrad"])
def test_the_state_of_parts_is_that_of_the_whole(
    kind: str, rows: range, monkeypatch: pytest.MonkeyPatch
) -> None:
    def trained(parts: bool) -> tuple[PartialEmbedding, dict[str, Any]]:
        torch.manual_seed(0)
        table = PartialEmbedding(60, D, sparse=False, trainable_rows=rows)
        options = {"momentum": 0.9} if kind == "SGD" else {"weight_decay": 0.1}
        optimizer = rowwise(getattr(torch.optim, kind)(table.parameters(), lr=0.1, **options))
        for step in range(6):
            with monkeypatch.context() as patch:
                # Beginning in parts, ending in parts, and with the whole between them.
                patch.setattr(blocks, "_IN_CACHE", 7 * D if parts and step != 3 else 2**19)
                patch.setattr(torch, "get_num_threads", lambda: 1)
                take_steps(optimizer, lambda: table(torch.randint(60, (40,))).square().sum())
            if step == 4:
                table.freeze_rows(list(rows)[:5])
        handle = handle_of(optimizer)
        assert handle is not None
        assert not [p for p in optimizer.state if p is not table.weight]
        (state,) = handle.tables.values()
        (cohort,) = state.cohorts.values()
        return table, cohort.state

    counts = count_parts(monkeypatch)
    (whole, expected), (parts, state) = trained(parts=False), trained(parts=True)
    all_of_them, without_five = -(-len(rows) // 7), -(-(len(rows) - 5) // 7)
    assert counts == [0] * 6 + [all_of_them] * 3 + [0] + [all_of_them, without_five]
    assert_same_bits(parts.weight, whole.weight, "the table")
    assert state.keys() == expected.keys()
    for key, value in expected.items():
        assert_same_bits(state[key].reshape(-1), value.reshape(-1), key)


@pytest.mark.parametrize("options", [{"foreach": True}, {"fused": True}], ids=["foreach", "fused"])
def test_what_steps_all_parameters_at_once_is_given_them_whole(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blocks, "_IN_CACHE", 2 * D)
    counts = count_parts(monkeypatch)
    table = PartialEmbedding(60, D, trainable_rows=range(40))
    optimizer = rowwise(torch.optim.AdamW(table.parameters(), **options))
    take_steps(optimizer, lambda: table(torch.arange(60)).sum())
    assert counts == [0]
