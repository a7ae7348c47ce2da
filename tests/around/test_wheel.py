"""The wheel that `make wheel` has made: what it holds, and that it steps where there is no compiler."""

import os
import subprocess
import sys
import venv
from pathlib import Path
from zipfile import ZipFile

import pytest
import torch

from support.processes import HANG_S

ROOT = Path(__file__).parents[2]
WHEEL = Path(os.environ.get("WHEEL", "none")).absolute()
SOURCES = {
    "fused_optim": ROOT / "fused_optim",
    "fused_optim/triton_kernels": ROOT / "triton_kernels",
}
TAG = f"-cp{sys.version_info.major}{sys.version_info.minor}-"

pytestmark = pytest.mark.skipif(not WHEEL.exists(), reason="needs a wheel: make wheel")


def test_it_holds_the_kernels_the_types_all_modules_and_nothing_else() -> None:
    """What else there might be: an OpenMP runtime of its own, which auditwheel copies unless told."""
    assert "-manylinux_" in WHEEL.name
    names = [file.filename for file in ZipFile(WHEEL).infolist() if not file.is_dir()]
    names = [name for name in names if ".dist-info/" not in name]
    kernels = [
        name for name in names if name.startswith("fused_optim/_C.") and name.endswith(".so")
    ]
    assert len(kernels) == 1, names
    modules = {
        f"{package}/{file.relative_to(folder)}"
        for package, folder in SOURCES.items()
        for file in folder.rglob("*.py")
    }
    report = {"fused_optim/bench/report.css", "fused_optim/bench/report.html.j2"}
    data = {"fused_optim/py.typed", "fused_optim/_C.pyi"}
    assert set(names) == {*modules, *report, *data, *kernels}


PROGRAM = """
import importlib.metadata, shutil, sys
import torch
import fused_optim
from fused_optim.optimizers import OPTIMIZERS

assert fused_optim.__file__.startswith(sys.prefix), fused_optim.__file__
assert not any(map(shutil.which, ("c++", "g++", "clang++", "cc", "gcc", "clang")))
for name, cls in OPTIMIZERS.items():
    param = torch.nn.Parameter(torch.ones(33))
    param.grad = torch.ones(33)
    optimizer = cls([param], lr=0.5)
    optimizer.step()
    assert optimizer.last_step.tensors == {"cpu": 1}, (name, optimizer.last_step)
    assert (param != 1).all(), name
(command,) = importlib.metadata.entry_points(group="console_scripts", name="fused-optim")
command.load()
"""


@pytest.mark.skipif(TAG not in WHEEL.name, reason="needs a wheel for this Python: make torch")
def test_it_steps_in_a_bare_environment_without_a_compiler(tmp_path: Path) -> None:
    """Beside the torch that runs this test."""
    venv.create(tmp_path, symlinks=True)
    (packages,) = tmp_path.glob("lib/python*/site-packages")
    bare = str(tmp_path / "bin/python")

    def run(*command: str) -> None:
        done = subprocess.run(
            command,
            env={"PATH": str(tmp_path / "bin")},
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=HANG_S,
        )
        assert done.returncode == 0, done.stdout + done.stderr

    install = ("install", "--no-deps", "--no-index", "--disable-pip-version-check", str(WHEEL))
    run(sys.executable, "-m", "pip", "--python", bare, *install)
    (packages / "torch.pth").write_text(f"{Path(torch.__file__).parents[1]}\n")
    run(bare, "-c", PROGRAM)
