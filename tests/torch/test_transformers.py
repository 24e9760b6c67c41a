"""Language models of `transformers` whose input embedding is a partly trainable table."""

from pathlib import Path
from typing import Any

import pytest

transformers = pytest.importorskip("transformers")
pytest.importorskip("safetensors")

import torch  # noqa: E402  # after the packages that may be missing
from oracle import assert_same_bits, rows_that_differ  # noqa: E402
from safetensors.torch import load_file  # noqa: E402
from small_tables import moved_rows  # noqa: E402
from steps import take_steps  # noqa: E402
from tiny_language_models import V, language_model  # noqa: E402
from torch import Tensor, nn  # noqa: E402

from partial_embedding.torch import PartialEmbedding  # noqa: E402

ROWS = [2, 5, 11]
FROZEN = [row for row in range(V) if row not in ROWS]
IDS = torch.tensor([[2, 3, 5, 7, 11, 1], [4, 5, 6, 12, 9, 1]])


def swap_embedding(model: nn.Module) -> None:
    """Put a partly trainable table where the input embedding was, around the same weight."""
    old = model.get_input_embeddings()
    table = PartialEmbedding(
        old.num_embeddings,
        old.embedding_dim,
        old.padding_idx,
        sparse=False,
        _weight=old.weight.data,
        trainable_rows=ROWS,
    )
    table.weight = old.weight
    model.set_input_embeddings(table)
    model.tie_weights()


def with_a_table(kind: Any) -> Any:
    """As a user would write it, so that `from_pretrained` loads into our table."""

    class Partial(kind):  # type: ignore[misc]
        def __init__(self, config: Any) -> None:
            super().__init__(config)
            swap_embedding(self)

    return Partial


PARTIAL: dict[str, Any] = {
    "BERT": with_a_table(transformers.BertLMHeadModel),
    "GPT-2": with_a_table(transformers.GPT2LMHeadModel),
    "Llama": with_a_table(transformers.LlamaForCausalLM),
    "T5": with_a_table(transformers.T5ForConditionalGeneration),
}
MODELS = pytest.mark.parametrize(
    ("family", "tied"),
    [
        pytest.param(family, tied, id=f"{family}-{'tied' if tied else 'untied'}")
        for family in PARTIAL
        for tied in (True, False)
    ],
)


def models(family: str, tied: bool) -> tuple[Any, Any]:
    """A plain model, and one with a partly trainable table, of the same weights."""
    plain = language_model(family, tied)
    partial = PARTIAL[family](plain.config).eval()
    partial.load_state_dict(plain.state_dict(), strict=True)
    partial.tie_weights()
    return plain, partial


def inputs(ids: Tensor = IDS) -> dict[str, Tensor]:
    return {"input_ids": ids, "labels": ids, "attention_mask": torch.ones_like(ids)}


def table_of(model: Any) -> PartialEmbedding:
    table = model.get_input_embeddings()
    assert isinstance(table, PartialEmbedding)
    return table


def is_tied(model: Any) -> bool:
    weight = model.get_output_embeddings().weight
    return weight is model.get_input_embeddings().weight


def head_is_tied(family: str, tied: bool) -> bool:
    # transformers ties T5's head whatever the configuration says, which then scales its input.
    return tied or family == "T5"


def gradient_rows(model: Any) -> list[int]:
    model.zero_grad()
    model(**inputs()).loss.backward()
    return moved_rows(table_of(model).weight.grad.to_dense())


@MODELS
def test_logits_are_those_of_the_plain_model(family: str, tied: bool) -> None:
    plain, partial = models(family, tied)
    out, expected = partial(**inputs()), plain(**inputs())
    assert_same_bits(out.logits, expected.logits, "the logits")
    assert_same_bits(out.loss[None], expected.loss[None], "the loss")
    assert is_tied(partial) == is_tied(plain) == head_is_tied(family, tied)
    assert list(partial.state_dict()) == list(plain.state_dict())


@MODELS
def test_gradient_is_that_of_the_plain_model_without_frozen_rows(family: str, tied: bool) -> None:
    plain, partial = models(family, tied)
    for model in (plain, partial):
        model(**inputs()).loss.backward()
    gradients = {name: parameter.grad for name, parameter in plain.named_parameters()}
    of_table = table_of(partial).weight
    for name, parameter in partial.named_parameters():
        expected = gradients[name]
        assert (parameter.grad is None) == (expected is None), name
        if expected is None:
            continue  # BERT has a bias that an untied head does not use
        if parameter is of_table:
            expected = expected.clone()
            expected[FROZEN] = 0.0
        assert_same_bits(parameter.grad, expected, name)
    # A tied head has gradients in every row, which the table's hook drops too.
    assert moved_rows(of_table.grad) == ROWS


@MODELS
def test_checkpoints_load_either_way_without_a_key_too_many_or_too_few(
    family: str, tied: bool, tmp_path: Path
) -> None:
    plain, partial = models(family, tied)
    with torch.no_grad():
        table_of(partial).weight.add_(1)
    plain_class, partial_class, files = type(plain), type(partial), []
    for source, target_class in (
        (partial, plain_class),
        (partial, partial_class),
        (plain, partial_class),
    ):
        folder = tmp_path / f"{type(source).__name__}-{target_class.__name__}"
        source.save_pretrained(folder)
        files.append(load_file(folder / "model.safetensors").keys())
        loaded, report = target_class.from_pretrained(folder, output_loading_info=True)
        for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
            assert not report[kind], (kind, report[kind])
        loaded.eval()
        assert is_tied(loaded) == head_is_tied(family, tied)
        assert_same_bits(loaded(**inputs()).logits, source(**inputs()).logits, "the logits")
        if target_class is partial_class:
            assert table_of(loaded).trainable_rows.tolist() == ROWS
            assert gradient_rows(loaded) == ROWS
    assert files[0] == files[1] == files[2]  # a tied weight once, as the plain model has it


@MODELS
def test_embeddings_are_resized_up_and_down(family: str, tied: bool) -> None:
    _, partial = models(family, tied)
    start = table_of(partial).weight.detach().clone()
    partial.resize_token_embeddings(V + 3)
    table = table_of(partial)
    assert table.num_embeddings == len(table.weight) == V + 3
    assert is_tied(partial) == head_is_tied(family, tied)
    assert table.trainable_rows.tolist() == ROWS
    assert_same_bits(table.weight[:V], start, "old rows")
    assert gradient_rows(partial) == ROWS
    table.unfreeze_rows([V, V + 2])
    # New tokens must be looked up to have a gradient where no tied head gives them one.
    ids = torch.tensor([[2, 5, 11, V, V + 1, V + 2, 1]])
    partial.zero_grad()
    partial(**inputs(ids)).loss.backward()
    moved = moved_rows(table.weight.grad)
    assert moved == [*ROWS, V, V + 2]
    partial.zero_grad()
    partial.resize_token_embeddings(10)
    table = table_of(partial)
    assert table.num_embeddings == len(table.weight) == 10
    assert table.trainable_rows.tolist() == [2, 5]
    assert_same_bits(table.weight, start[:10], "old rows")
    small = IDS.clamp(max=9)
    partial(**inputs(small)).loss.backward()
    assert moved_rows(table.weight.grad) == [2, 5]
    assert partial.generate(small, max_new_tokens=2, do_sample=False).shape[0] == 2


@MODELS
def test_tying_weights_again_changes_nothing(family: str, tied: bool) -> None:
    _, partial = models(family, tied)
    weight = table_of(partial).weight
    for _ in range(2):
        partial.tie_weights()
    assert table_of(partial).weight is weight
    assert is_tied(partial) == head_is_tied(family, tied)
    assert gradient_rows(partial) == ROWS


@MODELS
def test_bfloat16_models_train_their_rows_alone(family: str, tied: bool, tmp_path: Path) -> None:
    plain, partial = (model.bfloat16() for model in models(family, tied))
    assert_same_bits(partial(**inputs()).logits, plain(**inputs()).logits, "the logits")
    partial.save_pretrained(tmp_path)
    partial = PARTIAL[family].from_pretrained(tmp_path, dtype=torch.bfloat16)
    table = table_of(partial)
    assert table.weight.dtype == torch.bfloat16
    before = table.weight.detach().clone()
    optimizer = torch.optim.AdamW(partial.parameters(), lr=0.1, weight_decay=0.5)
    take_steps(optimizer, lambda: partial(**inputs()).loss, 2)
    assert_same_bits(table.weight[FROZEN], before[FROZEN], "frozen rows")
    assert rows_that_differ(before, table.weight) == ROWS
