"""What every launch needs: its device, the stream that uploads went to, compiled kernels."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable
from typing import Any

import torch
import triton
from torch import Tensor

from .specialize import COMPILE_OPTIONS
from .tables import DeviceCopy

CPU = 1  # DLPack's number; every other device here is torch's "cuda", which ROCm answers to as well
NO_PINNED_MEMORY = "no pinned memory was at hand while a CUDA graph was captured"


class OnDevice:
    """Launches on one device."""

    def __init__(self, device: torch.device, interpreted: bool) -> None:
        self.device = device
        self.interpreted = interpreted
        self._stream: int | None = None
        self._kernels: dict[tuple, Callable[..., object]] = {}

    def guard(self) -> contextlib.AbstractContextManager:
        if self.device.type == "cpu" or torch.cuda.current_device() == self.device.index:
            return contextlib.nullcontext()
        return torch.cuda.device(self.device)

    def copies(self) -> Iterable[DeviceCopy]:
        raise NotImplementedError

    def forget(self) -> None:
        """Drop memory that kernels write and read again."""
        raise NotImplementedError

    def notice_stream(self, capturing: bool) -> None:
        """What another stream uploads may come too late for this one."""
        if self.device.type == "cpu" or capturing:
            return
        stream = torch.cuda.current_stream(self.device).cuda_stream
        if stream != self._stream:
            for copy in self.copies():
                copy.version = None
            self.forget()
            self._stream = stream

    def kernel(
        self, function: Any, args: tuple, constants: dict[str, Any], num_warps: int, variant: Any
    ) -> Callable[..., object]:
        """(number of programs, args) -> launch, loaded onto the device.

        A launch through the function itself costs 16 to 54 us on the host, since it looks at every
        argument again; one through the compiled kernel 3 to 5 us (measured with a stub driver). What
        it would look at is the same each time: dtypes, and which arguments are None.

        Args:
            variant: as good as the constants, and quicker to compare.
        """
        dtypes = tuple(arg.dtype if isinstance(arg, Tensor) else arg is None for arg in args)
        kernel = self._kernels.get((function, variant, dtypes))
        if kernel is None:
            if self.interpreted:

                def kernel(n_programs: int, args: tuple) -> object:
                    return function[(n_programs,)](*args, **constants)
            else:
                compiled = function.warmup(
                    *args, grid=(1,), num_warps=num_warps, **COMPILE_OPTIONS, **constants
                )
                compiled[(1, 1, 1)]  # loads it; the launch itself must not fail
                values = tuple(constants.values())

                def kernel(n_programs: int, args: tuple) -> object:
                    return compiled[(n_programs, 1, 1)](*args, *values)

            self._kernels[function, variant, dtypes] = kernel
        return kernel


def device_of(device_type: int, index: int) -> torch.device:
    return torch.device("cpu") if device_type == CPU else torch.device("cuda", index)


def capturing() -> bool:
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


def warp_size(interpreted: bool) -> int:
    return 32 if interpreted else triton.runtime.driver.active.get_current_target().warp_size


def on(device: torch.device, number: Tensor | None) -> Tensor | None:
    """A number on the device, without waiting for any."""
    if number is None:
        return None
    if number.device.type == "cpu" and device.type != "cpu":
        return torch.full((), number.item(), dtype=torch.float32, device=device)
    if number.dtype not in (torch.float32, torch.float64):
        number = number.float()
    return number.to(device, non_blocking=True)
