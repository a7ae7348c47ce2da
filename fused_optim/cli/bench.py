"""python -m fused_optim bench: measures the table of workloads."""

import contextlib
import dataclasses
import functools
import gc
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from torch import nn
from torch.optim import Optimizer

from fused_optim import FusedOptimizer
from fused_optim.cli import contestants, phase, results, timing
from fused_optim.cli.contestants import COPY, COPY_NBYTES, MATCHING, NEVER_ON, OURS, PROBE
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
                    except phase.Disagreement as difference:
                        found.disagreements[workload.name] = str(difference)
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
        Disagreement: stock's phase and ours do not compute the same.
    """
    with _torch_threads(workload.threads):
        return _measure(workload, quick=quick, device=device, on_round=on_round)


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
    workload: Workload, *, quick: bool, device: Device, on_round: Callable[[float], object]
) -> results.Row:
    by_device = device.new_event is not None and workload.timed == "step"
    copy: timing.Step | None = None
    timer: timing.Timer | None = None
    if workload.phase is None:
        entrants = _enter(workload, quick=quick, device=device, rotates=by_device)
        if by_device:
            copy, timer = _copy_and_timer(device)
    else:
        _check_memory(workload, phase.N_SETS_OF_STREAMS, device)
        if by_device:
            copy, timer = _copy_and_timer(device)
        params = contestants.make_params(
            workload.shapes, workload.dtype, workload.layout, device.torch_device
        )
        entrants = phase.enter(workload, params, quick=quick, timer=timer)
    steps, nbytes, n_streams = entrants.steps, entrants.nbytes, entrants.n_streams

    schedule = QUICK if quick else FULL
    before = entrants.before
    if device.new_event is None:
        if workload.is_large and workload.layout == "matching" and workload.phase is None:
            steps |= contestants.bandwidth_steps(nbytes, n_streams)
        if workload.cold:
            before = functools.partial(torch.zeros(FLUSH_NBYTES // 4).add_, 1)
    elif copy is not None:
        steps |= {COPY: copy}
        schedule = dataclasses.replace(schedule if quick else GPU, burst_s=GPU_BURST_S)
    else:
        before = device.synchronize
        schedule = schedule if quick else GPU

    def drop(medians: dict[str, float]) -> set[str]:
        if not entrants.baselines:
            return set()
        best = min(medians[name] for name in entrants.baselines)
        return timing.clearly_slower(medians, best) - {OURS, PROBE, COPY}

    samples = timing.alternate(
        steps, schedule, before=before, drop=drop, timer=timer, on_round=on_round
    )
    row = _row(workload, samples, entrants)
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


def _copy_and_timer(device: Device) -> tuple[timing.Step, timing.Timer]:
    """A large copy, and the device's own clock, which holds its queue with it."""
    assert device.new_event is not None
    copy = contestants.device_copy(device.torch_device, COPY_NBYTES)
    return copy, EventTimer(device.new_event, hold=copy)


def _enter(
    workload: Workload, *, quick: bool, device: Device, rotates: bool
) -> contestants.Entrants:
    """Give every contestant tensors of its own, equal to ours.

    Args:
        rotates: several sets of them, if one alone would stay in the device's cache.
    """
    n_sets = device.n_sets(workload.nbytes) if rotates else 1
    variants = contestants.stock_variants(workload, quick=quick)
    against_stock = workload.layout == "matching" and not workload.switched
    peers = contestants.peers(device.type) if against_stock else ()
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

    if against_stock:
        # Quick runs leave out variants; where none of the others takes the workload, they are back.
        for chosen in (variants, contestants.stock_variants(workload, quick=False)):
            for variant in chosen if not steps else ():
                stock = functools.partial(contestants.stock, workload, variant)
                enter(variant, stock, workload.layout)
    else:
        name = NEVER_ON if workload.switched else MATCHING
        enter(name, functools.partial(contestants.ours, workload), "matching")
    baselines = list(steps)
    for peer in peers:
        if peer.name not in not_measured:
            enter(peer.name, functools.partial(peer.build, workload), workload.layout)

    ours = []
    for copy in [
        params,
        *(contestants.copy_params(params, workload.layout) for _ in range(n_sets - 1)),
    ]:
        build = contestants.switched if workload.switched else contestants.ours
        ours.append(build(workload, copy))
        contestants.start(ours[-1], workload)
    nbytes, n_streams = contestants.bytes_per_step(ours[0])
    return contestants.Entrants(
        ours=ours[0],
        steps={OURS: rotate([optimizer.step for optimizer in ours]), **steps},
        baselines=baselines,
        nbytes=nbytes,
        n_streams=n_streams,
        not_measured=not_measured,
        n_sets=n_sets,
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
    workload: Workload, samples: timing.Samples, entrants: contestants.Entrants
) -> results.Row:
    """Compare the samples and ask our optimizer which backend did the work."""

    def median(name: str) -> float:
        return timing.quartiles(timing.round_times(samples[name])).median

    baseline = min(entrants.baselines, key=median, default=None)
    probe_part = probe_over_copy = None
    if PROBE in samples:
        probe_part = timing.quartiles(timing.paired_ratios(samples[PROBE], samples[OURS]))
        nbytes = entrants.nbytes
        to_bandwidths = nbytes / contestants.copied_bytes(nbytes, entrants.n_streams)
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
        nbytes=entrants.nbytes,
        probe_part=probe_part,
        probe_over_copy=probe_over_copy,
        not_measured=entrants.not_measured,
        backends=dict(last_step.tensors),
        fallbacks=_fallbacks(entrants.ours),
        threads=torch.get_num_threads(),
        stock_calls=entrants.stock_calls,
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
