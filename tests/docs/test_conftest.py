"""What tests/conftest.py does about a broken CUDA context; without a GPU none works anyway."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from support.processes import HANG_S

if torch.cuda.is_available():
    pytest.skip("needs CPU kernels: on a GPU one would have to be broken", allow_module_level=True)

SUITE = """
import time

import pytest

@pytest.mark.parametrize("i", range(20))
def test_a_kernel(i):
    if i == 4:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")
    if i == 9:
        raise RuntimeError("just wrong")
    if i >= 10:  # the other worker's
        time.sleep(0.03)
"""

# Widens the moment in which xdist does not know yet that a worker has died, and cannot send to it.
SLOW_END = """
import os
import time

import pytest

end = os._exit
dead = set()

def end_later(status):
    time.sleep(0.5)
    end(status)

os._exit = end_later

@pytest.hookimpl(tryfirst=True)
def pytest_testnodeready(node):
    send = node.sendcommand

    def sendcommand(name, **kwargs):
        if node in dead:
            raise OSError("cannot send (already closed?)")
        send(name, **kwargs)

    node.sendcommand = sendcommand

def pytest_runtest_logreport(report):
    if "illegal memory access" in report.longreprtext:
        dead.add(getattr(report, "node", None))
"""


def run_pytest(folder: Path, *options: str) -> str:
    (folder / "test_it.py").write_text(SUITE)
    (folder / "slow_end.py").write_text(SLOW_END)
    tests = str(Path(__file__).parents[1])
    path = os.pathsep.join([tests, *(p for p in sys.path if p)])
    command = [sys.executable, "-m", "pytest", "-p", "conftest", "-p", "no:cacheprovider", *options]
    done = subprocess.run(
        [*command, "--rootdir", str(folder), "test_it.py"], cwd=folder, capture_output=True,
        text=True, timeout=HANG_S,
        env={**os.environ, "PYTHONPATH": path, "FUSED_OPTIM_TEST_DEVICE": "cuda"},
    )  # fmt: skip
    assert done.returncode != 0
    return done.stdout


def test_workers_are_replaced_and_all_other_tests_run(tmp_path: Path) -> None:
    out = run_pytest(tmp_path, "-n", "2", "--dist", "worksteal", "-p", "slow_end")
    failed = re.findall(r"^FAILED \S+\[(\d+)\]", out, re.MULTILINE)
    # Once by its own report, once by xdist's about the worker.
    assert sorted(failed) == ["4", "4", "9"], out
    assert re.search(r"3 failed, 18 passed", out), out
    assert "an illegal memory access" in out


def test_without_workers_the_session_ends(tmp_path: Path) -> None:
    out = run_pytest(tmp_path, "-p", "no:xdist")
    assert re.search(r"1 failed, 4 passed", out), out
    assert "test_it.py::test_a_kernel[4] broke the CUDA context" in out
