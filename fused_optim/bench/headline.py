"""`bench --chart RESULTS SVG`: a saved run in one picture, for a page that shows it.

Of each row, ours beside the fastest of torch.optim and the fastest other library.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fused_optim.bench import text
from fused_optim.bench.contestants import COPY, OURS, PROBE
from fused_optim.bench.markup import Markup, tag
from fused_optim.bench.peers import STOCK_FLAGS
from fused_optim.bench.timing import paired_ratios, quartiles

# The rows that are drawn, in this order, if the run has them; a GPU's table has names of its own.
ROWS = {
    "gpt2-rmsprop": "RMSprop, GPT-2 small",
    "small-cold": "AdamW, 2,000 tensors of 256",
    "small": "AdamW, 2,000 tensors of 4,096",
    "gpt2-phase-2t": "Unscale, clip, AdamW, average, zero, GPT-2 small",
    "gpt2-phase": "Unscale, clip, AdamW, average, zero, GPT-2 small",
    "gpt2-adamw": "AdamW, GPT-2 small",
}
TITLE = "Time of a step, as a multiple of fused_optim's: shorter is faster"

# Pixels. Names stand left of the bars, numbers right of them.
WIDTH, LEFT, RIGHT, TOP = 760, 200, 120, 62
BAR, PITCH, HEADING, GAP = 15, 20, 24, 16

# One picture for light and dark pages; letters have a contrast of at least 4.5 on its card.
STYLE = """
text { font: 13px system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; fill: #1b2430; }
.card { fill: #ffffff; stroke: #d9dee5; } .title, .work { font-weight: 600; } .title { font-size: 15px; }
.dim { fill: #55606e; } .name, .number { dominant-baseline: central; } .name { text-anchor: end; }
.ours { fill: #0b6e69; } .stock { fill: #b45309; } .peer { fill: #64748b; } text.ours { font-weight: 600; }
@media (prefers-color-scheme: dark) {
  text { fill: #e6eaf0; } .card { fill: #1a212b; stroke: #333e4b; } .dim { fill: #a3afbd; }
  .ours { fill: #2cb5a8; } .stock { fill: #e8903f; } .peer { fill: #8d9bad; }
}
"""


@dataclass(frozen=True)
class Bar:
    """A contestant of one row.

    kind: "ours", "stock" or "peer".
    times: its time / ours, the median.
    shown: the number beside it.
    """

    name: str
    kind: str
    times: float
    shown: str


def save(results: Path, path: Path) -> None:
    """Draw what `bench --json` has saved.

    Raises:
        ValueError: the file holds no such run, or none of the rows.
        OSError: a file cannot be read or written.
    """
    try:
        found = json.loads(results.read_text(encoding="utf-8"))
        rows = {row["name"]: row for row in found["rows"]}
        drawn = {title: bars(rows[name]) for name, title in ROWS.items() if name in rows}
        if not drawn:
            raise ValueError(f"has none of the rows {', '.join(ROWS)}")
        picture = _draw(_source(found), drawn)
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"--chart {results}: no results of bench --json: {error}") from error
    path.write_text(picture + "\n", encoding="utf-8")


def bars(row: dict[str, Any]) -> list[Bar]:
    """Ours, the fastest of torch.optim, and the fastest other library if one was timed."""
    samples = row["samples_s"]
    times = {
        name: quartiles(paired_ratios(samples[name], samples[OURS])).median for name in samples
    }
    drawn = [Bar(OURS, "ours", 1.0, text.seconds(row["seconds"][OURS]["median"]))]
    baseline = row["baseline"]
    name = f"torch.optim, {baseline}" if baseline in STOCK_FLAGS else "torch's fastest calls"
    drawn.append(Bar(name, "stock", times[baseline], _shown(samples, baseline, times)))
    peers = {*samples} - {OURS, COPY, PROBE, baseline, *STOCK_FLAGS}
    if peers:
        peer = min(peers, key=lambda name: times[name])
        drawn.append(Bar(peer, "peer", times[peer], _shown(samples, peer, times)))
    return drawn


def _shown(samples: dict[str, list], name: str, times: dict[str, float]) -> str:
    """Whoever was dropped after the first round is known roughly."""
    return f"{times[name]:.2f}x" if len(samples[name]) > 1 else f"about {times[name]:.0f}x"


def _source(found: dict[str, Any]) -> str:
    machine, versions = found["machine"], found["versions"]
    where = found["device"].get("name") or f"{machine['cpu']}, {text.threads(machine['threads'])}"
    return f"{where}, torch {versions['torch'].partition('+')[0]}, {found['date'][:10]}"


def _draw(source: str, drawn: dict[str, list[Bar]]) -> Markup:
    longest = max(bar.times for row in drawn.values() for bar in row)
    scale = (WIDTH - LEFT - RIGHT) / longest
    parts, top = [], TOP
    for title, row in drawn.items():
        parts.append(tag("text", title, x=16, y=top + 15, class_="work"))
        top += HEADING
        for bar in row:
            middle, width = top + BAR / 2, round(bar.times * scale, 1)
            parts += [
                tag("text", bar.name, x=LEFT - 10, y=middle, class_=f"name {bar.kind}"),
                tag("rect", x=LEFT, y=top, width=width, height=BAR, rx=2, class_=bar.kind),
                tag("text", bar.shown, x=LEFT + width + 8, y=middle, class_="number"),
            ]
            top += PITCH
        top += GAP
    told = "; ".join(
        f"{title}: {', '.join(f'{bar.name} {bar.shown}' for bar in row)}"
        for title, row in drawn.items()
    )
    return tag(
        "svg",
        tag("title", TITLE),
        tag("desc", told),
        tag("style", Markup(STYLE)),
        tag("rect", x=0.5, y=0.5, width=WIDTH - 1, height=top - 1, rx=8, class_="card"),
        tag("text", TITLE, x=16, y=28, class_="title"),
        tag("text", source, x=16, y=48, class_="dim"),
        *parts,
        xmlns="http://www.w3.org/2000/svg", viewBox=f"0 0 {WIDTH} {top}", width=WIDTH, height=top,
        role="img",
    )  # fmt: skip
