"""The command `partial-embedding report`: one page of what a run did to its rows."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from partial_embedding.errors import InputError
from partial_embedding.files import write_atomically
from partial_embedding.monitor.page import page
from partial_embedding.monitor.record import RECORD, read_record
from partial_embedding.recipes.command import CommandParser

PAGE = "report.html"


def report_command(args: Sequence[str]) -> None:
    """Write the page of a run, and its pictures, into the folder of the run.

    Args:
        args: The arguments of the command, without its name.

    Raises:
        InputError: An argument is refused, or the folder holds no record of a run.
        OSError: A file cannot be written.
    """
    given = _parser().parse_args(args)
    run = find_run(given.run)
    config = run / "config.yaml"
    settings = config.read_text(encoding="utf-8", errors="replace") if config.is_file() else ""
    html, pictures = page(read_record(run), given.title or str(given.run), settings)
    for name, picture in pictures.items():
        with write_atomically(run / name) as temporary:
            temporary.write_bytes(picture)
    with write_atomically(run / PAGE) as temporary:
        temporary.write_text(html, encoding="utf-8")
    print(f"report: {run / PAGE}")


def find_run(folder: Path) -> Path:
    """The folder itself, if it is that of a run, or the newest run in it.

    Args:
        folder: The folder of a run, or one that holds some, as `trainer.default_root_dir` does.

    Raises:
        InputError: There is no run.
    """
    if (folder / RECORD).is_file():
        return folder
    found = list(folder.glob(f"*/{RECORD}"))
    if not found:
        raise InputError(
            f"a report is made of a run that had a RowMonitor, which leaves {RECORD}. Received: "
            f"{folder}, which holds none. Name the folder of such a run."
        )
    return max(found, key=lambda path: path.stat().st_mtime_ns).parent


def _parser() -> argparse.ArgumentParser:
    parser = CommandParser(
        prog="partial-embedding report",
        description="Write one HTML page of what a run did to its rows.",
        allow_abbrev=False,
    )
    parser.add_argument("run", type=Path, help="the folder of a run, or of several: the newest")
    parser.add_argument("--title", help="the title of the page, by default the folder")
    return parser


if __name__ == "__main__":
    # For runs of Keras, whose environment lacks what the other commands need.
    try:
        report_command(sys.argv[1:])
    except (InputError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
