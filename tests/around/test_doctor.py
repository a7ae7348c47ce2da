"""python -m fused_optim doctor: it finds what is wrong, and says what would help."""

import os
import shutil
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import tomllib
import torch

import fused_optim
from fused_optim import backends, cli
from fused_optim.cli import doctor
from support.cases import VARIANTS
from support.marks import needs_cpu_kernels
from support.processes import fresh_python, python

pytestmark = needs_cpu_kernels

ROOT = Path(__file__).parents[2]
# Whatever else the machine has: other devices have tests of their own.
PROGRAM = """
import fused_optim
from fused_optim.cli import doctor, main
found = {**fused_optim.config(), "devices": ["cpu"]}
fused_optim.config = lambda: found
doctor.several_openmp = lambda *_: None
"""
RUN = "raise SystemExit(main(['doctor']))"
# For the interpreter.
SMALL = """
doctor.SHAPES = ((), (37, 29))
doctor.OPTIMIZERS = {name: doctor.OPTIMIZERS[name] for name in ("AdamW", "SGD", "Rprop")}
"""


@pytest.fixture
def examined(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """Run it with these classes on the CPU alone: exit status and lines."""
    found = {**fused_optim.config(), "devices": ["cpu"]}
    monkeypatch.setattr(fused_optim, "config", lambda: found)

    def run(*classes: type) -> tuple[int, list[str]]:
        monkeypatch.setattr(doctor, "OPTIMIZERS", {cls.__name__: cls for cls in classes})
        status = cli.main(["doctor"])
        return status, capsys.readouterr().out.splitlines()

    return run


def line_of(name: str, lines: list[str]) -> str:
    (line,) = (line for line in lines if line.split()[1:2] == [name])
    return line


@pytest.mark.parametrize("backend", ["cpu", "triton"])
def test_all_is_well_here(backend: str) -> None:
    run = fresh_python if backend == "triton" else python  # its interpreter is chosen at the start
    done = run(
        PROGRAM + (SMALL if backend == "triton" else "") + RUN,
        FUSED_OPTIM_ISA="",
        FUSED_OPTIM_BACKEND=backend,
        TRITON_INTERPRET="1",
    )
    assert done.returncode == 0, done
    lines = done.stdout.splitlines()
    for name in VARIANTS if backend == "cpu" else ("AdamW", "SGD", "Rprop"):
        device, _, by, float32, bfloat16, outcome = line_of(name, lines).split()
        assert (device, by, outcome) == ("cpu", backend, "ok")
        # bfloat16 was rounded to, and nothing was compared with itself.
        assert 0 < float(float32) < doctor.bound(torch.float32)
        assert 1e-4 < float(bfloat16) < doctor.bound(torch.bfloat16)
    assert lines[-1] == "All is well on cpu."
    # Nothing is faster than the CPU's kernels, but they are faster than the interpreter.
    hint = "- FUSED_OPTIM_BACKEND=triton keeps other kernels out: unset FUSED_OPTIM_BACKEND"
    assert [line for line in lines if line.startswith("-")] == ([hint] * (backend == "triton"))


@pytest.mark.parametrize(("dtype", "factor"), [(torch.float32, 1.0001), (torch.bfloat16, 1.2)])
@pytest.mark.parametrize("name", VARIANTS)
def test_a_kernel_that_computes_something_else_is_found(
    name: str, dtype: torch.dtype, factor: float, examined: Any
) -> None:
    class Wrong(getattr(fused_optim, name)):
        def step(self, closure: Any = None) -> None:
            (group,) = self.param_groups
            # In float64 too: what it is compared with is another class's.
            if group["params"][0].dtype in (dtype, torch.float64):
                group["lr"] = factor * doctor.lr_of(type(self))
            super().step()

    status, lines = examined(Wrong, fused_optim.SGD)
    assert status == 1
    line = line_of("Wrong", lines)
    assert doctor.DIFFERS in line and line.endswith(f"({doctor._name(dtype)})"), line
    assert line_of("SGD", lines).endswith("ok")
    assert lines[-1] == f"Not well: 1 of 2 {doctor.DIFFERS}."


def test_what_is_wrong_with_the_usual_options_alone_is_found(examined: Any) -> None:
    class SGD(fused_optim.SGD):
        def step(self, closure: Any = None) -> None:
            self.param_groups[0]["momentum"] *= 1.0001
            super().step()

    status, lines = examined(SGD)
    assert status == 1
    assert line_of("SGD", lines).endswith("(float32, weight_decay=0.015625, momentum=0.9)")


def test_an_error_is_a_line_and_no_end(examined: Any) -> None:
    class Broken(fused_optim.Adam):
        def step(self, closure: Any = None) -> None:
            raise RuntimeError("no memory\nand much more")

    status, lines = examined(Broken, fused_optim.SGD)
    assert status == 1
    assert line_of("Broken", lines).endswith("raised an error: RuntimeError: no memory (float32)")
    assert line_of("SGD", lines).endswith("ok")
    assert lines[-1] == "Not well: 1 of 2 raised an error."


def test_stock_instead_of_kernels_is_not_well() -> None:
    done = python(PROGRAM + RUN, FUSED_OPTIM_BACKEND="stock")
    assert done.returncode == 1, done
    assert "unset FUSED_OPTIM_BACKEND" in done.stdout
    n = len(VARIANTS)
    assert done.stdout.splitlines()[-1] == f"Not well: {n} of {n} {doctor.NO_KERNEL}."


def test_a_switch_with_a_bad_value_is_not_well() -> None:
    done = python("from fused_optim.cli import main\n" + RUN, FUSED_OPTIM_ISA="quantum")
    assert done.returncode == 1, done
    assert done.stdout.splitlines()[-1].startswith("Not well: FUSED_OPTIM_ISA=quantum")


def test_sources_that_shadow_the_installed_package_are_named(tmp_path: Path) -> None:
    ignored = shutil.ignore_patterns("__pycache__", "_C.*", "triton_kernels")
    shutil.copytree(Path(fused_optim.__file__).parent, tmp_path / "fused_optim", ignore=ignored)
    (tmp_path / "csrc").mkdir()
    # An editable installation would lend its kernels.
    done = python(f"""
import sys
sys.meta_path[:] = [f for f in sys.meta_path if "Editable" not in getattr(f, "__name__", "")]
sys.path.insert(0, {str(tmp_path)!r})
{PROGRAM}{RUN}""")
    assert done.returncode == 1, done
    assert f"imports the sources in {tmp_path}, which have no kernels" in done.stdout
    assert doctor.NO_KERNEL in done.stdout.splitlines()[-1]
    assert "C++17" not in done.stdout


def test_without_kernels_elsewhere_a_compiler_would_help(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fused_optim, "__file__", str(tmp_path / "fused_optim/__init__.py"))
    hint = doctor.no_kernels({"cpu_kernels": False, "why_no_cpu_kernels": "no file _C"})
    assert hint and "no file _C" in hint and "C++17" in hint and "pip install" in hint


OURS = "/env/lib/libgomp.so.1.0.0"
TORCH = os.path.realpath(Path(torch.__file__).parent)


def maps(*files: str) -> str:
    return "".join(
        f"7f5e4a000000-7f5e4a01b000 r-xp 00000000 08:01 1312 {' ' * 20}{file}\n"
        f"7f5e4a01b000-7f5e4a01c000 rw-p 00000000 00:00 0\n"
        for file in ("/bin/python3.11", *files, *files)
    )


@pytest.mark.parametrize(
    "theirs", [f"{TORCH}.libs/libgomp-a34b3233.so.1", f"{TORCH}/lib/libomp.so"]
)
def test_two_openmp_runtimes_are_named(theirs: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LD_PRELOAD", raising=False)
    hint = doctor.several_openmp(maps(OURS, theirs), OURS)
    assert hint and f"{', '.join(sorted([OURS, theirs]))}. Kernels use {OURS}" in hint
    assert hint.endswith(f"export LD_PRELOAD={theirs}")
    # One of a third package: nothing to do about the kernels.
    hint = doctor.several_openmp(maps("/with space/libiomp5.so", theirs), theirs)
    assert hint and "/with space/libiomp5.so" in hint and "LD_PRELOAD" not in hint
    monkeypatch.setenv("LD_PRELOAD", theirs)
    assert doctor.several_openmp(maps(OURS, theirs), theirs) is None


def test_one_openmp_runtime_is_no_hint() -> None:
    assert doctor.several_openmp(maps(OURS, "/libompi/libmpi.so", "/lib/libompi.so"), OURS) is None


@pytest.mark.parametrize(
    ("version", "loaded", "problem", "says"),
    [
        (None, "No module named 'triton'", "no kernel", ("missing", "'triton>=3.6'")),
        ("3.5.1", ModuleType("launch"), "", ("3.5.1", "'triton>=3.6'")),
        ("3.10.0", "no libcuda", "", ("no libcuda", "pip install")),
        ("3.6.0", ModuleType("launch"), "Triton failed: no gcc", ("C compiler", "FUSED_OPTIM_DEBUG")),
        ("3.6.0", ModuleType("launch"), "", None),
    ],
)  # fmt: skip
def test_what_a_gpu_lacks_for_triton(
    version: str | None,
    loaded: Any,
    problem: str,
    says: tuple[str, str] | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(backends, "_load_triton", lambda: loaded)
    rows = [doctor.Row("cuda:0", "Adam", problem=problem)]
    found = {"devices": ["cpu", "cuda:0"], "triton": version}
    hint = doctor.no_triton(found, rows)
    assert (hint is None) == (says is None)
    assert hint is None or all(text in hint for text in says or ())
    assert doctor.no_triton({**found, "devices": ["cpu"]}, rows) is None


def test_oldest_triton_is_the_packages() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"][
        "optional-dependencies"
    ]
    assert extras["triton"][0].startswith(f"triton>={doctor.OLDEST_TRITON};")


def test_a_gpu_without_kernels_is_not_well_and_another_accelerator_is(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = {**fused_optim.config(), "triton": None}
    monkeypatch.setattr(doctor, "SHAPES", ((3,),))

    def examine(cls: type, device: str) -> doctor.Row:
        verdict = None if device == "cpu" else doctor.NO_KERNEL
        return doctor.Row(device, cls.__name__, verdict=verdict)

    monkeypatch.setattr(doctor, "examine", examine)
    for other, status, text in (("cuda:0", 1, "triton>="), ("mps:0", 0, "No kernel serves mps:0")):
        devices = ["cpu", other]
        monkeypatch.setattr(fused_optim, "config", lambda: {**found, "devices": devices})  # noqa: B023
        assert cli.main(["doctor"]) == status
        assert text in capsys.readouterr().out


def test_a_slower_instruction_set_is_named() -> None:
    found = {"isa": "avx2", "isas_available": ["avx512", "avx2"]}
    hint = doctor.slower_isa(found)
    assert hint and "slower than avx512: unset FUSED_OPTIM_ISA" in hint
    assert doctor.slower_isa({**found, "isa": "avx512"}) is None
    assert doctor.slower_isa({"isa": None, "isas_available": []}) is None


def test_it_takes_no_arguments(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main(["doctor", "--quick"])
    assert stopped.value.code == 2
    assert "--quick" in capsys.readouterr().err
