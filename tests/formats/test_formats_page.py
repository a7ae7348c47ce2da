"""benchmarks/formats in its quick size: the page has every row, and its numbers are numbers."""

import math
import re
from pathlib import Path

import pytest

from support.marks import needs_cpu_kernels
from support.processes import python

pytestmark = needs_cpu_kernels

FORMATS = Path(__file__).resolve().parents[2] / "benchmarks" / "formats"
MASTERS = ["`None`", "`stochastic`", "`split8`", "`split16`"]
STATE_DTYPES = ["`None`", "`float32`", "`bfloat16`", "`int8`"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("page")
    done = python(f"""
import runpy, sys
sys.argv = ["formats", "--quick", "--out", {str(out)!r}]
runpy.run_path({str(FORMATS)!r}, run_name="__main__")
""")
    assert done.returncode == 0, done.stderr
    return out


def tables(folder: Path) -> list[list[list[str]]]:
    """Every table of the page, a list of its rows; headers first."""
    found, previous = [], ""
    for line in (folder / "formats.md").read_text("utf-8").splitlines():
        if line.startswith("|"):
            if not previous.startswith("|"):
                found.append([])
            cells = [cell.strip() for cell in line.strip("|").split(" | ")]
            if not set(cells) <= {"---"}:
                found[-1].append(cells)
        previous = line
    return found


def test_the_page_has_every_row(folder):
    footprints, peers, nmse, masters, *losses = tables(folder)
    float32 = [["`float32`", state_dtype, "`None`"] for state_dtype in STATE_DTYPES]
    bfloat16 = [
        ["`bfloat16`", state_dtype, master] for master in MASTERS for state_dtype in STATE_DTYPES
    ]
    assert [row[:3] for row in footprints[1:]] == float32 + bfloat16
    assert {len(row) for row in footprints} == {3 + 2}
    assert len(peers) == 1 + 4
    assert [row[0] for row in nmse[1:]][:3] == ["`None`", "`bfloat16`", "`int8`"]
    assert len(nmse) == 1 + 4
    assert [row[0] for row in masters[1:]] == MASTERS
    assert len(losses) == 4  # two models, training and held-out
    for table in losses:
        assert len(table) == 1 + 8
        assert {len(row) for row in table} == {9}


def test_its_bytes_are_what_the_formats_promise(folder):
    footprints, peers, *_ = tables(folder)
    kept = {tuple(row[:3]): float(row[3].split()[0]) for row in footprints[1:]}
    assert footprints[0][3:] == ["AdamW", "SGD momentum"]
    assert kept["`float32`", "`None`", "`None`"] == 12
    assert kept["`float32`", "`bfloat16`", "`None`"] == 8
    assert kept["`float32`", "`int8`", "`None`"] == 6.06
    assert kept["`bfloat16`", "`int8`", "`split8`"] == 5.06
    assert kept["`bfloat16`", "`float32`", "`split16`"] == 12
    assert [float(number) for number in peers[1][1:3]] == pytest.approx([2.0625, 5.0625], abs=1e-3)


def test_its_errors_are_positive_numbers(folder):
    _, _, nmse, masters, *_ = tables(folder)
    values = [float(cell) for row in nmse[1:] for cell in row[1:4]]
    values += [float(row[1]) for row in masters[1:]]
    assert all(math.isfinite(value) and value > 0 for value in values)
    stock, bfloat16, int8 = (float(row[1]) for row in nmse[1:4])
    assert stock < 1e-10 < bfloat16 < int8


def test_its_losses_are_numbers(folder):
    for table in tables(folder)[4:]:
        for row in table[1:]:
            values = [float(cell) for cell in row[3:7]]
            assert all(math.isfinite(value) for value in values)
            assert values[2] <= values[0] <= values[3]


def test_it_is_marked_as_quick_and_its_plots_exist(folder):
    page = (folder / "formats.md").read_text("utf-8")
    assert "A quick run" in page
    plots = re.findall(r"!\[.*?\]\((.*?)\)", page)
    assert len(plots) == 2
    for plot in plots:
        assert (folder / plot).read_text("utf-8").startswith("<?xml")
