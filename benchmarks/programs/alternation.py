"""All contestants in turns: trainings in processes of their own, one step in this one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from trainings import CONTESTANTS, PROGRAMS

from fused_optim.bench import contestants, timing
from fused_optim.bench.workloads import Workload

WORKER = Path(__file__).with_name("worker.py")
LATENCY = Workload("latency", "Adam on 3 tensors of 10", "Adam", [(10,)] * 3)


class NotMeasured(Exception):
    """What went wrong in a training."""


def order(number: int) -> list[str]:
    """Contestants in the turns of a round: in six rounds, each is first, second and third twice."""
    names = list(CONTESTANTS)
    first = number // 2 % len(names)
    turned = names[first:] + names[:first]
    return turned[::-1] if number % 2 else turned


def train(name: str, contestant: str, threads: int, seed: int, n_steps: int) -> dict[str, Any]:
    """One training in a fresh process, as users start it.

    Whoever ran before leaves no warm allocator, no threads and no caches behind, and where the data
    happens to lie is drawn anew each time.

    Raises:
        NotMeasured: it failed, or our kernels did not step all tensors.
    """
    done = subprocess.run(
        [sys.executable, str(WORKER), name, contestant, str(seed), str(n_steps)],
        env={**os.environ, "OMP_NUM_THREADS": str(threads)},
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise NotMeasured(f"{name} with {contestant}:\n{done.stderr}")
    sample = json.loads(done.stdout.splitlines()[-1])
    backends = sample.pop("backends")
    if backends is not None and set(backends) != {"cpu"}:
        raise NotMeasured(f"{name}: not all tensors were stepped by our kernels: {backends}")
    return sample


def measure(n_steps: dict[str, int], threads: Sequence[int], n_rounds: int) -> list[dict[str, Any]]:
    """A row for each program and number of threads, with a sample for each contestant and round.

    Args:
        n_steps: program -> how long it trains.

    Raises:
        NotMeasured: as by train(), or the contestants did not do the same.
    """
    rows: list[dict[str, Any]] = [
        {
            "name": name,
            "title": PROGRAMS[name].titled(length),
            "optimizer": PROGRAMS[name].optimizer,
            "n_steps": length,
            "threads": n_threads,
            "samples": {contestant: [] for contestant in CONTESTANTS},
        }
        for name, length in n_steps.items()
        for n_threads in threads
    ]
    for number in range(n_rounds):
        for row in rows:
            for contestant in order(number):
                sample = train(row["name"], contestant, row["threads"], number, row["n_steps"])
                row["samples"][contestant].append(sample)
                print(
                    f"round {number + 1} of {n_rounds}, {row['title']}, threads: {row['threads']}, "
                    f"{contestant}: {sample['wall_s']:.2f} s",
                    file=sys.stderr,
                )
    for row in rows:
        samples = [sample for samples in row["samples"].values() for sample in samples]
        for same in ("n_optimizer_steps", "hypers"):
            values = [sample.pop(same) for sample in samples]
            if any(value != values[0] for value in values):
                raise NotMeasured(f"{row['name']}: {same} differ: {values}")
            row[same] = values[0]
    return rows


def measure_latency(schedule: timing.Schedule) -> timing.Samples:
    """Seconds per step of three tiny tensors."""
    params = contestants.make_params(LATENCY)
    steps: dict[str, timing.Step] = {}
    for name, (module, options) in CONTESTANTS.items():
        copies = contestants.copy_params(params, LATENCY.layout)
        steps[name] = getattr(module, LATENCY.optimizer)(copies, **options).step
    return timing.alternate(steps, schedule)
