"""PNG charts of a benchmark run."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # no display needed

import matplotlib.pyplot as plt
from matplotlib.ticker import FormatStrFormatter, NullFormatter

from fused_optim.cli.contestants import OURS
from fused_optim.cli.results import Results, Row
from fused_optim.cli.workloads import LINEAR_N_TENSORS

MET, MISSED, NO_TARGET = "#2a7f62", "#c8553d", "#7a8793"


def draw(found: Results, folder: Path) -> list[Path]:
    """Draw what the rows allow and return the files written.

    Args:
        folder: exists.
    """
    linear_names = {f"linear-{n}" for n in LINEAR_N_TENSORS}
    rows = [row for row in found.rows if row.ratio and row.workload.name not in linear_names]
    linear_rows = [row for row in found.rows if row.workload.name in linear_names]
    written = []
    if rows:
        written.append(_draw_ratios(rows, _subtitle(found), folder / "ratios.png"))
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
        list(positions), [f"{row.workload.title}  (vs {row.baseline})" for row in rows], fontsize=9
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
