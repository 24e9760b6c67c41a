"""Checkpoints of Hugging Face's Trainer that hold the rows that trained."""

from pathlib import Path
from typing import Any

import pytest

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

import torch  # noqa: E402  # after the packages that may be missing
from safetensors.torch import load_file  # noqa: E402
from tiny_language_models import training_arguments  # noqa: E402

from partial_embedding import InputError  # noqa: E402
from partial_embedding.callbacks.transformers import RowUnfreezing  # noqa: E402
from partial_embedding.torch import replace_embedding  # noqa: E402

SCHEDULE = {"stages": [{"epoch": 0, "rows": [3, 4]}, {"epoch": 2, "rows": {"range": [0, 10]}}]}


def model_of(tied: bool, seed: int = 0) -> Any:
    torch.manual_seed(seed)
    config = transformers.GPT2Config(
        vocab_size=50, n_positions=16, n_embd=8, n_layer=1, n_head=2, tie_word_embeddings=tied
    )
    model = transformers.GPT2LMHeadModel(config)
    replace_embedding(model, trainable_rows="none", sparse=False)
    return model


def train(
    folder: Path, tied: bool, resume: Path | None = None, seed: int = 0, **options: Any
) -> Any:
    model = model_of(tied, seed)
    ids = [torch.arange(i, i + 8) % 50 for i in range(32)]
    given: dict[str, Any] = {
        "num_train_epochs": 4,
        "per_device_train_batch_size": 8,
        "learning_rate": 1e-2,
        "save_strategy": "epoch",
        **options,
    }
    examples = [{"input_ids": i, "labels": i} for i in ids]
    transformers.Trainer(
        model,
        training_arguments(folder, **given),
        train_dataset=examples,
        eval_dataset=examples[:8],
        callbacks=[RowUnfreezing(SCHEDULE, checkpoint="rows")],
    ).train(resume_from_checkpoint=str(resume) if resume else None)
    return model


@pytest.mark.parametrize("tied", [False, True], ids=["own_head", "tied_head"])
@pytest.mark.parametrize("epoch", [1, 3])
def test_a_resumed_run_ends_where_the_whole_one_does(
    epoch: int, tied: bool, tmp_path: Path
) -> None:
    whole = train(tmp_path / "whole", tied)
    place = tmp_path / "whole" / f"checkpoint-{4 * epoch}"
    saved = load_file(place / "model.safetensors")
    assert saved["transformer.wte.weight.ids"].tolist() == ([3, 4] if epoch < 3 else [*range(10)])
    assert "transformer.wte.weight" not in saved
    again = train(tmp_path / "again", tied, resume=place)
    for key, value in whole.state_dict().items():
        assert torch.equal(value, again.state_dict()[key]), key


def test_another_base_is_refused(tmp_path: Path) -> None:
    train(tmp_path / "whole", tied=False)
    with pytest.raises(InputError, match=r"'transformer\.wte\.weight'.*same vectors"):
        train(tmp_path / "again", False, tmp_path / "whole" / "checkpoint-8", seed=1)


def test_the_best_model_is_loaded_at_the_end_and_saved_whole(tmp_path: Path) -> None:
    model = train(
        tmp_path,
        tied=False,
        eval_strategy="epoch",
        load_best_model_at_end=True,
        metric_for_best_model="loss",
        greater_is_better=True,  # the first one is the best
    )
    weight = model.transformer.wte.weight.detach()
    assert torch.equal(weight[5:10], model_of(False).transformer.wte.weight[5:10])
    assert not torch.equal(weight[3:5], model_of(False).transformer.wte.weight[3:5])
    assert "transformer.wte.weight" in model.state_dict()
