"""The switches in the environment, each in a process of its own: they are read once."""

import importlib.util

import pytest
import torch

from support.cases import ONE_EACH
from support.marks import needs_cpu_kernels
from support.processes import fresh_python, python

PREAMBLE = """
import torch
from support.cases import CASES
from support.cases import ONE_EACH
from support.twins import Run, run_both
"""

USES = {
    "config": "import fused_optim; fused_optim.config()",
    "step": PREAMBLE + "Run(ONE_EACH[0], ONE_EACH[0].fused).step()",
}


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize(
    ("variable", "accepted"),
    [
        pytest.param("FUSED_OPTIM_ISA", ["baseline"], marks=needs_cpu_kernels),
        ("FUSED_OPTIM_BACKEND", ["cpu", "triton", "stock"]),
        ("FUSED_OPTIM_DEBUG", ["1"]),
    ],
)
def test_unknown_value_is_an_error_that_names_the_accepted_ones(
    variable: str, accepted: list[str], use: str
) -> None:
    done = python(USES[use], **{variable: "quantum"})
    assert done.returncode == 1
    message = done.stderr.strip().splitlines()[-1]
    assert message.startswith("ValueError") and "quantum" in message
    assert all(name in message for name in accepted), message


def test_importing_reads_no_environment() -> None:
    names = ("FUSED_OPTIM_ISA", "FUSED_OPTIM_BACKEND", "FUSED_OPTIM_DEBUG")
    done = fresh_python("import fused_optim", **dict.fromkeys(names, "quantum"))
    assert done.returncode == 0, done.stderr


def test_why_there_are_no_kernels_stands_apart(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from fused_optim import backends

    monkeypatch.setattr(backends, "config", lambda: {"isa": None, "why_no_cpu_kernels": "no _C"})
    backends.show_config()
    assert capsys.readouterr().out == "isa             None\nwhy no cpu kernels no _C\n"


@needs_cpu_kernels
def test_isa_of_the_environment_is_in_use() -> None:
    import fused_optim

    for isa in fused_optim.config()["isas_available"]:
        done = python("import fused_optim; print(fused_optim.config()['isa'])", FUSED_OPTIM_ISA=isa)
        assert done.stdout.split() == [isa], done.stderr


@needs_cpu_kernels
def test_isa_of_another_architecture_is_an_error() -> None:
    import fused_optim

    available = fused_optim.config()["isas_available"]
    for isa in {"baseline", "avx2", "avx512", "neon"} - set(available):
        done = python("import fused_optim; fused_optim.config()", FUSED_OPTIM_ISA=isa)
        assert done.returncode == 1 and "ValueError" in done.stderr


@needs_cpu_kernels
@pytest.mark.parametrize(("kind", "reason"), [("sparse", "strided"), ("complex", "complex")])
def test_forced_kernels_refuse_what_they_cannot_serve(kind: str, reason: str) -> None:
    program = f"""{PREAMBLE}
from support.twins import snapshot, assert_untouched
n_refused = 0
for case in ONE_EACH:
    run = Run(case, case.fused)
    run.step(2)
    assert run.opt.last_step.tensors == {{"cpu": len(run.params)}}
    if {kind!r} == "complex":
        run.opt.add_param_group({{"params": [torch.nn.Parameter(run.randn((3,), torch.complex64))]}})
    run.set_grads()
    if {kind!r} == "sparse":
        run.params[1].grad = run.randn((33, 5)).to_sparse(1)
    before = snapshot(run.opt)
    try:
        run.opt.step()
    except RuntimeError as error:
        assert {reason!r} in str(error), error
        assert_untouched(run.opt, before)
        n_refused += 1
print(n_refused)
"""
    done = python(program, FUSED_OPTIM_BACKEND="cpu")
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [str(len(ONE_EACH))]


def test_forced_stock_steps_everything_with_stocks_code() -> None:
    program = f"""{PREAMBLE}
for case in CASES:
    ours, stock = run_both(case, lambda run: run.step(3), tensors={{"stock": 5}})
    assert all(torch.equal(a, b) for a, b in zip(ours.params, stock.params)), case
    assert {{f.reason for f in ours.opt.last_step.fallbacks}} != {{""}}
print("equal")
"""
    done = python(program, FUSED_OPTIM_BACKEND="stock")
    assert done.stdout.split() == ["equal"], done.stderr


@needs_cpu_kernels
def test_forced_triton_refuses_cpu_params_without_its_interpreter() -> None:
    pytest.importorskip("triton", reason="needs triton")
    done = fresh_python(USES["step"], FUSED_OPTIM_BACKEND="triton", TRITON_INTERPRET="")
    assert done.returncode == 1
    assert "RuntimeError" in done.stderr and "TRITON_INTERPRET=1" in done.stderr, done.stderr


@needs_cpu_kernels
def test_forced_triton_serves_cpu_params_in_its_interpreter() -> None:
    pytest.importorskip("triton", reason="needs triton")
    program = (
        PREAMBLE
        + "run = Run(ONE_EACH[0], ONE_EACH[0].fused); run.step(2); print(run.opt.last_step)"
    )
    done = fresh_python(program, FUSED_OPTIM_BACKEND="triton", TRITON_INTERPRET="1")
    assert "{'triton': 5}" in done.stdout, done.stderr


def test_last_value_wins_over_none() -> None:
    """An empty value is no value."""
    done = python(USES["step"], FUSED_OPTIM_ISA="", FUSED_OPTIM_BACKEND="")
    assert done.returncode == 0, done.stderr


@needs_cpu_kernels
def test_isa_switch_in_process_refuses_unknown_names() -> None:
    from fused_optim import _C

    before = _C.isa()
    for name in ("quantum", "", "AVX2"):
        with pytest.raises(ValueError, match="baseline"):
            _C.set_isa(name)
    assert _C.isa() == before
    assert torch.get_num_threads() >= 1


# What has to wait until it is needed: both kinds of kernels, the command line, and what explains a step.
LATER = {"_C", "triton_kernels", "cli", "explain"}


def test_import_loads_modules_of_the_package_alone_and_none_that_can_wait() -> None:
    program = (
        "import torch, sys; before = set(sys.modules); import fused_optim; "
        "print(*set(sys.modules) - before)"
    )
    done = fresh_python(program)
    loaded = [name.split(".") for name in done.stdout.split()]
    assert {package for package, *_ in loaded} == {"fused_optim"}, done
    assert not {module for _, *modules in loaded for module in modules} & LATER, done
    assert all(importlib.util.find_spec(f"fused_optim.{module}") for module in LATER - {"_C"})


@pytest.mark.parametrize("run", [python, fresh_python])
def test_programs_see_the_package_under_test(run) -> None:
    """The installed wheel too, where a source tree lies in the present folder."""
    import fused_optim

    assert (
        run("import fused_optim; print(fused_optim.__file__)").stdout.strip()
        == fused_optim.__file__
    )
