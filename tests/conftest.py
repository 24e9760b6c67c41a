"""What all tests share: in CI a missing optional package is a failure and not a skip."""

import gc
import os
from collections.abc import Generator

import pytest

# Programs that tests start in processes of their own, which importing would run; and what is for
# type checkers alone, of both frameworks.
collect_ignore_glob = ["*/scripts/*.py", "*/run_*.py", "*/*_worker.py", "typing/*.py"]

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
