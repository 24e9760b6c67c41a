"""Engines that step something else in the place of a table are refused by what they leave on it."""

import pytest
import torch
from torch import distributed as dist
from torch.nn.parallel import DistributedDataParallel

from partial_embedding import InputError
from partial_embedding.torch import PartialEmbedding


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
    finally:
        dist.destroy_process_group()
