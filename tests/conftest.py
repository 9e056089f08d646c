"""What several tests need."""
import os
import subprocess
from collections import Counter
from pathlib import Path

import pytest

from musekit import cli

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def golden() -> Path:
    """The folder of golden fixtures; where it is absent, the test is skipped."""
    folder = Path(os.environ.get("MUSEKIT_GOLDEN", ROOT.parent / "shared" / "golden"))
    if not folder.is_dir():
        pytest.skip(f"golden fixtures not found at {folder}; set MUSEKIT_GOLDEN to their folder")
    return folder


@pytest.fixture
def here(monkeypatch, capfd):
    """Runs commands in this process, which has imported everything already; returns what a finished
    process would."""
    monkeypatch.setenv("COLUMNS", "110")

    def run(folder, *arguments):
        monkeypatch.chdir(folder)
        capfd.readouterr()
        try:
            status = cli.main([str(argument) for argument in arguments])
        except SystemExit as end:
            status = end.code
        out, complaints = capfd.readouterr()
        return subprocess.CompletedProcess(arguments, status, out, complaints)

    return run


class Progress:
    """A line as the last test of a file ends, where several processes share the tests (`pytest -n`)."""

    def __init__(self, plugins):
        self.plugins = plugins
        self.left = {}  # tests by file
        self.total = {}
        self.seconds = Counter()  # of setup, test and teardown
        self.failed = Counter()

    @pytest.hookimpl(optionalhook=True)
    def pytest_xdist_node_collection_finished(self, ids):
        if not self.total:
            self.total = Counter(id.partition("::")[0] for id in ids)
            self.left = dict(self.total)

    def pytest_runtest_logreport(self, report):
        file = report.nodeid.partition("::")[0]
        self.seconds[file] += report.duration
        self.failed[file] += report.failed
        if file not in self.left or report.when != "teardown":
            return
        self.left[file] -= 1
        if not self.left[file]:
            failed = f", {self.failed[file]} failed" if self.failed[file] else ""
            done = sum(count == 0 for count in self.left.values())
            where = f"[{done:3}/{len(self.total)}] {file:40}"
            line = f"{where} {self.total[file]:4} tests {self.seconds[file]:5.0f} s{failed}"
            reporter = self.plugins.getplugin("terminalreporter")
            reporter.ensure_newline()
            reporter.write_line(line)

    def pytest_report_teststatus(self, report):
        """No dot for a test that passes, since its file gets a line."""
        if self.total and report.passed:
            return "passed" if report.when == "call" else "", "", ""


def pytest_configure(config):
    if config.getoption("numprocesses", None):
        config.pluginmanager.register(Progress(config.pluginmanager))
