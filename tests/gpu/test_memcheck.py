"""benchmarks/memcheck.py: its cases, in Triton's interpreter."""

from pathlib import Path

import pytest

from support.processes import fresh_python, python

pytest.importorskip("triton", reason="needs triton")

PROGRAM = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parents[2] / "benchmarks")!r})
import memcheck, torch
memcheck.NUMELS = (4099,)
memcheck.OPTIONS = {{name: memcheck.OPTIONS[name] for name in ("AdamW", "SGD", "Rprop")}}
memcheck.main(torch.device("cpu"))
"""


def test_all_cases_are_stepped_by_triton() -> None:
    interpreter = {"FUSED_OPTIM_BACKEND": "triton", "TRITON_INTERPRET": "1"}
    done = fresh_python(PROGRAM, **interpreter, OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "10 cases checked"


def test_what_triton_has_not_stepped_is_not_checked() -> None:
    done = python(PROGRAM, FUSED_OPTIM_BACKEND="stock")
    assert done.returncode == 1
    assert "AssertionError: {'stock': 6}: " in done.stderr
