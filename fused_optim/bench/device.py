"""Where the benchmark runs: the CPU, or a GPU with a queue, events and an L2 cache."""

import gc
import itertools
import math
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import psutil
import torch

from fused_optim.bench.timing import Step

# Between two uses of one input set, other sets of this many times the L2 pass through it.
ROTATION = 4
# Enough for a step of thousands of launches (some 10 ms) at the 0.7 ms that copying 1 GiB takes at
# 3 TB/s. Beyond that, a step waits for the device itself, or fills its queue of 1,024 launches.
MAX_HOLDS = 64


class Event(Protocol):
    """The part of torch.cuda.Event that timing needs."""

    def record(self) -> object: ...
    def query(self) -> bool: ...
    def synchronize(self) -> object: ...
    def elapsed_time(self, end_event: Any) -> float: ...


# This process's own control group, as a container sees it.
_CGROUP = Path("/sys/fs/cgroup")


def _available_nbytes() -> int:
    """Memory that the CPU's tensors may take: the system's, or what is left of a container's limit."""
    available = psutil.virtual_memory().available
    try:
        limit = int((_CGROUP / "memory.max").read_text())
        used = int((_CGROUP / "memory.current").read_text())
    except (OSError, ValueError):  # no such group, or no limit: "max"
        return available
    return max(0, min(available, limit - used))


@dataclass(frozen=True)
class Device:
    """A place for tensors, and what the benchmark has to know about it.

    l2_nbytes: inputs have to be larger to come from memory; 0 on the CPU, where a workload itself
        says whether it is cold.
    about: for a reader of the numbers.
    new_event: makes an event of the device's queue; None where calls return when the work is done.
    synchronize: waits until the queue is empty.
    free_nbytes: memory not in use.
    release: gives memory that is not in use back to the system.
    """

    torch_device: torch.device
    l2_nbytes: int = 0
    about: dict[str, Any] = field(default_factory=dict)
    new_event: Callable[[], Event] | None = None
    synchronize: Step = lambda: None
    free_nbytes: Callable[[], int] = _available_nbytes
    release: Step = gc.collect

    @property
    def type(self) -> str:
        return self.torch_device.type

    def n_sets(self, nbytes: int) -> int:
        """How many sets of inputs a contestant takes in turn, so that none is found in the L2.

        Args:
            nbytes: of one set, states included.
        """
        return 1 + math.ceil(max(0, ROTATION * self.l2_nbytes - nbytes) / nbytes)


CPU = Device(torch.device("cpu"), about={"type": "cpu"})


def find(text: str) -> Device:
    """The device called so: "cpu", "cuda" or "cuda:1".

    Raises:
        ValueError: there is none.
    """
    try:
        wanted = torch.device(text)
    except RuntimeError:
        raise ValueError(f"--device {text!r} is no device; accepted: cpu, cuda, cuda:N") from None
    if wanted.type == "cpu":
        return CPU
    if wanted.type != "cuda":
        raise ValueError(f"--device {text!r} is not supported; accepted: cpu, cuda, cuda:N")
    n_devices = torch.cuda.device_count()
    if (wanted.index or 0) >= n_devices:
        raise ValueError(
            f"--device {text!r} is not available: torch {torch.__version__} sees {n_devices} CUDA "
            "devices"
        )
    return _cuda(wanted.index or 0)


def _cuda(index: int) -> Device:
    # Events and streams are those of the current device.
    torch.cuda.set_device(index)
    properties = torch.cuda.get_device_properties(index)

    def release() -> None:
        gc.collect()
        torch.cuda.empty_cache()

    return Device(
        torch.device("cuda", index),
        l2_nbytes=properties.L2_cache_size,
        about={
            "type": "cuda",
            "index": index,
            "name": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "memory_nbytes": properties.total_memory,
            "l2_nbytes": properties.L2_cache_size,
            "driver": _driver_version(),
            "cuda": torch.version.cuda,
            "hip": torch.version.hip,
        },
        new_event=lambda: torch.cuda.Event(enable_timing=True),
        synchronize=torch.cuda.synchronize,
        free_nbytes=lambda: torch.cuda.mem_get_info(index)[0],
        release=release,
    )


def _driver_version() -> str | None:
    """What nvidia-smi says; None without it. torch itself does not tell."""
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, check=True, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.partition("\n")[0].strip() or None


class EventTimer:
    """What the device takes for a burst, between two events in its queue.

    Before the first event goes other work that lasts until the host has submitted the whole burst.
    Without it the device would wait for the host between launches, and a step of many small ones
    would measure the host. Where the first event has passed before the host is through, the burst
    is repeated behind twice the work; beyond MAX_HOLDS the step is measured without it.

    Args:
        new_event: makes an event of the current stream.
        hold: submits a piece of work that depends on nothing, and waits for nothing.
    """

    def __init__(self, new_event: Callable[[], Event], hold: Step) -> None:
        self._new_event = new_event
        self._hold = hold
        self._n_holds: dict[Step, int] = {}

    def burst(self, step: Step, n_steps: int, before: Step | None) -> float:
        while True:
            n_holds = self._n_holds.setdefault(step, 1)
            seconds, was_held = self._try(step, n_steps, before, n_holds)
            if was_held or n_holds == 0:
                return seconds
            self._n_holds[step] = 2 * n_holds if 2 * n_holds <= MAX_HOLDS else 0

    def _try(
        self, step: Step, n_steps: int, before: Step | None, n_holds: int
    ) -> tuple[float, bool]:
        """Seconds per step, and whether the device began only when the host was through."""
        spans = [(self._new_event(), self._new_event()) for _ in range(n_steps if before else 1)]
        for _ in range(n_holds):
            self._hold()
        for begin, end in spans:
            if before is not None:
                before()
            begin.record()
            for _ in range(n_steps // len(spans)):
                step()
            end.record()
        was_held = not spans[0][0].query()
        spans[-1][1].synchronize()
        total_ms = sum(begin.elapsed_time(end) for begin, end in spans)
        return total_ms / 1e3 / n_steps, was_held


def rotate(steps: Sequence[Step]) -> Step:
    """One step that is each of these in turn."""
    turns = itertools.cycle(steps)
    return lambda: next(turns)()
