"""New tokens in many architectures of `transformers`, in its Trainer as it comes."""

import copy
from pathlib import Path

import pytest
import torch
import transformers
from oracle import assert_same_bits, rows_that_differ
from tiny_language_models import (
    ARCHITECTURES,
    COMPOSITE,
    FAMILIES,
    NEW,
    NEW_ROWS,
    V,
    batch,
    language_model,
    of_tables,
    tokenizer,
    training_arguments,
)

from partial_embedding.torch import PartialLinear, add_tokens, restore_embedding
from partial_embedding.torch.table import PartialTable

STEPS = 5


# Which differ in how they are tied; of the others one of both ways is left to the full run.
BOTH_WAYS = (*FAMILIES, *COMPOSITE)


@pytest.mark.parametrize(
    ("architecture", "tied"),
    [
        pytest.param(architecture, tied, marks=[pytest.mark.full] * (not both and i % 2 == tied))
        for i, architecture in enumerate(ARCHITECTURES)
        for both in [architecture in BOTH_WAYS]
        for tied in (True, False)
    ],
)
def test_the_new_rows_alone_move_and_the_saved_model_is_a_plain_one(
    architecture: str, tied: bool, tmp_path: Path
) -> None:
    model, words = language_model(architecture, tied), tokenizer()
    sizes = {name: len(value) for name, value in model.state_dict().items() if value.dim()}
    assert add_tokens(model, words, NEW) == NEW_ROWS
    # Every parameter that grew is a table's, or has nothing that could learn.
    tables, before = of_tables(model), copy.deepcopy(model.state_dict())
    given = batch(architecture, words)
    example = {name: value[0] for name, value in given.items()}
    arguments = training_arguments(
        tmp_path / "trainer",
        max_steps=STEPS,
        per_device_train_batch_size=1,
        learning_rate=0.01,
        weight_decay=0.1,
        max_grad_norm=1.0,
    )
    transformers.Trainer(model, arguments, train_dataset=[example] * STEPS).train()
    learned = set()
    for name, parameter in model.named_parameters():
        moved = rows_that_differ(before[name], parameter)
        if id(parameter) in tables:
            assert set(moved) <= set(NEW_ROWS), name
            learned |= {id(parameter)} if moved == NEW_ROWS else set()
        elif name in sizes and len(parameter) != sizes[name]:
            assert not moved, name
    # Untied, BART's encoder and decoder have tables of their own, and `shared` is read by none.
    used = [model.get_input_embeddings(), model.get_output_embeddings(), *model.modules()]
    found = [m for one in used for m in one.modules() if isinstance(m, PartialTable)]
    heads = [table for table in found if isinstance(table, PartialLinear)]
    assert {id(table.weight) for table in heads} <= learned
    assert {id(table.weight) for table in found if table not in heads} & learned

    model.eval()
    restore_embedding(model)
    model.save_pretrained(tmp_path / "model")
    loaded = type(model).from_pretrained(tmp_path / "model").eval()
    assert not of_tables(loaded)
    with torch.no_grad():
        logits = model(**given).logits
        assert_same_bits(loaded(**given).logits, logits, "logits")
    assert logits.shape[-1] == V + 2
