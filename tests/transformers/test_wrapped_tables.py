"""New tokens where PEFT wraps their tables too: copies, LoRA, and trainable tokens of its own."""

import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from oracle import assert_same_bits, rows_that_differ, same_bits
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
from torch import Tensor

from partial_embedding import InputError
from partial_embedding.torch import add_tokens
from partial_embedding.torch.row_files import load_rows, save_rows
from partial_embedding.torch.table import PartialTable

pytestmark = pytest.mark.filterwarnings("ignore")


# By name: what LoRA is given, the tables that learn where head and input are tied and where they
# are not, and those whose rows are saved where peft alone does not find them.
INPUT, HEAD = "model.embed_tokens", "lm_head"
COPIED_INPUT, COPIED_HEAD = f"{INPUT}.modules_to_save.default", f"{HEAD}.modules_to_save.default"
WRAPPED: dict[str, tuple[dict[str, Any], set[str], set[str], str]] = {
    "copies": (
        {"modules_to_save": ["embed_tokens", "lm_head"]},
        {COPIED_INPUT, COPIED_HEAD},
        {COPIED_INPUT, COPIED_HEAD},
        "",
    ),
    "a_copy_of_the_input": (
        {"modules_to_save": ["embed_tokens"]},
        {COPIED_INPUT, HEAD},
        {COPIED_INPUT, HEAD},
        "",
    ),
    "a_copy_of_the_head": (
        {"modules_to_save": ["lm_head"]},
        {INPUT, COPIED_HEAD},
        {INPUT, COPIED_HEAD},
        "tied",
    ),
    "lora_on_the_head": (
        {"target_modules": ["q_proj", "lm_head"]},
        {INPUT},
        {INPUT, f"{HEAD}.base_layer"},
        "untied",
    ),
    "its_own_tokens": ({"trainable_token_indices": NEW_ROWS}, {INPUT}, {INPUT, HEAD}, ""),
}


def learned(model: Any, before: dict[str, Tensor]) -> set[str]:
    """The tables of which the new rows moved and no others, tied ones once or by either name."""
    base, moved = model.get_base_model(), set()
    for name, module in base.named_modules():
        if isinstance(module, PartialTable) and "original_module" not in name:
            assert rows_that_differ(before[name], module.weight) == NEW_ROWS, name
            moved.add(name)
    return moved


@pytest.mark.parametrize("wrapped", WRAPPED)
@TIED
def test_rows_learn_and_are_saved_with_what_wraps_their_table(
    tied: bool, wrapped: str, tmp_path: Path
) -> None:
    options, of_tied, of_untied, unread = WRAPPED[wrapped]
    model, words = with_new_tokens(tied=tied)
    base = logits_of(model, words)
    model = peft.get_peft_model(model, lora(**options))
    before = {
        name: module.weight.detach().clone()
        for name, module in model.get_base_model().named_modules()
        if isinstance(module, PartialTable)
    }
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05, weight_decay=0.1)
    for _ in range(3):
        model.train()(**inputs(words, NEW_TEXT)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert learned(model, before) >= (of_tied if tied else of_untied)
    with model.disable_adapter():
        assert_same_bits(logits_of(model, words), base, "logits of the base model")
    now = logits_of(model, words)
    assert not same_bits(now, base)

    is_unread = unread == ("tied" if tied else "untied")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if is_unread:
            with pytest.warns(
                UserWarning, match=r"LoraConfig has no place for their ids, \w+.*alone"
            ):
                model.save_pretrained(tmp_path / "adapter")
        else:
            warnings.filterwarnings("error", ".*no place.*")
            model.save_pretrained(tmp_path / "adapter")
    here, words = with_new_tokens(tied=tied)
    here = peft.PeftModel.from_pretrained(here, tmp_path / "adapter")
    assert_same_bits(logits_of(here, words), now, "logits where the tokens are")
    plain = with_room(tied=tied)
    plain.lm_head.out_features = V + 2  # which transformers 5.0 leaves as it was where it is tied
    plain = peft.PeftModel.from_pretrained(plain, tmp_path / "adapter")
    assert same_bits(logits_of(plain, words), now) is not is_unread


def test_rows_of_a_layer_that_lora_adapts_are_saved_beside_it(tmp_path: Path) -> None:
    """As the warning says."""
    model, words = with_new_tokens(tied=False)
    model = peft.get_peft_model(model, lora(target_modules=["lm_head"]))
    with pytest.warns(UserWarning, match="alone will not read them. Use save_rows too"):
        model.save_pretrained(tmp_path / "adapter")
    save_rows(model, tmp_path / "rows")
    plain = with_room(tied=False)
    load_rows(plain, tmp_path / "rows")
    plain = peft.PeftModel.from_pretrained(plain, tmp_path / "adapter")
    assert_same_bits(logits_of(plain, words), logits_of(model, words), "logits")


def test_rows_of_copies_are_saved_by_peft_or_merged_first(tmp_path: Path) -> None:
    model, _ = with_new_tokens(tied=False)
    model = peft.get_peft_model(model, lora(modules_to_save=["lm_head"]))
    with pytest.raises(InputError, match=r"a copy for each adapter.*merge_and_unload first"):
        save_rows(model, tmp_path / "rows")
    merged = model.merge_and_unload()
    save_rows(merged, tmp_path / "rows")
    plain = with_room(tied=False)
    assert load_rows(plain, tmp_path / "rows") == {
        "lm_head.weight": NEW_ROWS,
        "model.embed_tokens.weight": NEW_ROWS,
    }


def test_lora_on_the_embedding_itself_makes_its_gradient_dense_and_says_so() -> None:
    model, words = with_new_tokens(tied=False)
    base = logits_of(model, words)
    with pytest.warns(UserWarning, match=r"gradient of all its rows too, 18×8 .*target_modules"):
        model = peft.get_peft_model(model, lora(target_modules=["q_proj", "embed_tokens"]))
    table = model.get_base_model().model.embed_tokens.base_layer
    before = table.weight.detach().clone()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05, weight_decay=0.1)
    model(**inputs(words, NEW_TEXT)).loss.backward()
    optimizer.step()
    assert rows_that_differ(before, table.weight) == NEW_ROWS
    with model.disable_adapter():
        assert_same_bits(logits_of(model, words), base, "logits of the base model")


def test_tokens_are_not_added_where_peft_has_copies_of_the_tables() -> None:
    model, words = language_model("Llama"), tokenizer()
    model = peft.get_peft_model(model, lora(modules_to_save=["embed_tokens", "lm_head"]))
    with pytest.raises(InputError, match=r"a copy of one for each adapter.*out of modules_to_save"):
        add_tokens(model, words, NEW)
    assert len(words) == V
