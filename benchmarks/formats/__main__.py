"""Measure the formats of params and states, and write docs/formats.md with its plots.

python benchmarks/formats [--quick] [--out FOLDER]

Takes about ten minutes on one core. Exits with 1 if the error of an update misses its target.
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import dataclass
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[2] / "examples"))

import footprint
import page
import plots
import replay
import torch
import training
from tasks import replayed_task, trainings
from variants import ALL

from fused_optim.bench.machine import about

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Size:
    replayed_steps: int = 800
    character_steps: int = 1000
    digit_epochs: int = 20
    seeds: int = 5


QUICK = Size(replayed_steps=5, character_steps=5, digit_epochs=1, seeds=2)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a few steps, to see that it runs")
    parser.add_argument("--out", type=Path, help="default: docs; with --quick build/formats")
    args = parser.parse_args()
    out = args.out or (ROOT / "build" / "formats" if args.quick else ROOT / "docs")
    size = QUICK if args.quick else Size()
    # The same numbers in every run, and models this small gain little from a second thread.
    torch.set_num_threads(1)
    start = time.perf_counter()
    footprints = {format: footprint.measure(format) for format in ALL}
    replayed = replay.run(replayed_task(size.replayed_steps))
    print(f"gradients replayed, {time.perf_counter() - start:.0f} s", flush=True)
    compared = []
    for work in trainings(size.character_steps, size.digit_epochs):
        compared.append(training.compare(work, size.seeds))
        print(f"{work.task.name} trained, {time.perf_counter() - start:.0f} s", flush=True)
    described = about(quick=args.quick) | {"minutes": (time.perf_counter() - start) / 60}
    out.mkdir(parents=True, exist_ok=True)
    written = out / "formats.md"
    written.write_text(page.write(described, footprints, replayed, compared), "utf-8")
    plots.draw_nmse(replayed, out / "formats" / "nmse.svg")
    plots.draw_losses(compared, out / "formats" / "losses.svg")
    print(written)
    if args.quick:
        return 0
    missed = page.missed(replayed)
    for line in missed:
        print(f"MISSED: {line}", file=sys.stderr)
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
