"""What was tried for the parts of a step that miss their aim: ways that give the same, in turns.

    python benchmarks/ways.py [--only gather scatter] [--report benchmarks/ways.md]

V = 1,000,000 and D = 64 unless said otherwise; 4,096 ids of which half train. Each figure is the
processor time of one thread, the median of turns that the ways of one section take.
"""

from __future__ import annotations

import argparse
import mmap
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import cycle
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch
from contenders import CONTENDERS, Step, Work, batches_of, drawn, ours
from torch import Tensor

from partial_embedding.torch import blocks
from partial_embedding.torch.hooks import close_passage
from partial_embedding.torch.row_gradient import RowGradient
from partial_embedding.torch.rowcopy import distinct, read_rows, sum_rows, write_rows
from partial_embedding.torch.rowset import RowSet

Way = Callable[[], object]
TURNS = 60


@dataclass(frozen=True)
class Section:
    """Ways to do one thing.

    Args:
        title: What is done.
        ways: By what they are; the first is the one that is used.
        times: Calls of one turn, for what is very short.
    """

    title: str
    ways: dict[str, Way]
    times: int = 1


def measured(section: Section) -> dict[str, float]:
    """Median microseconds of each way."""
    found: dict[str, list[float]] = {name: [] for name in section.ways}
    for _ in range(TURNS):
        for name, way in section.ways.items():
            start = time.process_time()
            for _ in range(section.times):
                way()
            found[name].append(1e6 * (time.process_time() - start) / section.times)
    return {name: statistics.median(spans[5:]) for name, spans in found.items()}


def in_turn(call: Callable[[Tensor], object], batches: Iterator[Tensor]) -> Way:
    """A call with the ids of another batch each time: the same ones would lie in the cache."""
    return lambda: call(next(batches))


def ids_of(work: Work) -> Iterator[Tensor]:
    """The ids of batches without end; ways that share them never read the same after each other."""
    return cycle([ids for ids, _ in drawn(work).batches])


# Ways


def finding() -> Iterator[Section]:
    """The trainable ones among the ids of a batch."""
    work = Work(trainable=1000)
    rows, batches = RowSet(work.rows, {0: drawn(work).rows}, 1), ids_of(work)
    slots, wide = rows.slots, rows.slots.long()

    def of_next(find: Callable[[Tensor], Tensor]) -> Way:
        return in_turn(lambda ids: find(ids).nonzero().flatten(), batches)

    ways = {
        "a mask of bytes, selected": of_next(rows.is_trainable),
        "a mask of bytes, indexed": of_next(lambda ids: rows.mask[ids]),
        "slots of 4 bytes, compared": of_next(lambda ids: slots.index_select(0, ids) < 1000),
        "slots of 8 bytes, compared": of_next(lambda ids: wide.index_select(0, ids) < 1000),
        "a search in the sorted rows": of_next(lambda ids: torch.isin(ids, rows.order)),
    }
    yield Section("Find the ids that train, K = 1,000", ways)


def summing() -> Iterator[Section]:
    """Gradients by row."""
    for trainable in (1000, 10_000):
        slots, values = batches_of(Work(trainable=trainable), "trainable")[0]
        into = torch.empty(trainable, values.shape[1])
        narrow = slots.int()

        def sorted_first(
            slots: Tensor = slots, values: Tensor = values, k: int = trainable
        ) -> Tensor:
            order = slots.argsort(stable=True)
            return values.new_zeros(k, 64).index_add_(0, slots[order], values[order])

        def coalesced(slots: Tensor = slots, values: Tensor = values, k: int = trainable) -> Tensor:
            made = torch.sparse_coo_tensor(slots[None], values, (k, 64), check_invariants=False)
            return made.coalesce()

        ways: dict[str, Way] = {
            "`index_add_` into kept memory": partial(sum_rows, slots, values, trainable, into),
            "`index_add_` into new memory": partial(sum_rows, slots, values, trainable),
            "`index_add_` by int32": partial(into.index_add_, 0, narrow, values),
            "torch's dense backward pass": partial(
                torch.ops.aten.embedding_dense_backward, values, slots, trainable, -1, False
            ),
            "sorted first": sorted_first,
            "a sparse tensor, coalesced": coalesced,
        }
        yield Section(f"Sum 2,048 gradients by row, K = {trainable:,}", ways)


def holding() -> Iterator[Section]:
    """What is held of the gradients of all entries until the step sums them."""
    k = 10_000
    work = Work(trainable=k, ids=65_536)
    rows, ids = RowSet(work.rows, {0: drawn(work).rows}, 1), next(ids_of(work))
    given, into = torch.rand(len(ids), 64), torch.empty(k + 1, 64)

    def select() -> tuple[Tensor, Tensor]:
        kept = rows.mask.index_select(0, ids).nonzero().flatten()
        return ids.index_select(0, kept), given.index_select(0, kept)

    def select_and_sum() -> tuple[Tensor, Tensor]:
        kept, values = select()
        found, places = distinct(kept, work.rows)
        return found, sum_rows(places, values, len(found))

    def sum_all() -> tuple[Tensor, Tensor]:
        return ids, given  # a frozen row's slot is the last one

    def sum_in_parts() -> tuple[Tensor, Tensor]:
        total = given.new_zeros(k, 64)
        for part, values in zip(ids.split(4096), given.split(4096), strict=True):
            kept = rows.mask.index_select(0, part).nonzero().flatten()
            slots = rows.slots.index_select(0, part.index_select(0, kept)).long()
            total.index_add_(0, slots, values.index_select(0, kept))
        return rows.order, total

    def way(hold: Callable[[], tuple[Tensor, Tensor]]) -> tuple[str, Way]:
        held = hold()[1]
        mib = 0.0 if held is given else held.nbytes / 2**20

        def to_the_end() -> Tensor:
            held_ids, values = hold()
            return sum_rows(rows.slots.index_select(0, held_ids), values, k + 1, into)

        return f"{mib:.1f} MiB", to_the_end

    ways = {
        "the entries that train": select,
        "their sums by row": select_and_sum,
        "their sums in a row for each of K, from parts of 4,096 ids": sum_in_parts,
        "all entries, as long as autograd's": sum_all,
    }
    made = {what: way(hold) for what, hold in ways.items()}
    yield Section(
        "Hold the gradients of 65,536 ids, K = 10,000",
        {f"{what}: {mib}": measured_way for what, (mib, measured_way) in made.items()},
    )


def gathering() -> Iterator[Section]:
    """Rows of a large table brought together."""
    table = Work().table()
    for trainable in (1000, 10_000):
        rows = drawn(Work(trainable=trainable)).rows
        into, numbers, ids = torch.empty(trainable, 64), as_elements(table), rows.numpy()
        by_chance = rows[torch.randperm(trainable)]
        ways: dict[str, Way] = {
            "`index_select` into kept memory": partial(read_rows, table, rows, None, into),
            "`index_select` into new memory": partial(read_rows, table, rows, None),
            "indexing": partial(table.__getitem__, rows),
            "`embedding`": partial(torch.nn.functional.embedding, rows, table),
            "NumPy, a row as one element": partial(numbers.take, ids),
            "rows that are not in order": partial(read_rows, table, by_chance, None, into),
        }
        yield Section(f"Gather {trainable:,} rows", ways)


def scattering() -> Iterator[Section]:
    """Rows written back."""
    table = Work().table()
    words = table.view(torch.complex128)
    for trainable in (1000, 10_000):
        rows = drawn(Work(trainable=trainable)).rows
        values = torch.rand(trainable, 64)
        wide = rows[:, None].expand(-1, 64)

        def read_before(rows: Tensor = rows, values: Tensor = values) -> None:
            table.index_select(0, rows)
            write_rows(table, rows, None, values)

        ways: dict[str, Way] = {
            "NumPy, a row as one element": partial(write_rows, table, rows, None, values),
            "`index_copy_`": partial(table.index_copy_, 0, rows, values),
            "`index_copy_` of words of 16 bytes": partial(
                words.index_copy_, 0, rows, values.view(torch.complex128)
            ),
            "`index_put_`": partial(table.index_put_, (rows,), values),
            "`scatter_`": partial(table.scatter_, 0, wide, values),
            "read once more just before": read_before,
        }
        yield Section(f"Scatter {trainable:,} rows", ways)


def as_elements(table: Tensor) -> np.ndarray:
    """The same memory, in which each row is one element."""
    return table.numpy().view(np.dtype((np.void, 256)))[:, 0]


def updating() -> Iterator[Section]:
    """A whole step, by how many numbers AdamW goes over at once, and by other makes of AdamW."""
    for trainable in (10_000, 100_000):
        work = Work(trainable=trainable)
        step = ours(work)

        def at_once(power: int, step: Step = step) -> Way:
            def stepped() -> None:
                with patch.object(blocks, "_IN_CACHE", 2**power):
                    step()

            return stepped

        ways = {
            "parts of 2^19 numbers": at_once(19),
            "parts of 2^15": at_once(15),
            "parts of 2^17": at_once(17),
            "parts of 2^21": at_once(21),
            "the rows that train side by side": ours(replace(work, together=True)),
            "`lazy`, which is another method": CONTENDERS["lazy"].build(work),
            "two tables by hand": CONTENDERS["two_tables"].build(work),
        }
        for option in ("foreach", "fused"):
            made = partial(torch.optim.AdamW, **{option: True})
            with patch.object(torch.optim, "AdamW", made):
                ways[f"the user's AdamW with {option}=True"] = ours(work)
        yield Section(f"A step of AdamW, K = {trainable:,}", ways)


def resting() -> Iterator[Section]:
    """A step of what leaves a row alone whose gradient is zero."""
    work = Work(optimizer="SGD")
    every = ours(work)

    def all_rows(step: Step = every) -> None:
        with patch.object(blocks.Blocks, "_rests_where_untouched", lambda *_: False):
            step()

    slots = batches_of(work, "trainable")[0][0]
    ways: dict[str, Way] = {
        "the touched rows": ours(work),
        "all rows that train": all_rows,
        "`lazy`": CONTENDERS["lazy"].build(work),
        "two tables by hand": CONTENDERS["two_tables"].build(work),
        "the K rows alone": CONTENDERS["floor"].build(work),
    }
    yield Section("A step of SGD, K = 10,000", ways)
    ways = {
        "by marks": partial(distinct, slots, 10_000),
        "by sorting": partial(torch.unique, slots, return_inverse=True),
    }
    yield Section("Tell 2,048 slots apart, of 10,000", ways)


def around() -> Iterator[Section]:
    """Python and torch's calls, where nothing else counts."""
    work = Work(rows=10_000, trainable=100, ids=64)
    for optimizer in ("SGD", "AdamW"):
        task = replace(work, optimizer=optimizer)
        afresh, plain = ours(task), ours(task)

        def without_passage(step: Step = afresh) -> None:
            close_passage(step.look_up)  # type: ignore[arg-type]
            step()

        def from_dense(step: Step = plain) -> None:
            with patch.object(step.look_up, "sparse", False):
                step()

        ways: dict[str, Way] = {
            "as it is": ours(task),
            "the way to the weight made at each lookup": without_passage,
            "a dense gradient": from_dense,
            "`lazy`": CONTENDERS["lazy"].build(task),
            "two tables by hand": CONTENDERS["two_tables"].build(task),
            "the K rows alone": CONTENDERS["floor"].build(task),
        }
        yield Section(f"A step of 64 ids, V = 10,000, K = 100, {optimizer}", ways, times=20)
    ids, values = torch.arange(64), torch.rand(64, 64)
    shape = (10_000, 64)
    ways = {
        "of rows": lambda: RowGradient(ids, values, shape[0], False),
        "torch's sparse": lambda: torch.sparse_coo_tensor(
            ids[None], values, shape, check_invariants=False
        ),
    }
    yield Section("Make a gradient", ways, times=100)


def on_huge_pages(table: Tensor) -> Tensor:
    """A copy in memory for which the system was asked for pages of 2 MB."""
    memory = mmap.mmap(-1, table.nbytes + 2**21)
    memory.madvise(mmap.MADV_HUGEPAGE)
    return (
        torch.frombuffer(memory, dtype=torch.float32, count=table.numel())
        .view_as(table)
        .copy_(table)
    )


def growing() -> Iterator[Section]:
    """What of a step grows with the table, though the rows do not."""
    for rows in (10**4, 10**6, 10**7):
        work = Work(rows=rows, trainable=1000)
        table, batches = work.table(), ids_of(work)
        row_set = RowSet(rows, {0: drawn(work).rows}, 1)
        into, order = torch.empty(1000, 64), row_set.order
        ordered = cycle([ids.sort().values for ids, _ in drawn(work).batches])
        bits = torch.from_numpy(np.packbits(row_set.mask.numpy(), bitorder="little"))
        huge = on_huge_pages(table)

        def look_at_bits(ids: Tensor, bits: Tensor = bits) -> Tensor:
            return bits.index_select(0, ids >> 3) >> (ids & 7) & 1

        ways: dict[str, Way] = {
            "read the ids of a batch": in_turn(partial(table.index_select, 0), batches),
            "read them sorted": in_turn(partial(table.index_select, 0), ordered),
            "look at the mask": in_turn(partial(row_set.mask.index_select, 0), batches),
            "look at the slots": in_turn(partial(row_set.slots.index_select, 0), batches),
            "look at a mask of bits": in_turn(look_at_bits, batches),
            "gather the rows that train": partial(read_rows, table, order, None, into),
            "gather them from huge pages": partial(read_rows, huge, order, None, into),
            "scatter them": partial(write_rows, table, order, None, into),
            "scatter them into huge pages": partial(write_rows, huge, order, None, into),
        }
        yield Section(f"Parts of a step, V = {rows:,}, K = 1,000", ways)


SECTIONS = {
    "find": finding,
    "sum": summing,
    "hold": holding,
    "gather": gathering,
    "scatter": scattering,
    "update": updating,
    "rest": resting,
    "around": around,
    "grow": growing,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", nargs="+", default=list(SECTIONS), choices=list(SECTIONS))
    parser.add_argument("--report", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    lines = [
        "# Ways that were tried",
        "",
        "Made by `python benchmarks/ways.py --report benchmarks/ways.md`: microseconds of one",
        "thread, medians of turns; the first way of each table is the one that is used.",
        f"V = 1,000,000 and D = 64 unless said otherwise. torch {torch.__version__}.",
    ]
    for name in args.only:
        for section in SECTIONS[name]():
            lines += [
                "",
                f"## {section.title}",
                "",
                "| way | µs | times the first |",
                "|---|---:|---:|",
            ]
            found = measured(section)
            first = next(iter(found.values()))
            lines += [f"| {way} | {us:,.0f} | {us / first:.2f} |" for way, us in found.items()]
    text = "\n".join(lines) + "\n"
    print(text)
    if args.report:
        args.report.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
