"""What holds for all tests: skips are counted, and in CI a skip outside tests/gpu is a failure."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import pytest

from tests.helpers.leaks import nothing_left

# Read where torch is imported, here and in every process that a test starts. The models are tiny, and threads that wait
# for each other on busy cores take many times as long as one.
os.environ["OMP_NUM_THREADS"] = "1"
# Under nohup and in the background of a script they are ignored, and so they would be by every process that a test
# starts and ends with them.
signal.signal(signal.SIGHUP, signal.SIG_DFL)
signal.signal(signal.SIGINT, signal.default_int_handler)

_skipped: list[str] = []


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.skipped and not report.nodeid.startswith("tests/gpu/"):
        _skipped.append(report.nodeid)


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    if os.environ.get("BIGTRAIN_FAIL_ON_SKIP") and _skipped:
        session.exitstatus = 1


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    terminalreporter.write_line(f"skipped outside tests/gpu: {len(_skipped)} {' '.join(_skipped)}".rstrip())


@pytest.fixture(autouse=True, scope="module")
def _nothing_left() -> Iterator[None]:
    """No module of tests leaves a process, a port or a file in shared memory."""
    with nothing_left():
        yield


@pytest.fixture(autouse=True)
def _own_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests do not inherit a launcher's variables."""
    monkeypatch.setenv("WANDB_MODE", "disabled")  # unless a test asks for it
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "BIGTRAIN_ATTEMPT_DIR"):
        monkeypatch.delenv(name, raising=False)
