"""The timing core: alternates callables and compares them round by round. Knows no optimizer."""

import gc
import math
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

Step = Callable[[], object]
# Per contestant, per round: seconds per step of each pass.
Samples = dict[str, list[list[float]]]
# A variant this much slower than the best one after the screening will not become the best.
CLEARLY_SLOWER = 1.5


class Timer(Protocol):
    """Measures a burst: n_steps calls of one step."""

    def burst(self, step: Step, n_steps: int, before: Step | None) -> float:
        """Seconds per step.

        Args:
            before: run unmeasured before each single step.
        """
        ...


@dataclass(frozen=True)
class HostTimer:
    """What the calls take by the host's clock, in seconds."""

    clock: Callable[[], float] = time.perf_counter

    def burst(self, step: Step, n_steps: int, before: Step | None) -> float:
        if before is None:
            begin = self.clock()
            for _ in range(n_steps):
                step()
            return (self.clock() - begin) / n_steps
        total = 0.0
        for _ in range(n_steps):
            before()
            begin = self.clock()
            step()
            total += self.clock() - begin
        return total / n_steps


@dataclass(frozen=True)
class Schedule:
    """How long to measure.

    A round visits all contestants n_passes times, in a new order each time. A visit is a burst of
    steps that takes at least burst_s. A contestant's time in the round is the median of its visits:
    several short visits spread over the round see the same disturbances as those of the others,
    where one long visit would meet them alone.

    Measuring ends with the first round that is beyond budget_s and at least the min_rounds-th, but
    never goes on after limit_s or max_rounds.
    """

    budget_s: float
    limit_s: float
    min_rounds: int
    max_rounds: int
    n_passes: int
    n_screening_rounds: int
    burst_s: float = 2e-3


@dataclass(frozen=True)
class Quartiles:
    """Lower quartile, median and upper quartile."""

    q1: float
    median: float
    q3: float

    def __str__(self) -> str:
        """Of ratios."""
        return f"{self.median:.2f}x [{self.q1:.2f}, {self.q3:.2f}]"


def quartiles(values: Sequence[float]) -> Quartiles:
    """With linear interpolation between neighbours.

    Args:
        values: at least one number.
    """
    return Quartiles(*np.quantile(values, (0.25, 0.5, 0.75)).tolist())


def round_times(passes: Sequence[Sequence[float]]) -> list[float]:
    """One time per round, in seconds: the median over the round's passes."""
    return [quartiles(one_round).median for one_round in passes]


def paired_ratios(
    numerator: Sequence[Sequence[float]], denominator: Sequence[Sequence[float]]
) -> list[float]:
    """Ratio of times in each round in which both were measured.

    Both begin with the first round; the one that was dropped early has fewer rounds.
    """
    pairs = zip(round_times(numerator), round_times(denominator), strict=False)
    return [above / below for above, below in pairs]


def clearly_slower(medians: dict[str, float], best: float) -> set[str]:
    """Those not worth more rounds beside the best one."""
    return {name for name, median in medians.items() if median > CLEARLY_SLOWER * best}


def alternate(
    steps: Mapping[str, Step],
    schedule: Schedule,
    *,
    before: Step | None = None,
    drop: Callable[[dict[str, float]], set[str]] | None = None,
    clock: Callable[[], float] = time.perf_counter,
    timer: Timer | None = None,
    on_round: Callable[[float, int], object] = lambda part_done, n_rounds: None,
) -> Samples:
    """Time every callable in alternation.

    Args:
        steps: name -> one step; called once unmeasured first.
        before: run unmeasured before each single step, for example to flush caches; before those that
            are not measured themselves too.
        drop: given each median in seconds after the screening rounds, names those to leave out from
            then on; their samples so far are kept.
        clock: seconds, monotonic; the schedule goes by it.
        timer: what the samples are measured with; default: the clock too.
        on_round: told the part done, from 0 to 1, and the number of rounds, after each of them.
    """
    timer = timer or HostTimer(clock)
    order = random.Random(0)
    gc_was_enabled = gc.isenabled()
    gc.collect()
    # As in timeit: a collection would hit whoever happens to run, for garbage of all.
    gc.disable()
    try:
        for step in steps.values():
            if before is not None:
                before()
            step()
        n_steps = {n: _burst_length(step, schedule, timer, before) for n, step in steps.items()}
        samples: Samples = {name: [] for name in steps}
        names = list(steps)
        begin = clock()
        n_rounds = 0
        while True:
            for name in names:
                samples[name].append([])
            for _ in range(schedule.n_passes):
                order.shuffle(names)
                for name in names:
                    seconds = timer.burst(steps[name], n_steps[name], before)
                    samples[name][-1].append(seconds)
            n_rounds += 1
            elapsed = clock() - begin
            part_done = min(elapsed / schedule.budget_s, n_rounds / schedule.min_rounds)
            on_round(min(1.0, max(part_done, n_rounds / schedule.max_rounds)), n_rounds)
            if n_rounds >= schedule.max_rounds or elapsed >= schedule.limit_s:
                return samples
            if n_rounds >= schedule.min_rounds and elapsed >= schedule.budget_s:
                return samples
            if drop is not None and n_rounds == schedule.n_screening_rounds:
                medians = {n: quartiles(round_times(samples[n])).median for n in names}
                dropped = drop(medians)
                names = [name for name in names if name not in dropped]
    finally:
        if gc_was_enabled:
            gc.enable()


def _burst_length(step: Step, schedule: Schedule, timer: Timer, before: Step | None) -> int:
    """Number of steps that take burst_s; doubles until the clock's resolution is no matter."""
    n_steps = 1
    while True:
        seconds = timer.burst(step, n_steps, before)
        if n_steps * seconds >= schedule.burst_s / 4:
            return max(1, math.ceil(schedule.burst_s / seconds))
        n_steps *= 2
