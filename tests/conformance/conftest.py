"""Fetches PEFT's tests once, prepares small local models, and prints what ran and what was left out.

`make conformance`, or any run that collects this folder. The tests come from the source distribution of the installed
PEFT, which pip fetches into `upstream/` (ignored by git) the first time. Set MOE_PEFT_SKIP_CONFORMANCE=1 to do without.
"""

from collections import Counter

import pytest
import torch

from . import checkpoints, factory


collect_ignore = ["upstream"]
if factory.unwanted or not factory.upstream_is_here():
    collect_ignore_glob = ["test_[!u]*.py"]  # test_upstream.py stays, and says why


def pytest_configure(config: pytest.Config) -> None:
    for marker in factory.UPSTREAM_MARKERS:
        config.addinivalue_line("markers", marker)


@pytest.fixture(scope="session", autouse=True)
def local_checkpoints() -> None:
    checkpoints.write_all()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    here = "/".join(__package__.split("."))
    counts: dict[str, Counter] = {}
    for outcome in ("passed", "failed", "error", "skipped"):
        for report in terminalreporter.stats.get(outcome, ()):
            path = report.nodeid.split("::")[0]
            if f"{here}/test_" in path:
                counts.setdefault(path.rsplit("/", 1)[-1], Counter())[outcome] += 1
    if not counts:
        return
    excluded = factory.excluded_counts()
    for module in sorted(counts):
        counts[module]["excluded"] = excluded.get(module, 0)
    total = sum(counts.values(), Counter())
    for module, count in [*sorted(counts.items()), ("in all", total)]:
        parts = [f"{count['passed']} passed", f"{count['excluded']} excluded", f"{count['skipped']} skipped"]
        bad = count["failed"] + count["error"]
        terminalreporter.write_line(f"conformance: {', '.join(parts + [f'{bad} failed'] * bool(bad))} ({module})")
    for line in factory.loose_ends():
        terminalreporter.write_line(f"conformance: {line}")


@pytest.fixture(autouse=True)
def _same_numbers_in_every_run():
    """Upstream's toy models start from whatever the generator holds; a router whose step is too small to be seen by
    `allclose` would fail once in many runs."""
    torch.manual_seed(0)
