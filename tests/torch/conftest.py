"""What all tests of the torch half share: one thread, and a count of what was run."""

from collections import defaultdict

import pytest
import torch

# The tensors are tiny: threads would only wait for each other, and the tests run in two processes.
torch.set_num_threads(1)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say how many configurations were run, so that none can vanish unseen."""
    seen: dict[str, set[str]] = defaultdict(set)
    for report in terminalreporter.stats.get("passed", []):
        for name, value in report.user_properties:
            if name.startswith("configuration: "):
                seen[name.removeprefix("configuration: ")].add(value)
    if seen:
        terminalreporter.section("configurations that passed")
        for kind, ids in sorted(seen.items()):
            terminalreporter.write_line(f"{len(ids):5d} {kind}")
