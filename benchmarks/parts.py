"""What a step, a preparation and a stage change cost by themselves, side by side with less.

    python benchmarks/parts.py

The tasks are small, so that what counts is Python and the calls of torch, and not memory.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from unittest.mock import patch

import torch
from contenders import CONTENDERS, Step, Work, drawn
from torch import Tensor

from partial_embedding.torch import PartialEmbedding, rowwise
from partial_embedding.torch.hooks import RowHook

SMALL = Work(rows=10_000, trainable=100, ids=64, optimizer="SGD")
LARGE = Work(rows=1_000_000, trainable=1000)


def seconds(call: Callable[[], object], times: int = 1) -> float:
    """Processor seconds of one call."""
    start = time.process_time()
    for _ in range(times):
        call()
    return (time.process_time() - start) / times


def taking_turns(
    ways: dict[str, Callable[[], object]], rounds: int, times: int
) -> dict[str, float]:
    """Median seconds of each way."""
    found: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, call in ways.items():
            found[name].append(seconds(call, times))
    return {name: statistics.median(spans[1:]) for name, spans in found.items()}


def around_a_step() -> dict[str, float]:
    """Microseconds of a step of few rows, beside those rows alone in a plain table."""
    steps = {name: CONTENDERS[name].build(SMALL) for name in ("ours", "floor")}
    found = taking_turns(dict(steps), rounds=60, times=100)
    return {name: 1e6 * span for name, span in found.items()}


def gradient_by_rows() -> dict[str, float]:
    """Microseconds of a step, beside one in which a sparse gradient stays what torch made."""
    ours = CONTENDERS["ours"].build(LARGE)
    # A hook is bound when the table is made.
    with patch.object(RowHook, "_hold_rows", lambda self, parameter: None):
        sparse = CONTENDERS["ours"].build(LARGE)

    def left_sparse() -> None:
        with patch("partial_embedding.torch.embedding.by_rows", lambda weight, table: weight):
            for _ in range(20):
                sparse()

    def as_it_is() -> None:
        for _ in range(20):
            ours()

    found = taking_turns({"ours": as_it_is, "sparse": left_sparse}, rounds=60, times=1)
    return {name: 1e6 * span / 20 for name, span in found.items()}


def preparing() -> dict[str, float]:
    """Milliseconds of `rowwise`, by optimizer."""

    def prepare(kind: str) -> float:
        table = PartialEmbedding(1000, 64, trainable_rows=range(100))
        optimizer = getattr(torch.optim, kind)(table.parameters(), lr=0.01)
        return 1e3 * seconds(lambda: rowwise(optimizer))

    kinds = ("AdamW", "SGD", "Adagrad", "RMSprop", "Adafactor")
    return {kind: statistics.median(prepare(kind) for _ in range(9)) for kind in kinds}


def stage_change() -> dict[str, float]:
    """Milliseconds until 100,000 more rows train, beside one pass over these rows."""
    work = replace(LARGE, trainable=200_000)
    rows = drawn(work).rows
    first, joining = rows[::2].contiguous(), rows[1::2].contiguous()
    found: dict[str, list[float]] = {"change": [], "pass": []}
    for _ in range(9):
        table = PartialEmbedding.from_pretrained(work.table(), trainable_rows=first)
        step = Step(table, rowwise(work.optimizer_of(table.parameters())), drawn(work).batches)
        step()
        handle = vars(step.optimizer)["_rowwise"]

        def change(table: PartialEmbedding = table, handle: object = handle) -> None:
            table.unfreeze_rows(joining)
            for state in handle.tables.values():  # type: ignore[attr-defined]
                state.sync()
                assert len(state.rows.slots) == work.rows

        found["change"].append(1e3 * seconds(change))
        found["pass"].append(1e3 * seconds(lambda table=table: one_pass(table.weight, joining)))
    return {name: statistics.median(spans) for name, spans in found.items()}


def one_pass(weight: Tensor, rows: Tensor) -> Tensor:
    """Reads rows, and writes what is read."""
    return weight.detach().index_select(0, rows)


def measure_parts() -> dict[str, dict[str, float]]:
    """All of it."""
    return {
        "around a step": around_a_step(),
        "gradient": gradient_by_rows(),
        "preparing": preparing(),
        "stage change": stage_change(),
    }


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps(measure_parts(), indent=1))
