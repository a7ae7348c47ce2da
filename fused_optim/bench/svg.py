"""Charts of a page: a line for each item, with its label, its number and an SVG of its bar.

Labels are the page's own text, so that a long one is broken into lines instead of cut off. Widths are
percentages: on a phone a bar gets narrower, and letters stay as large as they are. Colours are the style
sheet's.
"""

import math
from collections.abc import Sequence

from fused_optim.bench.charts import Bar, Point, Ratio
from fused_optim.bench.markup import Markup, tag

# Of a bar, in pixels: marks stick out by what the whole is higher.
HEIGHT, TOP, BAR_HEIGHT = 20, 3, 14


def _chart(title: str, items: Sequence[tuple[str, str, list[Markup]]]) -> Markup:
    """An image that a screen reader can tell.

    Args:
        items: label, number and what is drawn of each.
    """
    track = _rect("0", "100%", "track")
    lines = [
        tag(
            "div", tag("span", label), tag("svg", track, *parts, width="100%", height=HEIGHT),
            tag("span", shown, class_="value"),
        )
        for label, shown, parts in items
    ]  # fmt: skip
    description = "; ".join(f"{label}: {shown}" for label, shown, _ in items)
    return tag("div", *lines, role="img", aria_label=f"{title}. {description}", class_="chart")


def _rect(x: str, width: str, kind: str, top: float = 0, height: float = BAR_HEIGHT) -> Markup:
    return tag("rect", x=x, y=TOP + top, width=width, height=height, class_=kind)


def _line(x: str, kind: str) -> Markup:
    """Across the bar."""
    return tag("line", x1=x, x2=x, y1=0, y2=HEIGHT, class_=kind)


def _spread(low: str, high: str) -> Markup:
    return tag("line", x1=low, x2=high, y1=HEIGHT / 2, y2=HEIGHT / 2, class_="spread")


def bars(title: str, items: Sequence[Bar]) -> Markup:
    """Bars from 0; a thin line is the spread.

    Args:
        items: at least one.
    """
    longest = max(max(item.value, item.high) for item in items)

    def x(value: float) -> str:
        return f"{100 * value / longest:.2f}%"

    return _chart(
        title,
        [
            (
                item.label,
                item.shown,
                [_rect("0", x(item.value), item.kind), _spread(x(item.low), x(item.high))],
            )
            for item in items
        ],
    )


def ratios(title: str, items: Sequence[Ratio]) -> Markup:
    """Bars from 1 to both sides, on a logarithmic scale.

    Args:
        items: at least one.
    """
    reach = max(
        max(abs(math.log(value)) for value in (item.low, item.high, item.target or 1.0))
        for item in items
    )
    reach = max(reach, math.log(1.25))
    slowest = min(0.0, *(math.log(min(item.low, item.target or 1.0)) for item in items))
    # Room for what is there, and for a bar to the left that anybody could see.
    left = max(-slowest, reach / 8)

    def at(value: float) -> float:
        return 100 * (math.log(value) + left) / (reach + left)

    lines = []
    for item in items:
        begin, end = sorted((at(1.0), at(item.value)))
        parts = [
            _rect(f"{begin:.2f}%", f"{end - begin:.2f}%", item.kind),
            _spread(f"{at(item.low):.2f}%", f"{at(item.high):.2f}%"),
            _line(f"{at(1.0):.2f}%", "axis"),
        ]
        if item.target:
            parts.append(_line(f"{at(item.target):.2f}%", "target"))
        lines.append((item.label, f"{item.value:.2f}x", parts))
    return _chart(title, lines)


def bandwidths(title: str, items: Sequence[Point], roofs: dict[str, float]) -> Markup:
    """Bars from 0 of the bytes per second that steps reached, torch.optim's beneath ours, with the roofs.

    Args:
        items: at least one.
        roofs: what was measured with -> bytes per second.
    """
    # A roof's line is seen whole.
    top = 1.01 * max(*roofs.values(), *(max(item.bandwidths.values()) for item in items))

    def x(value: float) -> str:
        return f"{100 * value / top:.2f}%"

    lines = []
    for item in items:
        height = BAR_HEIGHT / len(item.bandwidths)
        parts = [
            _rect("0", x(value), kind, index * height, height)
            for index, (kind, value) in enumerate(item.bandwidths.items())
        ]
        parts += [_line(x(value), "roof") for value in roofs.values()]
        shown = f"{item.bandwidths['ours'] / 1e9:.1f} GB/s"
        if "stock" in item.bandwidths:
            shown += f" (baseline {item.bandwidths['stock'] / 1e9:.1f})"
        lines.append((f"{item.mark}. {item.label}", shown, parts))
    return _chart(title, lines)
