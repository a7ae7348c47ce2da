"""How much memory is there, and how much a step takes at its peak."""

import gc
from pathlib import Path

from fused_optim import FusedOptimizer
from fused_optim.bench import contestants, results
from fused_optim.bench.contestants import OURS
from fused_optim.bench.workloads import Workload


def measure(workload: Workload) -> results.Memory | None:
    """Peak growth of the process during one step after the first.

    The kernel's high-water mark sees every allocator, where torch's counters would miss ours.
    Returns None where /proc does not offer it.
    """
    growth = {}
    fallbacks: list[str] = []
    for name in (OURS, "fused", "foreach"):
        params = contestants.make_params(workload)
        if name == OURS:
            optimizer = contestants.ours(workload, params)
        else:
            optimizer = contestants.stock(workload, name, params)
        for _ in range(2):
            optimizer.step()
        try:
            # 5 resets the high-water mark to what is resident now; see proc(5).
            Path("/proc/self/clear_refs").write_text("5")
            before = _high_water_nbytes()
            optimizer.step()
            growth[name] = _high_water_nbytes() - before
        except OSError:
            return None
        if isinstance(optimizer, FusedOptimizer):
            fallbacks = contestants.fallbacks(optimizer)
        del params, optimizer
        gc.collect()
    return results.Memory(workload.title, workload.numel, growth, fallbacks)


def _high_water_nbytes() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    high_water = next(line for line in lines if line.startswith("VmHWM:"))
    return int(high_water.split()[1]) * 1024
