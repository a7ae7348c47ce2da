"""Measure whole trainings by torch.optim's optimizers and by ours, and a step of three tiny tensors.

python benchmarks/programs [--rounds N] [--only NAME ...] [--threads N ...] [--out FILE]

Takes about 20 minutes, on two cores without other work. Prints the table of README.md.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import os
import shlex
import sys
from pathlib import Path

import alternation
import table
from trainings import PROGRAMS

from fused_optim.bench import measure
from fused_optim.bench.machine import about
from fused_optim.bench.results import BUSY_ELSEWHERE, SCHEMA

ROOT = Path(__file__).resolve().parents[2]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="default: 5")
    parser.add_argument("--only", nargs="+", choices=PROGRAMS, default=list(PROGRAMS))
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2], metavar="N")
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "programs.json")
    args = parser.parse_args()
    args.out.parent.mkdir(parents=True, exist_ok=True)
    described = about(
        quick=False, command=shlex.join(["python", "benchmarks/programs", *sys.argv[1:]])
    )
    chosen, skipped = {}, {}
    for name in args.only:
        module, package = PROGRAMS[name].needs
        if importlib.util.find_spec(module):
            chosen[name] = PROGRAMS[name].n_steps
            described["versions"][package] = importlib.metadata.version(package)
        else:
            skipped[name] = f"needs {package}: pip install {package}"
            print(f"{name} is left out, it {skipped[name]}", file=sys.stderr)
    load_averages = [os.getloadavg()]
    latency = alternation.measure_latency(measure.FULL)
    try:
        rows = alternation.measure(chosen, args.threads, args.rounds)
    except alternation.NotMeasured as reason:
        print(reason, file=sys.stderr)
        return 1
    load_averages.append(os.getloadavg())
    found = {
        "schema": SCHEMA,
        **described,
        "settings": {"rounds": args.rounds},
        "load_averages": load_averages,
        "rows": rows,
        "latency": {"title": alternation.LATENCY.title, "samples_s": latency},
        "skipped": skipped,
    }
    args.out.write_text(json.dumps(found, indent=1) + "\n", "utf-8")
    print(table.written(found))
    print(f"All samples: {args.out}")
    samples = [sample for row in rows for samples in row["samples"].values() for sample in samples]
    elsewhere = max((sample["cpu_elsewhere"] or 0 for sample in samples), default=0)
    if elsewhere > BUSY_ELSEWHERE:
        print(
            f"Other processes took up to {elsewhere:.0%} of the machine: these are no numbers to quote.",
            file=sys.stderr,
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
