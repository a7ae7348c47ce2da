"""Norm, clip, skip, EMA and zeroing in Triton kernels give the C++ kernels' bits, and wait for nothing."""

import itertools
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

import fused_optim
from support.cases import BACKEND, DEVICE, Case
from support.kernels import assert_bits_of_cpp, cpp_kernels
from support.marks import each_capturable, each_optimizer, every_dtype
from support.program import bits, tame, wild

if BACKEND != "triton":
    pytest.skip("needs Triton: a GPU or its interpreter", allow_module_level=True)

# A norm's chunks have 65536 elements in parts of 16384 and lanes of 128.
NORM_NUMELS = (0, 1, 511, 512, 513, 16385, 65535, 65536, 65537, 131073 + 128)
NUMELS = (0, 1, 513, 8193)
SCALE = 3.0  # not a power of two: that it divides shows
ALL = {
    "max_grad_norm": 1.0,
    "skip_nonfinite": True,
    "zero_grads": True,
    "ema_decay": 0.9,
    "ema_warmup": True,
}


def params_of(dtypes: Sequence[torch.dtype]) -> list[Tensor]:
    """One of each size and dtype, one that is not aligned, one whose grads lie transposed."""
    params = [tame(n, dtype, seed=n) for n in NUMELS for dtype in dtypes]
    params.append(tame(1032, dtypes[0], seed=1)[1:])
    params.append(tame(37 * 29, dtypes[0], seed=2).view(37, 29))
    return params


def grads_of(params: Sequence[Tensor], step: int, bad: float | None) -> list[Tensor]:
    grads = [
        tame(p.numel(), p.dtype, seed=7 * step + i).view(p.shape) for i, p in enumerate(params)
    ]
    grads[-1] = grads[-1].t().contiguous().t()
    if bad is not None:
        grads[-2][-1] = bad
    return grads


def assert_same(
    build: Any,
    options: dict[str, Any],
    dtypes: Sequence[torch.dtype] = (torch.float32,),
    steps: Sequence[float | None] = (None, None),
    **program: Any,
) -> None:
    """Over as many `steps`; a number there is put into a grad, and the step is skipped."""
    params = params_of(dtypes)
    grads = [grads_of(params, step, bad) for step, bad in enumerate(steps)]
    skips = [step for step, bad in enumerate(steps) if bad is not None]
    assert_bits_of_cpp(build, params, grads, options, skips=skips, **program)


@pytest.mark.parametrize("values", [tame, wild])
@every_dtype
def test_norm_has_the_same_bits(dtype: torch.dtype, values: Any) -> None:
    def norm(device: torch.device, sizes: Sequence[int]) -> Tensor:
        params = [torch.zeros(n, dtype=dtype, device=device) for n in sizes]
        for i, param in enumerate(params):
            # The last one is not aligned.
            shifted = torch.zeros(len(param) + 1, dtype=dtype, device=device)
            param.grad = shifted[1:] if i == len(params) - 1 else torch.zeros_like(param)
            param.grad.copy_(values(len(param), dtype, seed=i))
        opt = fused_optim.SGD(params, lr=0.0, max_grad_norm=float("inf"))
        opt.step()
        assert opt.grad_norm.dtype == torch.float64 and opt.grad_norm.device.type == device.type
        return bits(opt.grad_norm.cpu())

    all_sizes = NORM_NUMELS if dtype == torch.float32 else (513, 16385, 65537)
    for sizes in (all_sizes, (511,)) if values is tame else (NUMELS,):
        ours = norm(DEVICE, sizes)
        with cpp_kernels():
            assert torch.equal(ours, norm(torch.device("cpu"), sizes))


def test_norm_of_more_chunks_than_finish_has_lanes() -> None:
    measure = pytest.importorskip("fused_optim.triton_kernels.measure")
    sums = tame(512 * 4 + 700, torch.float64, seed=0).square()
    partials = torch.cat([sums, torch.zeros_like(sums)]).to(DEVICE)
    result = torch.zeros(6, dtype=torch.float64, device=DEVICE)
    extra = torch.zeros(2, dtype=torch.float64, device=DEVICE)
    measure.finish[(1,)](
        partials, len(sums), extra, None, None, None, None, None, result, SKIPS_NONFINITE=False
    )
    lanes = torch.zeros(512, dtype=torch.float64)
    for first in range(0, len(sums), 512):
        part = sums[first : first + 512]
        lanes[: len(part)] += part
    while len(lanes) > 1:
        lanes = lanes[: len(lanes) // 2] + lanes[len(lanes) // 2 :]
    assert result[0].item() == lanes.item()


@each_optimizer
@pytest.mark.parametrize("bad", [float("nan"), float("-inf")])
def test_all_in_one_pass(case: Any, bad: float) -> None:
    """The second step is skipped, or the first one."""
    steps = (None, bad, None) if bad == bad else (bad, None)
    assert_same(case.fused, ALL, steps=steps)


@pytest.mark.parametrize(
    ("dtype", "write"),
    [
        *itertools.product(
            (torch.float32, torch.bfloat16), ("kept", "unscaled", "clipped", "zeroed")
        ),
        *itertools.product((torch.float64, torch.float16), ("unscaled", "clipped")),
    ],
    ids=str,
)
def test_what_is_left_in_the_grads(dtype: torch.dtype, write: str) -> None:
    options: dict[str, Any] = {"max_grad_norm": 2.0, "ema_decay": 0.75}
    if write == "clipped":
        options |= {"write_clipped_grads": True, "ema_dtype": torch.float32}
    if write == "zeroed":
        options |= {"zero_grads": True, "max_grad_norm": None, "ema_dtype": torch.float32}
    scale = None if write == "kept" else SCALE
    assert_same(fused_optim.AdamW, options, dtypes=(dtype,), scale=scale)


def test_dtypes_in_one_norm() -> None:
    dtypes = (torch.bfloat16, torch.float32, torch.float64)
    assert_same(fused_optim.Adagrad, ALL, dtypes=dtypes, steps=(None, float("inf")))


@each_capturable
def test_capturable(case: Case) -> None:
    options = {**ALL, "skip_nonfinite": False}
    assert_same(case.fused, options, steps=(None, None, None), only_device={"capturable": True})


def test_momentum_starts_with_the_first_step_that_is_not_skipped() -> None:
    def build(params: list[Tensor], **options: Any) -> torch.optim.Optimizer:
        return fused_optim.SGD(params, lr=0.1, momentum=0.9, dampening=0.5, **options)

    options = {"skip_nonfinite": True, "max_grad_norm": None}
    assert_same(build, options, steps=(float("nan"), float("nan"), None, None))


def test_large_float64_squares_overflow_without_a_skip() -> None:
    param = torch.zeros(5, dtype=torch.float64, device=DEVICE)
    param.grad = torch.full_like(param, 1e200)
    opt = fused_optim.SGD([param], lr=1.0, skip_nonfinite=True)
    opt.step()
    assert opt.grad_norm.item() == float("inf") and opt.skipped_steps.item() == 0
    assert param.tolist() == [-1e200] * 5


def scaled_step(opt: Any, scaler: Any, params: list[Tensor], bad: bool) -> None:
    for param in params:
        param.grad = torch.ones_like(param) * scaler.scale(torch.ones((), device=DEVICE))
    if bad:
        params[0].grad[1] = float("nan")
    scaler.step(opt)
    scaler.update()


def test_grad_scaler_learns_what_the_step_has_found() -> None:
    params = [torch.zeros(3, device=DEVICE) for _ in range(2)]
    opt = fused_optim.AdamW(params, lr=0.5, max_grad_norm=1.0, zero_grads=True)
    scaler = fused_optim.GradScaler(DEVICE.type, init_scale=1024.0, growth_interval=2)
    scales = []
    for bad in (True, False, True, False, False):
        scaled_step(opt, scaler, params, bad)
        scales.append(scaler.get_scale())
        assert not any(param.grad.any() for param in params), "zeroed, even by a skipped step"
    assert scales == [512.0, 512.0, 256.0, 256.0, 512.0]
    assert opt.skipped_steps.item() == 2 and opt.skipped_steps.dtype == torch.int64
    assert opt.grad_norm.item() == pytest.approx(6**0.5)
    assert {state["step"].item() for state in opt.state.values()} == {3.0}


def test_param_without_grad_is_averaged_unless_the_device_skips() -> None:
    params = [torch.full((3,), float(i), device=DEVICE) for i in range(2)]
    opt = fused_optim.SGD(params, lr=0.0, skip_nonfinite=True, ema_decay=0.5)
    for step, bad in enumerate((False, True, False)):
        params[0].grad = torch.full((3,), float("inf") if bad else 1.0, device=DEVICE)
        params[1].fill_(float(step + 1))
        opt.step()
    assert opt.ema_params()[1].tolist() == [2.0] * 3, "of 1 and 3"
    assert [entry["n_averaged"] for entry in opt.state_dict()["ema"].values()] == [2, 2]


@pytest.mark.parametrize("skips", [False, True], ids=["clips", "skips"])
def test_what_falls_back_to_stock_is_measured_and_clipped_too(skips: bool) -> None:
    params = [torch.zeros(4, device=DEVICE) for _ in range(2)]
    opt = fused_optim.SGD(
        params, lr=1.0, max_grad_norm=1.0, skip_nonfinite=skips, write_clipped_grads=True,
        ema_decay=0.5,
    )  # fmt: skip
    params[0].grad = torch.full((4,), 3.0, device=DEVICE)
    params[1].grad = torch._neg_view(torch.full((4,), 4.0, device=DEVICE))  # no kernel takes that
    opt.step()
    assert opt.last_step.tensors == {"triton": 1, "stock": 1}
    assert opt.grad_norm.item() == 10.0
    for param, expected in zip(params, (-0.3, 0.4)):
        torch.testing.assert_close(param, torch.full_like(param, expected))
        torch.testing.assert_close(param.grad.resolve_neg(), -param)
    for average, param in zip(opt.ema_params(), params):
        assert torch.equal(average, param)
    params[0].grad.fill_(float("nan"))
    before = [param.clone() for param in params]
    opt.step()
    if skips:
        assert all(torch.equal(*pair) for pair in zip(params, before))
    assert opt.skipped_steps.item() == int(skips)
