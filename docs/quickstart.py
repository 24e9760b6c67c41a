"""Draw `quickstart.svg` and `report.png`: run the quickstart, and open its page in a browser.

make pictures
"""

from __future__ import annotations

import contextlib
import subprocess
import tempfile
from pathlib import Path

from partial_embedding.cli import main
from partial_embedding.monitor.figures import standalone

DOCS = Path(__file__).resolve().parent


def screenshot(page: Path, picture: Path, width: int = 1000, height: int = 1700) -> None:
    """Draw what Chromium shows of a page."""
    flags = [
        "headless", "no-sandbox", "disable-gpu", "hide-scrollbars",
        f"window-size={width},{height}", f"screenshot={picture}",
    ]  # fmt: skip
    with tempfile.TemporaryDirectory() as profile:
        command = ["chromium", f"--user-data-dir={profile}", *(f"--{flag}" for flag in flags)]
        subprocess.run([*command, page.absolute().as_uri()], check=True, capture_output=True)


def draw(folder: Path) -> None:
    """Draw both from the one run below a folder."""
    (record,) = folder.rglob("rows.json")
    main(["report", str(record.parent), "--title", "quickstart"])
    page = record.with_name("report.html")
    html = page.read_text(encoding="utf-8")
    drift = html[html.index("<h2>How far rows moved") :]
    (DOCS / "quickstart.svg").write_text(standalone(drift), encoding="utf-8")
    screenshot(page, DOCS / "report.png")


if __name__ == "__main__":
    config = DOCS.parent / "configs" / "quickstart.yaml"
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        main(["fit", "--config", str(config)])
        draw(Path(folder))
