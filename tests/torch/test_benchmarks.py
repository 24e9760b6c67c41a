"""The contenders of `make bench` do the same work, and the report says what was measured."""

import importlib
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"
# These step all trainable rows, and so end where the K rows alone end.
ALIKE = ("ours", "dense", "masked", "copied_back", "peft", "two_tables")
FREEZING = ("ours", "lazy", "copied_back", "peft", "two_tables")


def of_benchmarks(name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module(name)


@pytest.fixture
def contenders(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return of_benchmarks("contenders", monkeypatch)


def trained(
    contenders: ModuleType, name: str, optimizer: str, **task: Any
) -> tuple[Tensor, Tensor]:
    """The trainable rows and the others after five steps."""
    contender = contenders.CONTENDERS[name]
    if not contender.installed:
        pytest.skip(f"no module {contender.needs}; `make bench` installs it")
    work = contenders.Work(rows=50, trainable=7, ids=20, width=4, optimizer=optimizer, **task)
    step = contender.build(work)
    for _ in range(5):
        step()
    rows = contenders.drawn(work).rows
    others = torch.tensor([row for row in range(50) if row not in rows])
    if name == "floor" or name.startswith("copying"):
        return step.look_up(torch.arange(7)), torch.empty(0)
    return step.look_up(rows).detach().clone(), step.look_up(others).detach().clone()


@pytest.mark.parametrize("together", [False, True])
@pytest.mark.parametrize("optimizer", ["AdamW", "SGD", "Adagrad"])
@pytest.mark.parametrize("name", ALIKE)
def test_contenders_train_the_same_rows_to_the_same_values(
    name: str, optimizer: str, together: bool, contenders: ModuleType
) -> None:
    floor, _ = trained(contenders, "floor", optimizer, together=together)
    rows, others = trained(contenders, name, optimizer, together=together)
    torch.testing.assert_close(rows, floor, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(rows, torch.full_like(rows, 0.01), atol=1e-6)
    if name in FREEZING:
        assert (others == torch.tensor(0.01)).all()


@pytest.mark.parametrize("name", ["lazy", "sparse_adam", "stages", "copying", "copying_lazy"])
def test_the_other_contenders_run(name: str, contenders: ModuleType) -> None:
    trained(contenders, name, "AdamW", law="zipf")


def test_a_mapped_table_trains(contenders: ModuleType) -> None:
    rows, others = trained(contenders, "ours", "AdamW", mapped=True)
    assert (rows != 0).any()
    assert (others == 0).all()


@pytest.mark.parametrize("optimizer", ["SGD", "Adagrad"])
def test_fbgemm_trains(optimizer: str, contenders: ModuleType) -> None:
    rows, _ = trained(contenders, "fbgemm", optimizer)
    assert (rows != 0.01).any()


def test_a_race_is_reported_with_its_targets(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    run, report = of_benchmarks("run", monkeypatch), of_benchmarks("report", monkeypatch)
    work = run.Work(rows=50, trainable=7, ids=20, width=4)
    names = [name for name in run.PEERS if run.CONTENDERS[name].installed]
    measured = run.run_race(run.Race("peers", [(name, work) for name in names]), seconds=0)
    results = {
        "machine": run.machine(),
        "missing": run.missing(),
        "races": {"peers": measured},
        "memory": [
            {"contender": name, "work": measured[0]["work"], "alive": 1000, "peak": peak}
            for name, peak in (("ours", 2000), ("floor", 1000))
        ],
    }
    ddp = of_benchmarks("ddp", monkeypatch)
    sizes = [run.Work(rows=rows, trainable=100) for rows in (1000, 2000)]
    results["ddp"] = [
        {"way": way, "work": run.asdict(size), "bytes": 26_000, "touched": 80, "ms": 1.0}
        for size in sizes
        for way in ddp.WAYS
    ]
    text = report.write_report(json.loads(json.dumps(results)), tmp_path)
    assert (
        "| peak memory over 1.2 × floor + 9 B a row: ours, V = 50, K = 7, AdamW, 20 ids, D = 4 "
        "| 1.21 | ≤ 1 | **missed** |" in text
    )
    assert "| bytes sent over those of the K rows: ours, dense gradient, K = 100 | 1.02 |" in text
    assert "| bytes sent over those of the rows touched: ours, K = 100 | 1.27 |" in text
    assert "| bytes sent, V = 2,000 over V = 1,000: ours, K = 100 | 1 | ≤ 1.1 | met |" in text
    assert (tmp_path / "memory.png").exists()
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n", encoding="utf-8")
    for _ in range(2):
        report.write_readme(results, readme)
    section = readme.read_text(encoding="utf-8")
    assert section.startswith("before\n")
    assert section.endswith("\nafter\n")
    assert "old" not in section
    assert section.count("| **`PartialEmbedding`** | yes |") == 1


def test_all_sizes_are_drawn(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    run, report = of_benchmarks("run", monkeypatch), of_benchmarks("report", monkeypatch)
    measured: dict[str, list[dict[str, Any]]] = {
        f"scale-{key}": [
            {"contender": name, "work": run.asdict(work), "peak": 10.0**6, "alive": 10.0**6}
            | dict.fromkeys(["ms", "low", "high", *run.PARTS], 1.0)
            for work in works
            for name in run.SCALED
        ]
        for key, works in run.scale(run.Work()).items()
    }
    results = {"machine": run.machine(), "missing": [], "races": measured}
    results["memory"] = [entry for entries in measured.values() for entry in entries]
    assert "![scale](scale.png)" in report.write_report(results, tmp_path)
    assert (tmp_path / "scale.png").exists()


def test_ways_to_sum_gradients_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    ways = of_benchmarks("ways", monkeypatch)
    monkeypatch.setattr(ways, "TURNS", 7)
    for section in ways.summing():
        found = {name: way() for name, way in section.ways.items() if "int32" not in name}
        first = next(iter(found.values())).clone()
        for name, summed in found.items():
            dense = summed.to_dense() if summed.is_sparse else summed
            torch.testing.assert_close(dense, first, msg=name)
        assert all(us > 0 for us in ways.measured(section).values())


@pytest.mark.skipif(not Path("/proc/net/dev").exists(), reason="only Linux counts bytes there")
def test_two_processes_send_the_rows_and_not_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    ddp = of_benchmarks("ddp", monkeypatch)
    work = ddp.Work(rows=20_000, trainable=1000, ids=200)
    sent = {way: ddp.measure(way, work) for way in ("plain", "sparse_by_row")}
    # Others may send there too.
    assert sent["plain"]["bytes"] > work.table_bytes
    assert sent["sparse_by_row"]["bytes"] < 0.5 * work.table_bytes
    assert 80 < sent["sparse_by_row"]["touched"] < 120
