"""Things that every launch needs: its device, the stream that uploads went to, compiled kernels."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable
from typing import Any

import torch
import triton
from torch import Tensor
from triton import knobs

from .specialize import COMPILE_OPTIONS
from .tables import DeviceCopy

CPU = 1  # DLPack's number; every other device here is torch's "cuda", which ROCm answers to as well
NO_PINNED_MEMORY = "no pinned memory was at hand while a CUDA graph was captured"
_NOTHING_TO_DO = contextlib.nullcontext()

# (number of programs, arguments, stream) -> launch
Launch = Callable[[int, tuple, int], object]

# (device's index) -> torch.cuda.current_stream(index).cuda_stream, in a tenth of its 2 us; torch's own Triton
# code calls it too. Not in builds without CUDA.
_current_stream = getattr(torch._C, "_cuda_getCurrentRawStream", None)


class OnDevice:
    """Launches on one device.

    Attributes:
        stream: the current one in the step under way, as the driver knows it.
        is_capturing: whether a CUDA graph is captured there.
    """

    def __init__(self, device: torch.device, interpreted: bool) -> None:
        self.device = device
        self.interpreted = interpreted
        self._is_cpu = device.type == "cpu"
        self.stream = 0
        self.is_capturing = False
        self._uploaded_on: int | None = None
        self._kernels: dict[tuple, Launch] = {}

    def guard(self) -> contextlib.AbstractContextManager:
        if self._is_cpu or torch.cuda.current_device() == self.device.index:
            return _NOTHING_TO_DO
        return torch.cuda.device(self.device)

    def copies(self) -> Iterable[DeviceCopy]:
        raise NotImplementedError

    def forget(self) -> None:
        """Drop memory that kernels write and read again."""
        raise NotImplementedError

    def look_around(self) -> None:
        """Begin a step, under the guard: what another stream uploads may come too late for this one."""
        self.is_capturing = capturing()
        if self._is_cpu:
            return
        assert _current_stream is not None
        self.stream = _current_stream(self.device.index)
        if self.stream != self._uploaded_on and not self.is_capturing:
            for copy in self.copies():
                copy.version = None
            self.forget()
            self._uploaded_on = self.stream

    def kernel(
        self, function: Any, args: tuple, constants: dict[str, Any], num_warps: int
    ) -> Launch:
        """A kernel for such arguments, loaded onto the device.

        A launch through the function itself costs 16 to 54 us on the host, since it looks at every
        argument again, one through the compiled kernel 3 to 5 us, one through what that calls under 1 us
        (measured with a stub driver). What they would look at is the same each time: dtypes, and which
        arguments are None.
        """
        if self.interpreted:
            return lambda n_programs, args, stream: function[(n_programs,)](*args, **constants)
        compiled = function.warmup(
            *args, grid=(1,), num_warps=num_warps, **COMPILE_OPTIONS, **constants
        )
        compiled[(1, 1, 1)]  # loads it; the launch itself must not fail
        run, loaded, metadata = compiled.run, compiled.function, compiled.packed_metadata
        values = tuple(constants.values())

        def launch(n_programs: int, args: tuple, stream: int) -> object:
            enter, leave = knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook
            if getattr(enter, "calls", enter) or getattr(leave, "calls", leave):  # a profiler's
                return compiled[(n_programs, 1, 1)](*args, *values)
            return run(n_programs, 1, 1, stream, loaded, metadata, None, None, None, *args, *values)

        return launch


def device_of(device_type: int, index: int) -> torch.device:
    return torch.device("cpu") if device_type == CPU else torch.device("cuda", index)


def dtype_of(number: Tensor | None) -> torch.dtype | None:
    return None if number is None else number.dtype


def capturing() -> bool:
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


def warp_size(interpreted: bool) -> int:
    return 32 if interpreted else triton.runtime.driver.active.get_current_target().warp_size


def on(device: torch.device, number: Tensor | None) -> Tensor | None:
    """A number on the device, without waiting for any."""
    if number is None:
        return None
    if number.device == device and number.dtype is torch.float32:
        return number
    if number.device.type == "cpu" and device.type != "cpu":
        return torch.full((), number.item(), dtype=torch.float32, device=device)
    if number.dtype not in (torch.float32, torch.float64):
        number = number.float()
    return number.to(device, non_blocking=True)
