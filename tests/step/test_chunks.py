"""Cutting tensors into work: indices beyond 2**31, and every thread count."""

import pytest

from fused_optim import _C
from support.marks import needs_cpu_kernels

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
