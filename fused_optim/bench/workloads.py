"""What the benchmark measures: one row per workload, and each row's target."""

import inspect
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

import torch

from fused_optim import units
from fused_optim.bench.models import (
    FORMATS,
    GPT2_BLOCKS,
    GPT2_BLOCKS_QUICK,
    OWN,
    SMALL_NUMEL,
    Shapes,
    billion,
    gpt2_small,
    resnet50,
)
from fused_optim.optimizers import OPTIMIZERS


@dataclass(frozen=True)
class Target:
    """What a row has to reach; None where nothing is asked.

    ratio: at least this, of baseline time / our time. At 1.0 the lower quartile of the paired
        ratios has to reach PARITY, otherwise their median has to reach `ratio`.
    probe: at least this part of the bandwidth of a plain pass over the same traffic.
    copy: at least this part of the bandwidth of torch.Tensor.copy_ on a large tensor.
    either: whether one of the parts is enough.
    """

    ratio: float | None = None
    probe: float | None = None
    copy: float | None = None
    either: bool = False

    @property
    def is_set(self) -> bool:
        return any(part is not None for part in (self.ratio, self.probe, self.copy))

    def as_dict(self) -> dict[str, Any]:
        """For JSON; what only GPU rows ask for stands there only where it is asked for."""
        asked = {"copy": self.copy, "either": self.either or None}
        return {
            "ratio": self.ratio,
            "probe": self.probe,
            **{name: value for name, value in asked.items() if value is not None},
        }


@dataclass(frozen=True)
class Phase:
    """What a training loop does to the params and grads between backward() and the next forward.

    parts: of PARTS, in their order.
    scaler: "torch.amp" or "fused_optim": whose GradScaler calls our step; torch's then calls stock's.
        None: no GradScaler; ours unscales as its step does when one has set ``grad_scale``.
    """

    parts: tuple[str, ...]
    scaler: str | None = None


PARTS = ("unscale", "clip", "step", "EMA", "zero")

# "No slower": two runs of the very same code differ by about this much on a quiet machine.
PARITY = 0.97


@dataclass(frozen=True)
class Workload:
    """One row of the table.

    layout: strides of the grads, "matching" the params', "transposed" or "channels_last". In the
        last two the baseline is our own time on matching grads, not torch.optim's.
    dtypes: of each tensor, where a model mixes them; empty: `dtype` for all.
    cold: whether caches are flushed, unmeasured, before each step.
    state_dtypes: states kept in another dtype than the optimizer gives them.
    format: a key of FORMATS. What it says of the params' dtype is in `dtype` already.
    timed: "step": until the work is done, on a GPU by the device's own time; "call": by the host's,
        until step() returns, with nothing in the device's queue before.
    phase: what is timed instead of the step alone; stock's calls are then the baseline.
    offload: in how many calls the step of float32 masters is made, from bfloat16 grads and to bfloat16
        outputs; the baseline is torch's calls for that, or, of several calls, one. 0: no such step.
    switched: whether the step is one whose options of one pass were on before and are off again. The
        baseline is then our own optimizer that never had one.
    threads: of the CPU, for this row; None: as many as for all.
    quick: whether a quick run measures it without being asked for it by name.
    """

    name: str
    title: str
    optimizer: str
    shapes: Shapes
    target: Target = Target()
    options: dict[str, Any] = field(default_factory=dict)
    dtype: torch.dtype = torch.float32
    dtypes: tuple[torch.dtype, ...] = ()
    layout: str = "matching"
    cold: bool = False
    state_dtypes: dict[str, torch.dtype] = field(default_factory=dict)
    format: str = OWN
    timed: str = "step"
    phase: Phase | None = None
    offload: int = 0
    switched: bool = False
    threads: int | None = None
    quick: bool = True

    @property
    def against_stock(self) -> bool:
        """Whether torch.optim and peers take part, and not ours alone in two ways."""
        return self.layout == "matching" and not self.switched and self.offload <= 1

    @property
    def formats(self) -> dict[str, Any]:
        """The options of its format."""
        return FORMATS[self.format].options

    @property
    def tensor_dtypes(self) -> tuple[torch.dtype, ...]:
        """Of each tensor."""
        return self.dtypes or (self.dtype,) * self.n_tensors

    @property
    def dtype_names(self) -> list[str]:
        """The params' dtypes, each once."""
        return sorted({str(dtype).removeprefix("torch.") for dtype in self.tensor_dtypes})

    @property
    def n_tensors(self) -> int:
        return len(self.shapes)

    @property
    def numel(self) -> int:
        return sum(torch.Size(shape).numel() for shape in self.shapes)

    @property
    def is_large(self) -> bool:
        """Whether a step is bound by memory: 10 M parameters are 160 MB of AdamW streams."""
        return self.numel >= 10_000_000

    @property
    def is_huge(self) -> bool:
        """Whether one more contestant would cost 8 GB and more."""
        return self.numel >= 500_000_000

    @property
    def nbytes(self) -> int:
        """Bytes of params, grads and two states, all in the widest dtype among them."""
        dtypes = [*self.tensor_dtypes, *self.state_dtypes.values()]
        # Stock's contestants of a smaller format are float32.
        widest = max([4 * bool(self.formats), *(dtype.itemsize for dtype in dtypes)])
        return 4 * self.numel * widest

    def needs_nbytes(self, n_contestants: int) -> int:
        """Memory for so many contestants, and for the temporaries of a stock step."""
        return self.nbytes * n_contestants + self.nbytes // 2


# How many threads the rows of phases take, each in a row of its own.
PHASE_THREADS = (1, 2)
SCALERS = ("torch.amp", "fused_optim")
WHOLE, CLIP = Phase(PARTS), Phase(("clip", "step"))
LINEAR_N_TENSORS = (10, 100, 1_000, 10_000)
# The name of the pseudo row that measures memory instead of time.
MEMORY = "memory"
MOMENTUM = {"momentum": 0.9}


def without_fused() -> list[str]:
    """The optimizers for which torch.optim has no fused code, if it has them."""
    return [
        name
        for name, ours in OPTIMIZERS.items()
        if "fused" not in inspect.signature(ours._stock).parameters
    ]


class _Rows(list[Workload]):
    """What the tables of the CPU and of a GPU share.

    Args:
        quick: take GPT-2 with fewer blocks, and say so in the titles.
        n_small: elements of each of 2,000 small tensors.
    """

    def __init__(self, quick: bool, n_small: int) -> None:
        super().__init__()
        n_blocks = GPT2_BLOCKS_QUICK if quick else GPT2_BLOCKS
        gpt2_title = f"GPT-2 ({n_blocks}/{GPT2_BLOCKS} blocks)" if quick else "GPT-2 small"
        n_large = 1 if quick else 4
        self._models: dict[str, tuple[str, Shapes]] = {
            "gpt2": (f", {gpt2_title}", gpt2_small(n_blocks)),
            "resnet50": (", ResNet-50", resnet50()),
            "small": (f", 2,000 x {n_small:,}", [(n_small,)] * 2_000),
            "tiny": (", 10 x 10", [(10,)] * 10),
            "formats": (f", {16 * n_large} M params", [(4096, 4096)] * n_large),
            "64m": (", 64 M params", [(4096, 4096)] * 4),
        }

    def add(
        self, name: str, what: str, target: Target = Target(), *, optimizer: str = "AdamW",
        model: str = "", after: str = "", **kwargs: Any,
    ) -> None:  # fmt: skip
        """A row.

        Args:
            what: is done.
            model: a key of _models; default: what its name begins with.
            after: stands behind the model in the title.
        """
        title, shapes = self._models[model or name.partition("-")[0]]
        self.append(Workload(name, what + title + after, optimizer, shapes, target, **kwargs))

    def add_phases(self, targets: dict[Phase, float], threads: Sequence[int | None]) -> None:
        """AdamW's phases on each model: the whole one, clip and step, and the whole one by GradScaler.

        Args:
            threads: a row for each; None: one that does not say how many.
        """
        kinds = {WHOLE: ("phase", "whole phase"), CLIP: ("clip", "clip and step")}
        for phase, model, n in itertools.product(kinds, ("gpt2", "resnet50"), threads):
            name, title = kinds[phase]
            self.add(
                f"{model}-{name}" + (f"-{n}t" if n else ""), f"{title}, AdamW",
                Target(targets[phase]), phase=phase, threads=n,
                after=f", {units.count(n, 'thread')}" if n else "",
                quick=phase is WHOLE and model == "gpt2" and n == threads[0],
            )  # fmt: skip
        for scaler in SCALERS:
            what = f"whole phase by {scaler}.GradScaler, AdamW"
            self.add(f"gpt2-{scaler}-scaler", what, phase=Phase(PARTS, scaler), quick=False)

    def add_formats(self, targets: dict[str, Target]) -> None:
        """AdamW with smaller states, and bfloat16 params with what they lack beside them."""
        for name, target in targets.items():
            self.add(
                f"formats-{name.removesuffix('-states')}", f"AdamW, {FORMATS[name].title}", target,
                dtype=FORMATS[name].dtype or torch.float32, format=name, quick=name == "int8",
            )  # fmt: skip


def table(quick: bool, threads: int | None = None) -> list[Workload]:
    """All rows in the order in which they are measured and printed.

    Args:
        quick: take GPT-2 with fewer blocks, and say so in the titles.
        threads: for all rows; None: rows that choose for themselves are there for each of
            PHASE_THREADS that is no more than torch's own choice.
    """
    rows = _Rows(quick, SMALL_NUMEL)
    add = rows.add
    bus_bound = Target(ratio=1.0, probe=0.95)
    no_fused, misfit = Target(ratio=3.0), Target(ratio=1 / 1.5)
    add("gpt2-adamw", "AdamW", bus_bound)
    add("resnet50-adamw", "AdamW", Target(1.1))
    add("gpt2-sgd", "SGD momentum", bus_bound, optimizer="SGD", options=MOMENTUM)
    add("gpt2-adagrad", "Adagrad", bus_bound, optimizer="Adagrad")
    for kind, options in {"momentum": MOMENTUM, "centered": {"centered": True}}.items():
        what = f"RMSprop {kind}"
        add(f"gpt2-rmsprop-{kind}", what, no_fused, optimizer="RMSprop", options=options)
    add("small-cold", "AdamW", Target(8.0), after=", cold", cold=True)
    add("small-warm", "AdamW", Target(5.0), after=", warm")
    add("tiny", "AdamW", Target(4.0))
    add("gpt2-bf16", "AdamW bf16", Target(1.0), dtype=torch.bfloat16)
    add("gpt2-fp16", "AdamW fp16", Target(1.2), dtype=torch.float16)
    add("gpt2-transposed", "AdamW, transposed grads", misfit, layout="transposed")
    add("resnet50-channels-last", "AdamW, channels_last grads", misfit, layout="channels_last")
    for name in without_fused():
        for model, target in {
            "gpt2": Target(3.0, probe=0.95), "resnet50": no_fused, "small": Target(8.0), "tiny": Target(8.0),
        }.items():  # fmt: skip
            add(f"{model}-{name.lower()}", name, target, optimizer=name, quick=model == "gpt2")
    ratios = {"int8": 1.3, "bf16-states": 1.3, "split16": 1.5, "split8": 1.0}
    rows.add_formats({name: Target(ratio) for name, ratio in ratios.items()})
    most = torch.get_num_threads()
    phase_threads = [n for n in PHASE_THREADS if n <= most] if threads is None else [threads]
    rows.add_phases({WHOLE: 1.8, CLIP: 1.4}, phase_threads)
    title, whole = "AdamW, float32 masters, bf16 grads and outputs", Target(ratio=2.0, probe=0.95)
    add("offload-gpt2", title, whole, model="gpt2", offload=1)
    add("offload-64m", title, whole, model="64m", offload=1, quick=False)
    in_pieces = f"{title}, 8 pieces from a thread"
    add("offload-pieces", in_pieces, Target(0.97), model="gpt2", offload=8, quick=False)
    switched = ", options on and off again"
    add("small-switched", "AdamW", Target(1.0), after=switched, switched=True)
    for n in LINEAR_N_TENSORS:
        title, shapes = f"AdamW, {n:,} x {SMALL_NUMEL}", [(SMALL_NUMEL,)] * n
        rows.append(Workload(f"linear-{n}", title, "AdamW", shapes))
    add(MEMORY, "AdamW", model="gpt2", after=", memory")
    return rows


def gpu_table(quick: bool) -> list[Workload]:
    """All rows on a GPU; those last for which a peer has to compile itself.

    Args:
        quick: as for table().
    """
    rows = _Rows(quick, 4096)
    add = rows.add
    fast, host = Target(ratio=1.1, copy=0.92, either=True), Target(ratio=5.0)
    bf16, host_time = torch.bfloat16, "host time of step(), AdamW"
    title = "AdamW, 1 B in 300 tensors"
    rows.append(Workload("billion", title, "AdamW", billion(), Target(1.0, copy=0.92)))
    add("small", "AdamW", Target(1.5))
    add("gpt2-host", host_time, host, timed="call")
    add("small-host", host_time, host, timed="call")
    # exp_avg_sq alone is float32: exp_avg is moved towards the grad by lerp, which takes only
    # tensors of one dtype, in torch.optim as here, so beside bfloat16 grads it has to be bfloat16.
    what, wide = "AdamW bf16, exp_avg_sq float32", {"exp_avg_sq": torch.float32}
    add("gpt2-bf16", what, Target(copy=0.90), dtype=bf16, state_dtypes=wide)
    add("gpt2-all-bf16", "AdamW bf16", dtype=bf16)
    rows.add_phases({WHOLE: 1.5, CLIP: 1.25}, [None])
    others = dict.fromkeys(("bf16-states", "split16", "split8"), Target(copy=0.8))
    rows.add_formats({"int8": Target(1.4, copy=0.8), **others})
    switched = ", options on and off again"
    add("small-switched", host_time, Target(1.0), after=switched, timed="call", switched=True)
    add("gpt2-adamw", "AdamW", fast)
    for name in without_fused():
        add(f"gpt2-{name.lower()}", name, Target(3.0), optimizer=name)
    add("gpt2-sgd", "SGD momentum", fast, optimizer="SGD", options=MOMENTUM)
    add("gpt2-adagrad", "Adagrad", fast, optimizer="Adagrad")
    return rows


def select(
    patterns: Sequence[str] | None,
    *,
    quick: bool,
    device_type: str = "cpu",
    threads: int | None = None,
) -> list[Workload]:
    """The rows whose name matches one of the shell patterns.

    Without patterns all rows, or those of a quick run.

    Raises:
        ValueError: a pattern matches no row.
    """
    rows = table(quick, threads) if device_type == "cpu" else gpu_table(quick)
    if patterns is None:
        return [row for row in rows if row.quick or not quick]
    for pattern in patterns:
        if not any(fnmatchcase(row.name, pattern) for row in rows):
            names = ", ".join(row.name for row in rows)
            raise ValueError(f"--only {pattern!r} matches no row; there are: {names}")
    return [row for row in rows if any(fnmatchcase(row.name, pattern) for pattern in patterns)]
