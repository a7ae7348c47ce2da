"""`bench --chart`: the picture of a saved run, and the one that README shows."""

import json
import re
from pathlib import Path
from xml.etree import ElementTree

import pytest

from fused_optim.bench import charts
from fused_optim.cli import main
from support import browser
from support.marks import needs_browser

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
SHOWN = ROOT / "docs/speed.svg"
TEXT = "{http://www.w3.org/2000/svg}text"
# Which file README's picture is drawn from.
RESULTS = ROOT / "benchmarks/results/cpu-xeon-2cores.json"


def row(baseline="fused", **seconds):
    """A row as --json has it: five rounds, or one of whoever was dropped."""
    samples = {
        name: [[second] for second in (value if isinstance(value, list) else [value] * 5)]
        for name, value in seconds.items()
    }
    ours = {"median": samples["fused_optim"][0][0]}
    return {"samples_s": samples, "baseline": baseline, "seconds": {"fused_optim": ours}}


def test_the_fastest_of_each_kind_is_drawn():
    found = row(
        fused_optim=0.01, foreach=0.03, fused=0.02, optimi=0.05, probe=0.001, copy_=0.001,
        **{"torch.compile": 0.015},
    )  # fmt: skip
    assert [(bar.name, bar.kind, bar.value, bar.shown) for bar in charts.best(found)] == [
        ("fused_optim", "ours", 1.0, "10.0 ms"),
        ("torch.optim, fused", "stock", pytest.approx(2.0), "2.00x"),
        ("torch.compile", "peer", pytest.approx(1.5), "1.50x"),
    ]


def test_one_round_is_a_rough_number_and_a_peer_may_lack():
    dropped = charts.best(row(fused_optim=0.01, fused=0.02, optimi=[0.16]))
    assert dropped[2].shown == "about 16x"
    phase = charts.best(row("stock calls", fused_optim=0.01, **{"stock calls": 0.018}))
    assert [bar.name for bar in phase] == ["fused_optim", "torch's fastest calls"]


def test_readme_shows_what_was_measured(tmp_path, capsys):
    assert main(["bench", "--chart", str(RESULTS), str(tmp_path / "speed.svg")]) == 0
    drawn, shown = (
        ElementTree.fromstring(file.read_text()) for file in (tmp_path / "speed.svg", SHOWN)
    )
    assert [text.text for text in drawn.iter(TEXT)] == [text.text for text in shown.iter(TEXT)]
    assert "Time of a step, as a multiple of fused_optim's: shorter is faster" in shown.itertext()
    assert f"]({SHOWN.relative_to(ROOT)})" in README


def test_readme_claims_what_all_machines_have():
    """From the lowest ratio to the highest, of the rows of the picture."""
    files = [json.loads(file.read_text()) for file in RESULTS.parent.glob("cpu-*.json")]
    claimed = re.findall(r"([\d.]+)x\s+to\s+([\d.]+)x", README.partition("## Install")[0])
    measured = []
    for name in ("gpt2-rmsprop", "small-cold", "gpt2-phase-2t", "gpt2-adamw"):
        rows = [row for found in files for row in found["rows"] if row["name"] == name]
        ratios = [row["ratio"]["median"] for row in rows]
        measured.append((f"{min(ratios):.2f}", f"{max(ratios):.2f}"))
    assert claimed == measured
    assert len(files) == 3 and "three machines" in README


@needs_browser
def test_nothing_of_it_is_cut_off_or_covered(tmp_path):
    """In a browser, where letters have widths."""
    page = tmp_path / "page.html"
    drawn = SHOWN.read_text().partition("<svg")[2]
    with browser.opened(browser.find()) as tab:
        page.write_text(f"<!doctype html><title>t</title><svg{drawn}")
        tab.show(page, width=1100)
        assert tab.evaluate("document.querySelectorAll('svg text').length") > 20
        assert tab.evaluate(browser.COVERED) == []
        bad = '<text y="10">out</text><text y="40" x="5">one</text><text y="42" x="9">other</text>'
        page.write_text(f'<!doctype html><title>t</title><svg width="90" height="50">{bad}</svg>')
        tab.show(page, width=1100)
        assert tab.evaluate(browser.COVERED) == ["out", "one"]


@pytest.mark.parametrize("content", ["", "[]", '{"rows": []}', '{"rows": [{"name": "tiny"}]}'])
def test_what_is_no_saved_run_is_refused_and_nothing_written(content, tmp_path, capsys):
    (tmp_path / "run.json").write_text(content)
    with pytest.raises(SystemExit) as ended:
        main(["bench", "--chart", str(tmp_path / "run.json"), str(tmp_path / "out.svg")])
    assert ended.value.code == 2
    assert "no results of bench --json" in capsys.readouterr().err
    assert not (tmp_path / "out.svg").exists()


def test_it_is_alone(tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["bench", "--chart", str(RESULTS), str(tmp_path / "out.svg"), "--quick"])
    assert ended.value.code == 2
    assert "takes no other options" in capsys.readouterr().err
