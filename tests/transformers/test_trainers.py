"""New tokens in the trainers that people use, as they come."""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from oracle import assert_alike, assert_same_bits, rows_that_differ, same_bits
from tiny_language_models import (
    NEW,
    NEW_ROWS,
    NEW_TEXT,
    QUIET,
    TIED,
    inputs,
    language_model,
    lora,
    tokenizer,
    training_arguments,
    with_new_tokens,
)
from torch import Tensor, nn
from torch.utils.data import DataLoader

from partial_embedding.torch import add_tokens, masked_gradient_only
from partial_embedding.torch.row_gradient import RowGradient
from partial_embedding.torch.table import PartialTable, tables_in

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*gradient_checkpointing.*:FutureWarning",
    "ignore:.*tied layer.*",
    "ignore:.*pin_memory.*",
)
ORDERS = ("no_lora", "lora_first", "tokens_first")
SHORT: dict[str, Any] = {
    **QUIET,
    "learning_rate": 0.02,
    "weight_decay": 0.1,
    "max_steps": 4,
    "per_device_train_batch_size": 2,
    "bf16": False,
}


def begun_lora() -> Any:
    """LoRA that changes nothing yet: TRL takes it for its reference."""
    return lora(init_lora_weights=True)


def made(tied: bool, order: str) -> tuple[Any, Any, dict[str, Tensor]]:
    """A model with new tokens, its tokenizer, and what there was before it trained."""
    model, words = language_model("Llama", tied), tokenizer()
    torch.manual_seed(1)
    if order == "lora_first":
        model = peft.get_peft_model(model, begun_lora())
    add_tokens(model, words, NEW)
    base = model.get_base_model() if order == "lora_first" else model
    before = {name: value.clone() for name, value in base.state_dict().items()}
    if order == "tokens_first":
        model = peft.get_peft_model(model, begun_lora())
    return model, words, before


class Gradients(transformers.TrainerCallback):  # type: ignore[misc,name-defined]
    """Keeps what kinds of gradients tables have when they are about to be stepped."""

    def __init__(self) -> None:
        self.kinds: dict[str, set[type]] = {}

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        for name, table in tables_in(given["model"]):
            self.kinds.setdefault(name, set()).add(type(table.weight.grad))

    def check(self, tied: bool) -> None:
        """Fail if there was one as large as a table."""
        assert len(self.kinds) == (1 if tied else 2)
        assert all(kinds == {RowGradient} for kinds in self.kinds.values())


def examples(words: Any, count: int = 8) -> list[dict[str, Tensor]]:
    batch = {name: value[0] for name, value in inputs(words, NEW_TEXT).items()}
    return [batch] * count


def assert_new_rows_learned(model: nn.Module, before: dict[str, Tensor]) -> None:
    """Fail unless of the tables exactly the new rows moved."""
    seen = 0
    tables = [module for module in model.modules() if isinstance(module, PartialTable)]
    weights = {id(table.weight) for table in tables}
    for name, parameter in model.named_parameters():
        if id(parameter) in weights:
            plain = name.removeprefix("base_model.model.")
            assert rows_that_differ(before[plain], parameter) == NEW_ROWS, name
            seen += 1
    assert seen


OPTIONS: dict[str, dict[str, Any]] = {
    "as_it_comes": {},
    "accumulation": {"gradient_accumulation_steps": 2},
    "bf16": {"bf16": True},
    "gradient_checkpointing": {"gradient_checkpointing": True},
    "adafactor": {"optim": "adafactor"},
    "sgd": {"optim": "sgd"},
    "no_clipping": {"max_grad_norm": 0.0},
}


@pytest.mark.parametrize(
    ("options", "order", "tied"),
    [
        # Each option with each order, and none with all of both; the rest in the full run.
        pytest.param(options, order, tied, marks=[pytest.mark.full] * (i and (i + j + tied) % 2))
        for i, options in enumerate(OPTIONS)
        for j, order in enumerate(ORDERS)
        for tied in (True, False)
    ],
)
def test_the_trainer_of_transformers(options: str, order: str, tied: bool, tmp_path: Path) -> None:
    model, words, before = made(tied, order)
    seen = Gradients()
    arguments = training_arguments(tmp_path, **{**SHORT, **OPTIONS[options]})
    transformers.Trainer(model, arguments, train_dataset=examples(words), callbacks=[seen]).train()
    assert_new_rows_learned(model, before)
    seen.check(tied)


def test_a_masked_gradient_alone_would_let_other_rows_move(tmp_path: Path) -> None:
    # What the test above would miss if the trainer's weight decay did nothing.
    model, words = with_new_tokens()
    before = model.lm_head.weight.detach().clone()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02, weight_decay=0.1)
    optimizers = (masked_gradient_only(optimizer), None)
    arguments = training_arguments(tmp_path, **SHORT)
    transformers.Trainer(
        model, arguments, train_dataset=examples(words), optimizers=optimizers
    ).train()
    assert len(rows_that_differ(before, model.lm_head.weight)) == len(before)


@pytest.mark.parametrize("order", ORDERS)
@TIED
def test_a_resumed_trainer_ends_where_the_uninterrupted_one_does(
    tied: bool, order: str, tmp_path: Path
) -> None:
    def run(folder: str, resume: str | None = None) -> Any:
        model, words, _ = made(tied, order)
        given = {**SHORT, "save_strategy": "steps", "save_steps": 2}
        arguments = training_arguments(tmp_path / folder, **given)
        transformers.Trainer(model, arguments, train_dataset=examples(words)).train(
            resume_from_checkpoint=resume
        )
        return model

    whole = run("whole")
    again = run("again", resume=str(tmp_path / "whole" / "checkpoint-2"))
    assert_alike(again, whole)


def accelerate_loop(model: Any, words: Any, folder: Path) -> Any:
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02, weight_decay=0.1)
    prepared, optimizer = accelerator.prepare(model, optimizer)
    for _ in range(4):
        with accelerator.accumulate(prepared):
            accelerator.backward(prepared(**inputs(words, NEW_TEXT)).loss)
            accelerator.clip_grad_norm_(prepared.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
    return model


def lightning(model: Any, words: Any, folder: Path) -> Any:
    pl = pytest.importorskip("pytorch_lightning")

    class Module(pl.LightningModule):  # type: ignore[misc,name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def training_step(self, batch: Any, index: int) -> Tensor:
            loss: Tensor = self.model(**batch).loss
            return loss

        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW(self.parameters(), lr=0.02, weight_decay=0.1)

    pl.Trainer(
        max_steps=4,
        accelerator="cpu",
        gradient_clip_val=1.0,
        precision="bf16-mixed",
        accumulate_grad_batches=2,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    ).fit(Module(), DataLoader([inputs(words, NEW_TEXT)] * 8, batch_size=None))
    return model


def sft(model: Any, words: Any, folder: Path) -> Any:
    trl = pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")
    trainer = trl.SFTTrainer(
        model,
        trl.SFTConfig(str(folder), max_length=32, **SHORT),
        train_dataset=datasets.Dataset.from_dict({"text": [NEW_TEXT] * 8}),
        processing_class=words,
        peft_config=begun_lora(),
        callbacks=[seen := Gradients()],
    )
    trainer.train()
    seen.check(model.config.tie_word_embeddings)
    return trainer.model


LOOPS: dict[str, Callable[[Any, Any, Path], Any]] = {
    "accelerate": accelerate_loop,
    "lightning": lightning,
    "sft": sft,
}


@pytest.mark.filterwarnings("ignore:.*train_dataloader.*", "ignore:.*eval mode.*")
@pytest.mark.parametrize("loop", LOOPS)
@TIED
def test_other_trainers(tied: bool, loop: str, tmp_path: Path) -> None:
    model, words, before = made(tied, "no_lora")
    trained = LOOPS[loop](model, words, tmp_path)
    assert_new_rows_learned(trained, before)


def test_the_trainer_of_sentence_transformers(tmp_path: Path) -> None:
    st = pytest.importorskip("sentence_transformers")
    datasets = pytest.importorskip("datasets")
    from sentence_transformers.base.modules.transformer import Transformer
    from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
    from sentence_transformers.sentence_transformer.modules.pooling import Pooling

    bert = language_model("BERT").bert
    bert.save_pretrained(tmp_path / "model")
    tokenizer().save_pretrained(tmp_path / "model")
    modules = [Transformer(str(tmp_path / "model"), max_seq_length=16), Pooling(8)]
    model = st.SentenceTransformer(modules=modules, device="cpu")
    inner = next(m for m in model.modules() if isinstance(m, transformers.BertModel))
    assert add_tokens(inner, model.tokenizer, NEW) == NEW_ROWS
    before = {name: value.clone() for name, value in model.state_dict().items()}
    pairs = {
        "anchor": ["the numbat sat", "a dog ran", "quokkas ran", "the cat"],
        "positive": ["a numbat ran", "the dog sat", "quokkas sat on", "a cat"],
    }
    arguments = st.SentenceTransformerTrainingArguments(str(tmp_path / "run"), **SHORT)
    st.SentenceTransformerTrainer(
        model=model,
        args=arguments,
        train_dataset=datasets.Dataset.from_dict(pairs),
        loss=MultipleNegativesRankingLoss(model),
        callbacks=[seen := Gradients()],
    ).train()
    assert_new_rows_learned(model, before)
    assert list(seen.kinds.values()) == [{RowGradient}]


@pytest.fixture
def preferences() -> Iterator[Any]:
    datasets = pytest.importorskip("datasets")
    pairs = {
        "prompt": ["the numbat sat on"] * 8,
        "chosen": [" quokkas and a numbat ran"] * 8,
        "rejected": [" a mat and the dog ran"] * 8,
    }
    return datasets.Dataset.from_dict(pairs)


@pytest.mark.parametrize("lora_is", ["given_to_trl", "put_on_before", "absent"])
@TIED
def test_the_reference_of_dpo_is_the_base_model_at_every_step(
    tied: bool, lora_is: str, preferences: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trl = pytest.importorskip("trl")
    from trl.trainer import dpo_trainer

    model, words, before = made(tied, "lora_first" if lora_is == "put_on_before" else "no_lora")
    reference, _ = with_new_tokens(tied=tied)
    dpo_trainer.add_fused_lm_head(reference)

    seen: list[tuple[dict[str, Any], Tensor]] = []
    use_adapter = dpo_trainer.use_adapter

    def keep(module: nn.Module, args: Any, given: dict[str, Any], output: Any) -> None:
        seen.append((given, output.log_probs.clone()))

    @contextmanager
    def seen_through(model: Any, adapter_name: str | None) -> Iterator[None]:
        with use_adapter(model, adapter_name):
            handle = model.register_forward_hook(keep, with_kwargs=True)
            yield
            handle.remove()

    monkeypatch.setattr(dpo_trainer, "use_adapter", seen_through)
    given: dict[str, Any] = {}
    if lora_is == "given_to_trl":
        given["peft_config"] = begun_lora()
    elif lora_is == "absent":
        given["ref_model"] = copy.deepcopy(model)  # else it is loaded, and has no such rows
        given["ref_model"].register_forward_hook(keep, with_kwargs=True)
    trainer = trl.DPOTrainer(
        model,
        args=trl.DPOConfig(str(tmp_path), max_length=32, **SHORT),
        train_dataset=preferences,
        processing_class=words,
        callbacks=[kinds := Gradients()],
        **given,
    )
    trainer.train()
    kinds.check(tied)
    assert_new_rows_learned(trainer.model, before)
    assert len(seen) == SHORT["max_steps"]
    for given, log_probs in seen:
        with torch.no_grad():
            expected = reference(**given).log_probs
        assert (log_probs < 0).any()
        assert_same_bits(log_probs, expected, "log-probabilities of the reference")
        with torch.no_grad():
            assert not same_bits(trainer.model(**given).log_probs, expected)
