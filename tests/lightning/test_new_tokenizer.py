"""The recipe that moves a language model to another tokenizer."""

from pathlib import Path

import pytest

pytest.importorskip("jsonargparse")
transformers = pytest.importorskip("transformers")

import torch  # noqa: E402  # after the packages that may be missing
from pytorch_lightning import Trainer  # noqa: E402

from partial_embedding.cli import main  # noqa: E402
from partial_embedding.errors import InputError  # noqa: E402
from partial_embedding.recipes.new_tokenizer import (  # noqa: E402
    FieldTexts,
    NewTokenizer,
    stdlib_code,
)

CONFIG = Path(__file__).resolve().parents[2] / "configs" / "new_tokenizer.yaml"
WHEN = ("before", "after the initialisation", "after the first stage", "at the end")

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*dataloader.*does not have many workers",
    "ignore:.*gradient_checkpointing.*",
    "ignore:.*LeafSpec.*",
    "ignore:.*deprecated.*",
)


def test_the_config_runs_and_its_checkpoint_is_enough(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "code.txt").write_text("\n".join(stdlib_code()[:300]), encoding="utf-8")
    options = {
        "trainer.default_root_dir": tmp_path,
        "trainer.enable_progress_bar": "false",
        "model.steps": 3,
        "model.num_tokens": 300,
        "model.max_new_tokens": 3,
        "data.path": tmp_path / "code.txt",
    }
    given = [f"--{name}={value}" for name, value in options.items()]
    assert main(["fit", "--config", str(CONFIG), *given]) == 0
    lines = capsys.readouterr().out.splitlines()
    losses = {
        when: float(line.rsplit(" ", 1)[1])
        for when in WHEN
        for line in lines
        if line.startswith(f"{when}: loss per byte")
    }
    assert tuple(losses) == WHEN
    assert losses["at the end"] < losses["after the first stage"]
    assert losses["after the first stage"] < losses["after the initialisation"]
    (audit,) = [line for line in lines if line.startswith("audit: ")]
    assert audit.endswith("changed a bit: 0")

    (folder,) = tmp_path.glob("version_*")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder / "model")
    saved = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    assert torch.equal(model.get_input_embeddings().weight, saved["model.lm_head.weight"])
    checkpoint = [f"--ckpt_path={folder / 'checkpoints' / 'last.ckpt'}", *given[:2]]
    assert main(["predict", *checkpoint, "--text", "for name in names"]) == 0
    assert "\nfor name in names," in capsys.readouterr().out
    assert main(["test", *checkpoint]) == 0
    assert "test_loss" in capsys.readouterr().out


def test_bytes_are_those_that_tokens_after_the_first_stand_for() -> None:
    module = NewTokenizer()
    from partial_embedding.recipes.small_language_model import small_tokenizer

    module.tokenizer = small_tokenizer(["the cat sat", "the dog sat"])
    assert module.tokenizer.tokenize("the cät")[0] == "the"
    assert module._bytes("the cät") == len(" cät".encode())
    assert module._bytes("") == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, r"batch_size is at least 1"),
        ({"validation_share": 1.0}, r"lies in \(0, 1\)"),
    ],
)
def test_bad_options_are_refused(options: dict[str, float], message: str) -> None:
    with pytest.raises(InputError, match=message):
        FieldTexts(**options)


def test_module_and_data_belong_together() -> None:
    with pytest.raises(InputError, match=r"takes its texts from FieldTexts"):
        Trainer(logger=False, enable_checkpointing=False, accelerator="cpu").fit(
            NewTokenizer(), [torch.zeros(1)]
        )
