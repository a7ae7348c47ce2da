"""The table of a saved measurement, in Markdown."""

from __future__ import annotations

from typing import Any

from trainings import DEFAULT, FUSED, OURS

from fused_optim import units
from fused_optim.bench.timing import paired_ratios, quartiles, round_times

HEADER = (
    "program",
    "threads",
    "`torch.optim`, s",
    "`step()` in it",
    "ours, s",
    "whole time",
    "CPU time",
    "`step()`",
    "whole time, `fused=True`",
    "`step()`, `fused=True`",
)


def written(found: dict[str, Any]) -> str:
    """Machine, trainings and latency of a step.

    Args:
        found: the content of the saved file.
    """
    lines = ["| " + " | ".join(row) + " |" for row in (HEADER, *map(cells, found["rows"]))]
    lines.insert(1, "|" + "---|" * len(HEADER))
    table = "\n".join(lines)
    return f"{_machine(found)}\n\n{table}\n\n{_latency(found['latency'])}\n"


def _machine(found: dict[str, Any]) -> str:
    machine, versions = found["machine"], found["versions"]
    return (
        f"{machine['cores']} cores of {machine['cpu']} ({versions['isa']}), torch {versions['torch']}, "
        f"Python {versions['python']}, {found['date'][:10]}, {found['settings']['rounds']} rounds:"
    )


def cells(row: dict[str, Any]) -> tuple[str, ...]:
    samples = row["samples"]

    def seconds(contestant: str, kind: str) -> list[float]:
        return [sample[kind] for sample in samples[contestant]]

    def ratio(contestant: str, kind: str) -> str:
        pairs = zip(seconds(contestant, kind), seconds(OURS, kind))
        return str(quartiles([theirs / ours for theirs, ours in pairs]))

    def median(contestant: str) -> str:
        return units.number(quartiles(seconds(contestant, "wall_s")).median)

    parts = [
        step / whole for step, whole in zip(*(seconds(DEFAULT, k) for k in ("step_s", "wall_s")))
    ]
    return (
        row["title"],
        str(row["threads"]),
        median(DEFAULT),
        f"{quartiles(parts).median:.0%}",
        median(OURS),
        ratio(DEFAULT, "wall_s"),
        ratio(DEFAULT, "cpu_s"),
        ratio(DEFAULT, "step_s"),
        ratio(FUSED, "wall_s"),
        ratio(FUSED, "step_s"),
    )


def _latency(found: dict[str, Any]) -> str:
    samples = found["samples_s"]

    def us(contestant: str) -> str:
        return units.number(1e6 * quartiles(round_times(samples[contestant])).median)

    def ratio(contestant: str) -> str:
        return str(quartiles(paired_ratios(samples[contestant], samples[OURS])))

    return (
        f"One step of {found['title']}: {us(OURS)} us; {us(DEFAULT)} us by `torch.optim` "
        f"({ratio(DEFAULT)}), {us(FUSED)} us with `fused=True` ({ratio(FUSED)})."
    )
