"""A step allocates nothing that grows with the parameters, and indexes past 2^31 elements."""

import gc

import pytest
import torch
from cases import BACKEND, CASES, DEVICE, Case
from marks import needs_8_gib, needs_cpu_kernels, not_interpreted
from twins import ONE_EACH, Run, python

# 16 Mi elements: a temporary of one tensor's size would take 64 MiB, 8 times what is allowed.
MEASURE = """
import torch
from pathlib import Path
from cases import CASES

def kib(name):
    line = next(l for l in Path("/proc/self/status").read_text().splitlines() if l.startswith(name))
    return int(line.split()[1])

case = next(case for case in CASES if case.id == {case_id!r})
params = [torch.nn.Parameter(torch.ones(4096, 4096)) for _ in range(2)]
for param in params:
    param.grad = torch.ones(4096, 4096)
params[1].grad = params[1].grad.{layout}
opt = getattr(case, {build!r})(params)
opt.step()
before = kib("VmRSS")
# Sets the peak back to the present.
Path("/proc/self/clear_refs").write_text("5")
opt.step()
opt.step()
print((kib("VmHWM") - before) // 1024)
"""


def growth_mib(case: Case, build: str, layout: str = "contiguous()") -> int:
    done = python(MEASURE.format(case_id=case.id, build=build, layout=layout))
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


@needs_cpu_kernels
@pytest.mark.parametrize("case", ONE_EACH, ids=lambda case: case.optimizer)
def test_a_step_allocates_nothing_of_the_params_size(case: Case) -> None:
    assert growth_mib(case, "fused", "t()") < 8


@needs_cpu_kernels
@pytest.mark.parametrize("layout", ["contiguous()", "fill_(2)[:1].expand(4096, 4096)"])
def test_nor_with_grads_in_another_layout(layout: str) -> None:
    assert growth_mib(ONE_EACH[0], "fused", layout) < 8


@needs_cpu_kernels
def test_the_measurement_sees_a_temporary() -> None:
    # Stock's for-loop makes one of the size of a tensor.
    case = next(case for case in ONE_EACH if "weight_decay" in dict(case.options))
    assert growth_mib(case, "stock") >= 60


def without_state() -> Case:
    """A case whose param is all the memory it needs."""
    for case in CASES:
        run = Run(case, case.stock)
        run.step()
        if not run.opt.state:
            return case
    raise AssertionError("every optimizer in the table has state")


@not_interpreted
@needs_8_gib
def test_more_than_2_to_the_31_elements() -> None:
    numel = 2**31 + 17
    param = torch.zeros(numel, dtype=torch.bfloat16, device=DEVICE)
    param.grad = torch.full_like(param[:1], 0.5).expand(numel)
    opt = without_state().fused([param], lr=1.0)
    opt.step()
    assert opt.last_step.tensors == {BACKEND: 1}
    for start in (0, 2**30 - 8, 2**31 - 16, 2**31 - 1, numel - 16):
        assert (param[start : start + 16] == -0.5).all(), start
    # And nothing in between was missed: each is counted, in slices that need no large temporary.
    for piece in param.split(2**28):
        assert piece.min() == piece.max() == -0.5
    del param, opt
    gc.collect()
