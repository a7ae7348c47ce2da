"""Cutting tensors into work: indices beyond 2**31, and every thread count."""

import pytest
import torch

import fused_optim
from fused_optim import _C
from support.cases import BACKEND, DEVICE
from support.marks import needs_8_gib, needs_cpu_kernels, not_interpreted

# A tensor whose element indices do not fit 32 bits, with a tail.
HUGE = 2**31 + 17


@needs_cpu_kernels
@pytest.mark.parametrize("numel", [0, 1, 16383, 16384, 16385, HUGE, 2**33 + 1])
def test_chunks_cover_every_element_once(numel: int) -> None:
    end = 0
    for begin, stop in _C.chunks(numel):
        assert begin == end
        assert begin % 64 == 0
        assert begin < stop
        end = stop
    assert end == numel


@not_interpreted
@needs_8_gib
def test_more_than_2_to_the_31_elements() -> None:
    param = torch.nn.Parameter(torch.zeros(HUGE, dtype=torch.bfloat16, device=DEVICE))
    # Zeros of fresh memory are never touched but by reading, so this costs no second 4 GiB.
    param.grad = torch.zeros(HUGE, dtype=torch.bfloat16, device=DEVICE)
    for index in (0, 2**31 - 1, 2**31, HUGE - 1):
        param.grad[index] = -1.0
    opt = fused_optim.SGD([param], lr=0.5)
    opt.step()
    assert opt.last_step.tensors == {BACKEND: 1}
    with torch.no_grad():
        assert param[[0, 2**31 - 1, 2**31, HUGE - 1]].tolist() == [0.5] * 4
        assert param[[1, 2**31 - 2, 2**31 + 1, HUGE - 2]].tolist() == [0.0] * 4
