"""What is no model, and what is neither true nor false, is refused wherever it is taken."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from partial_embedding.errors import InputError
from partial_embedding.torch import (
    PartialEmbedding,
    PartialEmbeddingBag,
    PartialLinear,
    grow_table,
    replace_embedding,
    restore_embedding,
    rowwise,
    split_rows,
)
from partial_embedding.torch.row_files import export_peft, import_peft, load_rows, save_rows


def model_of() -> Any:
    return nn.Sequential(PartialEmbedding(4, 2, trainable_rows=[1]))


def prepared(model: Any = None, lazy: Any = False) -> None:
    own = model_of()
    rowwise(torch.optim.SGD(own.parameters(), 0.1), model, lazy=lazy)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    save_rows(model_of(), tmp_path / "rows")
    export_peft(model_of(), tmp_path)
    return tmp_path


TAKES_A_MODEL: dict[str, Callable[[Any, Path], object]] = {
    "replace_embedding": lambda model, _: replace_embedding(model, trainable_rows=[1]),
    "restore_embedding": lambda model, _: restore_embedding(model),
    "grow_table": lambda model, _: grow_table(model, None, 1),
    "rowwise": lambda model, _: prepared(model),
    "save_rows": lambda model, folder: save_rows(model, folder / "other"),
    "load_rows": lambda model, folder: load_rows(model, folder / "rows"),
    "export_peft": lambda model, folder: export_peft(model, folder / "other"),
    "import_peft": lambda model, folder: import_peft(model, folder),
}


@pytest.mark.parametrize("call", TAKES_A_MODEL.values(), ids=TAKES_A_MODEL)
def test_what_is_no_model_is_refused(call: Callable[[Any, Path], object], saved: Path) -> None:
    for kind, wrong in (("str", "model"), ("Parameter", nn.Parameter(torch.ones(2, 2)))):
        with pytest.raises(InputError, match=f"a torch.nn.Module. Received a {kind}. Pass"):
            call(wrong, saved)
    assert not (saved / "other").exists()
    call(model_of(), saved)


def test_rows_of_what_is_no_table_are_not_split() -> None:
    with pytest.raises(InputError, match="Received 0 dimensions and a NoneType"):
        split_rows(None, None)  # type: ignore[arg-type]


TAKES_A_FLAG: dict[str, tuple[str, Callable[[Any, Path], object]]] = {
    "PartialEmbedding": ("sparse", lambda flag, _: PartialEmbedding(4, 2, sparse=flag)),
    "PartialEmbeddingBag": ("sparse", lambda flag, _: PartialEmbeddingBag(4, 2, sparse=flag)),
    "PartialLinear": ("sparse", lambda flag, _: PartialLinear(2, 4, sparse=flag)),
    "replace_embedding": (
        "sparse",
        lambda flag, _: replace_embedding(nn.Sequential(nn.Embedding(4, 2)), sparse=flag),
    ),
    "rowwise": ("lazy", lambda flag, _: prepared(lazy=flag)),
    "grow_table": ("trainable", lambda flag, _: grow_table(model_of(), "0", 1, trainable=flag)),
    "load_rows": (
        "overwrite",
        lambda flag, folder: load_rows(model_of(), folder / "rows", overwrite=flag),
    ),
    "import_peft": (
        "overwrite",
        lambda flag, folder: import_peft(model_of(), folder, overwrite=flag),
    ),
}


@pytest.mark.parametrize(("name", "call"), TAKES_A_FLAG.values(), ids=TAKES_A_FLAG)
def test_a_word_is_not_taken_for_true(
    name: str, call: Callable[[Any, Path], object], saved: Path
) -> None:
    for wrong in ("no", 1, None):
        with pytest.raises(InputError, match=f"^{name} is True or False. Received: {wrong!r}."):
            call(wrong, saved)
    for flag in (True, False):
        call(flag, saved)


def test_a_table_grows_by_a_number_of_numpy() -> None:
    model = model_of()
    assert grow_table(model, "0", np.int64(2)) == [4, 5]  # type: ignore[arg-type]  # a number
    with pytest.raises(InputError, match="from 1 up"):
        grow_table(model, "0", np.bool_(True))  # type: ignore[arg-type]
