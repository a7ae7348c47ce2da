"""`bench --html`: what the page says, that it holds everything, and how a real browser shows it."""

import base64
import dataclasses
import itertools
import re
from html import unescape
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch

from fused_optim import units
from fused_optim.bench import charts, html, machine, results, words
from fused_optim.bench.contestants import COPY, MATCHING, OURS, PROBE, Choice
from fused_optim.bench.timing import Quartiles
from fused_optim.bench.workloads import WHOLE, Target, Workload
from support import browser
from support.marks import needs_browser, needs_cpu_kernels

pytestmark = needs_cpu_kernels

ROOT = Path(__file__).parents[2]
# Markup to HTML, and to matplotlib.
EVIL = r"""<script>alert("1")</script> & '$\frac{x'"""
WORK = Workload("work", "AdamW, work", "AdamW", [(1000, 1000)], Target(1.1))
STYLE = (ROOT / "fused_optim/bench/report.css").read_text()
VOID = {"meta", "link", "source", "img"}


def pixels_of(path):
    from matplotlib import image  # not everywhere where tests are collected

    return image.imread(path)


def rounds(*seconds):
    return [[value] for value in seconds]


def make_row(
    work=WORK, ours=(0.01, 0.011, 0.012, 0.01), fused=(0.02, 0.021, 0.023, 0.02), **kwargs
):
    samples = {OURS: rounds(*ours), "fused": rounds(*fused)}
    row = results.Row(
        workload=work,
        baseline="fused",
        samples_s=samples,
        ratio_samples=[theirs / own for theirs, own in zip(fused, ours, strict=True)],
        nbytes=28_000_000,
        probe_part=None,
        probe_over_copy=None,
        not_measured={"for-loop": "left out of a quick run", "optimi": "not installed"},
        backends={"cpu": 1},
        fallbacks=[],
        cpu_elsewhere=0.01,
        threads=2,
    )
    return dataclasses.replace(row, **kwargs)


def make_results():
    """One of everything that a report may have to tell."""
    slower = make_row(
        dataclasses.replace(
            WORK,
            title=f"SGD, {EVIL} " + "a_long_name_without_a_space" * 4,
            target=Target(1.1, 0.95),
        ),
        ours=(0.03, 0.03, 0.03, 0.03),
    )
    peer = make_row(
        dataclasses.replace(
            WORK, title="AdamW, beside a peer", shapes=[(4000, 5000)], target=Target()
        )
    )
    peer.samples_s |= {
        "DeepSpeedCPUAdam": rounds(0.005, 0.005, 0.005, 0.005),
        PROBE: rounds(0.01, 0.01, 0.01, 0.01), COPY: rounds(0.004, 0.004, 0.004, 0.004),
    }  # fmt: skip
    peer.probe_part = Quartiles(0.9, 0.95, 1.0)
    peer.probe_over_copy = Quartiles(0.9, 0.95, 1.0)
    busy = make_row(cpu_elsewhere=0.6, fallbacks=["a complex tensor"])
    alone = make_row(dataclasses.replace(WORK, title="Lion, work", target=Target()), baseline=None)
    del alone.samples_s["fused"]
    alone.ratio_samples = []
    alone.not_measured["fused"] = "torch.optim has no Lion"
    phase = make_row(dataclasses.replace(WORK, phase=WHOLE, title="whole phase"))
    phase.stock_calls = {"clip": Choice("clip_grad_norm_(foreach=True)", {
        "clip_grad_norm_(foreach=True)": 0.002, "clip_grad_norm_(foreach=False)": 0.004})}  # fmt: skip
    formats = make_row(dataclasses.replace(WORK, title="int8 states", format="int8", cold=True))
    found = results.Results(
        machine.about(quick=True, command=f"python -m fused_optim bench --from '{EVIL}'"),
        [make_row(), slower, peer, busy, alone, phase, formats],
    )
    found.skipped["large"] = "needs 39 GiB, 3 GiB are free"
    found.disagreements["wrong"] = "param 0 differs by 1"
    found.memory = results.Memory(
        "AdamW, work", 10**6, {OURS: 0, "fused": 2**20}, ["a sparse grad"]
    )
    found.import_s = 0.0123
    return found


@pytest.fixture(scope="module")
def found():
    return make_results()


@pytest.fixture(scope="module")
def page(found):
    return html.page(found)


class Parsed(HTMLParser):
    """Elements in order, each with its attributes; raises where one is not closed."""

    def __init__(self, page):
        super().__init__()
        self.open, self.elements, self.text = [], [], []
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.text.append(data)

    def attributes(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]


@pytest.fixture(scope="module")
def parsed(page):
    return Parsed(page)


def test_names_are_text(page, parsed):
    assert parsed.attributes("script") == []
    assert "alert" in page and EVIL not in page
    assert EVIL in " ".join(parsed.text)


def pictures(parsed):
    """Of each picture its address for phones, and that for screens with what it tells."""
    narrow = [source["srcset"] for source in parsed.attributes("source")]
    return list(zip(narrow, parsed.attributes("img"), strict=True))


def svg_of(address):
    kind, _, data = address.partition(";base64,")
    assert kind == "data:image/svg+xml"
    return base64.b64decode(data).decode()


def test_everything_is_in_the_file(page, parsed):
    for name, attributes in parsed.elements:
        sources = {"src", "srcset", "data", "action", "background", "poster"} & set(attributes)
        assert not sources or name in ("source", "img")
        assert not any(name.startswith("on") for name in attributes) and "style" not in attributes
    for narrow, image in pictures(parsed):
        for drawn in (svg_of(narrow), svg_of(image["src"])):
            outside = re.findall(r'(?:href|src)="(?!#)|url\((?!#)|@import|<script', drawn)
            assert outside == []
    assert [link["href"] for link in parsed.attributes("link")] == ["data:,"]
    assert parsed.attributes("a") == parsed.attributes("iframe") == []
    assert "url(" not in STYLE and "@import" not in STYLE
    [policy] = [m for m in parsed.attributes("meta") if "http-equiv" in m]
    assert policy["content"].startswith("default-src 'none';")


def test_it_can_be_read_by_a_machine_for_people(parsed):
    assert parsed.attributes("html") == [{"lang": "en"}]
    assert len(parsed.attributes("title")) >= 1 and len(parsed.attributes("h1")) == 1
    levels = [int(name[1]) for name, _ in parsed.elements if re.fullmatch("h[1-6]", name)]
    assert all(below <= above + 1 for above, below in itertools.pairwise(levels))
    assert all(th.get("scope") in ("col", "row") for th in parsed.attributes("th"))
    assert len(parsed.attributes("caption")) == len(parsed.attributes("table")) == 1 + 7 + 1
    assert len(pictures(parsed)) == 1 + 1 + 7  # ratios, bandwidths, and each row's bars
    assert all(len(image["alt"]) > 35 for _, image in pictures(parsed))
    ratios = pictures(parsed)[0][1]["alt"]
    assert ratios.startswith("The baseline's time divided by ours. 1. AdamW, work: 1.96x; ")
    for said in ("3. AdamW, beside a peer: fused_optim: 2.7 GB/s", "baseline: 1.4 GB/s"):
        assert said in pictures(parsed)[1][1]["alt"]


def test_every_contestant_has_its_time_or_the_reason(found, parsed):
    said = " ".join(parsed.text)
    for row in found.rows:
        for name in row.contestants:
            if name in row.samples_s:
                assert units.seconds(row.seconds(name).median) in said
            else:
                assert f"not measured: {row.not_measured[name]}" in said
    for part in (
        "needs 39 GiB", "param 0 differs by 1", "memory that one step adds", "already: 12.3 ms",
        "clip_grad_norm_(foreach=True)", "caches flushed", "state_dtype=int8", torch.__version__,
        "target 1.1x: met", "target 1.1x, 95%: missed", "fell back to torch.optim: a complex tensor",
        "memory: a sparse grad",
        found.about["date"],
        found.about["machine"]["cpu"], found.about["versions"]["isa"], "new order each time",
    ):  # fmt: skip
        assert part in said, part


def test_one_round_has_no_quartiles():
    row = make_row()
    row.samples_s["foreach"] = rounds(0.05)
    page = html.page(results.Results(machine.about(quick=False), [row]))
    cells = {"median [quartiles]": "50.0 ms", "its time / ours": "5.00x", "rounds": "1"}
    for name, cell in cells.items():
        assert f'<td data-label="{name}"><span>{cell}</span> </td>' in page
    assert "foreach: 50.0 ms; fused: 20.5 ms [20.0 ms, 21.5 ms]" in page


def test_marks_of_a_row_stand_beside_its_verdict(found, page):
    assert [words.marks(row) for row in found.rows] == [
        [], ["missed"], ["peer faster"], ["busy", "fell back"], [], [], [],
    ]  # fmt: skip
    busy = (
        'not judged</span> <span class="mark">busy</span> <span class="mark">fell back</span></td>'
    )
    missed = '<span class="bad">slower</span> <span class="mark">missed</span></td>'
    assert page.count(busy) == page.count(missed) == 1
    # Explained once, beneath the table, if they occur.
    said = unescape(page)
    for mark, meaning in words.MARKS.items():
        assert said.count(meaning) == 1 and said.index(meaning) > said.index(busy), mark
    unmarked = html.page(results.Results(machine.about(quick=False), [make_row()]))
    assert not any(meaning in unescape(unmarked) for meaning in words.MARKS.values())
    # The chart is what one sees first.
    assert page.index('alt="The baseline') < page.index("<table>")


def test_what_concerns_the_whole_run_is_said_first(found, page):
    told = words.notices(found)
    assert told == [
        "A quick run: few rounds. For numbers to quote, omit --quick.",
        "Some rows were not timed: ours and the baseline computed something else.",
    ]
    assert page.index(told[1]) < page.index("<h2>Results</h2>")
    quiet = results.Results(machine.about(quick=False), [make_row()])
    assert words.notices(quiet) == []
    quiet.interrupted = True
    assert words.notices(quiet) == ["Interrupted: only the rows finished by then are here."]


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({}, "faster"),
        ({"ratio_samples": [0.9, 0.8, 0.7, 0.9]}, "slower"),
        ({"ratio_samples": [0.9, 1.1, 1.2, 0.8]}, "no difference"),
        ({"ratio_samples": [2.0, 2.0, 2.0]}, "not judged (3 rounds)"),
        ({"cpu_elsewhere": 0.5}, "not judged (busy)"),
        ({"baseline": None, "ratio_samples": []}, "no baseline"),
    ],
)
def test_a_verdict_needs_quartiles_on_one_side(change, word):
    assert words.judge(make_row(**change)) == word


def test_the_headline_of_one_row_is_its_answer():
    assert words.headline([make_row()]) == (
        "AdamW, work: a step of fused_optim takes 10.5 ms, the fastest that torch.optim offers (fused) "
        "20.5 ms. Ratio 1.96x [1.91, 2.00]: faster."
    )
    assert words.headline([]) == "Nothing was measured."
    assert words.headline([make_row(), make_row(cpu_elsewhere=0.5)]) == (
        "Steps of 2 works beside the fastest of torch.optim: faster in 1, not judged (busy) in 1."
    )
    own = make_row(baseline=MATCHING)
    own.samples_s[MATCHING] = own.samples_s.pop("fused")
    assert "torch.optim, in some rows our own other step: " in words.headline([own, make_row()])


def test_the_same_is_drawn_as_charts(found, tmp_path, monkeypatch):
    from matplotlib.figure import Figure
    from matplotlib.text import Text

    seen, save = [], Figure.savefig

    def savefig(figure, *args, **kwargs):
        save(figure, *args, **kwargs)
        seen.extend(label.get_text() for label in figure.findobj(Text))

    monkeypatch.setattr(Figure, "savefig", savefig)
    linear = [
        make_row(Workload(f"linear-{n}", "linear", "AdamW", [(256,)] * n)) for n in (10, 100, 1000)
    ]
    written = charts.save(dataclasses.replace(found, rows=found.rows + linear), tmp_path)
    assert [path.name for path in written] == [
        "ratios.png", "times.png", "roofline.png", "linear.png",
    ]  # fmt: skip
    # Mathematics is not parsed, for the sake of names; so there is none, in labels of axes neither.
    assert [label for label in seen if "$" in label and EVIL[-8:] not in label] == []
    for path in written:
        pixels = pixels_of(path)
        assert pixels.shape[0] > 200 and pixels.std() > 0.05


def test_a_run_without_rows_has_a_report_too():
    nothing = results.Results(machine.about(quick=False), skipped={"a": "needs 9 GiB"})
    said = " ".join(Parsed(html.page(nothing)).text)
    assert "Nothing was measured." in said
    assert "needs 9 GiB" in said


def luminance(colour):
    channels = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return sum(weight * c for weight, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def contrast(one, other):
    """As WCAG 2.2 defines it."""
    high, low = sorted((luminance(one), luminance(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("scheme", [0, 1], ids=["light", "dark"])
def test_colours_can_be_told_apart(scheme):
    assert contrast("#ffffff", "#000000") == pytest.approx(21)
    block = STYLE.split(":root {")[1 + scheme].split("}")[0]
    colours = dict(re.findall(r"--([\w-]+): (#\w{6})", block))
    colours |= {name: pair[scheme] for name, pair in charts.COLOURS.items()}
    texts = [("text", "page"), ("text", "card"), ("dim", "page"), ("dim", "card"), ("good", "card"),
             ("bad", "card"), ("text", "warn-page"), ("text", "code")]  # fmt: skip
    for one, other in texts:
        assert contrast(colours[one], colours[other]) >= 4.5, (one, other)
    for kind in ("ours", "stock", "peer"):
        assert contrast(colours[kind], colours["card"]) >= 3, kind


WIDTH = "document.scrollingElement.scrollWidth"
# What is wider than its own box, or sticks out of its card or of the screen: each makes a reader scroll
# sideways, or is cut off.
STICKS_OUT = """
[...document.querySelectorAll('body, body *')].filter(part => part.getClientRects().length).filter(part => {
  const {left, right} = part.getBoundingClientRect();
  const card = part.parentElement.closest('.card') ?? document.documentElement;
  const place = card.getBoundingClientRect(), padding = parseFloat(getComputedStyle(card).paddingLeft);
  // The lines at both ends of a chart have a width.
  return part.scrollWidth > part.clientWidth && part.clientWidth > 0
    || left < place.left + padding - 2 || right > place.right - padding + 2;
}).map(part => `${part.tagName} ${part.textContent}`)
"""
# Where details are closed, as for many rows, what is in them is seen too.
OPEN = "document.querySelectorAll('details').forEach(one => { one.open = true; })"


@pytest.fixture(scope="module")
def tab():
    found = browser.find()
    assert found is not None
    with browser.opened(found) as tab:
        yield tab


@needs_browser
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_a_browser_shows_it(tab, page, tmp_path, dark):
    file = tmp_path / "report.html"
    file.write_text(page)
    tab.requests.clear()
    tab.show(file, width=1280, dark=dark)
    assert {url.partition(":")[0] for url in tab.requests[1:]} <= {"data"}
    assert tab.requests[0] == file.as_uri()
    assert tab.complaints == []
    assert tab.evaluate("[...document.images].filter(one => one.naturalWidth > 200).length") == 9
    tab.screenshot(tmp_path / "report.png")
    pixels = pixels_of(tmp_path / "report.png")[..., :3]
    assert pixels.shape[1] == 1280 and pixels.shape[0] > 2000
    # Its corner is the page's colour, and there is something on it.
    assert bool(pixels[0, 0].mean() < 0.2) is dark
    assert pixels.std() > 0.05


@needs_browser
def test_nothing_is_wider_than_its_place(tab, page, tmp_path):
    file = tmp_path / "report.html"
    file.write_text(page)
    for width in (360, 600, 768, 863, 864, 1024, 1200, 1600):
        tab.show(file, width=width)
        tab.evaluate(OPEN)
        assert tab.evaluate(WIDTH) == width
        assert tab.evaluate(STICKS_OUT) == [], width


@needs_browser
def test_nothing_in_its_pictures_is_cut_off_or_covered(tab, parsed, tmp_path):
    file = tmp_path / "pictures.html"
    for drawn in zip(
        *((svg_of(narrow), svg_of(image["src"])) for narrow, image in pictures(parsed))
    ):
        bodies = ["<svg" + picture.partition("<svg")[2] for picture in drawn]
        file.write_text("<!doctype html><title>t</title>" + "<br>".join(bodies))
        tab.show(file, width=1200)
        assert tab.evaluate("document.querySelectorAll('svg').length") == 9
        assert tab.evaluate(browser.COVERED) == []


BAD = """<!doctype html><title>bad</title><div style="width: 2000px">wide</div>
<div class="card" style="width: 90px; overflow: auto"><p>cut_off_because_it_is_long</p></div>
<script>console.error('wrong'); no_such_function()</script><img src="absent.png" alt="">"""


@needs_browser
def test_the_browser_would_tell_what_is_wrong(tab, tmp_path):
    (tmp_path / "bad.html").write_text(BAD)
    tab.requests.clear()
    tab.show(tmp_path / "bad.html", width=390)
    assert tab.evaluate(WIDTH) > 390
    told = tab.evaluate(STICKS_OUT)
    assert "DIV wide" in told and "DIV cut_off_because_it_is_long" in told
    assert [url.rpartition("/")[2] for url in tab.requests] == ["bad.html", "absent.png"]
    assert any("wrong" in line for line in tab.complaints)
    assert any("no_such_function" in line for line in tab.complaints)
    tab.complaints.clear()
