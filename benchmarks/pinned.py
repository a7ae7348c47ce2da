"""Two processes pinned to a core each, beside one with two threads: who steps the host's half faster.

    python benchmarks/pinned.py

All step 64 M float32 masters in turns, from bfloat16 grads to bfloat16 outputs; each of two processes has
half of them, as data-parallel engines part them. Prints the median times and ratio.
"""

import multiprocessing
import os
import statistics
import time
from multiprocessing.connection import Connection

import torch

import fused_optim
from fused_optim.bench import contestants
from fused_optim.bench.offload import Host
from fused_optim.bench.workloads import table

N_ROUNDS = 21


def serve(pipe: Connection, cores: set[int], part: slice) -> None:
    """Step these tensors whenever asked to."""
    os.sched_setaffinity(0, cores)
    torch.set_num_threads(1)
    fused_optim.set_num_threads(len(cores))
    (work,) = (row for row in table(False) if row.name == "offload-64m")
    params = contestants.make_params(work)[part]
    host = Host(params, [param.grad.bfloat16() for param in params if param.grad is not None])
    host.step()
    pipe.send("ready")
    while pipe.recv():
        host.step()
        pipe.send("done")


def main() -> None:
    """Time both in turns."""
    cores = sorted(os.sched_getaffinity(0))[:2]
    if len(cores) < 2:
        raise SystemExit("needs two cores")
    shares = {
        "1 process, 2 threads": [(set(cores), slice(None))],
        "2 processes, 1 core each": [({core}, slice(i, None, 2)) for i, core in enumerate(cores)],
    }
    context = multiprocessing.get_context("spawn")
    pipes: dict[str, list[Connection]] = {}
    for name, parts in shares.items():
        pipes[name] = []
        for part in parts:
            ours, theirs = context.Pipe()
            context.Process(target=serve, args=(theirs, *part), daemon=True).start()
            pipes[name].append(ours)
    seconds: dict[str, list[float]] = {name: [] for name in pipes}
    for pipe in (pipe for found in pipes.values() for pipe in found):
        pipe.recv()
    for _ in range(N_ROUNDS):
        for name, found in pipes.items():
            begin = time.perf_counter()
            for pipe in found:
                pipe.send(True)
            for pipe in found:
                pipe.recv()
            seconds[name].append(time.perf_counter() - begin)
    for pipe in (pipe for found in pipes.values() for pipe in found):
        pipe.send(False)
    for name, times in seconds.items():
        print(f"{name:<26} {statistics.median(times) * 1e3:.1f} ms")
    one, two = seconds.values()
    print(f"two / one: {statistics.median(b / a for a, b in zip(one, two, strict=True)):.2f}")


if __name__ == "__main__":
    main()
