"""Triton kernels give the C++ kernels' bits, in the interpreter and on a GPU alike.

Compared are all bits of params and states; a NaN is a NaN, whatever its payload and sign.
"""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from support.cases import (
    BACKEND,
    CAPTURABLE,
    CASES,
    DTYPES,
    FEW_CASES,
    ONE_EACH,
    SHAPES,
    Case,
    n_steps_of_all,
)
from support.kernels import assert_bits_of_cpp, cpp_kernels
from support.marks import each_optimizer
from support.program import Program, Streams, assert_same_bits, wild

if BACKEND != "triton":
    pytest.skip("needs Triton: a GPU or its interpreter", allow_module_level=True)

# The interpreter takes blocks of 8192 elements and chunks of 16384, a GPU 512 and 2048.
NUMELS = (0, 1, 8193, 16385)
MISALIGNED = 1031


def params_and_grads(
    case: Case, dtype: torch.dtype, grad_dtype: torch.dtype
) -> tuple[list, list[list]]:
    """CPU tensors: one of each size, one that is not aligned, one whose grad lies transposed."""
    params = [wild(numel, dtype, seed=0).clone() for numel in NUMELS]
    params.append(wild(MISALIGNED + 1, dtype, seed=1)[1:])
    params.append(wild(37 * 29, dtype, seed=2).view(37, 29).clone())
    grads = []
    for step in range(1, n_steps_of_all(case) + 1):
        now = [wild(p.numel(), grad_dtype, seed=step).view(p.shape).clone() for p in params]
        now[-1] = now[-1].t().contiguous().t()
        grads.append(now)
    return params, grads


def assert_same(
    case: Case, dtype: torch.dtype, grad_dtype: torch.dtype, **only_device: Any
) -> None:
    params, grads = params_and_grads(case, dtype, grad_dtype)
    assert_bits_of_cpp(case.fused, params, grads, only_device=only_device)


def with_dtypes(cases: list[Case], computed: Sequence[torch.dtype]) -> pytest.MarkDecorator:
    """All cases in some dtypes; in others, a few."""
    pairs = [
        pytest.param(case, dtype, id=f"{case.id}-{dtype}")
        for case in cases
        for dtype in DTYPES
        if dtype in computed or case in FEW_CASES
    ]
    return pytest.mark.parametrize(("case", "dtype"), pairs)


@with_dtypes(CASES, (torch.float32,))
def test_same_bits(case: Case, dtype: torch.dtype) -> None:
    assert_same(case, dtype, dtype)


# The device prepares the same float64 numbers whatever the dtype of the params.
@pytest.mark.parametrize(
    ("case", "dtype"),
    [
        pytest.param(case, dtype, id=f"{case.id}-{dtype}")
        for case in dict.fromkeys((*FEW_CASES, *ONE_EACH))
        if case.optimizer in CAPTURABLE
        for dtype in DTYPES
        if dtype == torch.float32 or case.optimizer == "AdamW"
    ],
)
def test_same_bits_with_hypers_prepared_on_the_device(case: Case, dtype: torch.dtype) -> None:
    assert_same(case, dtype, dtype, capturable=True)


MIXED = [
    case
    for case in CASES
    if case.optimizer in ("SGD", "RMSprop", "Adagrad") and "centered" not in dict(case.options)
]


@pytest.mark.parametrize(
    ("dtype", "grad_dtype"),
    [
        (torch.float32, torch.bfloat16),
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
        (torch.float32, torch.float16),
    ],
    ids=str,
)
@pytest.mark.parametrize(
    "case", {case.optimizer: case for case in MIXED}.values(), ids=lambda case: case.id
)
def test_same_bits_of_mixed_dtypes(case: Case, dtype: torch.dtype, grad_dtype: torch.dtype) -> None:
    assert_same(case, dtype, grad_dtype)


@each_optimizer
def test_same_bits_in_every_layout(case: Case) -> None:
    """Params and grads that are slices, transposed or expanded, against contiguous copies."""
    generator = torch.Generator().manual_seed(0)
    shapes = [shape for shape in SHAPES if not shape.id.isdecimal()]
    params = [shape.param(torch.float32, generator) for shape in shapes]
    grads = [[shape.grad(torch.float32, generator) for shape in shapes] for _ in range(2)]

    def outcome(params: list[Tensor], grads: list[list[Tensor]], backend: str) -> Streams:
        program = Program(case.fused(params), params, lambda step: grads[step])
        program.step(len(grads))
        assert program.opt.last_step.tensors == {backend: len(shapes)}
        return program.harvest()

    copies = [p.cpu().clone(memory_format=torch.contiguous_format) for p in params]
    grad_copies = [
        [g.cpu().clone(memory_format=torch.contiguous_format) for g in now] for now in grads
    ]
    ours = outcome(params, grads, "triton")
    with cpp_kernels():
        assert_same_bits(ours, outcome(copies, grad_copies, "cpu"))
