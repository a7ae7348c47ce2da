"""A step allocates nothing that grows with the parameters, and indexes past 2^31 elements."""

import gc

import pytest
import torch

from support.cases import BACKEND, CASES, DEVICE, ONE_EACH, Case
from support.marks import few_cases, needs_8_gib, needs_cpu_kernels, not_interpreted
from support.processes import fresh_python, python
from support.twins import Run

# 16 Mi elements: a temporary of one tensor's size would take 64 MiB, 8 times what is allowed.
MEASURE = """
import torch
from pathlib import Path
from support.cases import CASES

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
@few_cases
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


TRAIN = """
import torch
from pathlib import Path
import fused_optim

def kib(name):
    line = next(l for l in Path("/proc/self/status").read_text().splitlines() if l.startswith(name))
    return int(line.split()[1])

def train(width, layers):
    model = torch.nn.Sequential(*(torch.nn.Linear(width, width, bias=False) for _ in range(layers)))
    x, opt = torch.randn(4, width), fused_optim.AdamW(model.parameters())
    if {released}:
        fused_optim.release_gradients(model, opt)
    before = kib("VmHWM")
    for _ in range(4):
        model(x).sum().backward()
        opt.step()
        opt.zero_grad()
    return kib("VmHWM") - before

torch.set_num_threads(1)  # each thread of a matmul keeps memory to work in
train(256, 2)  # loads code
print(train(1024, 16) // 1024)
"""


@needs_cpu_kernels
def test_released_grads_never_exist_at_once() -> None:
    # As it is, glibc scatters what later iterations allocate over what earlier ones have freed.
    environment = {"MALLOC_MMAP_THRESHOLD_": "65536"}
    growths = []
    for released in (False, True):
        program = TRAIN.format(released=released)
        done = fresh_python(program, **environment)
        assert done.returncode == 0, done.stderr
        growths.append(int(done.stdout))
    ordinary, released = growths
    # 16 params of 4 MiB, with two states each.
    assert ordinary >= (32 + 14) * 4
    assert released < (32 + 6) * 4


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
