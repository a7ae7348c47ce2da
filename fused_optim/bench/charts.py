"""What the charts show, taken from the results; svg.py and plot.py draw it."""

from collections.abc import Sequence
from dataclasses import dataclass

from fused_optim.bench import text
from fused_optim.bench.contestants import MATCHING, NEVER_ON, OURS, PLAIN, STOCK_CALLS
from fused_optim.bench.peers import STOCK_FLAGS
from fused_optim.bench.results import Results, Row
from fused_optim.bench.verdict import FASTER, judge


@dataclass(frozen=True)
class Bar:
    """The time of one contestant, with its spread.

    low, high: quartiles of `value`, all in seconds.
    kind: "ours", "stock" or "peer".
    """

    label: str
    shown: str
    value: float
    low: float
    high: float
    kind: str


@dataclass(frozen=True)
class Ratio:
    """One work: how many times as long as ours the baseline takes, and what was asked for.

    kind: "ours" where we are faster, otherwise "peer".
    """

    label: str
    value: float
    low: float
    high: float
    target: float | None
    kind: str


@dataclass(frozen=True)
class Point:
    """One work on the roofline.

    mark: short enough for a dot.
    bandwidths: kind ("ours", and "stock" where there is one) -> bytes per second.
    is_bound: whether the time of a step is that of moving its bytes.
    """

    mark: str
    label: str
    nbytes: float
    bandwidths: dict[str, float]
    is_bound: bool


def bars(row: Row) -> list[Bar]:
    """All that were timed."""
    found = []
    for name in row.contestants:
        if name in row.samples_s:
            time = row.seconds(name)
            shown = text.times(row, name)
            found.append(Bar(name, shown, time.median, time.q1, time.q3, _kind(name)))
    return found


def _kind(name: str) -> str:
    if name == OURS:
        return "ours"
    is_stock = name in (*STOCK_FLAGS, PLAIN, MATCHING, NEVER_ON, STOCK_CALLS)
    return "stock" if is_stock else "peer"


def ratios(rows: Sequence[Row]) -> list[Ratio]:
    """Of all rows that have one, numbered as they are."""
    return [
        Ratio(
            f"{index}. {row.workload.title}", row.ratio.median, row.ratio.q1, row.ratio.q3,
            row.workload.target.ratio, "ours" if judge(row) == FASTER else "peer",
        )
        for index, row in enumerate(rows, 1)
        if row.ratio
    ]  # fmt: skip


def points(found: Results) -> list[Point]:
    """Of all rows whose step was timed until its work was done, numbered as they are."""
    listed = []
    for index, row in enumerate(found.rows, 1):
        if row.workload.timed != "step":
            continue
        bandwidths = {"ours": row.bandwidth(OURS)}
        # In another format a step of torch.optim has other bytes to move.
        if row.baseline in (*STOCK_FLAGS, PLAIN) and not row.workload.formats:
            bandwidths["stock"] = row.bandwidth(row.baseline)
        listed.append(
            Point(str(index), row.workload.title, row.nbytes, bandwidths, row.shows_bandwidth)
        )
    return listed
