"""TextData and TextClassifier: what they make of texts, vectors and checkpoints."""

from pathlib import Path
from typing import Any

import pytest
import torch
from gensim.models import KeyedVectors
from pytorch_lightning import Callback, Trainer

from partial_embedding.callbacks.lightning import RowUnfreezing
from partial_embedding.errors import InputError
from partial_embedding.recipes.text_classifier import TextClassifier, TextData


@pytest.fixture
def data(small_run: list[str]) -> TextData:
    made = TextData(path="texts.csv", vectors="vectors.txt", batch_size=8)
    made.setup("fit")
    return made


def trainer(*callbacks: Callback, **options: Any) -> Trainer:
    rows = RowUnfreezing({"stages": [{"epoch": 0, "rows": "all"}]})
    return Trainer(
        accelerator="cpu",
        max_epochs=1,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[rows, *callbacks],
        **{"enable_checkpointing": False, **options},
    )


def test_the_table_has_the_vectors_of_the_file_and_the_others_are_missing(data: TextData) -> None:
    assert data.table.shape == (len(data.vocabulary), 6)
    assert data.vocabulary.tokens[:2] == ("<pad>", "<unk>")
    assert not data.table[0].any()
    vectors = KeyedVectors.load_word2vec_format("vectors.txt", no_header=True)
    missing = data.vocabulary.missing
    assert missing is not None
    assert {data.vocabulary.tokens[i] for i in missing} == {
        "<unk>", "bright", "love", "funny", "lively", "dull", "hate", "tedious", "hollow"
    }  # fmt: skip
    for token, row in data.vocabulary.index.items():
        if token in vectors:
            assert data.table[row].tolist() == vectors[token].tolist()


def test_every_text_is_either_trained_on_or_validated_once(data: TextData) -> None:
    sides = [data.train_dataloader(), data.val_dataloader()]
    sizes = [sum(len(labels) for _, labels in side) for side in sides]
    assert sum(sizes) == 60
    assert min(sizes) > 0
    for ids, labels in sides[0]:
        assert ids.dtype == labels.dtype == torch.int64
        assert ids.shape[0] == labels.shape[0] <= 8
        assert ids.max() < len(data.vocabulary)


def test_trained_vectors_are_kept_in_the_users_cache_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    first, second = TextData(dimension=4), TextData(dimension=4)
    first.setup("fit")
    (kept,) = (tmp_path / "partial_embedding").iterdir()
    written = kept.stat().st_mtime_ns
    second.setup("fit")
    assert kept.stat().st_mtime_ns == written
    assert (first.table == second.table).all()


def test_texts_to_test_come_from_their_own_file(small_run: list[str]) -> None:
    Path("test.csv").write_text("text,label\na joy,pos\na bore,neg\nunseen words,neg\n")
    data = TextData(path="texts.csv", vectors="vectors.txt", test_path="test.csv")
    data.setup("fit")
    ((ids, labels),) = data.test_dataloader()
    assert labels.tolist() == [1, 0, 0]
    assert ids[2].tolist() == [1, 1, 0, 0, 0]
    (_,) = data.predict_dataloader()
    assert data.given_texts == ["a joy", "a bore", "unseen words"]


@pytest.mark.parametrize("encoder", ["cnn", "mean"])
def test_scores_of_a_text_do_not_depend_on_the_others_in_its_batch(
    encoder: Any, data: TextData
) -> None:
    model = TextClassifier(encoder=encoder, channels=4)
    trainer(max_steps=1).fit(model, data)
    model.eval()
    with torch.no_grad():
        short = torch.tensor([[5, 6, 7, 0, 0]])
        long = torch.tensor([[5, 6, 7, *[0] * 17], list(range(2, 22))])
        torch.testing.assert_close(model(short)[0], model(long)[0])


def test_the_padding_row_stays_zero_when_all_rows_train(data: TextData) -> None:
    model = TextClassifier(encoder="mean")
    before = torch.from_numpy(data.table.copy())
    trainer().fit(model, data)
    assert not model.embedding.weight[0].any()
    assert not torch.equal(model.embedding.weight[2:], before[2:])


def test_data_without_a_model_or_before_they_are_set_up_are_refused() -> None:
    for sides, said in (("train", "set up first"), ("test", "a model that was trained")):
        with pytest.raises(InputError, match=said):
            getattr(TextData(), f"{sides}_dataloader")()


def test_a_model_without_its_data_is_refused() -> None:
    with pytest.raises(InputError, match="takes its table from TextData"):
        trainer().fit(TextClassifier())


def test_a_checkpoint_of_something_else_is_refused(data: TextData) -> None:
    with pytest.raises(InputError, match=r"its vocabulary\. Received one without"):
        TextClassifier().on_load_checkpoint({"state_dict": {}})


@pytest.mark.parametrize("suffix", ["vec", "txt.gz", "bin"])
def test_vectors_are_exported_in_formats_that_gensim_reads(
    suffix: Any, data: TextData, tmp_path: Path
) -> None:
    model = TextClassifier(encoder="mean", export=suffix)
    trainer(default_root_dir=tmp_path / "run").fit(model, data)
    path = tmp_path / "run" / f"vectors.{suffix}"
    read = KeyedVectors.load_word2vec_format(str(path), binary="bin" in suffix)
    assert read.index_to_key == list(data.vocabulary.tokens)
    assert torch.equal(torch.from_numpy(read.vectors.copy()), model.embedding.weight.detach())
