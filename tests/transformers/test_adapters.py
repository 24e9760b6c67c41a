"""Rows of new tokens beside adapters of PEFT: in any order, in its files, and out of its way."""

import copy
import json
import pickle
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from oracle import assert_same_bits, rows_that_differ, same_bits
from safetensors import safe_open
from steps import take_steps
from tiny_language_models import (
    NEW,
    NEW_ROWS,
    NEW_TEXT,
    TIED,
    V,
    inputs,
    language_model,
    logits_of,
    lora,
    tokenizer,
    with_new_tokens,
    with_room,
)

from partial_embedding import InputError
from partial_embedding.torch import (
    PartialEmbedding,
    add_tokens,
    replace_embedding,
    restore_embedding,
)
from partial_embedding.torch.row_files import export_peft, load_rows, save_rows

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*gradient_checkpointing.*:FutureWarning",
    "ignore:.*fan_in_fan_out.*",
    "ignore:.*tied layer.*",
    "ignore:Found missing adapter keys",
)
ORDERS = pytest.mark.parametrize("lora_first", [True, False], ids=["lora_first", "tokens_first"])


def adapted(tied: bool = True, lora_first: bool = True) -> tuple[Any, Any, Any]:
    """A model with LoRA and new tokens, its tokenizer, and a copy from before LoRA."""
    before, words = with_new_tokens(tied=tied)
    if not lora_first:
        return peft.get_peft_model(copy.deepcopy(before), lora()), words, before
    model, words = peft.get_peft_model(language_model("Llama", tied), lora()), tokenizer()
    add_tokens(model, words, NEW)
    return model, words, before


def train(model: Any, words: Any, steps: int = 3) -> None:
    learning = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(learning, lr=0.05, weight_decay=0.1)
    take_steps(optimizer, lambda: model(**inputs(words, NEW_TEXT)).loss, steps)


@ORDERS
@TIED
def test_rows_and_lora_learn_and_nothing_else(tied: bool, lora_first: bool) -> None:
    model, words, _ = adapted(tied=tied, lora_first=lora_first)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    train(model, words)
    of_tables = ("embed_tokens.weight", "lm_head.weight")
    for name, parameter in model.named_parameters():
        moved = rows_that_differ(before[name], parameter)
        if name.endswith(of_tables):
            assert moved == NEW_ROWS, name
        else:
            assert bool(moved) == ("lora" in name), name


@ORDERS
@TIED
def test_without_adapters_the_model_is_the_base_model_bit_for_bit(
    tied: bool, lora_first: bool
) -> None:
    model, words, before = adapted(tied=tied, lora_first=lora_first)
    expected = logits_of(before, words)
    train(model, words)
    learned = logits_of(model, words)
    with model.disable_adapter():
        assert_same_bits(logits_of(model, words), expected, "logits of the base model")
        with model.disable_adapter():
            assert_same_bits(logits_of(model, words), expected, "logits of the base model")
    assert_same_bits(logits_of(model, words), learned, "logits")
    with pytest.raises(RuntimeError, match="in between"), model.disable_adapter():
        raise RuntimeError("in between")
    assert_same_bits(logits_of(model, words), learned, "logits")
    assert not same_bits(learned, expected)


@ORDERS
@TIED
def test_adapters_that_transformers_itself_puts_on_and_off_take_the_rows_along(
    tied: bool, lora_first: bool, tmp_path: Path
) -> None:
    model, words = language_model("Llama", tied), tokenizer()
    before, _ = with_new_tokens(tied=tied)
    if lora_first:
        model.add_adapter(lora())
    add_tokens(model, words, NEW)
    if not lora_first:
        model.add_adapter(lora())
    train(model, words)
    learned, base = logits_of(model, words), logits_of(before, words)
    for head, old in (
        (model.get_input_embeddings(), before.get_input_embeddings()),
        (model.get_output_embeddings(), before.get_output_embeddings()),
    ):
        assert rows_that_differ(head.weight, old.weight) == NEW_ROWS
    for _ in range(2):
        model.disable_adapters()
        assert_same_bits(logits_of(model, words), base, "logits of the base model")
        model.enable_adapters()
        assert_same_bits(logits_of(model, words), learned, "logits")
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(with_room(tied=tied), tmp_path)
    assert_same_bits(logits_of(loaded, words), learned, "logits of what was saved")
    restore_embedding(model)
    assert not model._forward_pre_hooks
    assert_same_bits(logits_of(model, words), learned, "logits of plain tables")


def test_biases_of_heads_are_those_of_the_base_model_too() -> None:
    model, words = with_new_tokens("BERT")
    before = copy.deepcopy(model)
    model = peft.get_peft_model(model, peft.LoraConfig(target_modules=["query"], r=2))
    train(model, words)
    head = model.get_output_embeddings()
    assert rows_that_differ(before.get_output_embeddings().bias, head.bias) == NEW_ROWS
    with model.disable_adapter():
        assert_same_bits(head.bias, before.get_output_embeddings().bias, "the bias")
        assert_same_bits(logits_of(model, words), logits_of(before, words), "logits")


def test_rows_that_join_later_are_base_rows_until_then() -> None:
    model, words, before = adapted()
    train(model, words)
    model.get_input_embeddings().set_trainable_rows([3, 5])
    train_again = copy.deepcopy(model)
    train(train_again, words)
    table = train_again.get_input_embeddings().weight
    assert {3, 5} & set(rows_that_differ(before.lm_head.weight, table))
    with train_again.disable_adapter():
        assert_same_bits(logits_of(train_again, words), logits_of(before, words), "logits")


def test_a_look_at_the_base_model_leaves_the_gradient_alone() -> None:
    # As DPO takes its reference: between a forward pass and its backward pass.
    model, words, _ = adapted(tied=False)
    train(model, words)
    gradients = []
    for look in (False, True):
        model.zero_grad()
        loss = model(**inputs(words, NEW_TEXT)).loss
        if look:
            with torch.no_grad(), model.disable_adapter():
                model(**inputs(words, NEW_TEXT))
        loss.backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    for name, gradient in gradients[0].items():
        assert_same_bits(gradients[1][name].to_dense(), gradient.to_dense(), name)


def test_the_base_rows_cost_no_more_than_the_rows() -> None:
    model, *_ = adapted()
    part = model.get_input_embeddings().token_adapter
    assert not part._hidden
    assert sum(v.numel() for v in (part._ids, *part._base.values())) == len(NEW) * (8 + 1)


def test_a_table_that_was_there_before_is_known_to_peft_too() -> None:
    model, words = language_model("Llama", tied=False), tokenizer()
    table = PartialEmbedding.from_pretrained(
        model.get_input_embeddings().weight.data.clone(), trainable_rows=[3, 4]
    )
    model.set_input_embeddings(table)
    before = copy.deepcopy(model)
    model = peft.get_peft_model(model, lora())
    assert table.weight.requires_grad
    train(model, words)
    assert rows_that_differ(before.get_input_embeddings().weight, table.weight) == [3, 4]
    with model.disable_adapter():
        assert_same_bits(logits_of(model, words), logits_of(before, words), "logits")


@ORDERS
def test_each_adapter_has_its_rows_and_begins_with_those_that_there_are(lora_first: bool) -> None:
    # As TRL takes the reference of an adapter that was trained before: from a copy of it.
    model, words = language_model("Llama"), tokenizer()
    if not lora_first:
        add_tokens(model, words, NEW)
    model = peft.get_peft_model(model, lora(), adapter_name="mine")
    if lora_first:
        add_tokens(model, words, NEW)
    base = copy.deepcopy(model.get_input_embeddings().weight.detach())
    train(model, words)
    begun = model.get_input_embeddings().weight.detach().clone()
    model.add_adapter("ref", lora())
    train(model, words)
    learned = model.get_input_embeddings().weight.detach().clone()
    for _ in range(2):
        for name, expected in (("ref", begun), ("mine", learned)):
            model.set_adapter(name)
            assert_same_bits(model.get_input_embeddings().weight, expected, name)
            with model.disable_adapter():
                assert_same_bits(model.get_input_embeddings().weight, base, "the base model's")
            assert_same_bits(model.get_input_embeddings().weight, expected, name)
    model.set_adapter("ref")
    train(model, words)
    model.set_adapter("mine")
    assert_same_bits(model.get_input_embeddings().weight, learned, "of the first adapter")
    model.delete_adapter("mine")
    assert rows_that_differ(model.get_input_embeddings().weight, learned) == NEW_ROWS


def test_an_adapter_is_loaded_beside_the_rows_of_another(tmp_path: Path) -> None:
    other, words, _ = adapted()
    train(other, words)
    other.save_pretrained(tmp_path)
    model, words, _ = adapted(lora_first=False)
    train(model, words, steps=1)
    own = logits_of(model, words)
    model.load_adapter(tmp_path, "other")
    assert_same_bits(logits_of(model, words), own, "logits of the first adapter")
    model.set_adapter("other")
    assert_same_bits(logits_of(model, words), logits_of(other, words), "logits of the other")
    model.set_adapter("default")
    assert_same_bits(logits_of(model, words), own, "logits of the first adapter")


@TIED
def test_the_tokens_of_an_adapter_that_peft_made_are_served_by_the_table(
    tied: bool, tmp_path: Path
) -> None:
    # Tutorials add tokens and name them in the configuration of LoRA.
    plain, _ = with_new_tokens(tied=tied)
    restore_embedding(plain)
    tables = {"embed_tokens": [3, *NEW_ROWS], **({} if tied else {"lm_head": [3, *NEW_ROWS]})}
    theirs = peft.get_peft_model(plain, lora(trainable_token_indices=tables))
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "trainable_tokens_delta" in name:
                parameter += torch.randn_like(parameter)
    theirs.save_pretrained(tmp_path)

    model, words = with_new_tokens(tied=tied)
    before = copy.deepcopy(model)
    model = peft.get_peft_model(model, lora(trainable_token_indices=tables))
    assert isinstance(model.get_input_embeddings(), PartialEmbedding)
    train(model, words)
    for table, old in (
        (model.get_input_embeddings(), before.get_input_embeddings()),
        (model.get_output_embeddings(), before.get_output_embeddings()),
    ):
        assert table.trainable_rows.tolist() == [3, *NEW_ROWS]
        assert rows_that_differ(old.weight, table.weight) == [3, *NEW_ROWS]
    own = logits_of(model, words)
    model.load_adapter(tmp_path, "theirs")
    assert_same_bits(logits_of(model, words), own, "logits of the first adapter")
    model.set_adapter("theirs")
    torch.testing.assert_close(logits_of(model, words), logits_of(theirs, words))
    with model.disable_adapter():
        assert_same_bits(logits_of(model, words), logits_of(before, words), "logits")


@TIED
def test_adapters_that_have_rows_each_are_not_mixed(tied: bool) -> None:
    model, words, before = adapted(tied=tied)
    train(model, words)
    model.add_adapter("other", lora())
    two, batch = ["default", "other"], inputs(words, NEW_TEXT)
    with pytest.raises(ValueError, match="Cannot add weighted adapters"):
        model.add_weighted_adapter(two, [0.5, 0.5], "sum")
    model.eval()
    for names, rows in ((["other"], "'default'"), (["__base__"], "'default'"), (two, "'default'")):
        with pytest.raises(InputError, match=f"has the rows of {rows}"):
            model(**batch, adapter_names=names)
    expected = logits_of(model, words)
    assert_same_bits(model(**batch, adapter_names=["default"]).logits, expected, "by its name")
    with model.disable_adapter():
        assert_same_bits(logits_of(model, words), logits_of(before, words), "the base model's")


@TIED
def test_merging_and_unloading_keep_and_give_back(tied: bool) -> None:
    model, words, before = adapted(tied=tied)
    train(model, words)
    learned, twin = logits_of(model, words), copy.deepcopy(model)
    merged = model.merge_and_unload()
    torch.testing.assert_close(logits_of(merged, words), learned)
    assert merged.get_input_embeddings().trainable_rows.tolist() == NEW_ROWS
    restore_embedding(merged)
    assert not dict(merged.get_input_embeddings().named_children())
    assert_same_bits(logits_of(twin.unload(), words), logits_of(before, words), "logits")


def test_adapted_models_are_copied_and_pickled() -> None:
    model, words, before = adapted()
    train(model, words)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert_same_bits(logits_of(other, words), logits_of(model, words), "logits")
        with other.disable_adapter():
            assert_same_bits(logits_of(other, words), logits_of(before, words), "logits")
            assert not same_bits(logits_of(model, words), logits_of(before, words))


def test_a_part_for_peft_changes_no_key() -> None:
    model, _, before = adapted()
    assert list(model.get_base_model().state_dict()) == [
        key
        for plain in before.state_dict()
        for key in (
            [plain]
            if "q_proj" not in plain
            else [
                plain.replace("q_proj.", "q_proj.base_layer."),
                *(plain.replace("weight", f"lora_{x}.default.weight") for x in "AB"),
            ]
        )
    ]


# Files


@ORDERS
@TIED
def test_peft_saves_the_rows_with_the_adapter_and_reads_them_alone(
    tied: bool, lora_first: bool, tmp_path: Path
) -> None:
    model, words, _ = adapted(tied=tied, lora_first=lora_first)
    train(model, words)
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(with_room(tied=tied), tmp_path)
    assert_same_bits(logits_of(loaded, words), logits_of(model, words), "logits")


def test_rows_of_tokens_that_were_there_are_saved_with_the_adapter(tmp_path: Path) -> None:
    model, words = peft.get_peft_model(language_model("Llama"), lora()), tokenizer()
    replace_embedding(model, trainable_rows=[3, 4])
    train(model, words)
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(language_model("Llama"), tmp_path)
    assert_same_bits(logits_of(loaded, words), logits_of(model, words), "logits")


@ORDERS
def test_an_adapter_goes_on_where_it_was_saved(lora_first: bool, tmp_path: Path) -> None:
    # As Hugging Face's Trainer resumes a model of peft.
    model, words, _ = adapted(lora_first=lora_first)
    train(model, words)
    model.save_pretrained(tmp_path)
    again, _, before = adapted(lora_first=lora_first)
    again.load_adapter(tmp_path, "default", is_trainable=True)
    assert_same_bits(logits_of(again, words), logits_of(model, words), "logits")
    with again.disable_adapter():
        assert_same_bits(logits_of(again, words), logits_of(before, words), "logits")
    train(again, words, steps=1)
    assert not same_bits(logits_of(again, words), logits_of(model, words))


def test_an_adapter_without_rows_loads_too(tmp_path: Path) -> None:
    peft.get_peft_model(language_model("Llama"), lora()).save_pretrained(tmp_path)
    model, *_ = adapted()
    rows = model.get_input_embeddings().weight.detach().clone()
    model.load_adapter(tmp_path, "other")
    model.set_adapter("other")
    assert_same_bits(model.get_input_embeddings().weight, rows, "rows")


def test_adapters_of_another_kind_say_that_peft_alone_reads_no_rows(tmp_path: Path) -> None:
    model, words = with_new_tokens()
    config = peft.IA3Config(target_modules=["q_proj"], feedforward_modules=[])
    model = peft.get_peft_model(model, config)
    train(model, words)
    with pytest.warns(UserWarning, match=r"IA3Config has no place for their ids"):
        model.save_pretrained(tmp_path)


@ORDERS
@TIED
def test_row_files_are_the_same_whether_peft_has_wrapped_the_model(
    tied: bool, lora_first: bool, tmp_path: Path
) -> None:
    model, words, _ = adapted(tied=tied, lora_first=lora_first)
    train(model, words)
    save_rows(model, tmp_path / "wrapped", words)
    merged = model.merge_and_unload()
    save_rows(merged, tmp_path / "merged", words)
    wrapped, alone = (safe_open(tmp_path / name, "pt") for name in ("wrapped", "merged"))
    assert wrapped.metadata() == alone.metadata()
    for key in {*wrapped.keys(), *alone.keys()}:
        assert_same_bits(wrapped.get_tensor(key), alone.get_tensor(key), key)
    rows = merged.get_input_embeddings().weight[NEW_ROWS]
    for target in (
        language_model("Llama", tied),
        peft.get_peft_model(language_model("Llama", tied), lora()),
        adapted(tied=tied)[0].merge_and_unload(),
    ):
        theirs = tokenizer()
        if len(target.get_input_embeddings().weight) > V:
            add_tokens(language_model("Llama"), theirs, NEW)
        load_rows(target, tmp_path / "wrapped", theirs)
        assert_same_bits(target.get_input_embeddings().weight[NEW_ROWS], rows, "rows")


@TIED
def test_exported_rows_are_one_of_several_named_adapters(tied: bool, tmp_path: Path) -> None:
    logits = []
    for seed in (0, 1):
        model, words = with_new_tokens(tied=tied)
        with torch.no_grad():
            for table in (model.get_input_embeddings(), model.get_output_embeddings()):
                table.weight[NEW_ROWS] += torch.randn(2, 8) + seed
        if seed and not tied:
            model.lm_head.unfreeze_rows([3])  # tables may train different rows
            model.lm_head.weight.data[3] += 1
        export_peft(model, tmp_path / str(seed))
        logits.append(logits_of(model, words))
    loaded = peft.PeftModel.from_pretrained(
        with_room(tied=tied), tmp_path / "0", adapter_name="first"
    )
    loaded.load_adapter(tmp_path / "1", "second")
    for name, expected in zip(("first", "second"), logits, strict=True):
        loaded.set_adapter(name)
        torch.testing.assert_close(logits_of(loaded, words), expected)


def test_lora_and_rows_are_exported_into_one_folder(tmp_path: Path) -> None:
    model, words, _ = adapted(tied=False, lora_first=False)
    train(model, words)
    export_peft(copy.deepcopy(model), tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["trainable_token_indices"] == {
        "model.embed_tokens": NEW_ROWS,
        "lm_head": NEW_ROWS,
    }
    loaded = peft.PeftModel.from_pretrained(with_room(tied=False), tmp_path)
    assert_same_bits(logits_of(loaded, words), logits_of(model, words), "logits")


def test_rows_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    model, *_ = adapted()
    model.save_pretrained(tmp_path)
    other = peft.get_peft_model(language_model("Llama"), lora())
    replace_embedding(other, trainable_rows=[3])
    with pytest.raises((InputError, RuntimeError), match=r"fit the table"):
        other.load_adapter(tmp_path, "default", is_trainable=True)
