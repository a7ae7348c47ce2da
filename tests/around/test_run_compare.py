"""python -m fused_optim run --compare: one program, once with torch.optim and once with ours."""

import math
import re
from pathlib import Path

import pytest
import torch

from fused_optim.cli.compare import Record, compare, lines
from fused_optim.cli.run import Program
from fused_optim.tracing import left_to_the_interpreter
from support.marks import needs_cpu_kernels
from support.twins import ROUNDINGS_PER_STEP

pytestmark = needs_cpu_kernels

TRAINS = """
import sys
import torch

class Shared(torch.optim.SGD):
    pass

def train(value):
    params = [torch.nn.Parameter(torch.full((3,), value)), torch.nn.Parameter(torch.zeros(0))]
    params.append(torch.nn.Parameter(torch.full((2,), 1j)))
    optimizers = [torch.optim.AdamW(params), torch.optim.SGD(params[:1]), Shared(params, lr=0.1)]
    torch.optim.Adam([torch.ones(9)])  # which takes no step
    for _ in range(4):
        for p in params:
            p.grad = torch.ones_like(p)
        for optimizer in optimizers:
            optimizer.step()
    return type(optimizers[0]).__module__

where = train(2.0)
print(where, sys.argv[1:], flush=True)
print("an error of", where, file=sys.stderr)
"""


def check_table(shown: list[str]) -> str:
    """That it is one, with the ratios of its times; returns its last line."""
    head, in_step, steps, whole, params = shown
    assert head.split() == ["fused_optim:", "torch.optim", "fused_optim"]
    assert re.fullmatch(r"fused_optim: steps +[\d,]+ +[\d,]+", steps)
    for row, line in (("in step()", in_step), ("whole time", whole)):
        found = re.fullmatch(
            rf"fused_optim: {re.escape(row)} +([\d.e-]+) s +([\d.e-]+) s  ([\d.e+-]+)x", line
        )
        assert found, line
        stock, ours, ratio = map(float, found.groups())
        assert stock > 0
        assert ratio == pytest.approx(stock / ours, rel=0.0152)  # each has three digits
    assert re.fullmatch(
        r"fused_optim: final params: \d+ tensors of \d optimizers? differ by at most [\d.e-]+, "
        r"[\d.e-]+ of the largest of them",
        params,
    )
    return params


def test_the_page_shows_such_a_table() -> None:
    page = (Path(__file__).parents[2] / "docs/run.md").read_text()
    (block,) = re.findall(r"```text\n(fused_optim: +torch\.optim .*?)```", page, re.DOTALL)
    check_table(block.splitlines())


def test_a_program(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Its optimizers are gone before it ends."""
    (tmp_path / "train.py").write_text(TRAINS)
    args = ["--quiet", "--compare"]
    assert compare(Program("path", str(tmp_path / "train.py"), args), {}) == 0
    out, err = capfd.readouterr()
    names = ["torch.optim.adamw", "fused_optim.adamw"]
    assert out.splitlines() == [f"{name} {args}" for name in names]
    assert [line for line in err.splitlines() if "an error" in line] == [
        f"an error of {name}" for name in names
    ]
    params = check_table(err.splitlines()[-5:])
    # Those of AdamW and SGD: Shared has a step of its own in both runs.
    assert err.splitlines()[-3].split()[1:] == ["steps", "8", "8"]
    found = re.search(r"3 tensors of 2 optimizers differ by at most ([\d.e-]+)", params)
    assert found, params
    eps = torch.finfo(torch.float32).eps
    assert float(found[1]) <= ROUNDINGS_PER_STEP * 12 * eps * (1 + 2.0)  # of three optimizers


CLIPPED = """
import torch

class Sub(torch.Tensor): pass

kept = torch.nn.Parameter(torch.ones(2).as_subclass(Sub))
moved = torch.nn.Parameter(torch.full((1,), 8.0, dtype=torch.bfloat16))
optimizer = torch.optim.SGD([{"params": kept}, {"params": moved}], lr=1.0)
moved.grad = torch.full((1,), 4.0, dtype=torch.bfloat16)
optimizer.step()
print(moved.item(), flush=True)
"""


def test_a_module_and_options(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Options are those of our run alone, and the difference is that of the final params."""
    (tmp_path / "clipped.py").write_text(CLIPPED)
    monkeypatch.chdir(tmp_path)
    assert compare(Program("module", "clipped", []), {"max_grad_norm": 1e-30}) == 0
    out, err = capfd.readouterr()
    assert out.splitlines() == ["4.0", "8.0"]
    assert err.splitlines()[-1] == (
        "fused_optim: final params: 2 tensors of 1 optimizer differ by at most 4, 1 of the largest of them"
    )


ENDS = """
import os, sys, torch
is_ours = type(torch.optim.SGD([torch.ones(1)])) is not torch.optim.SGD
sys.stdout.flush()
"""


@pytest.mark.parametrize(
    ("code", "status", "said"),
    [
        ("sys.exit(5 * is_ours)", 5, "with fused_optim, the program ended with status 5"),
        ("os.kill(os.getpid(), 15)", 143, "with torch.optim, the program ended with status 143"),
        # What it has forked runs them, but is not it.
        (
            "if os.fork() == 0: sys.exit()\nos.wait(); os._exit(0)",
            1,
            "with torch.optim, the program ended without running exit handlers",
        ),
    ],
)
def test_a_program_that_fails(
    code: str, status: int, said: str, capfd: pytest.CaptureFixture[str]
) -> None:
    assert compare(Program("code", ENDS + code, []), {}) == status
    assert capfd.readouterr().err.splitlines()[-1] == f"fused_optim: {said}: nothing is compared"


def record(*optimizers: list[list[torch.Tensor]], n_steps: int = 1) -> Record:
    return Record(0.25, 4.0, n_steps, list(optimizers))


def last_line(stock: Record, ours: Record) -> str:
    return lines(stock, ours)[-1]


def test_programs_without_a_step() -> None:
    *found, served = lines(record(n_steps=0), record(n_steps=0))
    assert found == [
        "              torch.optim    fused_optim",
        "whole time            4 s            4 s  1x",
    ]
    assert re.fullmatch(r"no step of \w+(, \w+)* or \w+ in either run", served)


def test_what_does_not_match_is_said() -> None:
    a, b = torch.zeros(2), torch.zeros(2, 3)
    for ours, said in [
        (record([[a], [b]], [[a]]), "torch.optim stepped 1 optimizer, fused_optim 2"),
        (record([[a]]), "optimizer 0 has 2 groups with torch.optim, 1 with fused_optim"),
        (
            record([[a], [b, a]]),
            "group 1 of optimizer 0 has shapes [(2, 3)] with torch.optim, [(2, 3), (2,)] with fused_optim",
        ),
        (
            record([[b], [b]]),
            "group 0 of optimizer 0 has shapes [(2,)] with torch.optim, [(2, 3)] with fused_optim",
        ),
    ]:
        assert last_line(record([[a], [b]]), ours) == f"the final params do not match: {said}"


def test_params_that_have_no_values_are_said(capfd: pytest.CaptureFixture) -> None:
    code = """
import torch
param = torch.nn.Parameter(torch.empty(2, device="meta"))
optimizer = torch.optim.SGD([param])
param.grad = torch.ones_like(param)
optimizer.step()
"""
    assert compare(Program("code", code, []), {}) == 0
    assert "the final params cannot be compared: NotImplementedError" in capfd.readouterr().err


def test_nan_and_infinities() -> None:
    """Equal where both have them; else the difference is theirs, whatever other tensors have."""
    nan, inf = math.nan, math.inf
    odd = torch.tensor([nan, inf, -inf, 1.0])
    finite = torch.tensor([1.0, 1.0, 1.0, 1.0])
    assert "differ by at most 0, nan of" in last_line(record([[odd]]), record([[odd.clone()]]))
    for before in ([], [finite]):
        found = last_line(record([[*before, odd, finite]]), record([[*before, finite, finite]]))
        assert "differ by at most nan, nan of" in found
    found = last_line(
        record([[torch.zeros(3), torch.zeros(0)]]), record([[torch.ones(3), torch.ones(0)]])
    )
    assert found == "final params: 1 tensor of 1 optimizer differ by at most 1"
    found = last_line(record([[torch.tensor([3 + 4j])]]), record([[torch.tensor([0j])]]))
    assert "differ by at most 5, 1 of" in found


@pytest.mark.parametrize("with_callees", [True, False])
def test_compile_reaches_what_a_wrapper_of_stocks_step_calls(with_callees: bool) -> None:
    """Else a program that compiles its step would be compared with what it does not do."""
    from torch._dynamo.testing import CompileCounter

    def step(x: torch.Tensor) -> torch.Tensor:
        return x + 1

    def wrapper(x: torch.Tensor) -> torch.Tensor:
        return step(x)

    left_to_the_interpreter(wrapper, with_callees=with_callees)
    counter = CompileCounter()
    torch.compile(lambda x: wrapper(x), backend=counter)(torch.ones(1))
    assert counter.frame_count == (0 if with_callees else 1)
