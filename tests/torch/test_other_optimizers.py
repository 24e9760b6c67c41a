"""Optimizers that are not torch's own."""

import copy
from typing import Any

import optimi
import pytest
import pytorch_optimizer
import schedulefree
import torch
from cases import SPARSE_AND_DENSE, Case
from models import batches, follow, partial_table, prepared, starting_table, train
from oracle import assert_same_bits, same_bits, through_a_file
from plain_optimizers import Plain
from torch import Tensor
from transformers.optimization import Adafactor as TransformersAdafactor

from partial_embedding import InputError
from partial_embedding.torch import rowwise

FROM_ELSEWHERE = {
    "transformers.Adafactor": Case(TransformersAdafactor),
    "transformers.Adafactor-beta1": Case(TransformersAdafactor, {"beta1": 0.9}),
    "optimi.AdamW": Case(optimi.AdamW, {"lr": 0.01, "weight_decay": 0.1}),
    "optimi.Lion": Case(optimi.Lion, {"lr": 0.01, "weight_decay": 0.1}),
    "pytorch_optimizer.Lion": Case(pytorch_optimizer.Lion, {"lr": 0.01, "weight_decay": 0.1}),
}
STAGES = {
    "frozen_from_the_start": {},
    "trained_then_frozen": {3: (4, 9)},
    "unfrozen_late": {3: (1, 2, 4, 6, 7, 9)},
    "frozen_and_unfrozen_again": {2: (1, 6), 4: (1, 4, 6, 7), 7: (4, 7)},
}


@SPARSE_AND_DENSE
@pytest.mark.parametrize("scenario", STAGES)
@pytest.mark.parametrize("name", FROM_ELSEWHERE)
def test_optimizers_from_elsewhere_are_served_exactly(
    name: str, scenario: str, sparse: bool
) -> None:
    case = FROM_ELSEWHERE[name]
    model, optimizer, oracle = prepared(case, partial_table(sparse=sparse))
    follow(case, model, optimizer, oracle, batches(quiet=-1), STAGES[scenario])
    assert not same_bits(model.table.weight[4], starting_table()[4])
    assert_same_bits(model.table.weight[[0, 5, 11]], starting_table()[[0, 5, 11]], "frozen rows")


@pytest.mark.parametrize("name", FROM_ELSEWHERE)
def test_a_step_without_a_gradient_counts_where_the_stock_optimizer_counts_it(name: str) -> None:
    """optimi counts steps in the parameter group, whether or not there was a gradient."""
    case = FROM_ELSEWHERE[name]
    model, optimizer, oracle = prepared(case, partial_table())
    follow(case, model, optimizer, oracle, batches(quiet=2), {4: (1, 4, 7)})


@pytest.mark.parametrize("first", ["load", "rowwise", "step"])
def test_an_optimizer_that_compares_what_it_loaded_goes_on_exactly(first: str) -> None:
    case = FROM_ELSEWHERE["pytorch_optimizer.Lion"]
    model, optimizer, oracle = prepared(case, partial_table())
    follow(case, model, optimizer, oracle, batches(4, quiet=-1), {2: (1, 4, 7)})
    fresh = copy.deepcopy(model)
    resumed = case.make(fresh.parameters())
    if first == "rowwise":
        rowwise(resumed, fresh)
    if first == "step":
        train(case, fresh, resumed, batches()[0])
        fresh.load_state_dict(model.state_dict())
    resumed.load_state_dict(through_a_file(optimizer.state_dict(), weights_only=True))
    for step, batch in enumerate(batches(4, quiet=-1)):
        train(case, model, optimizer, batch)
        train(case, fresh, resumed, batch)
        assert_same_bits(fresh.table.weight, model.table.weight, f"after step {step}")
        resumed.load_state_dict(resumed.state_dict())


def test_schedule_free_optimizers_are_refused_by_name() -> None:
    table = partial_table()
    optimizer = schedulefree.AdamWScheduleFree(table.parameters())
    with pytest.raises(InputError, match="AdamWScheduleFree"):
        rowwise(optimizer, table)
    assert not optimizer._optimizer_step_pre_hooks
    assert_same_bits(table.weight, starting_table(), "after a refusal")


class BlockwiseAdam(Plain):
    """Keeps one scale for 16 elements, as 8-bit optimizers do: neither per row nor per table."""

    def direction(self, param: Tensor, group: dict[str, Any]) -> Tensor:
        grad, blocks = super().direction(param, group), -(-param.numel() // 16)
        absmax = self.state[param].setdefault("absmax", torch.zeros(blocks))
        padded = torch.zeros(blocks * 16)
        padded[: grad.numel()] = grad.flatten()
        absmax.copy_(torch.maximum(0.9 * absmax, padded.view(blocks, 16).abs().amax(1)))
        scale = absmax.clamp(min=1e-8).repeat_interleave(16)[: grad.numel()]
        return grad / scale.view_as(grad)


def test_state_in_blocks_of_elements_is_refused_by_name() -> None:
    table = partial_table()
    with pytest.raises(InputError, match="BlockwiseAdam"):
        rowwise(BlockwiseAdam(table.parameters()), table)
