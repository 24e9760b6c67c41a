"""Trains rows of a table that is larger than the memory it may take.

Usage: run_mapped.py FILE NUM_ROWS WIDTH

The process may have address space for the file once, and for a quarter of it more. Whatever would
copy the table, or make anything else of its size, ends in an error. It prints, as JSON, the bytes
of memory that became the process's own, and what was seen on the way.
"""

import json
import re
import resource
import sys
from pathlib import Path

import numpy as np
import torch

from partial_embedding import Schedule, open_vectors
from partial_embedding.schedule.runner import Runner
from partial_embedding.torch import FrozenRowAudit, PartialEmbedding, rowwise
from partial_embedding.torch.adapter import TorchTables

PATH, NUM_ROWS, WIDTH = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])


def bytes_of(file: str, *names: str) -> int:
    text = Path("/proc/self", file).read_text()
    return sum(1024 * int(re.search(rf"^{name}:\s+(\d+)", text, re.M)[1]) for name in names)


def private() -> int:
    return bytes_of("smaps_rollup", "Private_Dirty")


def train(table: PartialEmbedding, ids: torch.Tensor, optimizer: torch.optim.Optimizer) -> None:
    for _ in range(3):
        optimizer.zero_grad()
        table(ids).pow(2).sub(table(ids)).sum().backward()
        optimizer.step()


def prepared(table: PartialEmbedding) -> torch.optim.Optimizer:
    return rowwise(torch.optim.AdamW(table.parameters(), weight_decay=0.1), table)


# All that is imported late is imported now.
small = PartialEmbedding(4, WIDTH, trainable_rows=[1])
train(small, torch.tensor([0, 1]), prepared(small))

size = NUM_ROWS * WIDTH * 4
begun, limit = private(), bytes_of("status", "VmSize") + size + size // 4
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
try:
    torch.empty(NUM_ROWS, WIDTH), torch.empty(NUM_ROWS, WIDTH)
    refuses_copies = False
except RuntimeError:
    refuses_copies = True

vectors = torch.from_numpy(open_vectors(PATH))
rows = np.arange(0, NUM_ROWS, NUM_ROWS // 100)
table = PartialEmbedding.from_pretrained(vectors, trainable_rows=rows)
optimizer = prepared(table)
train(table, torch.arange(0, NUM_ROWS, NUM_ROWS // 1000), optimizer)
table.unfreeze_rows(range(50))
train(table, torch.arange(100), optimizer)
after_training = private() - begun

stages = [{"epoch": 0, "rows": {"range": [0, 100]}}, {"epoch": 1, "rows": {"range": [-50, None]}}]
runner = Runner(TorchTables(torch.nn.Sequential(table)), {None: Schedule(stages)})
for epoch in range(2):
    runner.advance(epoch, step=9 * epoch)
    train(table, torch.arange(NUM_ROWS - 100, NUM_ROWS), optimizer)
audit = FrozenRowAudit(table)
train(table, table.trainable_rows, optimizer)
audit.check()
state = table.state_dict(), optimizer.state_dict()

print(
    json.dumps(
        {
            "refuses_copies": refuses_copies,
            "after_training": after_training,
            "trained": table.weight[table.trainable_rows].ne(0).all().item(),
        }
    )
)
