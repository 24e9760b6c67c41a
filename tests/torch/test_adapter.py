"""The tables of a module as the runner moves them, without a framework's trainer."""

import copy
from typing import Any

import pytest
import torch
from oracle import unchanged
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm

from partial_embedding import InputError, Schedule
from partial_embedding.schedule.runner import Runner
from partial_embedding.torch import PartialEmbedding
from partial_embedding.torch.adapter import TorchTables


def runner_of(model: nn.Module, *stages: dict[str, Any], **options: Any) -> Runner:
    return Runner(TorchTables(model), {None: Schedule(stages)}, **options)


def test_an_audited_run_can_begin_anew() -> None:
    model = nn.Sequential(PartialEmbedding(10, 4))
    stages = ({"epoch": 0, "rows": [1]}, {"epoch": 2, "rows": [2]})
    first = runner_of(model, *stages, audit=True)
    first.advance(2, 8)
    again = runner_of(model, *stages, audit=True)
    again.place()
    again.advance(0, 0)
    again.finish(1)
    assert [(result.stage, result.changed) for result in again.audit_results] == [(0, 0)]


def test_a_weight_that_changes_when_it_is_read_is_not_read() -> None:
    model = nn.Sequential(spectral_norm(PartialEmbedding(10, 4, sparse=False)))
    with unchanged(model), torch.no_grad():  # under which what is computed takes no gradient
        runner_of(model, {"epoch": 0, "rows": [2, 3]}).place()
    table = model[0]
    assert isinstance(table, PartialEmbedding)
    assert table.trainable_rows.tolist() == [2, 3]


def test_the_first_rows_join_with_their_rate_whatever_trained_before() -> None:
    for rows in ("all", [2, 3]):
        model = nn.Sequential(PartialEmbedding(10, 4, trainable_rows=rows))
        runner_of(model, {"epoch": 0, "rows": [2, 3], "lr_scale": 0.5}).place()
        table = model[0]
        assert isinstance(table, PartialEmbedding)
        assert table.trainable_rows.tolist() == [2, 3]
        assert [rate_scale.lr_scale for rate_scale in table.rate_scales.values()] == [0.5]
        # And a plain schedule after that begins plainly.
        runner_of(model, {"epoch": 0, "rows": [2, 3]}).place()
        assert table.rate_scales == {}


FROZEN = {
    "from_pretrained": lambda: PartialEmbedding.from_pretrained(torch.ones(10, 4), freeze=True),
    "the_module": lambda: PartialEmbedding(10, 4).requires_grad_(False),
    "the_weight": lambda: _with_frozen_weight(),
}


def _with_frozen_weight() -> nn.Module:
    table = PartialEmbedding(10, 4)
    table.weight.requires_grad = False
    return table


@pytest.mark.parametrize("make", FROZEN.values(), ids=FROZEN)
def test_rows_of_a_weight_that_takes_no_gradients_are_refused_until_it_does(make: Any) -> None:
    model = nn.Sequential(make())
    with pytest.raises(
        InputError, match=r"stages\[1\]\.rows: .*requires_grad=False, as .*freeze.*get_peft_model"
    ):
        runner_of(model, {"epoch": 0, "rows": "none"}, {"epoch": 1, "rows": [3]})
    runner_of(model, {"epoch": 0, "rows": "none"})
    model[0].weight.requires_grad_(True)  # as the message says
    runner_of(model, {"epoch": 0, "rows": [3]})


def test_a_teacher_that_was_copied_follows_no_schedule() -> None:
    student = nn.Sequential(PartialEmbedding(6, 4))
    model = nn.ModuleDict({"student": student, "teacher": copy.deepcopy(student)})
    model["teacher"].requires_grad_(False)
    assert list(TorchTables(model).tables) == ["student.0"]
    # A copy that is all there is, is trained, or asked to be made so.
    assert list(TorchTables(model["teacher"]).tables) == ["0"]
