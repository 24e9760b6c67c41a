"""Engines that step something else in the place of a table are refused by what they leave on it."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from small_tables import moved_rows
from torch import distributed as dist
from torch.nn.parallel import DistributedDataParallel

from partial_embedding import InputError
from partial_embedding.torch import PartialEmbedding, PartialLinear


@pytest.mark.parametrize(
    ("mark", "said"),
    [
        ("_hp_mapping", r"DeepSpeed's ZeRO steps flat copies.*out of model_parameters"),
        ("ds_id", r"ZeRO-3 parts all parameters.*own, or fully_shard"),
    ],
)
@pytest.mark.parametrize("sparse", [True, False], ids=["sparse", "dense"])
def test_a_table_that_zero_has_taken_is_refused_in_its_backward_pass(
    mark: str, said: str, sparse: bool
) -> None:
    table = PartialEmbedding(10, 4, sparse=sparse, trainable_rows=[2])
    setattr(table.weight, mark, None)
    with pytest.raises(InputError, match=said):
        table(torch.tensor([2])).sum().backward()
    assert table.weight.grad is None


@pytest.mark.parametrize("mark", ["_hp_mapping", "ds_id"])
def test_a_table_of_which_all_rows_train_is_zeros_to_step(mark: str) -> None:
    table = PartialEmbedding(10, 4)
    setattr(table.weight, mark, None)
    table(torch.tensor([2])).sum().backward()
    assert table.weight.grad is not None


def test_a_flat_weight_is_no_table_of_other_rows() -> None:
    """As FSDP1 does it: the parameter stays, and what it holds is a part of a long vector."""
    table = PartialEmbedding(10, 4, trainable_rows=[2])
    table.weight.data = table.weight.data.flatten()[:12]
    with pytest.raises(InputError, match=r"a vector of 12 numbers as the weight of a PartialEmb"):
        torch.optim.AdamW(table.parameters()).step()
    with pytest.raises(InputError, match=r"a vector of 12 numbers"):
        table.set_trainable_rows([3])


def test_a_sparse_table_by_itself_is_refused_where_nccl_would_reduce_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    monkeypatch.setattr(dist, "get_backend", lambda group=None: "nccl")
    try:
        with pytest.raises(InputError, match=r"the sparse table ''\. Make it with sparse=False"):
            DistributedDataParallel(PartialEmbedding(10, 4, trainable_rows=[2]))
        DistributedDataParallel(PartialEmbedding(10, 4, sparse=False, trainable_rows=[2]))
        # A head by itself gets a dense gradient there.
        head = PartialLinear(4, 10, bias=False, trainable_rows=[2])
        DistributedDataParallel(head)(torch.ones(1, 4)).sum().backward()
        assert moved_rows(head.weight.grad) == [2]
    finally:
        dist.destroy_process_group()


PAGE = Path(__file__).resolve().parents[2] / "docs" / "several-devices.md"


def left(mark: str) -> None:
    table = PartialEmbedding(10, 4, trainable_rows=[2])
    setattr(table.weight, mark, None)
    table(torch.tensor([2])).sum().backward()


def flat() -> None:
    table = PartialEmbedding(10, 4, trainable_rows=[2])
    table.weight.data = table.weight.data.flatten()
    table.set_trainable_rows([3])


def redundant() -> None:
    class ZeroRedundancyOptimizer(torch.optim.SGD):
        """Stands in for torch's own, which takes a second to import."""

    table = PartialEmbedding(10, 4, trainable_rows=[2])
    table(torch.tensor([2])).sum().backward()
    ZeroRedundancyOptimizer(table.parameters()).step()


def in_lightning() -> None:
    lightning = pytest.importorskip("partial_embedding.callbacks.lightning")
    strategy = object.__new__(type("FSDPStrategy", (), {}))
    lightning.RowUnfreezing({"stages": [{"epoch": 0, "rows": [1]}]}).setup(
        SimpleNamespace(strategy=strategy), torch.nn.Linear(1, 1), "fit"
    )


def in_the_trainer(**given: Any) -> None:
    callbacks: Any = pytest.importorskip("partial_embedding.callbacks.transformers")
    arguments = SimpleNamespace(**{"deepspeed": None, "fsdp_plugin_args": None, **given})
    callbacks._check_engine(arguments, SimpleNamespace(tables={}), "table")


# What is said there and here, of each engine that is refused.
WAYS: dict[str, tuple[Callable[[], None], str]] = {
    "FSDP1": (flat, "FullyShardedDataParallel(model, ignored_states=keep_whole(model))"),
    "Lightning's `FSDPStrategy`": (in_lightning, "ModelParallelStrategy"),
    "Hugging Face's Trainer": (
        lambda: in_the_trainer(deepspeed="zero.json"),
        "fsdp_config={'version': 2}",
    ),
    "DeepSpeed ZeRO-3": (lambda: left("ds_id"), "fully_shard"),
    "`ZeroRedundancyOptimizer`": (redundant, "AdamW(whole)"),
}


@pytest.mark.parametrize("engine", WAYS)
def test_the_page_names_the_way_out_that_the_refusal_names(engine: str) -> None:
    act, way = WAYS[engine]
    rows = [line.split("|")[1:3] for line in PAGE.read_text("utf-8").splitlines() if "|" in line]
    (verdict,) = [
        said for name, said, *_ in (row for row in rows if len(row) > 1) if name.strip() == engine
    ]
    assert way in verdict
    with pytest.raises(InputError) as refused:
        act()
    assert way in str(refused.value)


def test_the_trainer_has_fsdp2_and_not_fsdp1() -> None:
    in_the_trainer(fsdp_plugin_args={"fsdp_version": 2})
    with pytest.raises(InputError, match=r"fsdp of version 1 .*'version': 2"):
        in_the_trainer(fsdp_plugin_args={"fsdp_version": 1})
