"""Peak memory and time of an iteration with and without release_gradients, each in a process of its own.

python benchmarks/release_memory.py [--optimizer AdamW] [--layers 12] [--width 2048] [--batch 32]

glibc keeps some of what is freed; with MALLOC_MMAP_THRESHOLD_=1000000 in the environment the peak is exact,
and iterations are slower.
"""

import argparse
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

import fused_optim

WARMUP = 3  # after which the states exist


def kib(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(name)).split()[1])


def measure(args: argparse.Namespace) -> None:
    """Prints the growth of the peak over what there is before the first backward, and times in ms."""
    torch.manual_seed(0)
    layers = []
    for _ in range(args.layers):
        layers += [torch.nn.Linear(args.width, args.width), torch.nn.GELU()]
    model = torch.nn.Sequential(*layers)
    x = torch.randn(args.batch, args.width)
    optimizer = getattr(fused_optim, args.optimizer)(model.parameters(), lr=1e-4)
    if args.only == "released":
        fused_optim.release_gradients(model, optimizer)
    start = kib("VmHWM")
    times = []
    for iteration in range(WARMUP + args.iterations):
        begin = time.perf_counter()
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        if iteration >= WARMUP:
            times.append((time.perf_counter() - begin) * 1e3)
    quartiles = statistics.quantiles(times, n=4)
    nbytes = sum(param.nbytes for param in model.parameters())
    states = sum(value.nbytes for state in optimizer.state.values() for value in state.values())
    print((kib("VmHWM") - start) / 1024, nbytes / 2**20, states / 2**20, *quartiles)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--optimizer", default="AdamW")
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--iterations", type=int, default=20)
    parser.add_argument("--only", choices=["ordinary", "released"], help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.only:
        measure(args)
        return
    print(
        f"{args.optimizer}, {args.layers} x Linear({args.width}, {args.width}), float32, batch of "
        f"{args.batch}, {args.iterations} iterations, {torch.get_num_threads()} threads of "
        f"{os.cpu_count()}, {platform.machine()}, torch {torch.__version__}"
    )
    print(f"{'loop':<10}{'peak grows by':>15}{'params':>11}{'states':>11}{'ms per iteration':>26}")
    for only in ("ordinary", "released"):
        command = [sys.executable, __file__, *sys.argv[1:], "--only", only]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        peak, nbytes, states, low, median, high = map(float, done.stdout.split())
        print(
            f"{only:<10}{peak:>11.0f} MiB{nbytes:>7.0f} MiB{states:>7.0f} MiB"
            f"{median:>12.1f} [{low:.1f}, {high:.1f}]"
        )


if __name__ == "__main__":
    main()
