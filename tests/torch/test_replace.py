"""Embeddings and heads of existing models, made partly trainable in place, and plain again."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from oracle import assert_same_bits, rows_that_differ, through_a_file
from small_tables import moved_rows
from steps import take_steps
from torch import Tensor, nn
from torch import distributed as dist

from partial_embedding.errors import InputError
from partial_embedding.torch import (
    PartialEmbedding,
    PartialEmbeddingBag,
    PartialLinear,
    detach_rowwise,
    replace_embedding,
    restore_embedding,
    rowwise,
)
from partial_embedding.torch.row_gradient import RowGradient

V, D = 11, 6
ROWS = [2, 5, 9]
FROZEN = [row for row in range(V) if row not in ROWS]
IDS = torch.tensor([[1, 2, 2], [5, 0, 10]])
LABELS = torch.tensor([2, 3, 9, 9, 5, 0])


class Scaled(nn.Embedding):
    """As Gemma's: what is looked up is scaled and cast."""

    def __init__(self) -> None:
        super().__init__(V, D)
        self.scale = 3.0

    def forward(self, ids: Tensor) -> Tensor:  # type: ignore[override]  # transformers' own name
        return super().forward(ids) * torch.tensor(self.scale).to(self.weight.dtype)


class Model(nn.Module):
    def __init__(self, words: nn.Embedding | None = None, tied: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.places = nn.Embedding(5, D)
        self.body = nn.ModuleDict({"words": words or nn.Embedding(V, D)})
        self.head = nn.Linear(D, V)
        if tied:
            self.head.weight = self.body["words"].weight

    def forward(self, ids: Tensor) -> Tensor:
        hidden = self.body["words"](ids) + self.places(torch.arange(ids.shape[1]))
        scores: Tensor = self.head(torch.tanh(hidden))
        return scores


def train(model: Model, steps: int = 3) -> torch.optim.Optimizer:
    optimizer = rowwise(torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.3), model)
    take_steps(optimizer, lambda: F.cross_entropy(model(IDS).flatten(0, 1), LABELS), steps)
    return optimizer


@pytest.mark.parametrize("words", [nn.Embedding, Scaled], ids=["plain", "scaled"])
def test_the_model_is_what_it_was_but_for_what_trains(words: Any) -> None:
    model = Model(words() if words is Scaled else None)
    module, weight = model.body["words"], model.head.weight
    expected, keys = model(IDS), list(model.state_dict())
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.3)
    seen = []
    module.register_forward_hook(lambda *_: seen.append("hook"))
    users = replace_embedding(model, "words", ROWS)
    assert list(users) == ["body.words", "head"]
    assert model.body["words"] is module is users["body.words"]
    assert module.weight is weight is model.head.weight
    assert isinstance(module, PartialEmbedding)
    assert isinstance(module, words)
    assert isinstance(model.head, PartialLinear)
    assert_same_bits(model(IDS), expected, "the scores")
    assert seen == ["hook"]
    assert list(model.state_dict()) == keys
    # An optimizer that was made before still holds the weight.
    rowwise(optimizer, model)
    before = copy.deepcopy(model.state_dict())
    model(IDS).square().sum().backward()
    assert isinstance(weight.grad, RowGradient)
    optimizer.step()
    assert rows_that_differ(before["head.weight"], weight) == ROWS
    assert rows_that_differ(before["head.bias"], model.head.bias) == ROWS


def test_the_scale_of_a_subclass_reaches_the_gradient() -> None:
    plain, partial = Model(Scaled(), tied=False), Model(Scaled(), tied=False)
    partial.load_state_dict(plain.state_dict())
    replace_embedding(partial, "words", ROWS)
    for model in (plain, partial):
        model(IDS).square().sum().backward()
    grad = partial.body["words"].weight.grad.to_dense()
    torch.testing.assert_close(grad[[2, 5]], plain.body["words"].weight.grad[[2, 5]])
    assert not grad[FROZEN].any()


def test_a_subclass_scales_in_functional_calls_too() -> None:
    model = Model(Scaled(), tied=False)
    expected = model(IDS)
    replace_embedding(model, "words", ROWS)
    parameters = {name: p.detach().clone() for name, p in model.named_parameters()}
    scores = torch.func.functional_call(model, parameters, (IDS,))
    assert_same_bits(scores, expected, "the scores")


@pytest.mark.parametrize("words", [None, Scaled], ids=["plain", "scaled"])
def test_it_is_copied_and_pickled_as_it_is(words: Any) -> None:
    model = Model(words() if words else None)
    replace_embedding(model, "words", ROWS)
    for other in (copy.deepcopy(model), through_a_file(model)):
        table = other.body["words"]
        assert_same_bits(other(IDS), model(IDS), "the scores")
        assert table.weight is other.head.weight is not model.head.weight
        other.head.unfreeze_rows([0])
        assert table.trainable_rows.tolist() == [0, *ROWS]
        assert model.head.trainable_rows.tolist() == ROWS
        train(other, steps=1)
        restore_embedding(other)
        assert type(table) is type(Model(words() if words else None).body["words"])


@pytest.mark.parametrize("words", [None, Scaled], ids=["plain", "scaled"])
def test_the_way_back_leaves_a_plain_model_with_the_learned_rows(words: Any) -> None:
    model = Model(words() if words else None)
    plain = copy.deepcopy(model)
    replace_embedding(model, "words", ROWS)
    detach_rowwise(train(model))
    learned, expected = model.head.weight.detach().clone(), model(IDS)
    assert restore_embedding(model) == ["body.words", "head"]
    for name, module in model.named_modules():
        assert type(module) is type(plain.get_submodule(name)), name
        assert vars(module).keys() == vars(plain.get_submodule(name)).keys(), name
    assert_same_bits(model.head.weight, learned, "the rows")
    assert model.head.weight is model.body["words"].weight
    assert_same_bits(model(IDS), expected, "the scores")
    model.zero_grad()
    model(IDS).square().sum().backward()
    assert model.head.weight.grad.layout == torch.strided
    assert model.head.weight.grad.any(1).all()  # nothing is dropped any more
    torch.optim.AdamW(model.parameters()).step()


def test_bags_and_untied_heads_are_replaced_by_their_names() -> None:
    model = nn.ModuleDict(
        {"bag": nn.EmbeddingBag(V, D, mode="sum"), "head": nn.Linear(D, V, bias=False)}
    )
    assert list(replace_embedding(model, "bag", ROWS)) == ["bag"]
    assert list(replace_embedding(model, model["head"], [1])) == ["head"]
    assert isinstance(model["bag"], PartialEmbeddingBag)
    model["head"](model["bag"](IDS)).sum().backward()
    assert set(model["bag"].weight.grad._indices()[0].tolist()) == {2, 5}
    assert set(model["head"].weight.grad._indices()[0].tolist()) == {1}


def test_other_users_of_the_weight_are_told_and_masked() -> None:
    class Raw(nn.Module):
        def __init__(self, matrix: nn.Parameter) -> None:
            super().__init__()
            self.matrix = matrix

    model = Model(tied=False)
    model.raw = Raw(model.body["words"].weight)
    assert list(replace_embedding(model, "words", ROWS)) == ["body.words", "raw"]
    assert type(model.raw) is Raw
    model.raw.matrix.square().sum().backward()
    assert moved_rows(model.raw.matrix.grad) == ROWS


def test_rows_that_are_to_train_need_a_weight_that_requires_gradients() -> None:
    model = Model()
    model.requires_grad_(False)
    replace_embedding(model, "words", ROWS)
    assert model.head.weight.requires_grad
    assert model.head.bias.requires_grad
    assert not model.places.weight.requires_grad
    model(IDS).sum().backward()


def test_asking_twice_for_the_same_rows_changes_nothing() -> None:
    model = Model()
    first = replace_embedding(model, "words", ROWS)
    rows = model.head.row_set
    assert list(replace_embedding(model, "head", ROWS)) == ["head", "body.words"]
    assert model.head.row_set is rows
    assert first["head"] is model.head


# What is refused leaves the model as it was


def a_parametrized_model() -> Model:
    model = Model(tied=False)
    nn.utils.parametrize.register_parametrization(model.body["words"], "weight", nn.Tanh())
    return model


def a_quantized_model() -> Model:
    class Params8bit(nn.Parameter):
        pass

    model = Model(tied=False)
    words = model.body["words"]
    words.weight = Params8bit(torch.zeros(V, D))
    return model


def an_integer_model() -> Model:
    model = Model(tied=False)
    model.body["words"].weight = nn.Parameter(torch.zeros(V, D, dtype=torch.int8), False)
    return model


def a_sharded_model() -> Model:
    from torch.distributed.tensor import distribute_tensor, init_device_mesh

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        model = Model(tied=False)
        sharded = distribute_tensor(torch.zeros(V, D), init_device_mesh("cpu", (1,)))
        model.body["words"].weight = nn.Parameter(sharded)
    finally:
        dist.destroy_process_group()
    return model


def two_tables() -> nn.Module:
    return nn.ModuleDict({"a": Model(), "b": Model()})


def partly_trainable() -> Model:
    model = Model()
    replace_embedding(model, "head", [1, 2])
    return model


def counted_by_frequency() -> Model:
    return Model(nn.Embedding(V, D, scale_grad_by_freq=True))


def scaled_with_max_norm() -> Model:
    words = Scaled()
    words.max_norm = 1.0
    return Model(words)


@pytest.mark.parametrize(
    ("make", "name", "rows", "message"),
    [
        (Model, "wrods", ROWS, r"'wrods', which fits none; the embeddings are: 'places', 'body.wo"),
        (Model, None, ROWS, r"no name, which fits 2; these are: 'places', 'body.words'\. Pass"),
        (two_tables, "words", ROWS, r"these are: 'a.body.words', 'b.body.words'"),
        (Model, nn.Embedding(V, D), ROWS, r"Received a Embedding, which fits none"),
        (lambda: nn.Linear(2, 2), None, "all", r"fits none; the embeddings are: none"),
        (Model, "words", [V], r"rows must lie in \[0, 11\)\. Received: 11"),
        (Model, "words", [True, False], r"mask"),
        (Model, "words", "every", r"one of .*'every'"),
        (partly_trainable, "words", [3], r"Received \(3\), while 'body.words' trains \(1, 2\)"),
        (partly_trainable, "words", "all", r"\(0, 1, 2, 3, 4, 5, …\), while 'body.words' trains"),
        (a_parametrized_model, "words", ROWS, r"'body.words', whose weight is computed"),
        (a_quantized_model, "words", ROWS, r"whose weight is a Params8bit"),
        (an_integer_model, "words", ROWS, r"whose weight is a torch.int8"),
        (a_sharded_model, "words", ROWS, r"whose weight is a DTensor"),
        (counted_by_frequency, "words", ROWS, r"scale_grad_by_freq=True.*Pass sparse=False"),
        (scaled_with_max_norm, "words", ROWS, r"Scaled with max_norm and a forward of its own"),
    ],
)
def test_bad_input_is_refused_and_the_model_is_as_it_was(
    make: Callable[[], nn.Module], name: Any, rows: Any, message: str
) -> None:
    model = make()
    kinds = {path: type(module) for path, module in model.named_modules()}
    trains = {path: p.requires_grad for path, p in model.named_parameters()}
    with pytest.raises(InputError, match=message):
        replace_embedding(model, name, rows)
    assert {path: type(module) for path, module in model.named_modules()} == kinds
    assert {path: p.requires_grad for path, p in model.named_parameters()} == trains
    for module in model.modules():
        if isinstance(module, nn.Embedding) and type(module) is nn.Embedding:
            assert not module.sparse
            assert not module.weight._backward_hooks


def test_a_table_of_a_class_of_ones_own_is_not_made_plain() -> None:
    class Own(PartialEmbedding):
        pass

    model = nn.ModuleList([PartialEmbedding(V, D), Own(V, D)])
    with pytest.raises(InputError, match=r"Received '1', a Own"):
        restore_embedding(model)
    assert type(model[0]) is PartialEmbedding
