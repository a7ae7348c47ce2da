"""The page's charts, as SVG."""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # no display needed

import matplotlib.pyplot as plt
from matplotlib.figure import Figure
from replay import NEAREST, Replay
from training import Comparison
from variants import FLOAT32

# Text stays text, and the same numbers give the same file.
plt.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "formats", "font.size": 9})


def draw_nmse(found: Replay, path: Path) -> None:
    """One panel per scale of the gradients."""
    figure, axes = plt.subplots(
        1, len(found.nmse), figsize=(9, 3.4), sharey=True, layout="constrained"
    )
    for panel, (scale, curves) in zip(axes, found.nmse.items()):
        for kind, values in curves.items():
            if kind == NEAREST:
                panel.semilogy(found.steps, values, "--", label="bfloat16, all rounded to nearest")
            elif kind != FLOAT32:
                panel.semilogy(found.steps, values, label=kind.cells[1].strip("`"))
        panel.set_title(f"gradients x {scale:g}")
        panel.set_xlabel("step")
        panel.minorticks_off()
        panel.grid(linewidth=0.4)
    axes[0].set_ylabel("NMSE of the update")
    axes[0].legend()
    _save(figure, path)


def draw_losses(comparisons: list[Comparison], path: Path) -> None:
    """A dot per run, and the range of float32 as a band; one panel per model and kind of loss."""
    kinds = list(comparisons[0].runs[FLOAT32][0].final)
    figure, rows = plt.subplots(
        len(comparisons),
        len(kinds),
        figsize=(9, 2.9 * len(comparisons)),
        sharey=True,
        squeeze=False,
        layout="constrained",
    )
    for row, comparison in zip(rows, comparisons):
        for panel, kind in zip(row, kinds):
            reference = comparison.final(FLOAT32, kind)
            panel.axvspan(min(reference), max(reference), color="tab:blue", alpha=0.12)
            for place, format in enumerate(comparison.runs):
                losses = comparison.final(format, kind)
                panel.plot(losses, [place] * len(losses), "o", markersize=4, color="tab:blue")
                panel.plot(sum(losses) / len(losses), place, "|", markersize=14, color="black")
            panel.set_title(f"{comparison.training.task.name}, {comparison.training.optimizer}")
            panel.set_xlabel(f"final {kind} loss (nats)")
            panel.set_yticks(
                range(len(comparison.runs)), [format.label for format in comparison.runs]
            )
            panel.locator_params(axis="x", nbins=5)
            panel.grid(linewidth=0.4)
    rows[0, 0].invert_yaxis()  # shared: the first format on top everywhere
    _save(figure, path)


def _save(figure: Figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)
