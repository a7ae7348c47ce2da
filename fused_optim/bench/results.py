"""What the benchmark found out: the schema of `bench --json`."""

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from fused_optim.bench.contestants import COPY, OURS, PROBE, Choice
from fused_optim.bench.peers import STOCK_FLAGS
from fused_optim.bench.timing import Quartiles, Samples, paired_ratios, quartiles, round_times
from fused_optim.bench.workloads import PARITY, Target, Workload

SCHEMA = 1
# Fewer rounds have no quartiles to speak of: no verdict then.
MIN_ROUNDS_TO_JUDGE = 4
# Of 2 cores, a fifth of one: more than a system idles with, less than any job takes. Beside other
# jobs threads wait for each other at random (a ratio of 12 where it is 1): no verdict either.
BUSY_ELSEWHERE = 0.1
# Part of the bandwidth of torch.Tensor.copy_ that the probe has to reach, to be a roof.
PROBE_TARGET = 0.95
# One byte per hundred parameters of the smaller model measured (54 M). The kernel counts resident
# pages in batches of up to 64 per thread, so that a step that allocates nothing may show 0.5 MiB.
MEMORY_TARGET_NBYTES = 2**19


@dataclass
class Row:
    """One workload, measured.

    baseline: contestant that `ratio` compares with: the fastest of torch.optim's variants, or
        ourselves on grads of matching layout; None if torch.optim takes no such workload.
    samples_s: contestant -> round -> pass -> seconds per step.
    ratio_samples: baseline time / our time, per round.
    nbytes: bytes that a step has to read and write.
    probe_part: our bandwidth / the probe's, None where a step is not bound by memory.
    probe_over_copy: the probe's bandwidth / that of torch.Tensor.copy_.
    not_measured: peer -> why it is not among the samples.
    backends: backend -> tensors stepped by it in our last step.
    fallbacks: why tensors were left to torch.optim; has to be empty.
    cpu_elsewhere: part of the machine's CPU time that other processes took meanwhile, None where
        the system does not tell.
    copy_part: our bandwidth / that of torch.Tensor.copy_ in the device's memory, None on the CPU.
    clock: whose time the samples are, the "host"'s or the "device"'s.
    n_sets: sets of inputs that each contestant took in turn.
    threads: torch's, of the CPU.
    stock_calls: part of a phase -> which of torch's calls do it in the baseline, and their times.
    """

    workload: Workload
    baseline: str | None
    samples_s: Samples
    ratio_samples: list[float]
    nbytes: int
    probe_part: Quartiles | None
    probe_over_copy: Quartiles | None
    not_measured: dict[str, str]
    backends: dict[str, int]
    fallbacks: list[str]
    cpu_elsewhere: float | None = None
    copy_part: Quartiles | None = None
    clock: str = "host"
    n_sets: int = 1
    threads: int | None = None
    stock_calls: dict[str, Choice] = field(default_factory=dict)

    def seconds(self, contestant: str) -> Quartiles:
        return quartiles(round_times(self.samples_s[contestant]))

    def ratio_to(self, contestant: str) -> Quartiles:
        """Its time / ours, paired in the rounds that both have."""
        return quartiles(paired_ratios(self.samples_s[contestant], self.samples_s[OURS]))

    @property
    def contestants(self) -> list[str]:
        """All that were timed or meant to be, ours first; without what shows the bandwidth."""
        names = [OURS, *STOCK_FLAGS, *self.samples_s, *self.not_measured]
        known = {*self.samples_s, *self.not_measured} - {COPY, PROBE}
        return [name for name in dict.fromkeys(names) if name in known]

    def bandwidth(self, contestant: str) -> float:
        """Bytes that a step has to move / the contestant's time, per second.

        A contestant that keeps other states, or makes temporaries, moves other bytes; it is held to these.
        """
        return self.nbytes / self.seconds(contestant).median

    @property
    def roofs(self) -> dict[str, float]:
        """Bytes per second of the probe and of torch.Tensor.copy_, as far as the row has them."""
        roofs = {}
        if self.probe_part:
            roofs[PROBE] = self.bandwidth(PROBE)
        if self.probe_over_copy:
            roofs[COPY] = roofs[PROBE] / self.probe_over_copy.median
        if self.copy_part:
            roofs[COPY] = self.bandwidth(OURS) / self.copy_part.median
        return roofs

    @property
    def ratio(self) -> Quartiles | None:
        return quartiles(self.ratio_samples) if self.ratio_samples else None

    @property
    def n_rounds(self) -> int:
        return len(self.ratio_samples if self.baseline else self.samples_s[OURS])

    @property
    def was_busy(self) -> bool:
        if self.clock == "device" or self.cpu_elsewhere is None:
            return False
        return self.cpu_elsewhere > BUSY_ELSEWHERE

    @property
    def shows_bandwidth(self) -> bool:
        """Whether the time of a step is that of moving its bytes."""
        return self.copy_part is not None or (
            self.workload.is_large and self.workload.timed == "step"
        )

    @property
    def faster_peers(self) -> list[str]:
        """Contestants but torch.optim that were faster than ours."""
        peers = set(self.samples_s) - {OURS, COPY, PROBE, self.baseline, *STOCK_FLAGS}
        return [name for name in sorted(peers) if self.ratio_to(name).median < 1]

    @property
    def met(self) -> bool | None:
        """Whether the target was reached; None without target or without a sound measurement."""
        if self.was_busy or self.n_rounds < MIN_ROUNDS_TO_JUDGE:
            return None
        return is_met(self.workload.target, self.ratio, self.probe_part, self.copy_part)

    def as_dict(self) -> dict[str, Any]:
        work = self.workload
        names = "name title optimizer options format cold n_tensors numel timed phase state_dtypes formats"
        found = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        del found["workload"]
        return {
            **{name: getattr(work, name) for name in names.split()},
            "dtype": ", ".join(work.dtype_names),
            "grad_layout": work.layout,
            "target": work.target.as_dict(),
            "met": self.met,
            "ratio": self.ratio,
            "seconds": {name: self.seconds(name) for name in sorted(self.samples_s)},
            "bytes_per_step": found.pop("nbytes"),
            **found,
            "faster_peers": self.faster_peers,
        }


def is_met(
    target: Target,
    ratio: Quartiles | None,
    probe_part: Quartiles | None,
    copy_part: Quartiles | None = None,
) -> bool | None:
    """Whether a row reaches its target; None if it has none."""
    parts: list[bool] = []
    if target.ratio is not None and ratio is not None:
        parity = target.ratio == 1.0
        parts.append(ratio.q1 >= PARITY if parity else ratio.median >= target.ratio)
    for wanted, found in ((target.probe, probe_part), (target.copy, copy_part)):
        if wanted is not None and found is not None:
            parts.append(found.median >= wanted)
    if not parts:
        return None
    return any(parts) if target.either else all(parts)


@dataclass
class Memory:
    """Peak growth of the process during a step after the first, in bytes, per contestant."""

    title: str
    numel: int
    growth_nbytes: dict[str, int]
    fallbacks: list[str]

    @property
    def met(self) -> bool:
        return self.growth_nbytes[OURS] <= MEMORY_TARGET_NBYTES


@dataclass
class Results:
    """A run of the benchmark.

    about: machine, versions and settings.
    skipped: name of a row that was not measured -> why.
    disagreements: name of a row in which ours and the baseline computed something else -> what.
    interrupted: whether Ctrl-C ended it; rows are those finished by then.
    plain_roofs: as Row.roofs, measured by themselves where no row has any.
    import_s: what `import fused_optim` takes in a fresh interpreter that has imported torch.
    """

    about: dict[str, Any]
    rows: list[Row] = field(default_factory=list)
    memory: Memory | None = None
    skipped: dict[str, str] = field(default_factory=dict)
    disagreements: dict[str, str] = field(default_factory=dict)
    interrupted: bool = False
    plain_roofs: dict[str, float] = field(default_factory=dict)
    import_s: float | None = None

    @property
    def roofs(self) -> dict[str, float]:
        """Bytes per second that memory allows: the median over the rows, by what was measured with."""
        names = dict.fromkeys(name for row in self.rows for name in row.roofs)
        return self.plain_roofs or {
            name: quartiles([row.roofs[name] for row in self.rows if name in row.roofs]).median
            for name in names
        }

    @property
    def on_gpu(self) -> bool:
        return self.about["device"]["type"] != "cpu"

    @property
    def is_quick(self) -> bool:
        return self.about["settings"]["quick"]

    @property
    def was_busy(self) -> bool:
        """Whether other processes disturbed a row so much that it is no number to quote."""
        return any(row.was_busy for row in self.rows)

    @property
    def fallbacks(self) -> list[str]:
        """One line per row in which a tensor fell back to torch.optim."""
        found = [(row.workload.name, row.fallbacks) for row in self.rows]
        if self.memory:
            found.append(("memory", self.memory.fallbacks))
        return [f"{name}: {'; '.join(reasons)}" for name, reasons in found if reasons]

    def save(self, path: Path) -> None:
        """Write everything, the samples too, as JSON."""
        data = {
            "schema": SCHEMA,
            **self.about,
            "interrupted": self.interrupted,
            "rows": [row.as_dict() for row in self.rows],
            "memory": self.memory and {**vars(self.memory), "met": self.memory.met},
            "import_s": self.import_s,
            "skipped": self.skipped,
            "disagreements": self.disagreements,
            "roofs_bytes_per_s": self.roofs,
        }
        path.write_text(json.dumps(data, indent=1, default=_plain) + "\n")


def _plain(value: Any) -> Any:
    """For JSON: a dataclass by its fields, a dtype by its name."""
    is_dtype = isinstance(value, torch.dtype)
    return str(value).removeprefix("torch.") if is_dtype else dataclasses.asdict(value)
