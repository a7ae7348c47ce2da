"""python -m fused_optim bench: measures the table of workloads."""

import contextlib
import dataclasses
import functools
import gc
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.optim import Optimizer

from fused_optim import FusedOptimizer, units
from fused_optim.bench import (
    agreement,
    contestants,
    machine,
    offload,
    peers,
    phase,
    progress,
    results,
    timing,
)
from fused_optim.bench.contestants import (
    COPY,
    COPY_NBYTES,
    MATCHING,
    NEVER_ON,
    OURS,
    PROBE,
    Entrants,
)  # fmt: skip
from fused_optim.bench.device import CPU, Device, EventTimer, rotate
from fused_optim.bench.peers import Lineup, Peer
from fused_optim.bench.progress import Watch
from fused_optim.bench.workloads import MEMORY, Workload

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

# Several times the last-level cache of one core complex (32 MB is common).
FLUSH_NBYTES = 64 * 2**20


class NotMeasured(Exception):
    """Why a whole row cannot be measured."""


def run(
    workloads: Sequence[Workload],
    *,
    quick: bool,
    threads: int | None,
    device: Device = CPU,
    lineup: Lineup | None = None,
    command: str = "",
) -> results.Results:
    """Measure the workloads one after the other and show the progress on stderr.

    Args:
        quick: few rounds, and fewer of torch.optim's variants on large workloads.
        threads: for all contestants alike; None: torch's own choice.
        lineup: who is timed beside ours; None: whoever makes sense on the device.
        command: what asked for it, for a reader of the numbers.
    """
    if threads is not None:
        torch.set_num_threads(threads)
    found = results.Results(machine.about(quick=quick, device=device, command=command))
    with progress.live(len(workloads)) as watch:
        try:
            for done, workload in enumerate(workloads):
                watch.row(done, workload.title)
                try:
                    if workload.name == MEMORY:
                        found.memory = measure_memory(workload)
                        watch.stage("import")
                        found.import_s = measure_import()
                    else:
                        asked = {"quick": quick, "device": device, "lineup": lineup}
                        found.rows.append(measure_row(workload, **asked, watch=watch))
                except NotMeasured as reason:
                    found.skipped[workload.name] = str(reason)
                except (MemoryError, torch.OutOfMemoryError) as error:
                    found.skipped[workload.name] = f"out of memory: {error}"
                except agreement.Disagreement as difference:
                    found.disagreements[workload.name] = str(difference)
                # Several GB belong to the last row; free them before the next one allocates.
                device.release()
            if found.rows and not found.roofs and device.new_event is None:
                watch.stage("bandwidth of the memory")
                found.plain_roofs = measure_roofs()
        except KeyboardInterrupt:
            found.interrupted = True
    return found


def measure_import() -> float:
    """Seconds that `import fused_optim` adds to torch's import."""
    program = (
        "import time, torch; begin = time.perf_counter(); import fused_optim; "
        "print(time.perf_counter() - begin)"
    )
    done = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True)
    return float(done.stdout)


def measure_memory(workload: Workload) -> results.Memory | None:
    """Peak growth of the process during one step after the first.

    The kernel's high-water mark sees every allocator, where torch's counters would miss ours.
    Returns None where /proc does not offer it.
    """
    growth = {}
    fallbacks: list[str] = []
    for name in (OURS, "fused", "foreach"):
        params = contestants.make_params(workload)
        is_ours = name == OURS
        build = contestants.ours if is_ours else functools.partial(contestants.stock, variant=name)
        optimizer: Optimizer = build(workload, params=params)
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
    return int(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0]) * 1024


def measure_roofs() -> dict[str, float]:
    """Bytes per second of the probe and of the copy, where no row is large enough to be held to them."""
    n_streams = 4  # AdamW's
    nbytes = FLUSH_NBYTES * (2 * n_streams - 1)
    steps = contestants.bandwidth_steps(nbytes, n_streams)
    samples = timing.alternate(steps, dataclasses.replace(QUICK, budget_s=0.3))
    moved = {PROBE: nbytes, COPY: contestants.copied_bytes(nbytes, n_streams)}
    return {
        name: moved[name] / timing.quartiles(timing.round_times(rounds)).median
        for name, rounds in samples.items()
    }


def measure_row(
    workload: Workload,
    *,
    quick: bool,
    device: Device = CPU,
    lineup: Lineup | None = None,
    watch: Watch | None = None,
) -> results.Row:
    """Measure one workload.

    Args:
        lineup: as for run().
        watch: told what happens.

    Raises:
        NotMeasured: the device has too little memory.
        Disagreement: stock's phase and ours do not compute the same.
    """
    lineup = lineup or peers.lineup(None, device.type)
    with _torch_threads(workload.threads):
        return _measure(workload, quick, device, lineup, watch or Watch())


@contextlib.contextmanager
def _torch_threads(n_threads: int | None) -> Iterator[None]:
    """So many threads meanwhile; None: as many as there are."""
    others = torch.get_num_threads()
    torch.set_num_threads(n_threads or others)
    try:
        yield
    finally:
        torch.set_num_threads(others)


def _measure(
    workload: Workload, quick: bool, device: Device, lineup: Lineup, watch: Watch
) -> results.Row:
    admitted, refused = _admit(workload, quick, device, lineup)
    timer: timing.Timer | None = None
    roofs: dict[str, timing.Step] = {}  # what the bandwidth is compared with
    if device.new_event is not None and workload.timed == "step" and not workload.offload:
        roofs[COPY] = contestants.device_copy(device.torch_device, COPY_NBYTES)
        timer = EventTimer(device.new_event, hold=roofs[COPY])
    if workload.offload:
        _check_memory(workload, 2 + len(admitted), device)
        watch.stage("first steps")
        entrants = offload.enter(workload, contestants.make_params(workload), admitted)
    elif workload.phase is None:
        entrants = _enter(workload, quick, device, admitted, lineup.variants, watch)
    else:
        _check_memory(workload, phase.N_SETS_OF_STREAMS + len(admitted), device)
        watch.stage("choosing torch's calls")
        params = contestants.make_params(workload, device.torch_device)
        entrants = phase.enter(workload, params, admitted, quick=quick, timer=timer)
    entrants.not_measured.update(refused)

    schedule = QUICK if quick else FULL
    before = entrants.before
    if device.new_event is None:
        if workload.is_large and workload.layout == "matching" and workload.phase is None:
            roofs = contestants.bandwidth_steps(entrants.nbytes, entrants.n_streams)
        if workload.cold:
            before = functools.partial(torch.zeros(FLUSH_NBYTES // 4).add_, 1)
    elif timer is not None:
        schedule = dataclasses.replace(schedule if quick else GPU, burst_s=GPU_BURST_S)
    else:
        before = device.synchronize
        schedule = schedule if quick else GPU

    def drop(medians: dict[str, float]) -> set[str]:
        if not entrants.baselines:
            return set()
        best = min(medians[name] for name in entrants.baselines)
        return timing.clearly_slower(medians, best) - {OURS, PROBE, COPY}

    watch.stage("first round")
    # From here on: a peer that compiles itself before is no other process that disturbs.
    elsewhere = machine.CpuElsewhere()
    samples = timing.alternate(
        entrants.steps | roofs,
        schedule,
        before=before,
        drop=drop,
        timer=timer,
        on_round=watch.round,
    )
    row = _row(workload, samples, entrants)
    row.cpu_elsewhere = elsewhere.part()
    if timer is not None:
        row.clock = "device"
        row.n_sets = entrants.n_sets
        to_bandwidths = entrants.nbytes / (2 * COPY_NBYTES)
        row.copy_part = _quartiles_of(samples, COPY, OURS, to_bandwidths)
    return row


def _quartiles_of(
    samples: timing.Samples, above: str, below: str, factor: float = 1
) -> timing.Quartiles:
    """Of the paired ratios of two contestants' times."""
    ratios = timing.paired_ratios(samples[above], samples[below])
    return timing.quartiles([factor * ratio for ratio in ratios])


def _enter(
    workload: Workload, quick: bool, device: Device, admitted: list[Peer],
    asked: Sequence[str], watch: Watch,
) -> Entrants:  # fmt: skip
    """Give every contestant tensors of its own, equal to ours.

    On a device's clock everyone has several sets of them, if one alone would stay in the device's cache.

    Args:
        asked: variants of torch.optim.
    """
    by_device = device.new_event is not None and workload.timed == "step"
    n_sets = device.n_sets(workload.nbytes) if by_device else 1
    against_stock = workload.against_stock
    stock = functools.partial(contestants.stock_variants, workload, asked=asked)
    variants, not_measured = stock(quick=quick) if against_stock else ([], {})
    others = [*variants, *admitted] if against_stock else [MATCHING]
    _check_memory(workload, n_sets * (1 + len(others)), device)
    params = contestants.make_params(workload, device.torch_device)
    steps: dict[str, timing.Step] = {}

    def enter(
        name: str, build: Callable[..., Optimizer], layout: str = workload.layout
    ) -> Optimizer:
        """The first of its optimizers; of ours, that of the params themselves."""
        watch.stage(f"first step of {name}")
        sets = [contestants.copy_params(params, layout) for _ in range(n_sets - (name == OURS))]
        optimizers = [build(workload, own) for own in ([params] if name == OURS else []) + sets]
        for optimizer in optimizers:
            contestants.start(optimizer, workload)
        steps[name] = rotate([optimizer.step for optimizer in optimizers])
        return optimizers[0]

    def attempt(name: str, build: Callable[..., Optimizer], layout: str = workload.layout) -> None:
        with contestants.reported(name, not_measured):
            enter(name, build, layout)

    if against_stock:
        # Quick runs leave out variants; where none of the others takes the workload, they are back.
        for chosen in (variants, stock(quick=False)[0]):
            for variant in chosen if not steps else ():
                attempt(variant, functools.partial(contestants.stock, variant=variant))
    else:
        attempt(NEVER_ON if workload.switched else MATCHING, contestants.ours, "matching")
    baselines = list(steps)
    for peer in admitted:
        attempt(peer.name, peer.build)
    ours = enter(OURS, contestants.switched if workload.switched else contestants.ours)
    nbytes, n_streams = contestants.bytes_per_step(ours)
    return Entrants(
        ours, {OURS: steps.pop(OURS), **steps}, baselines, nbytes, n_streams,
        {name: why for name, why in not_measured.items() if name not in steps}, n_sets,
    )  # fmt: skip


def _admit(
    workload: Workload, quick: bool, device: Device, lineup: Lineup
) -> tuple[list[Peer], dict[str, str]]:
    """The peers that may run the workload, and why the others may not."""
    asked: Any = {"quick": quick, "device_type": device.type, "by_name": lineup.by_name}
    refused = {}
    taking_part = lineup.peers if workload.against_stock else ()
    for peer in taking_part:
        if reason := peer.why_not(workload, **asked) or agreement.refusal(peer, workload):
            refused[peer.name] = reason
    return [peer for peer in taking_part if peer.name not in refused], refused


def _check_memory(workload: Workload, n_entrants: int, device: Device) -> None:
    """Raise NotMeasured where the device's memory cannot hold them all, and what shows the bandwidth."""
    free_nbytes = device.free_nbytes()
    if device.new_event is not None:
        needed_nbytes = workload.needs_nbytes(n_entrants) + 2 * COPY_NBYTES
    else:
        needed_nbytes = workload.needs_nbytes(n_entrants + workload.is_large)
    if needed_nbytes > free_nbytes:
        needed, free = units.binary(needed_nbytes), units.binary(free_nbytes)
        raise NotMeasured(f"needs {needed}, {free} are free")


def _row(workload: Workload, samples: timing.Samples, entrants: Entrants) -> results.Row:
    """Compare the samples and ask our optimizer which backend did the work."""

    def median(name: str) -> float:
        return timing.quartiles(timing.round_times(samples[name])).median

    # One round of a variant that was dropped says nothing beside the many of the others.
    most = max((len(samples[name]) for name in entrants.baselines), default=0)
    measured = [name for name in entrants.baselines if len(samples[name]) == most]
    baseline = min(measured, key=median, default=None)
    probe_part = probe_over_copy = None
    if PROBE in samples:
        copied = contestants.copied_bytes(entrants.nbytes, entrants.n_streams)
        probe_part = _quartiles_of(samples, PROBE, OURS)
        probe_over_copy = _quartiles_of(samples, COPY, PROBE, entrants.nbytes / copied)
    last_step = entrants.ours.last_step
    assert last_step is not None  # measured: it has stepped
    return results.Row(
        workload=workload,
        baseline=baseline,
        samples_s=samples,
        ratio_samples=timing.paired_ratios(samples[baseline], samples[OURS]) if baseline else [],
        nbytes=entrants.nbytes,
        probe_part=probe_part,
        probe_over_copy=probe_over_copy,
        not_measured=entrants.not_measured,
        backends=dict(last_step.tensors),
        fallbacks=contestants.fallbacks(entrants.ours),
        threads=torch.get_num_threads(),
        stock_calls=entrants.stock_calls,
    )
