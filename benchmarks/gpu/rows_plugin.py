"""A pytest plugin: the outcome of every test as a line of JSON, written as soon as it is known."""

from pathlib import Path
from typing import Any

from report import append_row


def pytest_addoption(parser: Any) -> None:
    parser.addoption("--rows", type=Path, required=True, help="file of outcomes")


def pytest_configure(config: Any) -> None:
    config.pluginmanager.register(Rows(config.getoption("--rows")))


class Rows:
    def __init__(self, file: Path) -> None:
        self.file = file

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.when != "call" and report.passed:
            return
        row = {"test": report.nodeid.split("::")[-1], "outcome": report.outcome, "seconds": round(report.duration, 2)}
        if not report.passed:
            row["message"] = str(report.longrepr)[-400:]
        append_row(self.file, row)
