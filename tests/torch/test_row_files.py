"""Files of trained rows alone, and adapters that PEFT reads and writes."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

transformers = pytest.importorskip("transformers")
pytest.importorskip("safetensors")

import torch  # noqa: E402  # after the packages that may be missing
from oracle import assert_same_bits, unchanged  # noqa: E402
from safetensors import safe_open  # noqa: E402
from safetensors.torch import save_file  # noqa: E402
from tiny_language_models import (  # noqa: E402
    NEW,
    NEW_ROWS,
    NEW_TEXT,
    D,
    V,
    inputs,
    language_model,
    lora,
    tokenizer,
    with_new_tokens,
)
from torch import nn  # noqa: E402

from partial_embedding.errors import InputError  # noqa: E402
from partial_embedding.torch import replace_embedding  # noqa: E402
from partial_embedding.torch.row_files import (  # noqa: E402
    export_peft,
    import_peft,
    load_rows,
    save_rows,
)

WITH_HEADS = pytest.mark.parametrize(
    ("family", "tied"),
    [("BERT", True), ("GPT-2", True), ("Llama", False), ("T5", True), ("Gemma 3", False)],
)


def learned(family: str = "GPT-2", tied: bool = True) -> tuple[Any, Any]:
    """A model whose new rows, and entries of the bias, are no longer what they began from."""
    model, words = with_new_tokens(family, tied)
    with torch.no_grad():
        for parameter in {*model.get_input_embeddings().parameters()} | {
            *model.get_output_embeddings().parameters()
        }:
            parameter[NEW_ROWS] += torch.randn_like(parameter[NEW_ROWS])
    return model, words


@WITH_HEADS
def test_a_model_and_its_rows_are_the_whole_model(family: str, tied: bool, tmp_path: Path) -> None:
    model, words = learned(family, tied)
    file = tmp_path / "rows.safetensors"
    save_rows(model, file, words)
    rows_alone = 4 * D * len(NEW) * (1 if tied else 2)
    assert rows_alone < file.stat().st_size < rows_alone + 2500
    plain, old_words = language_model(family, tied), tokenizer()
    written = load_rows(plain, file, old_words)
    assert set(map(tuple, written.values())) == {tuple(NEW_ROWS)}
    assert old_words.convert_tokens_to_ids(NEW) == NEW_ROWS
    with torch.no_grad():
        expected = model(**inputs(words, NEW_TEXT)).logits
        assert_same_bits(plain(**inputs(old_words, NEW_TEXT)).logits, expected, "logits")
    # And once more, onto a model that has the tokens.
    load_rows(plain, file, old_words)
    assert len(old_words) == V + 2


def test_rows_need_no_tokenizer_where_the_sizes_say_enough(tmp_path: Path) -> None:
    model, other = nn.Embedding(9, 3), nn.Embedding(9, 3)
    replace_embedding(model, trainable_rows=[2, 4])
    save_rows(model, tmp_path / "rows.safetensors")
    before = other.weight.detach().clone()
    assert load_rows(other, tmp_path / "rows.safetensors") == {"weight": [2, 4]}
    assert_same_bits(other.weight[[2, 4]], model.weight[[2, 4]], "the rows")
    assert_same_bits(other.weight[[0, 1, 3]], before[[0, 1, 3]], "the others")


def other_words() -> Any:
    words = tokenizer()
    words.add_tokens(["wombat"])
    return words


def same_size_but_other_words(folder: Path) -> tuple[Any, Any]:
    words = tokenizer()
    state = json.loads(words.backend_tokenizer.to_str())
    state["model"]["vocab"] = {
        token.replace("cat", "cow"): row for token, row in state["model"]["vocab"].items()
    }
    from tokenizers import Tokenizer

    changed = Tokenizer.from_str(json.dumps(state))
    return language_model("GPT-2"), transformers.PreTrainedTokenizerFast(
        tokenizer_object=changed, unk_token="[UNK]"
    )


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (lambda f: (language_model("GPT-2"), other_words()), r"'quokkas' has row 17 and not 16"),
        (same_size_but_other_words, r"a tokenizer with other tokens"),
        (lambda f: (language_model("GPT-2"), None), r"had 18 rows.*\(16, 17\).*a model with 16"),
        (lambda f: (language_model("Llama"), tokenizer()), r"LlamaFor.* without 'transformer.wte"),
    ],
    ids=["other_row", "other_tokens", "no_tokenizer", "other_model"],
)
def test_rows_of_another_vocabulary_are_refused(
    other: Callable[[Path], tuple[Any, Any]], message: str, tmp_path: Path
) -> None:
    model, words = learned()
    save_rows(model, tmp_path / "rows.safetensors", words)
    target, its_words = other(tmp_path)
    known = its_words and len(its_words)
    with unchanged(target), pytest.raises(InputError, match=message):
        load_rows(target, tmp_path / "rows.safetensors", its_words)
    assert (its_words and len(its_words)) == known


def test_other_files_are_refused(tmp_path: Path) -> None:
    model, words = learned()
    save_file({"a": torch.zeros(1)}, tmp_path / "other.safetensors")
    (tmp_path / "text.safetensors").write_text("no tensors")
    save_rows(model, tmp_path / "bare.safetensors")
    for name, message in {
        "other": "save_rows wrote",
        "text": "a safetensors file is meant",
        "bare": "a file without tokens",
    }.items():
        with pytest.raises(InputError, match=message):
            load_rows(model, tmp_path / f"{name}.safetensors", words)
    with pytest.raises(InputError, match="all rows train, or none"):
        save_rows(nn.Embedding(3, 3), tmp_path / "rows.safetensors")
    with pytest.raises(InputError, match=r"row 17 and a tokenizer of 16"):
        save_rows(model, tmp_path / "rows.safetensors", tokenizer())
    assert not (tmp_path / "rows.safetensors").exists()


def test_a_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    replace_embedding(model := nn.Embedding(9, 3), trainable_rows=[2])
    path = tmp_path / "no" / "rows.safetensors"
    with pytest.raises(FileNotFoundError) as failed:
        save_rows(model, path)
    assert failed.value.filename == str(path)


def test_rows_of_another_file_are_overwritten_only_when_asked(tmp_path: Path) -> None:
    for name, rows in (("a", [2, 4]), ("b", [4, 6]), ("c", [1])):
        model = nn.Embedding(9, 3)
        replace_embedding(model, trainable_rows=rows)
        save_rows(model, tmp_path / name)
    table = nn.Embedding(9, 3)
    load_rows(table, tmp_path / "a")
    load_rows(table, tmp_path / "a")  # the same rows once more
    load_rows(table, tmp_path / "c")
    before = table.weight.detach().clone()
    with pytest.raises(InputError, match=r"Received \(4\) of 'weight', which another file"):
        load_rows(table, tmp_path / "b")
    assert_same_bits(table.weight, before, "the table")
    assert load_rows(table, tmp_path / "b", overwrite=True) == {"weight": [4, 6]}
    assert_same_bits(table.weight[[1, 2]], before[[1, 2]], "other files' rows")


ROWS = {"0.weight": torch.ones(2, 4), "0.weight:rows": torch.tensor([1, 2])}
SIZES = '{"0.weight": 10}'


@pytest.mark.parametrize(
    ("tensors", "about", "message"),
    [
        ({**ROWS, "0.weight:rows": torch.tensor([-1, 2])}, SIZES, r"\(-1, 2\) are here"),
        ({**ROWS, "0.weight:rows": torch.tensor([1, 10])}, SIZES, r"\(1, 10\) are here"),
        ({**ROWS, "0.weight:rows": torch.tensor([2, 2])}, SIZES, r"has one id.*\(2, 2\)"),
        ({**ROWS, "0.weight:rows": torch.tensor([1, 2, 3])}, SIZES, r"Received 2 rows"),
        ({**ROWS, "0.weight:rows": torch.tensor([1.0, 2.0])}, SIZES, r"torch.float32 ids"),
        (ROWS, '{"0.weight": 10, "1.weight": 10}', r"rows and ids of each table.*'1.weight'"),
        (
            {**ROWS, "1.weight": torch.ones(3, 4), "1.weight:rows": torch.tensor([1, 2])},
            '{"0.weight": 10, "1.weight": 10}',
            r"'1.weight' has one id",
        ),
        (ROWS, "{", r"'num_rows' of them, an object in JSON"),
        (ROWS, None, r"'num_rows' of them, an object in JSON. Received: None"),
        (ROWS, '["0.weight"]', r"'num_rows' of them, an object in JSON"),
        (ROWS, "{}", r"rows and ids of each table, and no more. Received '0.weight'"),
        ({}, "{}", r"rows and ids of each table, and no more. Received nothing"),
        ({**ROWS, "more": torch.ones(1)}, SIZES, r"and no more. Received 'more'"),
        (ROWS, '{"0.weight": "ten"}', r"'num_rows' of them, an object in JSON"),
    ],
)
def test_malformed_files_are_refused_before_anything_is_written(
    tensors: dict[str, Any], about: str | None, message: str, tmp_path: Path
) -> None:
    said = {"format": "partial_embedding rows 1", **({"num_rows": about} if about else {})}
    save_file(tensors, tmp_path / "rows", said)
    model = nn.Sequential(nn.Embedding(10, 4), nn.Linear(4, 10))
    with unchanged(model), pytest.raises(InputError, match=message):
        load_rows(model, tmp_path / "rows")


@pytest.mark.parametrize(
    ("name", "said"),
    [("tokens", '{"x": "quokka"}'), ("tokens", "[]"), ("added", '{"11": 5}'), ("added", None)],
)
def test_files_whose_tokens_are_malformed_are_refused(
    name: str, said: str | None, tmp_path: Path
) -> None:
    model, words = learned("GPT-2")
    save_rows(model, tmp_path / "rows", words)
    with safe_open(tmp_path / "rows", "pt") as file:
        tensors, about = {key: file.get_tensor(key) for key in file.keys()}, file.metadata()  # noqa: SIM118
    about.pop(name)
    save_file(tensors, tmp_path / "rows", {**about, **({name: said} if said else {})})
    plain, other = language_model("GPT-2"), tokenizer()
    with unchanged(plain), pytest.raises(InputError, match=f"{name!r} of them, an object in JSON"):
        load_rows(plain, tmp_path / "rows", other)
    assert len(other) == len(tokenizer())


# PEFT


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("[]", "an object in JSON"),
        ("{", "an object in JSON"),
        (b"\xff\xfe", "an object in JSON"),
        ('{"trainable_token_indices": 5}', "whole numbers. Received 5"),
        ('{"trainable_token_indices": ["a", "b"]}', "whole numbers"),
        ('{"trainable_token_indices": [1.5, 2]}', "whole numbers"),
        ('{"trainable_token_indices": {"lm_head": [1, 2]}}', "whole numbers. Received None"),
        ('{"trainable_token_indices": [1]}', "has one id"),
    ],
)
def test_malformed_adapters_are_refused(config: str | bytes, message: str, tmp_path: Path) -> None:
    written = config if isinstance(config, bytes) else config.encode()
    (tmp_path / "adapter_config.json").write_bytes(written)
    key = "base_model.model.0.token_adapter.trainable_tokens_delta"
    save_file({key: torch.ones(2, 4)}, tmp_path / "adapter_model.safetensors")
    model = nn.Sequential(nn.Embedding(10, 4))
    with unchanged(model), pytest.raises(InputError, match=message):
        import_peft(model, tmp_path)


def test_an_adapter_without_rows_of_a_table_changes_nothing(tmp_path: Path) -> None:
    config = '{"trainable_token_indices": {"0": []}}'
    (tmp_path / "adapter_config.json").write_text(config, encoding="utf-8")
    key = "base_model.model.0.token_adapter.trainable_tokens_delta"
    save_file({key: torch.ones(0, 4)}, tmp_path / "adapter_model.safetensors")
    model = nn.Sequential(nn.Embedding(10, 4))
    with unchanged(model):
        assert import_peft(model, tmp_path) == {"0.weight": []}


@pytest.mark.parametrize("in_lora", [False, True], ids=["trainable_tokens", "lora"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_what_peft_saved_is_imported(tied: bool, in_lora: bool, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    rows = [3, 5]
    config = peft.TrainableTokensConfig(
        token_indices=rows, target_modules=["embed_tokens", *([] if tied else ["lm_head"])]
    )
    if in_lora:
        of_each = {"embed_tokens": rows, **({} if tied else {"lm_head": [4]})}
        config = lora(init_lora_weights=True, trainable_token_indices=of_each)
    model = language_model("Llama", tied)
    adapted = peft.get_peft_model(model, config).eval()
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "trainable_tokens_delta" in name:
                parameter.add_(1)
        expected = adapted(**inputs(tokenizer(), NEW_TEXT)).logits
    adapted.save_pretrained(tmp_path)
    plain = language_model("Llama", tied)
    written = import_peft(plain, tmp_path)
    assert written["model.embed_tokens.weight"] == rows
    with torch.no_grad():
        torch.testing.assert_close(plain(**inputs(tokenizer(), NEW_TEXT)).logits, expected)


def test_both_tables_of_a_tied_model_are_imported_where_they_are_alike(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    config = peft.TrainableTokensConfig(target_modules=["wte", "lm_head"], token_indices=[1, 2])
    adapted = peft.get_peft_model(language_model("GPT-2"), config)
    adapted.save_pretrained(tmp_path)
    written = import_peft(language_model("GPT-2"), tmp_path)
    assert written == {"transformer.wte.weight": [1, 2], "lm_head.weight": [1, 2]}
    with torch.no_grad():
        next(p for n, p in adapted.named_parameters() if "wte.trainable" in n).add_(1)
    adapted.save_pretrained(tmp_path)
    with pytest.raises(InputError, match=r"tables that are tied have the same rows"):
        import_peft(language_model("GPT-2"), tmp_path)


def test_what_peft_has_no_place_for_is_refused(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    with pytest.raises(InputError, match=r"no bias\. Received 'cls.predictions"):
        export_peft(learned("BERT")[0], tmp_path)
    assert not list(tmp_path.iterdir())
    peft.get_peft_model(language_model("Llama"), lora()).save_pretrained(tmp_path)
    with pytest.raises(InputError, match=r"a LORA adapter without"):
        import_peft(language_model("Llama"), tmp_path)
