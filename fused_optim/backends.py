"""Chooses the backend of a tensor; alone imports ``_C`` and, when a GPU is in use, Triton."""

from __future__ import annotations

import functools
import importlib
import os
import warnings
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

_BACKENDS = ("cpu", "triton", "stock")
_DLPACK_CPU = 1
_DLPACK_GPUS = 1 << 2 | 1 << 10  # CUDA, ROCm


@functools.cache
def forced() -> str | None:
    """The backend that ``FUSED_OPTIM_BACKEND`` asks for, or None.

    Raises:
        ValueError: it names no backend.
        RuntimeError: it names one that is not available.
    """
    name = os.environ.get("FUSED_OPTIM_BACKEND")
    if not name:
        return None
    if name not in _BACKENDS:
        raise ValueError(f"FUSED_OPTIM_BACKEND={name} is unknown; accepted: {', '.join(_BACKENDS)}")
    if name == "triton" and not isinstance(_load_triton(), ModuleType):
        raise RuntimeError(f"FUSED_OPTIM_BACKEND=triton: no Triton kernels: {_load_triton()}")
    if name == "cpu" and not isinstance(_load_kernels(), ModuleType):
        raise RuntimeError(f"FUSED_OPTIM_BACKEND=cpu: no CPU kernels: {_load_kernels()}")
    return name


@functools.cache
def debugging() -> bool:
    """Return True if ``FUSED_OPTIM_DEBUG`` asks for the tracebacks of kernels that failed.

    Raises:
        ValueError: it has an unknown value.
    """
    value = os.environ.get("FUSED_OPTIM_DEBUG")
    if value and value != "1":
        raise ValueError(f"FUSED_OPTIM_DEBUG={value} is unknown; accepted: 1")
    return bool(value)


@functools.cache
def _load_kernels() -> ModuleType | str:
    """The extension, or why there is none. Raises ValueError for a bad FUSED_OPTIM_ISA."""
    try:
        from fused_optim import _C
    except ImportError as error:
        return str(error)
    isa = os.environ.get("FUSED_OPTIM_ISA")
    if isa:
        _C.set_isa(isa)
    return _C


@functools.cache
def _load_triton() -> ModuleType | str:
    """The module that launches Triton kernels, or why there is none."""
    try:
        return importlib.import_module("fused_optim.triton_kernels.launch")
    except ImportError as error:
        return str(error)


@functools.cache
def interpreted() -> bool:
    """Return True if Triton's interpreter serves CPU tensors.

    FUSED_OPTIM_BACKEND=triton with TRITON_INTERPRET=1 asks for that.
    """
    if forced() != "triton":
        return False
    from triton import knobs

    return knobs.runtime.interpret


def device_types() -> int:
    """The DLPack device types that Triton kernels serve in this process, as bits.

    Triton is imported when the first GPU is in use.
    """
    if interpreted():
        return 1 << _DLPACK_CPU
    if not torch.cuda.is_initialized() or forced() in ("cpu", "stock"):
        return 0
    return _DLPACK_GPUS if isinstance(_load_triton(), ModuleType) else 0


def launcher(rule: str) -> Any:
    """The device side of a new optimizer; only where device_types() is not 0."""
    module = _load_triton()
    assert isinstance(module, ModuleType)
    return module.Launcher(rule, interpreted(), debugging())


def host_knows(number: Tensor) -> bool:
    """Return True if reading this number does not wait for a device."""
    return number.device.type == "cpu" and not interpreted()


@functools.cache
def warn_unless_served(device: torch.device) -> None:
    """Warn once, with the reason, if no kernel steps the tensors of this device."""
    if forced() is not None or (device.type == "cuda" and device_types() != 0):
        return
    loaded = _load_triton()
    reason = (
        f"Triton is not available: {loaded}" if isinstance(loaded, str) else "no kernel serves it"
    )
    warnings.warn(
        f"fused_optim runs torch.optim's own code for tensors on {device}: {reason}",
        RuntimeWarning,
        stacklevel=2,
    )


@functools.cache
def cpu_kernels() -> ModuleType | None:
    """The extension module with the CPU kernels; None, after one warning, if it is missing."""
    debugging()  # an unknown value is an error, whatever runs
    if forced() == "stock":
        return None
    kernels = _load_kernels()
    if isinstance(kernels, ModuleType):
        return kernels
    warnings.warn(
        f"fused_optim has no CPU kernels and runs torch.optim's own code instead: {kernels}",
        RuntimeWarning,
        stacklevel=2,
    )
    return None


def codec() -> ModuleType | None:
    """The extension module, for work outside of a step; None if it is missing."""
    kernels = _load_kernels()
    return kernels if isinstance(kernels, ModuleType) else None


_n_threads: int | None = None


def set_num_threads(num_threads: int | None) -> None:
    """Set the number of threads of the CPU's kernels in this process; torch's own setting stays.

    Processes that engines start with ``OMP_NUM_THREADS=1`` keep torch at one thread, and step with more. A
    process that is pinned to some cores has no more than these, whatever its number of threads.

    Args:
        num_threads: at least 1; None: ``torch.get_num_threads()``, as before the first call.

    Raises:
        ValueError: num_threads is less than 1, or no int.
    """
    global _n_threads
    _n_threads = None if num_threads is None else check_num_threads(num_threads)


def num_threads() -> int:
    """The number of threads that the CPU's kernels use at most."""
    return torch.get_num_threads() if _n_threads is None else _n_threads


def check_num_threads(given: Any) -> int:
    if type(given) is not int or given < 1:
        raise ValueError(
            f"Invalid num_threads: {given!r}; it must be an int of at least 1, or None"
        )
    return given


def config() -> dict[str, Any]:
    """Describe what is installed and in use.

    Returns:
        A dict with the keys version, cpu_kernels, isa, isas_available (best first), threads, openmp
        (path of the OpenMP runtime in use), torch, triton (None if not installed), devices, and
        backends (device -> the backend that serves it).
    """
    from importlib import metadata, util

    from fused_optim import __version__

    forced()
    debugging()
    kernels = _load_kernels()
    loaded = kernels if isinstance(kernels, ModuleType) else None
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    devices = ["cpu"]
    if accelerator is not None:
        devices += [f"{accelerator.type}:{i}" for i in range(torch.accelerator.device_count())]
    has_triton = util.find_spec("triton") is not None
    return {
        "version": __version__,
        "cpu_kernels": loaded is not None,
        "why_no_cpu_kernels": None if loaded is not None else kernels,
        "isa": loaded.isa() if loaded is not None else None,
        "isas_available": loaded.isas() if loaded is not None else [],
        "threads": num_threads(),
        "openmp": loaded.openmp_library() if loaded is not None else None,
        "torch": torch.__version__,
        "triton": metadata.version("triton") if has_triton else None,
        "devices": devices,
        "backends": {device: _backend_of(device) for device in devices},
    }


def _backend_of(device: str) -> str:
    if forced() == "stock" or not isinstance(_load_kernels(), ModuleType):
        return "stock"
    if device == "cpu":
        return "triton" if interpreted() else "cpu"
    served = device.startswith("cuda") and forced() != "cpu"
    return "triton" if served and isinstance(_load_triton(), ModuleType) else "stock"


def show_config() -> None:
    """Print :func:`config`, one line per entry."""
    for key, value in config().items():
        if isinstance(value, list):
            value = ", ".join(value)
        elif isinstance(value, dict):
            value = ", ".join(f"{device} by {backend}" for device, backend in value.items())
        if key != "why_no_cpu_kernels" or value is not None:
            print(f"{key.replace('_', ' '):<15} {value}")
