"""Packed states and params in Triton kernels give the C++ kernels' bits, and stay on the kernels."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from support.cases import BACKEND, ONE_EACH, Case, fullest
from support.kernels import assert_bits_of_cpp
from support.marks import over
from support.program import tame, wild

if BACKEND != "triton":
    pytest.skip("needs Triton: a GPU or its interpreter", allow_module_level=True)

# States of 4096 elements and more have 8 bits; blocks and chunks are as in test_triton_bits.py. The last
# group of 64 is whole, short, or lies in a block of its own.
NUMELS = (0, 1, 4096, 5000, 8193, 16384 + 8192 + 65)
MISALIGNED = 4159
FORMATS: list[tuple[torch.dtype, dict[str, Any]]] = [
    (torch.float32, {"state_dtype": "int8"}),
    (torch.float32, {"state_dtype": torch.bfloat16}),
    (torch.bfloat16, {"master": "stochastic"}),
    (torch.bfloat16, {"master": "split8", "state_dtype": "int8"}),
    (torch.bfloat16, {"master": "split16", "state_dtype": torch.bfloat16}),
    (torch.float16, {"master": "stochastic", "state_dtype": torch.bfloat16}),
    (torch.float16, {"master": "split8", "state_dtype": torch.float32}),
    (torch.float16, {"master": "split16", "state_dtype": "int8"}),
]
FORMAT_IDS = ["-".join(map(str, (dtype, *options.values()))) for dtype, options in FORMATS]
ADAMW, SGD = fullest("AdamW"), fullest("SGD")


def assert_same(
    case: Case,
    dtype: torch.dtype,
    options: dict[str, Any],
    numbers: Callable[[int, torch.dtype, int], Tensor] = wild,
    n_steps: int = 2,
    **program: Any,
) -> None:
    params: list[Tensor] = [wild(numel, dtype, seed=numel).clone() for numel in NUMELS]
    params.append(wild(MISALIGNED + 1, dtype, seed=1)[1:])
    params.append(wild(67 * 71, dtype, seed=2).view(67, 71).t())
    grads = [
        [numbers(p.numel(), dtype, 100 * step + i).view(p.shape) for i, p in enumerate(params)]
        for step in range(n_steps)
    ]
    # C++ kernels take none in another order than a packed param.
    relaid = [[torch.empty_like(p).copy_(g) for p, g in zip(params, now)] for now in grads]
    assert_bits_of_cpp(case.fused, params, grads, options, grads_for_cpp=relaid, **program)


@pytest.mark.parametrize(("dtype", "options"), FORMATS, ids=FORMAT_IDS)
@over([ADAMW, SGD])
def test_same_bits(case: Case, dtype: torch.dtype, options: dict[str, Any]) -> None:
    assert_same(case, dtype, options)


# The formats are the same code around all rules. AdamW's rule is Adam's.
@over([case for case in ONE_EACH if case not in (ADAMW, SGD) and case.optimizer != "Adam"])
def test_same_bits_of_other_rules(case: Case) -> None:
    assert_same(case, *FORMATS[3])


ONE_PASS = {
    "max_grad_norm": 1.0,
    "skip_nonfinite": True,
    "ema_decay": 0.9,
    "write_clipped_grads": True,
}


@pytest.mark.parametrize(
    ("dtype", "options"), [FORMATS[0], FORMATS[4], FORMATS[6]], ids=lambda value: None
)
def test_same_bits_in_one_pass(dtype: torch.dtype, options: dict[str, Any]) -> None:
    # Grads that are not finite would skip the steps.
    assert_same(ADAMW, dtype, {**options, **ONE_PASS}, numbers=tame)


@over([ADAMW, SGD])
def test_same_bits_where_the_device_counts_steps(case: Case) -> None:
    assert_same(case, *FORMATS[3], n_steps=3, skips=[1], scale=3.0)


def test_same_bits_with_capturable() -> None:
    assert_same(ADAMW, *FORMATS[3], only_device={"capturable": True})
