"""python -m fused_optim run --compare: a program with torch.optim and with ours, side by side.

Each run is a process of its own, which this module starts with itself as its main one, and which leaves what
is to be compared in a file.
"""

import atexit
import math
import os
import pickle
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from fused_optim import sharding
from fused_optim.cli.recorder import SERVED, Recorder
from fused_optim.cli.run import Program, arm, execute
from fused_optim.optimizers import REPLACED
from fused_optim.options import KernelOptions
from fused_optim.units import count

SIDES = ("torch.optim", "fused_optim")
EXIT_NOTHING_TO_COMPARE = 1

Params = list[list[list[Tensor]]]  # of each optimizer, of each of its groups


class Record(NamedTuple):
    """What the main process of a run leaves."""

    step_seconds: float
    whole_seconds: float
    n_steps: int
    params: Params | str  # why there are none


def compare(program: Program, options: KernelOptions) -> int:
    """Run a program twice, one run after the other, and print what differs.

    Returns:
        0; the exit status of the run that failed; or 1 if one has left nothing to compare.
    """
    records = []
    for side in SIDES:
        with tempfile.TemporaryDirectory() as folder:
            job, result = Path(folder, "job"), Path(folder, "result")
            job.write_bytes(pickle.dumps((side, program, options)))
            # Flags of the interpreter, as multiprocessing hands them on.
            flags = subprocess._args_from_interpreter_flags()  # type: ignore[attr-defined]
            command = [sys.executable, *flags, "-m", __name__, str(job), str(result)]
            status = subprocess.run(command).returncode
            if status != 0:
                status = status if status > 0 else 128 - status  # a signal's, as a shell has it
                _say(f"with {side}, the program ended with status {status}: nothing is compared")
                return status
            if not result.exists():
                _say(
                    f"with {side}, the program ended without running exit handlers: nothing is compared"
                )
                return EXIT_NOTHING_TO_COMPARE
            records.append(Record(*torch.load(result)))
    for line in lines(*records):
        _say(line)
    return 0


def _say(line: str) -> None:
    print(f"fused_optim: {line}", file=sys.stderr)


def lines(stock: Record, ours: Record) -> list[str]:
    """The report."""
    if stock.n_steps == ours.n_steps == 0:
        times = []
        params = f"no step of {SERVED} in either run"
    else:
        times = [
            _row("in step()", stock.step_seconds, ours.step_seconds),
            f"{'steps':<12}{stock.n_steps:>13,}  {ours.n_steps:>13,}",
        ]
        params = _difference(stock.params, ours.params)
    return [
        f"{'':<12}{SIDES[0]:>13}  {SIDES[1]:>13}",
        *times,
        _row("whole time", stock.whole_seconds, ours.whole_seconds),
        params,
    ]


def _row(what: str, stock: float, ours: float) -> str:
    ratio = f"  {stock / ours:.3g}x" if ours else ""
    return f"{what:<12}{stock:>11.3g} s  {ours:>11.3g} s{ratio}"


def _difference(stock: Params | str, ours: Params | str) -> str:
    if isinstance(stock, str) or isinstance(ours, str):
        return f"the final params cannot be compared: {stock if isinstance(stock, str) else ours}"
    mismatch = _mismatch(stock, ours)
    if mismatch:
        return f"the final params do not match: {mismatch}"
    pairs = [
        (_wide(pair[0]), _wide(pair[1]))
        for groups in zip(stock, ours)
        for tensors in zip(*groups)
        for pair in zip(*tensors)
        if pair[0].numel()
    ]
    largest = max((_largest(_distance(*pair)) for pair in pairs), key=_nan_last, default=0.0)
    size = max((_largest(a.abs()) for a, _ in pairs), key=_nan_last, default=0.0)
    relative = f", {largest / size:.2g} of the largest of them" if size else ""
    return (
        f"final params: {count(len(pairs), 'tensor')} of {count(len(stock), 'optimizer')} differ by at "
        f"most {largest:.2g}{relative}"
    )


def _mismatch(stock: Params, ours: Params) -> str | None:
    """The first place where one has what the other has not."""
    if len(stock) != len(ours):
        return f"{SIDES[0]} stepped {count(len(stock), 'optimizer')}, {SIDES[1]} {len(ours)}"
    for o, (groups, our_groups) in enumerate(zip(stock, ours)):
        if len(groups) != len(our_groups):
            numbers = (
                f"{count(len(groups), 'group')} with {SIDES[0]}, {len(our_groups)} with {SIDES[1]}"
            )
            return f"optimizer {o} has {numbers}"
        for g, (tensors, our_tensors) in enumerate(zip(groups, our_groups)):
            shapes, our_shapes = ([tuple(t.shape) for t in ts] for ts in (tensors, our_tensors))
            if shapes != our_shapes:
                return (
                    f"group {g} of optimizer {o} has shapes {shapes} with {SIDES[0]}, {our_shapes} with "
                    f"{SIDES[1]}"
                )
    return None


def _wide(values: Tensor) -> Tensor:
    """In a type that differences do not round."""
    return values.to(torch.complex128 if values.is_complex() else torch.float64)


def _distance(a: Tensor, b: Tensor) -> Tensor:
    """The distance of each two elements; 0 where both are the same infinity or both NaN."""
    is_same = (a == b) | (a.isnan() & b.isnan())
    return torch.where(is_same, 0.0, (a - b).abs())


def _largest(values: Tensor) -> float:
    return values.max().item()  # NaN if there is one


def _nan_last(value: float) -> tuple[bool, float]:
    return math.isnan(value), value


def _plain(param: Tensor) -> Tensor:
    """What this process holds of it, in a copy: a view would save all that it shows a part of."""
    return sharding.part_of(param.detach()).as_subclass(Tensor).to("cpu", copy=True)


def _save(recorder: Recorder, path: Path, pid: int) -> None:
    """At the end of the program's main process, not of its forks."""
    if os.getpid() != pid:
        return
    try:
        params = [
            [[_plain(param) for param in group["params"]] for group in groups]
            for groups in recorder.param_groups.values()
        ]
    except Exception as error:  # of tensors without values, say
        params = f"{type(error).__name__}: {error}"
    record = Record(recorder.step_seconds(), recorder.whole_seconds(), recorder.n_steps(), params)
    torch.save(tuple(record), path)


def _run(job: Path, result: Path) -> int:
    """One of the two runs, in its own process."""
    side, program, options = pickle.loads(job.read_bytes())
    recorder = Recorder(keeps_params=True)
    if side == SIDES[0]:
        recorder.start(*REPLACED)
    else:
        arm(options, recorder)
    atexit.register(_save, recorder, result, os.getpid())
    return execute(program)


if __name__ == "__main__":
    sys.exit(_run(Path(sys.argv[1]), Path(sys.argv[2])))
