"""RowUnfreezing in Hugging Face's Trainer, on a tiny random GPT-2."""

from pathlib import Path
from typing import Any

import pytest

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

import torch  # noqa: E402  # after the packages that may be missing
from torch import Tensor  # noqa: E402

from partial_embedding import InputError  # noqa: E402
from partial_embedding.callbacks.transformers import RowUnfreezing  # noqa: E402
from partial_embedding.torch import FrozenRowsMoved, PartialEmbedding  # noqa: E402

SCHEDULE = {"stages": [{"epoch": 0, "rows": [3, 4]}, {"epoch": 2, "rows": {"range": [0, 10]}}]}


def train(
    folder: Path,
    resume: Path | None = None,
    sparse: bool = False,
    callbacks: tuple[Any, ...] = (),
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """Train four epochs; the table before and after."""
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=50, n_positions=16, n_embd=8, n_layer=1, n_head=2, tie_word_embeddings=False
    )
    model = transformers.GPT2LMHeadModel(config)
    table = PartialEmbedding.from_pretrained(
        model.get_input_embeddings().weight.data.clone(), sparse=sparse
    )
    model.set_input_embeddings(table)
    before = table.weight.detach().clone()
    ids = [torch.arange(i, i + 8) % 50 for i in range(32)]
    arguments = transformers.TrainingArguments(
        str(folder),
        num_train_epochs=4,
        per_device_train_batch_size=8,
        weight_decay=0.1,
        learning_rate=1e-2,
        save_strategy="epoch",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        logging_strategy="no",
        **options,
    )
    transformers.Trainer(
        model,
        arguments,
        train_dataset=[{"input_ids": i, "labels": i} for i in ids],
        callbacks=[RowUnfreezing(SCHEDULE, audit=2), *callbacks],
    ).train(resume_from_checkpoint=str(resume) if resume else None)
    return before, table.weight.detach().clone()


def changed(before: Tensor, after: Tensor) -> list[int]:
    differs = before.view(torch.int32) != after.view(torch.int32)
    return differs.any(1).nonzero().flatten().tolist()


def test_only_scheduled_rows_move(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before, after = train(tmp_path)
    assert changed(before, after) == list(range(10))
    printed = capsys.readouterr().out
    assert "stage 0 from epoch 0: 2 rows train" in printed
    assert "stage 1 from epoch 2: 10 rows train" in printed
    assert "audit: transformer.wte: frozen rows by stage: 48, 40; changed a bit: 0" in printed


@pytest.mark.parametrize("epoch", [1, 2, 3])
def test_a_resumed_run_ends_where_the_uninterrupted_one_does(tmp_path: Path, epoch: int) -> None:
    _, after = train(tmp_path)
    _, resumed = train(tmp_path, resume=tmp_path / f"checkpoint-{4 * epoch}")
    assert not changed(after, resumed)


def test_a_sparse_table_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"'transformer\.wte'\. Make it with sparse=False"):
        train(tmp_path, sparse=True)


def test_a_write_into_a_frozen_row_is_found(tmp_path: Path) -> None:
    class Vandal(transformers.TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 5:
                kwargs["model"].get_input_embeddings().weight.data[20, 0] += 1e-3

    with pytest.raises(FrozenRowsMoved, match=r"transformer.wte: 1 frozen row changed.*: 20\."):
        train(tmp_path, callbacks=(Vandal(),))
