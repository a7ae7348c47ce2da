"""The page: every number comes from the run, but for the peers' published ones."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from footprint import SHAPES, Footprint
from replay import EPS, LR, NEAREST, Replay
from training import KINDS, Comparison, Summary, summarize
from variants import FLOAT32, SMALLEST_WITH_MASTER, Format

from fused_optim._C import SMALLEST_INT8

# Most that the NMSE of the update may be after the last step.
TARGETS = {Format(state_dtype=torch.bfloat16): 3e-4, Format(state_dtype="int8"): 2.5e-3}


@dataclass(frozen=True)
class Peer:
    """Published bytes per parameter.

    Args:
        states: of Adam's two states.
        kept: of bfloat16 params, 8 bits more for each of them, and the states.
    """

    name: str
    states: str
    kept: str
    source: str


PEERS = (
    Peer(
        "torchao `AdamW8bit`, blocks of 256",
        "2.03",
        "",
        "[README](https://github.com/pytorch/ao/blob/main/torchao/optim/README.md): 8 bits, one "
        "float32 scale per 256 elements",
    ),
    Peer(
        "bitsandbytes `AdamW8bit`, blocks of 256",
        "2.03",
        "",
        "[release 0.44](https://github.com/bitsandbytes-foundation/bitsandbytes/releases/tag/"
        "0.44.0): 8 bits, one float32 scale per 256 elements",
    ),
    Peer(
        "FlashOptim, groups of 32",
        "2.125",
        "5.125",
        "[source](https://github.com/databricks/flashoptim/blob/main/flashoptim/optimizers.py): "
        "8.5 bits per state, 8 correction bits; "
        "[paper](https://arxiv.org/abs/2602.23349): 5 bytes without grads, 7 with them",
    ),
)

PAGE = """\
# Formats: memory and accuracy

{notice}Written by `make formats`; every number but the peers' comes from that run: {about}.

`state_dtype` and `master` are options of every optimizer of fused_optim; None is exactly `torch.optim`.

- Targets of the error of the update: {missed}.
- Final losses outside of the spread of float32 from seed to seed: {outside}.

## Bytes per parameter

The sum of `nbytes` of params and of all tensors in `optimizer.state` after one step, over the number of
parameters; in parentheses with grads, which have the param's dtype. The model has {n_tensors} tensors of
{numel:,} elements in all, none below {min_numel:,}: smaller ones keep float32 states where `int8` is
asked for. AdamW has two states, SGD with momentum one; [the page of all optimizers](optimizers.md) says
what the others have.

{bytes_table}

Adam and AdamW beside other libraries; their figures are published ones, not measured here:

{peers_table}

## Error of the update

A character-level transformer of {replay_numel:,} parameters is trained for {n_steps} steps on the source
text of Python's standard library, with `torch.optim.AdamW` in float32 (lr {lr:g}, betas 0.9 and 0.999,
weight decay 0; the loss falls from {first_loss:.2f} to {last_loss:.2f}). At every step each format's
AdamW takes the same gradients. {int8_part:.1%} of the parameters are in tensors that `int8` stores in 8
bits; all are counted. The error after step {n_steps} is

    NMSE = sum((update - update_ref)^2) / sum(update_ref^2)

with the update of `torch.optim.AdamW` in float64 as the reference. Params are set to 0 before each step,
on which nothing depends without weight decay, so that the update is read off without a rounding by the
params. Small or large gradients: all are multiplied by 1e-6 or 1e+6, and so is eps ({eps:g}), in the
reference too. The exact update is the same then; what differs is only whether a format reaches that far.

{nmse_table}

*All rounded to nearest* is stock AdamW whose two states are rounded to the nearest bfloat16 after each
step: where the second moment changes by less than half a quantum a step, it stands still.
`state_dtype=torch.bfloat16` rounds it stochastically instead.

![NMSE of the update over the steps](formats/nmse.svg)

### Masters

bfloat16 params take the same gradients, rounded to bfloat16, with float32 states and without being set to
0. The error is that of the whole way from the first weights to those after step {n_steps},

    NMSE = sum((weights - weights_ref)^2) / sum((weights_ref - first_weights)^2)

with float64 params as the reference; the weights of split masters are those of `master_params()`.

{masters_table}

## Training

Two small models, {n_seeds} seeds each; a seed determines the first weights and the order of the batches,
the same ones for every format. The learning rate falls to 0 along a cosine. The models compute in float32
on whatever the params are stored in, so that formats differ in storage alone; bfloat16 params have
bfloat16 grads, and with neither option they are what `torch.optim` makes of them. The difference is that
of the means, ± its standard error from the differences seed by seed. *Within*: it is no larger than that
between the largest and the smallest loss of float32.

{training}
Every run, as params / `state_dtype` / `master`; the bars are means, the band is the range of float32:

![Final losses of all runs](formats/losses.svg)
"""

TRAINING = """\
### {name}, {optimizer}

{numel:,} parameters, {int8_part:.1%} of them in tensors that `int8` stores in 8 bits; {n_steps} steps,
{options}. From the tenth of the run before the last to the last, the training loss of float32 changed by
{last_tenth:+.4f}, in the mean over seeds.

{tables}
"""


def write(
    about: dict[str, Any],
    footprints: dict[Format, dict[str, Footprint]],
    replay: Replay,
    comparisons: list[Comparison],
) -> str:
    machine, versions = about["machine"], about["versions"]
    quick = about["settings"]["quick"]
    return PAGE.format(
        notice="**A quick run: the numbers mean nothing.** " if quick else "",
        missed=", ".join(missed(replay)) or "all met",
        outside=", ".join(outside(comparisons)) or "none",
        about=f"{machine['cpu']}, one thread, {machine['os']}; fused_optim "
        f"{versions['fused_optim']} ({versions['isa']}), torch {versions['torch']}, Python "
        f"{versions['python']}; {about['date']}; {about['minutes']:.1f} minutes",
        n_tensors=len(SHAPES),
        numel=_numel(SHAPES),
        min_numel=SMALLEST_INT8,
        bytes_table=_bytes_table(footprints),
        peers_table=_peers_table(footprints),
        replay_numel=replay.numel,
        int8_part=replay.int8_part,
        n_steps=replay.steps[-1],
        lr=LR,
        eps=EPS,
        first_loss=replay.losses[0],
        last_loss=sum(replay.losses[-20:]) / len(replay.losses[-20:]),
        nmse_table=_nmse_table(replay),
        masters_table=_masters_table(replay),
        n_seeds=len(comparisons[0].runs[FLOAT32]),
        training="\n".join(_training(comparison) for comparison in comparisons),
    )


def missed(replay: Replay) -> list[str]:
    """The targets that are not met."""
    return [
        f"{format.label}, gradients x {scale:g}: {values[-1]:.1e}, target {target:.1e}"
        for scale, found in replay.nmse.items()
        for format, values in found.items()
        if (target := TARGETS.get(format)) is not None and not values[-1] <= target
    ]


def outside(comparisons: list[Comparison]) -> list[str]:
    """The final losses further from float32's mean than its runs are from each other."""
    return [
        f"{format.label} ({comparison.training.task.name}, {kind})"
        for comparison in comparisons
        for format in comparison.runs
        for kind in KINDS
        if not _summary(comparison, format, kind).is_within
    ]


def _numel(shapes: Iterable[Sequence[int]]) -> int:
    total = 0
    for shape in shapes:
        numel = 1
        for size in shape:
            numel *= size
        total += numel
    return total


def _bytes_table(footprints: dict[Format, dict[str, Footprint]]) -> str:
    rows = [
        (*format.cells, *(f"{found.kept:.2f} ({found.total:.2f})" for found in row.values()))
        for format, row in footprints.items()
    ]
    names = next(iter(footprints.values()))
    return _table(("params", "`state_dtype`", "`master`", *names), rows)


def _peers_table(footprints: dict[Format, dict[str, Footprint]]) -> str:
    int8 = footprints[Format(state_dtype="int8")]["AdamW"]
    smallest = footprints[SMALLEST_WITH_MASTER]["AdamW"]
    ours = (
        "fused_optim, `int8`; with `split8`",
        f"{int8.states:.3f}",
        f"{smallest.kept:.3f}",
        "measured above",
    )
    header = ("", "two states", "bfloat16 params + 8 bits + two states", "source")
    return _table(header, [ours, *((p.name, p.states, p.kept, p.source) for p in PEERS)])


def _nmse_table(replay: Replay) -> str:
    scales = list(replay.nmse)
    rows = []
    for kind in replay.nmse[scales[0]]:
        values = [replay.nmse[scale][kind][-1] for scale in scales]
        target = TARGETS.get(kind)
        met = "" if target is None else "yes" if max(values) <= target else "**no**"
        rows.append(
            (
                "bfloat16, all rounded to nearest" if kind == NEAREST else kind.cells[1],
                *(f"{value:.1e}" for value in values),
                "" if target is None else f"{target:.1e}",
                met,
            )
        )
    return _table(
        ("`state_dtype`", *(f"gradients x {scale:g}" for scale in scales), "target", "met"), rows
    )


def _masters_table(replay: Replay) -> str:
    rows = [(format.cells[2], f"{value:.1e}") for format, value in replay.displacement.items()]
    return _table(("`master`", "NMSE of the way"), rows)


def _training(comparison: Comparison) -> str:
    training = comparison.training
    reference = comparison.runs[FLOAT32]
    return TRAINING.format(
        name=training.task.name.capitalize(),
        optimizer=training.optimizer,
        numel=comparison.numel,
        int8_part=comparison.int8_part,
        n_steps=len(training.task.batches),
        options=", ".join(f"{name} {value}" for name, value in training.options.items()),
        last_tenth=sum(run.last_tenth() for run in reference) / len(reference),
        tables="\n\n".join(_losses_table(comparison, kind) for kind in KINDS),
    )


def _losses_table(comparison: Comparison, kind: str) -> str:
    rows = []
    for format in comparison.runs:
        found = _summary(comparison, format, kind)
        rows.append(
            (
                *format.cells,
                f"{found.mean:.4f}",
                f"{found.std:.4f}",
                f"{found.low:.4f}",
                f"{found.high:.4f}",
                f"{found.difference:+.4f} ± {found.standard_error:.4f}",
                "yes" if found.is_within else "**no**",
            )
        )
    spread = _summary(comparison, FLOAT32, kind).spread
    return _table(
        (
            "params",
            "`state_dtype`",
            "`master`",
            f"final {kind} loss, mean",
            "std",
            "min",
            "max",
            "difference",
            f"within {spread:.4f}",
        ),
        rows,
    )


def _summary(comparison: Comparison, format: Format, kind: str) -> Summary:
    return summarize(comparison.final(format, kind), comparison.final(FLOAT32, kind))


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
