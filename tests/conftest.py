"""What all tests share: in CI a missing optional package is a failure and not a skip."""

import gc
import os
import shutil
import subprocess
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest

from partial_embedding import InputError

# Programs that tests start in processes of their own, which importing would run; and what is for
# type checkers alone, of both frameworks.
collect_ignore_glob = ["*/scripts/*.py", "*/run_*.py", "typing/*.py"]

IN_CI = bool(os.environ.get("CI"))


def pytest_collection_finish() -> None:
    """Leave what collecting made out of every later search for garbage.

    Lightning and transformers search after each run, which takes a third of a second where twelve
    thousand tests are waiting.
    """
    gc.collect()
    gc.freeze()


def _refuse_missing_package(report: pytest.TestReport | pytest.CollectReport) -> None:
    if IN_CI and report.skipped and "could not import" in str(report.longrepr):
        report.outcome = "failed"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    _refuse_missing_package(report)
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report() -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    report = yield
    _refuse_missing_package(report)
    return report


Refused = Callable[..., str]


@pytest.fixture
def refused() -> Refused:
    """Make a call that must be refused in one line which holds all of some parts; that line."""

    def refused(call: Callable[..., object], *arguments: Any, parts: Iterable[str]) -> str:
        with pytest.raises(InputError) as error:
            call(*arguments)
        message = str(error.value)
        assert "\n" not in message
        assert [part for part in parts if part not in message] == [], message
        return message

    return refused


@pytest.fixture
def largest_file() -> Callable[[int], AbstractContextManager[None]]:
    """Make every write beyond so many bytes of a file fail, as on a full disk."""

    @contextmanager
    def limited(size: int) -> Iterator[None]:
        import resource  # which Windows lacks

        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    return limited


# A browser, for pages of the site and of runs

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)


class _Quiet(SimpleHTTPRequestHandler):
    def log_request(self, *args: Any) -> None:
        """Say nothing of each request."""


@contextmanager
def _served(folder: Path) -> Iterator[str]:
    """A folder at an address of this machine, since scripts of a page may not read files."""
    handler = partial(_Quiet, directory=str(folder))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}"
        finally:
            server.shutdown()
            thread.join()


@pytest.fixture
def console(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., list[str]]:
    """What Chromium says on its console about pages of a folder, each in a frame of its own."""
    if CHROMIUM is None:
        missing = pytest.fail if IN_CI else pytest.skip
        missing("no Chromium to open pages in; `apt-get install chromium` brings it")
    flags = [
        "headless", "no-sandbox", "disable-gpu", "disable-background-networking", "no-first-run",
        f"user-data-dir={tmp_path_factory.mktemp('profile')}", "enable-logging=stderr",
        "virtual-time-budget=5000",
    ]  # fmt: skip

    def console(folder: Path, *pages: str) -> list[str]:
        frames = "".join(f'<iframe src="{page}" width=1200 height=800></iframe>' for page in pages)
        (folder / "frames.html").write_text(f"<!doctype html>{frames}<p>framed", encoding="utf-8")
        with _served(folder) as address:
            command = [CHROMIUM, *(f"--{flag}" for flag in flags), "--dump-dom"]
            done = subprocess.run(
                [*command, f"{address}/frames.html"],
                capture_output=True,
                text=True,
                timeout=180,
                check=True,
            )
        assert "framed" in done.stdout
        return [line for line in done.stderr.splitlines() if "CONSOLE" in line]

    return console
