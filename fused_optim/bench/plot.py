"""PNG charts of a benchmark run."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # no display needed

import matplotlib.pyplot as plt
from matplotlib.ticker import FormatStrFormatter, LogLocator, NullFormatter

from fused_optim.bench import charts, text
from fused_optim.bench.contestants import OURS
from fused_optim.bench.results import Results, Row
from fused_optim.bench.workloads import LINEAR_N_TENSORS

MET, MISSED, NO_TARGET = "#2a7f62", "#c8553d", "#7a8793"
LONGEST = 70  # characters of a title, beside which bars still have room
COLOURS = {"ours": "#0b6e69", "stock": "#b45309", "peer": "#64748b"}


def draw(found: Results, folder: Path) -> list[Path]:
    """Draw what the rows allow and return the files written.

    Args:
        folder: exists.
    """
    linear_names = {f"linear-{n}" for n in LINEAR_N_TENSORS}
    rows = [row for row in found.rows if row.ratio and row.workload.name not in linear_names]
    linear_rows = [row for row in found.rows if row.workload.name in linear_names]
    written = []
    # A name with dollars is a name, not mathematics.
    with matplotlib.rc_context({"text.parse_math": False}):
        if rows:
            written.append(_draw_ratios(rows, _subtitle(found), folder / "ratios.png"))
            written.append(_draw_times(rows, _subtitle(found), folder / "times.png"))
        if found.roofs and charts.points(found):
            written.append(_draw_roofline(found, folder / "roofline.png"))
        if linear_rows:
            written.append(_draw_linear(linear_rows, _subtitle(found), folder / "linear.png"))
    return written


def _subtitle(found: Results) -> str:
    machine, versions = found.about["machine"], found.about["versions"]
    where = found.about["device"].get("name") or f"{machine['cpu']}, {machine['threads']} threads"
    quick = ", quick run" if found.about["settings"]["quick"] else ""
    return (
        f"{where}, fused_optim {versions['fused_optim']} "
        f"({versions['isa']}), torch {versions['torch']}{quick}"
    )


def _draw_ratios(rows: list[Row], subtitle: str, path: Path) -> Path:
    """One bar per row: median, quartiles, and the target as a mark.

    Args:
        rows: each has a ratio.
    """
    ratios = [row.ratio for row in rows if row.ratio]
    fig, axes = plt.subplots(figsize=(12, 1.4 + 0.4 * len(rows)), layout="constrained")
    positions = range(len(rows), 0, -1)
    for position, row, ratio in zip(positions, rows, ratios, strict=True):
        colour = {True: MET, False: MISSED, None: NO_TARGET}[row.met]
        axes.barh(position, ratio.median - 1, left=1, height=0.6, color=colour)
        axes.plot([ratio.q1, ratio.q3], [position, position], color="black", linewidth=1.5)
        target = row.workload.target.ratio
        axes.annotate(
            f"{ratio.median:.2f}x" + ("" if target is None else f"  (target {target:.3g}x)"),
            (1, position),
            xycoords=("axes fraction", "data"),
            xytext=(6, 0),
            textcoords="offset points",
            va="center",
            fontsize=9,
        )
        if target is not None:
            axes.plot(
                [target] * 2,
                [position - 0.4, position + 0.4],
                color="black",
                linewidth=2.5,
            )
    axes.set_yticks(
        list(positions),
        [f"{text.shorten(row.workload.title, LONGEST)}  (vs {row.baseline})" for row in rows],
        fontsize=9,
    )
    axes.set_ylim(0.3, len(rows) + 0.7)
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_xscale("log", base=2)
    low = min(min(ratio.q1 for ratio in ratios), 0.6)
    high = max(
        max(ratio.q3, row.workload.target.ratio or 1)
        for row, ratio in zip(rows, ratios, strict=True)
    )
    axes.set_xlim(low * 0.9, high * 1.1)
    axes.xaxis.set_major_formatter(FormatStrFormatter("%gx"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.grid(axis="x", linewidth=0.4)
    axes.set_axisbelow(True)
    axes.set_xlabel(
        "baseline time / ours, right is faster (green: target met; line: quartiles; tick: target)"
    )
    axes.set_title(subtitle, fontsize=9)
    fig.savefig(path, dpi=120)
    plt.close(fig)
    return path


def _draw_times(rows: list[Row], subtitle: str, path: Path) -> Path:
    """One panel per row, one bar per contestant: median and quartiles."""
    panels = [charts.bars(row) for row in rows]
    heights = [len(bars) + 1.5 for bars in panels]
    fig, axes = plt.subplots(
        len(rows), figsize=(10, 0.6 + 0.32 * sum(heights)), layout="constrained", squeeze=False,
        height_ratios=heights,
    )  # fmt: skip
    for panel, row, bars in zip(axes[:, 0], rows, panels, strict=True):
        for position, bar in enumerate(reversed(bars)):
            panel.barh(position, bar.value * 1e3, height=0.6, color=COLOURS[bar.kind])
            quartiles = [bar.low * 1e3, bar.high * 1e3]
            panel.plot(quartiles, [position, position], color="black", linewidth=1.5)
        panel.set_yticks(range(len(bars)), [bar.label for bar in reversed(bars)], fontsize=9)
        panel.set_xlim(left=0)
        panel.grid(axis="x", linewidth=0.4)
        panel.set_axisbelow(True)
        panel.set_title(text.shorten(row.workload.title, LONGEST), fontsize=9, loc="left")
    axes[-1, 0].set_xlabel("ms per step, median and quartiles")
    fig.suptitle(subtitle, fontsize=9)
    fig.savefig(path, dpi=120)
    plt.close(fig)
    return path


def _draw_roofline(found: Results, path: Path) -> Path:
    """Bytes of a step against the bytes per second that it reached, beneath what memory allows."""
    fig, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    points = charts.points(found)
    for kind, label in (("stock", "baseline"), ("ours", "fused_optim")):
        shown = [point for point in points if kind in point.bandwidths]
        bandwidths = [point.bandwidths[kind] / 1e9 for point in shown]
        megabytes = [point.nbytes / 1e6 for point in shown]
        axes.plot(megabytes, bandwidths, "o", color=COLOURS[kind], label=label)
    for point in points:
        place = (point.nbytes / 1e6, point.bandwidths["ours"] / 1e9)
        axes.annotate(point.mark, place, xytext=(6, -3), textcoords="offset points", fontsize=8)
    for style, (name, bandwidth) in zip(("-", "--"), found.roofs.items(), strict=False):
        axes.axhline(bandwidth / 1e9, color="black", linestyle=style, label=name)
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(FormatStrFormatter("%g"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_ylim(bottom=0)
    axes.set_xlabel("MB that a step has to move")
    axes.set_ylabel("GB/s (the numbers are those of the rows)")
    axes.grid(linewidth=0.4)
    axes.legend()
    axes.set_title(_subtitle(found), fontsize=9)
    fig.savefig(path, dpi=120)
    plt.close(fig)
    return path


def _draw_linear(rows: list[Row], subtitle: str, path: Path) -> Path:
    """Time per tensor against the number of tensors: linear cost is a level line."""
    fig, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    for name in sorted({name for row in rows for name in row.samples_s}, key=lambda n: n != OURS):
        measured = [row for row in rows if name in row.samples_s]
        n_tensors = [row.workload.n_tensors for row in measured]
        per_tensor = [row.seconds(name).median * 1e6 / row.workload.n_tensors for row in measured]
        axes.plot(
            n_tensors, per_tensor, marker="o", label=name, linewidth=2.5 if name == OURS else 1.5
        )
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.xaxis.set_major_formatter(FormatStrFormatter("%g"))
    axes.yaxis.set_major_formatter(FormatStrFormatter("%g"))
    axes.yaxis.set_minor_formatter(FormatStrFormatter("%g"))
    axes.set_xlabel("tensors of 256 parameters")
    axes.set_ylabel("microseconds per tensor in one AdamW step")
    axes.grid(linewidth=0.4)
    axes.legend()
    axes.set_title(subtitle, fontsize=9)
    fig.savefig(path, dpi=120)
    plt.close(fig)
    return path
