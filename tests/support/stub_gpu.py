"""A GPU that takes launches and runs none: Triton compiles for it for real, tensors lie on the CPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget

from fused_optim import backends
from fused_optim.triton_kernels import launch, measure, tables

CPU_BIT = 1 << 1  # DLPack
KERNELS = (launch.multi_tensor, launch.prepare, measure.norm, measure.finish)


class StubGpu:
    """Triton's driver.

    Attributes:
        launches: (kernel's name, number of programs, arguments) of each.
        compiled: name of each kernel that was compiled, or loaded from Triton's cache on disk.
        uploaded: dtype and number of elements of each table that was copied to the device.
    """

    def __init__(self) -> None:
        self.launches: list[tuple[str, int, tuple]] = []
        self.compiled: list[str] = []
        self.uploaded: list[tuple[torch.dtype, int]] = []
        self.utils = SimpleNamespace(
            load_binary=lambda name, *_: (
                self.compiled.append(name) or (object(), name, 32, 0, 1024)
            ),
            get_device_properties=lambda device: {"max_shared_mem": 2**17},
            unload_module=lambda module: None,
        )

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def launcher_cls(self, source: Any, metadata: Any) -> Any:
        def run(grid_x: int, grid_y: int, grid_z: int, stream: int, name: str, *rest: Any) -> None:
            assert grid_y == grid_z == 1
            _, launch_metadata, enter_hook, exit_hook, *args = rest
            assert len(args) == len(source.fn.arg_names)
            for hook in (enter_hook, exit_hook):
                if hook is not None:
                    hook(launch_metadata)
            self.launches.append((name, grid_x, tuple(args)))

        return run

    def names(self) -> list[str]:
        return [name for name, *_ in self.launches]


@contextmanager
def stub_gpu() -> Iterator[StubGpu]:
    """CPU tensors are served by compiled Triton kernels on a stub."""
    gpu = StubGpu()
    before = triton.runtime.driver._active or gpu  # kernels are unloaded when they are collected
    triton.runtime.driver.set_active(gpu)
    for function in KERNELS:
        function.device_caches.clear()

    def new_launcher(rule: str) -> launch.Launcher:
        return launch.Launcher(rule, interpreted=False, debug=backends.debugging())

    bring = tables.DeviceCopy.bring

    def counted(copy: tables.DeviceCopy, version: int, numel: int, *rest: Any) -> bool:
        if copy.version != version:
            gpu.uploaded.append((copy.dtype, numel))
        return bring(copy, version, numel, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backends, "device_types", lambda: CPU_BIT)
        patch.setattr(backends, "launcher", new_launcher)
        patch.setattr(tables.DeviceCopy, "bring", counted)
        try:
            yield gpu
        finally:
            for function in KERNELS:
                function.device_caches.clear()
            triton.runtime.driver._active = before
