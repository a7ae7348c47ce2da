"""benchmarks/on_gpu.sh, as far as it runs without a GPU."""

import gzip
import os
import subprocess
import sys
from pathlib import Path

import pytest

from support.processes import HANG_S

ROOT = Path(__file__).parents[2]
ON_GPU = ROOT / "benchmarks" / "on_gpu.sh"


def run_on_gpu(out: Path, **env: str) -> subprocess.CompletedProcess[str]:
    outside = {key: value for key, value in os.environ.items() if key != "STAGES"}
    return subprocess.run(
        ["bash", str(ON_GPU)], capture_output=True, text=True, timeout=HANG_S,
        env={**outside, "OUT": str(out), **env},
    )  # fmt: skip


def dry_run(out: Path, **env: str) -> dict[str, str]:
    """Stage -> its command."""
    done = run_on_gpu(out, DRY_RUN="1", PYTHON=sys.executable, **env)
    assert done.returncode == 0, done.stderr
    assert not out.exists()
    stages = {}
    for text in done.stdout.strip().split("\n\n"):
        head, command = text.split("\n", 1)
        stages[head.split(",")[0]] = command
    return stages


def test_a_first_run_has_these_stages(tmp_path: Path) -> None:
    stages = dry_run(tmp_path / "out")
    assert list(stages) == ["build", "smoke", "cuda", "bits", "sweep", "bench", "suite"]
    for name in ("cuda", "bits", "suite"):
        assert "-q --tb=short -p no:cacheprovider -n 12 --dist worksteal tests/" in stages[name]


def test_stages_are_chosen_by_name(tmp_path: Path) -> None:
    assert list(dry_run(tmp_path / "out", STAGES="suite smoke")) == ["build", "smoke", "suite"]
    stages = dry_run(tmp_path / "out", STAGES="memcheck bench_all")
    assert list(stages) == ["build", "memcheck", "bench_all"]
    assert "--report-api-errors no" in stages["memcheck"]
    assert "--only" not in stages["bench_all"]
    done = run_on_gpu(tmp_path / "out", STAGES="smoke suit")
    assert done.returncode == 2
    assert done.stderr.startswith("STAGES: there is no suit, only smoke cuda ")


def test_each_test_of_gpu_tensors_is_in_one_stage(tmp_path: Path) -> None:
    stages = dry_run(tmp_path / "out")
    chosen = [
        Path(word).stem.removeprefix("test_")
        for name in ("cuda", "bits", "suite")
        for word in stages[name].split()
        if word.startswith("tests/")
    ]
    assert len(set(chosen)) == len(chosen)
    some = {"cuda", "triton_bits", "triton_packed", "amp", "fuzz", "numerics", "state"}
    assert some <= set(chosen)
    # These compile, or write pages, or measure, on the CPU alone: minutes in each worker.
    assert not {"codegen", "triton_launch", "threads", "contributing", "bench_device"} & set(chosen)


# In place of Python. FAKE_SUITE is what the tests say.
FAKE_PYTHON = r"""#!/bin/bash
echo "$FUSED_OPTIM_TEST_DEVICE" >>"$CALLS"
case "$*" in
  *cache_tag*) echo cpython-3 ;;
  *benchmarks/smoke.py)
    printf 'bits SGD  ok   0.1 s\nhost time  ok  9 us\nb  FAIL\n3 ok, 1 failed: b\n'; exit 1 ;;
  *tests/gpu/test_cuda.py) printf 's\n5 skipped in 0.01s\n' ;;
  *tests/gpu/test_triton_bits.py*)
    printf '==== FAILURES ====\n__ test_a[1] __\nE   no bits\n=== summary ===\n'
    printf 'FAILED tests/test_x.py::test_a[1-a] - E\nFAILED tests/test_x.py::test_a[2] - E\n'
    printf '2 failed, 40 passed in 3s\n'; exit 1 ;;
  *benchmarks/sweep.py*) echo '12 configurations measured, 0 with other bits' ;;
  *tests/one_pass/test_amp.py*) echo '7 passed in 2s'; [ -z "$HANGS" ] || sleep 100 ;;
  *"fused_optim bench"*) printf 'machine\n\n| work | ours |\n|---|---|\n| a | 1 |\n| b | 2 |\n\n| ms |\n' ;;
esac
"""


@pytest.fixture
def fake(tmp_path: Path) -> dict[str, str]:
    """An environment for the script."""
    python = tmp_path / "python"
    python.write_text(FAKE_PYTHON)
    python.chmod(0o755)
    return {"PYTHON": str(python), "SITE": str(tmp_path / "site"), "CALLS": str(tmp_path / "calls")}


def rows_of(done: subprocess.CompletedProcess[str]) -> list[list[str]]:
    lines = done.stdout.splitlines()
    at = lines.index("| stage | result | what it says | seconds |")
    return [line.strip("| ").split(" | ")[:3] for line in lines[at + 2 :]]


def test_the_table_says_what_each_stage_has_proved(tmp_path: Path, fake: dict[str, str]) -> None:
    out = tmp_path / "out"
    done = run_on_gpu(out, **fake)
    assert done.returncode == 1
    assert rows_of(done) == [
        ["build", "ok", "1 built"],
        ["smoke", "FAILED (1)", "3 ok, 1 failed: b"],
        ["cuda", "NOTHING PASSED", "5 skipped in 0.01s"],
        ["bits", "FAILED (1)", "2 failed, 40 passed in 3s"],
        ["sweep", "ok", "12 configurations measured, 0 with other bits"],
        ["bench", "ok", "2 rows measured"],
        ["suite", "ok", "7 passed in 2s"],
    ]
    # What is printed first: failures by function, tracebacks, the benchmark's table.
    lines = done.stdout.splitlines()
    assert "      2 FAILED tests/test_x.py::test_a" in lines
    assert {"E   no bits", "host time  ok  9 us", "| b | 2 |"} <= set(lines)
    assert "bits SGD  ok   0.1 s" not in lines
    # Files, few of them: all that was printed.
    assert [file.name for file in out.iterdir()] == ["logs.gz"]
    logs = gzip.decompress((out / "logs.gz").read_bytes()).decode()
    assert "=== smoke: FAILED (1)\nbits SGD  ok   0.1 s\n" in logs
    assert set(Path(fake["CALLS"]).read_text().split()) == {"cuda"}, "the device of all stages"


def test_a_stage_that_runs_out_of_time_leaves_the_others(
    tmp_path: Path, fake: dict[str, str]
) -> None:
    done = run_on_gpu(tmp_path / "out", **fake, HANGS="1", TOTAL_S="4", STAGES="sweep suite")
    assert done.returncode == 1
    assert rows_of(done) == [
        ["build", "ok", "1 built"],
        ["sweep", "ok", "12 configurations measured, 0 with other bits"],
        ["suite", "OUT OF TIME", "7 passed in 2s"],
    ]


def test_all_is_well_where_all_is(tmp_path: Path, fake: dict[str, str]) -> None:
    assert run_on_gpu(tmp_path / "out", **fake, STAGES="sweep suite").returncode == 0
