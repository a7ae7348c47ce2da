"""docs/migration.md tells to write what exists, what is accepted, and what has the defaults it names."""

import ast
import inspect
import pkgutil
import re
from pathlib import Path
from typing import Any

import pytest
import torch

import fused_optim
from fused_optim.options import KernelOptions
from support.marks import needs_cpu_kernels

PAGE = (Path(__file__).parents[2] / "docs/migration.md").read_text()
SWITCH = "FUSED_OPTIM_BACKEND"


def rows() -> list[tuple[str | None, str, str]]:
    """(our class of the table, or None where each row names one; their argument; what to write here)."""
    found, ours = [], None
    for line in PAGE.splitlines():
        cells = re.split(r"\s*\|\s*", line.strip("| "))
        if not line.startswith("|") or len(cells) != 3 or cells == ["---"] * 3:
            continue
        header = re.fullmatch(r"`fused_optim\.(\w+)`|here", cells[2])
        if header:
            ours = header[1]
        else:
            found.append((ours, cells[0], cells[2]))
    return found


def spans(text: str) -> list[str]:
    return re.findall(r"`([^`]+)`", text)


def classes(ours: str | None, here: str) -> list[str]:
    """That a row speaks of."""
    return [name for name in (ours, *re.findall(r"`fused_optim\.([A-Z]\w+)`", here)) if name]


def made(name: str, **options: Any) -> torch.optim.Optimizer:
    needed = {"momentum": 0.9} if options.get("nesterov") else {}
    param = torch.nn.Parameter(torch.ones(4, dtype=torch.bfloat16))
    return getattr(fused_optim, name)([param], **needed, **options)


def arguments(name: str) -> dict[str, Any]:
    """With their defaults."""
    own = inspect.signature(getattr(fused_optim, name)).parameters
    optimizer = made(name)
    return {
        **{key: parameter.default for key, parameter in own.items()},
        **{
            key: getattr(optimizer, key, optimizer.param_groups[0].get(key))
            for key in KernelOptions.__annotations__
        },
    }


def is_literal(text: str) -> bool:
    try:
        ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return False
    return True


def test_all_tables_are_found() -> None:
    served = {"AdamW", "SGD", "Adagrad", "Lion", "AdamWScheduleFree", None}
    assert {ours for ours, _, _ in rows()} == served
    n_tables = len(re.findall(r"^\|---\|---\|---\|$", PAGE, re.MULTILINE))
    assert len(rows()) > 6 * n_tables


@needs_cpu_kernels
@pytest.mark.parametrize(("ours", "theirs", "here"), rows())
def test_what_to_write_is_accepted(ours: str | None, theirs: str, here: str) -> None:
    names = classes(ours, here)
    for span in spans(here):
        option = re.fullmatch(r"(\w+)=(.+)", span)
        method = re.fullmatch(r"(\w+)(\(.*\))?", span)
        if is_literal(span) or span == SWITCH:
            continue
        if option:
            value = eval(option[2], {"torch": torch})
            accepting = [name for name in names if option[1] in arguments(name)]
            assert accepting, span
            for name in accepting:
                made(name, **{option[1]: value})
        elif method:
            assert any(
                method[1] in arguments(name) or hasattr(made(name), method[1]) for name in names
            ), span
        else:
            assert pkgutil.resolve_name(span) is not None


@pytest.mark.parametrize(("ours", "theirs", "here"), [row for row in rows() if row[0]])
def test_defaults_are_ours(ours: str, theirs: str, here: str) -> None:
    """The one that is named; if none is, theirs, where the same argument is what to write."""
    argument = re.match(r"`(\w+)(=[^`]*)?`", here)
    named = re.search(r"default `([^`]+)`", here)
    their_name, _, their_default = theirs.strip("`").partition("=")
    if named:
        assert argument
        assert arguments(ours)[argument[1]] == ast.literal_eval(named[1])
    elif argument and argument[0] == f"`{their_name}`" and their_default:
        assert arguments(ours)[their_name] == ast.literal_eval(their_default)
