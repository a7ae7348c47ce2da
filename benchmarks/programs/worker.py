"""One training, in a process of its own: what it took, as a line of JSON.

python worker.py PROGRAM CONTESTANT SEED N_STEPS
"""

from __future__ import annotations

import functools
import importlib
import json
import os
import sys
import time
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from trainings import CONTESTANTS, PROGRAMS

from fused_optim import FusedOptimizer
from fused_optim.bench.machine import CpuElsewhere


class Steps:
    """Times every step() of a class, stock's and ours by the same wrapper."""

    def __init__(self, optimizer: type[Optimizer]) -> None:
        self.seconds = 0.0
        self.number = 0
        self.latest: Any = None
        step = optimizer.step

        # wraps() copies torch's mark `hooked`: the next optimizer does not hook the class once more.
        @functools.wraps(step)
        def timed(optimizer: Optimizer, *args: Any, **kwargs: Any) -> Any:
            begin = time.perf_counter()
            try:
                return step(optimizer, *args, **kwargs)
            finally:
                self.seconds += time.perf_counter() - begin
                self.number += 1
                self.latest = optimizer

        optimizer.step = timed  # type: ignore[method-assign]


def _step_once(optimizer: type[Optimizer], options: dict[str, Any]) -> None:
    """The first optimizer of a process imports much of torch."""
    param = nn.Parameter(torch.ones(2))
    param.grad = torch.ones(2)
    optimizer([param], **options).step()  # type: ignore[call-arg]


def measure(name: str, contestant: str, seed: int, n_steps: int) -> dict[str, Any]:
    """Times in seconds; those of imports are not among them."""
    program = PROGRAMS[name]
    module, options = CONTESTANTS[contestant]
    optimizer = getattr(module, program.optimizer)
    importlib.import_module(program.module)
    _step_once(optimizer, options)
    steps = Steps(optimizer)
    load_average = os.getloadavg()[0]
    elsewhere = CpuElsewhere()
    begin, begin_cpu = time.perf_counter(), time.process_time()
    program.train(optimizer, options, seed, n_steps)
    cpu_s = time.process_time() - begin_cpu
    wall_s = time.perf_counter() - begin
    group = steps.latest.param_groups[0]
    ours = isinstance(steps.latest, FusedOptimizer)
    return {
        "seed": seed,
        "wall_s": wall_s,
        "cpu_s": cpu_s,
        "step_s": steps.seconds,
        "threads": torch.get_num_threads(),
        "load_average": load_average,
        "cpu_elsewhere": elsewhere.part(),
        "n_optimizer_steps": steps.number,
        "hypers": {name: group[name] for name in ("lr", "betas", "eps", "weight_decay")},
        "backends": steps.latest.last_step.tensors if ours else None,
    }


if __name__ == "__main__":
    name, contestant, seed, n_steps = sys.argv[1:]
    print(json.dumps(measure(name, contestant, int(seed), int(n_steps))))
