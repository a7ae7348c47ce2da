"""python -m fused_optim run: a program that knows nothing of us, in processes of their own."""

import json
import os
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import pytest

from fused_optim.cli import main
from support.cases import OF_TORCH
from support.marks import needs_cpu_kernels
from support.processes import HANG_S

pytestmark = needs_cpu_kernels

RUN = ("-m", "fused_optim", "run")

TRAINS = """
import atexit, inspect, json, pickle, sys
import torch
from torch.optim import AdamW

def of_main(): pass
atexit.register(lambda: print("at exit", pickle.loads(pickle.dumps(of_main)) is of_main))

class Shared(torch.optim.Adam):
    pass

class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.weights = torch.nn.ParameterList(torch.ones(3) for _ in range(4))
        self.rotation = torch.nn.Parameter(torch.ones(3, dtype=torch.complex64))

net = Net()
optimizers = [AdamW(net.parameters()), torch.optim.AdamW(net.weights[:2]), Shared(net.weights)]
for _ in range(3):
    for p in net.parameters():
        p.grad = torch.ones_like(p)
    for optimizer in optimizers:
        optimizer.step()
print(json.dumps({
    "argv": sys.argv,
    "path": sys.path[0],
    "file": __file__,
    "name": __name__,
    "spec": __spec__,
    "package": __package__,
    "globals": sorted(globals()),
    "main": sys.modules["__main__"].__dict__ is globals(),
    "classes": [f"{type(o).__module__}.{type(o).__name__}" for o in optimizers],
    "fused": "fused" in inspect.signature(AdamW).parameters,
    "isinstance": all(isinstance(o, torch.optim.Adam) for o in optimizers),
    "exp_avg": str(optimizers[0].state[net.weights[0]]["exp_avg"].dtype),
}))
sys.exit(7)
"""


def python(*args: object, cwd: Path, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *map(str, args)],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=HANG_S,
        env={**os.environ, **env},
    )


def both(
    *args: object, cwd: Path, **env: str
) -> tuple[subprocess.CompletedProcess[str], subprocess.CompletedProcess[str]]:
    """As `python ARGS` does it, and as we do."""
    return python(*args, cwd=cwd, **env), python(*RUN, *args, cwd=cwd, **env)


def reports(stderr: str) -> list[str]:
    return [line for line in stderr.splitlines() if line.startswith("fused_optim")]


def without_reports(stderr: str) -> str:
    return "".join(
        line for line in stderr.splitlines(keepends=True) if not line.startswith("fused_optim")
    )


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory):
    """One script run by Python and by us, through a link, with arguments that look like ours."""
    folder = tmp_path_factory.mktemp("program")
    (folder / "real").mkdir()
    (folder / "real" / "train.py").write_text(TRAINS)
    (folder / "train.py").symlink_to(folder / "real" / "train.py")
    return both("train.py", "--quiet", "--", "-m", "x y", "", cwd=folder)


def test_program_finds_what_it_finds_in_python(trained) -> None:
    plain, ours = trained
    found, expected = (json.loads(done.stdout.splitlines()[0]) for done in (ours, plain))
    assert found.pop("classes") == ["fused_optim.adamw.AdamW"] * 2 + ["__main__.Shared"]
    assert expected.pop("classes") == ["torch.optim.adamw.AdamW"] * 2 + ["__main__.Shared"]
    for seen in (
        found,
        expected,
    ):  # Python has an empty dict of annotations ready, or not: releases differ
        seen["globals"] = [key for key in seen["globals"] if key != "__annotations__"]
    assert found == expected
    assert found["argv"] == ["train.py", "--quiet", "--", "-m", "x y", ""]
    assert ours.stdout.splitlines()[1:] == plain.stdout.splitlines()[1:] == ["at exit True"]


def test_exit_status_is_the_programs(trained) -> None:
    plain, ours = trained
    assert plain.returncode == ours.returncode == 7


def test_report_says_what_ran_where(trained) -> None:
    _, ours = trained
    lines = reports(ours.stderr)
    assert lines == ours.stderr.splitlines()
    assert re.fullmatch(
        r"fused_optim: 2 AdamW: 6 steps, [\d.e-]+ s in step\(\), [\d.e-]+ ms each", lines[0]
    )
    share = re.fullmatch(
        r"fused_optim: step\(\) took ([\d.e-]+)% of the whole ([\d.e-]+) s", lines[3]
    )
    assert share
    seconds = float(re.findall(r"([\d.e-]+) s in step", lines[0])[0])
    # Each of the three numbers is printed with three digits, so is off by half a percent at most.
    assert float(share[1]) == pytest.approx(100 * seconds / float(share[2]), rel=0.0152)
    # 4 of one optimizer and 2 of the other, in 3 steps each.
    assert lines[1:] == [
        "fused_optim:   tensors in a step: 3 on CPU kernels, 0.5 by torch.optim's code",
        "fused_optim:   1 tensor by torch.optim's code: a complex tensor",
        lines[3],
        "fused_optim: Shared derives from torch.optim.Adam and keeps its step",
    ]


FAILS = """
import sys
def inner(): raise {error}
try:
    {{}}["key"]
except KeyError:
    inner()
"""


@pytest.mark.parametrize("error", ["KeyboardInterrupt", "ImportError('no')"])
def test_exceptions_end_the_program_as_in_python(error: str, tmp_path: Path) -> None:
    (tmp_path / "fails.py").write_text(FAILS.format(error=error))
    plain, ours = both("fails.py", cwd=tmp_path)
    assert ours.returncode == plain.returncode != 0
    assert "During handling" in plain.stderr
    assert without_reports(ours.stderr) == plain.stderr
    (report,) = reports(ours.stderr)
    served = re.fullmatch(r"fused_optim: no step of (.+) or (\w+) in this process", report)
    assert served
    assert sorted([*served[1].split(", "), served[2]]) == OF_TORCH


def test_syntax_errors_and_hooks_of_the_program(tmp_path: Path) -> None:
    (tmp_path / "broken.py").write_text("x = = 1\n")
    plain, ours = both("broken.py", cwd=tmp_path, RANK="1", WORLD_SIZE="2")
    assert ours.returncode == plain.returncode == 1
    assert reports(ours.stderr)[0].startswith("fused_optim [rank 1]: no step")
    assert without_reports(ours.stderr) == plain.stderr
    (tmp_path / "hooked.py").write_text(
        "import sys, traceback\n"
        "sys.excepthook = lambda t, e, tb: print(t, [f.name for f in traceback.extract_tb(tb)])\n"
        "1 / 0\n"
    )
    plain, ours = both("hooked.py", cwd=tmp_path)
    assert ours.returncode == plain.returncode == 1
    assert ours.stdout == plain.stdout == "<class 'ZeroDivisionError'> ['<module>']\n"


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("packages")
    (folder / "train").mkdir()
    (folder / "train" / "__init__.py").touch()
    (folder / "train" / "helper.py").touch()
    (folder / "train" / "__main__.py").write_text(
        "import sys\n"
        "if __package__: from . import helper\n"
        "else: import helper\n"
        "print(sys.argv, sys.path[0], __name__, __file__, __package__, __spec__ and __spec__.name)\n"
        "raise ValueError\n"
    )
    return folder


@pytest.mark.parametrize("args", [("-m", "train"), ("train",)])
def test_modules_and_folders_run_as_in_python(args: tuple[str, ...], package: Path) -> None:
    plain, ours = both(*args, "-m", "--help", cwd=package)
    assert "['" in plain.stdout
    assert ours.stdout == plain.stdout
    assert ours.returncode == plain.returncode == 1
    last = [done.stderr.splitlines()[-3:] for done in (plain, ours)]
    assert "fused_optim/cli" not in ours.stderr
    assert [line for line in last[1] if not line.startswith("fused_optim")] == last[0][-2:]


def test_a_module_that_is_not_there(package: Path) -> None:
    plain, ours = both("-m", "no_such_module", cwd=package)
    assert ours.returncode == plain.returncode == 1
    assert without_reports(ours.stderr) == plain.stderr


CODE = """
import json, sys
import torch
optimizer = torch.optim.SGD([torch.ones(1)])
names = sorted(globals())
print(json.dumps([sys.argv, sys.path[0], __name__, __spec__, str(__loader__), names]))
def inner(): raise KeyError(optimizer.defaults["lr"])
inner()
"""


def test_code_runs_as_in_python(tmp_path: Path) -> None:
    plain, ours = both("-c", CODE, "-c", "--quiet", "--", "--help", "", cwd=tmp_path)
    found, expected = (json.loads(done.stdout) for done in (ours, plain))
    for seen in (found, expected):  # an empty dict of annotations is there or not: releases differ
        seen[-1] = [key for key in seen[-1] if key != "__annotations__"]
    assert found == expected
    assert found[0] == ["-c", "-c", "--quiet", "--", "--help", ""]
    assert ours.returncode == plain.returncode == 1
    assert "KeyError: 0.001" in plain.stderr
    assert without_reports(ours.stderr) == plain.stderr


@pytest.mark.parametrize(
    ("args", "error"),
    [
        ((), "what to run is missing: a script or a folder, -m MODULE or -c CODE"),
        (("--quiet",), "what to run is missing: a script or a folder, -m MODULE or -c CODE"),
        (("-m",), "-m needs the name of a module"),
        (("-c",), "-c needs the code to run"),
        (("-m", "-c", "x"), "not allowed with argument"),
        (("--compare", "--quiet", "-c", "1 / 0"), "--quiet: not allowed with argument --compare"),
        (("no_such.py",), "No such file or directory: 'no_such.py'"),
        (("--state-dtype", "int4", "-c", "1 / 0"), "invalid choice: 'int4'"),
        (("--max-grad-norm", "-1", "-c", "1 / 0"), "Invalid max_grad_norm: -1.0; it must be > 0"),
        (("--max-grad-norm", "nan", "-c", "1 / 0"), "Invalid max_grad_norm: nan; it must be > 0"),
        (("--ema-decay", "1", "-c", "1 / 0"), "Invalid ema_decay: 1.0; it must be in [0, 1)"),
        (("--ema-decay", "x", "-c", "1 / 0"), "argument --ema-decay: invalid float value: 'x'"),
    ],
)
def test_bad_arguments(
    args: tuple[str, ...], error: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["run", *args])
    assert caught.value.code == 2
    said = capsys.readouterr().err
    assert "usage: python -m fused_optim run [OPTIONS] (PROGRAM | -m MODULE | -c CODE)" in said
    assert error in said


def test_help_says_what_int8_checkpoints_are(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["run", "--help"])
    said = " ".join(capsys.readouterr().out.split())
    assert "int8 states is not one that torch.optim loads" in said
    assert "state_dict_for_stock() gives one" in said


def test_options_are_those_of_patch(tmp_path: Path) -> None:
    code = (
        "import torch\n"
        "for name in ('Adam', 'SGD'):\n"
        "    o = getattr(torch.optim, name)([torch.ones(1)])\n"
        "    print(o.max_grad_norm, o.skip_nonfinite, o.param_groups[0]['ema_decay'])\n"
    )
    options = ("--max-grad-norm", "0.5", "--ema-decay", "0.9", "--skip-nonfinite")
    done = python(*RUN, *options, "-c", code, "--max-grad-norm", "7", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "0.5 True 0.9\n" * 2


def test_quiet_and_state_dtype(trained, tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text(TRAINS)
    done = python(*RUN, "--quiet", "--state-dtype", "bfloat16", "train.py", cwd=tmp_path)
    assert done.returncode == 7
    assert done.stderr == ""
    assert json.loads(done.stdout.splitlines()[0])["exp_avg"] == "torch.bfloat16"
    assert json.loads(trained[1].stdout.splitlines()[0])["exp_avg"] == "torch.float32"


STARTS_OTHERS = """
import multiprocessing, os, sys
import torch

def train(n_steps):
    p = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.SGD([p])
    for _ in range(n_steps):
        p.grad = torch.ones_like(p)
        optimizer.step()

def start(context, n_steps):
    process = context.Process(target=train, args=(n_steps,))
    process.start()
    process.join()
    assert process.exitcode == 0

if __name__ == "__main__":
    train(1)
    start(multiprocessing.get_context("fork"), 2)
    start(multiprocessing.get_context("spawn"), 3)
    start(multiprocessing.get_context("fork"), 0)
    if os.fork() == 0:
        train(4)
        sys.exit()
    os.wait()
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_every_process_that_stepped_says_so_once(tmp_path: Path) -> None:
    (tmp_path / "starts.py").write_text(STARTS_OTHERS)
    done = python(*RUN, "starts.py", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    counts = re.findall(r"^(fused_optim.*): SGD: (\d+) step", done.stderr, re.MULTILINE)
    assert [n for _, n in counts] == ["2", "3", "4", "1"]
    assert [bool(re.fullmatch(r"fused_optim \[process \d+\]", who)) for who, _ in counts] == [
        True,
        True,
        True,
        False,
    ]


def test_skipped_steps_closures_and_all_classes_are_counted(tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text(
        "import itertools, time, torch\n"
        # The clock goes on by a second whenever it is read, and by a thousand in a closure.
        "clock = itertools.count()\n"
        "time.perf_counter = lambda: float(next(clock))\n"
        f"for name in {OF_TORCH!r}:\n"
        "    p = torch.nn.Parameter(torch.ones(3))\n"
        "    optimizer = getattr(torch.optim, name)([p], skip_nonfinite=True)\n"
        "    def closure():\n"
        "        for _ in range(1000): next(clock)\n"
        "        p.grad = torch.ones(3)\n"
        "        return 1.0\n"
        "    assert optimizer.step(closure) == 1.0\n"
        "    p.grad = torch.full((3,), float('nan'))\n"
        "    optimizer.step()\n"
        "    optimizer.zero_grad()\n"
        "    optimizer.step()\n"
    )
    done = python(*RUN, "train.py", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    lines = reports(done.stderr)[:-1]
    assert len(lines) == 2 * len(OF_TORCH)
    counts = "3 steps, 1 of them skipped, 1 of them without grads"
    for name, line in zip(OF_TORCH, lines[::2]):
        found = re.match(rf"fused_optim: {name}: {counts}, ([\d.e-]+) s", line)
        assert found, line
        assert 0 < float(found[1]) < 1000
    assert set(lines[1::2]) == {
        "fused_optim:   tensors in a step: 1 on CPU kernels, 0 by torch.optim's code"
    }


OTHERS = """
import multiprocessing
import torch
from torch.optim import LBFGS, SGD, Muon, Optimizer, SparseAdam
import elsewhere, fused_optim

def params():
    return [torch.nn.Parameter(torch.ones(2))]

class Own(Optimizer):
    pass

class Shared(SGD):
    pass

class Ours(fused_optim.SGD):
    pass

class Wrapper(Optimizer):
    def __init__(self, held):
        self.held = held

class AlsoMadeOne(Optimizer):
    def __init__(self, params):
        super().__init__(params, {})
        self.held = [SGD(params)]

def others():
    return [SparseAdam(params()), SparseAdam(params()), Own(params(), {}), elsewhere.Derived(params())]

made = others()
for refused in (lambda: Muon(params()), lambda: LBFGS([]), lambda: elsewhere.Prodigy(params(), lr=-1)):
    try:
        made.append(refused())
    except ValueError:
        pass
made += [Shared(params()), Ours(params()), Wrapper(SGD(params())), AlsoMadeOne(params())]
made[-2].held.step()
assert [len(o.param_groups) for o in made[:4]] == [1] * 4
process = multiprocessing.get_context("fork").Process(target=others)
process.start()
process.join()
Muon(params())
"""

ELSEWHERE = """
from torch.optim import Optimizer

class Prodigy(Optimizer):
    def __init__(self, params, lr=1.0):
        super().__init__(params, {"lr": lr})
        if lr < 0:
            raise ValueError("lr")

class Derived(Prodigy):
    def __init__(self, params):
        super().__init__(params)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_what_is_not_served_is_named(tmp_path: Path) -> None:
    """Not what a constructor refused, even the last one, nor wrappers; and each process names its own."""
    (tmp_path / "train.py").write_text(OTHERS)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "__init__.py").write_text(
        "from .optimizers import Derived, Prodigy\n"
    )
    (tmp_path / "elsewhere" / "optimizers.py").write_text(ELSEWHERE)
    done = python(*RUN, "train.py", cwd=tmp_path)
    assert done.returncode == 1
    assert "ValueError: Muon only supports 2D" in done.stderr, done.stderr
    of_child, of_main = (
        [line.split(": ", 1)[1] for line in reports(done.stderr) if ("process" in line) is of_child]
        for of_child in (True, False)
    )
    named = [
        "2 SparseAdam of torch.optim, not served",
        "1 Own of the program, not served",
        "1 Derived of elsewhere, not served",
    ]
    assert of_main[-4:] == ["Shared derives from torch.optim.SGD and keeps its step", *named]
    assert of_main[0].startswith("SGD: 1 step")
    assert of_child[0].startswith("no step of Adam")
    assert of_child[-3:] == named


def test_console_script_is_the_same_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    project = (Path(__file__).resolve().parents[2] / "pyproject.toml").read_text()
    entry = re.search(r'\[project\.scripts\]\nfused-optim = "(.+)"', project)
    assert entry
    assert callable(pkgutil.resolve_name(entry[1]))
    module, function = entry[1].split(":")
    (tmp_path / "bin").mkdir()
    script = tmp_path / "bin" / "fused-optim"
    script.write_text(f"import sys\nfrom {module} import {function}\nsys.exit({function}())\n")
    (tmp_path / "fails.py").write_text("import sys\nprint(sys.path[0], sys.argv)\n1 / 0\n")
    plain = python("fails.py", "a", cwd=tmp_path)
    ours = python(script, "run", "fails.py", "a", cwd=tmp_path)
    assert ours.stdout == plain.stdout
    assert ours.returncode == plain.returncode == 1
    assert without_reports(ours.stderr) == plain.stderr
    monkeypatch.setattr(sys, "argv", [str(script)])
    with pytest.raises(SystemExit):
        main(["run", "--help"])
    assert "usage: fused-optim run" in capsys.readouterr().out
