"""pytest plugin: report the outcomes of tests as they come, so that a run that is stopped leaves what it had."""

import json
import os
from typing import Any


def pytest_configure(config: Any) -> None:
    if "PYTEST_XDIST_WORKER" not in os.environ:
        config.pluginmanager.register(Reporter(config))


class Reporter:
    """Prints a line of JSON for each test that failed or was skipped, and how many passed."""

    def __init__(self, config: Any):
        self.config = config
        self.counts = {"passed": 0, "failed": 0, "skipped": 0}

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.when == "call" or not report.passed:
            self.counts[report.outcome] += 1
            self.print("test counts", run="tests", **self.counts)
        if not report.passed:
            reason = report.longrepr[-1] if isinstance(report.longrepr, tuple) else str(report.longrepr)[-600:]
            self.print("tests", test=report.nodeid, outcome=report.outcome, reason=reason)

    def pytest_collectreport(self, report: Any) -> None:
        if report.failed:
            self.print("tests", test=report.nodeid, outcome="not collected", reason=str(report.longrepr)[-600:])

    def print(self, section: str, **row: Any) -> None:
        terminal = self.config.pluginmanager.get_plugin("terminalreporter")
        terminal.write("\n" + json.dumps({"section": section, "row": row}) + "\n")  # after the dots of progress
