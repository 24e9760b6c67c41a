"""A table that is larger than a device: its rows are spread over processes, and new ones learn.

Run it with as many processes as there are devices:

    torchrun --nproc-per-node=2 examples/sharded_table.py

A recommender knows 2,000 items and gets 100 new ones. Rows of items lie in the process that has
them; users, who fit each device, stay whole; FSDP2 shards the layers in between. The data is made
here: users and items have hidden tastes, of which ratings are noisy products.
"""

import tempfile
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.checkpoint.state_dict import get_state_dict
from torch.distributed.fsdp import fully_shard

from partial_embedding.torch import PartialEmbedding, average_gradients, keep_whole, split_rows
from partial_embedding.torch.row_files import load_rows, save_rows

USERS, OLD, NEW, WIDTH, STEPS = 50, 2000, 100, 8, 150

dist.init_process_group("gloo")  # "nccl" where each process has a GPU
rank, processes = dist.get_rank(), dist.get_world_size()
mesh = dist.init_device_mesh("cpu", (processes,))

torch.manual_seed(0)
tastes, kinds = torch.randn(USERS, WIDTH), torch.randn(OLD + NEW, WIDTH)
drawn = torch.Generator().manual_seed(1 + rank)  # a batch of its own in each process


class Ratings(nn.Module):
    """What users think of items."""

    def __init__(self) -> None:
        super().__init__()
        known = torch.cat([kinds[:OLD], torch.zeros(NEW, WIDTH)])
        new = range(OLD, OLD + NEW)
        self.items = PartialEmbedding.from_pretrained(known, trainable_rows=new)
        self.users = PartialEmbedding.from_pretrained(tastes.clone(), trainable_rows="none")
        self.mix = nn.Linear(WIDTH, WIDTH)

    def forward(self, users: Tensor, items: Tensor) -> Tensor:
        return (self.mix(self.users(users)) * self.items(items)).sum(dim=1)


model = Ratings()
nn.init.eye_(model.mix.weight)
ours = split_rows(model.items, mesh) | keep_whole(model)
fully_shard(model, mesh=mesh, ignored_params=ours)
begun = model.items.weight.to_local().detach().clone()  # the rows of this process

optimizer = torch.optim.AdamW(model.parameters(), lr=0.05, weight_decay=0.01)
for _ in range(STEPS):
    users = torch.randint(USERS, (256,), generator=drawn)
    items = torch.randint(OLD, OLD + NEW, (256,), generator=drawn)
    liked = (tastes[users] * kinds[items]).sum(dim=1)
    error = (model(users, items) - liked).pow(2).mean()
    optimizer.zero_grad()
    error.backward()
    average_gradients(optimizer)  # of the whole table; the split one's are those of all already
    torch.nn.utils.clip_grad_norm_(model.parameters(), 10.0)
    optimizer.step()

# No bit of an old item moved, in whichever process it lies.
own = model.items.weight.to_local().detach()
first = rank * len(begun)
old = torch.arange(first, first + len(own)) < OLD
print(f"process {rank}: {len(own)} rows of {OLD + NEW}, error {error:.3f}")
assert len(own) == (OLD + NEW) // processes
assert torch.equal(own[old], begun[old])
assert error < 0.5

# Checkpoints are torch's own. A file of rows holds the new items, and fits a table in one process.
with tempfile.TemporaryDirectory() as folder:
    names = [folder]
    dist.broadcast_object_list(names)
    place = Path(names[0])
    weights, states = get_state_dict(model, optimizer)
    dcp.save({"model": weights, "optimizer": states}, checkpoint_id=place / "checkpoint")
    save_rows(model, place / "new_items.safetensors")
    dist.barrier()
    alone = Ratings()
    written = load_rows(alone, place / "new_items.safetensors")
    assert len(written["items.weight"]) == NEW
    assert torch.equal(alone.items.weight[first : first + len(own)], own)
    dist.barrier()

dist.destroy_process_group()
