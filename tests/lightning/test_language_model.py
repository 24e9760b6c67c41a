"""The language-model recipe: its data, its module, and the command that runs both."""

import contextlib
import io
import re
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("jsonargparse")
transformers = pytest.importorskip("transformers")

import torch  # noqa: E402  # after the packages that may be missing
from pytorch_lightning import Trainer  # noqa: E402
from safetensors.torch import load_file  # noqa: E402

from partial_embedding.cli import main  # noqa: E402
from partial_embedding.errors import InputError  # noqa: E402
from partial_embedding.recipes import causal_model, language_model  # noqa: E402
from partial_embedding.recipes.language_model import NewTokens, TokenTexts  # noqa: E402
from partial_embedding.recipes.small_language_model import small_language_model  # noqa: E402
from partial_embedding.torch.row_files import load_rows  # noqa: E402

CONFIG = Path(__file__).resolve().parents[2] / "configs" / "new_tokens.yaml"

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*dataloader.*does not have many workers",
    "ignore:.*gradient_checkpointing.*",
    "ignore:.*LeafSpec.*",
    "ignore:.*deprecated.*",
)


def few_steps(texts: list[str]) -> tuple[Any, Any]:
    """The small model, trained for a few steps only."""
    return small_language_model(texts, steps=20)


@pytest.fixture
def quickly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(language_model, "small_language_model", few_steps)


def fit(folder: Path, epochs: int, *options: str) -> int:
    root = [f"--trainer.default_root_dir={folder}", f"--trainer.max_epochs={epochs}"]
    quiet = ["--trainer.enable_progress_bar=false", "--model.max_new_tokens=4"]
    return main(["fit", "--config", str(CONFIG), *root, *quiet, *options])


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """The folder of a run of the config, and the lines that it said."""
    folder, said = tmp_path_factory.mktemp("whole"), io.StringIO()
    with pytest.MonkeyPatch.context() as quickly, contextlib.redirect_stdout(said):
        quickly.setattr(language_model, "small_language_model", few_steps)
        assert fit(folder, 2) == 0
    return folder / "version_0", said.getvalue().splitlines()


def lines_of(capsys: pytest.CaptureFixture[str]) -> list[str]:
    return capsys.readouterr().out.splitlines()


def the(lines: list[str], start: str) -> str:
    (line,) = [line for line in lines if line.startswith(start)]
    return line


def loss_with(line: str) -> float:
    return float(line.split("with new tokens ")[1].split(",")[0])


def test_the_config_runs_and_says_what_was_learned(whole: tuple[Path, list[str]]) -> None:
    run, lines = whole
    before, after = the(lines, "before: loss on"), the(lines, "after: loss on")
    assert loss_with(after) < loss_with(before) - 0.02
    for when in ("before", "after"):
        apart = the(lines, f"{when}: logits of 32 texts without new tokens differ")
        assert float(apart.split("by ")[1].split(" ")[0]) < 1e-4
        assert len(re.findall(r" \d\.\d\d", the(lines, f"{when}: near 'archive': "))) == 3
    assert "5 rows train" in the(lines, "model.model.embed_tokens: stage 0")
    assert the(lines, "audit: ").endswith("changed a bit: 0")
    assert Path(the(lines, "rows: ").removeprefix("rows: ")).resolve() == run / "rows.safetensors"
    assert Path(the(lines, "model: ").removeprefix("model: ")).resolve() == run / "model"
    # The rows alone make another copy of the small model the trained one.
    data = TokenTexts(["archive", "iterator", "callable", "cookies", "logger"])
    data.setup("fit")
    model, tokenizer = few_steps(data.without_tokens(data.training))
    written = load_rows(model, run / "rows.safetensors", tokenizer)
    assert tokenizer.convert_tokens_to_ids("archive") in written["model.embed_tokens.weight"]
    saved = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    table = saved["state_dict"]["model.model.embed_tokens.weight"]
    assert torch.equal(model.get_input_embeddings().weight, table)


def test_test_and_predict_need_the_checkpoint_alone(
    whole: tuple[Path, list[str]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run, _ = whole
    # What plain transformers loads says what the checkpoint says.
    model = transformers.AutoModelForCausalLM.from_pretrained(run / "model").eval()
    words = transformers.AutoTokenizer.from_pretrained(run / "model")
    prompt = "the archive is a"
    ids = torch.tensor([words(prompt)["input_ids"]])
    made = model.generate(ids, max_new_tokens=4, do_sample=False)[0, ids.shape[1] :]
    checkpoint = ["--ckpt_path", str(run / "checkpoints" / "last.ckpt")]
    checkpoint += [f"--trainer.default_root_dir={tmp_path}", "--trainer.enable_progress_bar=false"]
    (tmp_path / "texts.txt").write_text("an archive\nthe callable iterator\n", encoding="utf-8")
    monkeypatch.setattr(language_model, "small_language_model", None)
    assert main(["predict", *checkpoint, "--text", prompt]) == 0
    continuation = words.decode(made, skip_special_tokens=True)
    assert f"{prompt},{continuation}" in lines_of(capsys)
    texts = ["--data.test_path", str(tmp_path / "texts.txt")]
    assert main(["test", *checkpoint, *texts]) == 0
    assert "test_loss" in capsys.readouterr().out
    assert main(["predict", *checkpoint, *texts]) == 0
    rows = (tmp_path / "predictions.csv").read_text(encoding="utf-8").splitlines()
    assert rows[0] == "text,continuation"
    assert [row.partition(",")[0] for row in rows[1:]] == ["an archive", "the callable iterator"]


@pytest.mark.usefixtures("quickly")
def test_a_resumed_run_ends_where_the_uninterrupted_one_does(
    whole: tuple[Path, list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert fit(tmp_path, 1) == fit(tmp_path, 2, "--ckpt_path=last") == 0
    rows, again = (
        load_file(run / "rows.safetensors") for run in (whole[0], tmp_path / "version_0")
    )
    assert rows.keys() == again.keys()
    for key, value in rows.items():
        assert torch.equal(value, again[key]), key
    capsys.readouterr()
    assert fit(tmp_path, 3, "--ckpt_path=last", "--data.tokens=[iterable]") == 2
    assert "a checkpoint belongs to the tokens" in capsys.readouterr().err


def test_a_model_of_ones_own_and_files_of_texts_and_tokens(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = ["the cat sat on a mat", "a dog ran", "the quokka sat", "a quokka ran on the mat"] * 4
    model, tokenizer = small_language_model(texts[:2], steps=1)
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    numbered = [f"{text} {i}" for i, text in enumerate(texts)]
    (tmp_path / "texts.txt").write_text("\n".join(numbered), encoding="utf-8")
    (tmp_path / "tokens.txt").write_text("quokka\n", encoding="utf-8")
    capsys.readouterr()
    arguments = {
        "model": "partial_embedding.recipes.language_model.NewTokens",
        "data": "partial_embedding.recipes.language_model.TokenTexts",
        "model.name": tmp_path / "model",
        "data.path": tmp_path / "texts.txt",
        "data.tokens": tmp_path / "tokens.txt",
        "trainer.default_root_dir": tmp_path / "runs",
        "trainer.max_epochs": 1,
        "trainer.enable_progress_bar": "false",
    }
    assert main(["fit", *(f"--{key}={value}" for key, value in arguments.items())]) == 0
    lines = lines_of(capsys)
    assert "1 rows train" in the(lines, "model.model.embed_tokens: stage 0")
    assert (tmp_path / "runs" / "version_0" / "rows.safetensors").is_file()


@pytest.mark.usefixtures("quickly")
def test_the_small_model_has_not_read_the_new_tokens(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = tmp_path / "texts.txt"
    texts.write_text("\n".join(f"the Quokka ate {i}" for i in range(40)), encoding="utf-8")
    assert fit(tmp_path, 1, f"--data.path={texts}", "--data.tokens=[quokka]") == 0
    assert "1 rows train" in the(lines_of(capsys), "model.model.embed_tokens: stage 0")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--model.name", "no/such/model"], "a model is a name on the Hugging Face hub"),
        (["--data.tokens", "missing.txt"], "Received: missing.txt, which is missing"),
        (["--data.tokens", "['[PAD]']"], "not in the vocabulary. Received '[PAD]'"),
        (["--data.tokens", "['zyzzyva']"], "Received none with any of zyzzyva"),
    ],
)
@pytest.mark.usefixtures("quickly")
def test_bad_input_is_one_line(
    options: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert fit(tmp_path, 1, *options) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert message in line


def test_module_and_data_belong_together() -> None:
    with pytest.raises(InputError, match=r"takes its texts from TokenTexts"):
        Trainer(logger=False, enable_checkpointing=False, accelerator="cpu").fit(
            NewTokens(), [torch.zeros(1)]
        )
    data = TokenTexts(["archive"])
    data.given_texts = ["a prompt"]
    with pytest.raises(InputError, match=r"a language model. Received NoneType"):
        data.predict_dataloader()
    with pytest.raises(InputError, match=r"another kind for a language model"):
        NewTokens().on_load_checkpoint({"state_dict": {}})


def test_without_transformers_one_line_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    for module in (language_model, causal_model):
        monkeypatch.delitem(sys.modules, module.__name__)
    assert main(["fit", "--config", str(CONFIG)]) == 2
    assert "Install partial-embedding[transformers]" in capsys.readouterr().err
