"""The language-model recipe: its data, its module, and the command that runs both."""

import re
import sys
from functools import partial
from pathlib import Path

import pytest

pytest.importorskip("pytorch_lightning")
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


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A model of one's own, and texts with words that it has no tokens for, as options."""
    folder = tmp_path_factory.mktemp("own")
    model, tokenizer = small_language_model(["the quick brown fox", "jumps over a lazy dog"], 1)
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    words = ("python", "mailbox", "keyword", "iterator", "archive", "dog")
    texts = [f"the {word} jumps over {i} lazy foxes" for word in words for i in range(8)]
    (folder / "texts.txt").write_text("\n".join(texts), encoding="utf-8")
    return [f"--model.name={folder / 'model'}", f"--data.path={folder / 'texts.txt'}"]


def lines_of(capsys: pytest.CaptureFixture[str]) -> list[str]:
    return capsys.readouterr().out.splitlines()


def the(lines: list[str], start: str) -> str:
    (line,) = [line for line in lines if line.startswith(start)]
    return line


def loss_with(line: str) -> float:
    return float(line.split("with new tokens ")[1].split(",")[0])


def test_the_config_runs_and_says_what_was_learned(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    small = partial(small_language_model, steps=20)
    monkeypatch.setattr(language_model, "small_language_model", small)
    options = ["--trainer.default_root_dir", str(tmp_path), "--trainer.max_epochs", "2"]
    options += ["--trainer.enable_progress_bar", "false"]
    assert main(["fit", "--config", str(CONFIG), *options]) == 0
    lines = lines_of(capsys)
    before, after = the(lines, "before: loss on"), the(lines, "after: loss on")
    assert loss_with(after) < loss_with(before) - 0.02
    for when in ("before", "after"):
        apart = the(lines, f"{when}: logits of 32 texts without new tokens differ")
        assert float(apart.split("by ")[1].split(" ")[0]) < 1e-4
        assert len(re.findall(r" \d\.\d\d", the(lines, f"{when}: near 'mailbox': "))) == 3
    assert "5 rows train" in the(lines, "model.model.embed_tokens: stage 0")
    assert the(lines, "audit: ").endswith("changed a bit: 0")
    # The rows alone make another copy of the small model the trained one.
    rows = Path(the(lines, "rows: ").removeprefix("rows: "))
    rows = rows if rows.is_absolute() else Path.cwd() / rows
    data = TokenTexts(["python"])
    data.setup("fit")
    model, tokenizer = small(data.training)
    written = load_rows(model, rows, tokenizer)
    assert tokenizer.convert_tokens_to_ids("mailbox") in written["model.embed_tokens.weight"]
    saved = torch.load(rows.parent / "checkpoints" / "last.ckpt", weights_only=True)
    table = saved["state_dict"]["model.model.embed_tokens.weight"]
    assert torch.equal(model.get_input_embeddings().weight, table)


def test_test_and_predict_need_the_checkpoint_alone(
    own: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    options = ["--trainer.default_root_dir", str(tmp_path), "--trainer.max_epochs", "1"]
    options += ["--trainer.enable_progress_bar", "false", "--model.max_new_tokens", "4"]
    assert main(["fit", "--config", str(CONFIG), *own, *options]) == 0
    run = Path(the(lines_of(capsys), "model: ").removeprefix("model: ")).resolve().parent
    # What plain transformers loads says what the checkpoint says.
    model = transformers.AutoModelForCausalLM.from_pretrained(run / "model").eval()
    words = transformers.AutoTokenizer.from_pretrained(run / "model")
    prompt = "the mailbox is a"
    ids = torch.tensor([words(prompt)["input_ids"]])
    made = model.generate(ids, max_new_tokens=4, do_sample=False)[0, ids.shape[1] :]
    checkpoint = ["--ckpt_path", str(run / "checkpoints" / "last.ckpt")]
    quiet = ["--trainer.default_root_dir", str(tmp_path / "again")]
    quiet += ["--trainer.enable_progress_bar", "false"]
    (tmp_path / "texts.txt").write_text("a mailbox\nthe python iterator\n", encoding="utf-8")
    monkeypatch.setattr(language_model, "pretrained", None)
    assert main(["predict", *checkpoint, *quiet, "--text", prompt]) == 0
    continuation = words.decode(made, skip_special_tokens=True)
    assert f"{prompt},{continuation}" in capsys.readouterr().out.splitlines()
    texts = ["--data.test_path", str(tmp_path / "texts.txt")]
    assert main(["test", *checkpoint, *quiet, *texts]) == 0
    assert "test_loss" in capsys.readouterr().out
    assert main(["predict", *checkpoint, *quiet, *texts]) == 0
    rows = (tmp_path / "again" / "predictions.csv").read_text(encoding="utf-8").splitlines()
    assert rows[0] == "text,continuation"
    assert [row.partition(",")[0] for row in rows[1:]] == ["a mailbox", "the python iterator"]


def test_a_resumed_run_ends_where_the_uninterrupted_one_does(
    own: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def fit(folder: str, epochs: int, *options: str) -> int:
        root = [f"--trainer.default_root_dir={tmp_path / folder}", f"--trainer.max_epochs={epochs}"]
        quiet = "--trainer.enable_progress_bar=false"
        return main(["fit", "--config", str(CONFIG), *own, *root, quiet, *options])

    assert fit("whole", 2) == fit("parts", 1) == fit("parts", 2, "--ckpt_path=last") == 0
    whole, parts = (
        load_file(tmp_path / folder / "version_0" / "rows.safetensors")
        for folder in ("whole", "parts")
    )
    assert whole.keys() == parts.keys()
    for key, value in whole.items():
        assert torch.equal(value, parts[key]), key
    capsys.readouterr()
    assert fit("parts", 3, "--ckpt_path=last", "--data.tokens=[keyword]") == 2
    assert "a checkpoint belongs to the tokens" in capsys.readouterr().err


def test_a_model_of_ones_own_and_files_of_texts_and_tokens(
    own: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "tokens.txt").write_text("archive\n", encoding="utf-8")
    arguments = {
        "model": "partial_embedding.recipes.language_model.NewTokens",
        "data": "partial_embedding.recipes.language_model.TokenTexts",
        "data.tokens": tmp_path / "tokens.txt",
        "trainer.default_root_dir": tmp_path / "runs",
        "trainer.max_epochs": 1,
        "trainer.enable_progress_bar": "false",
    }
    assert main(["fit", *(f"--{key}={value}" for key, value in arguments.items()), *own]) == 0
    lines = lines_of(capsys)
    assert "1 rows train" in the(lines, "model.model.embed_tokens: stage 0")
    assert (tmp_path / "runs" / "version_0" / "rows.safetensors").is_file()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--model.name", "no/such/model"], "a model is a name on the Hugging Face hub"),
        (["--data.tokens", "missing.txt"], "Received: missing.txt, which is missing"),
        (["--data.tokens", "['the']"], "not in the vocabulary. Received 'the'"),
        (["--data.tokens", "['zyzzyva']"], "Received none with any of zyzzyva"),
    ],
)
def test_bad_input_is_one_line(
    options: list[str],
    message: str,
    own: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    root = ["--trainer.default_root_dir", str(tmp_path)]
    assert main(["fit", "--config", str(CONFIG), *own, *root, *options]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert message in line


def test_module_and_data_belong_together() -> None:
    with pytest.raises(InputError, match=r"takes its texts from TokenTexts"):
        Trainer(logger=False, enable_checkpointing=False, accelerator="cpu").fit(
            NewTokens(), [torch.zeros(1)]
        )


def test_without_transformers_one_line_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    for module in (language_model, causal_model):
        monkeypatch.delitem(sys.modules, module.__name__)
    assert main(["fit", "--config", str(CONFIG)]) == 2
    assert "Install partial-embedding[transformers]" in capsys.readouterr().err
