"""`bench --html`: one file with everything in it, that loads nothing and runs no script."""

from pathlib import Path

from fused_optim.cli import charts, method, svg, text
from fused_optim.cli.contestants import OURS
from fused_optim.cli.markup import Markup, join, tag
from fused_optim.cli.results import Results, Row
from fused_optim.cli.style import STYLE
from fused_optim.cli.verdict import FASTER, SLOWER, facts, headline, judge, notices

TITLE = "fused_optim beside torch.optim"
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
    body = tag("body", _header(found), main, _footer(found))
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
    """A table in a region that scrolls by itself, the caption above it; the first cell of a row names it."""
    head = tag("tr", *(tag("th", name, scope="col") for name in columns))
    body = [
        tag("tr", tag("th", row[0], scope="row"), *(_cell(cell) for cell in row[1:]))
        for row in rows
    ]
    table = tag("table", tag("thead", head), tag("tbody", *body), aria_label=caption)
    region = tag("div", table, class_="scroll", role="region", tabindex="0", aria_label=caption)
    return join(tag("p", caption, class_="caption"), region)


def _cell(content: str) -> Markup:
    """Made cells stay; text becomes one."""
    return content if isinstance(content, Markup) else tag("td", content)


def _results(found: Results) -> Markup | None:
    if not found.rows:
        return None
    with_target = any(row.workload.target.is_set for row in found.rows)
    columns = [
        "work",
        "ratio [quartiles]",
        "verdict",
        "fused_optim",
        "baseline",
        "GB/s",
    ]
    columns += ["of the roof"] + ["asked", "reached"] * with_target
    rows = [
        [
            f"{index}. {row.workload.title}",
            text.ratio(row.ratio),
            tag("td", judge(row), class_={FASTER: "good", SLOWER: "bad"}.get(judge(row))),
            text.seconds(row.seconds(OURS).median),
            f"{text.seconds(row.seconds(row.baseline).median)} ({row.baseline})"
            if row.baseline
            else "none",
            f"{row.bandwidth(OURS) / 1e9:.1f}" if row.shows_bandwidth else "",
            _of_the_roof(row),
            *([text.wanted(row.workload.target), _reached(row)] if with_target else []),
        ]
        for index, row in enumerate(found.rows, 1)
    ]
    caption = (
        "Median time of a step. The baseline is the fastest variant of torch.optim, unless it says another "
        "name; ratio = its time / ours, so that above 1 we are faster"
    )
    return tag(
        "section", tag("h2", "Results"), tag("div", _table(caption, columns, rows), class_="card"),
        _ratio_chart(found.rows),
    )  # fmt: skip


def _reached(row: Row) -> Markup:
    verdict = text.verdict(row)
    return tag("td", verdict, class_={"yes": "good", "NO": "bad"}.get(verdict))


def _of_the_roof(row: Row) -> str:
    part = row.copy_part or row.probe_part
    return f"{part.median:.0%}" if part else ""


def _ratio_chart(rows: list[Row]) -> Markup:
    items = charts.ratios(rows)
    if len(items) < 2:
        return Markup("")
    chart = svg.ratios("The baseline's time divided by ours", items)
    caption = tag(
        "figcaption",
        "Right of the line we are faster; logarithmic. Thin line: quartiles. Grey: not told apart, slower "
        "or not judged. Mark: what the benchmark asks for.",
    )
    return tag("figure", chart, caption, class_="card")


def _roofline(found: Results) -> Markup | None:
    if not found.rows or not found.roofs:
        return None
    points = charts.points(found)
    if not points:
        return None
    chart = svg.roofline("Bandwidth that steps reach, beneath the memory's", points, found.roofs)
    caption = tag(
        "figcaption",
        tag("span", "fused_optim", class_="key ours"),
        tag("span", "torch.optim, fastest", class_="key stock"),
        ". The numbers are those of the table. Lines: ",
        f"{' and '.join(method.ROOFS[name] for name in found.roofs)}. No optimizer can be faster than its "
        "memory: what is near the line is done. Far below it, calls cost more than bytes; above it, the "
        "tensors fit into a cache.",
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
    rows = []
    for name in row.contestants:
        if name in row.samples_s:
            rows.append([name, *_times(row, name)])
        else:
            reason = f"not measured: {row.not_measured[name]}"
            rows.append([name, tag("td", reason, colspan=5, class_="text")])
    columns = [
        "contestant",
        "median",
        "lower quartile",
        "upper quartile",
        "its time / ours",
        "rounds",
    ]
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
    """Median, quartiles, ratio and rounds; after one round there are no quartiles."""
    time, n_rounds = row.seconds(name), len(row.samples_s[name])
    ratio = "" if name == OURS else text.ratio(row.ratio_to(name))
    if n_rounds == 1:
        return [text.seconds(time.median), "", "", ratio.partition(" ")[0], "1"]
    cells = [text.seconds(value) for value in (time.median, time.q1, time.q3)]
    return [*cells, ratio, str(n_rounds)]


def _calls(row: Row) -> Markup:
    """What a phase's baseline is made of."""
    if not row.stock_calls:
        return Markup("")
    rows = [
        [part, choice.variant, text.seconds(choice.seconds[choice.variant])]
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
        lines.append(text.memory_line(found.memory))
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


def _footer(found: Results) -> Markup:
    return tag(
        "footer",
        tag(
            "p",
            "Times of two machines, or of two runs, do not compare; ratios within a run do. All samples "
            "are saved by --json.",
        ),
    )
