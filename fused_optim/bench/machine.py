"""What machine the benchmark runs on, and what else runs there."""

import datetime
import os
import platform
import time
from pathlib import Path
from typing import Any

import psutil
import torch

import fused_optim
from fused_optim.bench import peers
from fused_optim.bench.device import CPU, Device


def about(*, quick: bool, device: Device = CPU, command: str = "") -> dict[str, Any]:
    """Machine, versions and settings, for a reader of the numbers.

    Args:
        command: that measured, as one would type it.
    """
    config = fused_optim.config()
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "machine": {
            "cpu": _cpu_model(),
            "cores": usable,
            "threads": torch.get_num_threads(),
            "os": platform.platform(),
        },
        "versions": {
            "fused_optim": config["version"],
            "isa": config["isa"],
            "torch": torch.__version__,
            "triton": config["triton"],
            "python": platform.python_version(),
        },
        "device": device.about,
        "peers": peers.versions(),
        "settings": {"quick": quick},
        "command": command,
    }


class CpuElsewhere:
    """The part of the machine's CPU time that other processes take, from its making on."""

    def __init__(self) -> None:
        psutil.cpu_percent()  # which the next call counts from
        self._begin, self._begin_own = time.monotonic(), time.process_time()

    def part(self) -> float:
        """From 0 to 1."""
        available_s = (time.monotonic() - self._begin) * (os.cpu_count() or 1)
        own = (time.process_time() - self._begin_own) / available_s
        return min(1.0, max(0.0, psutil.cpu_percent() / 100 - own))


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor() or platform.machine()
