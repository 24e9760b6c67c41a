"""Runs the contract for the framework that is installed, and says for which and how many tests."""

import os
from collections import Counter
from collections.abc import Callable, Sequence
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import pytest
from reference import HISTORIES, MATRIX, OPTIMIZERS, Run, ever_trained, walk

# Before TensorFlow is imported: quiet logs, and the two cores that the tests are planned for.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("TF_NUM_INTRAOP_THREADS", "2")
os.environ.setdefault("TF_NUM_INTEROP_THREADS", "2")

ADAPTERS = {"torch": "adapter_torch", "tensorflow": "adapter_keras"}

OUTCOMES = ("passed", "failed")

# Looking for doctests would import the adapter whose framework is absent.
collect_ignore = [f"{adapter}.py" for adapter in ADAPTERS.values()]


def the_one(installed: Sequence[str]) -> str:
    """The framework to run for; a contract that runs for none must not pass."""
    if len(installed) != 1:
        pytest.fail(
            f"the contract runs where one of {list(ADAPTERS)} is installed. Received: "
            f"{list(installed)}. Use the environments that the Makefile makes.",
            pytrace=False,
        )
    return installed[0]


@pytest.fixture
def choose() -> Callable[[Sequence[str]], str]:
    return the_one


@pytest.fixture
def adapter(record_property: Callable[[str, object], None]) -> Any:
    """The module that speaks the contract's verbs in the framework that is installed."""
    framework = the_one([name for name in ADAPTERS if find_spec(name)])
    record_property("contract", framework)
    return import_module(ADAPTERS[framework])


@pytest.fixture(scope="session")
def run_along() -> Callable[[Any, str, str], Run]:
    """Train along one of `HISTORIES` under one of `OPTIMIZERS`, once for all tests."""

    @cache
    def run(adapter: Any, optimizer: str, history: str) -> Run:
        schedule = HISTORIES[history]
        training = adapter.Training(
            MATRIX, schedule.trainable_rows(0), OPTIMIZERS[optimizer], ever_trained(schedule)
        )
        changed, tables, trained = [], [training.table], []
        for rows, batch in walk(schedule):
            training.train(rows if rows.size else "none")
            changed.append(training.table)
            trained.append(training.trainable_rows)
            training.step(*batch)
            tables.append(training.table)
        return Run(tables, changed, trained)

    return run


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    ran = Counter(
        (framework, outcome)
        for outcome in OUTCOMES
        for report in terminalreporter.stats.get(outcome, [])
        for name, framework in report.user_properties
        if name == "contract" and report.when == "call"
    )
    for framework in sorted({str(framework) for framework, _ in ran}):
        counts = {outcome: ran[framework, outcome] for outcome in OUTCOMES}
        told = ", ".join(f"{count} {outcome}" for outcome, count in counts.items())
        terminalreporter.section("contract")
        terminalreporter.write_line(
            f"{sum(counts.values())} contract tests ran for {framework}: {told}"
        )
