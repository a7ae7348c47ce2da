"""Skips are printed, and one whose reason is not in ALLOWED_SKIPS fails the run.

A test that breaks the CUDA context ends its process.
"""

import gc
import os
from collections.abc import Generator, Iterator
from contextlib import suppress
from typing import Any

import pytest
import torch

from fused_optim import backends
from support.cases import DEVICE

# A reason is allowed when it starts with one of these: what a machine lacks, never what the code lacks.
ALLOWED_SKIPS = (
    "needs 8 GiB of available memory",
    "needs CPU kernels",
    "needs another ISA",
    "needs a second CPU",
    "needs fork",
    "needs a GPU",
    "needs a second GPU",
    "needs 20 GiB of available memory",
    "needs Triton: a GPU or its interpreter",
    "needs triton",
    "needs chromium",
    "needs make",
    "needs a wheel",
)

_skips: list[tuple[str, str]] = []


def _note(report: pytest.CollectReport | pytest.TestReport) -> None:
    if report.skipped:
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        _skips.append((report.nodeid, reason.removeprefix("Skipped: ")))


pytest_runtest_logreport = _note
pytest_collectreport = _note


def _unplanned() -> list[tuple[str, str]]:
    return [skip for skip in _skips if not skip[1].startswith(ALLOWED_SKIPS)]


def pytest_sessionfinish(session: pytest.Session) -> None:
    if _unplanned() and session.exitstatus in (
        pytest.ExitCode.OK,
        pytest.ExitCode.NO_TESTS_COLLECTED,
    ):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    for nodeid, reason in _skips:
        terminalreporter.line(f"skipped: {nodeid}: {reason}")
    for nodeid, reason in _unplanned():
        terminalreporter.line(f"skipped for a reason not in ALLOWED_SKIPS: {nodeid}: {reason}")


# What an error says after which every call to the GPU fails, until the process ends.
BREAKS_THE_CONTEXT = ("CUDA error", "illegal memory access", "device-side assert")


def _is_broken() -> bool:
    try:
        torch.cuda.synchronize()
    # The second from torch without CUDA, in test_conftest.py.
    except (RuntimeError, AssertionError):
        return True
    return False


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """A test that breaks the CUDA context fails alone, not with all that come after it."""
    report = yield
    if DEVICE.type != "cuda" or call.excinfo is None:
        return report
    said = str(call.excinfo.value)
    if any(text in said for text in BREAKS_THE_CONTEXT) and _is_broken():
        if hasattr(item.config, "workerinput"):
            item.ihook.pytest_runtest_logreport(report=report)  # sent when this returns
            os._exit(1)  # xdist starts another worker for the rest
        item.session.shouldstop = f"{item.nodeid} broke the CUDA context: no test can run after it"
    return report


@pytest.hookimpl(optionalhook=True)
def pytest_testnodeready(node: Any) -> None:
    """What xdist sends a worker that has just died would end the session (xdist 3.8)."""
    send = node.sendcommand

    def send_unless_dead(name: str, **kwargs: object) -> None:
        # Its end comes next in the queue of xdist, which gives its tests to others.
        with suppress(OSError):
            send(name, **kwargs)

    node.sendcommand = send_unless_dead


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """For small tensors, where more only wait. test_bitwise shows that they change nothing."""
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(n_threads)


@pytest.fixture(scope="module")
def frozen_heap() -> Iterator[None]:
    """Leaves what exists by now out of the collections of garbage that the benchmark begins with.

    Each would visit all that torch has made: most of the time of a test that measures for milliseconds.
    """
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(autouse=True, scope="session")
def fallbacks_beside_interpreted_kernels() -> Iterator[None]:
    """A GPU's kernels leave to stock what they cannot serve; forced ones, as these are, would refuse."""
    with pytest.MonkeyPatch.context() as patch:
        if backends.interpreted():  # which it has looked up once and for all
            patch.setattr(backends, "forced", lambda: None)
        yield
