"""python -m fused_optim bench: measures the table of workloads."""

import functools
import gc
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from torch.optim import Optimizer

from fused_optim import FusedOptimizer
from fused_optim.cli import contestants, results, timing
from fused_optim.cli.contestants import COPY, MATCHING, OURS, PROBE
from fused_optim.cli.workloads import MEMORY, Workload

# The lower quartile of 13 rounds is the fourth of them: no single bad round decides.
FULL = timing.Schedule(
    budget_s=10, limit_s=18, min_rounds=13, max_rounds=150, n_passes=3, n_screening_rounds=1
)
QUICK = timing.Schedule(
    budget_s=1, limit_s=2.5, min_rounds=5, max_rounds=50, n_passes=2, n_screening_rounds=1
)

# A variant this much slower than the best one after the screening will not become the best.
CLEARLY_SLOWER = 1.5
# Several times the last-level cache of one core complex (32 MB is common).
FLUSH_NBYTES = 64 * 2**20


def run(workloads: Sequence[Workload], *, quick: bool, threads: int | None) -> results.Results:
    """Measure the workloads one after the other and show the progress on stderr.

    Args:
        quick: few rounds, and fewer of torch.optim's variants on large workloads.
        threads: for all contestants alike; None: torch's own choice.
    """
    if threads is not None:
        torch.set_num_threads(threads)
    found = results.Results(results.about(quick=quick))
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("", total=len(workloads))
        try:
            for done, workload in enumerate(workloads):
                progress.update(task, completed=done, description=workload.title)

                def on_round(part: float, done: int = done) -> None:
                    progress.update(task, completed=done + part)

                if workload.name == MEMORY:
                    found.memory = measure_memory(workload)
                else:
                    elsewhere = results.CpuElsewhere()
                    row = measure(workload, quick=quick, on_round=on_round)
                    row.cpu_elsewhere = elsewhere.part()
                    found.rows.append(row)
                # Several GB belong to the last row; free them before the next one allocates.
                gc.collect()
        except KeyboardInterrupt:
            found.interrupted = True
    return found


def measure(
    workload: Workload, *, quick: bool, on_round: Callable[[float], object] = lambda part: None
) -> results.Row:
    """Measure one workload.

    Args:
        on_round: told the part done, from 0 to 1.
    """
    params = contestants.make_params(workload.shapes, workload.dtype, workload.layout)
    ours = contestants.ours(workload, params)
    optimizers: dict[str, Optimizer] = {OURS: ours}
    not_measured: dict[str, str] = {}
    if workload.layout == "matching":
        baselines = contestants.stock_variants(workload, quick=quick)
        for variant in baselines:
            copies = contestants.copy_params(params, workload.layout)
            optimizers[variant] = contestants.stock(workload, variant, copies)
        peers, not_measured = _build_peers(workload, params)
        optimizers |= peers
    else:
        baselines = [MATCHING]
        copies = contestants.copy_params(params, "matching")
        optimizers[MATCHING] = contestants.ours(workload, copies)

    steps: dict[str, timing.Step] = {name: opt.step for name, opt in optimizers.items()}
    ours.step()
    nbytes, n_streams = contestants.bytes_per_step(ours)
    if workload.is_large and workload.layout == "matching":
        steps |= contestants.bandwidth_steps(nbytes, n_streams)

    flush = torch.zeros(FLUSH_NBYTES // 4) if workload.cold else None
    before = None if flush is None else functools.partial(flush.add_, 1)

    def drop(medians: dict[str, float]) -> set[str]:
        limit = CLEARLY_SLOWER * min(medians[name] for name in baselines)
        return {
            name
            for name, median in medians.items()
            if name not in (OURS, PROBE, COPY) and median > limit
        }

    samples = timing.alternate(
        steps, QUICK if quick else FULL, before=before, drop=drop, on_round=on_round
    )
    return _row(workload, samples, baselines, not_measured, ours, nbytes, n_streams)


def _build_peers(
    workload: Workload, params: Sequence[torch.nn.Parameter]
) -> tuple[dict[str, Optimizer], dict[str, str]]:
    """The peers that run, and why the others do not."""
    running: dict[str, Optimizer] = {}
    not_measured: dict[str, str] = {}
    for peer in contestants.PEERS:
        why_not = peer.why_not(workload)
        if why_not is None:
            try:
                copies = contestants.copy_params(params, workload.layout)
                optimizer = peer.build(workload, copies)
                optimizer.step()
                running[peer.name] = optimizer
            # A peer may fail in any way, for example while it compiles itself; the row says so.
            except Exception as error:
                why_not = f"failed: {type(error).__name__}: {error}"
        if why_not is not None:
            not_measured[peer.name] = why_not
    return running, not_measured


def _row(
    workload: Workload,
    samples: timing.Samples,
    baselines: Sequence[str],
    not_measured: dict[str, str],
    ours: FusedOptimizer,
    nbytes: int,
    n_streams: int,
) -> results.Row:
    """Compare the samples and ask our optimizer which backend did the work."""

    def median(name: str) -> float:
        return timing.quartiles(timing.round_times(samples[name])).median

    baseline = min(baselines, key=median)
    probe_part = probe_over_copy = None
    if PROBE in samples:
        probe_part = timing.quartiles(timing.paired_ratios(samples[PROBE], samples[OURS]))
        to_bandwidths = nbytes / contestants.copied_bytes(nbytes, n_streams)
        probe_over_copy = timing.quartiles(
            [ratio * to_bandwidths for ratio in timing.paired_ratios(samples[COPY], samples[PROBE])]
        )
    assert ours.last_step is not None  # measured: it has stepped
    return results.Row(
        workload=workload,
        baseline=baseline,
        samples_s=samples,
        ratio_samples=timing.paired_ratios(samples[baseline], samples[OURS]),
        nbytes=nbytes,
        probe_part=probe_part,
        probe_over_copy=probe_over_copy,
        not_measured=not_measured,
        backends=dict(ours.last_step.tensors),
        fallbacks=_fallbacks(ours),
    )


def _fallbacks(ours: FusedOptimizer) -> list[str]:
    """Distinct reasons for which tensors of the last step were left to torch.optim."""
    assert ours.last_step is not None  # measured: it has stepped
    return sorted({fallback.reason for fallback in ours.last_step.fallbacks})


def measure_memory(workload: Workload) -> results.Memory | None:
    """Peak growth of the process during one step after the first.

    The kernel's high-water mark sees every allocator, where torch's counters would miss ours.
    Returns None where /proc does not offer it.
    """
    growth = {}
    fallbacks: list[str] = []
    for name in (OURS, "fused", "foreach"):
        params = contestants.make_params(workload.shapes, workload.dtype, workload.layout)
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
            fallbacks = _fallbacks(optimizer)
        del params, optimizer
        gc.collect()
    return results.Memory(workload.title, workload.numel, growth, fallbacks)


def _high_water_nbytes() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    high_water = next(line for line in lines if line.startswith("VmHWM:"))
    return int(high_water.split()[1]) * 1024
