"""The class in `docs/how-it-works.md`, run beside the library: the same bits."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from oracle import same_bits

from partial_embedding.torch import PartialEmbedding, rowwise

ROOT = Path(__file__).resolve().parents[2]
V, D = 30, 5
# Rows that train from a step on: some join late, some leave, one comes back.
ROWS = {0: [3, 7, 29], 4: [0, 3, 7, 12, 29], 7: [0, 12, 13], 9: [0, 3, 12, 13]}
OPTIMIZERS: dict[str, Any] = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.1),
    "Adagrad": lambda p: torch.optim.Adagrad(p, lr=0.1, weight_decay=0.1),
}


def reference_class() -> Any:
    """The class that the page shows, in full."""
    page = (ROOT / "docs" / "how-it-works.md").read_text(encoding="utf-8")
    (block,) = (b for b in re.findall(r"```python\n(.*?)```", page, re.S) if "class Reference" in b)
    assert len(block.splitlines()) < 70
    names: dict[str, Any] = {}
    exec(block, names)
    return names["Reference"]


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_the_library_moves_rows_as_the_reference_does(make: Any) -> None:
    torch.manual_seed(0)
    table = PartialEmbedding(V, D, trainable_rows="none")
    plain = torch.nn.Embedding.from_pretrained(table.weight.detach().clone(), freeze=False)
    start = plain.weight.detach().clone()
    ours = rowwise(make(table.parameters()), table)
    reference = reference_class()(make(plain.parameters()), plain.weight)
    for step in range(12):
        if step in ROWS:
            table.set_trainable_rows(ROWS[step])
            reference.set_trainable_rows(ROWS[step])
        ids = torch.randint(V, (64,))
        for embedding, optimizer in ((table, ours), (plain, reference)):
            embedding.zero_grad()
            (embedding(ids) * torch.arange(D)).square().sum().backward()
            optimizer.step()
        assert same_bits(table.weight, plain.weight)
        ever = {row for at, rows in ROWS.items() if at <= step for row in rows}
        frozen = [row for row in range(V) if row not in ever]
        assert same_bits(table.weight[frozen], start[frozen])
    assert not same_bits(table.weight[ROWS[9]], start[ROWS[9]])
