"""`bench --html`: one file with everything in it, that loads nothing and runs no script."""

import re
from pathlib import Path

from fused_optim.bench import charts, method, svg, text
from fused_optim.bench.contestants import OURS
from fused_optim.bench.markup import Markup, join, tag
from fused_optim.bench.results import Results, Row
from fused_optim.bench.style import STYLE
from fused_optim.bench.verdict import FASTER, MARKS, SLOWER, facts, headline, judge, marks, notices

TITLE = "fused_optim beside torch.optim"
FOOTER = (
    "Times of two machines, or of two runs, do not compare; ratios within a run do. All samples are saved "
    "by --json."
)
# So many rows, and a reader wants to choose whose details to see.
MOST_OPEN = 6
# Whatever a name in the report might hold, the page fetches and runs nothing.
POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"


def save(found: Results, path: Path) -> None:
    """Write the report."""
    path.write_text(page(found), encoding="utf-8")


def page(found: Results) -> str:
    """The report as HTML."""
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", http_equiv="Content-Security-Policy", content=POLICY),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name="color-scheme", content="light dark"),
        tag("title", f"{TITLE}, {found.about['date'][:10]}"),
        tag("link", rel="icon", href="data:,"),
        tag("style", Markup(STYLE)),
    )
    sections = [_results(found), _roofline(found), _details(found), _unmeasured(found)]
    main = tag("main", *filter(None, sections), _method(found), _machine(found))
    body = tag("body", _header(found), main, tag("footer", tag("p", FOOTER)))
    return f"<!doctype html>\n{tag('html', head, body, lang='en')}\n"


def _header(found: Results) -> Markup:
    machine, device = found.about["machine"], found.about["device"]
    where = device.get("name") or f"{machine['cpu']}, {text.threads(machine['threads'])}"
    return tag(
        "header",
        tag(
            "p", f"Benchmark of {found.about['date'].replace('T', ' ')}, {where}", class_="eyebrow"
        ),
        tag("h1", TITLE),
        tag("p", headline(found.rows), class_="lead"),
        *(tag("p", notice, class_="notice") for notice in notices(found)),
    )


def _table(caption: str, columns: list[str], rows: list[list[str]]) -> Markup:
    """A table; the first cell of a row names it, the second of a short row reaches to the end.

    Text, which is numbers, is broken into lines only before a bracket, Markup anywhere.
    """
    head = tag("tr", *(tag("th", name, scope="col") for name in columns))
    body = []
    for first, *others in rows:
        n_lacking = len(columns) - 1 - len(others)
        cells = [
            # On a phone its column's name stands beside each cell.
            tag("td", cell if isinstance(cell, Markup) else _whole(*re.split(r" (?=[\[(])", cell)),
                data_label=name, colspan=1 + n_lacking if n_lacking else None)
            for name, cell in zip(columns[1:], others, strict=False)
        ]  # fmt: skip
        body.append(tag("tr", tag("th", first, scope="row"), *cells))
    return tag("table", tag("caption", caption), tag("thead", head), tag("tbody", *body))


def _whole(*words: str, kind: str | None = None) -> Markup:
    """Words none of which gets broken into lines."""
    return Markup(" ".join(tag("span", word, class_=kind) for word in words if word))


def _results(found: Results) -> Markup | None:
    if not found.rows:
        return None
    columns = ["work", "ratio [quartiles]", "verdict", "fused_optim", "baseline", "GB/s (of roof)"]
    rows = [
        [
            f"{index}. {row.workload.title}",
            text.ratio(row.ratio),
            _verdict(row),
            text.seconds(row.seconds(OURS).median),
            _baseline(row),
            _bandwidth(row),
        ]
        for index, row in enumerate(found.rows, 1)
    ]
    caption = (
        "Median time of a step. The baseline is the fastest variant of torch.optim, unless it says another "
        "name; ratio = its time / ours, so that above 1 we are faster"
    )
    seen = {mark for row in found.rows for mark in marks(row)}
    legend = [
        tag("p", tag("span", mark, class_="mark"), f" {meaning}", class_="dim")
        for mark, meaning in MARKS.items()
        if mark in seen
    ]
    table = tag("div", _table(caption, columns, rows), *legend, class_="card")
    return tag("section", tag("h2", "Results"), _ratio_chart(found.rows), table)


def _verdict(row: Row) -> Markup:
    """The verdict with its marks; a busy row has a mark that says so."""
    word = judge(row)
    told = _whole(word.removesuffix(" (busy)"), kind={FASTER: "good", SLOWER: "bad"}.get(word))
    asked = {"missed": f"missed {text.wanted(row.workload.target)}"}
    return join(told, " ", _whole(*(asked.get(mark, mark) for mark in marks(row)), kind="mark"))


def _baseline(row: Row) -> str:
    if row.baseline is None:
        return "none"
    return f"{text.seconds(row.seconds(row.baseline).median)} ({row.baseline})"


def _bandwidth(row: Row) -> str:
    if not row.shows_bandwidth:
        return ""
    part = row.copy_part or row.probe_part
    return f"{row.bandwidth(OURS) / 1e9:.1f}" + (f" ({part.median:.0%})" if part else "")


def _ratio_chart(rows: list[Row]) -> Markup:
    items = charts.ratios(rows)
    if len(items) < 2:
        return Markup("")
    chart = svg.ratios("The baseline's time divided by ours", items)
    caption = tag(
        "figcaption",
        "Green: we are faster. Grey: slower, not told apart or not judged. Logarithmic, from 1; thin line: "
        "quartiles"
        + "; thick line: what the benchmark asks for" * any(item.target for item in items)
        + ".",
    )
    return tag("figure", chart, caption, class_="card")


def _roofline(found: Results) -> Markup | None:
    items = [point for point in charts.points(found) if point.is_bound]
    if not items or not found.roofs:
        return None
    chart = svg.bandwidths("Bandwidth that steps reach, and the memory's", items, found.roofs)
    roofs = "; ".join(
        f"{method.ROOFS[name]}, {value / 1e9:.1f} GB/s"
        for name, value in sorted(found.roofs.items(), key=lambda item: item[1])
    )
    caption = tag(
        "figcaption",
        tag("span", "fused_optim", class_="key ours"),
        tag("span", "baseline", class_="key stock"),
        f". Lines, from the left: {roofs}. No optimizer can be faster than its memory: what is near the "
        "last line is done.",
    )
    return tag(
        "section", tag("h2", "How near the memory's limit"),
        tag("figure", chart, caption, class_="card"),
    )  # fmt: skip


def _details(found: Results) -> Markup | None:
    if not found.rows:
        return None
    return tag(
        "section",
        tag("h2", "Every contestant"),
        *(
            _row(index, row, len(found.rows) <= MOST_OPEN)
            for index, row in enumerate(found.rows, 1)
        ),
    )


def _row(index: int, row: Row, is_open: bool) -> Markup:
    title = f"{index}. {row.workload.title}"
    chart = svg.bars(f"Time of a step: {row.workload.title}", charts.bars(row))
    caption = tag("figcaption", "Median of the rounds; thin line: lower to upper quartile.")
    rows = [
        [name, *_times(row, name)]
        if name in row.samples_s
        else [name, join(f"not measured: {row.not_measured[name]}")]
        for name in row.contestants
    ]
    columns = ["contestant", "median [quartiles]", "its time / ours", "rounds"]
    content = join(
        tag("p", facts(row), class_="dim"),
        tag("figure", chart, caption),
        _table(f"All contestants: {row.workload.title}", columns, rows),
        _calls(row),
    )
    if is_open:
        return tag("article", tag("h3", title), content, class_="card")
    return tag("details", tag("summary", title), content, class_="card")


def _times(row: Row, name: str) -> list[str]:
    """Time, ratio and rounds; after one round there are no quartiles."""
    n_rounds = len(row.samples_s[name])
    ratio = "" if name == OURS else text.ratio(row.ratio_to(name))
    if n_rounds == 1:
        ratio = ratio.partition(" ")[0]
    return [text.times(row, name), ratio, str(n_rounds)]


def _calls(row: Row) -> Markup:
    """What a phase's baseline is made of."""
    if not row.stock_calls:
        return Markup("")
    rows = [
        [part, join(choice.variant), text.seconds(choice.seconds[choice.variant])]
        for part, choice in row.stock_calls.items()
    ]
    caption = "Stock calls, each the fastest of its variants, and what it takes by itself"
    return _table(caption, ["part", "call", "median"], rows)


def _unmeasured(found: Results) -> Markup | None:
    lines = [f"{name}: not measured: {reason}" for name, reason in found.skipped.items()]
    lines += [
        f"{name}: not timed: ours and the baseline compute something else: {difference}"
        for name, difference in found.disagreements.items()
    ]
    if found.memory:
        fell_back = "".join(f"; fell back to torch.optim: {why}" for why in found.memory.fallbacks)
        lines.append(text.memory_line(found.memory) + fell_back)
    if found.import_s is not None:
        lines.append(text.import_line(found.import_s))
    if not lines:
        return None
    items = tag("ul", *(tag("li", line) for line in lines))
    return tag("section", tag("h2", "Beside the times"), tag("div", items, class_="card"))


def _method(found: Results) -> Markup:
    told = method.told(found)
    return tag("section", tag("h2", "Method"), tag("ul", *(tag("li", line) for line in told)))


def _machine(found: Results) -> Markup:
    about = found.about
    machine, versions, device = about["machine"], about["versions"], about["device"]
    entries: list[tuple[str, str]] = []
    if device["type"] != "cpu":
        toolkit = f"ROCm {device['hip']}" if device["hip"] else f"CUDA {device['cuda']}"
        gib, l2_mib = device["memory_nbytes"] / 2**30, device["l2_nbytes"] / 2**20
        entries += [
            ("GPU", f"{device['name']}, {gib:.0f} GiB, L2 {l2_mib:.0f} MiB"),
            ("driver", f"{device['driver']}, {toolkit}"),
        ]
    entries += [
        ("CPU", f"{machine['cpu']}, {machine['cores']} cores"),
        ("threads", str(machine["threads"])),
        ("system", machine["os"]),
        ("fused_optim", f"{versions['fused_optim']} ({versions['isa']})"),
        ("torch", versions["torch"]),
        ("Triton", str(versions["triton"])),
        ("Python", versions["python"]),
        ("date", about["date"]),
        *((peer, version) for peer, version in about["peers"].items()),
    ]
    listed = [part for name, value in entries for part in (tag("dt", name), tag("dd", value))]
    command = join(tag("h3", "Command"), tag("pre", tag("code", about["command"])))
    return tag(
        "section",
        tag("h2", "Machine and versions"),
        tag("div", tag("dl", *listed), class_="card"),
        *([tag("div", command, class_="card")] if about["command"] else []),
    )
