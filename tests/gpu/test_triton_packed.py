"""Packed states and params in Triton kernels give the C++ kernels' bits, and stay on the kernels."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from gpu.test_triton_bits import cpp_kernels, moved
from gpu.test_triton_one_pass import tame
from rules.test_bitwise import Streams, assert_same_bits, bits, wild
from torch import Tensor

from support.cases import BACKEND, CASES, DEVICE, Case
from support.twins import by_id

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
# Of each rule the case with the most options: AdamW's is Adam's.
FULLEST = list(
    {
        case.optimizer: case
        for case in sorted(CASES, key=lambda case: len(case.options))
        if case.optimizer != "Adam"
    }.values()
)
ADAMW = next(case for case in FULLEST if case.optimizer == "AdamW")
SGD = next(case for case in FULLEST if case.optimizer == "SGD")


def outcome(
    case: Case,
    dtype: torch.dtype,
    options: dict[str, Any],
    device: torch.device,
    backend: str,
    skips: tuple[bool, ...] = (False, False),
    scaled: bool = False,
    numbers: Callable[[int, torch.dtype, int], Tensor] = wild,
) -> Streams:
    """All that steps leave behind; a skipped one is said to have found an infinity, if `scaled`."""
    params: list[Tensor] = [wild(numel, dtype, seed=numel).clone() for numel in NUMELS]
    params.append(wild(MISALIGNED + 1, dtype, seed=1)[1:])
    params.append(wild(67 * 71, dtype, seed=2).view(67, 71).t())
    params = [moved(param, device) for param in params]
    optimizer = case.fused(params, **options)
    found: Streams = {}
    for step, skipped in enumerate(skips):
        for i, param in enumerate(params):
            grad = numbers(param.numel(), dtype, 100 * step + i).view(param.shape)
            if backend == "cpu":  # C++ kernels take none in another order than a packed param
                grad = torch.empty_like(param).copy_(grad)
            param.grad = moved(grad, device)
        if scaled:
            optimizer.grad_scale = torch.tensor(3.0, device=device)
            optimizer.found_inf = torch.tensor(float(skipped), device=device)
        optimizer.step()
        report = optimizer.last_step
        assert (report is None and skipped) or report.tensors in ({}, {backend: len(params)})
        for i, param in enumerate(params):
            found[f"param {i} {step}"] = bits(param.cpu())
            found[f"grad {i} {step}"] = bits(param.grad.cpu())
            for key, value in optimizer.state[param].items():
                found[f"{key} {i} {step}"] = bits(value.cpu())
    if "ema_decay" in options:
        for i, average in enumerate(optimizer.ema_params()):
            found[f"ema {i}"] = bits(average.cpu())
    return found


def assert_bits_of_cpp(
    case: Case, dtype: torch.dtype, options: dict[str, Any], only_device: Any = (), **program: Any
) -> None:
    ours = outcome(case, dtype, {**options, **dict(only_device)}, DEVICE, "triton", **program)
    with cpp_kernels():
        cpu = torch.device("cpu")
        params = outcome(case, dtype, options, cpu, "cpu", **program)
    assert_same_bits(ours, params)


@pytest.mark.parametrize(("dtype", "options"), FORMATS, ids=FORMAT_IDS)
@pytest.mark.parametrize("case", FULLEST, ids=by_id)
def test_same_bits(case: Case, dtype: torch.dtype, options: dict[str, Any]) -> None:
    assert_bits_of_cpp(case, dtype, options)


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
    assert_bits_of_cpp(ADAMW, dtype, {**options, **ONE_PASS}, numbers=tame)


@pytest.mark.parametrize("case", [ADAMW, SGD], ids=by_id)
@pytest.mark.parametrize(("dtype", "options"), [FORMATS[0], FORMATS[3]], ids=["float32", "split8"])
def test_same_bits_where_the_device_counts_steps(
    case: Case, dtype: torch.dtype, options: dict[str, Any]
) -> None:
    assert_bits_of_cpp(case, dtype, options, skips=(False, True, False), scaled=True)


def test_same_bits_with_capturable() -> None:
    assert_bits_of_cpp(ADAMW, *FORMATS[3], only_device={"capturable": True})
