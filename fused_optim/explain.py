"""Tells what a step would do, without doing it: :meth:`FusedOptimizer.explain`."""

from __future__ import annotations

import functools
import time
from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from fused_optim import backends, units
from fused_optim.dry_run import DryRun

if TYPE_CHECKING:
    from fused_optim.optimizer import FusedOptimizer

# Sizes of each stream of a measurement: together they exceed the caches, and a GPU is faster.
CPU_PROBE_NBYTES = 64 * 2**20
GPU_PROBE_NBYTES = 256 * 2**20
N_PROBES = 7
_ORDER = ("cpu", "triton", "stock", None)
_MAX_LISTED = 8  # params of a row, in the table


@dataclass(frozen=True)
class ExplainedRow:
    """Tensors of one param group that the step treats alike.

    Attributes:
        group: index in ``param_groups``.
        indices: the params' indices in the group.
        names: the params' names, if the optimizer was given named parameters; else empty.
        backend: "cpu" or "triton", kernels; "stock", torch.optim's code; None: no step, there is no grad.
        device: where the params lie.
        format: dtypes of param, grad, states and average (EMA), and how they are stored.
        reason: the cause that no kernel steps them; None if one does.
        numel: elements of all params together.
        state_nbytes: bytes of their states, steps and averages.
        step_nbytes: bytes read and written in a step, averages included; None for torch.optim's
            code, which is not counted.
        seconds: step_nbytes at the bandwidth of the device; None if that was not measured.
    """

    group: int
    indices: tuple[int, ...]
    names: tuple[str, ...]
    backend: str | None
    device: torch.device
    format: str
    reason: str | None
    numel: int
    state_nbytes: int
    step_nbytes: int | None
    seconds: float | None


@dataclass(frozen=True, repr=False)
class Explanation:
    """The step that would be done; as a string, a table.

    Attributes:
        optimizer: name of the class.
        rows: param group by param group.
        n_assumed_grads: number of params without a grad, taken to get one like themselves.
        n_assumed_states: number of params without states; they count as the step would make them.
        bandwidths: device -> bytes per second, if it was measured.
        measured_with: threads of the CPU.

    Example:
        >>> params = [torch.nn.Parameter(torch.ones(1000)), torch.nn.Parameter(torch.ones(2) * 1j)]
        >>> explanation = fused_optim.AdamW(params).explain()
        >>> explanation.tensors["stock"]
        1
        >>> [row.reason for row in explanation.rows]
        [None, 'a complex tensor']
        >>> explanation.state_nbytes, explanation.step_nbytes
        (8040, 28000)
        >>> print(str(explanation).splitlines()[0])
        AdamW: 1 of 2 tensors on kernels, 1 by torch.optim's code
    """

    optimizer: str
    rows: list[ExplainedRow]
    n_assumed_grads: int
    n_assumed_states: int
    bandwidths: dict[torch.device, float]
    measured_with: int

    @property
    def tensors(self) -> dict[str, int]:
        """Backend -> number of tensors that it would step, as in :class:`StepReport`."""
        counts: dict[str, int] = {}
        for row in self.rows:
            if row.backend is not None:
                counts[row.backend] = counts.get(row.backend, 0) + len(row.indices)
        return counts

    @property
    def state_nbytes(self) -> int:
        """Bytes of all states, steps and averages."""
        return sum(row.state_nbytes for row in self.rows)

    @property
    def step_nbytes(self) -> int:
        """Bytes read and written in a step, but for tensors that torch.optim's code steps."""
        return sum(row.step_nbytes or 0 for row in self.rows)

    @property
    def seconds(self) -> float | None:
        """Predicted time of a step; None if no bandwidth was measured.

        The slowest device decides; tensors that torch.optim's code steps do not count. Many small
        tensors take longer, about a microsecond each; a model that caches hold takes less.
        """
        by_device: defaultdict[torch.device, float] = defaultdict(float)
        for row in self.rows:
            by_device[row.device] += row.seconds or 0.0
        return max(by_device.values()) if self.bandwidths else None

    def __str__(self) -> str:
        return "\n".join([_summary(self), *_table(self.rows), *_notes(self)])

    __repr__ = __str__  # which a notebook shows


def explain(optimizer: FusedOptimizer, *, measure: bool) -> Explanation:
    """See :meth:`FusedOptimizer.explain`."""
    dry_run, n_threads = DryRun(optimizer), backends.num_threads()
    bandwidths: dict[torch.device, float] = {}
    alike: dict[Any, list[int]] = {}
    for g, (group, params) in enumerate(zip(optimizer.param_groups, dry_run.groups)):
        for i, param in enumerate(params):
            device = param.tensor.device
            if measure and param.backend in ("cpu", "triton") and device not in bandwidths:
                bandwidths[device] = _bandwidth(device, n_threads)
            key = g, param.backend, device, param.format(group), param.reason
            alike.setdefault(key, []).append(i)
    one_pass = optimizer._clipping
    sums_up = one_pass is not None and (
        one_pass.max_grad_norm is not None or one_pass.skip_nonfinite
    )
    rows = []
    for (g, backend, device, text, reason), indices in sorted(
        alike.items(), key=lambda entry: (entry[0][0], _ORDER.index(entry[0][1]))
    ):
        members = [dry_run.groups[g][i] for i in indices]
        names = optimizer.param_groups[g].get("param_names")
        moved = None if backend == "stock" else sum(param.step_nbytes(sums_up) for param in members)
        row = ExplainedRow(
            group=g,
            indices=tuple(indices),
            names=() if names is None else tuple(names[i] for i in indices),
            backend=backend,
            device=device,
            format=text,
            reason=reason,
            numel=sum(param.numel() for param in members),
            state_nbytes=sum(param.state_nbytes() for param in members),
            step_nbytes=moved,
            seconds=None
            if moved is None or device not in bandwidths
            else moved / bandwidths[device],
        )
        rows.append(row)
    return Explanation(
        type(optimizer).__name__,
        rows,
        dry_run.n_assumed_grads,
        dry_run.n_assumed_states,
        bandwidths,
        n_threads,
    )


@functools.cache
def _bandwidth(device: torch.device, n_threads: int) -> float:
    """Bytes per second, measured once: on the CPU in a pass like AdamW's, on others in a copy."""
    kernels = backends.codec()
    seconds = []
    if device.type == "cpu" and kernels is not None:
        streams = [
            torch.zeros(CPU_PROBE_NBYTES // 4, dtype=torch.float32, device="cpu") for _ in range(4)
        ]
        for _ in range(N_PROBES):
            began = time.perf_counter()
            kernels.probe(streams, n_threads)
            seconds.append(time.perf_counter() - began)
        return 7 * CPU_PROBE_NBYTES / _median(seconds)  # the last is only read
    source = torch.zeros(GPU_PROBE_NBYTES, dtype=torch.uint8, device=device)
    target = torch.zeros_like(source)
    with torch.cuda.device(device):
        for _ in range(N_PROBES):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            target.copy_(source)
            end.record()
            end.synchronize()
            seconds.append(begin.elapsed_time(end) / 1e3)
    return 2 * GPU_PROBE_NBYTES / _median(seconds)


def _median(seconds: list[float]) -> float:
    """Without the module statistics: importing the package imports nothing but torch."""
    return sorted(seconds)[len(seconds) // 2]


def _summary(explanation: Explanation) -> str:
    counts = explanation.tensors
    n_stock = counts.get("stock", 0)
    n_kernels = sum(counts.values()) - n_stock
    total = f"of {n_kernels + n_stock:,} tensors"
    stock = f", {n_stock:,} by torch.optim's code" if n_stock else ""
    return f"{explanation.optimizer}: {n_kernels:,} {total} on kernels{stock}"


def _table(rows: list[ExplainedRow]) -> list[str]:
    head = ("group", "by", "tensors", "elements", "states", "moved a step", "time", "stored as")
    cells: list[tuple[str, ...]] = [head]
    for row in rows:
        where = "" if row.device.type == "cpu" else f" {row.device}"
        cells.append(
            (
                str(row.group),
                (row.backend or "-") + where,
                f"{len(row.indices):,}",
                f"{row.numel:,}",
                units.binary(row.state_nbytes),
                "?" if row.step_nbytes is None else units.binary(row.step_nbytes),
                "-" if row.seconds is None else _milliseconds(row.seconds),
                row.format,
            )
        )
    widths = [max(map(len, column)) for column in zip(*cells)]
    lines = []
    for number, line in enumerate(cells):
        padded = [
            cell.ljust(width) if c in (1, 7) else cell.rjust(width)
            for c, (cell, width) in enumerate(zip(line, widths))
        ]
        lines.append("  ".join(padded).rstrip())
        if number > 0 and rows[number - 1].reason is not None:
            lines.append(f"       {rows[number - 1].reason}: {_listed(rows[number - 1])}")
    return lines


def _listed(row: ExplainedRow) -> str:
    shown = [
        f"{index} ({name})" if name else str(index)
        for index, name in zip(row.indices, row.names or [""] * len(row.indices))
    ]
    more = len(shown) - _MAX_LISTED
    rest = f" and {more:,} more" if more > 0 else ""
    return f"param{'s' if len(shown) > 1 else ''} {', '.join(shown[:_MAX_LISTED])}{rest}"


def _notes(explanation: Explanation) -> list[str]:
    lines = [
        f"In all {units.binary(explanation.state_nbytes)} of states and "
        f"{units.binary(explanation.step_nbytes)} moved a step"
        + (", torch.optim's code not counted." if "stock" in explanation.tensors else ".")
    ]
    if explanation.n_assumed_grads:
        lines.append(f"Assumed grads, like their params: {explanation.n_assumed_grads:,}.")
    if explanation.n_assumed_states:
        lines.append(
            f"Params without states, counted as the step will make them: "
            f"{explanation.n_assumed_states:,}."
        )
    for device, rate in explanation.bandwidths.items():
        how = (
            f"a pass over 4 float32 streams of {units.binary(CPU_PROBE_NBYTES)} on "
            f"{explanation.measured_with} threads"
            if device.type == "cpu"
            else f"a copy of {units.binary(GPU_PROBE_NBYTES)}"
        )
        lines.append(f"Measured on {device}: {rate / 1e9:.1f} GB/s, {how}.")
    if explanation.seconds is not None:
        lines.append(
            f"Predicted: {_milliseconds(explanation.seconds)} a step, by its memory traffic alone."
        )
    return lines


def _milliseconds(seconds: float) -> str:
    return f"{seconds * 1e3:.3g} ms"
