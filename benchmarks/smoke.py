"""First contact with a GPU, in half a minute: one line per check, and the first traceback in full.

    python benchmarks/smoke.py [--only 'bits *' ...]

Without a GPU, what needs none runs in Triton's interpreter:

    TRITON_INTERPRET=1 FUSED_OPTIM_BACKEND=triton python benchmarks/smoke.py --device cpu
"""

from __future__ import annotations

import argparse
import contextlib
import fnmatch
import functools
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
import triton
import triton.language as tl
from torch import Tensor, nn

import fused_optim
from fused_optim import backends
from fused_optim.bench.contestants import device_copy
from fused_optim.bench.device import EventTimer
from fused_optim.bench.timing import HostTimer, Step, quartiles
from fused_optim.optimizers import OPTIMIZERS

# Each optimizer with all of its states; those that are not here have them by default.
ALL_STATES: dict[str, dict[str, Any]] = {
    "Adam": {"amsgrad": True},
    "SGD": {"momentum": 0.9, "nesterov": True},
    "RMSprop": {"centered": True, "momentum": 0.9},
    "Lion": {"weight_decay": 0.1},
}
OPTIONS = {name: ALL_STATES.get(name, {}) for name in OPTIMIZERS}
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
FORMATS: list[tuple[torch.dtype, dict[str, Any]]] = [
    (torch.float32, {"state_dtype": "int8"}),
    (torch.float32, {"state_dtype": torch.bfloat16}),
    (torch.bfloat16, {"master": "stochastic"}),
    (torch.bfloat16, {"master": "split16", "state_dtype": torch.bfloat16}),
    (torch.bfloat16, {"master": "split8", "state_dtype": "int8"}),
]
ONE_PASS = {"max_grad_norm": 1.0, "skip_nonfinite": True, "zero_grads": True, "ema_decay": 0.9}
# Below, at and above what a program takes at once and in all; states of 4,096 elements and more take 8 bits.
NUMELS = (1, 7, 513, 2048, 5003, 70_001)
MISALIGNED = 999
COPY_NBYTES = 2**30
ADD_BLOCK = tl.constexpr(256)


@dataclass(frozen=True)
class Check:
    """A line of the report.

    run: raises if the check fails; what it returns is printed.
    """

    name: str
    run: Callable[[], object]
    needs_gpu: bool = True


def bits(tensor: Tensor | None) -> Tensor:
    """The bits of every element, with one NaN for all."""
    assert tensor is not None
    copy = tensor.detach().cpu().flatten().clone()
    if copy.is_floating_point():
        copy[copy.isnan()] = float("nan")
    return copy.view(torch.uint8)


def outcome(
    name: str, dtype: torch.dtype, device: torch.device, backend: str, **options: Any
) -> dict[str, Tensor]:
    """Bits of all that two steps leave behind; the last param is not aligned."""
    generator = torch.Generator().manual_seed(0)

    def draw(numel: int) -> Tensor:
        drawn = torch.randn(numel, generator=generator, dtype=torch.float64)
        return drawn.to(dtype).to(device)

    params = [nn.Parameter(draw(numel)) for numel in NUMELS]
    params.append(nn.Parameter(draw(MISALIGNED + 1)[1:]))
    optimizer = getattr(fused_optim, name)(params, **options)
    for _ in range(2):
        for param in params:
            param.grad = draw(param.numel())
        optimizer.step()
    expect(optimizer, backend, len(params))
    found = {f"param {i}": param for i, param in enumerate(params)}
    found |= {f"grad {i}": param.grad for i, param in enumerate(params)}
    for i, param in enumerate(params):
        found |= {f"{key} {i}": value for key, value in optimizer.state[param].items()}
    if "ema_decay" in options:
        found |= {f"average {i}": average for i, average in enumerate(optimizer.ema_params())}
        found["norm"] = optimizer.grad_norm
    return {key: bits(value) for key, value in found.items()}


def expect(optimizer: Any, backend: str, n_tensors: int) -> None:
    """Whether the backend has stepped them all."""
    step = optimizer.last_step
    reasons = {fallback.reason for fallback in step.fallbacks}
    assert step.tensors == {backend: n_tensors}, f"{step.tensors}: {'; '.join(reasons)}"


@contextlib.contextmanager
def cpp_kernels() -> Iterator[None]:
    """CPU tensors go to the C++ kernels meanwhile, in the interpreter's process too."""
    with mock.patch.multiple(
        backends, device_types=lambda: 0, interpreted=lambda: False, forced=lambda: None
    ):
        yield


def same_bits(device: torch.device, name: str, dtype: torch.dtype, **options: Any) -> None:
    """As the C++ kernels'."""
    ours = outcome(name, dtype, device, "triton", **options)
    options.pop("capturable", None)  # for GPUs alone, and no other arithmetic
    with cpp_kernels():
        expected = outcome(name, dtype, torch.device("cpu"), "cpu", **options)
    assert ours.keys() == expected.keys(), ours.keys() ^ expected.keys()
    differ = [key for key in ours if not torch.equal(ours[key], expected[key])]
    assert not differ, f"other bits than the C++ kernels' in {', '.join(differ)}"


def environment(device: torch.device) -> str:
    from fused_optim import _C

    said = (
        f"python {sys.version.split()[0]}, torch {torch.__version__}, triton {triton.__version__}"
    )
    said += f", {_C.isa()}, {fused_optim.__file__}"
    if device.type == "cuda":
        torch.empty(1024, pin_memory=True)
        gpu = torch.cuda.get_device_properties(device)
        free = torch.cuda.mem_get_info(device)[0] / 2**30
        said += (
            f", {gpu.name} sm_{gpu.major}{gpu.minor}, {gpu.multi_processor_count} multiprocessors, "
            f"L2 {gpu.L2_cache_size >> 20} MiB, {free:.0f} GiB free"
        )
    return said


@triton.jit
def add_one(source, target, numel, BLOCK: tl.constexpr):
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = index < numel
    tl.store(target + index, tl.load(source + index, mask=mask) + 1, mask=mask)


def plain_triton(device: torch.device) -> None:
    """Tells a broken Triton from a broken package."""
    source = torch.arange(1000, device=device, dtype=torch.float32)
    target = torch.zeros_like(source)
    add_one[(4,)](source, target, 1000, ADD_BLOCK)
    assert torch.equal(target, source + 1)


def small(
    device: torch.device, n_tensors: int = 20, shape: tuple[int, ...] = (64, 33), **options: Any
) -> tuple[Any, list[nn.Parameter]]:
    """AdamW over params with grads."""
    generator = torch.Generator().manual_seed(0)
    params = []
    for _ in range(n_tensors):
        param = nn.Parameter(torch.randn(shape, generator=generator).to(device))
        param.grad = torch.randn(shape, generator=generator).to(device)
        params.append(param)
    return fused_optim.AdamW(params, **options), params


def waits_for_nothing(device: torch.device, **options: Any) -> None:
    optimizer, params = small(device, **options)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):  # the first one, which compiles, too
            optimizer.step()
            optimizer.param_groups[0]["lr"] *= 0.5
    finally:
        torch.cuda.set_sync_debug_mode("default")
    expect(optimizer, "triton", len(params))


def graph(device: torch.device) -> None:
    """A captured step, replayed, against the same steps uncaptured."""
    lr = torch.tensor(0.1, device=device)
    captured, params = small(device, capturable=True, lr=lr)
    eager, expected = small(device, lr=0.1)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        captured.step()
    torch.cuda.current_stream().wait_stream(side)
    replayed = torch.cuda.CUDAGraph()
    with torch.cuda.graph(replayed):
        captured.step()
    expect(captured, "triton", len(params))
    for _ in range(3):
        replayed.replay()
    for _ in range(4):
        eager.step()
    for ours, theirs in zip(params, expected):
        torch.testing.assert_close(ours, theirs)


def grad_scaler(device: torch.device) -> None:
    """The first step overflows and changes nothing."""
    optimizer, params = small(device, fused=True)
    scaler = torch.amp.GradScaler(device.type, init_scale=1024.0)
    before = params[0].detach().clone()
    for step in range(3):
        optimizer.zero_grad()
        scaler.scale(torch.stack([param.sum() for param in params]).sum()).backward()
        if step == 0:
            assert params[0].grad is not None
            params[0].grad[0, 0] = float("inf")
        scaler.step(optimizer)
        scaler.update()
        assert torch.equal(params[0], before) == (step == 0)
    assert scaler.get_scale() == 512.0


def another_stream(device: torch.device) -> None:
    optimizer, params = small(device)
    params[0].grad = torch.randn(33, 64, device=device).t()
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda.current_stream().wait_stream(torch.cuda.default_stream())
        optimizer.step()
    torch.cuda.synchronize()
    optimizer.step()
    expect(optimizer, "triton", len(params))


def default_device(device: torch.device) -> None:
    torch.set_default_device(device)
    try:
        param = nn.Parameter(torch.randn(64))
        param.grad = torch.randn(64)
        optimizer = fused_optim.AdamW([param])
        optimizer.step()
        expect(optimizer, "triton", 1)
    finally:
        torch.set_default_device(None)


def seconds(step: Step, hold: Step) -> float:
    """Of the device for one step."""
    step()
    timer = EventTimer(lambda: torch.cuda.Event(enable_timing=True), hold)
    return quartiles([timer.burst(step, 3, None) for _ in range(5)]).median


def bandwidth(device: torch.device) -> str:
    copy = device_copy(device, COPY_NBYTES)
    return f"{2 * COPY_NBYTES / seconds(copy, copy) / 1e12:.3f} TB/s"


def device_time(device: torch.device, dtype: torch.dtype, **options: Any) -> str:
    """A step of 2^28 params beside copy_ and torch's fused one, which knows no formats."""
    params = []
    for _ in range(16):
        params.append(nn.Parameter(torch.rand(2**24, dtype=dtype, device=device)))
        params[-1].grad = torch.rand_like(params[-1])
    copy = device_copy(device, COPY_NBYTES)
    copy_s = seconds(copy, copy)
    optimizer = fused_optim.AdamW(params, **options)
    ours_s = seconds(optimizer.step, copy)
    expect(optimizer, "triton", len(params))
    states = [v for p in params for v in optimizer.state[p].values() if v.dim() > 0]
    nbytes = sum(3 * param.nbytes for param in params) + 2 * sum(v.nbytes for v in states)
    del optimizer, states
    stock_s = seconds(torch.optim.AdamW(params, fused=True).step, copy)
    part = nbytes / ours_s / (2 * COPY_NBYTES / copy_s)
    return (
        f"{ours_s * 1e3:.3f} ms, {nbytes / ours_s / 1e12:.3f} TB/s, {part:.1%} of copy_; "
        f"torch fused {stock_s * 1e3:.3f} ms"
    )


def host_time(device: torch.device, n_tensors: int) -> str:
    optimizer, params = small(device, n_tensors, (16,))
    stock = torch.optim.AdamW(params, fused=True)

    def median_us(step: Step) -> float:
        step()
        timer = HostTimer()
        passes = [timer.burst(step, 1, torch.cuda.synchronize) for _ in range(30)]
        return quartiles(passes).median * 1e6

    return f"{median_us(optimizer.step):.0f} us; torch fused {median_us(stock.step):.0f} us"


def text_of(dtype: torch.dtype, options: dict[str, Any]) -> str:
    words = [str(word).removeprefix("torch.") for word in (dtype, *options.values())]
    return " ".join(words)


def checks_on(device: torch.device) -> list[Check]:
    """In the order in which a failure explains later ones."""
    found: list[Check] = []

    def add(
        name: str, run: Callable[..., object], *args: Any, on_cpu: bool = False, **options: Any
    ):
        run = functools.partial(run, device, *args, **options)
        found.append(Check(name, run, needs_gpu=not on_cpu))

    add("environment", environment, on_cpu=True)
    add("copy_ of 1 GiB", bandwidth)
    add("a plain Triton kernel", plain_triton, on_cpu=True)
    for name, options in OPTIONS.items():
        for dtype in DTYPES:
            what = f"bits {name} {text_of(dtype, {})}"
            add(what, same_bits, name, dtype, on_cpu=True, **options)
    for dtype, options in FORMATS:
        what = f"bits AdamW {text_of(dtype, options)}"
        add(what, same_bits, "AdamW", dtype, on_cpu=True, **options)
    for dtype, options in [(torch.float32, {}), FORMATS[0], FORMATS[3]]:
        what = f"bits AdamW {text_of(dtype, options)} one pass"
        add(what, same_bits, "AdamW", dtype, on_cpu=True, **options, **ONE_PASS)
    add("bits of hypers made on the device", same_bits, "AdamW", torch.float32, capturable=True)
    add("steps wait for nothing", waits_for_nothing)
    add("steps in one pass wait for nothing", waits_for_nothing, **ONE_PASS)
    add("CUDA graph", graph)
    add("GradScaler, the first step overflows", grad_scaler)
    add("another stream, a transposed grad", another_stream)
    add("torch.set_default_device", default_device)
    add("device time, float32", device_time, torch.float32)
    add("device time, bfloat16", device_time, torch.bfloat16)
    add("device time, float32 int8", device_time, torch.float32, state_dtype="int8")
    add("host time, 148 tensors", host_time, 148)
    add("host time, 2,000 tensors", host_time, 2000)
    return found


def is_broken(device: torch.device) -> bool:
    """Whether every call to the GPU fails from now on."""
    try:
        if device.type == "cuda":
            torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False


def run_all(checks: Sequence[Check], device: torch.device) -> bool:
    """Whether some ran and none failed."""
    n_ok, failed = 0, []
    for check in checks:
        begin = time.perf_counter()
        # Before it runs: it may hang, or end the process.
        print(f"{check.name:42} ", end="", flush=True)
        try:
            said = check.run()
            if device.type == "cuda":
                torch.cuda.synchronize()
        except BaseException as error:
            failed.append(check.name)
            print(f"FAIL {time.perf_counter() - begin:5.2f} s  {type(error).__name__}: {error}")
            if len(failed) == 1:
                traceback.print_exc(file=sys.stdout)
            if not isinstance(error, Exception):  # Ctrl-C
                break
            if is_broken(device):
                print("The CUDA context is broken: no check can run after this one.")
                break
        else:
            n_ok += 1
            print(f"ok   {time.perf_counter() - begin:5.2f} s  {said or ''}", flush=True)
    print(f"{n_ok} ok, {len(failed)} failed{': ' if failed else ''}{', '.join(failed)}", flush=True)
    return n_ok > 0 and not failed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", type=torch.device, default=torch.device("cuda"))
    parser.add_argument("--only", nargs="+", default=["*"], help="shell patterns of names")
    args = parser.parse_args()
    chosen = [
        check
        for check in checks_on(args.device)
        if any(fnmatch.fnmatchcase(check.name, pattern) for pattern in args.only)
        and (args.device.type == "cuda" or not check.needs_gpu)
    ]
    sys.exit(not run_all(chosen, args.device))


if __name__ == "__main__":
    main()
