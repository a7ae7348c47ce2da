"""benchmarks/on_gpu.sh, as far as it runs without a GPU."""

import os
import subprocess
import sys
from pathlib import Path

from processes import HANG_S

ON_GPU = Path(__file__).parents[1] / "benchmarks" / "on_gpu.sh"


def run_on_gpu(out, **env):
    return subprocess.run(
        ["bash", str(ON_GPU)], capture_output=True, text=True, timeout=HANG_S,
        env={**os.environ, "OUT": str(out), **env},
    )  # fmt: skip


def test_the_script_lists_its_stages(tmp_path):
    subprocess.run(["bash", "-n", str(ON_GPU)], check=True, timeout=HANG_S)
    done = run_on_gpu(tmp_path / "out", DRY_RUN="1", PYTHON=sys.executable)
    assert done.returncode == 0, done.stderr
    stages = [line.split(",")[0] for line in done.stdout.splitlines() if ", at most " in line]
    assert stages == ["build", "test_cuda", "suite", "memcheck", "bench"]
    assert "FUSED_OPTIM_TEST_DEVICE=cuda" in done.stdout
    assert "bench --device cuda --json" in done.stdout
    assert not (tmp_path / "out").exists()


# In place of Python: finds no GPU tests, and knows one benchmark table.
FAKE_PYTHON = """#!/bin/bash
case "$*" in
  *" tests/test_cuda.py") echo "no such tests"; exit 4 ;;
  *"fused_optim bench"*) printf 'machine\\n\\n| work | ours |\\n|---|---|\\n| a | 1 |\\n\\n| ms |\\n' ;;
esac
"""


def test_the_script_goes_on_after_a_failure_and_remembers_it(tmp_path):
    python = tmp_path / "python"
    python.write_text(FAKE_PYTHON)
    python.chmod(0o755)
    # Without compute-sanitizer, wherever the test runs.
    done = run_on_gpu(tmp_path / "out", PYTHON=str(python), PATH="/usr/bin:/bin")
    assert done.returncode == 1
    lines = done.stdout.splitlines()
    assert "no such tests" in lines
    at = lines.index("| stage | result | seconds |")
    table = [line.strip("| ").split(" | ") for line in lines[at + 2 : at + 7]]
    assert [row[:2] for row in table] == [
        ["build", "ok"],
        ["test_cuda", "FAILED (4)"],
        ["suite", "ok"],
        ["memcheck", "no compute-sanitizer"],
        ["bench", "ok"],
    ]
    assert lines[at + 7 :] == ["", "| work | ours |", "|---|---|", "| a | 1 |"]
