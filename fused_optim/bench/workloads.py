"""What the benchmark measures: one row per workload, and each row's target."""

import inspect
from collections.abc import Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

import torch

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


def _phase_rows(
    models: dict[str, tuple[str, Shapes]],
    targets: dict[Phase, float],
    threads: Sequence[int | None],
) -> list[Workload]:
    """AdamW's phases on each model: the whole one, clip and step, and the whole one by GradScaler.

    Args:
        models: name -> title and shapes; GradScaler's rows are those of the first model alone.
        threads: a row for each; None: one that does not say how many.
    """
    kinds = {WHOLE: ("phase", "whole phase"), CLIP: ("clip", "clip and step")}
    rows = []
    for phase, (name, title) in kinds.items():
        for model, (model_title, shapes) in models.items():
            for n in threads:
                rows.append(
                    Workload(
                        f"{model}-{name}" + (f"-{n}t" if n else ""),
                        f"{title}, AdamW, {model_title}"
                        + (f", {n} thread{'s' * (n > 1)}" if n else ""),
                        "AdamW", shapes, Target(targets[phase]), phase=phase, threads=n,
                        quick=phase is WHOLE and not rows,
                    )
                )  # fmt: skip
    model, (model_title, shapes) = next(iter(models.items()))
    rows += [
        Workload(
            f"{model}-{scaler}-scaler",
            f"whole phase by {scaler}.GradScaler, AdamW, {model_title}",
            "AdamW", shapes, phase=Phase(PARTS, scaler), quick=False,
        )
        for scaler in SCALERS
    ]  # fmt: skip
    return rows


def _format_rows(quick: bool, targets: dict[str, Target]) -> list[Workload]:
    """AdamW with smaller states, and bfloat16 params with what they lack beside them.

    Args:
        targets: format -> what its row has to reach.
    """
    shapes: Shapes = [(4096, 4096)] * (1 if quick else 4)
    size = "16 M" if quick else "64 M"
    return [
        Workload(
            f"formats-{name.removesuffix('-states')}",
            f"AdamW, {FORMATS[name].title}, {size} params", "AdamW", shapes, target,
            dtype=FORMATS[name].dtype or torch.float32, format=name, quick=name == "int8",
        )
        for name, target in targets.items()
    ]  # fmt: skip


def _offload_rows(gpt2_title: str, gpt2: Shapes) -> list[Workload]:
    """The host's half of offloaded training."""
    title, whole = "AdamW, float32 masters, bf16 grads and outputs", Target(ratio=2.0, probe=0.95)
    large: Shapes = [(4096, 4096)] * 4
    in_pieces = f"{title}, 8 pieces from a thread, {gpt2_title}"
    return [
        Workload("offload-gpt2", f"{title}, {gpt2_title}", "AdamW", gpt2, whole, offload=1),
        Workload(
            "offload-64m", f"{title}, 64 M params", "AdamW", large, whole, offload=1, quick=False
        ),
        Workload("offload-pieces", in_pieces, "AdamW", gpt2, Target(0.97), offload=8, quick=False),
    ]


LINEAR_N_TENSORS = (10, 100, 1_000, 10_000)
# The name of the pseudo row that measures memory instead of time.
MEMORY = "memory"


def without_fused() -> list[str]:
    """The optimizers for which torch.optim has no fused code, if it has them."""
    return [
        name
        for name, ours in OPTIMIZERS.items()
        if "fused" not in inspect.signature(ours._stock).parameters
    ]


def table(quick: bool, threads: int | None = None) -> list[Workload]:
    """All rows in the order in which they are measured and printed.

    Args:
        quick: take GPT-2 with fewer blocks, and say so in the titles.
        threads: for all rows; None: rows that choose for themselves are there for each of
            PHASE_THREADS that is no more than torch's own choice.
    """
    n_blocks = GPT2_BLOCKS_QUICK if quick else GPT2_BLOCKS
    gpt2 = gpt2_small(n_blocks)
    gpt2_title = f"GPT-2 ({n_blocks}/{GPT2_BLOCKS} blocks)" if quick else "GPT-2 small"
    small: Shapes = [(SMALL_NUMEL,)] * 2_000
    bus_bound = Target(ratio=1.0, probe=0.95)
    no_fused = Target(ratio=3.0)
    misfit = Target(ratio=1 / 1.5)

    def gpt2_row(name: str, what: str, optimizer: str, target: Target, **kwargs: Any) -> Workload:
        return Workload(f"gpt2-{name}", f"{what}, {gpt2_title}", optimizer, gpt2, target, **kwargs)

    momentum = {"momentum": 0.9}
    rows = [
        gpt2_row("adamw", "AdamW", "AdamW", bus_bound),
        Workload("resnet50-adamw", "AdamW, ResNet-50", "AdamW", resnet50(), Target(1.1)),
        gpt2_row("sgd", "SGD momentum", "SGD", bus_bound, options=momentum),
        gpt2_row("adagrad", "Adagrad", "Adagrad", bus_bound),
        gpt2_row("rmsprop-momentum", "RMSprop momentum", "RMSprop", no_fused, options=momentum),
        gpt2_row(
            "rmsprop-centered", "RMSprop centered", "RMSprop", no_fused, options={"centered": True}
        ),
        Workload(
            "small-cold", "AdamW, 2,000 x 256, cold", "AdamW", small, Target(8.0), cold=True
        ),
        Workload("small-warm", "AdamW, 2,000 x 256, warm", "AdamW", small, Target(5.0)),
        Workload("tiny", "AdamW, 10 x 10", "AdamW", [(10,)] * 10, Target(4.0)),
        gpt2_row("bf16", "AdamW bf16", "AdamW", Target(1.0), dtype=torch.bfloat16),
        gpt2_row("fp16", "AdamW fp16", "AdamW", Target(1.2), dtype=torch.float16),
        gpt2_row("transposed", "AdamW, transposed grads", "AdamW", misfit, layout="transposed"),
        Workload(
            "resnet50-channels-last", "AdamW, channels_last grads, ResNet-50", "AdamW",
            resnet50(), misfit, layout="channels_last",
        ),
    ]  # fmt: skip
    targets = {
        "int8": Target(1.3),
        "bf16-states": Target(1.3),
        "split16": Target(1.5),
        "split8": Target(1.0),
    }
    for name in without_fused():
        row = name.lower()
        rows += [
            gpt2_row(row, name, name, Target(ratio=3.0, probe=0.95)),
            Workload(f"resnet50-{row}", f"{name}, ResNet-50", name, resnet50(), no_fused, quick=False),
            Workload(f"small-{row}", f"{name}, 2,000 x 256", name, small, Target(8.0), quick=False),
            Workload(f"tiny-{row}", f"{name}, 10 x 10", name, [(10,)] * 10, Target(8.0), quick=False),
        ]  # fmt: skip
    rows += _format_rows(quick, targets)
    rows += _phase_rows(
        {"gpt2": (gpt2_title, gpt2), "resnet50": ("ResNet-50", resnet50())},
        {WHOLE: 1.8, CLIP: 1.4},
        [n for n in PHASE_THREADS if n <= torch.get_num_threads()]
        if threads is None
        else [threads],
    )
    rows += _offload_rows(gpt2_title, gpt2)
    rows.append(
        Workload(
            "small-switched", "AdamW, 2,000 x 256, options on and off again", "AdamW", small,
            Target(1.0), switched=True,
        )
    )  # fmt: skip
    rows += [
        Workload(f"linear-{n}", f"AdamW, {n:,} x {SMALL_NUMEL}", "AdamW", [(SMALL_NUMEL,)] * n)
        for n in LINEAR_N_TENSORS
    ]
    rows.append(Workload(MEMORY, f"AdamW, {gpt2_title}, memory", "AdamW", gpt2))
    return rows


def gpu_table(quick: bool) -> list[Workload]:
    """All rows on a GPU; those last for which a peer has to compile itself.

    Args:
        quick: as for table().
    """
    n_blocks = GPT2_BLOCKS_QUICK if quick else GPT2_BLOCKS
    gpt2 = gpt2_small(n_blocks)
    gpt2_title = f"GPT-2 ({n_blocks}/{GPT2_BLOCKS} blocks)" if quick else "GPT-2 small"
    small: Shapes = [(4096,)] * 2_000
    fast = Target(ratio=1.1, copy=0.92, either=True)
    host = Target(ratio=5.0)

    def gpt2_row(name: str, what: str, optimizer: str, target: Target, **kwargs: Any) -> Workload:
        return Workload(f"gpt2-{name}", f"{what}, {gpt2_title}", optimizer, gpt2, target, **kwargs)

    bf16 = torch.bfloat16
    return [
        Workload(
            "billion", "AdamW, 1 B in 300 tensors", "AdamW", billion(), Target(1.0, copy=0.92)
        ),
        Workload("small", "AdamW, 2,000 x 4,096", "AdamW", small, Target(1.5)),
        gpt2_row("host", "host time of step(), AdamW", "AdamW", host, timed="call"),
        Workload(
            "small-host", "host time of step(), AdamW, 2,000 x 4,096", "AdamW", small, host,
            timed="call",
        ),
        # exp_avg_sq alone is float32: exp_avg is moved towards the grad by lerp, which takes only
        # tensors of one dtype, in torch.optim as here, so beside bfloat16 grads it has to be bfloat16.
        gpt2_row(
            "bf16", "AdamW bf16, exp_avg_sq float32", "AdamW", Target(copy=0.90), dtype=bf16,
            state_dtypes={"exp_avg_sq": torch.float32},
        ),
        gpt2_row("all-bf16", "AdamW bf16", "AdamW", Target(), dtype=bf16),
        *_phase_rows(
            {"gpt2": (gpt2_title, gpt2), "resnet50": ("ResNet-50", resnet50())},
            {WHOLE: 1.5, CLIP: 1.25},
            [None],
        ),
        *_format_rows(
            quick,
            {
                "int8": Target(1.4, copy=0.8),
                **dict.fromkeys(("bf16-states", "split16", "split8"), Target(copy=0.8)),
            },
        ),
        Workload(
            "small-switched", "host time of step(), AdamW, 2,000 x 4,096, options on and off again",
            "AdamW", small, Target(1.0), timed="call", switched=True,
        ),
        gpt2_row("adamw", "AdamW", "AdamW", fast),
        *(gpt2_row(name.lower(), name, name, Target(3.0)) for name in without_fused()),
        gpt2_row("sgd", "SGD momentum", "SGD", fast, options={"momentum": 0.9}),
        gpt2_row("adagrad", "Adagrad", "Adagrad", fast),
    ]  # fmt: skip


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
