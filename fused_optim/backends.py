"""Which backend serves a tensor. The only importer of ``_C``."""

from __future__ import annotations

import functools
import os
import warnings
from types import ModuleType
from typing import Any

import torch

_BACKENDS = ("cpu", "triton", "stock")


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
    if name == "triton":
        raise RuntimeError("FUSED_OPTIM_BACKEND=triton: this version has no Triton kernels")
    if name == "cpu" and not isinstance(_load_kernels(), ModuleType):
        raise RuntimeError(f"FUSED_OPTIM_BACKEND=cpu: no CPU kernels: {_load_kernels()}")
    return name


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
def cpu_kernels() -> ModuleType | None:
    """The extension module with the CPU kernels; None, after one warning, if it is missing."""
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


def config() -> dict[str, Any]:
    """What is installed and in use.

    Returns:
        A dict with the keys version, cpu_kernels, isa, isas_available (best first), threads, openmp
        (path of the OpenMP runtime in use), torch, triton (None if not installed), devices, and
        backends (device -> the backend that serves it).
    """
    import importlib.util
    from importlib import metadata

    from fused_optim import __version__

    forced()
    kernels = _load_kernels()
    loaded = kernels if isinstance(kernels, ModuleType) else None
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    devices = ["cpu"]
    if accelerator is not None:
        devices += [f"{accelerator.type}:{i}" for i in range(torch.accelerator.device_count())]
    has_triton = importlib.util.find_spec("triton") is not None
    return {
        "version": __version__,
        "cpu_kernels": loaded is not None,
        "why_no_cpu_kernels": None if loaded is not None else kernels,
        "isa": loaded.isa() if loaded is not None else None,
        "isas_available": loaded.isas() if loaded is not None else [],
        "threads": torch.get_num_threads(),
        "openmp": loaded.openmp_library() if loaded is not None else None,
        "torch": torch.__version__,
        "triton": metadata.version("triton") if has_triton else None,
        "devices": devices,
        "backends": {
            device: "cpu" if device == "cpu" and loaded and forced() != "stock" else "stock"
            for device in devices
        },
    }


def show_config() -> None:
    """Print :func:`config`, one line per entry."""
    for key, value in config().items():
        if isinstance(value, list):
            value = ", ".join(value)
        elif isinstance(value, dict):
            value = ", ".join(f"{device} by {backend}" for device, backend in value.items())
        if key != "why_no_cpu_kernels" or value is not None:
            print(f"{key.replace('_', ' '):<16}{value}")
