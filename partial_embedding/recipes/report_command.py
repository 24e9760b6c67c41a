"""The command `partial-embedding report`: one page of what runs did to their rows."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from partial_embedding.errors import InputError
from partial_embedding.files import newest, write_text
from partial_embedding.monitor.page import comparison, page
from partial_embedding.monitor.record import RECORD, read_record
from partial_embedding.recipes.settings import CommandParser

PAGE = "report.html"


def report_command(args: Sequence[str]) -> None:
    """Write the page of a run into its folder, or that of several into the one around them."""
    parser = CommandParser(
        "report", "Write one HTML page of what a run did to its rows, or several side by side."
    )
    parser.add_argument(
        "run", type=Path, nargs="+", help="the folder of a run, or one that holds some: the newest"
    )
    parser.add_argument("--title", help="the title of the page, by default the folder")
    given = parser.parse_args(args)
    if len(given.run) == 1:
        print(f"report: {write_page(find_run(given.run[0]), given.title)}")
        return
    runs = {str(run): find_run(run) for run in given.run}
    if len(runs) < len(given.run) or len(set(map(Path.resolve, runs.values()))) < len(runs):
        raise InputError(
            f"runs that are compared are several. Received: {', '.join(map(str, given.run))}, "
            "of which some are the same. Name each once."
        )
    around = Path(os.path.commonpath([run.resolve().parent for run in runs.values()]))
    path = Path(os.path.relpath(around)) / PAGE
    records = {name: read_record(run) for name, run in runs.items()}
    write_text(path, comparison(records, given.title or f"{len(runs)} runs"))
    print(f"report: {path}")


def write_page(run: Path, title: str | None = None) -> Path:
    """Write the page of one run into its folder; by default it is called as that is from here."""
    config = run / "config.yaml"
    settings = config.read_text(encoding="utf-8", errors="replace") if config.is_file() else ""
    write_text(run / PAGE, page(read_record(run), title or os.path.relpath(run), settings))
    return run / PAGE


def find_run(folder: Path) -> Path:
    """The folder itself, if it is that of a run, or the newest run in it."""
    if (folder / RECORD).is_file():
        return folder
    if (found := newest(folder, f"*/{RECORD}")) is None:
        raise InputError(
            f"a report is made of a run that had a RowMonitor, which leaves {RECORD}. Received: "
            f"{folder}, which holds none. Name the folder of such a run."
        )
    return found.parent
