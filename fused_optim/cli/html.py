"""`bench --html`: one file with everything in it, that loads nothing and runs no script."""

from pathlib import Path

from fused_optim.cli import method, svg, text
from fused_optim.cli.contestants import MATCHING, NEVER_ON, OURS, STOCK_CALLS
from fused_optim.cli.markup import Markup, join, tag
from fused_optim.cli.peers import STOCK_FLAGS
from fused_optim.cli.results import MIN_ROUNDS_TO_JUDGE, Results, Row
from fused_optim.cli.style import STYLE

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


def judge(row: Row) -> str:
    """In a word, how our step compares with the baseline."""
    if row.ratio is None:
        return "no baseline"
    if row.was_busy:
        return "not judged, machine busy"
    if row.n_rounds < MIN_ROUNDS_TO_JUDGE:
        return f"not judged, {row.n_rounds} rounds"
    if row.ratio.q1 > 1:
        return "faster"
    return "slower" if row.ratio.q3 < 1 else "no difference"


def headline(rows: list[Row]) -> str:
    """What came out, in a sentence."""
    if not rows:
        return "Nothing was measured."
    if len(rows) > 1:
        words = [judge(row) for row in rows]
        counts = "; ".join(f"{word}: {words.count(word)}" for word in dict.fromkeys(words))
        return (
            f"Steps of {len(rows)} works, each beside the fastest that torch.optim offers. Of "
            f"fused_optim: {counts}."
        )
    [row] = rows
    ours = text.seconds(row.seconds(OURS).median)
    begin = f"{row.workload.title}: a step of fused_optim takes {ours}"
    if row.ratio is None or row.baseline is None:
        return f"{begin}; there is nothing of torch.optim to compare it with."
    theirs = text.seconds(row.seconds(row.baseline).median)
    return (
        f"{begin}, the fastest that torch.optim offers ({row.baseline}) {theirs}. "
        f"Ratio {text.ratio(row.ratio)}: {judge(row)}."
    )


def notices(found: Results) -> list[str]:
    """What a reader has to know before any number."""
    told = []
    if found.interrupted:
        told.append("Interrupted: only the rows finished by then are here.")
    if found.was_busy:
        told.append(
            "The machine was busy: other processes took so much of the CPU time that these are no "
            "numbers to quote. Measure again when nothing else runs."
        )
    if found.about["settings"]["quick"]:
        told.append("A quick run: few rounds. For numbers to quote, omit --quick.")
    missed = [row for row in found.rows if row.met is False]
    if missed:
        names = "; ".join(
            f"{row.workload.title} (asked: {text.wanted(row.workload.target)}, "
            f"found: {text.ratio(row.ratio) or 'no ratio'})"
            for row in missed
        )
        told.append(f"Targets missed: {names}.")
    if found.fallbacks:
        told.append(
            "Some tensors fell back to torch.optim's code, so these rows do not measure fused_optim "
            f"alone: {'; '.join(found.fallbacks)}."
        )
    faster = [f"{name} ({row.workload.title})" for row in found.rows for name in row.faster_peers]
    if faster:
        told.append(f"Faster than fused_optim: {', '.join(faster)}.")
    if found.disagreements:
        told.append(
            "Some rows were not timed, because ours and the baseline computed something else."
        )
    return told


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
        "fused_optim",
        "torch.optim, fastest",
        "ratio [quartiles]",
        "verdict",
        "GB/s",
    ]
    columns += ["of the roof"] + ["asked", "reached"] * with_target
    rows = [
        [
            f"{index}. {row.workload.title}",
            text.seconds(row.seconds(OURS).median),
            f"{text.seconds(row.seconds(row.baseline).median)} ({row.baseline})"
            if row.baseline
            else "none",
            text.ratio(row.ratio),
            tag("td", judge(row), class_={"faster": "good", "slower": "bad"}.get(judge(row))),
            f"{row.bandwidth(OURS) / 1e9:.1f}" if row.shows_bandwidth else "",
            _of_the_roof(row),
            *([text.wanted(row.workload.target), _reached(row)] if with_target else []),
        ]
        for index, row in enumerate(found.rows, 1)
    ]
    caption = "Median time of a step; ratio = torch.optim's fastest / ours, above 1 we are faster"
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
    items = [
        svg.Ratio(
            f"{index}. {row.workload.title}", row.ratio.median, row.ratio.q1, row.ratio.q3,
            row.workload.target.ratio, "ours" if judge(row) == "faster" else "peer",
        )
        for index, row in enumerate(rows, 1)
        if row.ratio
    ]  # fmt: skip
    if len(items) < 2:
        return Markup("")
    chart = svg.ratios("torch.optim's time divided by ours", items)
    caption = tag(
        "figcaption",
        "Right of the line we are faster; logarithmic. Thin line: quartiles. Grey: not told apart, slower "
        "or not judged. Mark: what the benchmark asks for.",
    )
    return tag("figure", chart, caption, class_="card")


def _roofline(found: Results) -> Markup | None:
    if not found.rows or not found.roofs:
        return None
    points = []
    for index, row in enumerate(found.rows, 1):
        if row.workload.timed != "step":
            continue
        bandwidths = {"ours": row.bandwidth(OURS)}
        # In another format a step of torch.optim has other bytes to move.
        if row.baseline in STOCK_FLAGS and not row.workload.formats:
            bandwidths["stock"] = row.bandwidth(row.baseline)
        points.append(svg.Point(str(index), row.workload.title, row.nbytes, bandwidths))
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


def _kind(name: str, row: Row) -> str:
    if name == OURS:
        return "ours"
    is_stock = name in STOCK_FLAGS or name in (row.baseline, MATCHING, NEVER_ON, STOCK_CALLS)
    return "stock" if is_stock else "peer"


def _row(index: int, row: Row, is_open: bool) -> Markup:
    measured = [name for name in row.contestants if name in row.samples_s]
    items = []
    for name in measured:
        time = row.seconds(name)
        shown = f"{text.seconds(time.median)} [{text.seconds(time.q1)}, {text.seconds(time.q3)}]"
        items.append(svg.Bar(name, shown, time.median, time.q1, time.q3, _kind(name, row)))
    title = f"{index}. {row.workload.title}"
    chart = svg.bars(f"Time of a step: {row.workload.title}", items)
    caption = tag("figcaption", "Median of the rounds; thin line: lower to upper quartile.")
    rows = []
    for name in row.contestants:
        if name in row.samples_s:
            time = row.seconds(name)
            cells = [text.seconds(value) for value in (time.median, time.q1, time.q3)]
            rows.append(
                [name, *cells, text.ratio(row.ratio_to(name)) if name != OURS else "",
                 str(len(row.samples_s[name]))]
            )  # fmt: skip
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


def facts(row: Row) -> str:
    """What was stepped, and how."""
    work = row.workload
    told = [
        f"{work.numel:,} parameters in {work.n_tensors:,} tensor{'s' * (work.n_tensors != 1)}, "
        f"{', '.join(work.dtype_names)}",
        f"{text.nbytes(row.nbytes)} to move in a step",
    ]
    if work.options or work.formats:
        options = {**work.options, **work.formats}.items()
        told.append(", ".join(f"{k}={str(v).removeprefix('torch.')}" for k, v in options))
    if work.formats:
        told.append("torch.optim has float32 params and states")
    if work.cold:
        told.append("caches flushed before each step")
    told.append(f"{text.threads(row.threads)}, {row.clock}'s clock")
    if row.cpu_elsewhere is not None:
        told.append(f"other processes took {row.cpu_elsewhere:.0%} of the CPU time")
    stepped = ", ".join(f"{count:,} by {backend}" for backend, count in row.backends.items())
    told.append(f"tensors stepped: {stepped}")
    return "; ".join(told) + "."


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
