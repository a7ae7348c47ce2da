"""Charts as SVG elements of a page.

Widths are percentages and heights pixels, without a view box: on a phone a chart gets narrower, and its
letters stay as large as they are. Colours are the style sheet's.
"""

import math
from collections.abc import Sequence

from fused_optim.cli.charts import Bar, Point, Ratio
from fused_optim.cli.markup import Markup, tag

BAR_HEIGHT = 14
ROW_HEIGHT = 46


def _chart(title: str, description: str, height: float, *parts: Markup) -> Markup:
    """An image that a screen reader can tell."""
    return tag(
        "svg", tag("title", title), tag("desc", description), *parts,
        role="img", aria_label=f"{title}. {description}", width="100%", height=height,
    )  # fmt: skip


def _above(top: float, label: str, shown: str, width: str) -> list[Markup]:
    """The line above a bar. A label beyond its width is cut off rather than written over the number."""
    written = tag("text", label, x="0", y=15, class_="label")
    return [
        tag("svg", written, x="0", y=top, width=width, height=20),
        tag("text", shown, x="100%", y=top + 15, class_="value"),
    ]


def bars(title: str, items: Sequence[Bar]) -> Markup:
    """Horizontal bars from 0, the label above each; a thin line is the spread.

    Args:
        items: at least one.
    """
    longest = max(max(item.value, item.high) for item in items)

    def x(value: float) -> str:
        return f"{100 * value / longest:.2f}%"

    parts = []
    for index, item in enumerate(items):
        top = index * ROW_HEIGHT
        y = top + 22
        middle = y + BAR_HEIGHT / 2
        parts += [
            *_above(top, item.label, item.shown, "40%"),
            tag("rect", x="0", y=y, width="100%", height=BAR_HEIGHT, rx=3, class_="track"),
            tag("rect", x="0", y=y, width=x(item.value), height=BAR_HEIGHT, rx=3, class_=item.kind),
            tag("line", x1=x(item.low), x2=x(item.high), y1=middle, y2=middle, class_="spread"),
        ]
    description = "; ".join(f"{item.label}: {item.shown}" for item in items)
    return _chart(title, description, len(items) * ROW_HEIGHT, *parts)


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

    parts, one = [], f"{at(1.0):.2f}%"
    for index, item in enumerate(items):
        top = index * ROW_HEIGHT
        y, middle = top + 22, top + 22 + BAR_HEIGHT / 2
        begin, end = sorted((at(1.0), at(item.value)))
        shown = f"{item.value:.2f}x" + (f" (asked: {item.target:.3g}x)" if item.target else "")
        parts += [
            *_above(top, item.label, shown, "55%"),
            tag("rect", x="0", y=y, width="100%", height=BAR_HEIGHT, rx=3, class_="track"),
            tag(
                "rect", x=f"{begin:.2f}%", y=y, width=f"{end - begin:.2f}%", height=BAR_HEIGHT,
                class_=item.kind,
            ),
            tag(
                "line", x1=f"{at(item.low):.2f}%", x2=f"{at(item.high):.2f}%", y1=middle, y2=middle,
                class_="spread",
            ),
        ]  # fmt: skip
        parts.append(tag("line", x1=one, x2=one, y1=y - 2, y2=y + BAR_HEIGHT + 2, class_="axis"))
        if item.target:
            place = f"{at(item.target):.2f}%"
            parts.append(tag("line", x1=place, x2=place, y1=y - 3, y2=y + 17, class_="target"))
    height = len(items) * ROW_HEIGHT
    description = "; ".join(f"{item.label}: {item.value:.2f}" for item in items)
    return _chart(title, description, height, *parts)


# Of the chart's height, in pixels; of its width, in percent.
PLOT_TOP, PLOT_HEIGHT, PLOT_BOTTOM = 30, 260, 46
PLOT_LEFT, PLOT_WIDTH = 13.0, 83.0


def roofline(title: str, points: Sequence[Point], roofs: dict[str, float]) -> Markup:
    """Bytes of a step (logarithmic) against the bytes per second that it reached, beneath what memory allows.

    Args:
        points: at least one.
        roofs: what was measured with -> bytes per second.
    """
    first = math.floor(math.log10(min(point.nbytes for point in points)))
    last = math.ceil(math.log10(1.01 * max(point.nbytes for point in points)))
    highest = max(*roofs.values(), *(max(point.bandwidths.values()) for point in points))
    step = _round_step(highest / 1e9)
    top_gb = step * math.ceil(1.02 * highest / 1e9 / step)

    def x(nbytes: float) -> str:
        part = (math.log10(nbytes) - first) / (last - first)
        return f"{PLOT_LEFT + PLOT_WIDTH * part:.2f}%"

    def y(bandwidth: float) -> float:
        return round(PLOT_TOP + PLOT_HEIGHT * (1 - bandwidth / 1e9 / top_gb), 1)

    bottom, right = PLOT_TOP + PLOT_HEIGHT, f"{PLOT_LEFT + PLOT_WIDTH:.2f}%"
    parts = []
    for index in range(round(top_gb / step) + 1):
        level = y(index * step * 1e9)
        parts += [
            tag("line", x1=f"{PLOT_LEFT}%", x2=right, y1=level, y2=level, class_="grid"),
            tag("text", f"{index * step:g}", x=f"{PLOT_LEFT - 1.5}%", y=level + 4, class_="value"),
        ]
    every = math.ceil((last - first) / 4)  # labels that a phone has room for
    for power in range(first, last + 1):
        place = x(10.0**power)
        parts.append(tag("line", x1=place, x2=place, y1=PLOT_TOP, y2=bottom, class_="grid"))
        if (power - first) % every == 0:
            parts.append(tag("text", _nbytes(power), x=place, y=bottom + 18, class_="middle"))
    parts += [
        tag("text", "bytes that a step has to move", x=x(10 ** ((first + last) / 2)), y=bottom + 38,
            class_="middle"),
        tag("text", "GB/s", x=f"{PLOT_LEFT - 1.5}%", y=12, class_="value"),
    ]  # fmt: skip
    # Two roofs may be close: the upper one's name is above its line, the other's below.
    for index, (name, bandwidth) in enumerate(sorted(roofs.items(), key=lambda item: -item[1])):
        level = y(bandwidth)
        dash = "6 4" if index else None
        parts += [
            tag("line", x1=f"{PLOT_LEFT}%", x2=right, y1=level, y2=level, class_="roof",
                stroke_dasharray=dash),
            tag("text", f"{name} {bandwidth / 1e9:.1f}", x=f"{PLOT_LEFT + 1}%",
                y=level + 15 if index else level - 6, class_="rooflabel"),
        ]  # fmt: skip
    for point in points:
        place = x(point.nbytes)
        levels = {kind: y(bandwidth) for kind, bandwidth in point.bandwidths.items()}
        low, high = min(levels.values()), max(levels.values())
        parts.append(tag("line", x1=place, x2=place, y1=low, y2=high, class_="pair"))
        for kind in reversed(levels):  # ours above the others
            told = f"{point.label}, {kind}: {point.bandwidths[kind] / 1e9:.1f} GB/s"
            radius = 9 if kind == "ours" else 12  # a ring: seen where both are equal
            dot = tag("circle", tag("title", told), cx=place, cy=levels[kind], r=radius,
                      class_=f"dot {kind}")  # fmt: skip
            parts.append(dot)
        parts.append(tag("text", point.mark, x=place, y=levels["ours"] + 4, class_="mark"))
    description = "; ".join(
        f"{point.label}: "
        + ", ".join(f"{kind} {value / 1e9:.1f} GB/s" for kind, value in point.bandwidths.items())
        for point in points
    )
    told_roofs = ", ".join(f"{name} {value / 1e9:.1f} GB/s" for name, value in roofs.items())
    return _chart(title, f"Roofs: {told_roofs}. {description}", bottom + PLOT_BOTTOM, *parts)


def _round_step(highest: float) -> float:
    """1, 2 or 5 times a power of ten: some five steps to the highest."""
    size = 10.0 ** math.floor(math.log10(highest / 5))
    return next(size * factor for factor in (1, 2, 5, 10) if size * factor >= highest / 5)


def _nbytes(power: int) -> str:
    unit = ("B", "kB", "MB", "GB", "TB")[power // 3]
    return f"{10 ** (power % 3)} {unit}"
