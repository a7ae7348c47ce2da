"""The examples in docstrings run as written."""

import doctest
import pkgutil

import pytest
import torch

import fused_optim
from support.cases import VARIANTS


@pytest.mark.parametrize(
    "name",
    [
        *VARIANTS,
        "release_gradients",
        "patch",
        "patched",
        "explain.Explanation",
    ],
)
def test_docstring_example(name: str) -> None:
    names = {"torch": torch, "fused_optim": fused_optim}
    found = doctest.DocTestFinder(recurse=False).find(
        pkgutil.resolve_name(f"fused_optim.{name}"), globs=names
    )
    runner = doctest.DocTestRunner()
    for example in found:
        runner.run(example)
    assert runner.tries >= 4
    assert runner.failures == 0
