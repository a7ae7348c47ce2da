"""What only a GPU can decide: the block, chunk, warps, registers and cache hints that run best.

    python benchmarks/sweep.py [--cases float32 int8 ...] [--seconds 60] [--json FILE]
    python benchmarks/sweep.py --dry        lists the configurations; needs no GPU

Compiles in processes side by side first. Then all configurations of a case are measured in turns, in one
process, beside copy_ and torch's fused optimizer. One with other bits than the shipped one is named, and not
measured.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from smoke import COPY_NBYTES, expect, outcome
from torch import Tensor, nn
from triton.runtime.jit import JITFunction

import fused_optim
from fused_optim.bench.contestants import device_copy
from fused_optim.bench.device import EventTimer
from fused_optim.bench.timing import (
    Schedule,
    Step,
    Timer,
    alternate,
    clearly_slower,
    paired_ratios,
    quartiles,
    round_times,
)

# Setuptools maps the folder into the package; pyright cannot know.
from fused_optim.triton_kernels import (  # pyright: ignore[reportMissingImports]
    multi_tensor,
    specialize,
    streams,
)

# Compilers side by side; each has a context on the GPU.
MAX_PROCESSES = 12
N_TENSORS = 16
COPY, STOCK = "copy_ of 1 GiB", "torch fused"

LOAD = "tl.load(address + indices[p], mask=mask"
STORE = "tl.store(address + indices[p], code, mask=mask"
# Name -> function of streams.py, a call in its source, and what is added to the call's arguments.
HINTS = {
    "load.ef": ("load", LOAD, ', eviction_policy="evict_first"'),
    "load.cg": ("load", LOAD, ', cache_modifier=".cg"'),
    "store.ef": ("store", STORE, ', eviction_policy="evict_first"'),
    "store.cs": ("store", STORE, ', cache_modifier=".cs"'),
}


@dataclass(frozen=True)
class Shape:
    """What a program takes at once and in all.

    per_thread: elements, half as many in float64.
    chunk: elements of a program; at least one block.
    parts: see streams.py; None: as it is shipped.
    """

    per_thread: int
    num_warps: int
    chunk: int
    parts: int | None = None


@dataclass(frozen=True)
class Config:
    """How a kernel is compiled; without arguments, as it is shipped."""

    shape: Shape | None = None
    maxnreg: int | None = None
    hints: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        words = list(self.hints)
        if self.maxnreg is not None:
            words.insert(0, f"maxnreg={self.maxnreg}")
        if self.shape is not None:
            threads = 32 * self.shape.num_warps
            parts = "" if self.shape.parts is None else f" parts={self.shape.parts}"
            words.insert(0, f"{self.shape.per_thread}x{threads}{parts} chunk={self.shape.chunk}")
        return " ".join(words) or "shipped"


def shaped(
    per_thread: int,
    num_warps: int,
    *chunks: int,
    maxnregs: Sequence[int | None] = (None,),
    parts: int | None = None,
) -> list[Config]:
    return [
        Config(Shape(per_thread, num_warps, chunk, parts), maxnreg)
        for chunk in chunks
        for maxnreg in maxnregs
    ]


HINTED = [
    Config(hints=hints)
    for hints in (
        ("load.ef",),
        ("load.cg",),
        ("store.cs",),
        ("store.ef",),
        ("load.ef", "store.cs"),
        ("load.ef", "store.ef"),
    )
]
# Bound by bandwidth: more bytes in flight, fewer prologues.
FLOAT32 = [
    Config(),
    *shaped(4, 4, 512, 2048, 4096, 8192, 16384, 65536),
    *shaped(4, 8, 1024, 4096, 8192, 16384, 65536),
    *shaped(8, 4, 1024, 2048, 4096, 8192, 16384),
    *shaped(8, 8, 4096, 8192, 16384),
    *shaped(8, 4, 8192, maxnregs=(64, 80)),
    *shaped(4, 16, 8192, 16384),
    *shaped(4, 2, 2048, 8192),
    *HINTED,
]
# 8 elements a thread are 128 bits.
BFLOAT16 = [
    Config(),
    *shaped(4, 4, 2048, 4096, 8192, 16384),
    *shaped(8, 4, 1024, 2048, 4096, 8192, 16384),
    *shaped(8, 2, 2048, 8192),
    *shaped(8, 8, 8192, 16384),
    *shaped(16, 4, 8192),
    *shaped(8, 4, 8192, maxnregs=(64, 80)),
    *HINTED,
]
# Near what the instructions allow: more warps side by side, or fewer of what elements have in common.
PACKED = [
    Config(),
    *(Config(maxnreg=n) for n in (80, 96, 112, 128)),
    *shaped(8, 1, 1024, 2048, 4096, 8192, 16384),
    *shaped(8, 2, 2048, 4096, 8192),
    *shaped(8, 4, 4096, 8192, 16384),
    *shaped(8, 1, 4096, maxnregs=(64, 80, 96, 128)),
    *shaped(16, 1, 4096, 8192, parts=4, maxnregs=(None, 128)),
    *shaped(4, 1, 2048, parts=1),
    *shaped(4, 4, 2048, 8192, parts=1),
    *HINTED,
]


@dataclass(frozen=True)
class Case:
    """AdamW with params of one dtype."""

    dtype: torch.dtype
    options: dict[str, Any]
    configs: list[Config]


BF16 = torch.bfloat16
CASES = {
    "float32": Case(torch.float32, {}, FLOAT32),
    "bfloat16": Case(BF16, {}, BFLOAT16),
    "int8": Case(torch.float32, {"state_dtype": "int8"}, PACKED),
    "bf16-states": Case(torch.float32, {"state_dtype": BF16}, PACKED),
    "split16": Case(BF16, {"master": "split16", "state_dtype": BF16}, PACKED),
    "split8": Case(BF16, {"master": "split8", "state_dtype": "int8"}, PACKED),
}


@contextlib.contextmanager
def configured(config: Config) -> Iterator[list[Any]]:
    """Kernels compiled meanwhile are `config`'s; those of multi_tensor are in the list."""
    compiled: list[Any] = []
    with contextlib.ExitStack() as stack:
        shape = config.shape
        if shape is not None:

            def block(self: Any) -> int:
                is_double = self.compute is specialize.tl.float64
                return shape.per_thread * self.warp_size * shape.num_warps // (1 + is_double)

            replaced = {
                "block": property(block),
                "num_warps": property(lambda self: shape.num_warps),
                "chunk": property(lambda self: max(shape.chunk, block(self))),
            }
            if shape.parts is not None:
                replaced["parts"] = property(lambda self: shape.parts)
            for name, value in replaced.items():
                stack.enter_context(mock.patch.object(specialize.Specialization, name, value))
        if config.maxnreg is not None:
            options = {"maxnreg": config.maxnreg}
            stack.enter_context(mock.patch.dict(specialize.COMPILE_OPTIONS, options))
        kernel = multi_tensor.multi_tensor
        if isinstance(kernel, JITFunction):  # in the interpreter nothing is compiled
            stack.enter_context(hinted(config.hints))
            warmup = kernel.warmup

            def recorded(*args: Any, **kwargs: Any) -> Any:
                compiled.append(warmup(*args, **kwargs))
                return compiled[-1]

            stack.enter_context(mock.patch.object(kernel, "warmup", recorded))
        yield compiled


@contextlib.contextmanager
def hinted(hints: Sequence[str]) -> Iterator[None]:
    """The kernel's source has these cache hints."""
    shipped = {f: f.src for f in (streams.load, streams.store)}
    changed = dict(shipped)
    for hint in hints:
        name, call, added = HINTS[hint]
        function = getattr(streams, name)
        assert shipped[function].count(call) == 1, f"{name}() has no longer one {call!r}"
        changed[function] = changed[function].replace(call, call + added)

    def write(sources: dict[Any, str]) -> None:
        for function, source in sources.items():
            function._unsafe_update_src(source)
        # Their hashes cover the functions they call; kernels in memory go by no hash.
        for caller in (streams.load_extra, multi_tensor.store_block, multi_tensor.update_block):
            caller.hash = None
        multi_tensor.multi_tensor.hash = None
        multi_tensor.multi_tensor.device_caches.clear()

    write(changed)
    try:
        yield
    finally:
        write(shipped)


@dataclass(frozen=True)
class Finding:
    """What became of one configuration of a case.

    digest: of the bits of all that two steps leave behind; None if it failed.
    """

    config: Config
    digest: str | None = None
    failure: str | None = None
    registers: int | None = None
    spills: int | None = None


def examine(case: Case, config: Config, device: torch.device) -> Finding:
    """Compile it, which leaves it in Triton's cache on disk, and take two steps."""
    try:
        with configured(config) as compiled:
            found = outcome("AdamW", case.dtype, device, "triton", **case.options)
    # A compiler may fail in any way; the others go on.
    except Exception as error:
        return Finding(config, failure=f"{type(error).__name__}: {error}")
    digest = hashlib.sha256()
    for key, value in sorted(found.items()):
        digest.update(key.encode() + value.numpy().tobytes())
    # Kernels are loaded by now.
    registers, spills = (compiled[0].n_regs, compiled[0].n_spills) if compiled else (None, None)
    return Finding(config, digest.hexdigest()[:12], None, registers, spills)


def examine_all(names: Sequence[str], device: torch.device) -> dict[str, list[Finding]]:
    """Of each of these cases, in processes side by side."""
    jobs = [(name, config) for name in names for config in CASES[name].configs]
    n_processes = min(len(os.sched_getaffinity(0)), MAX_PROCESSES)
    found: dict[str, list[Finding]] = {name: [] for name in names}
    with ProcessPoolExecutor(n_processes, multiprocessing.get_context("spawn")) as pool:
        findings = pool.map(examine, *zip(*((CASES[n], config, device) for n, config in jobs)))
        for (name, _), finding in zip(jobs, findings):
            found[name].append(finding)
    return found


def usable(findings: Sequence[Finding]) -> list[Finding]:
    """Those with the bits of the first, which is the shipped one."""
    expected = findings[0].digest
    return [f for f in findings if f.digest is not None and f.digest == expected]


@dataclass(frozen=True)
class Measured:
    """nbytes: read and written in a step; samples: as the benchmark's, in seconds per step."""

    nbytes: int
    samples: dict[str, list[list[float]]]


def measure(
    case: Case,
    configs: Sequence[Config],
    device: torch.device,
    numel: int,
    timer: Timer,
    schedule: Schedule,
) -> Measured:
    """All in turns, on the same params and states."""
    generator = torch.Generator(device).manual_seed(0)

    def draw() -> Tensor:
        drawn = torch.empty(numel // N_TENSORS, dtype=case.dtype, device=device)
        return drawn.uniform_(-1, 1, generator=generator)

    params = [nn.Parameter(draw()) for _ in range(N_TENSORS)]
    for param in params:
        param.grad = draw()
    steps: dict[str, Step] = {}
    state: Any = None
    for config in configs:
        optimizer = fused_optim.AdamW(params, **case.options)
        if state is None:
            state = optimizer.state
        optimizer.state = state
        # An optimizer keeps the kernels of its first step.
        with configured(config) as compiled:
            optimizer.step()
        expect(optimizer, "triton", len(params))
        assert compiled, f"{config.name}: nothing was compiled, so it would measure another one"
        steps[config.name] = optimizer.step
    nbytes = sum(3 * param.nbytes for param in params)
    nbytes += 2 * sum(v.nbytes for param in params for v in state[param].values() if v.dim() > 0)
    steps[COPY] = device_copy(device, COPY_NBYTES)
    # It knows no formats: float32 instead of those, beside which they are to be fast.
    stock = [nn.Parameter(p.detach().float() if case.options else p.detach()) for p in params]
    for param, ours in zip(stock, params):
        assert ours.grad is not None
        param.grad = ours.grad.to(param.dtype)
    steps[STOCK] = torch.optim.AdamW(stock, fused=True).step

    def hopeless(medians: dict[str, float]) -> set[str]:
        ours = {name: s for name, s in medians.items() if name not in (COPY, STOCK)}
        return clearly_slower(ours, min(ours.values())) - {configs[0].name}

    return Measured(nbytes, alternate(steps, schedule, drop=hopeless, timer=timer))


def report(measured: Measured, findings: Sequence[Finding]) -> None:
    """A line for each configuration, the fastest first; ratios are paired within rounds."""
    of = {finding.config.name: finding for finding in findings}
    samples = measured.samples
    medians = {name: quartiles(round_times(passes)).median for name, passes in samples.items()}
    shipped = findings[0].config.name
    print(f"{'ms':>8} {'shipped / this':>20} {'TB/s':>6} {'of copy_':>8} {'regs':>4} {'spills':>6}")
    for name in sorted(medians, key=lambda name: medians[name]):
        ratio = quartiles(paired_ratios(samples[shipped], samples[name]))
        line = f"{medians[name] * 1e3:8.4f} {ratio.median:6.3f} ({ratio.q1:.3f}-{ratio.q3:.3f})"
        if name in of:
            part = quartiles(paired_ratios(samples[COPY], samples[name])).median
            part *= measured.nbytes / (2 * COPY_NBYTES)
            rate = measured.nbytes / medians[name] / 1e12
            line += f" {rate:6.3f} {part:8.1%} {of[name].registers!s:>4} {of[name].spills!s:>6}"
        else:
            line += " " * 28
        print(f"{line}  {name}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--seconds", type=float, default=60, help="of measuring, in all")
    parser.add_argument("--numel", type=int, default=2**28)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--dry", action="store_true", help="list the configurations")
    args = parser.parse_args()
    if args.dry:
        for name in args.cases:
            for config in CASES[name].configs:
                print(f"{name}: {config.name}")
        return
    device = torch.device("cuda", torch.cuda.current_device())
    begin = time.perf_counter()
    found = examine_all(args.cases, device)
    n_configs = sum(map(len, found.values()))
    print(f"{n_configs} configurations compiled in {time.perf_counter() - begin:.0f} s")
    saved: dict[str, Any] = {
        "device": torch.cuda.get_device_name(device),
        "versions": {"torch": torch.__version__, "triton": triton.__version__},
        "cases": {},
    }
    n_measured, n_other_bits = 0, 0
    hold = device_copy(device, COPY_NBYTES)
    budget_s = args.seconds / len(args.cases)
    for name in args.cases:
        findings = found[name]
        chosen = usable(findings)
        print(f"\n{name}: {len(chosen)} of {len(findings)} configurations")
        for finding in findings:
            if finding.failure is not None:
                print(f"FAILED {finding.config.name}: {finding.failure[:200]}")
            elif finding not in chosen:
                n_other_bits += 1
                print(f"OTHER BITS {finding.config.name}")
        if not chosen:
            continue
        measured = measure(
            CASES[name],
            [finding.config for finding in chosen],
            device,
            args.numel,
            EventTimer(lambda: torch.cuda.Event(enable_timing=True), hold),
            Schedule(budget_s, 1.5 * budget_s, 3, 10**6, 1, 3),
        )
        n_measured += len(chosen)
        report(measured, findings)
        saved["cases"][name] = {
            "nbytes": measured.nbytes,
            "configs": {
                f.config.name: {"registers": f.registers, "spills": f.spills, "digest": f.digest}
                for f in findings
            },
            "samples_s": measured.samples,
        }
        if args.json is not None:
            args.json.write_text(json.dumps(saved) + "\n")
        torch.cuda.empty_cache()
    print(f"{n_measured} configurations measured, {n_other_bits} with other bits", flush=True)
    sys.exit(n_measured == 0 or n_other_bits > 0)


if __name__ == "__main__":
    main()
