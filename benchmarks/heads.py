"""A language model's table and head of a large vocabulary, beside the plain frozen model.

    python benchmarks/heads.py [--rows 256000] [--width 2048]

New tokens learn in a table that is tied to its head, in bfloat16. The plain model is the same one
with table and head frozen, so that what is left to it is the pass forward and backward.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from partial_embedding.torch import PartialEmbedding, PartialLinear

TOKENS = {"cpu": 128, "cuda": 2048}
NEW = 16


class Model(nn.Module):
    """A table, a layer, and a head that is tied to the table.

    Args:
        table: The table.
        head: The head, whose weight becomes that of the table.
    """

    def __init__(self, table: nn.Embedding, head: nn.Linear) -> None:
        super().__init__()
        self.table, self.head = table, head
        head.weight = table.weight
        width = table.embedding_dim
        self.layer = nn.Linear(width, width, bias=False, dtype=table.weight.dtype)

    def forward(self, ids: Tensor) -> Tensor:
        """The loss of predicting ids from themselves."""
        scores = self.head(torch.tanh(self.layer(self.table(ids))))
        return nn.functional.cross_entropy(scores.float(), ids)


def now(device: str) -> float:
    """Seconds that the processor computed, or that went by until a GPU was done."""
    if device == "cpu":
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def measure_heads(num_rows: int, width: int, rounds: int, device: str = "cpu") -> dict[str, float]:
    """Median seconds of a step of ours, and of the plain model's forward and backward."""
    values = torch.full((num_rows, width), 0.01, dtype=torch.bfloat16, device=device)
    new = range(num_rows - NEW, num_rows)
    plain = Model(
        nn.Embedding.from_pretrained(values),
        nn.Linear(width, num_rows, bias=False, device="meta"),
    )
    ours = Model(
        PartialEmbedding.from_pretrained(values, trainable_rows=new),
        PartialLinear(width, num_rows, bias=False, device="meta", trainable_rows=new),
    )
    plain.layer.to(device)
    ours.layer.to(device)
    optimizer = torch.optim.AdamW([ours.table.weight], lr=1e-3)

    def passes(model: Model, ids: Tensor) -> None:
        model.zero_grad()
        model(ids).backward()

    def step(ids: Tensor) -> None:
        passes(ours, ids)
        optimizer.step()

    ways: dict[str, Callable[[Tensor], None]] = {
        "plain": lambda ids: passes(plain, ids),
        "ours": step,
    }
    found: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(rounds + 1):  # the first one warms up
        ids = torch.randint(num_rows, (TOKENS[device],), device=device)
        ids[::8] = num_rows - 1 - ids[::8] % NEW
        for name, way in ways.items():
            start = now(device)
            way(ids)
            if turn:
                found[name].append(now(device) - start)
    return {name: statistics.median(spans) for name, spans in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rows", type=int, default=256_000)
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    torch.set_num_threads(1)
    print(json.dumps(measure_heads(args.rows, args.width, args.rounds), indent=1))


if __name__ == "__main__":
    main()
