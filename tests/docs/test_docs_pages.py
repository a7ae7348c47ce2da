"""The pages in docs/, README.md and CONTRIBUTING.md: their code runs, and what they name exists.

Links between pages, and into the API reference, are checked when Sphinx builds them (`make docs`).
"""

import ast
import doctest
import json
import re
import shlex
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tomllib
import torch

import fused_optim
from fused_optim import cli
from fused_optim.bench.workloads import select
from fused_optim.optimizers import OPTIMIZERS
from support.cases import OF_TORCH
from support.marks import needs_cpu_kernels
from support.processes import HANG_S

ROOT = Path(__file__).parents[2]
PAGES = sorted(ROOT.glob("docs/*.md"))
READ_ON_THEIR_OWN = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")]
READ_ON_THEIR_OWN += [ROOT / "benchmarks/results/README.md"]
ALL = PAGES + READ_ON_THEIR_OWN
MAKEFILE = (ROOT / "Makefile").read_text()
EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def blocks(page: Path, *languages: str) -> list[str]:
    found = re.findall(r"^```([^\n]*)\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)
    return [text for language, text in found if language in languages]


def code(page: Path) -> list[str]:
    """Lines of shell blocks, and code in a line."""
    prose = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    lines = [line for text in blocks(page, "sh", "") for line in text.splitlines()]
    return lines + [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", prose)]


def taken_for_granted(before: str) -> dict[str, Any]:
    """The names that a page's text says its blocks take for granted, such as: take `model` for granted."""
    readers_own = {
        "torch": torch,
        "fused_optim": fused_optim,
        "model": torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Linear(64, 1)),
        "data": [(torch.randn(8, 64), torch.randn(8, 1)) for _ in range(2)],
        "loss_of": lambda model, x, y: torch.nn.functional.mse_loss(model(x), y),
        "evaluate": lambda model: model(torch.ones(1, 64)),
    }
    said = " ".join(re.findall(r"\btakes?\s([^.:]*?)\sfor\sgranted\b", before))
    return {name: readers_own[name] for name in re.findall(r"`(\w+)`", said)}


RUNNABLE = [page for page in ALL if blocks(page, "python")]


@needs_cpu_kernels
@pytest.mark.parametrize("page", RUNNABLE, ids=name_of)
def test_code_runs_as_pasted(page: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each block by itself, with the names alone that the page says it takes for granted.

    Examples with `>>>` give what they say. A master is shown where it does something: on 16-bit params.
    """
    text = page.read_text()
    for block in re.finditer(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
        names = taken_for_granted(text[: block.start()])
        where = f"{page.name}, line {text.count(chr(10), 0, block.start()) + 2}"
        if ">>>" in block[1]:
            test = doctest.DocTestParser().get_doctest(block[1], names, where, str(page), 0)
            with capsys.disabled():
                result = doctest.DocTestRunner().run(test, clear_globs=False)
            assert result.attempted and not result.failed
            names = test.globs
        else:
            exec(compile(block[1], where, "exec"), names)
        for optimizer in names.values():
            if isinstance(optimizer, fused_optim.FusedOptimizer):
                for group in optimizer.param_groups:
                    bits = {torch.finfo(param.dtype).bits for param in group["params"]}
                    assert group.get("master") is None or bits == {16}, where


@needs_cpu_kernels
def test_quickstart_runs_unmodified(tmp_path: Path) -> None:
    """Its script, as it was before the swap, under the command that the page gives."""
    page = ROOT / "docs/quickstart.md"
    script = next(text for text in blocks(page, "python") if "from fused_optim import" in text)
    (tmp_path / "train.py").write_text(script.replace("from fused_optim", "from torch.optim"))
    (command,) = (line for line in code(page) if line.startswith("python -m fused_optim run"))
    done = subprocess.run(
        [sys.executable, *shlex.split(command)[1:]],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=HANG_S,
    )
    assert done.returncode == 0, done.stderr
    assert re.fullmatch(r"loss 0\.\d+\n", done.stdout)
    (shown,) = (text for text in blocks(page, "text") if "100 steps" in text)
    times = re.compile(r"[\d.e+-]+(?:%| s| ms)")
    assert times.sub("T", done.stderr) == times.sub("T", shown)


@pytest.mark.parametrize("page", ALL, ids=name_of)
def test_commands_exist(page: Path) -> None:
    parser = cli._parser()
    for line in code(page):
        for target in re.findall(r"^make ([\w-]+)", line):
            assert re.search(rf"^{target}:", MAKEFILE, re.MULTILINE), line
        for extra in re.findall(r"^pip install '\.\[(\w+)\]'", line):
            assert extra in EXTRAS, line
        ours = re.match(r"(?:(?:\S*python|torchrun .*) -m fused_optim|fused-optim) (.+)", line)
        if ours:
            args = parser.parse_args(shlex.split(ours[1]))
            if args.command == "bench" and args.only:
                assert select(args.only, quick=False), line


# What make, a build and the examples of the pages create or take for granted.
MADE = (".venv", "build", "dist", "OUT", "train.py", "ppo.py", "script.py")


@pytest.mark.parametrize("page", ALL, ids=name_of)
def test_paths_exist(page: Path) -> None:
    path = re.compile(r"[\w.-]+/[\w./-]*|[\w-]+\.(md|toml|py|txt|yaml)")
    words = {word.removesuffix(",") for line in code(page) for word in line.split()}
    named = {word for word in words if path.fullmatch(word) and word.split("/")[0] not in MADE}
    near = (ROOT, page.parent)
    assert [word for word in sorted(named) if not any((at / word).exists() for at in near)] == []


def headings(page: Path) -> set[str]:
    """Their anchors, as GitHub and MyST make them."""
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    found = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in found}


@pytest.mark.parametrize("page", ALL, ids=name_of)
def test_links_lead_somewhere(page: Path) -> None:
    prose = re.sub(r"```.*?```|`[^`]*`", "", page.read_text(), flags=re.DOTALL)
    for link in re.findall(r"\]\(([^)\s]+)\)", prose):
        if re.match(r"https?:|#fused_optim\.", link):
            continue
        file, _, anchor = link.partition("#")
        target = page.parent / file if file else page
        assert target.exists(), link
        included = re.search(r"```\{include\} (\S+)", target.read_text()) if file else None
        if included:
            target = target.parent / included[1]
        assert not anchor or anchor in headings(target), link


RATIO = re.compile(r"(?:about )?\d[\d.]*x\b(?: \[[\d., ]+\])?")


def written(ratios: list[float]) -> set[str]:
    """A ratio as pages have it: with quartiles or without; whoever was dropped after a round has neither."""
    if len(ratios) == 1:
        return {f"about {ratios[0]:.0f}x"}
    q1, median, q3 = statistics.quantiles(ratios, n=4, method="inclusive")
    return {f"{median:.2f}x", f"{median:.2f}x [{q1:.2f}, {q3:.2f}]"}


def ratios_of_steps(row: dict) -> set[str]:
    """Ratios of all contestants to ours, paired by round."""
    rounds = {
        name: [statistics.median(passes) for passes in samples]
        for name, samples in row["samples_s"].items()
    }
    ours = rounds["fused_optim"]
    return set().union(
        *(written([a / b for a, b in zip(theirs, ours)]) for theirs in rounds.values())
    )


def ratios_of_programs(found: dict) -> set[str]:
    """Ratios of trainings, and of a step of tiny tensors; see benchmarks/programs."""
    measured = ratios_of_steps(found["latency"])
    for row in found["rows"]:
        ours = row["samples"]["fused_optim"]
        for theirs in row["samples"].values():
            for kind in ("wall_s", "cpu_s", "step_s"):
                measured |= written([a[kind] / b[kind] for a, b in zip(theirs, ours)])
    return measured


def test_ratios_of_the_pages_are_those_of_the_samples() -> None:
    measured = set()
    for file in (ROOT / "benchmarks/results").glob("*.json"):
        found = json.loads(file.read_text())
        if "latency" in found:
            measured |= ratios_of_programs(found)
        else:
            measured |= set().union(*map(ratios_of_steps, found["rows"]))
    names = (
        "README.md",
        "benchmarks/results/README.md",
        "docs/choosing-a-format.md",
        "docs/one-pass.md",
        "docs/optimizers.md",
    )
    for name in names:
        ratios = RATIO.findall((ROOT / name).read_text())
        assert len(ratios) >= 4
        assert [ratio for ratio in ratios if ratio not in measured] == [], name


NAME = rf"`?\b(?:{'|'.join(OPTIMIZERS)})\b`?"


@pytest.mark.parametrize("page", [p for p in ALL if p.name != "CHANGELOG.md"], ids=name_of)
def test_lists_of_optimizers_are_complete(page: Path) -> None:
    """Five names in a row mean all, with those that torch.optim lacks or without."""
    found = re.findall(rf"{NAME}(?:,?(?:\s(?:and|or))?\s{NAME}){{4,}}", page.read_text())
    for names in found:
        listed = sorted({*re.findall(r"\w+", names)} - {"and", "or"})
        assert listed in (OF_TORCH, sorted(OPTIMIZERS)), names


def test_the_changelog_has_every_optimizer() -> None:
    text = (ROOT / "CHANGELOG.md").read_text()
    assert [name for name in OPTIMIZERS if f"`{name}`" not in text] == []


def test_the_reference_has_every_public_name() -> None:
    text = (ROOT / "docs/api.md").read_text()
    text = text.replace("EACH", "\n.. autoclass:: ".join(OPTIMIZERS))  # as docs/conf.py
    assert set(re.findall(r":: (\w+)$", text, re.MULTILINE)) - {"fused_optim"} == {
        *fused_optim.__all__
    }


PACKAGES = {path.parent.name for path in ROOT.glob("fused_optim/*/__init__.py")}


def imports(module: Path) -> set[str]:
    """Modules of fused_optim that it imports, wherever in its code, but not for types alone."""
    tree = ast.parse(module.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            node.body = []
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module == "fused_optim":
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and str(node.module).startswith("fused_optim."):
            found.add(str(node.module).split(".")[1])
    return found


def test_layers_are_those_of_the_imports() -> None:
    """As docs/how-it-works.md has them: from each row to itself or rows below."""
    text = (ROOT / "docs/how-it-works.md").read_text().partition("## Layers")[2]
    layer = {}
    for number, row in enumerate(re.findall(r"^\| (?!layer)[^|]*\|([^|]*)\|", text, re.MULTILINE)):
        for path in re.findall(r"`fused_optim/(\w+)(?:\.py|/)`", row):
            layer[path] = number
    modules = [*ROOT.glob("fused_optim/[!_]*.py"), *ROOT.glob("fused_optim/*/*.py")]
    module_of = {
        path: path.parent.name if path.parent.name in PACKAGES else path.stem for path in modules
    }
    layer |= {name.lower(): layer["optimizers"] for name in OPTIMIZERS}
    assert {*module_of.values()} == {*layer}
    for path, name in module_of.items():
        upwards = {other for other in imports(path) & {*layer} if layer[other] < layer[name]}
        assert not upwards, (path, upwards)
    assert imports(ROOT / "fused_optim/optimizer.py") >= {"backends", "step"}
    assert {module_of[path] for path in modules if "triton_kernels" in imports(path)} == {"codegen"}
