"""What tests loop over, and what they need of the kernels under test or of the machine."""

from pathlib import Path

import pytest
import torch

from support import browser
from support.cases import (
    BACKEND,
    CAPTURABLE,
    CASES,
    DEVICE,
    DTYPES,
    FEW_CASES,
    ONE_EACH,
    PLAIN,
    STATE_CASES,
    VARIANTS,
    Case,
)

GIB = 2**30


def over(cases: list[Case]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("case", cases, ids=lambda case: case.id)


all_cases = over(CASES)
few_cases = over(FEW_CASES)
each_state = over(STATE_CASES)
each_optimizer = over(ONE_EACH)
plain_optimizers = over(PLAIN)
each_capturable = over([case for case in ONE_EACH if case.optimizer in CAPTURABLE])
each_name = pytest.mark.parametrize("name", VARIANTS)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)

needs_browser = pytest.mark.skipif(browser.find() is None, reason="needs chromium")

needs_cpu_kernels = pytest.mark.skipif(BACKEND != "cpu", reason="needs CPU kernels")

# Triton's interpreter is slow, and lets kernels step on the CPU what stock steps on a GPU alone.
not_interpreted = pytest.mark.skipif(
    BACKEND == "triton" and DEVICE.type == "cpu", reason="needs CPU kernels or a GPU"
)


def _available_bytes() -> int:
    if DEVICE.type == "cuda":
        return torch.cuda.mem_get_info()[0]
    meminfo = Path("/proc/meminfo")
    if not meminfo.exists():
        return 0
    line = next(line for line in meminfo.read_text().splitlines() if "MemAvailable" in line)
    return int(line.split()[1]) * 1024


needs_8_gib = pytest.mark.skipif(
    _available_bytes() < 8 * GIB, reason="needs 8 GiB of available memory"
)
