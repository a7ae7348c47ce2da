"""The tables of both reports: what is in a column is said here alone."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from fused_optim import units
from fused_optim.bench.contestants import OURS, STOCK_CALLS
from fused_optim.bench.results import Results, Row
from fused_optim.bench.words import FASTER, SLOWER, judge, marks, time_of, wanted
from fused_optim.bench.workloads import LINEAR_N_TENSORS, PARITY


class Verdict(str):
    """In a word, with marks beside it; as text it has both."""

    word: str
    marks: list[str]
    kind: str

    def __new__(cls, row: Row) -> "Verdict":
        word, found = judge(row), marks(row)
        self = super().__new__(cls, ", ".join([word.removesuffix(" (busy)"), *found]))
        self.word, self.marks = word.removesuffix(" (busy)"), found
        self.kind = {FASTER: "good", SLOWER: "bad"}.get(word, "")
        return self


@dataclass(frozen=True)
class Table:
    """Text in rows; the first cell of each names it.

    caption: what the columns mean.
    """

    caption: str
    columns: list[str]
    rows: list[list[str]]


def _table(caption: str, columns: dict[str, Callable[[Row], str]], rows: Sequence[Row]) -> Table:
    """A line for each row; a column in which nothing stands is left out."""
    cells = {title: [cell(row) for row in rows] for title, cell in columns.items()}
    cells = {title: column for title, column in cells.items() if any(column)}
    return Table(caption, list(cells), [list(line) for line in zip(*cells.values(), strict=True)])


def main(found: Results) -> Table:
    """The rows in the order in which they were measured, numbered."""
    caption = (
        "Median time of a step. The baseline is the fastest variant of torch.optim, unless it says another "
        "name; ratio = its time / ours, taken within each round, with quartiles: above 1 we are faster."
    )
    if any(row.workload.target.is_set for row in found.rows):
        caption += (
            f" Targets are the benchmark's own: one of 1.0x asks for a lower quartile of {PARITY}, any other "
            "for the median; a percentage is the part of the roof."
        )
    if found.on_gpu:
        caption += (
            " Times are the GPU's own, without waiting for the host, except in rows of host time: the call "
            "of step() alone, from an empty queue. The roof is a large torch.Tensor.copy_ in the same rounds."
        )
    columns = {
        "work": lambda row: f"{found.rows.index(row) + 1}. {row.workload.title}",
        "ratio [quartiles]": lambda row: str(row.ratio or ""),
        "verdict": Verdict,
        "fused_optim": lambda row: units.seconds(row.seconds(OURS).median),
        "baseline": _baseline,
        "target": lambda row: wanted(row.workload.target),
        "GB/s (of roof)": _bandwidth,
    }
    return _table(caption, columns, found.rows)


def _baseline(row: Row) -> str:
    if row.baseline is None:
        return "none"
    return f"{units.seconds(row.seconds(row.baseline).median)} ({row.baseline})"


def _bandwidth(row: Row) -> str:
    if not row.shows_bandwidth:
        return ""
    part = row.copy_part or row.probe_part
    return f"{row.bandwidth(OURS) / 1e9:.1f}" + (f" ({part.median:.0%})" if part else "")


def linear(found: Results) -> Table | None:
    """What a step takes for each tensor."""
    rows = [row for row in found.rows if row.workload.name in LINEAR]
    columns = {
        "tensors": lambda row: f"{row.workload.n_tensors:,}",
        "fused_optim, each": lambda row: _each(row, OURS),
        "baseline, each": lambda row: _each(row, row.baseline),
        "fused_optim, each parameter": lambda row: (
            f"{row.seconds(OURS).median * 1e9 / row.workload.numel:.2f} ns"
        ),
    }
    return _table("Linear in the tensors", columns, rows) if rows else None


LINEAR = {f"linear-{n}" for n in LINEAR_N_TENSORS}


def _each(row: Row, name: str | None) -> str:
    return units.seconds(row.seconds(name).median / row.workload.n_tensors) if name else "none"


def contestants(row: Row) -> Table:
    """Everyone's time, or the reason why there is none."""
    lines = []
    for name in row.contestants:
        if name in row.samples_s:
            n_rounds = len(row.samples_s[name])
            ratio = "" if name == OURS else str(row.ratio_to(name))
            ratio = ratio if n_rounds > 1 else ratio.partition(" ")[0]
            lines.append([name, time_of(row, name), ratio, str(n_rounds)])
        else:
            lines.append([name, f"not measured: {row.not_measured[name]}"])
    columns = ["contestant", "median [quartiles]", "its time / ours", "rounds"]
    return Table(f"All contestants: {row.workload.title}", columns, lines)


def calls(row: Row) -> Table | None:
    """What a phase's baseline is made of."""
    lines = [
        [part, choice.variant, units.seconds(choice.seconds[choice.variant])]
        for part, choice in row.stock_calls.items()
    ]
    caption = (
        f"{STOCK_CALLS.capitalize()}, each the fastest of its variants, and what it takes by itself"
    )
    return Table(caption, ["part", "call", "median"], lines) if lines else None
