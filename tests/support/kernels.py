"""The same program on the kernels under test, on a GPU or in Triton's interpreter, and on the C++ kernels."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from fused_optim import backends
from support.cases import DEVICE
from support.program import Program, Streams, assert_same_bits


@contextmanager
def cpp_kernels() -> Iterator[None]:
    """In the interpreter's process: CPU tensors go to the C++ kernels meanwhile."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backends, "device_types", lambda: 0)
        patch.setattr(backends, "interpreted", lambda: False)
        yield


def moved(tensor: Tensor, device: torch.device) -> Tensor:
    """On the device, with the same alignment and strides."""
    flat = torch.zeros(tensor.numel() + 8, dtype=tensor.dtype, device=device)
    offset = tensor.storage_offset()
    copy = flat[offset : offset + tensor.numel()].as_strided(tensor.shape, tensor.stride(), offset)
    return copy.copy_(tensor)


def outcome(
    build: Callable[..., Any],
    params: Sequence[Tensor],
    grads: Sequence[Sequence[Tensor]],
    device: torch.device,
    options: dict[str, Any],
    skips: Sequence[int] = (),
    scale: float | None = None,
) -> Streams:
    """All that steps with these grads leave behind; those in `skips` do nothing.

    With a `scale`, as under a GradScaler, which has found infinities in the grads of `skips`.
    """
    params = [moved(param, device) for param in params]
    for param, grad in zip(params, grads[0]):
        if grad.dtype != param.dtype:
            param.grad_dtype = grad.dtype
    run = Program(
        build(params, **options), params, lambda step: [moved(grad, device) for grad in grads[step]]
    )
    backend = "triton" if backends.device_types() else "cpu"
    found: Streams = {}
    for step in range(len(grads)):
        if scale is not None:
            run.opt.grad_scale = torch.tensor(scale, device=device)
            run.opt.found_inf = torch.tensor(float(step in skips), device=device)
        run.step()
        report = run.opt.last_step
        if step not in skips:
            assert report.tensors == {backend: len(params)}, report
        else:  # None where the host has skipped the first
            assert report is None or report.tensors in ({}, {backend: len(params)}), report
        found |= {f"{key} after {step}": value for key, value in run.harvest_all().items()}
    if "ema_decay" in options:  # not before: it may ask the device
        found |= {f"ema {i}": average for i, average in enumerate(run.opt.ema_params())}
        saved = run.opt.state_dict()["ema"].values()
        found["averaged"] = torch.tensor([entry["n_averaged"] for entry in saved])
    return found


def assert_bits_of_cpp(
    build: Callable[..., Any],
    params: Sequence[Tensor],
    grads: Sequence[Sequence[Tensor]],
    options: dict[str, Any] | None = None,
    only_device: dict[str, Any] | None = None,
    grads_for_cpp: Sequence[Sequence[Tensor]] | None = None,
    **program: Any,
) -> None:
    """What steps with these CPU tensors leave is the same, bit for bit, on both."""
    options = options or {}
    ours = outcome(build, params, grads, DEVICE, {**options, **(only_device or {})}, **program)
    with cpp_kernels():
        cpu = torch.device("cpu")
        theirs = outcome(build, params, grads_for_cpp or grads, cpu, options, **program)
    assert_same_bits(ours, theirs)
