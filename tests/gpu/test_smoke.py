"""benchmarks/smoke.py, as far as it runs without a GPU."""

import importlib
from pathlib import Path
from types import ModuleType

import pytest
import torch

from support.processes import fresh_python

pytest.importorskip("triton", reason="needs triton")

FOLDER = Path(__file__).parents[2] / "benchmarks"
CPU = torch.device("cpu")


def interpreted(program: str) -> tuple[int, list[str]]:
    """Exit status and output of a program that can import smoke.py, in Triton's interpreter."""
    path = f"import sys\nsys.path.insert(0, {str(FOLDER)!r})\n"
    environment = {"FUSED_OPTIM_BACKEND": "triton", "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = fresh_python(path + program, **environment, FUSED_OPTIM_TEST_DEVICE="")
    return done.returncode, done.stdout.splitlines()


def test_checks_run_in_the_interpreter() -> None:
    only = ["environment", "a plain*", "bits SGD float32", "bits AdamW float32 int8", "CUDA graph"]
    status, lines = interpreted(f"""
import smoke
sys.argv = ["smoke.py", "--device", "cpu", "--only", *{only}]
smoke.main()
""")
    assert status == 0, lines
    assert [line[:42].rstrip() for line in lines[:-1]] == [
        "environment", "a plain Triton kernel", "bits SGD float32", "bits AdamW float32 int8",
    ], "the graph needs a GPU"  # fmt: skip
    assert lines[-1] == "4 ok, 0 failed"


def test_other_bits_are_a_failure() -> None:
    status, lines = interpreted("""
import smoke
outcome = smoke.outcome

def negated_on_cpp(name, dtype, device, backend, **options):
    return outcome(name, dtype, device, backend, maximize=backend == "cpu", **options)

smoke.outcome = negated_on_cpp
sys.argv = ["smoke.py", "--device", "cpu", "--only", "bits Lion float32"]
smoke.main()
""")
    assert status == 1
    assert "AssertionError: other bits than the C++ kernels' in param 1, " in lines[0]
    assert lines[-1] == "0 ok, 1 failed: bits Lion float32"


@pytest.fixture
def smoke(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module("smoke")


def fail() -> None:
    raise RuntimeError("CUDA error: what the driver says")


def test_a_failed_check_leaves_the_others(
    smoke: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    checks = [smoke.Check(name, fail) for name in "ab"] + [smoke.Check("c", lambda: "said")]
    assert not smoke.run_all(checks, CPU)
    out = capsys.readouterr().out
    assert out.count("Traceback") == 1
    assert out.count("FAIL") == 2
    assert out.splitlines()[-2].endswith("  said")
    assert out.splitlines()[-1] == "1 ok, 2 failed: a, b"


def test_no_check_is_a_failure(smoke: ModuleType) -> None:
    assert smoke.run_all([smoke.Check("a", lambda: None)], CPU)
    assert not smoke.run_all([], CPU)


def test_nothing_runs_after_a_broken_context(
    smoke: ModuleType, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "synchronize", fail)
    checks = [smoke.Check("a", lambda: None), smoke.Check("b", lambda: None)]
    assert not smoke.run_all(checks, torch.device("cuda"))
    lines = capsys.readouterr().out.splitlines()
    assert lines[-2] == "The CUDA context is broken: no check can run after this one."
    assert lines[-1] == "0 ok, 1 failed: a"
