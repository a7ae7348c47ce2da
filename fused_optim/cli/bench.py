"""python -m fused_optim bench: measures the table of workloads."""

import dataclasses
import functools
import gc
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from torch import nn
from torch.optim import Optimizer

from fused_optim import FusedOptimizer
from fused_optim.cli import contestants, results, timing
from fused_optim.cli.contestants import COPY, COPY_NBYTES, MATCHING, OURS, PROBE
from fused_optim.cli.device import CPU, Device, EventTimer, rotate
from fused_optim.cli.workloads import MEMORY, Workload

# The lower quartile of 13 rounds is the fourth of them: no single bad round decides.
FULL = timing.Schedule(
    budget_s=10, limit_s=18, min_rounds=13, max_rounds=150, n_passes=3, n_screening_rounds=1
)
QUICK = timing.Schedule(
    budget_s=1, limit_s=2.5, min_rounds=5, max_rounds=50, n_passes=2, n_screening_rounds=1
)
# Times of a GPU scatter less. Events resolve half a microsecond; a longer burst of many launches
# would be more than its queue holds.
GPU = dataclasses.replace(FULL, budget_s=4, limit_s=12)
GPU_BURST_S = 2e-4

# A variant this much slower than the best one after the screening will not become the best.
CLEARLY_SLOWER = 1.5
# Several times the last-level cache of one core complex (32 MB is common).
FLUSH_NBYTES = 64 * 2**20


class NotMeasured(Exception):
    """Why a whole row cannot be measured."""


def run(
    workloads: Sequence[Workload], *, quick: bool, threads: int | None, device: Device = CPU
) -> results.Results:
    """Measure the workloads one after the other and show the progress on stderr.

    Args:
        quick: few rounds, and fewer of torch.optim's variants on large workloads.
        threads: for all contestants alike; None: torch's own choice.
    """
    if threads is not None:
        torch.set_num_threads(threads)
    found = results.Results(results.about(quick=quick, device=device))
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
                    try:
                        row = measure(workload, quick=quick, device=device, on_round=on_round)
                        row.cpu_elsewhere = elsewhere.part()
                        found.rows.append(row)
                    except NotMeasured as reason:
                        found.skipped[workload.name] = str(reason)
                # Several GB belong to the last row; free them before the next one allocates.
                device.release()
        except KeyboardInterrupt:
            found.interrupted = True
    return found


def measure(
    workload: Workload,
    *,
    quick: bool,
    device: Device = CPU,
    on_round: Callable[[float], object] = lambda part: None,
) -> results.Row:
    """Measure one workload.

    Args:
        on_round: told the part done, from 0 to 1.

    Raises:
        NotMeasured: the device has too little memory.
    """
    by_device = device.new_event is not None and workload.timed == "step"
    entrants = _enter(workload, quick=quick, device=device, rotates=by_device)
    steps = entrants.steps
    nbytes, n_streams = contestants.bytes_per_step(entrants.ours)

    schedule = QUICK if quick else FULL
    before: timing.Step | None = None
    timer: timing.Timer | None = None
    if device.new_event is None:
        if workload.is_large and workload.layout == "matching":
            steps |= contestants.bandwidth_steps(nbytes, n_streams)
        if workload.cold:
            before = functools.partial(torch.zeros(FLUSH_NBYTES // 4).add_, 1)
    elif by_device:
        copy = contestants.device_copy(device.torch_device, COPY_NBYTES)
        steps |= {COPY: copy}
        timer = EventTimer(device.new_event, hold=copy)
        schedule = dataclasses.replace(schedule if quick else GPU, burst_s=GPU_BURST_S)
    else:
        before = device.synchronize
        schedule = schedule if quick else GPU

    def drop(medians: dict[str, float]) -> set[str]:
        if not entrants.baselines:
            return set()
        limit = CLEARLY_SLOWER * min(medians[name] for name in entrants.baselines)
        return {
            name
            for name, median in medians.items()
            if name not in (OURS, PROBE, COPY) and median > limit
        }

    samples = timing.alternate(
        steps, schedule, before=before, drop=drop, timer=timer, on_round=on_round
    )
    row = _row(workload, samples, entrants, nbytes, n_streams)
    if by_device:
        row.clock = "device"
        row.n_sets = entrants.n_sets
        row.copy_part = timing.quartiles(
            [
                ratio * nbytes / (2 * COPY_NBYTES)
                for ratio in timing.paired_ratios(samples[COPY], samples[OURS])
            ]
        )
    return row


@dataclasses.dataclass
class Entrants:
    """All who are timed on one workload, past their first step.

    ours: the optimizer under test; of several, the first.
    steps: contestant -> its step.
    baselines: those that the ratio may compare with; none where torch.optim takes no such workload.
    not_measured: who could not enter -> why.
    n_sets: sets of inputs, each with an optimizer of its own, that every step takes in turn.
    """

    ours: FusedOptimizer
    steps: dict[str, timing.Step]
    baselines: list[str]
    not_measured: dict[str, str]
    n_sets: int


def _enter(workload: Workload, *, quick: bool, device: Device, rotates: bool) -> Entrants:
    """Give every contestant tensors of its own, equal to ours.

    Args:
        rotates: several sets of them, if one alone would stay in the device's cache.
    """
    n_sets = device.n_sets(workload.nbytes) if rotates else 1
    variants = contestants.stock_variants(workload, quick=quick)
    peers = contestants.peers(device.type) if workload.layout == "matching" else ()
    refusals = {peer.name: peer.why_not(workload, quick=quick) for peer in peers}
    not_measured = {name: reason for name, reason in refusals.items() if reason is not None}
    n_entrants = 1 + len(variants) + len(peers) - len(not_measured)
    _check_memory(workload, n_sets * n_entrants, device)
    params = contestants.make_params(
        workload.shapes, workload.dtype, workload.layout, device.torch_device
    )
    steps: dict[str, timing.Step] = {}

    def enter(name: str, build: Callable[[list[nn.Parameter]], Optimizer], layout: str) -> None:
        optimizers = []
        # An optimizer may fail in any way, for example while it compiles itself; the row says so.
        try:
            for _ in range(n_sets):
                optimizers.append(build(contestants.copy_params(params, layout)))
                contestants.start(optimizers[-1], workload)
            steps[name] = rotate([optimizer.step for optimizer in optimizers])
        except Exception as error:
            not_measured[name] = f"failed: {type(error).__name__}: {error}"

    if workload.layout == "matching":
        # Quick runs leave out variants; where none of the others takes the workload, they are back.
        for chosen in (variants, contestants.stock_variants(workload, quick=False)):
            for variant in chosen if not steps else ():
                stock = functools.partial(contestants.stock, workload, variant)
                enter(variant, stock, workload.layout)
    else:
        enter(MATCHING, functools.partial(contestants.ours, workload), "matching")
    baselines = list(steps)
    for peer in peers:
        if peer.name not in not_measured:
            enter(peer.name, functools.partial(peer.build, workload), workload.layout)

    ours = []
    for copy in [
        params,
        *(contestants.copy_params(params, workload.layout) for _ in range(n_sets - 1)),
    ]:
        ours.append(contestants.ours(workload, copy))
        contestants.start(ours[-1], workload)
    return Entrants(
        ours[0],
        {OURS: rotate([optimizer.step for optimizer in ours]), **steps},
        baselines,
        not_measured,
        n_sets,
    )


def _check_memory(workload: Workload, n_entrants: int, device: Device) -> None:
    """Raise NotMeasured where the device's memory cannot hold them all."""
    free_nbytes = device.free_nbytes()
    needed_nbytes = workload.needs_nbytes(n_entrants) + 2 * COPY_NBYTES
    if free_nbytes is not None and needed_nbytes > free_nbytes:
        raise NotMeasured(
            f"needs {needed_nbytes / 2**30:.0f} GiB, {free_nbytes / 2**30:.0f} GiB are free"
        )


def _row(
    workload: Workload,
    samples: timing.Samples,
    entrants: Entrants,
    nbytes: int,
    n_streams: int,
) -> results.Row:
    """Compare the samples and ask our optimizer which backend did the work."""

    def median(name: str) -> float:
        return timing.quartiles(timing.round_times(samples[name])).median

    baseline = min(entrants.baselines, key=median, default=None)
    probe_part = probe_over_copy = None
    if PROBE in samples:
        probe_part = timing.quartiles(timing.paired_ratios(samples[PROBE], samples[OURS]))
        to_bandwidths = nbytes / contestants.copied_bytes(nbytes, n_streams)
        probe_over_copy = timing.quartiles(
            [ratio * to_bandwidths for ratio in timing.paired_ratios(samples[COPY], samples[PROBE])]
        )
    last_step = entrants.ours.last_step
    assert last_step is not None  # measured: it has stepped
    return results.Row(
        workload=workload,
        baseline=baseline,
        samples_s=samples,
        ratio_samples=timing.paired_ratios(samples[baseline], samples[OURS]) if baseline else [],
        nbytes=nbytes,
        probe_part=probe_part,
        probe_over_copy=probe_over_copy,
        not_measured=entrants.not_measured,
        backends=dict(last_step.tensors),
        fallbacks=_fallbacks(entrants.ours),
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
