"""New tokens in Hugging Face's Trainer on two processes, with no call but `add_tokens`."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from accelerate import state
from accelerate.utils import DistributedType
from launch import in_processes, of_all, shared_folder
from made_tensors import MadeTensors
from oracle import assert_same_bits, rows_that_differ
from tiny_language_models import (
    NEW_ROWS,
    TIED,
    inputs,
    training_arguments,
    with_new_tokens,
)
from torch import distributed as dist

from partial_embedding import InputError
from partial_embedding.callbacks.transformers import RowUnfreezing
from partial_embedding.torch.shards import is_sharded

TABLES = ("embed_tokens.weight", "lm_head.weight")
TEXTS = ("the numbat sat on quokkas", "a dog ran and quokkas", "numbat quokkas on the mat") * 4
# Global batches are the same whoever shares them.
GLOBAL_BATCH = 4
SAVED_AT, SHARDED_STEPS = 3, 5
SCHEDULE = {"stages": [{"step": 0, "rows": NEW_ROWS[:1]}, {"step": 2, "rows": [1, *NEW_ROWS]}]}
Parameters = dict[str, torch.Tensor]


def begin() -> int:
    """The number of processes, where accelerate looks for them."""
    if dist.is_initialized() and dist.get_world_size() > 1:
        rank, size = str(dist.get_rank()), str(dist.get_world_size())
        os.environ.update(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=size, LOCAL_WORLD_SIZE=size)
        return dist.get_world_size()
    if dist.is_initialized():
        dist.destroy_process_group()
    return 1


def with_examples(tied: bool) -> tuple[Any, list[dict[str, Any]]]:
    model, words = with_new_tokens(tied=tied)
    examples = [{n: v[0] for n, v in inputs(words, text).items()} for text in TEXTS]
    assert len({len(example["input_ids"]) for example in examples}) == 1
    return model, examples


def held(model: Any) -> Parameters:
    return {
        name: (value.full_tensor() if is_sharded(value) else value).detach().clone()
        for name, value in model.named_parameters()
    }


def arguments_of(folder: Path, processes: int, **options: Any) -> Any:
    return training_arguments(
        folder,
        learning_rate=0.05,
        weight_decay=0.1,
        per_device_train_batch_size=GLOBAL_BATCH // processes,
        bf16=False,
        **options,
    )


def check_beside_one_process(name: str, processes: int, after: Parameters) -> None:
    """Keep what one process ended with, and hold against it what all of several end with."""
    path = shared_folder() / name
    if processes == 1:
        torch.save(after, path)
        return
    alone, first = torch.load(path, weights_only=True), of_all(after)[0]
    for which, value in after.items():
        assert_same_bits(value, first[which], f"{which} of the other rank")
        torch.testing.assert_close(value, alone[which], rtol=1e-4, atol=1e-5)


@TIED
@pytest.mark.parametrize("order", ["no_lora", "lora_after"])
@pytest.mark.parametrize("optimizer", ["sgd", "adamw_torch"])
@in_processes(1, 2)
def test_ranks_end_alike_where_one_process_does_and_make_no_gradient_as_large_as_a_table(
    optimizer: str, order: str, tied: bool
) -> None:
    processes = begin()
    model, examples = with_examples(tied)
    if order == "lora_after":
        from peft import LoraConfig, get_peft_model

        torch.manual_seed(1)
        model = get_peft_model(model, LoraConfig(target_modules=["q_proj"], r=2))
    before = held(model)
    given = {"ddp_backend": "gloo"} if processes > 1 else {}
    arguments = arguments_of(shared_folder(), processes, max_steps=3, optim=optimizer, **given)
    made = MadeTensors()

    class Begins(transformers.TrainerCallback):
        def on_train_begin(self, *args: Any, **given: Any) -> None:
            made.shapes.clear()

    trainer = transformers.Trainer(model, arguments, train_dataset=examples, callbacks=[Begins()])
    with made:
        trainer.train()
    after, learned = held(model), []
    for name, value in after.items():
        moved = rows_that_differ(before[name], value)
        if name.endswith(TABLES):
            learned.append(moved)
        elif order == "lora_after":
            assert not moved or "lora" in name, name
    assert learned == [NEW_ROWS] * (1 if tied else 2)
    check_beside_one_process(f"{optimizer}-{order}-{tied}", processes, after)
    if processes > 1:
        tables = {name for name in before if name.endswith(TABLES)}
        assert not {before[name].shape for name in tables} & made.shapes
        assert tables <= set(trainer.model_wrapped.parameters_to_ignore)


def let_fsdp_have_the_cpu() -> None:
    """Accelerate takes FSDP for a GPU's alone; on CPUs it leaves out to say which engine it is."""
    real = state.AcceleratorState.__init__

    def init(self: Any, *args: Any, **options: Any) -> None:
        real(self, *args, **options)
        if options.get("fsdp_plugin") is not None:
            self.distributed_type = DistributedType.FSDP
            self.fsdp_plugin = options["fsdp_plugin"]

    state.AcceleratorState.__init__ = init
    state.AcceleratorState._reset_state()


@TIED
@in_processes(1, 2)
def test_rows_that_fsdp2_shards_end_where_one_process_does_and_resume(tied: bool) -> None:
    processes, folder = begin(), shared_folder() / f"sharded-{tied}"
    let_fsdp_have_the_cpu()
    sharding: dict[str, Any] = {
        "fsdp": True,
        "fsdp_config": {"version": 2, "state_dict_type": "SHARDED_STATE_DICT"},
    }

    def run(folder: Path, resumed: Path | None = None) -> tuple[Any, Parameters]:
        model, examples = with_examples(tied)
        before = held(model)
        arguments = arguments_of(
            folder,
            processes,
            max_steps=SHARDED_STEPS,
            save_strategy="steps",
            save_steps=SAVED_AT,
            lr_scheduler_type="constant",
            **(sharding if processes > 1 else {}),
        )
        state.AcceleratorState._reset_state()
        scheduled = ["model.embed_tokens"] if tied else ["model.embed_tokens", "lm_head"]
        callback = RowUnfreezing(dict.fromkeys(scheduled, SCHEDULE), audit=1)
        trainer = transformers.Trainer(
            model, arguments, train_dataset=examples, callbacks=[callback]
        )
        if resumed is not None:
            callback.resume(model, resumed)
        trainer.train(resume_from_checkpoint=None if resumed is None else str(resumed))
        return trainer.model, before

    model, before = run(folder / f"of-{processes}")
    after = held(model)
    tables = [name for name in before if name.endswith(TABLES)]
    for name in tables:
        assert rows_that_differ(before[name], after[name]) == [1, *NEW_ROWS]
    check_beside_one_process(f"after-{tied}", processes, after)
    if processes > 1:
        assert all(is_sharded(model.get_parameter(name)) for name in tables)
        again, _ = run(folder / "again", folder / f"of-2/checkpoint-{SAVED_AT}")
        for name, value in held(again).items():
            assert_same_bits(value, after[name], f"{name}, resumed")


@in_processes(2)
def test_a_checkpoint_of_rows_alone_is_refused_where_fsdp2_shards_them() -> None:
    begin()
    let_fsdp_have_the_cpu()
    model, examples = with_examples(tied=True)
    trainer = transformers.Trainer(
        model,
        arguments_of(shared_folder(), 2, max_steps=1, fsdp=True, fsdp_config={"version": 2}),
        train_dataset=examples,
        callbacks=[RowUnfreezing(SCHEDULE, checkpoint="rows")],
    )
    with pytest.raises(InputError, match=r"checkpoint='rows' with fsdp\. Leave checkpoint out"):
        trainer.train()
