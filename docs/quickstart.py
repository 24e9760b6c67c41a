"""Draw `quickstart.png` and `report.png`: run the quickstart, and open its page in a browser.

make pictures
"""

from __future__ import annotations

import contextlib
import shutil
import subprocess
import tempfile
from pathlib import Path

from partial_embedding.cli import main

DOCS = Path(__file__).resolve().parent


def screenshot(page: Path, picture: Path, width: int = 1100, height: int = 1500) -> None:
    """Draw what Chromium shows of a page, in the light scheme."""
    flags = [
        "headless", "no-sandbox", "disable-gpu", "hide-scrollbars", "force-device-scale-factor=1",
        f"window-size={width},{height}", f"screenshot={picture}",
    ]  # fmt: skip
    with tempfile.TemporaryDirectory() as profile:
        command = ["chromium", f"--user-data-dir={profile}", *(f"--{flag}" for flag in flags)]
        subprocess.run([*command, page.absolute().as_uri()], check=True, capture_output=True)


if __name__ == "__main__":
    config = DOCS.parent / "configs" / "quickstart.yaml"
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        main(["fit", "--config", str(config)])
        run = next(Path("runs").rglob("rows.json")).parent
        main(["report", str(run)])
        shutil.copy(next(run.glob("rows*.png")), DOCS / "quickstart.png")
        screenshot(next(run.glob("report*.html")), DOCS / "report.png")
