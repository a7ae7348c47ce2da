"""Who is timed: our optimizers, torch.optim's variants, and the bandwidth probes."""

import contextlib
import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

import fused_optim
from fused_optim import FusedOptimizer, OnePassOptions, backends, plain
from fused_optim.bench.peers import STOCK_FLAGS
from fused_optim.bench.timing import Step
from fused_optim.bench.workloads import Workload

OURS = "fused_optim"
MATCHING = "matching layout"
NEVER_ON = "never switched on"
STOCK_CALLS = "stock calls"
# The one variant of what torch.optim lacks: the package's own, in torch's operations.
PLAIN = "plain loop"
PROBE = "probe"
COPY = "copy_"
CPU = torch.device("cpu")
QUICK_NUMEL = 1_000_000
# Of each of the two buffers of the copy on a GPU, many times any L2.
COPY_NBYTES = 2**30


@dataclass(frozen=True)
class Choice:
    """Which of several calls of torch does one part of a phase.

    variant: the fastest.
    seconds: of every variant by itself, the median.
    """

    variant: str
    seconds: dict[str, float]


@dataclass(frozen=True)
class Entrants:
    """All who are timed on one workload, past their first step.

    ours: the optimizer under test; of several, the first. Of it, what the last step did is read.
    steps: contestant -> its step.
    baselines: those that the ratio may compare with; none where torch.optim takes no such workload.
    nbytes: that our step reads and writes.
    n_streams: of a step alone, without what a phase adds.
    not_measured: who could not enter -> why.
    n_sets: sets of inputs, each with an optimizer of its own, that every step takes in turn.
    before: has to run before each step.
    stock_calls: part of a phase -> what does it in STOCK_CALLS; none but for phases.
    """

    ours: Any
    steps: dict[str, Step]
    baselines: list[str]
    nbytes: int
    n_streams: int
    not_measured: dict[str, str] = field(default_factory=dict)
    n_sets: int = 1
    before: Step | None = None
    stock_calls: dict[str, Choice] = field(default_factory=dict)


@contextlib.contextmanager
def reported(name: str, not_measured: dict[str, str]) -> Iterator[None]:
    """A contestant may fail in any way, for example while it compiles itself; the row says so."""
    try:
        yield
    except Exception as error:
        not_measured[name] = f"failed: {type(error).__name__}: {error}"


def make_params(workload: Workload, device: torch.device = CPU) -> list[nn.Parameter]:
    """Parameters with grads, all uniform in (-1, 1): the same values whoever asks."""
    generator = torch.Generator(device).manual_seed(0)

    def uniform(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        values = torch.empty(shape, dtype=dtype, device=device)
        real = torch.view_as_real(values) if dtype.is_complex else values
        real.uniform_(-1, 1, generator=generator)
        return values

    params = []
    for shape, dtype in zip(workload.shapes, workload.tensor_dtypes, strict=True):
        param = nn.Parameter(uniform(shape, dtype))
        param.grad = _with_layout(uniform(shape, dtype), workload.layout)
        params.append(param)
    return params


def copy_params(params: Sequence[nn.Parameter], layout: str) -> list[nn.Parameter]:
    """Parameters and grads of equal values in memory of their own."""
    copies = []
    for param in params:
        copy = nn.Parameter(param.detach().clone())
        assert param.grad is not None
        copy.grad = _with_layout(param.grad.clone(memory_format=torch.contiguous_format), layout)
        copies.append(copy)
    return copies


def _with_layout(grad: torch.Tensor, layout: str) -> torch.Tensor:
    """The same values with other strides, where the number of dimensions allows."""
    if layout == "transposed" and grad.dim() == 2:
        return grad.t().contiguous().t()
    if layout == "channels_last" and grad.dim() == 4:
        return grad.contiguous(memory_format=torch.channels_last)
    return grad


def ours(
    workload: Workload, params: Sequence[nn.Parameter], one_pass: OnePassOptions | None = None
) -> FusedOptimizer:
    """The optimizer under test."""
    options = {**workload.options, **workload.formats, **(one_pass or {})}
    return getattr(fused_optim, workload.optimizer)(params, **options)


def switched(workload: Workload, params: Sequence[nn.Parameter]) -> FusedOptimizer:
    """Ours after a step with the options of one pass, all of them off again.

    Memory lies as it does for an optimizer that never had them: states come before the averages, grads
    stay where they are.
    """
    optimizer = ours(workload, params)
    optimizer.step()
    grads = [param.grad for param in params if param.grad is not None]
    values = [grad.clone() for grad in grads]
    optimizer.max_grad_norm, optimizer.skip_nonfinite, optimizer.zero_grads = 1.0, True, True
    for group in optimizer.param_groups:
        group["ema_decay"] = 0.99
    optimizer.step()
    optimizer.max_grad_norm, optimizer.skip_nonfinite, optimizer.zero_grads = None, False, False
    for group in optimizer.param_groups:
        group["ema_decay"] = None
    for grad, value in zip(grads, values, strict=True):
        grad.copy_(value)
    return optimizer


def stock_variants(
    workload: Workload, *, quick: bool, asked: Sequence[str] = tuple(STOCK_FLAGS)
) -> tuple[list[str], dict[str, str]]:
    """The variants of torch.optim's optimizer that are measured, and why the others are not.

    For a huge workload, the fused one alone. Where torch.optim has no such optimizer, PLAIN.

    Args:
        quick: leave out what is never the best where it would cost the most time: everything but
            fused, if there is a fused one, from QUICK_NUMEL parameters on.
        asked: by the user; if torch.optim has none of these, they are as all.
    """
    optimizer = _stock_class(workload)
    if optimizer.__module__ == plain.__name__:
        return [PLAIN], dict.fromkeys(asked, f"torch.optim has no {workload.optimizer}")
    has_fused = "fused" in inspect.signature(optimizer).parameters
    why_not = {} if has_fused else {"fused": f"torch.optim has no fused {workload.optimizer}"}
    chosen = [name for name in STOCK_FLAGS if name in asked and name not in why_not]
    chosen = chosen or [name for name in STOCK_FLAGS if name not in why_not]
    if "fused" in chosen:
        reason = "workload too large" if workload.is_huge else "left out of a quick run"
        if workload.is_huge or (quick and workload.numel >= QUICK_NUMEL):
            why_not |= dict.fromkeys([name for name in chosen if name != "fused"], reason)
            chosen = ["fused"]
    return chosen, why_not


def stock(workload: Workload, params: Sequence[nn.Parameter], variant: str) -> Optimizer:
    """One variant of torch.optim's optimizer.

    Args:
        variant: a key of STOCK_FLAGS, or PLAIN.
    """
    optimizer = _stock_class(workload)
    accepted = inspect.signature(optimizer).parameters
    flags = {name: on for name, on in STOCK_FLAGS.get(variant, {}).items() if name in accepted}
    if workload.formats:
        params = [_in_float32(param) for param in params]
    return optimizer(params, **workload.options, **flags)


def _stock_class(workload: Workload) -> Any:
    return getattr(fused_optim, workload.optimizer)._stock


def _in_float32(param: nn.Parameter) -> nn.Parameter:
    if param.dtype.itemsize > 2:
        return param
    copy = nn.Parameter(param.detach().float())
    assert param.grad is not None
    copy.grad = param.grad.float()
    return copy


def start(optimizer: Optimizer, workload: Workload) -> None:
    """The first step, which makes the states, and the states' dtypes that the workload asks for.

    Raises:
        RuntimeError: the optimizer does not take these dtypes.
    """
    optimizer.step()
    if not workload.state_dtypes:
        return
    for states in optimizer.state.values():
        for name, dtype in workload.state_dtypes.items():
            states[name] = states[name].to(dtype)
    optimizer.step()


def bytes_per_step(optimizer: Optimizer) -> tuple[int, int]:
    """Bytes one step has to move, and the number of streams, both read off the optimizer's state.

    The grad is read, everything else read and written. Call it after the first step.
    """
    nbytes = 0
    n_streams = 0
    for group in optimizer.param_groups:
        for param in group["params"]:
            states = [
                value
                for value in optimizer.state.get(param, {}).values()
                if isinstance(value, torch.Tensor) and value.shape == param.shape and value.dim()
            ]
            nbytes += param.grad.nbytes + 2 * (param.nbytes + sum(s.nbytes for s in states))
            n_streams = max(n_streams, 2 + len(states))
    return nbytes, n_streams


def bandwidth_steps(nbytes: int, n_streams: int) -> dict[str, Step]:
    """A pass over as many streams with the same traffic and next to no arithmetic, and a copy.

    Without our kernels there is no probe.

    Args:
        nbytes: bytes the probe moves, reads and writes together.
        n_streams: one of them is only read.
    """
    numel = nbytes // (4 * (2 * n_streams - 1))
    streams = [torch.ones(numel) for _ in range(n_streams)]
    steps: dict[str, Step] = {COPY: lambda: streams[0].copy_(streams[1])}
    kernels = backends.cpu_kernels()
    if kernels is not None:
        n_threads = torch.get_num_threads()
        steps[PROBE] = lambda: kernels.probe(streams, n_threads)
    return steps


def copied_bytes(nbytes: int, n_streams: int) -> int:
    """Bytes that the copy of bandwidth_steps moves."""
    return 2 * 4 * (nbytes // (4 * (2 * n_streams - 1)))


def device_copy(device: torch.device, nbytes: int) -> Step:
    """A copy of so many bytes in the device's memory, which moves twice as many."""
    source = torch.ones(nbytes // 4, device=device)
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


def fallbacks(ours: Any) -> list[str]:
    """Distinct reasons for which tensors of the last step were left to torch.optim."""
    assert ours.last_step is not None  # measured: it has stepped
    return sorted({fallback.reason for fallback in ours.last_step.fallbacks})
