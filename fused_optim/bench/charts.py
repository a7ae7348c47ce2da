"""Charts: bars beneath each other, drawn by matplotlib as SVG for pages and as PNG for folders."""

import io
import json
import re
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FormatStrFormatter

from fused_optim import units
from fused_optim.bench import tables
from fused_optim.bench.contestants import COPY, MATCHING, NEVER_ON, OURS, PLAIN, PROBE, STOCK_CALLS
from fused_optim.bench.peers import STOCK_FLAGS
from fused_optim.bench.results import Results, Row
from fused_optim.bench.timing import paired_ratios, quartiles
from fused_optim.bench.words import FASTER, judge, time_of

# In light and in dark: text has a contrast of at least 4.5 on the card, bars of at least 3 (WCAG 2.2 AA).
COLOURS = {
    "card": ("#ffffff", "#1a212b"),
    "text": ("#1b2430", "#e6eaf0"),
    "dim": ("#55606e", "#a3afbd"),
    "ours": ("#0b6e69", "#2cb5a8"),
    "stock": ("#b45309", "#e8903f"),
    "peer": ("#64748b", "#8d9bad"),
}
LIGHT = {name: light for name, (light, _) in COLOURS.items()}
# Points. A picture for a page of a wide screen, one for a phone's.
WIDE, NARROW = 720, 240
LINE, BAR, GAP = 16, 13, 10
LETTER = 7.0  # of one of 10 points
SETTINGS: Any = {
    "font.size": 10,
    "text.color": LIGHT["text"],
    "svg.fonttype": "none",
    "svg.hashsalt": "fused_optim",
    "text.parse_math": False,  # a name with dollars is a name, not mathematics
}


@dataclass(frozen=True)
class Bar:
    """A line of a chart.

    shown: the number beside it.
    kind: "ours", "stock" or "peer".
    spread: quartiles of `value`; empty where there are none.
    target: what was asked for.
    """

    name: str
    shown: str
    value: float
    kind: str
    spread: tuple[float, ...] = ()
    target: float | None = None


@dataclass(frozen=True)
class Chart:
    """Groups of bars, each beneath its title.

    origin: where bars begin; those from 1 are ratios, on a logarithmic scale.
    roofs: lines across all of them.
    """

    title: str
    groups: dict[str, list[Bar]]
    origin: float = 0
    roofs: tuple[float, ...] = ()

    @property
    def told(self) -> str:
        """All of it, for a screen reader."""
        lines = [
            ": ".join(filter(None, (title, bar.name, bar.shown)))
            for title, bars in self.groups.items()
            for bar in bars
        ]
        return f"{self.title}. {'; '.join(lines)}"


def times(rows: Sequence[Row]) -> Chart:
    """All that were timed, with quartiles; the longest of each row is as wide as those of others."""
    groups = {}
    for number, row in enumerate(rows, 1):
        found = {n: row.seconds(n) for n in row.contestants if n in row.samples_s}
        longest = max(max(time.median, time.q3) for time in found.values())
        groups[f"{number}. {row.workload.title}" if len(rows) > 1 else ""] = [
            Bar(name, time_of(row, name), time.median / longest, _kind(name),
                (time.q1 / longest, time.q3 / longest))
            for name, time in found.items()
        ]  # fmt: skip
    return Chart("Time of a step", groups)


def _kind(name: str) -> str:
    if name == OURS:
        return "ours"
    is_stock = name in (*STOCK_FLAGS, PLAIN, MATCHING, NEVER_ON, STOCK_CALLS)
    return "stock" if is_stock else "peer"


def ratios(found: Results) -> Chart:
    """The baseline's time / ours with quartiles and targets; grey where we are not faster."""
    groups = {}
    for (title, *_), row in zip(tables.main(found).rows, found.rows, strict=True):
        if (ratio := row.ratio) is not None:
            kind = "ours" if judge(row) == FASTER else "peer"
            target = row.workload.target.ratio
            shown = f"{ratio.median:.2f}x"
            groups[title] = [Bar("", shown, ratio.median, kind, (ratio.q1, ratio.q3), target)]
    return Chart("The baseline's time divided by ours", groups, origin=1)


def bandwidths(found: Results, *, all_rows: bool = False) -> Chart:
    """Bytes per second that steps bound by memory reached, with the roofs.

    Args:
        all_rows: of the other steps, too.
    """
    groups = {}
    for (title, *_), row in zip(tables.main(found).rows, found.rows, strict=True):
        if not (row.shows_bandwidth or (all_rows and row.workload.timed == "step")):
            continue
        names = {OURS: OURS}
        # In another format a step of torch.optim has other bytes to move.
        if row.baseline in (*STOCK_FLAGS, PLAIN) and not row.workload.formats:
            names["baseline"] = row.baseline
        groups[title] = [
            Bar(label, f"{row.bandwidth(name) / 1e9:.1f} GB/s", row.bandwidth(name), _kind(name))
            for label, name in names.items()
        ]
    return Chart(
        "Bandwidth that steps reach, and the memory's", groups, roofs=(*found.roofs.values(),)
    )


# The rows of a saved run that are drawn, in this order, if it has them; a GPU's table has names of its own.
SHOWN = {
    "gpt2-rmsprop": "RMSprop, GPT-2 small",
    "small-cold": "AdamW, 2,000 tensors of 256",
    "small": "AdamW, 2,000 tensors of 4,096",
    "gpt2-phase-2t": "Unscale, clip, AdamW, average, zero, GPT-2 small",
    "gpt2-phase": "Unscale, clip, AdamW, average, zero, GPT-2 small",
    "gpt2-adamw": "AdamW, GPT-2 small",
}


def saved(results: Path) -> Chart:
    """Of what `bench --json` has saved: ours, the fastest of torch.optim and the fastest other library.

    Raises:
        ValueError: the file holds no such run, or none of the rows.
        OSError: it cannot be read.
    """
    try:
        found = json.loads(results.read_text(encoding="utf-8"))
        rows = {row["name"]: row for row in found["rows"]}
        groups = {title: best(rows[name]) for name, title in SHOWN.items() if name in rows}
        if not groups:
            raise ValueError(f"has none of the rows {', '.join(SHOWN)}")
        machine, torch_version = found["machine"], found["versions"]["torch"].partition("+")[0]
        cpu = f"{machine['cpu']}, {units.count(machine['threads'], 'thread')}"
        where = f"{found['device'].get('name') or cpu}, torch {torch_version}, {found['date'][:10]}"
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"--chart {results}: no results of bench --json: {error}") from error
    return Chart(
        f"Time of a step, as a multiple of fused_optim's: shorter is faster\n{where}", groups
    )


def best(row: dict[str, Any]) -> list[Bar]:
    """The fastest of each kind; whoever was dropped after the first round is known roughly."""
    samples, baseline = row["samples_s"], row["baseline"]
    times = {n: quartiles(paired_ratios(samples[n], samples[OURS])).median for n in samples}

    def bar(name: str, contestant: str, kind: str) -> Bar:
        value = times[contestant]
        is_rough = len(samples[contestant]) == 1
        return Bar(name, f"about {value:.0f}x" if is_rough else f"{value:.2f}x", value, kind)

    stock = f"torch.optim, {baseline}" if baseline in STOCK_FLAGS else "torch's fastest calls"
    bars = [Bar(OURS, units.seconds(row["seconds"][OURS]["median"]), 1.0, "ours")]
    bars.append(bar(stock, baseline, "stock"))
    if peers := {*samples} - {OURS, COPY, PROBE, baseline, *STOCK_FLAGS}:
        peer = min(peers, key=lambda name: times[name])
        bars.append(bar(peer, peer, "peer"))
    return bars


def draw(chart: Chart, width: float = WIDE, *, titled: bool = True) -> Figure:
    """A figure as high as it has to be.

    Args:
        width: in points.
        titled: with the chart's own title.
    """
    bars = [bar for group in chart.groups.values() for bar in group]
    is_log = chart.origin == 1
    reached = [
        value for bar in bars for value in (bar.value, *bar.spread, bar.target or chart.origin)
    ]
    reached.append(chart.origin)
    low, high = min(reached), max(*reached, *chart.roofs)
    if is_log:  # room for a bar to the left that anybody could see
        low, high = min(low, 0.9), max(high, 1.25)
    n_letters = int(width / LETTER)
    left = min(max(len(bar.name) for bar in bars) * LETTER + 6, width / 2)
    right = max(len(bar.shown) for bar in bars) * LETTER + 6
    below = (
        right > width / 3
    )  # numbers stand beneath bars where they would leave no room beside them
    texts = textwrap.wrap
    titles = (
        [line for part in chart.title.split("\n") for line in texts(part, n_letters)]
        if titled
        else []
    )
    heads = {title: texts(title, n_letters) for title in chart.groups}
    pitch = BAR + 5 + LINE * below
    height = LINE * (len(titles) + bool(titles)) + sum(
        LINE * len(heads[title]) + pitch * len(group) + GAP for title, group in chart.groups.items()
    )
    with matplotlib.rc_context(SETTINGS):
        figure = Figure((width / 72, height / 72), facecolor=LIGHT["card"])
        span = width - left - (0 if below else right)
        axes = figure.add_axes((left / width, 0, span / width, 1))
        axes.axis("off")
        axes.set(xlim=(low, high), ylim=(height, 0), xscale="log" if is_log else "linear")
        y = 0.0

        def write(lines: Sequence[str], **style: Any) -> None:
            nonlocal y
            for line in lines:
                figure.text(0, 1 - (y + LINE / 2) / height, line, va="center", **style)
                y += LINE

        write(titles[:1], weight="bold")
        write(titles[1:], color=LIGHT["dim"])
        y += LINE * bool(titles)
        top = y
        for title, group in chart.groups.items():
            write(heads[title], weight="bold" if group[0].name else "normal")
            for bar in group:
                middle = y + BAR / 2
                axes.barh(
                    middle, bar.value - chart.origin, BAR, chart.origin, color=LIGHT[bar.kind]
                )
                if bar.spread:
                    axes.plot(bar.spread, [middle] * 2, color=LIGHT["text"], linewidth=1.5)
                if bar.target is not None:
                    axes.plot(
                        [bar.target] * 2, [y - 2, y + BAR + 2], color=LIGHT["text"], linewidth=3
                    )
                if is_log:
                    axes.plot([1, 1], [y - 2, y + BAR + 2], color=LIGHT["dim"], linewidth=1)
                place: Any = {"va": "center", "color": LIGHT["text"]}
                at = 1 - middle / height
                figure.text((left - 6) / width, at, bar.name, ha="right", **place)
                at -= LINE * below / height
                figure.text(1, at, bar.shown, ha="right", **place)
                y += pitch
            y += GAP
        for roof in chart.roofs:
            axes.plot([roof] * 2, [top, y - GAP], color=LIGHT["text"], linewidth=1.5)
        return figure


# For savefig, of a picture that stands alone.
MARGIN: Any = {"pad_inches": 0.2, "bbox_inches": "tight"}


def svg(figure: Figure, **options: Any) -> str:
    """As a picture for light and dark pages, the same whenever it is drawn.

    Args:
        options: of savefig.
    """
    file = io.StringIO()
    with matplotlib.rc_context(SETTINGS):
        figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None}, **options)
    schemes = [";".join(f"--{n}:{pair[dark]}" for n, pair in COLOURS.items()) for dark in (0, 1)]
    style = f":root{{{schemes[0]}}}@media(prefers-color-scheme:dark){{:root{{{schemes[1]}}}}}"
    picture = file.getvalue().replace(
        '<style type="text/css">', f'<style type="text/css">{style}', 1
    )
    for name, colour in LIGHT.items():
        picture = picture.replace(f": {colour}", f": var(--{name})")
    return re.sub(r"[ \t]+$", "", picture, flags=re.MULTILINE)


def save(found: Results, folder: Path) -> list[Path]:
    """Draw what the rows allow as PNG, and return the files written.

    Args:
        folder: exists.
    """
    drawn = {
        "ratios": ratios(found),
        "times": times(found.rows),
        "roofline": bandwidths(found, all_rows=True),
    }
    figures = {name: draw(chart) for name, chart in drawn.items() if chart.groups}
    if tables.linear(found) is not None:
        figures["linear"] = _linear([r for r in found.rows if r.workload.name in tables.LINEAR])
    for name, figure in figures.items():
        figure.savefig(folder / f"{name}.png", dpi=150, **MARGIN)
    return [folder / f"{name}.png" for name in figures]


def _linear(rows: list[Row]) -> Figure:
    """Time per tensor against the number of tensors: linear cost is a level line."""
    figure = Figure((8, 5), layout="constrained")
    axes = figure.subplots()
    for name in dict.fromkeys(name for row in rows for name in row.contestants):
        measured = [row for row in rows if name in row.samples_s]
        n_tensors = np.array([row.workload.n_tensors for row in measured])
        microseconds = np.array([row.seconds(name).median * 1e6 for row in measured])
        axes.loglog(n_tensors, microseconds / n_tensors, "o-", label=name)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(FormatStrFormatter("%g"))
    axes.set(xlabel="tensors of 256 parameters", ylabel="microseconds per tensor in one AdamW step")
    axes.grid(linewidth=0.4)
    axes.legend()
    return figure
